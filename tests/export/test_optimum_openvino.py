"""Optimum exports our model to OpenVINO like any other, and what its models generate is what PyTorch generates.

On transformers 4.57 with optimum-intel 1.27, and on 5.5, the newest that optimum-intel 2.2 admits.
"""

import sys

import pytest
import torch
from optimum.intel import OVModelForSeq2SeqLM, OVWeightQuantizationConfig
from optimum_toys import OPTIMUM_CLI, assert_same, logits, run, written_by_our_export
from toys import SLIDING, make_model, ragged, random_ids
from vision_export_toys import make_student


# On a CPU, OpenVINO computes in bf16 if it can, keeps a fused cache in 8 bits and rounds what meets compressed
# weights; untrained toys are chaotic.
FP32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


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
    shared = {"decoder_num_hidden_layers": 4, "cross_attention_sharing": 3}
    model = make_model("merged", encoder_attention="causal", encoder_pooling=2, **SLIDING, **shared)
    exported = exported_to_openvino(tmp_path, model, stateful=False)
    assert not exported.decoder.stateful
    assert_same(exported, model)


def test_openvino_stateful_with_shared_keys_and_values(tmp_path):
    model = make_model("shared")
    exported = exported_to_openvino(tmp_path, model)
    assert exported.decoder.stateful
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


@pytest.mark.process
def test_optimum_cli_export_openvino(tmp_path):
    model = make_model("separate", cross_attention_layers=[1, 2])
    model.save_pretrained(tmp_path / "model")
    run(*OPTIMUM_CLI, "export", "openvino", "--model", str(tmp_path / "model"), str(tmp_path / "openvino"))
    exported = OVModelForSeq2SeqLM.from_pretrained(tmp_path / "openvino", ov_config=FP32)
    assert exported.decoder.stateful
    assert_same(exported, model)


@pytest.mark.process
@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "Optimum first"])
def test_the_order_of_imports_does_not_matter(ours_first):
    imports = ["import hf_encdec_distill", "from optimum.intel import OVModelForSeq2SeqLM"]
    code = "\n".join(
        [
            *(imports if ours_first else reversed(imports)),
            "from optimum.exporters.tasks import TasksManager",
            "import optimum.exporters.openvino.model_configs",
            "recipes = TasksManager._SUPPORTED_MODEL_TYPE['rope_encdec']['openvino']",
            "print(recipes['text2text-generation-with-past'].func.__name__)",
        ]
    )
    assert "RopeEncDecOpenVINOConfig" in run(sys.executable, "-c", code)


def test_a_folder_of_our_own_export_is_refused_with_what_loads_it(tmp_path):
    folder = written_by_our_export(tmp_path / "ours", "openvino_encoder_model.xml", "openvino_decoder_model.xml")
    with pytest.raises(ValueError, match=r"OVModelForSeq2SeqLM expects encoder states: load it with .*ExportedFor"):
        OVModelForSeq2SeqLM.from_pretrained(folder)


def test_a_student_that_reads_images_is_refused(tmp_path):
    make_student()[0].save_pretrained(tmp_path / "student")
    with pytest.raises(
        ValueError, match="student reads images, and OVModelForSeq2SeqLM has no place for the graph that does"
    ):
        OVModelForSeq2SeqLM.from_pretrained(tmp_path / "student", export=True)
