"""The Mu converter against tensors that Microsoft's own code computed; see data/README.md."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.models.rope_encdec.convert_mu import _merge_fields, _our_config, convert_mu_checkpoint


DATA = Path(__file__).parent / "data"
FIELDS = json.loads((DATA / "mu_config.json").read_text())
REFERENCE = load_file(DATA / "mu_reference.safetensors")
LOGITS = sorted(name for name in REFERENCE if name.startswith(("tiled", "interleaved")) and "greedy" not in name)
EOS = 2  # the toy vocabulary has 64 tokens


def mu_tensors(dtype=torch.float32):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(DATA / "mu_weights.safetensors").items()}
    return {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}


def fields_of(case):
    """`tiled.factor4.long` -> the fields of Mu's configuration in that case."""
    order, factor = case.split(".")[:2]
    return {**FIELDS, "is_interleaved": order == "interleaved", "rope_factor": float(factor.removeprefix("factor"))}


def save_checkpoint(path, tensors, fields):
    """As `src/mu/checkpoint.py` of Microsoft's repository writes it."""
    torch.save({"model_state_dict": tensors, "model_config": fields, "global_step": 3, "score": -0.5}, path)
    return path


def converted(case, tmp_path):
    return convert_mu_checkpoint(save_checkpoint(tmp_path / "mu.pt", mu_tensors(), fields_of(case)), eos_token_id=EOS)


def inputs(case):
    """The padded batch of a case, with the masks that Mu derives from id 0."""
    batch = case.split(".")[-1]
    prompt, target = (REFERENCE[f"{batch}.{side}_input_ids"].long() for side in ("encoder", "decoder"))
    return {
        "input_ids": prompt,
        "attention_mask": (prompt != 0).long(),
        "decoder_input_ids": target,
        "decoder_attention_mask": (target != 0).long(),
    }


@torch.no_grad()
def assert_equals_reference(model, case, attn_implementation="sdpa"):
    model.set_attn_implementation(attn_implementation)
    torch.testing.assert_close(model(**inputs(case)).logits, REFERENCE[case], atol=1e-4, rtol=0)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", LOGITS)
def test_logits_equal_mus(case, attn_implementation, tmp_path):
    # Orders of the key/value heads differ by 6 here, NTK factors by 0.5.
    assert_equals_reference(converted(case, tmp_path), case, attn_implementation)


@pytest.mark.parametrize("order", ["tiled", "interleaved"])
def test_ntk_factor_changes_nothing_up_to_block_size(order, tmp_path):
    model = converted(f"{order}.factor4", tmp_path)
    assert model.config.rope_parameters["rope_type"] == "dynamic"
    assert_equals_reference(model, f"{order}.factor1.short")


def test_a_longer_batch_before_leaves_no_trace(tmp_path):
    model = converted("tiled.factor4", tmp_path)
    assert_equals_reference(model, "tiled.factor4.long")
    assert_equals_reference(model, "tiled.factor4.mixed")


@torch.no_grad()
def test_right_padded_targets_need_no_mask(tmp_path):
    case = "tiled.factor4.long"
    batch = inputs(case)
    is_real = batch.pop("decoder_attention_mask").bool()
    logits = converted(case, tmp_path)(**batch).logits
    torch.testing.assert_close(logits[is_real], REFERENCE[case][is_real], atol=1e-4, rtol=0)


def greedy(model, **kwargs):
    prompt = inputs("long")["input_ids"]
    return model.generate(prompt, attention_mask=(prompt != 0).long(), do_sample=False, **kwargs)


@pytest.mark.parametrize("order", ["tiled", "interleaved"])
def test_greedy_equals_mus_argmax_loop(order, tmp_path):
    model = converted(f"{order}.factor4", tmp_path)
    expected = REFERENCE[f"{order}.factor4.greedy"].long()
    block_size = FIELDS["block_size"]
    # Past block_size Mu turns old keys again, which keys in a cache can't follow.
    assert greedy(model, max_new_tokens=block_size, use_cache=True).equal(expected[:, : block_size + 1])
    assert greedy(model, max_new_tokens=expected.shape[1] - 1, use_cache=False).equal(expected)


def test_end_token_is_the_one_given(tmp_path):
    expected = REFERENCE["tiled.factor4.greedy"].long()[:, :17]
    end = 6
    path = save_checkpoint(tmp_path / "mu.pt", mu_tensors(), fields_of("tiled.factor4"))
    generated = greedy(convert_mu_checkpoint(path, eos_token_id=end), max_new_tokens=16)
    for row, tokens in zip(expected.tolist(), generated.tolist(), strict=True):
        length = row.index(end) + 1 if end in row else len(row)
        assert tokens == row[:length] + [0] * (len(row) - length)
    assert [end in row for row in expected.tolist()] == [True, False, True]


def test_bare_state_dict_with_json(tmp_path):
    """Also: the head may be left to the embedding, and fields at Mu's defaults may be left out of the JSON."""
    tensors = mu_tensors()
    del tensors["lm_head.weight"]
    torch.save(tensors, tmp_path / "mu.pt")
    fields = fields_of("tiled.factor1")
    for name in ("is_interleaved", "rope_factor", "rope_theta", "dropout", "n_head", "n_kv_head", "pad_token_id"):
        del fields[name]
    (tmp_path / "mu.json").write_text(json.dumps(fields))
    model = convert_mu_checkpoint(tmp_path / "mu.pt", tmp_path / "mu.json", eos_token_id=EOS)
    assert_equals_reference(model, "tiled.factor1.long")


def test_json_fills_in_what_the_checkpoint_does_not_record(tmp_path):
    recorded = fields_of("interleaved.factor4")
    given = {"is_interleaved": recorded.pop("is_interleaved"), "rope_factor": 4, "rope_theta": 10000.0}
    (tmp_path / "mu.json").write_text(json.dumps(given))
    path = save_checkpoint(tmp_path / "mu.pt", mu_tensors(), recorded)
    assert_equals_reference(
        convert_mu_checkpoint(path, tmp_path / "mu.json", eos_token_id=EOS), "interleaved.factor4.long"
    )


def test_converted_model_saves_and_loads(tmp_path):
    model = converted("tiled.factor4", tmp_path)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    assert not loaded.training
    assert_equals_reference(loaded, "tiled.factor4.long")
    for config in (loaded.config, loaded.generation_config):
        tokens = (config.pad_token_id, config.bos_token_id, config.eos_token_id, config.decoder_start_token_id)
        assert tokens == (0, 1, EOS, 1)
    assert loaded.config.attention_dropout == FIELDS["dropout"]


@torch.no_grad()
def test_checkpoint_keeps_its_dtype(tmp_path):
    case = "tiled.factor1.short"
    path = save_checkpoint(tmp_path / "mu.pt", mu_tensors(torch.bfloat16), fields_of(case))
    model = convert_mu_checkpoint(path, eos_token_id=EOS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    # Written and read as bfloat16, nothing is lost: the float32 reference used just these values.
    torch.testing.assert_close(model.float()(**inputs(case)).logits, REFERENCE[case], atol=1e-4, rtol=0)


def test_default_fields_are_those_of_the_332_m_model():
    """332,042,240 parameters: what fits the public bfloat16 checkpoint, 664,270,379 bytes with its zip directory."""
    config = _our_config(_merge_fields({}, {}, "", ""), bos_token_id=1, eos_token_id=32000)
    with torch.device("meta"):
        model = RopeEncDecForConditionalGeneration(config)
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == 332_042_240
    sizes = (config.encoder_num_hidden_layers, config.decoder_num_hidden_layers, config.hidden_size, config.head_dim)
    assert sizes == (20, 10, 1024, 384 // 6)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_attention_as_wide_as_the_model_by_default(tmp_path):
    fields = {**FIELDS, "qkv_embd": None, "n_head": 4, "n_kv_head": 2}
    tensors = mu_tensors()
    rows = {"q_linear": 32, "k_linear": 16, "v_linear": 16}
    for name in tensors:
        linear, kind = name.split(".")[-2:]
        if linear in rows:
            tensors[name] = torch.randn(rows[linear], 32) if kind == "weight" else torch.randn(rows[linear])
        elif linear == "out_linear" and kind == "weight":
            tensors[name] = torch.randn(32, 32)
    path = save_checkpoint(tmp_path / "mu.pt", tensors, fields)
    (tmp_path / "mu.json").write_text(json.dumps({"qkv_embd": 32}))  # the same thing, said otherwise
    model = convert_mu_checkpoint(path, tmp_path / "mu.json", eos_token_id=EOS)
    assert (model.config.head_dim, model.config.num_attention_heads) == (8, 4)
    # Four heads on two: 0 and 2 read the first key/value head, 1 and 3 the second.
    mus = tensors["transformer.e.0.attn.q_linear.weight"].view(4, 8, 32)
    ours = model.model.encoder.layers[0].self_attn.q_proj.weight.view(4, 8, 32)
    assert ours.equal(mus[[0, 2, 1, 3]])


def _without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: _without(t, "transformer.h.1.cross_attn.k_linear.bias"),
            r"missing tensors: transformer\.h\.1\.cross_attn\.k_linear\.bias",
        ),
        (
            lambda t: {**t, "transformer.e.2.ln1.weight": torch.ones(32)},
            r"unknown tensors: transformer\.e\.2\.ln1\.weight",
        ),
        (
            lambda t: {**t, "transformer.e.0.mlp.fc1.weight": torch.ones(40, 32)},
            r"misshapen tensors: transformer\.e\.0\.mlp\.fc1\.weight \(40, 32\) instead of \(48, 32\)",
        ),
        (lambda t: {**t, "lm_head.weight": t["lm_head.weight"] + 1}, r"lm_head\.weight differs"),
        (lambda t: {**t, "lm_head.bias": torch.zeros(64)}, r"vision variant.*lm_head\.bias"),
        (lambda t: {**t, "optimizer": {}}, r"expected a dict of tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    path = save_checkpoint(tmp_path / "mu.pt", change(mu_tensors()), FIELDS)
    with pytest.raises(ValueError, match=message):
        convert_mu_checkpoint(path, eos_token_id=EOS)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"n_kv_head": 6}, r"n_kv_head: .*mu\.json says 6.*mu\.pt was made with 3"),
        ({"is_interleaved": True}, r"is_interleaved: .*says True.*with False"),
        ({"qkv_embd": None}, r"qkv_embd: .*says None.*with 24"),
        ({"n_layers": 2}, r"mu\.json: unknown fields \['n_layers'\]"),
        ({"n_head": "6"}, r"mu\.json: n_head='6' has the wrong type"),
        ({"model_type": "llava_mu", "n_embd": 768}, r"mu\.json belongs to the vision variant"),
        ([1], r"mu\.json holds the list \[1\], expected a JSON object"),
    ],
)
def test_configurations_that_do_not_fit_are_named(given, message, tmp_path):
    path = save_checkpoint(tmp_path / "mu.pt", mu_tensors(), FIELDS)
    (tmp_path / "mu.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=message):
        convert_mu_checkpoint(path, tmp_path / "mu.json", eos_token_id=EOS)


@pytest.mark.parametrize(
    "fields, tokens, message",
    [
        ({"n_head": 5}, {}, r"n_head=5 has to divide qkv_embd=24"),
        ({"n_kv_head": 4}, {}, r"num_key_value_heads=4"),
        ({"n_head": 24, "n_kv_head": 12}, {}, r"head_dim=1"),
        ({}, {"eos_token_id": 32000}, r"eos_token_id=32000 is not in the vocabulary of 64 tokens"),
        ({}, {"bos_token_id": -1}, r"bos_token_id=-1"),
    ],
)
def test_values_that_cannot_work_are_named(fields, tokens, message, tmp_path):
    path = save_checkpoint(tmp_path / "mu.pt", mu_tensors(), {**FIELDS, **fields})
    with pytest.raises(ValueError, match=message):
        convert_mu_checkpoint(path, **{"eos_token_id": EOS, **tokens})


def test_without_any_configuration_the_defaults_are_held_against_the_tensors(tmp_path):
    torch.save(mu_tensors(), tmp_path / "mu.pt")
    with pytest.raises(ValueError, match=r"missing tensors: transformer\.e\.10\..* and \d+ more.*config_path"):
        convert_mu_checkpoint(tmp_path / "mu.pt")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:54c2\nsize 664270379\n", r"git lfs pull"),
        (b"no checkpoint", r"mu\.pt can't be read as a PyTorch checkpoint"),
        (b"", r"mu\.pt can't be read as a PyTorch checkpoint"),
    ],
)
def test_files_that_are_no_checkpoint(content, message, tmp_path):
    (tmp_path / "mu.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert_mu_checkpoint(tmp_path / "mu.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"model_state_dict": mu_tensors(), "model_config": Path("x")}, tmp_path / "mu.pt")
    with pytest.raises(ValueError, match="Python objects"):
        convert_mu_checkpoint(tmp_path / "mu.pt")


def test_json_that_is_none(tmp_path):
    path = save_checkpoint(tmp_path / "mu.pt", mu_tensors(), FIELDS)
    (tmp_path / "mu.json").write_text("n_embd: 32")
    with pytest.raises(ValueError, match=r"mu\.json is not JSON"):
        convert_mu_checkpoint(path, tmp_path / "mu.json")


@pytest.mark.parametrize(
    "content", [b"", b"noise" * 100, b"<html></html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_checkpoint_that_is_none(tmp_path, content):
    (tmp_path / "mu.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"mu\.pt can't be read as a PyTorch checkpoint: it is"):
        convert_mu_checkpoint(tmp_path / "mu.pt")


def test_fields_in_a_checkpoint_that_are_none(tmp_path):
    torch.save({"model_state_dict": mu_tensors(), "model_config": [1, 2]}, tmp_path / "mu.pt")
    with pytest.raises(ValueError, match=r"has the model_config \[1, 2\]"):
        convert_mu_checkpoint(tmp_path / "mu.pt")
