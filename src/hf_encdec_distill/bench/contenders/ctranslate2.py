"""CTranslate2: decoder-only models in 8 bits, from its own converter."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from . import Contender, Model


class CTranslate2(Contender):
    packages = {"ctranslate2": "ctranslate2"}

    def prepare(self, folder: Path) -> None:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(self.source).convert(str(folder), quantization=self.precision, force=True)

    def load(self, folder: Path, threads: int) -> None:
        import ctranslate2

        self.names = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        self.loaded = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=self.precision, inter_threads=1, intra_threads=threads
        )

    def answer(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[list[list[int]], list[float]]:
        texts = [[self.names[token] for token in prompt] for prompt in prompts]  # it reads tokens by name
        times = [0.0] * new_tokens
        start = time.perf_counter()

        def note(result) -> bool:  # once per row and step
            times[result.step] = time.perf_counter() - start
            return False

        results = self.loaded.generate_batch(
            texts,
            min_length=new_tokens,
            max_length=new_tokens,
            include_prompt_in_result=False,
            end_token=[],
            callback=note,
        )
        return [result.sequences_ids[0] for result in results], times


def contenders(model: Model) -> list[Contender]:
    return [] if model.is_student else [CTranslate2(model.name, str(model.folder), "ctranslate2", "int8")]
