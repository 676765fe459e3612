"""The quickstart with a toy teacher and a file of rows: interrupted, resumed, and its output loaded elsewhere."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import transformers
from distillation_toys import write_pairs, write_teacher
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_encdec_distill.cli.main import main


pytestmark = pytest.mark.process

MODELS = {"teacher_before", "teacher", "student_start", "student_kd", "lead_baseline"}
COMMAND = [sys.executable, "-m", "hf_encdec_distill", "quickstart"]
SOURCES = ["red 3 green", "blue 14 white", "black 15 red and something that is a good deal longer"]

# Nothing of the package can be imported, as on a machine that does not have it.
LOAD_ELSEWHERE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_encdec_distill":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import json, torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
folder, sources = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # 5.x asks the config's code for it too
student = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
tokens = student.generate(**tokenizer(sources, return_tensors="pt", padding=True), max_new_tokens=16)
assert not any(name.partition(".")[0] == "hf_encdec_distill" for name in sys.modules)
print(json.dumps(tokens.tolist()))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, make_bpe_tokenizer):
    """Arguments of a run: a toy teacher in a folder, and rows whose target can be read off the source."""
    folder = tmp_path_factory.mktemp("inputs")
    write_teacher(folder / "teacher", make_bpe_tokenizer(chat_template=None), std=0.15)
    write_pairs(folder / "pairs.csv", 300)
    options = ["--teacher", str(folder / "teacher"), "--dataset", str(folder / "pairs.csv")]
    options += [
        "--source-column",
        "text",
        "--target-column",
        "short",
        "--encoder-layers",
        "3",
        "--decoder-layers",
        "2",
    ]
    return options


def start(*options):
    return subprocess.Popen([*COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """The folder of a run that was interrupted while its student trained, and resumed; with what it said."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    process = start(*inputs, "--minutes", "1.0", "--output", str(folder))

    def interrupt():
        while process.poll() is None and not (folder / "work" / "training-student").exists():
            time.sleep(0.1)
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    said = process.communicate()[1].splitlines(keepends=True)
    assert process.returncode == 130, "".join(said)
    checkpoints = list((folder / "work" / "training-student").glob("checkpoint-*"))
    assert len(checkpoints) == 1
    steps_before = int(checkpoints[0].name.rpartition("-")[2])
    state = json.loads((folder / "state.json").read_text())
    assert "teach" in state["results"] and "distill" not in state["results"]

    resumed = subprocess.run([*COMMAND, "--resume", "--output", str(folder)], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    return {"folder": folder, "interrupted": said, "resumed": resumed, "steps_before": steps_before, "state": state}


def test_an_interrupted_run_says_how_to_go_on_and_does(run):
    assert re.fullmatch(
        r"hf-encdec-distill quickstart: stopped after \d+:\d\d; "
        rf"go on with: hf-encdec-distill quickstart --resume --output {re.escape(str(run['folder']))}\n",
        run["interrupted"][-1],
    )
    metrics = json.loads((run["folder"] / "metrics.json").read_text())
    curve = metrics["curves"]["student_kd"]  # means over stretches of steps, of both parts
    assert curve[0]["step"] <= run["steps_before"] and curve[-1]["step"] == metrics["recipe"]["steps"]
    assert metrics["recipe"]["steps"] > run["steps_before"] > 0
    state = json.loads((run["folder"] / "state.json").read_text())
    assert state["seconds_used"] > run["state"]["seconds_used"]
    assert state["results"]["teach"] == run["state"]["results"]["teach"]  # not done a second time
    assert "teach the teacher" not in run["resumed"].stderr


def test_the_taught_teacher_is_saved_for_both_versions_of_transformers(run):
    folder = run["folder"] / "work" / "teacher"  # model/test_teachers_of_either_version.py loads such ones
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 10000.0
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_everything_was_measured_for_every_model(run):
    metrics = json.loads((run["folder"] / "metrics.json").read_text())
    assert set(metrics["models"]) == MODELS
    for name, measures in {
        "teacher_before": {"ce", "rouge_l", "distinct"},
        "student_start": {"ce", "kl", "teacher_agreement"},
        "lead_baseline": {"rouge_l", "distinct"},
        **dict.fromkeys(("teacher", "student_kd"), {"ce", "kl", "teacher_agreement", "rouge_l", "distinct"}),
    }.items():
        assert measures <= set(metrics["models"][name]), name
    assert metrics["models"]["student_kd"]["ce"]["value"] < metrics["models"]["student_start"]["ce"]["value"]
    assert metrics["latency"]["student"]["first_token_ms"]["value"] > 0
    assert metrics["seeds"] == [0]


def test_a_person_gets_a_table_and_the_lines_that_load_the_student(run):
    out = run["resumed"].stdout
    for words in ("student, distilled", "lead-sentence baseline", "tokens/s", "seed 0", "trust_remote_code=True"):
        assert words in out
    folder = run["folder"]
    lines = re.findall(r"^    (?!hf-encdec-distill )(\S.*)$", out, re.MULTILINE)
    assert len(lines) == 4
    names = {}
    exec("\n".join(lines), names)  # the lines work as they are printed
    assert names["model"].config.model_type == "rope_encdec"
    for picture in ("loss.png", "quality.png", "student/loss.png", "student/quality.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    samples = (folder / "samples.md").read_text()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert len(metrics["samples"]) == samples.count("\n## ") == min(10, metrics["data"]["test_rows"]) >= 8
    assert all(sample["source"] in samples for sample in metrics["samples"])
    card = (folder / "student" / "README.md").read_text()
    assert card.startswith("---\n") and "student, distilled" in card
    recipe = json.loads((folder / "recipe.json").read_text())
    assert json.loads((folder / "student" / "recipe.json").read_text())["recipe"] == recipe["recipe"]
    assert recipe["settings"]["minutes"] == 1.0 and recipe["versions"]["torch"] == torch.__version__


def test_the_student_generates_the_same_where_the_package_is_not(run, tmp_path):
    folder = str(run["folder"] / "student")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    elsewhere = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, folder, json.dumps(SOURCES)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert elsewhere.returncode == 0, elsewhere.stderr
    tokenizer, student = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokens = student.generate(**tokenizer(SOURCES, return_tensors="pt", padding=True), max_new_tokens=16)
    assert json.loads(elsewhere.stdout) == tokens.tolist()


def test_the_students_tokenizer_loads_in_either_version_of_transformers(run):
    saved = json.loads((run["folder"] / "student" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_used_folder_is_not_overwritten_and_a_finished_run_shows_its_table_again(run, inputs, capsys):
    before = (run["folder"] / "metrics.json").read_bytes()
    again = subprocess.run([*COMMAND, *inputs, "--output", str(run["folder"])], capture_output=True, text=True)
    error = again.stderr.splitlines()[-1]  # libraries may have their say before
    assert again.returncode == 2 and "Traceback" not in again.stderr
    assert "--resume" in error and "--output" in error
    resume = ["quickstart", "--resume", "--output", str(run["folder"])]
    verbosity = transformers.logging.get_verbosity()
    try:
        assert main(resume) == 0
        assert capsys.readouterr().out == run["resumed"].stdout
        assert main([*resume, "--json"]) == 0
    finally:
        transformers.logging.set_verbosity(verbosity)
    assert json.loads(capsys.readouterr().out) == json.loads(before)
    assert (run["folder"] / "metrics.json").read_bytes() == before
