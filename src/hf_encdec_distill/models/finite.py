"""NaN and infinity among weights, found before they are saved, exported or published."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, None if all are finite.

    Of a tensor that is divided among processes the part of this one is looked at.
    """
    for name, tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        tensor = tensor.detach()
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        # torch has no `isfinite` for float8.
        if not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all():
            return name
    return None


def check_finite(model: nn.Module) -> None:
    """Raises ValueError, naming the weight, where one of a model is NaN or infinite."""
    name = not_finite(model.named_parameters())
    if name is not None:
        raise ValueError(f"the weight {name!r} is not finite, it holds NaN or infinity: {_MEND}")


def check_finite_files(files: Iterable[Path]) -> None:
    """As `check_finite`, of safetensors files, of which one tensor at a time is in memory.

    Raises:
        ValueError: also for a file that is not whole.
    """
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                name = not_finite((name, content.get_tensor(name)) for name in content.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}): save the model again") from error
        if name is not None:
            raise ValueError(f"{file}: the weight {name!r} is not finite, it holds NaN or infinity: {_MEND}")


_MEND = "take a checkpoint from before, or train again with a lower learning rate"
