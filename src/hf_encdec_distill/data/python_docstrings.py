"""The built-in task: a Python function -> the first sentence of its docstring.

The task of the paper's CodeXGLUE experiment, on data that every machine with Python has already: the standard library
and the installed packages, read with `ast`. The same packages give the same rows, wherever and whenever it runs.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import site
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple

from . import cache_root, cached_folder


if TYPE_CHECKING:
    from datasets import DatasetDict

# What a teacher reads of a row. A docstring follows code of its own accord: of all templates tried on the untuned
# teacher this one is the best, 3.97 nats per token against 4.12 for "Summary:" and 4.25 without the last newline. The
# newline is also what the student starts from, so that a decoded answer has nothing but white space in front.
PROMPT_TEMPLATE = '{source}\n"""\n'
ROWS_LICENSE = "that of the package each function comes from"

# Part of the cache key: raise it whenever the rows change.
_MINER = 3

SOURCE_CHARACTERS = (40, 1100)
TARGET_WORDS = (4, 24)
# Of the standard library's files. Held-out rows come from there only: it is what every machine has.
HELD_OUT = {"test": 0.2, "validation": 0.12}
# Of one held-out file, or two large modules would be half of the test split.
HELD_OUT_ROWS_PER_FILE = 20
# Share of 5-token shingles in common (Jaccard) from which two functions count as copies.
NEAR_DUPLICATE = 0.4
_SHINGLE = 5
MAX_FILE_BYTES = 1 << 20


class Row(NamedTuple):
    source: str
    target: str
    origin: str  # "json.decoder:JSONDecoder.raw_decode"


def load_python_docstrings(
    packages: Literal["stdlib", "all"] = "all",
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> DatasetDict:
    """Return train, validation and test with the string columns `source`, `target` and `origin`.

    Mined on the first call and kept under `cache_root(cache_dir)`, keyed by the Python version, the installed
    distributions with their versions, and the version of this code.

    Args:
        packages: `"stdlib"`, or `"all"` to add every installed distribution to the training rows.
        cache_dir: where to keep it, see `cache_root`.
        progress: show a bar when mining takes more than five seconds.

    Raises:
        ValueError: `packages` is neither, or too little was found for a test split.
    """
    from datasets import Dataset, DatasetDict

    if packages not in ("stdlib", "all"):
        raise ValueError(f"packages={packages!r} is unknown: expected 'stdlib' or 'all'")
    distributions = installed_distributions() if packages == "all" else {}
    versions = [[name, distribution.version] for name, distribution in sorted(distributions.items())]
    key = json.dumps([_MINER, platform.python_implementation(), platform.python_version(), versions])

    def build(partial: Path) -> None:
        held_out_from = sorted(stdlib_files())
        rest = [file for name in sorted(distributions) for file in sorted(distribution_files(distributions[name]))]
        splits = mine(held_out_from, rest, progress)
        if not all(splits.values()):
            raise ValueError(
                f"Only {sum(map(len, splits.values()))} rows were found in {len(held_out_from)} files of the standard "
                "library: is this a Python without its sources? Give data of your own instead, with --dataset"
            )
        columns = {
            split: {c: [getattr(row, c) for row in rows] for c in Row._fields} for split, rows in splits.items()
        }
        DatasetDict({split: Dataset.from_dict(content) for split, content in columns.items()}).save_to_disk(partial)

    name = f"python-docstrings-{packages}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    return DatasetDict.load_from_disk(cached_folder(cache_root(cache_dir) / name, build))


def lead_sentence(source: str) -> str:
    """The baseline that reads one line: name and parameters as words, "def raw_decode(self, s):" -> "Raw decode s.".

    Text that is no Python function gives its own first sentence, the usual lead baseline of summarisation.
    """
    try:
        (function,) = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return first_sentence(source)
    if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        return first_sentence(source)
    names = [argument.arg for argument in ast.iter_child_nodes(function.args) if isinstance(argument, ast.arg)]
    names = [function.name, *(name for name in names if name not in ("self", "cls"))]
    words = [word for name in names for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    return " ".join(words or names).lower().capitalize() + "."


# Where the files are -------------------------------------------------------------------------------------------------

_SKIPPED_FOLDERS = {
    *("test", "tests", "testing", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"),
    *("_vendor", "vendor", "vendored", "_vendored", "benchmarks", "examples", "node_modules"),
}


def _wanted(path: PurePosixPath, suffixes: tuple[str, ...] = (".py",)) -> bool:
    """Tests describe tests, and vendored code is a copy of something else."""
    return (
        path.suffix in suffixes
        and ".." not in path.parts
        and not path.is_absolute()
        and _SKIPPED_FOLDERS.isdisjoint(path.parts)
        and not re.match(r"test_|conftest\.|.*_test\.py", path.name)
    )


def stdlib_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in names:
            relative = PurePosixPath((Path(folder) / name).relative_to(root).as_posix())
            if _wanted(relative):
                yield str(relative), Path(folder) / name


def installed_distributions() -> dict[str, importlib.metadata.Distribution]:
    """What is installed, by normalised name; asked of the site directories and not of `sys.path`, which has the
    working directory and PYTHONPATH in it."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        paths.append(site.getusersitepackages())
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions(path=list(dict.fromkeys(paths))):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name and name != "hf-encdec-distill":
            found.setdefault(name, distribution)
    return found


def distribution_files(
    distribution: importlib.metadata.Distribution, suffixes: tuple[str, ...] = (".py",)
) -> Iterator[tuple[str, Path]]:
    for path in distribution.files or ():
        if _wanted(path, suffixes):
            yield path.as_posix(), Path(path.locate())


# What is taken from them ---------------------------------------------------------------------------------------------


def mine(
    held_out_from: Iterable[tuple[str, Path]], rest: Iterable[tuple[str, Path]], progress: bool = False
) -> dict[str, list[Row]]:
    """Rows by split, from `(path inside its package, file)` pairs in an order that the caller fixed.

    Split by file, with a hash of the path; test and validation come from `held_out_from` only. A function that is
    there twice, by code or by description, is kept once, where test comes before validation and validation before
    train; then training rows that nearly copy a held-out function go, and validation rows that nearly copy a test one.
    """
    from tqdm.auto import tqdm

    files = [(split_of(path), path, file) for path, file in held_out_from]
    files += [("train", path, file) for path, file in rest]
    order = {"test": 0, "validation": 1, "train": 2}
    files.sort(key=lambda entry: order[entry[0]])  # stable: the caller's order within a split

    splits: dict[str, list[Row]] = {split: [] for split in order}
    seen: set[bytes] = set()
    with _no_garbage_collection():
        for split, path, file in tqdm(files, "mine docstrings", unit=" files", disable=not progress, delay=5):
            fresh = []
            for row in rows_of_file(path, file):
                keys = {digest(_body(row.source)), digest(_normalised(row.target))}
                if seen.isdisjoint(keys):
                    fresh.append(row)
                seen |= keys
            if split != "train":
                fresh = sorted(fresh, key=_place)[:HELD_OUT_ROWS_PER_FILE]
            splits[split] += fresh
    held_out = _ShingleIndex(row.source for row in splits["test"])
    splits["validation"] = [row for row in splits["validation"] if not held_out.has_copy_of(row.source)]
    held_out.add(row.source for row in splits["validation"])
    splits["train"] = [row for row in splits["train"] if not held_out.has_copy_of(row.source)]
    # In the order of a hash, so that the first n rows are a fair sample of all packages.
    return {split: sorted(splits[split], key=_place) for split in ("train", "validation", "test")}


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A syntax tree is many objects and no cycle: looking for cycles took two thirds of the time of `ast.parse`."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def split_of(path: str) -> str:
    position = int.from_bytes(digest(path), "big") / (1 << 64)
    for split, share in HELD_OUT.items():
        if position < share:
            return split
        position -= share
    return "train"


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def _place(row: Row) -> bytes:
    """Orders rows at random, but always in the same way."""
    return digest(row.source)


def _body(source: str) -> str:
    """The code without its `def` line: copies are often renamed."""
    return source.partition("\n")[2]


def _normalised(target: str) -> str:
    return " ".join(re.findall(r"\w+", target.lower()))


class _ShingleIndex:
    """Finds functions that share most of their token 5-grams with one that was added. Exact, and fast enough: a
    function has about a hundred shingles, and few of them occur among the held-out ones."""

    def __init__(self, sources: Iterable[str]):
        self.sizes: list[int] = []
        self.owners: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self.add(sources)

    def add(self, sources: Iterable[str]) -> None:
        for source in sources:
            shingles = self._shingles(source)
            for shingle in shingles:
                self.owners[shingle].append(len(self.sizes))
            self.sizes.append(len(shingles))

    def has_copy_of(self, source: str) -> bool:
        shingles = self._shingles(source)
        common = Counter(owner for shingle in shingles for owner in self.owners.get(shingle, ()))
        return any(
            shared >= NEAR_DUPLICATE * (len(shingles) + self.sizes[owner] - shared) for owner, shared in common.items()
        )

    @staticmethod
    def _shingles(source: str) -> set[tuple[str, ...]]:
        tokens = re.findall(r"\w+|[^\w\s]", _body(source))
        return {tuple(tokens[i : i + _SHINGLE]) for i in range(max(1, len(tokens) - _SHINGLE + 1))}


def rows_of_file(path: str, file: Path) -> list[Row]:
    """The rows of one file in the order of its lines; none if it cannot be read or is no Python 3."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            return []
        content = file.read_bytes()
        if b'"""' not in content and b"'''" not in content:  # spares the parser every fifth file
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(content)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    module = re.sub(r"(^|\.)__init__$", "", path.removesuffix(".py").replace("/", "."))
    rows: list[Row] = []
    _collect(tree, f"{module}:", rows)
    return rows


def _collect(node: ast.AST, prefix: str, rows: list[Row]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            row = _row(child, prefix)
            if row is not None:
                rows.append(row)
        # Functions inside functions describe little that a reader could know; classes and `if` blocks hold methods.
        if isinstance(child, ast.ClassDef):
            _collect(child, f"{prefix}{child.name}.", rows)
        elif isinstance(child, ast.If | ast.Try | ast.With):
            _collect(child, prefix, rows)


def _row(function: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> Row | None:
    if function.name == "__init__":  # described as the class, whose name and purpose the source does not show
        return None
    docstring = ast.get_docstring(function)
    if not docstring or not is_description(target := first_sentence(docstring)):
        return None
    body = function.body[1:]
    if all(_says_nothing(statement) for statement in body):
        return None
    # `ast.unparse` is the slow part, so what is far too long does not get there.
    if (body[-1].end_lineno or 0) - body[0].lineno > SOURCE_CHARACTERS[1] // 10:
        return None
    function.body, function.decorator_list = body, []
    try:
        source = ast.unparse(function)
    except RecursionError:
        return None
    if not SOURCE_CHARACTERS[0] <= len(source) <= SOURCE_CHARACTERS[1] or not source.isascii():
        return None
    return Row(source, target, f"{prefix}{function.name}")


def _says_nothing(statement: ast.stmt) -> bool:
    """`pass`, `...`, another string, `raise NotImplementedError`: nothing there that could be described."""
    if isinstance(statement, ast.Raise):
        return "NotImplementedError" in ast.dump(statement)
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def first_sentence(text: str) -> str:
    """The first sentence of the first paragraph on one line, without reStructuredText and Markdown marks."""
    paragraph = " ".join(re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0].split())
    paragraph = re.sub(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", paragraph)  # :class:`~a.B` -> a.B
    paragraph = re.sub(r"`([^`']+)'", r"'\1'", paragraph)  # `name' -> 'name'
    paragraph = re.sub(r"(`{1,2})(.+?)\1_{0,2}", r"\2", paragraph)  # ``code`` -> code
    for end in re.finditer(r"[.!?](?=\s)", paragraph):
        sentence = paragraph[: end.end()]
        if not _ABBREVIATION.search(sentence):
            return sentence
    return paragraph if paragraph.endswith((".", "!", "?", ":", ",")) else paragraph + "."


# Where a full stop ends no sentence: "e.g. this", "J. Doe".
_ABBREVIATION = re.compile(
    r"\b(?:e\.?g|i\.?e|etc|cf|vs|viz|resp|approx|incl|eqs?|figs?|refs?|dr|st|[a-z])\.$", re.IGNORECASE
)


def is_description(sentence: str) -> bool:
    """Whether a model could learn to say this of the code: a sentence of plain words, no reference, no boilerplate."""
    words = re.findall(r"\w[\w'*.-]*", sentence)
    return (
        TARGET_WORDS[0] <= len(words) <= TARGET_WORDS[1]
        and sentence.isascii()
        and sentence[0].isalpha()
        and not _NO_DESCRIPTION.search(sentence)
    )


_NO_DESCRIPTION = re.compile(
    r"""https?: | www\. | >>> | -> | => | == | -{3} | [|{}<>\\`$@] | [:,]$ | \.\.\.$
    | \b(?:Args|Arguments|Parameters?|Params|Returns?|Raises|Examples?|Notes?|Usage|Yields):
    | :(?:param|return|type|rtype)
    | ^\w[\w.]*\(                       # a signature
    | ^\w+(?:\s\([^)]*\))?:             # "base (int, optional): ..."
    | \*optional\*
    | ^(?:See|Same\ as|Alias\ (?:for|of|to)|Override[sn]?|Overridden|Inherit(?:s|ed)|Deprecated|Refer\ to)\b
    | \b(?:TODO|FIXME|XXX|docstring|deprecated|base\ class|super\ ?class|parent\ class)\b""",
    re.VERBOSE | re.IGNORECASE,
)
