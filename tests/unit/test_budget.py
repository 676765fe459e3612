"""Budgets of time, counted by hand, and the students that meet them."""

import copy
import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_encdec_distill import RopeEncDecConfig, RopeEncDecForConditionalGeneration
from hf_encdec_distill.models.rope_encdec import healing, initialization
from hf_encdec_distill.models.rope_encdec.budget import Budget, layers_within


SIZES = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 4}
SIZES |= {"num_key_value_heads": 1, "tie_word_embeddings": True}


def teacher_config(depth=4):
    return LlamaConfig(num_hidden_layers=depth, initializer_range=0.3, **SIZES)


def student_config(encoder=2, decoder=1, cross_attention="merged"):
    layers = {"encoder_num_hidden_layers": encoder, "decoder_num_hidden_layers": decoder}
    return RopeEncDecConfig(cross_attention=cross_attention, encoder_attention="causal", **layers, **SIZES)


def make_rows(number):
    return [(torch.randint(3, 32, (6,)).tolist(), torch.randint(3, 32, (4,)).tolist()) for _ in range(number)]


def test_time_by_hand():
    budget = Budget(prompt_tokens=6, answer_tokens=3, speedup=2, flops_per_byte=2)
    # A block has q = 64, kv = 64, o = 64 and f = 384 elements in matrices, 576 in all, and 16 in its norms.
    prompt = 4 * (2 * 6 * 576 + 4 * 6 * 6 * 8) + 2 * 32 * 8
    step = 4 * (4 * (576 + 16) + 8 + 33 * 8) + 4 * 4 * 8 * 7.5  # weights, head, row of the embedding; keys and values
    assert budget.time(teacher_config()) == pytest.approx(prompt / 2 + 2 * step)
    # The encoder reads 5 tokens, the decoder makes keys and values of them and takes a first step.
    prompt = 2 * (2 * 5 * 576 + 4 * 5 * 5 * 8) + 2 * 5 * 64 + (2 * 576 + 4 * 6 * 8) + 2 * 32 * 8
    step = 4 * ((576 + 16) + 8 + 33 * 8) + 4 * 8 * 7.5
    assert budget.time(student_config()) == pytest.approx(prompt / 2 + 2 * step)


@pytest.mark.parametrize(("prompt", "answer", "speedup"), [(60, 4, 2.0), (30, 30, 2.5), (200, 10, 3.0)])
def test_splits_are_the_largest_that_are_fast_enough(prompt, answer, speedup):
    budget, teacher = Budget(prompt, answer, speedup), teacher_config(depth=6)

    def fast_enough(encoder, decoder):
        return budget.time(teacher) / budget.time(student_config(encoder, decoder)) >= speedup

    enough = {split for split in itertools.product(range(1, 7), repeat=2) if fast_enough(*split)}
    largest = {(e, d) for e, d in enough if not {(e + 1, d), (e, d + 1)} & enough}
    assert len(largest) > 1
    assert sorted(budget.splits(teacher, student_config())) == sorted(largest)


def test_the_nearest_of_three_splits_with_either_layers_is_taken():
    budget, teacher, config = Budget(60, 10, 2.0), teacher_config(depth=6), student_config()
    gaps = {side: torch.rand(6, 7) for side in ("encoder", "decoder")}
    splits = budget.splits(teacher, config)
    assert len(splits) > 3
    tried, by_influence = [], lambda encoder, decoder: {"encoder": range(encoder), "decoder": range(decoder)}

    def divergence(kept):
        tried.append(copy.deepcopy(kept))
        return -len(tried)  # the last one is the nearest

    kept = layers_within(budget, teacher, config, gaps, by_influence, divergence)
    assert kept == tried[-1] and len(tried) == 6
    assert [{side: range(len(layers)) for side, layers in kept.items()} for kept in tried[::2]] == tried[1::2]
    tried = tried[::2]
    most = {decoder: encoder for encoder, decoder in splits}
    assert len({len(kept["decoder"]) for kept in tried}) == 3
    for kept in tried:
        assert len(kept["encoder"]) <= most[len(kept["decoder"])]
        assert kept["encoder"][-1] < max(kept["decoder"][-1], 1)  # all of the encoder is read


def test_no_layers_are_tried_twice():
    budget, teacher, config = Budget(60, 10, 2.0), teacher_config(depth=6), student_config()
    gaps = {side: torch.rand(6, 7) for side in ("encoder", "decoder")}
    tried = []

    def divergence(kept):
        tried.append(kept)
        return len(tried)

    same = {"encoder": [0], "decoder": [0]}
    layers_within(budget, teacher, config, gaps, lambda *_: same, divergence)
    assert len(tried) >= 3 and tried.count(same) == 1


@pytest.mark.parametrize(
    ("cross_attention", "width", "window"),
    [("merged", None, None), ("merged", 6, None), ("merged", None, 4), ("separate", None, None)],
)
def test_a_student_within_a_budget(cross_attention, width, window):
    teacher, budget = LlamaForCausalLM(teacher_config(depth=5)).eval(), Budget(30, 10, 1.5)
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher,
        budget=budget,
        calibration=make_rows(10),
        cross_attention=cross_attention,
        decoder_intermediate_size=width,
        encoder_sliding_window=window,
    )
    assert student.config.decoder_intermediate_size == width or width is None
    assert budget.time(teacher.config) / budget.time(student.config) >= 1.5
    most = {decoder: encoder for encoder, decoder in budget.splits(teacher.config, student.config)}
    assert student.config.encoder_num_hidden_layers <= most[student.config.decoder_num_hidden_layers]


def test_splits_are_compared_on_rows_that_they_were_not_fitted_on(monkeypatch):
    """A row that comes again would move all others by one place."""
    teacher, rows, batches = LlamaForCausalLM(teacher_config(depth=5)).eval(), make_rows(10), []
    real = initialization.calibration_batches

    def noting(rows, device):
        batches.append({(tuple(prompt), tuple(target)) for prompt, target in rows})
        return real(rows, device)

    for module in (initialization, healing):
        monkeypatch.setattr(module, "calibration_batches", noting)
    RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, budget=Budget(30, 10, 1.5), calibration=[rows[0], *rows]
    )
    to_measure, all_rows, compared, held_out, fitted, *_ = batches
    assert to_measure == all_rows and len(all_rows) == len(rows)
    assert compared == held_out and len(compared) == 2 and not compared & fitted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speedup": 1.0}, r"speedup=1.0 asks for nothing.*above 1"),
        ({"speedup": float("nan")}, "speedup=nan"),
        ({"prompt_tokens": 1}, "prompt_tokens=1 is too few"),
        ({"answer_tokens": 0}, "answer_tokens=0 is too few"),
        ({"flops_per_byte": 0}, "flops_per_byte=0.*positive"),
    ],
)
def test_budgets_that_say_nothing(fields, message):
    with pytest.raises(ValueError, match=message):
        Budget(**{"prompt_tokens": 10, "answer_tokens": 10, "speedup": 2.0, **fields})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decoder_layers": [0, 1]}, "budget= decides"),
        ({"encoder_num_hidden_layers": 2}, "budget= decides"),
        ({"encoder_layer_types": ["full_attention"]}, "budget= decides.*encoder_sliding_window"),
        ({"encoder_pooling": 2, "encoder_pooling_layer": 3}, "budget= decides.*encoder_pooling alone"),
        ({"layer_selection": "even"}, "budget= chooses.*layer_selection='even'"),
        ({"calibration": None}, "measures on rows.*tokenizer="),
        ({"budget": Budget(10, 10, 1000)}, r"speedup=1000 is more than any.*one layer on each side gives [1-9]\.\d"),
    ],
)
def test_budgets_that_cannot_be_met(arguments, message):
    teacher = LlamaForCausalLM(teacher_config())
    arguments = {"budget": Budget(10, 10, 1.2), "calibration": make_rows(5), **arguments}
    with pytest.raises(ValueError, match=message) as error:
        RopeEncDecForConditionalGeneration.from_decoder_only(teacher, **arguments)
    assert "\n" not in str(error.value)
