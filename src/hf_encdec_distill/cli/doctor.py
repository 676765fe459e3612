"""Show what is installed and what the machine has: versions, runtimes, CPU features, and what each missing extra adds.

Exit code 2 if a required package is missing, of a wrong version, or cannot be imported.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import platform
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ..export.backends import Backend, backend_of, targets
from ..progress import progress
from ._display import say_result, wrap


if TYPE_CHECKING:
    from packaging.requirements import Requirement

SUMMARY = "show versions, runtimes and the machine"
EXAMPLE = "hf-encdec-distill doctor --json"

DISTRIBUTION = "hf-encdec-distill"
# What the extras add, but for those of one target.
_ADDS = {
    "demo": "the quickstart, plots, BLEU and chrF",
    "exporters": "export to all targets but llama.cpp",
    "optimum": "Optimum's own models and command line, for ONNX Runtime and OpenVINO (holds transformers at 4.57)",
    "demo-ui": "the page that `demo` opens",
    "images": "students that read images",
    "peft": "teach, and teachers that are LoRA adapters",
    "quantization": "teachers in 8 or 4 bits",
    "served": "teachers on a server of vLLM or SGLang",
}
_MODULES = {"huggingface-hub": "huggingface_hub", "pyyaml": "yaml"}  # the others are named as their distributions
_OURS = ("hf_encdec_distill.models.rope_encdec", "hf_encdec_distill.distillation.trainer")
# What fast products of float32, bfloat16 and 8 bits need, as torch's cpuinfo and Linux' /proc/cpuinfo name it.
_CPU_FEATURES = {
    "AVX2": {"avx2"},
    "AVX512": {"avx512_f", "avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "AVX512_BF16": {"avx512_bf16"},
    "AMX": {"amx_int8", "amx_bf16"},
    "NEON": {"asimd", "neon"},
    "DOTPROD": {"asimddp", "neon_dot"},
    "BF16": {"bf16"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none of its own."""


def run(args: argparse.Namespace) -> None:
    requirements = _requirements()
    names = {requirement.name for extra in ("", *targets(), *_ADDS) for requirement in requirements.get(extra, ())}
    versions = {name: version for name in sorted(names) if (version := _version(name))}
    broken = {requirement.name: f"needs {requirement}" for requirement in _unmet(requirements[""])}
    modules = [_MODULES.get(requirement.name, requirement.name) for requirement in requirements[""]]
    with progress("import") as update, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)  # remarks of converters on versions and on what they lack
        for index, name in enumerate([*modules, *_OURS]):
            update(index / (len(modules) + len(_OURS)), name)
            try:
                importlib.import_module(name)
            except Exception as error:  # a broken package may raise anything
                broken.setdefault(name, _first_line(error))
        backends = _backends()
        runtimes = _runtimes(backends.values())
        logging.disable(logging.NOTSET)
    labels = {target: backends[target].label if target in backends else target for target in targets()}
    of_targets = {target: f"export to {label}" for target, label in labels.items()}
    adds = {"demo": _ADDS["demo"], **of_targets, **_ADDS}
    content = {
        "healthy": not broken,
        "broken": broken,
        "versions": {DISTRIBUTION: _version(DISTRIBUTION), "python": platform.python_version(), **versions},
        "lane": _lane(),
        "runtimes": runtimes,
        "machine": {} if broken else _machine(),
        "extras": {
            name: {
                "adds": adds[name],
                "missing": [f"{lacks.name}{lacks.specifier}" for lacks in _unmet(requirements[name])],
                "install": f'pip install "{DISTRIBUTION}[{name}]"',
            }
            for name in adds
            if name in requirements
        },
    }
    content["traps"] = _traps(content)
    say_result(args, content, _page(content))
    if broken:
        raise ValueError("; ".join(f"{name}: {error}" for name, error in broken.items()))


def _requirements() -> dict[str, list[Requirement]]:
    """What the distribution says that it and each of its extras need; `""` are those without an extra."""
    from packaging.requirements import Requirement

    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return {"": []}
    parsed = [Requirement(line) for line in distribution.requires or ()]
    extras = {
        extra: [found for found in parsed if found.marker and found.marker.evaluate({"extra": extra})]
        for extra in distribution.metadata.get_all("Provides-Extra", [])
    }
    return {"": [found for found in parsed if not found.marker or found.marker.evaluate({"extra": ""})], **extras}


def _unmet(requirements: list[Requirement]) -> list[Requirement]:
    return [
        requirement
        for requirement in requirements
        if (version := _version(requirement.name)) is None
        or not requirement.specifier.contains(version, prereleases=True)
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _lane() -> str:
    transformers, optimum = _version("transformers") or "", _version("optimum")
    return f"transformers {transformers} {f'with Optimum {optimum}' if optimum else 'without Optimum'}"


def _backends() -> dict[str, Backend]:
    """The targets of an export; none where torch or transformers is broken, which has been found by then."""
    try:
        return {target: backend_of(target) for target in targets()}
    except Exception:
        return {}


def _runtimes(backends: Iterable[Backend]) -> dict[str, list[str] | str]:
    """What PyTorch and the runtimes of exports can compute on here, or why they cannot be asked."""
    devices: dict[str, Callable[[], list[str]]] = {"torch": _torch_devices}
    for backend in backends:
        devices.setdefault(backend.packages[0], backend.devices)
    runtimes: dict[str, list[str] | str] = {}
    for name, ask in devices.items():
        if _version(name):
            try:
                runtimes[name] = ask()
            except Exception as error:
                runtimes[name] = _first_line(error)
    return runtimes


def _torch_devices() -> list[str]:
    import torch

    cuda = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def _machine() -> dict[str, Any]:
    import torch

    from ..bench import cpu_flags, machine_description

    flags = cpu_flags()
    features = [name for name, any_of in _CPU_FEATURES.items() if any_of & flags]
    described = machine_description()
    kept = ("cpu", "system", "usable_cores", "threads", "memory_gib", "bf16_unit")
    return {
        **{name: described[name] for name in kept},
        "cpu_features": features,
        "torch_built_for_cuda": torch.version.cuda,
    }


def _traps(content: dict[str, Any]) -> list[str]:
    """What works but will surprise."""
    traps = []
    machine, versions = content["machine"], content["versions"]
    if versions[DISTRIBUTION] is None:
        traps.append(f"{DISTRIBUTION} is not installed here, so that what it needs is not known: pip install -e .")
    for name, found in content["runtimes"].items():
        if name != "torch" and isinstance(found, str):
            traps.append(f"{name} is installed and cannot be imported: {found}")
    if machine:
        features = machine["cpu_features"]
        if "x86_64" in machine["system"] and "VNNI" not in features:
            traps.append(
                "this CPU has no VNNI: products of 8-bit numbers can saturate in ONNX Runtime; prove int8 exports here"
            )
        if machine["bf16_unit"] is None:
            traps.append("this CPU has no bfloat16 unit: bfloat16 is emulated and slower than float32")
        if machine["threads"] > machine["usable_cores"]:
            traps.append(
                f"torch uses {machine['threads']} threads on {machine['usable_cores']} cores: set OMP_NUM_THREADS"
            )
        if (machine["memory_gib"] or 99) < 6:
            traps.append(f"{machine['memory_gib']} GiB of memory: the quickstart needs about 6")
        if machine["torch_built_for_cuda"] and not any("cuda" in device for device in content["runtimes"]["torch"]):
            traps.append("torch is built for CUDA and finds no GPU: look at the driver")
    if (versions.get("transformers") or "").startswith("5.") and "optimum-onnx" in versions:
        traps.append("optimum-onnx does not admit transformers 5: install one or the other")
    return traps


def _page(content: dict[str, Any]) -> str:
    missing = [
        [name, extra["adds"], ", ".join(extra["missing"]), extra["install"]]
        for name, extra in content["extras"].items()
        if extra["missing"]
    ]
    machine = {name: ", ".join(x) if isinstance(x, list) else x for name, x in content["machine"].items()}
    runtimes = {name: x if isinstance(x, str) else ", ".join(x) for name, x in content["runtimes"].items()}
    parts = [content["lane"], _lines(content["versions"]), _lines(runtimes), _lines(machine)]
    if missing:
        lines = [
            f"{wrap(f'{name}: {adds}', 4)}\n{wrap(f'    missing: {lacks}', 6)}\n    {install}"
            for name, adds, lacks, install in missing
        ]
        parts.append("not installed\n" + "\n".join(lines))
    parts += [wrap(f"trap: {trap}") for trap in content["traps"]]
    parts += [wrap(f"broken: {name}: {error}") for name, error in content["broken"].items()]
    return "\n\n".join(part for part in parts if part)


def _lines(entries: dict[str, Any]) -> str:
    width = max(map(len, entries), default=0)
    return "\n".join(wrap(f"{name.ljust(width)}  {value}", width + 2) for name, value in entries.items())
