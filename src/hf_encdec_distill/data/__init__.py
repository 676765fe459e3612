"""The built-in demonstration: a task and a teacher that need no Hub, and where they are kept.

Everything is imported on first use: `import hf_encdec_distill.data` costs nothing.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path


_EXPORTS = {
    "fetch_builtin_teacher": "builtin_teacher",
    "load_builtin_teacher": "builtin_teacher",
    "PROMPT_TEMPLATE": "python_docstrings",
    "lead_sentence": "python_docstrings",
    "load_python_docstrings": "python_docstrings",
    "load_pairs": "loading",
    "save_pairs": "loading",
    "find_sentinels": "plain_text",
    "load_plain_text": "plain_text",
}
__all__ = [*_EXPORTS, "cache_root", "cached_folder", "fingerprint"]

_RECORD = "files.sha256.json"
logger = logging.getLogger(__name__)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
    folder built anew. Of several processes one builds and the others wait for it.
    """
    from filelock import FileLock

    if _damage(folder) is None:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        damage = _damage(folder)
        if damage is None:
            return folder
        if folder.exists():
            logger.warning("%s is made anew: %s", folder, damage)
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
    from huggingface_hub.utils.sha import sha_fileobj

    with file.open("rb") as stream:
        return [file.stat().st_size, sha_fileobj(stream).hex()]
