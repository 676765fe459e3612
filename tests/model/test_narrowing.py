"""Decoders with fewer neurons, compared with dense MLPs whose neurons are silenced by hand, and with NumPy."""

import copy
from functools import partial
from itertools import cycle

import numpy as np
import pytest
import torch
from test_from_decoder_only import FAMILIES, make_teacher, mean_divergence
from test_least_squares import (
    DECODER,
    DEPTH,
    ENCODER,
    fit_by_hand,
    make_rows,
    make_student,
    pruned,
    teacher_states,
    unchanged,
    watched,
)
from torch.nn import functional as F
from toys import KINDS, make_model, random_ids
from transformers import AutoModelForSeq2SeqLM

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.models.cost import model_cost
from hf_encdec_distill.models.rope_encdec import layer_choice, least_squares, teacher_layers
from hf_encdec_distill.models.rope_encdec.narrowing import keep_neurons, neurons_to_keep


def decoder_mlps(student):
    return [layer.mlp for layer in student.model.decoder.layers]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_an_mlp_of_some_neurons_by_hand(gated, bias):
    mlp = make_model(gated_mlp=gated, mlp_bias=bias, hidden_act="gelu").model.decoder.layers[0].mlp
    before, kept, x = {name: p.clone() for name, p in mlp.named_parameters()}, [0, 3, 4, 30, 47], torch.randn(3, 32)
    old = dict(mlp.named_parameters())
    keep_neurons(mlp, torch.tensor(kept))
    up = F.linear(x, before["up_proj.weight"], before.get("up_proj.bias"))
    gate = F.linear(x, before["gate_proj.weight"], before.get("gate_proj.bias")) if gated else None
    inner = F.gelu(gate) * up if gated else F.gelu(up)
    inner[:, [neuron for neuron in range(48) if neuron not in kept]] = 0.0
    torch.testing.assert_close(mlp(x), F.linear(inner, before["down_proj.weight"], before.get("down_proj.bias")))
    assert mlp.up_proj.out_features == mlp.down_proj.in_features == 5
    assert all(p.requires_grad and p.is_contiguous() for p in mlp.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in old.items())


def ridge_without(inputs, missing, weight, penalty, gone):
    """The weight of least squares that has no neuron of `gone`, and its error; with all data stacked."""
    stay = [neuron for neuron in range(len(weight)) if neuron not in gone]
    wanted = missing + inputs[:, gone] @ weight[gone]
    pull = np.sqrt(penalty) * np.eye(len(stay))
    system = np.concatenate([inputs[:, stay], pull])
    right = np.concatenate([wanted, np.zeros((len(stay), wanted.shape[1]))])
    change, *_ = np.linalg.lstsq(system, right, rcond=None)
    error = np.square(right - system @ change).sum() + penalty * np.square(weight[gone]).sum()
    found = np.zeros_like(weight)
    found[stay] = weight[stay] + change
    return found, error


def taken_out_one_by_one(inputs, missing, weight, penalty, count):
    """Each time the neuron whose absence costs least, by trying all."""
    gone = []
    while len(weight) - len(gone) > count:
        errors = {
            neuron: ridge_without(inputs, missing, weight, penalty, [*gone, neuron])[1]
            for neuron in range(len(weight))
            if neuron not in gone
        }
        gone.append(min(errors, key=errors.get))
    return gone


@pytest.mark.parametrize("seed", range(4))
def test_the_neuron_that_goes_is_the_one_of_brute_force(seed):
    """Inputs that nearly depend on each other, where energies mislead."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 9)) + 0.1 * rng.normal(size=(60, 9))
    missing, weight, penalty = rng.normal(size=(60, 4)), rng.normal(size=(9, 4)), 0.3
    hessian = torch.from_numpy(mixed.T @ mixed + penalty * np.eye(9))
    whole = torch.from_numpy(ridge_without(mixed, missing, weight, penalty, [])[0])
    for count in (8, 7, 4, 1):
        gone = taken_out_one_by_one(mixed, missing, weight, penalty, count)
        expected = [neuron for neuron in range(9) if neuron not in gone]
        assert neurons_to_keep(hessian, whole, count).tolist() == expected
    assert neurons_to_keep(hessian, whole, 9).tolist() == list(range(9))


NEURONS, WIDTH = 16, 10


@torch.no_grad()
def narrow_by_hand(layer, run, rows, tokens, goals, kept):
    """Fit `down_proj`, the neurons `kept` alone, to `WIDTH` of them; the others write nothing. Returns those left."""
    linear = layer.mlp.down_proj
    inputs, missing = [], []
    for row, at, goal in zip(rows, tokens, goals):
        (_, entering), (_, leaving) = watched(partial(run, *row), [layer, linear])  # what is inside leaves first
        inputs.append(entering[at][:, kept])
        missing.append(goal - leaving[at])
    inputs, missing = (torch.cat(x).double().numpy() for x in (inputs, missing))
    penalty = least_squares.RIDGE * np.square(inputs).sum() / len(inputs)
    weight = linear.weight.double().numpy().T[kept]
    gone = taken_out_one_by_one(inputs, missing, weight, penalty, WIDTH)
    found, _ = ridge_without(inputs, missing, weight, penalty, gone)
    linear.weight.zero_()
    linear.weight[:, kept] = torch.from_numpy(found.T).float()
    return [neuron for index, neuron in enumerate(kept) if index not in gone]


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_and_weights_are_those_of_numpy(kind):
    teacher = make_teacher(num_hidden_layers=DEPTH, intermediate_size=NEURONS)
    rows, expected = make_rows(30), make_student(teacher, None, cross_attention=kind)
    student = make_student(teacher, None, cross_attention=kind, decoder_intermediate_size=WIDTH)
    gaps = least_squares.fit_encoder_decoder(
        student,
        teacher_layers.as_causal_encoder(teacher),
        {"encoder": ENCODER, "decoder": DECODER},
        layer_choice.calibration_batches(rows, "cpu"),
        teacher_layers.as_causal_encoder(teacher, DECODER, share_memory=False),
    )
    assert [gap.layer for gap in gaps if gap.side == "decoder"] == DECODER  # layer 0 too, behind which nothing is cut
    states, goals = teacher_states(teacher, rows), [*DECODER[1:], DEPTH]
    expected.model.encoder.load_state_dict(student.model.encoder.state_dict())
    kept = [list(range(NEURONS))] * len(DECODER)
    if kind == "merged":
        alone = pruned(teacher, DECODER)

        def run(prompt, target):
            alone(torch.tensor([prompt + target]), use_cache=False)

        at_target = [slice(len(prompt) - 1, len(prompt + target) - 1) for prompt, target in rows]
        for position, (ours, theirs) in enumerate(zip(expected.model.decoder.layers, alone.model.layers)):
            tokens = at_target if goals[position] == DEPTH else [slice(1, None)] * len(rows)
            there = [row[goals[position]][at] for row, at in zip(states, tokens)]
            kept[position] = narrow_by_hand(theirs, run, rows, tokens, there, kept[position])
            ours.mlp.down_proj.weight.data.copy_(theirs.mlp.down_proj.weight)

    def write(prompt, target):
        inputs = torch.tensor([[prompt[-1], *target[:-1]]])
        expected(input_ids=torch.tensor([prompt[:-1]]), decoder_input_ids=inputs)

    for position, layer in enumerate(expected.model.decoder.layers):
        there, everywhere = [], [slice(None)] * len(rows)
        for row, (prompt, _) in zip(states, rows):
            there.append(row[goals[position]][len(prompt) - 1 : -1])
        if kind == "separate":
            fit_by_hand(layer, layer.cross_attn.o_proj, write, rows, everywhere, there)
        kept[position] = narrow_by_hand(layer, write, rows, everywhere, there, kept[position])

    for ours, theirs, neurons in zip(decoder_mlps(student), decoder_mlps(expected), kept):
        for name in ("gate_proj", "up_proj"):
            for parameter, whole in zip(getattr(ours, name).parameters(), getattr(theirs, name).parameters()):
                assert torch.equal(parameter, whole[neurons])
        weight = theirs.down_proj.weight[:, neurons]
        torch.testing.assert_close(ours.down_proj.weight, weight, atol=2e-4, rtol=1e-3)
    inputs = {"input_ids": random_ids(2, 7), "decoder_input_ids": random_ids(2, 5)}
    with torch.no_grad():
        torch.testing.assert_close(student(**inputs).logits, expected(**inputs).logits, atol=5e-3, rtol=1e-2)


@torch.no_grad()
def written(student, rows):
    """For each layer of a decoder what each neuron writes, `E[x^2] |column|^2`, row by row without padding."""
    linears, total = [mlp.down_proj for mlp in decoder_mlps(student)], 0
    for prompt, target in rows:
        inputs = torch.tensor([[prompt[-1], *target[:-1]]])
        run = partial(student, input_ids=torch.tensor([prompt[:-1]]), decoder_input_ids=inputs)
        total = total + torch.stack([x.square().sum(0) for x in watched(run, linears)[0]])
    return [energy * linear.weight.square().sum(0) for energy, linear in zip(total, linears)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [20, 0])
def test_without_a_fit_those_stay_that_write_most(count, kind):
    teacher, rows = make_teacher(num_hidden_layers=DEPTH), make_rows(count) or None
    options = {"cross_attention": kind, "heal": None}
    whole = make_student(teacher, rows, **options)
    student = make_student(teacher, rows, decoder_intermediate_size=20, **options)
    if count:
        scores = written(whole, rows)
    else:
        scores = [
            mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
            for mlp in decoder_mlps(whole)
        ]
    for ours, theirs, score in zip(decoder_mlps(student), decoder_mlps(whole), scores):
        kept = sorted(sorted(range(48), key=lambda neuron: -score[neuron])[:20])
        assert torch.equal(ours.up_proj.weight, theirs.up_proj.weight[kept])
        assert torch.equal(ours.down_proj.weight, theirs.down_proj.weight[:, kept])
    assert student.healing is None and student.config.decoder_intermediate_size == 20


@pytest.mark.parametrize(("family", "kind"), list(zip(FAMILIES, cycle(KINDS))))
def test_the_fit_brings_every_family_nearer(family, kind):
    teacher, rows, unseen = make_teacher(family, num_hidden_layers=DEPTH), make_rows(200), make_rows(25, seed=2)
    before, options = copy.deepcopy(teacher.state_dict()), {"cross_attention": kind, "decoder_intermediate_size": 24}
    plain = make_student(teacher, rows, heal=None, **options)
    student = make_student(teacher, rows, **options)
    assert student.healing.taken and student.healing.kl_after < student.healing.kl_before
    assert mean_divergence(teacher, student, unseen) < mean_divergence(teacher, plain, unseen)
    assert mean_divergence(teacher, student, rows[::5]) == pytest.approx(student.healing.kl_after, rel=1e-3)
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.model.decoder.parameters())
    again = make_student(teacher, rows, **options)
    assert len(unchanged(student, again)) == len(list(again.parameters()))


def test_a_fit_that_does_harm_is_undone(caplog):
    teacher = make_teacher(num_hidden_layers=DEPTH)
    noise = ([5] * 30, [5] * 20)
    rows = [row if index % 5 == 0 else noise for index, row in enumerate(make_rows(20))]
    plain = make_student(teacher, rows, heal=None, decoder_intermediate_size=32)
    student = make_student(teacher, rows, decoder_intermediate_size=32)
    assert not student.healing.taken and "heal='least_squares' is not taken" in caplog.text
    assert len(unchanged(student, plain)) == len(list(plain.parameters()))


def test_a_student_of_full_depth_is_fitted_in_its_decoder_alone():
    teacher, rows = make_teacher(num_hidden_layers=DEPTH), make_rows(200)
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, calibration=rows, decoder_intermediate_size=40
    )
    assert [(gap.side, gap.layer) for gap in student.healing.gaps] == [("decoder", layer) for layer in range(DEPTH)]
    for ours, theirs in zip(student.model.encoder.layers, teacher.model.layers):
        assert all(torch.equal(weight, theirs.state_dict()[name]) for name, weight in ours.state_dict().items())


def test_all_neurons_are_no_change():
    teacher, rows = make_teacher(num_hidden_layers=DEPTH), make_rows(40)
    plain, same = make_student(teacher, rows), make_student(teacher, rows, decoder_intermediate_size=48)
    assert len(unchanged(same, plain)) == len(list(plain.parameters())) and same.healing == plain.healing


def test_it_is_smaller_saved_and_asked_as_any_other(tmp_path):
    teacher, rows = make_teacher(num_hidden_layers=DEPTH), make_rows(40)
    student = make_student(teacher, rows, decoder_intermediate_size=20)
    # A row of gate and up with its bias, and a column of down, for each neuron of three layers.
    lost = len(DECODER) * (48 - 20) * (3 * 32 + 2)
    assert make_student(teacher, rows, heal=None).num_parameters() - student.num_parameters() == lost
    assert model_cost(student, 9).parameters["total"] == student.num_parameters()
    student.save_pretrained(tmp_path)
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(unchanged(student, loaded)) == len(list(student.parameters()))
    ids = torch.randint(4, 97, (2, 7))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    assert loaded.generate(ids, **options).tolist() == student.generate(ids, **options).tolist()


@pytest.mark.parametrize("width", [0, -3, 49, True, 2.5, "20"])
def test_a_width_that_cannot_be(width):
    with pytest.raises(
        ValueError, match=f"decoder_intermediate_size={width!r} does not work.*48 neurons, keep 1 to 48"
    ):
        make_student(make_teacher(), None, [0, 1], [0, 1], decoder_intermediate_size=width)
