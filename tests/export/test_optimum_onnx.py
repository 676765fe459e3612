"""Optimum exports our model to ONNX like any other, and what its models generate is what PyTorch generates."""

import pickle
import sys

import onnx
import pytest
import torch
from optimum.exporters.onnx import main_export, onnx_export_from_model
from optimum.onnxruntime import ORTModelForSeq2SeqLM
from optimum_toys import OPTIMUM_CLI, assert_same, run, written_by_our_export
from toys import KINDS, SLIDING, make_model, ragged
from vision_export_toys import make_student

from hf_encdec_distill import RopeEncDecModel


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
    "pooled half way up": ({"kind": "merged", "encoder_pooling": 2}, {"use_merged": True}),
    "shared keys and values of the prompt": ({"kind": "shared"}, {"use_merged": True}),
    "shared, one softmax": ({"kind": "merged", "cross_attention_sharing": 2, "decoder_num_hidden_layers": 3}, {}),
    "pooled as it leaves": ({"kind": "separate", "encoder_pooling": 3, "encoder_pooling_layer": 3}, {}),
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
    "layers that slide": ({"kind": "merged", **SLIDING}, {}),
    "half of a head turned": (
        {"kind": "merged", "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5}},
        {},
    ),
}


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
    model = make_model("pooled")
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


@pytest.mark.process
def test_optimum_cli_export_onnx(tmp_path):
    model = make_model("merged")
    model.save_pretrained(tmp_path / "model")
    run(*OPTIMUM_CLI, "export", "onnx", "--model", str(tmp_path / "model"), str(tmp_path / "onnx"))
    assert_same(ORTModelForSeq2SeqLM.from_pretrained(tmp_path / "onnx"), model)


@pytest.mark.process
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


def test_a_folder_of_our_own_export_is_refused_with_what_loads_it(tmp_path):
    folder = written_by_our_export(tmp_path / "ours", "encoder_model.onnx", "decoder_model.onnx")
    with pytest.raises(ValueError, match=r"ORTModelForSeq2SeqLM expects encoder states: load it with .*ExportedFor"):
        ORTModelForSeq2SeqLM.from_pretrained(folder)


def test_a_student_that_reads_images_is_refused(tmp_path):
    make_student()[0].save_pretrained(tmp_path / "student")
    with pytest.raises(
        ValueError, match="student reads images, and ORTModelForSeq2SeqLM has no place for the graph that does"
    ):
        ORTModelForSeq2SeqLM.from_pretrained(tmp_path / "student", export=True)
    with pytest.raises(ValueError, match="student reads images, and Optimum's export has no place"):
        main_export(str(tmp_path / "student"), output=tmp_path / "exported")
