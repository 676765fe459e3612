"""Configs for a size such as `70b`, where no model has been chosen yet: published Llama-like shapes."""

from __future__ import annotations

import re

from transformers import AutoConfig, PretrainedConfig

from .cost import model_cost
from .rope_encdec.configuration_rope_encdec import RopeEncDecConfig
from .rope_encdec.layer_choice import choose_layers
from .rope_encdec.teacher_layers import check_family, student_config


_LLAMA_3 = {"vocab_size": 128_256, "max_position_embeddings": 131_072, "tie_word_embeddings": False}
_SMOLLM2 = {"vocab_size": 49_152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_QWEN3 = {"vocab_size": 151_936, "max_position_embeddings": 40_960, "tie_word_embeddings": False, "head_dim": 128}
# Name -> model_type; hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads; all
# else. From the config.json of each on the Hub.
_SHAPES: dict[str, tuple[str, tuple[int, ...], dict]] = {
    "SmolLM2-135M": ("llama", (576, 1536, 30, 9, 3), _SMOLLM2),
    "SmolLM2-360M": ("llama", (960, 2560, 32, 15, 5), _SMOLLM2),
    "Llama-3.2-1B": ("llama", (2048, 8192, 16, 32, 8), {**_LLAMA_3, "tie_word_embeddings": True}),
    "SmolLM2-1.7B": ("llama", (2048, 8192, 24, 32, 32), _SMOLLM2),
    "Llama-3.2-3B": ("llama", (3072, 8192, 28, 24, 8), {**_LLAMA_3, "tie_word_embeddings": True}),
    "Llama-3.1-8B": ("llama", (4096, 14336, 32, 32, 8), _LLAMA_3),
    "Qwen3-14B": ("qwen3", (5120, 17408, 40, 40, 8), _QWEN3),
    "Qwen3-32B": ("qwen3", (5120, 25600, 64, 64, 8), _QWEN3),
    "Llama-3.1-70B": ("llama", (8192, 28672, 80, 64, 8), _LLAMA_3),
    "Llama-3.1-405B": ("llama", (16384, 53248, 126, 128, 8), _LLAMA_3),
}
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_FARTHEST = 1.3  # from a size that was asked for, as a ratio


def count(text: str) -> int | None:
    """`70b`, `1.5B`, `135m` or `2000` as a number; None where the text is no such number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbt]?)", text.strip().lower().replace(",", "").replace("_", ""))
    return round(float(match[1]) * _SUFFIXES[match[2]]) if match else None


def typical_config(parameters: int) -> tuple[str, PretrainedConfig]:
    """The published decoder-only shape whose number of parameters is nearest, and its name.

    Raises:
        ValueError: none has between 1/1.3 and 1.3 times as many.
    """
    configs = {}
    for name, (family, sizes, others) in _SHAPES.items():
        fields = {**dict(zip(_FIELDS, sizes, strict=True)), **others}
        configs[name] = AutoConfig.for_model(family, **fields)
    totals = {name: model_cost(config, 2, 2).parameters["total"] for name, config in configs.items()}

    def distance(name: str) -> float:
        return max(totals[name] / max(parameters, 1), parameters / totals[name])

    nearest = min(totals, key=distance)
    if distance(nearest) > _FARTHEST:
        known = ", ".join(f"{name} ({total / 1e9:.3g} B)" for name, total in totals.items())
        raise ValueError(
            f"no published shape is near {parameters / 1e9:.3g} B parameters: give a folder or a Hub id in place of "
            f"a size, or a size near one of {known}"
        )
    return nearest, configs[nearest]


def split_config(config: PretrainedConfig, encoder_layers: int, decoder_layers: int) -> RopeEncDecConfig:
    """Of the merged student that `init` makes of a decoder-only model, with evenly spaced layers.

    Raises:
        ValueError: the model is of another family, or has fewer layers than one side asks for.
    """
    check_family(config)
    depth = config.num_hidden_layers
    for side, number in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        if not 1 <= number <= depth:
            raise ValueError(f"{side}_layers={number} of a model with {depth} layers: give 1 to {depth}")
    kept: dict = {"decoder": decoder_layers, "encoder": encoder_layers}
    choose_layers(kept, "even", depth, merged=True, influence=None, greedy=None)
    return student_config(config, kept["encoder"], kept["decoder"], "merged", encoder_attention="causal")
