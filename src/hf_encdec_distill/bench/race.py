"""One bench: contenders made ready, then timed in interleaved rounds, then a report.

What keeps it fair: each contender is a process of its own with the same number of threads (`worker.py`); all answer
the same text with the same number of tokens in and out; a round is a turn of every contender, so a machine that slows
down slows all of them; the first round warms up and is not counted.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..export.runtime import sha256
from ..models.cost import ModelCost, model_cost
from .contenders import Contender, Model
from .floors import counted, floor
from .latency import machine_description, quartiles, timings
from .results import VERSION, headlines
from .worker import Failed, Worker


# The shares of the time by which preparing, loading and warming up have to have begun.
_PREPARED, _LOADED, _WARM = 0.5, 0.65, 0.85
_TIMINGS = ("first_token_ms", "step_ms", "request_ms")

Stage = Callable[[str], AbstractContextManager[Callable[[float, str], None]]]  # `progress.Display.stage`


@dataclass(frozen=True)
class Request:
    """Tokens of the prompt as a decoder-only model reads it, tokens of the answer, rows that are answered at once."""

    source: int
    target: int
    batch: int

    def __str__(self) -> str:
        return f"{self.source} tokens in, {self.target} out, batch {self.batch}"


@dataclass
class _Runner:
    """A contender on its way through a bench."""

    contender: Contender
    folder: Path
    worker: Worker
    answers: dict[Request, list[dict]] = field(default_factory=dict)


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
        models: by name; those of the contenders.
        contenders: in the order of how much it matters that they are there, should time run short.
        prompts: the token ids of a model's prompts for a request in a round.
        folder: for what contenders are converted to; what is there already is used again.
        rounds: measured ones, fewer if there is no time for all of them.
        minutes: in which it shall be over.
        stage: shows where it is.

    Returns:
        The report: `bench.json`, see docs/bench.md.

    Raises:
        ValueError: a contender answers with another number of tokens than it was asked for, or not one is left.
    """
    begin, left_out = time.monotonic(), []

    def share() -> float:
        return (time.monotonic() - begin) / (60 * minutes)

    def leave_out(contender: Contender, why: str, request: Request | None = None) -> None:
        names = {name: getattr(contender, name) for name in ("model", "backend", "precision")}
        left_out.append({**names, **(asdict(request) if request else {}), "why": why})

    machine = {**machine_description(), "threads": threads}
    with stage("convert") as show:
        ready = []
        for index, contender in enumerate(contenders):
            show(index / len(contenders), _name(contender))
            why = contender.missing()
            if why is None:
                try:
                    ready.append((contender, _prepare(contender, folder, threads, share() < _PREPARED)))
                    continue
                except Failed as failure:
                    why = str(failure)
            leave_out(contender, why)
        with Worker(None, threads) as worker:
            devices = dict.fromkeys(["cpu", *(contender.device for contender, _ in ready)])
            rates = {device: worker.ask("rates", threads=threads, device=device) for device in devices}

    with ExitStack() as stack:
        runners = []
        with stage("load") as show:
            for index, (contender, prepared) in enumerate(ready):
                show(index / len(ready), _name(contender))
                if share() > _LOADED:
                    leave_out(contender, "no time to load it: give --minutes more")
                    continue
                runner = _Runner(contender, prepared, stack.enter_context(Worker(contender, threads)))
                try:
                    runner.worker.ask("load", folder=str(prepared), threads=threads)
                    runners.append(runner)
                except Failed as failure:
                    leave_out(contender, str(failure))
        turns = [(runner, request) for request in requests for runner in runners]

        def turn(runner: _Runner, request: Request, number: int) -> bool:
            ids = prompts(models[runner.contender.model], request, number)
            try:
                answer = runner.worker.ask("answer", prompts=ids, new_tokens=request.target)
            except Failed as failure:
                leave_out(runner.contender, str(failure), request)
                return False
            check_answer(answer["tokens"], answer["times"], request, _name(runner.contender))
            runner.answers.setdefault(request, []).append(answer)
            return True

        with stage("warm up") as show:
            costs: dict[tuple[int, Request], float] = {}
            for index, (runner, request) in enumerate(turns):
                show(index / len(turns), f"{_name(runner.contender)}, {request}")
                if share() > _WARM:
                    leave_out(runner.contender, "no time to warm up: give --minutes more", request)
                    continue
                start = time.monotonic()
                if turn(runner, request, 0):
                    costs[id(runner), request] = time.monotonic() - start
        rounds, kept = plan(costs, 60 * minutes * (1 - share()), rounds)
        for runner, request in turns:
            if (id(runner), request) in costs and (id(runner), request) not in kept:
                leave_out(runner.contender, "no time for a round with it: give --minutes more", request)
        turns = [(runner, request) for runner, request in turns if (id(runner), request) in kept]
        with stage(f"measure {rounds} rounds") as show:
            for number in range(1, rounds + 1):
                for index, (runner, request) in enumerate(list(turns)):
                    show((number - 1 + index / len(turns)) / rounds, f"{_name(runner.contender)}, {request}")
                    if not turn(runner, request, number):
                        turns.remove((runner, request))
    rows = [
        _row(runner, request, models[runner.contender.model], rates[runner.contender.device])
        for runner, request in turns
    ]
    if not rows:
        reasons = "; ".join(f"{out['model']}, {out['backend']} {out['precision']}: {out['why']}" for out in left_out)
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
        "left_out": left_out,
    }


def _name(contender: Contender) -> str:
    return f"{contender.model}, {contender.backend} {contender.precision}"


def _prepare(contender: Contender, folder: Path, threads: int, in_time: bool) -> Path:
    """What the contender is loaded from: its source, or a conversion of it that is whole.

    Raises:
        Failed: it cannot be converted, or not in time.
    """
    if type(contender).prepare is Contender.prepare:
        return Path(contender.source)
    key = _hash(Path(contender.source))[:12]
    prepared = folder / f"{contender.backend}-{contender.precision}-{key}-{__version__}"
    if not prepared.exists():
        if not in_time:
            raise Failed("no time to convert it: give --minutes more, or run it again, which goes on from here")
        partial = folder / f"{prepared.name}.new"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with Worker(contender, threads) as worker:
                worker.ask("prepare", folder=str(partial))
            partial.rename(prepared)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return prepared


def _hash(folder: Path) -> str:
    """Of what a model's files say."""
    import hashlib

    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
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


def plan(costs: Mapping[Any, float], seconds: float, rounds: int) -> tuple[int, set]:
    """How many rounds there is time for, and with whom.

    Rounds are given up first. Where there is no time for even one, those go that take longest.

    Args:
        costs: seconds of a turn of each.
        seconds: what is left.
        rounds: that were asked for.
    """
    kept = dict(costs)
    while len(kept) > 1 and sum(kept.values()) > seconds:
        del kept[max(kept, key=lambda key: kept[key])]
    whole = sum(kept.values())
    return max(1, min(rounds, int(seconds / whole) if whole else rounds)), set(kept)


def _row(runner: _Runner, request: Request, model: Model, rates: Mapping[str, float]) -> dict[str, Any]:
    contender = runner.contender
    warm, *answers = runner.answers[request]
    measured = [timings(answer["times"]) for answer in answers]
    values = {name: quartiles([of_round[name] for of_round in measured]) for name in _TIMINGS}
    cost = _cost(model, request)
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
        "disk_mb": sum(path.stat().st_size for path in runner.folder.iterdir() if path.is_file()) / 1e6,
        "counted": counts,
        "floor": least,
        "over_floor": {name: values[name]["value"] / least[name] for name in _TIMINGS},
        "measured": [{name: of_round[name] for name in _TIMINGS} for of_round in measured],
    }


def _cost(model: Model, request: Request) -> ModelCost:
    import torch

    return model_cost(model.config, request.source, request.target, torch.float32)
