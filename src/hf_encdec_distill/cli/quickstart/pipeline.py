"""The quickstart, stage by stage; each leaves its result in the run's folder and is not done twice."""

from __future__ import annotations

import dataclasses
import gc
import shlex
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import transformers

from ...bench import (
    compare_cost,
    compare_latency,
    greedy_decode,
    plot_loss_curves,
    plot_quality,
)
from ...cards.model_card import write_model_card
from ...data import lead_sentence
from ...data.loading import check_path
from ...devices import autocast, device, precision_arguments, working_dtype
from ...distillation import DistillationTrainer, DistillationTrainingArguments
from ...distillation.checks.limits import max_positions
from ...evaluation.scoring import BATCH_SIZE as EVALUATION_BATCH
from ...evaluation.scoring import encode_rows, generate, score
from ...files import alone_in, write_json
from ...metrics.measures import METRICS, measure_texts
from ...metrics.significance import interval, mean
from ...metrics.texts import distinct_share, in_other_scripts
from ...models.either_version import save_teacher
from ...models.families import sliding_window_of
from ...models.loading import base_of, load_config, load_student, load_teacher, load_tokenizer
from ...models.prompts import PreTrainedTokenizerFast, encode_prompt, prompt_start_token_id
from ...models.rope_encdec import RopeEncDecForConditionalGeneration
from ...progress import Display, clock
from .._inputs import load_splits, prompt_template, teacher_path
from ..init import teacher_depth
from . import outcome, recipe
from .planning import Plan, groups_of_like_length
from .recording import record
from .report import samples_page
from .state import TITLES, TRAININGS, State, open_run
from .timed_training import InOrder, TimeShare, train, training_order
from .trimming import trim_teacher
from .tuning import tune_teacher


# The fastest machine makes fewer steps per second than this; it bounds the data order that is laid out in advance.
_STEPS_PER_SECOND = 10
_NEXT_ROWS = 32  # of the first evaluation, after which the plan is made again


class _StudentTrainer(InOrder, DistillationTrainer):
    pass


def quickstart(
    folder: Path,
    given: Mapping[str, Any],
    resume: bool = False,
    now: Callable[[], float] = time.monotonic,
    start: float | None = None,
) -> dict:
    """Run what is not done yet.

    Args:
        folder: the run's folder.
        given: fields of `state.Settings` that differ from their defaults.
        resume: go on with the run that is in `folder`; one that is finished trains on for the `minutes` given.
        now: the clock.
        start: when the command began, by that clock; what it imported counts.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: for settings that cannot work, a folder in use, or by another process, or data without the columns.
        KeyboardInterrupt: after Ctrl-C; its message says how to go on.
    """
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    state = open_run(folder, dict(given), resume, now, start)
    pipeline = Pipeline(state)
    with alone_in(folder):
        try:
            return pipeline.run()
        except KeyboardInterrupt:
            state.save()
            command = shlex.join(["hf-encdec-distill", "quickstart", "--resume", "--output", str(folder)])
            raise KeyboardInterrupt(f"stopped after {clock(state.seconds_used)}; go on with: {command}") from None


class Pipeline:
    """The stages of a run. Large things are loaded when a stage asks for them: a resumed run starts where it is."""

    def __init__(self, state: State):
        self.state, self.settings, self.folder = state, state.settings, state.folder
        self.work = state.folder / "work"
        self._stage, self._fraction = "", 0.0
        open_stages = len(self._stages) - len(state.results)
        self.display = Display(self.seconds_to_go, open_stages, seconds_late=self.seconds_late)

    @property
    def _stages(self) -> list[str]:
        optional = {"frozen": self.state.unfreezes, "more": self.state.reads_more, "twin": self.settings.twin}
        return [name for name in TITLES if optional.get(name, True)]

    def run(self) -> dict:
        stages: dict[str, Callable[[Callable[[float, str], None]], dict]] = {
            name: getattr(self, name) for name in self._stages
        }
        to_do = [name for name in stages if name not in self.state.results]
        for name in to_do:
            self._stage, self._fraction = name, 0.0
            with self.display.stage(TITLES[name]) as update:
                self.state.begin(name)
                result = stages[name](self._noting(update))
                self.state.finish(name, result)
                self._fraction = 1.0
            if result.get("note"):
                self.display.say(f"      {result['note']}")
            gc.collect()
        if to_do:
            took = clock(self.state.seconds_used)
            self.display.say(f"{self.state.minutes:g} minutes were asked for, and {took} taken")
        return self.state.results["report"]["metrics"]

    def _noting(self, update: Callable[[float, str], None]) -> Callable[[float, str], None]:
        def noting(fraction: float, detail: str = "") -> None:
            self._fraction = fraction
            update(fraction, detail)

        return noting

    # The time --------------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The stage `before` has made it."""
        return Plan(**self.state.results["before"]["plan"])

    def _seconds_to_train(self) -> float:
        """Of those that are left, what the evaluation of all rows and the report do not need."""
        return self.state.seconds_left - sum(self._to_come().values())

    def _to_come(self) -> dict[str, float]:
        """Seconds of the stages that are not done yet, of those whose cost is known."""
        plan, results = self.plan, self.state.results
        seconds = {"evaluate": plan.evaluation(plan.held_out), "latency": plan.latency()}
        seconds["report"] = recipe.REPORT_SECONDS
        if "distill" in results and self.settings.twin:
            distill, steps = results["distill"], results["distill"]["steps"] - self.state.earlier["steps"]
            seconds["twin"] = results["start"]["overhead"] + steps * distill["step_seconds"] * distill["twin_cost"]
        return {name: seconds[name] for name in seconds if name not in results}

    def seconds_to_go(self) -> float:
        """An honest guess at what is to come, more than `state.seconds_left` if the run will be late.

        Trainings take the time that there is, or a step where there is none. Other stages take what was planned, or
        what the part that is done of them says; the evaluation leaves out rows where time is short.
        """
        left, results, stage = self.state.seconds_left, self.state.results, self._stage
        if "before" not in results:  # nothing is known of the others
            return max(left, recipe.REPORT_SECONDS)
        to_come, used = self._to_come(), self.state.seconds_used
        trainings = {"teach", "start", "frozen", *self.state.trainings} & set(self._stages)
        for name in trainings - results.keys() - to_come.keys():
            of_all_weights = name in self.state.trainings and not self.state.is_frozen
            size = recipe.ALL_WEIGHTS_BATCH_SIZE if of_all_weights else recipe.BATCH_SIZE
            to_come[name] = self.plan.smallest_training(size)
        spent = used - self.state.begun.get(stage, used)
        if self._fraction:
            to_come[stage] = spent * (1 - self._fraction) / self._fraction
        elif stage in to_come:
            to_come[stage] = max(to_come[stage] - spent, 0.0)
        if "evaluate" in to_come and stage != "evaluate":
            others = sum(to_come.values()) - to_come["evaluate"]
            smallest = self.plan.evaluation(min(self.plan.held_out, EVALUATION_BATCH))
            to_come["evaluate"] = min(to_come["evaluate"], max(left - others, smallest))
        seconds = sum(to_come.values())
        return seconds if "distill" in results else max(left, seconds)

    def seconds_late(self) -> float:
        return self.seconds_to_go() - self.state.seconds_left

    # What stages share -----------------------------------------------------------------------------------------------

    @property
    def template(self) -> str:
        return prompt_template(self.settings.prompt_template, self.settings.dataset) or recipe.OTHER_TEMPLATE

    @property
    def teacher_path(self) -> str:
        """Of the untuned one, with the vocabulary of this run."""
        given = self.state.results["teacher"]["path"]
        # Else it is the run's own, for which older versions noted a path that a moved folder leaves behind.
        return given if self.state.results["data"]["teacher"] == given else str(self.work / "teacher-before")

    @cached_property
    def tokenizer(self):
        """The teacher's and the student's."""
        return load_tokenizer(self.teacher_path)

    @cached_property
    def rows(self) -> dict[str, list[dict]]:
        """All rows of train, validation and test, encoded; test rows in an order drawn from the seed."""
        splits = datasets.DatasetDict.load_from_disk(str(self.work / "data"))
        if "more" in self.state.results:
            splits["train"] = datasets.load_from_disk(str(self.work / "more-data"))
        return self._encoded(splits)

    def _encoded(self, splits: Mapping[str, datasets.Dataset]) -> dict[str, list[dict]]:
        rows = {
            name: encode_rows(split, self.tokenizer, self.template, self.state.max_prompt, recipe.MAX_TARGET)
            for name, split in splits.items()
        }
        order = np.random.default_rng(self.settings.seed).permutation(len(rows["test"]))
        rows["test"] = [rows["test"][index] for index in order]
        return rows

    @cached_property
    def _measure(self) -> str:
        """What answers are scored by: ROUGE-L, or chrF where the references have other letters than ROUGE counts."""
        targets = [row["target"] for row in self.rows["test"]]
        return "chrf" if 2 * in_other_scripts(targets) > len(targets) else "rouge_l"

    @property
    def held_out(self) -> list[dict]:
        """The test rows for which the plan has time: all models are measured on these."""
        return self.rows["test"][: self.plan.held_out]

    def answers(self, model, rows, update) -> list[str]:
        texts = generate(model, self.tokenizer, rows, recipe.MAX_TARGET, update)
        if not self.settings.is_built_in_task:
            return texts
        # The task is one sentence. An untuned teacher closes the docstring and goes on; that is not its answer.
        return [text.partition('"""')[0].strip().partition("\n")[0].strip() for text in texts]

    def load_teacher(self, path, dtype):
        return load_teacher(path, dtype=dtype).to(device())

    def load_student(self, path, dtype):
        return load_student(path, dtype=dtype).to(device())

    # Stages: each takes `update(fraction, detail)` and returns what is worth keeping ---------------------------------

    def teacher(self, update) -> dict:
        settings = self.settings
        if not settings.is_built_in_task:
            check_path(settings.dataset)  # before a teacher is downloaded
        path = teacher_path(settings.teacher)
        depth = teacher_depth(path, encoder_layers=settings.encoder_layers, decoder_layers=settings.decoder_layers)
        tokenizer = load_tokenizer(path)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {path} has no eos_token, which has to end a target: set it")
        if prompt_start_token_id(tokenizer, self.template) is None:
            raise ValueError(
                f"prompt_template={self.template!r} does not always end in the same token, from which the student "
                "would start: end it in fixed text, as in '{source}\\n\\nAnswer:'"
            )
        return {"path": path, "layers": depth, "max_prompt": _longest_prompt(path)}

    def data(self, update) -> dict:
        settings = self.settings
        # Mining all packages takes most of a minute, and yields more than can be recorded.
        packages: Literal["stdlib", "all"] = "stdlib" if self.state.begins_frozen else "all"
        splits = load_splits(settings.dataset, settings.source_column, settings.target_column, packages)
        if len(splits["train"]) < recipe.BATCH_SIZE:
            raise ValueError(
                f"{settings.dataset} has {len(splits['train'])} rows to train on, expected at least "
                f"{recipe.BATCH_SIZE}, one batch: give more rows with --dataset"
            )
        splits.save_to_disk(str(self.work / "data"))
        sizes = {name: len(split) for name, split in splits.items()}
        note = ", ".join(f"{size} rows to {name}" for name, size in sizes.items())
        given = self.state.results["teacher"]["path"]
        teacher, tokens = trim_teacher(
            given, settings.vocabulary, splits["train"], self.template, self.work / "teacher-before"
        )
        if tokens:
            note += f"; a vocabulary of {tokens[0]:,} of {tokens[1]:,} tokens"
        # Kept for the stages that come: they are encoded once in a run that is not interrupted.
        self.tokenizer = load_tokenizer(teacher)
        self.rows = self._encoded(splits)
        targets = [row["labels"] for split in self.rows.values() for row in split]
        cut = sum(labels[-1] != self.tokenizer.eos_token_id for labels in targets)
        if cut:
            note += f"; {cut} of {len(targets)} targets have more than {recipe.MAX_TARGET} tokens with EOS and are cut"
        longest = self.state.max_prompt
        full = [row["source"] for split in self.rows.values() for row in split if len(row["prompt"]) >= longest]
        cut = sum(len(encode_prompt(self.tokenizer, source, self.template)) > longest for source in full)
        if cut:
            note += f"; {cut} of {len(targets)} prompts have more than {longest} tokens and their sources are cut"
        return {"sizes": sizes, "teacher": given if teacher == given else "", "tokens": tokens, "note": note}

    def more(self, update) -> dict:
        """The held-out rows, and the vocabulary, stay those of the stage `data`."""
        splits = load_splits(self.settings.dataset, self.settings.source_column, self.settings.target_column, "all")
        splits["train"].save_to_disk(str(self.work / "more-data"))
        for name in ("rows", "_ready"):  # if they were read before
            self.__dict__.pop(name, None)
        rows = len(splits["train"])
        return {"rows": rows, "note": f"{rows} rows to train, from all installed packages"}

    def before(self, update) -> dict:
        """Measure the untuned teacher on the first rows, and plan from what they cost how many there will be."""
        seconds, start = self.state.seconds_left, self.state.now()
        teacher, now = self.load_teacher(self.teacher_path, working_dtype()), self.state.now
        load, request = now() - start, 0.0
        layers = self.settings.encoder_layers + self.settings.decoder_layers
        size = layers / self.state.results["teacher"]["layers"]
        rows, limit = self.rows["test"], recipe.FIRST_ROWS
        texts: list[str] = []
        sums: list[float] = []
        seconds_of: dict[str, list[float]] = {"generate": [], "score": []}
        counts: list[int] = []
        while (count := len(texts)) < min(limit, len(rows)):
            chunk = rows[count : min(limit, count + _NEXT_ROWS)]
            times = [now()]
            texts += self.answers(teacher, chunk, _quiet)
            times.append(now())
            sums += score({"teacher": teacher}, chunk)["teacher"]["ce"].tolist()
            times.append(now())
            for kind, first, last in (("generate", 0, 1), ("score", 1, 2)):
                seconds_of[kind].append(times[last] - times[first])
            counts.append(len(chunk))
            if not request:  # after the first rows: what happens once has happened
                greedy_decode(teacher, torch.tensor([chunk[0]["prompt"]]).to(device()), recipe.LATENCY_TOKENS)
                request = now() - times[-1]
            # The first rows, with all that happens once, only count as long as there are no others.
            of_text, of_score = (sum(s[1:] or s) / sum(counts[1:] or counts) for s in seconds_of.values())
            plan = Plan(load, of_score, of_text, request, size, len(self.state.trainings))
            plan = plan.for_run(seconds, len(texts), len(rows))
            limit = plan.held_out
            update(len(texts) / limit, f"{len(texts)} of {limit} rows")
        entry = self._entry({"ce": np.array(sums)}, texts, rows[: len(texts)])
        note = f"{len(texts)} held-out rows"
        if len(texts) < min(recipe.ENOUGH_ROWS, len(rows)):
            note += f", since {self.settings.minutes:g} minutes do not allow {min(recipe.ENOUGH_ROWS, len(rows))}"
        heading, factor, decimals, _ = METRICS[self._measure]
        score_of = f"{heading.split(',')[0]} {factor * entry[self._measure]['value']:.{decimals}f}"
        note += f": CE {entry['ce']['value']:.2f} nats per token, {score_of}"
        return {
            "ce": sums,
            "texts": texts,
            "plan": dataclasses.asdict(plan),
            "note": note,
        }

    def teach(self, update) -> dict:
        seconds, share = self._seconds_to_train(), recipe.PARTS["teach"] / sum(recipe.PARTS.values())
        taught = share * seconds
        if self.state.unfreezes:
            taught = max(share * min(seconds, 60 * recipe.FROZEN_MINUTES), recipe.LONG_TEACHER_SHARE * seconds)
        end = self.state.seconds_used + taught
        teacher = self.load_teacher(self.teacher_path, torch.float32)
        rows, plan = self.rows["train"], self.plan
        seconds = end - self.state.seconds_used
        fit = recipe.VALIDATION_SHARE * seconds / max(plan.score, 1e-9)
        validation = self.rows["validation"][: int(min(max(fit, recipe.BATCH_SIZE), recipe.VALIDATION_ROWS))]
        seconds = max(seconds - plan.score * len(validation) - plan.load, 1.0)  # as long to save as to load
        steps_a_pass = max(len(rows) // recipe.BATCH_SIZE, 1)
        steps = min(self._most_steps(), recipe.TEACHER_PASSES * steps_a_pass)
        order = training_order([len(row["prompt"]) for row in rows], recipe.BATCH_SIZE, steps, self.settings.seed)
        result = tune_teacher(
            teacher,
            self.tokenizer,
            [rows[index] for index in order],
            validation,
            steps_a_pass,
            self.work / "training-teacher",
            TimeShare(seconds, steps, recipe.TEACHER_LEARNING_RATE, update, now=self.state.now),
            recipe.BATCH_SIZE,
            self.settings.seed,
        )
        save_teacher(teacher, self.tokenizer, self.work / "teacher")
        loss = f"CE {result['held_out_loss']:.2f} on validation rows"
        return result | {"note": f"{result['steps']} steps of {recipe.BATCH_SIZE}, {loss}"}

    def start(self, update) -> dict:
        """Make the student, and record rows for it. If there will be a twin, a step of it is measured instead: the
        time has to last for both."""
        teacher = self.load_teacher(self.work / "teacher", torch.float32)
        rows = self.rows["train"]
        drawn = np.random.default_rng(self.settings.seed).permutation(len(rows))[: recipe.HEAL_ROWS]
        with autocast():  # only what the layers compute: sums and solves of the fit keep their precision
            student = RopeEncDecForConditionalGeneration.from_decoder_only(
                teacher,
                encoder_num_hidden_layers=self.settings.encoder_layers,
                decoder_num_hidden_layers=self.settings.decoder_layers,
                layer_selection=recipe.LAYER_SELECTION,
                tokenizer=self.tokenizer,
                prompt_template=self.template,
                calibration=[(rows[index]["prompt"], rows[index]["labels"]) for index in drawn],
            )
        student.save_pretrained(self.work / "start")
        parameters = student.num_parameters()
        healing = student.healing and student.healing.to_dict()
        note = f"{parameters / 1e6:.1f} M parameters"
        if healing and healing["taken"]:
            note += f", KL from the teacher {healing['kl_before']:.2f}, fitted {healing['kl_after']:.2f}"
        recorded = 0
        if self.state.begins_frozen:
            seconds = self._seconds_frozen() - 2 * self.plan.load  # the student is loaded and saved for its training
            places = self.work / "records", self.work / "states"
            recorded = record(
                teacher, student, self._ready, self.tokenizer, *places, seconds, self._time_pass, self.state.now
            )
            note += f", {recorded} rows recorded"
        del teacher, student
        twin_step, overhead = self._time_steps(1, 0.0, 0) if self.settings.twin else (0.0, 2 * self.plan.load)
        return {
            "parameters": parameters,
            "healing": healing,
            "recorded": recorded,
            "twin_step": twin_step,
            "overhead": overhead,
            "note": note,
        }

    @cached_property
    def _ready(self) -> list[dict]:
        """The training rows for a student, in an order drawn from the seed."""
        rows = self.rows["train"]
        order = np.random.default_rng(self.settings.seed + 2).permutation(len(rows))
        return [{"input_ids": rows[index]["inputs"], "labels": rows[index]["labels"]} for index in order]

    def _time_pass(self, recorded: int) -> float:
        """Seconds that one pass takes for a recorded row."""
        step, _ = self._time_steps(recipe.TIMED_STEPS, recipe.DISTILL_WEIGHT, recorded)
        return step / recipe.BATCH_SIZE

    def _time_steps(self, steps: int, distill_weight: float, recorded: int) -> tuple[float, float]:
        """Seconds of a step of a student's training, and of loading and saving around it."""
        now = self.state.now
        share = TimeShare(float("inf"), steps, _peak(recorded), _quiet, goes_on=not recorded, now=now)
        with tempfile.TemporaryDirectory(dir=self.work) as name:
            begun, folder = now(), Path(name)
            result = self._train_student(share, distill_weight, recorded, folder / "training", folder / "student")
            return result["step_seconds"], now() - begun - steps * result["step_seconds"]

    def _share(self, seconds: float, steps: int, recorded: int, update, **more) -> TimeShare:
        earlier, now = self.state.steps_before, self.state.now
        return TimeShare(seconds, steps, _peak(recorded), update, earlier=earlier, goes_on=True, now=now, **more)

    def _seconds_frozen(self) -> float:
        """For the training with a frozen encoder, and what is recorded for it."""
        seconds = self._seconds_to_train()
        if self.state.unfreezes:
            spent = self.state.seconds_used - self.state.begun["start"]
            seconds = min(seconds, 60 * recipe.FROZEN_MINUTES - spent)
        return seconds

    def frozen(self, update) -> dict:
        """The first steps of a run that unfreezes its encoder: on recorded rows, many and cheap."""
        recorded = self.state.results["start"]["recorded"]
        share = self._share(max(self._seconds_frozen() - self.plan.load, 1.0), self._most_steps(), recorded, update)
        training, target = self.work / TRAININGS["distill"], self.folder / "student"
        result = self._train_student(share, recipe.DISTILL_WEIGHT, recorded, training, target)
        return {"steps": result["steps"], "note": f"{result['steps']} steps of {recipe.BATCH_SIZE}"}

    def distill(self, update) -> dict:
        start, earlier, before = self.state.results["start"], self.state.earlier, self.state.steps_before
        share = self._share(
            # It is saved afterwards, which takes as long as to load it.
            max(self._seconds_to_train() - self.plan.load - (len(self.state.trainings) - 1) * start["overhead"], 1.0),
            before + self._most_steps(),
            self._recorded,
            update,
            twin_step=start["twin_step"],
            twin_cost=earlier["twin_cost"] or None,
        )
        training, target = self.work / TRAININGS["distill"], self.folder / "student"
        result = self._train_student(share, recipe.DISTILL_WEIGHT, self._recorded, training, target)
        note = f"{result['steps'] - before} steps of {result['batch_size']}"
        note += f", after {before} before" if before else ""
        return result | {"twin_cost": share.twin_cost, "note": note}

    def _most_steps(self) -> int:
        """Of a round: for a bound that is the same for all its parts, however often it is interrupted."""
        return int(60 * self.settings.minutes * _STEPS_PER_SECOND) + 1

    def twin(self, update) -> dict:
        """As many steps, from the same start, on the same rows at the same learning rates: only the loss differs."""
        rates = self.state.results["distill"]["rates"]
        replay = self._share(float("inf"), len(rates), self._recorded, update, replay=rates)
        training, target = self.work / TRAININGS["twin"], self.work / "student-ce"
        return self._train_student(replay, 0.0, self._recorded, training, target)

    @property
    def _recorded(self) -> int:
        """Rows that the student is trained on with its encoder frozen; 0: all, with all weights."""
        return self.state.results["start"]["recorded"] if self.state.is_frozen else 0

    def _train_student(
        self, share: TimeShare, distill_weight: float, recorded: int, training: Path, target: Path
    ) -> dict:
        """From `start`, or from the last checkpoint in `training` if there is one; on the first `recorded` rows."""
        student = self.load_student(self.work / "start", torch.float32)
        tokenizer = load_tokenizer(self.work / "start", PreTrainedTokenizerFast)
        rows = self._ready[: recorded or None]
        size = recipe.BATCH_SIZE if recorded else min(recipe.ALL_WEIGHTS_BATCH_SIZE, len(rows))
        order = training_order([len(row["input_ids"]) for row in rows], size, share.steps, self.settings.seed + 1)
        frozen: dict[str, Any] = (
            {"freeze_encoder": True, "encoder_states": str(self.work / "states")} if recorded else {}
        )
        args = DistillationTrainingArguments(
            output_dir=str(training),
            divergence=recipe.DIVERGENCE,
            distill_weight=distill_weight,
            teacher_dtype=str(working_dtype()).removeprefix("torch."),
            per_device_train_batch_size=size,
            max_steps=share.steps,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            save_total_limit=1,
            disable_tqdm=True,
            report_to="none",
            seed=self.settings.seed,
            **frozen,
            **precision_arguments(),
        )
        trainer = _StudentTrainer(
            model=student,
            args=args,
            train_dataset=[rows[index] for index in order],
            processing_class=tokenizer,
            teacher=str(self.work / ("records" if recorded else "teacher")),
        )
        result = train(trainer, share)
        (target / "README.md").unlink(missing_ok=True)  # the card of other weights
        student.save_pretrained(target)
        tokenizer.save_pretrained(target)
        return result | {"batch_size": size}

    def evaluate(self, update) -> dict:
        """All models on the same rows: those that there is time for."""
        later = {name: seconds for name, seconds in self._to_come().items() if name != "evaluate"}
        end = self.state.seconds_used + self.state.seconds_left - sum(later.values())
        held_out, dtype = self.held_out, working_dtype()
        teacher = self.load_teacher(self.work / "teacher", dtype)
        students = {"student_start": self.load_student(self.work / "start", dtype)}
        if self.settings.twin:
            students["student_ce"] = self.load_student(self.work / "student-ce", dtype)
        students["student_kd"] = self.load_student(self.folder / "student", dtype)
        writers = {"teacher": teacher} | {name: model for name, model in students.items() if name != "student_start"}
        found: list[tuple[dict, dict[str, list[str]]]] = []
        done: list[int] = []
        groups = groups_of_like_length([len(row["prompt"]) for row in held_out], EVALUATION_BATCH, self.settings.seed)
        begun = self.state.seconds_used
        for indices in groups:
            used = self.state.seconds_used
            if done and used + (used - begun) * len(indices) / len(done) > end:
                break
            batch = [held_out[index] for index in indices]
            sums = score({"teacher": teacher, **students}, batch, teacher)
            found.append((sums, {name: self.answers(model, batch, _quiet) for name, model in writers.items()}))
            done += indices
            update(len(done) / len(held_out), f"{len(done)} of {len(held_out)} rows")
        order = np.argsort(done)
        done = [done[position] for position in order]
        rows = [held_out[index] for index in done]
        sums = {
            name: {measure: np.concatenate([part[name][measure] for part, _ in found])[order] for measure in measures}
            for name, measures in found[0][0].items()
        }
        texts = {name: [text for _, part in found for text in part[name]] for name in writers}
        texts = {name: [written[position] for position in order] for name, written in texts.items()}
        texts["lead_baseline"] = [lead_sentence(row["source"]) for row in rows]
        before = self.state.results["before"]
        sums_before = {"ce": np.array(before["ce"])[done]}
        models = {"teacher_before": self._entry(sums_before, [before["texts"][index] for index in done], rows)}
        models |= {name: self._entry(sums.get(name, {}), texts.get(name), rows) for name in [*sums, "lead_baseline"]}

        differences = [self._difference("student_kd", "student_ce", sums, texts, rows)] if self.settings.twin else []
        samples = [
            {"source": row["source"], "reference": row["target"], **{name: texts[name][index] for name in texts}}
            for index, row in enumerate(rows[: recipe.SAMPLES])
        ]
        result = {"rows": len(rows), "models": models, "differences": differences, "samples": samples}
        result["distinct_references"] = distinct_share([row["target"] for row in rows])
        if len(rows) < len(held_out):
            result["note"] = f"{len(rows)} of {len(held_out)} rows, for all models: the time was over"
        return result

    def _difference(self, of: str, minus: str, sums, texts, rows: list[dict]) -> dict:
        """Of two models, row by row."""
        difference: dict[str, Any] = {"of": of, "minus": minus}
        tokens = np.array([len(row["labels"]) for row in rows])
        for measure in sums[of]:
            first, second = (mean(sums[name][measure], tokens) for name in (of, minus))
            difference[measure] = interval(first, second)
        name = self._measure
        first, second = (measure_texts([name], texts[model], rows)[name] for model in (of, minus))
        return difference | {name: interval(first, second)}

    def _entry(self, sums: Mapping[str, np.ndarray], texts: list[str] | None, rows: list[dict]) -> dict:
        """One model of metrics.json, see `hf_encdec_distill.cards.model_card`."""
        tokens = np.array([len(row["labels"]) for row in rows])
        entry: dict[str, Any] = {"n": len(rows)}
        entry |= {measure: interval(mean(values, tokens)) for measure, values in sums.items()}
        if texts is not None:
            entry[self._measure] = interval(measure_texts([self._measure], texts, rows)[self._measure])
            entry["distinct"] = distinct_share(texts)
        return entry

    def latency(self, update) -> dict:
        dtype, tokens = working_dtype(), recipe.LATENCY_TOKENS
        student = self.load_student(self.folder / "student", dtype)
        teacher = self.load_teacher(self.work / "teacher", dtype)
        prompts = [row["prompt"] for row in self.held_out[: self.plan.rounds]]
        measured = compare_latency(student, teacher, prompts, new_tokens=tokens, rounds=len(prompts), dtype=dtype)
        cost = compare_cost(student, teacher, round(measured.prompt_length), tokens, dtype)
        return {"latency": measured.to_dict(), "cost": cost.to_dict()}

    def report(self, update) -> dict:
        metrics = outcome.metrics(self.state, self.tokenizer, self.template)
        # Beside the card too, which goes to the Hub with the student's folder.
        for folder in (self.folder, self.folder / "student"):
            plot_loss_curves(metrics["curves"], folder / "loss.png")
            plot_quality(metrics["models"], folder / "quality.png", spread=metrics["spread"])
            write_json(folder / "recipe.json", outcome.recipe_file(self.state))
        write_json(self.folder / "metrics.json", metrics)
        (self.folder / "samples.md").write_text(
            samples_page(metrics["samples"], "python" if self.settings.is_built_in_task else ""), encoding="utf-8"
        )
        write_model_card(self.folder / "student", metrics)
        return {"metrics": metrics}


def _peak(recorded: int) -> float:
    """The student's learning rate: on recorded rows with a frozen encoder, or of all weights."""
    return recipe.STUDENT_LEARNING_RATE if recorded else recipe.ALL_WEIGHTS_LEARNING_RATE


def _longest_prompt(teacher: str) -> int:
    """Tokens of a prompt that leave room for an answer: a student attends in full, as far as its teacher's window.

    Raises:
        ValueError: there is hardly any.
    """
    config = load_config(base_of(teacher))
    positions = sliding_window_of(config) or max_positions(config) or recipe.MAX_PROMPT + recipe.MAX_TARGET
    if positions < 2 * recipe.MAX_TARGET:
        raise ValueError(
            f"{teacher} reads {positions} tokens at once, expected at least {2 * recipe.MAX_TARGET}, half of them for "
            "the answer: choose another teacher"
        )
    return min(recipe.MAX_PROMPT, positions - recipe.MAX_TARGET)


def _quiet(fraction: float, detail: str) -> None:
    pass
