"""`export_model`: a student, a target, a variant -> a folder that is whole or not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..files import filling, is_used
from ..models.prompts import in_a_class_of_both_versions
from .backends import backend_of, check_installed
from .manifest import write_manifest
from .modules import in_float32
from .recipe import Shapes, check_exportable, check_options, graphs, size_of_images, that_fit


def check_new(folder: Path) -> None:
    """Raises ValueError if something is there already."""
    if is_used(folder):
        raise ValueError(f"{folder} is not empty: remove it, or choose another folder")


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
        model: a [`RopeEncDecForConditionalGeneration`] or [`RopeEncDecForImageTextToText`]. It stays as it is:
            where it is in another type than float32, a float32 copy is exported.
        tokenizer: its tokenizer, or `None`; of a student that reads images its processor, whose size of images is that
            of the graphs.
        folder: new or empty; gets its content when all is written.
        stateful: whether the runtime keeps the target's keys and values. `None` is the target's way: OpenVINO does,
            Core ML does in half precision (its states have no other), ONNX does not.
        license: of the weights, as an identifier that the Hub knows; written into the files.
        calibration: for OpenVINO's int4, rows of training data, `inputs` (prompt token ids) and `labels` (target token
            ids with EOS), whose activations say which weights matter.
        kv_cache_precision: of a stateful OpenVINO decoder, one of [`openvino.KV_CACHE_PRECISIONS`], written into the
            file. `None` leaves it to whoever runs the file.

    Raises:
        ValueError: the folder is in use, no row of `calibration` fits the shapes, the target cannot
            do what is asked for, or see [`recipe.check_exportable`].
        ImportError: the target's package is missing; the message has the line that installs it.
    """
    shapes = shapes or Shapes()
    processor, tokenizer = tokenizer, getattr(tokenizer, "tokenizer", tokenizer)
    image_size = size_of_images(model.config, processor)
    check_exportable(model, target, variant, shapes, image_size)
    options: dict[str, Any] = {"calibration": calibration, "kv_cache_precision": kv_cache_precision}
    options = {name: value for name, value in options.items() if value is not None}
    check_options(target, variant, options)
    if calibration is not None:
        options["calibration"] = that_fit(calibration, shapes)
    backend = backend_of(target)
    shapes, stateful = backend.settle(model.config, variant, shapes, stateful, options)
    folder = Path(folder)
    check_new(folder)
    check_installed(target)
    with filling(folder) as partial:
        with torch.no_grad(), _tokenizer_of(model, tokenizer), in_float32(model) as exact:
            recipe = graphs(model.config, shapes, image_size)
            backend.export(exact, recipe, shapes, variant, stateful, partial, license, options)
        model.config.save_pretrained(partial)
        model.generation_config.save_pretrained(partial)
        if processor is not tokenizer:
            processor.save_pretrained(partial)
        if tokenizer is not None:
            in_a_class_of_both_versions(tokenizer).save_pretrained(partial)
            backend.write_tokenizer(tokenizer, model, partial)
        if calibration is not None:
            options["calibration"] = len(options["calibration"])
        if image_size is not None:
            options["image_size"] = list(image_size)
        write_manifest(partial, target, variant, shapes, stateful, backend.cache_dtype(variant), options)
    return folder.resolve()


@contextmanager
def _tokenizer_of(model, tokenizer) -> Iterator[None]:
    """The model has this one in the block, where it is not `None`: GGUF has the vocabulary in the file."""
    own = model.tokenizer
    model.tokenizer = own if tokenizer is None else tokenizer
    try:
        yield
    finally:
        model.tokenizer = own
