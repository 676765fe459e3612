"""Distil a decoder-only language model into a RoPE encoder-decoder that plugs into transformers.

Importing the package registers the model with the `Auto` classes, and with Optimum once that is imported; everything
else is imported on first use (PEP 562).
"""

import importlib

from .export.optimum_registration import register_with_optimum
from .models.rope_encdec import (
    RopeEncDecConfig,
    RopeEncDecEncoderModel,
    RopeEncDecForConditionalGeneration,
    RopeEncDecModel,
)


register_with_optimum()

__version__ = "0.1.0"

_ON_FIRST_USE = {
    "DistillationTrainer": "distillation.trainer",
    "DistillationTrainingArguments": "distillation.arguments",
}

__all__ = [
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "RopeEncDecConfig",
    "RopeEncDecEncoderModel",
    "RopeEncDecForConditionalGeneration",
    "RopeEncDecModel",
]


def __getattr__(name):
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ON_FIRST_USE[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *_ON_FIRST_USE})
