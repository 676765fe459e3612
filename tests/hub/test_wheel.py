"""What people get: a wheel, made from the sdist, in an empty environment, from the first command to the Hub and back.

Minutes of building and installing, so it runs by its marker, once in CI: `pytest -m wheel`.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from distillation_toys import write_pairs, write_teacher
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from server import TOKEN, Hub


pytestmark = [pytest.mark.wheel, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
REPOSITORY = "ann/student"
TEXTS = ["red 3 green", "blue 14 white"]

# Runs isolated, in an environment that has torch and transformers and not the package.
LOAD_BACK = """
import importlib.util
import json
import sys

assert importlib.util.find_spec("hf_encdec_distill") is None
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

name, revision, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
trusted = {"trust_remote_code": True, "revision": revision}
tokenizer = AutoTokenizer.from_pretrained(name, **trusted)
model = AutoModelForSeq2SeqLM.from_pretrained(name, **trusted)
answers = model.generate(**tokenizer(texts, return_tensors="pt", padding=True), max_new_tokens=8, do_sample=False)
print(json.dumps(tokenizer.batch_decode(answers[:, 1:], skip_special_tokens=True)))
"""


# In an environment with the wheel and `optimum`: Optimum's model of what optimum-cli wrote answers as PyTorch does.
COMPARE = """
import sys

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import hf_encdec_distill

target, student, exported = sys.argv[1:]
if target == "onnx":
    from optimum.onnxruntime import ORTModelForSeq2SeqLM as Exported
else:
    from optimum.intel import OVModelForSeq2SeqLM as Exported
inputs = AutoTokenizer.from_pretrained(student)(["Return the sum.", "Two dogs."], padding=True, return_tensors="pt")
inputs.pop("token_type_ids", None)
models = AutoModelForSeq2SeqLM.from_pretrained(student), Exported.from_pretrained(exported)
answers = [model.generate(**inputs, max_new_tokens=8, num_beams=1, do_sample=False) for model in models]
assert torch.equal(*answers), answers
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist, and the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def environment(distributions, tmp_path_factory):
    """An empty environment with the wheel and what the quickstart needs; returns its folder of programs."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "pip"), "install", "-q"]
    # The versions of this lane, so that the toy's folders are those of the test.
    lane = [
        f"transformers=={importlib.metadata.version('transformers')}",
        f"huggingface-hub=={importlib.metadata.version('huggingface_hub')}",
    ]
    subprocess.run([*pip, f"{distributions[1]}[demo]", *lane], check=True)
    return folder / "bin"


def test_what_is_in_them(distributions):
    sdist, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    there = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == there
    assert "hf_encdec_distill/py.typed" in names
    assert not any(name.startswith(("tests", "studies", "docs")) for name in names)
    needed = [
        Requirement(line.partition(": ")[2]).name
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert {"torch", "transformers", "accelerate", "datasets"} <= set(needed) and "optimum" not in needed
    with tarfile.open(sdist) as archive:
        parts = {Path(name).parts[1] for name in archive.getnames() if len(Path(name).parts) > 1}
    assert {"src", "tests", "studies", "docs", "examples", "README.md", "mkdocs.yml", "LICENSE"} <= parts


def test_from_the_first_command_to_the_hub_and_back(environment, tmp_path, make_bpe_tokenizer):
    write_teacher(tmp_path / "teacher", make_bpe_tokenizer(chat_template=None), std=0.15)
    write_pairs(tmp_path / "pairs.csv", 300)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    variables |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(*command, **more):
        program = [str(environment / command[0]), *map(str, command[1:])]
        done = subprocess.run(program, cwd=tmp_path, env=variables | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    where = run("python", "-c", "import hf_encdec_distill; print(hf_encdec_distill.__file__)")
    assert Path(where.strip()).is_relative_to(environment.parent)
    data = ["--dataset", "pairs.csv", "--source-column", "text", "--target-column", "short"]
    run(
        *("hf-encdec-distill", "quickstart", "--minutes", "1", "--teacher", "teacher", *data),
        *("--encoder-layers", "3", "--decoder-layers", "2"),
        HF_HUB_OFFLINE="1",
    )
    student = tmp_path / "runs" / "quickstart" / "student"
    answers = json.loads(
        run("hf-encdec-distill", "generate", student, *TEXTS, "--max-new-tokens", "8", "--json", HF_HUB_OFFLINE="1")
    )["answers"]
    with Hub(TOKEN) as hub:
        endpoint = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        pushed = json.loads(run("hf-encdec-distill", "push", student, REPOSITORY, "--json", **endpoint))
        assert TOKEN not in json.dumps(pushed)
        commit, files = hub.repositories[f"models/{REPOSITORY}"].at("main")
        assert {"model.safetensors", "config.json", "README.md", "modeling_rope_encdec.py"} <= set(files)

        run("pip", "uninstall", "-q", "-y", "hf-encdec-distill")
        elsewhere = json.loads(run("python", "-I", "-c", LOAD_BACK, REPOSITORY, commit, json.dumps(TEXTS), **endpoint))
    assert [text.strip() for text in elsewhere] == [pair["answer"] for pair in answers]

    card = ModelCard.load(student / "README.md")
    metadata = card.data.to_dict()
    assert metadata["library_name"] == "transformers" and "knowledge-distillation" in metadata["tags"]
    assert card.data.eval_results and "model-index" in metadata
    assert "AutoModelForSeq2SeqLM" in card.text


def test_optimum_cli_needs_the_wheel_and_one_extra(distributions, tmp_path):
    student = Path(__file__).parent / "frozen" / "0.1" / "separate"
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    commands = [("pip", "install", "-q", f"{distributions[1]}[optimum]")]
    for target in ("onnx", "openvino"):
        commands += [
            ("optimum-cli", "export", target, "--model", student, target),
            ("python", "-I", "-c", COMPARE, target, student, target),
        ]
    for program, *words in commands:
        command = [str(programs / program), *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
