"""What helps a student at equal steps: every arm is the baseline with one thing changed, over several seeds.

    python studies/quality.py --task docstrings --work runs/studies

Results go to docs/studies/quality/<task>.json as they come, one entry for each arm and seed; what is there is not run
again, so that the program goes on after an interruption and takes new arms up. `--table` writes the tables and plots
from what is there and runs nothing.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tasks import MAX_SOURCE, MAX_TARGET, MEASURES, Task, load_task, remembering_teacher, rounded, table_line
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, set_seed

from hf_encdec_distill import DistillationTrainer, DistillationTrainingArguments, RopeEncDecForConditionalGeneration
from hf_encdec_distill.bench import best_cpu_dtype
from hf_encdec_distill.data import load_plain_text
from hf_encdec_distill.distillation import LiveTeacher, capture
from hf_encdec_distill.evaluation import encode_rows, generate, score
from hf_encdec_distill.files import write_json
from hf_encdec_distill.metrics import distinct_share, rouge_l


@dataclass(frozen=True)
class Arm:
    """`reference` is what its row in the table is compared with."""

    question: str
    label: str
    init: dict = field(default_factory=dict)  # of `from_decoder_only`
    training: dict = field(default_factory=dict)  # of `DistillationTrainingArguments`
    teacher: str = "top_k"  # or live, or another cache in CACHES
    plain_text_steps: int = 0  # steps on plain text, with the live teacher, before those on the task
    calibration_rows: int = 32  # of the validation split, for `from_decoder_only`
    reference: str = "base"


CACHES = {"top_k": {"kind": "top_k", "k": 32}, "top_8": {"kind": "top_k", "k": 8}}
CACHES["sampled"] = {"kind": "sampled", "rounds": 32}
LIVE = {"teacher": "live", "reference": "live"}

ARMS = {
    "base": Arm("Loss", "forward KL, weight 0.9, top 32"),
    "ce": Arm("Loss", "cross-entropy alone", training={"distill_weight": 0.0}),
    "half": Arm("Loss", "weight 0.5", training={"distill_weight": 0.5}),
    "pure": Arm("Loss", "weight 1", training={"distill_weight": 1.0}),
    "live": Arm("Signal", "live teacher", teacher="live"),
    "top_8": Arm("Signal", "top 8", teacher="top_8"),
    "sampled": Arm("Signal", "32 samples", teacher="sampled"),
    "reverse": Arm("Divergence, live teacher", "reverse KL", training={"divergence": "reverse_kl"}, **LIVE),
    "jsd": Arm("Divergence, live teacher", "JSD, beta 0.5", training={"divergence": "generalized_jsd"}, **LIVE),
    "skew": Arm("Divergence, live teacher", "skew KL, alpha 0.1", training={"divergence": "skew_kl"}, **LIVE),
    "skew_reverse": Arm(
        "Divergence, live teacher", "skew reverse KL, alpha 0.1", training={"divergence": "skew_reverse_kl"}, **LIVE
    ),
    "variation": Arm(
        "Divergence, live teacher", "total variation", training={"divergence": "total_variation"}, **LIVE
    ),
    "warm": Arm("Divergence, live teacher", "forward KL, T = 2", training={"distill_temperature": 2.0}, **LIVE),
    "hidden_mse": Arm("Hidden states, live teacher", "MSE", training={"hidden_state_weight": 0.1}, **LIVE),
    "hidden_cosine": Arm(
        "Hidden states, live teacher",
        "cosine",
        training={"hidden_state_weight": 1.0, "hidden_state_loss": "cosine"},
        **LIVE,
    ),
    "policy_25": Arm("Policy", "on-policy, a quarter", training={"on_policy_fraction": 0.25}, **LIVE),
    "policy_50": Arm("Policy", "on-policy, half", training={"on_policy_fraction": 0.5}, **LIVE),
    "separate": Arm("Start", "separate cross-attention", init={"cross_attention": "separate"}),
    "warmed_up": Arm(
        "Start",
        "separate, cross-attention first for a quarter",
        init={"cross_attention": "separate"},
        training={"cross_attention_warmup_steps": 15},
        reference="separate",
    ),
    "random": Arm("Start", "merged, random weights", init={"random": True}),
    "adapted": Arm("Start", "60 steps on plain text before", plain_text_steps=60),
    "even": Arm("Layers", "evenly spaced", init={"layer_selection": "even"}),
    "first": Arm("Layers", "first, and the last", init={"layer_selection": "first"}),
    # On 32 rows it takes hours to choose.
    "greedy": Arm("Layers", "greedy, on 8 rows", init={"layer_selection": "greedy"}, calibration_rows=8),
    "frozen": Arm("Encoder", "frozen", training={"freeze_encoder": True}),
    "bidirectional": Arm("Encoder", "bidirectional", init={"encoder_attention": "bidirectional"}),
    "annealed": Arm("Encoder", "causal to bidirectional in 30 steps", training={"bidirectional_warmup_steps": 30}),
    "shallow": Arm("Depth", "13 + 2 layers", init={"layers": (13, 2)}),
    "progressive": Arm(
        "Depth",
        "14 + 7 layers, one less every 5 steps",
        init={"layers": (14, 7)},
        training={"progressive_depth_steps": 5, "final_encoder_layers": 11, "final_decoder_layers": 4},
    ),
    "deep": Arm("Depth", "7 + 8 layers", init={"layers": (7, 8)}),
}
LAYERS = (11, 4)
LEARNING_RATE = 1e-3
LOWER_IS_BETTER = ("ce", "kl")
GENERATED = 48  # test rows that are answered
PLAIN_WINDOW = 128  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("docstrings", "debian"), default="docstrings")
    parser.add_argument("--work", type=Path, default=Path("runs/studies"), help="for rows, teacher and caches")
    parser.add_argument("--output", type=Path, default=Path("docs/studies/quality"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--test-rows", type=int, default=96)
    parser.add_argument("--table", action="store_true", help="only write tables and plots")
    args = parser.parse_args()
    file = args.output / f"{args.task}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.table:
        task = load_task(args.task, args.work)
        # Seeds choose their rows out of twice as many as a run takes: that is what caches have to hold.
        for split, count in (("train", 2 * args.steps * args.batch_size), ("test", args.test_rows)):
            task.rows[split] = task.rows[split].select(range(min(count, len(task.rows[split]))))
        setting = _setting(args, task)
        before = results.setdefault("setting", setting)
        if changed := [name for name in ("steps", "batch_size", "test_rows") if setting[name] != before[name]]:
            raise ValueError(
                f"{file} was measured with another {', '.join(changed)}: give the same, or another --output"
            )
        for seed in args.seeds:
            for name in args.arms:
                runs = results.setdefault("arms", {}).setdefault(name, {})
                if str(seed) not in runs:
                    runs[str(seed)] = run(ARMS[name], task, seed, args)
                    print(name, seed, runs[str(seed)], flush=True)
                    write_json(file, results)
    (args.output / f"{args.task}.md").write_text(tables(results), encoding="utf-8")


def run(arm: Arm, task: Task, seed: int, args: argparse.Namespace) -> dict:
    """Trains one student and measures it; the seed chooses and orders its rows, out of twice as many."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else best_cpu_dtype()
    tokenizer = _tokenizer(task.teacher)
    student = _student(arm, task, tokenizer, seed)
    shared = {
        "output_dir": str(args.work / task.name / "student"),
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": LEARNING_RATE,
        "seed": seed,
        "prompt_template": task.prompt_template,
        "teacher_dtype": str(dtype).removeprefix("torch."),
        "bf16": dtype is torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }

    def train(rows, teacher: Path, steps: int, **changes) -> None:
        trainer = DistillationTrainer(
            student,
            DistillationTrainingArguments(**(shared | {"max_steps": steps, "warmup_steps": steps // 8} | changes)),
            train_dataset=rows,
            processing_class=student.tokenizer,
            teacher=str(teacher),
            teacher_processing_class=tokenizer,
        )
        trainer.train()
        shutil.rmtree(shared["output_dir"], ignore_errors=True)

    start = time.monotonic()
    if arm.plain_text_steps:
        text = load_plain_text(
            None, tokenizer, window=PLAIN_WINDOW, start_token_id=student.config.decoder_start_token_id, seed=seed
        )
        train(text, task.teacher, arm.plain_text_steps)
    rows = task.rows["train"].shuffle(seed=seed).select(range(args.steps * args.batch_size))
    teacher = task.teacher if arm.teacher == "live" else _cache(arm.teacher, task, tokenizer, dtype)
    limits = {"max_source_length": MAX_SOURCE, "max_target_length": MAX_TARGET}
    train(rows, teacher, args.steps, **(limits | arm.training))
    seconds = time.monotonic() - start
    return measure(student, task, tokenizer, dtype) | {"seconds": round(seconds, 1)}


def measure(student, task: Task, tokenizer, dtype: torch.dtype) -> dict:
    """Cross-entropy, KL and agreement a target token of the test rows; ROUGE-L and distinct answers of the first."""
    rows = encode_rows(task.rows["test"], tokenizer, task.prompt_template, MAX_SOURCE, MAX_TARGET)
    for row in rows:
        if student.config.cross_attention != "merged":
            row["inputs"] = student.tokenizer(row["source"])["input_ids"]
    student = student.to(dtype).eval()
    teacher = remembering_teacher(task.teacher, dtype, student.device)
    tokens = sum(len(row["labels"]) for row in rows)
    sums = score({"student": student}, rows, teacher)["student"]
    answers = generate(student, student.tokenizer, rows[:GENERATED], MAX_TARGET)
    scores = [rouge_l(answer, row["target"]) for answer, row in zip(answers, rows[:GENERATED], strict=True)]
    result = {name: float(values.sum() / tokens) for name, values in sums.items()}
    return result | {"rouge_l": float(np.mean(scores)), "distinct": distinct_share(answers)}


@functools.cache
def _tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def _student(arm: Arm, task: Task, tokenizer, seed: int):
    set_seed(seed)
    init = {"layers": LAYERS, "random": False} | arm.init
    random = init.pop("random")
    built = _built(task.teacher, task.prompt_template, _calibration(task, arm.calibration_rows), tokenizer, **init)
    student = copy.deepcopy(built)
    if random:
        student = AutoModelForSeq2SeqLM.from_config(built.config)
        student.tokenizer, student.generation_config = built.tokenizer, built.generation_config
    return student


@functools.lru_cache(maxsize=1)
def _built(teacher: Path, template: str, calibration: tuple, tokenizer, layers: tuple[int, int], **init):
    """Out of the teacher's layers: the same for all seeds, and for all arms that begin alike."""
    return RopeEncDecForConditionalGeneration.from_decoder_only(
        AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
        tokenizer=tokenizer,
        encoder_num_hidden_layers=layers[0],
        decoder_num_hidden_layers=layers[1],
        prompt_template=template,
        calibration=list(calibration),
        heal=None,
        **init,
    )


def _calibration(task: Task, rows: int) -> tuple[tuple[str, str], ...]:
    return tuple((row["source"], row["target"]) for row in task.rows["validation"].select(range(rows)))


def _cache(name: str, task: Task, tokenizer, dtype: torch.dtype) -> Path:
    """All training rows, captured once."""
    folder = task.teacher.parent / f"cache-{name}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        capture(
            LiveTeacher.load(task.teacher, str(dtype).removeprefix("torch.")).to(torch.device(device)),
            task.rows["train"],
            partial,
            tokenizer,
            prompt_template=task.prompt_template,
            max_source_length=MAX_SOURCE,
            max_target_length=MAX_TARGET,
            batch_size=16,
            progress=False,
            **CACHES[name],
        )
        os.replace(partial, folder)
    return folder


def _setting(args: argparse.Namespace, task: Task) -> dict:
    """What all arms have in common."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else best_cpu_dtype()
    tokenizer = AutoTokenizer.from_pretrained(task.teacher)
    rows = encode_rows(task.rows["test"], tokenizer, task.prompt_template, MAX_SOURCE, MAX_TARGET)
    teacher = AutoModelForCausalLM.from_pretrained(task.teacher, dtype=dtype).eval()
    answers = generate(teacher, tokenizer, rows[:GENERATED], MAX_TARGET)
    scores = [rouge_l(answer, row["target"]) for answer, row in zip(answers, rows[:GENERATED], strict=True)]
    tokens = sum(len(row["labels"]) for row in rows)
    ce = float(score({"teacher": teacher}, rows)["teacher"]["ce"].sum() / tokens)
    return {
        "task": task.name,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "test_rows": len(rows),
        "test_tokens": tokens,
        "generated_rows": GENERATED,
        "layers": LAYERS,
        "teacher": {"ce": ce, "rouge_l": float(np.mean(scores)), "distinct": distinct_share(answers)},
    }


def tables(results: dict) -> str:
    """Markdown: for each question its arms, means over the seeds, and the difference to their references."""
    setting, runs = results["setting"], results["arms"]
    teacher = {name: setting["teacher"].get(name) for name in MEASURES}
    parts = [
        f"# Task `{setting['task']}`\n",
        f"{setting['steps']} steps of {setting['batch_size']} rows, students of {setting['layers'][0]} + "
        f"{setting['layers'][1]} layers, {setting['test_rows']} held-out rows ({setting['test_tokens']} tokens; "
        f"ROUGE-L and distinct on {setting['generated_rows']} of them). Means over the seeds; in brackets the least "
        "and the largest difference to the reference at the same seed. Bold: the same sign at every seed, three of "
        "them at least.\n",
    ]
    header = [
        "",
        "seeds",
        "CE",
        "KL",
        "agreement, %",
        "ROUGE-L",
        "distinct, %",
        "CE minus reference",
        "agreement minus",
    ]
    for question in dict.fromkeys(arm.question for arm in ARMS.values()):
        names = [name for name, arm in ARMS.items() if arm.question == question and runs.get(name)]
        if not names:
            continue
        references = dict.fromkeys(ARMS[name].reference for name in names)
        lines = [f"## {question}\n", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for name in [*(r for r in references if r not in names and r in runs), *names]:
            lines.append(_row(name, runs))
        parts.append("\n".join(lines) + "\n")
    values = ", ".join(f"{name} {rounded(value, name)}" for name, value in teacher.items() if value is not None)
    parts.insert(2, f"The teacher: {values}.\n")
    return "\n".join(parts)


def _row(name: str, runs: dict) -> str:
    seeds = sorted(runs[name])
    cells = [ARMS[name].label, str(len(seeds))]
    cells += [rounded(statistics.mean(runs[name][seed][measure] for seed in seeds), measure) for measure in MEASURES]
    reference = ARMS[name].reference
    for measure in ("ce", "teacher_agreement"):
        both = [seed for seed in seeds if seed in runs.get(reference, {})]
        changes = [runs[name][seed][measure] - runs[reference][seed][measure] for seed in both]
        if name == reference or not changes:
            cells.append("")
            continue
        factor, digits = MEASURES[measure]
        mean, least, most = (
            f"{factor * v:+.{digits}f}" for v in (statistics.mean(changes), min(changes), max(changes))
        )
        same = len(changes) >= 3 and (min(changes) > 0 or max(changes) < 0)
        cells.append(f"{f'**{mean}**' if same else mean} [{least}, {most}]")
    return table_line(cells)


if __name__ == "__main__":
    main()
