"""What a distillation takes, before there are weights: memory, disk and hours, from two configs and the hardware.

    hours of training   steps * (3 * student's FLOPs (4 with checkpoints) + live teacher's) / (rate * efficiency)
                        + steps * 40 bytes a parameter / rate of reading
    hours of a capture  rows * teacher's FLOPs / (rate * efficiency)

FLOPs are those of `models.cost`, a row being its prompt and all its targets at once. The 40 bytes are AdamW's: weight,
gradient and two moments are read, all but the gradient written; the gradient's norm is read, and it is scaled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ..models.cost import model_cost
from ..models.memory import forward_bytes, training_memory, weight_bytes
from .hardware import Efficiency, Hardware


USABLE = 0.9  # of a GPU's memory: the rest for its context, NCCL and fragments, as vLLM's gpu_memory_utilization
UPDATE_BYTES = 40  # a parameter and step, see above
SERVED_AT_ONCE = 8192  # tokens: max_num_batched_tokens of vLLM's server on GPUs of 70 GiB and more
# Of the bytes of a record, those that its Parquet file takes: caches of ours with top_k 32, docs/studies/plan/plan.md.
# The ids are stored as indices into a dictionary; the more rows in a shard, the less that adds.
PARQUET_SHARE = {"value": 0.76, "low": 0.74, "high": 0.83}


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be learnt, in tokens of the teacher.

    Attributes:
        tokens: targets of the data set.
        prompt_length, target_length: means over its rows.
        batch_size: rows on a device.
        passes: over the data set.
        checkpointing: `gradient_checkpointing` of the training.
    """

    tokens: int
    prompt_length: int = 512
    target_length: int = 128
    batch_size: int = 8
    passes: float = 1.0
    checkpointing: bool = False

    def __post_init__(self):
        least = {"tokens": 1, "prompt_length": 2, "target_length": 2, "batch_size": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)} leaves nothing to plan: give at least {value}")
        if not 0 < self.passes * self.tokens < math.inf:
            raise ValueError(f"passes={self.passes} leaves nothing to plan, or no end: give a number above 0")

    @property
    def rows(self) -> int:
        return math.ceil(self.tokens / self.target_length)


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to have the teacher's distributions.

    Attributes:
        name: `live`, `recorded` or `served`.
        devices: that one teacher takes.
        device_bytes: on each of them, at the peak; `live` has the student's beside it.
        fits: whether there is so much memory, and so many devices.
        capture: seconds of the record, 0 for `live`.
        training: seconds of the training.
    """

    name: str
    devices: int
    device_bytes: int
    fits: bool
    capture: dict[str, float]
    training: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.capture["value"] + self.training["value"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """
    Attributes:
        memory: bytes of the student on a device (`TrainingMemory.to_dict`) with the student whole on each (`ddp`)
            and, on several, in shards (`fsdp2`), from a record.
        sharding: which of the two the ways below take: `ddp` where it fits.
        batch_sizes: most rows on a device that fit, for either; 0 where none does.
        teacher_bytes: its weights.
        steps: of the optimizer.
        ways: to have the teacher.
        best: name of the quickest that fits, None if none does.
        disk: bytes of the record as Parquet (`value`, `low`, `high`), and of what `datasets` unpacks of it (`arrow`).
    """

    memory: dict[str, dict[str, int]]
    sharding: str
    batch_sizes: dict[str, int]
    teacher_bytes: int
    steps: int
    ways: list[Way]
    best: str | None
    disk: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def make_plan(
    teacher,
    student,
    work: Work,
    hardware: Hardware,
    devices: int,
    efficiency: Efficiency,
    record_bytes: int,
    teacher_dtype: str = "bfloat16",
) -> Plan:
    """
    Args:
        teacher, student: configs.
        devices: how many of `hardware`, for the teacher's capture and then for the training.
        record_bytes: of one target token.
        teacher_dtype: of `models.memory.WEIGHT_BYTES`.

    Raises:
        ValueError: a family whose cost cannot be counted, or fewer than one device.
    """
    if devices < 1:
        raise ValueError(f"{devices} devices leave nothing to plan for: give at least 1")
    usable = USABLE * hardware.memory - hardware.process

    def of_student(sharding: str, rows: int, signal: str = "recorded"):
        return training_memory(
            student,
            rows,
            work.prompt_length,
            work.target_length,
            teacher=signal,
            autocast=hardware.bf16,
            checkpointing=work.checkpointing,
            shards=devices if sharding == "fsdp2" else 1,
        )

    def most_rows(sharding: str) -> int:
        return _most_rows(lambda rows: of_student(sharding, rows).total, usable)

    shardings = ["ddp", "fsdp2"] if devices > 1 else ["ddp"]
    used = {name: of_student(name, work.batch_size) for name in shardings}
    sharding = next((name for name in shardings if used[name].total <= usable), shardings[-1])
    teacher_bytes = weight_bytes(teacher, teacher_dtype)
    lengths = (work.prompt_length, work.target_length)
    reading = forward_bytes(teacher, work.batch_size, *lengths)
    steps = math.ceil(work.passes * work.rows / (work.batch_size * devices))

    def training(live: bool) -> dict[str, float]:
        flops = step_flops(student, work, teacher if live else None)
        update = steps * UPDATE_BYTES * model_cost(student, *lengths).parameters["total"]
        return _at(efficiency, steps * flops / hardware.matrix_rate, update / hardware.read_rate)

    def capture(at_once: int, everywhere: bool) -> dict[str, float]:
        flops = work.rows * row_flops(teacher, *lengths, everywhere)
        return _at(efficiency, flops / (at_once * hardware.matrix_rate))

    beside = of_student(sharding, work.batch_size, "live").total + teacher_bytes + reading
    whole = teacher_bytes + reading
    tensor_parallel, served = served_bytes(teacher, work, hardware, teacher_bytes)
    replicas = max(devices // tensor_parallel, 1)
    trains = used[sharding].total <= usable
    recorded = training(live=False)
    ways = [
        Way("live", 1, beside, beside <= usable, dict.fromkeys(("value", "low", "high"), 0.0), training(live=True)),
        Way("recorded", 1, whole, whole <= usable and trains, capture(devices, False), recorded),
        Way(
            "served",
            tensor_parallel,
            served,
            tensor_parallel <= devices and served <= usable and trains,
            capture(replicas * tensor_parallel, True),
            recorded,
        ),
    ]
    fitting = [way for way in ways if way.fits]
    raw = float(work.tokens) * record_bytes + 16 * work.rows  # a row's key
    return Plan(
        memory={name: used[name].to_dict() for name in shardings},
        sharding=sharding,
        batch_sizes={name: most_rows(name) for name in shardings},
        teacher_bytes=teacher_bytes,
        steps=steps,
        ways=ways,
        best=min(fitting, key=lambda way: way.seconds).name if fitting else None,
        disk={**{name: share * raw for name, share in PARQUET_SHARE.items()}, "arrow": raw},
    )


def row_flops(config, prompt_length: int, target_length: int, logits_everywhere: bool = False) -> float:
    """Of a forward pass over a row: prompt and targets, with logits at the targets or, as in a server, everywhere."""
    cost = model_cost(config, prompt_length, target_length)
    flops = cost.first_token_flops + (target_length - 1) * cost.flops_per_token
    return flops + logits_everywhere * 2 * prompt_length * cost.parameters["embedding"]


def step_flops(student, work: Work, teacher=None) -> float:
    """Of a training step on one device: a backward pass is two forward ones, and checkpoints run another; a live
    teacher runs once."""
    lengths = (work.prompt_length, work.target_length)
    a_row = (4 if work.checkpointing else 3) * row_flops(student, *lengths)
    return work.batch_size * (a_row + (row_flops(teacher, *lengths) if teacher is not None else 0))


def served_bytes(teacher, work: Work, hardware: Hardware, weights: int) -> tuple[int, int]:
    """Over how many GPUs tensor parallelism has to spread a teacher, and bytes on each.

    These are the weights, keys and values of the tokens that are read at once and their states, each in as many parts,
    and the logits of a row with their logarithms.

    The number divides the query heads, as vLLM asks; it is the largest such power of two if even that is too few.
    """
    cost = model_cost(teacher, SERVED_AT_ONCE, 2)
    states = forward_bytes(teacher, 1, SERVED_AT_ONCE - 1, 1)
    logits = 6 * (work.prompt_length + work.target_length) * teacher.vocab_size
    number = 1
    while True:
        each = math.ceil((weights + cost.kv_cache_bytes + states) / number) + logits
        if each <= USABLE * hardware.memory - hardware.process or teacher.num_attention_heads % (2 * number):
            return number, each
        number *= 2


def _at(efficiency: Efficiency, seconds_at_peak: float, others: float = 0.0) -> dict[str, float]:
    """Seconds at the expected efficiency (`value`), at the largest (`low`) and at the least (`high`)."""
    shares = {"value": efficiency.value, "low": efficiency.high, "high": efficiency.low}
    return {name: seconds_at_peak / share + others for name, share in shares.items()}


def _most_rows(total: Callable[[int], int], usable: float) -> int:
    """The most rows whose `total` bytes are `usable`, 0 if not even one's are."""
    least, most = 0, 1
    while total(most) <= usable:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if total(middle) <= usable else (least, middle)
    return least
