"""Every option of the architecture: one by one for what is quick, and together in few toys for what is not; and the
targets that they go to."""

import sys

from hf_encdec_distill.export.backends import targets


# onnxruntime-genai 0.18 has no wheel for Python 3.10.
TARGETS = [target for target in targets() if target != "genai" or sys.version_info >= (3, 11)]

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

OPTIONS = {
    "separate": {"kind": "separate"},
    "separate, causal encoder": {"kind": "separate", "encoder_attention": "causal"},
    "separate, any encoder layer": {"kind": "separate", "cross_attention_layers": [1, 2]},
    "merged": {"kind": "merged"},
    "merged, causal encoder": {"kind": "merged", "encoder_attention": "causal"},
    "merged, any encoder layer": {"kind": "merged", "cross_attention_layers": [3, 0]},
    "a key and value head for each query head": {"kind": "merged", "num_key_value_heads": 4},
    "one key and value head": {"kind": "separate", "num_key_value_heads": 1},
    "biases": {"kind": "merged", "attention_bias": True, "mlp_bias": True},
    "biases on queries, keys and values": {"kind": "separate", "attention_bias": "qkv"},
    "norms of queries and keys": {"kind": "merged", "qk_norm": True},
    "plain MLP": {"kind": "separate", "gated_mlp": False, "hidden_act": "gelu"},
    "head of its own": {"kind": "merged", "tie_word_embeddings": False},
    "narrow decoder": {"kind": "merged", "decoder_intermediate_size": 40},
    "wide heads": {"kind": "merged", "head_dim": 16},
    "layers without RoPE": {"kind": "merged", "encoder_no_rope_layers": [1], "decoder_no_rope_layers": [0]},
    "layers that slide": {"kind": "merged", "encoder_sliding_window": 3},
    "layers that slide, causal, with a base of their own": {
        "kind": "separate",
        "encoder_attention": "causal",
        "encoder_layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "encoder_sliding_window": 3,
        "encoder_sliding_rope_theta": 50.0,
    },
    "half of a head turned": {"kind": "merged", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "linear RoPE": {"kind": "separate", "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "YaRN": {"kind": "merged", "rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "Llama 3's RoPE": {"kind": "merged", "rope_parameters": LLAMA_3},
    "shared keys and values of the prompt": {"kind": "separate", "cross_attention_sharing": 2},
    "shared in groups of two and one": {
        "kind": "merged",
        "decoder_num_hidden_layers": 3,
        "cross_attention_sharing": 2,
    },
    "pooled half way up": {"kind": "merged", "encoder_pooling": 2},
    "pooled as it leaves": {"kind": "separate", "encoder_pooling": 3, "encoder_pooling_layer": 3},
}

TOGETHER = {
    "separate": {
        "kind": "separate",
        "num_key_value_heads": 1,
        "attention_bias": "qkv",
        "gated_mlp": False,
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        "encoder_pooling": 3,
        "encoder_pooling_layer": 3,
        "cross_attention_sharing": 2,
    },
    "separate, any encoder layer": {
        "kind": "separate",
        "encoder_attention": "causal",
        "cross_attention_layers": [1, 2],
        "encoder_layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "encoder_sliding_window": 3,
        "encoder_sliding_rope_theta": 50.0,
        "head_dim": 16,
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "encoder_no_rope_layers": [1],
        "decoder_no_rope_layers": [0],
    },
    "merged": {
        "kind": "merged",
        "encoder_attention": "causal",
        "attention_bias": True,
        "mlp_bias": True,
        "decoder_intermediate_size": 40,
        "decoder_num_hidden_layers": 3,
        "cross_attention_sharing": 2,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
    },
    "merged, any encoder layer": {
        "kind": "merged",
        "cross_attention_layers": [3, 0],
        "encoder_sliding_window": 3,
        "num_key_value_heads": 4,
        "qk_norm": True,
        "tie_word_embeddings": False,
        "rope_parameters": LLAMA_3,
        "encoder_pooling": 2,
    },
}
