"""What is measured: names, units and scales of the measures, labels of the models, and measures of answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .significance import Sums, mean
from .texts import exact_match, f1, rouge_l, text_statistics, warn_of_other_scripts


MODEL_LABELS = {
    "teacher_before": "teacher, before tuning",
    "teacher": "teacher, tuned",
    "student_start": "student, before training",
    "student_ce": "student, cross-entropy alone",
    "student_kd": "student, distilled",
    "lead_baseline": "lead-sentence baseline",
}
# key -> (heading, factor for display, decimals, whether it is a share)
METRICS = {
    "rouge_l": ("ROUGE-L", 100, 1, True),
    "exact_match": ("Exact match, %", 100, 1, True),
    "f1": ("F1", 100, 1, True),
    "chrf": ("chrF", 1, 1, False),
    "bleu": ("BLEU", 1, 1, False),
    "judge": ("Judge, 1 to 5", 1, 2, False),
    "ce": ("CE, nats/token", 1, 3, False),
    "kl": ("KL to teacher, nats/token", 1, 3, False),
    "teacher_agreement": ("Agreement with teacher, %", 100, 1, True),
    "ece": ("Calibration error, %", 100, 1, True),
    "entropy_gap": ("Entropy minus teacher's, nats/token", 1, 3, False),
    "distinct": ("Distinct outputs, %", 100, 1, True),
}
OF_TEACHER = ("kl", "teacher_agreement", "entropy_gap")
OF_LOGITS = ("ce", "ece", *OF_TEACHER)
_OF_A_TEXT = {"rouge_l": rouge_l, "exact_match": exact_match, "f1": f1}


def estimate(values: Sequence[float]) -> dict[str, float]:
    """The mean of one value per seed, with the minimum and the maximum as its spread.

    Raises:
        ValueError: without a value.
    """
    if not values:
        raise ValueError("an estimate needs at least one value, got none")
    return {"value": math.fsum(values) / len(values), "low": min(values), "high": max(values), "n": len(values)}


def bounds(estimate: float | Mapping, name: str, share: bool = False) -> tuple[float, float, float]:
    """`(value, low, high)` of an Estimate; a plain number is its own bounds.

    Raises:
        ValueError: if a number is missing or not finite, `low <= value <= high` does not hold, or a `share` lies
            outside 0 ... 1.
    """
    if isinstance(estimate, Mapping):
        numbers = tuple(estimate.get(key, estimate.get("value")) for key in ("value", "low", "high"))
    else:
        numbers = (estimate,) * 3
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
        raise ValueError(
            f"{name} is {estimate!r}: expected a finite number or {{'value', 'low', 'high'}}; leave out what is "
            "not known"
        )
    value, low, high = numbers
    if not low <= value <= high:
        raise ValueError(f"{name} has value {value} outside its spread, {low} to {high}")
    if share and not 0 <= low <= high <= 1:
        raise ValueError(f"{name} is {estimate!r}: shares are given in 0 to 1; divide percentages by 100")
    return value, low, high


def model_label(key: str, models: Mapping) -> str:
    """The name of an entry of `metrics["models"]` in cards and plots."""
    return models.get(key, {}).get("label") or MODEL_LABELS.get(key, key)


def model_order(models: Mapping) -> list[str]:
    """The keys of `metrics["models"]`, known ones first and in their order."""
    return [key for key in MODEL_LABELS if key in models] + [key for key in models if key not in MODEL_LABELS]


def measure_texts(names: Iterable[str], texts: Sequence[str], rows: Sequence[dict]) -> dict[str, Sums]:
    """Answers against the rows' targets, by the measures of `texts`.

    Args:
        names: of `rouge_l exact_match f1`, means over the rows, and `bleu chrf`, which are of all rows together.
    """
    references, names = [row["target"] for row in rows], list(names)
    if "rouge_l" in names:
        warn_of_other_scripts(references)
    found = {}
    for name in names:
        if name in _OF_A_TEXT:
            scores = [_OF_A_TEXT[name](text, reference) for text, reference in zip(texts, references, strict=True)]
            found[name] = mean(np.array(scores), np.ones(len(scores)))
        else:
            found[name] = Sums(*text_statistics(name, texts, references))
    return found


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The points that none is as fast as and better than, fastest first.

    Args:
        points: for each name a time, of which less is better, and a quality, of which more is.
    """
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    return front
