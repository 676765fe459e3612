"""Layers taken out of a student that is there already: for good, or to see what it would do without them."""

import contextlib
import copy

from torch import nn

from .modeling_rope_encdec import slots_of_states, states_handed_over


SIDES = ("encoder", "decoder")
_FIELDS = (
    "cross_attention_layers",
    "encoder_pooling_layer",
    "encoder_layer_types",
    *(f"{side}_{name}" for side in SIDES for name in ("num_hidden_layers", "no_rope_layers")),
)


def config_without_layer(config, side, index):
    """A copy of `config` without layer `index` of `side`, `"encoder"` or `"decoder"`.

    Every decoder layer that stays reads what it read before: the encoder states above a removed encoder layer move
    down by one, and the state that entered it now enters the layer that followed.

    Raises:
        ValueError: for a decoder layer where these share the prompt's keys and values, since the groups would move.
    """
    if side == "decoder" and config.cross_attention_sharing > 1:
        raise ValueError(
            f"cross_attention_sharing={config.cross_attention_sharing}: decoder layers of a student that share the "
            "prompt's keys and values cannot be taken out one by one. Take out encoder layers alone, or make a "
            "shallower student."
        )
    smaller = copy.deepcopy(config)
    states = config.encoder_state_of_decoder_layer
    if side == "encoder":
        states = [state - (state > index) for state in states]
        pooled_from = config.first_pooled_layer
        smaller.encoder_pooling_layer = pooled_from and pooled_from - (pooled_from > index)
        if config.encoder_sliding_window is not None:  # the default counts layers, and those that stay do not change
            types = config.attention_of_encoder_layer
            smaller.encoder_layer_types = [kind for layer, kind in enumerate(types) if layer != index]
    else:
        states = [state for layer, state in enumerate(states) if layer != index]
    # The default of `merged` spreads the decoder evenly; that of `separate` is the last state at any depth.
    if config.cross_attention == "merged" or config.cross_attention_layers is not None:
        smaller.cross_attention_layers = states
    setattr(smaller, f"{side}_num_hidden_layers", getattr(config, f"{side}_num_hidden_layers") - 1)
    no_rope = [layer - (layer > index) for layer in getattr(config, f"{side}_no_rope_layers") if layer != index]
    setattr(smaller, f"{side}_no_rope_layers", no_rope)
    return smaller


@contextlib.contextmanager
def without_layer(model, side, index):
    """Inside, a [`RopeEncDecForConditionalGeneration`] computes as if it lacked that layer; without a KV cache, whose
    layers keep their numbers."""
    encoder, decoder = model.model.encoder, model.model.decoder
    stack = encoder if side == "encoder" else decoder
    before = stack.layers, encoder.states_read, encoder.pooling_layer, decoder.state_slots
    smaller = config_without_layer(model.config, side, index)
    try:
        stack.layers = nn.ModuleList([layer for position, layer in enumerate(stack.layers) if position != index])
        encoder.states_read, decoder.state_slots = states_handed_over(smaller), slots_of_states(smaller)
        encoder.pooling_layer = smaller.first_pooled_layer
        yield
    finally:
        stack.layers, encoder.states_read, encoder.pooling_layer, decoder.state_slots = before


def remove_layer(model, side, index):
    """Take layer `index` of `side` out of a [`RopeEncDecForConditionalGeneration`], in place.

    It is then the model that `from_pretrained` would load from what `save_pretrained` writes: config, the numbers by
    which layers find their place in a KV cache, and the encoder layers of a `merged` student that nothing reads any
    more, which are frozen.
    """
    smaller = config_without_layer(model.config, side, index)
    for name in _FIELDS:
        setattr(model.config, name, getattr(smaller, name))
    layers = getattr(model.model, side).layers
    del layers[index]
    for position, layer in enumerate(layers):
        for name in ("self_attn", "cross_attn"):
            if hasattr(layer, name):
                getattr(layer, name).layer_idx = position
    model.model.encoder.states_read = states_handed_over(model.config)
    model.model.encoder.pooling_layer = model.config.first_pooled_layer
    model.model.decoder.state_slots = slots_of_states(model.config)
    model.tie_weights()
