"""Names of a package that are imported on first use (PEP 562), so that importing the package costs nothing."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def on_first_use(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package.

    Called in the `else:` of an `if TYPE_CHECKING:` that imports the same names: type checkers and editors then know
    these, and no others.

    Args:
        package: its `__name__`.
        names: for each module, relative to the package, the names that it has.
    """
    module_of = {name: module for module, several in names.items() for name in several}

    def __getattr__(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module_of[name], package), name)

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return __getattr__, __dir__, list(module_of)
