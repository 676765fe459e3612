"""A model card written during training: `trainer.add_callback(ModelCardCallback(trainer))`."""

import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from transformers import TrainerCallback
from transformers.modelcard import extract_hyperparameters_from_trainer

from ..bench import EnergyMeter, compare_cost, machine_description, versions
from ..distillation import CachedTeacher, DistillationTrainer, LiveTeacher, ServedTeacher
from ..distillation.arguments import OWN_FIELDS
from .model_card import card_text, check, teacher_entry, write_model_card


MARK = "<!-- Written by ModelCardCallback, which rewrites it until you delete this line. -->"
# In every card, since few know these defaults; other fields only where they are not at theirs.
_ALWAYS = ("divergence", "distill_weight", "distill_temperature")
_ELSEWHERE = {"prompt_template", "source_column", "target_column", "encoder_states"}  # in the card, or of this copy
# As RopeEncDec, BART and T5 call them.
_ENCODER_LAYERS = ("encoder_num_hidden_layers", "encoder_layers", "num_layers")
_DECODER_LAYERS = ("decoder_num_hidden_layers", "decoder_layers", "num_decoder_layers")
_NO_MEASURES = (
    "loss",
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "jit_compilation_time",
    "model_preparation_time",
)
_SOURCE, _TARGET = 128, 32  # tokens of the request whose cost is counted, where the arguments set no limit


class ModelCardCallback(TrainerCallback):
    """Writes `README.md` into `output_dir` at each save and evaluation after the first step, and at the end.

    The card has numbers only if `eval_dataset` was evaluated with the weights as they are then. It never overwrites a
    card that it did not write. The card has the energy if counters can be read
    (`bench.EnergyMeter`), and CO2 if `energy={"grid_g_per_kwh": ..., "location": "..."}` gives the source.

    Args:
        trainer: the card describes its teacher, student, data, arguments and evaluation.
        known: what a trainer cannot know, in the structure of `hf_encdec_distill.cards.model_card`, for instance
            `task={"name": "...", "language": "en"}` or `data={"name": "...", "license": "..."}`; it takes
            precedence.

    Raises:
        ValueError: when training begins, if `known` contradicts the structure.
    """

    def __init__(self, trainer: DistillationTrainer, **known: Any):
        self.trainer, self.known = trainer, known
        self._begun_at, self._meter, self._energy = 0, None, None
        self._evaluation: Mapping[str, Any] | None = None  # of the weights as they are
        self._evaluations: dict[int, Mapping[str, Any]] = {}  # by their steps

    def on_train_begin(self, args, state, control, **kwargs):
        # An error in `known` is raised now, not after the training; whether counters can be read is not known yet.
        metrics = self.metrics()
        check(metrics)
        card_text({**metrics, "energy": {"kwh": 0.0, "counters": "", **(metrics["energy"] or {})}}, "")
        self._begun_at, self._meter, self._energy = state.global_step, EnergyMeter(), None
        self._evaluation, self._evaluations = None, {}

    def on_step_end(self, args, state, control, **kwargs):
        self._meter.update()
        self._evaluation = None

    def on_evaluate(self, args, state, control, metrics=None, eval_dataloader=None, **kwargs):
        if "eval_loss" in (metrics or {}) and self._is_of_eval_dataset(eval_dataloader):
            self._evaluation = self._evaluations[state.global_step] = metrics
        self._write(args, state)

    def _is_of_eval_dataset(self, loader) -> bool:
        """`trainer.evaluate(other_rows)` measures others. Without unused columns the rows are another `Dataset`."""
        rows, expected = getattr(loader, "dataset", None), self.trainer.eval_dataset
        if rows is expected or not isinstance(expected, datasets.Dataset):
            return rows is expected
        expected = self.trainer.get_eval_dataloader().dataset
        return getattr(rows, "_fingerprint", None) == getattr(expected, "_fingerprint", "")

    def on_save(self, args, state, control, **kwargs):
        self._write(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._meter.update()
        self._energy = self._meter.result()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            step = int(state.best_model_checkpoint.rpartition("-")[2])
            self._evaluation = self._evaluations.get(step)
        self._write(args, state)

    def _write(self, args, state) -> None:
        card = Path(args.output_dir) / "README.md"
        ours = not card.is_file() or MARK in card.read_text(encoding="utf-8", errors="replace")
        if state.is_world_process_zero and state.global_step and ours:
            write_model_card(card, self.metrics(), self.trainer.hub_model_id or args.hub_model_id)

    def metrics(self) -> dict[str, Any]:
        """What `write_model_card` takes."""
        found = {
            "note": MARK,
            "teacher": self._teacher,
            "student": self._student(),
            "vision_tower": self._vision_tower,
            "task": {
                "prompt_template": self.trainer.args.prompt_template,
                "built_in": self.trainer.data_collator.reads_prompt(),
            },
            "data": self._data(),
            "recipe": self._recipe(),
            "stages": self._stages(),
            "machine": machine_description(),
            "energy": self._energy,
            "cost": self._cost(),
            **self._quality(),
        }
        for key, value in self.known.items():
            both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
            found[key] = {**found[key], **value} if both else value
        return found

    @cached_property
    def _teacher(self) -> dict[str, Any]:
        teacher = self.trainer.teacher
        if isinstance(teacher, CachedTeacher):
            name = teacher.manifest["teacher"]
        elif isinstance(teacher, ServedTeacher):
            name = teacher.describe()["model"]
        else:
            name = getattr(teacher.model.config, "_name_or_path", None)
        return teacher_entry(name) if name else {}

    @cached_property
    def _vision_tower(self) -> dict[str, Any]:
        config = getattr(self.trainer.model.config, "vision_config", None)
        if config is None:
            return {}
        entry = teacher_entry(config._name_or_path) if config._name_or_path else {}
        return {**entry, "model_type": config.model_type}

    def _student(self) -> dict[str, Any]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        config = model.config
        known = {
            "model_type": ("model_type",),
            "encoder_layers": _ENCODER_LAYERS,
            "decoder_layers": _DECODER_LAYERS,
            "cross_attention": ("cross_attention",),
            "encoder_attention": ("encoder_attention",),
        }
        there = {
            key: [getattr(config, name) for name in names if hasattr(config, name)] for key, names in known.items()
        }
        student = {key: values[0] for key, values in there.items() if values}
        if not config.is_encoder_decoder:
            student["layers"] = config.num_hidden_layers
            student["chat_template"] = getattr(self.trainer.data_collator.tokenizer, "chat_template", None) is not None
        if not self.trainer.is_sharded:
            student["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        return student

    def _data(self) -> dict[str, Any]:
        rows, held_out = self.trainer.train_dataset, self.trainer.eval_dataset
        data = {"split": "validation", "train_rows": _length(rows), "validation_rows": _length(held_out)}
        info, fingerprint = getattr(rows, "info", None), getattr(rows, "_fingerprint", None)
        if fingerprint is not None:
            data["description"] = f"Fingerprint of the training rows in datasets: `{fingerprint}`"
        # Files of a data set on the Hub are recorded as hf://datasets/user/name@commit/path.
        for file in getattr(info, "download_checksums", None) or ():
            found = re.match(r"hf://datasets/([^@]+)@([^/]+)/", file)
            if found:
                data |= {"name": found[1], "hub_id": found[1], "license": getattr(info, "license", None) or None}
                data["description"] = f"Commit `{found[2]}`. {data['description']}"
                break
        return data

    def _recipe(self) -> dict[str, Any]:
        args = self.trainer.args
        recipe = {name: getattr(args, name) for name in OWN_FIELDS if name not in _ELSEWHERE}
        recipe = {name: value for name, value in recipe.items() if name in _ALWAYS or value != OWN_FIELDS[name]}
        said = ", ".join(f"{name} {version}" for name, version in versions().items())
        given = extract_hyperparameters_from_trainer(self.trainer)
        return {**recipe, **given, "learning_rate": self._learning_rate(), "versions": said}

    def _learning_rate(self) -> float:
        """The peak in the optimizer: a script may have made that itself, and then the argument was not used."""
        groups = getattr(self.trainer.optimizer, "param_groups", None) or [{"lr": self.trainer.args.learning_rate}]
        return max(float(group.get("initial_lr", group["lr"])) for group in groups)

    def _cost(self) -> dict[str, Any] | None:
        """Sizes and counted operations against the teacher; None if the formulas do not cover one of the two."""
        args, teacher = self.trainer.args, self.trainer.teacher
        if not isinstance(teacher, LiveTeacher):
            return None
        student = self.trainer.accelerator.unwrap_model(self.trainer.model)
        lengths = (args.max_source_length or _SOURCE, args.max_target_length or _TARGET)
        try:
            return compare_cost(student.config, teacher.model.config, *lengths).to_dict()
        except ValueError:
            return None

    def _stages(self) -> list[dict[str, Any]]:
        state = self.trainer.state
        seconds = [row["train_runtime"] for row in state.log_history if "train_runtime" in row]
        steps = state.global_step - self._begun_at
        if not seconds or not steps:  # `--resume` of a run that has come to its end makes none
            return []
        note = f"continued from step {self._begun_at}; earlier time not included" if self._begun_at else ""
        return [{"name": "training", "steps": steps, "seconds": seconds[-1], "note": note}]

    def _quality(self) -> dict[str, Any]:
        """The evaluation of these weights, as the one entry of `models`."""
        args, rows = self.trainer.args, _length(self.trainer.eval_dataset)
        if self._evaluation is None or rows is None:
            return {}
        last = {name[len("eval_") :]: x for name, x in self._evaluation.items() if name.startswith("eval_")}
        last = {name: x for name, x in last.items() if isinstance(x, (int, float)) and math.isfinite(x)}
        divergence, ce = last.pop("distill_loss", None), last.pop("ce_loss", None)
        entry = {
            "n": rows,
            "parameters": self._student().get("parameters"),
            "ce": ce,
            "teacher_agreement": last.pop("teacher_agreement", None),
        }
        of_all_tokens = args.vocab_policy != "universal" and isinstance(self.trainer.teacher, LiveTeacher)
        if of_all_tokens and (args.divergence, args.distill_temperature) == ("forward_kl", 1.0):
            entry["kl"] = divergence
        entry["logged"] = {name: x for name, x in last.items() if name not in _NO_MEASURES}
        key = "student_kd" if args.distill_weight else "student_ce"
        return {"seeds": [args.seed], "models": {key: entry}, "published": key}


def _length(rows) -> int | None:
    """Rows of a dataset; None for a stream, for several datasets, and for none."""
    return len(rows) if rows is not None and hasattr(rows, "__len__") and not isinstance(rows, Mapping) else None
