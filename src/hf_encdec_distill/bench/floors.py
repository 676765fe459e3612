"""The least time that a request can take on this machine: counted FLOPs and bytes over measured rates.

Rates are the best of some tries on the threads of the bench, so noise makes a floor too high rather than too low. What
a cache of the CPU holds is read faster than `read`; a model that small can be below its floor.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping

from ..models.cost import ModelCost
from .contenders import PRECISIONS


_TRIES, _LONGEST = 15, 1.0  # of a measurement, and the seconds after which there are no more of them
_SIZE = 2048  # of square matrices
_READ = 2**28  # bytes


def measure_rates(threads: int, device: str = "cpu") -> dict[str, float]:
    """Bytes per second (`read`), and FLOPs per second of large matrix products in `fp32`, `bf16` and, where this torch
    has them, `int8`."""
    import torch

    torch.set_num_threads(threads)
    memory = torch.ones(_READ // 4, device=device)
    matrix = memory.view(2**13, -1)
    seconds = min(_best(memory.sum), _best(lambda: matrix @ matrix[0]))
    rates = {"read": _READ / seconds}
    products: dict[str, tuple[torch.dtype, Callable]] = {
        "fp32": (torch.float32, torch.mm),
        "bf16": (torch.bfloat16, torch.mm),
    }
    if hasattr(torch, "_int_mm"):  # torch has no public product of int8
        products["int8"] = (torch.int8, torch._int_mm)
    for name, (dtype, product) in products.items():
        one = torch.ones(_SIZE, _SIZE, device=device).to(dtype)
        with contextlib.suppress(RuntimeError):  # this device has none of that dtype
            rates[name] = 2 * _SIZE**3 / _best(lambda one=one, product=product: product(one, one))
    return rates


def _best(run: Callable) -> float:
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < _TRIES and sum(seconds) < _LONGEST):
        start = time.perf_counter()
        run().view(-1)[0].item()  # which waits for a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def counted(cost: ModelCost, precision: str, batch: int) -> dict[str, float]:
    """FLOPs of the first token and of a step for all rows of the batch, and bytes that a step reads.

    Args:
        cost: of a request in fp32. Its keys and values count as 4 bytes each in fp32 and as 2 in all other precisions.
    """
    weights = cost.weight_bytes_per_token / 4 * PRECISIONS[precision]
    cache = cost.cache_bytes_per_token / 4 * (4 if precision == "fp32" else 2)
    return {
        "first_token_flops": batch * cost.first_token_flops,
        "step_flops": batch * cost.flops_per_token,
        "step_bytes": weights + batch * cache,
    }


def floor(
    counts: Mapping[str, float], precision: str, new_tokens: int, rates: Mapping[str, float]
) -> dict[str, float]:
    """Milliseconds: `first_token_ms`, `step_ms`, and `request_ms` of `new_tokens`.

    The first token takes its FLOPs at the rate of the precision. A step takes the larger of its bytes at the rate of
    reading and its FLOPs. Weights of 8 bits and less may be multiplied in any precision: the fastest counts.

    Args:
        counts: from `counted`.
        rates: from `measure_rates`.
    """
    usable = {"fp32": ["fp32"], "bf16": ["fp32", "bf16"], "fp16": ["fp32", "bf16"]}
    rate = max(rates[name] for name in usable.get(precision, ["fp32", "bf16", "int8"]) if name in rates)
    first = 1e3 * counts["first_token_flops"] / rate
    step = 1e3 * max(counts["step_bytes"] / rates["read"], counts["step_flops"] / rate)
    return {"first_token_ms": first, "step_ms": step, "request_ms": first + (new_tokens - 1) * step}
