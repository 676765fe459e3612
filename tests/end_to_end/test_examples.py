"""The example scripts run as they are printed in their docstrings, on the built-in task, with a toy teacher."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distillation_toys import spread
from transformers import AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory, make_bpe_tokenizer):
    folder = tmp_path_factory.mktemp("toy") / "teacher"
    tokenizer = make_bpe_tokenizer(chat_template=None)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    spread(LlamaForCausalLM(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
