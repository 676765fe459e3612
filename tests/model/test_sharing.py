"""Decoder layers that share keys and values of the prompt, against the attention written out in torch's own
functions."""

import pytest
import torch
from torch.nn import functional as F
from toys import KINDS, make_llama, make_model, ragged, random_ids
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.models.rope_encdec.depth import remove_layer, without_layer
from hf_encdec_distill.models.rope_encdec.layer_choice import choose_layers
from hf_encdec_distill.models.rope_encdec.prompt_keys import shared_prompt_keys


LAYERS = 5
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def make_shared(kind, sharing, **fields):
    """Its encoder is as deep as its decoder, so that each group of a `merged` one reads a state of its own."""
    sizes = {"encoder_num_hidden_layers": LAYERS, "decoder_num_hidden_layers": LAYERS, "qk_norm": True}
    return make_model(kind, cross_attention_sharing=sharing, **{**sizes, **fields})


def by_hand(model, ids, target):
    """Logits of one row. The encoder is the model's own, which shares nothing."""
    config, decoder = model.config, model.model.decoder
    merged, prompt = config.cross_attention == "merged", ids.shape[1]
    encoded = model.model.encoder(ids, output_hidden_states=True)
    rotary = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads)
    )

    def norm(states, module):
        return F.rms_norm(states, states.shape[-1:], module.weight, module.eps)

    def heads(states, projection, over_heads=None):
        states = projection(states).unflatten(-1, (-1, config.head_dim))
        return (states if over_heads is None else norm(states, over_heads)).transpose(1, 2)

    def turned(states, first):
        positions = torch.arange(states.shape[2])[None] + first
        return apply_rotary_pos_emb(states, states, *rotary(states, positions))[0]

    def attend(query, key, value, mask=None):
        return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(1, 2).flatten(2)

    states = model.get_input_embeddings()(target)
    causal = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).tril()
    for index, layer in enumerate(decoder.layers):
        begins = index % config.cross_attention_sharing == 0
        attention, normed = layer.self_attn, norm(states, layer.input_layernorm)
        query = turned(heads(normed, attention.q_proj, attention.q_norm), prompt * merged)
        key = turned(heads(normed, attention.k_proj, attention.k_norm), prompt * merged)
        value = heads(normed, attention.v_proj)
        if merged:
            if begins:
                read = norm(encoded.hidden_states[index], layer.input_layernorm)
                prompt_key = turned(heads(read, attention.k_proj, attention.k_norm), 0)
                prompt_value = heads(read, attention.v_proj)
            key, value = torch.cat((prompt_key, key), dim=2), torch.cat((prompt_value, value), dim=2)
            visible = torch.cat((causal.new_ones(target.shape[1], prompt), causal), dim=1)
            states = states + attention.o_proj(attend(query, key, value, visible))
        else:
            states = states + attention.o_proj(attend(query, key, value, causal))
            attention = layer.cross_attn
            if begins:
                prompt_key = heads(encoded.last_hidden_state, attention.k_proj, attention.k_norm)
                prompt_value = heads(encoded.last_hidden_state, attention.v_proj)
            query = heads(norm(states, layer.cross_attn_layernorm), attention.q_proj, attention.q_norm)
            states = states + attention.o_proj(attend(query, prompt_key, prompt_value))
        states = states + layer.mlp(norm(states, layer.post_attention_layernorm))
    return F.linear(norm(states, decoder.norm), model.lm_head.weight)


def gradients(model, logits, labels):
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return loss, dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("sharing", [2, LAYERS + 1])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_formula(kind, sharing, checkpointing):
    model = make_shared(kind, sharing)
    ids, target, labels = random_ids(1, 7), random_ids(1, 4), random_ids(1, 4)
    expected = by_hand(model, ids, target)
    loss, of_formula = gradients(model, expected, labels)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    outputs = model(input_ids=ids, decoder_input_ids=target, labels=labels, use_cache=False)
    torch.testing.assert_close(outputs.logits, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.loss, loss)
    outputs.loss.backward()
    for name, gradient in of_formula.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def greedy_by_hand(model, row):
    tokens = torch.full((1, 1), model.config.decoder_start_token_id)
    for _ in range(GREEDY["max_new_tokens"]):
        tokens = torch.cat((tokens, by_hand(model, row, tokens)[:, -1:].argmax(-1)), dim=-1)
    return tokens[0].tolist()


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_formula(kind, cache):
    model = make_shared(kind, 2)
    model.generation_config.eos_token_id = None
    ids, mask, rows = ragged("left")
    found = model.generate(ids, attention_mask=mask, cache_implementation=cache, **GREEDY)
    assert found.tolist() == [greedy_by_hand(model, row) for row in rows]


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_are_those_of_a_model_that_has_the_projections_twice(settings):
    model = make_shared("separate", 2)
    twin = make_shared("separate", 1)
    weights = model.state_dict()
    for name in twin.state_dict().keys() - weights.keys():
        _, _, _, layer, rest = name.split(".", 4)
        weights[name] = weights[f"model.decoder.layers.{int(layer) - 1}.{rest}"]
        assert int(layer) % 2 and rest.startswith(("cross_attn.k_", "cross_attn.v_"))
    twin.load_state_dict(weights)
    ids, mask, _ = ragged("left")
    found, expected = (one.generate(ids, attention_mask=mask, **GREEDY, **settings) for one in (model, twin))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_group_keeps_one_tensor_until_beams_part(kind):
    model = make_shared(kind, 2)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    ids, target = random_ids(3, 6), random_ids(3, 4)
    model(input_ids=ids, decoder_input_ids=target[:, :3], past_key_values=cache)
    layers = cache.cross_attention_cache.layers
    places = [[tensor.data_ptr() for tensor in (layer.keys, layer.values)] for layer in layers]
    assert places == [places[first] for first in (0, 0, 2, 2, 4)] and len({key for key, _ in places}) == 3
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    step = model.model.decoder(model.get_input_embeddings()(target[order, 3:]), past_key_values=cache)
    whole = model.model(input_ids=ids, decoder_input_ids=target).last_hidden_state
    torch.testing.assert_close(step.last_hidden_state, whole[order, 3:], atol=2e-5, rtol=1e-5)


def test_the_encoder_hands_over_what_the_first_of_each_group_reads():
    model = make_shared("merged", 2)
    assert model.config.encoder_states_read == [0, 2, 4]
    states = model.get_encoder()(random_ids(1, 4)).cross_attention_states
    assert states.shape == (1, 4, 3 * model.config.hidden_size)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_teachers_layers(kind):
    """Each layer is the teacher's, but for what the first of its group makes."""
    teacher = make_llama(6)
    kept = {"encoder_layers": [0, 2, 4], "decoder_layers": [1, 2, 3, 5], "decoder_start_token_id": 1, "heal": None}
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, cross_attention=kind, cross_attention_sharing=2, **kept
    )
    assert student.config.cross_attention_sharing == 2
    assert student.config.encoder_state_of_decoder_layer == ([1, 1, 2, 2] if kind == "merged" else [3] * 4)
    plain = RopeEncDecForConditionalGeneration.from_decoder_only(teacher, cross_attention=kind, **kept)
    weights, missing = student.state_dict(), plain.state_dict().keys() - student.state_dict().keys()
    assert len(missing) == (0 if kind == "merged" else 4)
    for name, weight in plain.state_dict().items():
        assert name in missing or torch.equal(weights[name], weight)


@pytest.mark.parametrize(("selection", "encoder"), [("even", [0, 2, 4]), ("first", [0, 1, 4])])
def test_encoder_layers_are_chosen_below_the_last_that_is_read(selection, encoder):
    """Of these decoder layers the third is the last that reads a state, the one that enters the teacher's layer 5."""
    kept = {"decoder": [0, 2, 5, 7], "encoder": 3}
    choose_layers(kept, selection, depth=8, merged=True, influence=None, greedy=None, sharing=2)
    assert kept["encoder"] == encoder


@pytest.mark.parametrize("sharing", [0, 1.5, None])
def test_what_is_no_number_of_layers_is_refused(sharing):
    with pytest.raises(ValueError, match=f"cross_attention_sharing={sharing} does not work; .* at least 1"):
        RopeEncDecForConditionalGeneration.from_decoder_only(
            make_llama(4), decoder_num_hidden_layers=2, cross_attention_sharing=sharing, decoder_start_token_id=1
        )


def test_a_layer_that_projects_no_prompt_shares_nothing_with_the_encoder():
    """Although it has the projections of the encoder layer above the state that its group reads."""
    teacher = make_llama(4)
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, cross_attention_sharing=2, decoder_start_token_id=1, heal=None
    )
    encoder, decoder = student.model.encoder.layers, student.model.decoder.layers
    decoder[1].load_state_dict(decoder[0].state_dict())
    assert list(shared_prompt_keys(student)) == [(decoder[0], encoder[0]), (decoder[2], encoder[2])]


@torch.no_grad()
def test_encoder_layers_go_and_decoder_layers_stay():
    model, ids, target = make_shared("merged", 2), random_ids(2, 7), random_ids(2, 3)
    with pytest.raises(ValueError, match="cross_attention_sharing=2: .* cannot be taken out one by one"):
        remove_layer(model, "decoder", 1)
    with without_layer(model, "encoder", 1):
        without = model(input_ids=ids, decoder_input_ids=target, use_cache=False).logits
    remove_layer(model, "encoder", 1)
    model.config.check_fields()
    smaller = make_shared("merged", 2, encoder_num_hidden_layers=4, cross_attention_layers=[0, 0, 1, 1, 3])
    smaller.load_state_dict(model.state_dict())
    assert smaller.config.cross_attention_layers == model.config.cross_attention_layers
    for after in (model, smaller):
        torch.testing.assert_close(after(input_ids=ids, decoder_input_ids=target).logits, without)
