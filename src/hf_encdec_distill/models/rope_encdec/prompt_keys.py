"""The keys and values of the prompt, which a `merged` decoder layer makes as the encoder layer above the state that it
reads does, as long as both have the teacher's projections. They are then computed once where a runtime can share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def key_value_modules(layer: Any) -> list[nn.Module]:
    """Of an encoder layer or of a merged decoder layer: what makes keys and values of a state."""
    attention = layer.self_attn
    norms = [attention.k_norm] if attention.config.qk_norm else []
    return [layer.input_layernorm, attention.k_proj, attention.v_proj, *norms]


def same_keys_and_values(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers make the same keys and values of a state, but for RoPE."""

    def weights(layer):
        return [parameter for module in key_value_modules(layer) for parameter in module.parameters()]

    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def shared_prompt_keys(model) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each decoder layer of a `merged` student whose keys and values of the prompt are those of an encoder layer, and
    that layer, the one that begins at the state which the decoder layer reads."""
    encoder, decoder, states = (
        model.get_encoder().layers,
        model.get_decoder().layers,
        model.config.encoder_state_of_decoder_layer,
    )
    for index in dict.fromkeys(model.config.prompt_keys_of_decoder_layer):
        state = states[index]
        if state < len(encoder) and same_keys_and_values(decoder[index], encoder[state]):
            yield decoder[index], encoder[state]
