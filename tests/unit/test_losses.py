"""Divergences against torch's own, hand-computed values and numerical gradients."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from distillation_toys import LargestTensor
from torch.distributions import Categorical, kl_divergence
from transformers.trainer_pt_utils import LabelSmoother

from hf_encdec_distill.distillation.losses import (
    DIVERGENCES,
    chunked_sum,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    select_divergence,
    skew_kl,
    skew_reverse_kl,
    token_mean,
    total_variation,
    universal_logit_distance,
)


def logits_pair(*shape, scale=2.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype) for _ in range(2))


def categorical_reference(name, student, teacher, temperature, beta, alpha):
    """Each divergence from explicit mixtures of probabilities, by torch.distributions."""
    p = Categorical(probs=torch.softmax(teacher / temperature, -1))
    q = Categorical(probs=torch.softmax(student / temperature, -1))

    def mixture(share_of_p):
        return Categorical(probs=share_of_p * p.probs + (1 - share_of_p) * q.probs)

    return {
        "forward_kl": lambda: kl_divergence(p, q),
        "reverse_kl": lambda: kl_divergence(q, p),
        "generalized_jsd": lambda: (
            beta * kl_divergence(p, mixture(beta)) + (1 - beta) * kl_divergence(q, mixture(beta))
        ),
        "skew_kl": lambda: kl_divergence(p, mixture(alpha)),
        "skew_reverse_kl": lambda: kl_divergence(q, mixture(1 - alpha)),
        "total_variation": lambda: (p.probs - q.probs).abs().sum(-1) / 2,
    }[name]()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_equals_torch_distributions(name, temperature):
    student, teacher = logits_pair(3, 5, 11)
    for beta, alpha in [(0.5, 0.1), (0.2, 0.4), (0.9, 0.01)]:
        ours = select_divergence(name, beta, alpha)(student, teacher, temperature)
        theirs = categorical_reference(name, student, teacher, temperature, beta, alpha)
        assert ours.shape == (3, 5)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_kl_equals_functional_kl_div():
    student, teacher = logits_pair(7, 13)
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    theirs = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher), theirs)
    theirs = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(reverse_kl(student, teacher), theirs)


def test_values_by_hand():
    teacher, student = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    kl_pq = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    kl_qp = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert forward_kl(student, teacher).item() == pytest.approx(kl_pq, rel=1e-5)
    assert reverse_kl(student, teacher).item() == pytest.approx(kl_qp, rel=1e-5)
    assert total_variation(student, teacher).item() == pytest.approx(0.25, rel=1e-5)
    # m = 0.8 p + 0.2 q = (0.45, 0.55)
    jsd = 0.8 * (0.5 * math.log(0.5 / 0.45) + 0.5 * math.log(0.5 / 0.55))
    jsd += 0.2 * (0.25 * math.log(0.25 / 0.45) + 0.75 * math.log(0.75 / 0.55))
    assert generalized_jsd(student, teacher, beta=0.8).item() == pytest.approx(jsd, rel=1e-4)
    # 0.4 p + 0.6 q = (0.35, 0.65) and 0.6 p + 0.4 q = (0.4, 0.6)
    skew = 0.5 * math.log(0.5 / 0.35) + 0.5 * math.log(0.5 / 0.65)
    assert skew_kl(student, teacher, alpha=0.4).item() == pytest.approx(skew, rel=1e-4)
    skew = 0.25 * math.log(0.25 / 0.4) + 0.75 * math.log(0.75 / 0.6)
    assert skew_reverse_kl(student, teacher, alpha=0.4).item() == pytest.approx(skew, rel=1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_never_negative_and_zero_when_equal(name):
    divergence = select_divergence(name, 0.3, 0.1)
    student, _ = logits_pair(500, 40, scale=6.0, dtype=torch.float32)
    assert torch.equal(divergence(student, student.clone()), torch.zeros(500))
    for size in (1e-7, 1e-5, 1e-3):
        noise = torch.randn(500, 40, generator=torch.Generator().manual_seed(1)) * size
        assert (divergence(student, student + noise) >= 0).all()
    other, _ = logits_pair(500, 40, scale=6.0, dtype=torch.float32, seed=9)
    assert (divergence(student, other) > 0).all()


def test_a_student_that_is_nearly_its_teacher_keeps_its_gradient():
    """Where rounding takes the sum below 0; autograd of torch's own is never 0 there."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(64, 5000, generator=generator)
    teacher[:, 0] += 25
    student = (teacher + 1e-2 * torch.randn(64, 5000, generator=generator)).requires_grad_()
    divergence = forward_kl(student, teacher)
    assert (divergence == 0).any(), "rounding cuts none"
    (found,) = torch.autograd.grad(divergence.sum(), student)
    difference = torch.softmax(student.detach().double(), -1) - torch.softmax(teacher.double(), -1)
    assert (found.norm(dim=-1) > 0).all() and (found - difference).norm() < 0.05 * difference.norm()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_are_numerically_right(name):
    student, teacher = (x.requires_grad_() for x in logits_pair(4, 6))
    divergence = select_divergence(name, 0.3, 0.2)
    assert torch.autograd.gradcheck(lambda s, t: divergence(s, t, 1.7), (student, teacher))


def test_forward_kl_gradient_is_the_difference_of_probabilities():
    student, teacher = logits_pair(5, 9)
    student.requires_grad_()
    forward_kl(student, teacher, 2.0).sum().backward()
    difference = torch.softmax(student.detach() / 2, -1) - torch.softmax(teacher / 2, -1)
    torch.testing.assert_close(student.grad, difference / 2)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_ids_masked_on_both_sides_do_not_count(name):
    divergence = select_divergence(name)
    student, teacher = logits_pair(4, 6)
    reduced = student[:, :4].clone().requires_grad_()
    expected = divergence(reduced, teacher[:, :4])
    expected.sum().backward()
    student[:, 4:], teacher[:, 4:] = -torch.inf, -torch.inf
    student.requires_grad_()
    masked = divergence(student, teacher)
    masked.sum().backward()
    torch.testing.assert_close(masked, expected)
    torch.testing.assert_close(student.grad[:, :4], reduced.grad)
    assert torch.equal(student.grad[:, 4:], torch.zeros(4, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_ids_masked_on_one_side(name):
    """Teacher without the last id: finite unless it is reverse KL; the student without it: unless forward KL."""
    student, teacher = logits_pair(3, 5)
    masked = teacher.clone()
    masked[:, -1] = -torch.inf
    divergence = select_divergence(name, 0.4, 0.3)
    for one, two, infinite in ((student, masked, "reverse_kl"), (masked, student, "forward_kl")):
        one = one.clone().requires_grad_()
        value = divergence(one, two)
        if name == infinite:
            assert torch.isinf(value).all()
            continue
        value.sum().backward()
        torch.testing.assert_close(
            value, categorical_reference(name, one.detach(), two, 1.0, 0.4, 0.3), rtol=1e-6, atol=1e-6
        )
        assert torch.isfinite(one.grad).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_huge_logits_stay_finite(name):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, 1e4]])
    value = select_divergence(name, 0.5, 0.1)(student, teacher)
    value.sum().backward()
    expected = {
        "forward_kl": 2e4,
        "reverse_kl": 2e4,
        "generalized_jsd": math.log(2),
        "skew_kl": math.log(10),
        "skew_reverse_kl": math.log(10),
        "total_variation": 1.0,
    }[name]
    torch.testing.assert_close(value, torch.tensor([expected, 0.0]))
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_half_precision_is_computed_in_float32(name, dtype):
    student, teacher = logits_pair(6, 50, dtype=dtype)
    value = select_divergence(name)(student, teacher)
    assert value.dtype == torch.float32
    exact = select_divergence(name)(student.double(), teacher.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


def test_ends_of_the_generalized_jsd():
    student, teacher = logits_pair(5, 8)
    for tiny in (1e-4, 1e-6):
        torch.testing.assert_close(
            generalized_jsd(student, teacher, beta=tiny) / tiny, forward_kl(student, teacher), rtol=200 * tiny, atol=0
        )
        torch.testing.assert_close(
            generalized_jsd(student, teacher, beta=1 - tiny) / tiny,
            reverse_kl(student, teacher),
            rtol=200 * tiny,
            atol=0,
        )


def test_skew_of_zero_is_the_kl():
    student, teacher = logits_pair(5, 8)
    torch.testing.assert_close(skew_kl(student, teacher, alpha=0.0), forward_kl(student, teacher))
    torch.testing.assert_close(skew_reverse_kl(student, teacher, alpha=0.0), reverse_kl(student, teacher))


def test_unknown_divergence_names_the_known():
    with pytest.raises(ValueError, match="'kl'.*forward_kl.*total_variation"):
        select_divergence("kl")


def test_cross_entropy_equals_torch_and_transformers():
    student, _ = logits_pair(9, 12, dtype=torch.float32)
    labels = torch.arange(9)
    torch.testing.assert_close(cross_entropy(student, labels).mean(), F.cross_entropy(student, labels))
    smoothed = LabelSmoother(epsilon=0.2)({"logits": student}, labels)
    torch.testing.assert_close(cross_entropy(student, labels, 0.2).mean(), smoothed)
    torch.testing.assert_close(
        cross_entropy(student.bfloat16(), labels),
        F.cross_entropy(student.bfloat16().float(), labels, reduction="none"),
    )


def test_token_mean():
    values = torch.tensor([1.0, 2.0, 6.0])
    assert token_mean(values).item() == 3.0
    assert token_mean(values, 6).item() == 1.5
    assert token_mean(values, torch.tensor(9)).item() == 1.0
    empty = torch.zeros(0, requires_grad=True)
    token_mean(empty, 0).backward()
    assert token_mean(empty).item() == 0.0 and token_mean(empty, torch.tensor(0)).item() == 0.0


# Chunk by chunk, from hidden states and the head, against the same function on all logits at once -------------------


def head_inputs(rows=23, width=8, vocabulary=31, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = ((rows, width), (vocabulary, width), (vocabulary,))
    hidden, weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    teacher = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)], teacher.to(dtype), labels


@pytest.mark.parametrize("chunk_size", [1, 5, 23, 100])
@pytest.mark.parametrize("name", [*DIVERGENCES, "cross_entropy"])
def test_chunked_equals_dense(name, chunk_size):
    inputs, teacher, labels = head_inputs()
    hidden, weight, bias = inputs

    def per_token(logits, chunk):
        if name == "cross_entropy":
            return cross_entropy(logits, labels[chunk], 0.1)[None]
        return select_divergence(name, 0.3, 0.2)(logits, teacher[chunk], 1.7)[None]

    dense = per_token(F.linear(hidden, weight, bias), slice(None))
    expected = torch.autograd.grad(3 * dense.sum() / 7, inputs)
    total, terms = chunked_sum(per_token, hidden, weight, bias, chunk_size=chunk_size)
    assert not terms.requires_grad
    torch.testing.assert_close(terms, dense.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(total, dense.sum(), rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(3 * total / 7, inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_chunked_gradients_are_numerically_right():
    inputs, teacher, _ = head_inputs(rows=5, width=3, vocabulary=4)

    def function(hidden, weight, bias):
        return chunked_sum(
            lambda logits, chunk: forward_kl(logits, teacher[chunk])[None], hidden, weight, bias, chunk_size=2
        )[0]

    assert torch.autograd.gradcheck(function, inputs)


def test_chunked_terms_are_weighed():
    inputs, teacher, labels = head_inputs(dtype=torch.float32)
    hidden, weight, _ = inputs

    def both(logits, chunk):
        return torch.stack([cross_entropy(logits, labels[chunk]), reverse_kl(logits, teacher[chunk])])

    dense = both(F.linear(hidden, weight), slice(None))
    total, terms = chunked_sum(both, hidden, weight, chunk_size=4, term_weights=(0.0, 0.9))
    assert terms.shape == (2, 23)
    torch.testing.assert_close(terms, dense.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, 0.9 * dense[1].sum())
    expected = torch.autograd.grad(0.9 * dense[1].sum(), (hidden, weight))
    for ours, theirs in zip(torch.autograd.grad(total, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_chunked_in_half_precision_keeps_its_sums_in_float32():
    inputs, teacher, _ = head_inputs(rows=400, dtype=torch.bfloat16)
    hidden, weight, bias = inputs

    def per_token(logits, chunk):
        return forward_kl(logits, teacher[chunk])[None]

    exact = [x.detach().double().requires_grad_() for x in inputs]
    dense = forward_kl(F.linear(*exact), teacher.double()).sum()
    total, _ = chunked_sum(per_token, hidden, weight, bias, chunk_size=4)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), dense, rtol=0.01, atol=0)
    pairs = zip(torch.autograd.grad(total, inputs), torch.autograd.grad(dense, exact), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() <= 0.02 * theirs.norm()


def test_chunked_in_float16_keeps_gradients_that_float16_has_not():
    """Of a student that is nearly its teacher, whose loss is scaled as GradScaler does, over a large vocabulary."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(16, 8).half(), torch.randn(4000, 8)
    teacher = hidden.float() @ weight.T + 1e-3 * torch.randn(16, 4000)
    exact = [hidden.double().requires_grad_(), weight.half().double().requires_grad_()]
    dense = forward_kl(F.linear(*exact), teacher.double()).sum() / 1000
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    total, _ = chunked_sum(
        lambda logits, chunk: forward_kl(logits.float(), teacher[chunk])[None], *inputs, chunk_size=4
    )
    scale = 2.0**16
    ours = torch.autograd.grad(total / 1000 * scale, inputs)
    for gradient, expected, source in zip(ours, torch.autograd.grad(dense, exact), inputs, strict=True):
        assert gradient.dtype == source.dtype
        lost = (gradient == 0) & (expected.abs() > 1e-12)
        assert lost.double().mean() < 0.01


def test_chunked_never_holds_all_logits():
    """No tensor of the chunked loss, forward or backward, has as many elements as two chunks of logits."""
    rows, width, vocabulary, chunk_size = 64, 4, 500, 8
    inputs, teacher, _ = head_inputs(rows, width, vocabulary, torch.float32)
    teacher_hidden = torch.randn(rows, 3)
    teacher_weight = torch.randn(vocabulary, 3)
    with LargestTensor() as chunked:
        total, _ = chunked_sum(
            lambda logits, chunk: generalized_jsd(logits, teacher_hidden[chunk] @ teacher_weight.T)[None],
            *inputs,
            chunk_size=chunk_size,
        )
        total.backward()
    assert chunked.elements <= chunk_size * vocabulary
    with LargestTensor() as dense:
        generalized_jsd(F.linear(*inputs), teacher_hidden @ teacher_weight.T).sum().backward()
    assert dense.elements == rows * vocabulary


def test_chunked_without_gradient_makes_none():
    inputs, teacher, _ = head_inputs()
    asked = []

    def per_token(logits, chunk):
        asked.append(logits.requires_grad)
        return forward_kl(logits, teacher[chunk])[None]

    with torch.no_grad():
        # The head's weight is a parameter in training, which would still say that it wants a gradient.
        total, terms = chunked_sum(per_token, inputs[0], torch.nn.Parameter(inputs[1]), inputs[2], chunk_size=4)
    assert not total.requires_grad and not any(asked)
    torch.testing.assert_close(terms[0], forward_kl(F.linear(*inputs), teacher).detach())


def test_chunked_refuses_what_has_no_meaning():
    inputs, _, _ = head_inputs()
    with pytest.raises(ValueError, match="chunk_size=0"):
        chunked_sum(lambda logits, chunk: logits.T[:1], *inputs, chunk_size=0)
    with pytest.raises(ValueError, match="no rows"):
        chunked_sum(lambda logits, chunk: logits.T[:1], inputs[0][:0], *inputs[1:])


def test_chunked_takes_its_products_in_the_dtype_of_the_hidden_states():
    inputs, teacher, _ = head_inputs(rows=200, dtype=torch.float32)
    hidden, weight, bias = inputs
    with torch.autocast("cpu", torch.bfloat16):  # does to the dense one what half-precision states do to the other
        dense = forward_kl(F.linear(hidden, weight, bias), teacher).sum()
        total, _ = chunked_sum(
            lambda logits, chunk: forward_kl(logits, teacher[chunk])[None],
            hidden.bfloat16(),
            weight,
            bias,
            chunk_size=16,
        )
    torch.testing.assert_close(total, dense, rtol=1e-5, atol=0)
    pairs = zip(torch.autograd.grad(total, inputs), torch.autograd.grad(dense, inputs), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 0.01 * theirs.norm()


def test_universal_distance_by_hand():
    """Sorted, the shorter filled up with zeros; which token has the probability is not looked at."""
    teacher = torch.tensor([[0.2, 0.5, 0.3]]).log()
    student = torch.tensor([[0.4, 0.6]]).log()
    torch.testing.assert_close(universal_logit_distance(student, teacher), torch.tensor([0.1 + 0.1 + 0.2]))
    torch.testing.assert_close(universal_logit_distance(teacher, student), torch.tensor([0.4]))
    assert universal_logit_distance(teacher[:, [2, 0, 1]], teacher).item() == 0.0
    # At temperature 2 the square roots, normalised: 0.4 and 0.6 are 0.4495 and 0.5505.
    p = torch.tensor([0.5, 0.3, 0.2]).sqrt() / torch.tensor([0.5, 0.3, 0.2]).sqrt().sum()
    q = torch.tensor([0.6, 0.4, 0.0]).sqrt() / torch.tensor([0.6, 0.4]).sqrt().sum()
    torch.testing.assert_close(universal_logit_distance(student, teacher, 2.0), (p - q).abs().sum()[None])


@pytest.mark.parametrize("sizes", [(4, 6), (6, 4), (5, 5)])
def test_universal_distance_is_the_least_over_all_ways_to_pair_tokens(sizes):
    student, teacher = (logits_pair(4, 3, size, seed=size)[i] for i, size in enumerate(sizes))
    ours = universal_logit_distance(student, teacher)
    assert ours.shape == (4, 3) and ours.dtype == torch.float64 and (ours > 0).all() and (ours < 2).all()
    p, q = (F.pad(x.softmax(-1), (0, max(sizes) - x.shape[-1])) for x in (teacher, student))
    pairings = [(p - q[..., list(order)]).abs().sum(-1) for order in itertools.permutations(range(max(sizes)))]
    torch.testing.assert_close(ours, torch.stack(pairings).amin(0))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: universal_logit_distance(x, teacher, 1.7), student)
    assert universal_logit_distance(student.detach().bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_what_is_too_small_for_the_dtype_counts_as_nothing():
    """exp(-300) is 0 in float32, and 0 log 0 is 0."""
    one, other = torch.tensor([[1.0, 2.0, -torch.inf]]), torch.tensor([[0.0, 0.0, -300.0]])
    expected = torch.nn.functional.kl_div(one[:, :2].log_softmax(-1), other[:, :2].softmax(-1), reduction="sum")
    assert forward_kl(one, other).item() == pytest.approx(expected.item(), rel=1e-6)
    assert reverse_kl(other, one).item() == pytest.approx(expected.item(), rel=1e-6)
