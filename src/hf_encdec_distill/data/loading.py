"""Pairs of source and target text, from wherever they are, as train, validation and test."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import logging
import os
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..files import named_inside, read_json, replacing


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset
    from datasets.packaged_modules.csv.csv import CsvConfig

BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
T = TypeVar("T")
_ROWS_THAT_NAME = 1000  # in which the columns of JSON are looked up, as rows may lack some
# To pandas "None", "NA" and "null" are no text unless it is told; an empty cell still is none.
_CSV = {"keep_default_na": False, "na_values": [""]}
_CSV_NAMES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")  # in a folder `datasets` reads compressed ones too
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
    left out, and counted in the log. In a CSV or TSV the two columns are text, whatever it looks like: "007" stays so.

    Args:
        dataset: a CSV, TSV, JSON, JSON lines or Parquet file, a folder with such files (splits by their names) or
            written by `save_to_disk`, a name on the Hub, files by the names of their splits (`{"train": "a.csv"}`),
            or `None` for the built-in task. A split is train if it is the only one, unless it is named after another;
            without train nothing is carved, and only what is there returned. A TSV file is read as quoted, where a
            quote opens a cell and is closed at its end, else quotes are text in it.
        source_column, target_column: where the texts are.
        config: configuration of a dataset that has several.
        cache_dir, progress: for the built-in task, see `load_python_docstrings`.

    Raises:
        ValueError: no such dataset, none that can be read, no such column, columns without text or with something
            else, or too few rows to carve a split out of.
    """
    from datasets import DatasetDict

    columns = (source_column, target_column)

    if dataset is None:
        from .python_docstrings import load_python_docstrings

        return load_python_docstrings(cache_dir=cache_dir, progress=progress)
    if isinstance(dataset, Mapping):
        known = {name: own for own, names in _SPLIT_NAMES.items() for name in (own, *names)}
        if len({known.get(name) for name in dataset} - {None}) < len(dataset):
            raise ValueError(
                f"dataset has the splits {', '.join(dataset)}: name each once, by one of {', '.join(known)}"
            )
        splits = {known[name]: load_tables(file, config, columns)["train"] for name, file in dataset.items()}
    else:
        splits = named_splits(load_tables(dataset, config, columns), dataset)
    splits = {
        name: _with_text(_two_columns(split, source_column, target_column), f"{dataset} ({name})")
        for name, split in splits.items()
    }
    missing = [name for name in ("test", "validation") if name not in splits and "train" in splits]
    if missing and (distinct := len(set(splits["train"]["source"]))) <= len(missing):
        raise ValueError(
            f"{dataset} (train) has {distinct} distinct sources, too few to hold out {' and '.join(missing)}: give at "
            f"least {len(missing) + 1}, or a folder with a file for each split"
        )
    for name in missing:
        splits["train"], splits[name] = _carve(splits["train"])
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
    with replacing(file) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8", errors="surrogatepass")
    return len(lines)


def load_tables(
    dataset: str | os.PathLike, config: str | None, columns: Collection[str], streaming: bool = False
) -> Mapping[str, Dataset | IterableDataset]:
    """What `load_pairs` takes, under the names that its splits have.

    Args:
        columns: those that hold text. In a CSV they are not taken for anything else; of JSON on this machine, the
            other columns have names and no values.

    Raises:
        ValueError: there is no such dataset, or it cannot be read.
    """
    dataset = os.fspath(dataset)
    check_path(dataset)
    with says_why(dataset):
        tables = _tables(Path(dataset).expanduser(), dataset, config, columns, streaming)
    return tables


def _tables(
    path: Path, dataset: str, config: str | None, columns: Collection[str], streaming: bool
) -> Mapping[str, Dataset | IterableDataset]:
    from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.json.json import JsonConfig

    suffix = path.suffix.lower()
    if path.is_file():
        if BUILDERS[suffix] == "json":
            return _json_tables({"train": [path]}, columns, streaming)
        options = {}
        if BUILDERS[suffix] == "csv":
            separator = "\t" if suffix == ".tsv" else ","
            options = {"sep": separator, **_csv_options([path], columns, CsvConfig(sep=separator))}
        return load_dataset(BUILDERS[suffix], data_files={"train": str(path)}, streaming=streaming, **options)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        for state in path.rglob("state.json"):
            for entry in read_json(state, fields={"_data_files": list})["_data_files"]:
                named_inside(state.parent, entry.get("filename") if isinstance(entry, dict) else entry)
        loaded = load_from_disk(str(path))
        loaded = DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded
        return {name: split.to_iterable_dataset() for name, split in loaded.items()} if streaming else loaded
    name = str(path) if path.is_dir() else dataset
    found = load_dataset_builder(name, config).config
    files = {str(split): [Path(file) for file in some] for split, some in (found.data_files or {}).items()}
    every = [file for some in files.values() for file in some]
    for file in every if path.is_dir() else ():
        # By its name: a link in the folder is its owner's, as large files on another disk are.
        where = Path(os.path.abspath(file))
        if not any(where.is_relative_to(folder) for folder in (path.absolute(), path.resolve())):
            raise BadFile(f"{path} names {file}, expected files of that folder: put a copy there")
    read_here = all(BUILDERS.get(file.suffix.lower()) == "json" and file.is_file() for file in every)
    if isinstance(found, JsonConfig) and found.field is None and read_here:
        return _json_tables(files, columns, streaming)
    options = _csv_options(every, columns, found) if isinstance(found, CsvConfig) else {}
    return load_dataset(name, config, streaming=streaming, **options)


@contextmanager
def says_why(dataset: str | os.PathLike) -> Iterator[None]:
    """Raises ValueError, which names the dataset, in place of what `datasets` raises while it is read."""
    from datasets import config
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except (OSError, ValueError, StopIteration, DatasetGenerationError) as error:
        # The error says why (no table, offline, gated, a config to choose), but not what else could have been given.
        why = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        if isinstance(why, BadFile):
            raise why from None
        cache = Path(config.HF_DATASETS_CACHE)
        if isinstance(why, OSError) and why.filename and _is_about(Path(os.fsdecode(why.filename)), cache):
            raise ValueError(
                f"{dataset} was not read, for a copy of it cannot be written to {cache} ({why.strerror}): make room "
                "there, or name a folder that can be written with the environment variable HF_DATASETS_CACHE"
            ) from error
        path = Path(dataset).expanduser()
        if isinstance(why, UnicodeDecodeError):
            for file in [path] if path.is_file() else sorted(path.rglob("*")):
                if BUILDERS.get(file.suffix.lower()) == "csv":
                    check_utf8(file)
        # Of which each version of `datasets` says something else.
        if path.is_file() and not path.stat().st_size:
            why = "it is empty"
        elif path.is_file() and "corresponds to no data" in str(why):
            why = "it has a header and no rows"
        if path.is_file():
            raise ValueError(f"{dataset} gives no rows, read as {BUILDERS[path.suffix.lower()]}: {why}") from error
        raise ValueError(
            f"{dataset} is neither a readable folder nor a dataset that the Hub gives us: {why}"
        ) from error


def _is_about(file: Path, folder: Path) -> bool:
    """Whether `file` is in `folder`, or is what would have to hold it."""
    return file.is_relative_to(folder) or folder.is_relative_to(file)


def check_path(dataset: str) -> None:
    """Raises ValueError for a path where nothing is, or a file that `load_tables` does not read."""
    path = Path(dataset).expanduser()
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in BUILDERS:
        raise ValueError(f"{dataset} has the suffix {path.suffix!r}, expected one of {', '.join(BUILDERS)}")
    if not path.exists() and (suffix in BUILDERS or dataset.startswith((".", "~", os.sep))):
        raise ValueError(f"{dataset} is not there: expected a file, a folder or the name of a dataset on the Hub")


class BadFile(ValueError):
    """Says which file, where in it, and how to mend it: there is nothing to add."""


def check_utf8(file: Path) -> None:
    """Raises ValueError where a file is not in UTF-8."""
    try:
        with file.open(encoding="utf-8") as stream:
            while stream.read(1 << 16):
                pass
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in UTF-8 ({error}): save it as UTF-8, or leave it out") from error


def _json_tables(
    files: Mapping[str, list[Path]], columns: Collection[str], streaming: bool
) -> Mapping[str, Dataset | IterableDataset]:
    """`datasets` itself would take texts that look like dates for dates, and not give them back as they were."""
    from datasets import Dataset, Features, IterableDataset, Value

    kind = IterableDataset if streaming else Dataset
    tables = {}
    for split, some in files.items():
        names = {name: None for file in some for _, row in islice(_json_rows(file), _ROWS_THAT_NAME) for name in row}
        if not names:
            raise BadFile(f"{some[0]} has no rows")
        # With their times, so that a file that has changed is not taken from the cache.
        shards = [(str(file), file.stat().st_mtime_ns) for file in some]
        tables[split] = kind.from_generator(
            _json_texts,
            features=Features({name: Value("string") for name in names}),
            gen_kwargs={"files": shards, "names": tuple(names), "columns": tuple(columns)},
        )
    return tables


def _json_texts(
    files: list[tuple[str, int]], names: tuple[str, ...], columns: tuple[str, ...]
) -> Iterator[dict[str, str | None]]:
    for file, _ in files:
        for where, row in _json_rows(Path(file)):
            texts = {column: row.get(column) for column in columns if column in names}
            for column, text in texts.items():
                if not isinstance(text, str | None):
                    raise BadFile(
                        f"{where}: {column!r} is {reprlib.repr(text)}, expected text: put it in quotes, or choose "
                        "another column"
                    )
                try:
                    (text or "").encode()
                except UnicodeEncodeError as error:
                    raise BadFile(
                        f"{where}: {column!r} is {reprlib.repr(text)}, no valid Unicode text ({error.reason}): leave "
                        "the row out, or write both halves of the character"
                    ) from error
            yield {**dict.fromkeys(names), **texts}


def _json_rows(file: Path) -> Iterator[tuple[str, dict]]:
    """Rows of JSON Lines, or of a file that is one list, each after the words for where it is."""
    with file.open(encoding="utf-8-sig") as stream:
        try:
            begin = next((line for line in stream if not line.isspace()), "")
            stream.seek(0)
            if begin.lstrip().startswith("["):
                rows = ((f"{file}, row {n}", row) for n, row in enumerate(_json(stream.read(), str(file)), 1))
            else:
                lines = ((f"{file}, line {n}", line) for n, line in enumerate(stream, 1) if not line.isspace())
                rows = ((where, _json(line.strip(), where)) for where, line in lines)
            for where, row in rows:
                yield where, row if isinstance(row, dict) else {"text": row}
        except UnicodeDecodeError:
            check_utf8(file)
            raise


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{where} is not JSON ({error}): expected a row on each line, or one list of rows") from error


def _csv_options(files: Iterable[Path], columns: Collection[str], config: CsvConfig) -> dict:
    """How CSV or TSV files are read, beyond what `config` says: `columns` as the text that stands there, and quotes in
    a TSV as text where they do not pair up as those around a cell do. Files that are not on this machine are not read.

    Raises:
        BadFile: pandas would not give back what is in the cells of a file.
    """
    options: dict[str, Any] = {**_CSV, "converters": dict.fromkeys(columns, str)}
    files = [file for file in files if file.name.lower().endswith(_CSV_NAMES) and file.is_file()]
    for file in files:
        line = _unpaired_quote(file, config)
        if line is None:
            continue
        if config.sep == "\t":
            logger.warning("%s: quotes that do not enclose whole cells; all are taken for text", file)
            options["quoting"] = csv.QUOTE_NONE
            break
        if _unpaired_quote(file, dataclasses.replace(config, escapechar="\\")) is None:
            raise BadFile(f'{file}, line {line}: a quote inside of a cell is written \\", expected two of them, ""')
        logger.warning("%s, line %d: a quote that does not enclose a whole cell; look at how it is read", file, line)
    for file in files:
        _check_first_row(file, dataclasses.replace(config, **options))
    return options


def _unpaired_quote(file: Path, config: CsvConfig) -> int | None:
    """The line up to which quotes enclose whole cells; None if they do so to the end, or the file is compressed.

    Read as quoted, a file with a quote that is never closed would lose all lines up to the next quote.
    """
    if file.suffix.lower() not in BUILDERS:
        return None
    dialect = {name: getattr(config, name) for name in ("quotechar", "quoting", "escapechar", "doublequote")}
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with file.open(encoding="utf-8", errors="replace", newline="") as stream:
            rows = csv.reader(stream, delimiter=config.sep, strict=True, **dialect)
            try:
                for _ in rows:
                    pass
            except csv.Error:
                return rows.line_num
    finally:
        csv.field_size_limit(limit)
    return None


def _check_first_row(file: Path, config: CsvConfig) -> None:
    """Raises BadFile where the first row is longer than the header: to pandas its first cells would be an index, and
    the others stand one column too far to the left. It refuses later rows that are longer than the first by itself."""
    import pandas as pd

    row = pd.read_csv(file, **{**config.pd_read_csv_kwargs, "chunksize": None, "nrows": 1})
    if row.empty or isinstance(row.index, pd.RangeIndex) or config.index_col is not None:
        return
    header = list(row.columns)
    if other := _other_separator(header):
        raise BadFile(f"{file} has cells that are separated by {other!r}, expected {config.sep!r}")
    raise BadFile(
        f"{file}: the first row has {len(header) + row.index.nlevels} cells, and the header has {len(header)}: name "
        f"each column in the header, leave out {config.sep!r} at the ends of rows, and put quotes around a cell that "
        "has one in it"
    )


def named_splits(splits: Mapping[str, T], dataset: str | os.PathLike) -> dict[str, T]:
    """The splits under our names, as many of them as there are; one alone is train if its name says no other.

    Raises:
        ValueError: there are several, and none has one of our names.
    """
    found = {
        ours: splits[theirs] for ours, names in _SPLIT_NAMES.items() for theirs in reversed(names) if theirs in splits
    }
    if not found:
        if len(splits) != 1:
            raise ValueError(f"{dataset} has the splits {', '.join(splits)}: expected one that is called 'train'")
        found = {"train": next(iter(splits.values()))}
    return found


def _two_columns(split: Dataset, source_column: str, target_column: str) -> Dataset:
    for column, option in ((source_column, "--source-column"), (target_column, "--target-column")):
        check_column(column, split.column_names, option)
        kind = getattr(split.features[column], "dtype", type(split.features[column]).__name__)
        # Where every cell is empty, the type says nothing: pandas reads such a column of a CSV file as float64.
        empty = split.with_format("arrow")[column].null_count == len(split)
        if kind not in ("string", "large_string") and not empty:
            raise ValueError(
                f"Column {column!r} holds {kind}, expected text: choose another with {option}, or save it as text"
            )
    if source_column == target_column:
        raise ValueError(f"Source and target are both column {source_column!r}: expected two columns")
    _check_images(split)
    split = split.select_columns([source_column, target_column])
    # By way of names that cannot clash, since "target" may be what the source column is called.
    split = split.rename_columns({source_column: "\0source", target_column: "\0target"})
    return split.rename_columns({"\0source": "source", "\0target": "target"})


def check_column(column: str, columns: Collection[str], option: str) -> None:
    """Raises ValueError where a table has no such column; `option` chooses one."""
    if column in columns:
        return
    why = f"There is no column {column!r}; the columns are {', '.join(map(repr, columns))}"
    if separator := _other_separator(columns):
        raise ValueError(f"{why}: separate the cells of a CSV by commas, not by {separator!r}")
    raise ValueError(f"{why} (a CSV has to begin with a line of them): choose with {option}")


def _other_separator(columns: Collection[str]) -> str | None:
    """What the header of a CSV was separated by, if it was read as one name."""
    only = next(iter(columns)) if len(columns) == 1 else ""
    return next((mark for mark in ";\t|" if mark in only), None)


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


def _carve(split: Dataset) -> tuple[Dataset, Dataset]:
    """`split` without, and with only, the sources whose hashes are smallest."""
    digests = [hashlib.sha256(source.encode(errors="surrogatepass")).digest() for source in split["source"]]
    order = sorted(set(digests))
    count = min(max(round(CARVED_SHARE * len(order)), CARVED_ROWS), len(order) // 5)
    carved = set(order[: max(count, 1)])
    rest = [i for i, digest in enumerate(digests) if digest not in carved]
    return split.select(rest), split.select([i for i, digest in enumerate(digests) if digest in carved])
