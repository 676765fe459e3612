"""Latency, size and FLOPs of a student held against the decoder-only model it came from, and the plots of a run.

Everything here is imported on first use: plots need matplotlib (`pip install "hf-encdec-distill[demo]"`), the rest
torch and transformers.
"""

import importlib


_EXPORTS = {
    "EnergyMeter": "energy",
    "ModelCost": "cost",
    "CostComparison": "cost",
    "model_cost": "cost",
    "compare_cost": "cost",
    "decoder_only_config": "cost",
    "LatencyComparison": "latency",
    "compare_latency": "latency",
    "greedy_decode": "latency",
    "bf16_unit": "latency",
    "cpu_flags": "latency",
    "best_cpu_dtype": "latency",
    "machine_description": "latency",
    "plot_loss_curves": "plots",
    "plot_quality": "plots",
    "plot_latency": "plots",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
