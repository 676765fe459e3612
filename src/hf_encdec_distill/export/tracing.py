"""The modules of a student as `torch.export` programs, which ONNX and OpenVINO are made from."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .modules import ExportedDecoder, ExportedEncoder, ExportedVision
from .recipe import EXAMPLE_SIZES, Graph


def modules_of(model, graphs: Mapping[str, Graph], stateful: bool = False) -> dict[str, torch.nn.Module]:
    """What each graph is made from. `stateful`: see [`ExportedDecoder`]."""
    fixed = any(port.name == "position" for port in graphs["decoder"].inputs)
    modules: dict[str, torch.nn.Module] = {
        "encoder": ExportedEncoder(model),
        "decoder": ExportedDecoder(model, fixed, stateful),
    }
    if "vision" in graphs:
        modules["vision"] = ExportedVision(model, *graphs["vision"].inputs[0].shape(EXAMPLE_SIZES)[2:])
    return modules


@torch.no_grad()
def export_programs(
    model, graphs: Mapping[str, Graph], stateful: bool = False
) -> dict[str, torch.export.ExportedProgram]:
    """One program for each graph, its named axes free, its inputs positional in the order of the recipe.

    Args:
        stateful: see [`ExportedDecoder`].
    """
    dtype = model.dtype
    modules, programs = modules_of(model, graphs, stateful), {}
    for name, graph in graphs.items():
        examples = [port.example(EXAMPLE_SIZES, dtype) for port in graph.inputs]
        free = [
            {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(port.axes) if isinstance(axis, str)}
            for port in graph.inputs
        ]
        leading = 2  # ids and mask; what follows are the decoder's `*states`
        dynamic = (*free[:leading], tuple(free[leading:])) if name == "decoder" else tuple(free)
        programs[name] = torch.export.export(
            modules[name].eval(), tuple(examples), dynamic_shapes=dynamic, strict=False
        )
    return programs
