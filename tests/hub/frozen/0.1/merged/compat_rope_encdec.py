"""What differs between transformers 4.57 and 5.x for the model files.

This file travels to the Hub beside the weights: it imports only torch and transformers. Each shim says which versions
need it and when it can go.
"""

import inspect

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_outputs import Seq2SeqLMOutput


# transformers < 5.0 spells it `PretrainedConfig`. Goes when 4.57 is dropped.
try:
    from transformers import PreTrainedConfig  # noqa: F401
except ImportError:
    from transformers import PretrainedConfig as PreTrainedConfig  # noqa: F401

# transformers >= 5.0 keeps RoPE in `config.rope_parameters` and no longer has "default" among its functions.
# Goes when 4.57 is dropped.
try:
    from transformers.modeling_rope_utils import RotaryEmbeddingConfigMixin  # noqa: F401

    ROPE_LIVES_IN_ONE_DICT = True
except ImportError:
    ROPE_LIVES_IN_ONE_DICT = False


if ROPE_LIVES_IN_ONE_DICT:

    class RopeConfigMixin:
        """Nothing to add: transformers 5 reads `rope_parameters` itself."""

else:

    class RopeConfigMixin:
        """The fields that the RoPE functions of transformers 4.57 read, as views of `rope_parameters`."""

        @property
        def rope_theta(self):
            return self.rope_parameters["rope_theta"]

        @property
        def rope_scaling(self):
            return None if self.rope_parameters["rope_type"] == "default" else self.rope_parameters

        @property
        def partial_rotary_factor(self):
            return self.rope_parameters.get("partial_rotary_factor", 1.0)

        @property
        def original_max_position_embeddings(self):
            # 4.57 asks `hasattr`, so an absent value has to look like an absent attribute.
            length = self.rope_parameters.get("original_max_position_embeddings")
            if length is None:
                raise AttributeError("original_max_position_embeddings")
            return length


# transformers >= 5.0 describes the queries of a mask by length and offset, 4.57 by their positions.
# Goes when 4.57 is dropped.
_MASKS_TAKE_CACHE_POSITION = "cache_position" in inspect.signature(ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]).parameters


# transformers >= 5.24 calls `past_key_values` `cache`, in outputs and in what `generate` passes to a model. Goes when
# 5.23 is dropped.
CACHE_FIELD = "cache" if "cache" in Seq2SeqLMOutput.__dataclass_fields__ else "past_key_values"


def _all_keys_mask_function(batch_idx, head_idx, q_idx, kv_idx):
    # Written on the indices, so that it broadcasts under vmap and without.
    return (q_idx >= 0) & (kv_idx >= 0)


def make_attention_mask(
    attn_implementation,
    hidden_states,
    key_length,
    query_offset=0,
    padding_mask=None,
    causal=True,
    may_skip=True,
):
    """The mask in the form that an attention implementation takes, through transformers' own registry.

    Args:
        attn_implementation (`str`): Key of `ALL_MASK_ATTENTION_FUNCTIONS`.
        hidden_states (`torch.Tensor` of shape `(batch, query_length, hidden)`): Gives batch, length, dtype and device.
        key_length (`int`): Number of keys.
        query_offset (`int` or 0-d `torch.Tensor`): Index of the first query on the axis of the keys.
        padding_mask (`torch.Tensor` of shape `(batch, <= key_length)`, *optional*): 1 where a key is real; keys past
            its end are not there.
        causal (`bool`): Whether query `i` sees only keys up to `i`, or all of them.
        may_skip (`bool`): Whether no mask at all may be returned where the implementation's own `is_causal` will do.

    Returns:
        `None`, a 4D mask, a 2D mask or a `BlockMask`, as the implementation wants it.
    """
    batch, query_length = hidden_states.shape[:2]
    device = hidden_states.device
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if padding_mask is not None:
        padding_mask = padding_mask.to(device=device, dtype=torch.bool)
        if not tracing and padding_mask.shape[-1] >= key_length and bool(padding_mask.all()):
            padding_mask = None
    if not causal and padding_mask is None:
        return None
    # A registered attention without a mask function of its own gets a boolean mask, as upstream does.
    key = attn_implementation if attn_implementation in ALL_MASK_ATTENTION_FUNCTIONS else "sdpa"
    arguments = {
        "batch_size": batch,
        "kv_length": key_length,
        "kv_offset": 0,
        "mask_function": causal_mask_function if causal else _all_keys_mask_function,
        "attention_mask": padding_mask,
        "allow_is_causal_skip": causal and may_skip,
        "dtype": hidden_states.dtype,
    }
    if _MASKS_TAKE_CACHE_POSITION:
        arguments["cache_position"] = torch.arange(query_length, device=device) + query_offset
    else:
        arguments.update(q_length=query_length, q_offset=query_offset, device=device)
    return ALL_MASK_ATTENTION_FUNCTIONS[key](**arguments)


def cache_key_length(cache, query_length):
    """Keys that `cache` (one side of an `EncoderDecoderCache`) will hand out once `query_length` tokens are added."""
    if not cache.layers:
        return query_length
    # transformers < 5.0 takes positions here and reads only their number. Goes when 4.57 is dropped.
    argument = torch.empty(query_length, device="meta") if _MASKS_TAKE_CACHE_POSITION else query_length
    return cache.get_mask_sizes(argument, 0)[0]


def update_cache(cache, key_states, value_states, layer_idx, positions):
    """Write keys and values at `positions` of `cache` and return all that it holds.

    transformers >= 5.0 counts positions inside the cache and has no `cache_kwargs`. Goes when 4.57 is dropped.
    """
    if _MASKS_TAKE_CACHE_POSITION:
        return cache.update(key_states, value_states, layer_idx, {"cache_position": positions})
    return cache.update(key_states, value_states, layer_idx)
