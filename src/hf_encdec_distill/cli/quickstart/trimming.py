"""The teacher with a smaller vocabulary, before it is taught: its student then has the same tokens from the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from ...models.either_version import save_teacher
from ...models.loading import load_teacher, load_tokenizer
from ...models.vocabulary import trim_to_rows, trim_vocabulary


def trim_teacher(
    path: str, size: int, rows: Mapping[str, Sequence[str]], template: str, folder: Path
) -> tuple[str, list[int]]:
    """Write a teacher with the tokens that are most frequent in the training rows.

    Args:
        path: the teacher, a folder or a Hub id.
        size: most tokens to keep; 0 keeps all.
        rows: the columns `source` and `target`.
        template: the prompt's.
        folder: for the teacher that is written.

    Returns:
        Where the teacher is, and how many tokens it has and had; `path` and nothing where none had to go.

    Raises:
        ValueError: its tokenizer cannot be trimmed, or not so far.
    """
    tokenizer = load_tokenizer(path)
    if not size or len(tokenizer) <= size:
        return path, []
    try:
        trimmed = trim_to_rows(tokenizer, rows, size, template)
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}. Keep the teacher's tokens with --vocabulary 0.") from error
    teacher = load_teacher(path, dtype="auto")
    if not isinstance(teacher, PreTrainedModel):
        teacher = teacher.merge_and_unload()  # an adapter, whose base has all tokens
    trim_vocabulary(teacher, tokenizer, trimmed)
    save_teacher(teacher, trimmed, folder)
    return str(folder), [len(trimmed), len(tokenizer)]
