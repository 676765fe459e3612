"""llama.cpp: decoder-only models in 8 and 4 bits, written as GGUF here. The student's is an export target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from . import Contender, Model


_FILE = "model.gguf"
_BACKENDS = ("llama.cpp", "llama.cpp -fa off")


class LlamaCppDecoderOnly(Contender):
    """With flash attention as llama.cpp has it by default, or without it, which for some requests is faster."""

    packages = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}

    def prepare(self, folder: Path) -> None:
        import torch

        from ...export.gguf import write_decoder_only
        from ...models.loading import load_teacher

        write_decoder_only(load_teacher(self.source, dtype=torch.float32), folder / _FILE, self.precision)

    def load(self, folder: Path, threads: int) -> None:
        from ...export.llama_cpp import LlamaCpp

        dtype = "float32" if self.precision == "fp32" else "float16"
        self.loaded = LlamaCpp(folder / _FILE, threads, dtype, self.backend == _BACKENDS[0], shared=False)

    def steps(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Iterator[list[int]]:
        self.loaded.clear(len(prompts))
        last = len(prompts[0]) - 1
        tokens = [
            (row, position, token, position == last)
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for position in range(last + 1, last + 1 + new_tokens):
            step = self.loaded.evaluate(tokens).argmax(-1).tolist()
            yield step
            tokens = [(row, position, token, True) for row, token in enumerate(step)]


def contenders(model: Model) -> list[Contender]:
    if model.is_student:
        return []
    return [
        LlamaCppDecoderOnly(model.name, str(model.folder), backend, precision)
        for precision in ("int8", "int4", "fp32")
        for backend in _BACKENDS
    ]
