"""`export_model`: a student, a target, a variant -> a folder that is whole or not there."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import torch

from .. import __version__
from .graphs import check_installed
from .recipe import Shapes, check_exportable, graphs
from .runtime import MANIFEST, MANIFEST_VERSION, sha256


def export_model(
    model,
    tokenizer,
    target: str,
    folder: Path,
    variant: str = "fp32",
    shapes: Shapes | None = None,
    stateful: bool | None = None,
    license: str = "unknown",
) -> Path:
    """Write the graphs of a student, its config, generation config and tokenizer, and `exported.json`.

    Args:
        model: a [`RopeEncDecForConditionalGeneration`].
        tokenizer: its tokenizer, or `None`.
        folder: new or empty; takes its name when everything is in it.
        stateful: whether the runtime keeps the target's keys and values. `None` is the target's way: OpenVINO does,
            Core ML does in half precision (its states have no other), ONNX does not.
        license: of the weights, as an identifier that the Hub knows; written into the files.

    Raises:
        ValueError: the folder is in use, or see [`recipe.check_exportable`].
        ImportError: the target's package is missing; the message has the line that installs it.
    """
    shapes = shapes or Shapes()
    check_exportable(model, target, variant, shapes)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose a folder that is not there yet")
    backend = backend_of(target)
    check_installed(target)
    shapes, stateful = backend.settle(model.config, variant, shapes, stateful)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with torch.no_grad():
            backend.export(model.eval(), graphs(model.config, shapes), shapes, variant, stateful, partial, license)
        model.config.save_pretrained(partial)
        model.generation_config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        write_manifest(partial, target, variant, shapes, stateful, backend.cache_dtype(variant))
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def backend_of(target: str):
    """The module of a target, with `settle`, `cache_dtype` and `export`."""
    return importlib.import_module(f".{target}", __package__)


def write_manifest(folder: Path, target: str, variant: str, shapes: Shapes, stateful: bool, cache_dtype: str) -> None:
    """`exported.json`: what the graphs are, and the hash of every file of theirs."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_of_graphs(path.relative_to(folder)))
    content = {
        "version": MANIFEST_VERSION,
        "package": __version__,
        "target": target,
        "variant": variant,
        "shapes": str(shapes),
        "stateful": stateful,
        "cache_dtype": cache_dtype,
        "files": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _is_of_graphs(path: Path) -> bool:
    return path.suffix in (".onnx", ".onnx_data", ".xml", ".bin") or ".mlpackage" in path.parts[0]
