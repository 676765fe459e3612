"""The lean loop against `generate()` of transformers' own models, and the bookkeeping around it."""

import pytest
import torch
from distillation_toys import spread
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from hf_encdec_distill import RopeEncDecConfig, RopeEncDecForConditionalGeneration, devices
from hf_encdec_distill.bench import (
    LatencyComparison,
    best_cpu_dtype,
    bf16_unit,
    compare_latency,
    greedy_decode,
    machine_description,
)


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return spread(LlamaForCausalLM(config), std=0.5)


@pytest.fixture(scope="module")
def bart():
    config = BartConfig(
        vocab_size=120,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        eos_token_id=None,
        forced_eos_token_id=None,
        bos_token_id=None,
    )
    return spread(BartForConditionalGeneration(config), std=0.5)


def student(cross_attention):
    config = RopeEncDecConfig(
        vocab_size=120,
        hidden_size=48,
        intermediate_size=64,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention=cross_attention,
        decoder_start_token_id=5,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return spread(RopeEncDecForConditionalGeneration(config), std=0.5)


@pytest.fixture(scope="module")
def merged():
    return student("merged")


@pytest.fixture(scope="module")
def separate():
    return student("separate")


@pytest.mark.parametrize("name", ["llama", "bart", "merged", "separate"])
def test_greedy_decode_gives_the_tokens_of_generate(name, request):
    model = request.getfixturevalue(name)
    ids = torch.randint(1, 120, (2, 17), generator=torch.Generator().manual_seed(2))
    tokens, times = greedy_decode(model, ids, 9)
    mask = torch.ones_like(ids)
    theirs = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=9, min_new_tokens=9)
    assert len(set(tokens[0])) > 2
    assert tokens == theirs[:, -9:].tolist()
    assert len(times) == 9 and all(early < late for early, late in zip(times, times[1:], strict=False))


def test_the_head_sees_one_position_of_the_prompt(llama):
    lengths = []
    hook = llama.lm_head.register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    greedy_decode(llama, torch.ones(1, 11, dtype=torch.long), 3)
    hook.remove()
    assert lengths == [1, 1, 1]


def test_rounds_are_interleaved_and_the_models_are_left_alone(llama, bart):
    order = []
    hooks = [
        model.register_forward_pre_hook(lambda module, args, name=name: order.append(name))
        for name, model in (("student", bart), ("teacher", llama))
    ]
    result = compare_latency(bart, llama, prompt_length=8, new_tokens=2, rounds=3, dtype=torch.float32)
    for hook in hooks:
        hook.remove()
    assert order == ["teacher"] * 2 + ["student"] * 2 + (["teacher"] * 2 + ["student"] * 2) * 3
    before = llama.lm_head.weight.clone()
    compare_latency(bart, llama, prompt_length=8, new_tokens=2, rounds=1, dtype=torch.bfloat16)
    assert llama.dtype == torch.float32 and torch.equal(before, llama.lm_head.weight)
    assert len(result.rounds) == 3 and result.dtype == "float32" and result.prompt_length == 8


def test_a_copy_in_another_dtype_keeps_ties_and_float32_frequencies(bart, llama):
    from hf_encdec_distill.bench.latency import _ready

    half = _ready(bart, torch.bfloat16)
    assert half.lm_head.weight.data_ptr() == half.model.shared.weight.data_ptr() and half.dtype == torch.bfloat16
    half = _ready(llama, torch.bfloat16)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert _ready(llama, torch.float32) is llama


def test_prompts_are_fixed_by_the_seed_and_used_in_turn(llama, bart, monkeypatch):
    seen = []
    from hf_encdec_distill.bench import latency

    monkeypatch.setattr(
        latency, "greedy_decode", lambda model, ids, n: (seen.append(ids[0].tolist()), ([0] * n, [0.5, 0.75]))[1]
    )
    for seed in (3, 3, 4):
        compare_latency(bart, llama, prompt_length=6, new_tokens=2, rounds=1, seed=seed)
    assert seen[0] == seen[1] == seen[4] and seen[0] != seen[8] and len(seen[0]) == 6
    seen.clear()
    result = compare_latency(bart, llama, prompts=[[1, 2], [3, 4, 5, 6]], new_tokens=2, rounds=2)
    assert seen[::2] == [[1, 2], [3, 4, 5, 6], [1, 2]] == seen[1::2]
    assert result.prompt_length == 3


def test_a_merged_student_reads_the_teachers_prompt_without_its_start_token(llama, merged, separate, monkeypatch):
    from hf_encdec_distill.bench import latency

    seen = []
    monkeypatch.setattr(
        latency, "greedy_decode", lambda model, ids, n: (seen.append(ids[0].tolist()), ([0] * n, [0.5, 0.75]))[1]
    )
    compare_latency(merged, llama, prompt_length=6, new_tokens=2, rounds=1)
    assert seen[0][-1] == 5 and len(seen[0]) == 6 and seen[1] == seen[0][:-1]
    compare_latency(separate, llama, prompts=[[7, 8, 9]], new_tokens=2, rounds=1)
    assert seen[-2:] == [[7, 8, 9]] * 2
    with pytest.raises(ValueError, match="ends in token 9, but the merged student starts from token 5"):
        compare_latency(merged, llama, prompts=[[7, 5], [8, 9]], new_tokens=2, rounds=1)


def test_summary_and_ratio_by_hand():
    def timing(first, step):
        return {
            "first_token_ms": first,
            "step_ms": step,
            "tokens_per_second": 1000 / step,
            "request_ms": first + 4 * step,
        }

    rounds = [
        {"teacher": timing(100.0, 10.0), "student": timing(50.0, 4.0)},
        {"teacher": timing(200.0, 20.0), "student": timing(120.0, 4.0)},
        {"teacher": timing(300.0, 40.0), "student": timing(90.0, 10.0)},
    ]
    report = LatencyComparison("float32", "asked for", 8, 5, rounds, {}).to_dict()
    assert report["teacher"]["first_token_ms"] == {"value": 200.0, "low": 150.0, "high": 250.0}
    assert report["student"]["tokens_per_second"]["value"] == 250.0
    # within rounds .5 .6 .3: not the ratio of the medians, 90 / 200
    assert report["ratio"]["first_token"] == pytest.approx({"value": 0.5, "low": 0.4, "high": 0.55})
    assert report["ratio"]["step"] == pytest.approx({"value": 0.25, "low": 0.225, "high": 0.325})


def test_timings_by_hand(llama, bart, monkeypatch):
    from hf_encdec_distill.bench import latency

    monkeypatch.setattr(latency, "greedy_decode", lambda model, ids, n: ([0] * n, [0.2, 0.25, 0.3, 0.35, 0.4]))
    result = compare_latency(bart, llama, prompt_length=6, new_tokens=5, rounds=1)
    assert result.rounds[0]["student"] == pytest.approx(
        {"first_token_ms": 200, "step_ms": 50, "tokens_per_second": 20, "request_ms": 400}
    )


def test_the_dtype_follows_what_the_cpu_has(monkeypatch):
    for capabilities, unit, dtype in (
        ({"amx_bf16": True, "avx512_bf16": True}, "AMX", torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False}, "AVX512-BF16", torch.bfloat16),
        ({"bf16": True, "architecture": "aarch64"}, "Arm BF16", torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, None, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert (bf16_unit(), best_cpu_dtype()) == (unit, dtype)


def test_without_torchs_answer_the_system_is_asked(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(devices, "_cpu_info", lambda field: {"flags": "fpu avx512_bf16 amx_bf16"}.get(field, ""))
    assert bf16_unit() == "AMX"
    monkeypatch.setattr(devices, "_cpu_info", lambda field: {"Features": "fp asimd bf16"}.get(field, ""))
    assert bf16_unit() == "Arm BF16"
    monkeypatch.setattr(devices, "_cpu_info", lambda field: "fpu avx2" if field == "flags" else "")
    assert bf16_unit() is None


def test_the_machine_is_described():
    machine = machine_description()
    assert machine["threads"] == torch.get_num_threads() and machine["torch"] == torch.__version__
    assert machine["cpu"] and 1 <= machine["usable_cores"] <= machine["cores"]


def test_unfair_or_impossible_comparisons_are_refused(llama, bart):
    class Everywhere(LlamaForCausalLM):
        def forward(self, input_ids=None, past_key_values=None, use_cache=None, return_dict=None):
            raise NotImplementedError

    with pytest.raises(ValueError, match="Everywhere has no logits_to_keep"):
        compare_latency(bart, Everywhere(llama.config))
    with pytest.raises(ValueError, match="new_tokens=1"):
        compare_latency(bart, llama, new_tokens=1)
    with pytest.raises(ValueError, match="rounds=0"):
        compare_latency(bart, llama, rounds=0)
    with pytest.raises(ValueError, match="prompt_length=1"):
        compare_latency(bart, llama, prompt_length=1)
    with pytest.raises(ValueError, match=r"prompts=\[\[7\]\]"):
        compare_latency(bart, llama, prompts=[[1, 2], [7]])
    with pytest.raises(ValueError, match="on meta"):
        compare_latency(bart, LlamaForCausalLM(llama.config).to("meta"))
