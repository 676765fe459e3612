"""Energy by the hardware's own counters: RAPL of CPU packages, NVML of GPUs. Nothing is estimated."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch


POWERCAP = Path("/sys/class/powercap")  # Linux; since 5.10 its energy_uj is readable to root alone by default
_JOULES_PER_KWH = 3.6e6


@dataclass
class _Counter:
    """Joules since whenever; what starts again from 0 does so after `span` of them."""

    kind: str
    read: Callable[[], float]
    span: float
    used: float = 0.0

    def __post_init__(self):
        self.last = self.read()

    def update(self) -> None:
        now = self.read()
        self.used += (now - self.last) % self.span
        self.last = now


class EnergyMeter:
    """What all counters that can be read have seen since it was made, whoever used it: it is the whole machine's.

    Call `update` at least every few minutes: the counter of a package of 200 W starts again after 20 of them.
    """

    def __init__(self, powercap: Path = POWERCAP):
        self._counters = [*_cpu_packages(powercap), *_gpus()]

    def update(self) -> None:
        for counter in self._counters:
            counter.update()

    def result(self) -> dict | None:
        """`kwh`, and which `counters` they are of; None if there are none."""
        kinds = [counter.kind for counter in self._counters]
        if not kinds:
            return None
        return {
            "kwh": sum(counter.used for counter in self._counters) / _JOULES_PER_KWH,
            "counters": " and ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)),
        }


def _cpu_packages(powercap: Path) -> Iterator[_Counter]:
    """https://docs.kernel.org/power/powercap/powercap.html; AMD's are called intel-rapl there too."""
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            if not (zone / "name").read_text().startswith("package"):
                continue  # a part of a package, or the platform that it is a part of
            span = float((zone / "max_energy_range_uj").read_text()) / 1e6
            yield _Counter("CPU (RAPL)", partial(_rapl_joules, zone), span)
        except OSError:  # not for this user to read
            continue


def _rapl_joules(zone: Path) -> float:
    return float((zone / "energy_uj").read_text()) / 1e6


def _nvml_joules(handle) -> float:
    import pynvml

    return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _gpus() -> Iterator[_Counter]:
    """From Volta on, where nvidia-ml-py is installed."""
    if not torch.cuda.is_available() or importlib.util.find_spec("pynvml") is None:
        return
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # CUDA without NVIDIA's driver library, as some containers have it
        return
    for index in range(torch.cuda.device_count()):
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
            yield _Counter("GPU (NVML)", partial(_nvml_joules, handle), float("inf"))
        except pynvml.NVMLError:  # an older one
            continue
