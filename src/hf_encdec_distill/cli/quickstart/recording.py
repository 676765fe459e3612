"""Records for training with a frozen encoder: teacher and encoder on as many rows as there is time for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...devices import precision_arguments, working_dtype
from ...distillation import DistillationCollator, LiveTeacher, capture, capture_encoder_states
from . import recipe


def record(
    teacher,
    student,
    rows: list[dict],
    tokenizer,
    records: Path,
    states: Path,
    seconds: float,
    time_pass: Callable[[int], float],
    now: Callable[[], float] = time.monotonic,
) -> int:
    """Read the first of `rows`, once each: as many as can be recorded and trained on in about `seconds`.

    Args:
        teacher, student: the student's encoder stays as it is.
        rows: `input_ids` and `labels`.
        tokenizer: the teacher's.
        records, states: folders for what the teacher and what the encoder says.
        seconds: `FIRST_RECORDED` rows are read in any case; from their cost the next ones are planned.
        time_pass: the seconds that one pass of the training takes for a row, once so many are recorded.
        now: the clock.

    Returns:
        The number of rows.
    """
    end = now() + seconds
    live = LiveTeacher(teacher.to(working_dtype()))
    start = student.config.decoder_start_token_id
    collator = DistillationCollator(student.tokenizer, tokenizer, start_token_id=start)
    accelerator = Accelerator(mixed_precision="bf16" if precision_arguments()["bf16"] else "no")
    options: dict[str, Any] = {"kind": "top_k", "k": recipe.TOP_K, "start_token_id": start, "progress": False}
    count, more, a_pass = 0, recipe.FIRST_RECORDED, 0.0
    while more >= recipe.FIRST_RECORDED and count < len(rows):
        begun = now()
        # Those of like length together: little padding.
        chunk = sorted(rows[count : count + more], key=lambda row: len(row["input_ids"]))
        new = capture(live, chunk, records, tokenizer, **options)
        capture_encoder_states(student, chunk, states, collator, accelerator=accelerator, progress=False)
        count, seconds_taken = count + len(chunk), now() - begun
        a_pass = a_pass or time_pass(count)
        if not new:  # an interrupted run had recorded them, so that they say nothing of the cost
            continue
        a_row = seconds_taken / new
        trained = max(recipe.PASSES * a_pass, a_row * (1 / recipe.RECORDING_SHARE - 1))
        left = end - now() - count * trained
        more = int(min(left / max(a_row + trained, 1e-9), 3 * count))  # the first rows are slow: step by step
    return count
