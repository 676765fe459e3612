"""Model cards, written from what was measured; everything is imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any


_EXPORTS = {
    "ModelCardCallback": "callback",
    "model_index": "index",
    "update_model_card": "index",
    "write_model_card": "model_card",
}
__all__ = ["ModelCardCallback", "model_index", "update_model_card", "write_model_card"]

if TYPE_CHECKING:
    from .callback import ModelCardCallback
    from .index import model_index, update_model_card
    from .model_card import write_model_card


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
