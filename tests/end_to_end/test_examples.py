"""The example scripts run as they are printed in their docstrings, on the built-in task, with a toy teacher."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distillation_toys import write_teacher
from transformers import AutoModelForSeq2SeqLM


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory, make_bpe_tokenizer):
    return write_teacher(tmp_path_factory.mktemp("toy") / "teacher", make_bpe_tokenizer(chat_template=None), layers=3)


@pytest.mark.parametrize(
    ("script", "logged"),
    [
        ("finetune_seq2seq.py", {"loss", "eval_rougeL"}),
        ("distill.py", {"loss", "ce_loss", "distill_loss", "eval_teacher_agreement"}),
    ],
)
def test_an_example_trains_and_saves(script, logged, teacher_folder, tmp_path):
    printed = ast.get_docstring(ast.parse((EXAMPLES / script).read_text())).split("\n\n")[1].split()
    assert printed[:2] == ["python", f"examples/{script}"]
    output = tmp_path / "run"
    options = [*printed[2:], "--output_dir", str(output), "--max_steps", "2", "--teacher", str(teacher_folder)]
    options += [
        "--encoder_layers",
        "2",
        "--decoder_layers",
        "2",
        "--eval_rows",
        "4",
        "--use_cpu",
        "--logging_steps",
        "1",
    ]
    options += [
        "--per_device_train_batch_size",
        "4",
        "--report_to",
        "none",
        "--save_steps",
        "2",
        "--disable_tqdm",
        "true",
    ]
    run = subprocess.run([sys.executable, str(EXAMPLES / script), *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    keys = {key for row in state["log_history"] for key in row}
    assert logged <= keys | set(ast.literal_eval(run.stdout.strip().splitlines()[-1]))
    start = AutoModelForSeq2SeqLM.from_pretrained(output / "checkpoint-2")
    saved = AutoModelForSeq2SeqLM.from_pretrained(output)
    assert saved.config.model_type == "rope_encdec"
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), saved.parameters(), strict=True))
