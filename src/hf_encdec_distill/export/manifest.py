"""`exported.json`: what the graphs of an exported folder are, and the hash of every file of theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..files import inside, one_line, read_json, sha256
from .backends import backend_of, check_installed, targets
from .graphs import Graphs
from .recipe import Shapes, graphs


MANIFEST = "exported.json"
MANIFEST_VERSION = 1
_FIELDS = {
    "version": int,
    "target": str,
    "shapes": str,
    "stateful": bool,
    "variant": str,
    "cache_dtype": str,
    "files": dict,
}


def write_manifest(
    folder: Path,
    target: str,
    variant: str,
    shapes: Shapes,
    stateful: bool,
    cache_dtype: str,
    options: Mapping[str, Any] | None = None,
) -> None:
    """
    Args:
        options: what else was asked for.
    """
    content = {
        "version": MANIFEST_VERSION,
        "package": __version__,
        "target": target,
        "variant": variant,
        "shapes": str(shapes),
        "stateful": stateful,
        "cache_dtype": cache_dtype,
        **(options or {}),
        "files": {name: sha256(folder / name) for name in _files_of(folder, target)},
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict:
    """`exported.json` of a folder, after a look at every file that it names.

    Raises:
        ValueError: there is none, it is of a newer version, or a file is missing, changed, outside of the folder or
            without a hash.
    """
    try:
        manifest = read_json(folder / MANIFEST, fields=_FIELDS)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} holds no export: make one with hf-encdec-distill export MODEL {folder}") from None
    if manifest["target"] not in targets():
        raise ValueError(f"{folder / MANIFEST} names the target {manifest['target']!r}: export it again")
    if manifest["cache_dtype"] not in ("float32", "float16"):
        raise ValueError(f"{folder / MANIFEST} stores keys and values as {manifest['cache_dtype']!r}: export it again")
    if manifest["version"] > MANIFEST_VERSION:
        raise ValueError(
            f"{folder / MANIFEST} is of version {manifest['version']}, this package reads up to {MANIFEST_VERSION}: "
            "pip install -U hf-encdec-distill"
        )
    size = manifest.get("image_size", [1, 1])
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"{folder / MANIFEST} has image_size={size!r}, expected [height, width]: export it again")
    unnamed = [name for name in _files_of(folder, manifest["target"]) if name not in manifest["files"]]
    if unnamed or not manifest["files"]:
        raise ValueError(
            f"{folder / MANIFEST} has no hash of {', '.join(unnamed) or 'any file'}, expected one of each file of the "
            "graphs: remove what does not belong there, or export the model again"
        )
    for name, digest in manifest["files"].items():
        file = inside(folder, name)
        found = sha256(file) if file.is_file() else "missing"
        if found != digest:
            state = "missing" if found == "missing" else f"changed after the export (sha256 {found}, not {digest})"
            raise ValueError(f"{folder / name} is {state}: export the model again")
    return manifest


def _files_of(folder: Path, target: str) -> list[str]:
    """The files that a target's graphs are, relative to the folder; none is hidden, as those that macOS adds are."""
    paths = {path for glob in backend_of(target).files for path in folder.glob(glob) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in paths if not path.name.startswith("."))


def load_graphs(folder: Path, manifest: Mapping[str, Any], config) -> Graphs:
    """The graphs of a folder on the runtime of their target.

    Args:
        config: of the model, or anything with its fields.

    Raises:
        ImportError: the runtime is missing; the message has the line that installs it.
        ValueError: the manifest's shapes are none, or the graphs are not those of the config.
    """
    shapes, dtype = Shapes.parse(manifest["shapes"]), np.dtype(manifest["cache_dtype"])  # whatever is installed
    check_installed(manifest["target"], to_run=True)
    recipe = graphs(config, shapes, manifest.get("image_size"))
    backend = backend_of(manifest["target"])
    try:
        return backend.load(folder, recipe, shapes, dtype, manifest["stateful"])
    except ValueError:
        raise
    except Exception as error:  # each runtime has its own
        raise ValueError(
            f"{folder} does not load in {backend.runtime}: {one_line(error)}. Export the model again"
        ) from error
