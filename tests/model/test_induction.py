"""Layers that copy, against the loss on repeated tokens that the built-in teacher has without their attention."""

import pytest
import torch
from test_from_decoder_only import calibration_rows, make_teacher
from torch.nn import functional as F

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.data.builtin_teacher import load_builtin_teacher
from hf_encdec_distill.models.decoder_only import prune_decoder_only
from hf_encdec_distill.models.rope_encdec import induction


def loss_on_what_is_repeated(model):
    tokens = torch.randint(1000, 40_000, (1, 40), generator=torch.Generator().manual_seed(7)).repeat(1, 2)
    with torch.no_grad():
        logits = model(tokens).logits[:, 40:-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 41:].flatten()).item()


def without_attention(model, layer):
    projection = model.model.layers[layer].self_attn.o_proj
    weight = projection.weight.data
    projection.weight.data = torch.zeros_like(weight)
    loss = loss_on_what_is_repeated(model)
    projection.weight.data = weight
    return loss


def test_no_other_layer_is_missed_as_much_where_tokens_are_repeated():
    """The first three aside, without which a model writes nothing at all."""
    teacher, _ = load_builtin_teacher(dtype=torch.float32)
    previous, found = induction.copying_layers(teacher)
    assert teacher.config._attn_implementation == "sdpa"  # as it was
    others = [layer for layer in (4, 7, 10, 13, 15, 17, 19, 20, 22, 23, 26, 28) if layer not in (previous, found)]
    assert previous < found
    assert min(without_attention(teacher, layer) for layer in (previous, found)) > max(
        without_attention(teacher, layer) for layer in others
    )


def layers_of(student, teacher):
    """Of the teacher, by the queries of encoder and decoder, or of a decoder-only student."""
    sides = (
        {"encoder": student.model.encoder, "decoder": student.model.decoder}
        if student.config.is_encoder_decoder
        else {"decoder": student.model}
    )
    queries = [layer.self_attn.q_proj.weight for layer in teacher.model.layers]
    return {
        side: [
            next(i for i, query in enumerate(queries) if torch.equal(query, layer.self_attn.q_proj.weight))
            for layer in model.layers
        ]
        for side, model in sides.items()
    }


@pytest.mark.parametrize("kind", ["merged", "separate", "decoder-only"])
def test_a_student_keeps_them(kind, monkeypatch):
    teacher = make_teacher(num_hidden_layers=6)

    def chosen(selection):
        options = {"layer_selection": selection, "calibration": calibration_rows(), "heal": None}
        if kind == "decoder-only":
            return layers_of(prune_decoder_only(teacher, num_hidden_layers=5, **options), teacher)
        counts = {"encoder_num_hidden_layers": 4, "decoder_num_hidden_layers": 4}
        student = RopeEncDecForConditionalGeneration.from_decoder_only(
            teacher, cross_attention=kind, **counts, **options
        )
        return layers_of(student, teacher)

    by_influence = chosen("influence")
    missing = {side: [i for i in range(2, 5) if i not in layers] for side, layers in by_influence.items()}
    previous, found = missing.get("encoder", missing["decoder"])[0], missing["decoder"][-1]
    monkeypatch.setattr(induction, "copying_layers", lambda _: (previous, found))
    by_induction = chosen("induction")
    assert previous in by_induction.get("encoder", by_induction["decoder"]) and found in by_induction["decoder"]
    assert [len(layers) for layers in by_induction.values()] == [len(layers) for layers in by_influence.values()]
    for side, layers in by_induction.items():
        assert layers[:2] == [0, 1] and (side == "encoder" or layers[-1] == 5)


def test_without_rows_there_is_nothing_to_choose_the_others_by():
    with pytest.raises(ValueError, match="layer_selection='induction' measures on rows"):
        RopeEncDecForConditionalGeneration.from_decoder_only(
            make_teacher(), decoder_num_hidden_layers=2, layer_selection="induction"
        )


def test_a_teacher_that_does_not_copy(caplog):
    """A random one: its layers are chosen by influence."""
    teacher = make_teacher(initializer_range=0.02)
    assert induction.copying_layers(teacher) is None
    influence = {"encoder": [0.1, 0.2], "decoder": [0.3, 0.4]}
    assert induction.copying_first(teacher, influence) == influence
    assert "no induction head" in caplog.text
