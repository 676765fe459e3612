"""OpenVINO: decoder-only models as optimum-intel exports them, stateful, with logits at the last position alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from . import Contender, Model


_FILE = "openvino_model.xml"
_END = 2**31 - 1  # of an axis, whatever its length


class OptimumOpenVino(Contender):
    packages = {"openvino": "openvino", "optimum.intel": '"hf-encdec-distill[optimum]"'}

    def import_packages(self) -> None:
        import openvino  # noqa: F401  # which alone runs an export

    def prepare(self, folder: Path) -> None:
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        bits = {"int8": 8, "int4": 4}.get(self.precision)
        quantization = None if bits is None else OVWeightQuantizationConfig(bits=bits)
        options = {"quantization_config": quantization} if quantization else {"load_in_8bit": False}
        OVModelForCausalLM.from_pretrained(self.source, export=True, compile=False, **options).save_pretrained(folder)

    def load(self, folder: Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(folder / _FILE)
        _keep_last_position(model)
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if self.precision == "fp32":  # else it computes in bfloat16 where the CPU has a unit for it
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        self.inputs = {name for port in model.inputs for name in port.get_names()}
        self.request = core.compile_model(model, "CPU", settings).create_infer_request()

    def steps(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Iterator[list[int]]:
        import numpy as np

        ids = np.array(prompts, dtype=np.int64)
        batch, seen = len(ids), 0
        self.request.reset_state()
        for _ in range(new_tokens):
            end = seen + ids.shape[1]
            inputs = {
                "input_ids": ids,
                "attention_mask": np.ones((batch, end), dtype=np.int64),
                "position_ids": np.broadcast_to(np.arange(seen, end), ids.shape).copy(),
                "beam_idx": np.arange(batch, dtype=np.int32),
            }
            outputs = self.request.infer({name: array for name, array in inputs.items() if name in self.inputs})
            ids, seen = outputs["logits"][:, -1:].argmax(-1), end
            yield ids[:, 0].tolist()


def _keep_last_position(model) -> None:
    """The product with the head sees the last position of the prompt alone, as openvino-genai does it."""
    from openvino import opset13 as ops

    product = model.output("logits").get_node().input_value(0).get_node()
    while product.get_type_name() != "MatMul":
        product = product.input_value(0).get_node()
    last = ops.slice(product.input_value(0), [-1], [_END], [1], [1])
    product.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def contenders(model: Model) -> list[Contender]:
    if model.is_student:
        return []
    return [
        OptimumOpenVino(model.name, str(model.folder), "openvino", precision) for precision in ("int8", "int4", "fp32")
    ]
