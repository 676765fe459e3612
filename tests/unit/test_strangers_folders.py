"""Folders that somebody else made: none of their code runs, and none of their names reaches a file elsewhere."""

import json
import shutil

import pytest
from distillation_toys import TEMPLATE, write_pairs, write_teacher

from hf_encdec_distill.cli.main import main


SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_bpe_tokenizer):
    """With `teacher`, `student`, `adapter` on that teacher, and `pairs.csv`."""
    folder = tmp_path_factory.mktemp("made")
    write_teacher(folder / "teacher", make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>"), layers=2)
    write_pairs(folder / "pairs.csv", 60)
    shape = ["--encoder-layers", "2", "--decoder-layers", "2"]
    assert run("init", folder / "teacher", *data(folder), *shape, "--output", folder / "student") == 0
    return folder


def data(folder):
    columns = ["--source-column", "text", "--target-column", "short", "--prompt-template", TEMPLATE]
    return ["--dataset", folder / "pairs.csv", *columns]


def run(*words):
    return main([str(word) for word in words])


COMMANDS = {
    "generate": lambda f: ["generate", f / "student", "red 1 blue", "--max-new-tokens", 2],
    "init": lambda f: ["init", f / "teacher", *data(f), "--encoder-layers", 2, "--output", f / "out"],
    "cache": lambda f: ["cache", f / "teacher", *data(f), "--splits", "validation", "--output", f / "out"],
    "evaluate": lambda f: ["evaluate", f / "student", "--teacher", f / "teacher", *data(f)[:-2], "--rows", 2],
    "distill": lambda f: [
        *("distill", f / "student", "--teacher", f / "teacher", *data(f), "--output", f / "out"),
        *("--max-steps", 1, "--use-cpu", "--report-to", "none"),
    ],
}


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("command", COMMANDS)
def test_code_that_would_replace_generate_does_not_run(folder, tmp_path, command):
    """transformers 4.57 runs it out of a folder that is not of the Hub without being told to trust it."""
    mark = tmp_path / "ran"
    for model in ("teacher", "student"):
        (folder / model / "custom_generate").mkdir()
        code = f"open({str(mark)!r}, 'w')\n\n\ndef generate(model, **kwargs):\n    raise SystemExit(99)\n"
        (folder / model / "custom_generate" / "generate.py").write_text(code)
    assert run(*COMMANDS[command](folder)) == 0
    assert not mark.exists()


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("command", ["init", "cache", "distill"])
def test_no_text_of_another_place_comes_into_what_is_made(folder, tmp_path, capsys, command, name):
    """A chat template may be any text: a tokenizer that is saved takes it along."""
    secret = tmp_path / "key"
    secret.write_text(SECRET)
    (folder / "teacher" / name).unlink(missing_ok=True)
    (folder / "teacher" / name).symlink_to(secret)
    assert run(*COMMANDS[command](folder)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert name in error and "leads out of the folder" in error
    made_here = (folder / "out").rglob("*") if (folder / "out").exists() else ()
    assert not [file for file in made_here if file.is_file() and SECRET.encode() in file.read_bytes()]


def test_weights_may_be_a_link_but_are_not_exported_then(folder, tmp_path, capsys):
    """Weights lie on another disk in many places; what is read from there is made public by an export alone."""
    weights = folder / "student" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    assert run(*COMMANDS["generate"](folder)) == 0
    export = ["export", folder / "student", tmp_path / "exported", "--target", "onnx", *data(folder)[:-2]]
    assert run(*export) == 2
    assert "leads out of the folder" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("shard", ["../key", "/etc/passwd", "sub/../../key"])
@pytest.mark.parametrize("command", ["generate", "init"])
def test_an_index_does_not_reach_out_of_its_folder(folder, capsys, command, shard):
    for model in ("teacher", "student"):
        (folder / model / "model.safetensors").rename(folder / "key")
        index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
        (folder / model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run(*COMMANDS[command](folder)) == 2
    assert repr(shard) in capsys.readouterr().err.splitlines()[-1]
