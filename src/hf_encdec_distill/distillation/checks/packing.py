"""Several rows of a data set in one row of a batch ("packing"), which distillation refuses.

The teacher's prompt and target are matched with the student's row by row: of two rows in one, the teacher would read
the second behind the first, and so would an encoder that is not told where one ends.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..alignment.positions import IGNORED


# What `DataCollatorWithFlattening` (transformers, data/data_collator.py) and its relatives say of a packed row.
_BOUNDARIES = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")


def refuse_packed(batch: Mapping[str, Any], rows: int | None = None) -> None:
    """Raises ValueError where a row of the batch holds several rows of the data set.

    Args:
        batch: `labels` `[B, T]`, and perhaps `position_ids` `[B, S]` or `decoder_position_ids` `[B, T]`.
        rows: how many rows of the data set it was made of, if that is known.
    """
    labels = batch.get("labels")
    found = [f"{name} in the batch" for name in _BOUNDARIES if batch.get(name) is not None]
    if rows is not None and labels is not None and len(labels) != rows:
        found.append(f"a batch of {len(labels)} rows made of {rows}")
    ids = batch.get("input_ids")
    read = batch.get("attention_mask", None if ids is None else torch.ones_like(ids))
    for name, real in (
        ("position_ids", read),
        ("decoder_position_ids", None if labels is None else labels != IGNORED),
    ):
        positions = batch.get(name)
        if positions is not None and real is not None and positions.shape == real.shape:
            found += [f"{name} of row {row} start again" for row in _restarts(positions, real.bool())]
    if found:
        raise ValueError(
            f"the batch is packed ({found[0]}): several rows of the data set stand in one, and teacher and student "
            "cannot be aligned there. Use a collator that pads (DataCollatorForSeq2Seq, or leave data_collator out); "
            "grouping rows by length keeps the padding small."
        )


def _restarts(positions: Tensor, real: Tensor) -> list[int]:
    """Rows whose positions do not ascend from one real token to the next."""
    falls = (positions[:, 1:] <= positions[:, :-1]) & real[:, 1:] & real[:, :-1]
    return falls.any(dim=1).nonzero()[:, 0].tolist()
