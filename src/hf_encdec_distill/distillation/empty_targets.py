"""Counts training rows that have nothing to teach, since a run over nothing else looks like any other."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils import logging

from .alignment import IGNORED


logger = logging.get_logger(__name__)


class EmptyTargets:
    """Rows of one pass over the data whose labels are all -100, or nothing but the end of sequence.

    The latter is what an empty text becomes; it teaches a student to answer with nothing, which may be meant.

    Args:
        eos_token_id: of the student; None if it has none.
    """

    def __init__(self, eos_token_id: int | None = None):
        self.eos_token_id = eos_token_id
        self.reported = False
        self._counts = None  # rows, and those with an empty target; on the device, so that no step waits for them
        self._first_epoch: float | None = None

    def see(self, batches: Iterable[Mapping[str, Any]], epoch: float | None, accelerator: Accelerator) -> None:
        """The batches of a step, before it; `epoch` as in `TrainerState`, by which the end of a pass is known."""
        if self.reported:
            return
        epoch = epoch or 0.0
        self._first_epoch = epoch if self._first_epoch is None else self._first_epoch
        if epoch - self._first_epoch >= 1:
            return self.report(accelerator, whole_pass=True)
        for batch in batches:
            labels = batch.get("labels")
            if labels is not None:
                empty = ((labels == IGNORED) | (labels == self.eos_token_id)).all(dim=1)
                counts = torch.stack([torch.ones_like(empty).sum(), empty.sum()])
                self._counts = counts if self._counts is None else self._counts + counts

    def report(self, accelerator: Accelerator, whole_pass: bool) -> None:
        """Warns if there were such rows.

        Raises:
            ValueError: all rows of a whole pass, on all processes, were.
        """
        if self.reported or self._counts is None:
            return
        self.reported = True
        rows, empty = accelerator.gather(self._counts.unsqueeze(0)).sum(dim=0).tolist()
        what = "an empty target (labels all -100, or nothing but the end of sequence)"
        if whole_pass and rows == empty:
            raise ValueError(
                f"all {rows} rows have {what}: there is nothing to learn. Look at the target column, and whether the "
                "targets were cut away where prompt and target share a length limit."
            )
        if empty:
            logger.warning(f"{empty} of the {rows} rows that were read have {what}.")
