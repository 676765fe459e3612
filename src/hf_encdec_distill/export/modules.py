"""The plain modules that every target is made from: what the encoder computes once, one step of the decoder, and of a
student that reads images what its vision tower computes.

They run a [`RopeEncDecForConditionalGeneration`]'s own layers on tensors alone, without cache objects, masks from a
registry or anything else that a tracer would have to see through. Cross keys and values leave the encoder, so that
the decoder needs nothing else of the prompt but its mask.

Shapes are named by suffix, as in the model: B batch, S prompt, S' what the encoder leaves of it (S, or
fewer where it pools), T target tokens of this call, P target tokens of earlier calls, M slots of a fixed cache, G
key/value heads, R query heads for each of them, D head width, V vocabulary, H hidden size, I images, F features of
each.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv

from ..models.evaluating import evaluating
from ..models.families import rope_limit
from ..models.rope_encdec import RopeEncDecForConditionalGeneration, RopeEncDecForImageTextToText
from ..models.rope_encdec.modeling_rope_encdec import (
    RopeEncDecRMSNorm,
    RopeEncDecRotaryEmbedding,
    apply_rotary_pos_emb,
    mean_of_neighbours,
    pooled_attention_mask,
    pooled_position_ids,
)


# Added to the score of a key that is masked out. Finite, and within fp16: with -inf a row that sees no key at all (a
# pad on the left of a causal prompt) would be NaN, and the least fp32 number is -inf in fp16.
MASKED = -3e4
_Module = TypeVar("_Module", bound=nn.Module)


class ExportedVision(nn.Module):
    """Pixels -> image features.

    Args:
        model: a [`RopeEncDecForImageTextToText`]; its weights are used, not copied.
        height, width: in pixels. Positions of patches are fitted to them here, once: what is traced would do so again
            for every image, and by an interpolation that Core ML does not have.
    """

    def __init__(self, model: RopeEncDecForImageTextToText, height: int, width: int):
        super().__init__()
        self.encoder = _with_the_same_weights(model.model.encoder)
        embeddings: Any = self.encoder.vision_tower.embeddings
        fit, fitted = embeddings.interpolate_pos_encoding, list[Tensor]()

        def fit_once(*states_and_size) -> Tensor:
            if not fitted:
                fitted.append(fit(*states_and_size).detach())
            return fitted[0]

        embeddings.interpolate_pos_encoding = fit_once
        with torch.no_grad():
            self.encoder.get_image_features(torch.zeros(1, 3, height, width))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        """`(I, 3, height, width)` to `(I, F, H)`."""
        return (self.encoder.get_image_features(pixel_values),)


class ExportedEncoder(nn.Module):
    """Prompt -> the keys and values that each decoder layer reads.

    Args:
        model: its weights are used, not copied.
        rotary: makes of the model's RoPE what gives cosines and sines: [`TraceableRotary`], or a [`RotaryTable`].
    """

    def __init__(
        self,
        model: RopeEncDecForConditionalGeneration,
        rotary: Callable[[RopeEncDecRotaryEmbedding], nn.Module] | None = None,
    ):
        super().__init__()
        self.encoder, self.decoder = model.model.encoder, model.model.decoder
        self.rotary = nn.ModuleDict(
            {
                name: (rotary or TraceableRotary)(module)
                for name, module in self.encoder.named_children()
                if isinstance(module, RopeEncDecRotaryEmbedding)
            }
        )
        self.config = model.config
        # Layers above the highest state that is read do nothing for the decoder.
        self.depth = max(self.config.encoder_states_read)
        # What the decoder reads is pooled in any case.
        at = self.config.first_pooled_layer
        self.pooling_layer = None if at is None else min(at, self.depth)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, image_features: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """`(B, S)` ids and mask, and `(I, F, H)` features of images, to key and value `(B, G, S', D)` of each decoder
        layer in turn.

        Where the encoder pools, pads have to stand behind a prompt.
        """
        real = attention_mask.to(torch.int64)
        merged = self.config.cross_attention == "merged"
        if merged:
            positions = (real.cumsum(-1) - 1).clamp(min=0)
        else:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden = self.encoder.embed_tokens(input_ids)
        if image_features is not None:
            hidden = _with_images(hidden, input_ids == self.config.image_token_id, image_features)
        rotary, biases = self._of_each_type(hidden, positions, real)

        entering: list[Tensor] = []
        for index, layer in enumerate([*self.encoder.layers[: self.depth], None]):
            if index == self.pooling_layer:
                size = self.config.encoder_pooling
                hidden, *entering = (mean_of_neighbours(state, real, size) for state in (hidden, *entering))
                real = pooled_attention_mask(real, size)
                positions = pooled_position_ids(torch.arange(hidden.shape[1], device=hidden.device)[None], size)
                rotary, biases = self._of_each_type(hidden, positions, real)
            entering.append(hidden)
            if layer is None:
                break
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            query = attention.project_query(normed)
            key, value = attention.project_key_value(normed)
            if layer.uses_rope:
                tables = rotary[layer.rotary]
                query, key = apply_rotary_pos_emb(query, tables), apply_rotary_pos_emb(key, tables)
            hidden = hidden + attention.o_proj(grouped_attention(query, key, value, biases[layer.sliding_window]))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))

        outputs: list[Tensor] = []
        states = self.config.encoder_state_of_decoder_layer
        for index, readers in Counter(self.config.prompt_keys_of_decoder_layer).items():
            layer, state = self.decoder.layers[index], entering[states[index]]
            if merged:
                key, value = layer.self_attn.project_prompt(
                    layer.input_layernorm(state), rotary["rotary_emb"] if layer.uses_rope else None
                )
            else:
                key, value = layer.cross_attn.project_key_value(self.encoder.norm(state))
            if readers == 1:
                outputs += [key, value]
                continue
            # OpenVINO (v2026.4) converts no graph that has a tensor, or its clone, twice among the outputs.
            keys, values = (torch.stack([part] * readers).unbind() for part in (key, value))
            outputs += [part for pair in zip(keys, values, strict=True) for part in pair]
        return tuple(outputs)

    def _of_each_type(self, hidden: Tensor, positions: Tensor, real: Tensor) -> tuple[dict, dict]:
        """Cosines and sines by the name of their module, and what hides keys by the window."""
        tables = {name: module(hidden, positions) for name, module in self.rotary.items()}
        windows = dict.fromkeys(layer.sliding_window for layer in self.encoder.layers[: self.depth])
        return tables, {window: _bias(self._visible(real, window), hidden) for window in windows}

    def _visible(self, real: Tensor, window: int | None) -> Tensor:
        """Keys that a query sees: `(B, 1, 1 or S, S)` of a mask `(B, S)`."""
        visible = (real > 0)[:, None, None]
        order = torch.arange(real.shape[1], device=real.device)
        keys, queries = order[None], order[:, None]
        if self.config.encoder_attention == "causal":
            visible = visible & (keys <= queries)[None, None]
        elif window is not None:
            visible = visible & (keys < queries + window)[None, None]
        if window is not None:
            visible = visible & (keys > queries - window)[None, None]
        return visible


class ExportedDecoder(nn.Module):
    """Target tokens -> logits, and the target's keys and values.

    Args:
        model: its weights are used, not copied.
        fixed: the cache has M slots of which this call fills one, the one at `position`, and T is 1; else the new keys
            and values are appended to those of earlier calls.
        stateful: self-attention in the form that OpenVINO's CPU plug-in makes one operation of, with its states and
            the concatenation (2026.4, `ScaledDotProductAttentionWithKVCache`). Keys and values are repeated for their
            query heads, since it takes a folded query for a longer one; expanded, not `repeat_interleave`: a Gather is
            not recognised, and the plug-in then ignores `KV_CACHE_PRECISION`. With `merged` cross-attention there is
            one cache, which begins with the prompt.
        rotary: as in [`ExportedEncoder`].
    """

    def __init__(
        self,
        model: RopeEncDecForConditionalGeneration,
        fixed: bool = False,
        stateful: bool = False,
        rotary: Callable[[RopeEncDecRotaryEmbedding], nn.Module] | None = None,
    ):
        super().__init__()
        self.embed_tokens, self.decoder, self.lm_head = (
            model.model.encoder.embed_tokens,
            model.model.decoder,
            model.lm_head,
        )
        self.rotary = (rotary or TraceableRotary)(self.decoder.rotary_emb)
        self.config, self.fixed, self.stateful = model.config, fixed, stateful

    def forward(self, input_ids: Tensor, encoder_attention_mask: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            input_ids: `(B, T)`.
            encoder_attention_mask: `(B, S')`, 1 where the prompt is real.
            states: with a fixed cache `position` `(1,)` first, the number of earlier tokens. Then for each layer its
                own key and value `(B, G, P or M, D)`, then for each layer the prompt's `(B, G, S', D)`. A stateful
                `merged` decoder takes one of each, `(B, G, S' + P, D)`.

        Returns:
            logits `(B, T, V)`, then for each layer its own key and value, with the new tokens in them.
        """
        merged = self.config.cross_attention == "merged"
        joined = merged and self.stateful
        apart = merged and not joined and not self.fixed
        layers = len(self.decoder.layers)
        of_layers = states[1:] if self.fixed else states
        own, cross = of_layers[: 2 * layers], of_layers[2 * layers :]
        real = encoder_attention_mask.to(torch.int64)
        hidden = self.embed_tokens(input_ids)
        (batch, prompt), target, past = real.shape, input_ids.shape[1], own[0].shape[2]
        if joined:
            past = past - prompt
        if self.fixed:
            positions = states[0]
            slots = torch.arange(past, device=input_ids.device)
            visible = (slots <= positions)[None, None, None]
            here = (slots == positions).to(hidden.dtype)[None, None, :, None]
        else:
            positions = torch.arange(past, past + target, device=input_ids.device)
            visible = (torch.arange(past + target, device=input_ids.device)[None] <= positions[:, None])[None, None]
        positions = positions[None]
        if merged:
            positions = positions + real.sum(-1, keepdim=True) * self.config.encoder_pooling
        rotary = self.rotary(hidden, positions)
        own_bias = _bias(visible, hidden)
        cross_bias = _bias((real > 0)[:, None, None], hidden)
        bias = own_bias
        if merged and not apart:
            bias = torch.cat(
                (
                    cross_bias.expand(batch, 1, target, prompt),
                    own_bias.expand(batch, 1, target, own_bias.shape[-1]),
                ),
                dim=-1,
            )

        outputs = []
        for index, layer in enumerate(self.decoder.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            query = attention.project_query(normed)
            new_key, new_value = attention.project_key_value(normed)
            if layer.uses_rope:
                query, new_key = apply_rotary_pos_emb(query, rotary), apply_rotary_pos_emb(new_key, rotary)
            if self.fixed:
                # By multiplication: a write to a slice is refused by some converters, and this one is small.
                key, value = (
                    old * (1 - here) + new * here
                    for old, new in zip(own[2 * index : 2 * index + 2], (new_key, new_value), strict=True)
                )
            else:
                key = torch.cat((own[2 * index], new_key), dim=2)
                value = torch.cat((own[2 * index + 1], new_value), dim=2)
            outputs += [key, value]
            if self.stateful:
                key, value = (repeat_kv(x, attention.num_key_value_groups) for x in (key, value))
            # Where they are joined, the prompt's are among the layer's own.
            cross_key, cross_value = (key, value) if joined else cross[2 * index : 2 * index + 2]
            if merged and self.fixed:
                key, value = torch.cat((cross_key, key), dim=2), torch.cat((cross_value, value), dim=2)
            if apart:
                attended = _attention_to_both(query, (cross_key, cross_value, cross_bias), (key, value, own_bias))
            else:
                attended = grouped_attention(query, key, value, bias)
            hidden = hidden + attention.o_proj(attended)
            if not merged:
                query = layer.cross_attn.project_query(layer.cross_attn_layernorm(hidden))
                attended = grouped_attention(query, cross_key, cross_value, cross_bias)
                hidden = hidden + layer.cross_attn.o_proj(attended)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.lm_head(self.decoder.norm(hidden)), *outputs


class TraceableRotary(nn.Module):
    """The model's RoPE as it is, but for the two types whose frequencies depend on the longest sequence of a call:
    there upstream asks for that length with an `if`, which a tracer would freeze."""

    def __init__(self, rotary: RopeEncDecRotaryEmbedding):
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        rotary = self.rotary
        limit = rope_limit(rotary.config)
        if limit is None:
            return rotary(x, position_ids)
        length = position_ids.max() + 1
        if rotary.rope_type == "dynamic":
            inv_freq, _ = rotary.rope_init_fn(rotary.config, x.device, seq_len=length)
        else:
            short, _ = rotary.rope_init_fn(rotary.config, x.device)
            long, _ = rotary.rope_init_fn(rotary.config, x.device, seq_len=limit + 1)
            inv_freq = torch.where(length > limit, long, short)
        angles = position_ids[..., None].float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class RotaryTable(nn.Module):
    """Cosines and sines of the first `length` positions, looked up instead of computed: for runtimes that would round
    the angles to fp16, in which position 1000 is off by half a radian."""

    cos: Tensor
    sin: Tensor

    def __init__(self, rotary: nn.Module, length: int):
        super().__init__()
        with torch.no_grad():
            cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
        self.register_buffer("cos", cos[0])
        self.register_buffer("sin", sin[0])

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[position_ids].to(x.dtype), self.sin[position_ids].to(x.dtype)


class ScaledRMSNorm(nn.Module):
    """RMSNorm whose squares stay within fp16, which ends at 65504: each row is first divided by its largest number, if
    that is more than 1. The result is the same; without it a row with a 256 in it would come out as zeros."""

    def __init__(self, norm: RopeEncDecRMSNorm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp(min=1.0)
        x = x / largest
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps * largest.pow(-2)))


@contextmanager
def in_float32(model: _Module) -> Iterator[_Module]:
    """The model in float32 and evaluation mode: a copy where it has weights of another type. Afterwards each module of
    the model is in the mode that it was in."""
    tensors = (*model.parameters(), *model.buffers())
    is_float32 = all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point())
    with evaluating(model):
        yield model if is_float32 else copy.deepcopy(model).float()


def with_scaled_norms(model: RopeEncDecForConditionalGeneration) -> RopeEncDecForConditionalGeneration:
    """A copy of the model, with the same weights, whose norms are [`ScaledRMSNorm`]s."""
    model = _with_the_same_weights(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RopeEncDecRMSNorm):
                setattr(module, name, ScaledRMSNorm(child))
    return model


def _with_the_same_weights(module: _Module) -> _Module:
    """A copy whose tensors are those of the module."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def _with_images(hidden: Tensor, is_image: Tensor, features: Tensor) -> Tensor:
    """`(B, S, H)` states with `(I, F, H)` features in the places `(B, S)` of image tokens, in their order through all
    rows: what `masked_scatter` does, by a lookup, which every target has and which no tracer bounds by the number of
    images. All other tokens look up the zeros in front, so that there may be no image at all."""
    table = torch.cat((features.new_zeros(1, features.shape[-1]), features.flatten(0, 1)))
    ordinal = is_image.to(torch.int64).flatten().cumsum(0).view(is_image.shape)
    return torch.where(is_image[..., None], table[torch.where(is_image, ordinal, 0)], hidden)


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention of `(B, G * R, T, D)` to `(B, G, K, D)` under a bias `(B or 1, 1, T or 1, K)`, to `(B, T, G * R * D)`.

    The R query heads of a group stand one after the other on the time axis, so that keys and values are read as they
    are instead of being repeated R times: less memory traffic on every target, and a repeat of a stateful cache is
    what OpenVINO cannot compile.
    """
    groups, (batch, heads, length, width) = key.shape[1], query.shape
    ratio = heads // groups
    if ratio > 1:
        query = query.reshape(batch, groups, ratio * length, width)
        bias = _of_each_query(bias, ratio)
    # No `scale`: the default is ours too, and naming it makes Core ML spell the attention out.
    output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return _with_heads_joined(output, heads, length)


def _attention_to_both(
    query: Tensor, prompt: tuple[Tensor, Tensor, Tensor], own: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """[`grouped_attention`] to the keys of two parts `(key, value, bias)`, which are read where they are: joining them
    would copy the prompt's for every target token."""
    groups, (batch, heads, length, width) = own[0].shape[1], query.shape
    ratio = heads // groups
    query = (query * width**-0.5).reshape(batch, groups, ratio * length, width)
    scores = [query @ key.transpose(2, 3) + _of_each_query(bias, ratio) for key, _, bias in (prompt, own)]
    weights, first = torch.cat(scores, dim=-1).softmax(dim=-1), prompt[0].shape[2]
    output = weights[..., :first] @ prompt[1] + weights[..., first:] @ own[1]
    return _with_heads_joined(output, heads, length)


def _of_each_query(bias: Tensor, ratio: int) -> Tensor:
    return bias.repeat(1, 1, ratio, 1) if bias.shape[2] != 1 else bias


def _with_heads_joined(output: Tensor, heads: int, length: int) -> Tensor:
    batch, _, _, width = output.shape
    return output.reshape(batch, heads, length, width).transpose(1, 2).reshape(batch, length, heads * width)


def _bias(visible: Tensor, like: Tensor) -> Tensor:
    return (~visible).to(like.dtype) * MASKED
