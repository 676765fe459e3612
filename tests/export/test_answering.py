"""Greedy answers of an exported folder without transformers, against those with it; and what falls back to it."""

import json
import os
import shutil
import string
import subprocess
import sys

import pytest
import torch
from tokenizer_toys import TEXTS, unigram
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from toys import make_model, random_ids
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_encdec_distill.cli.main import main
from hf_encdec_distill.export import answering
from hf_encdec_distill.export.answering import ExportedStudent, NeedsTransformers
from hf_encdec_distill.export.exporting import export_model
from hf_encdec_distill.export.graphs import threads
from hf_encdec_distill.export.recipe import Shapes
from hf_encdec_distill.export.runtime import ExportedForConditionalGeneration
from hf_encdec_distill.models.prompts import student_tokenizer


TEMPLATE = "Fix this: {source} Now say it: "
START, TOKENS = 5, 12  # no special token: it is a part of the answer's text


@pytest.fixture(scope="module", params=[("onnx", "dynamic"), ("onnx", "fixed:60,12"), ("openvino", "dynamic")])
def exported(request, tmp_path_factory):
    """The folder of an export whose tokenizer has a prompt template, and whose answers end now and then."""
    return make_export(tmp_path_factory.mktemp("answering") / "exported", *request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("answering") / "exported", "onnx", "dynamic")


def letters():
    """As BERT's, and the same in every process, which a trained one is not."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]", "bos_token": "[CLS]"}
    pieces = [
        *special.values(),
        *string.ascii_lowercase,
        *(f"##{letter}" for letter in string.ascii_lowercase),
        *".:!",
    ]
    tokenizer = Tokenizer(models.WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_export(folder, target, shapes):
    torch.manual_seed(0)
    tokenizer = student_tokenizer(letters(), TEMPLATE, cross_attention="merged")
    options = {"decoder_start_token_id": START, "eos_token_id": None}
    model = make_model("merged", vocab_size=len(tokenizer), encoder_num_hidden_layers=1, **options)
    model.generation_config.eos_token_id = None
    export_model(model, tokenizer, target, folder, shapes=Shapes.parse(shapes))
    return folder


def write(folder, name, **changed):
    """`folder / name` with other fields; those that are None go."""
    content = {**json.loads((folder / name).read_text()), **changed}
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def with_transformers(folder, text, tokens=TOKENS, **options):
    """Its answer, ids and text, as docs/export.md loads a folder."""
    model = ExportedForConditionalGeneration.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)[0]
    return found.tolist(), tokenizer.decode(found[1:], skip_special_tokens=True).strip()


def test_the_same_answers(exported, tmp_path):
    """With no end, and with several, of which some are special tokens and some are words; ends of different length."""
    folder = shutil.copytree(exported, tmp_path / "exported")
    texts = [*TEXTS[:4], "a", ""]
    free = [with_transformers(folder, text)[0] for text in texts]
    assert len({tuple(answer) for answer in free}) > 2
    lengths = set()
    for ends in (None, free[0][3], [free[1][2], free[2][5]]):
        write(folder, "generation_config.json", eos_token_id=ends)
        student = ExportedStudent(folder)
        for text in texts:
            ids, answer = with_transformers(folder, text)
            assert student.encode(text) == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
            assert list(student.generate(student.encode(text), TOKENS)) == ids[1:]
            assert student.answer(text, TOKENS) == answer
            lengths.add(len(ids))
    assert len(lengths) > 2


def test_tokens_come_one_by_one(folder, monkeypatch):
    student = ExportedStudent(folder)
    calls = []
    decode = student._graphs.decode
    monkeypatch.setattr(student._graphs, "decode", lambda *args: calls.append(1) or decode(*args))
    answer = student.generate([7, 8], 5)
    next(answer)
    next(answer)
    assert len(calls) == 2


def test_what_it_does_not_take(folder, tmp_path):
    with pytest.raises(ValueError, match="a prompt of 0 tokens"):
        next(ExportedStudent(folder).generate([], 3))
    fixed = make_export(tmp_path / "fixed", "onnx", "fixed:9,4")
    student = ExportedStudent(fixed)
    with pytest.raises(ValueError, match="a prompt of 10 tokens: this export .* takes at most 9"):
        next(student.generate(random_ids(10).tolist(), 3))
    with pytest.raises(ValueError, match="5 target tokens: this export .* has 4 slots"):
        list(student.generate([7, 8], 5))
    content = bytearray((fixed / "decoder_model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (fixed / "decoder_model.onnx").write_bytes(content)
    with pytest.raises(ValueError, match="decoder_model.onnx is changed after the export") as error:
        ExportedStudent(fixed)
    assert not isinstance(error.value, NeedsTransformers)


# What a generation config may ask for, given the answer without it.
MORE_THAN_GREEDY = {
    "repetition_penalty": lambda answer: {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": lambda answer: {"no_repeat_ngram_size": 1},
    "suppress_tokens": lambda answer: {"suppress_tokens": [answer[1]]},
    "forced_eos_token_id": lambda answer: {"forced_eos_token_id": min({6, 7} - {answer[-1]})},
    "min_new_tokens": lambda answer: {"min_new_tokens": 3, "eos_token_id": answer[1]},
}


@pytest.mark.parametrize("name", MORE_THAN_GREEDY)
def test_more_than_greedy_search_is_left_to_transformers(name, folder, tmp_path, capsys):
    """The command's answer is that of transformers, which is another one than without the setting."""
    answer, text = with_transformers(folder, TEXTS[0])
    folder = shutil.copytree(folder, tmp_path / "exported")
    write(folder, "generation_config.json", **MORE_THAN_GREEDY[name](answer))
    with pytest.raises(NeedsTransformers, match=f"asks for {name}"):
        ExportedStudent(folder)
    expected = with_transformers(folder, TEXTS[0])[1]
    assert expected != text
    assert main(["generate", str(folder), TEXTS[0], "--max-new-tokens", str(TOKENS)]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("generation_config.json", {"do_sample": True}),
        ("generation_config.json", {"num_beams": 4}),
        ("generation_config.json", {"min_length": 3}),
        ("generation_config.json", {"forced_bos_token_id": 0}),
        ("generation_config.json", {"a_setting_of_tomorrow": 1}),
        ("generation_config.json", {"decoder_start_token_id": None}),
        ("config.json", {"num_beams": 4}),
        ("config.json", {"head_dim": None}),
        ("config.json", {"model_type": "t5"}),
        ("tokenizer_config.json", {"clean_up_tokenization_spaces": True}),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizerFast"}),
        ("tokenizer_config.json", {"split_special_tokens": True}),
        ("tokenizer_config.json", {"add_prefix_space": True}),
        ("tokenizer_config.json", {"add_bos_token": True}),
        ("tokenizer_config.json", {"eos_token": "<a new one>"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "the", "special": True}}}),
    ],
    ids=str,
)
def test_what_is_not_plain_is_seen(file, changed, folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "exported")
    ExportedStudent(folder)
    write(folder, file, **changed)
    with pytest.raises(NeedsTransformers):
        ExportedStudent(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_what_is_missing_or_torn_is_left_to_transformers(name, content, folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "exported")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(NeedsTransformers, match=name):
        ExportedStudent(folder)


def test_the_text_of_another_tokenizer(tmp_path):
    """Whose decoder begins with a blank, as T5's, and whose start token is special."""
    tokenizer = student_tokenizer(unigram(), cross_attention="separate")
    options = {"decoder_start_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = make_model("separate", vocab_size=len(tokenizer), encoder_num_hidden_layers=1, **options)
    folder = export_model(model, tokenizer, "onnx", tmp_path / "exported")
    student = ExportedStudent(folder)
    for text in TEXTS[:5]:
        assert student.answer(text, TOKENS) == with_transformers(folder, text)[1]


@pytest.mark.parametrize(("tokens", "code"), [("6", 0), ("500", 2)], ids=["answers", "is too long"])
def test_the_command_says_the_same_with_and_without(tokens, code, folder, capsys, monkeypatch):
    def said():
        assert main(["generate", str(folder), *TEXTS[:3], "--max-new-tokens", tokens, "--json"]) == code
        out, err = capsys.readouterr()
        return out, err.splitlines()[-1] if code else None

    def refuse(folder):
        raise NeedsTransformers(folder)

    without = said()
    monkeypatch.setattr(answering, "ExportedStudent", refuse)
    assert said() == without


def in_a_fresh_process(program, **environment):
    """What it prints, as JSON."""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.process
@pytest.mark.parametrize(
    ("target", "runtime"),
    [("onnx", "onnxruntime"), ("openvino", "openvino"), ("genai", "onnxruntime_genai"), ("gguf", "llama_cpp")],
)
def test_the_command_loads_neither_torch_nor_transformers(target, runtime, tmp_path):
    folder = make_export(tmp_path / "exported", target, "dynamic")
    program = f"""
import io, json, sys
from hf_encdec_distill.cli.main import main
printed, stdout = io.StringIO(), sys.stdout
sys.stdout = printed
code = main(["generate", {str(folder)!r}, "a b", "--max-new-tokens", "4"])
sys.stdout = stdout
print(json.dumps([code, printed.getvalue(), [name.partition(".")[0] for name in sys.modules]]))
"""
    code, printed, modules = in_a_fresh_process(program)
    assert code == 0 and printed == f"{with_transformers(folder, 'a b', 4)[1]}\n"
    assert runtime in modules and not {"torch", "transformers", "huggingface_hub"} & set(modules)


@pytest.mark.process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads where Linux lists them")
@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_threads_as_were_asked_for(threads, folder):
    """Each of the two graphs has as many, of which one is the caller's own."""
    program = f"""
import json, os
import numpy, onnxruntime
from hf_encdec_distill.export.answering import ExportedStudent
before = len(os.listdir("/proc/self/task"))
student = ExportedStudent({str(folder)!r})
student.answer("a b", 4)
print(json.dumps(len(os.listdir("/proc/self/task")) - before))
"""
    assert in_a_fresh_process(program, OMP_NUM_THREADS=str(threads)) == 2 * (threads - 1)


def test_no_thread_spins_when_its_work_is_done(folder):
    for session in ExportedStudent(folder)._graphs.sessions.values():
        options = session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_threads_without_torch_are_as_many_as_with_it(monkeypatch):
    assert threads() == torch.get_num_threads()
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    assert threads() == 5
    for odd in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", odd)
        assert 1 <= threads() <= (os.cpu_count() or 1)
