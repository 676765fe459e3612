"""Where asymmetry pays: pruned decoder-only models and encoder-decoders of many splits, healed for the same time.

    python studies/heal.py --task docstrings --work runs/studies
    python studies/heal.py --latency
    python studies/heal.py --table

Every arm starts from the same tuned teacher, is fitted to it in closed form and distilled from the same records with
the same loss, optimizer and rows, until its CPU seconds of one thread are used: those of cached encoder states
included, those of the fit, which is made once for all seeds, in a column of their own. CPU seconds rather than those
of a clock, so that other load on the machine costs no arm its steps. Quality is then drawn against the time of a
request, which `--latency` measures for each split in one runtime.

Results go to docs/studies/heal/<task>-<minutes>.json as they come, one entry for each arm and seed. What is there is
not run again, so the program goes on after an interruption and takes new arms up; started twice with other arms, it
uses two cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tasks import (
    MAX_SOURCE,
    MAX_TARGET,
    MEASURES,
    TRAIN_ROWS,
    Task,
    load_task,
    picture,
    remembering_teacher,
    rounded,
    table_line,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)

from hf_encdec_distill import (
    DistillationTrainer,
    DistillationTrainingArguments,
    RopeEncDecConfig,
    RopeEncDecForConditionalGeneration,
)
from hf_encdec_distill.bench import best_cpu_dtype, greedy_decode, machine_description, plot_front
from hf_encdec_distill.data import fetch_builtin_teacher
from hf_encdec_distill.distillation import LiveTeacher, TargetGeneration, capture
from hf_encdec_distill.distillation.options.fake_quantization import fake_quantized
from hf_encdec_distill.evaluation import encode_rows, generate, score
from hf_encdec_distill.files import write_json
from hf_encdec_distill.metrics import distinct_share, pareto_front, rouge_l
from hf_encdec_distill.models.decoder_only import prune_decoder_only
from hf_encdec_distill.models.loading import load_student, load_teacher, load_tokenizer


@dataclass(frozen=True)
class Arm:
    """Layers that are kept, by number (influence then chooses) or by the teacher's index."""

    label: str
    decoder: int | tuple[int, ...]
    encoder: int | tuple[int, ...] | None = None  # None: a decoder-only model
    heal: str | None = "least_squares"
    training: dict = field(default_factory=dict)  # of `DistillationTrainingArguments`
    options: dict = field(default_factory=dict)  # of the student's config
    also_int4: bool = False  # whether it is measured with weights rounded to 4 bits, too
    targets: str = "references"  # or the teacher's "greedy" answers, or the "likely" half of those

    @property
    def layers(self) -> tuple[int, int]:
        """Numbers of encoder and decoder layers; a decoder-only model reads its prompt with the decoder's."""
        count = [layers if isinstance(layers, int) else len(layers) for layers in (self.encoder or 0, self.decoder)]
        return count[0], count[1]

    @property
    def split(self) -> str:
        """What its times depend on."""
        layers = " + ".join(str(count) for count in self.layers if count)
        return ", ".join([layers, *(f"{name}={value}" for name, value in self.options.items())])


SIX, EIGHT = (0, 1, 20, 23, 24, 29), (0, 1, 8, 20, 23, 24, 28, 29)
FOUR = (0, 1, 24, 29)
FROZEN = {"freeze_encoder": True}  # on states that are kept
LOW = {"per_device_train_batch_size": 16, "learning_rate": 5e-4}
POOLED = {"encoder_pooling": 2, "encoder_pooling_layer": 2}
SHARED = {"cross_attention_sharing": 2}
NARROW = {"decoder_intermediate_size": 768}
ALL = 30
ARMS = {
    "only_4": Arm("decoder-only 4", FOUR),
    "only_6": Arm("decoder-only 6", SIX),
    "only_8": Arm("decoder-only 8", EIGHT),
    "only_11": Arm("decoder-only 11", 11),
    "only_15": Arm("decoder-only 15", 15),
    # Encoders that are the decoder's own lower layers: a decoder-only model whose two sides are untied.
    "nested_5_6": Arm("5 + 6", SIX, SIX[:-1]),
    "nested_7_8": Arm("7 + 8", EIGHT, EIGHT[:-1]),
    "split_5_4": Arm("5 + 4", FOUR, SIX[:-1]),
    "split_7_4": Arm("7 + 4", FOUR, EIGHT[:-1]),
    "split_11_4": Arm("11 + 4", FOUR, 11),
    "split_11_6": Arm("11 + 6", SIX, 11),
    "split_20_6": Arm("20 + 6", SIX, 20),
    "frozen_5_4": Arm("5 + 4, frozen encoder", FOUR, SIX[:-1], training=FROZEN),
    "frozen_7_8": Arm("7 + 8, frozen encoder", EIGHT, EIGHT[:-1], training=FROZEN),
    "frozen_11_4": Arm("11 + 4, frozen encoder", FOUR, 11, training=FROZEN),
    "frozen_11_6": Arm("11 + 6, frozen encoder", SIX, 11, training=FROZEN),
    "frozen_5_6": Arm("5 + 6, frozen encoder", SIX, SIX[:-1], training=FROZEN, also_int4=True),
    # As a long quickstart does: ten minutes on kept states, then all weights.
    "thawed_5_6": Arm("5 + 6, frozen for 600 steps", SIX, SIX[:-1], training=FROZEN | {"unfreeze_encoder_after": 600}),
    "thawed_11_4": Arm("11 + 4, frozen for 600 steps", FOUR, 11, training=FROZEN | {"unfreeze_encoder_after": 600}),
    "thawed_11_6": Arm("11 + 6, frozen for 600 steps", SIX, 11, training=FROZEN | {"unfreeze_encoder_after": 600}),
    "half_5_6": Arm("5 + 6, frozen for 100 steps", SIX, SIX[:-1], training=FROZEN | {"unfreeze_encoder_after": 100}),
    # With the rate and the rows per step that a long quickstart has for all weights, here from the first step on.
    "low_only_6": Arm("decoder-only 6, 16 rows at 5e-4", SIX, training=LOW),
    "low_5_6": Arm(
        "5 + 6, frozen for 300 steps, 16 rows at 5e-4",
        SIX,
        SIX[:-1],
        training=LOW | FROZEN | {"unfreeze_encoder_after": 300},
    ),
    "frozen_20_6": Arm("20 + 6, frozen encoder", SIX, 20, training=FROZEN),
    "frozen_20_8": Arm("20 + 8, frozen encoder", EIGHT, 20, training=FROZEN),
    "whole_6": Arm("whole frozen encoder + 6", SIX, ALL, training=FROZEN),
    "whole_8": Arm("whole frozen encoder + 8", EIGHT, ALL, training=FROZEN),
    "plain_5_6": Arm("5 + 6, not fitted", SIX, SIX[:-1], heal=None),
    "plain_only_6": Arm("decoder-only 6, not fitted", SIX, heal=None),
    "fast_5_6": Arm("5 + 6, frozen encoder, twice the rate", SIX, SIX[:-1], training=FROZEN | {"learning_rate": 2e-3}),
    # The time in which the teacher writes its answers is not counted.
    "greedy_5_6": Arm(
        "5 + 6, frozen encoder, the teacher's answers", SIX, SIX[:-1], training=FROZEN, targets="greedy"
    ),
    "likely_5_6": Arm(
        "5 + 6, frozen encoder, the teacher's likelier answers", SIX, SIX[:-1], training=FROZEN, targets="likely"
    ),
    "pooled_5_6": Arm("5 + 6, frozen encoder, prompt pooled by 2", SIX, SIX[:-1], training=FROZEN, options=POOLED),
    "shared_5_6": Arm(
        "5 + 6, frozen encoder, prompt keys shared by 2", SIX, SIX[:-1], training=FROZEN, options=SHARED
    ),
    # The same without the encoder's last layer, whose state the first of no group reads.
    "shared_4_6": Arm(
        "4 + 6, frozen encoder, prompt keys shared by 2", SIX, SIX[:-2], training=FROZEN, options=SHARED
    ),
    "narrow_5_6": Arm("5 + 6, frozen encoder, decoder half as wide", SIX, SIX[:-1], training=FROZEN, options=NARROW),
    "muon_5_6": Arm("5 + 6, frozen encoder, Muon", SIX, SIX[:-1], training=FROZEN | {"optim": "muon"}),
    "qat_5_6": Arm(
        "5 + 6, frozen encoder, trained for int4", SIX, SIX[:-1], training=FROZEN | {"qat": "int4"}, also_int4=True
    ),
}
SHAPES = {"64/128": (64, 128), "128/32": (128, 32), "512/64": (512, 64), "2048/64": (2048, 64)}
_IN_WORDS = {"ce": "CE", "kl": "KL", "teacher_agreement": "agreement", "rouge_l": "ROUGE-L"}

BATCH_SIZE, LEARNING_RATE, WARMUP = 8, 1e-3, 0.1  # the last is a share of the time
HEAL_ROWS = 200
STEPS = 16  # of an answer, from which the time of all its tokens is taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("docstrings", "debian"), default="docstrings")
    parser.add_argument("--work", type=Path, default=Path("runs/studies"), help="for rows, teacher and records")
    parser.add_argument("--output", type=Path, default=Path("docs/studies/heal"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=4.0, help="CPU time of each run, on one thread")
    parser.add_argument("--train-rows", type=int, default=TRAIN_ROWS, help="where the work folder has no rows yet")
    parser.add_argument("--test-rows", type=int, default=96, help="held-out rows for CE, KL and agreement")
    parser.add_argument("--generated", type=int, default=48, help="of those, rows for ROUGE-L and distinct answers")
    parser.add_argument("--latency", action="store_true", help="only measure the time of requests")
    parser.add_argument("--rounds", type=int, default=3, help="of --latency")
    parser.add_argument("--table", action="store_true", help="only write tables and plots")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.latency:
        write_json(args.output / "latency.json", measure_latency([ARMS[name] for name in args.arms], args.rounds))
    elif not args.table:
        torch.set_num_threads(1)
        task, file = load_task(args.task, args.work, args.train_rows), _file(args)
        if not file.exists():
            write_json(file, {"setting": _setting(args, task), "arms": {}})
        for seed in args.seeds:
            for name in args.arms:
                if str(seed) not in _read(file)["arms"].get(name, {}):
                    result = run(ARMS[name], task, seed, args)
                    print(name, seed, result, flush=True)
                    results = _read(file)  # another process may have added to it
                    results["arms"].setdefault(name, {})[str(seed)] = result
                    write_json(file, results)
    for file in sorted(args.output.glob("*-*.json")):
        report(file, args.output / "latency.json")


def _file(args: argparse.Namespace) -> Path:
    return args.output / f"{args.task}-{args.minutes:g}.json"


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


# --- training ---


class _CpuTime(TrainerCallback):
    """Ends training when the CPU seconds since `start` are used; the learning rate follows them."""

    def __init__(self, seconds: float):
        self.start, self.seconds = time.process_time(), seconds

    @property
    def used(self) -> float:
        return (time.process_time() - self.start) / self.seconds

    def rate(self) -> float:
        """A rise over the first tenth of the time, then a line to zero."""
        return max(min(self.used / WARMUP, (1 - self.used) / (1 - WARMUP)), 0.01)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self.used >= 1


def run(arm: Arm, task: Task, seed: int, args: argparse.Namespace) -> dict:
    """Train and measure one student from its fit; the seed orders its rows."""
    set_seed(seed)
    records, rows = _records(task, arm.targets), _train_rows(task, arm.targets)
    student, tokenizer, start = _fitted(arm, task, args)
    clock = _CpuTime(60 * args.minutes)
    with tempfile.TemporaryDirectory() as folder:
        frozen = {"encoder_states": f"{folder}/states"} if "freeze_encoder" in arm.training else {}
        trainer = DistillationTrainer(
            student,
            DistillationTrainingArguments(
                **{
                    "output_dir": folder,
                    "max_steps": 100_000,
                    "per_device_train_batch_size": BATCH_SIZE,
                    "learning_rate": LEARNING_RATE,
                    "seed": seed,
                    "prompt_template": task.prompt_template,
                    "max_source_length": MAX_SOURCE,
                    "max_target_length": MAX_TARGET,
                    "use_cpu": True,
                    "logging_steps": 10,
                    "save_strategy": "no",
                    "report_to": [],
                    "disable_tqdm": True,
                    **frozen,
                    **arm.training,
                }
            ),
            train_dataset=rows.shuffle(seed=seed),
            processing_class=tokenizer,
            teacher=str(records),
            teacher_processing_class=_tokenizer(task.teacher),
            callbacks=[clock],
        )
        trainer.create_optimizer()
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: clock.rate())
        clock.start = time.process_time()
        trainer.train()
    result = measure(student, task, args)
    if arm.also_int4:
        with torch.no_grad(), fake_quantized(student, "int4"):
            result["int4"] = measure(student, task, args)
    return {
        **result,
        "steps": trainer.state.global_step,
        "start": start,
        "parameters": student.num_parameters(),
    }


def _fitted(arm: Arm, task: Task, args: argparse.Namespace):
    """The arm's student as the closed form makes it, once for all seeds, its tokenizer, and what it measures."""
    sides = "-".join(str(side).replace(" ", "") for side in (arm.encoder, arm.decoder, *arm.options.items()))
    folder = task.teacher.parent / "fits" / f"{sides}-{arm.heal}"
    if not folder.exists():
        teacher = AutoModelForCausalLM.from_pretrained(task.teacher, dtype=torch.float32)
        begun = time.process_time()
        student = _student(arm, teacher, task, _tokenizer(task.teacher))
        seconds = round(time.process_time() - begun, 1)
        folder.parent.mkdir(exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent))
        student.save_pretrained(partial)
        student.tokenizer.save_pretrained(partial)
        write_json(partial / "start.json", measure(student, task, args) | {"fit_seconds": seconds})
        os.replace(partial, folder)
    load = load_teacher if arm.encoder is None else load_student
    student, tokenizer = load(folder, dtype=torch.float32), load_tokenizer(folder, PreTrainedTokenizerFast)
    return student, tokenizer, _read(folder / "start.json")


def _student(arm: Arm, teacher, task: Task, tokenizer):
    rows = task.rows["validation"].select(range(min(HEAL_ROWS // 2, len(task.rows["validation"]))))
    rows = [*rows, *task.rows["train"].select(range(HEAL_ROWS - len(rows)))]
    shared = {
        "tokenizer": tokenizer,
        "prompt_template": task.prompt_template,
        "calibration": [(row["source"], row["target"]) for row in rows],
        "heal": arm.heal,
    }
    if arm.encoder is None:
        return prune_decoder_only(teacher, **_kept("", arm.decoder), **shared)
    sides = _kept("encoder_", arm.encoder) | _kept("decoder_", arm.decoder)
    return RopeEncDecForConditionalGeneration.from_decoder_only(teacher, **sides, **shared, **arm.options)


def _kept(side: str, layers: int | tuple[int, ...]) -> dict:
    return {f"{side}num_hidden_layers": layers} if isinstance(layers, int) else {f"{side}layers": list(layers)}


@functools.cache
def _tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def _records(task: Task, targets: str) -> Path:
    """The teacher's top 32 at each target token of the training rows or of its answers to them, captured once."""
    written = targets != "references"
    folder = task.teacher.parent / ("cache-written" if written else "cache-top_k")
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        capture(
            LiveTeacher.load(task.teacher, str(best_cpu_dtype()).removeprefix("torch.")),
            task.rows["train"],
            partial,
            _tokenizer(task.teacher),
            kind="top_k",
            k=32,
            generation=TargetGeneration(max_new_tokens=MAX_TARGET) if written else None,
            prompt_template=task.prompt_template,
            max_source_length=MAX_SOURCE,
            max_target_length=MAX_TARGET,
            batch_size=16,
            progress=False,
        )
        os.replace(partial, folder)
    return folder


def _train_rows(task: Task, targets: str) -> Dataset:
    if targets == "references":
        return task.rows["train"]
    folder = _records(task, targets)
    rows = Dataset.from_parquet([str(file) for file in sorted(folder.glob("generated-train-*.parquet"))])
    if targets == "greedy":
        return rows
    likelihoods = folder / "mean_log_probs.json"
    if not likelihoods.exists():
        encoded = encode_rows(rows, _tokenizer(task.teacher), task.prompt_template, MAX_SOURCE, MAX_TARGET)
        teacher = load_teacher(task.teacher, dtype=best_cpu_dtype())
        sums = score({"teacher": teacher}, encoded)["teacher"]["ce"]
        write_json(likelihoods, [-float(ce) / len(row["labels"]) for ce, row in zip(sums, encoded, strict=True)])
    order = np.argsort(json.loads(likelihoods.read_text(encoding="utf-8")))
    return rows.select(order[len(rows) // 2 :])


# --- quality ---


@functools.cache
def _test_rows(task_name: str, work: Path, count: int) -> list[dict]:
    task = load_task(task_name, work)
    rows = task.rows["test"].select(range(min(count, len(task.rows["test"]))))
    return encode_rows(rows, _tokenizer(task.teacher), task.prompt_template, MAX_SOURCE, MAX_TARGET)


def measure(student, task: Task, args: argparse.Namespace) -> dict:
    """Cross-entropy, KL and agreement per target token of the test rows; ROUGE-L and distinct answers of the first."""
    rows = _test_rows(task.name, task.teacher.parents[1], args.test_rows)
    was_training = student.training
    student.eval()
    sums = score({"student": student}, rows, remembering_teacher(task.teacher, torch.float32, torch.device("cpu")))[
        "student"
    ]
    answers = generate(student, _tokenizer(task.teacher), rows[: args.generated], MAX_TARGET)
    student.train(was_training)
    tokens = sum(len(row["labels"]) for row in rows)
    result = {name: float(values.sum() / tokens) for name, values in sums.items()}
    return result | _of_texts(answers, rows)


def _of_texts(answers: list[str], rows: list[dict]) -> dict:
    scores = [rouge_l(answer, row["target"]) for answer, row in zip(answers, rows, strict=False)]
    return {"rouge_l": float(np.mean(scores)), "distinct": distinct_share(answers)}


def _setting(args: argparse.Namespace, task: Task) -> dict:
    """What all arms have in common."""
    rows = _test_rows(task.name, task.teacher.parents[1], args.test_rows)
    teacher = remembering_teacher(task.teacher, torch.float32, torch.device("cpu"))
    answers = generate(teacher, _tokenizer(task.teacher), rows[: args.generated], MAX_TARGET)
    tokens = sum(len(row["labels"]) for row in rows)
    ce = float(score({"teacher": teacher}, rows)["teacher"]["ce"].sum() / tokens)
    return {
        "task": task.name,
        "cpu_minutes": args.minutes,
        "batch_size": BATCH_SIZE,
        "heal_rows": HEAL_ROWS,
        "train_rows": len(task.rows["train"]),
        "test_rows": len(rows),
        "test_tokens": tokens,
        "generated_rows": min(args.generated, len(rows)),
        "teacher": {"ce": ce, **_of_texts(answers, rows)},
        "machine": machine_description(),
    }


# --- speed ---


def measure_latency(arms: Sequence[Arm], rounds: int) -> dict:
    """First token, step and request of each split and shape in milliseconds, by round, interleaved.

    Weights do not matter, so they are random; of a long answer the first `STEPS` are measured.
    """
    teacher = AutoConfig.from_pretrained(fetch_builtin_teacher())
    whole = Arm("teacher", teacher.num_hidden_layers)
    models = {arm.split: _untrained(arm) for arm in (whole, *arms)}
    for model in models.values():  # what happens once has happened
        greedy_decode(model, torch.ones(1, 8, dtype=torch.long), 2)
    measured: dict[str, dict[str, list]] = {shape: {split: [] for split in models} for shape in SHAPES}
    for number in range(rounds):
        for shape, (prompt, answer) in SHAPES.items():
            ids = torch.randint(teacher.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(number))
            for split, model in models.items():
                inputs = ids[:, :-1] if model.config.is_encoder_decoder else ids
                _, times = greedy_decode(model, inputs, min(answer, STEPS))
                first, step = 1e3 * times[0], 1e3 * (times[-1] - times[0]) / (len(times) - 1)
                timing = {"first_token_ms": first, "step_ms": step, "request_ms": first + (answer - 1) * step}
                measured[shape][split].append(timing)
        print(f"round {number + 1} of {rounds}", flush=True)
    return {
        "runtime": "PyTorch, float32, batch 1",
        "teacher": whole.split,
        "rounds": measured,
        "machine": machine_description(),
    }


def _untrained(arm: Arm):
    """A model of the arm's shape, at the teacher's widths, with random weights."""
    encoder, decoder = arm.layers
    config = AutoConfig.from_pretrained(fetch_builtin_teacher())
    config.num_hidden_layers = decoder
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if encoder:
        fields = RopeEncDecForConditionalGeneration.from_decoder_only(model).config.to_dict()
        fields |= {"encoder_num_hidden_layers": encoder, **arm.options}
        states, sharing = fields["cross_attention_layers"], arm.options.get("cross_attention_sharing", 1)
        fields["cross_attention_layers"] = [states[layer - layer % sharing] for layer in range(decoder)]
        model = RopeEncDecForConditionalGeneration(RopeEncDecConfig.from_dict(fields)).eval()
    return model


# --- tables and plots ---


def report(file: Path, latency_file: Path) -> None:
    """Markdown with all arms and plots of quality against the time of a request, beside `file`."""
    results = json.loads(file.read_text(encoding="utf-8"))
    latency = json.loads(latency_file.read_text(encoding="utf-8")) if latency_file.exists() else None
    parts = [tables(results, latency)]
    for shape in SHAPES if latency is not None else ():
        stem, title = f"{file.stem}-{shape.replace('/', '-')}", f"{shape.replace('/', ' tokens in, ')} out"
        plot_front(
            _points(results, latency, shape, "teacher_agreement"),
            file.with_name(f"{stem}.svg"),
            across="request / teacher's request",
            up="agreement with the teacher, %",
            title=title,
        )
        parts.append(picture(stem, title))
    file.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")


def _points(results: Mapping, latency: Mapping, shape: str, measure: str) -> dict[str, tuple[float, tuple]]:
    """For each arm with a time its request relative to the teacher's, and mean, least and largest of a measure."""
    points = {}
    for name, runs in results["arms"].items():
        if not runs or ARMS[name].split not in latency["rounds"][shape]:
            continue
        values = [MEASURES[measure][0] * run[measure] for run in runs.values()]
        time_ratio = _ratio(latency, shape, ARMS[name].split, "request_ms")
        points[ARMS[name].label] = (time_ratio, (statistics.mean(values), min(values), max(values)))
    return points


def _ratio(latency: Mapping, shape: str, split: str, timing: str) -> float:
    """Of the teacher's time, within each round; the median."""
    rounds = latency["rounds"][shape]
    pairs = zip(rounds[split], rounds[latency["teacher"]], strict=True)
    return statistics.median(own[timing] / teacher[timing] for own, teacher in pairs)


def tables(results: Mapping, latency: Mapping | None) -> str:
    setting = results["setting"]
    teacher = ", ".join(f"{name} {rounded(setting['teacher'][name], name)}" for name in setting["teacher"])
    parts = [
        f"# Task `{setting['task']}`, {setting['cpu_minutes']:g} CPU minutes each\n",
        f"{setting['test_rows']} held-out rows ({setting['test_tokens']} tokens; ROUGE-L and distinct on "
        f"{setting['generated_rows']} of them), fitted on {setting['heal_rows']} rows. Means over the seeds, in "
        f"brackets the least and the largest. The teacher: {teacher}.\n",
    ]
    header = [
        "",
        "M parameters",
        "fit, s",
        "start: KL, agreement",
        "steps",
        "seeds",
        "CE",
        "KL",
        "agreement, %",
        "ROUGE-L",
    ]
    lines = [table_line(header), table_line(["---"] * len(header))]
    for name, arm in ARMS.items():
        runs = list(results["arms"].get(name, {}).values())
        if not runs:
            continue
        start = [statistics.mean(run["start"][measure] for run in runs) for measure in ("kl", "teacher_agreement")]
        cells = [arm.label, f"{runs[0]['parameters'] / 1e6:.0f}", f"{runs[0]['start']['fit_seconds']:.0f}"]
        cells += [f"{rounded(start[0], 'kl')}, {rounded(start[1], 'teacher_agreement')}"]
        cells += [f"{statistics.mean(run['steps'] for run in runs):.0f}", str(len(runs))]
        cells += [_spread([run[measure] for run in runs], measure) for measure in MEASURES if measure != "distinct"]
        lines.append(table_line(cells))
    parts.append("\n".join(lines) + "\n")
    for name, by_seed in results["arms"].items():
        runs = [run["int4"] for run in by_seed.values() if "int4" in run]
        if not runs:
            continue
        spreads = (f"{words} {_spread([run[key] for run in runs], key)}" for key, words in _IN_WORDS.items())
        parts.append(f"With weights rounded to int4, {ARMS[name].label}: {', '.join(spreads)}.\n")
    if latency is not None:
        parts.append(_times(results, latency))
    return "\n".join(parts)


def _times(results: Mapping, latency: Mapping) -> str:
    """First token, step and request of each arm as shares of the teacher's; bold: on the front."""
    header = ["", *(f"{shape}: first token, step, request" for shape in SHAPES)]
    lines = [table_line(header), table_line(["---"] * len(header))]
    fronts = {}
    for shape in SHAPES:
        points = _points(results, latency, shape, "teacher_agreement")
        fronts[shape] = pareto_front({label: (ratio, mean) for label, (ratio, (mean, *_)) in points.items()})
    for name, arm in ARMS.items():
        if not results["arms"].get(name):
            continue
        cells = [arm.label]
        for shape in SHAPES:
            if arm.split not in latency["rounds"][shape]:
                cells.append("not timed")
                continue
            ratios = [
                _ratio(latency, shape, arm.split, f"{timing}_ms") for timing in ("first_token", "step", "request")
            ]
            text = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            cells.append(f"**{text}**" if arm.label in fronts[shape] else text)
        lines.append(table_line(cells))
    machine, rounds = latency["machine"], len(latency["rounds"][shape][latency["teacher"]])
    about = (
        f"Shares of the teacher's time ({latency['runtime']}, {machine['threads']} threads, {machine['cpu']}; medians "
        f"of {rounds} interleaved rounds). Bold: on the front, no other arm "
        "answers as soon and agrees more with the teacher.\n"
    )
    return f"{about}\n" + "\n".join(lines) + "\n"


def _spread(values: list[float], measure: str) -> str:
    mean, least, most = (rounded(value, measure) for value in (statistics.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} [{least}, {most}]"


if __name__ == "__main__":
    main()
