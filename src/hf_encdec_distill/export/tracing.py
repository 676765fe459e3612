"""The two modules of a student as `torch.export` programs, which ONNX and OpenVINO are made from."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .modules import ExportedDecoder, ExportedEncoder
from .recipe import EXAMPLE_SIZES, Graph


@torch.no_grad()
def export_programs(
    model, graphs: Mapping[str, Graph], stateful: bool = False
) -> dict[str, torch.export.ExportedProgram]:
    """One program for each graph, its named axes free, its inputs positional in the order of the recipe.

    Args:
        stateful: see [`ExportedDecoder`].
    """
    dtype = model.dtype
    fixed = any(port.name == "position" for port in graphs["decoder"].inputs)
    modules = {"encoder": ExportedEncoder(model), "decoder": ExportedDecoder(model, fixed, stateful)}
    programs = {}
    for name, graph in graphs.items():
        examples = [port.example(EXAMPLE_SIZES, dtype) for port in graph.inputs]
        free = [
            {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(port.axes) if isinstance(axis, str)}
            for port in graph.inputs
        ]
        leading = 2  # ids and mask; what follows are the decoder's `*states`
        dynamic = (*free[:leading], tuple(free[leading:])) if len(free) > leading else tuple(free)
        programs[name] = torch.export.export(
            modules[name].eval(), tuple(examples), dynamic_shapes=dynamic, strict=False
        )
    return programs
