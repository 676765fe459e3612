"""The examples run on toys: the scripts as they are printed in their docstrings and from a config file."""

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from distillation_toys import write_pairs, write_teacher
from transformers import AutoModelForSeq2SeqLM


EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = {
    "run_distillation.py": ("teacher_name_or_path", {"ce_loss", "distill_loss"}, {"eval_teacher_agreement"}),
    "finetune_seq2seq.py": ("model_name_or_path", set(), set()),
}
TOY_SHAPE = {"encoder_layers": 2, "decoder_layers": 2, "calibration_samples": 4}
TOY_TRAINING = {"max_steps": 2, "use_cpu": True, "logging_steps": 1, "save_steps": 2, "report_to": "none"}
TOY_LIMITS = {"max_train_samples": 8, "max_eval_samples": 4, "max_predict_samples": 4}


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory, make_bpe_tokenizer):
    return write_teacher(tmp_path_factory.mktemp("toy") / "teacher", make_bpe_tokenizer(chat_template=None), layers=3)


def options(values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def metrics_of(output, split):
    return json.loads((output / f"{split}_results.json").read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_as_printed(script, teacher_folder, tmp_path):
    model, of_training, of_evaluation = SCRIPTS[script]
    printed = ast.get_docstring(ast.parse((EXAMPLES / script).read_text())).split("\n\n")[1].replace("\\", "").split()
    assert printed[:2] == ["python", f"examples/{script}"]
    output = tmp_path / "run"
    toy = {model: teacher_folder, "output_dir": output, **TOY_SHAPE, **TOY_TRAINING, **TOY_LIMITS}
    command = [sys.executable, str(EXAMPLES / script), *printed[2:], *options(toy)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert {"loss", *of_training} <= {key for row in state["log_history"] for key in row}
    assert {"train_loss", "train_samples"} <= set(metrics_of(output, "train"))
    assert {"eval_loss", "eval_rougeL", "eval_samples", *of_evaluation} <= set(metrics_of(output, "eval"))
    assert metrics_of(output, "predict")["predict_samples"] == 4
    predictions = [json.loads(line) for line in (output / "generated_predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 4 and all(set(row) == {"source", "target", "prediction"} for row in predictions)
    card = (output / "README.md").read_text()
    assert f"Rougel: {round(metrics_of(output, 'eval')['eval_rougeL'], 4)}" in card
    start = AutoModelForSeq2SeqLM.from_pretrained(output / "checkpoint-2")
    saved = AutoModelForSeq2SeqLM.from_pretrained(output)
    assert saved.config.model_type == "rope_encdec"
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), saved.parameters(), strict=True))


def run_script(script, monkeypatch, *arguments):
    """In this process: another would have to import torch anew."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script), *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_takes_a_config_file_and_goes_on(script, teacher_folder, tmp_path, monkeypatch):
    model, *_ = SCRIPTS[script]
    output = tmp_path / "run"
    recipe = {
        model: str(teacher_folder),
        "train_file": str(write_pairs(tmp_path / "train.csv", 20)),
        "validation_file": str(write_pairs(tmp_path / "validation.csv", 6)),
        "source_column": "text",
        "target_column": "short",
        "prompt_template": "{source}\n",
        "metrics": ["chrf", "squad"],
        "output_dir": str(output),
        "max_target_length": 8,
        "do_train": True,
        "do_eval": True,
        "predict_with_generate": True,
        **TOY_SHAPE,
        **TOY_TRAINING,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_script(script, monkeypatch, tmp_path / "recipe.yaml")
    first = metrics_of(output, "eval")
    assert first["eval_samples"] == 6 and {"eval_chrf", "eval_f1"} <= set(first) and "eval_rougeL" not in first
    (tmp_path / "recipe.json").write_text(json.dumps({**recipe, "max_steps": 3}))
    run_script(script, monkeypatch, tmp_path / "recipe.json")
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3]
    steps = [row["loss"] for row in history if "loss" in row]
    before = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert steps[:2] == [row["loss"] for row in before if "loss" in row]  # not trained again


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "nothing to do"),
        ({"do_train": True}, "is not empty and has no checkpoint"),
        ({"do_eval": True, "metrics": "accuracy"}, "'accuracy' is none of rouge, squad, chrf, bleu"),
        ({"do_eval": True, "train_file": "a.csv", "dataset_name": "b"}, "leave one of them out"),
    ],
)
def test_what_a_script_refuses(script, wrong, message, tmp_path, monkeypatch):
    (tmp_path / "something").touch()
    with pytest.raises(ValueError, match=message):
        run_script(script, monkeypatch, *options({**wrong, "output_dir": tmp_path, "report_to": "none"}))
