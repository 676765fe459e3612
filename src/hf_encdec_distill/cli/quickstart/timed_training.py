"""Training that fits a share of the wall clock: what the quickstart's teacher and students have in common.

How many steps a machine makes in a given time is not known before, and on a shared machine not even then. So it is
measured, from the first step on: the learning rate warms up over a share of the steps that will fit and falls linearly
to zero with the last of them. A twin that has to be comparable replays the recorded rates, step by step.
"""

from __future__ import annotations

import math
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
from .recipe import WARMUP


_SECONDS_BETWEEN_SAVES = 600.0  # a checkpoint holds weights and two moments: gigabytes, not for every minute
_RECENT_STEPS = 16
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

    def _inner_training_loop(self, *args, **kwargs):
        # transformers 4.57 takes the batch size of the checkpoint, which another stage may have trained with.
        return super()._inner_training_loop(*args, **kwargs | {"batch_size": self.args.train_batch_size})


class TimeShare(TrainerCallback, ExportableState):
    """Ends training when the next step would not end within `seconds`, reports progress, and saves on a Ctrl-C and
    every ten minutes.

    Each step's learning rate is set between its backward pass and its update: then the first step, too, is measured
    before its rate is chosen.

    Args:
        seconds: the share of the wall clock from now on, so that what precedes the first step counts; `inf` with
            `replay`.
        steps: the most steps to make, those of earlier rounds among them; what there is data for.
        peak: the largest learning rate.
        update: called as `update(fraction, detail)` after each step.
        replay: learning rates, one a step, in place of the clock's; training ends with the last one.
        earlier: steps of earlier rounds, from whose last checkpoint this one goes on, with a warm-up of its own.
        twin_step: seconds of the first step of a twin, for whose training `seconds` have to last too (as many steps).
        twin_cost: a step of the twin in steps of this training, where it is known from an earlier round.
        goes_on: whether to save a checkpoint at the end, for another round.
        now: the clock.

    Attributes:
        rates: the learning rate of each step that was done.
        durations: seconds of the steps that this process did.
        interrupted: whether Ctrl-C ended it.
    """

    def __init__(
        self,
        seconds: float,
        steps: int,
        peak: float,
        update: Callable[[float, str], None],
        replay: list[float] | None = None,
        earlier: int = 0,
        twin_step: float = 0.0,
        twin_cost: float | None = None,
        goes_on: bool = False,
        now: Callable[[], float] = time.monotonic,
    ):
        self.seconds, self.steps, self.peak, self.update, self.replay = seconds, steps, peak, update, replay
        self.earlier, self.twin_step, self.twin_cost = earlier, twin_step, twin_cost
        self.goes_on, self.now = goes_on, now
        self.rates: list[float] = []
        self.durations: list[float] = []
        self.interrupted = False
        self._used_before = 0.0
        self._start = self._saved = self._step_begun = now()
        self._stop = threading.Event()

    @property
    def used(self) -> float:
        """Seconds of this round, over all parts if it was interrupted."""
        return self._used_before + self.now() - self._start

    @property
    def own_seconds(self) -> float:
        """Of the share, those for this training; the others are for its twin."""
        if self.twin_cost is not None:
            return self.seconds / (1.0 + self.twin_cost)
        step = self.step_seconds
        return self.seconds * step / (step + self.twin_step) if self.twin_step else self.seconds

    @property
    def step_seconds(self) -> float:
        """What a step takes: the mean of the last ones, without the first of a process, which takes longer."""
        recent = self.durations[1:][-_RECENT_STEPS:] or self.durations
        return sum(recent) / len(recent) if recent else self.now() - self._step_begun

    @property
    def steps_that_fit(self) -> float:
        """Of this round, those that are done among them; asked in the middle of a step."""
        done = len(self.rates) - self.earlier
        left = self.own_seconds - self.used + self.now() - self._step_begun
        return min(done + max(left / max(self.step_seconds, 1e-9), 1.0), self.steps - self.earlier)

    @property
    def fraction(self) -> float:
        """How much of this round is done, 0 to 1: of the time, or of the steps if those come to an end before."""
        of_steps = (len(self.rates) - self.earlier) / max(self.steps - self.earlier, 1)
        return min(max(self.used / self.own_seconds, of_steps), 1.0)

    def rate(self) -> float:
        """The learning rate of the step that is being made."""
        if self.replay is not None:
            return self.replay[min(len(self.rates), len(self.replay) - 1)]
        step, steps = len(self.rates) - self.earlier, self.steps_that_fit
        warm = max(WARMUP * steps, 1.0)
        return self.peak * min((step + 1) / warm, (steps - step) / (steps - warm + 1))

    def resume(self, checkpoint: str) -> None:
        """Take up the clock and the record of a run that was interrupted, or the record of the round before."""
        states = read_json(Path(checkpoint) / TRAINER_STATE_NAME, fields={"stateful_callbacks": dict})[
            "stateful_callbacks"
        ]
        record = states[type(self).__name__]["attributes"]
        self.rates = record["rates"]
        if len(self.rates) > self.earlier:  # else it is where the round before ended
            self._used_before, self.twin_cost = record["used"], record["twin_cost"]
            self.seconds = record["seconds"] or self.seconds

    def state(self) -> dict:
        """What the trainer writes into its own state of each checkpoint."""
        seconds = self.seconds if math.isfinite(self.seconds) else None
        record = {"used": self.used, "seconds": seconds, "twin_cost": self.twin_cost, "rates": self.rates}
        return {"args": {}, "attributes": record}

    def on_train_begin(self, args, state, control, **kwargs):
        self._saved = self._step_begun = self.now()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        rate = self.rate()
        for group in optimizer.param_groups:
            group["lr"] = rate
        self.rates.append(rate)

    def on_step_end(self, args, state, control, **kwargs):
        self.durations.append(self.now() - self._step_begun)
        self._step_begun = self.now()
        if self.twin_cost is None:
            # First steps both, on the same rows. The twin's has no teacher: that it took longer was other load.
            self.twin_cost = min(self.twin_step / max(self.durations[0], 1e-9), 1.0)
        finished = self.used + self.step_seconds > self.own_seconds or state.global_step >= self.steps
        self.interrupted = self._stop.is_set()
        control.should_training_stop = self.interrupted or finished
        due = self.now() - self._saved > _SECONDS_BETWEEN_SAVES
        if self.interrupted or due or (finished and self.goes_on):
            control.should_save, self._saved = True, self.now()
        self.update(self.fraction, f"step {state.global_step} of {self._expected()}")

    def _expected(self) -> str:
        """Steps of the whole training, as far as it is known."""
        if self.replay is not None:
            return str(self.steps)
        return f"about {self.earlier + max(round(self.steps_that_fit), len(self.rates) - self.earlier)}"

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

    The trainer's optimizer is AdamW with the share's learning rate. Returns `steps` of all rounds, `step_seconds` of
    this one, the learning `rates` and the `curve` of the losses, in means over at most `_CURVE_POINTS` stretches.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    assert trainer.model is not None and trainer.args.output_dir is not None  # their constructors see to it
    # All of them, for a later round may train those that have no gradient in this one.
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=share.peak, weight_decay=0.0, fused=True)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1.0)
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
        "step_seconds": share.step_seconds,
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
