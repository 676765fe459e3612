"""A teacher on a server is asked about batches before their turn, and answers while the student takes its steps.

All batches of a step are asked about when the step begins, and with them the first of the next step: accelerate's
loaders make one batch more than they have handed out (`DataLoaderShard.__iter__`). With `dataloader_num_workers` that
batch is made in another process, and is asked about when its own step begins.

Every 256 rows the server's probes are compared with what it predicted at first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..alignment.positions import asked_positions, target_positions, with_teacher_inputs
from ..alignment.vocabularies import SharedVocabulary
from ..collator import DistillationCollator
from ..teachers.served import ServedTeacher


class RemembersLast(DistillationCollator):
    """A `DistillationCollator` whose `last` is the batch that it made last, until that is taken."""

    last: dict[str, Any] | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        self.last = super().__call__(rows)
        return self.last


class AskedAhead:
    """Sends batches to `teacher`, whose `scores` later waits for the answers.

    Args:
        collator: which makes the batches of the trainer.
        vocabulary: which ids of the teacher those of the student are.
    """

    def __init__(self, teacher: ServedTeacher, collator: RemembersLast, vocabulary: SharedVocabulary):
        self._teacher, self._collator, self._vocabulary = teacher, collator, vocabulary
        self._rows_since_comparison = 0

    def __call__(self, batches: Sequence[Mapping[str, Any]], and_next: bool = True) -> None:
        """Asks about `batches`, and about the one that comes after them if `and_next`.

        Raises:
            ValueError: the server has another model than at first.
        """
        last, self._collator.last = self._collator.last, None
        self._rows_since_comparison += sum(map(self._ask, batches))
        if and_next and last is not None:
            self._ask(last)  # counted when its own step begins
        if self._rows_since_comparison >= self._teacher.rows_per_comparison:
            self._rows_since_comparison = 0
            self._teacher.confirm()

    def _ask(self, batch: Mapping[str, Any]) -> int:
        """How many of its rows the teacher is asked about."""
        if batch.get("labels") is None:
            return 0
        inputs = with_teacher_inputs(batch, self._collator.start_token_id, self._vocabulary)
        rows, columns, _ = asked_positions(inputs, *target_positions(batch["labels"]))
        return len(self._teacher.ask(inputs["teacher_input_ids"], inputs["teacher_attention_mask"], rows, columns))
