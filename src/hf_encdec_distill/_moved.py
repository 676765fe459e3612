"""Modules that documentation before 0.1.0 imported from: their names are found in their new place. Goes with 0.2."""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


_PACKAGE = __name__.rpartition(".")[0]
MOVED = {
    "distillation.cache": ("distillation.teachers.recorded", "distillation.teachers.capture"),
    "distillation.fidelity": ("evaluation.fidelity",),
    "distillation.metrics": ("metrics.texts",),
    "model_card": ("cards.model_card", "cards.index", "metrics.measures"),
    "model_card_callback": ("cards.callback",),
}


class _MovedModules(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        homes = MOVED[module.__name__.partition(".")[2]]

        def __getattr__(name: str) -> Any:
            if not name.startswith("__"):
                for home in homes:
                    found = importlib.import_module(f"{_PACKAGE}.{home}")
                    if hasattr(found, name):
                        message = f"{module.__name__}.{name} has moved to {found.__name__}"
                        warnings.warn(message, DeprecationWarning, stacklevel=2)
                        return getattr(found, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = __getattr__  # type: ignore[method-assign]  # PEP 562 asks for it


def find_moved_modules() -> None:
    sys.meta_path.append(_MovedModules())
