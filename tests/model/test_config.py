"""The configuration: what it refuses, what it accepts in older spellings, and that it survives every round trip."""

import copy
import json
import math
import pickle

import pytest
import torch
from toys import SLIDING, make_config
from transformers import AutoConfig, DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_encdec_distill import RopeEncDecConfig, RopeEncDecEncoderModel, RopeEncDecForConditionalGeneration
from hf_encdec_distill.models.rope_encdec.compat_rope_encdec import ROPE_LIVES_IN_ONE_DICT
from hf_encdec_distill.models.rope_encdec.modeling_rope_encdec import RopeEncDecRotaryEmbedding


@pytest.mark.parametrize(
    ("fields", "name", "value", "mend"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads", "3", "divisor of hidden_size=32"),
        ({"num_attention_heads": 0}, "num_attention_heads", "0", "at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads", "3", "divisor of num_attention_heads=4"),
        ({"head_dim": 7}, "head_dim", "7", "even"),
        ({"head_dim": 8.0}, "head_dim", "8.0", "whole number"),
        ({"partial_rotary_factor": 0.4}, "head_dim", "8", "even"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor", "1.5", "at most 1"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type", "'spiral'", "'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters", "linear", "['factor']"),
        ({"rope_theta": -1.0}, "rope_theta", "-1.0", "positive"),
        ({"rope_theta": math.inf}, "rope_theta", "inf", "positive"),
        ({"rope_theta": 10**400}, "rope_theta", "1000", "positive"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor", "0", "positive"),
        ({"rope_parameters": {"rope_type": "linear", "factor": math.nan}}, "factor", "nan", "positive"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor", "'2'", "positive"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps", "nan", "above 0 and below 1"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps", "-1.0", "above 0 and below 1"),
        ({"rms_norm_eps": None}, "rms_norm_eps", "None", "above 0 and below 1"),
        ({"attention_dropout": 5}, "attention_dropout", "5", "from 0 to below 1"),
        ({"gated_mlp": "false"}, "gated_mlp", "'false'", "True or False"),
        ({"cross_attention_layers": [True, True]}, "cross_attention_layers", "[True, True]", "each of the 2 decoder"),
        ({"encoder_num_hidden_layers": 0}, "encoder_num_hidden_layers", "0", "at least 1"),
        ({"decoder_num_hidden_layers": 0}, "decoder_num_hidden_layers", "0", "at least 1"),
        ({"decoder_intermediate_size": 0}, "decoder_intermediate_size", "0", "at least 1"),
        ({"vocab_size": -5}, "vocab_size", "-5", "at least 1"),
        ({"hidden_act": "relux"}, "hidden_act", "'relux'", "'silu'"),
        ({"attention_bias": "kv"}, "attention_bias", "'kv'", '"qkv"'),
        ({"cross_attention": "fused"}, "cross_attention", "'fused'", '"merged"'),
        ({"encoder_attention": "prefix"}, "encoder_attention", "'prefix'", '"causal"'),
        ({"cross_attention_layers": [0]}, "cross_attention_layers", "[0]", "each of the 2 decoder layers"),
        ({"cross_attention_layers": [0, 4]}, "cross_attention_layers", "[0, 4]", "0 to encoder_num_hidden_layers=3"),
        ({"encoder_no_rope_layers": [3]}, "encoder_no_rope_layers", "[3]", "0 to 2"),
        (
            {"encoder_layer_types": ["full_attention"]},
            "encoder_layer_types",
            "['full_",
            "each of the 3 encoder layers",
        ),
        (
            {"encoder_layer_types": ["full_attention", "full_attention", "local"]},
            "types",
            "'local'",
            "sliding_attention",
        ),
        ({"encoder_layer_types": ["sliding_attention"] * 3}, "encoder_sliding_window", "None", "at least 1"),
        ({"encoder_sliding_window": 0}, "encoder_sliding_window", "0", "at least 1"),
        ({"encoder_sliding_rope_theta": 0.0}, "encoder_sliding_rope_theta", "0.0", "positive"),
        (
            {"encoder_sliding_rope_theta": 5.0},
            "encoder_sliding_rope_theta",
            "5.0",
            "None where no encoder layer slides",
        ),
        ({"cross_attention_sharing": 0}, "cross_attention_sharing", "0", "at least 1"),
        (
            {"cross_attention_sharing": 2, "cross_attention_layers": [1, 2]},
            "cross_attention_layers",
            "[1, 2]",
            "group of cross_attention_sharing=2, such as [1, 1]",
        ),
        (
            {"cross_attention": "merged", "cross_attention_sharing": 2, "decoder_no_rope_layers": [1]},
            "decoder_no_rope_layers",
            "[1]",
            "group of cross_attention_sharing=2 or none",
        ),
        ({"decoder_no_rope_layers": [-1]}, "decoder_no_rope_layers", "[-1]", "0 to 1"),
        ({"decoder_start_token_id": None}, "decoder_start_token_id", "None", "bos_token_id"),
        ({"decoder_start_token_id": 97}, "decoder_start_token_id", "97", "0 to 96"),
    ],
)
def test_what_cannot_work_is_refused_with_field_value_and_mend(fields, name, value, mend):
    with pytest.raises(ValueError) as error:
        make_config(**fields)
    message = str(error.value)
    assert name in message and value in message and mend in message


EVERY_FIELD = {
    "decoder_intermediate_size": 20,
    "head_dim": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "gated_mlp": False,
    "attention_bias": "qkv",
    "mlp_bias": True,
    "qk_norm": True,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0, "partial_rotary_factor": 0.5},
    "encoder_no_rope_layers": [1],
    "decoder_no_rope_layers": [0, 1],
    "rms_norm_eps": 1e-5,
    "attention_dropout": 0.1,
    "use_cache": False,
    "tie_word_embeddings": False,
    "decoder_num_hidden_layers": 4,
    "cross_attention_layers": [1, 1, 3, 3],
    "cross_attention_sharing": 2,
    "encoder_attention": "causal",
    "encoder_pooling": 4,
    "encoder_pooling_layer": 2,
    **SLIDING,
    "pad_token_id": None,
    "bos_token_id": 5,
    "eos_token_id": [2, 3],
    "decoder_start_token_id": 7,
}


@pytest.mark.parametrize("kind", ["separate", "merged"])
def test_every_field_survives_dict_disk_copy_and_pickle(kind, tmp_path):
    config = make_config(kind, **EVERY_FIELD)
    config.save_pretrained(tmp_path)
    for twin in (
        RopeEncDecConfig.from_dict(config.to_dict()),
        RopeEncDecConfig(**json.loads(config.to_json_string(use_diff=False))),
        RopeEncDecConfig(**json.loads(config.to_json_string(use_diff=True))),
        RopeEncDecConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert type(twin) is RopeEncDecConfig
        for name, value in EVERY_FIELD.items():
            assert getattr(twin, name) == value, name
        assert twin.cross_attention == kind
        assert twin.is_encoder_decoder is True
        written, again = config.to_dict(), twin.to_dict()
        assert {k: v for k, v in written.items() if k != "_name_or_path"} == {
            k: v for k, v in again.items() if k != "_name_or_path"
        }


def test_an_untouched_config_survives_too(tmp_path):
    RopeEncDecConfig().save_pretrained(tmp_path)
    assert RopeEncDecConfig.from_pretrained(tmp_path).to_diff_dict() == RopeEncDecConfig().to_diff_dict()


LEGACY = [
    {},
    {"rope_theta": 500.0},
    {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {
        "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    },
    {"rope_theta": 500.0, "rope_scaling": None},
]


@pytest.mark.parametrize("fields", LEGACY)
def test_older_rope_arguments_mean_what_they_mean_upstream(fields):
    upstream = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=128, **copy.deepcopy(fields))
    theirs = LlamaRotaryEmbedding(upstream)
    config = make_config(**copy.deepcopy(fields))
    ours = RopeEncDecRotaryEmbedding(config)
    torch.testing.assert_close(ours.inv_freq, theirs.inv_freq)
    assert ours.attention_scaling == theirs.attention_scaling
    # Folded into one dict, which alone is enough to say it again.
    again = RopeEncDecRotaryEmbedding(make_config(rope_parameters=config.rope_parameters))
    torch.testing.assert_close(again.inv_freq, theirs.inv_freq)


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_rope_that_is_given_when_loading_keeps_theta_and_width(name, tmp_path):
    make_config(rope_theta=500.0, partial_rotary_factor=0.5).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, **{name: {"rope_type": "linear", "factor": 4.0}})
    linear = {"rope_type": "linear", "rope_theta": 500.0, "partial_rotary_factor": 0.5, "factor": 4.0}
    assert config.rope_parameters == linear
    rotary = RopeEncDecForConditionalGeneration(config).model.decoder.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, torch.tensor([1 / 4, 500.0**-0.5 / 4]))  # 4 of 8 features turn
    config.rope_parameters = {**linear, "rope_theta": 70.0}
    assert config.rope_parameters["rope_theta"] == 70.0


def test_older_rope_fields_can_be_set(tmp_path):
    make_config().save_pretrained(tmp_path)
    if ROPE_LIVES_IN_ONE_DICT:  # transformers 5 has no such fields
        assert not hasattr(AutoConfig.from_pretrained(tmp_path), "rope_theta")
        return
    config = AutoConfig.from_pretrained(tmp_path, rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4.0})
    config.partial_rotary_factor = 0.5
    expected = {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5}
    assert config.rope_parameters == expected
    config.rope_scaling = None
    assert config.rope_parameters == {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("field", "value"),
    [("cross_attention", "nonsense"), ("encoder_pooling", 0), ("cross_attention_layers", [9, 9])],
)
def test_a_field_that_is_set_later_is_checked_by_the_model(field, value, tmp_path):
    make_config().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, **{field: value})
    for cls in (RopeEncDecForConditionalGeneration, RopeEncDecEncoderModel):
        with pytest.raises(ValueError, match=rf"RopeEncDecConfig: {field}=.* does not work"):
            cls(config)


def test_the_one_dict_wins_over_older_arguments():
    config = make_config(rope_parameters={"rope_type": "default", "rope_theta": 7.0}, rope_theta=500.0)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 7.0}


def test_a_window_alone_is_modern_berts_order():
    """As its own config has it: `global_attn_every_n_layers` is 3. Each number of layers has its own."""
    full, sliding = "full_attention", "sliding_attention"
    config = make_config(encoder_sliding_window=4, encoder_num_hidden_layers=5)
    assert config.attention_of_encoder_layer == [full, sliding, sliding, full, sliding]
    config.encoder_num_hidden_layers = 2
    assert config.attention_of_encoder_layer == [full, sliding]
    assert make_config().attention_of_encoder_layer == [full] * 3


def test_a_sliding_encoder_leaves_the_decoders_cache_whole():
    assert not any(layer.is_sliding for layer in DynamicCache(config=make_config(**SLIDING)).layers)


def test_num_hidden_layers_is_another_name_for_the_decoders_depth():
    config = make_config(decoder_num_hidden_layers=5)
    assert config.num_hidden_layers == 5
    config.num_hidden_layers = 4
    assert config.decoder_num_hidden_layers == 4
    assert RopeEncDecConfig(num_hidden_layers=6).decoder_num_hidden_layers == 6


def test_missing_sizes_are_filled_in():
    config = RopeEncDecConfig(hidden_size=48, intermediate_size=80, num_attention_heads=4)
    assert (config.num_key_value_heads, config.head_dim, config.decoder_intermediate_size) == (4, 12, 80)


@pytest.mark.parametrize(
    ("kind", "encoder", "decoder", "states"),
    [
        ("separate", 4, 2, [4, 4]),
        ("merged", 4, 4, [0, 1, 2, 3]),  # the state that enters the matching layer
        ("merged", 4, 2, [1, 3]),  # each decoder layer stands for a run of two and reads where it ends
        ("merged", 5, 2, [2, 4]),
        ("merged", 2, 4, [0, 0, 1, 1]),
    ],
)
def test_default_encoder_states(kind, encoder, decoder, states):
    config = make_config(kind, encoder_num_hidden_layers=encoder, decoder_num_hidden_layers=decoder)
    assert config.encoder_state_of_decoder_layer == states
    assert config.encoder_states_read == sorted(set(states))


def test_a_saved_config_names_a_class_for_each_auto_class(tmp_path):
    make_config().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM", "AutoModelForTextEncoding"}


def test_auto_config_knows_the_model_type():
    config = AutoConfig.for_model("rope_encdec", hidden_size=64, num_attention_heads=4)
    assert type(config) is RopeEncDecConfig and config.hidden_size == 64


def test_no_pad_token_and_several_ends_work_in_generate():
    model = RopeEncDecForConditionalGeneration(make_config(pad_token_id=None, eos_token_id=[2, 3])).eval()
    ids = torch.randint(4, 97, (2, 5))
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert tokens.shape[0] == 2
    for row in tokens.tolist():
        ends = [index for index, token in enumerate(row) if token in (2, 3)]
        assert not ends or set(row[ends[0] :]) <= {2, 3}  # after an end there is only filling
