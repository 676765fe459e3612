"""Parquet files that are whole or not there.

A shard is written under another name and appears in one rename, as `<prefix>-<worker>-<number>-<hash>.parquet`, the
hash being that of its own bytes: one that was cut or altered is found, and what a killed process left behind is never
taken for one. Any number of workers may write to a folder at once.
"""

import math
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from datasets.exceptions import DatasetGenerationError

from ...files import inside, sha256


PARTIAL = "partial-"  # how the names of files begin that are not whole yet
_OLD = 3600.0  # seconds after which such a file is one that a killed process left


class ShardWriter:
    """Gathers rows and writes them shard by shard.

    Args:
        folder: where the shards go.
        prefix: of their names.
        worker: the name of who writes; each worker writes shards of its own.
        features: the columns of a row.
        rows_per_shard: rows from which on a shard is written; at most so many are lost in an interruption.
        seconds_per_shard: after which a row is written, however few there are.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        worker: str,
        features: datasets.Features,
        rows_per_shard: int,
        seconds_per_shard: float = math.inf,
    ):
        self.folder, self.prefix, self.worker = folder, prefix, worker
        self.features, self.rows_per_shard, self.seconds_per_shard = features, rows_per_shard, seconds_per_shard
        self.rows = 0
        self._number = len(shard_files(folder, f"{prefix}-{worker}"))
        self._buffer: list[Mapping[str, Any]] = []

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Rows that belong together: all of them are in one shard."""
        if not self._buffer:
            self._begun = time.monotonic()
        self._buffer += rows
        if len(self._buffer) >= self.rows_per_shard or time.monotonic() - self._begun > self.seconds_per_shard:
            self.flush()

    def flush(self) -> None:
        if not self._buffer:
            return
        columns = {name: [row[name] for row in self._buffer] for name in self.features}
        partial = self.folder / partial_name(self.worker)
        try:
            shard = datasets.Dataset.from_dict(columns, features=self.features)
            with partial.open("wb") as stream:
                pyarrow.parquet.write_table(shard.with_format("arrow")[:], stream)
                stream.flush()
                os.fsync(stream.fileno())
            name = f"{self.prefix}-{self.worker}-{self._number:05}-{file_digest(partial)}.parquet"
            os.replace(partial, self.folder / name)
        finally:
            partial.unlink(missing_ok=True)
        self.rows += len(self._buffer)
        self._number += 1
        self._buffer = []


def partial_name(worker: str) -> str:
    """One that no other process uses, and by which the worker knows its own again."""
    return f"{PARTIAL}{worker}-{uuid.uuid4().hex[:8]}"


def remove_left_behind(folder: Path, worker: str) -> None:
    """Remove what this worker left when it was killed, and what is so old that nobody can be writing it."""
    for partial in folder.glob(f"{PARTIAL}*"):
        try:
            if not partial.name.startswith(f"{PARTIAL}{worker}-") and time.time() - partial.stat().st_mtime < _OLD:
                continue
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink()
        except FileNotFoundError:  # its own worker was quicker
            continue


def shard_files(folder: Path, prefix: str = "*") -> list[Path]:
    """The shards whose names begin with `prefix`, sorted; raises ValueError where one is a link out of the folder."""
    return sorted(inside(folder, shard.name) for shard in folder.glob(f"{prefix}-*.parquet"))


def check_shards(folder: Path, prefix: str = "*") -> list[Path]:
    """The same, each with the bytes that were written; raises ValueError, naming the shard, where that is not so."""
    shards = shard_files(folder, prefix)
    # Hashing leaves the interpreter alone: what limits a large cache is then its disk, not one core.
    with ThreadPoolExecutor() as pool:
        for shard, digest in zip(shards, pool.map(file_digest, shards), strict=True):
            if not shard.stem.endswith(f"-{digest}"):
                raise ValueError(
                    f"{shard} is not what was written, it was cut or altered: delete it and capture again; only its "
                    "rows are captured again."
                )
    return shards


def read_shards(folder: Path, prefix: str) -> datasets.Dataset:
    """All rows of the checked shards, memory-mapped."""
    try:
        return datasets.Dataset.from_parquet([str(shard) for shard in check_shards(folder, prefix)])
    except DatasetGenerationError as error:
        raise ValueError(f"the shards in {folder} hold no rows, or rows of several kinds: capture it again") from error


def read_keys(folder: Path, prefix: str) -> set[bytes]:
    """The column `key` of the checked shards."""
    return set().union(*_keys_of_each(folder, prefix))


def count_keys(folder: Path, prefix: str) -> tuple[int, int]:
    """How many keys the checked shards have, and how many of them stand in more than one: two workers had a row."""
    counts = Counter(key for keys in _keys_of_each(folder, prefix) for key in keys)
    return len(counts), sum(count > 1 for count in counts.values())


def _keys_of_each(folder: Path, prefix: str) -> Iterator[set[bytes]]:
    for shard in check_shards(folder, prefix):
        yield set(pyarrow.parquet.read_table(shard, columns=["key"]).column("key").to_pylist())


def file_digest(file: Path) -> str:
    """Of its bytes, as it stands at the end of its name."""
    return sha256(file)[:16]
