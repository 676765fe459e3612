"""Fidelity and calibration against numbers done by hand, torch.distributions and torchmetrics."""

import math

import numpy as np
import pytest
import torch

from hf_encdec_distill.evaluation.fidelity import (
    CalibrationError,
    Fidelity,
    calibration_gaps,
    token_calibration,
    token_fidelity,
)


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_fidelity_by_hand():
    student = logits_of([0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [1.0, 0.0, 0.0])
    teacher = logits_of([0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.5, 0.5, 0.0])
    student[2, 1] = math.log(0.5)  # 2/3 and 1/3 after the softmax
    found = token_fidelity(student, teacher)
    # KL(teacher || student): nothing; .5 log 2 + .25 log 1/2; .5 log(.5/(2/3)) + .5 log(.5/(1/3))
    assert found["kl"].tolist() == pytest.approx([0, 0.25 * math.log(2), 0.5 * math.log(9 / 8)])
    assert found["teacher_agreement"].tolist() == [1, 0, 1]
    third = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert found["entropy_gap"].tolist() == pytest.approx([0, 0, third - math.log(2)])

    metric = Fidelity(keep_in_memory=True)
    for rows in (slice(0, 1), slice(1, 3)):
        metric.add_batch(**{name: values[rows] for name, values in found.items()})
    expected = {name: values.mean().item() for name, values in found.items()}
    assert metric.compute() == pytest.approx(expected)
    assert Fidelity().compute(**found) == pytest.approx(expected)
    assert set(expected) == {"kl", "teacher_agreement", "entropy_gap"}


def test_the_entropy_gap_is_that_of_entropies_and_halves_are_not_enough_for_it():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 5, 4000, generator=generator) for _ in range(2))
    entropy = [torch.distributions.Categorical(logits=logits.double()).entropy() for logits in (student, teacher)]
    found = token_fidelity(student, teacher)
    torch.testing.assert_close(found["entropy_gap"].double(), entropy[0] - entropy[1], atol=1e-5, rtol=0)
    assert found["kl"].shape == (2, 5)
    half = token_fidelity(student.bfloat16(), teacher.bfloat16())
    assert all(values.dtype == torch.float32 for values in half.values())
    torch.testing.assert_close(half["entropy_gap"], found["entropy_gap"], atol=0.05, rtol=0)


def test_logits_that_do_not_match():
    with pytest.raises(ValueError, match=r"\[2, 5\].*\[2, 6\].*restrict"):
        token_fidelity(torch.zeros(2, 5), torch.zeros(2, 6))


def test_the_calibration_error_by_hand():
    """Bins of a fifth: two tokens in (.4, .6], one at its upper end; three in (.8, 1]; a 0 counts in the first."""
    confidence, correct = [0.5, 0.6, 0.9, 1.0, 0.95, 0.0], [1, 0, 1, 1, 0, 1]
    expected = (abs(1.1 - 1) + abs(2.85 - 2) + abs(0 - 1)) / 6
    inputs = {"confidence": confidence, "correct": correct}
    assert CalibrationError().compute(**inputs, bins=5)["ece"] == pytest.approx(expected)
    gaps = calibration_gaps(torch.tensor(confidence), torch.tensor(correct), bins=5)
    assert gaps.sum(dim=0).tolist() == pytest.approx([-1, 0, 0.1, 0, 0.85], abs=1e-6)
    # Three of four right at 75 %: perfectly calibrated, and with one bin only the means count.
    assert CalibrationError().compute(confidence=[0.75] * 4, correct=[1, 1, 0, 1])["ece"] == 0
    assert CalibrationError().compute(**inputs, bins=1)["ece"] == pytest.approx(abs(np.mean(confidence) - 4 / 6))


def test_the_calibration_error_is_that_of_torchmetrics():
    numbers = torch.arange(200 * 7, dtype=torch.float64).reshape(200, 7)
    logits = 4 * torch.sin(numbers**2)
    labels = torch.where(torch.arange(200) < 120, logits.argmax(-1), torch.arange(200) % 7)
    found = token_calibration(logits, labels)
    # torchmetrics 1.9.0, multiclass_calibration_error(probabilities, labels, 7, n_bins=..., norm="l1")
    for options, expected in (({}, 0.16559013724327087), ({"bins": 10}, 0.16501374542713165)):
        metric = CalibrationError()
        for rows in torch.arange(200).split(64):
            metric.add_batch(**{name: values[rows] for name, values in found.items()})
        assert metric.compute(**options)["ece"] == pytest.approx(expected, abs=1e-6)
    assert found["correct"][:120].all()
    assert found["confidence"].tolist() == pytest.approx(logits.softmax(-1).amax(-1).tolist())
