"""Blocks and positions, compared with the transformers models whose weights they can hold."""

import copy

import pytest
import torch
from torch.nn import functional as F
from toys import KINDS, SLIDING, VOCAB, make_config, make_llama, make_model, merged_twin, ragged, random_ids, stir
from transformers import AutoConfig, AutoModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import _bidirectional_window_overlay

from hf_encdec_distill import RopeEncDecEncoderModel, RopeEncDecForConditionalGeneration, RopeEncDecModel


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Upstream fields of each family, and the fields of ours that describe the same block.
FAMILIES = {
    "llama": ({"attention_bias": True, "mlp_bias": True}, {"attention_bias": True, "mlp_bias": True}),
    "mistral": ({"head_dim": 12, "sliding_window": None}, {"head_dim": 12}),
    "qwen2": ({}, {"attention_bias": "qkv"}),
    "qwen3": ({"head_dim": 12}, {"head_dim": 12, "qk_norm": True}),
    "phi3": ({"original_max_position_embeddings": 128}, {}),
    "smollm3": ({"no_rope_layers": [1, 0, 1], "rope_theta": 5e5}, {"encoder_no_rope_layers": [1], "rope_theta": 5e5}),
}


def upstream_model(family, **fields):
    config = AutoConfig.for_model(family, num_hidden_layers=3, **SIZES, **TOKENS, **fields)
    return stir(AutoModel.from_config(config)).eval()


def encoder_twin(upstream, **fields):
    """A causal encoder that holds an upstream base model's weights; Phi-3's fused projections are split."""
    config = make_config(encoder_attention="causal", **{**SIZES, "encoder_num_hidden_layers": 3, **fields})
    model = RopeEncDecEncoderModel(config).eval()
    weights = {}
    for name, weight in upstream.state_dict().items():
        if "qkv_proj" in name:
            rows = [heads * config.head_dim for heads in (4, 2, 2)]
            for part, rows_of_it in zip("qkv", weight.split(rows)):
                weights[name.replace("qkv_proj", f"{part}_proj")] = rows_of_it
        elif "gate_up_proj" in name:
            for part, rows_of_it in zip(("gate", "up"), weight.chunk(2)):
                weights[name.replace("gate_up_proj", f"{part}_proj")] = rows_of_it
        else:
            weights[name] = weight
    model.encoder.load_state_dict(weights, strict=True)
    return model


def upstream_states(upstream, ids):
    with torch.no_grad():
        return upstream(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_a_causal_encoder_is_the_upstream_base_model(family):
    theirs, ours = FAMILIES[family]
    upstream = upstream_model(family, **theirs)
    model = encoder_twin(upstream, **ours)
    ids, mask, rows = ragged("right")
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for index, row in enumerate(rows):
        torch.testing.assert_close(
            states[index, : row.shape[1]], upstream_states(upstream, row)[0], atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_bidirectional_encoder_is_the_upstream_block_under_an_open_mask(family):
    theirs, ours = FAMILIES[family]
    upstream = upstream_model(family, attn_implementation="eager", **theirs)
    model = encoder_twin(upstream, **ours)
    twin = RopeEncDecEncoderModel(make_config(**{**SIZES, "encoder_num_hidden_layers": 3, **ours})).eval()
    twin.load_state_dict(model.state_dict())
    ids, mask, _ = ragged("left")
    open_mask = torch.zeros(*ids.shape[:1], 1, ids.shape[1], ids.shape[1])
    open_mask = open_mask.masked_fill(mask[:, None, None, :] == 0, torch.finfo(torch.float).min)
    with torch.no_grad():
        expected = upstream(input_ids=ids, attention_mask=open_mask, use_cache=False).last_hidden_state
        states = twin(input_ids=ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(states[real], expected[real], atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        causal = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert (causal - states)[real].abs().max() > 0.1


TYPES = SLIDING["encoder_layer_types"]
QWEN3 = {"head_dim": 12, "use_sliding_window": True, "sliding_window": 2, "layer_types": TYPES}


@pytest.mark.parametrize(
    ("family", "theirs", "ours"),
    [
        ("mistral", {"sliding_window": 2}, {"encoder_layer_types": ["sliding_attention"] * 3}),
        ("qwen3", QWEN3, {"encoder_layer_types": TYPES, "head_dim": 12, "qk_norm": True}),
    ],
)
def test_a_causal_encoder_that_slides_is_the_upstream_base_model(family, theirs, ours):
    upstream = upstream_model(family, **theirs)
    model = encoder_twin(upstream, encoder_sliding_window=2, **ours)
    full = encoder_twin(upstream, **{**ours, "encoder_layer_types": None})
    for side in ("right", "left"):
        ids, mask, rows = ragged(side)
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
            assert (full(input_ids=ids, attention_mask=mask).last_hidden_state - states)[0].abs().max() > 0.1
        for row, real, alone in zip(states, mask.bool(), rows):
            torch.testing.assert_close(row[real], upstream_states(upstream, alone)[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_bidirectional_encoder_that_slides_is_the_upstream_block_under_gemmas_mask(side):
    upstream = upstream_model("qwen3", attn_implementation="eager", **QWEN3)
    ours = {"encoder_layer_types": TYPES, "encoder_sliding_window": 2, "head_dim": 12, "qk_norm": True}
    model = RopeEncDecEncoderModel(make_config(**{**SIZES, "encoder_num_hidden_layers": 3, **ours})).eval()
    model.encoder.load_state_dict(upstream.state_dict())
    ids, mask, _ = ragged(side)
    real, order = mask.bool(), torch.arange(ids.shape[1])
    near = _bidirectional_window_overlay(2)(0, 0, order[:, None], order[None])
    masks = {"full_attention": torch.ones_like(near), "sliding_attention": near}
    masks = {
        name: torch.where(visible & real[:, None, None], 0.0, torch.finfo(torch.float).min)
        for name, visible in masks.items()
    }
    with torch.no_grad():
        expected = upstream(input_ids=ids, attention_mask=masks, use_cache=False).last_hidden_state
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(states[real], expected[real], atol=2e-5, rtol=1e-5)


def test_layers_that_slide_have_a_rope_base_of_their_own():
    upstream, other = upstream_model("qwen3", **QWEN3), upstream_model("qwen3", rope_theta=50.0, **QWEN3)

    def turn(_layer, args, kwargs):
        tables = other.rotary_emb(args[0], torch.arange(args[0].shape[1])[None])
        return args, {**kwargs, "position_embeddings": tables}

    for layer, kind in zip(upstream.layers, TYPES):
        if kind == "sliding_attention":
            layer.register_forward_pre_hook(turn, with_kwargs=True)
    model = encoder_twin(upstream, head_dim=12, qk_norm=True, **SLIDING)
    ids = random_ids(2, 7)
    with torch.no_grad():
        states = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(states, upstream_states(upstream, ids), atol=2e-5, rtol=1e-5)
    assert model.encoder.rotary_emb.inv_freq[1] != model.encoder.sliding_rotary_emb.inv_freq[1]


ROPE_FIELDS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.3, 1.6],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


def test_no_rope_type_is_left_out():
    assert set(ROPE_FIELDS) >= {"default", *ROPE_INIT_FUNCTIONS}


def rope_llama(rope, **fields):
    """A Llama with these rope fields; transformers < 5.0 looks for the original length of longrope on the config."""
    if rope["rope_type"] == "longrope":
        fields["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return make_llama(rope_scaling=copy.deepcopy(rope), rope_theta=500.0, **fields)


# Dynamic NTK scales past `max_position_embeddings`, the others know an original length.
@pytest.mark.parametrize("rope_type", sorted({"default", *ROPE_INIT_FUNCTIONS}))
def test_every_rope_type_follows_the_upstream_model(rope_type):
    rope = {"rope_type": rope_type, **ROPE_FIELDS[rope_type]}
    longest = 16 if rope_type == "dynamic" else 64
    upstream = rope_llama(rope, max_position_embeddings=longest).model
    model = encoder_twin(
        upstream,
        rms_norm_eps=upstream.config.rms_norm_eps,
        max_position_embeddings=longest,
        rope_parameters={**rope, "rope_theta": 500.0},
    )
    if rope_type != "default":  # the type has to make a difference, or this compares nothing
        plain = encoder_twin(upstream, rms_norm_eps=upstream.config.rms_norm_eps, rope_theta=500.0)
        ids = random_ids(1, 40)
        with torch.no_grad():
            assert (model(ids).last_hidden_state - plain(ids).last_hidden_state).abs().max() > 0.01
    for length in (12, 40, 12):  # within, past the original length, and back again
        ids = random_ids(2, length)
        with torch.no_grad():
            states = model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(states, upstream_states(upstream, ids), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("rope_type", ["default", "longrope"])
def test_partial_rotary_follows_phi3(rope_type):
    fields = {"original_max_position_embeddings": 16}
    scaling = None
    if rope_type == "longrope":
        scaling = {"type": "longrope", "short_factor": [1.0, 1.3], "long_factor": [1.5, 4.0]}
    upstream = upstream_model("phi3", partial_rotary_factor=0.5, rope_scaling=copy.deepcopy(scaling), **fields)
    ours = {"rope_scaling": None if scaling is None else {**scaling, **fields}, "partial_rotary_factor": 0.5}
    model = encoder_twin(upstream, **ours)
    assert model.encoder.rotary_emb.inv_freq.shape == (2,)
    for length in (12, 40):
        ids = random_ids(2, length)
        with torch.no_grad():
            states = model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(states, upstream_states(upstream, ids), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("rope_type", ["default", "dynamic", "yarn", "longrope", "llama3"])
def test_merged_at_full_depth_is_llama_under_every_kind_of_rope(rope_type):
    rope = {"rope_type": rope_type, **ROPE_FIELDS[rope_type]}
    # Up to the original length: past it, dynamic and longrope turn on the length of a call, which an encoder-decoder
    # divides between two.
    llama = rope_llama(rope, layers=2)
    model = merged_twin(llama, rope_parameters={**rope, "rope_theta": 500.0})
    prompt, target = random_ids(2, 9), random_ids(2, 6)
    with torch.no_grad():
        logits = model(input_ids=prompt, decoder_input_ids=target).logits
        expected = llama(torch.cat((prompt, target), dim=-1)).logits[:, 9:]
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(("rope_type", "length"), [("dynamic", 64), ("longrope", 16), ("yarn", None)])
def test_where_rope_depends_on_the_length_a_student_says_how_far_it_is_its_teacher(rope_type, length, caplog):
    llama = rope_llama({"rope_type": rope_type, **ROPE_FIELDS[rope_type]}, layers=2, max_position_embeddings=64)
    student = RopeEncDecForConditionalGeneration.from_decoder_only(llama, decoder_start_token_id=5)
    said = f"rope_type={rope_type!r} turns by the length of a call" in caplog.text
    assert said == (length is not None) and (not said or f"stay within {length} tokens" in caplog.text)
    if length is None:
        return

    def difference(prompt, target):
        ids, start = random_ids(1, prompt + target), torch.tensor([[5]])
        ids = torch.cat((ids[:, :prompt], start, ids[:, prompt:]), dim=1)
        logits = student(input_ids=ids[:, :prompt], decoder_input_ids=ids[:, prompt:]).logits
        return (logits - llama(ids).logits[:, prompt:]).abs().max()

    with torch.no_grad():
        assert difference(length // 2, length // 2 - 1) < 1e-4 and difference(length // 2, length) > 0.01


def test_a_separate_decoder_with_silent_cross_attention_is_llama_on_the_target():
    llama = make_llama(layers=2)
    model = make_model(
        "separate", decoder_num_hidden_layers=2, tie_word_embeddings=False, rms_norm_eps=llama.config.rms_norm_eps
    )
    weights = {
        "model.encoder.embed_tokens.weight": llama.model.embed_tokens.weight,
        "lm_head.weight": llama.lm_head.weight,
    }
    for name, weight in llama.model.state_dict().items():
        if name.startswith(("layers.", "norm.")):
            weights[f"model.decoder.{name}"] = weight
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    prompt, target = random_ids(2, 5), random_ids(2, 8)
    with torch.no_grad():
        speaking = model(input_ids=prompt, decoder_input_ids=target).logits
        for layer in model.model.decoder.layers:
            layer.cross_attn.o_proj.weight.zero_()
        silent = model(input_ids=prompt, decoder_input_ids=target).logits
        expected = llama(target).logits
    torch.testing.assert_close(silent, expected, atol=2e-5, rtol=1e-5)
    assert (speaking - expected).abs().max() > 0.1


def test_cross_attention_is_torchs_multi_head_attention():
    model = make_model("separate", num_key_value_heads=4, attention_bias=True)
    cross = model.model.decoder.layers[0].cross_attn
    reference = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    reference.load_state_dict(
        {
            "in_proj_weight": torch.cat([getattr(cross, f"{p}_proj").weight for p in "qkv"]),
            "in_proj_bias": torch.cat([getattr(cross, f"{p}_proj").bias for p in "qkv"]),
            "out_proj.weight": cross.o_proj.weight,
            "out_proj.bias": cross.o_proj.bias,
        }
    )
    targets, prompt = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    with torch.no_grad():
        torch.testing.assert_close(cross(targets, prompt, None)[0], reference(targets, prompt, prompt)[0])


def test_separate_cross_attention_knows_no_positions():
    model = make_model("separate", cls=RopeEncDecModel)
    states, order, target = torch.randn(1, 7, 32), torch.randperm(7), random_ids(1, 4)
    with torch.no_grad():
        straight, shuffled = (
            model(encoder_outputs=BaseModelOutput(s), decoder_input_ids=target) for s in (states, states[:, order])
        )
    torch.testing.assert_close(straight.last_hidden_state, shuffled.last_hidden_state, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_mlp_formula(gated):
    mlp = make_model(gated_mlp=gated, mlp_bias=True, hidden_act="gelu").model.encoder.layers[0].mlp
    x = torch.randn(3, 32)
    up = F.linear(x, mlp.up_proj.weight, mlp.up_proj.bias)
    inner = F.gelu(F.linear(x, mlp.gate_proj.weight, mlp.gate_proj.bias)) * up if gated else F.gelu(up)
    torch.testing.assert_close(mlp(x), F.linear(inner, mlp.down_proj.weight, mlp.down_proj.bias))


def test_norm_is_torchs_rms_norm():
    norm = make_model().model.encoder.norm
    x = 3 * torch.randn(4, 32)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (32,), norm.weight, norm.eps))


@pytest.mark.parametrize("state", [0, 2, 3])
def test_separate_layers_read_the_encoder_state_that_they_name(state):
    model = make_model("separate", decoder_num_hidden_layers=1, cross_attention_layers=[state])
    plain = make_model("separate", decoder_num_hidden_layers=1)
    plain.load_state_dict(model.state_dict())
    ids, target = random_ids(2, 6), random_ids(2, 4)
    with torch.no_grad():
        encoded = plain.get_encoder()(ids, output_hidden_states=True)
        read = encoded.hidden_states[state]
        if state < 3:  # the last one has been through the final norm already
            read = model.model.encoder.norm(read)
        expected = plain(encoder_outputs=BaseModelOutput(read), decoder_input_ids=target).logits
        torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=target).logits, expected)


def test_merged_layers_read_the_encoder_state_that_they_name():
    """A merged decoder is blind to every encoder layer above the states that it reads, and sees all below."""
    model = make_model("merged", encoder_num_hidden_layers=4, cross_attention_layers=[1, 2])
    ids, target = random_ids(1, 6), random_ids(1, 4)

    def logits():
        with torch.no_grad():
            return model(input_ids=ids, decoder_input_ids=target).logits

    before = logits()
    for index, seen in ((3, False), (2, False), (1, True), (0, True)):
        weight = model.model.encoder.layers[index].mlp.down_proj.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(-1)
        assert (not torch.equal(before, logits())) == seen, index
        with torch.no_grad():
            weight.copy_(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_without_rope_ignore_positions(kind):
    """With RoPE nowhere and an open mask, nothing tells one order of the prompt from another."""
    every = {"encoder_no_rope_layers": [0, 1, 2], "decoder_no_rope_layers": [0, 1]}
    model = make_model(kind, **every)
    ids, target = random_ids(1, 7), random_ids(1, 4)
    with torch.no_grad():
        straight, shuffled = (
            model(input_ids=prompt, decoder_input_ids=target).logits for prompt in (ids, ids[:, torch.randperm(7)])
        )
        torch.testing.assert_close(straight, shuffled, atol=2e-5, rtol=1e-5)
        positions = make_model(kind)
        positions.load_state_dict(model.state_dict())
        with_rope = positions(input_ids=ids, decoder_input_ids=target).logits
    assert (with_rope - straight).abs().max() > 0.01


def test_angles_stay_exact_under_autocast():
    model = make_model()
    positions = torch.tensor([[0, 1000, 4000]])
    exact = model.model.encoder.rotary_emb(torch.zeros(1), positions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model.model.encoder.rotary_emb(torch.zeros(1), positions)
    torch.testing.assert_close(cast, exact, atol=0, rtol=0)


@pytest.mark.parametrize("cls", [RopeEncDecModel, RopeEncDecForConditionalGeneration])
def test_what_the_decoder_lacks_is_said(cls):
    model = make_model(cls=cls)
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="exactly one of decoder_input_ids and decoder_inputs_embeds, got neither"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="got both"):
        model(input_ids=ids, decoder_input_ids=ids, decoder_inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds, got neither"):
        model(decoder_input_ids=ids)
    with pytest.raises(ValueError, match="got both"):
        model(input_ids=ids, inputs_embeds=torch.zeros(1, 4, 32), decoder_input_ids=ids)


def test_merged_refuses_encoder_outputs_without_its_states():
    model = make_model("merged")
    with pytest.raises(ValueError, match=r"no cross_attention_states.*\[1, 2\].*get_encoder"):
        model(encoder_outputs=BaseModelOutput(torch.zeros(1, 4, 32)), decoder_input_ids=random_ids(1, 2))


def test_merged_refuses_a_4d_target_mask():
    model = make_model("merged")
    with pytest.raises(ValueError, match="2D mask"):
        model(
            input_ids=random_ids(1, 4),
            decoder_input_ids=random_ids(1, 2),
            decoder_attention_mask=torch.ones(1, 1, 2, 2),
        )
