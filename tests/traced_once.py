"""Equal students are traced once in a process: most of an export's time is `torch.export`, and of a test's an export.

What is shared is what one process would make a second time from the same sources: for the same weights, config, graphs
and options the programs of `export_programs`, and what `torch.onnx.export` and `openvino.convert_model` make of them;
and the table of what ONNX has for each operator of torch, which takes 0.6 seconds of each graph. Nothing is kept on
disk, so that no change of the sources is hidden.
"""

import copy
import functools
import hashlib
import sys

import torch

from hf_encdec_distill.export import tracing


LARGEST = 2_000_000  # parameters; what is larger is no toy, and not kept in memory


def content_of(model):
    """A hash of every weight and buffer, and of the config."""
    hashed = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            hashed.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def traced_once(export_programs):
    made = {}

    @functools.wraps(export_programs)
    def find(model, graphs, stateful=False):
        for module, name, each_its_own in (("torch.onnx", "export", False), ("openvino", "convert_model", True)):
            convert_once(sys.modules.get(module), name, each_its_own)
        fill_registry_once()
        if model.num_parameters() > LARGEST:
            return export_programs(model, graphs, stateful)
        key = type(model), content_of(model), repr(graphs), stateful
        if key not in made:
            # Of a copy: the student may learn something else afterwards.
            made[key] = export_programs(copy.deepcopy(model), graphs, stateful)
            for program in made[key].values():
                program.converted = {}
        return dict(made[key])

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


tracing.export_programs = traced_once(tracing.export_programs)
