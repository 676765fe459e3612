"""What tests of folders that anybody may have made start from, and those of commands."""

import json

import pytest
from distillation_toys import TEMPLATE, write_pairs, write_teacher
from transformers import AutoModelForCausalLM

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.cli.main import main


@pytest.fixture(scope="session")
def whole(tmp_path_factory, make_bpe_tokenizer):
    """A teacher, a student with its tokenizer, and pairs, as they should be; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = make_bpe_tokenizer(pad_token="<|endoftext|>")
    write_teacher(folder / "teacher", tokenizer, layers=2)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher, tokenizer=tokenizer)
    student.save_pretrained(folder / "student")
    write_pairs(folder / "pairs.csv", 120)
    return folder


@pytest.fixture
def teacher_folder(tmp_path, make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>")
    return write_teacher(tmp_path / "teacher", tokenizer)


@pytest.fixture
def pairs_file(tmp_path):
    return write_pairs(tmp_path / "pairs.csv", 200)


@pytest.fixture
def data_arguments(pairs_file):
    return ["--dataset", str(pairs_file), "--source-column", "text", "--target-column", "short"]


@pytest.fixture
def student_folder(tmp_path, teacher_folder, data_arguments, capsys):
    """That `init` made, of all layers."""
    folder = tmp_path / "student"
    options = [
        "--encoder-layers",
        "4",
        "--decoder-layers",
        "4",
        "--prompt-template",
        TEMPLATE,
        "--output",
        str(folder),
    ]
    assert main(["init", str(teacher_folder), *options, *data_arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said.pop("parameters") > 0
    assert said == {"output": str(folder), "encoder_layers": 4, "decoder_layers": 4, "healing": None}
    return folder
