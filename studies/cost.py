"""Seconds and peak memory of a training step, for each source of the teacher's signal and against TRL's trainers.

The floating-point operations of a step are counted as they run, backward, teacher and rollouts included, and compared
with what large matrix products reach on the same machine in the same dtype: the use of the machine.

    python studies/cost.py --work runs/studies

Equal parameters: a student of 20 + 10 layers of SmolLM2-135M's, and for TRL that model itself, 30 layers; each
with the tuned SmolLM2-135M as teacher, the same rows of 200 to 256 prompt tokens, AdamW, fp32 weights, autocast to the
CPU's fast dtype (bfloat16 on a GPU), no gradient checkpointing. A frozen encoder has read its rows before. Each
measurement is a process of its own; rounds are interleaved. TRL needs the newest transformers:
`pip install "trl>=1.16"`; without it its rows are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tasks import load_task, taken_before

from hf_encdec_distill.bench.worker import memory
from hf_encdec_distill.files import write_json


BATCH, STEPS, SKIPPED = 8, 6, 2
MAX_PROMPT, MAX_TARGET = 256, 32
# What a measurement trains with: our own arguments and teacher, or TRL's.
OURS = {
    "cross-entropy alone": ({"distill_weight": 0.0}, "live"),
    "live teacher": ({}, "live"),
    "cache, top 32": ({}, "top_k"),
    "cache, 32 samples": ({}, "sampled"),
    "cache, dense": ({}, "dense"),
    "cache, top 32, frozen encoder's states kept": ({"freeze_encoder": True}, "top_k"),
    "on-policy, live teacher": ({"on_policy_fraction": 1.0}, "live"),
}
TRL = ("TRL GKDTrainer, off-policy", "TRL DistillationTrainer, on-policy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/studies"), help="for rows, teacher and caches")
    parser.add_argument("--output", type=Path, default=Path("docs/studies/cost"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", metavar="NAME", help="take one measurement and print it")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.work)))
        return
    prepare(args.work)
    args.output.mkdir(parents=True, exist_ok=True)
    names = [*OURS, *(TRL if importlib.util.find_spec("trl") else ())]
    file = args.output / "cost.json"
    taken = taken_before(file, names)
    for number in range(args.rounds):
        for name in names:
            if len(taken[name]) > number:
                continue
            command = [sys.executable, __file__, "--work", str(args.work), "--measure", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            taken[name].append(json.loads(output.splitlines()[-1]))
            print(number, name, taken[name][-1], flush=True)
            write_json(file, taken)
    (args.output / "cost.md").write_text(table(taken), encoding="utf-8")


def prepare(work: Path) -> None:
    """Rows, and a cache of each kind; no part of a measurement."""
    import torch
    from transformers import AutoTokenizer

    from hf_encdec_distill.distillation import LiveTeacher, capture

    task = load_task("docstrings", work)
    rows = _rows(work, task.prompt_template)
    tokenizer = AutoTokenizer.from_pretrained(task.teacher)
    for kind in ("top_k", "sampled", "dense"):
        folder = work / "cost" / kind
        if not folder.exists():
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            teacher = LiveTeacher.load(task.teacher, "bfloat16").to(device)
            partial = folder.with_name(f"{kind}.partial")
            capture(teacher, rows, partial, tokenizer, kind=kind, **_lengths(task.prompt_template))
            os.replace(partial, folder)
    if not _states(work).exists():
        for name, (changes, _) in OURS.items():
            if "freeze_encoder" in changes:
                measure(name, work)


def _states(work: Path) -> Path:
    """Of the frozen encoder."""
    return work / "cost" / "states"


def _lengths(template: str) -> dict:
    return {"prompt_template": template, "max_source_length": MAX_PROMPT, "max_target_length": MAX_TARGET}


def _rows(work: Path, template: str):
    """Rows of 200 to 256 prompt tokens, chosen once."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    from hf_encdec_distill.data import fetch_builtin_teacher, load_python_docstrings
    from hf_encdec_distill.models.prompts import encode_prompt

    folder = work / "cost" / "rows"
    if not folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(fetch_builtin_teacher())
        pairs = load_python_docstrings("stdlib")["train"]
        long = pairs.filter(lambda row: 200 <= len(encode_prompt(tokenizer, row["source"], template)) <= MAX_PROMPT)
        long.shuffle(seed=0).select(range(BATCH * STEPS)).save_to_disk(folder)
    return load_from_disk(str(folder))


def measure(name: str, work: Path) -> dict:
    """Median seconds of a step after the first `SKIPPED`; peak memory in MB, and what of it came with training; FLOPs
    of one more step, and those per second that matrix products reach."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

    set_seed(0)
    task = load_task("docstrings", work)
    rows = _rows(work, task.prompt_template)
    tokenizer = AutoTokenizer.from_pretrained(task.teacher)
    cuda = torch.cuda.is_available()
    shared = {
        "output_dir": str(work / "cost" / "run"),
        "max_steps": STEPS + 1,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-4,
        "bf16": True,
        "use_cpu": not cuda,
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "logging_steps": STEPS,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    before: list[float] = []
    ends: list[float] = []
    counter = FlopCounterMode(display=False)

    class Clock(TrainerCallback):
        """Notes when steps end: what lies between two of them has the making of a batch in it, rollouts included. The
        last step is counted instead."""

        def on_step_end(self, *_args, **_kwargs):
            if cuda:
                torch.cuda.synchronize()
            if len(ends) == STEPS:  # the step that was counted; to enter once more would begin at 0
                return
            ends.append(time.perf_counter())
            if len(ends) == STEPS:
                counter.__enter__()

        def on_train_begin(self, *_args, **_kwargs):
            before.append(_memory(cuda))

    build = _our_trainer if name in OURS else _trl_trainer
    trainer = build(name, task, rows, tokenizer, shared, AutoModelForCausalLM)
    trainer.add_callback(Clock())
    trainer.train()
    counter.__exit__(None, None, None)
    seconds = [end - start for start, end in zip(ends, ends[1:])][SKIPPED - 1 :]
    return {
        "seconds": statistics.median(seconds),
        "flops": counter.get_total_flops(),
        "matrix_rate": _matrix_rate("cuda" if cuda else "cpu"),
        "peak_mb": _memory(cuda),
        "before_training_mb": before[0],
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }


def _matrix_rate(device: str) -> float:
    """FLOPs per second of products of large bfloat16 matrices, the best of some."""
    import torch

    size, rates = 2048, []
    one = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    for _ in range(5):
        start = time.perf_counter()
        (one @ one)[0, 0].item()
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return max(rates)


def _memory(cuda: bool) -> float:
    """Peak so far, MB: of the device, or resident of the process."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    return memory()["peak"] / 1e6


def _our_trainer(name, task, rows, tokenizer, shared, causal):
    import torch

    from hf_encdec_distill import (
        DistillationTrainer,
        DistillationTrainingArguments,
        RopeEncDecForConditionalGeneration,
    )

    changes, teacher = OURS[name]
    if "freeze_encoder" in changes:
        changes = {**changes, "encoder_states": str(_states(task.teacher.parents[1]))}
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        causal.from_pretrained(task.teacher, dtype=torch.float32),
        tokenizer=tokenizer,
        encoder_num_hidden_layers=20,
        decoder_num_hidden_layers=10,
        layer_selection="even",
        heal=None,
        prompt_template=task.prompt_template,
    )
    return DistillationTrainer(
        student,
        DistillationTrainingArguments(**shared, **_lengths(task.prompt_template), teacher_dtype="bfloat16", **changes),
        train_dataset=rows,
        processing_class=student.tokenizer,
        teacher=str(task.teacher if teacher == "live" else task.teacher.parents[1] / "cost" / teacher),
        teacher_processing_class=tokenizer,
    )


def _trl_trainer(name, task, rows, tokenizer, shared, causal):
    import torch

    student = causal.from_pretrained(task.teacher, dtype=torch.float32)
    teacher = causal.from_pretrained(task.teacher, dtype=torch.bfloat16)
    prompts = rows.map(lambda row: {"prompt": task.prompt_template.replace("{source}", row["source"])})
    if "GKD" not in name:
        from trl import DistillationConfig, DistillationTrainer

        config = DistillationConfig(
            **shared, max_completion_length=MAX_TARGET, beta=0.0, temperature=1.0, logging_nan_inf_filter=False
        )
        return DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=prompts.select_columns(["prompt"]),
            processing_class=tokenizer,
        )
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from hf_encdec_distill.distillation import DistillationCollator

    encode = DistillationCollator(tokenizer, tokenizer, **_lengths(task.prompt_template)).encode

    def collate(batch: list[dict]) -> dict:
        """The very tokens that our trainer gives its teacher, with labels at the targets."""
        ready = [encode(row) for row in batch]
        ids = [torch.tensor(row["teacher_input_ids"]) for row in ready]
        labels = [
            torch.tensor(
                [-100] * row["teacher_labels_start"] + row["teacher_input_ids"][row["teacher_labels_start"] :]
            )
            for row in ready
        ]
        pad = torch.nn.utils.rnn.pad_sequence
        prompts = [row[: start["teacher_labels_start"]] for row, start in zip(ids, ready)]
        return {
            "input_ids": pad(ids, True, tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], True),
            "labels": pad(labels, True, -100),
            "prompts": pad(prompts, True, tokenizer.pad_token_id),
            "prompt_attention_mask": pad([torch.ones_like(row) for row in prompts], True),
        }

    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(**shared, lmbda=0.0, beta=0.0, temperature=1.0),
        train_dataset=rows,
        data_collator=collate,
        processing_class=tokenizer,
    )


def table(taken: dict[str, list[dict]]) -> str:
    """Markdown: medians over the rounds, and ratios within each round."""
    base = taken["cross-entropy alone"]
    lines = [
        f"Batch {BATCH}, {len(base)} round{'s' * (len(base) > 1)}; in brackets least and largest. Memory is the "
        "process's peak.\n",
        "| | parameters, M | seconds per step | against cross-entropy alone | examples/s | peak memory, GB | TFLOP | "
        "use of the machine, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in taken.items():
        seconds = [run["seconds"] for run in runs]
        ratios = [run["seconds"] / reference["seconds"] for run, reference in zip(runs, base)]
        cells = [
            name,
            f"{runs[0]['parameters'] / 1e6:.1f}",
            f"{statistics.median(seconds):.2f} [{min(seconds):.2f}, {max(seconds):.2f}]",
            f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
            f"{BATCH / statistics.median(seconds):.2f}",
            f"{statistics.median(run['peak_mb'] for run in runs) / 1e3:.2f}",
            f"{runs[0]['flops'] / 1e12:.2f}",
            f"{100 * statistics.median(run['flops'] / run['seconds'] / run['matrix_rate'] for run in runs):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "# Cost of a step\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
