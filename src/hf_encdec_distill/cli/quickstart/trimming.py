"""The teacher with a smaller vocabulary, before it is taught: its student then has the same tokens from the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...models.either_version import save_teacher
from ...models.loading import base_of, load_merged_teacher, load_tokenizer
from ...models.vocabulary import trim_to_rows, trim_vocabulary


def trim_teacher(
    path: str, size: int, rows: Mapping[str, Sequence[str]], template: str, folder: Path
) -> tuple[str, list[int]]:
    """Write a teacher with the tokens that are most frequent in the training rows, and an adapter merged.

    Args:
        path: the teacher, a folder or a Hub id.
        size: most tokens to keep; 0 keeps all.
        rows: the columns `source` and `target`.
        template: the prompt's.
        folder: for the teacher that is written.

    Returns:
        Where the teacher is, and how many tokens it has and had, or nothing where none had to go; `path` where nothing
        had to be done.

    Raises:
        ValueError: its tokenizer cannot be trimmed, or not so far.
    """
    tokenizer = load_tokenizer(path)
    if not size or len(tokenizer) <= size:
        if base_of(path) == path:
            return path, []
        save_teacher(load_merged_teacher(path, dtype="auto"), tokenizer, folder)
        return str(folder), []
    try:
        trimmed = trim_to_rows(tokenizer, rows, size, template)
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}. Keep the teacher's tokens with --vocabulary 0.") from error
    teacher = load_merged_teacher(path, dtype="auto")
    trim_vocabulary(teacher, tokenizer, trimmed)
    save_teacher(teacher, trimmed, folder)
    return str(folder), [len(trimmed), len(tokenizer)]
