"""Plan a distillation before there are weights: memory, disk and hours, counted from two configs and the hardware.

It says whether the teacher fits beside the student, has to be recorded (`cache`), or has to be served over several
GPUs; how large the record becomes; and how long capture and training take. Nothing is loaded or trained. What is
assumed is listed with the result.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._display import say_result, table, wrap
from ._inputs import BUILT_IN, check_at_least_one, public_name, refuse_of_other_kinds, teacher_path


if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..bench.hardware import Efficiency, Hardware
    from ..bench.plan import Plan, Work

SUMMARY = "memory, disk and hours of a distillation"
EXAMPLE = "hf-encdec-distill plan --teacher 70b --student 1b --tokens 1B --gpus 8"

# As the tables of bench.hardware and models.memory have them, which take seconds to import.
_DEVICES = ("b200", "h200", "h100", "a100", "a100-40gb", "l40s", "l4", "rtx-4090", "rtx-3090", "mi300x", "cpu")
_DTYPES = ("float32", "bfloat16", "float16", "8bit", "4bit")
_PARTS = {
    "weights": "weights, float32",
    "gradients": "gradients, float32",
    "optimizer": "AdamW's moments, float32",
    "copies": "bf16 copies, or gathered layers",
    "activations": "activations",
    "logits": "logits",
    "total": "student",
}
_WAYS = {
    "live": "live",
    "recorded": "recorded",
    "served": "served, recorded",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sized = "or a size such as {}, for which a published shape is taken"
    parser.add_argument(
        "--teacher", required=True, metavar="MODEL", help=f"folder, Hub id, {BUILT_IN!r}, {sized.format('70b')}"
    )
    parser.add_argument(
        "--student",
        required=True,
        metavar="MODEL",
        help=f"student, or decoder-only model: folder, Hub id, {BUILT_IN!r}, {sized.format('1b')}",
    )
    parser.add_argument("--tokens", required=True, metavar="N", help="target tokens of the data set, such as 1B")
    parser.add_argument(
        "--encoder-layers", type=int, metavar="N", help="make the student from a decoder-only model, as `init` does"
    )
    parser.add_argument("--decoder-layers", type=int, metavar="N", help="likewise (default of a size: half of them)")
    lengths = parser.add_argument_group("data and training")
    for name, default, metavar, text in (
        ("prompt-length", 512, "TOKENS", "mean prompt tokens per row"),
        ("target-length", 128, "TOKENS", "mean target tokens per row"),
        ("batch-size", 8, "ROWS", "rows per device and step"),
    ):
        lengths.add_argument(
            f"--{name}", type=int, default=default, metavar=metavar, help=f"{text} (default: {default})"
        )
    lengths.add_argument(
        "--passes", type=float, default=1.0, metavar="N", help="passes over the data set (default: 1)"
    )
    lengths.add_argument("--gradient-checkpointing", action="store_true", help="compute activations twice, keep few")
    lengths.add_argument(
        "--kind", choices=("top_k", "sampled", "dense"), default="top_k", help="kind of record (default: top_k)"
    )
    lengths.add_argument("--k", type=int, default=32, metavar="N", help="tokens that top_k keeps (default: 32)")
    lengths.add_argument("--rounds", type=int, default=50, metavar="N", help="tokens that sampled draws (default: 50)")
    hardware = parser.add_argument_group("hardware")
    hardware.add_argument(
        "--device",
        choices=_DEVICES,
        default="h100",
        metavar="NAME",
        help=f"{', '.join(_DEVICES[:-1])}, or cpu for this machine (default: h100)",
    )
    hardware.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs (default: 1)")
    hardware.add_argument(
        "--teacher-dtype",
        choices=_DTYPES,
        default="bfloat16",
        metavar="NAME",
        help=f"dtype of the teacher's weights: {', '.join(_DTYPES)} (default: bfloat16)",
    )
    hardware.add_argument(
        "--efficiency",
        type=float,
        metavar="SHARE",
        help="share of the peak rate that training and capture reach (default: 0.3 on GPUs, which is assumed, and "
        "the measured one on CPUs)",
    )


def run(args: argparse.Namespace) -> None:
    from ..bench.hardware import GPUS, OF_CPUS, OF_GPUS, Efficiency, this_cpu
    from ..bench.latency import machine_description
    from ..bench.plan import Work, make_plan
    from ..distillation.teachers.recorded import record_bytes
    from ..models.sizes import count

    check_at_least_one(args, "k", "rounds")
    refuse_of_other_kinds(args)
    tokens = count(args.tokens)
    if not tokens:
        raise ValueError(f"--tokens {args.tokens}: give a number of target tokens, such as 1B, 300M or 2000000")
    on_cpu = args.device == "cpu"
    if on_cpu and args.gpus != 1:
        raise ValueError(f"--gpus {args.gpus} with --device cpu: a CPU is planned for by itself, leave --gpus out")
    teacher, teacher_name = _teacher(args.teacher)
    student, student_name = _student(args, teacher)
    work = Work(
        tokens, args.prompt_length, args.target_length, args.batch_size, args.passes, args.gradient_checkpointing
    )
    efficiency = OF_CPUS if on_cpu else OF_GPUS
    if args.efficiency is not None:
        efficiency = Efficiency(args.efficiency, args.efficiency, args.efficiency, "given with --efficiency")
    hardware = this_cpu(machine_description()["usable_cores"] or 1) if on_cpu else GPUS[args.device]
    kept = record_bytes(args.kind, min(args.k, teacher.vocab_size), args.rounds, teacher.vocab_size)
    plan = make_plan(teacher, student, work, hardware, args.gpus, efficiency, kept, args.teacher_dtype)
    names = {"teacher": teacher_name, "student": student_name}
    assumptions = _assumptions(args, work, efficiency)
    content = {
        "models": names,
        "parameters": {"teacher": _parameters(teacher), "student": _parameters(student)},
        "work": dataclasses.asdict(work),
        "hardware": {**dataclasses.asdict(hardware), "devices": args.gpus},
        "efficiency": dataclasses.asdict(efficiency),
        "record_bytes": kept,
        **plan.to_dict(),
        "assumptions": assumptions,
    }
    say_result(args, content, _page(args, content, plan, hardware, assumptions))


def _teacher(asked: str) -> tuple[PretrainedConfig, str]:
    """Its config and what to call it."""
    from ..models.loading import base_of, load_config
    from ..models.sizes import count, typical_config

    size = None if Path(asked).exists() else count(asked)
    if size is None:
        return load_config(base_of(teacher_path(asked))), public_name(asked)
    shape, config = typical_config(size)
    return config, f"the shape of {shape}"


def _student(args: argparse.Namespace, teacher: PretrainedConfig) -> tuple[PretrainedConfig, str]:
    """Its config and what to call it: a model as it is, or one of its layers as `init` would take them."""
    from ..models.sizes import count, split_config

    is_size = not Path(args.student).exists() and count(args.student) is not None
    config, name = _teacher(args.student)
    asked = {"encoder": args.encoder_layers, "decoder": args.decoder_layers}
    if config.model_type == "rope_encdec":
        if asked != {"encoder": None, "decoder": None}:
            raise ValueError(
                f"--student {args.student} is an encoder-decoder, whose layers are known: leave --encoder-layers and "
                "--decoder-layers out"
            )
        return config, name
    if is_size:  # it learns by the teacher's ids
        config.vocab_size = teacher.vocab_size
    elif asked == {"encoder": None, "decoder": None}:
        return config, f"{name}, decoder-only"
    half = max(config.num_hidden_layers // 2, 1) if is_size else config.num_hidden_layers
    layers = [half if number is None else number for number in asked.values()]
    return split_config(config, *layers), f"{layers[0]} + {layers[1]} layers of {name}, merged"


def _parameters(config: PretrainedConfig) -> int:
    from ..models.cost import model_cost

    return model_cost(config, 2, 2).parameters["total"]


def _assumptions(args: argparse.Namespace, work: Work, efficiency: Efficiency) -> list[str]:
    low_high = "" if efficiency.low == efficiency.high else f" ({efficiency.low:g} to {efficiency.high:g})"
    lines = [
        f"efficiency {efficiency.value:g}{low_high} of the peak rate: {efficiency.source}.",
        f"Rows have {work.prompt_length} + {work.target_length} tokens without padding, which is nearly so with "
        "--max-tokens-per-batch.",
        "The student trains all its weights with AdamW: float32 weights, "
        f"{'bf16 autocast' if args.device != 'cpu' else 'bf16 autocast where the CPU has a unit for it'}, forward KL, "
        "no gradient accumulation, no on-policy steps.",
        "The record takes 0.74 to 0.83 of its bytes as Parquet, as measured with top_k 32; `datasets` unpacks it once "
        "more where it trains.",
    ]
    if args.device != "cpu":
        lines += [
            "Peak rates and memory are the vendor's, and a tenth of the memory stays free. Communication between "
            "GPUs, starting up, reading data, evaluation and checkpoints take no time of their own.",
            "Nothing of this has been measured on a GPU, and FSDP2's memory nowhere: on CPUs, see What has been "
            "measured.",
            "A served teacher gives logits at every prompt token, reads 8,192 tokens at once and takes 0.9 of a GPU, "
            "as vLLM does unless told otherwise.",
        ]
    if args.kind == "sampled":
        lines.append("No token is drawn twice: the record is at most so large.")
    if args.kind == "dense":
        lines.append("The share of Parquet has not been measured for a dense record.")
    return lines


def _page(
    args: argparse.Namespace, content: dict[str, Any], plan: Plan, hardware: Hardware, assumptions: list[str]
) -> str:
    work = content["work"]
    devices = f"{args.gpus} x {hardware.name}" if args.device != "cpu" else hardware.name
    count = content["parameters"]
    blocks = [
        wrap(
            f"{work['tokens']:,} target tokens in rows of {work['prompt_length']} + {work['target_length']}, "
            f"passes: {work['passes']:g}, {work['batch_size']} rows on each device: {plan.steps:,} steps on {devices}."
        ),
        "\n".join(
            wrap(f"{side}  {content['models'][side]}: {_count(count[side])} parameters{suffix}", 9)
            for side, suffix in (("teacher", f", {args.teacher_dtype}"), ("student", ""))
        ),
    ]
    names = {"ddp": "whole" if args.gpus == 1 else "whole (DDP)", "fsdp2": "in shards (FSDP2)"}
    body = [
        [title, *(f"{part[key] / 1e9:.3g}" for part in plan.memory.values())]
        for key, title in _PARTS.items()
        if any(part[key] for part in plan.memory.values())
    ]
    if hardware.process:
        body.append(["the process without it", f"{hardware.process / 1e9:.3g}"])
    body.append(["most rows that fit", *(str(rows) for rows in plan.batch_sizes.values())])
    blocks.append(table(["GB on a device, training", *(names[name] for name in plan.memory)], body))
    header = ["teacher", "GPUs", "GB each", "fits", "capture, h", "training, h", "both"]
    blocks.append(
        table(
            header,
            [
                [
                    _WAYS[way.name],
                    str(way.devices),
                    f"{way.device_bytes / 1e9:.3g}",
                    "yes" if way.fits else "no",
                    _hours(way.capture),
                    _hours(way.training),
                    f"{way.seconds / 3600:.3g}",
                ]
                for way in plan.ways
                if args.device != "cpu" or way.name != "served"
            ],
        )
    )
    disk = plan.disk
    blocks.append(
        wrap(
            f"record: {_size(disk['value'])} ({_size(disk['low'])} to {_size(disk['high'])}) of Parquet, "
            f"{content['record_bytes']} bytes a target before that; {_size(disk['arrow'])} more where a student "
            "trains on it."
        )
    )
    blocks.append(wrap(_advice(args, plan)))
    blocks.append("Assumed:\n" + "\n".join(wrap(f"- {line}", 2) for line in assumptions))
    return "\n\n".join(blocks)


def _advice(args: argparse.Namespace, plan: Plan) -> str:
    way = next((way for way in plan.ways if way.name == plan.best), None)
    if way is None:
        if not plan.batch_sizes[plan.sharding]:
            return (
                "Not even one row of the student fits on a device: take more or larger devices, "
                "--gradient-checkpointing, or a smaller student."
            )
        if plan.memory[plan.sharding]["total"] and max(plan.batch_sizes.values()) < args.batch_size:
            return (
                f"The student's batch does not fit: --batch-size {max(plan.batch_sizes.values())} does, and "
                "--gradient-checkpointing makes room for more."
            )
        return (
            f"The teacher does not fit: it would be served over {plan.ways[-1].devices} devices. Take more or larger "
            "ones, --teacher-dtype 8bit or 4bit, or a teacher that somebody else serves."
        )
    sharded = " The student is sharded with FSDP2." if plan.sharding == "fsdp2" else ""
    hours = f"{way.seconds / 3600:.3g} hours in all."
    if way.name == "live":
        return f"Quickest: train with a live teacher, {hours}{sharded}"
    if way.name == "recorded":
        return f"Quickest: record the teacher on each device with `cache`, then train without it, {hours}{sharded}"
    replicas = args.gpus // way.devices
    return (
        f"Quickest: serve the teacher over {way.devices} GPUs ({replicas} such server(s)), record it with "
        f"`cache --server`, then train without it, {hours}{sharded}"
    )


def _hours(seconds: dict[str, float]) -> str:
    if not seconds["value"]:
        return ""
    value, low, high = (f"{seconds[name] / 3600:.3g}" for name in ("value", "low", "high"))
    return value if low == high else f"{value} ({low} to {high})"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _size(count: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.3g} kB"
