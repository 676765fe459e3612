"""The exported ONNX graphs outside Python: the example for JavaScript gives the answers that PyTorch gives."""

import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hf_encdec_distill.export.exporting import export_model


pytestmark = pytest.mark.process

EXAMPLE = Path(__file__).parents[2] / "examples" / "javascript"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example with its packages, from npm."""
    npm = shutil.which("npm")
    assert npm, "this test needs Node.js and npm: apt-get install npm, or nodejs.org"
    folder = tmp_path_factory.mktemp("javascript")
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules"))
    subprocess.run(
        [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, check=True, timeout=300
    )
    return folder


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_the_same_answers(variant, example, trained, trained_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(trained_folder / "student")
    folder = export_model(trained, tokenizer, "onnx", tmp_path / "exported", variant)
    texts = ["w1 w2 w3", "w9 w8", "w4 w4 w5 w6 w0 w7"]
    command = ["node", "generate.mjs", str(folder), *texts]
    result = subprocess.run(command, cwd=example, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    expected = []
    for text in texts:
        tokens = trained.generate(**tokenizer(text, return_tensors="pt", return_token_type_ids=False), do_sample=False)
        expected.append(tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
    assert result.stdout.splitlines() == expected
    assert expected[0] == "w3 w2 w1"


def test_other_exports_are_named(example, trained, tmp_path):
    folder = export_model(trained, None, "openvino", tmp_path / "exported")
    result = subprocess.run(["node", "generate.mjs", str(folder), "w1"], cwd=example, capture_output=True, text=True)
    assert result.returncode != 0 and "holds openvino of shapes dynamic" in result.stderr
