"""Training that fits a share of the wall clock: what the quickstart's teacher and students have in common.

How many steps a machine makes in a given time is not known before, and on a shared machine not even then. So the clock
drives the schedule: the learning rate warms up over the first steps and falls linearly with the time that is used, and
training ends where both reach zero. A twin that has to be comparable replays the recorded rates, step by step.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ...files import read_json
from .._checkpoints import last_whole_checkpoint


WARMUP_STEPS = 20


_SECONDS_BETWEEN_SAVES = 600.0  # a checkpoint holds weights and two moments: gigabytes, not for every minute


_CURVE_POINTS = 200


def training_order(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[int]:
    """Row indices for `steps` batches of rows of similar length, in passes that use each row at most once.

    In each pass rows are shuffled, sorted by length within runs of 32 batches, and the batches shuffled again: padding
    nearly vanishes and the order stays random. Rows that fill no batch are left for another pass.

    Raises:
        ValueError: there are fewer rows than a batch takes.
    """
    if len(lengths) < batch_size:
        raise ValueError(f"{len(lengths)} rows cannot fill a batch of {batch_size}: give more training data")
    generator, sizes = np.random.default_rng(seed), np.asarray(lengths)
    order: list[int] = []
    while len(order) < steps * batch_size:
        rows = generator.permutation(len(sizes))[: len(sizes) // batch_size * batch_size]
        runs = np.split(rows, range(32 * batch_size, len(rows), 32 * batch_size))
        batches = [run[np.argsort(sizes[run], kind="stable")].reshape(-1, batch_size) for run in runs]
        order += generator.permutation(np.concatenate(batches)).ravel().tolist()
    return order[: steps * batch_size]


class InOrder:
    """Mix-in for a `Trainer`: rows are taken in the order of the data set, which `training_order` has made."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


class TimeShare(TrainerCallback, ExportableState):
    """Ends training when `seconds` are used, reports progress, and saves on a Ctrl-C and every ten minutes.

    Args:
        seconds: the share of the wall clock; `inf` with `replay`.
        steps: the most steps to make; what there is data for.
        peak: the largest learning rate.
        update: called as `update(fraction, detail)` after each step.
        replay: learning rates, one a step, in place of the clock's; training ends with the last one.

    Attributes:
        rates: the learning rate of each step that was done.
        interrupted: whether Ctrl-C ended it.
    """

    def __init__(
        self,
        seconds: float,
        steps: int,
        peak: float,
        update: Callable[[float, str], None],
        replay: list[float] | None = None,
    ):
        self.seconds, self.steps, self.peak, self.update, self.replay = seconds, steps, peak, update, replay
        self.rates: list[float] = []
        self.interrupted = False
        self._used_before = 0.0
        self._start = self._saved = time.monotonic()
        self._stop = threading.Event()

    @property
    def used(self) -> float:
        """Seconds, over all parts of an interrupted run."""
        return self._used_before + time.monotonic() - self._start

    @property
    def fraction(self) -> float:
        """How much is done, 0 to 1: of the time, or of the steps if those come to an end before."""
        return min(max(self.used / self.seconds, len(self.rates) / self.steps), 1.0)

    def rate(self, step: int) -> float:
        """Learning rate of a step, as a share of `peak`."""
        if self.replay:
            return self.replay[min(step, len(self.replay) - 1)] / self.peak
        return min(1.0, (step + 1) / WARMUP_STEPS) * (1.0 - self.fraction)

    def resume(self, checkpoint: str) -> None:
        """Take up the clock and the record of a run that was interrupted."""
        states = read_json(Path(checkpoint) / TRAINER_STATE_NAME, fields={"stateful_callbacks": dict})[
            "stateful_callbacks"
        ]
        record = states[type(self).__name__]["attributes"]
        self._used_before, self.rates = record["used"], record["rates"]

    def state(self) -> dict:
        """What the trainer writes into its own state of each checkpoint."""
        return {"args": {}, "attributes": {"used": self.used, "rates": self.rates}}

    def on_train_begin(self, args, state, control, **kwargs):
        self._start = self._saved = time.monotonic()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, **kwargs):
        finished = self.used >= self.seconds or state.global_step >= self.steps
        self.interrupted = self._stop.is_set() and not finished
        control.should_training_stop = self.interrupted or finished
        if self.interrupted or time.monotonic() - self._saved > _SECONDS_BETWEEN_SAVES:
            control.should_save, self._saved = True, time.monotonic()
        self.update(self.fraction, f"step {state.global_step}")

    @contextmanager
    def catching_interrupts(self) -> Iterator[None]:
        """The first Ctrl-C lets the step end and saves; the second is an ordinary `KeyboardInterrupt`."""

        def stop(signum, frame):
            self._stop.set()
            signal.signal(signal.SIGINT, before)
            # Not `print`, which a signal may find in the middle of a line of its own.
            os.write(2, b"\nstopping after this step, to save it; Ctrl-C again stops at once and loses it\n")

        if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
            yield
            return
        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def train(trainer: Trainer, share: TimeShare) -> dict:
    """Train within the share, going on from the last whole checkpoint in `trainer.args.output_dir` if there is one.

    The trainer's optimizer is AdamW with the share's learning rate. Returns `steps`, `seconds`, the learning `rates`
    and the `curve` of the losses, in means over at most `_CURVE_POINTS` stretches.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    assert trainer.model is not None and trainer.args.output_dir is not None  # their constructors see to it
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.optimizer = torch.optim.AdamW(trainable, lr=share.peak, weight_decay=0.0, fused=True)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: share.rate(step))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(share)
    checkpoint = last_whole_checkpoint(Path(trainer.args.output_dir))
    if checkpoint is not None:
        share.resume(checkpoint)
    with share.catching_interrupts():
        trainer.train(resume_from_checkpoint=checkpoint)
    if share.interrupted:
        raise KeyboardInterrupt
    return {
        "steps": trainer.state.global_step,
        "seconds": share.used,
        "rates": share.rates,
        "curve": _curve([row for row in trainer.state.log_history if "loss" in row]),
    }


def _curve(history: list[dict]) -> list[dict]:
    stride = -(-len(history) // _CURVE_POINTS)
    losses = [name for name in ("loss", "ce_loss", "distill_loss") if history and name in history[0]]
    curve = []
    for first in range(0, len(history), stride or 1):
        stretch = history[first : first + stride]
        means = {name: sum(row[name] for row in stretch) / len(stretch) for name in losses}
        curve.append({"step": stretch[-1]["step"], **means})
    return curve
