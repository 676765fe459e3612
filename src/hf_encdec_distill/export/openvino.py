"""OpenVINO: `openvino_encoder_model.xml`, `openvino_decoder_model.xml` and, of a student that reads images,
`openvino_vision_model.xml`, each with its weights beside it.

The decoder is stateful unless asked otherwise: the runtime keeps the target's keys and values, and `beam_idx` says
from which row each row goes on. With fixed shapes (an NPU's form) no dimension is left open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .backends import Backend, register_backend
from .graphs import GraphCache, Graphs, quiet, threads
from .recipe import Graph, Shapes, variant_of, with_prompt_in_cache


_FILES = {
    "vision": "openvino_vision_model",
    "encoder": "openvino_encoder_model",
    "decoder": "openvino_decoder_model",
}
_BEAM = "beam_idx"
_BLOCK = 32  # weights of int4 that share a scale
# Types of a stateful decoder's keys and values: those of the CPU plug-in that lose no more than 8 bits do.
KV_CACHE_PRECISIONS = ("f32", "f16", "bf16", "u8")
_KV_CACHE_PRECISION = ["runtime_options", "KV_CACHE_PRECISION"]  # where OpenVINO and optimum-intel look for it


@register_backend
class OpenVinoBackend(Backend):
    name = "openvino"
    label = "OpenVINO"
    runtime = "OpenVINO"
    packages = ("openvino", "nncf")
    variants = ("fp32", "fp16", "int8", "int4")
    files = ("*.xml", "*.bin")
    reads_images = True
    own_options = {
        "calibration": "calibration rows are for target openvino with variant int4, not for {target} with {variant}: "
        "leave them out, or export int4 to openvino",
        "kv_cache_precision": "a KV-cache precision is for target openvino, not for {target}: leave it out",
    }

    def settle(
        self, config, variant: str, shapes: Shapes, stateful: bool | None, options: Mapping[str, Any]
    ) -> tuple[Shapes, bool]:
        """
        Raises:
            ValueError: rows of weights that do not divide into blocks of int4, calibration without int4, or a
                precision of states that no plug-in applies.
        """
        if "calibration" in options and variant != "int4":
            raise ValueError(self.own_options["calibration"].format(target=self.name, variant=variant))
        if "kv_cache_precision" in options:
            _check_kv_cache_precision(options["kv_cache_precision"], shapes, stateful)
        if variant == "int4" and shapes.targets is None:
            names = ("hidden_size", "intermediate_size", "decoder_intermediate_size")
            widths = {name: getattr(config, name) for name in names}
            widths["num_attention_heads * head_dim"] = config.num_attention_heads * config.head_dim
            odd = [f"{name}={width}" for name, width in widths.items() if width % _BLOCK]
            if odd:
                raise ValueError(
                    f"int4 for openvino has a scale for each {_BLOCK} weights of a row, and {', '.join(odd)} does not "
                    "divide into so many: export int8, or int4 with fixed shapes, which has one for each row"
                )
        return shapes, True if stateful is None else stateful

    def cache_dtype(self, variant: str) -> str:
        return "float32"  # `fp16` is how weights are stored; the device chooses what it computes in

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
        import openvino

        from .tracing import export_programs

        calibration, kv_cache_precision = options.get("calibration"), options.get("kv_cache_precision")
        growing = stateful and shapes.targets is None
        joined = growing and model.config.cross_attention == "merged"
        traced = {**graphs, "decoder": with_prompt_in_cache(graphs["decoder"])} if joined else graphs
        programs = export_programs(model, traced, stateful=growing)
        for name, graph in traced.items():
            with quiet():
                converted = openvino.convert_model(programs[name])
            for ports, recipe in ((converted.inputs, graph.inputs), (converted.outputs, graph.outputs)):
                for port, of_recipe in zip(ports, recipe, strict=True):
                    port.get_tensor().set_names({of_recipe.name})
            converted.reshape(
                {port.name: [-1 if isinstance(a, str) else a for a in port.axes] for port in graph.inputs}
            )
            stored = variant_of(name, variant)
            if stored in ("int8", "int4"):
                calls = None
                if calibration is not None and stored == "int4":
                    calls = _Calls(name, model, graphs, shapes, calibration, joined)
                converted = _compressed(converted, stored, shapes.targets is not None, calls)
            if name == "decoder" and stateful:  # after compression, which feeds keys and values as inputs
                _make_stateful(converted, graphs["decoder"], growing, joined)
                if kv_cache_precision is not None:
                    converted.set_rt_info(kv_cache_precision, _KV_CACHE_PRECISION)
            converted.set_rt_info(license, ["license"])
            openvino.save_model(converted, folder / f"{_FILES[name]}.xml", compress_to_fp16=variant == "fp16")

    def load(self, folder: Path, graphs: Mapping[str, Graph], shapes: Shapes, dtype, stateful: bool) -> OpenVinoGraphs:
        return OpenVinoGraphs(folder, graphs, shapes, dtype, stateful)

    def devices(self) -> list[str]:
        import openvino

        core = openvino.Core()
        return [f"{device} {core.get_property(device, 'FULL_DEVICE_NAME')}" for device in core.available_devices]


def _check_kv_cache_precision(precision: str, shapes: Shapes, stateful: bool | None) -> None:
    if precision not in KV_CACHE_PRECISIONS:
        raise ValueError(f"KV-cache precision {precision!r}: choose of {', '.join(KV_CACHE_PRECISIONS)}")
    if stateful is False or shapes.targets is not None:
        raise ValueError(
            f"KV-cache precision {precision!r} is for a stateful decoder of dynamic shapes only, this one is "
            f"{'stateless' if stateful is False else 'stateful'} and {shapes}: leave it out"
        )


def _compressed(model, variant: str, fixed: bool, calls: _Calls | None):
    """Weights in 8 bits, a scale for each channel, or in 4, in blocks; symmetric where the shapes are fixed, since an
    NPU takes no other form, and there int4 has a scale for each channel too. With `calls` AWQ (Lin et al. 2023,
    arXiv:2306.00978, section 3.2) scales the channels of each product by how large their activations are."""
    import nncf

    form = f"{variant.upper()}_{'SYM' if fixed else 'ASYM'}"
    options: dict[str, Any] = {}
    if variant == "int4":
        options = {"group_size": -1 if fixed else _BLOCK, "ratio": 1.0}
    if calls is not None:
        options |= {"dataset": nncf.Dataset(calls), "subset_size": len(calls), "awq": True}
    return nncf.compress_weights(model, mode=getattr(nncf.CompressWeightsMode, form), **options)


class _Calls:
    """The inputs of each call of a graph while PyTorch reads the prompts of rows and is fed their targets, as often
    as it is asked for them: with fixed shapes all of them at once could fill the memory."""

    def __init__(
        self,
        graph: str,
        model,
        graphs: Mapping[str, Graph],
        shapes: Shapes,
        rows: Sequence[Mapping[str, Any]],
        joined: bool,
    ):
        self.graph, self.model, self.rows, self.joined = graph, model, rows, joined
        self.pytorch = _RecordingGraphs(model, graphs, shapes)

    def __len__(self) -> int:
        token_by_token = self.graph == "decoder" and self.pytorch.shapes.targets is not None
        return sum(len(row["labels"]) if token_by_token else 1 for row in self.rows)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        import torch

        for row in self.rows:
            self.pytorch.calls = {name: [] for name in self.pytorch.graphs}
            prompt = np.array([row["inputs"]])
            cross, mask = self.pytorch.encode(prompt, np.ones_like(prompt), row.get("pixel_values"))
            if self.graph == "decoder":
                tokens = self.model.prepare_decoder_input_ids_from_labels(torch.tensor([row["labels"]]))
                self.pytorch.decode(tokens.numpy(), mask, cross, self.pytorch.new_cache(1))
            for call in self.pytorch.calls[self.graph]:
                if self.graph == "decoder" and self.joined:
                    for own in self.pytorch.graphs["decoder"].cache:
                        prompt = call.pop(_of_prompt(own))
                        call[own] = np.concatenate((prompt, call[own]), axis=2)
                yield call


class _RecordingGraphs(Graphs):
    """The modules that the graphs are made from, which note what they are called with."""

    def __init__(self, model, graphs: Mapping[str, Graph], shapes: Shapes):
        from .tracing import modules_of

        super().__init__(graphs, shapes)
        self.modules = modules_of(model, graphs)
        self.calls: dict[str, list[dict[str, np.ndarray]]] = {}

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        import torch

        self.calls[graph].append(dict(inputs))
        tensors = (torch.as_tensor(inputs[port.name]) for port in self.graphs[graph].inputs)
        with torch.no_grad():
            return [output.numpy() for output in self.modules[graph](*tensors)]


def _make_stateful(model, graph: Graph, growing: bool, joined: bool) -> None:
    """Turn the cache from inputs and outputs into states that begin empty, or as zeros where they have fixed slots, or
    as the prompt's keys and values (`joined`), which are inputs for this alone."""
    import openvino
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    if growing:
        beam = ops.parameter([-1], openvino.Type.i32, name=_BEAM)
        beam.output(0).get_tensor().set_names({_BEAM})
        model.add_parameters([beam])
        for name in graph.cache:
            state = model.input(name)
            readers = state.get_target_inputs()
            reordered = ops.gather(state, beam, ops.constant(0))
            for reader in readers:
                reader.replace_source_output(reordered.output(0))
        model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, dict(graph.cache))
    if not growing:
        return
    if joined:
        _begin_with_prompt(model, graph)
        return
    # A state is as large as its first value, and the batch is known only at run time.
    batch = ops.gather(ops.shape_of(model.input("input_ids"), "i64"), ops.constant([0]), ops.constant(0))
    for op in model.get_ops():
        if op.get_type_name() == "ReadValue":
            _, heads, _, width = op.get_output_partial_shape(0)
            shape = ops.concat([batch, ops.constant(np.array([heads.get_length(), 0, width.get_length()]))], 0)
            op.set_arguments([ops.broadcast(ops.constant(np.float32(0)), shape)])
    model.validate_nodes_and_infer_types()


def _of_prompt(own: str) -> str:
    """The port of the prompt's key or value that belongs to one of the decoder's own."""
    return own.replace(".decoder.", ".encoder.")


def _begin_with_prompt(model, graph: Graph) -> None:
    import openvino
    from openvino import opset13 as ops

    # OpenVINO joins the names of input and output in that of a state.
    reads = {op.get_variable_id(): op for op in model.get_ops() if op.get_type_name() == "ReadValue"}
    for old, new in graph.cache.items():
        port = next(port for port in graph.inputs if port.name == _of_prompt(old))
        start = ops.parameter([-1 if isinstance(a, str) else a for a in port.axes], openvino.Type.f32, name=port.name)
        start.output(0).get_tensor().set_names({port.name})
        model.add_parameters([start])
        reads[old + new].set_arguments([start.output(0)])
    model.validate_nodes_and_infer_types()


class OpenVinoGraphs(Graphs):
    """An exported folder on OpenVINO.

    Args:
        device: as OpenVINO names it, such as `CPU`, `GPU` or `NPU`.
        settings: of the device, over those that make a CPU compute and keep its states in fp32, which are the ones
            that parity is proven with; a precision of states that is written in the file stands. OpenVINO's own
            choices are faster and less exact: bfloat16 where the CPU has it, and 8 bits in states
            (`KV_CACHE_PRECISION`). Of int8 and int4 a CPU with VNNI also rounds activations, unless
            `DYNAMIC_QUANTIZATION_GROUP_SIZE` is 0.
    """

    def __init__(
        self,
        folder: Path,
        graphs: Mapping[str, Graph],
        shapes: Shapes,
        dtype,
        stateful: bool,
        device: str = "CPU",
        settings: Mapping[str, object] | None = None,
    ):
        super().__init__(graphs, shapes, dtype)
        import openvino

        self._tensor = openvino.Tensor
        core = openvino.Core()
        exact = {"INFERENCE_NUM_THREADS": threads(), "INFERENCE_PRECISION_HINT": "f32"}
        models = {name: core.read_model(folder / f"{_FILES[name]}.xml") for name in graphs}
        if not models["decoder"].has_rt_info(_KV_CACHE_PRECISION):
            exact["KV_CACHE_PRECISION"] = "f32"
        settings = {**(exact if device == "CPU" else {}), **(settings or {})}
        self.compiled = {name: core.compile_model(model, device, settings) for name, model in models.items()}
        self.stateful = stateful
        self.request = self.compiled["decoder"].create_infer_request() if stateful else None
        self.running: GraphCache | None = None  # whose keys and values are in the request
        self._begins = True  # whether this call is the first of a generation

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        outputs = self.compiled[graph](dict(inputs))
        return [outputs[port.name] for port in self.graphs[graph].outputs]

    def new_cache(self, batch: int) -> GraphCache:
        """Of a stateful decoder with a free batch, only the order of the rows, which goes to `beam_idx`."""
        if self.stateful and self.shapes.targets is None:
            return GraphCache([[np.arange(batch, dtype=np.int32)]])
        return super().new_cache(batch)

    def decode(self, input_ids, encoder_mask, cross, cache: GraphCache) -> np.ndarray:
        """
        Raises:
            ValueError: the runtime's states belong to a generation that began after that of `cache`.
        """
        if self.request is not None:
            self._begins = cache.length == 0
            if self._begins:
                self.request.reset_state()
                self.running = cache
            elif cache is not self.running:
                raise ValueError(
                    "this decoder is stateful and another generation has begun on it: end one before the other, or "
                    "export with --stateless"
                )
        return super().decode(input_ids, encoder_mask, cross, cache)

    def step(self, inputs: dict[str, np.ndarray], own: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        if self.request is None:
            return super().step(inputs, own)
        if self.shapes.targets is None:
            if not self._begins:  # the prompt's are where the first call has put them
                inputs = {name: array for name, array in inputs.items() if name not in self._cross}
            logits = self.request.infer(inputs | {_BEAM: own[0]})[0]
            return logits, [np.arange(len(own[0]), dtype=np.int32)]
        # Rows take turns on the one set of states that there is. OpenVINO joins the names of input and output in that
        # of a state.
        found = self.request.query_state()
        states = [next(state for state in found if state.name.startswith(port.name)) for port in self._own]
        for state, array in zip(states, own, strict=True):
            state.state = self._tensor(array)
        logits = self.request.infer(inputs)[0]
        return logits, [state.state.data.copy() for state in states]
