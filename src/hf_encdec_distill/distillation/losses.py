"""Divergences between a student's and a teacher's next-token distributions, and the cross-entropy beside them.

Pure functions on logits, dense over the vocabulary. Shape suffixes: `_xV` is `[..., V]`, any leading dimensions and
the vocabulary last; results are `[...]`, one number in nats for each position, and never negative. Half precision is
computed in float32, float64 stays float64. `p` is the teacher, `q` the student, both at `temperature`; the factor
temperature**2 that keeps gradients comparable (Hinton et al. 2015, arXiv 1503.02531, section 2) is the caller's.

A logit of -inf is a probability of exactly 0: `0 * log 0` counts as 0, in the value and in the gradient. Where the
divergence is infinite (`forward_kl`: the student excludes what the teacher allows) the result is infinite.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


Divergence = Callable[..., Tensor]


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q), `[..., V]` and `[..., V]` -> `[...]`: the student has to cover all that the teacher would say."""
    student_xV, teacher_xV = _log_probs(student_logits, teacher_logits, temperature)
    return _kl_to_mixture(teacher_xV, student_xV, 1.0)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p), `[..., V]` and `[..., V]` -> `[...]`: the student may only say what the teacher could.

    MiniLLM, arXiv 2306.08543, section 2.1.
    """
    student_xV, teacher_xV = _log_probs(student_logits, teacher_logits, temperature)
    return _kl_to_mixture(student_xV, teacher_xV, 1.0)


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, `[..., V]` and `[..., V]` -> `[...]`.

    GKD, arXiv 2306.13649, equation 1. At most beta log(1/beta) + (1 - beta) log(1/(1 - beta)) nats. It goes to 0 at
    both ends of beta, in proportion: divided by beta it tends to `forward_kl` as beta -> 0, divided by 1 - beta to
    `reverse_kl` as beta -> 1. For those ends use these two functions.
    """
    student_xV, teacher_xV = _log_probs(student_logits, teacher_logits, temperature)
    of_teacher = _kl_to_mixture(teacher_xV, student_xV, 1.0 - beta)
    of_student = _kl_to_mixture(student_xV, teacher_xV, beta)
    return beta * of_teacher + (1.0 - beta) * of_student


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, alpha: float = 0.1) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q), `[..., V]` and `[..., V]` -> `[...]`, at most log(1/alpha) nats.

    DistiLLM, arXiv 2402.03898, equation 4; alpha = 0 is `forward_kl`.
    """
    student_xV, teacher_xV = _log_probs(student_logits, teacher_logits, temperature)
    return _kl_to_mixture(teacher_xV, student_xV, 1.0 - alpha)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q), `[..., V]` and `[..., V]` -> `[...]`, at most log(1/alpha) nats.

    DistiLLM, arXiv 2402.03898, section 3.1; alpha = 0 is `reverse_kl`.
    """
    student_xV, teacher_xV = _log_probs(student_logits, teacher_logits, temperature)
    return _kl_to_mixture(student_xV, teacher_xV, 1.0 - alpha)


def total_variation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Half the sum of |p - q|, `[..., V]` and `[..., V]` -> `[...]`, from 0 to 1."""
    student_xV, teacher_xV = _log_probs(student_logits, teacher_logits, temperature)
    return 0.5 * (teacher_xV.exp() - student_xV.exp()).abs().sum(dim=-1)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "generalized_jsd": generalized_jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}


def select_divergence(name: str, jsd_beta: float = 0.5, skew_alpha: float = 0.1) -> Divergence:
    """The divergence called `name`, with its own parameter filled in: `(student, teacher, temperature) -> [...]`."""
    if name not in DIVERGENCES:
        raise ValueError(f"divergence={name!r} is unknown; choose one of {', '.join(DIVERGENCES)}.")
    if name == "generalized_jsd":
        return partial(generalized_jsd, beta=jsd_beta)
    if name.startswith("skew_"):
        return partial(DIVERGENCES[name], alpha=skew_alpha)
    return DIVERGENCES[name]


def cross_entropy(student_logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log q(label), `[N, V]` and `[N]` -> `[N]` nats, at temperature 1.

    `label_smoothing` moves that share of the target to the uniform distribution over V, as LabelSmoother does.
    """
    logits = student_logits.to(_at_least_float32(student_logits.dtype))
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def token_mean(per_token: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Sum of `per_token` `[N]` over `num_items` tokens (all N of them when None); 0 when there is no token at all."""
    count = per_token.numel() if num_items is None else num_items
    return per_token.sum() / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _log_probs(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    dtype = _at_least_float32(student_logits.dtype)
    return (
        torch.log_softmax(student_logits.to(dtype) / temperature, dim=-1),
        torch.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1),
    )


def _kl_to_mixture(log_a_xV: Tensor, log_b_xV: Tensor, weight: float) -> Tensor:
    """KL(a || weight b + (1 - weight) a) = -sum a log(1 - weight + weight b / a), from log-probabilities.

    Every divergence above but the last is made of this one. Working on the ratio b / a, never on the mixture itself,
    makes it exactly 0 when a equals b.
    """
    # Where a is 0 the term is 0 whatever b is; replacing the ratio keeps -inf - (-inf) out of value and gradient.
    ratio_xV = torch.where(log_a_xV > -torch.inf, log_b_xV - log_a_xV, 0.0)
    kl = -(log_a_xV.exp() * _log_mixed_ratio(ratio_xV, weight)).sum(dim=-1)
    # The sum is >= 0; rounding can leave it at -1e-8.
    return kl.clamp(min=0)


def _log_mixed_ratio(log_ratio: Tensor, weight: float) -> Tensor:
    """log(1 - weight + weight exp(log_ratio)) without overflow on either side and exactly 0 at 0."""
    if weight == 1.0:
        return log_ratio
    # exp is only taken of what is <= 0: directly for small b / a, with b / a taken out of the logarithm for large.
    below = torch.log1p(weight * torch.expm1(log_ratio.clamp(max=0)))
    above = log_ratio + torch.log1p((1.0 - weight) * torch.expm1(-log_ratio.clamp(min=0)))
    return torch.where(log_ratio <= 0, below, above)
