"""`push`: what goes up, in one commit, and what a Hub that fails leaves behind."""

import hashlib
import json
import re
import shutil
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from server import TOKEN, LargeFile

from hf_encdec_distill.cards import write_model_card
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.export.exporting import write_manifest
from hf_encdec_distill.export.recipe import Shapes


FROZEN = Path(__file__).parent / "frozen" / "0.1" / "merged"
STUDENT = {
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "configuration_rope_encdec.py",
    "modeling_rope_encdec.py",
    "compat_rope_encdec.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
}
RECORDS = {"README.md", "loss.png", "recipe.yaml", "provenance.json"}
EXPORT = {"model.onnx", "model.onnx_data", "config.json", "exported.json", "parity.json"}
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# A student

![Loss](loss.png) ![Elsewhere](https://example.com/picture.png)
"""


@pytest.fixture
def folder(tmp_path):
    """A student as a run leaves it, with what does not belong on the Hub beside it."""
    folder = tmp_path / "student"
    shutil.copytree(FROZEN, folder)
    (folder / "README.md").write_text(CARD)
    (folder / "loss.png").write_bytes(b"\x89PNG\0")
    for name in ("recipe.yaml", "provenance.json", "trainer_state.json", "state.json"):
        (folder / name).write_text("{}")
    for name in ("training_args.bin", "pytorch_model.bin", "optimizer.pt", "checkpoint-1/model.safetensors", "work/x"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x80\x04pickle")
    return folder


def write_export(folder, failures=()):
    """What `export` leaves, with graphs that no runtime has to read."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"\0graph")
    (folder / "model.onnx_data").write_bytes(b"\0weights" * 100)
    (folder / "config.json").write_text("{}")
    write_manifest(folder, "onnx", "int8", Shapes(), False, "float32")
    (folder / "parity.json").write_text(json.dumps({"failures": list(failures)}))
    (folder / "notes.txt").write_text("mine")


def push(*words):
    return main(["push", *map(str, words)])


def pushed(hub, revision="main"):
    oid, files = hub.repositories["models/ann/student"].at(revision)
    return oid, {name: content for name, content in files.items() if name != ".gitattributes"}


def one_error(capsys):
    output = capsys.readouterr()
    errors = [line for line in output.err.split("\n") if line.startswith("hf-encdec-distill")]
    assert len(errors) == 1 and "Traceback" not in output.err and not output.out
    assert TOKEN not in output.err
    return errors[0]


def test_what_goes_up_and_what_stays(hub, folder, capsys):
    write_export(folder / "onnx")
    write_export(folder / "onnx_int8")
    write_export(folder / "openvino.rejected", ["greedy answers"])
    assert push(folder, "ann/student", "--private", "--commit-message", "First", "--json") == 0
    output = capsys.readouterr()
    oid, files = pushed(hub)
    exports = {f"{export}/{name}" for export in ("onnx", "onnx_int8") for name in EXPORT}
    assert set(files) == STUDENT | RECORDS | exports
    for name, content in files.items():
        assert content == (folder / name).read_bytes(), name
    assert {name for name, content in files.items() if isinstance(content, LargeFile)} == {
        "model.safetensors",
        "loss.png",
        *(f"{export}/{name}" for export in ("onnx", "onnx_int8") for name in ("model.onnx", "model.onnx_data")),
    }
    repository = hub.repositories["models/ann/student"]
    assert repository.private and list(repository.messages.values()) == ["initial commit", "First"]
    said = json.loads(output.out)
    assert said["commit"] == oid and said["url"] == f"{hub.url}/ann/student/commit/{oid}"
    assert {file["path"]: file["bytes"] for file in said["files"]} == {n: len(c) for n, c in files.items()}
    assert {"training_args.bin", "checkpoint-1/", "openvino.rejected/", "work/"} <= set(said["left_out"])
    assert TOKEN not in output.out + output.err


def test_the_card_names_the_repository_and_the_exports_that_go(hub, folder, capsys):
    """On the Hub, its lines load what is there; the file here stays as it is."""
    report = {
        "target": "onnx",
        "variant": "int8",
        "shapes_taken": "dynamic",
        "megabytes": {"exported": 1.0},
        "logits": 0.0,
        "tokens": {"greedy": 1.0},
        "ce": {"exported": 3.0, "pytorch": 3.0},
        "rows": 2,
        "failures": [],
    }
    card = write_model_card(folder, {})
    before = card.read_text()
    for name in ("onnx", "onnx_int8"):
        write_export(folder / name)
        (folder / name / "parity.json").write_text(json.dumps(report))
    assert 'from_pretrained("student")' in before
    assert push(folder, "ann/student", "--include", "onnx_int8") == 0
    text = pushed(hub)[1]["README.md"].decode()
    assert 'from_pretrained("ann/student")' in text and '"student"' not in text
    assert 'snapshot_download("ann/student", allow_patterns="onnx_int8/*")' in text
    assert "| `onnx_int8` |" in text and "| `onnx` |" not in text
    assert card.read_text() == before
    card.write_text(before.replace("## Limits", "## Limits by hand").replace("<!-- How to load", "<!--"))
    assert push(folder, "ann/other") == 0
    assert hub.repositories["models/ann/other"].at("main")[1]["README.md"] == card.read_bytes()


def test_a_dry_run_lists_the_same_and_asks_nothing(hub, folder, capsys, monkeypatch):
    write_export(folder / "onnx")
    monkeypatch.delenv("HF_TOKEN")
    assert push(folder, "ann/student", "--dry-run", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert {file["path"] for file in said["files"]} == STUDENT | RECORDS | {f"onnx/{name}" for name in EXPORT}
    assert push(folder, "ann/student", "--dry-run", "--include") == 0
    page = capsys.readouterr().out
    assert "Nothing was sent." in page and "onnx/model.onnx" not in page
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size / 1e6:.3f}" in page.splitlines()[2]
    assert not hub.requests


def test_pictures_that_a_card_shows_in_other_ways(hub, folder, capsys):
    """With a title, with a blank in the name, as HTML; those that are in the card itself or on the web need no file,
    and what a card only spells out shows none."""
    shown = ["a.png", "b c.png", "d.png", "e.png", "f.png"]
    text = f"""{CARD}
![a](a.png "title") ![b](<b c.png> 'title') <img alt="d" src="d.png"> <IMG
 src='./e.png'/> [![f](f.png)](https://example.com)
![data](data:image/png;base64,iVBORw0KGgo=) <img src="https://example.com/no.png"> <img src="//example.com/no.png">
`![no](no.png)` <!-- <img src="no.png"> -->

```html
<img src="no.png">
```
"""
    (folder / "README.md").write_text(text)
    assert push(folder, "ann/student") == 2
    assert f"README.md shows {', '.join(['a.png', 'b c.png', 'f.png', 'd.png', 'e.png'])}, not in" in one_error(capsys)
    for name in shown:
        (folder / name).write_bytes(b"\x89PNG\0")
    assert push(folder, "ann/student") == 0
    assert set(pushed(hub)[1]) == STUDENT | RECORDS | set(shown)


def test_pictures_by_name_and_in_parentheses(hub, folder):
    shown = ["a.png", "b.png", "fig(1).png", "d.png", "light.png", "dark.png", "e.png"]
    for name in shown:
        (folder / name).write_bytes(b"\x89PNG\0")
    (folder / "README.md").write_text(f"""{CARD}
![of [two] words][A] ![b.png] ![c](fig(1).png) ![d](d.png?raw=true) \\![no](no.png) [no][other]
<picture><source media="(a > b)" srcset="dark.png 1x, dark.png 2x"><img alt='a>b' src=light.png
 srcset='e.png 2x'></picture>

[a]: a.png "title"
[b.png]: <b.png#part>
[other]: no.png
""")
    assert push(folder, "ann/student") == 0
    assert set(pushed(hub)[1]) == STUDENT | RECORDS | set(shown)


def test_code_of_the_tokenizer_goes_too(hub, folder, capsys):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "tokenization_mine.MineFast"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert push(folder, "ann/student") == 2
    assert "names tokenization_mine.py, not there" in one_error(capsys)
    (folder / "tokenization_mine.py").write_text("class MineFast: ...")
    assert push(folder, "ann/student") == 0
    assert set(pushed(hub)[1]) == STUDENT | RECORDS | {"tokenization_mine.py"}


def test_a_second_push_replaces_weights_and_exports(hub, folder, capsys):
    write_export(folder / "onnx")
    templates = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")
    for name in templates:  # of the earlier student alone: `AutoTokenizer` would read them beside any other
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{{ messages }}")
    assert push(folder, "ann/student") == 0
    first, files = pushed(hub)
    assert set(templates) < set(files)
    for name in templates:
        (folder / name).unlink()
    repository = hub.repositories["models/ann/student"]
    repository.commit("main", {**repository.at("main")[1], "notes/theirs.md": b"kept"}, "by hand")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "onnx")
    write_export(folder / "onnx_int8")
    assert push(folder, "ann/student") == 0
    shards = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    exports = {f"onnx_int8/{name}" for name in EXPORT}
    expected = (STUDENT - {"model.safetensors"}) | shards | RECORDS | exports | {"notes/theirs.md"}
    assert set(pushed(hub)[1]) == expected
    assert "model.safetensors" in pushed(hub, first)[1]  # what was pinned stays


def test_branches_and_pull_requests(hub, folder, capsys):
    assert push(folder, "ann/student") == 0
    main_before, _ = pushed(hub)
    (folder / "recipe.yaml").write_text("seed: 1\n")
    assert push(folder, "ann/student", "--create-pr") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/ann/student/discussions/1"
    assert push(folder, "ann/student", "--revision", "v2") == 0
    assert pushed(hub)[0] == main_before
    for revision in ("refs/pr/1", "v2"):
        assert pushed(hub, revision)[1]["recipe.yaml"] == b"seed: 1\n"
    (folder / "recipe.yaml").write_text("seed: 2\n")
    assert push(folder, "ann/student", "--revision", "refs/pr/1") == 0  # another commit to what is proposed
    assert pushed(hub, "refs/pr/1")[1]["recipe.yaml"] == b"seed: 2\n" and pushed(hub)[0] == main_before


def test_a_public_repository_does_not_become_private(hub, folder, capsys):
    assert push(folder, "ann/student") == 0
    before = pushed(hub)
    capsys.readouterr()
    assert push(folder, "ann/student", "--private") == 2
    assert "there already, and public" in one_error(capsys)
    assert pushed(hub) == before


def break_hash(folder):
    write_export(folder / "onnx")
    (folder / "onnx" / "model.onnx").write_bytes(b"\0graph of another")


def forget_the_weights(folder):
    write_export(folder / "onnx")
    manifest = json.loads((folder / "onnx" / "exported.json").read_text())
    del manifest["files"]["model.onnx_data"]
    (folder / "onnx" / "exported.json").write_text(json.dumps(manifest))


def break_parity(folder):
    write_export(folder / "onnx", ["greedy answers 12 %"])


def reject(folder):
    write_export(folder / "onnx")
    (folder / "onnx").rename(folder / "onnx.rejected")


@pytest.mark.parametrize(
    ("harm", "words", "message"),
    [
        (break_hash, [], r"onnx/model.onnx is changed after the export"),
        (forget_the_weights, [], r"exported.json has no hash of model.onnx_data"),
        (break_parity, ["--include", "onnx"], r"not equal to PyTorch within bounds: greedy answers 12 %"),
        (reject, ["--include", "onnx.rejected"], r"no parity.json that proves it"),
        (lambda folder: None, ["--include", "coreml"], r"holds no export"),
        (lambda folder: (folder / "model.safetensors").unlink(), [], r"no weights in safetensors"),
        (lambda folder: (folder / "modeling_rope_encdec.py").unlink(), [], r"names modeling_rope_encdec.py"),
        (lambda folder: (folder / "compat_rope_encdec.py").unlink(), [], r"No such file.*compat_rope_encdec.py"),
        (lambda folder: (folder / "loss.png").unlink(), [], r"shows loss.png"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), [], r"has no tokenizer"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), [], r"metadata of .* are not valid"),
    ],
)
def test_what_is_not_whole_is_refused(hub, folder, capsys, harm, words, message):
    harm(folder)
    assert push(folder, "ann/student", *words) == 2
    assert re.search(message, one_error(capsys))
    assert not hub.repositories


# What lies outside of the folder --------------------------------------------------------------------------------


SECRET = b"-----BEGIN OPENSSH PRIVATE KEY-----"


def name_in_index(name):
    def harm(folder, secret):
        (folder / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name(secret)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return harm


def name_in_auto_map(name):
    def harm(folder, secret):
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"]["AutoConfig"] = f"{name(secret)}.Config"
        (folder / "config.json").write_text(json.dumps(config))

    return harm


def name_in_an_import(folder, secret):
    with (folder / "modeling_rope_encdec.py").open("a") as code:
        code.write("\nfrom ./../elsewhere/key import x\n")


def name_in_the_card(folder, secret):
    (folder / "README.md").write_text(CARD.replace("loss.png", "../elsewhere/key.py"))


def name_in_an_export(folder, secret):
    write_export(folder / "onnx")
    manifest = json.loads((folder / "onnx" / "exported.json").read_text())
    manifest["files"]["../../elsewhere/key.py"] = hashlib.sha256(SECRET).hexdigest()
    (folder / "onnx" / "exported.json").write_text(json.dumps(manifest))


def link(name):
    def harm(folder, secret):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)

    return harm


def link_an_export(folder, secret):
    write_export(secret.parent / "onnx")
    (folder / "onnx").symlink_to(secret.parent / "onnx")


OUTSIDE = {
    "a shard above": name_in_index(lambda secret: "../elsewhere/key.py"),
    "a shard of the root": name_in_index(str),
    "a shard of Windows": name_in_index(lambda secret: "..\\elsewhere\\key.py"),
    "code of the root": name_in_auto_map(lambda secret: str(secret.with_suffix(""))),
    "code that code imports": name_in_an_import,
    "a figure": name_in_the_card,
    "a file of an export": name_in_an_export,
    "an export that is a link": link_an_export,
    **{
        f"a link for {name}": link(name)
        for name in (
            "README.md",
            "chat_template.jinja",
            "config.json",
            "model.safetensors",
            "modeling_rope_encdec.py",
            "recipe.yaml",
            "loss.png",
        )
    },
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_of_the_folder_goes_up(hub, folder, capsys, name):
    secret = folder.parent / "elsewhere" / "key.py"
    secret.parent.mkdir()
    secret.write_bytes(SECRET)
    OUTSIDE[name](folder, secret)
    for words in ([], ["--dry-run"]):
        assert push(folder, "ann/student", *words) == 2
        assert re.search("is named in|leads out of the folder", one_error(capsys))
    assert not hub.repositories and not hub.stored


def test_an_export_that_is_named_from_outside_is_refused(hub, folder, capsys):
    write_export(folder.parent / "onnx")
    assert push(folder, "ann/student", "--include", "../onnx") == 2
    assert "is named in" in one_error(capsys) and not hub.repositories


def test_a_snapshot_in_the_cache_of_the_hub_is_pushed(hub, folder, capsys):
    """Its files are links to the blobs of the same repository, and to nothing else."""
    repository = folder.parent / "models--ann--other"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    shutil.copytree(folder, blobs, dirs_exist_ok=True)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        if file.is_file():
            (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert push(snapshot, "ann/student") == 0
    assert set(pushed(hub)[1]) == STUDENT | RECORDS
    capsys.readouterr()
    secret = folder.parent / "key.py"
    secret.write_bytes(SECRET)
    (snapshot / "NOTICE").symlink_to(secret)
    assert push(snapshot, "ann/student") == 2
    assert "leads out of the folder" in one_error(capsys)


def test_metadata_that_the_hub_refuses_are_refused_before_any_file(hub, folder, capsys):
    (folder / "README.md").write_text("---\nlicense: [mit]\n---\n")
    assert push(folder, "ann/student") == 2
    assert '"license" must be a string' in one_error(capsys)
    assert not pushed(hub)[1] and not hub.stored


def test_no_token_no_network_no_hub(hub, folder, capsys, monkeypatch, forget_sessions):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "nowhere"))
    assert push(folder, "ann/student") == 2
    assert "no token to write to" in one_error(capsys)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(folder, "ann/student") == 2
    assert "was not uploaded to http://127.0.0.1:9" in one_error(capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_sessions()
    assert push(folder, "ann/student") == 2
    assert "offline mode is enabled" in one_error(capsys)
    assert not hub.requests


# Faults ------------------------------------------------------------------------------------------------------------

LFS, COMMIT, PREUPLOAD = "PUT /storage/", "POST .*/commit/", "POST .*/preupload/"
MENDED = {
    "an upload that fails": (LFS, {"status": 500}),
    "an upload that is cut": (LFS, {"cut": True}),
    "an upload that is throttled": (LFS, {"status": 503}),
}
FINAL = {
    "a commit that fails": (COMMIT, {"status": 500}, "500"),
    "a commit that is cut": (COMMIT, {"cut": True}, "was not uploaded to"),
    "too many requests": (COMMIT, {"status": 429, "retry_after": 1}, "429"),
    "content that changes on its way": (LFS, {"flipped": True}, "BadDigest"),
    "no space over there": (LFS, {"status": 507, "message": "Insufficient Storage"}, "507"),
    "a token that has expired": ("POST .*/objects/batch", {"status": 401, "message": "token has expired"}, "expired"),
    "a token that may only read": (PREUPLOAD, {"status": 403, "message": "read-only token"}, "read-only"),
}


@pytest.fixture
def second_push(hub, folder, capsys, monkeypatch):
    """A repository with a student, and another one that is to follow; waits between retries are none."""
    assert push(folder, "ann/student") == 0
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    (folder / "recipe.yaml").write_text("seed: 2\n")
    capsys.readouterr()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return folder


@pytest.mark.parametrize("name", MENDED)
def test_a_fault_that_passes_is_tried_again(hub, second_push, name):
    request, fault = MENDED[name]
    before = len(hub.requests)
    hub.fail(request, **fault)
    assert push(second_push, "ann/student") == 0
    tries = [asked for asked in hub.requests[before:] if asked.startswith("PUT /storage/")]
    assert len(tries) == 2
    _, files = pushed(hub)
    assert files["model.safetensors"] == (second_push / "model.safetensors").read_bytes()
    assert files["recipe.yaml"] == b"seed: 2\n"


@pytest.mark.parametrize("name", FINAL)
def test_a_fault_that_stays_leaves_the_branch_as_it_was(hub, second_push, capsys, name):
    request, fault, message = FINAL[name]
    before = pushed(hub)
    hub.fail(request, times=99, **fault)
    assert push(second_push, "ann/student") == 2
    assert message in one_error(capsys)
    assert pushed(hub) == before
    assert all(hashlib.sha256(content).hexdigest() == oid for oid, content in hub.stored.items())
    assert not [file for file in second_push.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
