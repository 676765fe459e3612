"""The lines that a card gives for each exported folder answer as PyTorch does."""

import json
import re
import shutil

import pytest
from transformers import AutoTokenizer

from hf_encdec_distill.cards import write_model_card
from hf_encdec_distill.cards.loading import PARITY
from hf_encdec_distill.export.exporting import export_model
from hf_encdec_distill.export.parity import prove


@pytest.fixture(scope="module")
def folder(trained, trained_folder, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "student"
    shutil.copytree(trained_folder / "student", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, model_input_names=["input_ids", "attention_mask"])
    tokenizer.save_pretrained(folder)
    for target in ("onnx", "openvino"):
        export_model(trained, tokenizer, target, folder / target)
        report = prove(folder / target, trained, rows[:2], max_new_tokens=4)
        (folder / target / PARITY).write_text(json.dumps(report))
    return folder


def section(text, heading):
    """The language of its code, behind the line that installs what it needs, and the code."""
    install = r"(?:```bash\npip install .*\n```\n\n)?"
    return re.search(rf"^### {heading}\n\n{install}```(\w+)\n(.*?)```", text, re.MULTILINE | re.DOTALL)


def with_source(code):
    return re.sub("^source = .*$", 'source = "w4 w7 w1"', code, flags=re.MULTILINE)


@pytest.mark.parametrize("heading", ["ONNX Runtime", "OpenVINO"])
def test_the_lines_answer_as_pytorch(folder, trained, heading, monkeypatch):
    text = write_model_card(folder, {}).read_text()
    assert section(text, "Swift") is None  # no such export
    language, code = section(text, heading).groups()
    names = {"printed": []}
    monkeypatch.chdir(folder.parent)
    exec(with_source(code).replace("print(", "printed.append("), names)
    ids = AutoTokenizer.from_pretrained(folder)(names["source"], return_tensors="pt")
    expected = AutoTokenizer.from_pretrained(folder).decode(
        trained.generate(**ids, max_new_tokens=48)[0], skip_special_tokens=True
    )
    assert language == "python" and names["printed"] == [expected] == ["w1 w7 w4"]


def test_of_a_repository_the_folder_is_fetched(folder, tmp_path, monkeypatch):
    """`snapshot_download` gives a folder that has the export in it."""
    exports = {"onnx": json.loads((folder / "onnx" / PARITY).read_text())}
    text = write_model_card(tmp_path / "card.md", {"exports": exports}, "me/tiny").read_text()
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k)) or str(folder))
    exec(with_source(section(text, "ONNX Runtime")[2]), {"print": asked.append})
    assert asked == [(("me/tiny",), {"allow_patterns": "onnx/*"}), "w1 w7 w4"]


def test_swift_names_the_programs_of_the_folder(tmp_path, folder):
    report = json.loads((folder / "onnx" / PARITY).read_text()) | {"target": "coreml"}
    text = write_model_card(tmp_path, {"exports": {"coreml_fp16": report}}).read_text()
    language, code = section(text, "Swift").groups()
    assert language == "swift" and 'fileURLWithPath: "coreml_fp16"' in code
    assert "encoder.mlpackage" in code and "decoder.mlpackage" in code and section(text, "ONNX Runtime") is None


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_an_export_has_a_tokenizer_that_both_versions_of_transformers_load(folder, target):
    config = json.loads((folder / target / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
