"""Quality of models on held-out rows: cross-entropy and closeness to the teacher from logits, texts from generation.

A row is a dict with the texts `source` and `target`, the token ids of the teacher's `prompt`, of `inputs` (what an
encoder reads of it) and of `labels` (the target with its EOS, or without where it is cut). Sums are kept row by row,
so that two models can be compared on the same rows and the spread of their difference be drawn from them
(`metrics.significance`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..distillation.alignment.positions import IGNORED
from ..distillation.checks.limits import check_rows
from ..distillation.losses import cross_entropy
from ..distillation.teachers.targets import end_tokens, generate_tokens
from ..metrics.measures import OF_TEACHER
from ..models.families import is_merged
from ..models.prompts import encode_prompt, lacks_prompt, no_room
from .fidelity import calibration_gaps, token_calibration, token_fidelity


Update = Callable[[float, str], None]


BATCH_SIZE = 16


def encode_rows(
    pairs: Iterable[Mapping[str, str]],
    tokenizer,
    prompt_template: str | None,
    max_prompt: int,
    max_target: int,
    prompt_date: str | None = None,
) -> list[dict]:
    """Texts `source` and `target` -> rows for a decoder-only model, whose tokenizer it is, and a merged student.

    `labels` are at most `max_target` tokens of the target and its EOS: one that is cut did not end there: it has none.

    Raises:
        ValueError: the tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no eos_token, which has to end a target: set it"
        )
    rows = []
    for pair in pairs:
        prompt = encode_prompt(tokenizer, pair["source"], prompt_template, max_prompt, prompt_date)
        target = tokenizer(pair["target"], add_special_tokens=False)["input_ids"]
        rows.append(
            {
                "source": pair["source"],
                "target": pair["target"],
                "prompt": prompt,
                "inputs": prompt[:-1],
                "labels": [*target, tokenizer.eos_token_id][:max_target],
            }
        )
    return rows


def read_by_encoder(rows: Sequence[dict], tokenizer, config, max_prompt: int) -> None:
    """Put what an encoder-decoder reads by its own `tokenizer` into rows of `encode_rows`.

    A merged student has the prompt template in its tokenizer: a decoder-only model reads what it reads. Where that
    cannot hold the template, the rows have its prompts already.

    Raises:
        ValueError: `max_prompt` leaves no token for the source, or the rows have other prompts than the student, whose
            tokenizer cannot hold its own.
    """
    merged = is_merged(config)
    if lacks_prompt(tokenizer, config):
        start = config.decoder_start_token_id
        if any(row["prompt"][-1:] != [start] for row in rows):
            raise ValueError(
                f"the student's tokenizer cannot hold its prompt, which ends in {tokenizer.decode([start])!r}, and "
                f"{tokenizer.decode(rows[0]['prompt'])!r:.100} is another one: give the prompt template that it was "
                "made with (--prompt-template), or the teacher whose chat template it was (--teacher)"
            )
        return
    length = max_prompt - merged  # the start token is one of the prompt's
    around = len(tokenizer("")["input_ids"])
    if length <= around:
        raise no_room(max_prompt, around + merged)
    for row in rows:
        row["inputs"] = tokenizer(row["source"], truncation=True, max_length=length)["input_ids"]
        if merged:
            row["prompt"] = [*row["inputs"], config.decoder_start_token_id]


def pad(lists: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
    """Ragged rows -> one integer tensor."""
    rows = [torch.tensor(row, dtype=torch.long) for row in lists]
    side = "left" if left else "right"
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def batches(rows: Sequence[dict], update: Update, what: str) -> Iterable[tuple[list[int], list[dict]]]:
    """Indices and rows of batches of similar length, the longest first: what fails for memory fails at once."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["prompt"]))
    for first in range(0, len(order), BATCH_SIZE):
        indices = order[first : first + BATCH_SIZE]
        yield indices, [rows[index] for index in indices]
        done = first + len(indices)
        update(done / len(order), f"{what}: {done} of {len(order)} rows")


def left_padded(lists: Sequence[Sequence[int]], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """What a decoder-only model reads of ragged rows: ids, mask, and positions that the pads do not move."""
    mask = pad([[1] * len(ids) for ids in lists], 0, left=True)
    return {
        "input_ids": pad(lists, pad_token_id, left=True),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
    }


def completion_batch(rows: Sequence[dict], pad_token_id: int = 0) -> dict:
    """What a decoder-only model reads of rows: `prompt + labels`, padded on the left, so that targets end together.

    Then the head is needed at the last columns only, which every causal model of transformers takes as a number,
    `logits_to_keep`: at prompt lengths of hundreds it would cost more than half of a training step. With T labels in
    the longest row, `labels` is `[B, T]` and the logits are `[B, T + 1, V]`, column t predicting label t.
    """
    labels = pad([row["labels"] for row in rows], IGNORED, left=True)
    return {
        **left_padded([row["prompt"] + row["labels"] for row in rows], pad_token_id),
        "labels": labels,
        "logits_to_keep": labels.shape[1] + 1,
    }


def target_logits(model, rows: Sequence[dict]) -> tuple[torch.Tensor, torch.Tensor]:
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
    models: Mapping[str, torch.nn.Module],
    rows: Sequence[dict],
    teacher=None,
    update: Update = lambda *_: None,
    measures: Collection[str] = ("ce", "kl", "teacher_agreement"),
) -> dict[str, dict[str, np.ndarray]]:
    """Sums over the target tokens of each row, for each model.

    Args:
        models: encoder-decoders or decoder-only models, in evaluation mode.
        teacher: decoder-only model to compare with; its logits are computed once for all models, itself among them.
        measures: of `ce` (nats), `ece` and those that need a teacher, which are left out without one: `kl` (teacher to
            model, nats), `teacher_agreement` (tokens where both put the same id first) and `entropy_gap` (nats).

    Returns:
        For each model and measure `[rows]`, or `[rows, bins]` for `ece` (see `fidelity.calibration_gaps`).

    Raises:
        ValueError: a row has more tokens than a model has positions for.
    """
    for name, model in [*models.items(), *([] if teacher is None else [("the teacher", teacher)])]:
        _check_fits(name, model, rows, [len(row["labels"]) for row in rows])
    measures = [name for name in measures if teacher is not None or name not in OF_TEACHER]
    sums: dict[str, dict[str, np.ndarray]] = {name: {} for name in models}
    for indices, batch in batches(rows, update, "scoring"):
        owner = torch.repeat_interleave(torch.tensor([len(row["labels"]) for row in batch]))
        of_teacher = None if teacher is None else target_logits(teacher, batch)
        theirs = None if of_teacher is None else of_teacher[0].float()
        for name, model in models.items():
            ours, labels = of_teacher if of_teacher and model is teacher else target_logits(model, batch)
            per_token = {"ce": cross_entropy(ours, labels)}
            if "ece" in measures:
                calibration = token_calibration(ours, labels)
                per_token["ece"] = calibration_gaps(calibration["confidence"], calibration["correct"])
            if theirs is not None:
                size = min(ours.shape[-1], theirs.shape[-1])  # padded vocabulary rows that only one side has
                per_token |= token_fidelity(ours[:, :size], theirs[:, :size])
            for measure in measures:
                values = per_token[measure].cpu().double()
                by_row = values.new_zeros(len(batch), *values.shape[1:]).index_add_(0, owner, values)
                into = sums[name].setdefault(measure, np.zeros((len(rows), *by_row.shape[1:])))
                into[indices] = by_row.numpy()
    return sums


def generate(
    model, tokenizer, rows: Sequence[dict], max_new_tokens: int, update: Update = lambda *_: None
) -> list[str]:
    """Greedy answers of an encoder-decoder or a decoder-only model, in the order of the rows.

    Raises:
        ValueError: a prompt leaves the model no positions for so many tokens.
    """
    _check_fits(model.name_or_path or "the model", model, rows, [max_new_tokens] * len(rows))
    answers = [""] * len(rows)
    side = _side(model)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    options["eos_token_id"] = end_tokens(model, tokenizer) or None
    for indices, batch in batches(rows, update, "generating"):
        tokens = generate_tokens(model, [row[side] for row in batch], tokenizer.pad_token_id, **options)
        for index, text in zip(indices, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
            answers[index] = text.strip()
    return answers


def _side(model) -> str:
    """What a model reads of a row."""
    return "inputs" if model.config.is_encoder_decoder else "prompt"


def _check_fits(name: str, model, rows: Sequence[dict], targets: Sequence[int]) -> None:
    check_rows(name, model.config, [len(row[_side(model)]) for row in rows], targets)
