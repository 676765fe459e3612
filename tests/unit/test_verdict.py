"""What a run says about its student."""

import json
from pathlib import Path

import numpy as np
import pytest

from hf_encdec_distill.metrics.verdict import still_falling, verdict


RUN = Path(__file__).parents[2] / "docs" / "runs" / "quickstart-120-minutes" / "metrics.json"


def models(student, **more):
    return {"lead_baseline": {"rouge_l": 0.182}, "teacher_before": {"rouge_l": 0.172}, "student_kd": student, **more}


def test_the_student_of_twelve_minutes_that_nobody_was_told_about():
    found = verdict(
        models({"rouge_l": {"value": 0.071}, "distinct": 0.1}), "student_kd", [{"loss": 9.0}, {"loss": 8.0}]
    )
    assert found == [
        "Below the untuned teacher. These weights score lower than the teacher, before tuning, which never saw the "
        "task: ROUGE-L 7.1 against 17.2.",
        "Below a trivial baseline. These weights score lower than the lead-sentence baseline, which needs no model: "
        "ROUGE-L 7.1 against 18.2.",
        "Still learning. The loss was still falling when the time was over: more training makes a better student.",
        "Repeats itself. Of its outputs 10 % are distinct, of the references 100 %.",
    ]


def test_nothing_is_said_of_a_student_that_is_well():
    flat = [{"loss": 2 + 0.1 * np.sin(step)} for step in range(100)]
    assert verdict(models({"rouge_l": 0.3, "distinct": 0.9}), "student_kd", flat) == []
    assert verdict(models({"distinct": 0.9}), "student_kd") == []  # nothing to compare with


def test_labels_that_repeat_are_no_fault():
    """Two labels for 64 rows."""
    perfect = models({"rouge_l": 1.0, "distinct": 2 / 64})
    assert verdict(perfect, "student_kd", distinct_references=2 / 64) == []
    stuck = models({"rouge_l": 0.5, "distinct": 1 / 64})
    assert verdict(stuck, "student_kd", distinct_references=3 / 64) == [
        "Repeats itself. Of its outputs 2 % are distinct, of the references 5 %."
    ]


@pytest.mark.parametrize(("slope", "falls"), [(0.0, 0.02), (-0.3, 0.0), (0.3, 1.0)])
def test_a_loss_that_falls_is_told_from_one_that_is_noisy(slope, falls):
    """`slope`: by how much the loss falls from the quarter before the last to the last, in spreads of a step."""
    draws = np.random.default_rng(0)
    steps = np.arange(2000)
    found = [still_falling(draws.normal(size=2000) - slope * steps / 500) for _ in range(200)]
    assert np.mean(found) == pytest.approx(falls, abs=0.06)


def test_the_run_of_two_hours_was_still_learning():
    """As its page says."""
    metrics = json.loads(RUN.read_text(encoding="utf-8"))
    (sentence,) = verdict(metrics["models"], "student_kd", metrics["curves"]["student_kd"])
    assert sentence.startswith("Still learning. ")


@pytest.mark.parametrize(
    ("losses", "falls"), [([], False), ([3.0], True), ([3.0, 2.0], True), ([2.0, 3.0, 4.0], False)]
)
def test_a_training_of_a_few_steps(losses, falls):
    assert still_falling(losses) is falls
