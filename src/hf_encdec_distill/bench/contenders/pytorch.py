"""PyTorch: any model as transformers loads it, through `greedy_decode`, on the CPU or on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import Contender, Model


_CUDA = "pytorch cuda"


class PyTorch(Contender):
    packages = {"torch": "torch", "transformers": "transformers"}

    @property
    def device(self) -> str:
        return "cuda" if self.backend == _CUDA else "cpu"

    def missing(self) -> str | None:
        import torch

        return "no CUDA device here" if self.device == "cuda" and not torch.cuda.is_available() else None

    def load(self, folder: Path, threads: int) -> None:
        import torch

        from ...models.loading import load_student_of_any_kind

        torch.set_num_threads(threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]
        self.loaded = load_student_of_any_kind(self.source, dtype=dtype).eval().to(self.device)

    def answer(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[list[list[int]], list[float]]:
        import torch

        from ..latency import greedy_decode
        from . import read_by

        ids = torch.tensor(prompts, device=self.loaded.device)
        return greedy_decode(self.loaded, read_by(self.loaded.config, ids), new_tokens)


def contenders(model: Model) -> list[Contender]:
    from ...devices import bf16_unit

    cpu = ("bf16", "fp32") if bf16_unit() else ("fp32",)
    where = [*(("pytorch", precision) for precision in cpu), (_CUDA, "bf16")]
    return [PyTorch(model.name, str(model.folder), backend, precision) for backend, precision in where]
