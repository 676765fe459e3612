"""What the trainer asks of a teacher, wherever its distributions come from."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..alignment.vocabularies import SharedVocabulary, log_mass
from ..losses import Divergence


class TeacherScores(Protocol):
    """The teacher's distributions at N positions, compared with the student's a slice of them at a time."""

    def divergence(self, student_logits: Tensor, chunk: slice, divergence: Divergence, temperature: float) -> Tensor:
        """`[C, V]` of the student at the slice `chunk` of the positions -> `[C]` nats, at `temperature`."""

    def top(self, chunk: slice) -> Tensor:
        """The shared id that the teacher puts first, as its place in the shared vocabulary, `[C]`."""


class TeacherSignal(Protocol):
    """What the trainer asks of a teacher, whether it is a model or a record of one."""

    vocab_size: int
    input_names: Collection[str]  # what it can be given beside tokens, such as `pixel_values`; empty if it reads text

    def to(self, device: torch.device) -> "TeacherSignal":
        """Moves the teacher to the training device; called once, before training."""

    def check(
        self, prompt_template: str | None, divergence: str, temperature: float, prompt_date: str | None = None
    ) -> None:
        """Raises ValueError where training asks for what this teacher cannot give; called once, before training."""

    def scores(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        rows: Tensor,
        columns: Tensor,
        vocabulary: SharedVocabulary,
        chunked: bool,
        images: Mapping[str, Tensor],
    ) -> TeacherScores:
        """The distributions at the N positions `[rows, columns]` of a batch `[B, L]`, over the shared vocabulary;
        `chunked` if they will be asked for a few at a time; `images` from `positions.teacher_images`."""


@dataclass(frozen=True)
class DenseScores:
    """`TeacherScores` from logits over the whole vocabulary; `logits_at` gives them for a slice, `[C, V]`."""

    logits_at: Callable[[slice], Tensor]
    vocabulary: SharedVocabulary

    def divergence(self, student_logits: Tensor, chunk: slice, divergence: Divergence, temperature: float) -> Tensor:
        logits = self.logits_at(chunk)
        shared = self.vocabulary.restrict_teacher(logits)
        values = divergence(self.vocabulary.restrict_student(student_logits), shared, temperature)
        return values * log_mass(shared, logits, temperature).exp() if self.vocabulary.by_mass else values

    def top(self, chunk: slice) -> Tensor:
        return self.vocabulary.restrict_teacher(self.logits_at(chunk)).argmax(dim=-1)


@dataclass(frozen=True)
class PartialScores:
    """`TeacherScores` at N positions where only those in `asked`, `[N]`, were asked: `scores` has those, in order.

    At the others the divergence is 0, without gradient, and the first id is -1.
    """

    scores: TeacherScores
    asked: Tensor

    def divergence(self, student_logits: Tensor, chunk: slice, divergence: Divergence, temperature: float) -> Tensor:
        asked = self.asked[chunk]
        values = self.scores.divergence(student_logits[asked], self._of_asked(chunk), divergence, temperature)
        return values.new_zeros(len(asked)).masked_scatter(asked, values)

    def top(self, chunk: slice) -> Tensor:
        asked = self.asked[chunk]
        ids = self.scores.top(self._of_asked(chunk))
        return ids.new_full((len(asked),), -1).masked_scatter(asked, ids)

    def _of_asked(self, chunk: slice) -> slice:
        """A slice of the N positions -> the slice of those asked that are in it."""
        first, last, _ = chunk.indices(len(self.asked))
        return slice(*(int(self.asked[:end].sum()) for end in (first, last)))
