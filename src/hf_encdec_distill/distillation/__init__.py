"""Distillation of a decoder-only teacher into an encoder-decoder student; everything is imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any


_EXPORTS = {
    "DistillationCollator": "collator",
    "DistillationTrainer": "trainer",
    "DistillationTrainingArguments": "arguments",
    "CachedTeacher": "cache",
    "LiveTeacher": "teachers",
    "SharedVocabulary": "alignment",
    "TargetGeneration": "sequence_level",
    "TeacherSignal": "teachers",
    "capture": "cache",
}
__all__ = [
    "CachedTeacher",
    "DistillationCollator",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "LiveTeacher",
    "SharedVocabulary",
    "TargetGeneration",
    "TeacherSignal",
    "capture",
]

if TYPE_CHECKING:
    from .alignment import SharedVocabulary
    from .arguments import DistillationTrainingArguments
    from .cache import CachedTeacher, capture
    from .collator import DistillationCollator
    from .sequence_level import TargetGeneration
    from .teachers import LiveTeacher, TeacherSignal
    from .trainer import DistillationTrainer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
