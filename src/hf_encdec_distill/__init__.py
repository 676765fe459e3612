"""Distil a decoder-only language model into a RoPE encoder-decoder that plugs into transformers.

Importing the package registers the model with the `Auto` classes, and more with transformers' pipelines and with
Optimum, once those are imported (see `registration`). What is named here is imported on first use (PEP 562).
"""

import importlib

from .registration import register


register()

__version__ = "0.1.0"

_ON_FIRST_USE = {
    "DistillationTrainer": "distillation.trainer",
    "DistillationTrainingArguments": "distillation.arguments",
    "RopeEncDecConfig": "models.rope_encdec",
    "RopeEncDecEncoderModel": "models.rope_encdec",
    "RopeEncDecForConditionalGeneration": "models.rope_encdec",
    "RopeEncDecModel": "models.rope_encdec",
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
