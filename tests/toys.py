"""Toy models and ragged prompts that the model tests share.

Weights have a spread of 0.2, norms and biases are moved off one and zero: tiny weights hide wrong positions and
ignored masks, norms of one hide a norm that is not applied.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_encdec_distill import RopeEncDecConfig, RopeEncDecForConditionalGeneration


VOCAB = 97
KINDS = ("separate", "merged")
PROMPT_LENGTHS = (7, 4, 2)
SLIDING = {  # of the encoder's three layers
    "encoder_layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "encoder_sliding_window": 2,
    "encoder_sliding_rope_theta": 50.0,
}


def make_config(kind="separate", **fields):
    """`kind` is one of `KINDS`, or `pooled` for `merged` with an encoder that pools, by what divides no prompt, or
    `shared` for `separate` with decoder layers that share keys and values of the prompt, in groups of two and one."""
    if kind == "pooled":
        kind, fields = "merged", {"encoder_pooling": 3, **fields}
    elif kind == "shared":
        kind, fields = "separate", {"cross_attention_sharing": 2, "decoder_num_hidden_layers": 3, **fields}
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "encoder_num_hidden_layers": 3,
        "decoder_num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "cross_attention": kind,
    }
    return RopeEncDecConfig(**{**defaults, **fields})


def stir(model):
    """Move every vector parameter off its initial value, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_model(kind="separate", cls=RopeEncDecForConditionalGeneration, **fields):
    return stir(cls(make_config(kind, **fields))).eval()


def make_llama(layers=3, **fields):
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return stir(LlamaForCausalLM(LlamaConfig(**{**defaults, **fields}))).eval()


def merged_twin(llama, **fields):
    """A merged, causal model of full depth that holds a Llama's weights on both sides."""
    layers = llama.config.num_hidden_layers
    model = make_model(
        "merged",
        encoder_num_hidden_layers=layers,
        decoder_num_hidden_layers=layers,
        encoder_attention="causal",
        tie_word_embeddings=False,
        rms_norm_eps=llama.config.rms_norm_eps,
        **fields,
    )
    weights = {
        "lm_head.weight": llama.lm_head.weight,
        "model.encoder.embed_tokens.weight": llama.model.embed_tokens.weight,
    }
    for name, weight in llama.model.state_dict().items():
        if name.startswith(("layers.", "norm.")):
            weights[f"model.encoder.{name}"] = weights[f"model.decoder.{name}"] = weight
    model.load_state_dict(weights, strict=True)
    return model


def random_ids(*shape):
    """Token ids without special ones."""
    return torch.randint(3, VOCAB, shape)


def ragged(side="right", lengths=PROMPT_LENGTHS):
    """Prompts padded on one side, `(B, S)` ids and mask, and the same rows alone, each `(1, length)`."""
    rows = [random_ids(1, length) for length in lengths]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        start = 0 if side == "right" else ids.shape[1] - row.shape[1]
        ids[index, start : start + row.shape[1]] = row[0]
        mask[index, start : start + row.shape[1]] = 1
    return ids, mask, rows
