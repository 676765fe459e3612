"""ONNX: `encoder_model.onnx`, `decoder_model.onnx`, for images `vision_model.onnx`, and a file of weights for all.

A weight that both graphs use (the embedding, and with `merged` cross-attention the projections of keys and values) and
the tied head are stored once. Opset 18, which ONNX Runtime has known since 1.14 (2023).
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .backends import Backend, register_backend
from .graphs import Graphs, quiet, threads
from .recipe import Graph, Shapes, variant_of


if TYPE_CHECKING:
    import torch


OPSET = 18
WEIGHTS = "model.onnx_data"
_FILES = {"vision": "vision_model.onnx", "encoder": "encoder_model.onnx", "decoder": "decoder_model.onnx"}
_STORED_INSIDE = 1024  # bytes; what is smaller stays in the graph, where shape inference finds it
_BLOCK = 32  # weights of int4 that share a scale


@register_backend
class OnnxBackend(Backend):
    name = "onnx"
    label = "ONNX"
    runtime = "ONNX Runtime"
    packages = ("onnxruntime", "onnx", "onnxscript")
    variants = ("fp32", "fp16", "int8", "int4")
    files = ("*.onnx", "*.onnx_data")
    reads_images = True

    def settle(
        self, config, variant: str, shapes: Shapes, stateful: bool | None, options: Mapping[str, Any]
    ) -> tuple[Shapes, bool]:
        """
        Raises:
            ValueError: a stateful decoder is asked for, which ONNX does not have.
        """
        if stateful:
            raise ValueError("ONNX graphs have no states: leave stateful out, or choose openvino or coreml")
        return shapes, False

    def cache_dtype(self, variant: str) -> str:
        return "float16" if variant == "fp16" else "float32"

    def export(
        self,
        model,
        graphs: Mapping[str, Graph],
        shapes: Shapes,
        variant: str,
        stateful: bool,
        folder: Path,
        license: str,
        options: Mapping[str, Any],
    ) -> None:
        from .tracing import export_programs

        if variant == "fp16":
            model = copy.deepcopy(model).half()
        write_graphs(export_programs(model, graphs), graphs, _FILES, variant, license, folder)

    def load(self, folder: Path, graphs: Mapping[str, Graph], shapes: Shapes, dtype, stateful: bool) -> OnnxGraphs:
        return OnnxGraphs(folder, graphs, shapes, dtype)

    def devices(self) -> list[str]:
        import onnxruntime

        return onnxruntime.get_available_providers()


def write_graphs(
    programs: Mapping[str, torch.export.ExportedProgram],
    graphs: Mapping[str, Graph],
    files: Mapping[str, str],
    variant: str,
    license: str,
    folder: Path,
) -> None:
    """Write each program as the file of its name, with the ports of its graph, and the weights of all as one more."""
    import onnx
    import onnx_ir
    import torch

    store: dict[str, tuple[int, int]] = {}
    with open(folder / WEIGHTS, "wb") as weights:
        for name, graph in graphs.items():
            with quiet():
                program = torch.onnx.export(programs[name], (), opset_version=OPSET, verbose=False)
            assert program is not None  # of an exported program there is always one
            _name_ports(program.model.graph, graph)
            proto = program.model_proto
            stored = variant_of(name, variant)
            if stored in ("int8", "int4"):
                with quiet():
                    proto = _quantized(proto, stored)
            written = onnx_ir.from_proto(proto)
            written.metadata_props["license"] = license
            _store_weights(written, weights, store, folder)
            onnx_ir.save(written, folder / files[name])
    for name in graphs:
        onnx.checker.check_model(str(folder / files[name]))


def _name_ports(graph, recipe: Graph) -> None:
    """The recipe's names for inputs, outputs and their free axes, in place of the tracer's symbols."""
    import onnx_ir

    for values, ports in ((graph.inputs, recipe.inputs), (graph.outputs, recipe.outputs)):
        for value, port in zip(values, ports, strict=True):
            value.name = port.name
            value.shape = onnx_ir.Shape(port.axes)


def _quantized(proto, variant: str):
    """Weights of matrix products and of the embedding in 8 bits, one scale for each channel, or in 4, in blocks."""
    import onnx
    from onnxruntime.quantization import QuantType, matmul_nbits_quantizer, quantize_dynamic

    proto = _with_head_as_matrix(proto)
    if variant == "int4":
        options = matmul_nbits_quantizer.DefaultWeightOnlyQuantConfig(
            block_size=_BLOCK, is_symmetric=False, accuracy_level=4, op_types_to_quantize=("MatMul", "Gather")
        )
        quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(proto, algo_config=options)
        quantizer.process()
        return quantizer.model.model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantize_dynamic(
            proto,
            path,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return onnx.load(path)


def _with_head_as_matrix(proto):
    """A transposed weight as a weight: quantisers look for the second operand of a product among the constants."""
    from onnx import numpy_helper

    weights = {weight.name: weight for weight in proto.graph.initializer}
    for node in [node for node in proto.graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        order = next(list(a.ints) for a in node.attribute if a.name == "perm")
        matrix = np.ascontiguousarray(numpy_helper.to_array(weights[node.input[0]]).transpose(order))
        proto.graph.initializer.append(numpy_helper.from_array(matrix, node.output[0]))
        proto.graph.node.remove(node)
    used = {name for node in proto.graph.node for name in node.input}
    for weight in [weight for weight in proto.graph.initializer if weight.name not in used]:
        proto.graph.initializer.remove(weight)
    return proto


def _store_weights(model, weights, store: dict[str, tuple[int, int]], folder: Path) -> None:
    """Move what is large into the open file `weights`, where what is there already (`store`) is not written again."""
    import onnx_ir

    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor.nbytes < _STORED_INSIDE:
            continue
        content = tensor.tobytes()
        key = hashlib.sha256(content).hexdigest()
        if key not in store:
            weights.write(b"\0" * (-weights.tell() % 64))  # so that a runtime can map it as it is
            store[key] = (weights.tell(), len(content))
            weights.write(content)
            weights.flush()
        offset, length = store[key]
        value.const_value = onnx_ir.ExternalTensor(
            WEIGHTS, offset, length, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=folder
        )


class OnnxGraphs(Graphs):
    """An exported folder on ONNX Runtime.

    Args:
        providers: execution providers, the preferred one first.
    """

    def __init__(self, folder: Path, graphs: Mapping[str, Graph], shapes: Shapes, dtype, providers=None):
        super().__init__(graphs, shapes, dtype)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads()
        # After its work a thread would spin for a while, on a core that the other session or torch needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.sessions = {
            name: onnxruntime.InferenceSession(
                str(folder / _FILES[name]), options, providers=list(providers or ["CPUExecutionProvider"])
            )
            for name in graphs
        }

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        return self.sessions[graph].run(None, dict(inputs))
