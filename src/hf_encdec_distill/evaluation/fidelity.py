"""How close a student's distributions are to its teacher's, and how well its confidence is earned.

What is kept of a target token is a few numbers, never a distribution over the vocabulary. In an evaluation loop:

    fidelity, calibration = Fidelity(), CalibrationError()
    for batch in loader:
        targets = labels != -100  # labels [B, T], logits [B, T, V]
        fidelity.add_batch(**token_fidelity(student_logits[targets], teacher_logits[targets]))
        calibration.add_batch(**token_calibration(student_logits[targets], labels[targets]))
    fidelity.compute()  # {"kl": ..., "teacher_agreement": ..., "entropy_gap": ...}
    calibration.compute()  # {"ece": ...}

Student and teacher have to see the same target tokens and the same ids: `alignment` has what that takes.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..distillation.losses import at_least_float32, forward_kl


BINS = 15


def token_fidelity(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
    """Two of `[..., V]` -> `kl` (teacher to student, nats), `teacher_agreement` (1 where both put the same id first)
    and `entropy_gap` (entropy of the student minus that of the teacher, nats), `[...]` each.

    Raises:
        ValueError: the two differ in shape.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits are {list(student_logits.shape)} and teacher_logits {list(teacher_logits.shape)}: "
            "expected the same target tokens and ids (SharedVocabulary.restrict_student and restrict_teacher take out "
            "ids that only one side has)"
        )
    return {
        "kl": forward_kl(student_logits, teacher_logits),
        "teacher_agreement": (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float(),
        "entropy_gap": _entropy(student_logits) - _entropy(teacher_logits),
    }


def _entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.to(at_least_float32(logits.dtype)).softmax(-1)).sum(-1)


def token_calibration(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`[..., V]` and `[...]` -> `confidence`, the probability of the likeliest id, and `correct`, 1 where that is the
    label, `[...]` each."""
    confidence, likeliest = logits.to(at_least_float32(logits.dtype)).softmax(-1).max(-1)
    return {"confidence": confidence, "correct": (likeliest == labels).float()}


def calibration_gaps(confidence: Tensor, correct: Tensor, bins: int = BINS) -> Tensor:
    """`[N]` and `[N]` -> `[N, bins]`: confidence minus correctness in the column of the token's bin, 0 elsewhere.

    Bin m of M takes what lies in ((m - 1) / M, m / M]. The ECE is the sum over bins of |sum over tokens|, over N.
    """
    bin_N = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return F.one_hot(bin_N, bins) * (confidence - correct)[:, None]


class Fidelity(evaluate.Metric):
    """Means over tokens of what `token_fidelity` gives: `kl`, `teacher_agreement` and `entropy_gap`.

    The gap is below 0 for a student that is surer than its teacher.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _numbers(self, "kl", "teacher_agreement", "entropy_gap")

    def _compute(self, **values: Sequence[float]) -> dict[str, float]:
        return {name: float(np.mean(column)) for name, column in values.items()}


class CalibrationError(evaluate.Metric):
    """Expected calibration error `ece`, 0 to 1, of the `confidence` in each prediction and whether it is `correct`.

    The mean distance of confidence and accuracy over `bins` (15) bins of equal width, each counting by its
    predictions: Guo et al. 2017 (arXiv 1706.04599, equation 3). Of classifiers too, nothing here is about language.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _numbers(self, "confidence", "correct")

    def _compute(self, confidence: Sequence[float], correct: Sequence[float], bins: int = BINS) -> dict[str, float]:
        gaps = calibration_gaps(torch.tensor(confidence), torch.tensor(correct), bins)
        return {"ece": gaps.double().sum(dim=0).abs().sum().item() / len(gaps)}


def _numbers(metric: evaluate.Metric, *names: str) -> evaluate.MetricInfo:
    features = datasets.Features({name: datasets.Value("float32") for name in names})
    return evaluate.MetricInfo(description=type(metric).__doc__, citation="", features=features)
