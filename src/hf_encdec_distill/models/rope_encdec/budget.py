"""What a request may take, counted from sizes alone: no machine is timed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cost import model_cost
from .layer_paths import decoder_path, encoder_path


# Splits that are made and fitted before one is taken.
_TRIALS = 3


@dataclass(frozen=True)
class Budget:
    """A request, and how many times faster than its teacher a student has to answer it.

    The time of a request at batch 1 is counted as the FLOPs up to the first token, which a processor's arithmetic
    limits, and the bytes that each further token reads, which its memory limits, in float32
    ([`~hf_encdec_distill.bench.model_cost`]). Only the ratio of the two rates matters for a speedup.

    Attributes:
        prompt_tokens: tokens that the teacher reads before the answer, at least 2.
        answer_tokens: tokens that are generated, at least 2.
        speedup: the teacher's time over the student's, above 1.
        flops_per_byte: FLOPs that a processor does in the time in which it reads a byte. The default is a measured
            one: 2 cores of an AMD EPYC with AVX2 multiply float32 matrices at 105 to 140 GFLOP/s and read 20 to 25
            GB/s.

    Raises:
        ValueError: for a speedup of 1 or less, fewer than 2 tokens, or a ratio that is not positive.
    """

    prompt_tokens: int
    answer_tokens: int
    speedup: float
    flops_per_byte: float = 5.4

    def __post_init__(self):
        for name in ("prompt_tokens", "answer_tokens"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}={getattr(self, name)} is too few for a budget: give at least 2.")
        if not self.speedup > 1:
            raise ValueError(
                f"speedup={self.speedup} asks for nothing: give how many times faster than the teacher, above 1."
            )
        if not self.flops_per_byte > 0:
            raise ValueError(f"flops_per_byte={self.flops_per_byte} does not work: a positive number is needed.")

    def time(self, model_or_config) -> float:
        """Counted time of the request, in the time that a byte takes to be read."""
        cost = model_cost(model_or_config, self.prompt_tokens, self.answer_tokens, torch.float32)
        return cost.first_token_flops / self.flops_per_byte + (self.answer_tokens - 1) * cost.bytes_per_token

    def splits(self, teacher_config, student_config) -> list[tuple[int, int]]:
        """The numbers of layers `(encoder, decoder)` that meet the budget, but do not with one more on either side.

        Args:
            teacher_config: Of the decoder-only model.
            student_config ([`RopeEncDecConfig`]): Of a student of it, whatever its numbers of layers.

        Raises:
            ValueError: if one layer on each side is still too slow.
        """
        config, depth, whole = copy.copy(student_config), teacher_config.num_hidden_layers, self.time(teacher_config)

        def speedup(encoder: int, decoder: int) -> float:
            config.encoder_num_hidden_layers, config.decoder_num_hidden_layers = encoder, decoder
            return whole / self.time(config)

        best = speedup(1, 1)
        if best < self.speedup:
            raise ValueError(
                f"speedup={self.speedup:g} is more than any student of this teacher reaches for a prompt of "
                f"{self.prompt_tokens} and an answer of {self.answer_tokens} tokens: one layer on each side gives "
                f"{best:.1f}, so ask for less."
            )
        most, encoder = {}, depth  # decoder layers, by the most encoder layers beside them
        for decoder in range(1, depth + 1):
            while encoder and speedup(encoder, decoder) < self.speedup:
                encoder -= 1
            most[encoder] = decoder
        return [(encoder, decoder) for encoder, decoder in most.items() if encoder]


def layers_within(
    budget: Budget,
    teacher_config,
    student_config,
    gaps: dict[str, Tensor],
    by_influence: Callable[[int, int], dict[str, list[int]]],
    divergence: Callable[[dict[str, list[int]]], float],
) -> dict[str, list[int]]:
    """`{"encoder": layers, "decoder": layers}` of the best student that meets a budget.

    Each of the budget's splits gets the layers on the cheapest paths. The `_TRIALS` splits with the cheapest ones are
    tried, with these layers and with those of most influence: neither choice is the better one of all. What has the
    least `divergence` is taken.

    Args:
        teacher_config, student_config: As for [`Budget.splits`].
        gaps (`dict`): From `measure_gaps`.
        by_influence: The layers of most influence for numbers of encoder and decoder layers.
        divergence: Of a student with such layers from its teacher.

    Raises:
        ValueError: as [`Budget.splits`].
    """
    candidates = []
    merged = student_config.cross_attention == "merged"
    for encoder, decoder in budget.splits(teacher_config, student_config):
        writing, cost_of_writing = decoder_path(gaps, decoder, merged)
        if merged:  # nothing reads what an encoder layer above the last decoder layer's depth gives
            readers = writing[:: student_config.cross_attention_sharing]
            encoder = min(encoder, max(readers[-1], 1))
        reading, cost_of_reading = encoder_path(gaps, encoder, readers if merged else None)
        candidates.append((cost_of_writing + cost_of_reading, {"encoder": reading, "decoder": writing}))
    trials: list[dict[str, list[int]]] = []
    for _, kept in sorted(candidates, key=lambda candidate: candidate[0])[:_TRIALS]:
        for layers in (kept, by_influence(len(kept["encoder"]), len(kept["decoder"]))):
            if layers not in trials:  # each costs a fit
                trials.append(layers)
    return trials[0] if len(trials) == 1 else min(trials, key=divergence)
