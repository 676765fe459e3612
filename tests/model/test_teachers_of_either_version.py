"""Teachers that one version of transformers saved are the same in the other, or are refused with what mends them."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from freeze_teachers import CASES, TEACHERS, TEXTS, filled, logits, make_config, make_tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.distillation.alignment.tokenizers import tokenizer_beside
from hf_encdec_distill.distillation.teachers.fingerprints import config_digest
from hf_encdec_distill.distillation.teachers.live import LiveTeacher
from hf_encdec_distill.models.either_version import check_rope_is_read, fields_of_4_57, save_teacher
from hf_encdec_distill.models.rope_encdec.compat_rope_encdec import ROPE_LIVES_IN_ONE_DICT


VERSIONS = sorted(folder.name for folder in TEACHERS.iterdir())
BOTH = pytest.mark.parametrize("version", VERSIONS)


def expected(version, name):
    return load_file(TEACHERS / version / "expected.safetensors")[name]


def assert_same(model, version, name):
    torch.testing.assert_close(logits(model.eval()), expected(version, name), atol=2e-5, rtol=0)


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_rope_of_each_family_is_read_alike(case, version):
    config = AutoConfig.from_pretrained(TEACHERS / version / case)
    check_rope_is_read(config)
    assert_same(filled(AutoModelForCausalLM.from_config(config)), version, case)


# How the digests of the frozen configs begin; that of llama3 is worked out below.
DIGESTS = {
    "llama": "ead807d6c85223ee",
    "llama3": "9ac5afd9789bf8e9",
    "mistral": "44e6b461642d6d36",
    "qwen2": "96068d23a6059dcf",
    "qwen3": "b41b4c918507d4e2",
    "qwen3-dynamic": "2b61206c46547696",
    "smollm3": "6501d14b2b253a02",
    "phi3": "66b0b0e70fac85cb",
    "phi3-longrope": "b7ecbf687f85f5b9",
}


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_a_cache_made_with_one_version_goes_on_with_the_other(case, version):
    config = AutoConfig.from_pretrained(TEACHERS / version / case)
    assert config_digest(AutoModelForCausalLM.from_config(config))[:16] == DIGESTS[case]


def test_what_a_teacher_is_known_by():
    """Written out by hand from the two config.json; and another number is another teacher."""
    by_hand = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **{"vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 16},
        **{"initializer_range": 0.02, "rms_norm_eps": 1e-06, "attention_dropout": 0.0, "pretraining_tp": 1},
        **{"use_cache": True, "return_dict": True, "chunk_size_feed_forward": 0, "pad_token_id": 0, "eos_token_id": 2},
        **{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
        "rope_parameters": {
            **{"rope_type": "llama3", "rope_theta": 300.0, "original_max_position_embeddings": 8},
            **{"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
    }
    digest = hashlib.sha256(json.dumps(by_hand, sort_keys=True).encode()).hexdigest()
    assert digest[:16] == DIGESTS["llama3"]
    rope = {**by_hand["rope_parameters"], "factor": 2.0}
    changes = [{"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}, {"tie_word_embeddings": True}]
    changes += [{"rope_parameters": rope} if ROPE_LIVES_IN_ONE_DICT else {"rope_scaling": rope}]
    for change in changes:
        config = AutoConfig.from_pretrained(TEACHERS / "4.57" / "llama3", **change)
        assert config_digest(AutoModelForCausalLM.from_config(config)) != digest


@BOTH
def test_a_whole_teacher_is_the_same_model_with_the_same_tokens(version):
    folder = TEACHERS / version / "whole"
    assert_same(LiveTeacher.load(folder).model, version, "llama")
    tokenizer = tokenizer_beside(folder, "none")
    assert tokenizer(TEXTS, padding=True)["input_ids"] == expected(version, "tokens").tolist()
    assert tokenizer.decode(tokenizer("<sentinel> dogs")["input_ids"], skip_special_tokens=True).strip() == "dogs"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Two"}], tokenize=False) == "Two: "
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


@BOTH
def test_an_adapter_is_the_same_on_its_base(version, tmp_path):
    shutil.copytree(TEACHERS / version / "adapter", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"whole"', json.dumps(str(TEACHERS / version / "whole"))))
    assert_same(LiveTeacher.load(tmp_path).model, version, "adapter")
    assert tokenizer_beside(tmp_path, "none")(TEXTS, padding=True)["input_ids"] == expected(version, "tokens").tolist()


@pytest.mark.parametrize("case", CASES)
def test_what_this_version_saves_has_what_the_other_reads(case, tmp_path):
    save_teacher(filled(AutoModelForCausalLM.from_config(make_config(case))), make_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    frozen = json.loads((TEACHERS / "4.57" / case / "config.json").read_text())
    assert config["rope_theta"] == frozen["rope_theta"] == 300.0
    # 5.x spells out what follows from other fields.
    assert (frozen.get("rope_scaling") or {}).items() <= (config.get("rope_scaling") or {}).items()
    assert config.get("partial_rotary_factor", 1.0) == frozen.get("partial_rotary_factor", 1.0)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not list(tmp_path.glob("*.tmp"))


def foreign(version, folder):
    """A teacher as transformers alone saves it."""
    shutil.copytree(TEACHERS / version / "foreign", folder)
    shutil.copy(TEACHERS / version / "whole" / "model.safetensors", folder)
    return folder


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@BOTH
def test_a_foreign_teacher_is_read_right_or_refused_with_the_line_that_mends_it(version, tmp_path):
    folder = foreign(version, tmp_path / "foreign")
    if version == "5.24" and not ROPE_LIVES_IN_ONE_DICT:
        message = r'transformers 5\.24\.0.*add ("rope_theta": 300\.0, "rope_scaling": null) to its config\.json'
        with pytest.raises(ValueError, match=message) as raised:
            LiveTeacher.load(folder)
        with pytest.raises(ValueError, match=message):
            RopeEncDecForConditionalGeneration.from_decoder_only(AutoModelForCausalLM.from_pretrained(folder))
        lines = re.search(message, str(raised.value)).group(1)
        change(folder / "config.json", **json.loads(f"{{{lines}}}"))

        message = r'saved by transformers 5.*set ("tokenizer_class": "PreTrainedTokenizerFast")'
        with pytest.raises(ValueError, match=message) as raised:
            tokenizer_beside(folder, "none")
        lines = re.search(message, str(raised.value)).group(1)
        change(folder / "tokenizer_config.json", **json.loads(f"{{{lines}}}"))
    assert_same(LiveTeacher.load(folder).model, version, "llama")
    assert tokenizer_beside(folder, "none")(TEXTS, padding=True)["input_ids"] == expected(version, "tokens").tolist()


def test_a_tokenizer_that_is_there_and_broken_is_refused_and_one_that_is_not_is_none(tmp_path):
    folder = foreign(VERSIONS[0], tmp_path / "foreign")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))} does not load as a tokenizer"):
        tokenizer_beside(folder, "none")
    for file in [*folder.glob("*token*"), folder / "chat_template.jinja"]:
        file.unlink()
    assert tokenizer_beside(folder, "none") is None


@pytest.mark.parametrize(
    ("model_type", "parameters"),
    [
        ("gemma3_text", {"rope_theta": 10000.0, "rope_type": "default"}),
        ("llama", {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}),
        ("llama", {"rope_theta": 1e6, "rope_type": "longrope"}),
        ("llama", {"rope_theta": 1e6, "rope_type": "of tomorrow"}),
    ],
)
def test_what_4_57_has_no_words_for_is_not_written_and_refused_there(model_type, parameters):
    assert fields_of_4_57(model_type, parameters) is None
    if not ROPE_LIVES_IN_ONE_DICT:
        config = LlamaConfig(rope_parameters=parameters)
        config.model_type = model_type
        with pytest.raises(ValueError, match=r"Use it where transformers 5 is installed\.$"):
            check_rope_is_read(config)


def test_a_length_where_4_57_does_not_look_is_refused_there():
    """Its longrope asks the config itself, and would take `max_position_embeddings` for the length before scaling."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0}
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 16, **factors}
    fields = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(rope_scaling=scaling, **fields)
    if ROPE_LIVES_IN_ONE_DICT:
        check_rope_is_read(config)
    else:
        with pytest.raises(ValueError, match='add "original_max_position_embeddings": 16 to its config.json'):
            check_rope_is_read(config)
    check_rope_is_read(LlamaConfig(rope_scaling=scaling, original_max_position_embeddings=16, **fields))


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_teach_saves_for_both_versions(kind, tmp_path):
    """`quickstart` saves by the same function."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"source": f"Two dogs {i}", "target": "a line"}) + "\n" for i in range(12)))
    base, out = TEACHERS / VERSIONS[0] / "whole", tmp_path / "taught"
    command = ["teach", str(base), "--dataset", str(rows), "--prompt-template", "{source} sum", "--output", str(out)]
    command += ["--max-steps", "1", "--report-to", "none", *(["--adapter"] if kind == "adapter" else [])]
    assert main(command) == 0
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (
        AutoTokenizer.from_pretrained(out)(TEXTS)["input_ids"]
        == AutoTokenizer.from_pretrained(base)(TEXTS)["input_ids"]
    )
    if kind == "merged":
        assert json.loads((out / "config.json").read_text())["rope_theta"] == 300.0
    else:
        assert not (out / "config.json").exists()
