"""Layers by what a fit leaves between them: against plain ridge regressions, against all subsets."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.models import SUPPORTED_FAMILIES
from hf_encdec_distill.models.rope_encdec import layer_paths
from hf_encdec_distill.models.rope_encdec.layer_choice import calibration_batches
from hf_encdec_distill.models.rope_encdec.layer_paths import (
    decoder_path,
    encoder_path,
    measure_gaps,
    shortest_path,
    step_costs,
)


VOCAB, RIDGE = 60, 0.02


def make_teacher(depth, family="llama"):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, num_hidden_layers=depth, initializer_range=0.3, **sizes, **tokens)
    return AutoModelForCausalLM.from_config(config).eval()


def make_rows(lengths):
    return [(torch.randint(3, VOCAB, (p,)).tolist(), torch.randint(3, VOCAB, (t,)).tolist()) for p, t in lengths]


def ridge_with_each_left_out(inputs, missing):
    """Sum of squares that is left at each position by a fit on all the others, solved one by one."""
    penalty = RIDGE * np.mean(np.sum(inputs**2, axis=0))
    damping = np.sqrt(penalty) * np.eye(inputs.shape[1])
    total = 0.0
    for out in range(len(inputs)):
        x, y = np.delete(inputs, out, axis=0), np.delete(missing, out, axis=0)
        system, wanted = np.vstack([x, damping]), np.vstack([y, np.zeros((len(damping), y.shape[1]))])
        weights = np.linalg.lstsq(system, wanted, rcond=None)[0]
        total += np.sum((missing[out] - inputs[out] @ weights) ** 2)
    return total


def test_gaps_are_those_of_a_dense_ridge():
    depth = 4
    teacher = make_teacher(depth)
    rows = make_rows([(7, 4), (2, 3), (5, 6), (9, 2)])
    seen = {side: ([[] for _ in range(depth + 1)], [[] for _ in range(depth)]) for side in ("encoder", "decoder")}
    notes = {}

    def note(kind, i):
        return lambda _module, args: notes.update({(kind, i): args[0][0]})

    handles = [
        module.register_forward_pre_hook(note(kind, i))
        for kind, modules in (
            (0, [*teacher.model.layers, teacher.model.norm]),
            (1, [layer.mlp.down_proj for layer in teacher.model.layers]),
        )
        for i, module in enumerate(modules)
    ]
    for prompt, target in rows:  # one by one, without padding
        places = {"encoder": range(1, len(prompt)), "decoder": range(len(prompt) - 1, len(prompt) + len(target) - 1)}
        with torch.no_grad():
            teacher(torch.tensor([prompt + target]))
        for side, indices in places.items():
            for (kind, i), values in notes.items():
                seen[side][kind][i].append(values[list(indices)].double().numpy())
    for handle in handles:
        handle.remove()

    gaps = measure_gaps(teacher, calibration_batches(rows, "cpu"), RIDGE)
    for side, (states, inputs) in seen.items():
        states, inputs = ([np.concatenate(parts) for parts in kind] for kind in (states, inputs))
        for layer, goal in itertools.product(range(depth), range(depth + 1)):
            if goal <= layer + 1:
                assert gaps[side][layer, goal] == (0.0 if goal == layer + 1 else torch.inf)
                continue
            left = ridge_with_each_left_out(inputs[layer], states[goal] - states[layer + 1])
            variance = np.sum((states[goal] - states[goal].mean(0)) ** 2)
            assert gaps[side][layer, goal] == pytest.approx(left / variance, rel=1e-3)


@pytest.mark.parametrize("end", [4, 6])
def test_the_shortest_path_is_the_best_of_all_subsets(end):
    depth = 6
    cost = torch.rand(depth, depth + 1)
    for count in range(1, end + 1):
        paths = [[0, *others] for others in itertools.combinations(range(1, end), count - 1)]
        totals = [sum(float(cost[i, j]) for i, j in itertools.pairwise([*path, end])) for path in paths]
        path, total = shortest_path(cost, count, end)
        assert path == paths[int(np.argmin(totals))]
        assert total == pytest.approx(min(totals))


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_layers_that_do_nothing_are_left_out(family):
    teacher = make_teacher(6, family)
    with torch.no_grad():
        for layer in (2, 4):
            teacher.model.layers[layer].self_attn.o_proj.weight.zero_()
            teacher.model.layers[layer].mlp.down_proj.weight.zero_()
    rows = make_rows([(8, 5)] * 6)
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher,
        encoder_num_hidden_layers=3,
        decoder_num_hidden_layers=4,
        layer_selection="least_squares",
        calibration=rows,
        heal=None,
    )
    assert student.config.cross_attention_layers == [0, 1, 2, 3]
    for prompt, target in rows[:2]:
        with torch.no_grad():
            expected = teacher(torch.tensor([prompt + target])).logits[:, len(prompt) - 1 : -1]
            logits = student(
                input_ids=torch.tensor([prompt[:-1]]), decoder_input_ids=torch.tensor([[prompt[-1], *target[:-1]]])
            ).logits
        torch.testing.assert_close(logits, expected, rtol=2e-3, atol=2e-3)  # the norm's scale is one of a grid


def test_positions_beyond_a_number_are_thinned_in_all_rows(monkeypatch):
    masks = [torch.ones(3, 40, dtype=torch.bool), torch.ones(5, 20, dtype=torch.bool)]
    thinned = layer_paths._thinned(masks, most=60)
    assert sum(int(mask.sum()) for mask in thinned) == 60
    assert all(int(row.sum()) >= 4 for mask in thinned for row in mask)
    assert [torch.equal(*pair) for pair in zip(layer_paths._thinned(masks, most=220), masks)] == [True, True]


def test_paths_of_both_sides():
    gaps = {side: torch.rand(6, 7) for side in ("encoder", "decoder")}
    kept = {}
    for side in gaps:
        gaps[side] *= 0.9  # a path keeps the product of the shares that are not missing
        for path in ([0, *others] for others in itertools.combinations(range(1, 6), 2)):
            shares = [1 - float(gaps[side][i, j]) for i, j in itertools.pairwise([*path, 6])]
            kept.setdefault(side, {})[tuple(path)] = np.prod(shares)
    best = {side: max(of_side, key=of_side.get) for side, of_side in kept.items()}
    path, cost = decoder_path(gaps, 3, merged=True)
    assert tuple(path) == best["decoder"]
    assert np.exp(-cost) == pytest.approx(kept["decoder"][best["decoder"]], rel=1e-4)
    assert tuple(encoder_path(gaps, 3, None)[0]) == best["encoder"]
    assert decoder_path(gaps, 1, merged=True)[0] == [5] and decoder_path(gaps, 1, merged=False)[0] == [0]


def test_a_step_that_leaves_more_than_all_is_possible_but_dear():
    costs = step_costs(torch.tensor([0.0, 0.5, 1.0, 3.0, torch.inf]))
    torch.testing.assert_close(costs, torch.tensor([0.0, np.log(2), np.log(1000), np.log(1000), np.inf]).float())
