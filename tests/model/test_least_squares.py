"""The closed-form start, compared with least squares of NumPy on states that transformers' models give, row by row."""

import copy
import gc
import tempfile
from functools import partial

import numpy as np
import pytest
import torch
from test_from_decoder_only import FAMILIES, VOCAB, make_teacher, mean_divergence
from toys import make_llama

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.models.rope_encdec import healing, initialization, layer_choice, least_squares, teacher_layers


DEPTH = 6
KINDS = ("merged", "separate")
ENCODER, DECODER = [0, 2, 4], [0, 1, 5]


def make_rows(count, seed=1, lowest=4):
    """Ragged ones, by far not of the same length."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(lowest, VOCAB, (n,), generator=generator).tolist() for n in (6 + 5 * (i % 4), 4 + i % 3))
        for i in range(count)
    ]


def make_student(teacher, rows, encoder=ENCODER, decoder=DECODER, **arguments):
    return RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, encoder_layers=encoder, decoder_layers=decoder, calibration=rows, **arguments
    )


def unchanged(student, plain):
    return [name for name, weight in student.named_parameters() if torch.equal(weight, plain.get_parameter(name))]


@torch.no_grad()
def watched(run, modules):
    """What enters each of `modules` and what leaves it while one row runs, `(L, width)` each."""
    entering, leaving = [], []
    hooks = [
        hook
        for module in modules
        for hook in (
            module.register_forward_pre_hook(lambda module, args: entering.append(args[0][0])),
            module.register_forward_hook(lambda module, args, output: leaving.append(first_row(output))),
        )
    ]
    run()
    for hook in hooks:
        hook.remove()
    return entering, leaving


def first_row(output):
    """Of what a module returns, which may be a tuple or the states alone."""
    return (output[0] if isinstance(output, tuple) else output)[0]


def teacher_states(teacher, rows):
    """For each row what enters each layer and what enters the final norm, from a transformers model, unpadded."""
    modules = (*teacher.model.layers, teacher.model.norm)
    return [watched(partial(teacher, torch.tensor([prompt + target])), modules)[0] for prompt, target in rows]


@torch.no_grad()
def fit_by_hand(layer, linear, run, rows, tokens, goals):
    """Ridge regression as ordinary least squares on stacked data; what `Gap` says before and after it."""
    inputs, missing = [], []
    for row, at, goal in zip(rows, tokens, goals):
        (_, entering), (_, leaving) = watched(partial(run, *row), [layer, linear])  # what is inside leaves first
        inputs.append(entering[at])
        missing.append(goal - leaving[at])
    inputs, missing, goals = (torch.cat(x).double().numpy() for x in (inputs, missing, goals))
    penalty = least_squares.RIDGE * np.square(inputs).sum() / len(inputs)
    pull = np.sqrt(penalty) * np.eye(inputs.shape[1])
    change, *_ = np.linalg.lstsq(
        np.concatenate([inputs, pull]), np.concatenate([missing, np.zeros((len(pull), missing.shape[1]))]), rcond=None
    )
    linear.weight.add_(torch.from_numpy(change.T).float())
    variance = np.square(goals - goals.mean(0)).sum()
    return np.square(missing).sum() / variance, np.square(missing - inputs @ change).sum() / variance


def means(states, pooling):
    """Of so many neighbours each, from the first row on."""
    return torch.stack([states[first : first + pooling].mean(0) for first in range(0, len(states), pooling)])


@pytest.mark.parametrize(
    ("family", "kind", "with_alone", "pooling", "sharing"),
    [
        *((family, "merged", with_alone, 1, 1) for family in ("llama", "phi3") for with_alone in (True, False)),
        *((family, "separate", False, 1, 1) for family in ("llama", "phi3")),
        ("llama", "merged", True, 2, 1),
        ("llama", "separate", False, 3, 1),
        ("llama", "merged", True, 1, 2),
        ("llama", "separate", False, 1, 3),
    ],
)
def test_weights_are_those_of_numpy(family, kind, with_alone, pooling, sharing):
    teacher, fitted = make_teacher(family, num_hidden_layers=DEPTH), make_rows(30)
    options = {"cross_attention": kind, "encoder_pooling": pooling, "cross_attention_sharing": sharing}
    student = make_student(teacher, None, **options, heal=None)
    expected = copy.deepcopy(student)
    found = least_squares.fit_encoder_decoder(
        student,
        teacher_layers.as_causal_encoder(teacher),
        {"encoder": ENCODER, "decoder": DECODER},
        layer_choice.calibration_batches(fitted, "cpu"),
        teacher_layers.as_causal_encoder(teacher, DECODER, share_memory=False) if with_alone else None,
    )
    states = teacher_states(teacher, fitted)
    if with_alone:
        start_from_decoder_alone(expected.model.decoder, pruned(teacher, DECODER), fitted, states)
    encoder, decoder = expected.model.encoder, expected.model.decoder

    def read(prompt, target):
        encoder(torch.tensor([prompt[:-1]]))

    def write(prompt, target):
        inputs = torch.tensor([[prompt[-1], *target[:-1]]])
        expected(input_ids=torch.tensor([prompt[:-1]]), decoder_input_ids=inputs)

    gaps = []
    # The prompt without its last token, which the decoder starts from; the encoder's top stands for layer 5, which
    # reads it, or, in `separate`, for the teacher's own top.
    for index, (layer, goal) in enumerate(zip(encoder.layers, [2, 4, 5 if kind == "merged" else DEPTH])):
        of_layer = pooling if index >= (student.config.first_pooled_layer or 0) else 1
        tokens = [slice(1, None)] * len(fitted)
        goals = [means(row[goal][: len(prompt) - 1], of_layer)[1:] for row, (prompt, _) in zip(states, fitted)]
        gaps.append(fit_by_hand(layer, layer.mlp.down_proj, read, fitted, tokens, goals))
    for layer, goal in zip(decoder.layers, [1, 5, DEPTH]):
        goals = [row[goal][len(prompt) - 1 : -1] for row, (prompt, _) in zip(states, fitted)]
        shares = []
        for linear in ([layer.cross_attn.o_proj] if kind == "separate" else []) + [layer.mlp.down_proj]:
            shares.append(fit_by_hand(layer, linear, write, fitted, [slice(None)] * len(fitted), goals))
        gaps.append((shares[0][0], shares[-1][1]))

    for name, weight in student.named_parameters():
        torch.testing.assert_close(weight, expected.get_parameter(name), atol=2e-4, rtol=1e-3)
    if kind == "merged" and pooling == 1:  # nothing is missing behind the decoder's layer 0: it is left as it is
        assert max(gaps.pop(3)) < 1e-10
    np.testing.assert_allclose([(gap.before, gap.after) for gap in found], gaps, rtol=1e-3)
    assert [(gap.side, gap.layer, gap.goal) for gap in found][:3] == [
        ("encoder", 0, 2),
        ("encoder", 2, 4),
        ("encoder", 4, 5 if kind == "merged" else DEPTH),
    ]


def start_from_decoder_alone(decoder, alone, rows, states):
    """Fit a transformers model of the decoder's layers to whole sequences by hand, and take its weights over."""

    def run(prompt, target):
        alone(torch.tensor([prompt + target]), use_cache=False)

    for position, (ours, theirs) in enumerate(zip(decoder.layers, alone.model.layers)):
        goal = [*DECODER[1:], DEPTH][position]
        at_target = [slice(len(prompt) - 1, len(prompt + target) - 1) for prompt, target in rows]
        tokens = at_target if goal == DEPTH else [slice(1, None)] * len(rows)
        if position:  # nothing is missing behind layer 0
            goals = [row[goal][at] for row, at in zip(states, tokens)]
            fit_by_hand(theirs, theirs.mlp.down_proj, run, rows, tokens, goals)
        ours.mlp.down_proj.weight.data.copy_(theirs.mlp.down_proj.weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_nearer_and_the_teacher_stays(family, kind):
    teacher = make_teacher(family, num_hidden_layers=DEPTH)
    before = copy.deepcopy(teacher.state_dict())
    rows, unseen = make_rows(200), make_rows(25, seed=2)
    plain = make_student(teacher, rows[:40], cross_attention=kind, heal=None)
    student = make_student(teacher, rows, cross_attention=kind)
    assert student.healing.taken and student.healing.kl_after < student.healing.kl_before
    assert all(gap.after <= gap.before for gap in student.healing.gaps)
    assert mean_divergence(teacher, student, unseen) < mean_divergence(teacher, plain, unseen)
    assert mean_divergence(teacher, student, rows[::5]) == pytest.approx(student.healing.kl_after, rel=1e-3)
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())


@torch.no_grad()
def without_effect(teacher, layer):
    """The layer hands on what enters it."""
    for linear in (teacher.model.layers[layer].self_attn.o_proj, teacher.model.layers[layer].mlp.down_proj):
        for parameter in linear.parameters():
            parameter.zero_()


def test_nothing_is_mended_where_nothing_is_missing():
    teacher, rows = make_teacher(num_hidden_layers=DEPTH), make_rows(40)
    without_effect(teacher, 1)
    without_effect(teacher, 3)
    plain = make_student(teacher, rows, [0, 2, 4, 5], [0, 2, 4, 5], heal=None)
    student = copy.deepcopy(plain)
    kept = {"encoder": [0, 2, 4, 5], "decoder": [0, 2, 4, 5]}
    gaps = least_squares.fit_encoder_decoder(
        student, teacher_layers.as_causal_encoder(teacher), kept, layer_choice.calibration_batches(rows, "cpu")
    )
    assert gaps and all(gap.before < 1e-10 and gap.after < 1e-10 for gap in gaps)
    for name, weight in student.named_parameters():
        torch.testing.assert_close(weight, plain.get_parameter(name), atol=1e-6, rtol=0)


def test_a_gap_that_weights_can_fill_is_filled(monkeypatch):
    """Layer 1 has the MLP of layer 0 before its last projection: what it adds, layer 0 can add."""
    teacher, rows = make_teacher(num_hidden_layers=DEPTH, mlp_bias=False), make_rows(60)
    lower, upper = teacher.model.layers[:2]
    with torch.no_grad():
        lower.mlp.down_proj.weight.zero_()
        upper.self_attn.o_proj.weight.zero_()
        upper.self_attn.o_proj.bias.zero_()
        for name in ("post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"):
            upper.get_parameter(name).copy_(lower.get_parameter(name))
    monkeypatch.setattr(least_squares, "RIDGE", 1e-9)  # it pulls towards the zero that is there
    layers = [0, 2, 3, 4, 5]
    student = make_student(teacher, rows, layers, layers)
    for side in (student.model.encoder, student.model.decoder):
        torch.testing.assert_close(side.layers[0].mlp.down_proj.weight, upper.mlp.down_proj.weight, atol=2e-3, rtol=0)
    assert student.healing.taken
    assert mean_divergence(teacher, student, make_rows(10, seed=2)) < 1e-5 < student.healing.kl_before


@pytest.mark.parametrize("autocast", [False, True])
def test_a_fit_that_does_harm_is_undone(autocast, caplog):
    """Fitted to rows of one token, which say nothing of the rows that are held out."""
    teacher = make_teacher(num_hidden_layers=DEPTH)
    rows = [row if index % 5 == 0 else ([5] * (20 + index), [5] * 20) for index, row in enumerate(make_rows(20))]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = make_student(teacher, rows, heal=None)
        student = make_student(teacher, rows)
    assert not student.healing.taken and student.healing.kl_after > student.healing.kl_before
    assert "heal='least_squares' is not taken" in caplog.text and "Pass more calibration rows" in caplog.text
    assert len(unchanged(student, plain)) == len(list(plain.parameters()))


def test_full_depth_is_untouched():
    teacher, rows = make_teacher(num_hidden_layers=DEPTH), make_rows(60)
    student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher, calibration=rows)
    assert student.healing is None
    for side in (student.model.encoder, student.model.decoder):
        for ours, theirs in zip(side.layers, teacher.model.layers):
            weights = theirs.state_dict()
            assert all(torch.equal(weight, weights[name]) for name, weight in ours.state_dict().items())


def test_a_student_without_a_gap_is_not_fitted(caplog):
    """The encoder lacks the layer above the last state that the decoder reads."""
    teacher, rows = make_teacher(num_hidden_layers=DEPTH), make_rows(20)
    student = make_student(teacher, rows, list(range(DEPTH - 1)), list(range(DEPTH)))
    assert student.healing is None and not caplog.text
    assert mean_divergence(teacher, student, rows) < 1e-5


def fitted_layers(student):
    return {side: [gap.layer for gap in student.healing.gaps if gap.side == side] for side in ("encoder", "decoder")}


@pytest.mark.parametrize(
    ("encoder", "decoder", "arguments", "fitted"),
    [
        # All that the decoder's first two layers read is exact, so they are too; the third has a gap behind it.
        (list(range(DEPTH)), [0, 1, 2, 5], {}, {"encoder": [], "decoder": [2, 5]}),
        # The decoder's layer 3 reads what enters the teacher's: nothing is missing there, and the last two never run.
        ([0, 1, 2, 4, 5], [0, 3], {}, {"encoder": [], "decoder": [0, 3]}),
        ([0, 1, 3, 5], list(range(DEPTH)), {}, {"encoder": [1, 3], "decoder": [2, 3, 4, 5]}),
        ([0, 1, 3], list(range(DEPTH)), {}, {"encoder": [1, 3], "decoder": [2, 3, 4, 5]}),
        ([2], [3], {}, {"encoder": [2], "decoder": [3]}),
        ([2], [3], {"cross_attention": "separate"}, {"encoder": [2], "decoder": [3]}),
        ([0, 1], [0, 1], {"encoder_attention": "bidirectional"}, {"encoder": [0], "decoder": [1]}),
        # From the layer on that slides, nothing is what the teacher computes.
        ([0, 1, 2, 3], [0, 1, 2, 5], {"encoder_sliding_window": 3}, {"encoder": [1, 2, 3], "decoder": [2, 5]}),
        ([0, 1, 2], [0, 1, 2], {"cross_attention_layers": [1, 1, 1]}, {"encoder": [0], "decoder": [0, 1, 2]}),
    ],
)
def test_layers_with_nothing_to_mend_are_left_alone(encoder, decoder, arguments, fitted):
    teacher, rows = make_teacher(num_hidden_layers=DEPTH), make_rows(80)
    student = make_student(teacher, rows, encoder, decoder, **arguments)
    assert fitted_layers(student) == fitted and student.healing.taken
    plain = make_student(teacher, rows, encoder, decoder, heal=None, **arguments)
    changed = {name for name, _ in student.named_parameters()} - set(unchanged(student, plain))
    names = {
        f"model.{side}.layers.{position}.{name}.weight"
        for side, layers in (("encoder", encoder), ("decoder", decoder))
        for position, layer in enumerate(layers)
        for name in ("mlp.down_proj", *["cross_attn.o_proj"] * ("cross_attention" in arguments and side == "decoder"))
        if layer in fitted[side]
    }
    assert changed - {"model.decoder.norm.weight"} == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    teacher, rows = make_teacher(num_hidden_layers=DEPTH).to(dtype), make_rows(120)
    student = make_student(teacher, rows)
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}
    plain, unseen = make_student(teacher, rows[:40], heal=None), make_rows(12, seed=2)
    teacher, student, plain = teacher.float(), student.float(), plain.float()
    assert mean_divergence(teacher, student, unseen) < mean_divergence(teacher, plain, unseen)


def test_autocast_does_not_go_on_with_weights_as_they_were_before_the_fit():
    """It keeps the weights that it has cast; what is fitted under it is what is fitted without, but for rounding."""
    teacher, rows = make_teacher(num_hidden_layers=DEPTH), make_rows(120)
    with torch.autocast("cpu", torch.bfloat16):
        student = make_student(teacher, rows)
    expected = make_student(teacher, rows)
    assert student.healing.taken and {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert student.healing.kl_after == pytest.approx(expected.healing.kl_after, rel=0.05)
    assert student.healing.kl_after < 0.9 * student.healing.kl_before
    weight, fitted = (model.model.encoder.layers[1].mlp.down_proj.weight for model in (student, expected))
    plain = teacher.model.layers[ENCODER[1]].mlp.down_proj.weight
    assert (weight - fitted).norm() < 0.1 * (fitted - plain).norm()


def test_it_is_the_same_twice_and_in_batches_of_another_size(monkeypatch):
    teacher, rows = make_teacher(num_hidden_layers=DEPTH), make_rows(80)
    student = make_student(teacher, rows)
    again = make_student(teacher, rows)
    assert len(unchanged(student, again)) == len(list(again.parameters()))
    monkeypatch.setattr(layer_choice, "_CALIBRATION_BATCH", 3)
    for name, weight in make_student(teacher, rows).named_parameters():
        torch.testing.assert_close(weight, student.get_parameter(name), atol=1e-4, rtol=1e-3)


def floating_bytes_in_memory():
    """Of all tensors but those that are mapped from a file."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # No subclass: those that an export has left behind have no data.
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.is_floating_point():
            storage = thing.untyped_storage()
            if storage.filename is None:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_memory_does_not_grow_with_the_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    teacher, fit, seen = make_teacher(num_hidden_layers=DEPTH), least_squares._fit_projection, []

    def look(*arguments):
        seen.append((floating_bytes_in_memory(), sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())))
        return fit(*arguments)

    monkeypatch.setattr(least_squares, "_fit_projection", look)
    most = []
    for count in (16, 160):
        rows = [(list(range(4, 24)), list(range(4, 12)))] * count
        batches = layer_choice.calibration_batches(rows, "cpu")
        student = make_student(teacher, None, heal=None)
        kept = {"encoder": ENCODER, "decoder": DECODER}
        least_squares.fit_encoder_decoder(student, teacher_layers.as_causal_encoder(teacher), kept, batches)
        most.append([max(numbers) for numbers in zip(*seen)])
        seen.clear()
    (few_in_memory, few_on_disk), (many_in_memory, many_on_disk) = most
    assert many_in_memory == few_in_memory and many_on_disk == 10 * few_on_disk
    assert not any(tmp_path.iterdir())


def test_no_file_is_left_behind_by_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail(*arguments):
        assert any(tmp_path.rglob("tmp*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(least_squares, "_fit_projection", fail)
    with pytest.raises(KeyboardInterrupt):
        make_student(make_teacher(num_hidden_layers=DEPTH), make_rows(10))
    assert not any(tmp_path.iterdir())


def test_states_that_are_not_finite_are_an_error(monkeypatch):
    teacher, rows = make_teacher(num_hidden_layers=DEPTH), make_rows(20)
    with torch.no_grad():
        teacher.model.layers[3].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"'model.layers.3.mlp.down_proj.weight' is not finite"):
        make_student(teacher, rows)
    # Rows beyond those that the teacher is measured on are met by the fit alone.
    for module in (initialization, healing):
        monkeypatch.setattr(module, "measure_teacher", lambda teacher, batches: ([torch.zeros(1, 1)], {}))
    with pytest.raises(ValueError, match=r"states that are not finite.*dtype=torch.float32"):
        make_student(teacher, rows)


@pytest.mark.parametrize("count", [1, 8])
def test_one_row_cannot_say_anything(count, caplog):
    rows = make_rows(1) * count
    student = make_student(make_teacher(num_hidden_layers=DEPTH), rows)
    assert student.healing is None and "heal='least_squares' is not taken: one calibration row" in caplog.text


def test_rows_that_come_again_count_once():
    """Held out in turn, rows that repeat with another period would all be held out once."""
    student = make_student(make_teacher(num_hidden_layers=DEPTH), make_rows(7) * 5)
    assert (student.healing.rows, student.healing.held_out_rows) == (5, 2)


def test_rows_may_be_as_short_as_can_be():
    """No prompt token is left to fit the encoder on, a target has one token, or there are but two rows."""
    teacher, plain = make_teacher(num_hidden_layers=DEPTH), None
    for rows in ([([4 + i, 9], [7]) for i in range(20)], make_rows(2)):
        student = make_student(teacher, rows)
        plain = make_student(teacher, rows, heal=None)
        assert student.healing.rows + student.healing.held_out_rows == len(rows)
        assert all(torch.isfinite(weight).all() for weight in student.parameters())
        assert "model.encoder.layers.0.self_attn.o_proj.weight" in unchanged(student, plain)


def test_a_trimmed_vocabulary_comes_after_it(make_bpe_tokenizer):
    from hf_encdec_distill.models.vocabulary import trim_tokenizer

    tokenizer = make_bpe_tokenizer()
    teacher, rows = make_teacher(num_hidden_layers=DEPTH, vocab_size=len(tokenizer)), make_rows(60)
    rows = [tuple([i % len(tokenizer) for i in side] for side in row) for row in rows]
    whole = make_student(teacher, rows, tokenizer=tokenizer)
    trimmed = make_student(teacher, rows, tokenizer=tokenizer, trimmed_tokenizer=trim_tokenizer(tokenizer, ["add a"]))
    assert trimmed.config.vocab_size < whole.config.vocab_size and trimmed.healing == whole.healing
    layers = [name for name, _ in whole.named_parameters() if ".layers." in name]
    assert layers and set(layers) <= set(unchanged(trimmed, whole))


def test_tokens_of_the_generation_config_are_trimmed_too(make_bpe_tokenizer):
    """Those that end an answer of a decoder-only model may be more than its config names."""
    from hf_encdec_distill.models.vocabulary import trim_tokenizer, trim_vocabulary

    tokenizer = make_bpe_tokenizer()
    trimmed = trim_tokenizer(tokenizer, ["add a"])
    kept = tokenizer.convert_ids_to_tokens(trimmed("add a")["input_ids"] and tokenizer("add a")["input_ids"])
    gone = next(token for token in tokenizer.get_vocab() if token not in trimmed.get_vocab())
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(kept[0])]
    model = make_teacher(num_hidden_layers=1, vocab_size=len(tokenizer), eos_token_id=ends[0])
    model.generation_config.eos_token_id = ends
    model.generation_config.suppress_tokens = [tokenizer.convert_tokens_to_ids(token) for token in (kept[1], gone)]
    trim_vocabulary(model, tokenizer, trimmed)
    expected = [trimmed.convert_tokens_to_ids(token) for token in (tokenizer.eos_token, kept[0])]
    assert model.generation_config.eos_token_id == model.config.eos_token_id == expected
    assert model.generation_config.suppress_tokens == [trimmed.convert_tokens_to_ids(kept[1])]


def test_a_student_that_half_precision_cannot_hold_is_refused():
    """Where layers are gone whose output kept the sum in the range of float16."""
    teacher = make_llama(5, mlp_bias=True)
    with torch.no_grad():
        for layer, height in ((1, 4e4), (2, -4e4), (3, 4e4), (4, -4e4)):
            teacher.model.layers[layer].mlp.down_proj.bias.zero_()
            teacher.model.layers[layer].mlp.down_proj.bias[0] = height
    options = {"encoder_layers": [0, 1, 2, 3], "decoder_layers": [0, 1, 3, 4], "heal": None}
    rows = [([4 + i % 20, 5, 6], [7, 8]) for i in range(10)]
    with pytest.raises(ValueError, match="not finite.*load the teacher in float32 or bfloat16"):
        RopeEncDecForConditionalGeneration.from_decoder_only(
            teacher.half(), calibration=rows, decoder_start_token_id=1, **options
        )


@pytest.mark.parametrize("row", [([3, 4, 5], None), ("text", [3])])
def test_a_calibration_row_without_a_target_is_named(row):
    with pytest.raises(ValueError, match="calibration has .* expected two texts, or two lists of token ids"):
        make_student(make_teacher(num_hidden_layers=DEPTH), [row] * 4)


def test_a_bar_is_for_a_terminal(capsys):
    make_student(make_teacher(num_hidden_layers=DEPTH), make_rows(20))
    assert "Fitting" not in "".join(capsys.readouterr())


def test_an_unknown_way_to_heal_is_refused():
    with pytest.raises(ValueError, match=r"heal='gradient' is not one of 'least_squares', None"):
        make_student(make_teacher(num_hidden_layers=DEPTH), make_rows(20), heal="gradient")


# Decoder-only students -----------------------------------------------------------------------------------------------


@torch.no_grad()
def pruned(teacher, layers):
    student = copy.deepcopy(teacher)
    student.model.layers = torch.nn.ModuleList([student.model.layers[layer] for layer in layers])
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index
    student.config.num_hidden_layers = len(layers)
    if getattr(student.config, "no_rope_layers", None):
        student.config.no_rope_layers = [teacher.config.no_rope_layers[layer] for layer in layers]
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = [teacher.config.layer_types[layer] for layer in layers]
    return student


@torch.no_grad()
def divergence_of_causal(teacher, student, rows):
    total = tokens = 0
    for prompt, target in rows:
        inputs, at = torch.tensor([prompt + target]), slice(len(prompt) - 1, -1)
        theirs, ours = (model(inputs, use_cache=False).logits[0, at].log_softmax(-1) for model in (teacher, student))
        total += (theirs.exp() * (theirs - ours)).sum().item()
        tokens += len(target)
    return total / tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_only_students_come_nearer(family):
    layers = [0, 1, 3, 5]
    teacher = make_teacher(family, num_hidden_layers=DEPTH)
    before, student, rows = copy.deepcopy(teacher.state_dict()), pruned(teacher, layers), make_rows(120)
    plain = copy.deepcopy(student)
    found = healing.heal_decoder_only(student, teacher, layers, rows)
    assert found.taken and [gap.layer for gap in found.gaps] == [1, 3, 5]
    changed = {name for name, _ in student.named_parameters()} - set(unchanged(student, plain))
    fitted = {f"model.layers.{position}.mlp.down_proj.weight" for position in (1, 2, 3)}
    assert changed - {"model.norm.weight"} == fitted
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())

    # What it says is what the student has on the rows that are held out.
    assert divergence_of_causal(teacher, student, rows[::5]) == pytest.approx(found.kl_after, rel=1e-3)
    assert found.kl_after < found.kl_before <= divergence_of_causal(teacher, plain, rows[::5])

    # The first layer that is fitted, by hand.
    fitted = [row for index, row in enumerate(rows) if index % 5]
    states = teacher_states(teacher, fitted)
    layer, tokens = plain.model.layers[1], [slice(1, None)] * len(fitted)
    goals = [row[3][1:] for row in states]

    def read(prompt, target):
        plain(torch.tensor([prompt + target]), use_cache=False)

    gap = fit_by_hand(layer, layer.mlp.down_proj, read, fitted, tokens, goals)
    weight = student.model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(weight, layer.mlp.down_proj.weight, atol=2e-4, rtol=1e-3)
    np.testing.assert_allclose((found.gaps[0].before, found.gaps[0].after), gap, rtol=1e-3)
