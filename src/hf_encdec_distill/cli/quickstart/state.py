"""The memory of a run that can be interrupted: what it was asked for, what is finished, and the time that is used."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, get_type_hints

from ...files import check_fields, read_json, write_json
from .._inputs import BUILT_IN
from .._recipe import checked


_FILE = "state.json"
_FIELDS = {"settings": dict, "seconds_used": float, "shares": dict, "results": dict}


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
    encoder_layers: int = 11
    decoder_layers: int = 4

    def __post_init__(self):
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes={self.minutes} is no time to work in: give a number above 0")
        for side in ("encoder_layers", "decoder_layers"):
            if getattr(self, side) < 1:
                raise ValueError(f"{side}={getattr(self, side)}: a student needs at least one layer on either side")
        if self.prompt_template is not None and "{source}" not in self.prompt_template:
            raise ValueError(
                f"prompt_template={self.prompt_template!r} lacks the source: put {{source}} where it goes"
            )


class State:
    """`state.json` of a run's folder; `open_run` makes one."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        results: dict[str, dict] | None = None,
        shares: dict[str, float] | None = None,
        seconds: float = 0.0,
    ):
        self.folder, self.settings = folder, settings
        self.results: dict[str, dict] = results or {}
        self.shares: dict[str, float] = shares or {}
        self._seconds_before, self._start = seconds, time.monotonic()

    @property
    def seconds_used(self) -> float:
        """Wall-clock seconds of all parts of the run."""
        return self._seconds_before + time.monotonic() - self._start

    @property
    def seconds_left(self) -> float:
        return 60.0 * self.settings.minutes - self.seconds_used

    def begin(self, stage: str, share: float) -> float:
        """The seconds that a stage may take: `share`, or what it was given when it first began."""
        share = self.shares.setdefault(stage, share)
        if self.results:  # nothing is written before the first stage is done: a wrong path leaves no run behind
            self.save()
        return share

    def finish(self, stage: str, result: dict) -> None:
        self.results[stage] = result
        self.save()

    def save(self) -> None:
        content = {
            "settings": dataclasses.asdict(self.settings),
            "seconds_used": self.seconds_used,
            "shares": self.shares,
            "results": self.results,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _FILE, content)


def open_run(folder: Path, given: dict[str, Any], resume: bool) -> State:
    """Begin a run in a new folder, or take up the one that is there.

    Args:
        given: the settings that the user named; a resumed run has to agree with them.

    Raises:
        ValueError: the folder is in use and `resume` is not set, there is nothing to resume, or a setting differs.
    """
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if not resume:
        if used:
            raise ValueError(
                f"{folder} is not empty: go on with the run that is in it with --resume, or choose another folder "
                "with --output"
            )
        return State(folder, Settings(**given))
    try:
        content = read_json(folder / _FILE, fields=_FIELDS)
    except FileNotFoundError:
        raise ValueError(
            f"there is no run in {folder} to resume: name its folder with --output, or begin one without --resume"
        ) from None
    where = str(folder / _FILE)
    check_fields(content["results"], dict.fromkeys(content["results"], dict), f"{where}, results")
    check_fields(content["shares"], dict.fromkeys(content["shares"], float), f"{where}, shares")
    hints = get_type_hints(Settings)
    settings = Settings(**checked(content["settings"], hints, f"{where}, settings", "those of `quickstart --help`"))
    for name, value in given.items():
        if getattr(settings, name) != value:
            raise ValueError(
                f"the run in {folder} was begun with {name}={getattr(settings, name)!r}, not {value!r}: leave "
                f"--{name.replace('_', '-')} out, or begin another run in another folder"
            )
    return State(folder, settings, content["results"], content["shares"], content["seconds_used"])
