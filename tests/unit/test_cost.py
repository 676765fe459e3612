"""The counted costs against real tiny modules: torch's FLOP counter, `numel`, and the tensors of a real cache."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import EncoderDecoderCache

from hf_encdec_distill import RopeEncDecConfig, RopeEncDecForConditionalGeneration
from hf_encdec_distill.bench import compare_cost, decoder_only_config, greedy_decode, model_cost


PROMPT, NEW = 13, 5
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_LIKE = {
    "llama": {"tie_word_embeddings": False},
    "llama with biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral with keys that it does not read": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"tie_word_embeddings": True, "sliding_window": None},
    "phi3": {"tie_word_embeddings": False, "head_dim": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2 with a key that it does not read": {"mlp_bias": True},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3 with biases": {"attention_bias": True, "tie_word_embeddings": False},
    "smollm3": {"tie_word_embeddings": True},
}
ENCODER_DECODER = {
    "merged": {"cross_attention": "merged"},
    "merged, top of the encoder unread": {
        "cross_attention": "merged",
        "encoder_num_hidden_layers": 4,
        "cross_attention_layers": [0, 2],
        "encoder_attention": "causal",
    },
    "merged, all of the encoder read": {"cross_attention": "merged", "cross_attention_layers": [1, 3]},
    "merged, every extra": {
        "cross_attention": "merged",
        "attention_bias": True,
        "mlp_bias": True,
        "qk_norm": True,
        "gated_mlp": False,
        "decoder_intermediate_size": 24,
    },
    "merged, pooled": {"cross_attention": "merged", "encoder_pooling": 5, "encoder_pooling_layer": 1},
    "merged, shared": {"cross_attention": "merged", "cross_attention_sharing": 2, "cross_attention_layers": [3, 3]},
    "separate": {"cross_attention": "separate"},
    "separate, pooled as it leaves": {
        "cross_attention": "separate",
        "encoder_pooling": 2,
        "encoder_pooling_layer": 3,
    },
    "separate, every extra": {
        "cross_attention": "separate",
        "attention_bias": "qkv",
        "mlp_bias": True,
        "qk_norm": True,
        "tie_word_embeddings": False,
        "decoder_intermediate_size": 24,
    },
    "separate, shared, norms over heads": {
        "cross_attention": "separate",
        "decoder_num_hidden_layers": 3,
        "cross_attention_sharing": 2,
        "attention_bias": "qkv",
        "qk_norm": True,
    },
    "separate, biases, plain MLP": {"cross_attention": "separate", "attention_bias": True, "gated_mlp": False},
}


def decoder_only(name):
    config = CONFIG_MAPPING[name.split()[0]](**{**SIZES, "num_hidden_layers": 3, **LLAMA_LIKE[name]})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def encoder_decoder(name):
    options = {"encoder_num_hidden_layers": 3, "decoder_num_hidden_layers": 2, "decoder_start_token_id": 1}
    config = RopeEncDecConfig(**{**SIZES, **options, **ENCODER_DECODER[name]})
    config._attn_implementation = "eager"
    return RopeEncDecForConditionalGeneration(config).eval()


def numel(parameters):
    return sum({id(p): p.numel() for p in parameters}.values())


def counted_flops(model, length, new_tokens):
    """What torch counts in matrix products, RoPE's outer product of positions and frequencies (no matrix work) apart.

    Eager attention shows every product; `sdpa` on a CPU hides some behind kernels that the counter does not know.
    """
    with FlopCounterMode(display=False) as counter:
        greedy_decode(model, torch.ones(1, length, dtype=torch.long), new_tokens)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    rotary = sum(count for name, count in counts.items() if name.endswith("rotary_emb"))
    return counts["Global"] - rotary


def check_flops(model, length):
    cost = model_cost(model, PROMPT, NEW)
    first = counted_flops(model, length, 1)
    assert cost.first_token_flops == first
    assert cost.flops_per_token * (NEW - 1) == counted_flops(model, length, NEW) - first
    return cost


def cache_bytes(caches):
    tensors = [tensor for cache in caches for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


@torch.inference_mode()
def test_decoder_only_cache_bytes():
    model = decoder_only("llama")
    cache = model(torch.ones(1, PROMPT + NEW - 1, dtype=torch.long), use_cache=True).past_key_values
    assert model_cost(model, PROMPT, NEW, torch.float32).kv_cache_bytes == cache_bytes([cache])


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_decoder_only_flops_and_parameters(name):
    model = decoder_only(name)
    cost = check_flops(model, PROMPT)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert cost.kind == "decoder-only" and cost.parameters == {
        "embedding": embedding.numel(),
        "encoder": 0,
        "decoder": numel(model.parameters()) - numel([embedding, head]),
        "head": 0 if head is embedding else head.numel(),
        "total": numel(model.parameters()),
    }
    # A decode step reads every weight but the embedding, of which it reads one row; a tied head is read whole.
    step = (
        numel([*model.base_model.layers.parameters(), *model.base_model.norm.parameters(), head])
        + SIZES["hidden_size"]
    )
    assert cost.weight_bytes_per_token == 2 * step


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_encoder_decoder_flops_and_parameters(name):
    model = encoder_decoder(name)
    merged = model.config.cross_attention == "merged"
    cost = check_flops(model, PROMPT - merged)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    shared = {id(embedding), id(head)}
    encoder, decoder = (
        numel(p for p in side.parameters() if id(p) not in shared)
        for side in (model.get_encoder(), model.get_decoder())
    )
    assert cost.kind == "encoder-decoder" and cost.parameters == {
        "embedding": embedding.numel(),
        "encoder": encoder,
        "decoder": decoder,
        "head": 0 if head is embedding else head.numel(),
        "total": numel(model.parameters()),
    }
    idle = () if merged else ("cross_attn.k_", "cross_attn.v_")  # projections and norm of the prompt's keys and values
    touched = [
        p for n, p in model.get_decoder().named_parameters() if id(p) not in shared and not any(i in n for i in idle)
    ]
    assert cost.weight_bytes_per_token == 2 * (numel([*touched, head]) + SIZES["hidden_size"])


@pytest.mark.parametrize("name", ["merged", "merged, shared", "separate", "separate, shared, norms over heads"])
@torch.inference_mode()
def test_encoder_decoder_cache_bytes(name):
    model = encoder_decoder(name)
    ids = torch.ones(1, PROMPT - (model.config.cross_attention == "merged"), dtype=torch.long)
    cache = model(
        input_ids=ids, decoder_input_ids=torch.ones(1, NEW, dtype=torch.long), use_cache=True
    ).past_key_values
    assert isinstance(cache, EncoderDecoderCache)
    expected = cache_bytes([cache.self_attention_cache, cache.cross_attention_cache])
    assert model_cost(model, PROMPT, NEW, torch.float32).kv_cache_bytes == expected


def test_the_quadratic_term_and_the_cache_read_by_hand():
    # two layers, 4 heads of 12, 2 key/value heads, 2 bytes an element
    llama = model_cost(decoder_only("llama").config, prompt_length=100, new_tokens=3)
    assert llama.first_token_attention_flops == 3 * 4 * 100 * 100 * 4 * 12
    assert llama.cache_bytes_per_token == 3 * 2 * 2 * 12 * 2 * (101 + 102) / 2
    assert llama.bytes_per_token == llama.weight_bytes_per_token + llama.cache_bytes_per_token
    merged = model_cost(encoder_decoder("merged").config, prompt_length=100, new_tokens=3)
    assert merged.first_token_attention_flops == 3 * 4 * 99 * 99 * 4 * 12
    assert merged.cache_bytes_per_token == 2 * 2 * 2 * 12 * 2 * (101 + 102) / 2
    shared = model_cost(encoder_decoder("merged, shared").config, prompt_length=100, new_tokens=3)
    assert shared.cache_bytes_per_token == merged.cache_bytes_per_token - 99 * 2 * 2 * 12 * 2
    separate = model_cost(encoder_decoder("separate").config, prompt_length=100, new_tokens=3)
    assert separate.first_token_attention_flops == 3 * 4 * 100 * 100 * 4 * 12
    assert separate.cache_bytes_per_token == 2 * 2 * 2 * 12 * 2 * (102 + 103) / 2


@pytest.mark.parametrize("encoder_attention,keys", [("causal", 8), ("bidirectional", 15)])
def test_a_window_in_the_encoder_by_hand(encoder_attention, keys):
    fields = {**encoder_decoder("merged").config.to_dict(), "encoder_attention": encoder_attention}
    costs = [
        model_cost(RopeEncDecConfig(**{**fields, "encoder_sliding_window": window}), prompt_length=100, new_tokens=3)
        for window in (None, 8, 99)
    ]
    # Two of the three layers slide.
    assert costs[1].first_token_attention_flops == 4 * 99 * (99 + 2 * keys) * 4 * 12
    saved = costs[0].first_token_attention_flops - costs[1].first_token_attention_flops
    assert costs[0].first_token_flops - costs[1].first_token_flops == saved
    assert costs[2] == costs[0] and costs[1].flops_per_token == costs[0].flops_per_token


def test_bytes_follow_the_dtype():
    config = decoder_only("qwen2").config
    half, full = (model_cost(config, PROMPT, NEW, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert full.bytes_per_token == 2 * half.bytes_per_token and full.kv_cache_bytes == 2 * half.kv_cache_bytes
    assert full.flops_per_token == half.flops_per_token and full.parameters == half.parameters


def test_comparison_is_student_over_teacher_and_plain_json():
    student, teacher = encoder_decoder("merged"), decoder_only("llama")
    result = compare_cost(student, teacher.config, PROMPT, NEW)
    assert result.ratio["parameters"] == numel(student.parameters()) / numel(teacher.parameters())
    assert result.ratio["kv_cache_bytes"] == pytest.approx(2 / 3)  # two decoder layers for three, the same positions
    report = json.loads(json.dumps(result.to_dict()))
    assert report["dtype"] == "bfloat16" and report["ratio"] == result.ratio
    assert report["student"] == model_cost(student, PROMPT, NEW).to_dict()


def test_what_cannot_be_counted_is_refused():
    config = decoder_only("llama").config
    with pytest.raises(ValueError, match="prompt_length=1"):
        model_cost(config, 1)
    with pytest.raises(ValueError, match="new_tokens=1"):
        model_cost(config, 8, 1)
    with pytest.raises(ValueError, match="model_type 'gpt2'.*llama, mistral"):
        model_cost(CONFIG_MAPPING["gpt2"](), 8)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_model_that_a_student_came_from_is_counted_from_the_students_config(family):
    teacher = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            family,
            vocab_size=60,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher, encoder_layers=[0], decoder_layers=[0, 3])
    counted = model_cost(decoder_only_config(student.config), prompt_length=10)
    assert counted == model_cost(teacher, prompt_length=10)
    assert counted.parameters["total"] == sum(parameter.numel() for parameter in teacher.parameters())
    assert decoder_only_config(RopeEncDecConfig()) is None
