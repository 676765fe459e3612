"""The memory, time and disk that `plan` foretells, against runs: some made here, some that are in docs/studies.

    python studies/plan_against_runs.py --work runs/studies

A run made here is a process of its own on one thread, forked from one that has imported everything: some steps of
`DistillationTrainer` on rows of one length, with models of SmolLM2-135M's width and random weights (neither memory nor
time depends on them); or a capture of the built-in teacher on Python source. Time is CPU time, of the steps after the
first two, since other work may share the cores; the rates of matrix products and of reading are measured in the same
process, before and after. Memory is the peak of the process; what it takes with everything imported and no model yet
is measured too, and added to what is foretold.

A time is foretold with the median efficiency of the *other* runs of its group, so that no run is held against itself:
this is what `plan --efficiency` does for somebody who has timed one run on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import shutil
import statistics
import sysconfig
import time
from pathlib import Path

from hf_encdec_distill.bench import worker
from hf_encdec_distill.bench.hardware import PROCESS_BYTES
from hf_encdec_distill.bench.plan import PARQUET_SHARE, UPDATE_BYTES, Work, row_flops, step_flops
from hf_encdec_distill.files import write_json
from hf_encdec_distill.models.cost import model_cost
from hf_encdec_distill.models.memory import LOGIT_BYTES, forward_bytes, training_memory, weight_bytes
from hf_encdec_distill.models.sizes import split_config, typical_config


STEPS, SKIPPED = 5, 2
GOAL = 0.15


@dataclasses.dataclass(frozen=True)
class Run:
    """A student's layers (a decoder alone: decoder-only), its vocabulary, and rows of `batch` x (prompt + target)."""

    encoder: int | None
    decoder: int
    vocabulary: int
    batch: int
    prompt: int
    target: int
    live: bool = False
    bf16: bool = True
    checkpointing: bool = False


RUNS = {
    "5 + 6, recorded": Run(5, 6, 16_000, 8, 128, 16),
    "20 + 10, recorded": Run(20, 10, 49_152, 8, 248, 24),
    "20 + 10, live": Run(20, 10, 49_152, 8, 248, 24, live=True),
    "5 + 6, recorded, long targets": Run(5, 6, 49_152, 8, 256, 128),
    "5 + 6, live, long targets": Run(5, 6, 49_152, 8, 256, 128, live=True),
    "20 + 10, recorded, checkpoints": Run(20, 10, 49_152, 4, 512, 64, checkpointing=True),
    "decoder-only 12, recorded": Run(None, 12, 49_152, 8, 248, 24),
    "5 + 6, recorded, float32": Run(5, 6, 49_152, 8, 128, 16, bf16=False),
    "20 + 10, recorded, float32": Run(20, 10, 49_152, 4, 248, 24, bf16=False),
    "5 + 6, live, float32": Run(5, 6, 49_152, 8, 128, 16, live=True, bf16=False),
}
CAPTURES = {"capture, 128 rows": (128, 96, 64)}  # rows, prompt, target
# Runs that are in docs/, each group on one machine and thread count. The rate of bfloat16 products is that of
# docs/measured.md (0.2 TFLOP/s for each AMD core), that of reading the least that `Budget` names.
CORE, READ = 0.2e12, 20e9
COST = Run(20, 10, 49_152, 8, 252, 24)  # prompts of 200 to 256 tokens: of 8, the longest is taken for all
HEAL = Run(None, 4, 49_152, 8, 75, 20)  # mean over batches of the longest row, 95 tokens, and target of 8
TWO_HOURS = Run(11, 4, 49_152, 8, 127, 13)  # rows of one length; means of docs/measured.md
COMMITTED = {
    "study of cost": {
        "cross-entropy alone": COST,
        "cache, top 32": COST,
        "live teacher": dataclasses.replace(COST, live=True),
    },
    "two-hour quickstart": {
        "adapt the teacher to the task": dataclasses.replace(TWO_HOURS, encoder=None, decoder=30),
        "train the student on the teacher": dataclasses.replace(TWO_HOURS, live=True),
        "train its twin on the labels alone": TWO_HOURS,
    },
    "study of splits": {
        "only_4": HEAL,
        "only_6": dataclasses.replace(HEAL, decoder=6),
        "only_8": dataclasses.replace(HEAL, decoder=8),
    },
}
CORES = {"study of cost": 1, "two-hour quickstart": 2, "study of splits": 1}
_LOADED = dataclasses.replace(COST, live=True)
PROCESS = PROCESS_BYTES  # of the study of cost, which did not measure it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/studies"), help="for caches")
    parser.add_argument("--output", type=Path, default=Path("docs/studies/plan"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--runs", nargs="*", choices=[*RUNS, *CAPTURES], default=[*RUNS, *CAPTURES], help="none: report alone"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "plan.json"
    taken = _read(file) if file.exists() else {}
    if args.runs:
        import hf_encdec_distill.distillation.trainer  # noqa: F401  # before processes are forked, so that all have it

    for number in range(args.rounds):
        for name in args.runs:
            if len(taken.setdefault(name, [])) > number:
                continue
            if name in RUNS:
                apart(record, name, args.work)
            taken[name].append(apart(measure if name in RUNS else measure_capture, name, args.work))
            print(number, name, taken[name][-1], flush=True)
            write_json(file, taken)
    (args.output / "plan.md").write_text(report(taken, Path(__file__).parents[1] / "docs"), encoding="utf-8")


# --- runs ---


def apart(function, *args):
    """What the function returns in a process of its own, which is told nothing but what this one has imported."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args)


def configs(run: Run):
    """Of teacher and student: SmolLM2-135M, and its layers with the run's vocabulary."""
    _, teacher = typical_config(135_000_000)
    teacher.vocab_size = run.vocabulary
    if run.encoder is not None:
        return teacher, split_config(teacher, run.encoder, run.decoder)
    _, student = typical_config(135_000_000)
    student.vocab_size, student.num_hidden_layers = run.vocabulary, run.decoder
    return teacher, student


def record(name: str, work: Path) -> None:
    """The cache of a run that needs one, where it is not there yet."""
    import torch

    from hf_encdec_distill.distillation import LiveTeacher, capture

    run, folder = RUNS[name], _folder(name, work)
    if run.live or folder.exists():
        return
    torch.set_num_threads(1)
    _, student = configs(run)
    start = student.decoder_start_token_id if run.encoder is not None else None
    capture(LiveTeacher(_teacher(run)), _random_rows(run), folder, progress=False, start_token_id=start)


def _folder(name: str, work: Path) -> Path:
    return work / "plan" / name.replace(" ", "-")


def _teacher(run: Run):
    import torch
    from transformers import AutoModelForCausalLM

    config, _ = configs(run)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if run.bf16 else torch.float32)


def measure(name: str, work: Path) -> dict:
    """CPU seconds of a step, peak memory of the process, what it took before there were models, and rates."""
    import torch
    from transformers import AutoModelForCausalLM, TrainerCallback

    from hf_encdec_distill import (
        DistillationTrainer,
        DistillationTrainingArguments,
        RopeEncDecForConditionalGeneration,
    )

    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = RUNS[name]
    process = worker.memory()["peak"]
    rates = [_rates()]
    _, student_config = configs(run)
    rows = _random_rows(run)
    teacher = str(_folder(name, work)) if not run.live else _teacher(run)
    if run.encoder is None:
        student = AutoModelForCausalLM.from_config(student_config, dtype=torch.float32)
    else:
        student = RopeEncDecForConditionalGeneration(student_config)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_args, **_kwargs):
            ends.append(time.process_time())

    trainer = DistillationTrainer(
        student,
        DistillationTrainingArguments(
            str(work / "plan" / "training"),
            max_steps=STEPS,
            per_device_train_batch_size=run.batch,
            bf16=run.bf16,
            use_cpu=True,
            gradient_checkpointing=run.checkpointing,
            optim="adamw_torch_fused",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        data_collator=_stack,
        train_dataset=rows,
        teacher=teacher,
    )
    trainer.add_callback(Clock())
    trainer.train()
    peak = worker.memory()["peak"]
    rates.append(_rates())
    seconds = [end - start for start, end in zip(ends, ends[1:])][SKIPPED - 1 :]
    return {
        "seconds": statistics.median(seconds),
        "peak": peak,
        "process": process,
        "rates": {kind: max(each[kind] for each in rates) for kind in rates[0]},
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        **_machine(),
    }


def measure_capture(name: str, work: Path) -> dict:
    """CPU seconds and bytes on disk of a record of the built-in teacher, and what `measure` has of the process."""
    import torch
    from transformers import AutoTokenizer

    from hf_encdec_distill.data import fetch_builtin_teacher
    from hf_encdec_distill.distillation import LiveTeacher, capture
    from hf_encdec_distill.distillation.teachers.recorded import size_on_disk

    torch.set_num_threads(1)
    number, prompt, target = CAPTURES[name]
    process = worker.memory()["peak"]
    rates = [_rates()]
    path = fetch_builtin_teacher()
    ids = AutoTokenizer.from_pretrained(path)(_python_source(), verbose=False)["input_ids"]
    length = prompt + target
    assert len(ids) >= number * length, "the standard library's source is too short"
    rows = []
    for first in range(0, number * length, length):
        row = ids[first : first + length]
        rows.append({"input_ids": row[:prompt], "attention_mask": [1] * prompt, "labels": row[prompt:]})
    teacher = LiveTeacher.load(path, "bfloat16")
    folder = work / "plan" / name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    capture(teacher, rows, folder, k=32, progress=False)
    seconds = time.process_time() - start
    peak = worker.memory()["peak"]
    rates.append(_rates())
    return {
        "seconds": seconds,
        "peak": peak,
        "process": process,
        "rates": {kind: max(each[kind] for each in rates) for kind in rates[0]},
        "bytes": size_on_disk(folder),
        **_machine(),
    }


def _random_rows(run: Run):
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    prompt = run.prompt - (run.encoder is not None)  # a merged student's teacher reads its start token beside these

    def ids(length: int) -> list[int]:
        return torch.randint(3, run.vocabulary, (length,), generator=generator).tolist()

    rows = [
        {"input_ids": ids(prompt), "attention_mask": [1] * prompt, "labels": ids(run.target)}
        for _ in range(2 * run.batch)
    ]
    return Dataset.from_list(rows)


def _stack(rows: list[dict]) -> dict:
    import torch

    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def _python_source() -> str:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files[:40])


def _rates() -> dict[str, float]:
    """As `bench.floors.measure_rates`, of one thread and in CPU time, since other work may share its core."""
    import torch

    def best(run, work: float) -> float:
        taken = []
        for _ in range(8):
            start = time.process_time()
            run()
            taken.append(time.process_time() - start)
        return work / min(taken)

    memory, size = torch.ones(2**26), 2048
    matrices = {kind: torch.ones(size, size, dtype=kind) for kind in (torch.float32, torch.bfloat16)}
    products = {
        str(kind).removeprefix("torch."): best(lambda one=one: one @ one, 2.0 * size**3)
        for kind, one in matrices.items()
    }
    return {"read": best(memory.sum, 4.0 * len(memory)), **products}


def _machine() -> dict:
    from hf_encdec_distill.bench import machine_description

    machine = machine_description()
    return {name: machine[name] for name in ("cpu", "bf16_unit", "torch", "transformers")}


# --- what is foretold ---


def foretold_memory(run: Run, process: float) -> float:
    """Bytes of the process at its peak."""
    teacher, student = configs(run)
    signal = "live" if run.live else "recorded"
    memory = training_memory(
        student,
        run.batch,
        run.prompt,
        run.target,
        teacher=signal,
        autocast=run.bf16,
        checkpointing=run.checkpointing,
    )
    beside = 0
    if run.live:
        beside = weight_bytes(teacher, "bfloat16" if run.bf16 else "float32")
        beside += forward_bytes(teacher, run.batch, run.prompt, run.target)
    return process + memory.total + beside


def step_parts(run: Run) -> tuple[float, float]:
    """FLOPs and bytes of the update of a step."""
    teacher, student = configs(run)
    work = Work(run.batch * run.target, run.prompt, run.target, run.batch, checkpointing=run.checkpointing)
    flops = step_flops(student, work, teacher if run.live else None)
    return flops, UPDATE_BYTES * model_cost(student, run.prompt, run.target).parameters["total"]


def efficiency(run: Run, seconds: float, matrix_rate: float, read_rate: float) -> float:
    """Counted FLOPs over those of the rate, in the time that the update leaves."""
    flops, update = step_parts(run)
    return flops / matrix_rate / (seconds - update / read_rate)


def committed_seconds(docs: Path) -> dict[str, dict[str, float]]:
    """Of a step of each run in `COMMITTED`."""
    cost = _read(docs / "studies" / "cost" / "cost.json")
    stages = _read(docs / "runs" / "quickstart-120-minutes" / "metrics.json")["stages"]
    splits = _read(docs / "studies" / "heal" / "docstrings-4.json")
    cpu_seconds = 60 * splits["setting"]["cpu_minutes"]
    arms = {name: [run["steps"] for run in splits["arms"][name].values()] for name in COMMITTED["study of splits"]}
    return {
        "study of cost": {
            name: statistics.median(run["seconds"] for run in cost[name]) for name in COMMITTED["study of cost"]
        },
        "two-hour quickstart": {
            stage["name"]: stage["seconds"] / stage["steps"]
            for stage in stages
            if stage["name"] in COMMITTED["two-hour quickstart"]
        },
        "study of splits": {name: cpu_seconds / statistics.mean(steps) for name, steps in arms.items()},
    }


def foretold_loss(targets: int, chunk: int, hidden: int = 576, vocabulary: int = 49_152) -> float:
    """Bytes beyond the inputs of `studies/chunked_loss.py`: with chunks the head's gradient is there at the peak, too,
    without them its bfloat16 copy alone."""
    head = hidden * vocabulary
    return LOGIT_BYTES["live"] * chunk * vocabulary + (11 if chunk < targets else 2) * head


def _read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


# --- the report ---


class Check:
    """Gathers how far what is foretold is off."""

    def __init__(self):
        self.offs: list[tuple[str, float]] = []

    def row(self, what: str, measured: float, foretold: float, unit: float = 1.0) -> list[str]:
        off = foretold / measured - 1
        self.offs.append((what, off))
        return [f"{measured / unit:.3g}", f"{foretold / unit:.3g}", f"{100 * off:+.0f} %"]

    def summary(self) -> str:
        misses = [f"{what} ({100 * off:+.0f} %)" for what, off in self.offs if abs(off) > GOAL]
        text = f"{len(self.offs) - len(misses)} of {len(self.offs)} numbers are within {100 * GOAL:.0f} %."
        return f"{text} Those that are not: {'; '.join(misses)}." if misses else text


def report(taken: dict[str, list[dict]], docs: Path) -> str:
    """Markdown: each number that was measured, what is foretold of it, and how far off that is."""
    here = {name: runs[-1] for name, runs in taken.items() if runs}
    check = Check()
    tables = [times(here, docs, check), memories(here, docs, check), losses(docs), records(here, check)]
    lines = ["# Plans against runs", "", check.summary()]
    if here:
        machine = next(iter(here.values()))
        lines[1:1] = [
            "",
            f"`python studies/plan_against_runs.py`; runs made here on one thread of an {machine['cpu']} "
            f"({machine['bf16_unit']}), torch {machine['torch']}, transformers {machine['transformers']}, with other "
            "work on the machine.",
        ]
    return "\n".join([*lines, *(line for table in tables for line in table)]) + "\n"


def times(here: dict[str, dict], docs: Path, check: Check) -> list[str]:
    """Each with the median efficiency of the others of its group."""
    groups: dict[str, dict[str, tuple[Run, float, float, float]]] = {}
    for group, seconds in committed_seconds(docs).items():
        rate = CORES[group] * CORE
        groups[group] = {name: (COMMITTED[group][name], seconds[name], rate, READ) for name in COMMITTED[group]}
    for name, measured in here.items():
        if name in RUNS:
            kind = "bfloat16" if RUNS[name].bf16 else "float32"
            rates = measured["rates"]
            group = groups.setdefault(f"made here, {kind}", {})
            group[name] = (RUNS[name], measured["seconds"], rates[kind], rates["read"])
    rows = []
    for group, runs in groups.items():
        shares = {name: efficiency(*run) for name, run in runs.items()}
        for name, (run, seconds, rate, read) in runs.items():
            others = [share for other, share in shares.items() if other != name]
            if others:
                flops, update = step_parts(run)
                foretold = flops / rate / statistics.median(others) + update / read
                cells = check.row(f"time of {group}, {name}", seconds, foretold)
                rows.append([group, name, f"{flops / 1e12:.2f}", f"{shares[name]:.2f}", *cells])
    title = "Seconds of a step, foretold with the efficiency of the others of the same group"
    return _table(title, ["group", "run", "TFLOP", "efficiency", "measured", "foretold", "off"], rows)


def memories(here: dict[str, dict], docs: Path, check: Check) -> list[str]:
    cost = _read(docs / "studies" / "cost" / "cost.json")
    runs = [
        (f"study of cost, {name}", run, PROCESS, statistics.median(each["peak_mb"] for each in cost[name]) * 1e6)
        # Where it is not asked, the teacher was loaded all the same.
        for name, run in {**COMMITTED["study of cost"], "cross-entropy alone": _LOADED}.items()
    ]
    runs += [
        (name, RUNS[name], measured["process"], measured["peak"]) for name, measured in here.items() if name in RUNS
    ]
    rows = [
        [name, f"{run.batch} x ({run.prompt} + {run.target})", f"{process / 1e9:.2f}"]
        + check.row(f"memory of {name}", peak, foretold_memory(run, process), 1e9)
        for name, run, process, peak in runs
    ]
    header = ["run", "rows", "of these before there are models", "measured", "foretold", "off"]
    return _table("GB of the process at its peak", header, rows)


def losses(docs: Path) -> list[str]:
    """Where the bytes of a logit are from; what was fitted is no check."""
    rows, fitted = [], Check()
    for name, runs in _read(docs / "studies" / "chunked_loss" / "chunked_loss.json").items():
        divergence, targets, chunk = name.split()
        if divergence == "forward_kl" and int(targets) > 128:
            measured = statistics.median(run["gb"] for run in runs)
            foretold = foretold_loss(int(targets), int(chunk)) / 1e9
            rows.append([targets, "all" if targets == chunk else chunk])
            rows[-1] += fitted.row(f"loss at {targets} targets in chunks of {chunk}", measured, foretold)
    return _table(
        "GB of the loss, forward KL, to which the bytes of a logit are fitted",
        ["targets", "chunk", "measured", "fitted", "off"],
        rows,
    )


def records(here: dict[str, dict], check: Check) -> list[str]:
    rows = []
    for name, (number, prompt, target) in CAPTURES.items():
        if name in here:
            measured, config = here[name], configs(COST)[0]
            share = number * row_flops(config, prompt, target) / measured["rates"]["bfloat16"] / measured["seconds"]
            foretold = PARQUET_SHARE["value"] * (32 * 8 + 4 + 16 / target)
            rows.append([name, str(number * target), f"{measured['seconds']:.1f}", f"{share:.2f}"])
            rows[-1] += check.row(f"disk of {name}", measured["bytes"] / (number * target), foretold)
    header = ["record, top_k 32", "targets", "CPU s", "efficiency", "measured", "foretold", "off"]
    return _table("Bytes of a target on disk", header, rows)


def _table(title: str, header: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    lines = [header, ["---"] * len(header), *rows]
    return ["", f"## {title}", "", *(f"| {' | '.join(line)} |" for line in lines)]


if __name__ == "__main__":
    main()
