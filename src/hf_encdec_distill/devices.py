"""Where models run, and in which precision."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def _cpu_info(field: str) -> str:
    """The first value of a field of Linux' /proc/cpuinfo; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def cpu_name() -> str:
    """The model of this CPU, or its architecture where the system does not say."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """What this CPU can do, in the words of torch's cpuinfo, or of /proc/cpuinfo where this torch cannot say."""
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    return set(f"{_cpu_info('flags')} {_cpu_info('Features')}".split())


def bf16_unit() -> str | None:
    """The unit with which this CPU multiplies bfloat16 matrices in hardware; `None` if it has none.

    Without one, torch emulates bfloat16 and is slower than in float32.
    """
    flags = cpu_flags()
    for unit, needed in (("AMX", "amx_bf16"), ("AVX512-BF16", "avx512_bf16"), ("Arm BF16", "bf16")):
        if needed in flags:
            return unit
    return None


def best_cpu_dtype() -> torch.dtype:
    """`torch.bfloat16` where the CPU has a unit for it (see `bf16_unit`), else `torch.float32`."""
    return torch.bfloat16 if bf16_unit() else torch.float32


def device() -> torch.device:
    """Where the quickstart trains and measures: a CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def working_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return best_cpu_dtype()


def autocast() -> torch.autocast:
    """Matrix products in `working_dtype()` for what runs on `device()` with float32 weights."""
    return torch.autocast(device().type, working_dtype(), enabled=working_dtype() is not torch.float32)


def precision_arguments() -> dict:
    """Training arguments for `device()` and `working_dtype()`: fp32 weights, bf16 autocast."""
    return {"use_cpu": device().type == "cpu", "bf16": working_dtype() is torch.bfloat16}
