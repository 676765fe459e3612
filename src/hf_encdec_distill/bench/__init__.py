"""Latency, size and FLOPs of a student held against the decoder-only model it came from and against what
else people run, and the plots of a run.

Everything here is imported on first use: plots need matplotlib (`pip install "hf-encdec-distill[demo]"`), the rest
torch and transformers.
"""

from typing import TYPE_CHECKING

from .._lazy import on_first_use


if TYPE_CHECKING:
    from ..devices import best_cpu_dtype as best_cpu_dtype
    from ..devices import bf16_unit as bf16_unit
    from ..devices import cpu_flags as cpu_flags
    from ..models.cost import CostComparison as CostComparison
    from ..models.cost import ModelCost as ModelCost
    from ..models.cost import compare_cost as compare_cost
    from ..models.cost import decoder_only_config as decoder_only_config
    from ..models.cost import model_cost as model_cost
    from .energy import EnergyMeter as EnergyMeter
    from .latency import LatencyComparison as LatencyComparison
    from .latency import compare_latency as compare_latency
    from .latency import greedy_decode as greedy_decode
    from .latency import machine_description as machine_description
    from .latency import versions as versions
    from .plots import plot_bench as plot_bench
    from .plots import plot_front as plot_front
    from .plots import plot_loss_curves as plot_loss_curves
    from .plots import plot_quality as plot_quality
else:
    __getattr__, __dir__, __all__ = on_first_use(
        __name__,
        {
            ".energy": ["EnergyMeter"],
            ".latency": ["LatencyComparison", "compare_latency", "greedy_decode", "machine_description", "versions"],
            ".plots": ["plot_bench", "plot_front", "plot_loss_curves", "plot_quality"],
            "..models.cost": ["CostComparison", "ModelCost", "compare_cost", "decoder_only_config", "model_cost"],
            "..devices": ["best_cpu_dtype", "bf16_unit", "cpu_flags"],
        },
    )
