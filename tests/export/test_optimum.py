"""Optimum exports our model like any other, and what its models generate is what PyTorch generates."""

import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from optimum.exporters.onnx import onnx_export_from_model
from optimum.intel import OVModelForSeq2SeqLM, OVWeightQuantizationConfig
from optimum.onnxruntime import ORTModelForSeq2SeqLM
from toys import KINDS, make_model, ragged, random_ids

import hf_encdec_distill
from hf_encdec_distill import RopeEncDecModel, registration


# On a CPU, OpenVINO computes in bf16 if it can, keeps a fused cache in 8 bits and rounds what meets compressed
# weights; untrained toys are chaotic.
FP32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}

ONNX_CASES = {
    "separate": ({"kind": "separate"}, {}),
    "merged": ({"kind": "merged"}, {}),
    "one file for both decoders": ({"kind": "separate", "cross_attention_layers": [1, 2]}, {"use_merged": True}),
    "one file, wide heads, head of its own": (
        {"kind": "merged", "head_dim": 16, "tie_word_embeddings": False, "encoder_attention": "causal"},
        {"use_merged": True},
    ),
    "no cache": ({"kind": "merged", "num_key_value_heads": 4}, {"use_cache": False}),
    "no cache, cross-attention": ({"kind": "separate", "encoder_attention": "causal"}, {"use_cache": False}),
    "biases, norms, plain MLP, no RoPE in places": (
        {
            "kind": "separate",
            "num_key_value_heads": 1,
            "attention_bias": "qkv",
            "mlp_bias": True,
            "qk_norm": True,
            "gated_mlp": False,
            "hidden_act": "gelu",
            "encoder_no_rope_layers": [1],
            "decoder_no_rope_layers": [0],
        },
        {},
    ),
    "RoPE that grows with the prompt": (
        {"kind": "merged", "max_position_embeddings": 6, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
        {},
    ),
    "RoPE of two lengths": (
        {
            "kind": "merged",
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [1.0, 2.0, 3.0, 4.0],
                "original_max_position_embeddings": 5,
            },
        },
        {},
    ),
    "half of a head turned": (
        {"kind": "merged", "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5}},
        {},
    ),
}


@torch.no_grad()
def logits(model, prompt, mask, target):
    return model(input_ids=prompt, attention_mask=mask, decoder_input_ids=target).logits


def assert_same(exported, model):
    """Logits and tokens, of prompts and targets of several lengths (one among them), each model asked repeatedly."""
    for prompt, mask, _ in (ragged("left"), ragged("right"), ragged("right", (3, 1)), ragged("left", (1,))):
        for target in (random_ids(len(prompt), 1), random_ids(len(prompt), 5)):
            expected = logits(model, prompt, mask, target)
            got = logits(exported, prompt, mask, target)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        for beams in (1, 3):
            arguments = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": beams}
            assert torch.equal(exported.generate(prompt, **arguments), model.generate(prompt, **arguments))


@pytest.mark.parametrize("case", ONNX_CASES)
def test_onnx_runtime(case, tmp_path):
    options, arguments = ONNX_CASES[case]
    model = make_model(**options)
    model.save_pretrained(tmp_path / "model")
    exported = ORTModelForSeq2SeqLM.from_pretrained(tmp_path / "model", export=True, **arguments)
    assert_same(exported, model)

    exported.save_pretrained(tmp_path / "exported")
    again = ORTModelForSeq2SeqLM.from_pretrained(tmp_path / "exported", **arguments)
    prompt, mask, _ = ragged("left")
    again_ids = again.generate(prompt, attention_mask=mask, max_new_tokens=8)
    assert torch.equal(again_ids, model.generate(prompt, attention_mask=mask, max_new_tokens=8))


def test_onnx_runtime_writes_into_buffers_of_the_right_size(tmp_path):
    model = make_model("merged")
    onnx_export_from_model(model, tmp_path, do_validation=False)
    exported = ORTModelForSeq2SeqLM.from_pretrained(tmp_path, use_io_binding=True)
    prompt, mask, _ = ragged("left")
    tokens = exported.generate(prompt, attention_mask=mask, max_new_tokens=8)
    assert torch.equal(tokens, model.generate(prompt, attention_mask=mask, max_new_tokens=8))


WITH_PAST = ["decoder_model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx", "encoder_model.onnx"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("task", "files"),
    [(None, WITH_PAST), ("feature-extraction", ["model.onnx"]), ("feature-extraction-with-past", WITH_PAST)],
)
def test_a_model_in_memory(kind, task, files, tmp_path):
    # Without a task, Optimum asks our class for it; validation compares each file with PyTorch.
    model = make_model(kind) if task is None else make_model(kind, cls=RopeEncDecModel)
    before = model.config._attn_implementation
    onnx_export_from_model(model, tmp_path, task=task, atol=1e-4)
    assert sorted(path.name for path in tmp_path.glob("*.onnx")) == files
    for name in files:
        onnx.checker.check_model(str(tmp_path / name), full_check=True)

    # The model is as it was, whatever its owner does with it next.
    assert model.config._attn_implementation == before
    assert all("forward" not in vars(module) for module in model.modules())
    pickle.dumps(model)


def exported_to_openvino(folder, model, **arguments):
    model.save_pretrained(folder / "model")
    return OVModelForSeq2SeqLM.from_pretrained(folder / "model", export=True, ov_config=FP32, **arguments)


@pytest.fixture(scope="module")
def stateful(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stateful")
    torch.manual_seed(0)
    model = make_model("merged")
    exported = exported_to_openvino(folder, model)
    exported.save_pretrained(folder / "exported")
    return model, exported, folder / "exported"


def test_openvino_stateful(stateful):
    model, exported, folder = stateful
    assert exported.decoder.stateful
    assert_same(exported, model)
    again = OVModelForSeq2SeqLM.from_pretrained(folder, ov_config=FP32)
    prompt, mask, _ = ragged("left")
    again_ids = again.generate(prompt, attention_mask=mask, max_new_tokens=8)
    assert torch.equal(again_ids, model.generate(prompt, attention_mask=mask, max_new_tokens=8))


def test_openvino_stateless(tmp_path):
    model = make_model("merged", encoder_attention="causal")
    exported = exported_to_openvino(tmp_path, model, stateful=False)
    assert not exported.decoder.stateful
    assert_same(exported, model)


# Relative error of all logits, a few times what rounding to 255 or 15 steps costs this toy (0.03 and 0.29); two
# unrelated models would have 1.4.
@pytest.mark.parametrize(("bits", "bound"), [(8, 0.1), (4, 0.6)])
def test_openvino_with_compressed_weights(stateful, bits, bound):
    model, _, folder = stateful
    config = OVWeightQuantizationConfig(bits=bits, **({"group_size": 16, "ratio": 1.0} if bits == 4 else {}))
    compressed = OVModelForSeq2SeqLM.from_pretrained(folder, quantization_config=config, ov_config=FP32)
    prompt, mask, _ = ragged("left")
    target = random_ids(len(prompt), 5)
    expected = logits(model, prompt, mask, target)
    error = (logits(compressed, prompt, mask, target) - expected).norm() / expected.norm()
    assert 1e-4 < error < bound
    assert compressed.generate(prompt, attention_mask=mask, max_new_tokens=4).shape[0] == len(prompt)


def run(*command):
    """A command in a process of its own, with the package that these tests see."""
    source = str(Path(hf_encdec_distill.__file__).parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


OPTIMUM_CLI = (sys.executable, "-m", "optimum.commands.optimum_cli")


def test_optimum_cli_export_onnx(tmp_path):
    model = make_model("merged")
    model.save_pretrained(tmp_path / "model")
    run(*OPTIMUM_CLI, "export", "onnx", "--model", str(tmp_path / "model"), str(tmp_path / "onnx"))
    assert_same(ORTModelForSeq2SeqLM.from_pretrained(tmp_path / "onnx"), model)


def test_optimum_cli_export_openvino(tmp_path):
    model = make_model("separate", cross_attention_layers=[1, 2])
    model.save_pretrained(tmp_path / "model")
    run(*OPTIMUM_CLI, "export", "openvino", "--model", str(tmp_path / "model"), str(tmp_path / "openvino"))
    exported = OVModelForSeq2SeqLM.from_pretrained(tmp_path / "openvino", ov_config=FP32)
    assert exported.decoder.stateful
    assert_same(exported, model)


def test_optimum_cli_does_not_pay_for_us():
    code = (
        "import sys\n"
        "import optimum.commands.register.register_hf_encdec_distill as ours\n"
        "assert ours.REGISTER_COMMANDS == []\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert run(sys.executable, "-c", code).split() == ["False", "False"]


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "Optimum first"])
def test_the_order_of_imports_does_not_matter(ours_first):
    imports = ["import hf_encdec_distill", "from optimum.onnxruntime import ORTModelForSeq2SeqLM"]
    code = "\n".join(
        [
            *(imports if ours_first else reversed(imports)),
            "from optimum.exporters.tasks import TasksManager",
            "recipes = TasksManager._SUPPORTED_MODEL_TYPE['rope_encdec']['onnx']",
            "decoder = ORTModelForSeq2SeqLM._ort_decoder_class",
            "print(recipes['text2text-generation-with-past'].func.__name__, hasattr(decoder.__init__, '__wrapped__'))",
        ]
    )
    assert "RopeEncDecOnnxConfig True" in run(sys.executable, "-c", code)


def test_optimum_goes_on_working_if_a_recipe_cannot_be_imported(monkeypatch):
    before = list(sys.meta_path)
    monkeypatch.setitem(registration._MODULES, "this", "no_such_recipe")
    with pytest.warns(RuntimeWarning, match="rope_encdec: ModuleNotFoundError.*no_such_recipe.*pip install"):
        importlib.import_module("this")
    registration.register()
    assert sys.meta_path == before
