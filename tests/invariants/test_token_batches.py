"""`max_tokens_per_batch`: batches by tokens, each row once, and the loss that the step's rows have by hand.

As one of two processes this file trains, and each process writes which rows it read.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from distillation_toys import (
    Stream,
    arguments,
    collate,
    make_t5,
    make_teacher,
    ragged_rows,
    token_terms,
)
from forked import on_two_processes

from hf_encdec_distill import DistillationTrainer
from hf_encdec_distill.distillation.options.token_batches import TokenBatches


ROWS = ragged_rows(23)
NUMBERS = {(*row["input_ids"], *row["labels"]): number for number, row in enumerate(ROWS)}
SIZES = [(len(row["input_ids"]), len(row["labels"])) for row in ROWS]
LIMIT = 40


def padded(batch):
    return len(batch) * (max(SIZES[row][0] for row in batch) + max(SIZES[row][1] for row in batch))


class Collator:
    """Pads, and keeps which rows it was given."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append([NUMBERS[(*row["input_ids"], *row["labels"])] for row in rows])
        return collate(rows)


def make_trainer(folder, rows=ROWS, **settings):
    return DistillationTrainer(
        make_t5(dropout=settings.pop("dropout", 0.0)),
        arguments(folder, **{"max_tokens_per_batch": LIMIT, "learning_rate": 1e-2, **settings}),
        teacher=make_teacher(),
        train_dataset=rows,
        data_collator=Collator(),
    )


def batches_of(trainer):
    return trainer.data_collator.student_collator.batches


def make_batches(processes=1, epoch=0, sizes=SIZES, limit=LIMIT, seed=3):
    return TokenBatches(sizes, limit, processes, seed, lambda: epoch)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_each_row_once_and_none_above_the_limit(processes):
    epochs = [list(make_batches(processes, epoch)) for epoch in range(3)]
    for batches in epochs:
        assert sorted(row for batch in batches for row in batch) == list(range(len(ROWS)))
        assert all(padded(batch) <= LIMIT for batch in batches)
        assert len(batches) == len(make_batches(processes)) and len(batches) % processes == 0
    assert epochs[0] == list(make_batches(processes)) != epochs[1] != epochs[2]
    assert epochs[0] != list(make_batches(processes, seed=4))
    real = sum(sum(size) for size in SIZES)
    assert sum(map(padded, epochs[0])) < 1.3 * real
    in_order = [list(range(i, min(i + 3, len(ROWS)))) for i in range(0, len(ROWS), 3)]
    assert sum(map(padded, in_order)) > 1.4 * real and len(in_order) >= len(epochs[0]) - processes


def test_batches_are_as_full_as_they_can_be():
    """Two lengths: as many rows of each as the limit has room for."""
    sizes = [(3, 1)] * 10 + [(6, 2)] * 5
    batches = list(make_batches(sizes=sizes, limit=16))
    assert sorted(map(len, batches)) == [1, 2, 2, 2, 4, 4]
    assert len(list(make_batches(3, sizes=[(3, 1)] * 4, limit=5))) == 6  # two rows come twice


def test_a_row_above_the_limit_is_named():
    with pytest.raises(ValueError, match=r"max_tokens_per_batch=9, but row 1 alone has 7 \+ 3 tokens"):
        make_batches(sizes=[(2, 3), (7, 3)], limit=9)


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_the_loss_of_a_step_is_that_of_its_rows(tmp_path, kind):
    """Accumulated batches of different sizes: by hand, a mean over the step's target tokens."""
    rows = Dataset.from_list(ROWS) if kind == "dataset" else ROWS
    settings = {"learning_rate": 0.0, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    trainer = make_trainer(tmp_path, rows, **settings)
    trainer.train()
    batches = batches_of(trainer)
    assert sorted(row for batch in batches for row in batch) == list(range(len(ROWS)))
    assert all(padded(batch) <= LIMIT for batch in batches) and len({len(batch) for batch in batches}) > 1
    logs = [log for log in trainer.state.log_history if "ce_loss" in log]
    assert len(logs) == (len(batches) + 1) // 2
    for step, log in enumerate(logs):
        numbers = [row for batch in batches[2 * step : 2 * step + 2] for row in batch]
        ce, kl, _ = token_terms(make_t5(), make_teacher(), [ROWS[number] for number in numbers])
        assert log["ce_loss"] == pytest.approx(ce.mean().item(), rel=1e-5)
        assert log["distill_loss"] == pytest.approx(kl.mean().item(), rel=1e-4)


def test_texts_are_counted_as_the_student_reads_them(tmp_path, make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer(pad_token="<|endoftext|>")
    rows = [{"source": "x" * (1 + 7 * i % 23), "target": "yz"[: 1 + i % 2]} for i in range(24)]
    trainer = DistillationTrainer(
        make_t5(),
        arguments(tmp_path, max_tokens_per_batch=60, max_source_length=15, prompt_template="{source}"),
        teacher=make_teacher(),
        train_dataset=rows,
        processing_class=tokenizer,
        teacher_processing_class=tokenizer,
    )
    batches = list(trainer.get_train_dataloader())
    sizes = [batch["input_ids"].numel() + batch["labels"].numel() for batch in batches]
    assert max(sizes) <= 60 and max(sizes) > 45
    assert max(batch["input_ids"].shape[1] for batch in batches) == 15
    assert sum(len(batch["labels"]) for batch in batches) == 24


@pytest.mark.parametrize("stop", [3, 6])
def test_resumed_equals_never_stopped(tmp_path, stop):
    """In the first epoch and in the second, with dropout and accumulation."""
    settings = {"dropout": 0.3, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    settings |= {"save_strategy": "steps", "save_steps": stop, "seed": 7}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    steps = whole.state.global_step
    assert steps == 12 and stop % 4
    epochs = [batches_of(whole)[first : first + 8] for first in (0, 8, 16)]
    assert epochs[0] != epochs[1] != epochs[2] and sorted(map(len, epochs[0])) == sorted(map(len, epochs[1]))
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert resumed.state.global_step == steps
    assert batches_of(resumed) == batches_of(whole)[-len(batches_of(resumed)) :]
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_what_cannot_be_counted_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_tokens_per_batch sorts rows by length, and a Stream has none"):
        make_trainer(tmp_path, Stream(ROWS), max_steps=1).train()
    with pytest.raises(ValueError, match=r"counts input_ids and labels, and row 0 has \['input_ids'\]"):
        make_trainer(tmp_path, [{"input_ids": [5, 6]}], max_steps=1).train()
    for settings, message in (
        ({"auto_find_batch_size": True}, "with auto_find_batch_size=True"),
        ({"accelerator_config": {"split_batches": True}}, "with split_batches=True"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch=0 is out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **{"max_tokens_per_batch": LIMIT, **settings})


def run(folder: Path) -> None:
    """Two epochs, and the second half of the second again from its checkpoint."""
    for name in ("whole", "resumed"):
        trainer = make_trainer(
            folder,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=3,
            ddp_backend="gloo",
        )
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if name == "resumed" else None)
        rank = trainer.accelerator.process_index
        logs = [log for log in trainer.state.log_history if "ce_loss" in log]
        (folder / f"{name}-{rank}.json").write_text(json.dumps({"batches": batches_of(trainer), "logs": logs}))
        torch.save(trainer.model.state_dict(), folder / f"{name}-{rank}.pt")


@pytest.mark.process
def test_two_processes(tmp_path):
    """As many batches on each, each row once between them; losses and weights of the steps by hand; resumed."""
    on_two_processes(__file__, tmp_path)
    (one, two), (again, _) = (
        [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        for name in ("whole", "resumed")
    )
    batches = [one["batches"], two["batches"]]
    assert len(batches[0]) == len(batches[1]) and all(padded(b) <= LIMIT for side in batches for b in side)
    per_epoch = len(batches[0]) // 2
    for epoch in (slice(per_epoch), slice(per_epoch, None)):
        assert sorted(row for side in batches for b in side[epoch] for row in b) == list(range(len(ROWS)))
    student = make_t5()
    for step, log in enumerate(one["logs"][: (per_epoch + 1) // 2]):
        last = min(2 * step + 2, per_epoch)
        numbers = [row for side in batches for b in side[2 * step : last] for row in b]
        ce, kl, _ = token_terms(student, make_teacher(), [ROWS[number] for number in numbers])
        assert log["ce_loss"] == pytest.approx(ce.mean().item(), rel=1e-4)
        student.zero_grad()
        (0.9 * kl + 0.1 * ce).mean().backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= 1e-2 * parameter.grad
    assert len(one["logs"]) == 4 and per_epoch == 4
    assert again["batches"] == one["batches"][-len(again["batches"]) :] and len(again["batches"]) < per_epoch
    weights = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole-0", "whole-1", "resumed-0")]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]) and torch.equal(value, weights[2][name]), name


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # or its threads may abort the process at its end
