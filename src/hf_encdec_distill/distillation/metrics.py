"""How good generated text is: ROUGE, exact matches, and how much of it differs from row to row.

ROUGE alone misleads: one constant sentence scores 0.18 on the built-in task. The share of distinct outputs stands
beside it and unmasks that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import datasets
import evaluate
import numpy as np


if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedTokenizerBase

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F1 of one text, 0 to 1: words lowercased and stemmed, longest common subsequence (Lin, 2004).

    Raises:
        ImportError: `rouge-score` is missing.
    """
    return _scorer(("rougeL",)).score(reference, prediction)["rougeL"].fmeasure


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Means over the texts of `rouge1`, `rouge2` and `rougeL` F1, 0 to 1.

    Raises:
        ImportError: `rouge-score` is missing.
        ValueError: there are no texts, or the two differ in number.
    """
    _check_lengths(predictions, references)
    scorer = _scorer(ROUGE_TYPES)
    scores = [scorer.score(b, a) for a, b in zip(predictions, references, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGE_TYPES}


def distinct_share(predictions: Sequence[str]) -> float:
    """Distinct texts divided by texts, white space aside: 1 if no output repeats, 1/n if the model has one answer.

    Raises:
        ValueError: there are no texts.
    """
    _check_lengths(predictions, predictions)
    return len({" ".join(text.split()) for text in predictions}) / len(predictions)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions equal to their reference, white space aside.

    Raises:
        ValueError: there are no texts, or the two differ in number.
    """
    _check_lengths(predictions, references)
    same = [a.split() == b.split() for a, b in zip(predictions, references, strict=True)]
    return sum(same) / len(same)


@cache
def _scorer(rouge_types: tuple[str, ...]):
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(
            'ROUGE needs rouge-score: pip install "hf-encdec-distill[demo]" (or pip install rouge-score)'
        ) from error
    # With the Porter stemmer, as summarisation papers and transformers' examples report it.
    return RougeScorer(list(rouge_types), use_stemmer=True)


def _check_lengths(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) == 0 or len(predictions) != len(references):
        raise ValueError(
            f"Got {len(predictions)} predictions and {len(references)} references: expected equally many, at least one"
        )


class _TextMetric(evaluate.Metric):
    """A metric of texts that works offline: `evaluate.load` asks the Hub for a script, its base class asks nobody."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            features=datasets.Features({"predictions": text, "references": text}),
        )


class Rouge(_TextMetric):
    """Means of ROUGE-1, ROUGE-2 and ROUGE-L F1 over the texts, 0 to 1: `Rouge().compute(predictions=, references=)`.

    What `evaluate.load("rouge")` calls by the same names with `use_stemmer=True`.
    """

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return rouge(predictions, references)


class ExactMatch(_TextMetric):
    """Share of predictions equal to their reference, white space aside."""

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {"exact_match": exact_match(predictions, references)}


class DistinctShare(_TextMetric):
    """Share of predictions that are distinct; the references are only counted."""

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {"distinct": distinct_share(predictions)}


def generation_metrics(
    tokenizer: PreTrainedTokenizerBase, decoder_start_token_id: int | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for `Seq2SeqTrainer` with `predict_with_generate=True`.

    The function takes predictions (rows, generated tokens) and labels (rows, target tokens), both padded with -100 or
    the pad token, and returns `rouge1 rouge2 rougeL exact_match distinct` (0 to 1) and `generated_tokens`, the mean
    number without pads and special tokens.

    Args:
        tokenizer: the student's.
        decoder_start_token_id: what `generate` puts in front of every prediction. A `merged` student starts with an
            ordinary token, which decoding would not drop; special ones (T5's pad) need not be named.

    Raises:
        ValueError: the tokenizer has neither pad nor EOS; and, by the function that is returned, predictions are
            logits, since `predict_with_generate` is off.
    """
    # -100 is no token id. What is put in its place is dropped in decoding, as a pad or another special token is.
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if filler is None:
        raise ValueError("The tokenizer has neither pad_token nor eos_token: give it one, tokenizer.pad_token = ...")

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predicted = prediction.predictions
        predicted = np.asarray(predicted[0] if isinstance(predicted, tuple) else predicted)
        if predicted.ndim != 2:
            raise ValueError(
                f"Predictions of shape {predicted.shape}, expected (rows, tokens): set predict_with_generate=True"
            )
        if decoder_start_token_id is not None and (predicted[:, 0] == decoder_start_token_id).all():
            predicted = predicted[:, 1:]
        predicted, labels = (np.where(ids < 0, filler, ids) for ids in (predicted, np.asarray(prediction.label_ids)))
        texts, references = (
            [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
            for ids in (predicted, labels)
        )
        tokens = ~np.isin(predicted, tokenizer.all_special_ids)
        return {
            **rouge(texts, references),
            "exact_match": exact_match(texts, references),
            "distinct": distinct_share(texts),
            "generated_tokens": float(tokens.sum(axis=1).mean()),
        }

    return compute_metrics
