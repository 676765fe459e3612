"""One bench: contenders made ready, then timed in interleaved rounds, then a report.

What keeps it fair: each contender is a process of its own with the same number of threads (`worker.py`); all answer
the same text with the same number of tokens in and out; a round is a turn of every contender, so a machine that slows
down slows all of them; the first round warms up and is not counted.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from .. import __version__
from ..files import sha256
from ..models.cost import model_cost
from .contenders import Contender, Model
from .floors import counted, floor
from .latency import machine_description, quartiles, timings
from .results import TIMES, VERSION, headlines
from .worker import Failed, Worker


# The shares of the time by which the last conversion, load and warm-up have to have begun.
_CONVERTED, _LOADED, _WARM = 0.5, 0.65, 0.85
# What a contender may take in memory: so many times its files, and so many bytes for the packages that it imports.
_TIMES_FILES, _PACKAGES = 3, 5e8
_SETTLE = (
    0.1  # seconds; threads of OpenMP spin for 20 ms after an answer, and would take a core from the next contender
)

Stage = Callable[[str], AbstractContextManager[Callable[[float, str], None]]]  # `progress.Display.stage`


@dataclass(frozen=True)
class Request:
    """Tokens of the prompt as a decoder-only model reads it, tokens of the answer, rows that are answered at once."""

    source: int
    target: int
    batch: int

    def __str__(self) -> str:
        return f"{self.source} tokens in, {self.target} out, batch {self.batch}"


@dataclass(eq=False)
class _Runner:
    """A contender that is loaded, and what it has answered."""

    contender: Contender
    folder: Path
    worker: Worker
    answers: dict[Request, list[dict]] = field(default_factory=dict)


_Turn = tuple[_Runner, Request]


def race(
    models: Mapping[str, Model],
    contenders: Sequence[Contender],
    requests: Sequence[Request],
    prompts: Callable[[Model, Request, int], list[list[int]]],
    folder: Path,
    threads: int,
    rounds: int,
    minutes: float,
    stage: Stage,
) -> dict[str, Any]:
    """Run a bench.

    Args:
        models: those of the contenders, by name.
        contenders: in the order of how much it matters that they are there, should time run short.
        prompts: the token ids of a model's prompts for a request in a round.
        folder: for what contenders are converted to; what is there already is used again.
        rounds: measured ones, fewer if there is no time for all of them.
        minutes: in which it shall be over.
        stage: shows where it is.

    Returns:
        The report: `bench.json`, see docs/bench.md.

    Raises:
        ValueError: a contender answers with another number of tokens than it was asked for, not one is left, or the
            rates of a device cannot be measured.
    """
    bench = _Bench(models, prompts, folder, threads, minutes, stage)
    machine = {**machine_description(), "threads": threads}
    ready, rates = bench.convert(contenders)
    with ExitStack() as stack:
        runners = bench.load(ready, stack)
        costs = bench.warm_up([(runner, request) for request in requests for runner in runners])
        rounds, kept = plan(costs, bench.seconds_left(), rounds, lambda turn: bench.kind(turn[0].contender))
        for runner, request in [turn for turn in costs if turn not in kept]:
            bench.leave_out(runner.contender, "no time for a round with it: give --minutes more", request)
        turns = bench.measure([turn for turn in costs if turn in kept], rounds)
    rows = [
        _row(runner, request, models[runner.contender.model], rates[runner.contender.device])
        for runner, request in turns
    ]
    if not rows:
        reasons = "; ".join(
            f"{out['model']}, {out['backend']} {out['precision']}: {out['why']}" for out in bench.left_out
        )
        raise ValueError(f"nothing could be measured: {reasons}")
    return {
        "version": VERSION,
        "package": __version__,
        "machine": machine,
        "rates": rates,
        "rounds": rounds,
        "spread": f"median and quartiles of {rounds} interleaved rounds",
        "headlines": headlines(rows),
        "rows": rows,
        "left_out": bench.left_out,
    }


class _Bench:
    """The parts of a bench; arguments as of `race`. `left_out` says who has no row, and why."""

    def __init__(self, models, prompts, folder: Path, threads: int, minutes: float, stage: Stage):
        self.models, self.prompts, self.folder, self.threads, self.stage = models, prompts, folder, threads, stage
        self.begin, self.seconds = time.monotonic(), 60 * minutes
        self.left_out: list[dict[str, Any]] = []

    def seconds_left(self) -> float:
        return self.begin + self.seconds - time.monotonic()

    def is_in_time(self, share: float) -> bool:
        return self.seconds_left() > (1 - share) * self.seconds

    def leave_out(self, contender: Contender, why: str, request: Request | None = None) -> None:
        names = {name: getattr(contender, name) for name in ("model", "backend", "precision")}
        self.left_out.append({**names, **(asdict(request) if request else {}), "why": why})

    def convert(self, contenders: Sequence[Contender]) -> tuple[list[tuple[Contender, Path]], dict[str, dict]]:
        """Contenders with the folders that they are loaded from; the rates of the devices that they compute on."""
        ready: list[tuple[Contender, Path]] = []
        with self.stage("convert") as show:
            missing = [contender.missing() for contender in contenders]
            there = [contender for contender, why in zip(contenders, missing, strict=True) if why is None]
            with Worker(None, self.threads) as worker:
                devices = dict.fromkeys(["cpu", *(contender.device for contender in there)])
                rates = {device: self._rates(worker, device) for device in devices}
            for index, (contender, why) in enumerate(zip(contenders, missing, strict=True)):
                show(index / len(contenders), _name(contender))
                if why is None:
                    try:
                        needed = self._is_first_of_its_kind(contender, [other for other, _ in ready])
                        ready.append((contender, self._converted(contender, needed)))
                        continue
                    except Failed as failure:
                        why = str(failure)
                self.leave_out(contender, why)
        return ready, rates

    def _is_first_of_its_kind(self, contender: Contender, others: Sequence[Contender]) -> bool:
        """A student or a decoder-only model that has none beside it: without it there would be nothing to compare, so
        it is made ready however late it is."""
        return all(self.kind(other) != self.kind(contender) for other in others)

    def kind(self, contender: Contender) -> str:
        return "student" if self.models[contender.model].is_student else "decoder-only"

    def _rates(self, worker: Worker, device: str) -> dict[str, float]:
        """
        Raises:
            ValueError: they cannot be measured, and without them there is no floor.
        """
        try:
            return worker.ask("rates", threads=self.threads, device=device)
        except Failed as failure:
            raise ValueError(
                f"what {device} reads and multiplies in a second could not be measured: {failure}; mend that, or name "
                "backends that compute elsewhere with --backend"
            ) from failure

    def _converted(self, contender: Contender, needed: bool) -> Path:
        """What the contender is loaded from: its source, or a conversion of it that is whole.

        Raises:
            Failed: it cannot be converted, or not in time and is not needed.
        """
        if type(contender).prepare is Contender.prepare:
            return Path(contender.source)
        key = _hash(Path(contender.source))[:12]
        converted = self.folder / f"{contender.backend}-{contender.precision}-{key}-{__version__}"
        if not converted.exists():
            if not (needed or self.is_in_time(_CONVERTED)):
                raise Failed("no time to convert it: give --minutes more, or run it again, which goes on from here")
            partial = self.folder / f"{converted.name}.new"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                with Worker(contender, self.threads) as worker:
                    worker.ask("prepare", folder=str(partial))
                partial.rename(converted)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return converted

    def load(self, ready: Sequence[tuple[Contender, Path]], stack: ExitStack) -> list[_Runner]:
        """Processes that are ready to answer, until `stack` ends."""
        runners: list[_Runner] = []
        with self.stage("load") as show:
            for index, (contender, converted) in enumerate(ready):
                show(index / len(ready), _name(contender))
                free = psutil.virtual_memory().available
                needed = self._is_first_of_its_kind(contender, [runner.contender for runner in runners])
                if not (needed or self.is_in_time(_LOADED)):
                    self.leave_out(contender, "no time to load it: give --minutes more")
                    continue
                if free < _TIMES_FILES * _size(contender, converted) + _PACKAGES:
                    why = f"no memory to load it beside the others, {free / 1e9:.1f} GB are left"
                    self.leave_out(contender, f"{why}: choose fewer with --backend and --precision")
                    continue
                worker = stack.enter_context(Worker(contender, self.threads))
                try:
                    worker.ask("load", folder=str(converted), threads=self.threads)
                    runners.append(_Runner(contender, converted, worker))
                except Failed as failure:
                    self.leave_out(contender, str(failure))
        return runners

    def warm_up(self, turns: Sequence[_Turn]) -> dict[_Turn, float]:
        """The seconds that each turn takes."""
        costs: dict[_Turn, float] = {}
        with self.stage("warm up") as show:
            for index, (runner, request) in enumerate(turns):
                show(index / len(turns), f"{_name(runner.contender)}, {request}")
                start = time.monotonic()
                needed = self._is_first_of_its_kind(runner.contender, [other.contender for other, _ in costs])
                if not (needed or self.is_in_time(_WARM)):
                    self.leave_out(runner.contender, "no time to warm up: give --minutes more", request)
                elif self._answer(runner, request, 0):
                    costs[runner, request] = time.monotonic() - start
        return costs

    def measure(self, turns: Sequence[_Turn], rounds: int) -> list[_Turn]:
        """Interleaved rounds; the turns that were there in all of them."""
        failed: set[_Turn] = set()
        with self.stage(f"measure {rounds} rounds") as show:
            for number in range(rounds):
                for index, (runner, request) in enumerate(turns):
                    show((number + index / len(turns)) / rounds, f"{_name(runner.contender)}, {request}")
                    if (runner, request) not in failed and not self._answer(runner, request, number + 1):
                        failed.add((runner, request))
        return [turn for turn in turns if turn not in failed]

    def _answer(self, runner: _Runner, request: Request, number: int) -> bool:
        """Have a request answered, the `number`th of its kind; whether that went well.

        Raises:
            ValueError: see `check_answer`.
        """
        ids = self.prompts(self.models[runner.contender.model], request, number)
        time.sleep(_SETTLE)
        try:
            answer = runner.worker.ask("answer", prompts=ids, new_tokens=request.target)
        except Failed as failure:
            self.leave_out(runner.contender, str(failure), request)
            return False
        check_answer(answer["tokens"], answer["times"], request, _name(runner.contender))
        runner.answers.setdefault(request, []).append(answer)
        return True


def _name(contender: Contender) -> str:
    return f"{contender.model}, {contender.backend} {contender.precision}"


def _hash(folder: Path) -> str:
    """Of what a model's files say."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin", ".model"))
    return hashlib.sha256("".join(f"{path.name} {sha256(path)}\n" for path in files).encode()).hexdigest()


def check_answer(tokens: Sequence[Sequence[int]], times: Sequence[float], request: Request, name: str) -> None:
    """
    Raises:
        ValueError: it is not of the length that was asked for.
    """
    lengths = sorted({len(row) for row in tokens})
    if len(tokens) != request.batch or lengths != [request.target] or len(times) != request.target:
        raise ValueError(
            f"{name} answered {len(tokens)} rows of {' or '.join(map(str, lengths)) or 'no'} tokens with {len(times)} "
            f"times, expected {request.batch} of {request.target}: nothing is reported, since times of other lengths "
            "cannot be compared; leave it out with --backend, and report it"
        )


def plan(
    costs: Mapping[Any, float], seconds: float, rounds: int, kind: Callable[[Any], str] = lambda turn: "any"
) -> tuple[int, set]:
    """How many rounds there is time for, and with whom.

    Rounds are given up first. Where there is no time for even one, those go that take longest, but for one of each
    kind.

    Args:
        costs: seconds that each turn takes.
        seconds: what is left.
        rounds: that were asked for.
        kind: of a turn.
    """
    kept = dict(costs)
    while sum(kept.values()) > seconds:
        of_kind = Counter(map(kind, kept))
        others = [turn for turn in kept if of_kind[kind(turn)] > 1]
        if not others:
            break
        del kept[max(others, key=lambda turn: kept[turn])]
    whole = sum(kept.values())
    return max(1, min(rounds, int(seconds / whole) if whole else rounds)), set(kept)


def _row(runner: _Runner, request: Request, model: Model, rates: Mapping[str, float]) -> dict[str, Any]:
    contender = runner.contender
    warm, *answers = runner.answers[request]
    measured = [timings(answer["times"]) for answer in answers]
    values = {name: quartiles([of_round[name] for of_round in measured]) for name in TIMES}
    cost = model_cost(model.config, request.source, request.target, torch.float32)
    counts = counted(cost, contender.precision, request.batch)
    least = floor(counts, contender.precision, request.target, rates)
    return {
        "model": contender.model,
        "backend": contender.backend,
        "precision": contender.precision,
        "parameters": cost.parameters["total"],
        **asdict(request),
        **values,
        "requests_per_second": 1e3 * request.batch / values["request_ms"]["value"],
        "cores": max(answer["cores"] for answer in answers),
        "peak_mb": answers[-1]["peak_mb"],
        "memory_mb": answers[-1]["memory_mb"],
        "disk_mb": _size(contender, runner.folder) / 1e6,
        "counted": counts,
        "floor": least,
        "over_floor": {name: values[name]["value"] / least[name] for name in TIMES},
        "measured": [{name: of_round[name] for name in TIMES} for of_round in measured],
    }


def _size(contender: Contender, folder: Path) -> int:
    """Bytes of what a contender is loaded from: of a conversion all files, since an `.mlpackage` is a folder; of its
    source those on top, since exports and checkpoints may lie below."""
    files = folder.iterdir() if folder == Path(contender.source) else folder.rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())
