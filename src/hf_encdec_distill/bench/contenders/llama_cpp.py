"""llama.cpp: decoder-only models in 8 and 4 bits, written as GGUF here. The student's is an export target."""

from __future__ import annotations

import time
from collections.abc import Sequence
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

    def answer(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[list[list[int]], list[float]]:
        start, steps, times = time.perf_counter(), [], []
        self.loaded.clear(len(prompts))
        last = len(prompts[0]) - 1
        tokens = [
            (row, position, token, position == last)
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for position in range(last + 1, last + 1 + new_tokens):
            steps.append(self.loaded.evaluate(tokens).argmax(-1).tolist())
            times.append(time.perf_counter() - start)
            tokens = [(row, position, token, True) for row, token in enumerate(steps[-1])]
        return [list(row) for row in zip(*steps, strict=True)], times


def contenders(model: Model) -> list[Contender]:
    if model.is_student:
        return []
    return [
        LlamaCppDecoderOnly(model.name, str(model.folder), backend, precision)
        for precision in ("int8", "int4", "fp32")
        for backend in _BACKENDS
    ]
