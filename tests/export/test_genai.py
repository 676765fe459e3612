"""ONNX Runtime GenAI's own way to an answer, as an app goes it: tokenizer, generator, loop. Every option of the
architecture is in `test_targets.py`, the proof in `test_parity.py`."""

import hashlib
import json
import logging

import pytest
import torch
from architectures import LLAMA_3
from tokenizer_toys import wordpiece
from toys import make_model, random_ids

from hf_encdec_distill.cli.serve import BadRequest, Service, parse
from hf_encdec_distill.export import genai as genai_target
from hf_encdec_distill.export.exporting import export_model
from hf_encdec_distill.export.genai import TOKENIZER
from hf_encdec_distill.export.graphs import threads
from hf_encdec_distill.export.recipe import Shapes
from hf_encdec_distill.export.runtime import ExportedForConditionalGeneration
from hf_encdec_distill.models.prompts import prompt_start_token_id, student_tokenizer


og = pytest.importorskip("onnxruntime_genai", reason="no wheel for Python 3.10")

TOKENS = 24
SMALLEST = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
TOYS = {
    "as of Llama, causal": {"encoder_num_hidden_layers": 1, "encoder_attention": "causal", "rope_parameters": LLAMA_3},
    "as of Qwen2, bidirectional": {
        "encoder_num_hidden_layers": 1,
        "attention_bias": "qkv",
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
    "as of Qwen3, states of other layers": {"qk_norm": True, "cross_attention_layers": [2, 0], "head_dim": 16},
}


def exported(folder, tokenizer=None, **options):
    torch.manual_seed(0)
    model = make_model("merged", **options)
    model.generation_config.eos_token_id = None
    export_model(model, tokenizer, "genai", folder)
    return model


def answer(genai, ids, tokens=TOKENS):
    """What an app does with the ids of a prompt and the start token behind them."""
    settings = og.GeneratorParams(genai)
    settings.set_search_options(max_length=len(ids) + tokens)
    generator = og.Generator(genai, settings)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0)[len(ids) :].tolist()


def expected(model, ids, tokens=TOKENS):
    return model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0, 1:].tolist()


def test_no_thread_spins_when_its_work_is_done(tmp_path, monkeypatch):
    overlays = []

    class Config(og.Config):
        def overlay(self, text):
            overlays.append(json.loads(text))
            super().overlay(text)

    monkeypatch.setattr(og, "Config", Config)
    exported(tmp_path / "exported", **SMALLEST)
    ExportedForConditionalGeneration.from_pretrained(tmp_path / "exported")
    (session,) = (overlay["model"]["decoder"]["session_options"] for overlay in overlays)
    assert session["session.intra_op.allow_spinning"] == "0" and session["intra_op_num_threads"] == threads()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"session_options": {"custom_ops_library": "evil.so"}}, "session_options"),
        ({"session_options": {"enable_profiling": "/tmp/written"}}, "session_options"),
        ({"session_options": {"provider_options": [{"custom": {"library_path": "evil.so"}}]}}, "session_options"),
        ({"extension_library": "evil.so"}, "extension_library"),
        ({"pipeline": [{"prompt": {"filename": "../prompt_model.onnx"}}]}, "prompt"),
        ({"pipeline": [{"decoder": {"filename": "decoder_model.onnx", "session_options": {}}}]}, "decoder"),
    ],
)
def test_a_config_of_a_stranger_loads_and_writes_nothing(changed, message, tmp_path):
    """GenAI does what its own config says, libraries of native code included."""
    exported(tmp_path / "exported", **SMALLEST)
    file = tmp_path / "exported" / "genai_config.json"
    content = json.loads(file.read_text())
    content["model"]["decoder"] |= changed
    file.write_text(json.dumps(content))
    manifest = json.loads((tmp_path / "exported" / "exported.json").read_text())
    manifest["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "exported" / "exported.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"has a {message} that no export writes"):
        ExportedForConditionalGeneration.from_pretrained(tmp_path / "exported")


@pytest.mark.parametrize("options", TOYS.values(), ids=TOYS)
def test_greedy_answers_are_those_of_pytorch(options, tmp_path):
    """Prompts of any length on one loaded model, down to one token; then one that ends early."""
    model = exported(tmp_path / "exported", **options)
    genai = og.Model(str(tmp_path / "exported"))
    start = model.config.decoder_start_token_id
    prompts = [random_ids(length).tolist() for length in (7, 1, 2, 30, 7)]
    answers = [answer(genai, [*prompt, start]) for prompt in prompts]
    assert answers == [expected(model, prompt) for prompt in prompts]
    assert all(len(one) == TOKENS for one in answers) and len({tuple(one) for one in answers}) == len(answers)


def test_an_answer_ends_at_any_end_of_sequence(tmp_path):
    model = exported(tmp_path / "endless", **SMALLEST)
    prompt, start = random_ids(6).tolist(), model.config.decoder_start_token_id
    whole = expected(model, prompt)
    end = next(i for i in range(3, TOKENS) if whole[i] not in whole[:i])
    model.generation_config.eos_token_id = [whole[end], model.config.vocab_size - 1]
    export_model(model, None, "genai", tmp_path / "exported")
    ended = expected(model, prompt)
    assert ended == whole[: end + 1]
    assert answer(og.Model(str(tmp_path / "exported")), [*prompt, start]) == ended[:-1]  # without what ended it


@pytest.mark.parametrize("bos", [True, False])
def test_from_text_to_text(bos, make_bpe_tokenizer, tmp_path):
    """GenAI's tokenizer makes the student's prompt of a text, with the start token; the head has more rows than the
    tokenizer has tokens."""
    teachers = make_bpe_tokenizer(add_bos=bos)
    tokenizer, start = student_tokenizer(teachers), prompt_start_token_id(teachers)
    options = {"vocab_size": len(tokenizer) + 23, "decoder_start_token_id": start, **SMALLEST}
    model = exported(tmp_path / "exported", tokenizer, **options)
    genai = og.Model(str(tmp_path / "exported"))
    reader = og.Tokenizer(genai)
    for text in ("def add(a, b): return a + b", "a", 'Zoé says "hi"\n\tand {{ leaves }}'):
        ids = reader.encode(reader.apply_chat_template(json.dumps([{"role": "user", "content": text}]))).tolist()
        prompt = tokenizer(text)["input_ids"]
        assert ids == [*prompt, start]
        assert answer(genai, ids, 6) == expected(model, prompt, 6)
    assert reader.decode(reader.encode("def add(a, b)")) == "def add(a, b)"


def test_a_tokenizer_that_genai_does_not_read(tmp_path, caplog):
    """The graphs are there all the same."""
    tokenizer = student_tokenizer(wordpiece())
    with caplog.at_level(logging.WARNING):
        model = exported(tmp_path / "exported", tokenizer, vocab_size=len(tokenizer), **SMALLEST)
    assert "cannot make this student's prompts from text" in caplog.text and "token ids" in caplog.text
    assert not (tmp_path / "exported" / TOKENIZER).exists()
    prompt = tokenizer("The quick brown fox")["input_ids"]
    genai = og.Model(str(tmp_path / "exported"))
    assert answer(genai, [*prompt, model.config.decoder_start_token_id], 6) == expected(model, prompt, 6)


def test_a_tokenizer_that_ends_the_process(make_bpe_tokenizer, tmp_path, caplog, monkeypatch):
    """GenAI's is asked in a process of its own."""
    monkeypatch.setattr(genai_target, "_READ_PROBES", "import os\nos.abort()")
    with caplog.at_level(logging.WARNING):
        exported(tmp_path / "exported", make_bpe_tokenizer(), vocab_size=300, **SMALLEST)
    assert "its process ended with exit code" in caplog.text and not (tmp_path / "exported" / TOKENIZER).exists()


@pytest.mark.process
def test_the_current_folders_python_files_are_not_asked(make_bpe_tokenizer, tmp_path, caplog, monkeypatch):
    (tmp_path / "json.py").write_text("raise ImportError('not for you')")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        exported(tmp_path / "exported", make_bpe_tokenizer(), vocab_size=300, **SMALLEST)
    assert not caplog.text and (tmp_path / "exported" / TOKENIZER).is_dir()


def test_both_graphs_read_one_file_of_weights(tmp_path):
    model = exported(tmp_path / "exported", vocab_size=4096)
    parameters = sum(p.numel() for p in model.parameters()) * 4
    assert (tmp_path / "exported" / "model.onnx_data").stat().st_size < 1.05 * parameters


def test_a_cache_has_so_many_slots(tmp_path, monkeypatch, make_bpe_tokenizer):
    """An error where they end, not a wrong answer; a server says that the answer is cut."""
    from hf_encdec_distill.export import genai

    exported(tmp_path / "exported", max_position_embeddings=12, vocab_size=300, **SMALLEST)
    model = ExportedForConditionalGeneration.from_pretrained(tmp_path / "exported")
    assert model.generate(random_ids(1, 6), max_new_tokens=6, do_sample=False).shape == (1, 7)
    with pytest.raises(ValueError, match="6 prompt tokens and 7 target tokens: this export takes .* 12 tokens in all"):
        model.generate(random_ids(1, 6), max_new_tokens=7, do_sample=False)
    service = Service("toy", model, make_bpe_tokenizer(), 9)
    asked = parse("/v1/completions", {"prompt": "x"}, 9)
    *_, (_, count, reason) = service.answer(random_ids(1, 6)[0].tolist(), asked)
    assert (count, reason) == (6, "length")
    with pytest.raises(ValueError, match="0 prompt tokens"):
        model(random_ids(1, 3), torch.zeros(1, 3), decoder_input_ids=random_ids(1, 1))
    monkeypatch.setattr(genai, "_ANSWER", 2)
    with pytest.raises(ValueError, match="6 prompt tokens and 3 target tokens: .* 2 of a target"):
        model.generate(random_ids(1, 6), max_new_tokens=3, do_sample=False)
    *_, (_, count, reason) = service.answer(random_ids(1, 6)[0].tolist(), asked)
    assert (count, reason) == (2, "length")
    model.graphs.longest = 3  # which leaves out how far a scaled RoPE reaches
    with pytest.raises(BadRequest, match="the prompt has 3 tokens, which leave no place for an answer"):
        service.read("!!!")


@pytest.mark.parametrize(
    "toy,options,message",
    [
        ({"kind": "separate"}, {}, "cross_attention='separate': genai runs .* choose onnx, openvino or coreml"),
        ({"head_dim": 12}, {}, "head_dim=12: .* multiples of 8"),
        ({}, {"shapes": Shapes.parse("fixed:8,8")}, "shapes fixed:8,8: genai takes dynamic"),
        ({}, {"shapes": Shapes.parse("ranged:8,8")}, "genai takes dynamic"),
        ({}, {"stateful": True}, "leave stateful out"),
        ({}, {"variant": "palette4"}, "variant 'palette4' is for coreml, not for genai"),
        ({}, {"kv_cache_precision": "u8"}, "a KV-cache precision is for target openvino, not for genai"),
        *(
            (
                {
                    "rope_parameters": {
                        "rope_type": rope,
                        "factor": 2.0,
                        "short_factor": [1.0] * 4,
                        "long_factor": [2.0] * 4,
                        "original_max_position_embeddings": 8,
                    }
                },
                {},
                f"rope_type='{rope}' chooses its frequencies .* choose onnx or openvino",
            )
            for rope in ("dynamic", "longrope")
        ),
    ],
)
def test_what_genai_does_not_take(toy, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_model(make_model(**{"kind": "merged", **SMALLEST, **toy}), None, "genai", tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())
