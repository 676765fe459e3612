"""How long rows are to a sampler that goes by length, also where their texts are encoded only in the batch."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import Dataset, IterableDataset
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from .._compat import samples_by_length
from ..collator import DistillationCollator


class _EncodedRows(Dataset):
    """What `Trainer` measures the rows of, by `len(row["input_ids"])`; batches are still made of `rows`."""

    def __init__(self, rows, encode: Callable[[Mapping[str, Any]], dict[str, Any]]):
        self.rows, self.encode = rows, encode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.encode(self.rows[index])


def with_lengths(dataset: Any, args: TrainingArguments, collator: DistillationCollator):
    """`dataset` for a sampler; one that groups by length finds `input_ids` in it also if `collator` makes them.

    A column of lengths, `length_column_name`, is left to the sampler, which reads that of a `datasets.Dataset`.
    """
    if not samples_by_length(args) or not has_length(dataset) or not len(dataset):
        return dataset
    has_lengths = args.length_column_name in (getattr(dataset, "column_names", None) or ())
    if has_lengths or "input_ids" in dataset[0]:  # type: ignore[index]  # has_length says Sized
        return dataset
    return _EncodedRows(dataset, collator.encode)


def row_sizes(dataset: Any, collator: DistillationCollator) -> list[tuple[int, int]]:
    """Tokens of source and target of each row, as the student reads them.

    Raises:
        ValueError: the data set has no length, or its rows are no tokens.
    """
    if isinstance(dataset, IterableDataset) or not has_length(dataset):
        raise ValueError(
            f"max_tokens_per_batch sorts rows by length, and a {type(dataset).__name__} has none to sort: give a data "
            "set with a length, or leave it out."
        )
    sizes = []
    for number in range(len(dataset)):
        row = collator.encode(dataset[number])  # type: ignore[index]  # has_length says Sized
        if "input_ids" not in row or row.get("labels") is None:
            raise ValueError(
                f"max_tokens_per_batch counts input_ids and labels, and row {number} has {sorted(row)}: leave it out."
            )
        sizes.append((len(row["input_ids"]), len(row["labels"])))
    return sizes
