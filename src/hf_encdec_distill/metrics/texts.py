"""How good generated text is: ROUGE, SQuAD's exact match and F1, BLEU, chrF, and how much differs from row to row.

ROUGE alone misleads: one constant sentence scores 0.18 on the built-in task. The share of distinct outputs stands
beside it and unmasks that. `rouge_l`, `exact_match` and `f1` are of one text; `rouge`, `squad`, `bleu` and `chrf` are
of many and return a dict, as do the subclasses of `evaluate.Metric`, which work offline: `evaluate.load` asks the Hub.
"""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import datasets
import evaluate
import numpy as np


if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

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
    warn_of_other_scripts(references)
    scorer = _scorer(ROUGE_TYPES)
    scores = [scorer.score(b, a) for a, b in zip(predictions, references, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGE_TYPES}


def warn_of_other_scripts(references: Sequence[str]) -> None:
    """ROUGE's words are of Latin letters and digits, so that it gives 0 for all texts in other scripts."""
    without = in_other_scripts(references)
    if 2 * without > len(references):
        logger.warning(
            "%d of %d references have no Latin letter and no digit, and ROUGE counts nothing else: it is 0 for them. "
            "Take chrf (--metrics chrf), which counts characters of any script.",
            without,
            len(references),
        )


def in_other_scripts(references: Sequence[str]) -> int:
    """How many of them ROUGE gives 0 whatever the answer: those without a Latin letter and without a digit."""
    return sum(re.search("[a-z0-9]", text.lower()) is None for text in references if text.strip())


def distinct_share(predictions: Sequence[str]) -> float:
    """Distinct texts divided by texts, white space aside: 1 if no output repeats, 1/n if the model has one answer.

    Raises:
        ValueError: there are no texts.
    """
    _check_lengths(predictions, predictions)
    return len({" ".join(text.split()) for text in predictions}) / len(predictions)


def normalize_answer(text: str) -> str:
    """What SQuAD's evaluation compares: lower case, without punctuation, articles and needless white space.

    `evaluate-v1.1.py` of SQuAD (arXiv 1606.05250). It is made for answers in English; out of code it takes operators.
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, reference: str | Sequence[str]) -> float:
    """1 if one text is its reference, or one of several, after `normalize_answer`; else 0."""
    return float(any(normalize_answer(prediction) == normalize_answer(text) for text in _several(reference)))


def f1(prediction: str, reference: str | Sequence[str]) -> float:
    """F1 of the words of one text after `normalize_answer`, 0 to 1; of several references the best counts.

    Two texts of which nothing is left are equal, as in SQuAD 2.0's script; 1.1's gives them 0.
    """
    return max(
        _word_f1(normalize_answer(prediction).split(), normalize_answer(x).split()) for x in _several(reference)
    )


def _word_f1(prediction: list[str], reference: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(reference)).values())
    return 2 * common / (len(prediction) + len(reference)) if prediction or reference else 1.0


def squad(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Means over the texts of `exact_match` and `f1`, 0 to 1 (SQuAD's script multiplies by 100).

    Raises:
        ValueError: there are no texts, the two differ in number, or a text has no reference.
    """
    _check_lengths(predictions, references)
    pairs = list(zip(predictions, references, strict=True))
    return {score.__name__: float(np.mean([score(*pair) for pair in pairs])) for score in (exact_match, f1)}


def bleu(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """`bleu` of the whole set, 0 to 100: sacrebleu's default, `corpus_bleu` (case kept, tokenizer 13a, 4-grams).

    Post, 2018 (arXiv 1804.08771). It is no mean over texts, and sets that share few 4-grams are near 0.

    Raises:
        ImportError: `sacrebleu` is missing.
        ValueError: there are no texts, the two differ in number, or a text has no reference.
    """
    return _corpus_score("bleu", predictions, references)


def chrf(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """`chrf` of the whole set, 0 to 100: sacrebleu's default, `corpus_chrf` (chrF2, character 6-grams).

    Popovic, 2015 (aclanthology W15-3049). It needs no tokenizer and suits code and languages without spaces.

    Raises:
        As of `bleu`.
    """
    return _corpus_score("chrf", predictions, references)


def text_statistics(
    name: str, predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray], str]:
    """What `bleu` or `chrf` is made of, so that it can be taken of any draw of the texts.

    Returns:
        Counts of each text, `[texts, K]`; the function that makes sums of them, `[..., K]`, the scores `[...]`; and
        sacrebleu's signature, which says all settings and its version.

    Raises:
        As of `bleu`.
    """
    _check_lengths(predictions, references)
    metric = _sacrebleu(name)
    streams = list(zip_longest(*map(_several, references)))  # None where a text has fewer references than another
    # Names with an underscore, for which sacrebleu has no public ones: its own significance tests are made of them.
    counts = np.array(metric._extract_corpus_statistics(predictions, streams))

    def scores(sums: np.ndarray) -> np.ndarray:
        return np.apply_along_axis(lambda row: metric._compute_score_from_stats(row).score, -1, sums)

    return counts, scores, str(metric.get_signature())


def _corpus_score(name: str, predictions, references) -> dict[str, float]:
    counts, scores, _ = text_statistics(name, predictions, references)
    return {name: float(scores(counts.sum(axis=0)))}


def _sacrebleu(name: str):
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise ImportError(
            'BLEU and chrF need sacrebleu: pip install "hf-encdec-distill[demo]" (or pip install sacrebleu)'
        ) from error
    return {"bleu": BLEU, "chrf": CHRF}[name]()


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


def _check_lengths(predictions: Sequence[str], references: Sequence) -> None:
    if len(predictions) == 0 or len(predictions) != len(references):
        raise ValueError(
            f"Got {len(predictions)} predictions and {len(references)} references: expected equally many, at least one"
        )


def _several(reference: str | Sequence[str]) -> Sequence[str]:
    references = [reference] if isinstance(reference, str) else reference
    if len(references) == 0:
        raise ValueError("A text has an empty list of references: give it one at least, or leave the text out")
    return references


class _TextMetric(evaluate.Metric):
    """A metric of texts; `several` says that a text may have several references."""

    several = False

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        references = [datasets.Sequence(text), text] if self.several else [text]
        features = [datasets.Features({"predictions": text, "references": column}) for column in references]
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation="", features=features if self.several else features[0]
        )


class Rouge(_TextMetric):
    """Means of ROUGE-1, ROUGE-2 and ROUGE-L F1 over the texts, 0 to 1: `Rouge().compute(predictions=, references=)`.

    What `evaluate.load("rouge")` calls by the same names with `use_stemmer=True`.
    """

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return rouge(predictions, references)


class Squad(_TextMetric):
    """`exact_match` and `f1` as SQuAD takes them, 0 to 1; each reference a text, or each a list of texts.

    What `evaluate.load("squad")` calls by the same names, divided by 100, of bare texts: no ids.
    """

    several = True

    def _compute(self, predictions: Sequence[str], references: Sequence) -> dict[str, float]:
        return squad(predictions, references)


class Bleu(_TextMetric):
    """sacrebleu's `bleu`, 0 to 100; each reference a text, or each a list of texts.

    What `evaluate.load("sacrebleu")` calls `score`.
    """

    several = True

    def _compute(self, predictions: Sequence[str], references: Sequence) -> dict[str, float]:
        return bleu(predictions, references)


class ChrF(_TextMetric):
    """sacrebleu's `chrf`, 0 to 100; each reference a text, or each a list of texts.

    What `evaluate.load("chrf")` calls `score`.
    """

    several = True

    def _compute(self, predictions: Sequence[str], references: Sequence) -> dict[str, float]:
        return chrf(predictions, references)


class DistinctShare(_TextMetric):
    """Share of predictions that are distinct; the references are only counted."""

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {"distinct": distinct_share(predictions)}


def generation_metrics(
    tokenizer: PreTrainedTokenizerBase,
    decoder_start_token_id: int | None = None,
    metrics: Sequence[Callable[..., dict[str, Any]]] = (rouge, squad),
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for `Seq2SeqTrainer` with `predict_with_generate=True`.

    The function takes predictions (rows, generated tokens) and labels (rows, target tokens), both padded with -100 or
    the pad token, and returns what `metrics` give, `distinct` (0 to 1) and `generated_tokens`, the mean number without
    pads and special tokens.

    Args:
        tokenizer: the student's.
        decoder_start_token_id: what `generate` puts in front of every prediction. A `merged` student starts with an
            ordinary token, which decoding would not drop; special ones (T5's pad) need not be named.
        metrics: functions of the texts `predictions` and `references` that return a dict: `rouge`, `squad`, `bleu` and
            `chrf`, or the `compute` of any `evaluate.Metric`. Default: `rouge1 rouge2 rougeL exact_match f1`.

    Raises:
        ValueError: the tokenizer has neither pad nor EOS; and, by the function that is returned, predictions are
            logits, since `predict_with_generate` is off.
    """
    _filler(tokenizer)  # says early what would fail late

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predicted = prediction.predictions
        predicted = np.asarray(predicted[0] if isinstance(predicted, tuple) else predicted)
        if predicted.ndim != 2:
            raise ValueError(
                f"Predictions of shape {predicted.shape}, expected (rows, tokens): set predict_with_generate=True"
            )
        predicted = _written(predicted, tokenizer, decoder_start_token_id)
        texts, references = (decode_texts(ids, tokenizer) for ids in (predicted, np.asarray(prediction.label_ids)))
        tokens = ~np.isin(predicted, tokenizer.all_special_ids)
        return {
            **{
                name: value
                for metric in metrics
                for name, value in metric(predictions=texts, references=references).items()
            },
            "distinct": distinct_share(texts),
            "generated_tokens": float(tokens.sum(axis=1).mean()),
        }

    return compute_metrics


def decode_texts(
    ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, decoder_start_token_id: int | None = None
) -> list[str]:
    """Texts of the `predictions` or `label_ids` that `Seq2SeqTrainer.predict` returns, (rows, tokens).

    Args:
        ids: padded with -100 or the pad token.
        tokenizer, decoder_start_token_id: as of `generation_metrics`.

    Raises:
        ValueError: the tokenizer has neither pad nor EOS.
    """
    ids = _written(ids, tokenizer, decoder_start_token_id)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _written(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, decoder_start_token_id: int | None) -> np.ndarray:
    """Token ids without -100, and without what `generate` puts in front."""
    ids = np.where(ids < 0, _filler(tokenizer), ids)
    if decoder_start_token_id is not None and (ids[:, 0] == decoder_start_token_id).all():
        ids = ids[:, 1:]
    return ids


def _filler(tokenizer: PreTrainedTokenizerBase) -> int:
    """-100 is no token id. What is put in its place is dropped in decoding, as a pad or another special token is."""
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if filler is None:
        raise ValueError("The tokenizer has neither pad_token nor eos_token: give it one, tokenizer.pad_token = ...")
    return filler
