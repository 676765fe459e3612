"""Core ML: `encoder.mlpackage`, `decoder.mlpackage`, for images `vision.mlpackage`, written and proven on any system.

Batch 1. Keys and values of all layers are one tensor `(layers, 1, G, length, D)`. The decoder keeps its own in two
states (iOS 18, macOS 15) or, stateless, takes and returns them (iOS 16, macOS 13). All but fp32 compute in fp16.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..models.families import RULED_BY_LENGTH
from .backends import Backend, register_backend
from .graphs import GraphCache, Graphs, quiet
from .modules import ExportedDecoder, ExportedEncoder, ExportedVision, RotaryTable, with_scaled_norms
from .recipe import Graph, Port, Shapes, pooled_length, stacked, stacked_name, variant_of


_FILES = {"vision": "vision.mlpackage", "encoder": "encoder.mlpackage", "decoder": "decoder.mlpackage"}
_LONGEST_PROMPT, _LONGEST_ANSWER = 2048, 256  # tokens, of `dynamic`: states need a size
_BLOCK = 32  # weights of int4 that share a scale
_GROUP = 16  # channels of palette4 that share 16 values
_DESCRIPTIONS = {
    "input_ids": "Token ids of the prompt; in the decoder its last token, decoder_start_token_id at first",
    "attention_mask": "1 where the prompt is real, 0 where it is padded",
    "pixel_values": "An image of three colours, normalised as preprocessor_config.json says",
    "image_features": "Features of the images, in the order of their tokens in the prompt; behind them zeros",
    "encoder_attention_mask": "The mask that the encoder was given",
    "position": "How many target tokens came before this one",
    "cross_keys": "The prompt's keys of each decoder layer, once for each prompt",
    "cross_values": "The prompt's values of each decoder layer, once for each prompt",
    "self_keys": "Keys of earlier target tokens, zeros at first",
    "self_values": "Values of earlier target tokens, zeros at first",
    "new_keys": "self_keys with those of this token",
    "new_values": "self_values with those of this token",
    "logits": "Score of each token of the vocabulary to come next",
}
_SWIFT = """```swift
import CoreML
let folder = URL(fileURLWithPath: "{folder}")
let encoder = try await MLModel(contentsOf: MLModel.compileModel(at: folder.appending(path: "encoder.mlpackage")))
let decoder = try await MLModel(contentsOf: MLModel.compileModel(at: folder.appending(path: "decoder.mlpackage")))
```

The encoder runs once per prompt, the decoder once per token; `docs/export.md` of the package has the loop."""


@register_backend
class CoreMlBackend(Backend):
    name = "coreml"
    label = "Core ML"
    runtime = "Core ML"
    packages = ("coremltools",)
    variants = ("fp32", "fp16", "int8", "int4", "palette4")
    files = ("*.mlpackage/**/*",)
    flexible_prompts = True
    reads_images = True
    rows = 6  # an interpreter that runs a program operation by operation takes its time

    def settle(
        self, config, variant: str, shapes: Shapes, stateful: bool | None, options: Mapping[str, Any]
    ) -> tuple[Shapes, bool]:
        """
        Raises:
            ValueError: states in fp32, which Core ML does not have, or RoPE that no table can hold.
        """
        rope = config.rope_parameters["rope_type"]
        if rope in RULED_BY_LENGTH:
            raise ValueError(
                f"rope_type={rope!r} chooses its frequencies by the longest sequence of a call, which the table of "
                "the coreml target cannot: export to onnx or openvino, or train with another rope_type"
            )
        if stateful and variant == "fp32":
            raise ValueError(
                "Core ML keeps states in fp16: export variant fp32 stateless, or choose fp16, int8 or int4"
            )
        if shapes.targets is None:
            answer = min(_LONGEST_ANSWER, config.max_position_embeddings // 2)
            shapes = Shapes(range(1, min(_LONGEST_PROMPT, config.max_position_embeddings - answer) + 1), answer)
        return shapes, variant != "fp32" if stateful is None else stateful

    def cache_dtype(self, variant: str) -> str:
        return _working_dtype(variant)

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
        with quiet():
            import coremltools as ct
        prompts, targets = shapes.prompts, shapes.targets
        assert prompts is not None and targets is not None  # `settle` leaves nothing open
        if variant != "fp32":
            model = with_scaled_norms(model)
        pooling = model.config.encoder_pooling
        # What the decoder reads of the prompt, and how far that reaches in positions.
        left: Sequence[int] = sorted({pooled_length(size, pooling) for size in prompts})
        if isinstance(prompts, range):
            left = range(1, left[-1] + 1)
        rotary = functools.partial(RotaryTable, length=left[-1] * pooling + targets)
        recipe = stacked(graphs)
        decoder = _StackedDecoder(ExportedDecoder(model, fixed=True, rotary=rotary))
        modules: dict[str, nn.Module] = {
            "encoder": _StackedEncoder(ExportedEncoder(model, rotary)),
            "decoder": _WithState(decoder, recipe["decoder"]) if stateful else decoder,
        }
        if "vision" in recipe:
            modules["vision"] = ExportedVision(model, *recipe["vision"].inputs[0].shape({})[2:])
        new = stateful or variant in ("int4", "palette4") or (len(prompts) > 1 and not isinstance(prompts, range))
        for name, graph in recipe.items():
            lengths = prompts if name == "encoder" else left
            states = set(graph.cache) if stateful else set()
            inputs = [port for port in graph.inputs if port.name not in states]
            outputs = [port for port in graph.outputs if port.name not in {graph.cache[state] for state in states}]
            examples = [_example(port, lengths) for port in inputs]
            with quiet(), mended():
                traced = torch.jit.trace(modules[name].eval(), tuple(examples), check_trace=False)
                package = ct.convert(
                    traced,
                    inputs=[_tensor_type(port, lengths, variant) for port in inputs],
                    outputs=[
                        ct.TensorType(name=port.name, dtype=np.dtype(_working_dtype(variant))) for port in outputs
                    ],
                    states=[
                        ct.StateType(ct.TensorType(shape=port.axes, dtype=np.float16), name=port.name)
                        for port in graph.inputs
                        if port.name in states
                    ]
                    or None,
                    minimum_deployment_target=ct.target.iOS18 if new else ct.target.iOS16,
                    compute_precision=ct.precision.FLOAT32 if variant == "fp32" else ct.precision.FLOAT16,
                    convert_to="mlprogram",
                    skip_model_load=True,
                )
                package = _compressed(package, variant_of(name, variant))
            _describe(package, name, model.config, shapes, variant, license)
            package.save(str(folder / _FILES[name]))

    def load(self, folder: Path, graphs: Mapping[str, Graph], shapes: Shapes, dtype, stateful: bool) -> CoreMlGraphs:
        return CoreMlGraphs(folder, graphs, shapes, dtype, stateful)

    def devices(self) -> list[str]:
        import coremltools

        return ["converts and runs"] if coremltools.utils._is_macos() else ["converts; runs on macOS alone"]

    def card_lines(self, folder: str) -> tuple[str, str]:
        return "Swift", _SWIFT.format(folder=folder)


def _working_dtype(variant: str) -> str:
    return "float32" if variant == "fp32" else "float16"


class _StackedEncoder(nn.Module):
    def __init__(self, encoder: ExportedEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *image_features: Tensor) -> tuple[Tensor, Tensor]:
        cross = self.encoder(input_ids, attention_mask, *image_features)
        return torch.stack(cross[0::2]), torch.stack(cross[1::2])


class _StackedDecoder(nn.Module):
    def __init__(self, decoder: ExportedDecoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids, mask, position, own_keys, own_values, cross_keys, cross_values) -> tuple[Tensor, ...]:
        layers = range(own_keys.shape[0])
        own = [tensor[layer] for layer in layers for tensor in (own_keys, own_values)]
        cross = [tensor[layer] for layer in layers for tensor in (cross_keys, cross_values)]
        logits, *new = self.decoder(input_ids, mask, position, *own, *cross)
        return logits, torch.stack(new[0::2]), torch.stack(new[1::2])


class _WithState(nn.Module):
    """The same with its own keys and values in buffers, which the converter makes states of."""

    self_keys: Tensor
    self_values: Tensor

    def __init__(self, decoder: _StackedDecoder, graph: Graph):
        super().__init__()
        self.decoder = decoder
        for port in graph.inputs:
            if port.name in graph.cache:
                self.register_buffer(port.name, torch.zeros(port.shape({})))

    def forward(self, input_ids, mask, position, cross_keys, cross_values) -> Tensor:
        logits, keys, values = self.decoder(
            input_ids, mask, position, self.self_keys, self.self_values, cross_keys, cross_values
        )
        self.self_keys[:] = keys
        self.self_values[:] = values
        return logits


def _example(port: Port, prompts: Sequence[int]) -> Tensor:
    sizes = {"prompt": prompts[0] if len(prompts) == 1 else max(2, min(prompts))}
    example = port.example(sizes, torch.float32)
    return example.int() if example.dtype == torch.int64 else example


def _tensor_type(port: Port, prompts: Sequence[int], variant: str):
    """A new one for each conversion, since the converter changes what it is given."""
    import coremltools as ct

    dtype = np.int32 if port.dtype == "int64" else np.dtype(_working_dtype(variant))
    if "prompt" not in port.axes:
        return ct.TensorType(name=port.name, shape=port.axes, dtype=dtype)

    def with_prompt(size):
        return [size if axis == "prompt" else axis for axis in port.axes]

    if isinstance(prompts, range):
        shape = ct.Shape(with_prompt(ct.RangeDim(1, prompts[-1], default=min(64, prompts[-1]))))
    else:
        every = [with_prompt(size) for size in prompts]
        shape = ct.EnumeratedShapes(every, default=every[-1])
    return ct.TensorType(name=port.name, shape=shape, dtype=dtype)


def _compressed(package, variant: str):
    """Weights of more than 2048 numbers in 8 bits for each channel, in 4 by blocks, or as 16 values for a group."""
    if variant in ("fp32", "fp16"):
        return package
    import coremltools.optimize.coreml as optimize

    if variant == "palette4":
        options = optimize.OpPalettizerConfig(
            mode="uniform", nbits=4, granularity="per_grouped_channel", group_size=_GROUP
        )
        return optimize.palettize_weights(package, optimize.OptimizationConfig(global_config=options))
    blocks = (
        {"granularity": "per_block", "block_size": _BLOCK} if variant == "int4" else {"granularity": "per_channel"}
    )
    options = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype=variant, **blocks)
    return optimize.linear_quantize_weights(package, optimize.OptimizationConfig(global_config=options))


def _describe(package, name: str, config, shapes: Shapes, variant: str, license: str) -> None:
    """What Xcode shows of a model."""
    package.author = f"hf-encdec-distill {__version__}"
    package.version = __version__
    package.license = license
    package.short_description = {
        "vision": "Sees an image once: its features.",
        "encoder": "Reads a prompt once: keys and values for each decoder layer.",
        "decoder": "One target token: scores of the next.",
    }[name]
    for described in (package.input_description, package.output_description):
        for port in described:
            described[port] = _DESCRIPTIONS[port]
    package.user_defined_metadata.update(
        {
            "com.github.apple.coremltools.package": "hf-encdec-distill",
            "variant": variant,
            "shapes": str(shapes),
            "decoder_start_token_id": str(config.decoder_start_token_id),
            "eos_token_id": str(config.eos_token_id),
            **({"image_token_id": str(config.image_token_id)} if hasattr(config, "image_token_id") else {}),
        }
    )


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """coremltools 9.0 calls int() on an array of one number, which NumPy since 2.4 refuses ("only 0-dimensional arrays
    can be converted to Python scalars", `_cast` in converters/mil/frontend/torch/ops.py). Goes with the first release
    of coremltools that converts a traced `x.shape[0]` on NumPy 2.4."""
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil import Builder

    original = ops._cast

    def cast(context, node, dtype, name):
        value = context[node.inputs[0]]
        if value.can_be_folded_to_const() and np.ndim(value.val) > 0 and np.size(value.val) == 1:
            context.add(Builder.const(val=dtype(np.asarray(value.val).item()), name=node.name), node.name)
        else:
            original(context, node, dtype, name)

    ops._cast = cast
    try:
        yield
    finally:
        ops._cast = original


class _State:
    """The state of one row and the inputs that it has taken; `None` if none has."""

    def __init__(self, taken: Sequence[dict[str, np.ndarray]] = (), state=None):
        self.taken, self.state = list(taken), state


class _States(GraphCache):
    """A state for each row of the batch, which a step writes to."""

    def __init__(self, batch: int):
        super().__init__([])
        self.rows = [_State() for _ in range(batch)]  # type: ignore[misc]  # not arrays

    def reorder_cache(self, beam_idx) -> None:
        """The first beam that goes on from another takes its state. Core ML's cannot be copied, as the interpreter's
        can: the beams after it give their inputs again."""
        chosen: list[Any] = [self.rows[index] for index in np.asarray(beam_idx)]
        self.rows = []
        for one in chosen:
            self.rows.append(_State(one.taken, one.state))  # type: ignore[arg-type]
            one.state = dict(one.state) if isinstance(one.state, dict) else None


class CoreMlGraphs(Graphs):
    """An exported folder on Core ML where it is there, else on [`MilProgram`], operation by operation."""

    def __init__(self, folder: Path, graphs: Mapping[str, Graph], shapes: Shapes, dtype, stateful: bool):
        super().__init__(graphs, shapes, dtype)
        self.stateful = stateful
        if platform.system() == "Darwin":
            with quiet():
                from coremltools.models import MLModel as Program
        else:
            from .mil_interpreter import MilProgram as Program
        self.programs = {name: Program(str(folder / _FILES[name])) for name in graphs}
        self._layers = len(self._own) // 2

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        outputs = self.programs[graph].predict(self._stacked(inputs))
        if graph == "vision":
            return list(outputs.values())
        return self._unstacked(outputs, "new" if graph == "decoder" else "cross")

    def _stacked(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Layers of one kind as one tensor, and whole numbers in Core ML's 32 bits."""
        plain = {
            name: array.astype(np.int32) if array.dtype.kind == "i" else array
            for name, array in inputs.items()
            if "." not in name
        }
        kinds: dict[str, list[np.ndarray]] = {}
        for name, array in inputs.items():
            if "." in name:
                kinds.setdefault(stacked_name(name), []).append(array)
        return plain | {name: np.stack(arrays) for name, arrays in kinds.items()}

    def _unstacked(self, outputs: Mapping[str, np.ndarray], kind: str) -> list[np.ndarray]:
        logits = [outputs["logits"]] if "logits" in outputs else []
        layers = range(self._layers)
        return logits + [outputs[f"{kind}_{side}"][layer] for layer in layers for side in ("keys", "values")]

    def new_cache(self, batch: int) -> GraphCache:
        if not self.stateful:
            return super().new_cache(batch)
        return _States(batch)

    def step(self, inputs: dict[str, np.ndarray], own: Any) -> tuple[np.ndarray, Any]:
        if not self.stateful:
            return super().step(inputs, own)
        own.taken.append(inputs)
        unread = [inputs]
        if own.state is None:
            own.state, unread = self.programs["decoder"].make_state(), own.taken
        for one in unread:
            logits = self.programs["decoder"].predict(self._stacked(one), own.state)["logits"]
        return logits, own
