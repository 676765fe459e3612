"""Tuning a decoder-only teacher on a task: completion-only fine-tuning on rows of prompt and target."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from ...devices import autocast, precision_arguments
from ...distillation.alignment.positions import IGNORED
from ...distillation.checks.finite_training import FiniteTraining
from ...evaluation.scoring import completion_batch, score
from ...files import read_json, replacing, write_json
from .timed_training import InOrder, TimeShare, train


def completion_loss(
    outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy at the targets; `outputs.logits` is `[B, T + 1, V]` for labels `[B, T]`: column t predicts t."""
    logits = outputs.logits[:, :-1][labels != IGNORED]
    total = F.cross_entropy(logits.float(), labels[labels != IGNORED], reduction="sum", label_smoothing=smoothing)
    return total / (num_items_in_batch if num_items_in_batch is not None else len(logits))


class CompletionTrainer(FiniteTraining, Trainer):
    """Trains a causal model on batches of `completion_batch`; its arguments are those of `Trainer`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.compute_loss_func = functools.partial(completion_loss, smoothing=self.args.label_smoothing_factor)
        self._loss_shifts_labels = False  # transformers 5 would not count the first label of a causal model's rows


class _InOrderTrainer(InOrder, CompletionTrainer):
    pass


class _BestPass(TrainerCallback):
    """Measures after each pass over the data and, in the end, gives the model back as it was after the best one.

    The best weights and the losses are kept in `folder`, for a training that is interrupted in a later pass.
    """

    def __init__(self, model, held_out: Sequence[dict], steps_a_pass: int, folder: Path):
        self.model, self.held_out, self.steps_a_pass = model, held_out, steps_a_pass
        self._weights, self._record = folder / "best.pt", folder / "passes.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.losses: list[float] = read_json(self._record, list) if self._record.exists() else []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps_a_pass == 0:
            self.measure()

    def measure(self) -> None:
        self.losses.append(held_out_loss(self.model, self.held_out))
        if self.losses[-1] == min(self.losses):
            with replacing(self._weights) as partial:
                torch.save(self.model.state_dict(), partial)
        write_json(self._record, self.losses)

    def restore(self) -> None:
        if self.losses:
            self.measure()  # what came after the last whole pass
            self.model.load_state_dict(torch.load(self._weights, weights_only=True))


def held_out_loss(model, rows: Sequence[dict]) -> float:
    """Cross-entropy a target token, in nats; the model's mode is left as it was."""
    was_training = model.training
    model.eval()
    with autocast():
        total = score({"model": model}, rows)["model"]["ce"].sum()
    model.train(was_training)
    return float(total / np.sum([len(row["labels"]) for row in rows]))


def trainer_in_order(
    model, rows: Sequence[dict], collate: Callable, folder: Path, steps: int, batch_size: int, seed: int
) -> Trainer:
    """A trainer for `timed_training.train`, of all weights that have a gradient."""
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        save_total_limit=1,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
        **precision_arguments(),
    )
    return _InOrderTrainer(model=model, args=args, train_dataset=rows, data_collator=collate)


def tune_teacher(
    model,
    tokenizer,
    rows: Sequence[dict],
    held_out: Sequence[dict],
    steps_a_pass: int,
    folder: Path,
    share: TimeShare,
    batch_size: int,
    seed: int,
) -> dict:
    """Fine-tune all layers on `rows`, in their order, within a share of the wall clock.

    A teacher that has learnt its rows by heart has nothing to tell about others: if the data is read more than once,
    the weights after the pass with the lowest loss on `held_out` are those that are kept.

    The embedding stays as it is: it is a fifth of the weights, moves little in some hundred steps, and the student
    starts from it. `share.peak` is the learning rate.

    Args:
        model: a causal language model in float32, trained in place.
        rows, held_out: as `evaluation.encode_rows` makes them.
        folder: for checkpoints, from which an interrupted training goes on.

    Returns:
        What `timed_training.train` does, and `held_out_loss`.
    """
    model.get_input_embeddings().requires_grad_(False)

    def collate(batch: Sequence[dict]) -> dict:
        return completion_batch(batch, tokenizer.pad_token_id or 0)

    trainer = trainer_in_order(model, rows, collate, folder, share.steps, batch_size, seed)
    best = _BestPass(model, held_out, steps_a_pass, folder)
    trainer.add_callback(best)
    result = train(trainer, share)
    best.restore()
    return result | {"held_out_loss": held_out_loss(model, held_out)}
