"""A token of the Hub is in no file that a training writes, since a trainer pushes its folder."""

import pytest
from distillation_toys import arguments, collate, make_rope, make_teacher, ragged_rows, write_pairs, write_teacher
from transformers import Seq2SeqTrainingArguments

from hf_encdec_distill import DistillationTrainer, DistillationTrainingArguments
from hf_encdec_distill.cli.main import main


TOKEN = "hf_ThisIsSecret"
# transformers 5 has the first alone.
NAMES = [name for name in ("hub_token", "push_to_hub_token") if name in Seq2SeqTrainingArguments.__dataclass_fields__]


def files_with_the_token(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert any(file.name == "training_args.bin" for file in files)
    return [file for file in files if TOKEN.encode() in file.read_bytes()]


@pytest.mark.parametrize("cls", [DistillationTrainingArguments, Seq2SeqTrainingArguments])
@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_keeps_its_token_and_does_not_write_it(tmp_path, cls, name):
    args = arguments(tmp_path, cls=cls, max_steps=1, save_strategy="steps", save_steps=1, **{name: TOKEN})
    trainer = DistillationTrainer(
        make_rope("merged"), args, data_collator=collate, train_dataset=ragged_rows(4), teacher=make_teacher()
    )
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == TOKEN  # what it pushes with
    assert not files_with_the_token(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_teach_does_not_write_it(tmp_path, make_bpe_tokenizer, name):
    teacher = write_teacher(tmp_path / "teacher", make_bpe_tokenizer(), layers=1)
    words = ["teach", teacher, "--dataset", write_pairs(tmp_path / "pairs.csv", 60), "--output", tmp_path / "taught"]
    words += ["--source-column", "text", "--target-column", "short", "--max-steps", 1, "--use-cpu", "--rank", 1]
    words += ["--save-steps", 1, "--report-to", "none", f"--{name.replace('_', '-')}", TOKEN]
    assert main([str(word) for word in words]) == 0
    assert not files_with_the_token(tmp_path / "taught")
