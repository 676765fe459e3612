"""The modules of a student as `torch.export` programs, which ONNX, OpenVINO and GenAI's graphs are made from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

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


def export_programs(
    model, graphs: Mapping[str, Graph], stateful: bool = False
) -> dict[str, torch.export.ExportedProgram]:
    """One program for each graph, its named axes free, its inputs positional in the order of the recipe.

    Args:
        stateful: see [`ExportedDecoder`].
    """
    modules = modules_of(model, graphs, stateful)
    return {name: program_of(modules[name], graph, EXAMPLE_SIZES, model.dtype) for name, graph in graphs.items()}


@torch.no_grad()
def program_of(
    module: torch.nn.Module, graph: Graph, sizes: Mapping[str, int], dtype: torch.dtype
) -> torch.export.ExportedProgram:
    """A module as one program; `sizes` are those of the named axes in an example, see [`EXAMPLE_SIZES`]."""
    examples = tuple(port.example(sizes, dtype) for port in graph.inputs)
    free: list[Any] = [
        {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(port.axes) if isinstance(axis, str)}
        for port in graph.inputs
    ]
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:  # such as a decoder's `*states`: one argument
        named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        free[named:] = [tuple(free[named:])]
    return torch.export.export(module.eval(), examples, dynamic_shapes=tuple(free), strict=False)
