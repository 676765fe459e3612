"""ONNX Runtime GenAI: decoder-only models as its own builder writes them; logits at the last position, I/O bound."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...export.backends import child_environment
from . import Contender, Model


class OnnxRuntimeGenAi(Contender):
    packages = {"onnxruntime_genai": "onnxruntime-genai"}

    def prepare(self, folder: Path) -> None:
        """
        Raises:
            ValueError: the builder does not take the model, or not with this version of transformers.
        """
        with tempfile.TemporaryDirectory() as cache:
            options = {"-i": self.source, "-o": str(folder), "-p": self.precision, "-e": "cpu", "-c": cache}
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
            command += [word for option in options.items() for word in option]
            run = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
        if run.returncode != 0:
            last = (run.stderr.strip().splitlines() or ["no word"])[-1]
            raise ValueError(f"its builder (onnxruntime_genai.models.builder) failed: {last}")

    def load(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai

        config = onnxruntime_genai.Config(str(folder))
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.loaded = onnxruntime_genai.Model(config)

    def steps(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Iterator[list[int]]:
        import numpy as np
        import onnxruntime_genai

        ids = np.array(prompts, dtype=np.int32)
        parameters = onnxruntime_genai.GeneratorParams(self.loaded)
        length = ids.shape[1] + new_tokens
        # It has no way to go on after an end of sequence but not to choose one.
        parameters.set_search_options(do_sample=False, batch_size=len(ids), min_length=length, max_length=length)
        generator = onnxruntime_genai.Generator(self.loaded, parameters)
        generator.append_tokens(ids)
        for _ in range(new_tokens):
            generator.generate_next_token()
            yield [int(token) for token in generator.get_next_tokens()]


def contenders(model: Model) -> list[Contender]:
    if model.is_student:
        return []
    return [
        OnnxRuntimeGenAi(model.name, str(model.folder), "onnxruntime-genai", precision)
        for precision in ("int8", "int4", "fp32")
    ]
