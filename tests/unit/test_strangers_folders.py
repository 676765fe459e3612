"""Folders that somebody else made: none of their code runs, and none of their names reaches a file elsewhere."""

import json
import shutil

import datasets
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


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_nobody_is_asked_whether_code_may_run(folder, tmp_path, capsys, monkeypatch, file):
    """Nor is a "y" taken that stands on the input for something else."""
    mark = tmp_path / "ran"
    (folder / "student" / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n\n\nclass Evil:\n    pass\n")
    content = json.loads((folder / "student" / file).read_text())
    if file == "config.json":
        content |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Evil"}}
    else:
        content |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (folder / "student" / file).write_text(json.dumps(content))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    run(*COMMANDS["generate"](folder))
    assert not mark.exists() and not asked
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("field", ["vocab_file", "merges_file", "tokenizer_file"])
@pytest.mark.parametrize("command", ["generate", "init"])
def test_a_tokenizer_reads_no_file_elsewhere(folder, tmp_path, capsys, command, field):
    secret = tmp_path / "key"
    secret.write_text(SECRET)
    for model in ("teacher", "student"):
        file = folder / model / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), field: str(secret)}))
    assert run(*COMMANDS[command](folder)) == 2
    assert f"has {field}={str(secret)!r}, expected a file of that folder" in capsys.readouterr().err.splitlines()[-1]
    for model in ("teacher", "student"):  # one that is not there is a place of whoever saved it
        file = folder / model / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), field: "/home/somebody/tokenizer.model"}))
    if field != "tokenizer_file":
        assert run(*COMMANDS[command](folder)) == 0


def test_data_may_be_a_link(folder, tmp_path):
    (tmp_path / "data").mkdir()
    (folder / "pairs.csv").rename(tmp_path / "elsewhere.csv")
    (tmp_path / "data" / "train.csv").symlink_to(tmp_path / "elsewhere.csv")
    words = ["evaluate", folder / "student", "--rows", 2, "--dataset", tmp_path / "data", "--source-column", "text"]
    assert run(*words, "--target-column", "short") == 0


@pytest.mark.parametrize("kind", ["card", "saved"])
def test_data_do_not_reach_out_of_their_folder(folder, tmp_path, capsys, kind):
    rows = datasets.Dataset.from_list([{"text": f"red {row}", "short": SECRET} for row in range(20)])
    rows.to_csv(tmp_path / "private.csv")
    rows.save_to_disk(tmp_path / "private")
    data = tmp_path / "data"
    if kind == "card":
        data.mkdir()
        files = [{"split": "train", "path": "../private.csv"}]
        (data / "README.md").write_text(
            f"---\nconfigs: {json.dumps([{'config_name': 'default', 'data_files': files}])}\n---\n"
        )
    else:
        rows.save_to_disk(data)
        (outside,) = (file.name for file in (tmp_path / "private").glob("*.arrow"))
        state = json.loads((data / "state.json").read_text())
        state["_data_files"] = [{"filename": f"../private/{outside}"}]
        (data / "state.json").write_text(json.dumps(state))
    words = ["evaluate", folder / "student", "--rows", 2, "--dataset", data, "--source-column", "text"]
    assert run(*words, "--target-column", "short") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "private" in error and "that folder" in error


def test_a_generation_config_that_asks_for_more_than_tokens(folder, capsys):
    file = folder / "student" / "generation_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "return_dict_in_generate": True}))
    assert run(*COMMANDS["generate"](folder)) == 0
    assert run(*COMMANDS["evaluate"](folder)) == 0
    for field, value in (("decoder_start_token_id", -1), ("decoder_start_token_id", 5000), ("eos_token_id", "x")):
        file.write_text(json.dumps({**content, field: value}))
        assert run(*COMMANDS["generate"](folder)) == 2
        assert repr(value) in capsys.readouterr().err.splitlines()[-1]
