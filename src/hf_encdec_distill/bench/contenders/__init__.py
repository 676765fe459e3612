"""Who runs in a bench: a model on a backend in a precision, and which there are.

A backend is one file of this folder, named in `_MODULES`. It has a subclass of `Contender` and the function
`contenders`, and imports its own packages only where it uses them, so that nothing here needs any of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from ...metrics.timing import timed
from ...models.families import is_merged


# Bytes of a weight, in the order of how likely people are to deploy it.
PRECISIONS = {"int8": 1.0, "int4": 0.5, "bf16": 2.0, "fp16": 2.0, "fp32": 4.0}


@dataclass(frozen=True)
class Model:
    """A model of the bench.

    Attributes:
        name: who it is, such as `student` or `teacher`.
        folder: its files, as `from_pretrained` takes them.
        config: its configuration.
    """

    name: str
    folder: Path
    config: Any

    @property
    def is_student(self) -> bool:
        return self.config.model_type == "rope_encdec"


@dataclass
class Contender(ABC):
    """A model on a backend in a precision. It is described in one process and runs in another, so its fields are text.

    Attributes:
        model: the name of its `Model`.
        source: the folder of that.
        backend: the name of the runtime.
        precision: of its weights, of `PRECISIONS`.
        packages: modules that it needs -> the distribution that has them.
        device: on which it computes, as torch names it.
    """

    model: str
    source: str
    backend: str
    precision: str
    packages: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @property
    def device(self) -> str:
        return "cpu"

    def missing(self) -> str | None:
        """What to install before it can run, in a sentence; None if nothing is missing."""
        gone = {module: name for module, name in self.packages.items() if importlib.util.find_spec(module) is None}
        if not gone:
            return None
        return f"{' and '.join(gone)} not installed: pip install {' '.join(dict.fromkeys(gone.values()))}"

    def import_packages(self) -> None:
        """Import what it runs with, so that memory can be counted from there."""
        for module in self.packages:
            importlib.import_module(module)

    def prepare(self, folder: Path) -> None:
        """Convert the model into an empty folder; what leaves it empty runs `source` as it is. Not timed."""
        return

    @abstractmethod
    def load(self, folder: Path, threads: int) -> None:
        """Make ready to answer with so many threads, from what `prepare` wrote."""

    def answer(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[list[list[int]], list[float]]:
        """Answer greedily, at a fixed length: an end of sequence ends nothing.

        Args:
            prompts: token ids as the decoder-only model reads them, one list per row, all of one length.

        Returns:
            For each row `new_tokens` token ids; for each of these steps the seconds from the call until the ids of all
            rows were there.
        """
        return timed(self.steps(prompts, new_tokens))

    def steps(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Iterator[list[int]]:
        """The token ids of all rows, once a step; of a runtime that has no steps, `answer` takes the times."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, str]:
        """From which `contender_of` makes the same in another process."""
        return {"module": type(self).__module__.rpartition(".")[2], "kind": type(self).__name__, **asdict(self)}


def read_by(config, prompts):
    """What a model reads of prompts, `(batch, length)` of any array: a `merged` student all but the last token, with
    which its decoder starts."""
    return prompts[:, :-1] if is_merged(config) else prompts


# Modules of this folder.
_MODULES = ("exported", "pytorch", "llama_cpp", "onnxruntime_genai", "ctranslate2", "optimum_openvino")


def contenders(model: Model) -> list[Contender]:
    """A model on every backend, installed or not."""
    return [
        contender
        for name in _MODULES
        for contender in importlib.import_module(f".{name}", __package__).contenders(model)
    ]


def contender_of(fields: Mapping[str, str]) -> Contender:
    """What `Contender.to_dict` describes."""
    fields = dict(fields)
    module = importlib.import_module(f".{fields.pop('module')}", __package__)
    return getattr(module, fields.pop("kind"))(**fields)
