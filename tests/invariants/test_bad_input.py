"""What users give by mistake: a clear error, or a counted warning where the run can go on, and nothing is lost.

Elsewhere: files that are no data, columns that are missing or hold no text, rows without text (`test_data_loading`);
a full disk and other mishaps in a capture, caches of others (`test_cache`); vocabularies and shared weights
(`test_trainer_students_and_data`); rows that contradict themselves (`test_collator`).

Run as a script this file is one of two processes, of which one dies.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from distillation_toys import (
    EOS,
    TEMPLATE,
    InOrder,
    arguments,
    collate,
    make_t5,
    make_teacher,
    ragged_rows,
    write_pairs,
    write_teacher,
)
from forked import start_rank
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, TrainerCallback

from hf_encdec_distill import DistillationTrainer
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.distillation import DistillationCollator, LiveTeacher, capture
from hf_encdec_distill.distillation.checks.limits import max_positions
from hf_encdec_distill.models.prompts import student_tokenizer


ROWS = ragged_rows(8)


def make_trainer(folder, tokenizer, rows=ROWS, student=None, teacher=None, eval_rows=None, **changed):
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 1, **changed}
    return DistillationTrainer(
        student or make_t5(),
        arguments(folder, **settings),
        teacher=teacher or make_teacher(),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
    )


# Empty data sets and targets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_a_data_set_without_rows(tmp_path, tokenizer, kind):
    empty = [] if kind == "list" else datasets.Dataset.from_dict({"source": [], "target": []})
    with pytest.raises(ValueError, match="train_dataset has no rows"):
        make_trainer(tmp_path, tokenizer, rows=empty).train()
    trainer = make_trainer(tmp_path, tokenizer, eval_rows=empty)
    with pytest.raises(ValueError, match=r"data set to evaluate \(eval\) has no rows"):
        trainer.evaluate()
    with pytest.raises(ValueError, match=r"data set to evaluate \(test\) has no rows"):
        trainer.predict(empty)


def masked(row):
    return {**row, "labels": [-100] * len(row["labels"])}


@pytest.mark.parametrize("kind", ["masked", "eos", "text"])
def test_all_targets_are_empty(tmp_path, tokenizer, kind):
    """Cut away, nothing but EOS, or empty texts: found after one pass over the data, however long the run would be."""
    rows = {
        "masked": [masked(row) for row in ROWS],
        "eos": [{**row, "labels": [EOS]} for row in ROWS],
        "text": [{"source": "def f(x)", "target": ""}] * 8,
    }[kind]
    trainer = make_trainer(tmp_path, tokenizer, rows=rows, num_train_epochs=50)
    with pytest.raises(ValueError, match=r"all 8 rows have an empty target.*nothing to learn.*length limit"):
        trainer.train()
    assert trainer.state.global_step == 4
    last = make_trainer(tmp_path, tokenizer, rows=rows, num_train_epochs=1)
    with pytest.raises(ValueError, match="all 8 rows"):
        last.train()


def test_the_rest_of_an_epoch_says_nothing_of_all_rows(tmp_path, tokenizer):
    """A resumed run reads the last row alone, whose target is empty; the rows before it are not."""
    rows = [*ROWS[:4], {**ROWS[4], "labels": [EOS]}]
    args = arguments(tmp_path, per_device_train_batch_size=2, num_train_epochs=1, save_strategy="steps", save_steps=2)
    given = {"train_dataset": rows, "teacher": make_teacher(), "processing_class": tokenizer}
    InOrder(make_t5(), args, **given).train()
    resumed = InOrder(make_t5(), args, **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3


def test_some_targets_are_empty(tmp_path, tokenizer, warnings_of):
    """Counted once, in the first pass; rows of a run that was stopped before that say nothing about all."""
    rows = [masked(ROWS[0]), {**ROWS[1], "labels": [EOS]}, *ROWS[2:]]
    make_trainer(tmp_path, tokenizer, rows=rows, num_train_epochs=3, gradient_accumulation_steps=2).train()
    told = [text for text in warnings_of() if "empty target" in text]
    assert len(told) == 1 and "2 of the 8 rows" in told[0]
    make_trainer(tmp_path, tokenizer, num_train_epochs=2).train()
    assert len([text for text in warnings_of() if "empty target" in text]) == 1
    first = make_trainer(tmp_path, tokenizer, rows=[masked(row) for row in ROWS], max_steps=2)
    first.train()
    assert "4 of the 4 rows" in warnings_of()[-1]


def told_of_ends(warnings_of):
    return [text for text in warnings_of() if "ends in EOS" in text]


def test_no_label_row_ends_in_eos(tmp_path, tokenizer, warnings_of):
    """Told once, after one pass or 100 rows; one row that ends is enough to say nothing."""
    endless = [{**row, "labels": [*row["labels"][:-1], 9]} for row in ROWS]
    make_trainer(tmp_path, tokenizer, rows=endless, num_train_epochs=3).train()
    told = told_of_ends(warnings_of)
    assert len(told) == 1 and "none of the 8 label rows" in told[0] and f"id {EOS}" in told[0]
    make_trainer(tmp_path, tokenizer, rows=endless * 20, per_device_train_batch_size=40, max_steps=3).train()
    assert "none of the 120 label rows" in told_of_ends(warnings_of)[1]
    make_trainer(tmp_path, tokenizer, rows=endless * 20, max_steps=3).train()  # 6 rows say nothing yet
    make_trainer(tmp_path, tokenizer, rows=[*endless, ROWS[0]]).train()
    assert len(told_of_ends(warnings_of)) == 2


@pytest.mark.parametrize("kind", ["texts that are cut", "plain text", "another EOS of the student"])
def test_rows_that_may_do_without_eos(tmp_path, tokenizer, warnings_of, kind):
    endless = [{**row, "labels": [*row["labels"], 9]} for row in ROWS]
    student, changed = make_t5(), {}
    if kind == "texts that are cut":
        endless, changed = [{"source": "def f(x)", "target": "Return it."}] * 8, {"max_target_length": 3}
    elif kind == "plain text":
        endless = [{**row, "teacher_input_ids": [*row["input_ids"], *row["labels"]]} for row in endless]
    else:
        student.generation_config.eos_token_id = [EOS, 9]
    make_trainer(tmp_path, tokenizer, rows=endless, student=student, **changed).train()
    assert not told_of_ends(warnings_of)


def test_targets_of_a_students_tokenizer_end_where_the_migration_page_says(make_bpe_tokenizer):
    """Not T5's `text_target`, which the prompt template of a merged student is put around."""
    tokenizer = student_tokenizer(make_bpe_tokenizer(), "Say:\n{source}\nSaid:")
    labels = tokenizer("Zed" + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    assert labels == [*tokenizer.convert_tokens_to_ids(["Z", "e", "d"]), EOS]
    assert tokenizer(text_target="Zed")["input_ids"] == tokenizer("Zed")["input_ids"] != labels


def test_rows_without_a_target_column(tmp_path, tokenizer):
    rows = [{"source": "def f(x)"}] * 4
    with pytest.raises(ValueError, match="the batch has no labels, only .*distillation needs targets"):
        make_trainer(tmp_path, tokenizer, rows=rows).train()
    with pytest.raises(ValueError, match=r"row 0 of train has no target"):
        capture(LiveTeacher(make_teacher()), rows, tmp_path / "cache", tokenizer, progress=False)


def test_rows_without_any_column_that_is_needed(tmp_path, tokenizer):
    rows = datasets.Dataset.from_dict({"code": ["a"] * 4, "doc": ["b"] * 4})
    for options in ({}, {"remove_unused_columns": False}):
        with pytest.raises(ValueError, match=r"source|No columns"):
            make_trainer(tmp_path, tokenizer, rows=rows, **options).train()
    with pytest.raises(ValueError, match=r"the columns \['code', 'doc'\], but needs 'source' and 'target'"):
        capture(LiveTeacher(make_teacher()), list(rows), tmp_path / "cache", tokenizer, progress=False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"source": 5, "target": "a"}, "source=5 is of type int, expected text"),
        ({"source": "a", "target": 5}, "target=5 is of type int, expected text"),
        ({"source": {"a": 1}, "target": "b"}, "source={'a': 1} is of type dict"),
        ({"source": "a", "target": ["b"]}, r"target=\['b'\] is of type list"),
        ({"messages": []}, r"messages=\[\] is not a conversation"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "content is a int; the target has to be text"),
    ],
)
def test_columns_of_the_wrong_type(tmp_path, tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        DistillationCollator(tokenizer, tokenizer)([row])
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, rows=[row] * 2).train()
    with pytest.raises(ValueError, match=message):
        capture(LiveTeacher(make_teacher()), [row], tmp_path / "cache", tokenizer, progress=False)


# Prompts -------------------------------------------------------------------------------------------------------------


def test_a_teacher_without_a_chat_template(tmp_path, make_bpe_tokenizer, warnings_of):
    """Text is read as it is, which is said; messages cannot be."""
    plain = make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>")
    row = {"source": "def f(x)", "target": "Return x."}
    ready = DistillationCollator(plain, plain).encode(row)
    assert plain.decode(ready["teacher_input_ids"]) == "def f(x)Return x.<|im_end|>"
    assert any("no chat template, and no prompt_template" in text for text in warnings_of())
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    with pytest.raises(ValueError, match="no chat template to render messages with"):
        make_trainer(tmp_path, plain, rows=[chat] * 2).train()


def small(cls, config, **limits):
    torch.manual_seed(0)
    return cls(config(vocab_size=280, **limits)).eval()


def make_bart(positions):
    return small(
        BartForConditionalGeneration,
        BartConfig,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=positions,
        pad_token_id=0,
        eos_token_id=EOS,
        bos_token_id=3,
        decoder_start_token_id=EOS,
    )


@pytest.mark.parametrize("side", ["input_ids", "labels"])
def test_a_row_longer_than_the_student(tmp_path, tokenizer, side):
    """BART has a table of positions: one token more than fits fails in torch, and before that with us, by name."""
    student = make_bart(12)
    fits = {"input_ids": [5] * 12, "labels": [6] * 11 + [EOS], "attention_mask": [1] * 12}
    with pytest.raises(IndexError):
        student(input_ids=torch.full((1, 13), 5), labels=torch.full((1, 3), 5))
    assert make_trainer(tmp_path, tokenizer, [ROWS[0], fits], student).train().global_step == 1
    long = {**fits, side: [7] * 13}
    long["attention_mask"] = [1] * len(long["input_ids"])
    what = "source" if side == "input_ids" else "target"
    message = rf"has 13 tokens of {what}, but the student has positions for 12 .*max_source_length"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, [long, ROWS[0]], student, eval_rows=[long]).train()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, [ROWS[0]], student, eval_rows=[long]).evaluate()


def test_a_merged_student_reads_prompt_and_target_in_a_row(tmp_path, make_bpe_tokenizer):
    plain = make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>")
    teacher = make_teacher()
    from hf_encdec_distill import RopeEncDecForConditionalGeneration

    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, tokenizer=plain, prompt_template=TEMPLATE, max_position_embeddings=20
    )
    row = {"source": "a" * 12, "target": "b" * 6}  # 13 of the prompt, the start token, 6 and EOS
    trainer = make_trainer(tmp_path, plain, [row], student, teacher, prompt_template=TEMPLATE)
    trainer.compute_loss(student, trainer.data_collator([row]))
    with pytest.raises(ValueError, match="21 tokens of prompt and target, but the student has positions for 20"):
        trainer.compute_loss(student, trainer.data_collator([row, {**row, "target": "b" * 7}]))


def test_a_prompt_longer_than_the_teacher(tmp_path, tokenizer):
    teacher = make_teacher()
    teacher.config.max_position_embeddings = 12
    fits, long = (
        {"input_ids": [5] * length, "attention_mask": [1] * length, "labels": [6, 6, EOS]} for length in (9, 10)
    )
    make_trainer(tmp_path, tokenizer, [fits], teacher=teacher).train()
    message = "row 1 of the batch has 13 tokens of prompt and target, but the teacher has positions for 12"
    trainer = make_trainer(tmp_path, tokenizer, [fits, long], teacher=teacher)
    with pytest.raises(ValueError, match=message):
        trainer.compute_loss(trainer.model, trainer.data_collator([fits, long]))
    # Padding is no token: neither that of other rows nor to a multiple of some number.
    batch = trainer.data_collator([fits])
    wide = torch.nn.functional.pad(batch["input_ids"], (0, 7))
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 7))
    trainer.compute_loss(trainer.model, {"input_ids": wide, "attention_mask": mask, "labels": batch["labels"]})
    rows = [fits, {**fits, "input_ids": [4] * 9}, {**long, "input_ids": [4] * 10}]
    with pytest.raises(ValueError, match=r"row 0 of the batch has 13 tokens"):
        capture(LiveTeacher(teacher), rows, tmp_path / "cache", tokenizer, batch_size=2, progress=False)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (make_t5().config, None),
        (make_bart(33).config, 33),
        (LlamaConfig(max_position_embeddings=64), 64),
        (LlamaConfig(max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 4.0}), 256),
    ],
    ids=["t5", "bart", "llama", "dynamic"],
)
def test_positions_of_a_model(config, limit):
    assert max_positions(config) == limit


# A teacher that computes no numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [3, 1000])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "generalized_jsd", "total_variation"])
def test_logits_of_the_teacher_that_are_nan(tmp_path, tokenizer, chunk_size, divergence):
    """The step is named and the student is as before; transformers would leave the NaN out of its log, and go on."""
    teacher = make_teacher()
    poison = 70  # no other row has this token
    with torch.no_grad():
        teacher.model.embed_tokens.weight[poison] = torch.nan
    rows = [*ROWS[:4], {**ROWS[4], "input_ids": [poison, *ROWS[4]["input_ids"][1:]]}, ROWS[5]]
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        teacher=teacher,
        divergence=divergence,
        loss_chunk_size=chunk_size,
        learning_rate=1e-2,
    )
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.model.train()
    message = (
        r"teacher's logits are not finite at \d+ of the \d+ target tokens of a batch in step 0, in its rows \[4\]"
    )
    with pytest.raises(ValueError, match=message):
        trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(rows)
    assert all(torch.equal(now, then) for now, then in zip(trainer.model.parameters(), before, strict=True))
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in trainer.model.parameters())


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_bpe_tokenizer):
    """A folder with `teacher` and `student`."""
    folder = tmp_path_factory.mktemp("models")
    write_teacher(folder / "teacher", make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>"), layers=2)
    pairs = ["--dataset", str(write_pairs(folder / "pairs.csv", 40))]
    pairs += ["--source-column", "text", "--target-column", "short", "--prompt-template", TEMPLATE]
    assert main(["init", str(folder / "teacher"), "--output", str(folder / "student"), *pairs]) == 0
    return folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source,target\n", "pairs.csv gives no rows, read as csv: "),
        ("source,other\na,b\n", "no column 'target'; the columns are 'source', 'other' ("),
        ("source,target\n" + "a,\n" * 9, "none of the 9 rows has text in both source and target"),
        ("source,target\n" + "1,a\n2,b\n", "has 2 distinct sources, too few to hold out test and validation"),
    ],
    ids=["empty", "column", "targets", "rows"],
)
def test_data_that_the_command_refuses(models, tmp_path, capsys, text, message):
    """In one line, and before there is anything in the output folder."""
    (tmp_path / "pairs.csv").write_text(text)
    for command in (["distill", str(models / "student"), "--teacher"], ["cache"]):
        words = [*command, str(models / "teacher"), "--dataset", str(tmp_path / "pairs.csv")]
        assert main([*words, "--output", str(tmp_path / "out"), "--prompt-template", TEMPLATE]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error and error.startswith(f"hf-encdec-distill {command[0]}: error:")
        assert not (tmp_path / "out").exists()


def test_a_cache_that_was_made_of_other_rows(models, tmp_path, capsys):
    write_pairs(tmp_path / "few.csv", 40)
    text = (tmp_path / "few.csv").read_text()
    (tmp_path / "few.csv").write_text(text.replace("It is", "They are"))
    columns = ["--source-column", "text", "--target-column", "short", "--prompt-template", TEMPLATE]
    words = ["--dataset", str(models / "pairs.csv"), "--output", str(tmp_path / "cache"), "--k", "3"]
    assert main(["cache", str(models / "teacher"), *words, *columns]) == 0
    words = ["--teacher", str(tmp_path / "cache"), "--dataset", str(tmp_path / "few.csv"), "--max-steps", "1"]
    assert (
        main(["distill", str(models / "student"), "--output", str(tmp_path / "o"), "--use-cpu", *words, *columns]) == 2
    )
    assert "rows of the batch are not in the cache" in capsys.readouterr().err


# One of two processes dies -------------------------------------------------------------------------------------------


class Dies(TrainerCallback):
    """The second process, in the middle of the fourth step; the last checkpoint is that of the second."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and int(os.environ.get("RANK", 0)) == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, checkpoint: str | None = None, dies: bool = False) -> DistillationTrainer:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    trainer = InOrder(
        make_t5(),
        arguments(
            folder,
            learning_rate=1e-2,
            adam_epsilon=1e-2,  # at 1e-8 the first steps are the signs of gradients, and no rounding is small
            max_steps=6,
            save_strategy="steps",
            save_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2 // processes,
            ddp_backend="gloo" if processes > 1 else None,
            ddp_timeout=60,
        ),
        teacher=make_teacher(),
        train_dataset=ROWS,
        data_collator=collate,
        callbacks=[Dies()] if dies else None,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.process
def test_one_of_two_processes_dies(tmp_path):
    """Nobody looks after them: the one that is left ends by itself, with an error, and the checkpoint before is whole.

    On that one process goes on, with as many rows a step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    left, dead = (start_rank(rank, __file__, tmp_path / "run", port) for rank in (0, 1))
    try:
        dead.join(timeout=240)
        died = time.monotonic()
        left.join(timeout=60)
    finally:
        left.kill()
        dead.kill()
    assert dead.exitcode == -signal.SIGKILL
    assert left.exitcode > 0 and "RuntimeError" in (tmp_path / "run-0.txt").read_text()
    assert time.monotonic() - died < 60
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2
    resumed, whole = train(tmp_path / "resumed", str(checkpoint)), train(tmp_path / "whole")
    assert resumed.state.global_step == 6
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    train(Path(sys.argv[1]), dies=True)
