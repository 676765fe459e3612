"""An encoder that pools, against the encoder that does not and means that are made in a loop."""

import copy

import pytest
import torch
from toys import KINDS, make_config, make_model, ragged, random_ids

from hf_encdec_distill import RopeEncDecEncoderModel
from hf_encdec_distill.models.rope_encdec.depth import remove_layer, without_layer
from hf_encdec_distill.models.rope_encdec.modeling_rope_encdec import pool_positions, pooled_attention_mask


def means(states, size):
    """`(1, S, H)` to `(1, ceil(S / size), H)`."""
    parts = [states[:, first : first + size].mean(1) for first in range(0, states.shape[1], size)]
    return torch.stack(parts, dim=1)


@torch.no_grad()
def by_hand(model, ids, target):
    """Logits of one row: two encoders without pooling, one upon the other; the decoder is told all positions."""
    config, plain = model.config, make_model(model.config.cross_attention)
    plain.load_state_dict(model.state_dict())
    size, first = config.encoder_pooling, config.encoder_pooling_layer
    entering = []
    for layer in (*plain.model.encoder.layers, plain.model.encoder.norm):
        layer.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    plain.model.encoder(ids)
    below = [means(state, size) for state in entering[: first + 1]]
    positions = (torch.arange(below[0].shape[1])[None] + 1) * size - 1
    upper = copy.deepcopy(plain.model.encoder)
    upper.layers, upper.states_read = upper.layers[first:], ()
    entering.clear()
    last = upper(inputs_embeds=below[first], position_ids=positions).last_hidden_state
    states = [*below[:first], *entering]
    merged = config.cross_attention == "merged"
    read = torch.cat([states[index] for index in config.encoder_states_read], -1) if merged else last
    steps = torch.arange(target.shape[1])[None]
    decoded = plain.model.decoder(
        plain.get_input_embeddings()(target),
        read,
        encoder_position_ids=positions,
        position_ids=steps + positions.shape[1] * (size - 1) if merged else steps,  # it adds the length itself
    )
    return plain.lm_head(decoded.last_hidden_state)


@pytest.mark.parametrize("length", [1, 6, 7])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_above_see_means_at_the_places_of_the_last(kind, first, size, length):
    model = make_model(kind, encoder_pooling=size, encoder_pooling_layer=first)
    ids, target = random_ids(1, length), random_ids(1, 4)
    with torch.no_grad():
        found = model(input_ids=ids, decoder_input_ids=target).logits
    torch.testing.assert_close(found, by_hand(model, ids, target), atol=1e-5, rtol=1e-4)


def test_pads_are_in_no_mean_wherever_they_stand():
    states = torch.randn(2, 7, 4)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    pooled = pool_positions(states, mask, 2)
    for row in range(2):
        expected = means(states[row][mask[row].bool()][None], 2)[0]
        torch.testing.assert_close(pooled[row, : len(expected)], expected)
        assert not pooled[row, len(expected) :].any()
    assert pooled_attention_mask(mask, 2).tolist() == [[True, True, True, False], [True, True, False, False]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_encoder_alone_hands_out_fewer_positions(side):
    model = make_model(encoder_pooling=3, cls=RopeEncDecEncoderModel)
    ids, mask, rows = ragged(side)
    with torch.no_grad():
        together = model(ids, attention_mask=mask).last_hidden_state
        assert together.shape[1] == 3  # of 7
        for row, alone in enumerate(rows):
            expected = model(alone).last_hidden_state[0]
            assert len(expected) == -(-alone.shape[1] // 3)
            torch.testing.assert_close(together[row, : len(expected)], expected, atol=2e-5, rtol=1e-5)


def test_gradients_are_those_of_finite_differences():
    model = make_model("pooled").double()
    ids, mask, _ = ragged("left")
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    target = random_ids(3, 3)

    def loss(embedded):
        return model(inputs_embeds=embedded, attention_mask=mask, labels=target).loss

    (gradient,) = torch.autograd.grad(loss(embedded), embedded)
    direction = torch.randn_like(embedded)
    with torch.no_grad():
        # Norms compute in float32.
        difference = (loss(embedded + 1e-3 * direction) - loss(embedded - 1e-3 * direction)) / 2e-3
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-3)
    assert not gradient[mask == 0].any() and gradient[mask == 1].any(-1).all()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_layer_that_is_taken_out_leaves_the_pooling_where_it_was(index):
    """Below the next layer that is left, or on top."""
    model = make_model(encoder_pooling=2, encoder_pooling_layer=2)
    ids, target = random_ids(2, 7), random_ids(2, 3)
    with torch.no_grad():
        with without_layer(model, "encoder", index):
            without = model(input_ids=ids, decoder_input_ids=target).logits
        smaller = make_model(encoder_pooling=2, encoder_pooling_layer=2 - (index < 2), encoder_num_hidden_layers=2)
        remove_layer(model, "encoder", index)
        smaller.load_state_dict(model.state_dict())
        assert model.config.encoder_pooling_layer == smaller.config.encoder_pooling_layer
        for after in (model, smaller):
            torch.testing.assert_close(after(input_ids=ids, decoder_input_ids=target).logits, without)


def test_positions_of_the_users_are_refused():
    model, ids = make_model("pooled"), random_ids(1, 4)
    with pytest.raises(ValueError, match=r"counts positions itself: leave position_ids out.*encoder_pooling=3"):
        model(input_ids=ids, position_ids=torch.arange(4)[None], decoder_input_ids=ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_pooling": 0}, "encoder_pooling=0 does not work; it has to be a whole number of at least 1"),
        (
            {"encoder_pooling": 2, "encoder_pooling_layer": 4},
            "encoder_pooling_layer=4 .* index of an encoder layer, or .*=3 to",
        ),
    ],
)
def test_what_cannot_be_pooled(fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)
