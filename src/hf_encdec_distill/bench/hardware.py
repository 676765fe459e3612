"""What runs a plan: memory, rates, and how much of the rates training reaches.

Of GPUs it is their vendors' numbers: nothing of this package has run on one. Of this machine it is measured.
"""

from __future__ import annotations

import dataclasses

import psutil

from ..devices import best_cpu_dtype, cpu_name


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One GPU, or the CPU of this machine.

    Attributes:
        name: of the vendor.
        memory: bytes.
        matrix_rate: FLOPs per second of dense matrix products, bfloat16 or the fastest that the CPU has.
        read_rate: bytes per second.
        bf16: whether those products are bfloat16, and training uses autocast.
        process: bytes that a process takes before it loads a model, where they are of the same memory.
    """

    name: str
    memory: float
    matrix_rate: float
    read_rate: float
    bf16: bool = True
    process: float = 0.0


# Peak rates without sparsity, with accumulation in float32; memory in 10^9 bytes, a little less than a driver shows.
# https://www.nvidia.com/en-us/data-center/{dgx-b200,h200,h100,a100,l40s,l4}/, the white papers of NVIDIA's Ada and
# Ampere GA102 architectures, and https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html
GPUS = {
    "b200": Hardware("NVIDIA B200", 180e9, 2250e12, 8.0e12),
    "h200": Hardware("NVIDIA H200 SXM", 141e9, 989e12, 4.8e12),
    "h100": Hardware("NVIDIA H100 SXM", 80e9, 989e12, 3.35e12),
    "a100": Hardware("NVIDIA A100 80GB SXM", 80e9, 312e12, 2.039e12),
    "a100-40gb": Hardware("NVIDIA A100 40GB SXM", 40e9, 312e12, 1.555e12),
    "l40s": Hardware("NVIDIA L40S", 48e9, 362e12, 0.864e12),
    "l4": Hardware("NVIDIA L4", 24e9, 121e12, 0.3e12),
    "rtx-4090": Hardware("NVIDIA GeForce RTX 4090", 24e9, 165e12, 1.008e12),
    "rtx-3090": Hardware("NVIDIA GeForce RTX 3090", 24e9, 71e12, 0.936e12),
    "mi300x": Hardware("AMD Instinct MI300X", 192e9, 1307e12, 5.3e12),
}


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Counted FLOPs over those that the peak rate could have made in the same time (MFU, arXiv 2204.02311, appendix
    B): the expected share, the least and the largest, and where they are from."""

    value: float
    low: float
    high: float
    source: str

    def __post_init__(self):
        if not 0 < self.low <= self.value <= self.high <= 1:
            raise ValueError(
                f"efficiency={self.value} ({self.low} to {self.high}) is out of range: give a share of the peak "
                "rate, above 0 and at most 1"
            )


OF_GPUS = Efficiency(
    0.3,
    0.2,
    0.43,
    "assumed: nothing of this package has run on a GPU. The training of Llama 3 reached 0.38 to 0.43 on H100s (arXiv "
    "2407.21783, table 4) with kernels and parallelism of its own, so that is the upper end; 0.3 is a guess for "
    "transformers' Trainer",
)
OF_CPUS = Efficiency(
    0.45,
    0.32,
    0.76,
    "measured in bfloat16 on two AMD machines, over nine runs (docs/studies/plan/plan.md). Runs on one machine with "
    "like batches agree to 5 %, so time one step and give its share",
)


PROCESS_BYTES = 0.6e9  # torch, transformers, datasets and the trainer, imported: 0.57 GB measured on Linux


def this_cpu(threads: int) -> Hardware:
    """The CPU of this machine, its rates measured as those of `bench`'s floors are; takes seconds."""
    import torch

    from .floors import measure_rates

    bf16 = best_cpu_dtype() is torch.bfloat16
    rates = measure_rates(threads)
    memory = psutil.virtual_memory().total
    return Hardware(
        f"{cpu_name()}, {threads} threads",
        memory,
        rates["bf16" if bf16 else "fp32"],
        rates["read"],
        bf16,
        PROCESS_BYTES,
    )
