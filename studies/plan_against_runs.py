"""The memory, time and disk that `plan` foretells, against runs: some made here, some that are in docs/studies.

    python studies/plan_against_runs.py --work runs/studies

A run made here is a process of its own on one thread, forked from one that has imported everything: some steps of
`DistillationTrainer` on rows of one length, with models of SmolLM2-135M's width and random weights (neither memory nor
time depends on them); or a capture of the built-in teacher on Python source. Time is CPU time, of the steps after the
first two, since other work may share the cores; the rates of matrix products and of reading are measured in the same
process, before and after. Memory is the peak of the process; what it takes with everything imported and no model yet
is measured too, and added to what is foretold.

A time is foretold with the efficiency that the *other* runs of the same precision had (their median), so that no run
is held against itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import resource
import shutil
import statistics
import sysconfig
import time
from pathlib import Path

import torch
from datasets import Dataset
from tasks import taken_before
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_encdec_distill import DistillationTrainer, DistillationTrainingArguments, RopeEncDecForConditionalGeneration
from hf_encdec_distill.bench import machine_description, model_cost
from hf_encdec_distill.bench.plan import PARQUET_SHARE, UPDATE_BYTES, Work, row_flops, step_flops
from hf_encdec_distill.data import fetch_builtin_teacher
from hf_encdec_distill.distillation import LiveTeacher, capture
from hf_encdec_distill.distillation.teachers.recorded import record_bytes, size_on_disk
from hf_encdec_distill.files import write_json
from hf_encdec_distill.models.loading import load_config
from hf_encdec_distill.models.memory import forward_bytes, training_memory, weight_bytes
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
# docs/studies/cost/cost.json: rows of 200 to 256 prompt tokens in batches of 8, whose longest is taken for all.
COMMITTED = {
    "cross-entropy alone": Run(20, 10, 49_152, 8, 252, 24),
    "cache, top 32": Run(20, 10, 49_152, 8, 252, 24),
    "live teacher": Run(20, 10, 49_152, 8, 252, 24, live=True),
}
COMMITTED_PROCESS = 0.7e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/studies"), help="for caches")
    parser.add_argument("--output", type=Path, default=Path("docs/studies/plan"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--runs", nargs="+", choices=[*RUNS, *CAPTURES], default=[*RUNS, *CAPTURES])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "plan.json"
    taken = taken_before(file, [*RUNS, *CAPTURES])
    for number in range(args.rounds):
        for name in args.runs:
            if len(taken[name]) > number:
                continue
            if name in RUNS:
                apart(record, name, args.work)
            taken[name].append(apart(measure if name in RUNS else measure_capture, name, args.work))
            print(number, name, taken[name][-1], flush=True)
            write_json(file, taken)
    cost = json.loads((Path(__file__).parents[1] / "docs" / "studies" / "cost" / "cost.json").read_text("utf-8"))
    (args.output / "plan.md").write_text(report(taken, cost), encoding="utf-8")


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
    config, _ = configs(run)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if run.bf16 else torch.float32)


def measure(name: str, work: Path) -> dict:
    """CPU seconds of a step, peak memory of the process, what it took before there were models, and rates."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = RUNS[name]
    process = _peak()
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
    peak = _peak()
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
    torch.set_num_threads(1)
    number, prompt, target = CAPTURES[name]
    process = _peak()
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
    peak = _peak()
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
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def _python_source() -> str:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files[:40])


def _peak() -> float:
    """Bytes, resident, of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _rates() -> dict[str, float]:
    """As `bench.floors.measure_rates`, of one thread and in CPU time, since other work may share its core."""

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


def efficiency(run: Run, measured: dict) -> float:
    """Counted FLOPs over those of the measured rate, in the time that the update leaves."""
    flops, update = step_parts(run)
    rates = measured["rates"]
    return flops / rates["bfloat16" if run.bf16 else "float32"] / (measured["seconds"] - update / rates["read"])


def report(taken: dict[str, list[dict]], cost: dict[str, list[dict]]) -> str:
    """Markdown: each number that was measured, what is foretold of it, and how far off that is."""
    taken = {name: runs[-1] for name, runs in taken.items() if runs}
    trained = {name: measured for name, measured in taken.items() if name in RUNS}
    machine = next(iter(taken.values()))
    misses: list[str] = []
    offs: list[float] = []

    def off(what: str, foretold: float, measured: float) -> str:
        offs.append(foretold / measured - 1)
        if abs(offs[-1]) > GOAL:
            misses.append(f"{what} ({100 * offs[-1]:+.0f} %)")
        return f"{100 * offs[-1]:+.0f} %"

    memory = [["run", "rows", "measured, GB", "foretold, GB", "off"]]
    for name, measured in trained.items():
        run, foretold = RUNS[name], foretold_memory(RUNS[name], measured["process"])
        cells = [name, f"{run.batch} x ({run.prompt} + {run.target})", f"{measured['peak'] / 1e9:.2f}"]
        memory.append([*cells, f"{foretold / 1e9:.2f}", off(f"memory of {name}", foretold, measured["peak"])])
    for name, run in COMMITTED.items():
        peak = statistics.median(each["peak_mb"] for each in cost[name]) * 1e6
        foretold = foretold_memory(run, COMMITTED_PROCESS)
        cells = [f"[cost of a step](../cost/cost.md): {name}", f"{run.batch} x ({run.prompt} + {run.target})"]
        cells += [
            f"{peak / 1e9:.2f}",
            f"{foretold / 1e9:.2f}",
            off(f"memory of the study of cost, {name}", foretold, peak),
        ]
        memory.append(cells)
    times = [["run", "CPU s a step", "efficiency", "foretold, s", "off"]]
    shares = {name: efficiency(RUNS[name], measured) for name, measured in trained.items()}
    for name, measured in trained.items():
        run = RUNS[name]
        others = [share for other, share in shares.items() if other != name and RUNS[other].bf16 == run.bf16]
        if not others:
            continue
        flops, update = step_parts(run)
        rates = measured["rates"]
        foretold = flops / rates["bfloat16" if run.bf16 else "float32"] / statistics.median(others)
        foretold += update / rates["read"]
        cells = [name, f"{measured['seconds']:.2f}", f"{shares[name]:.2f}", f"{foretold:.2f}"]
        times.append([*cells, off(f"time of {name}", foretold, measured["seconds"])])
    alone = "cross-entropy alone"
    ratios = [["study of cost: step relative to cross-entropy alone", "measured", "foretold", "off"]]
    for name in [name for name in COMMITTED if name != alone]:
        measured_ratio = statistics.median(
            run["seconds"] / base["seconds"] for run, base in zip(cost[name], cost[alone], strict=True)
        )
        foretold = step_parts(COMMITTED[name])[0] / step_parts(COMMITTED[alone])[0]
        cells = [name, f"{measured_ratio:.2f}", f"{foretold:.2f}"]
        ratios.append([*cells, off(f"time of the study of cost, {name}", foretold, measured_ratio)])
    disk = [["record, top_k 32", "targets", "bytes a target", "foretold", "off", "CPU s", "efficiency"]]
    for name, (rows, prompt, target) in CAPTURES.items():
        if name not in taken:
            continue
        measured, config = taken[name], load_config(fetch_builtin_teacher())
        each = measured["bytes"] / (rows * target)
        foretold = PARQUET_SHARE["value"] * (record_bytes("top_k", 32, 0, config.vocab_size) + 16 / target)
        share = rows * row_flops(config, prompt, target) / measured["rates"]["bfloat16"] / measured["seconds"]
        cells = [name, str(rows * target), f"{each:.0f}", f"{foretold:.0f}", off(f"disk of {name}", foretold, each)]
        disk.append([*cells, f"{measured['seconds']:.1f}", f"{share:.2f}"])
    used = [f"{process / 1e9:.2f}" for process in sorted(measured["process"] for measured in taken.values())]
    lines = [
        "# What `plan` foretells, against runs",
        "",
        f"`python studies/plan_against_runs.py` on one thread of an {machine['cpu']} ({machine['bf16_unit']}), torch "
        f"{machine['torch']}, transformers {machine['transformers']}; other work on the machine. A process with "
        f"everything imported and no model takes {used[0]} to {used[-1]} GB, which is in what is foretold.",
        "",
        f"{len(offs) - len(misses)} of {len(offs)} numbers are within {100 * GOAL:.0f} %."
        + (f" Those that are not: {'; '.join(misses)}." if misses else ""),
    ]
    for table in (memory, times, ratios, disk):
        if len(table) > 1:
            head, *rows = table
            lines += [
                "",
                f"| {' | '.join(head)} |",
                "|" + "---|" * len(head),
                *(f"| {' | '.join(row)} |" for row in rows),
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
