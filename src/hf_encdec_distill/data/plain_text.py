"""Plain text -> rows for adapting a student before its task: continuing a text, and filling in spans of it.

Documents are tokenised and cut into windows, and every window becomes one ready row:

- `prefix_lm`: the encoder reads the first part of the window, the decoder writes the rest (T5, arXiv 1910.10683,
  section 3.2.3; T5Gemma, arXiv 2504.06225; UL2's S-denoising, arXiv 2205.05131).
- `span_denoising`: the encoder reads the window with spans replaced by sentinels, the decoder writes each sentinel and
  what stood there (T5, section 3.1.4; UL2's R- and X-denoising).
- `ul2`: both, as UL2R mixes them for training a model further (arXiv 2210.11399, section 3.1).

In all of them the teacher reads the window as it stands in the text.

A window never crosses from one document into another: what a text goes on with can't be learnt from where another
one ended, and an instruction-tuned teacher has no token that separates documents. A document of L tokens gives
`ceil(L / window)` windows of nearly the same length: each token is in one of them, and no short end is left over.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tokenizers import Tokenizer

from ..models.prompts import PLACEHOLDER, encode_prompt
from . import fingerprint
from .loading import BUILDERS, check_column, check_utf8, load_tables, named_splits, says_why
from .python_docstrings import (
    MAX_FILE_BYTES,
    digest,
    distribution_files,
    installed_distributions,
    split_of,
    stdlib_files,
)


if TYPE_CHECKING:
    from datasets import IterableDataset

Objective = Literal["prefix_lm", "span_denoising", "ul2"]

# Share of the rows that are prefix and continuation; the others are denoised. For ul2, UL2R's half.
PREFIX_ROWS = {"prefix_lm": 1.0, "span_denoising": 0.0, "ul2": 0.5}
# Mean length of a span and share of the tokens in spans, each for one half of the denoised rows: T5's own, which is
# UL2's R; and one of UL2's X, those with long spans or much in them.
R_DENOISING = (3.0, 0.15)
X_DENOISING = (32.0, 0.5)

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_ABOUT = re.compile(r"readme|licen[cs]e|copying|notice|citation|change|authors", re.IGNORECASE)  # of a data set
# Share of the documents, or windows of a few, that are held out where the corpus has no validation split of its own.
HELD_OUT = 0.05
SHORTEST_WINDOW = 16

_BLOCK_CHARACTERS = 1 << 16
_MOST_SHARDS = 256


def load_plain_text(
    text: str | os.PathLike | None,
    tokenizer,
    *,
    objective: Objective = "prefix_lm",
    window: int = 512,
    start_token_id: int | None = None,
    prefix_share: tuple[float, float] = (0.5, 0.5),
    sentinels: Sequence[int] | None = None,
    split: Literal["train", "validation"] = "train",
    text_column: str = "text",
    config: str | None = None,
    seed: int = 0,
    shuffle_buffer: int = 1000,
) -> IterableDataset:
    """Return ready rows for `DistillationTrainer`, made while they are read.

    `train` has no end (set `max_steps`): documents are shuffled, and each further pass draws other splits and spans.
    `validation` is read once, in order. What is drawn for a window depends on `seed`, its tokens and its place in the
    stream alone, so that a run that is resumed, which reads again and skips, sees the rows it would have seen.

    Rows have `input_ids`, `labels`, `teacher_input_ids` and, for `prefix_lm`, `teacher_labels_start`, else
    `teacher_label_positions`: the teacher is not asked about sentinels and EOS.

    Args:
        text: a `.txt`, `.md`, `.rst` or `.py` file in UTF-8, or a folder with such files in it at any depth (a file is
            a document, one of more than 65,536 characters several); a CSV, TSV, JSON, JSON lines or Parquet file, a
            folder of such files (and a README) or written by `save_to_disk`, or a name on the Hub, of which nothing is
            downloaded before it is read; or `None`: the source and documentation of this Python and of its installed
            packages.
        tokenizer: the teacher's. Windows begin with its BOS if it puts one in front.
        objective: see the module.
        window: most tokens of a window, BOS included.
        start_token_id: of a `merged` student, `config.decoder_start_token_id`. A window is split where that token
            stands in the text, taken out of a longer token if need be, so that encoder, decoder and teacher read the
            same text. Where there is none near, only the student reads the token.
        prefix_share: least and most of the window that the prefix takes, drawn evenly between, and moved to the
            nearest start token. The half wastes least on padding, and is T5Gemma's.
        sentinels: ids that stand for spans, in turn; they come again where a window has more spans. By default
            `find_sentinels(tokenizer)`.
        split: which of the two. Where the corpus has no validation split, it is the documents whose hashes are
            smallest, and of the built-in corpus the files of the standard library from which `load_python_docstrings`
            takes its own validation rows; the files of its test rows are in neither. Where all documents would be on
            one side, as that of a small text file, it is the last windows.
        text_column: column with the text, for tables.
        config: configuration of a dataset on the Hub that has several.
        seed: of all that is drawn.
        shuffle_buffer: windows among which the next one is drawn.

    Raises:
        ValueError: an argument outside its range, no such corpus or column, none or too little text, no sentinels, a
            file that is not in UTF-8, or a folder with text files and tables (a README beside tables is none of its
            texts).
    """
    if objective not in PREFIX_ROWS:
        raise ValueError(f"objective={objective!r} is unknown: expected one of {', '.join(PREFIX_ROWS)}")
    if window < SHORTEST_WINDOW:
        raise ValueError(f"window={window} is too short to split: give at least {SHORTEST_WINDOW} tokens")
    if not 0 < prefix_share[0] <= prefix_share[1] < 1:
        raise ValueError(f"prefix_share={prefix_share} has to be two shares between 0 and 1, the smaller one first")
    if split not in ("train", "validation"):
        raise ValueError(f"split={split!r} is unknown: expected 'train' or 'validation'")
    if PREFIX_ROWS[objective] == 1:
        sentinels = ()
    elif sentinels is None:
        sentinels = find_sentinels(tokenizer)
    rows = _Rows(
        prefix_rows=PREFIX_ROWS[objective],
        start_token_id=start_token_id,
        seams={} if start_token_id is None else find_seams(tokenizer, start_token_id),
        prefix_share=(prefix_share[0], prefix_share[1]),
        sentinels=tuple(sentinels),
        eos_token_id=tokenizer.eos_token_id,
        seed=seed,
    )
    corpus = "the built-in corpus" if text is None else os.fspath(text)
    splits = _documents(text, text_column, config)
    cut = functools.partial(
        _cut, backend=_text_backend(tokenizer), bos=encode_prompt(tokenizer, "", PLACEHOLDER), window=window
    )

    def windows_of(documents: IterableDataset) -> IterableDataset:
        columns = [text_column]
        return documents.map(cut, batched=True, batch_size=16, input_columns=columns, remove_columns=columns)

    if "validation" in splits:
        windows = windows_of(splits[split])
        if not _begins(windows):
            raise ValueError(
                f"{corpus} has no {split} document of {SHORTEST_WINDOW} tokens or more: give more text"
                + (", or do without it (--eval-rows 0)" if split == "validation" else "")
            )
    else:
        sides = {
            side: windows_of(splits["train"].filter(functools.partial(_is_on, side=side), input_columns=[text_column]))
            for side in ("train", "validation")
        }
        windows = sides[split]
        if not all(map(_begins, sides.values())):
            windows = _few(windows_of(splits["train"]), split, corpus)
    if split == "train":
        # Repeated after the shuffling: in a shard without a window, repeating first would never come to an end.
        windows = windows.shuffle(seed=seed, buffer_size=shuffle_buffer).repeat(None)
    return windows.map(rows, with_indices=True, input_columns=["tokens"], remove_columns=["tokens"])


# Rows ----------------------------------------------------------------------------------------------------------------


def _text_backend(tokenizer) -> Tokenizer:
    """The tokenizer without its special tokens: what looks like one is text, perhaps of a page about tokenizers.

    A copy, since `datasets` reads shards in threads, where a tokenizer that each call sets up again fails.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; load it with use_fast=True")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["special"]]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.no_padding()
    backend.no_truncation()
    return backend


def _cut(texts: list[str | None], backend: Tokenizer, bos: list[int], window: int) -> dict[str, list[list[int]]]:
    """Documents -> the windows of each, in order."""
    for text in texts:
        if not isinstance(text, str | None):
            raise ValueError(f"the text column holds {type(text).__name__}, expected text: choose another one")
    windows = []
    for encoding in backend.encode_batch([text or "" for text in texts], add_special_tokens=False):
        ids = encoding.ids
        count = math.ceil(len(ids) / (window - len(bos)))
        ends = [len(ids) * i // count for i in range(count + 1)] if count else [0]
        pieces = (bos + ids[first:last] for first, last in zip(ends, ends[1:]))
        windows += [piece for piece in pieces if len(piece) >= SHORTEST_WINDOW]
    return {"tokens": windows}


@dataclass(frozen=True)
class _Rows:
    """Tokens of a window and its place in the stream -> its row."""

    prefix_rows: float
    start_token_id: int | None
    seams: dict[int, tuple[list[int], list[int]]]
    prefix_share: tuple[float, float]
    sentinels: tuple[int, ...]
    eos_token_id: int | None
    seed: int

    def __call__(self, tokens: list[int], place: int) -> dict:
        rng = np.random.default_rng((self.seed, place, zlib.crc32(np.asarray(tokens, dtype=np.int64).tobytes())))
        if self.prefix_rows < 1 and rng.random() >= self.prefix_rows:
            mean_span, rate = R_DENOISING if rng.random() < 0.5 else X_DENOISING
            spans = draw_spans(len(tokens), mean_span, rate, rng)
            return span_row(tokens, spans, self.sentinels, self.eos_token_id)
        point = round(rng.uniform(*self.prefix_share) * len(tokens))
        row = prefix_row(tokens, point, self.start_token_id, self.seams)
        if self.prefix_rows < 1:  # all rows of a batch have the same columns
            first = row.pop("teacher_labels_start") - 1
            row["teacher_label_positions"] = list(range(first, first + len(row["labels"])))
        return row


def prefix_row(
    tokens: list[int], point: int, start_token_id: int | None, seams: dict[int, tuple[list[int], list[int]]]
) -> dict:
    """The row of a window that is split at the start token nearest to `point`, or, if none is near, there.

    Args:
        tokens: the window.
        point: how many tokens the prefix should have.
        start_token_id: of a merged student, else None.
        seams: what `find_seams` gives.
    """
    reach = len(tokens) // 4
    window = range(max(1, point - reach), min(len(tokens) - 1, point + reach + 1))
    near = [place for place in window if tokens[place] in seams]
    if not near:
        point = min(max(point, 1), len(tokens) - 1)
        row = {"input_ids": tokens[:point], "labels": tokens[point:]}
        return {**row, "teacher_input_ids": tokens, "teacher_labels_start": point}
    place = min(near, key=lambda place: abs(place - point))
    before, after = seams[tokens[place]]
    prefix, labels = tokens[:place] + before, after + tokens[place + 1 :]
    return {
        "input_ids": prefix,
        "labels": labels,
        "teacher_input_ids": [*prefix, start_token_id, *labels],
        "teacher_labels_start": len(prefix) + 1,
    }


def find_seams(tokenizer, start_token_id: int) -> dict[int, tuple[list[int], list[int]]]:
    """The tokens whose text holds that of the start token, each with the tokens of what is before and after it.

    Most lines of code end in a token that has the indentation of the next line in it. Taken apart, such a token is the
    same text, cut as it is where a prompt ends in the start token and a target begins.
    """
    seams: dict[int, tuple[list[int], list[int]]] = {start_token_id: ([], [])}
    start = tokenizer.decode([start_token_id])
    ids = range(len(tokenizer))
    for token, text in zip(ids, tokenizer.batch_decode([[token] for token in ids])):
        # "\ufffd": part of a character, whose bytes this text does not show.
        if token == start_token_id or not start or start not in text or "\ufffd" in text:
            continue
        before, _, after = text.partition(start)
        before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
        if tokenizer.decode([*before, start_token_id, *after]) == text:
            seams[token] = (before, after)
    return seams


def draw_spans(length: int, mean_span: float, rate: float, rng: np.random.Generator) -> list[tuple[int, int]]:
    """First token and end of each span, of `length` tokens of which `rate` are in spans of `mean_span` on average.

    Any such division is as likely as any other; the first token is in no span and the last is (T5's
    `random_spans_noise_mask`, `t5/data/preprocessors.py`).
    """
    hidden = min(max(round(length * rate), 1), length - 1)
    spans = min(max(round(hidden / mean_span), 1), hidden, length - hidden)

    def lengths(total: int) -> np.ndarray:
        cuts = np.sort(rng.choice(total - 1, size=spans - 1, replace=False)) + 1
        return np.diff(np.concatenate([[0], cuts, [total]]))

    ends = np.cumsum(np.stack([lengths(length - hidden), lengths(hidden)], axis=1).ravel()).tolist()
    return list(zip(ends[::2], ends[1::2]))


def span_row(
    tokens: list[int], spans: list[tuple[int, int]], sentinels: Sequence[int], eos_token_id: int | None
) -> dict:
    """The row of a window with `spans` (as from `draw_spans`) replaced; targets end in EOS, where there is one."""
    inputs, labels, positions, end = [], [], [], 0
    for number, (first, last) in enumerate(spans):
        sentinel = sentinels[number % len(sentinels)]
        inputs += [*tokens[end:first], sentinel]
        labels += [sentinel, *tokens[first:last]]
        positions += [-1, *range(first - 1, last - 1)]
        end = last
    if eos_token_id is not None:
        labels.append(eos_token_id)
        positions.append(-1)
    inputs += tokens[end:]
    return {
        "input_ids": inputs,
        "labels": labels,
        "teacher_input_ids": tokens,
        "teacher_label_positions": positions,
    }


def find_sentinels(tokenizer) -> list[int]:
    """Ids that can stand for spans: tokens kept for such use (`<extra_id_0>`, `<|reserved_special_token_0|>`,
    `<unused0>`), or else special tokens that neither have a role nor are in the chat template.

    SmolLM2 has 14 of the second kind, from `<repo_name>` to `<empty_output>`. A text does not hold them, and the
    teacher is not asked about them.

    Raises:
        ValueError: there is none; says how to add some.
    """
    roles = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
    taken = {getattr(tokenizer, f"{role}_token_id", None) for role in roles}
    template = str(tokenizer.chat_template or "")
    free = {
        token_id: token
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
        if token_id not in taken and token.content not in template
    }
    kept = [i for i, token in free.items() if re.search(r"extra_id|sentinel|reserved|unused", token.content)]
    sentinels = kept or [i for i, token in free.items() if token.special]
    if not sentinels:
        raise ValueError(
            f"{type(tokenizer).__name__} has no free special token to stand for a span. Add some to the student's "
            "tokenizer, tokenizer.add_special_tokens({'additional_special_tokens': ['<extra_id_0>', ...]}), then "
            "student.resize_token_embeddings(len(tokenizer)), and give their ids as sentinels; or use prefix_lm."
        )
    return sentinels


# Documents -----------------------------------------------------------------------------------------------------------


def _documents(text: str | os.PathLike | None, column: str, config: str | None) -> Mapping[str, IterableDataset]:
    """Streams with the texts in `column`: train, and validation where the corpus has one of its own."""
    if text is None:
        return {split: _stream(_builtin_files()[split], column) for split in ("train", "validation")}
    files = _text_files(Path(text).expanduser())
    if files:
        return {"train": _stream(files, column)}
    splits = named_splits(load_tables(text, config, [column], True), text)
    if "train" not in splits:
        raise ValueError(
            f"{text} has no training text, only the split {' and '.join(splits)}: give a file for train too"
        )
    for documents in splits.values():
        with says_why(text):
            columns = next(iter(documents), {column: None})
        check_column(column, columns, "--text-column")
    return {split: splits[split].select_columns([column]) for split in ("train", "validation") if split in splits}


def _begins(windows: IterableDataset) -> bool:
    return next(iter(windows), None) is not None


def _is_on(text: str | None, side: str) -> bool:
    held_out = int.from_bytes(digest(str(text)), "big") < HELD_OUT * (1 << 64)
    return held_out == (side == "validation")


def _few(windows: IterableDataset, split: str, corpus: str) -> IterableDataset:
    """The windows of a corpus of few documents, without or with only the last ones."""
    from datasets import Dataset

    every = list(windows)
    if not every:
        raise ValueError(
            f"{corpus} has no document of {SHORTEST_WINDOW} tokens or more, where a file, or a row of a table, is a "
            "document: give more text, or join short rows"
        )
    if split == "validation" and len(every) == 1:
        raise ValueError(
            f"{corpus} has one window of text, of {len(every[0]['tokens'])} tokens, and none to hold out: give more "
            "text, a shorter --window, or --eval-rows 0"
        )
    first = len(every) - min(max(round(HELD_OUT * len(every)), 1), len(every) - 1)
    return Dataset.from_list(every[:first] if split == "train" else every[first:]).to_iterable_dataset()


def _text_files(path: Path) -> list[Path]:
    """The text files that a path stands for; none if it is a name, a table or a folder of tables.

    Raises:
        ValueError: a file that is neither, or is not in UTF-8; a folder of both.
    """
    if path.is_file():
        if path.suffix.lower() not in (*TEXT_SUFFIXES, *BUILDERS):
            raise ValueError(
                f"{path} has the suffix {path.suffix!r}, expected one of {', '.join((*TEXT_SUFFIXES, *BUILDERS))}"
            )
        if path.suffix.lower() in BUILDERS:
            return []
        check_utf8(path)  # before training: `_read` would drop what is no UTF-8
        return [path]
    files = [file for file in path.rglob("*") if file.is_file()]
    texts = [file for file in files if file.suffix.lower() in TEXT_SUFFIXES]
    tables = [file for file in files if file.suffix.lower() in (*BUILDERS, ".arrow")]
    corpus = [file for file in texts if file.parent != path or not _ABOUT.match(file.name)]
    if tables and not corpus:
        return []
    tables = [file for file in tables if file.suffix.lower() != ".json"]  # which source code has beside it
    if tables:
        text, table = (str(min(some).relative_to(path)) for some in (corpus, tables))
        raise ValueError(
            f"{path} holds text files, such as {text}, and tables, such as {table}: only one kind is read, so give a "
            "folder that has no other"
        )
    for file in texts:
        check_utf8(file)
    return _distinct(texts)


def _distinct(files: Iterable[Path]) -> list[Path]:
    """The first file of each content, in the order of its hash: at random, but always in the same way."""
    by_content: dict[str, Path] = {}
    for file in files:
        by_content.setdefault(fingerprint(file)[1], file)
    return [by_content[content] for content in sorted(by_content)]


@functools.cache
def _builtin_files() -> dict[str, list[Path]]:
    """Python sources and documentation by split; what is there twice is in the first of test, validation and train."""
    files: dict[str, list[Path]] = {"test": [], "validation": [], "train": []}
    for path, file in sorted(stdlib_files()):
        files[split_of(path)].append(file)
    for _, distribution in sorted(installed_distributions().items()):
        for path, file in sorted(distribution_files(distribution, (*TEXT_SUFFIXES, ""))):
            # METADATA has what the package's page on PyPI says.
            if file.name == "METADATA" or (file.suffix and ".dist-info/" not in path):
                files["train"].append(file)
    documentation = Path(sys.base_prefix, "share", "doc")
    files["train"] += sorted(file for file in documentation.rglob("*") if file.suffix in TEXT_SUFFIXES)
    readable = (file for group in files.values() for file in group if file.is_file())
    distinct = _distinct(file for file in readable if file.stat().st_size <= MAX_FILE_BYTES)
    members = {split: set(group) for split, group in files.items()}
    return {split: [file for file in distinct if file in group] for split, group in members.items()}


def _stream(files: list[Path], column: str) -> IterableDataset:
    from datasets import Features, IterableDataset, Value

    shards = [[str(file) for file in files[first::_MOST_SHARDS]] for first in range(min(len(files), _MOST_SHARDS))]
    return IterableDataset.from_generator(
        _read, features=Features({column: Value("string")}), gen_kwargs={"shards": shards, "column": column}
    )


def _read(shards: list[list[str]], column: str) -> Iterator[dict[str, str]]:
    for shard in shards:
        for file in shard:
            with Path(file).open(encoding="utf-8-sig", errors="ignore") as stream:  # as some packages need it
                while lines := stream.readlines(_BLOCK_CHARACTERS):  # whole ones
                    yield {column: "".join(lines)}
