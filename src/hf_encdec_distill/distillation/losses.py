"""Divergences between a student's and a teacher's next-token distributions, and the cross-entropy beside them.

Pure functions on logits, dense over the vocabulary. Shape suffixes: `_xV` is `[..., V]`, any leading dimensions and
the vocabulary last; results are `[...]`, one number in nats for each position, and never negative. Half precision is
computed in float32, float64 stays float64. `p` is the teacher, `q` the student, both at `temperature`; the factor
temperature**2 that keeps gradients comparable (Hinton et al. 2015, arXiv 1503.02531, section 2) is the caller's.

A logit of -inf is a probability of exactly 0: `0 * log 0` counts as 0, in the value and in the gradient. Where the
divergence is infinite (`forward_kl`: the student excludes what the teacher allows) the result is infinite.

`hidden_state_mse` and `hidden_state_cosine` compare states `[..., H]` instead, one number for each position too.

`chunked_sum` takes any divergence from hidden states and the language-model head instead, a few rows at a time, so
that `[N, V]` is never held.
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


def universal_logit_distance(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """sum_i |p_(i) - q_(i)|, `[..., V]` and `[..., W]` -> `[...]`: probabilities in descending order, i their rank.

    Universal logit distillation, arXiv 2402.12030: the shorter of the two is filled up with zeros, and tokens are not
    looked at, so that student and teacher may have different vocabularies. It is the least L1 distance over all ways
    to pair tokens of the one with tokens of the other, from 0 to below 2. It says how sure to be and among how many,
    never of what: a student that puts the teacher's mass on wrong tokens has a distance of 0, so it goes beside a
    cross-entropy. Its gradient, unlike a KL's, vanishes with the probability that it moves.
    """
    student_xV, teacher_xW = (
        torch.softmax(logits.to(at_least_float32(logits.dtype)) / temperature, dim=-1).sort(descending=True).values
        for logits in (student_logits, teacher_logits)
    )
    width = max(student_xV.shape[-1], teacher_xW.shape[-1])
    student_xV, teacher_xV = (F.pad(probs, (0, width - probs.shape[-1])) for probs in (student_xV, teacher_xW))
    return (teacher_xV - student_xV).abs().sum(dim=-1)


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
    logits = student_logits.to(at_least_float32(student_logits.dtype))
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def hidden_state_mse(student_states: Tensor, teacher_states: Tensor) -> Tensor:
    """Mean over H of (s - t)^2, `[..., H]` and `[..., H]` -> `[...]`; `s` is what a projection made of the student's.

    FitNets, arXiv 1412.6550, equation 3; TinyBERT, arXiv 1909.10351, equation 8. States of a few features with large
    values, which many language models have (arXiv 2402.17762), are most of it: see `hidden_state_cosine`.
    """
    dtype = at_least_float32(student_states.dtype)
    return (student_states.to(dtype) - teacher_states.to(dtype)).square().mean(dim=-1)


def hidden_state_cosine(student_states: Tensor, teacher_states: Tensor) -> Tensor:
    """1 - s . t / (|s| |t|), `[..., H]` and `[..., H]` -> `[...]`, from 0 to 2, whatever the lengths of the two.

    DistilBERT, arXiv 1910.01108, section 3.
    """
    dtype = at_least_float32(student_states.dtype)
    return 1 - F.cosine_similarity(student_states.to(dtype), teacher_states.to(dtype), dim=-1)


HIDDEN_STATE_LOSSES = {"mse": hidden_state_mse, "cosine": hidden_state_cosine}


def token_mean(per_token: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Sum of `per_token` `[N]` over `num_items` tokens (all N of them when None); 0 when there is no token at all."""
    count = per_token.numel() if num_items is None else num_items
    return per_token.sum() / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def chunked_sum(
    per_token: Callable[[Tensor, slice], Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    chunk_size: int = 128,
    term_weights: tuple[float, ...] = (1.0,),
) -> tuple[Tensor, Tensor]:
    """Sum over N positions of a loss on logits `hidden @ weight.T + bias`, which are made `chunk_size` rows at a time.

    Where a gradient is asked for, each chunk goes backward before the next one is made: what is kept is the gradient
    of `hidden`, `weight` and `bias`, and nothing is computed twice. That is the idea of Liger Kernel's fused linear
    losses (arXiv 2410.10989, section 3.2), for any loss. Products are taken in the dtype of `hidden`, autocast or not.

    Args:
        per_token: `(logits [C, V], chunk) -> [K, C]`, K terms at the C of the N positions that the slice `chunk`
            takes. What else it reads gets no gradient.
        hidden: `[N, H]`, what the head would be given.
        weight: `[V, H]`, of the head.
        bias: `[V]`, of the head.
        chunk_size: rows at a time.
        term_weights: what each of the K terms counts in the sum.

    Returns:
        The weighted sum, a scalar to call `backward` on, and the terms as they are, `[K, N]`, without gradient.

    Raises:
        ValueError: `chunk_size` is below 1, or there is no position to take a loss at.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is out of range; it has to be at least 1.")
    if not len(hidden):
        raise ValueError("hidden has no rows; take the mean of no token with token_mean, which is 0.")
    if not torch.is_grad_enabled():  # a parameter would still say that it wants one
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return _ChunkedSum.apply(hidden, weight, bias, per_token, chunk_size, term_weights)


# The gradient of a logit is at most about 1, and float16 holds 6e-8 to 65504.
_LIFTED = 1024.0


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, per_token, chunk_size, term_weights):
        wanted = ctx.needs_input_grad[:3]
        inputs = (hidden, weight, bias)
        # The loss is scaled for float16 only after this: what float16 would make 0 until then is lifted here.
        lifted = _LIFTED if hidden.dtype == torch.float16 else 1.0
        # Sums over thousands of rows are kept in float32: in half precision small terms would be lost.
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(tensor, dtype=at_least_float32(tensor.dtype)) if want else None
            for tensor, want in zip(inputs, wanted, strict=True)
        )
        terms = []
        with torch.autocast(hidden.device.type, enabled=False):
            weight, bias = (None if tensor is None else tensor.to(hidden.dtype) for tensor in (weight, bias))
            for first in range(0, len(hidden), chunk_size):
                chunk = slice(first, min(first + chunk_size, len(hidden)))
                logits = F.linear(hidden[chunk], weight, bias).requires_grad_(any(wanted))
                with torch.set_grad_enabled(any(wanted)):
                    values = per_token(logits, chunk)
                    total = (values * values.new_tensor(term_weights)[:, None]).sum() * lifted
                terms.append(values.detach())
                if not any(wanted):
                    continue
                (of_logits,) = torch.autograd.grad(total, logits)
                if of_hidden is not None:
                    of_hidden[chunk] = of_logits @ weight
                if of_weight is not None:
                    of_weight += of_logits.T @ hidden[chunk]
                if of_bias is not None:
                    of_bias += of_logits.sum(dim=0)
        ctx.lifted, ctx.dtypes = lifted, [None if tensor is None else tensor.dtype for tensor in inputs]
        ctx.save_for_backward(
            *(
                gradient if gradient is None or dtype == torch.float16 else gradient.to(dtype)
                for gradient, dtype in zip((of_hidden, of_weight, of_bias), ctx.dtypes, strict=True)
            )
        )
        terms = torch.cat(terms, dim=1)
        ctx.mark_non_differentiable(terms)
        return (terms.sum(dim=1) * terms.new_tensor(term_weights)).sum(), terms

    @staticmethod
    def backward(ctx, of_sum, _of_terms):
        factor = of_sum / ctx.lifted
        gradients = (
            None if gradient is None else (gradient * factor).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What losses are computed in: half precision is not enough for sums over a vocabulary."""
    return torch.promote_types(dtype, torch.float32)


def _log_probs(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    dtype = at_least_float32(student_logits.dtype)
    return (
        torch.log_softmax(student_logits.to(dtype) / temperature, dim=-1),
        torch.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1),
    )


def _kl_to_mixture(log_a_xV: Tensor, log_b_xV: Tensor, weight: float) -> Tensor:
    """KL(a || weight b + (1 - weight) a) = -sum a log(1 - weight + weight b / a), from log-probabilities.

    Every divergence above but the last is made of this one. Working on the ratio b / a, never on the mixture itself,
    makes it exactly 0 when a equals b.
    """
    # Where a is 0, or too small for the dtype, the term is 0 whatever b is; replacing the ratio keeps -inf - (-inf)
    # and 0 * inf out of value and gradient.
    a_xV = log_a_xV.exp()
    ratio_xV = torch.where(a_xV > 0, log_b_xV - log_a_xV, 0.0)
    kl = -(a_xV * _log_mixed_ratio(ratio_xV, weight)).sum(dim=-1)
    # The sum is >= 0; rounding can leave it at -1e-8. The gradient is that of the sum all the same: that of `clamp`
    # would be 0 for half of the tokens on which a student is nearly its teacher.
    return torch.where(kl < 0, kl - kl.detach(), kl)


def _log_mixed_ratio(log_ratio: Tensor, weight: float) -> Tensor:
    """log(1 - weight + weight exp(log_ratio)) without overflow on either side and exactly 0 at 0."""
    if weight == 1.0:
        return log_ratio
    # exp is only taken of what is <= 0: directly for small b / a, with b / a taken out of the logarithm for large.
    below = torch.log1p(weight * torch.expm1(log_ratio.clamp(max=0)))
    above = log_ratio + torch.log1p((1.0 - weight) * torch.expm1(-log_ratio.clamp(min=0)))
    return torch.where(log_ratio <= 0, below, above)
