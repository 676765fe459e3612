"""What a config means: a key that is there may be one that the code of a decoder-only family never reads."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple


# Model types of this package's encoder-decoders; the second reads images too.
STUDENTS = ("rope_encdec", "rope_encdec_vision")
# RoPE types whose frequencies depend on the longest sequence of a call.
RULED_BY_LENGTH = ("dynamic", "longrope")
_ATTENTION_BIASES = ("llama", "qwen3", "smollm3", *STUDENTS)
_MLP_BIASES = ("llama", "smollm3", *STUDENTS)


class Biases(NamedTuple):
    """Of a block's linear layers: `"qkv"` are those of the three projections into attention alone."""

    attention: bool | Literal["qkv"]
    mlp: bool


def biases_of(config: Any) -> Biases:
    """As the models of `SUPPORTED_FAMILIES` and this package's make them."""
    family = config.model_type
    attention = getattr(config, "attention_bias", False) if family in _ATTENTION_BIASES else False
    mlp = getattr(config, "mlp_bias", False) if family in _MLP_BIASES else False
    return Biases("qkv" if family == "qwen2" else attention, mlp)  # Qwen2's are not in its config


def is_merged(config: Any) -> bool:
    """Whether the decoder reads the prompt and its own tokens in a row, as a student's does with
    `cross_attention="merged"`."""
    return getattr(config, "cross_attention", None) == "merged"


def merged_start_token_id(config: Any) -> int | None:
    """The last token of the prompt, with which a merged student's decoder starts; None of any other model."""
    return config.decoder_start_token_id if is_merged(config) else None


def rope_limit(config: Any) -> int | None:
    """Tokens beyond which a call has other RoPE frequencies, of a type in `RULED_BY_LENGTH`; None for any other type.

    As transformers v4.57.6 and v5.24.0 read it: modeling_rope_utils.py, `dynamic_rope_update` and what it calls.
    """
    rope = config.rope_parameters
    if rope["rope_type"] not in RULED_BY_LENGTH:
        return None
    original = rope.get("original_max_position_embeddings") if rope["rope_type"] == "longrope" else None
    return original or config.max_position_embeddings


def sliding_window_of(config: Any) -> int | None:
    """Tokens that a layer of a decoder-only model looks back over; None if all layers see all of its positions."""
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    # Qwen2 has a window that none of its layers slides in, unless it has more than max_window_layers.
    slides = types is None or "sliding_attention" in types
    if getattr(config, "use_sliding_window", True) is False or window is None or not slides:
        return None
    return window if window < config.max_position_embeddings else None
