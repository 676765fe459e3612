"""Counts training rows that have nothing to teach, or not where to stop: a run over such looks like any other."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.utils import logging

from ..alignment.positions import IGNORED


logger = logging.get_logger(__name__)


_ENOUGH = 100  # rows of a process, none of which ends in EOS, before a word is said of it


class EmptyTargets:
    """Rows of one pass over the data whose labels are all -100, or nothing but the end of sequence.

    The latter is what an empty text becomes; it teaches a student to answer with nothing, which may be meant.

    Counted too is whether any row ends in EOS, of those that came ready and leave it to the trainer what the teacher
    reads. Texts are given one, unless they are cut, and windows of plain text bring what the teacher reads.

    Args:
        eos_token_ids: of the student; none if it has none.
    """

    def __init__(self, eos_token_ids: Sequence[int] = ()):
        self.eos_token_ids = list(eos_token_ids)
        self.reported = False
        # Rows, those with an empty target, ready ones, and those of these that end in EOS; on the device, so that no
        # step waits for them.
        self._counts: Tensor | None = None
        self._ready, self._told = 0, not self.eos_token_ids
        self._first_epoch: float | None = None

    def see(self, batches: Iterable[Mapping[str, Any]], epoch: float | None, accelerator: Accelerator) -> None:
        """The batches of a step, before it; `epoch` as in `TrainerState`, by which the end of a pass is known."""
        if self.reported:
            return
        self._first_epoch = (epoch or 0.0) if self._first_epoch is None else self._first_epoch
        if self._has_passed(epoch):
            return self.report(epoch, accelerator)
        for batch in batches:
            labels = batch.get("labels")
            if labels is not None:
                is_ready = batch.get("teacher_input_ids") is None
                counts = self._count(labels, is_ready)
                self._counts = counts if self._counts is None else self._counts + counts
                self._ready += len(labels) * is_ready
        if self._counts is not None and self._ready >= _ENOUGH and not self._told:
            self._tell_of_ends(self._counts.tolist())

    def _count(self, labels: Tensor, is_ready: bool) -> Tensor:
        is_target, is_eos = labels != IGNORED, torch.isin(labels, torch.tensor(self.eos_token_ids).to(labels))
        empty = (~is_target | is_eos).all(dim=1)
        is_last = is_target & (is_target.flip(1).cumsum(dim=1).flip(1) == 1)
        ends = (is_last & is_eos).any(dim=1)
        every = torch.ones_like(empty)
        return torch.stack([every, empty, every & is_ready, ends & is_ready]).sum(dim=1)

    def _has_passed(self, epoch: float | None) -> bool:
        """Whether all rows were seen: a resumed run begins amid an epoch."""
        return self._first_epoch is not None and (epoch or 0.0) - self._first_epoch >= 1

    def report(self, epoch: float | None, accelerator: Accelerator) -> None:
        """Warns if there were such rows.

        Raises:
            ValueError: all rows of a whole pass, on all processes, were.
        """
        if self.reported or self._counts is None:
            return
        self.reported, whole_pass = True, self._has_passed(epoch)
        counts = accelerator.gather(self._counts.unsqueeze(0)).sum(dim=0).tolist()
        rows, empty = counts[:2]
        what = "an empty target (labels all -100, or nothing but the end of sequence)"
        if whole_pass and rows == empty:
            raise ValueError(
                f"all {rows} rows have {what}: there is nothing to learn. Look at the target column, and whether the "
                "targets were cut away where prompt and target share a length limit."
            )
        if empty:
            logger.warning(f"{empty} of the {rows} rows that were read have {what}.")
        if whole_pass and not self._told:
            self._tell_of_ends(counts)

    def _tell_of_ends(self, counts: list[int]) -> None:
        self._told = True
        _, _, ready, ended = counts
        if ready and not ended:
            logger.warning(
                f"none of the {ready} label rows that were read ends in EOS (id {self.eos_token_ids[0]}): the student "
                "does not learn where to stop. Encode targets as tokenizer(target + tokenizer.eos_token, "
                "add_special_tokens=False), or give their texts."
            )
