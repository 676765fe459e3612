"""Saving and loading: no key too many or too few, no warning, any dtype and device map, through every Auto class."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_common import CLASSES, EVERYTHING, assert_initial, call
from toys import KINDS, SLIDING, make_config, make_model, random_ids
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding

from hf_encdec_distill import (
    RopeEncDecConfig,
    RopeEncDecEncoderModel,
    RopeEncDecForConditionalGeneration,
    RopeEncDecModel,
)


class Records(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def warnings_of_transformers():
    """Messages of level WARNING and above that transformers logs meanwhile; its logger does not propagate."""
    handler, logger = Records(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)


def equal_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", CLASSES)
def test_round_trip(cls, kind, tied, tmp_path, warnings_of_transformers):
    model = make_model(kind, cls=cls, tie_word_embeddings=tied, **EVERYTHING)
    model.save_pretrained(tmp_path)
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], problem
    assert warnings_of_transformers == []
    assert equal_states(model, loaded) and not loaded.training
    assert torch.equal(call(loaded)[0], call(model)[0])
    written = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in written) == (cls is RopeEncDecForConditionalGeneration and not tied)


@pytest.mark.parametrize("kind", KINDS)
def test_shards(kind, tmp_path):
    model = make_model(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert equal_states(model, RopeEncDecForConditionalGeneration.from_pretrained(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_auto_classes(kind, tmp_path, warnings_of_transformers):
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is RopeEncDecConfig
    for auto, cls in (
        (AutoModel, RopeEncDecModel),
        (AutoModelForSeq2SeqLM, RopeEncDecForConditionalGeneration),
        (AutoModelForTextEncoding, RopeEncDecEncoderModel),
    ):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is cls
        assert type(auto.from_config(model.config)) is cls
        expected = call(model)
        state = expected.logits if cls is RopeEncDecForConditionalGeneration else expected.encoder_last_hidden_state
        outputs = call(loaded)
        got = outputs.logits if cls is RopeEncDecForConditionalGeneration else (
            outputs.last_hidden_state if cls is RopeEncDecEncoderModel else outputs.encoder_last_hidden_state
        )  # fmt: skip
        torch.testing.assert_close(got, state)
    assert warnings_of_transformers == []  # the encoder leaves the decoder's weights where they are, by design


@pytest.mark.parametrize("source", [RopeEncDecModel, RopeEncDecForConditionalGeneration])
@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_alone_out_of_a_full_checkpoint(kind, source, tmp_path, warnings_of_transformers):
    model = make_model(kind, cls=source)
    model.save_pretrained(tmp_path)
    encoder, info = RopeEncDecEncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and warnings_of_transformers == []
    torch.testing.assert_close(call(encoder).last_hidden_state, call(model).encoder_last_hidden_state)
    encoder.save_pretrained(tmp_path / "alone")
    again = AutoModelForTextEncoding.from_pretrained(tmp_path / "alone")
    assert equal_states(encoder, again)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_on_a_base_checkpoint(kind, tmp_path):
    base = make_model(kind, cls=RopeEncDecModel)
    base.save_pretrained(tmp_path)
    tied, info = RopeEncDecForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert equal_states(base, tied.model) and tied.lm_head.weight is tied.get_input_embeddings().weight
    untied, info = RopeEncDecForConditionalGeneration.from_pretrained(
        tmp_path, tie_word_embeddings=False, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert equal_states(base, untied.model)
    assert_initial("lm_head.weight", untied.lm_head.weight)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_missing_weights_are_initialised(kind, low_memory, tmp_path):
    """As a fresh model has them, whatever memory held: from_pretrained starts on the meta device."""
    model = make_model(kind, **EVERYTHING)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {
        name: weight.clone()  # safetensors 0.5 reads them from the file when they are looked at
        for name, weight in weights.items()
        if "decoder.layers.1" not in name and "encoder.norm" not in name
    }
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = RopeEncDecForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, low_cpu_mem_usage=low_memory
    )
    assert set(info["missing_keys"]) == weights.keys() - kept.keys()
    for name, parameter in loaded.named_parameters():
        if name in kept:
            assert torch.equal(parameter, kept[name])
        else:
            assert_initial(name, parameter)
    assert call(loaded).logits.isfinite().all()


def test_wrong_shapes_are_an_error_or_initialised_on_request(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch|size"):
        RopeEncDecForConditionalGeneration.from_pretrained(tmp_path, vocab_size=50)
    loaded = RopeEncDecForConditionalGeneration.from_pretrained(tmp_path, vocab_size=50, ignore_mismatched_sizes=True)
    assert_initial("embed", loaded.get_input_embeddings().weight)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16, "auto"])
def test_dtypes(argument, dtype, tmp_path):
    model = make_model("merged")
    frequencies = model.model.encoder.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).keys() & {"dtype", "torch_dtype"}
    loaded = RopeEncDecForConditionalGeneration.from_pretrained(tmp_path, **{argument: dtype})
    expected = torch.float16 if dtype is torch.float16 else torch.bfloat16
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected} and loaded.dtype == expected
    # Angles need full precision, whatever the weights are in.
    for side in (model.model.encoder, loaded.model.encoder, loaded.half().model.decoder):
        assert torch.equal(side.rotary_emb.inv_freq, frequencies)
    assert AutoModelForSeq2SeqLM.from_config(loaded.config, **{argument: torch.float16}).dtype == torch.float16


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
@pytest.mark.parametrize("kind", KINDS)
def test_device_maps(kind, device_map, tmp_path):
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    loaded = RopeEncDecForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(call(loaded).logits, call(model).logits)
    settings = {"max_new_tokens": 4, "do_sample": False}
    ids = random_ids(2, 5)
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize(
    "rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}]
)
@pytest.mark.parametrize("cls", CLASSES)
def test_meta_init(cls, rope, tmp_path):
    """Built on the meta device, a model has the same weights to fill, and loading brings what no checkpoint holds."""
    config = make_config("merged", rope_parameters={**rope, "rope_theta": 500.0})
    model = cls(config).eval()
    with torch.device("meta"):
        empty = cls(config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert empty.state_dict().keys() == model.state_dict().keys()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(call(cls.from_pretrained(tmp_path))[0], call(model)[0])


@pytest.mark.parametrize("cls", CLASSES)
def test_layers_that_slide(cls, tmp_path):
    model = make_model(cls=cls, **SLIDING)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(call(cls.from_pretrained(tmp_path))[0], call(model)[0])
    half = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
    rotary = [each.get_encoder().sliding_rotary_emb.inv_freq for each in (model, half)]
    assert torch.equal(*rotary) and rotary[1].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_no_frequencies(kind):
    assert not any("inv_freq" in name for name in make_model(kind, **SLIDING).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_state_survives(kind, tmp_path):
    """What needs no gradient in a merged model needs none after loading either."""
    model = make_model(kind, encoder_num_hidden_layers=4)
    model.save_pretrained(tmp_path)
    loaded = RopeEncDecForConditionalGeneration.from_pretrained(tmp_path)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert bool(frozen) == (kind == "merged")


def test_one_process_writes_the_tokenizer(tmp_path, make_bpe_tokenizer):
    model = make_model()
    model.tokenizer = make_bpe_tokenizer()
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "tokenizer.json").exists()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()


def test_arguments_by_their_places(tmp_path):
    """`is_main_process` and `state_dict`, as of any model of transformers."""
    model = make_model()
    doubled = {name: 2 * value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, True, doubled)
    loaded = RopeEncDecForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in doubled.items())


@pytest.mark.process
def test_a_subclass_is_saved_with_its_own_code(tmp_path):
    """As transformers saves any class that registers itself, not with the names of ours."""
    (tmp_path / "mine.py").write_text("""
from hf_encdec_distill import RopeEncDecConfig, RopeEncDecForConditionalGeneration

class MineConfig(RopeEncDecConfig):
    model_type = "mine_encdec"

class MineModel(RopeEncDecForConditionalGeneration):
    config_class = MineConfig

MineConfig.register_for_auto_class()
MineModel.register_for_auto_class("AutoModelForSeq2SeqLM")
""")
    code = f"""
import sys, torch
sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parents[1])!r}]
import mine
from toys import make_model
from transformers import AutoModelForSeq2SeqLM
fields = make_model("merged").config.to_diff_dict()
model = mine.MineModel(mine.MineConfig(**{{k: v for k, v in fields.items() if k not in ("model_type", "auto_map")}}))
model.save_pretrained({str(tmp_path / "saved")!r})
loaded = AutoModelForSeq2SeqLM.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
assert type(loaded).__name__ == "MineModel", type(loaded)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    auto_map = json.loads((tmp_path / "saved/config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": "mine.MineConfig", "AutoModelForSeq2SeqLM": "mine.MineModel"}
