"""What a run leaves to read, `metrics.json` and `recipe.json`, from the results of its stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ...bench import machine_description, versions
from ...cards.model_card import teacher_entry
from ...data.builtin_teacher import FACTS
from ...data.python_docstrings import ROWS_LICENSE
from ...devices import working_dtype
from ...metrics.verdict import verdict
from ...models.loading import load_config
from ...models.prompts import PreTrainedTokenizerFast, encode_prompt
from .._inputs import BUILT_IN, dataset_name, public_name
from . import recipe
from .report import continuation
from .state import TITLES, State


def metrics(state: State, tokenizer: PreTrainedTokenizerFast, template: str) -> dict:
    """The content of `metrics.json`, see `hf_encdec_distill.cards.model_card`.

    Args:
        state: of a run of which all but the report is done.
        tokenizer: the teacher's.
        template: of its prompts.
    """
    results, settings = state.results, state.settings
    teacher = FACTS if settings.teacher == BUILT_IN else teacher_entry(settings.teacher)
    config = load_config(state.folder / "student")
    held_out, models = results["evaluate"]["rows"], results["evaluate"]["models"]
    for name in models:
        if name.startswith("student_"):
            models[name]["parameters"] = results["start"]["parameters"]
    teacher_parameters = results["latency"]["cost"]["teacher"]["parameters"]["total"]
    models["teacher_before"]["parameters"] = models["teacher"]["parameters"] = teacher_parameters
    sizes = results["data"]["sizes"]
    return {
        "title": f"{teacher['name']} as an encoder-decoder",
        "task": _task(state, tokenizer, template),
        "teacher": {**teacher, "adaptation": _adaptation(results)},
        "student": {
            "encoder_layers": settings.encoder_layers,
            "decoder_layers": settings.decoder_layers,
            "cross_attention": config.cross_attention,
            "encoder_attention": config.encoder_attention,
            "parameters": results["start"]["parameters"],
        },
        "data": {
            "name": dataset_name(settings.dataset),
            "license": ROWS_LICENSE if settings.is_built_in_task else None,
            "train_rows": results["more"]["rows"] if "more" in results else sizes["train"],
            "validation_rows": sizes.get("validation"),
            "test_rows": held_out,
        },
        "recipe": _recipe(state),
        "stages": [
            {"name": TITLES[name], "steps": results[name].get("steps"), "seconds": state.stage_seconds(name)}
            for name in TITLES
            if name in results
        ],
        "seeds": [settings.seed],
        "spread": f"95 % interval, bootstrap over the {held_out} held-out rows (one seed of training)",
        "models": models,
        "verdict": _verdict(state, models),
        "differences": results["evaluate"]["differences"],
        "latency": results["latency"]["latency"],
        "cost": results["latency"]["cost"],
        "machine": machine_description(),
        "curves": {
            name: results[stage]["curve"]
            for name, stage in (("student_ce", "twin"), ("student_kd", "distill"))
            if stage in results
        },
        "samples": results["evaluate"]["samples"],
        "figures": {"Loss": "loss.png", "Quality": "quality.png"},
    }


def recipe_file(state: State) -> dict:
    """The content of `recipe.json`: settings, recipe, versions and machine."""
    settings = state.settings
    # It goes to the Hub with the student, where paths of this machine say nothing.
    named = {name: public_name(getattr(settings, name)) for name in ("teacher", "dataset")}
    return {
        "settings": dataclasses.asdict(settings) | {"minutes": state.minutes} | named,
        "recipe": _recipe(state),
        "versions": versions(),
        "machine": machine_description(),
    }


def _adaptation(results: Mapping[str, Mapping]) -> str:
    steps = f"all layers, {results['teach']['steps']} steps of {recipe.BATCH_SIZE}"
    tokens = results["data"]["tokens"]
    return f"{tokens[0]:,} of its {tokens[1]:,} tokens, {steps}" if tokens else steps


def _task(state: State, tokenizer: PreTrainedTokenizerFast, template: str) -> dict:
    read = PreTrainedTokenizerFast.from_pretrained(state.folder / "student")("a")["input_ids"]
    built_in = read == encode_prompt(tokenizer, "a", template)[:-1]
    task = {"prompt_template": template, "built_in": built_in}
    if state.settings.is_built_in_task:
        return task | {
            "pipeline_tag": "summarization",
            "language": "en",
            "name": "Python docstrings",
            "description": "Reads a Python function without its docstring and writes the first sentence of the "
            "docstring.",
        }
    return task | {"name": dataset_name(state.settings.dataset)}


def _verdict(state: State, models: Mapping[str, Mapping]) -> dict:
    results = state.results
    repeated = results["evaluate"].get("distinct_references", 1.0)
    sentences = verdict(models, "student_kd", results["distill"]["curve"], repeated)
    rows, available = results["evaluate"]["rows"], results["data"]["sizes"]["test"]
    if rows < recipe.ENOUGH_ROWS:
        why = "The time did not allow more" if rows < available else "The data have no more"
        sentences.append(f"Few rows. {why} than {rows} held-out rows: take the scores as rough.")
    # An absolute path says more about the machine than the readers of a card should know.
    folder = state.folder.name if state.folder.is_absolute() else str(state.folder)
    return {"sentences": sentences, **({"command": continuation(folder)} if sentences else {})}


def _recipe(state: State) -> dict:
    results, earlier = state.results, state.earlier
    times = earlier["rounds"] + 1 + ("frozen" in results)
    # A student that has recorded rows begins with its encoder frozen, in smaller steps at another rate.
    before, rates = state.steps_before if results["start"]["recorded"] else 0, results["distill"]["rates"]
    size = results["distill"].get("batch_size", recipe.BATCH_SIZE)  # older versions trained all weights with that
    schedule = f"warm-up over {recipe.WARMUP:.0%} of the steps, then linear to zero"
    return {
        "divergence": recipe.DIVERGENCE,
        "distill_weight": recipe.DISTILL_WEIGHT,
        "minutes": state.minutes,
        "steps": results["distill"]["steps"],
        "batch_size": _then(recipe.BATCH_SIZE if before else size, size),
        "encoder": _encoder_training(state),
        "learning_rate": _then(_peak(rates[:before] or rates), _peak(rates[before:])),
        "schedule": schedule + (f", {times} times" if times > 1 else ""),
        "teacher_steps": results["teach"]["steps"],
        "teacher_learning_rate": _peak(results["teach"]["rates"]),
        "max_prompt_tokens": state.max_prompt,
        "max_target_tokens": recipe.MAX_TARGET,
        "precision": str(working_dtype()).removeprefix("torch."),
        "seed": state.settings.seed,
    }


def _then(first: float, later: float) -> float | str:
    return later if first == later else f"{first:g}, then {later:g}"


def _encoder_training(state: State) -> str:
    rows = state.results["start"]["recorded"]
    frozen = f"frozen, the decoder is trained on {rows} rows"
    if state.is_frozen:
        return frozen
    return f"{frozen}, then all weights on all rows" if rows else "trained"


def _peak(rates: list[float]) -> float:
    """The largest learning rate of a training, which the clock decided; to three digits."""
    return float(f"{max(rates):.3g}")
