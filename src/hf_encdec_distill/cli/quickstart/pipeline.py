"""The quickstart, stage by stage; each leaves its result in the run's folder and is not done twice."""

from __future__ import annotations

import dataclasses
import gc
import platform
import shlex
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import transformers

from ...bench import compare_cost, compare_latency, machine_description, plot_loss_curves, plot_quality
from ...cards.model_card import teacher_entry, write_model_card
from ...data import lead_sentence
from ...data.builtin_teacher import FACTS
from ...data.python_docstrings import ROWS_LICENSE
from ...devices import device, precision_arguments, working_dtype
from ...distillation import DistillationTrainer, DistillationTrainingArguments
from ...evaluation.scoring import encode_rows, generate, score
from ...files import write_json
from ...metrics.measures import measure_texts
from ...metrics.significance import interval, mean
from ...metrics.texts import distinct_share
from ...models.either_version import save_teacher
from ...models.loading import load_config, load_student, load_teacher, load_tokenizer
from ...models.prompts import PreTrainedTokenizerFast, encode_prompt, prompt_start_token_id
from ...models.rope_encdec import RopeEncDecForConditionalGeneration
from ...progress import Display, clock
from .._inputs import BUILT_IN, dataset_name, load_splits, prompt_template, teacher_path
from .report import percent, samples_page
from .state import State, open_run
from .timed_training import InOrder, TimeShare, train, training_order
from .tuning import PEAK_LEARNING_RATE, tune_teacher


BATCH_SIZE = 8
STUDENT_LEARNING_RATE = 1e-3
DIVERGENCE, DISTILL_WEIGHT = "forward_kl", 0.9
MAX_PROMPT, MAX_TARGET = 256, 32  # tokens
CALIBRATION_ROWS = 32
VALIDATION_ROWS = 96
SAMPLES = 10
LATENCY_PROMPTS, LATENCY_TOKENS = 8, 32
OTHER_TEMPLATE = "{source}\n\nAnswer:"
# The fastest machine makes fewer steps a second than this; it bounds the data order that is laid out in advance.
_STEPS_PER_SECOND = 10
_TEACHER_PASSES = 3

# What each stage may take of the time that is left when it begins, against those that follow.
SHARES = {
    "teacher": 3,
    "data": 3,
    "before": 6,
    "teach": 16,
    "start": 2,
    "distill": 36,
    "twin": 20,
    "evaluate": 12,
    "latency": 2,
    "report": 1,
}
TITLES = {
    "teacher": "fetch the teacher",
    "data": "mine the data",
    "before": "evaluate the teacher as it is",
    "teach": "teach the teacher the task",
    "start": "cut the student out of the teacher",
    "distill": "train the student on the teacher",
    "twin": "train its twin on the labels alone",
    "evaluate": "evaluate on held-out rows",
    "latency": "measure the latency",
    "report": "write the report",
}


class _StudentTrainer(InOrder, DistillationTrainer):
    pass


def quickstart(folder: Path, given: Mapping[str, Any], resume: bool = False) -> dict:
    """Run what is not done yet.

    Args:
        folder: the run's folder.
        given: fields of `state.Settings` that differ from their defaults.
        resume: go on with the run that is in `folder`.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: for settings that cannot work, a folder in use, or data without the columns.
        KeyboardInterrupt: after Ctrl-C; its message says how to go on.
    """
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    state = open_run(folder, dict(given), resume)
    pipeline = Pipeline(state)
    try:
        metrics = pipeline.run()
    except KeyboardInterrupt:
        state.save()
        command = shlex.join(["hf-encdec-distill", "quickstart", "--resume", "--output", str(folder)])
        raise KeyboardInterrupt(f"stopped after {clock(state.seconds_used)}; go on with: {command}") from None
    return metrics


class Pipeline:
    """The stages of a run. Large things are loaded when a stage asks for them: a resumed run starts where it is."""

    def __init__(self, state: State):
        self.state, self.settings, self.folder = state, state.settings, state.folder
        self.work = state.folder / "work"
        open_stages = len(SHARES) - len(state.results)
        self.display = Display(lambda: state.seconds_left, open_stages)

    def run(self) -> dict:
        stages: dict[str, Callable[[Callable[[float, str], None], float], dict]] = {
            name: getattr(self, name) for name in SHARES
        }
        for name, stage in stages.items():
            if name in self.state.results:
                continue
            before = self.state.seconds_used
            with self.display.stage(TITLES[name]) as update:
                result = stage(update, self.state.begin(name, self._share(name)))
            result["seconds"] = result.get("seconds", self.state.seconds_used - before)
            self.state.finish(name, result)
            if result.get("note"):
                self.display.say(f"      {result['note']}")
            gc.collect()
        return self.state.results["report"]["metrics"]

    def _share(self, stage: str) -> float:
        """Seconds that a stage may take; one at least, however late it is."""
        names = list(SHARES)
        weights = [SHARES[name] for name in names[names.index(stage) :]]
        return max(self.state.seconds_left * weights[0] / sum(weights), 1.0)

    # What stages share -----------------------------------------------------------------------------------------------

    @property
    def built_in_task(self) -> bool:
        return self.settings.dataset == BUILT_IN

    @property
    def template(self) -> str:
        return prompt_template(self.settings.prompt_template, self.settings.dataset) or OTHER_TEMPLATE

    @property
    def teacher_path(self) -> str:
        return self.state.results["teacher"]["path"]

    @cached_property
    def tokenizer(self):
        """The teacher's."""
        return load_tokenizer(self.teacher_path)

    @cached_property
    def rows(self) -> dict[str, list[dict]]:
        """All rows of train, validation and test, encoded; test rows in an order drawn from the seed."""
        splits = datasets.DatasetDict.load_from_disk(str(self.work / "data"))
        rows = {
            name: encode_rows(split, self.tokenizer, self.template, MAX_PROMPT, MAX_TARGET)
            for name, split in splits.items()
        }
        order = np.random.default_rng(self.settings.seed).permutation(len(rows["test"]))
        rows["test"] = [rows["test"][index] for index in order]
        return rows

    @property
    def held_out(self) -> list[dict]:
        """The test rows that the first evaluation had time for: all models are measured on these."""
        return self.rows["test"][: self.state.results["before"]["rows"]]

    def answers(self, model, rows, update) -> list[str]:
        texts = generate(model, self.tokenizer, rows, MAX_TARGET, update)
        if not self.built_in_task:
            return texts
        # The task is one sentence. An untuned teacher closes the docstring and goes on; that is not its answer.
        return [text.partition('"""')[0].strip().partition("\n")[0].strip() for text in texts]

    def load_teacher(self, path, dtype):
        return load_teacher(path, dtype=dtype).to(device())

    def load_student(self, path, dtype):
        return load_student(path, dtype=dtype).to(device())

    # Stages: each takes `update(fraction, detail)` and its share in seconds, and returns what is worth keeping -------

    def teacher(self, update, share) -> dict:
        path = teacher_path(self.settings.teacher)
        config = load_config(path)
        depth = config.get_text_config(decoder=True).num_hidden_layers
        for side in ("encoder_layers", "decoder_layers"):
            if getattr(self.settings, side) > depth:
                raise ValueError(
                    f"{side}={getattr(self.settings, side)}, but the teacher has {depth} layers: give at most {depth} "
                    f"with --{side.replace('_', '-')}"
                )
        tokenizer = load_tokenizer(path)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {path} has no eos_token, which has to end a target: set it")
        if prompt_start_token_id(tokenizer, self.template) is None:
            raise ValueError(
                f"prompt_template={self.template!r} does not always end in the same token, from which the student "
                "would start: end it in fixed text, as in '{source}\\n\\nAnswer:'"
            )
        return {"path": path, "layers": depth}

    def data(self, update, share) -> dict:
        settings = self.settings
        # Mining all packages takes most of a minute, and yields more than a short run can read.
        packages: Literal["stdlib", "all"] = "all" if settings.minutes >= 30 else "stdlib"
        splits = load_splits(settings.dataset, settings.source_column, settings.target_column, packages)
        splits.save_to_disk(str(self.work / "data"))
        sizes = {name: len(split) for name, split in splits.items()}
        note = ", ".join(f"{size} rows to {name}" for name, size in sizes.items())
        return {"sizes": sizes, "note": note}

    def before(self, update, share) -> dict:
        teacher = self.load_teacher(self.teacher_path, working_dtype())
        rows, texts, sums, start, count = self.rows["test"], [], [], self.state.seconds_used, 0
        while count < len(rows):
            used = self.state.seconds_used - start
            # Rows are taken until the next ones would not end in time; all later evaluations are on as many.
            if count and used * (count + 2 * BATCH_SIZE) / count > share:
                break
            chunk = rows[count : count + 2 * BATCH_SIZE]
            texts += self.answers(teacher, chunk, lambda *_: None)
            sums.append(score({"teacher": teacher}, chunk)["teacher"]["ce"])
            count += len(chunk)
            update((self.state.seconds_used - start) / share, f"{count} rows")
        entry = self._entry({"ce": np.concatenate(sums)}, texts, rows[:count])
        note = (
            f"{count} held-out rows: CE {entry['ce']['value']:.2f} nats per token, ROUGE-L {percent(entry['rouge_l'])}"
        )
        return {"rows": count, "entry": entry, "note": note}

    def teach(self, update, share) -> dict:
        teacher = self.load_teacher(self.teacher_path, torch.float32)
        rows = self.rows["train"]
        steps_a_pass = max(len(rows) // BATCH_SIZE, 1)
        steps = min(int(share * _STEPS_PER_SECOND) + 1, _TEACHER_PASSES * steps_a_pass)
        order = training_order([len(row["prompt"]) for row in rows], BATCH_SIZE, steps, self.settings.seed)
        result = tune_teacher(
            teacher,
            self.tokenizer,
            [rows[index] for index in order],
            self.rows["validation"][:VALIDATION_ROWS],
            steps_a_pass,
            self.work / "training-teacher",
            TimeShare(share, steps, PEAK_LEARNING_RATE, update),
            BATCH_SIZE,
            self.settings.seed,
        )
        save_teacher(teacher, self.tokenizer, self.work / "teacher")
        loss = f"CE {result['held_out_loss']:.2f} on validation rows"
        return result | {"note": f"{result['steps']} steps of {BATCH_SIZE}, {loss}"}

    def start(self, update, share) -> dict:
        teacher = self.load_teacher(self.work / "teacher", torch.float32)
        rows = self.rows["train"]
        drawn = np.random.default_rng(self.settings.seed).permutation(len(rows))[:CALIBRATION_ROWS]
        student = RopeEncDecForConditionalGeneration.from_decoder_only(
            teacher,
            encoder_num_hidden_layers=self.settings.encoder_layers,
            decoder_num_hidden_layers=self.settings.decoder_layers,
            tokenizer=self.tokenizer,
            prompt_template=self.template,
            calibration=[(rows[index]["prompt"], rows[index]["labels"]) for index in drawn],
        )
        student.save_pretrained(self.work / "start")
        parameters = student.num_parameters()
        return {"parameters": parameters, "note": f"{parameters / 1e6:.1f} M parameters"}

    def distill(self, update, share) -> dict:
        clock_share = TimeShare(share, int(share * _STEPS_PER_SECOND) + 1, STUDENT_LEARNING_RATE, update)
        result = self._train_student(clock_share, DISTILL_WEIGHT, "student")
        return result | {"note": f"{result['steps']} steps of {BATCH_SIZE}"}

    def twin(self, update, share) -> dict:
        """As many steps, from the same start, on the same rows at the same learning rates: only the loss differs."""
        rates = self.state.results["distill"]["rates"]
        replay = TimeShare(float("inf"), len(rates), STUDENT_LEARNING_RATE, update, rates)
        return self._train_student(replay, 0.0, "work/student-ce")

    def _train_student(self, share: TimeShare, distill_weight: float, target: str) -> dict:
        student = self.load_student(self.work / "start", torch.float32)
        tokenizer = load_tokenizer(self.work / "start", PreTrainedTokenizerFast)
        rows = self.rows["train"]
        order = training_order([len(row["prompt"]) for row in rows], BATCH_SIZE, share.steps, self.settings.seed + 1)
        ready = [{"input_ids": row["inputs"], "labels": row["labels"]} for row in rows]
        args = DistillationTrainingArguments(
            output_dir=str(self.work / f"training-{Path(target).name}"),
            divergence=DIVERGENCE,
            distill_weight=distill_weight,
            teacher_dtype=str(working_dtype()).removeprefix("torch."),
            per_device_train_batch_size=BATCH_SIZE,
            max_steps=share.steps,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            save_total_limit=1,
            disable_tqdm=True,
            report_to="none",
            seed=self.settings.seed,
            **precision_arguments(),
        )
        trainer = _StudentTrainer(
            model=student,
            args=args,
            train_dataset=[ready[index] for index in order],
            processing_class=tokenizer,
            teacher=str(self.work / "teacher"),
        )
        result = train(trainer, share)
        student.save_pretrained(self.folder / target)
        tokenizer.save_pretrained(self.folder / target)
        return result

    def evaluate(self, update, share) -> dict:
        rows, dtype = self.held_out, working_dtype()
        teacher = self.load_teacher(self.work / "teacher", dtype)
        students = {
            "student_start": self.load_student(self.work / "start", dtype),
            "student_ce": self.load_student(self.work / "student-ce", dtype),
            "student_kd": self.load_student(self.folder / "student", dtype),
        }
        part = _Parts(update, 4)
        sums = score({"teacher": teacher, **students}, rows, teacher, part.next())
        texts = {"teacher": self.answers(teacher, rows, part.next())}
        for name in ("student_ce", "student_kd"):
            texts[name] = self.answers(students[name], rows, part.next())
        texts["lead_baseline"] = [lead_sentence(row["source"]) for row in rows]
        models = {name: self._entry(sums.get(name, {}), texts.get(name), rows) for name in [*sums, "lead_baseline"]}

        tokens = np.array([len(row["labels"]) for row in rows])
        difference: dict[str, Any] = {"of": "student_kd", "minus": "student_ce"}
        for measure in sums["student_kd"]:
            kd, ce = (mean(sums[name][measure], tokens) for name in ("student_kd", "student_ce"))
            difference[measure] = interval(kd, ce)
        kd, ce = (measure_texts(["rouge_l"], texts[name], rows)["rouge_l"] for name in ("student_kd", "student_ce"))
        difference["rouge_l"] = interval(kd, ce)

        samples = [
            {"source": row["source"], "reference": row["target"], **{name: texts[name][index] for name in texts}}
            for index, row in enumerate(rows[:SAMPLES])
        ]
        return {"models": models, "differences": [difference], "samples": samples}

    def _entry(self, sums: Mapping[str, np.ndarray], texts: list[str] | None, rows: list[dict]) -> dict:
        """One model of metrics.json, see `hf_encdec_distill.cards.model_card`."""
        tokens = np.array([len(row["labels"]) for row in rows])
        entry: dict[str, Any] = {"n": len(rows)}
        entry |= {measure: interval(mean(values, tokens)) for measure, values in sums.items()}
        if texts is not None:
            entry["rouge_l"] = interval(measure_texts(["rouge_l"], texts, rows)["rouge_l"])
            entry["distinct"] = distinct_share(texts)
        return entry

    def latency(self, update, share) -> dict:
        dtype = working_dtype()
        student = self.load_student(self.folder / "student", dtype)
        teacher = self.load_teacher(self.work / "teacher", dtype)
        prompts = [row["prompt"] for row in self.held_out[:LATENCY_PROMPTS]]
        measured = compare_latency(
            student, teacher, prompts, new_tokens=LATENCY_TOKENS, rounds=len(prompts), dtype=dtype
        )
        cost = compare_cost(student, teacher, round(measured.prompt_length), LATENCY_TOKENS, dtype)
        return {"latency": measured.to_dict(), "cost": cost.to_dict()}

    def report(self, update, share) -> dict:
        metrics = self._metrics()
        # Beside the card too, which goes to the Hub with the student's folder.
        for folder in (self.folder, self.folder / "student"):
            plot_loss_curves(metrics["curves"], folder / "loss.png")
            plot_quality(metrics["models"], folder / "quality.png", spread=metrics["spread"])
            write_json(folder / "recipe.json", self._recipe_file())
        write_json(self.folder / "metrics.json", metrics)
        (self.folder / "samples.md").write_text(
            samples_page(metrics["samples"], "python" if self.built_in_task else ""), encoding="utf-8"
        )
        write_model_card(self.folder / "student", metrics)
        return {"metrics": metrics}

    def _metrics(self) -> dict:
        results, settings = self.state.results, self.settings
        teacher = FACTS if settings.teacher == BUILT_IN else teacher_entry(settings.teacher)
        config = load_config(self.folder / "student")
        held_out = results["before"]["rows"]
        models = {"teacher_before": results["before"]["entry"], **results["evaluate"]["models"]}
        for name in ("student_start", "student_ce", "student_kd"):
            models[name]["parameters"] = results["start"]["parameters"]
        teacher_parameters = results["latency"]["cost"]["teacher"]["parameters"]["total"]
        models["teacher_before"]["parameters"] = models["teacher"]["parameters"] = teacher_parameters
        sizes = results["data"]["sizes"]
        return {
            "title": f"{teacher['name']} as an encoder-decoder",
            "task": self._task(),
            "teacher": {
                **teacher,
                "adaptation": f"all layers, {results['teach']['steps']} steps of {BATCH_SIZE}",
            },
            "student": {
                "encoder_layers": settings.encoder_layers,
                "decoder_layers": settings.decoder_layers,
                "cross_attention": config.cross_attention,
                "encoder_attention": config.encoder_attention,
                "parameters": results["start"]["parameters"],
            },
            "data": {
                "name": dataset_name(settings.dataset),
                "license": ROWS_LICENSE if self.built_in_task else None,
                "train_rows": sizes["train"],
                "validation_rows": sizes.get("validation"),
                "test_rows": held_out,
            },
            "recipe": self._recipe(),
            "stages": [
                {"name": TITLES[name], "steps": results[name].get("steps"), "seconds": results[name]["seconds"]}
                for name in SHARES
                if name in results
            ],
            "seeds": [settings.seed],
            "spread": f"95 % interval, bootstrap over the {held_out} held-out rows (one seed of training)",
            "models": models,
            "differences": results["evaluate"]["differences"],
            "latency": results["latency"]["latency"],
            "cost": results["latency"]["cost"],
            "machine": machine_description(),
            "curves": {"student_ce": results["twin"]["curve"], "student_kd": results["distill"]["curve"]},
            "samples": results["evaluate"]["samples"],
            "figures": {"Loss": "loss.png", "Quality": "quality.png"},
        }

    def _task(self) -> dict:
        read = PreTrainedTokenizerFast.from_pretrained(self.folder / "student")("a")["input_ids"]
        built_in = read == encode_prompt(self.tokenizer, "a", self.template)[:-1]
        task = {"prompt_template": self.template, "built_in": built_in}
        task |= {"pipeline_tag": "summarization", "language": "en"}
        if self.built_in_task:
            return task | {
                "name": "Python docstrings",
                "description": "Reads a Python function without its docstring and writes the first sentence of the "
                "docstring.",
            }
        return task | {"name": self.settings.dataset}

    def _recipe(self) -> dict:
        results = self.state.results
        return {
            "divergence": DIVERGENCE,
            "distill_weight": DISTILL_WEIGHT,
            "steps": results["distill"]["steps"],
            "batch_size": BATCH_SIZE,
            "learning_rate": _peak(results["distill"]["rates"]),
            "schedule": "warm-up over 20 steps, then linear to zero",
            "teacher_steps": results["teach"]["steps"],
            "teacher_learning_rate": _peak(results["teach"]["rates"]),
            "max_prompt_tokens": MAX_PROMPT,
            "max_target_tokens": MAX_TARGET,
            "precision": str(working_dtype()).removeprefix("torch."),
            "seed": self.settings.seed,
        }

    def _recipe_file(self) -> dict:
        return {
            "settings": dataclasses.asdict(self.settings),
            "recipe": self._recipe(),
            "versions": {name: _version(name) for name in _VERSIONS} | {"python": platform.python_version()},
            "machine": machine_description(),
        }


def _peak(rates: list[float]) -> float:
    """The largest learning rate of a training, which the clock decided; to three digits."""
    return float(f"{max(rates):.3g}")


_VERSIONS = ("hf-encdec-distill", "torch", "transformers", "accelerate", "datasets", "tokenizers")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class _Parts:
    """Splits one progress bar into equal parts."""

    def __init__(self, update: Callable[[float, str], None], parts: int):
        self.update, self.parts, self.begun = update, parts, 0

    def next(self) -> Callable[[float, str], None]:
        before, self.begun = self.begun, self.begun + 1
        return lambda fraction, detail: self.update((before + fraction) / self.parts, detail)
