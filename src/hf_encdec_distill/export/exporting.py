"""`export_model`: a student, a target, a variant -> a folder that is whole or not there."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..models.prompts import in_a_class_of_both_versions
from .graphs import check_installed
from .recipe import Shapes, check_exportable, check_openvino_options, graphs, that_fit
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
    calibration: Sequence[Mapping[str, Any]] | None = None,
    kv_cache_precision: str | None = None,
) -> Path:
    """Write the graphs of a student, its config, generation config and tokenizer, and `exported.json`.

    Args:
        model: a [`RopeEncDecForConditionalGeneration`].
        tokenizer: its tokenizer, or `None`.
        folder: new or empty; takes its name when everything is in it.
        stateful: whether the runtime keeps the target's keys and values. `None` is the target's way: OpenVINO does,
            Core ML does in half precision (its states have no other), ONNX does not.
        license: of the weights, as an identifier that the Hub knows; written into the files.
        calibration: for OpenVINO's int4, rows of training data, `inputs` (prompt token ids) and `labels` (target token
            ids with EOS), whose activations say which weights matter.
        kv_cache_precision: of a stateful OpenVINO decoder, one of [`recipe.KV_CACHE_PRECISIONS`], written into the
            file. `None` leaves it to whoever runs the file.

    Raises:
        ValueError: the folder is in use, no row of `calibration` fits the shapes, or see [`recipe.check_exportable`]
            and [`recipe.check_openvino_options`].
        ImportError: the target's package is missing; the message has the line that installs it.
    """
    shapes = shapes or Shapes()
    check_exportable(model, target, variant, shapes)
    calibrated = calibration is not None
    check_openvino_options(model.config, target, variant, shapes, stateful, calibrated, kv_cache_precision)
    options: dict[str, Any] = {}
    if calibrated:
        options["calibration"] = that_fit(calibration, shapes)
    if kv_cache_precision is not None:
        options["kv_cache_precision"] = kv_cache_precision
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
            recipe = graphs(model.config, shapes)
            backend.export(model.eval(), recipe, shapes, variant, stateful, partial, license, **options)
        model.config.save_pretrained(partial)
        model.generation_config.save_pretrained(partial)
        if tokenizer is not None:
            in_a_class_of_both_versions(tokenizer).save_pretrained(partial)
        if calibrated:
            options["calibration"] = len(options["calibration"])
        write_manifest(partial, target, variant, shapes, stateful, backend.cache_dtype(variant), options)
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


def write_manifest(
    folder: Path,
    target: str,
    variant: str,
    shapes: Shapes,
    stateful: bool,
    cache_dtype: str,
    options: Mapping[str, Any] | None = None,
) -> None:
    """`exported.json`: what the graphs are, and the hash of every file of theirs.

    Args:
        options: what else was asked for.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_of_graphs(path.relative_to(folder)))
    content = {
        "version": MANIFEST_VERSION,
        "package": __version__,
        "target": target,
        "variant": variant,
        "shapes": str(shapes),
        "stateful": stateful,
        "cache_dtype": cache_dtype,
        **(options or {}),
        "files": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _is_of_graphs(path: Path) -> bool:
    return path.suffix in (".onnx", ".onnx_data", ".xml", ".bin") or ".mlpackage" in path.parts[0]
