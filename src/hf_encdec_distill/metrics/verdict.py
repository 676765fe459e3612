"""What a reader has to know before using a student: that it is below a trivial baseline, still learning, or stuck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .measures import METRICS, bounds, model_label, model_order


UNTUNED_TEACHER = "teacher_before"
_HIGHER_IS_BETTER = ("rouge_l", "exact_match", "f1", "chrf", "bleu", "judge")
_FEW_DISTINCT = 0.5  # of the references' share


def verdict(
    models: Mapping[str, Mapping],
    published: str,
    curve: Sequence[Mapping[str, float]] = (),
    distinct_references: float = 1.0,
) -> list[str]:
    """Texts of two sentences, of which the first says in a few words what the second explains; none if all is well.

    Args:
        models: as in `metrics.json`.
        published: the entry of the student.
        curve: its training, rows with a `loss`.
        distinct_references: the share of references that are distinct, 0 to 1: labels repeat, sentences hardly.
    """
    sentences = below_baselines(models, published)
    if still_falling([row["loss"] for row in curve]):
        sentences.append(
            "Still learning. The loss was still falling when the time was over: more training makes a better student."
        )
    distinct = models[published].get("distinct")
    if distinct is not None and bounds(distinct, "distinct")[0] < _FEW_DISTINCT * distinct_references:
        ours, theirs = (f"{100 * share:.0f} %" for share in (bounds(distinct, "distinct")[0], distinct_references))
        sentences.append(f"Repeats itself. Of its outputs {ours} are distinct, of the references {theirs}.")
    return sentences


def below_baselines(models: Mapping[str, Mapping], published: str) -> list[str]:
    """One for each baseline, the untuned teacher among them, with a better score than the published weights in a
    measure of both."""
    sentences, ours = [], models[published]
    for key in model_order(models):
        if key != UNTUNED_TEACHER and not key.endswith("_baseline"):
            continue
        below = []
        for name in _HIGHER_IS_BETTER:
            if ours.get(name) is None or models[key].get(name) is None:
                continue
            heading, factor, decimals, _ = METRICS[name]
            student, baseline = (bounds(entry[name], name)[0] for entry in (ours, models[key]))
            if student < baseline:
                values = " against ".join(f"{factor * value:.{decimals}f}" for value in (student, baseline))
                below.append(f"{heading.split(',')[0]} {values}")
        if below:
            untuned = key == UNTUNED_TEACHER
            what, why = (
                ("the untuned teacher", "never saw the task") if untuned else ("a trivial baseline", "needs no model")
            )
            lower = f"These weights score lower than the {model_label(key, models)}, which {why}: {', '.join(below)}."
            sentences.append(f"Below {what}. {lower}")
    return sentences


def still_falling(losses: Sequence[float]) -> bool:
    """Whether the mean loss of the last quarter of a training is below that of the quarter before it by more than
    twice the standard error of their difference."""
    quarter = len(losses) // 4
    if len(losses) < 2:  # a training of one step has hardly begun; without any there was none
        return bool(losses)
    if quarter < 2:
        half = len(losses) // 2
        return bool(np.mean(losses[half:]) < np.mean(losses[:half]))
    last, before = np.array(losses[-quarter:]), np.array(losses[-2 * quarter : -quarter])
    error = np.sqrt((last.var(ddof=1) + before.var(ddof=1)) / quarter)
    return bool(before.mean() - last.mean() > 2 * error)
