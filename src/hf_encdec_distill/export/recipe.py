"""What the exported graphs of a student are, as data: ports, axes, cache, and how equal to PyTorch they have to be.

Every target reads this; an option of the architecture that changes a shape changes it here and nowhere else. Names are
those that Optimum and transformers.js give to the same tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..models.families import STUDENTS
from .backends import backend_of, targets


if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Bounds:
    """How far an export may be from PyTorch.

    `logits` is the largest difference, as a share of the largest logit; `None` where rounding of weights makes it say
    little. `padding` is the largest difference that pads around a prompt make to the export's own logits. `ce` is the
    rise of the cross-entropy on the rows, as a share of PyTorch's; `agreement` the share of target tokens at which
    both put the same token first; `tokens` the share of greedy and beam answers that are the same to the last token.
    """

    logits: float | None
    padding: float
    ce: float
    agreement: float
    tokens: float


# For each way to store a weight, a variant; `palette4` is 16 values for each group of channels, `q4_k_m` llama.cpp's
# mixture of types of 4 to 8 bits.
BOUNDS = {
    "fp32": Bounds(logits=1e-4, padding=1e-4, ce=1e-4, agreement=0.999, tokens=1.0),
    "fp16": Bounds(logits=None, padding=0.02, ce=0.01, agreement=0.98, tokens=0.8),
    "int8": Bounds(logits=None, padding=0.3, ce=0.05, agreement=0.9, tokens=0.0),
    **dict.fromkeys(
        ("int4", "palette4", "q4_k_m"), Bounds(logits=None, padding=0.1, ce=0.25, agreement=0.7, tokens=0.0)
    ),
}


def variant_of(graph: str, variant: str) -> str:
    """How the weights of one of the graphs are stored: a vision tower's in 8 bits where others have 4, as in the
    vision-language models of optimum-intel (v1.27.0). Not all widths of towers divide into blocks: SigLIP so400m has
    4304."""
    return "int8" if graph == "vision" and variant in ("int4", "palette4") else variant


@dataclass(frozen=True)
class Shapes:
    """Which lengths the graphs take.

    Args:
        prompts: `None` for any number of prompt tokens, one number for exactly so many (shorter ones are padded),
            several for any of them, or a `range` for all from its start on.
        targets: slots of the cache, that is, the longest answer; `None` for a cache that grows.

    Raises:
        ValueError: only one of the two is given.
    """

    prompts: tuple[int, ...] | range | None = None
    targets: int | None = None

    def __post_init__(self):
        if (self.prompts is None) != (self.targets is None):
            raise ValueError(
                f"prompts={self.prompts} with targets={self.targets}: give both, or neither for free lengths"
            )

    @classmethod
    def parse(cls, text: str) -> Shapes:
        """`dynamic`, `fixed:SRC,TGT`, `enumerated:SRC,...,TGT` or `ranged:SRC,TGT` (all lengths up to SRC).

        Raises:
            ValueError: it is none of them, or a length is no whole number of at least 1.
        """
        kind, _, rest = text.partition(":")
        numbers = [int(part) if part.strip().isdecimal() else 0 for part in rest.split(",")] if rest else []
        if text == "dynamic":
            return cls()
        if min(numbers, default=0) >= 1:
            *prompts, targets = numbers
            if kind == "fixed" and len(prompts) == 1:
                return cls(tuple(prompts), targets)
            if kind == "enumerated" and len(prompts) >= 2:
                return cls(tuple(sorted(set(prompts))), targets)
            if kind == "ranged" and len(prompts) == 1:
                return cls(range(1, prompts[0] + 1), targets)
        raise ValueError(
            f"shapes {text!r}: give dynamic, fixed:SRC,TGT, enumerated:SRC,SRC,...,TGT or ranged:SRC,TGT, with "
            "lengths in tokens of at least 1"
        )

    def __str__(self) -> str:
        if self.prompts is None or self.targets is None:
            return "dynamic"
        if isinstance(self.prompts, range):
            return f"ranged:{self.prompts[-1]},{self.targets}"
        return (
            f"{'fixed' if len(self.prompts) == 1 else 'enumerated'}:{','.join(map(str, self.prompts))},{self.targets}"
        )

    def padded(self, length: int) -> int:
        """The number of prompt tokens that a prompt of `length` tokens is padded to.

        Raises:
            ValueError: the graphs do not take so long a prompt.
        """
        if self.prompts is None:
            return length
        fitting = [size for size in self.prompts if size >= length]
        if not fitting:
            raise ValueError(
                f"a prompt of {length} tokens: this export ({self}) takes at most {max(self.prompts)}; cut the prompt "
                "or export again with longer shapes"
            )
        return min(fitting)


@dataclass(frozen=True)
class Port:
    """An input or output: its axes, by name or by size, and its dtype, as NumPy and torch name it (`None` for the
    working precision)."""

    name: str
    axes: tuple[str | int, ...]
    dtype: str | None = None

    def shape(self, sizes: Mapping[str, int]) -> list[int]:
        """The sizes of the axes, given those of the named ones."""
        return [sizes[axis] if isinstance(axis, str) else axis for axis in self.axes]

    def example(self, sizes: Mapping[str, int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the port's shape, its axes of the given sizes; ones, or token 1 that is real."""
        import torch

        return torch.ones(self.shape(sizes), dtype=getattr(torch, self.dtype) if self.dtype else dtype)


@dataclass(frozen=True)
class Graph:
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    # Input of the cache -> the output that takes its place at the next call.
    cache: Mapping[str, str] = field(default_factory=dict)
    pooling: int = 1  # how many prompt tokens become one position in the encoder
    image_token_id: int | None = None  # stands in the encoder's prompt once for each feature of an image


def pooled_length(length: int, pooling: int) -> int:
    """How many positions an encoder that pools leaves of so many prompt tokens."""
    return -(-length // pooling)


# Sizes of the named axes in an example. No two alike and none below 2, or a tracer takes one for the other or for 1.
EXAMPLE_SIZES = {
    "batch": 2,
    "prompt": 5,
    "target": 3,
    "past": 4,
    "past + target": 7,
    "prompt + past": 9,
    "prompt + past + target": 12,
    "images": 6,
}


def size_of_images(config: PretrainedConfig, processor: Any = None) -> tuple[int, int] | None:
    """Height and width in pixels of the images that a student reads: its processor's, or those that its tower was
    trained with; `None` of a student that reads text alone."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return None
    images = getattr(processor, "image_processor", None)
    return (vision.image_size, vision.image_size) if images is None else (images.size["height"], images.size["width"])


def graphs(config: PretrainedConfig, shapes: Shapes, image_size: Sequence[int] | None = None) -> dict[str, Graph]:
    """The `encoder` (once for each prompt) and the `decoder` (once for each call) of a student, and of one that reads
    images `vision` (once for all of a batch).

    With `shapes.targets` the batch is 1, the decoder takes one token, and its cache has so many slots, the one at
    `position` to be filled. One prompt length makes the axis `prompt` that number. Where the encoder pools, the axis
    `prompt` of the decoder counts pooled positions. `vision` then takes one image, and the encoder the features of as
    many as the longest prompt has room for.

    Args:
        image_size: height and width in pixels; by default [`size_of_images`].
    """
    pooling = getattr(config, "encoder_pooling", 1)  # of older folders
    prompt: str | int = "prompt"
    left: str | int = "prompt"
    if shapes.prompts is not None and len(shapes.prompts) == 1:
        prompt, left = shapes.prompts[0], pooled_length(shapes.prompts[0], pooling)
    fixed = shapes.targets is not None
    batch, target = (1, 1) if fixed else ("batch", "target")
    heads, width = config.num_key_value_heads, config.head_dim
    sides = [(layer, side) for layer in range(config.decoder_num_hidden_layers) for side in ("key", "value")]

    def cache(prefix: str, of: str, length: str | int) -> tuple[Port, ...]:
        return tuple(Port(f"{prefix}.{layer}.{of}.{side}", (batch, heads, length, width)) for layer, side in sides)

    past = cache("past_key_values", "decoder", shapes.targets or "past")
    present = cache("present", "decoder", shapes.targets or "past + target")
    position = (Port("position", (1,), "int64"),) if fixed else ()
    sees = getattr(config, "vision_config", None) is not None
    vision = {"vision": _vision(config, shapes, image_size)} if sees else {}
    features: tuple[Port, ...] = ()
    if sees:
        [port] = vision["vision"].outputs
        room = port.axes[0] if shapes.prompts is None else max(shapes.prompts) // int(port.axes[1])
        features = (replace(port, axes=(room, *port.axes[1:])),)
    return {
        **vision,
        "encoder": Graph(
            inputs=(
                Port("input_ids", (batch, prompt), "int64"),
                Port("attention_mask", (batch, prompt), "int64"),
                *features,
            ),
            outputs=cache("present", "encoder", "pooled prompt" if pooling > 1 and left == "prompt" else left),
            pooling=pooling,
            image_token_id=config.image_token_id if sees else None,
        ),
        "decoder": Graph(
            inputs=(
                Port("input_ids", (batch, target), "int64"),
                Port("encoder_attention_mask", (batch, left), "int64"),
                *position,
                *past,
                *cache("past_key_values", "encoder", left),
            ),
            outputs=(Port("logits", (batch, target, config.vocab_size)), *present),
            cache={old.name: new.name for old, new in zip(past, present, strict=True)},
        ),
    }


def _vision(config: PretrainedConfig, shapes: Shapes, image_size: Sequence[int] | None) -> Graph:
    height, width = image_size or (config.vision_config.image_size,) * 2
    side = config.vision_config.patch_size * config.projector_pixel_shuffle
    tokens = (height // side) * (width // side)
    images = "images" if shapes.prompts is None else 1
    return Graph(
        inputs=(Port("pixel_values", (images, 3, height, width)),),
        outputs=(Port("image_features", (images, tokens, config.hidden_size)),),
    )


def with_prompt_in_cache(decoder: Graph) -> Graph:
    """The decoder's graph where its cache begins with the prompt's keys and values, which then are no inputs."""

    def longer(ports: tuple[Port, ...]) -> tuple[Port, ...]:
        def axis(name: str | int) -> str | int:
            return f"prompt + {name}" if str(name).startswith("past") else name

        return tuple(replace(port, axes=tuple(map(axis, port.axes))) for port in ports)

    own = tuple(port for port in decoder.inputs if "." not in port.name or port.name in decoder.cache)
    return Graph(longer(own), longer(decoder.outputs), decoder.cache, decoder.pooling)


def stacked(recipe: Mapping[str, Graph]) -> dict[str, Graph]:
    """The same graphs with the layers of each kind of key and value in one tensor, layers first: `cross_keys`,
    `cross_values`, `self_keys` and `self_values`, and `new_keys` and `new_values` for the last two as outputs."""

    def of(ports: tuple[Port, ...], decoder_name: str) -> tuple[Port, ...]:
        plain = [port for port in ports if "." not in port.name]
        layered = [port for port in ports if "." in port.name]
        merged: dict[str, list[Port]] = {}
        for port in layered:
            merged.setdefault(stacked_name(port.name, decoder_name), []).append(port)
        return (*plain, *(Port(name, (len(same), *same[0].axes)) for name, same in merged.items()))

    return {
        name: Graph(
            of(graph.inputs, "self"),
            of(graph.outputs, "new"),
            {"self_keys": "new_keys", "self_values": "new_values"} if graph.cache else {},
            graph.pooling,
            graph.image_token_id,
        )
        for name, graph in recipe.items()
    }


def stacked_name(name: str, own: str = "self") -> str:
    """`past_key_values.0.encoder.key` -> `cross_keys`, `past_key_values.0.decoder.key` -> `self_keys`."""
    _, _, side, kind = name.split(".")
    return f"{'cross' if side == 'encoder' else own}_{kind}s"


def that_fit(rows: Sequence[Mapping], shapes: Shapes) -> list[Mapping]:
    """
    Raises:
        ValueError: none does.
    """
    longest = max(shapes.prompts) if shapes.prompts is not None else math.inf
    slots = shapes.targets or math.inf
    fitting = [row for row in rows if 0 < len(row["inputs"]) <= longest and len(row["labels"]) <= slots]
    if not fitting:
        raise ValueError(
            f"none of {len(rows)} rows fits an export of shapes {shapes}: give --dataset with shorter ones, or longer "
            "--shapes"
        )
    return fitting


def check_exportable(
    model: PreTrainedModel, target: str, variant: str, shapes: Shapes, image_size: Sequence[int] | None = None
) -> None:
    """
    Args:
        image_size: as in [`graphs`].

    Raises:
        ValueError: there is no such target or variant, the target has no such variant or shapes, the model is none of
            ours, its positions are too few for the shapes, or a weight is not finite. Of a model that reads images:
            the target does not, or the size or the shapes do not fit them.
    """
    from ..models.finite import check_finite

    backend = backend_of(target)
    if variant not in BOUNDS:
        raise ValueError(f"variant {variant!r}: choose of {', '.join(BOUNDS)}")
    if variant not in backend.variants:
        having = [other for other in targets() if variant in backend_of(other).variants]
        raise ValueError(
            f"variant {variant!r} is for {' and '.join(having)}, not for {target}: choose of "
            f"{', '.join(backend.variants)}"
        )
    config = model.config
    if config.model_type not in STUDENTS or not hasattr(model, "lm_head"):
        raise ValueError(
            f"{type(model).__name__} of model type {config.model_type!r} cannot be exported: it has to be a "
            "RopeEncDecForConditionalGeneration (hf-encdec-distill init makes one from a decoder-only model)"
        )
    image_size = image_size or size_of_images(config)
    if image_size is not None:
        if not backend.reads_images:
            having = [other for other in targets() if backend_of(other).reads_images]
            raise ValueError(
                f"a student that reads images is exported to {', '.join(having)}, not to {target}: choose one of them"
            )
        tokens = config.image_tokens(*image_size)
        if shapes.prompts is not None and max(shapes.prompts) < tokens:
            raise ValueError(
                f"shapes {shapes}: an image of {image_size[0]} x {image_size[1]} pixels is {tokens} tokens of a "
                "prompt; give longer prompts"
            )
    if shapes.prompts is not None and len(shapes.prompts) > 1 and not backend.flexible_prompts:
        having = [other for other in targets() if backend_of(other).flexible_prompts]
        raise ValueError(
            f"shapes {shapes}: {target} takes dynamic and fixed:SRC,TGT; the others are for {' and '.join(having)}"
        )
    if _positions(config, shapes) > config.max_position_embeddings:
        raise ValueError(
            f"shapes {shapes} need {_positions(config, shapes)} positions, the model has max_position_embeddings="
            f"{config.max_position_embeddings}; give shorter ones"
        )
    check_finite(model)


def check_options(target: str, variant: str, options: Iterable[str]) -> None:
    """
    Raises:
        ValueError: an option that other targets have.
    """
    for option in options:
        if option not in backend_of(target).own_options:
            having = (backend_of(other).own_options for other in targets())
            refusal = next(own[option] for own in having if option in own)
            raise ValueError(refusal.format(target=target, variant=variant))


def _positions(config: PretrainedConfig, shapes: Shapes) -> int:
    """`merged` decoders count on where the prompt ends, the others from 0. A length that is free needs none."""
    prompt, target = max(shapes.prompts or (0,)), shapes.targets or 0
    prompt = pooled_length(prompt, config.encoder_pooling) * config.encoder_pooling
    return prompt + target if config.cross_attention == "merged" else max(prompt, target)
