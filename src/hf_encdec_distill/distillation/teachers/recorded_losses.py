"""Losses on what a cache holds of a distribution: its likeliest tokens with their tail, or tokens drawn from it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..alignment.vocabularies import SharedVocabulary
from ..losses import Divergence, at_least_float32, forward_kl


def top_k_divergence(
    student_logits: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    tail: Tensor,
    divergence: Divergence = forward_kl,
    temperature: float = 1.0,
) -> Tensor:
    """A divergence over K + 1 events: the teacher's K likeliest tokens, and all others as one.

    Not above the dense one for every f-divergence (data processing inequality), and 0 where the student equals the
    teacher. The tail is what keeps the student from putting mass outside of the K.

    Args:
        student_logits: `[C, V]`.
        ids: `[C, K]`; one that is not below V, or whose student logit is -inf, counts as impossible on both sides.
        log_probs: `[C, K]`, the teacher's, at `temperature`.
        tail: `[C]`, log of the teacher's mass outside of the K.
        divergence: of `losses`.
        temperature: divides the student's logits.

    Returns:
        `[C]`, nats.
    """
    vocabulary = student_logits.shape[-1]
    logits = student_logits.to(at_least_float32(student_logits.dtype)) / temperature
    # One column more, where ids beyond the student's vocabulary are sent: impossible, and in nobody's way.
    logits = F.pad(logits, (0, 1), value=-torch.inf)
    ids = ids.clamp(max=vocabulary)
    student = logits.gather(-1, ids)
    teacher = log_probs.masked_fill(student == -torch.inf, -torch.inf)
    rest = logits.scatter(-1, ids, -torch.inf)
    # Nothing is left to a student whose vocabulary is all recorded, and no gradient may come from there.
    none_left = (rest == -torch.inf).all(dim=-1, keepdim=True)
    rest = rest.masked_fill(none_left, 0.0).logsumexp(dim=-1, keepdim=True).masked_fill(none_left, -torch.inf)
    tail = tail.unsqueeze(-1).masked_fill(none_left, -torch.inf)
    return divergence(torch.cat((student, rest), dim=-1), torch.cat((teacher, tail), dim=-1), 1.0)


def sampled_forward_kl(
    student_logits: Tensor, ids: Tensor, log_probs: Tensor, weights: Tensor, temperature: float = 1.0
) -> Tensor:
    """An unbiased estimate of `forward_kl` from tokens that were drawn: `sum_r w_r (log p_r - log q_r)`.

    Sparse logit sampling, arXiv 2503.16870: unlike a cut to the top k, what the gradient expects is that of the whole
    distribution. The paper divides the weights by their sum; that is biased where tokens are not drawn from the
    teacher itself, and the same where they are. A single estimate may be negative.

    Args:
        student_logits: `[C, V]`.
        ids: `[C, R]`, tokens drawn with replacement; one that came up n times may stand there once.
        log_probs: `[C, R]`, the teacher's log-probability of each, at `temperature`.
        weights: `[C, R]`, the importance weights: n times its probability over that of drawing it, divided by the
            number of draws. 0 fills up a row.
        temperature: divides the student's logits.

    Returns:
        `[C]`, nats.
    """
    vocabulary = student_logits.shape[-1]
    logits = student_logits.to(at_least_float32(student_logits.dtype)) / temperature
    student = logits.gather(-1, ids.clamp(max=vocabulary - 1)) - logits.logsumexp(dim=-1, keepdim=True)
    shared = (ids < vocabulary) & (student > -torch.inf)
    return (weights * torch.where(shared, log_probs - student, 0.0)).sum(dim=-1)


@dataclass(frozen=True)
class TopKScores:
    """`TeacherScores` of the K likeliest tokens and the mass of all others: `[N, K]`, `[N, K]` and `[N]`.

    What of the tail is on tokens that are not shared was not recorded, and counts as shared.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor
    vocabulary: SharedVocabulary

    def divergence(self, student_logits: Tensor, chunk: slice, divergence: Divergence, temperature: float) -> Tensor:
        student_logits = self.vocabulary.restrict_student(student_logits)
        places, log_probs, tail = self.vocabulary.places(self.ids[chunk]), self.log_probs[chunk], self.tail[chunk]
        values = top_k_divergence(student_logits, places, log_probs, tail, divergence, temperature)
        if not self.vocabulary.by_mass:
            return values
        shared = places < self.vocabulary.size
        mass = (log_probs.exp() * shared).sum(dim=-1)
        return values * (mass + tail.exp() * (shared.sum(dim=-1) < self.vocabulary.size))

    def top(self, chunk: slice) -> Tensor:
        places = self.vocabulary.places(self.ids[chunk])
        first_shared = (places < self.vocabulary.size).int().argmax(dim=-1, keepdim=True)
        return places.gather(-1, first_shared).squeeze(-1)


@dataclass(frozen=True)
class SampledScores:
    """`TeacherScores` of R drawn tokens, `[N, R]` three times, and the likeliest token `[N]`.

    For a `MappedVocabulary` the gradient is unbiased; the value lacks -m log m, which is not in the record.
    """

    ids: Tensor
    log_probs: Tensor
    weights: Tensor
    likeliest: Tensor
    vocabulary: SharedVocabulary

    def divergence(self, student_logits: Tensor, chunk: slice, divergence: Divergence, temperature: float) -> Tensor:
        record = (self.vocabulary.places(self.ids[chunk]), self.log_probs[chunk], self.weights[chunk])
        return sampled_forward_kl(self.vocabulary.restrict_student(student_logits), *record, temperature)

    def top(self, chunk: slice) -> Tensor:
        return self.vocabulary.places(self.likeliest[chunk])
