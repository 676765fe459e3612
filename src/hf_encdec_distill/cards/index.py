"""The model-index of a card: what was measured, in the metadata that the Hub reads.

https://huggingface.co/docs/hub/model-cards#evaluation-results
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import inside, one_line, replacing
from ..metrics.measures import METRICS, OF_TEACHER, bounds


_METADATA = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---", re.DOTALL)


def eval_results(metrics: Mapping, key: str) -> list[EvalResult]:
    """`models[key]` for a model-index: the values as cards show them, and in `metric_args` the number of rows, the
    spread, and the teacher or judge that a number depends on."""
    task, data, entry = metrics.get("task", {}), metrics.get("data", {}), metrics["models"][key]

    def args(name: str) -> dict:
        _, factor, decimals, _ = METRICS[name]
        value, low, high = bounds(entry[name], f"models[{key!r}][{name!r}]")
        found = {"rows": entry[name].get("rows", entry["n"]) if isinstance(entry[name], Mapping) else entry["n"]}
        if low < high:
            found |= {"low": round(low * factor, decimals), "high": round(high * factor, decimals)}
            found |= {"spread": metrics["spread"]}
        other = "judge" if name == "judge" else "teacher" if name in OF_TEACHER else None
        if other and metrics.get(other, {}).get("name"):
            found[other] = metrics[other].get("hub_id") or metrics[other]["name"]
            tuned = metrics[other].get("adaptation")
            found[other] += f", fine-tuned on the task: {tuned}" if tuned else ""
        return found

    of = {
        "task_type": task.get("pipeline_tag") or "text-generation",
        "task_name": task.get("name"),
        "dataset_type": data.get("hub_id") or data.get("name") or "unnamed",
        "dataset_name": data.get("name") or "unnamed",
        "dataset_split": data.get("split", "test"),
    }
    results = [
        EvalResult(
            **of,
            metric_type={"rouge_l": "rouge"}.get(name, name),
            metric_name=heading,
            metric_value=round(bounds(entry[name], name)[0] * factor, decimals),
            metric_config=metrics.get("signatures", {}).get(name),
            metric_args=args(name),
        )
        for name, (heading, factor, decimals, _) in METRICS.items()
        if entry.get(name) is not None
    ]
    for name, value in entry.get("logged", {}).items():
        results.append(
            EvalResult(**of, metric_type=name, metric_name=name, metric_value=value, metric_args={"rows": entry["n"]})
        )
    return results


def model_index(metrics: Mapping, key: str, name: str) -> str:
    """`models[key]` as the `model-index` of a card's metadata, YAML; `name` is the model's name there."""
    return ModelCardData(model_name=name, eval_results=eval_results(metrics, key)).to_yaml() + "\n"


def load_card(folder: str | Path) -> Any:
    """The `ModelCard`, whose `data` huggingface_hub declares as those of any card.

    Raises:
        ValueError: there is no card, its metadata cannot be read, or they have results of several models.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():  # the name of a folder that is not there would be looked for on the Hub
        raise ValueError(f"there is no model card {path}: write one first (write_model_card)")
    try:
        card = ModelCard.load(inside(path.parent, path.name))
        written = _METADATA.match(path.read_text(encoding="utf-8"))  # the card has read the last model's alone
        metadata = (yaml.safe_load(written[1]) if written else None) or {}
        models = [entry.get("name") for entry in metadata.get("model-index") or []]
    except Exception as error:  # of whatever is written there; PyYAML's are no ValueErrors
        raise ValueError(f"the metadata of {path} are not valid: {one_line(error)}") from error
    if len(models) > 1:
        raise ValueError(
            f"the model-index of {path} has {len(models)} models, {', '.join(map(str, models))}: leave one in it"
        )
    return card


def update_model_card(folder: str | Path, metrics: Mapping, key: str) -> Path:
    """Writes `models[key]` into the model-index of the card in a folder; text and other metadata do not change, but
    for comments in the metadata, which are lost.

    A result of the same measure on the same dataset and split is replaced; others stay. It never contacts the Hub.

    Returns:
        The path written.

    Raises:
        ValueError: see `load_card`.
    """
    path = Path(folder) / "README.md"
    card = load_card(folder)
    task = {"pipeline_tag": card.data.get("pipeline_tag"), **metrics.get("task", {})}
    measured = eval_results({**metrics, "task": task}, key)

    def what(result: EvalResult) -> tuple:
        return (result.dataset_type, result.dataset_split, result.metric_type, result.metric_name)

    again = set(map(what, measured))
    kept = [result for result in card.data.eval_results or [] if what(result) not in again]
    card.data.eval_results = kept + measured
    card.data.model_name = card.data.get("model_name") or path.resolve().parent.name
    with replacing(path) as temporary:
        card.save(temporary)  # keeps the newlines of the file
    return path
