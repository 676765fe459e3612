"""What ONNX Runtime GenAI's two graphs compute, as modules that are traced."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.rope_encdec.modeling_rope_encdec import apply_rotary_pos_emb
from .modules import ExportedDecoder, ExportedEncoder, TraceableRotary


EXAMPLE_SIZES = {"prompt + 1": 5, "past + 1": 7, "slots": 9}


class PromptStage(nn.Module):
    """Encoder and first step of the decoder.

    Args:
        model: its weights are used, not copied.
    """

    def __init__(self, model):
        super().__init__()
        self.encoder, self.decoder = ExportedEncoder(model), ExportedDecoder(model)

    def forward(self, input_ids: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            input_ids: `(1, S + 1)`, the prompt and the start token.
            cache: any part of it, `(1, G, M, D)`, for the number M of its slots.

        Returns:
            logits `(1, 1, V)`, then for each layer key and value `(1, G, M, D)`, of which S + 1 slots are filled.
        """
        prompt, start = input_ids[:, :-1], input_ids[:, -1:]
        mask = torch.ones_like(prompt)
        cross = self.encoder(prompt, mask)
        logits, *own = self.decoder(start, mask, *(part[:, :, :0] for part in cross), *cross)
        free = cache.new_zeros((1, cache.shape[1], cache.shape[2] - input_ids.shape[1], cache.shape[3]))
        return logits, *(torch.cat((*parts, free), dim=2) for parts in zip(cross, own, strict=True))


class DecoderStage(nn.Module):
    """One further token. ONNX Runtime's own attention writes key and value into their slot of the cache, where
    everything else would copy all slots at each step.

    Args:
        model: its weights are used, not copied.
    """

    def __init__(self, model):
        super().__init__()
        self.embed_tokens, self.decoder, self.lm_head = (
            model.model.encoder.embed_tokens,
            model.model.decoder,
            model.lm_head,
        )
        self.rotary = TraceableRotary(self.decoder.rotary_emb)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            input_ids: `(1, 1)`.
            attention_mask: `(1, P + 1)`, one for each token so far.
            past: for each layer key and value `(1, G, M, D)`, the first P of M slots filled.

        Returns:
            logits `(1, 1, V)`, then for each layer key and value, one more slot filled.
        """
        hidden = self.embed_tokens(input_ids)
        position = attention_mask.sum(-1, keepdim=True) - 1
        last = position[:, 0].to(torch.int32)
        length = torch.scalar_tensor(attention_mask.shape[1], dtype=torch.int32)
        rotary = self.rotary(hidden, position)
        outputs: list[Tensor] = []
        for index, layer in enumerate(self.decoder.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            query = attention.project_query(normed)
            key, value = attention.project_key_value(normed)
            if layer.uses_rope:
                query, key = apply_rotary_pos_emb(query, rotary), apply_rotary_pos_emb(key, rotary)
            heads, groups = query.shape[1], key.shape[1]
            query, key, value = (x.transpose(1, 2).flatten(2) for x in (query, key, value))
            # Operator of onnxruntime v1.32.0, docs/ContribOperators.md.
            old_key, old_value = past[2 * index : 2 * index + 2]
            attended, *new = torch.onnx.ops.symbolic_multi_out(
                "com.microsoft::GroupQueryAttention",
                (query, key, value, old_key, old_value, last, length),
                {"num_heads": heads, "kv_num_heads": groups},
                dtypes=[query.dtype] * 3,
                shapes=[query.shape, old_key.shape, old_value.shape],
                version=1,
            )
            outputs += new
            hidden = hidden + attention.o_proj(attended)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.lm_head(self.decoder.norm(hidden)), *outputs
