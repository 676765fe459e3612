"""The built-in demonstration: a task and a teacher that need no Hub, and where they are kept.

Everything is imported on first use: `import hf_encdec_distill.data` costs nothing.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .._lazy import on_first_use
from ..files import sha256


if TYPE_CHECKING:
    from .builtin_teacher import fetch_builtin_teacher as fetch_builtin_teacher
    from .builtin_teacher import load_builtin_teacher as load_builtin_teacher
    from .builtin_vision_tower import fetch_builtin_vision_tower as fetch_builtin_vision_tower
    from .builtin_vision_tower import load_builtin_vision_tower as load_builtin_vision_tower
    from .loading import load_pairs as load_pairs
    from .loading import save_pairs as save_pairs
    from .plain_text import find_sentinels as find_sentinels
    from .plain_text import load_plain_text as load_plain_text
    from .python_docstrings import PROMPT_TEMPLATE as PROMPT_TEMPLATE
    from .python_docstrings import lead_sentence as lead_sentence
    from .python_docstrings import load_python_docstrings as load_python_docstrings
else:
    __getattr__, __dir__, __all__ = on_first_use(
        __name__,
        {
            ".builtin_teacher": ["fetch_builtin_teacher", "load_builtin_teacher"],
            ".builtin_vision_tower": ["fetch_builtin_vision_tower", "load_builtin_vision_tower"],
            ".loading": ["load_pairs", "save_pairs"],
            ".plain_text": ["find_sentinels", "load_plain_text"],
            ".python_docstrings": ["PROMPT_TEMPLATE", "lead_sentence", "load_python_docstrings"],
        },
    )
    __all__ += ["cache_root", "cached_folder", "fingerprint"]

_RECORD = "files.sha256.json"
logger = logging.getLogger(__name__)


def cache_root(cache_dir: str | os.PathLike | None = None) -> Path:
    """`cache_dir`, else `$HF_ENCDEC_DISTILL_CACHE`, else `hf_encdec_distill` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if cache_dir is None:
        cache_dir = os.environ.get("HF_ENCDEC_DISTILL_CACHE") or (
            Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hf_encdec_distill"
        )
    return Path(cache_dir).expanduser()


def cached_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, after `build(empty_folder)` has filled it if it is not there, or not as it was written.

    The folder appears in one rename, with size and SHA-256 of each of its files, which every later call checks: a
    build that was interrupted leaves nothing that looks finished, and a file that was cut or altered is found and the
    folder built again. Of several processes one builds and the others wait for it.

    Raises:
        ValueError: nothing can be written beside `folder`.
    """
    from filelock import FileLock

    if _damage(folder) is None:
        return folder
    _make_writable(folder.parent)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        damage = _damage(folder)
        if damage is None:
            return folder
        if folder.exists():
            logger.warning("%s is made again: %s", folder, damage)
            shutil.rmtree(folder)
        # One fixed name is safe under the lock, and what a killed process left there goes away here.
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            build(partial)
            record = {file.relative_to(partial).as_posix(): fingerprint(file) for file in _files(partial)}
            (partial / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror
    else:
        if os.access(folder, os.W_OK):
            return
        why = "no permission"
    raise ValueError(
        f"nothing can be written to {folder} ({why}): name another folder with the environment variable "
        "HF_ENCDEC_DISTILL_CACHE"
    )


def _damage(folder: Path) -> str | None:
    """What is wrong with a cached folder, or `None`."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        for name, (size, digest) in record.items():
            file = folder / name
            # The size first: it costs nothing, and most damage is a file that was cut.
            if file.stat().st_size != size or fingerprint(file) != [size, digest]:
                return f"{name} is not what was written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def fingerprint(file: Path) -> list:
    """Size in bytes and SHA-256 of a file, read in blocks."""
    return [file.stat().st_size, sha256(file)]
