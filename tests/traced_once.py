"""Equal modules are traced once in a process: most of an export's time is `torch.export`, and of a test's an export.

What is shared is what one process would make a second time from the same sources: for the same weights, settings,
ports and sizes the program of `program_of`, and what `torch.onnx.export` and `openvino.convert_model` make of it; and
the table of what ONNX has for each operator of torch, which takes 0.6 seconds of each graph. Nothing is kept on disk,
so that no change of the sources is hidden. Core ML's converter checks its program at the end alone.
"""

import copy
import functools
import hashlib
import sys

import pytest
import torch

from hf_encdec_distill.export import tracing


LARGEST = 2_000_000  # parameters; what is larger is no toy, and not kept in memory


def content_of(module):
    """A hash of every weight and buffer, of the config and of what else each part of the module was told."""
    hashed = hashlib.sha256()
    for name, part in module.named_modules():
        hashed.update(f"{name} {type(part).__qualname__}".encode())
        for key, value in sorted(vars(part).items()):
            if hasattr(value, "to_json_string"):
                hashed.update(value.to_json_string(use_diff=False).encode())
            elif isinstance(value, (bool, int, float, str, tuple, torch.dtype, type(None))):
                hashed.update(f"{key}={value}".encode())
    for tensors in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            hashed.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def traced_once(program_of):
    made = {}

    @functools.wraps(program_of)
    def find(module, graph, sizes, dtype):
        for name, function, each_its_own in (("torch.onnx", "export", False), ("openvino", "convert_model", True)):
            convert_once(sys.modules.get(name), function, each_its_own)
        fill_registry_once()
        if sum(parameter.numel() for parameter in module.parameters()) > LARGEST:
            return program_of(module, graph, sizes, dtype)
        key = content_of(module), repr(graph), repr(sizes), dtype
        if key not in made:
            # Of a copy: the student may learn something else afterwards.
            made[key] = program_of(copy.deepcopy(module), graph, sizes, dtype)
            made[key].converted = {}
        return made[key]

    return find


def convert_once(module, name, each_its_own):
    """Replace a converter by one that remembers what it made of a program of ours, or hands out clones of it."""
    convert = getattr(module, name, None)
    if convert is None or hasattr(convert, "remembers"):
        return

    @functools.wraps(convert)
    def find(program, *args, **options):
        if not hasattr(program, "converted"):
            return convert(program, *args, **options)
        key = name, args, tuple(sorted(options.items()))
        if key not in program.converted:
            program.converted[key] = convert(program, *args, **options)
        return program.converted[key].clone() if each_its_own else program.converted[key]

    find.remembers = True
    setattr(module, name, find)


def fill_registry_once():
    """Read from the sources of a thousand functions of onnxscript; an export adds nothing to it."""
    registry = getattr(sys.modules.get("torch.onnx._internal.exporter._registration"), "ONNXRegistry", None)
    if registry is not None and not hasattr(registry.from_torchlib, "cache_info"):
        registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))


def checked_at_the_end(trace):
    """The converter checks the whole program after each of some hundred passes, which is a quarter of its time."""

    @functools.wraps(trace)
    def find(*args, **options):
        passes = sys.modules.get("coremltools.converters.mil.mil.passes.pass_pipeline")
        if passes is not None and not hasattr(passes.PassPipelineManager, "checks_at_the_end"):
            apply, check = passes.PassPipelineManager.apply_pipeline, passes.Program.validate

            def apply_pipeline(program, pipeline):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(passes.Program, "validate", lambda *_, **__: None)
                    apply(program, pipeline)
                check(program)

            passes.PassPipelineManager.apply_pipeline = staticmethod(apply_pipeline)
            passes.PassPipelineManager.checks_at_the_end = True
        return trace(*args, **options)

    return find


tracing.program_of = traced_once(tracing.program_of)
torch.jit.trace = checked_at_the_end(torch.jit.trace)
