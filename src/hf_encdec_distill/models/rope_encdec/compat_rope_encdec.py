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

        @rope_theta.setter
        def rope_theta(self, value):
            self.rope_parameters = {**self.rope_parameters, "rope_theta": value}

        @property
        def rope_scaling(self):
            return None if self.rope_parameters["rope_type"] == "default" else self.rope_parameters

        @rope_scaling.setter
        def rope_scaling(self, value):
            self.rope_parameters = value  # as in transformers 5

        @property
        def partial_rotary_factor(self):
            return self.rope_parameters.get("partial_rotary_factor", 1.0)

        @partial_rotary_factor.setter
        def partial_rotary_factor(self, value):
            self.rope_parameters = {**self.rope_parameters, "partial_rotary_factor": value}

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


def is_traced():
    """Whether `torch.compile`, `torch.export` or `torch.jit.trace` runs the code: sizes and values are not known."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _all_keys_mask_function(batch_idx, head_idx, q_idx, kv_idx):
    # Written on the indices, so that it broadcasts under vmap and without.
    return (q_idx >= 0) & (kv_idx >= 0)


def _window_mask_function(window, causal):
    # transformers v5.24.0 has one for the bidirectional window, v4.57.6 has not. Goes when 4.57 is dropped.
    def mask_function(batch_idx, head_idx, q_idx, kv_idx):
        return (kv_idx > q_idx - window) & (kv_idx <= q_idx if causal else kv_idx < q_idx + window)

    return mask_function


def _check_flash_window(attn_implementation, padding_mask):
    # Here, not at the top: whoever has no window needs nothing of it.
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    _, process = lazy_import_flash_attention(attn_implementation)
    # transformers 5.24 has a pair here, whose second is for paged caches. Goes when 4.57 is dropped.
    process = process[0] if isinstance(process, tuple) else process
    if not process.keywords["supports_mapping"]["window_size"]:  # it would be ignored without a word
        raise ValueError(
            f"attn_implementation={attn_implementation!r} knows no window on this device, and would attend to the "
            'whole prompt. Use model.set_attn_implementation("sdpa").'
        )
    if padding_mask is None:
        return
    begins = padding_mask.clone()  # where a run of real tokens does
    begins[:, 1:] &= ~padding_mask[:, :-1]
    if bool((begins.sum(-1) > 1).any()):
        raise ValueError(
            f"attention_mask has pads between real tokens, which attn_implementation={attn_implementation!r} would "
            "leave out of a sliding window. Put them at an end of the row, or use "
            'model.set_attn_implementation("sdpa").'
        )


def make_attention_mask(
    attn_implementation,
    hidden_states,
    key_length,
    query_offset=0,
    padding_mask=None,
    causal=True,
    may_skip=True,
    window=None,
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
        window (`int`, *optional*): Query `i` sees only keys `j` with `|i - j| < window`, as in transformers' sliding
            windows (causal: masking_utils.py; bidirectional: modeling_gemma3.py; v4.57.6 and v5.24.0). Flash attention
            takes it beside the mask, as `sliding_window`.

    Returns:
        `None`, a 4D mask, a 2D mask or a `BlockMask`, as the implementation wants it.

    Raises:
        ValueError: where flash attention would not keep to the window.
    """
    batch, query_length = hidden_states.shape[:2]
    device = hidden_states.device
    tracing = is_traced()
    if padding_mask is not None:
        padding_mask = padding_mask.to(device=device, dtype=torch.bool)
        if not tracing and padding_mask.shape[-1] >= key_length and bool(padding_mask.all()):
            padding_mask = None
    mask_function = causal_mask_function if causal else _all_keys_mask_function
    if window is not None and not tracing and key_length <= window:
        window = None  # it reaches all keys
    if window is not None:
        mask_function = _window_mask_function(window, causal)
        if "flash" in attn_implementation and not tracing:
            _check_flash_window(attn_implementation, padding_mask)
    elif not causal and padding_mask is None:
        return None
    # A registered attention without a mask function of its own gets a boolean mask, as upstream does.
    key = attn_implementation if attn_implementation in ALL_MASK_ATTENTION_FUNCTIONS else "sdpa"
    arguments = {
        "batch_size": batch,
        "kv_length": key_length,
        "kv_offset": 0,
        "mask_function": mask_function,
        "attention_mask": padding_mask,
        "allow_is_causal_skip": causal and may_skip and window is None,
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
