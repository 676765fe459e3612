"""A RoPE encoder-decoder whose decoder reads the encoder through a cross-attention of its own, or merged into its
self-attention.

This file travels to the Hub beside the weights: it imports only torch, transformers and its own siblings.

Shapes are named by suffix: B batch, S prompt (encoder) length, P prompt positions that leave the encoder (S, or fewer
where it pools), T target (decoder) length, K keys that a query sees, H hidden size, N query heads, G key/value heads,
D head width, V vocabulary.
"""

import copy
import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple

from .compat_rope_encdec import CACHE_FIELD, cache_key_length, is_traced, make_attention_mask, update_cache
from .configuration_rope_encdec import RopeEncDecConfig


@dataclass
class RopeEncDecEncoderOutput(BaseModelOutput):
    """Output of the encoder.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, P, H)`): State after the last layer and the final norm.
        hidden_states (`tuple` of `(B, S or P, H)`): The state that enters each layer, then `last_hidden_state`.
        attentions (`tuple` of `(B, N, S or P, S or P)`): Attention probabilities of each layer.
        cross_attention_states (`torch.FloatTensor` of shape `(B, P, R * H)`): The R distinct encoder states that the
            decoder reads (`config.encoder_states_read`), side by side in one tensor so that `generate` expands it for
            beams; `None` where the decoder reads `last_hidden_state` alone.
    """

    cross_attention_states: torch.FloatTensor | None = None


class RopeEncDecRMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467), as Llama and Mu compute it: fp32 inside, weight outside."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        x_fp32 = x.float()
        x_fp32 = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x_fp32.to(x.dtype)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class RopeEncDecRotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE (arXiv 2104.09864), of any type in transformers' `ROPE_INIT_FUNCTIONS`.

    Attribute names are those that `dynamic_rope_update` and the weight initialisation of transformers look for.
    """

    def __init__(self, config: RopeEncDecConfig, device=None, rope_theta=None):
        super().__init__()
        if rope_theta is not None:
            config = copy.copy(config)
            config.rope_parameters = {**config.rope_parameters, "rope_theta": rope_theta}
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_init_fn = (
            self.compute_default_rope_parameters
            if self.rope_type == "default"
            else ROPE_INIT_FUNCTIONS[self.rope_type]
        )
        inv_freq, self.attention_scaling = self.rope_init_fn(config, device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` is for weights: rounded frequencies turn position 1000 by a radian.
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            inv_freq, self.attention_scaling = self.rope_init_fn(self.config, self.inv_freq.device)
            self.inv_freq, self.original_inv_freq = inv_freq, inv_freq.clone()
        return self

    @staticmethod
    def compute_default_rope_parameters(config, device=None, seq_len=None, **kwargs):
        """Frequencies `theta^(-2i / width)` of shape `(width / 2,)` and the factor 1.0 on cosines and sines."""
        parameters = config.rope_parameters
        width = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, width, 2, dtype=torch.int64).to(device=device, dtype=torch.float) / width
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x, position_ids):
        """`x` gives device and dtype, `position_ids` is `(B or 1, L)`; returns two tensors `(B or 1, L, width)`."""
        inv_freq = self.inv_freq
        if self.rope_type == "dynamic":
            # Upstream keeps the frequencies of the longest batch so far; a batch must not depend on earlier ones.
            inv_freq, _ = self.rope_init_fn(self.config, x.device, seq_len=position_ids.max() + 1)
        inv_freq = inv_freq.to(device=x.device, dtype=torch.float)
        # Products, not a matmul: autocast would round those, and at position 4000 bf16 is off by several radians.
        angles = position_ids[..., None].float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_half(x):
    """`(x1, x2) -> (-x2, x1)` on the halves of the last axis."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(x, position_embeddings):
    """Rotate the first `width` of the D features of `x` `(B, heads, L, D)` by `(cos, sin)`, each `(B, L, width)`."""
    cos, sin = (table.unsqueeze(1) for table in position_embeddings)
    width = cos.shape[-1]
    if width == x.shape[-1]:
        return x * cos + rotate_half(x) * sin
    rotated, passed = x[..., :width], x[..., width:]
    return torch.cat((rotated * cos + rotate_half(rotated) * sin, passed), dim=-1)


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, prompt_length=None, **kwargs
):
    """The plain formula, and the twin that every faster implementation is compared with.

    `query` `(B, N, T, D)`, `key` and `value` `(B, G, K, D)`, `attention_mask` additive `(B, 1, T, K)`; returns
    `(B, T, N, D)` and the probabilities `(B, N, T, K)`. Where the first `prompt_length` keys are the prompt's, these
    are two tensors, split before they are used, so that `retain_grad` works on either.
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    handed_out = weights
    if prompt_length is not None:
        handed_out = weights.split((prompt_length, weights.shape[-1] - prompt_length), dim=-1)
        weights = torch.cat(handed_out, dim=-1)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), handed_out


class RopeEncDecAttention(nn.Module):
    """Projections, grouped heads and the call into `ALL_ATTENTION_FUNCTIONS`; subclasses say who attends to what."""

    def __init__(self, config: RopeEncDecConfig, layer_idx: int, is_causal: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        query_width = config.num_attention_heads * config.head_dim
        key_value_width = config.num_key_value_heads * config.head_dim
        qkv_bias = bool(config.attention_bias)
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=qkv_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_bias is True)
        if config.qk_norm:
            self.q_norm = RopeEncDecRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RopeEncDecRMSNorm(config.head_dim, config.rms_norm_eps)

    def project_query(self, hidden_states):
        """`(B, T, H) -> (B, N, T, D)`"""
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        return (self.q_norm(query) if self.config.qk_norm else query).transpose(1, 2)

    def project_key_value(self, hidden_states):
        """`(B, K, H) ->` two of `(B, G, K, D)`"""
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        return (self.k_norm(key) if self.config.qk_norm else key).transpose(1, 2), value.transpose(1, 2)

    def attend(self, query, key, value, attention_mask, **kwargs):
        """`(B, N, T, D)` on `(B, G, K, D) -> (B, T, H)` and the probabilities `(B, N, T, K)` where they exist."""
        # transformers reads this source to learn whether attention can be switched: 5.x looks for the first form,
        # 4.57 for the second. Goes when 4.57 is dropped.
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
        elif self.config._attn_implementation == "eager":
            attention_interface = eager_attention_forward
        else:
            attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(-2)), weights


class RopeEncDecSelfAttention(RopeEncDecAttention):
    """Attention of a sequence to itself, RoPE on queries and keys."""

    def project_own(self, hidden_states, position_embeddings, cache, positions):
        """`(B, T, H)` to the sequence's own queries, and keys and values together with those of earlier calls."""
        query = self.project_query(hidden_states)
        key, value = self.project_key_value(hidden_states)
        if position_embeddings is not None:
            query = apply_rotary_pos_emb(query, position_embeddings)
            key = apply_rotary_pos_emb(key, position_embeddings)
        if cache is not None:
            key, value = update_cache(cache.self_attention_cache, key, value, self.layer_idx, positions)
        return query, key, value

    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, positions=None, **kwargs):
        query, key, value = self.project_own(hidden_states, position_embeddings, cache, positions)
        return self.attend(query, key, value, attention_mask, **kwargs)


class RopeEncDecCrossAttention(RopeEncDecAttention):
    """Attention of the decoder to the encoder's output: no positions anywhere, so there is no RoPE to apply."""

    def __init__(self, config: RopeEncDecConfig, layer_idx: int, is_causal: bool):
        super().__init__(config, layer_idx, is_causal)
        if config.prompt_keys_of_decoder_layer[layer_idx] != layer_idx:
            del self.k_proj, self.v_proj
            if config.qk_norm:
                del self.k_norm

    def forward(self, hidden_states, encoder_states, attention_mask, shared=None, cache=None, **kwargs):
        query = self.project_query(hidden_states)
        key, value = _once_per_prompt(cache, self.layer_idx, lambda: self.project_key_value(encoder_states), shared)
        attend = self.attend
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            attend = self.attend_packed
        return *attend(query, key, value, attention_mask, **kwargs), (key, value)

    def attend_packed(self, query, key, value, padding_mask, **kwargs):
        """Flash attention on ragged prompts, all rows in one `(1, ...)` batch with its boundaries beside it.

        Left to itself, transformers takes the mask of the keys for that of the queries too, as in self-attention
        (`_upad_input` in modeling_flash_attention_utils.py, v4.57.6 and v5.23.0), and drops targets.
        """
        batch, length = query.shape[0], query.shape[2]
        real = padding_mask.bool()
        lengths = real.sum(-1, dtype=torch.int32)
        output, weights = self.attend(
            query.transpose(0, 1).flatten(1, 2).unsqueeze(0),
            key.transpose(1, 2)[real].transpose(0, 1).unsqueeze(0),
            value.transpose(1, 2)[real].transpose(0, 1).unsqueeze(0),
            None,
            cu_seq_lens_q=torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device),
            cu_seq_lens_k=nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            max_length_q=length,
            max_length_k=int(lengths.max()),
            **kwargs,
        )
        return output.view(batch, length, -1), weights


class RopeEncDecMergedAttention(RopeEncDecSelfAttention):
    """One softmax over the prompt's keys and the decoder's own.

    What a decoder-only model does at its target tokens: the prompt's keys and values come out of the same projections
    as the target's, from the state that the prompt has at this depth. Related: SwiftKV (arXiv 2410.03960) feeds later
    layers' prompt keys from an earlier state; T5Gemma 2 merges the two attentions on the last encoder layer.
    """

    def project_prompt(self, encoder_states, encoder_position_embeddings):
        key, value = self.project_key_value(encoder_states)
        if encoder_position_embeddings is not None:
            key = apply_rotary_pos_emb(key, encoder_position_embeddings)
        return key, value

    def forward(
        self,
        hidden_states,
        encoder_states,
        position_embeddings,
        encoder_position_embeddings,
        attention_mask,
        shared=None,
        cache=None,
        positions=None,
        **kwargs,
    ):
        query, key, value = self.project_own(hidden_states, position_embeddings, cache, positions)
        prompt_key, prompt_value = _once_per_prompt(
            cache, self.layer_idx, lambda: self.project_prompt(encoder_states, encoder_position_embeddings), shared
        )
        key, value = torch.cat((prompt_key, key), dim=2), torch.cat((prompt_value, value), dim=2)
        output, weights = self.attend(query, key, value, attention_mask, prompt_length=prompt_key.shape[2], **kwargs)
        cross_weights, self_weights = weights if isinstance(weights, tuple) else (None, None)
        return output, self_weights, cross_weights, (prompt_key, prompt_value)


def _once_per_prompt(cache, layer_idx, project, shared):
    """Keys and values of the prompt: out of the cache if it has them, else projected and put there; `shared` are those
    of the first layer of a group, for the others."""
    if cache is None:
        return shared or project()
    layers = cache.cross_attention_cache.layers
    if not cache.is_updated.get(layer_idx):
        key, value = shared or project()
        positions = torch.arange(key.shape[2], device=key.device)
        update_cache(cache.cross_attention_cache, key, value, layer_idx, positions)
        cache.is_updated[layer_idx] = True
        if shared and not cache.is_compileable:  # which has slots of its own; a dynamic one needs no copy
            layers[layer_idx].keys, layers[layer_idx].values = shared
    return layers[layer_idx].keys, layers[layer_idx].values


class RopeEncDecMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate."""

    def __init__(self, config: RopeEncDecConfig, width: int):
        super().__init__()
        if config.gated_mlp:
            self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.gated = config.gated_mlp

    def forward(self, x):
        if self.gated:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act_fn(self.up_proj(x)))


class RopeEncDecEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: RopeEncDecConfig, layer_idx: int):
        super().__init__()
        is_causal = config.encoder_attention == "causal"
        self.input_layernorm = RopeEncDecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = RopeEncDecSelfAttention(config, layer_idx, is_causal)
        self.post_attention_layernorm = RopeEncDecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = RopeEncDecMLP(config, config.intermediate_size)
        self.uses_rope = layer_idx not in config.encoder_no_rope_layers
        slides = config.attention_of_encoder_layer[layer_idx] == "sliding_attention"
        self.sliding_window = config.encoder_sliding_window if slides else None
        # Which of the encoder's modules gives its cosines and sines.
        own_theta = slides and config.encoder_sliding_rope_theta is not None
        self.rotary = "sliding_rotary_emb" if own_theta else "rotary_emb"

    def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
        attended, weights = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings if self.uses_rope else None,
            attention_mask,
            sliding_window=self.sliding_window,  # for flash attention, whose mask is of pads alone
            **kwargs,
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, weights


class RopeEncDecDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: RopeEncDecConfig, layer_idx: int):
        super().__init__()
        self.merged = config.cross_attention == "merged"
        self.input_layernorm = RopeEncDecRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.merged:
            self.self_attn = RopeEncDecMergedAttention(config, layer_idx, is_causal=True)
        else:
            self.self_attn = RopeEncDecSelfAttention(config, layer_idx, is_causal=True)
            self.cross_attn_layernorm = RopeEncDecRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.cross_attn = RopeEncDecCrossAttention(config, layer_idx, is_causal=False)
        self.post_attention_layernorm = RopeEncDecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = RopeEncDecMLP(config, config.decoder_intermediate_size)
        self.uses_rope = layer_idx not in config.decoder_no_rope_layers
        self.begins_group = config.cross_attention_sharing > 1 and layer_idx % config.cross_attention_sharing == 0

    # Differentiable inputs are tensors and positional, outputs are tensors: reentrant checkpointing sees no others.
    # Before 5.24 upstream's layer takes away what is called `past_key_values` in train mode, also where there is no
    # gradient.
    def forward(
        self,
        hidden_states,
        encoder_states,
        position_embeddings,
        encoder_position_embeddings,
        self_attention_mask,
        cross_attention_mask,
        prompt_key=None,
        prompt_value=None,
        cache=None,
        positions=None,
        **kwargs,
    ):
        if not self.uses_rope:
            position_embeddings = encoder_position_embeddings = None
        shared = None if prompt_key is None else (prompt_key, prompt_value)
        if self.merged:
            # As in a decoder-only block, one norm serves prompt and target.
            attended, self_weights, cross_weights, prompt = self.self_attn(
                self.input_layernorm(hidden_states),
                None if encoder_states is None else self.input_layernorm(encoder_states),
                position_embeddings,
                encoder_position_embeddings,
                self_attention_mask,
                shared,
                cache=cache,
                positions=positions,
                **kwargs,
            )
            hidden_states = hidden_states + attended
        else:
            attended, self_weights = self.self_attn(
                self.input_layernorm(hidden_states),
                position_embeddings,
                self_attention_mask,
                cache=cache,
                positions=positions,
                **kwargs,
            )
            hidden_states = hidden_states + attended
            attended, cross_weights, prompt = self.cross_attn(
                self.cross_attn_layernorm(hidden_states),
                encoder_states,
                cross_attention_mask,
                shared,
                cache=cache,
                **kwargs,
            )
            hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        outputs = hidden_states, self_weights, cross_weights
        return (*outputs, *prompt) if self.begins_group else outputs


# Column then row, so that each pair of projections needs one reduction (Megatron-LM, arXiv 1909.08053, section 3).
_TENSOR_PARALLEL_STYLES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "colwise"),
    **dict.fromkeys(("o_proj", "down_proj"), "rowwise"),
}


class RopeEncDecPreTrainedModel(PreTrainedModel):
    config_class = RopeEncDecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RopeEncDecEncoderLayer", "RopeEncDecDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        config.check_fields()

    def post_init(self):
        super().post_init()
        # FSDP2 puts a model under a class of its own, and `save_pretrained` copies the file where `__module__` is.
        self.__module__ = type(self).__module__
        # From the modules that are there (`merged` has no cross-attention, a plain MLP no gate) and for each class by
        # itself: a plan in the config would be repeated under the prefix of every submodel. Embedding and LM head stay
        # whole on each rank.
        names = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in self.named_modules()}
        styles = {name: _TENSOR_PARALLEL_STYLES.get(name.rpartition(".")[-1]) for name in sorted(names)}
        self._tp_plan = {name: style for name, style in styles.items() if style is not None}


def _wanted(kwargs, config, name):
    """`output_attentions` and `output_hidden_states` as the call asks, or as the config says."""
    value = kwargs.pop(name, None)
    return bool(getattr(config, name, False) if value is None else value)


def _real_positions(attention_mask, length, device):
    """`(B, L)`: each row's real tokens counted from 0, so that padding moves nothing, wherever it stands."""
    if attention_mask is None:
        return torch.arange(length, device=device).unsqueeze(0)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def beside(tensor, other):
    """`tensor`, which may be None, on the device of `other`: with `device_map` the layers are on several. Asked first,
    since a tracer would note even a move that moves nothing."""
    return tensor if tensor is None or tensor.device == other.device else tensor.to(other.device)


def pool_positions(hidden_states, attention_mask, size):
    """`(B, S, H)` to the means `(B, P, H)` of `size` neighbours each, counted from a row's first real position.

    The last mean of a row is one of fewer where `size` does not divide its length; past a row's end there are zeros.
    """
    batch, length, _ = hidden_states.shape
    if attention_mask is None:
        return mean_of_neighbours(hidden_states, hidden_states.new_ones(batch, length), size)
    # Real positions to the front, wherever the pads stand; these share a slot past the end, which is dropped.
    real, columns = attention_mask.bool(), torch.arange(length, device=attention_mask.device)
    slots = torch.where(real, attention_mask.long().cumsum(-1) - 1, length)
    source = torch.zeros(batch, length + 1, dtype=torch.long, device=slots.device)
    source = source.scatter(1, slots, columns.expand(batch, -1))[:, :-1]
    first_of_row = torch.arange(batch, device=slots.device)[:, None] * length
    hidden_states = hidden_states.flatten(0, 1)[source + first_of_row]
    return mean_of_neighbours(hidden_states, columns < real.sum(-1, keepdim=True), size)


def mean_of_neighbours(hidden_states, attention_mask, size):
    """`pool_positions` where pads stand behind the real positions."""
    real = attention_mask.to(hidden_states.dtype).unsqueeze(1)
    # Zeros for all that the last mean may lack: runtimes disagree on windows that reach over the end.
    total, share = (
        nn.functional.avg_pool1d(nn.functional.pad(x, (0, size - 1)), size)
        for x in (hidden_states.transpose(1, 2) * real, real)
    )
    return (total / share.clamp(min=1 / size)).transpose(1, 2)


def pooled_attention_mask(attention_mask, size):
    """`(B, S)`, 1 where the prompt is real, to `(B, P)`, true where a pooled position has a real token."""
    if attention_mask is None or size == 1:
        return attention_mask
    groups = (attention_mask.shape[1] + size - 1) // size
    first = torch.arange(groups, device=attention_mask.device) * size
    return first < attention_mask.long().sum(-1, keepdim=True)


def pooled_position_ids(positions, size):
    """RoPE positions of pooled positions, counted from 0: each where its last token stood, had it all of them."""
    return positions if size == 1 else (positions + 1) * size - 1


def states_handed_over(config):
    """The encoder states that go to the decoder besides `last_hidden_state`, as indices into `hidden_states`."""
    # `separate` on the last layer needs nothing more.
    if config.cross_attention == "separate" and config.encoder_states_read == [config.encoder_num_hidden_layers]:
        return ()
    return tuple(config.encoder_states_read)


def slots_of_states(config):
    """Where each decoder layer finds its state in what the encoder hands over; `None` for a layer that shares keys and
    values with the one before."""
    read = zip(config.encoder_state_of_decoder_layer, config.prompt_keys_of_decoder_layer)
    return [
        config.encoder_states_read.index(state) if first == layer else None
        for layer, (state, first) in enumerate(read)
    ]


class RopeEncDecEncoder(RopeEncDecPreTrainedModel):
    """Embedding, layers, final norm. Owns the embedding that the decoder and the LM head share."""

    def __init__(self, config: RopeEncDecConfig):
        super().__init__(config)
        # No padding_idx: masks keep pads out, and where pad == eos or pad == start the token has to learn.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [RopeEncDecEncoderLayer(config, layer_idx) for layer_idx in range(config.encoder_num_hidden_layers)]
        )
        self.norm = RopeEncDecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RopeEncDecRotaryEmbedding(config)
        if config.encoder_sliding_rope_theta is not None:
            self.sliding_rotary_emb = RopeEncDecRotaryEmbedding(config, rope_theta=config.encoder_sliding_rope_theta)
        self.gradient_checkpointing = False
        self.states_read = states_handed_over(config)
        self.pooling_layer = config.first_pooled_layer
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`): Prompt; or `inputs_embeds` `(B, S, H)`.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 1 where the prompt is real.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): RoPE positions.

        Returns:
            [`RopeEncDecEncoderOutput`]

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given, for an `attention_mask` of
                another shape, for `position_ids` where the encoder pools, or if layers slide and flash attention would
                not.
        """
        output_attentions = kwargs["output_attentions"] = _wanted(kwargs, self.config, "output_attentions")
        output_hidden_states = _wanted(kwargs, self.config, "output_hidden_states")
        kwargs.pop("use_cache", None)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "The encoder needs exactly one of input_ids and inputs_embeds, got "
                f"{_given(input_ids, inputs_embeds)}."
            )
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None and not is_traced() and attention_mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} for prompts of shape "
                f"{tuple(hidden_states.shape[:2])}: give one number for each token."
            )
        if position_ids is None:
            # `separate` needs only distances, for which the plain count serves padding on either side, as in Mu;
            # `merged` goes on from here.
            mask = attention_mask if self.config.cross_attention == "merged" else None
            position_ids = _real_positions(mask, hidden_states.shape[1], hidden_states.device)
        elif self.pooling_layer is not None:
            raise ValueError(
                "An encoder that pools counts positions itself: leave position_ids out, padding is told by "
                f"attention_mask. (config.encoder_pooling={self.config.encoder_pooling})"
            )

        entering, attentions = [], []

        def climb(layers, hidden_states, position_ids, attention_mask):
            # One pair of tables and one mask for each type of the layers that are there.
            position_embeddings = {
                name: getattr(self, name)(hidden_states, position_ids)
                for name in dict.fromkeys(layer.rotary for layer in layers)
            }
            masks = {
                window: make_attention_mask(
                    self.config._attn_implementation,
                    hidden_states,
                    key_length=hidden_states.shape[1],
                    padding_mask=attention_mask,
                    causal=self.config.encoder_attention == "causal",
                    window=window,
                )
                for window in dict.fromkeys(layer.sliding_window for layer in layers)
            }
            for layer in layers:
                entering.append(hidden_states)
                hidden_states, weights = layer(
                    hidden_states, position_embeddings[layer.rotary], masks[layer.sliding_window], **kwargs
                )
                attentions.append(weights)
            return hidden_states

        hidden_states = climb(self.layers[: self.pooling_layer], hidden_states, position_ids, attention_mask)
        if self.pooling_layer is not None:
            size = self.config.encoder_pooling
            attention_mask = beside(attention_mask, hidden_states)
            hidden_states = pool_positions(hidden_states, attention_mask, size)
            positions = _real_positions(None, hidden_states.shape[1], hidden_states.device)
            hidden_states = climb(
                self.layers[self.pooling_layer :],
                hidden_states,
                pooled_position_ids(positions, size),
                pooled_attention_mask(attention_mask, size),
            )
        entering.append(hidden_states)
        last_hidden_state = self.norm(hidden_states)

        states_read = [
            entering[index]
            if self.pooling_layer is None or index >= self.pooling_layer
            else pool_positions(entering[index], beside(attention_mask, entering[index]), size)
            for index in self.states_read
        ]
        if self.config.cross_attention == "separate":  # its keys have no norm of their own
            states_read = [self.norm(state) for state in states_read]
        states_read = [beside(state, last_hidden_state) for state in states_read]
        return RopeEncDecEncoderOutput(
            last_hidden_state=last_hidden_state,
            hidden_states=(*entering[:-1], last_hidden_state) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            cross_attention_states=torch.cat(states_read, dim=-1) if states_read else None,
        )


class RopeEncDecDecoder(RopeEncDecPreTrainedModel):
    """Layers and final norm. Takes embeddings: the embedding itself is the encoder's."""

    def __init__(self, config: RopeEncDecConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            [RopeEncDecDecoderLayer(config, layer_idx) for layer_idx in range(config.decoder_num_hidden_layers)]
        )
        self.norm = RopeEncDecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RopeEncDecRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.state_slots = slots_of_states(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        inputs_embeds,
        encoder_hidden_states=None,
        attention_mask=None,
        encoder_attention_mask=None,
        position_ids=None,
        encoder_position_ids=None,
        past_key_values=None,
        use_cache=None,
        cache=None,
        **kwargs,
    ):
        """
        Args:
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, H)`): Embedded target tokens.
            encoder_hidden_states (`torch.FloatTensor` of shape `(B, P, R * H)`, *optional*): The states that the
                decoder reads; may be missing once `past_key_values` holds the prompt's keys and values.
            attention_mask (`torch.Tensor` of shape `(B, past + T)` or 4D, *optional*): 1 where the target is real.
            encoder_attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*): 1 where the prompt is real.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Positions counted from the first target
                token; `merged` adds the length of each prompt.
            encoder_position_ids (`torch.LongTensor` of shape `(B, P)`, *optional*): RoPE positions of the prompt.
            past_key_values ([`EncoderDecoderCache`], *optional*): Self and cross keys and values. transformers >= 5.24
                calls it `cache`; either name will do.

        Returns:
            [`BaseModelOutputWithPastAndCrossAttentions`]

        Raises:
            ValueError: if there is neither a prompt nor a cache that holds one, if there are two caches or one of
                another class, if one that holds tokens meets gradient checkpointing, or a static one flash attention,
                if the prompt's mask or keys in the cache would be more or fewer than the prompt.
        """
        output_attentions = kwargs["output_attentions"] = _wanted(kwargs, self.config, "output_attentions")
        output_hidden_states = _wanted(kwargs, self.config, "output_hidden_states")
        merged = self.config.cross_attention == "merged"
        past_key_values = _one_cache(past_key_values, cache)
        hidden_states = inputs_embeds
        target_length, device = hidden_states.shape[1], hidden_states.device

        if use_cache is None:
            use_cache = self.config.use_cache and not self.training  # where nobody asks, training keeps nothing
        if self.training and self.gradient_checkpointing and torch.is_grad_enabled():
            if past_key_values is not None and past_key_values.get_seq_length():
                raise ValueError(
                    "Gradient checkpointing runs layers twice, and past_key_values that hold tokens would get new "
                    "ones twice: call the model in eval mode, without gradients, or without a cache."
                )
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        cache_holds_prompt = past_key_values is not None and bool(past_key_values.is_updated.get(0))
        if encoder_hidden_states is None and not cache_holds_prompt:
            raise ValueError(
                "The decoder needs encoder_hidden_states, or past_key_values that hold the prompt; got neither. "
                "Pass input_ids or encoder_outputs to the model."
            )

        # transformers < 5.0: `generate` knows the position, where a static cache would have to search for it. It does
        # not know of what PEFT puts into a dynamic one, which always goes on at its end.
        positions = kwargs.pop("cache_position", None)
        is_static = past_key_values is not None and past_key_values.is_compileable
        if positions is None or not is_static:
            past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
            positions = torch.arange(target_length, device=device) + past_length
        else:
            past_length = positions[0]
        if past_key_values is None:
            self_length = target_length
        else:
            self_length = cache_key_length(past_key_values.self_attention_cache, target_length)
            if is_static and "flash" in self.config._attn_implementation:
                raise ValueError(
                    f"attn_implementation={self.config._attn_implementation!r} has no mask that hides the empty slots "
                    'of a static cache. Use model.set_attn_implementation("sdpa"), or a dynamic cache.'
                )
        if cache_holds_prompt:
            prompt_length = past_key_values.cross_attention_cache.layers[0].keys.shape[2]
        else:
            prompt_length = encoder_hidden_states.shape[1]
        if not is_traced():
            self._check_prompt_length(
                prompt_length, encoder_attention_mask, None if cache_holds_prompt else past_key_values
            )

        if position_ids is None:
            position_ids = positions.unsqueeze(0)
            if merged and attention_mask is not None and attention_mask.dim() == 2:
                # A mask may be shorter than the target (what it lacks is not real) or as long as a static cache.
                counted = _real_positions(attention_mask, None, device)
                position_ids = counted[:, positions.clamp(max=counted.shape[1] - 1)]
        encoder_position_embeddings = None
        if merged:
            pooling = self.config.encoder_pooling
            if encoder_attention_mask is None:
                position_ids = position_ids + prompt_length * pooling
            else:
                position_ids = position_ids + encoder_attention_mask.long().sum(-1, keepdim=True) * pooling
            if not cache_holds_prompt:
                if encoder_position_ids is None:
                    encoder_position_ids = pooled_position_ids(
                        _real_positions(encoder_attention_mask, prompt_length, device), pooling
                    )
                encoder_position_embeddings = self.rotary_emb(hidden_states, encoder_position_ids)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)

        masks = self._masks(
            hidden_states,
            attention_mask,
            encoder_attention_mask,
            past_length,
            self_length,
            prompt_length,
            may_skip_mask=not is_static,  # which hands out slots that are not filled yet; only the mask hides them
        )
        states = None
        if encoder_hidden_states is not None:
            states = encoder_hidden_states.split(self.config.hidden_size, dim=-1)

        entering, self_attentions, cross_attentions, shared = [], [], [], ()
        for layer, slot in zip(self.layers, self.state_slots):
            entering.append(hidden_states)
            hidden_states, self_weights, cross_weights, *made = layer(
                hidden_states,
                None if states is None or slot is None else states[slot],
                position_embeddings,
                encoder_position_embeddings,
                *masks,
                *(shared if slot is None else ()),
                cache=past_key_values,
                positions=positions,
                **kwargs,
            )
            shared = made or shared
            self_attentions.append(self_weights)
            cross_attentions.append(cross_weights)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            **{CACHE_FIELD: past_key_values},
            hidden_states=(*entering, hidden_states) if output_hidden_states else None,
            attentions=tuple(self_attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
        )

    def _check_prompt_length(self, length, mask, cache_to_fill):
        if mask is not None and mask.shape[-1] != length:
            size, pooled, tokens = self.config.encoder_pooling, "", ""
            if size > 1:
                pooled, tokens = f", both pooled by {size}", f", {(length - 1) * size + 1} to {length * size} of them"
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)} for prompts of shape {(mask.shape[0], length)}{pooled}: "
                f"give one number for each token{tokens}."
            )
        if cache_to_fill is None:
            return
        keys = cache_key_length(cache_to_fill.cross_attention_cache, length)
        if keys != length:
            raise ValueError(
                f"past_key_values.cross_attention_cache would have {keys} keys for a prompt of length {length}, and "
                f"all of them are attended to. Give a StaticCache max_cache_len={length}, or an empty DynamicCache()."
            )

    def _masks(
        self,
        hidden_states,
        attention_mask,
        encoder_attention_mask,
        past_length,
        self_length,
        prompt_length,
        may_skip_mask,
    ):
        """Masks of the two attentions; `merged` has one attention, whose mask stands in the first place."""
        implementation = self.config._attn_implementation
        if self.config.cross_attention == "separate":
            self_mask = attention_mask
            if attention_mask is None or attention_mask.dim() == 2:
                self_mask = make_attention_mask(
                    implementation,
                    hidden_states,
                    key_length=self_length,
                    query_offset=past_length,
                    padding_mask=attention_mask,
                    may_skip=may_skip_mask,
                )
            cross_mask = make_attention_mask(
                implementation,
                hidden_states,
                key_length=prompt_length,
                padding_mask=encoder_attention_mask,
                causal=False,
            )
            return self_mask, cross_mask

        # [prompt | target] under one causal mask: the prompt is what a decoder-only model would have in its past.
        padding_mask = None
        if attention_mask is not None or encoder_attention_mask is not None:
            batch = hidden_states.shape[0]
            if attention_mask is not None and attention_mask.dim() != 2:
                raise ValueError(
                    f"decoder_attention_mask of shape {tuple(attention_mask.shape)} does not fit merged "
                    "cross-attention; pass the 2D mask of shape (batch, target length)."
                )
            sides = ((encoder_attention_mask, prompt_length), (attention_mask, self_length))
            padding_mask = torch.cat(
                [
                    hidden_states.new_ones(batch, length, dtype=torch.bool) if mask is None else mask.bool()
                    for mask, length in sides
                ],
                dim=-1,
            )
        mask = make_attention_mask(
            implementation,
            hidden_states,
            key_length=prompt_length + self_length,
            query_offset=prompt_length + past_length,
            padding_mask=padding_mask,
            may_skip=may_skip_mask,
        )
        return mask, None


class RopeEncDecModel(RopeEncDecPreTrainedModel):
    """Encoder and decoder without a head."""

    def __init__(self, config: RopeEncDecConfig):
        super().__init__(config)
        self.encoder = RopeEncDecEncoder(config)
        self.decoder = RopeEncDecDecoder(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value

    def get_encoder(self, modality=None):
        # transformers >= 5.0 asks for "image" and "audio" encoders to find out what a model can read.
        return self.encoder if modality is None else self

    def get_decoder(self):
        return self.decoder

    def tie_weights(self, *args, **kwargs):
        super().tie_weights(*args, **kwargs)
        # A `merged` decoder norms for itself and may leave top layers unread: nothing gives them a gradient, and
        # DistributedDataParallel would wait for one. Here because transformers calls this after each load, which in
        # 5.x makes new parameters.
        if self.config.cross_attention == "merged":
            unread = self.encoder.layers[self.config.encoder_states_read[-1] :]
            for module in (*unread, self.encoder.norm):
                module.requires_grad_(False)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        decoder_position_ids=None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        use_cache=None,
        cache=None,
        **kwargs,
    ):
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`): Prompt; or `inputs_embeds`, or `encoder_outputs`.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 1 where the prompt is real, on either side.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): RoPE positions of the prompt.
            decoder_input_ids (`torch.LongTensor` of shape `(B, T)`): Target, the start token first; or
                `decoder_inputs_embeds` of shape `(B, T, H)`.
            decoder_attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): 1 where the target is real.
            decoder_position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Counted from the first target
                token.
            encoder_outputs ([`RopeEncDecEncoderOutput`] or `tuple`, *optional*): What the encoder returned before.
            past_key_values ([`EncoderDecoderCache`], *optional*): Keys and values of earlier calls. transformers
                >= 5.24 calls it `cache`; either name will do.

        Returns:
            [`Seq2SeqModelOutput`]

        Raises:
            ValueError: if the decoder has no input, or a `merged` decoder gets `encoder_outputs` without the states
                that it reads.
        """
        flags = {name: kwargs.pop(name, None) for name in ("output_attentions", "output_hidden_states")}
        cache_position = kwargs.pop("cache_position", None)
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError(
                "The decoder needs exactly one of decoder_input_ids and decoder_inputs_embeds, got "
                f"{_given(decoder_input_ids, decoder_inputs_embeds)}. In training, pass labels."
            )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                return_dict=True,
                **flags,
                **kwargs,
            )
        elif isinstance(encoder_outputs, (tuple, list)):
            # The optional fields are tuples, so a second tensor can only be the states that the decoder reads.
            tensors = [value for value in encoder_outputs if isinstance(value, torch.Tensor)]
            encoder_outputs = RopeEncDecEncoderOutput(
                last_hidden_state=tensors[0], cross_attention_states=tensors[1] if len(tensors) > 1 else None
            )
        encoder_hidden_states = getattr(encoder_outputs, "cross_attention_states", None)
        if encoder_hidden_states is None:
            encoder_hidden_states = encoder_outputs.last_hidden_state
            if self.encoder.states_read:
                raise ValueError(
                    f"encoder_outputs of type {type(encoder_outputs).__name__} have no cross_attention_states, but "
                    f"this decoder reads the encoder states {list(self.encoder.states_read)}. Pass what "
                    "model.get_encoder() returned, whole."
                )
        if decoder_inputs_embeds is None:
            decoder_inputs_embeds = self.encoder.embed_tokens(decoder_input_ids)
        if cache_position is not None:
            kwargs["cache_position"] = cache_position
        decoder_outputs = self.decoder(
            decoder_inputs_embeds,
            encoder_hidden_states,
            attention_mask=decoder_attention_mask,
            encoder_attention_mask=pooled_attention_mask(attention_mask, self.config.encoder_pooling),
            position_ids=decoder_position_ids,
            encoder_position_ids=position_ids,
            past_key_values=_one_cache(past_key_values, cache),
            use_cache=use_cache,
            return_dict=True,
            **flags,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            **{CACHE_FIELD: getattr(decoder_outputs, CACHE_FIELD)},
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
        )


class RopeEncDecEncoderModel(RopeEncDecPreTrainedModel):
    """The encoder alone, for embeddings, retrieval or conditioning a diffusion model."""

    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?decoder\.", r"^lm_head\."]

    def __init__(self, config: RopeEncDecConfig):
        super().__init__(config)
        self.encoder = RopeEncDecEncoder(config)
        self.encoder.states_read = ()  # there is no decoder to hand them to
        self.post_init()

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value

    def get_encoder(self, modality=None):
        return self.encoder if modality is None else self

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
        """See [`RopeEncDecEncoder`]. Returns [`BaseModelOutput`], `last_hidden_state` of shape `(B, S, H)`."""
        outputs = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        return BaseModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RopeEncDecForConditionalGeneration(RopeEncDecPreTrainedModel, GenerationMixin):
    """Encoder, decoder and LM head."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config: RopeEncDecConfig):
        super().__init__(config)
        self.model = RopeEncDecModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # labels stand where their logits do; nothing is shifted
        self.tokenizer = None  # set by `from_decoder_only`, written beside the weights by `save_pretrained`
        self.post_init()

    @classmethod
    def from_decoder_only(cls, teacher, **kwargs):
        """Build a student from a decoder-only model; see
        [`hf_encdec_distill.models.rope_encdec.initialization.from_decoder_only`] for the arguments."""
        try:
            from hf_encdec_distill.models.rope_encdec.initialization import from_decoder_only
        except ImportError as error:
            raise ImportError(
                "from_decoder_only needs the package that this model file comes from: pip install hf-encdec-distill"
            ) from error
        return from_decoder_only(teacher, model_class=cls, **kwargs)

    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if self.tokenizer is not None and is_main_process:
            self.tokenizer.save_pretrained(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # `save_pretrained(push_to_hub=True)` comes here before it returns, and sends what it has seen change.
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_encoder(self, modality=None):
        return self.model.encoder if modality is None else self

    def get_decoder(self):
        return self.model.decoder

    def tie_weights(self, *args, **kwargs):
        super().tie_weights(*args, **kwargs)
        self.model.tie_weights()

    def _prepare_generation_config(self, *args, **kwargs):
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size}: transformers would cut the prompt's "
                "attention_mask into the decoder's chunks. Leave it out: the encoder reads the prompt at once."
            )
        return generation_config, model_kwargs

    def prepare_inputs_for_generation(self, *args, position_ids=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        # Those of the prompt; transformers 4.57 would cut them to the length of the decoder's input.
        return inputs if position_ids is None else {**inputs, "position_ids": position_ids}

    @staticmethod
    def create_masks_for_generate(*args, attention_mask=None, **kwargs):
        # Upstream would build the 4D mask of the target alone; the decoder builds one that knows the prompt too.
        return attention_mask

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        decoder_position_ids=None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ):
        """
        Args:
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): Target tokens, -100 where there is none. They
                give the loss and, unless the decoder has an input, its input: the start token, then all but the last.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): Last positions to compute logits for, 0 for all.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): What the summed loss is divided by; without it,
                the number of target tokens in this batch.

        All others as in [`RopeEncDecModel`].

        Returns:
            [`Seq2SeqLMOutput`], `logits` of shape `(B, T, V)`
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=_one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            if num_items_in_batch is None:
                num_items_in_batch = (labels != -100).sum()
            # A sum over no token is 0, but 0 / 0 would be NaN.
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_FIELD: getattr(outputs, CACHE_FIELD)},
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def prepare_decoder_input_ids_from_labels(self, labels):
        """`(B, T)` labels, -100 allowed, to decoder inputs: the start token, then all but the last label."""
        start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        # Any real token will do in place of -100: no target depends on what follows it.
        pad = self.config.pad_token_id
        filler = pad if pad is not None and 0 <= pad < self.config.vocab_size else 0
        return torch.cat((start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, filler)), dim=-1)


def _one_cache(past_key_values, cache):
    """The cache, by whichever name it was given."""
    given = [one for one in (past_key_values, cache) if one is not None]
    for one in given:
        if not hasattr(one, "is_updated"):
            raise ValueError(
                f"past_key_values of type {type(one).__name__}: an encoder-decoder takes an EncoderDecoderCache, such "
                "as EncoderDecoderCache(DynamicCache(), DynamicCache())."
            )
    if len(given) == 2 and cache is not past_key_values:
        # With transformers 5.24, PEFT 0.21 gives its prefix as `past_key_values` at each step of `generate`. The first
        # begins with it, beside an empty `cache`; later ones go on with `cache`, which then has the prompt too.
        held = [(bool(one.is_updated.get(0)), bool(one.get_seq_length())) for one in given]
        if held[0] == held[1]:
            raise ValueError(
                "Two caches, past_key_values and cache, and neither holds more than the other: this transformers "
                f"calls it {CACHE_FIELD}, give one."
            )
        return given[held.index(max(held))]
    return given[0] if given else None


def _given(first, second) -> str:
    return "neither" if first is None and second is None else "both"


__all__ = [
    "RopeEncDecEncoderModel",
    "RopeEncDecForConditionalGeneration",
    "RopeEncDecModel",
    "RopeEncDecPreTrainedModel",
]
