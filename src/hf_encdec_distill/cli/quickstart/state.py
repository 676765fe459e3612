"""The memory of a run that can be interrupted: what it was asked for, what is finished, and the time that is used."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from ...files import check_fields, check_positive, is_used, read_json, write_json
from .._checkpoints import last_whole_checkpoint
from .._inputs import BUILT_IN, check_columns
from .._recipe import checked
from .planning import Plan
from .recipe import (
    DECODER_LAYERS,
    ENCODER_LAYERS,
    ENOUGH_ROWS,
    FIRST_ROWS,
    FROZEN_BELOW_MINUTES,
    MAX_PROMPT,
    VOCABULARY,
)


_FILE = "state.json"
_FIELDS = {"settings": dict, "seconds_used": float, "begun": dict, "results": dict, "earlier": dict}
_EARLIER = {"rounds": int, "minutes": float, "seconds": float, "steps": int, "twin_cost": float, "stages": dict}
# The stages, in their order.
TITLES = {
    "teacher": "fetch the teacher",
    "data": "mine the data",
    "before": "evaluate the teacher as it is",
    "teach": "teach the teacher the task",
    "start": "cut the student from the teacher",
    "frozen": "train its decoder on the records",
    "more": "mine more data to train on",
    "distill": "train the student on the teacher",
    "twin": "train its twin on the labels alone",
    "evaluate": "evaluate on held-out rows",
    "latency": "measure the latency",
    "report": "write the report",
}
TRAININGS = {"distill": "training-student", "twin": "training-student-ce"}  # folders in work/, with their checkpoints
_ONCE_A_ROUND = (*TRAININGS, "evaluate", "report")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run was asked for; kept in its folder, so that --resume needs to be told nothing."""

    minutes: float = 12.0
    seed: int = 0
    teacher: str = BUILT_IN
    dataset: str = BUILT_IN
    source_column: str = "source"
    target_column: str = "target"
    prompt_template: str | None = None
    encoder_layers: int = ENCODER_LAYERS
    decoder_layers: int = DECODER_LAYERS
    vocabulary: int = VOCABULARY
    twin: bool = False

    def __post_init__(self):
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes={self.minutes} is no time to work in: give a number above 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} is out of range: give one from 0 to {2**32 - 1}")
        for side in ("encoder_layers", "decoder_layers"):
            if getattr(self, side) < 1:
                raise ValueError(f"{side}={getattr(self, side)}: a student needs at least one layer on either side")
        if self.vocabulary < 0:
            raise ValueError(f"vocabulary={self.vocabulary}: give a number of tokens, or 0 for the teacher's own")
        check_columns(self.dataset, self.source_column, self.target_column)
        if self.prompt_template is not None and "{source}" not in self.prompt_template:
            raise ValueError(
                f"prompt_template={self.prompt_template!r} lacks the source: put {{source}} where it goes"
            )

    @property
    def is_built_in_task(self) -> bool:
        return self.dataset == BUILT_IN


class State:
    """`state.json` of a run's folder; `open_run` makes one.

    A run has rounds: the first, and one for each time that it was continued after its end. `settings.minutes` are
    those of the round that is under way, `earlier` sums up the others: `rounds`, `minutes`, `seconds`, `steps` of each
    student, `twin_cost` (a step of the twin, in steps of the student; 0 where there is none), and the seconds of the
    `stages`.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        results: dict[str, dict] | None = None,
        begun: dict[str, float] | None = None,
        seconds: float = 0.0,
        earlier: dict[str, Any] | None = None,
        now: Callable[[], float] = time.monotonic,
        start: float | None = None,
    ):
        self.folder, self.settings, self.now = folder, settings, now
        self.results: dict[str, dict] = results or {}
        self.begun: dict[str, float] = begun or {}
        self.earlier: dict[str, Any] = earlier or {
            "rounds": 0,
            "minutes": 0.0,
            "seconds": 0.0,
            "steps": 0,
            "twin_cost": 0.0,
            "stages": {},
        }
        self._seconds_before, self._start = seconds, now() if start is None else start

    @property
    def seconds_used(self) -> float:
        """Wall-clock seconds of all parts of the run."""
        return self._seconds_before + self.now() - self._start

    @property
    def seconds_left(self) -> float:
        """Of the round."""
        return 60.0 * self.settings.minutes - (self.seconds_used - self.earlier["seconds"])

    @property
    def minutes(self) -> float:
        """That all rounds were given."""
        return self.earlier["minutes"] + self.settings.minutes

    @property
    def max_prompt(self) -> int:
        """Tokens; those of runs before it was noted are the recipe's."""
        return self.results["teacher"].get("max_prompt", MAX_PROMPT)

    @property
    def begins_frozen(self) -> bool:
        """Whether the encoder is, in the run's first steps. A twin replays all steps of its student from the start."""
        return bool(self.results["start"]["recorded"]) if "start" in self.results else not self.settings.twin

    @property
    def is_frozen(self) -> bool:
        """Whether it is in all steps of this round."""
        return self.settings.minutes < FROZEN_BELOW_MINUTES and not self.earlier["rounds"]

    @property
    def unfreezes(self) -> bool:
        """Whether it is in some of the first round's, for which that has the stage `frozen`."""
        return "frozen" in self.results or (self.begins_frozen and not self.is_frozen and not self.earlier["rounds"])

    @property
    def reads_more(self) -> bool:
        """Whether a run of the built-in task, which begins with the standard library alone, goes on with more."""
        is_long = self.settings.minutes >= FROZEN_BELOW_MINUTES
        return "more" in self.results or (self.begins_frozen and is_long and self.settings.is_built_in_task)

    @property
    def steps_before(self) -> int:
        """Of each student, before the stage `distill`: with a frozen encoder, or in earlier rounds."""
        return self.earlier["steps"] or self.results.get("frozen", {}).get("steps", 0)

    @property
    def trainings(self) -> list[str]:
        """Stages that train a student."""
        return [name for name in TRAININGS if name != "twin" or self.settings.twin]

    def begin(self, stage: str) -> None:
        self.begun.setdefault(stage, self.seconds_used)
        if self.results:  # nothing is written before the first stage is done: a wrong path leaves no run behind
            self.save()

    def finish(self, stage: str, result: dict) -> None:
        """Note the result of a stage, and the `seconds` since it first began."""
        self.results[stage] = result | {"seconds": self.seconds_used - self.begun[stage]}
        self.save()

    def stage_seconds(self, stage: str) -> float:
        """Of all rounds."""
        return self.earlier["stages"].get(stage, 0.0) + self.results[stage]["seconds"]

    def go_on(self, minutes: float) -> None:
        """Begin another round after the last stage of one.

        The students train on, with all their weights, and what depends on them is made again. The untuned teacher is
        measured again only where there was no time for enough rows, and now there is.

        Raises:
            ValueError: the last checkpoints are not there any more.
        """
        for stage in self.trainings:
            folder, steps = TRAININGS[stage], self.results["distill"]["steps"]
            checkpoint = last_whole_checkpoint(self.folder / "work" / folder)
            if checkpoint is None or int(checkpoint.rpartition("-")[2]) != steps:
                raise ValueError(
                    f"{self.folder / 'work' / folder} has no whole checkpoint of step {steps}, from which the run "
                    "could go on: begin another run in another folder with --output"
                )
        distill = self.results["distill"]
        self.earlier = {
            "rounds": self.earlier["rounds"] + 1,
            "minutes": self.minutes,
            "seconds": self._seconds_before,
            "steps": distill["steps"],
            "twin_cost": self.results["twin"]["step_seconds"] / distill["step_seconds"] if self.settings.twin else 0.0,
            "stages": {name: self.stage_seconds(name) for name in self.results},
        }
        for name in _ONCE_A_ROUND:
            self.results.pop(name, None)
        self._plan_rows(60.0 * minutes)
        for name in self.results:  # what is not done again
            del self.earlier["stages"][name]
        self.begun = {name: when for name, when in self.begun.items() if name in self.results}
        self.settings = dataclasses.replace(self.settings, minutes=minutes)

    def _plan_rows(self, seconds: float) -> None:
        before, available = self.results["before"], self.results["data"]["sizes"]["test"]
        plan, measured = Plan(**before["plan"]), len(before["ce"])
        if plan.for_run(seconds, 0, available).held_out > measured < min(ENOUGH_ROWS, available):
            del self.results["before"]
        else:
            few = min(measured, FIRST_ROWS)
            before["plan"]["held_out"] = plan.for_run(seconds, few, measured, first=False).held_out

    def save(self) -> None:
        content = {
            "settings": dataclasses.asdict(self.settings),
            "seconds_used": self.seconds_used,
            "begun": self.begun,
            "results": self.results,
            "earlier": self.earlier,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _FILE, content)


def open_run(
    folder: Path,
    given: dict[str, Any],
    resume: bool,
    now: Callable[[], float] = time.monotonic,
    start: float | None = None,
) -> State:
    """Begin a run in a new folder, take up the one that is there, or continue it where it is finished.

    Args:
        given: the settings that the user named; a resumed run has to agree with them. `minutes` continue a finished
            run for as long.
        now, start: the clock, and when the command began.

    Raises:
        ValueError: the folder is in use and `resume` is not set, there is nothing to resume, a setting differs, or the
            minutes of a new run are too few for a twin.
    """
    if not resume:
        if _is_in_use(folder):
            raise ValueError(
                f"{folder} is not empty: go on with the run that is in it with --resume, or choose another folder "
                "with --output"
            )
        settings = Settings(**given)
        if settings.twin and settings.minutes < FROZEN_BELOW_MINUTES:
            raise ValueError(
                f"twin=True, but minutes={settings.minutes:g}: so few are for one student; give --minutes "
                f"{FROZEN_BELOW_MINUTES} or more, or leave --twin out"
            )
        return State(folder, settings, now=now, start=start)
    try:
        content = read_json(folder / _FILE, fields=_FIELDS)
    except FileNotFoundError:
        raise ValueError(
            f"there is no run in {folder} to resume: name its folder with --output, or begin one without --resume"
        ) from None
    where = str(folder / _FILE)
    results, begun, earlier = (content[name] for name in ("results", "begun", "earlier"))
    check_fields(results, dict.fromkeys(results, dict), f"{where}, results")
    check_fields(begun, dict.fromkeys(begun, float), f"{where}, begun")
    check_fields(earlier, _EARLIER, f"{where}, earlier")
    try:
        if "max_prompt" in results.get("teacher", {}):
            check_fields(results["teacher"], {"max_prompt": int}, f"{where}, results, teacher")
            check_positive(results["teacher"], ["max_prompt"], f"{where}, results, teacher")
        if "data" in results:
            check_fields(results["data"], {"sizes": dict, "teacher": str, "tokens": list}, f"{where}, results, data")
        if "before" in results:  # else there is no plan yet
            check_fields(results["before"], {"plan": dict}, f"{where}, results, before")
            check_fields(results["before"]["plan"], get_type_hints(Plan), f"{where}, results, before, plan")
    except ValueError as error:
        raise ValueError(f"{error}: another version began this run; begin one with another --output") from None
    hints = get_type_hints(Settings)
    settings = Settings(**checked(content["settings"], hints, f"{where}, settings", "those of `quickstart --help`"))
    is_finished = "report" in results
    for name, value in given.items():
        if getattr(settings, name) != value and not (name == "minutes" and is_finished):
            end = "leave --minutes out; they can be added once it is finished" if name == "minutes" else ""
            raise ValueError(
                f"the run in {folder} was begun with {name}={getattr(settings, name)!r}, not {value!r}: "
                + (end or f"leave --{name.replace('_', '-')} out, or begin another run in another folder")
            )
    state = State(folder, settings, results, begun, content["seconds_used"], earlier, now, start)
    if is_finished and "minutes" in given:
        state.go_on(Settings(minutes=given["minutes"]).minutes)
    return state


def _is_in_use(folder: Path) -> bool:
    """Whether a folder has more than a run that stopped before its first model was measured: for a column that is not
    there, say. Nothing of it is lost when it is begun again."""
    try:
        return not read_json(folder / _FILE, fields=_FIELDS)["results"].keys() <= {"teacher", "data"}
    except (OSError, ValueError):
        return is_used(folder)
