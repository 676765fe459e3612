"""Batches by tokens, not rows: as many rows of similar length as stay within a number of padded tokens."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class TokenBatches(Sampler[list[int]]):
    """Lists of row numbers: each row once per epoch, and no list of more than `limit` padded tokens.

    Rows are sorted by length, those of equal length in random order, and cut into batches; neighbours are then dealt
    to the processes of a step, and the steps shuffled (as fairseq's `--max-tokens` does it, data/data_utils.py,
    v0.12.2, `batch_by_size`). The number of batches depends on the lengths alone, so every epoch has the same. It is a
    multiple of `processes`; only if that takes more batches than there are rows does a row come twice.

    Args:
        sizes: of each row, the tokens of source and target. A batch has its rows times the sum of both maxima.
        limit: of padded tokens.
        processes: that the batches are dealt to, one after the other.
        seed: with the epoch, of the order.
        epoch: gives the number of the epoch that begins.

    Raises:
        ValueError: a row is longer than the limit.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], limit: int, processes: int, seed: int, epoch: Callable[[], int]
    ):
        longest = max(range(len(sizes)), key=lambda row: sum(sizes[row]))
        if sum(sizes[longest]) > limit:
            source, target = sizes[longest]
            raise ValueError(
                f"max_tokens_per_batch={limit}, but row {longest} alone has {source} + {target} tokens (source and "
                "target): raise it, or cut rows with max_source_length and max_target_length."
            )
        self.sizes, self.limit, self.processes, self.seed, self.epoch = sizes, limit, processes, seed, epoch
        self._length = len(self._batches(torch.Generator().manual_seed(seed)))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        batches = self._batches(generator)
        for step in torch.randperm(len(batches) // self.processes, generator=generator).tolist():
            yield from batches[step * self.processes : (step + 1) * self.processes]

    def _batches(self, generator: torch.Generator) -> list[list[int]]:
        """In ascending order of length."""
        rows = torch.randperm(len(self.sizes), generator=generator).tolist()
        batches: list[list[int]] = [[]]
        most_target = 0
        for row in sorted(rows, key=self.sizes.__getitem__):
            source, target = self.sizes[row]
            most_target = max(most_target, target)
            if (len(batches[-1]) + 1) * (source + most_target) > self.limit:
                batches.append([])
                most_target = target
            batches[-1].append(row)
        while len(batches) % self.processes:
            most = max(range(len(batches)), key=lambda place: len(batches[place]))
            half = len(batches[most]) // 2
            batches[most : most + 1] = [batches[most][:half] or batches[0], batches[most][half:]]
        return batches
