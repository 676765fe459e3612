"""The student on the runtimes of its export targets: a tight loop over the exported graphs, PyTorch not in it."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import PRECISIONS, Contender, Model, read_by


class Exported(Contender):
    """Of the target that its backend is named after."""

    def missing(self) -> str | None:
        from ...export.backends import backend_of, check_installed
        from ...export.recipe import Shapes
        from ...models.loading import load_config

        try:
            check_installed(self.backend)
        except ImportError as error:
            return str(error)
        if self.backend == "coreml" and platform.system() != "Darwin":
            return "Core ML runs on macOS alone"  # elsewhere its programs are interpreted, for the proof
        try:
            backend_of(self.backend).settle(load_config(self.source), self.precision, Shapes(), None, {})
        except ValueError as error:
            return str(error)
        return None

    def import_packages(self) -> None:
        from ...export.backends import backend_of

        importlib.import_module(backend_of(self.backend).packages[0])

    def prepare(self, folder: Path) -> None:
        import torch

        from ...export.exporting import export_model
        from ...models.loading import load_student

        export_model(load_student(self.source, dtype=torch.float32), None, self.backend, folder, self.precision)

    def load(self, folder: Path, threads: int) -> None:
        from types import SimpleNamespace

        from ...export.manifest import load_graphs, read_manifest
        from ...files import read_json

        self.config = SimpleNamespace(**read_json(folder / "config.json"))
        # The targets take their threads from OMP_NUM_THREADS, which the worker has set.
        self.graphs = load_graphs(folder, read_manifest(folder), self.config)

    def steps(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Iterator[list[int]]:
        import numpy as np

        ids = read_by(self.config, np.array(prompts, dtype=np.int64))
        cross, mask = self.graphs.encode(ids, np.ones_like(ids))
        cache = self.graphs.new_cache(len(ids))
        step = np.full((len(ids), 1), self.config.decoder_start_token_id, dtype=np.int64)
        for _ in range(new_tokens):
            step = self.graphs.decode(step, mask, cross, cache)[:, -1:].argmax(-1)
            yield step[:, 0].tolist()


def contenders(model: Model) -> list[Contender]:
    """On each target the student quantised, where the target can do that, and in its widest precision."""
    from ...export.backends import backend_of, targets

    if not model.is_student:
        return []
    found: list[Contender] = []
    for target in targets():
        variants = [variant for variant in backend_of(target).variants if variant in PRECISIONS]
        widest = max(variants, key=lambda variant: PRECISIONS[variant])
        kept = [variant for variant in variants if variant in ("int8", "int4", widest)]
        found += [Exported(model.name, str(model.folder), target, variant) for variant in kept]
    return found
