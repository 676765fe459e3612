"""Pairs of source and target text, from wherever they are, as train, validation and test."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
T = TypeVar("T")
# To pandas "None", "NA" and "null" are no text unless it is told; an empty cell still is none.
_CSV = {"keep_default_na": False, "na_values": [""]}
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
# A split that is missing is carved out of train: this share, but at least so many rows, but at most a fifth.
CARVED_SHARE = 0.05
CARVED_ROWS = 50

logger = logging.getLogger(__name__)


def load_pairs(
    dataset: str | os.PathLike | Mapping[str, str | os.PathLike] | None = None,
    source_column: str = "source",
    target_column: str = "target",
    config: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> DatasetDict:
    """Return train, validation and test with the string columns `source` and `target`.

    A split that `dataset` lacks is carved out of its train split by a hash of the source text: the same rows in any
    order give the same splits, and rows with the same source stay together. Rows without a source or a target are
    left out, and counted in the log.

    Args:
        dataset: a CSV, TSV, JSON, JSON lines or Parquet file, a folder with such files (splits by their names) or
            written by `save_to_disk`, a name on the Hub, files by the names of their splits (`{"train": "a.csv"}`;
            without train nothing is carved, and only what is there returned), or `None` for the built-in task. A TSV
            file is read as quoted, where a quote opens a cell and is closed at its end, else quotes are text in it.
        source_column, target_column: where the texts are.
        config: configuration of a dataset that has several.
        cache_dir, progress: for the built-in task, see `load_python_docstrings`.

    Raises:
        ValueError: no such dataset, no such column, columns without text, or too few rows to carve a split out of.
    """
    from datasets import DatasetDict

    if dataset is None:
        from .python_docstrings import load_python_docstrings

        return load_python_docstrings(cache_dir=cache_dir, progress=progress)
    if isinstance(dataset, Mapping):
        known = {name: own for own, names in _SPLIT_NAMES.items() for name in (own, *names)}
        if len({known.get(name) for name in dataset} - {None}) < len(dataset):
            raise ValueError(
                f"dataset has the splits {', '.join(dataset)}: name each once, by one of {', '.join(known)}"
            )
        splits = {known[name]: load_tables(file, config)["train"] for name, file in dataset.items()}
    else:
        splits = named_splits(load_tables(dataset, config), dataset)
    splits = {
        name: _with_text(_two_columns(split, source_column, target_column), f"{dataset} ({name})")
        for name, split in splits.items()
    }
    for name in ("test", "validation"):
        if name not in splits and "train" in splits:
            splits["train"], splits[name] = _carve(splits["train"], f"{dataset} (train)")
    return DatasetDict({name: splits[name] for name in _SPLIT_NAMES if name in splits})


def save_pairs(pairs: Iterable[Mapping[str, str]], file: str | os.PathLike) -> int:
    """Write rows as JSON lines for `load_pairs`, whole or not at all; returns their number.

    Raises:
        ValueError: there are no rows.
    """
    lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
    if not lines:
        raise ValueError(f"There are no rows to write to {file}")
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text("".join(lines), encoding="utf-8", errors="surrogatepass")
    os.replace(partial, file)
    return len(lines)


def load_tables(
    dataset: str | os.PathLike, config: str | None, streaming: bool = False
) -> Mapping[str, Dataset | IterableDataset]:
    """What `load_pairs` takes, with all its columns, under the names that its splits have.

    Raises:
        ValueError: there is no such dataset.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk
    from datasets.exceptions import DatasetGenerationError
    from datasets.packaged_modules.csv.csv import CsvConfig

    dataset = os.fspath(dataset)
    check_path(dataset)
    path = Path(dataset).expanduser()
    suffix = path.suffix.lower()
    try:
        if path.is_file():
            options = _csv_options([path]) if BUILDERS[suffix] == "csv" else {}
            options = {**options, "sep": "\t"} if suffix == ".tsv" else options
            return load_dataset(BUILDERS[suffix], data_files={"train": str(path)}, streaming=streaming, **options)
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = load_from_disk(str(path))
            loaded = DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded
            return {name: split.to_iterable_dataset() for name, split in loaded.items()} if streaming else loaded
        name = str(path) if path.is_dir() else dataset
        is_csv = isinstance(load_dataset_builder(name, config).config, CsvConfig)
        options = _csv_options(path.rglob("*.[tT][sS][vV]") if path.is_dir() else ()) if is_csv else {}
        return load_dataset(name, config, streaming=streaming, **options)
    except (OSError, ValueError, StopIteration, DatasetGenerationError) as error:
        # The error says why (no table, offline, gated, a config to choose), but not what else could have been given.
        why = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        # Of which each version of `datasets` says something else, of JSON lines a StopIteration.
        is_empty = path.is_file() and not path.stat().st_size
        why = "it is empty" if is_empty or isinstance(why, StopIteration) else why
        if path.is_file():
            raise ValueError(f"{dataset} gives no rows, read as {BUILDERS[suffix]}: {why}") from error
        raise ValueError(
            f"{dataset} is neither a readable folder nor a dataset that the Hub gives us: {why}"
        ) from error


def check_path(dataset: str) -> None:
    """Raises ValueError for a path where nothing is, or a file that `load_tables` does not read."""
    path = Path(dataset).expanduser()
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in BUILDERS:
        raise ValueError(f"{dataset} has the suffix {path.suffix!r}, expected one of {', '.join(BUILDERS)}")
    if not path.exists() and (suffix in BUILDERS or dataset.startswith((".", "~", os.sep))):
        raise ValueError(f"{dataset} is not there: expected a file, a folder or the name of a dataset on the Hub")


def _csv_options(files: Iterable[Path]) -> dict:
    """How CSV or TSV files are read: quotes in a TSV are text where they do not pair up as those around a cell do."""
    stray = [file for file in files if file.suffix.lower() == ".tsv" and not _quotes_pair_up(file)]
    if not stray:
        return _CSV
    logger.warning("%s: quotes that do not enclose whole cells; all are taken for text", stray[0])
    return {**_CSV, "quoting": csv.QUOTE_NONE}


def _quotes_pair_up(file: Path) -> bool:
    """Read as quoted, a file with a quote that is never closed would lose all lines up to the next quote."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with file.open(encoding="utf-8", errors="replace", newline="") as stream:
            for _ in csv.reader(stream, delimiter="\t", strict=True):
                pass
    except csv.Error:
        return False
    finally:
        csv.field_size_limit(limit)
    return True


def named_splits(splits: Mapping[str, T], dataset: str | os.PathLike) -> dict[str, T]:
    """The splits under our names, as many of them as there are, train among them."""
    found = {
        ours: splits[theirs] for ours, names in _SPLIT_NAMES.items() for theirs in reversed(names) if theirs in splits
    }
    if "train" not in found:
        if len(splits) != 1:
            raise ValueError(f"{dataset} has the splits {', '.join(splits)}: expected one that is called 'train'")
        found = {"train": next(iter(splits.values()))}
    return found


def _two_columns(split: Dataset, source_column: str, target_column: str) -> Dataset:
    for column, option in ((source_column, "--source-column"), (target_column, "--target-column")):
        if column not in split.column_names:
            raise ValueError(
                f"There is no column {column!r}; the columns are {', '.join(split.column_names)}: choose with {option}"
            )
        kind = getattr(split.features[column], "dtype", type(split.features[column]).__name__)
        # Where every cell is empty, the type says nothing: pandas reads such a column of a CSV file as float64.
        empty = split.with_format("arrow")[column].null_count == len(split)
        if kind not in ("string", "large_string") and not empty:
            raise ValueError(f"Column {column!r} holds {kind}, expected text: choose another with {option}")
    if source_column == target_column:
        raise ValueError(f"Source and target are both column {source_column!r}: expected two columns")
    _check_images(split)
    split = split.select_columns([source_column, target_column])
    # By way of names that cannot clash, since "target" may be what the source column is called.
    split = split.rename_columns({source_column: "\0source", target_column: "\0target"})
    return split.rename_columns({"\0source": "source", "\0target": "target"})


def _check_images(split: Dataset) -> None:
    """Raises ValueError where rows are ready for a model that sees; images that a dataset merely has are left out."""
    from datasets import Image

    for column, feature in split.features.items():
        if "pixel_values" in column:
            raise ValueError(
                f"Column {column!r} holds images, and pairs are text alone: expected a dataset without it. Rows with "
                "images go to DistillationTrainer and distillation.teachers.capture.capture from Python"
            )
        if isinstance(feature, Image):
            logger.warning("column %r holds images, which are left out: pairs are text alone", column)


def _with_text(split: Dataset, where: str) -> Dataset:
    texts = zip(split["source"], split["target"])
    kept = [i for i, pair in enumerate(texts) if all(text is not None and text.strip() for text in pair)]
    dropped = len(split) - len(kept)
    if not kept:
        raise ValueError(f"{where}: none of the {len(split)} rows has text in both source and target")
    if dropped:
        logger.warning("%s: %d of %d rows left out, source or target is empty", where, dropped, len(split))
        split = split.select(kept)
    return split


def _carve(split: Dataset, where: str) -> tuple[Dataset, Dataset]:
    """`split` without, and with only, the sources whose hashes are smallest."""
    digests = [hashlib.sha256(source.encode(errors="surrogatepass")).digest() for source in split["source"]]
    order = sorted(set(digests))
    count = min(max(round(CARVED_SHARE * len(order)), CARVED_ROWS), len(order) // 5)
    count = max(count, 1)
    if count >= len(order):
        raise ValueError(f"{where}: {len(order)} distinct sources are too few to carve a held-out split out of them")
    carved = set(order[:count])
    rest = [i for i, digest in enumerate(digests) if digest not in carved]
    return split.select(rest), split.select([i for i, digest in enumerate(digests) if digest in carved])
