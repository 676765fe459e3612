"""What a distillation is told: a YAML file, flat, in the names of the command's options with underscores.

Its keys are `student` or `init` (a student made of the teacher first, see `init.Shape`), `teacher`,
`teacher_tokenizer`, `dataset`, `source_column`, `target_column`, `output`, and each field of
`DistillationTrainingArguments`. Values mean what they mean to `HfArgumentParser.parse_yaml_file` and TRL, but a key or
a type that is wrong is an error.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..files import read_yaml, write_text
from ._checkpoints import RECIPE_HEADER
from ._inputs import DATA, check_is_there
from .init import Shape


SUFFIXES = (".yaml", ".yml")
_KEYS = "those of `distill --help` and the fields of DistillationTrainingArguments"
_RUN = dict.fromkeys(("student", "teacher", "teacher_tokenizer", *DATA, "output"), str)
_WITH_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
# The beginnings of the names of training arguments, of either version of transformers.
_LEADS_OUT = ("push_to_hub", "hub_", "report_to", "logging_dir", "run_name", "project", "trackio_")


@dataclasses.dataclass(frozen=True)
class Init(Shape):
    """The `init` section: the shape of the student, and of which model it is made."""

    teacher: str | None = None  # by default the teacher of the distillation, which a cache cannot be


def read_recipe(file: Path) -> dict[str, Any]:
    """The recipe in a file, every value of its key's type; a key that is null is left out.

    Raises:
        ValueError: no such file, no YAML mapping, an unknown key, a value of the wrong type; the key is named.
    """
    from ..distillation import DistillationTrainingArguments

    check_is_there(file, "a recipe, or to --reproduce a folder that `distill` wrote")
    try:
        content = read_yaml(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read as a recipe: {error}") from error
    fields = {field.name for field in dataclasses.fields(DistillationTrainingArguments) if field.init}
    hints = {name: hint for name, hint in get_type_hints(DistillationTrainingArguments).items() if name in fields}
    del hints["output_dir"]  # `output`
    recipe = checked(content, {**hints, **_RUN, "init": dict}, str(file))
    if "init" in recipe:
        keys = f"`teacher` and {', '.join(field.name for field in dataclasses.fields(Shape))}"
        recipe["init"] = checked(recipe["init"], get_type_hints(Init), f"{file}, init", keys)
        if "student" in recipe:
            raise ValueError(
                f"{file} has both a student and an init section, which would make one: leave one of them out."
            )
    return recipe


def write_recipe(file: Path, recipe: Mapping[str, Any]) -> None:
    """What `read_recipe` reads, whole or not at all; tokens of the Hub are left out."""
    import yaml

    public = {name: value for name, value in recipe.items() if not (value is None or name.endswith("_token"))}
    if "init" in public:
        shape = dataclasses.asdict(Init(**public["init"]))
        public["init"] = {name: value for name, value in shape.items() if value is not None}
    write_text(file, RECIPE_HEADER + yaml.safe_dump(public, sort_keys=False, allow_unicode=True, width=110))


def training_part(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `DistillationTrainingArguments` in a recipe."""
    return {name: value for name, value in recipe.items() if name not in _RUN and name != "init"}


def kept_to_itself(recipe: Mapping[str, Any], where: str, output: str) -> dict[str, Any]:
    """A stranger's recipe without what would publish the run, report on it or write outside of `output`.

    Raises:
        ValueError: a DeepSpeed configuration, which has reports and folders of its own.
    """
    if recipe.get("deepspeed"):
        raise ValueError(
            f"{where} trains with DeepSpeed, whose configuration may report and write anywhere: read it, and run "
            "`distill RECIPE --output NEW` if that is what you want"
        )
    kept = {name: value for name, value in recipe.items() if not name.startswith(_LEADS_OUT)}
    if "encoder_states" in kept:
        kept["encoder_states"] = str(Path(output) / "encoder_states")
    return {**kept, "report_to": "none"}  # which is not the default of transformers 4.57


def checked(content: Any, hints: Mapping[str, Any], where: str, known: str = _KEYS) -> dict[str, Any]:
    """The mapping, every value of its key's type; a key that is null is left out.

    Args:
        hints: the type of each key.
        where: it is from, for messages.
        known: what the keys are, for messages.

    Raises:
        ValueError: it is no mapping, or has an unknown key or a value of the wrong type.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds a {type(content).__name__}, expected a mapping of keys to values.")
    for name in content:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: unknown key {name!r}, the closest valid one is {close!r}; keys are {known}.")
    return {name: _typed(name, value, hints[name], where) for name, value in content.items() if value is not None}


def _typed(name: str, value: Any, hint: Any, where: str) -> Any:
    if _fits(value, hint):
        return _with_numbers(value) if isinstance(value, dict) else value
    if isinstance(value, datetime.date) and _fits("", hint):  # which YAML makes of 2026-11-28 without quotes
        return value.isoformat()
    if isinstance(value, bool) and _fits("", hint):  # as YAML 1.1 reads on, off, yes and no
        raise ValueError(f"{where}: {name} is {value} to YAML, expected a text: put the word in quotes.")
    if isinstance(value, str) and _fits(0.5, hint):  # YAML 1.1 takes 1e-3, which has no dot, for text
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError(f"{where}: {name}={value!r} is of type {type(value).__name__}, expected {_describe(hint)}.")


def _with_numbers(value: Any) -> Any:
    """A mapping whose values have no types of their own, with numbers where YAML 1.1 takes one for text."""
    if isinstance(value, dict):
        return {name: _with_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_numbers(inner) for inner in value]
    return float(value) if isinstance(value, str) and _WITH_EXPONENT.fullmatch(value) else value


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if isinstance(value, bool):  # which is an int to Python
        return hint is bool
    if origin is None and issubclass(hint, Enum):  # from Python 3.13 on, dict[str, Any] is no class
        return value in [member.value for member in hint]
    return isinstance(value, int | float) if hint is float else isinstance(value, origin or hint)


def _describe(hint: Any) -> str:
    inner = [one for one in get_args(hint) if one is not NoneType]
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_describe, inner))
    if get_origin(hint) is Literal:
        return " or ".join(map(str, inner))
    return getattr(hint, "__name__", str(hint))
