"""The targets of an export: what each is and does (`Backend`), and which there are.

A target is one file of this folder, named in `_MODULES`. It is imported when it is first asked for, and imports its
own packages only where it uses them, so that nothing here needs any of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar


if TYPE_CHECKING:
    from .graphs import Graphs
    from .recipe import Graph, Shapes


class Backend(Protocol):
    """An export target.

    Attributes:
        name: what `--target` takes, and the extra of this package that installs `packages`.
        label: the format, as people call it.
        runtime: what runs it, as people call it.
        packages: modules that it needs, first the one that runs an export.
        variants: of [`recipe.BOUNDS`], those that it can write.
        files: glob patterns of the files that `export` writes.
        flexible_prompts: whether it takes `ranged` and `enumerated` shapes.
        reads_images: whether it takes students that read images, whose graphs are three.
        own_options: options of [`export_model`] that not every target has -> the error where they do not apply, with
            `{target}` and `{variant}` for what was asked for.
        rows: test rows that the command compares on by default.
    """

    name: str
    label: str
    runtime: str
    packages: tuple[str, ...]
    variants: tuple[str, ...]
    files: tuple[str, ...]
    flexible_prompts: bool = False
    reads_images: bool = False
    own_options: Mapping[str, str] = MappingProxyType({})
    rows: int = 24

    @abstractmethod
    def settle(
        self, config, variant: str, shapes: Shapes, stateful: bool | None, options: Mapping[str, Any]
    ) -> tuple[Shapes, bool]:
        """Shapes and statefulness where the user has left them open.

        Args:
            options: those of `own_options` that were given. Rows may still have to be loaded: ask for the key alone.

        Raises:
            ValueError: the target cannot do what is asked for.
        """

    @abstractmethod
    def cache_dtype(self, variant: str) -> str:
        """NumPy's name for the type of the keys and values that go in and out: `float32` or `float16`."""

    @abstractmethod
    def export(
        self,
        model,
        graphs: Mapping[str, Graph],
        shapes: Shapes,
        variant: str,
        stateful: bool,
        folder: Path,
        license: str,
        options: Mapping[str, Any],
    ) -> None:
        """Write the graphs of `model`, a [`RopeEncDecForConditionalGeneration`] in float32 and evaluation mode, into
        `folder`.

        Args:
            graphs: from [`recipe.graphs`].
            shapes, stateful: as `settle` gave them.
        """

    def write_tokenizer(self, tokenizer, model, folder: Path) -> None:
        """What the runtime reads in place of transformers' tokenizer, which is in the folder already; as a rule
        nothing. Called after `export`, for a student that has a tokenizer."""

    @abstractmethod
    def load(self, folder: Path, graphs: Mapping[str, Graph], shapes: Shapes, dtype, stateful: bool) -> Graphs:
        """What `export` wrote, ready to run. `dtype` is that of `cache_dtype`."""

    @abstractmethod
    def devices(self) -> list[str]:
        """What the runtime can compute on here."""

    def card_lines(self, folder: str) -> tuple[str, str] | None:
        """Heading and Markdown for the model card, where an app loads the export in a way of its own; otherwise
        `None`, and the card shows [`ExportedForConditionalGeneration`]."""
        return None


# Modules of this folder, each named as its target.
_MODULES = ("onnx", "openvino", "coreml", "genai", "gguf")
_BACKENDS: dict[str, Backend] = {}
_BackendClass = TypeVar("_BackendClass", bound=type[Backend])


def register_backend(cls: _BackendClass) -> _BackendClass:
    """Decorator of a [`Backend`]: makes it known by its name.

    Raises:
        ValueError: the name is taken.
    """
    if cls.name in _BACKENDS:
        raise ValueError(
            f"{cls.__name__}: {type(_BACKENDS[cls.name]).__name__} has the name {cls.name!r}: choose another"
        )
    _BACKENDS[cls.name] = cls()
    return cls


def targets() -> tuple[str, ...]:
    """The names of all backends. Imports none of them."""
    return (*_MODULES, *(name for name in _BACKENDS if name not in _MODULES))


def backend_of(target: str) -> Backend:
    """
    Raises:
        ValueError: there is no such target.
    """
    if target not in targets():
        raise ValueError(f"target {target!r}: choose of {', '.join(targets())}")
    if target not in _BACKENDS:
        importlib.import_module(f".{target}", __package__)
    return _BACKENDS[target]


def child_environment() -> dict[str, str]:
    """The environment of a Python process that is started with `-m` or `-c`: it does not import what lies in the
    current folder, where a `random.py` of the user would stand in for Python's own. Python 3.10, which is past its
    end, does not know the variable."""
    return {**os.environ, "PYTHONSAFEPATH": "1"}


def check_installed(target: str, to_run: bool = False) -> None:
    """
    Args:
        to_run: whether an export is to be run only.

    Raises:
        ImportError: a package is missing; the message has the line that installs it.
    """
    packages = backend_of(target).packages
    needed = packages[:1] if to_run else packages
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f'{target} needs {" and ".join(missing)}: pip install "hf-encdec-distill[{target}]"')
