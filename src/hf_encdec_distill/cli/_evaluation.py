"""Quality of models on held-out rows: cross-entropy and closeness to the teacher from logits, texts from generation.

A row is a dict with the texts `source` and `target`, the token ids of the teacher's `prompt`, of `inputs` (what an
encoder reads of it) and of `labels` (the target with its EOS). Sums are kept row by row, so that two models can be
compared on the same rows and the spread of their difference be drawn from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from ..distillation.alignment import IGNORED
from ..distillation.losses import cross_entropy, forward_kl
from ..distillation.sequence_level import generate_tokens
from ..models.prompts import encode_prompt


Update = Callable[[float, str], None]
BATCH_SIZE = 16
_RESAMPLES = 2000


def encode_rows(
    pairs: Iterable[Mapping[str, str]], tokenizer, prompt_template: str | None, max_prompt: int, max_target: int
) -> list[dict]:
    """Texts `source` and `target` -> rows for a decoder-only model, whose tokenizer it is, and a merged student."""
    rows = []
    for pair in pairs:
        prompt = encode_prompt(tokenizer, pair["source"], prompt_template, max_prompt)
        labels = tokenizer(pair["target"], add_special_tokens=False)["input_ids"][:max_target]
        rows.append(
            {
                "source": pair["source"],
                "target": pair["target"],
                "prompt": prompt,
                "inputs": prompt[:-1],
                "labels": [*labels, tokenizer.eos_token_id],
            }
        )
    return rows


def pad(lists: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
    """Ragged rows -> one integer tensor."""
    width = max(map(len, lists))
    fill = [[value] * (width - len(row)) for row in lists]
    return torch.tensor([[*f, *row] if left else [*row, *f] for f, row in zip(fill, lists, strict=True)])


def _batches(rows: Sequence[dict], update: Update, what: str) -> Iterable[tuple[list[int], list[dict]]]:
    """Indices and rows of batches of similar length, the longest first: what fails for memory fails at once."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["prompt"]))
    for first in range(0, len(order), BATCH_SIZE):
        indices = order[first : first + BATCH_SIZE]
        yield indices, [rows[index] for index in indices]
        done = first + len(indices)
        update(done / len(order), f"{what}: {done} of {len(order)} rows")


def completion_batch(rows: Sequence[dict], pad_token_id: int = 0) -> dict:
    """What a decoder-only model reads of rows: `prompt + labels`, padded on the left, so that targets end together.

    Then the head is needed at the last columns only, which every causal model of transformers takes as a number,
    `logits_to_keep`: at prompt lengths of hundreds it would cost more than half of a training step. With T labels in
    the longest row, `labels` is `[B, T]` and the logits are `[B, T + 1, V]`, column t predicting label t.
    """
    ids = [row["prompt"] + row["labels"] for row in rows]
    labels = pad([row["labels"] for row in rows], IGNORED, left=True)
    mask = pad([[1] * len(row) for row in ids], 0, left=True)
    return {
        "input_ids": pad(ids, pad_token_id, left=True),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "labels": labels,
        "logits_to_keep": labels.shape[1] + 1,
    }


def _logits(model, rows: Sequence[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[N, V]` at the N target tokens of a batch, row after row, and the labels `[N]`."""
    if model.config.is_encoder_decoder:
        labels = pad([row["labels"] for row in rows], IGNORED).to(model.device)
        ids = pad([row["inputs"] for row in rows], 0).to(model.device)
        mask = pad([[1] * len(row["inputs"]) for row in rows], 0).to(model.device)
        decoder_ids = model.prepare_decoder_input_ids_from_labels(labels=labels)
        outputs = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False)
        logits = outputs.logits
    else:
        batch = completion_batch(rows)
        keep = batch.pop("logits_to_keep")
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch, logits_to_keep=keep, use_cache=False).logits[:, :-1]
    targets = labels != IGNORED
    return logits[targets], labels[targets]


@torch.inference_mode()
def score(
    models: Mapping[str, torch.nn.Module], rows: Sequence[dict], teacher=None, update: Update = lambda *_: None
) -> dict[str, dict[str, np.ndarray]]:
    """Sums over the target tokens of each row, for each model.

    Args:
        models: encoder-decoders or decoder-only models, in evaluation mode.
        teacher: decoder-only model to compare with; its logits are computed once for all models.

    Returns:
        For each model `ce` and, with a teacher, `kl` (teacher to model, nats) and `teacher_agreement` (tokens where
        both put the same id first), each `[rows]`.
    """
    names = ("ce", "kl", "teacher_agreement") if teacher is not None else ("ce",)
    sums = {name: {measure: np.zeros(len(rows)) for measure in names} for name in models}
    for indices, batch in _batches(rows, update, "scoring"):
        owner = torch.repeat_interleave(torch.tensor([len(row["labels"]) for row in batch]))
        theirs = None if teacher is None else _logits(teacher, batch)[0].float()
        for name, model in models.items():
            ours, labels = _logits(model, batch)
            per_token = {"ce": cross_entropy(ours, labels)}
            if theirs is not None:
                size = min(ours.shape[-1], theirs.shape[-1])  # padded vocabulary rows that only one side has
                ours, shared = ours[:, :size], theirs[:, :size]
                per_token["kl"] = forward_kl(ours, shared)
                per_token["teacher_agreement"] = (ours.argmax(-1) == shared.argmax(-1)).float()
            for measure, values in per_token.items():
                by_row = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, owner, values.cpu().double())
                sums[name][measure][indices] = by_row.numpy()
    return sums


def generate(
    model, tokenizer, rows: Sequence[dict], max_new_tokens: int, update: Update = lambda *_: None
) -> list[str]:
    """Greedy answers of an encoder-decoder or a decoder-only model, in the order of the rows."""
    answers = [""] * len(rows)
    side = "inputs" if model.config.is_encoder_decoder else "prompt"
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    options["eos_token_id"] = tokenizer.eos_token_id
    for indices, batch in _batches(rows, update, "generating"):
        tokens = generate_tokens(model, [row[side] for row in batch], tokenizer.pad_token_id, **options)
        for index, text in zip(indices, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
            answers[index] = text.strip()
    return answers


def interval(sums: np.ndarray, weights: np.ndarray, seed: int = 0) -> dict[str, float]:
    """`sum(sums) / sum(weights)` over rows, with the 95 % interval of a bootstrap over the rows.

    Args:
        sums, weights: `[rows]` each; for a difference of two models `sums` is the difference of theirs.
    """
    drawn = np.random.default_rng(seed).integers(len(sums), size=(_RESAMPLES, len(sums)))
    value = float(sums.sum() / weights.sum())
    low, high = np.percentile(sums[drawn].sum(axis=1) / weights[drawn].sum(axis=1), [2.5, 97.5])
    # A value outside its own percentile interval happens for constant rows, by rounding.
    return {"value": value, "low": min(float(low), value), "high": max(float(high), value)}


def p_value(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of "the sign of each row's difference is a coin toss", `[rows]`: a paired permutation test.

    Of `_RESAMPLES` random flips the share whose sum is at least as far from 0, the one observed among them (Phipson
    and Smyth 2010), so never below 1 / (`_RESAMPLES` + 1).
    """
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(_RESAMPLES, len(differences)))
    # What rounding makes of equal sums must not count as smaller.
    as_far = np.abs(signs @ differences) >= abs(differences.sum()) * (1 - 1e-9)
    return float((as_far.sum() + 1) / (_RESAMPLES + 1))
