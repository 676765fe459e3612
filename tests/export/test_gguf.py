"""Students and decoder-only models in llama.cpp: the files are read by llama.cpp itself, the answers are PyTorch's."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from architectures import LLAMA_3
from toys import make_llama, make_model, random_ids, stir
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.export import gguf as target
from hf_encdec_distill.export import llama_cpp
from hf_encdec_distill.export.exporting import export_model
from hf_encdec_distill.export.runtime import ExportedForConditionalGeneration


TOLERANCE = 1e-5  # of the largest logit
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": lambda: make_llama(4),
    "llama 3": lambda: make_llama(4, max_position_embeddings=4096, rope_scaling=LLAMA_3 | {"rope_theta": 1e4}),
    "llama with a head": lambda: make_llama(4, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama of wide heads": lambda: make_llama(4, head_dim=16),
    "qwen2": lambda: stir(Qwen2ForCausalLM(Qwen2Config(**SIZES))).eval(),
    "qwen3": lambda: stir(Qwen3ForCausalLM(Qwen3Config(**SIZES))).eval(),
}


def exported(model, folder, variant="fp32"):
    model.generation_config.eos_token_id = None
    export_model(model, model.tokenizer, "gguf", folder, variant)
    return ExportedForConditionalGeneration.from_pretrained(folder)


@torch.no_grad()
def assert_logits_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_only_model_of_each_family(family, tmp_path):
    """As llama-cpp-python's own class reads and runs it."""
    from llama_cpp import Llama

    torch.manual_seed(0)
    model = FAMILIES[family]()
    target.write_decoder_only(model, tmp_path / "model.gguf", "fp32")
    ids = random_ids(1, 40)
    runtime = Llama(str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0)
    runtime.eval(ids[0].tolist())
    assert_logits_equal(torch.from_numpy(runtime.scores[:40]), model(ids).logits[0])


@pytest.mark.parametrize("encoder_attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_each_family(family, encoder_attention, tmp_path):
    torch.manual_seed(0)
    teacher = FAMILIES[family]()
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher,
        encoder_layers=[0, 1, 3],
        decoder_layers=[1, 3],
        encoder_attention=encoder_attention,
        decoder_start_token_id=1,
    )
    stir(student)  # so that no decoder layer is like an encoder layer
    runtime = exported(student, tmp_path / "exported")
    for length in (1, 5, 40):
        ids, labels = random_ids(2, length), random_ids(2, 6)
        mask = torch.ones_like(ids)
        mask[1, : length // 3] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        assert_logits_equal(
            runtime(**inputs, decoder_input_ids=labels).logits, student(**inputs, decoder_input_ids=labels).logits
        )
        for beams in (1, 3):
            options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
            assert runtime.generate(**inputs, **options).tolist() == student.generate(**inputs, **options).tolist()


def test_layers_that_read_as_the_encoder_does_are_not_written_twice(tmp_path):
    """A student that is not trained yet has its teacher's projections on both sides."""
    torch.manual_seed(0)
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        make_llama(6),
        encoder_layers=[0, 1, 4],
        decoder_layers=[0, 1, 4, 5],
        decoder_start_token_id=1,
    )
    rows, sources = target.encoder_rows(student)
    read = student.config.encoder_state_of_decoder_layer
    assert read == [0, 1, 2, 3] and len(rows) == 4 and sources == [0, 1, 2, 3]
    assert [row.rest is None for row in rows] == [False, False, False, True]
    runtime = exported(student, tmp_path / "exported")
    ids, labels = random_ids(2, 9), random_ids(2, 5)
    inputs = {"input_ids": ids, "decoder_input_ids": labels}
    assert_logits_equal(runtime(**inputs).logits, student(**inputs).logits)


@pytest.mark.parametrize("variant,coarse", [("int8", "Q8_0"), ("int4", "Q4_0")])
def test_a_decoder_of_another_width(variant, coarse, tmp_path):
    """Each file says its own; rows that are no whole blocks stay F16."""
    from gguf import GGUFReader

    for width, of_down in ((96, coarse), (40, "F16")):
        folder = tmp_path / str(width)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "decoder_intermediate_size": width}
        exported(make_model("merged", **sizes), folder, variant)
        for file, neurons, stored in ((target.ENCODER, 128, coarse), (target.DECODER, width, of_down)):
            tensors = {tensor.name: tensor for tensor in GGUFReader(folder / file).tensors}
            up, down = tensors["blk.0.ffn_up.weight"], tensors["blk.0.ffn_down.weight"]
            assert (up.shape.tolist(), down.shape.tolist()) == ([64, neurons], [neurons, 64])
            assert (up.tensor_type.name, down.tensor_type.name) == (coarse, stored)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_k_quants(family, tmp_path):
    """What llama.cpp's quantiser stores, read back by the package gguf, is near the weights: 4 bits where rows are cut
    into whole blocks of 256, else the next finer type; and logits are nearer to PyTorch's than those of int4."""
    import gguf

    torch.manual_seed(0)
    wide = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.06}
    wide |= {"qk_norm": True} if family == "qwen3" else {"decoder_intermediate_size": 96}
    student = make_model("merged", **wide)
    runtime = exported(student, tmp_path / "exported", "q4_k_m")
    assert sorted(path.name for path in (tmp_path / "exported").glob("*.*g*uf*")) == [target.DECODER, target.ENCODER]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "exported" / target.DECODER).tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in stored.items()}
    assert kinds["blk.0.ffn_up.weight"] == "Q4_K" and kinds["blk.0.ffn_norm.weight"] == "F32"
    assert kinds["blk.1.ffn_down.weight"] in (("Q4_K", "Q6_K") if family == "qwen3" else ("Q5_0", "Q8_0"))
    for index, layer in enumerate(student.model.decoder.layers):
        for part in ("up", "down"):
            tensor, weight = stored[f"blk.{index}.ffn_{part}.weight"], getattr(layer.mlp, f"{part}_proj").weight
            found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            assert 1e-4 < float((found - weight).norm() / weight.norm()) < 0.08
    ids, labels = random_ids(2, 9), random_ids(2, 5)
    inputs = {"input_ids": ids, "decoder_input_ids": labels}
    expected = student(**inputs).logits
    runtimes = (runtime, exported(student, tmp_path / "plain", "int4"))
    mixed, plain = (float((each(**inputs).logits - expected).norm() / expected.norm()) for each in runtimes)
    assert 0 < mixed < plain


def test_what_llama_cpp_cannot_quantise_is_an_error_and_leaves_nothing(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"no model")
    with pytest.raises(RuntimeError, match=r"could not store .*model\.gguf as Q4_K_M \(.+\)"):
        llama_cpp.quantize(tmp_path / "model.gguf", "Q4_K_M")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("encoder_attention", ["causal", "bidirectional"])
def test_prompts_and_answers_longer_than_a_context(encoder_attention, tmp_path):
    """The contexts begin with 512 cells, and a call takes 512 tokens."""
    torch.manual_seed(0)
    model = make_model("merged", max_position_embeddings=2048, encoder_attention=encoder_attention)
    runtime = exported(model, tmp_path / "exported")
    ids = random_ids(2, 700)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = random_ids(2, 600)
    found, expected = (one(**inputs, decoder_input_ids=labels).logits for one in (runtime, model))
    # Angles at position 1000 have lost two digits in either.
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-3 * float(expected.abs().max()))
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 3}
    assert runtime.generate(**inputs, **options).tolist() == model.generate(**inputs, **options).tolist()


def test_one_context_serves_one_generation(tmp_path):
    torch.manual_seed(0)
    runtime = exported(make_model("merged"), tmp_path / "exported")
    inputs = {"input_ids": random_ids(1, 4), "decoder_input_ids": random_ids(1, 1)}
    first = runtime(**inputs)
    runtime(**inputs)
    cache = first.get("cache", first.get("past_key_values"))
    with pytest.raises(ValueError, match="another generation has begun on this decoder"):
        runtime(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="llama.cpp takes 256"):
        runtime(input_ids=random_ids(200, 2), decoder_input_ids=random_ids(200, 1))


@pytest.mark.parametrize(
    "options,problem",
    [
        ({"kind": "separate"}, "cross_attention 'separate', whose block llama.cpp lacks"),
        ({"kind": "merged", "gated_mlp": False}, "an MLP without a gate"),
        ({"kind": "merged", "hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"kind": "merged", "decoder_no_rope_layers": [0]}, "layers without RoPE"),
        ({"kind": "merged", "encoder_sliding_window": 3}, "encoder layers with a sliding window"),
        (
            {"kind": "merged", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "RoPE on a part of each head",
        ),
        ({"kind": "merged", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE of type 'dynamic'"),
        ({"kind": "merged", "qk_norm": True, "attention_bias": True}, "biases with qk_norm"),
        ({"kind": "merged", "qk_norm": True, "rope_parameters": LLAMA_3}, "RoPE of type 'llama3' with qk_norm"),
    ],
)
def test_blocks_that_llama_cpp_lacks_are_refused(options, problem, tmp_path):
    with pytest.raises(ValueError, match=f"{problem}.*onnx and openvino serve it"):
        export_model(make_model(**options), None, "gguf", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_decoder_only_models_of_other_blocks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="hidden_act 'gelu': llama.cpp has no architecture"):
        target.write_decoder_only(make_llama(2, hidden_act="gelu"), tmp_path / "model.gguf", "fp32")
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=4))
    with pytest.raises(ValueError, match="layers with a sliding window: llama.cpp has no architecture"):
        target.write_decoder_only(model, tmp_path / "model.gguf", "fp32")
    assert not (tmp_path / "model.gguf").exists()


def test_llama_cpp_knows_the_tokens(make_bpe_tokenizer, tmp_path):
    """Text, special tokens and bytes come out as the tokenizer has them."""
    from llama_cpp import Llama

    tokenizer = make_bpe_tokenizer()
    model = make_model("merged", vocab_size=len(tokenizer) + 3, eos_token_id=tokenizer.eos_token_id)
    export_model(model, tokenizer, "gguf", tmp_path / "exported")
    runtime = Llama(str(tmp_path / "exported" / target.DECODER), n_ctx=64, verbose=False, vocab_only=True)
    ids = tokenizer("def area(x):\n    return 12 * x  # ünï", add_special_tokens=False)["input_ids"]
    assert runtime.detokenize(ids).decode() == tokenizer.decode(ids)
    assert runtime.token_eos() == tokenizer.eos_token_id
    assert runtime.metadata["hf_encdec_distill.decoder_start_token_id"] == str(model.config.decoder_start_token_id)


def test_llama_cpp_knows_each_end_of_an_answer(make_bpe_tokenizer, tmp_path):
    import llama_cpp.llama_cpp as llama
    from llama_cpp import Llama

    tokenizer = make_bpe_tokenizer()
    ends = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    model = make_model("merged", vocab_size=len(tokenizer), eos_token_id=ends)
    model.generation_config.eos_token_id = ends
    export_model(model, tokenizer, "gguf", tmp_path / "exported")
    runtime = Llama(str(tmp_path / "exported" / target.DECODER), n_ctx=64, verbose=False, vocab_only=True)
    vocabulary = llama.llama_model_get_vocab(runtime.model)
    assert all(llama.llama_vocab_is_eog(vocabulary, token) for token in ends)


def test_tokens_that_the_tokenizer_lacks_have_names_that_it_lacks(make_bpe_tokenizer, tmp_path):
    """Where two tokens have one name llama.cpp ends the process, so the names are looked at first."""
    from gguf import GGUFReader
    from llama_cpp import Llama

    tokenizer = make_bpe_tokenizer()
    names = ["[unused300]", "[unused_]"]
    tokenizer.add_special_tokens({"additional_special_tokens": names[:1]})
    tokenizer.add_tokens(names[1:])
    model = make_model("merged", vocab_size=310, eos_token_id=tokenizer.eos_token_id)
    export_model(model, tokenizer, "gguf", tmp_path / "exported")
    for file in (target.ENCODER, target.DECODER):
        tokens = GGUFReader(tmp_path / "exported" / file).fields["tokenizer.ggml.tokens"].contents()
        assert len(set(tokens)) == len(tokens) == 310
        runtime = Llama(str(tmp_path / "exported" / file), n_ctx=64, verbose=False, vocab_only=True)
        for name in names:
            ids = tokenizer.convert_tokens_to_ids([name])
            assert runtime.tokenize(name.encode(), add_bos=False, special=True) == ids


def test_states_of_another_form_are_refused():
    keys = [np.arange(6, dtype=np.float16).reshape(3, 2)]
    state = llama_cpp.PromptState(keys, [key + 10 for key in keys])
    content = llama_cpp._serialize(state, 0, np.dtype(np.float16), False)
    back = llama_cpp._parse(content, 1, np.dtype(np.float16), False)
    assert np.array_equal(back.keys[0], keys[0]) and np.array_equal(back.values[0], keys[0] + 10)
    assert len(content) == 60 + 2 * (12 + 12)
    for place, value, problem in (
        (8, 2, "2 streams"),
        (16, 5, "position 5"),
        (52, 1, "transposed"),
        (56, 2, "2 layers"),
        (60, 8, "numbers of type 8"),
    ):
        other = content.copy()
        other[place] = value
        with pytest.raises(ValueError, match=f"{problem}.*pip install"):
            llama_cpp._parse(other, 1, np.dtype(np.float16), False)


@pytest.mark.parametrize("dtype,flash", [("float16", True), ("float16", False), ("float32", False)])
def test_states_are_those_of_llama_cpp(dtype, flash, tmp_path):
    """Byte by byte, with values by position and transposed."""
    torch.manual_seed(0)
    target.write_decoder_only(make_llama(2), tmp_path / "model.gguf", "fp32")
    runtime = llama_cpp.LlamaCpp(tmp_path / "model.gguf", 1, dtype, flash)
    runtime.evaluate([(0, position, 3 + position, False) for position in range(5)])
    content = runtime._state_bytes(0)
    assert np.array_equal(llama_cpp._serialize(runtime.state(0), 0, np.dtype(dtype), not flash), content)


# Prints how many threads loading and running add to a process.
THREADS = """
import os
import sys
from pathlib import Path
from hf_encdec_distill.export.llama_cpp import LlamaCpp
def threads():
    return len(os.listdir("/proc/self/task"))
before = threads()
runtime = LlamaCpp(Path(sys.argv[1]), 2, "float16", False)
runtime.evaluate([(0, position, 3 + position, position == 39) for position in range(40)])
print(threads() - before)
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_it_computes_with_as_many_threads_as_it_is_given(tmp_path):
    """The one that calls and one of its team. On a CPU with AMX, where loading computes too, a second team would join
    them, and all would sleep between operations."""
    torch.manual_seed(0)
    model = make_llama(2, hidden_size=256, intermediate_size=512, vocab_size=512, head_dim=64)
    target.write_decoder_only(model, tmp_path / "model.gguf", "int8")
    run = subprocess.run(
        [sys.executable, "-c", THREADS, str(tmp_path / "model.gguf")],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert run.stdout.split() == ["2"], run.stdout + run.stderr


def test_a_program_ends_in_silence(tmp_path):
    """Where a model goes after the modules that would free it."""
    target.write_decoder_only(make_llama(1), tmp_path / "model.gguf", "fp32")
    program = (
        "import sys, torch; from pathlib import Path; import hf_encdec_distill.export.llama_cpp as llama_cpp\n"
        "kept = llama_cpp.LlamaCpp(Path(sys.argv[1]), 1, 'float16', False)\n"
        "def holds(): kept"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.gguf")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")


def test_torch_may_multiply_in_bfloat16_in_between(tmp_path):
    """On a CPU with AMX both set up tiles, which belong to a thread: numbers would be wrong, or the process end."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 288}
    runtime = exported(make_model("merged", **sizes), tmp_path / "exported", "int8")
    inputs = {"input_ids": random_ids(1, 40), "decoder_input_ids": random_ids(1, 40)}
    before = runtime(**inputs).logits
    matrix = torch.randn(512, 512).bfloat16()
    for _ in range(3):
        matrix = torch.nn.functional.linear(matrix, matrix) / 32
        assert torch.equal(runtime(**inputs).logits, before)


def test_a_file_that_llama_cpp_cannot_read(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ValueError, match="llama.cpp cannot read .*model.gguf"):
        llama_cpp.LlamaCpp(tmp_path / "model.gguf", 1, "float16", True)
