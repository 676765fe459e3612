"""The cards in `model_cards/` are what their command writes, byte for byte, and what the Hub can read."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.utils import validate_repo_id


FOLDER = Path(__file__).parents[2] / "model_cards"
RUN = Path(__file__).parents[2] / "docs" / "runs" / "quickstart-120-minutes" / "model_card.md"
CARDS = [*sorted(FOLDER.glob("*.md")), RUN]


@pytest.fixture
def regenerate(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the program adds to it
    spec = importlib.util.spec_from_file_location("regenerate", FOLDER / "regenerate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.regenerate
    for name in ("quality", "tasks"):
        sys.modules.pop(name, None)


def test_cards_are_up_to_date(regenerate, tmp_path):
    written = {path.name: path.read_bytes() for path in regenerate(tmp_path, tmp_path)}
    assert written == {path.name: path.read_bytes() for path in CARDS}, "run python model_cards/regenerate.py"
    assert len(written) >= 4


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_huggingface_hub_takes_a_card_as_it_is(path, tmp_path):
    """`ModelCard.validate` asks the Hub itself; this is what can be known without it."""
    card = ModelCard.load(path)
    card.save(tmp_path / "again.md")
    assert ModelCard.load(tmp_path / "again.md").content == card.content == path.read_text()
    data = card.data
    # A parser of YAML 1.1, which takes "no" and "1e-3" otherwise than one of 1.2, reads the same.
    assert yaml.safe_load(path.read_text().split("---")[1]) == data.to_dict()
    validate_repo_id(data.base_model)
    assert re.fullmatch("[a-z]{2,3}", data.language) and data.license == "apache-2.0"
    assert data.library_name == "transformers" and data.pipeline_tag == "summarization"
    assert data.model_name and all(isinstance(result, EvalResult) for result in data.eval_results)
    for result in data.eval_results:
        for field in ("task_type", "dataset_type", "dataset_name", "metric_type"):
            assert getattr(result, field)
        assert isinstance(result.metric_value, float) and result.metric_args["rows"] > 0
    ce = next(result for result in data.eval_results if result.metric_type == "ce")
    assert ce.metric_args["low"] <= ce.metric_value <= ce.metric_args["high"] and ce.metric_args["spread"]


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card_has_all_that_a_reader_needs(path):
    text = ModelCard.load(path).text
    headings = re.findall("^## (.*)", text, re.MULTILINE)
    needed = ["Intended use", "How to load", "Results", "Training", "Environmental cost", "Limits", "License"]
    assert [heading for heading in needed if heading not in headings] == []
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (path.parent / figure).is_file()
    ours = re.sub("^source = .*$", "", text.split("## Samples")[0], flags=re.MULTILINE)
    assert "Energy was not measured." in text and "None" not in ours
