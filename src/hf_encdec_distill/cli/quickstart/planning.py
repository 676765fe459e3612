"""The time of a run, planned from what was measured on its first rows: how many rows the evaluations can take, and
what the stages cost that come after the training."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from . import recipe


@dataclasses.dataclass(frozen=True)
class Plan:
    """Costs in seconds, of the teacher on this machine.

    Args:
        load: to load a model.
        score, generate: a row.
        request: an answer of `recipe.LATENCY_TOKENS` at batch 1.
        student_size: the student's layers, in those of the teacher.
        trained: students that are, 2 where there is a twin.
        held_out: rows on which all models are measured.
        rounds: of the latency.
    """

    load: float
    score: float
    generate: float
    request: float
    student_size: float
    trained: int
    held_out: int = 0
    rounds: int = 0

    def for_run(self, seconds: float, done: int, available: int, first: bool = True) -> Plan:
        """With `held_out` and `rounds` for a run that has `seconds` for all that comes.

        As many rows as fit into their share, `done` at least; if that is fewer than `recipe.ENOUGH_ROWS`, those or
        what fits into the largest share that they may have. `first`: the untuned teacher has to be measured, too.
        """
        a_row = self.evaluation(1) - self.evaluation(0) + (self.score + self.generate if first else 0.0)

        def fit(share: float) -> int:
            return int((share * seconds - self.evaluation(0)) / max(a_row, 1e-9))

        rows = max(fit(recipe.EVALUATION_SHARE), min(recipe.ENOUGH_ROWS, fit(recipe.LARGEST_EVALUATION_SHARE)))
        rows = max(done, min(rows, available, recipe.MOST_ROWS))
        rounds = int(recipe.LATENCY_SHARE * seconds / max(self._round(), 1e-9)) - 1
        return dataclasses.replace(self, held_out=rows, rounds=min(max(rounds, 2), recipe.LATENCY_ROUNDS, rows))

    def evaluation(self, rows: int) -> float:
        """The teacher; the student before and after training, and its twin. What is not trained does not write."""
        score, generate = 1 + (1 + self.trained) * self.student_size, 1 + self.trained * self.student_size
        return (2 + self.trained) * self.load + rows * (score * self.score + generate * self.generate)

    def smallest_training(self, batch_size: int) -> float:
        """One step, between loading and saving a model: backward is twice forward, and the optimizer has its share."""
        return 2 * self.load + 4 * batch_size * self.score

    def latency(self) -> float:
        """The first round only warms up."""
        return 2 * self.load + (self.rounds + 1) * self._round()

    def _round(self) -> float:
        """A request to the teacher and one to the student."""
        return (1 + self.student_size) * self.request


def groups_of_like_length(lengths: Sequence[int], size: int, seed: int) -> list[list[int]]:
    """Indices of rows in groups of `size` that are alike in length, in random order.

    So little is padded, and the rows of the first groups are a fair sample wherever the time ends.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups = [order[first : first + size] for first in range(0, len(order), size)]
    random.Random(seed).shuffle(groups)
    return groups
