"""A name that is no folder here is asked of the Hub once, and what comes of it is one line, quickly."""

import socket
import time

import pytest
from huggingface_hub import constants, file_download
from server import Repository

from hf_encdec_distill.cli.main import main
from hf_encdec_distill.models import loading
from hf_encdec_distill.models.loading import find, load_config, load_student, load_teacher, load_tokenizer


@pytest.fixture
def nothing_here(tmp_path, monkeypatch):
    """An empty folder to work in, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def refused(load, name) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        load(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def of_models(hub) -> list[str]:
    return [request for request in hub.requests if "/agent-harnesses" not in request]  # what 2.x asks once a process


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_teacher, load_student])
def test_a_typo_costs_one_request_and_says_that_there_is_no_such_folder(hub, nothing_here, load):
    name = "ann/studnet"
    said = refused(load, name)
    assert f"there is no folder {name}, and {hub.url} has no model of that name" in said
    assert of_models(hub) == [f"GET /api/models/{name}"]


def test_a_typo_on_the_command_line_is_one_line(hub, nothing_here, capsys):
    for argv in (
        ["info", "studnet"],
        ["generate", "studnet", "a text"],
        ["export", "studnet", "out", "--target", "onnx"],
    ):
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert "there is no folder studnet" in said and said.count("\n") == 1
    assert len(of_models(hub)) == 3


@pytest.mark.parametrize(
    "name", ["./student", "../student", "/runs/student", "runs/a/student", "~/student", "runs/student/", "my student"]
)
def test_what_looks_like_a_path_is_not_asked_of_the_hub(hub, nothing_here, name):
    assert f"there is no folder {name}" in refused(find, name)
    assert of_models(hub) == []


def test_a_file_is_not_asked_of_the_hub(hub, nothing_here, tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert "is a file, expected a folder" in refused(find, "model.safetensors")
    assert "nor a file of that name" in refused(find, "recipe.yaml")
    assert of_models(hub) == []


def test_a_hub_that_is_not_there_costs_no_retries(hub, nothing_here, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    began = time.monotonic()
    assert "there is no folder ann/student, and http://127.0.0.1" in refused(find, "ann/student")
    assert time.monotonic() - began < 3


def test_a_hub_that_does_not_answer_is_not_waited_for_long(hub, nothing_here, monkeypatch):
    monkeypatch.setattr(loading, "_SECONDS_TO_ANSWER", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        assert "does not give it" in refused(find, "ann/student")
        assert time.monotonic() - began < 3


def test_offline_it_says_that_it_is(hub, nothing_here, monkeypatch, forget_sessions):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_sessions()
    said = refused(find, "ann/student")
    assert "there is no folder ann/student" in said and "offline" in said.lower()
    assert of_models(hub) == []


def test_a_model_of_the_hub_is_found_once(hub, nothing_here, monkeypatch):
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    hub.repositories["models/ann/there"] = there = Repository()
    there.commit("main", {"config.json": b'{"model_type": "llama"}'}, "a config")
    folder = find("ann/there")
    assert (folder / "config.json").read_text() == '{"model_type": "llama"}'
    asked = len(hub.requests)
    assert find("ann/there") == folder and len(hub.requests) == asked
    hub.repositories["models/ann/bare"] = bare = Repository()
    bare.commit("main", {"README.md": b"nothing"}, "a card")
    assert "ann/bare on" in refused(find, "ann/bare")
