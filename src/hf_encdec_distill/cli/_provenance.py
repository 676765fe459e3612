"""Where a student comes from: what it was trained of and on, and the numbers that came out, as a file beside it."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..bench import versions
from ..data import fingerprint
from ..distillation.teachers.fingerprints import weights_digest
from ..distillation.teachers.recorded import CachedTeacher
from ..distillation.teachers.served import ServedTeacher
from ..files import check_fields, read_json
from ._checkpoints import PROVENANCE


if TYPE_CHECKING:
    from datasets import Dataset

    from ..distillation import DistillationTrainer

logger = logging.getLogger(__name__)

_FIELDS = {"fingerprints": dict, "versions": dict, "machine": dict}
# Two runs whose numbers are nearer than this, relatively, are the same run on another machine. Another seed is not: it
# moves a loss by some hundredths.
TOLERANCE = 1e-3
_LOSSES = ("loss", "ce_loss", "distill_loss")
_TIMINGS = ("_runtime", "_per_second", "_time")


def describe(trainer: DistillationTrainer) -> dict[str, Any]:
    """What is known before training begins: `fingerprints`, `start`, `seeds`, `versions`, `machine` and `git`."""
    args, teacher = trainer.args, trainer.teacher
    student = {"weights": weights_digest(trainer.model)}
    # Layers fitted to a teacher and data, whose fingerprints are there, differ from machine to machine by rounding.
    healing = getattr(trainer.model, "healing", None)
    start = {**healing.to_dict(), **student} if healing is not None and healing.taken else None
    if isinstance(teacher, CachedTeacher):
        names = ("teacher_weights", "kind", "k", "rounds", "proposal_power", "temperature", "generation")
        of_teacher = {name.removeprefix("teacher_"): teacher.manifest[name] for name in names}
        if "server" in teacher.manifest:
            of_teacher["server"] = teacher.manifest["server"]["model"]
        teacher_dtype = teacher.manifest["teacher_dtype"] or "unknown"  # to who has asked a server
    elif isinstance(teacher, ServedTeacher):
        of_teacher = {"server": teacher.describe()["model"]}
        teacher_dtype = "unknown"
    else:
        of_teacher = {"weights": weights_digest(teacher.model)}
        teacher_dtype = str(teacher.model.dtype)
    data: dict[str, Any] = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
    return {
        "fingerprints": {
            "dataset": {name: {"rows": len(rows), "sha256": rows_digest(rows)} for name, rows in data.items()},
            "teacher": of_teacher,
            **({"student": student} if start is None else {}),
        },
        "start": start,
        "seeds": {"seed": args.seed, "data_seed": args.data_seed, "full_determinism": args.full_determinism},
        "versions": versions(),
        "machine": {
            "platform": platform.platform(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else str(args.device),
            "processes": args.world_size,
            "threads": torch.get_num_threads(),
            "student_dtype": str(trainer.model.dtype).removeprefix("torch."),
            "teacher_dtype": teacher_dtype.removeprefix("torch."),
            "autocast": "bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        },
        "git": _git(),
    }


def rows_digest(rows: Dataset) -> str:
    """SHA-256 over the texts of `source` and `target`, row by row.

    The `_fingerprint` of datasets follows names and times of files, not what is in them.
    """
    digest = hashlib.sha256()
    for batch in rows.select_columns(["source", "target"]).iter(1000):
        for pair in zip(batch["source"], batch["target"], strict=True):
            digest.update(json.dumps(pair).encode())
    return digest.hexdigest()


def describe_result(trainer: DistillationTrainer, metrics: Mapping[str, float], folder: Path) -> dict[str, Any]:
    """What came out: optimizer `steps`, `metrics` of the evaluation, first, last and mean of the logged `losses`, and
    a digest of the weights' files in `folder`."""
    logged = [row for row in trainer.state.log_history if "loss" in row]
    losses = {}
    for name in _LOSSES:
        values = [row[name] for row in logged if name in row]
        if values:
            losses[name] = {"first": values[0], "last": values[-1], "mean": sum(values) / len(values)}
    digest = hashlib.sha256("".join(fingerprint(file)[1] for file in sorted(folder.glob("*.safetensors"))).encode())
    return {
        "steps": trainer.state.global_step,
        "metrics": {name: value for name, value in metrics.items() if not name.endswith(_TIMINGS)},
        "losses": losses,
        "weights": digest.hexdigest(),
    }


def read_provenance(folder: Path) -> dict[str, Any]:
    """Raises ValueError if there is none, or the run that it tells of did not come to its end."""
    file = folder / PROVENANCE
    try:
        provenance = read_json(file, fields=_FIELDS)
        if provenance.get("result") is not None:
            _check_recorded(provenance, str(file))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no record of its run: {error}. Name a folder that `distill` wrote.") from error
    if provenance.get("result") is None:
        raise ValueError(f"the run in {folder} was not finished, so it has no numbers: go on with it with --resume.")
    return provenance


def _check_recorded(provenance: Mapping[str, Any], where: str) -> None:
    """Raises ValueError where something that is compared is not there, or is no number."""
    machine = provenance["machine"]
    check_fields(machine, {"device": str, "threads": int}, f"{where}, machine")
    if machine["threads"] < 1:
        raise ValueError(f"{where} has {machine['threads']} threads of its machine, expected at least 1")
    check_fields(provenance, {"result": dict}, where)
    result = provenance["result"]
    check_fields(result, {"steps": int, "metrics": dict, "losses": dict, "weights": str}, f"{where}, result")
    for nested in (result["metrics"], result["losses"]):
        numbers = _numbers(nested)
        check_fields(numbers, dict.fromkeys(numbers, float), f"{where}, result")


def check_inputs(recorded: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError where data, teacher or student are not those that were recorded; warns of all else."""
    differing = _differences(recorded["fingerprints"], now["fingerprints"])
    if differing:
        raise ValueError(
            f"not what the run in {folder} was made of: {'; '.join(differing)}. Name the same dataset, teacher and "
            "student, where they have moved with --dataset, --teacher and --student."
        )
    parts = ("start", "versions", "machine", "git")
    differing = _differences({part: recorded.get(part) for part in parts}, {part: now[part] for part in parts})
    if differing:
        logger.warning("not as in %s, numbers may differ a little: %s", folder, "; ".join(differing))


def warn_of_changes(folder: Path, now: Mapping[str, Any]) -> None:
    """Before the run in `folder` goes on: a warning where it was begun with other data or models."""
    if (folder / PROVENANCE).is_file():  # a run of an earlier version has none
        begun = read_json(folder / PROVENANCE, fields={"fingerprints": dict})
        differing = _differences(begun["fingerprints"], now["fingerprints"])
        if differing:
            logger.warning("the run in %s was begun with something else: %s", folder, "; ".join(differing))


def compare_results(recorded: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> str:
    """One line on how near the numbers are; raises ValueError where they are farther apart than `TOLERANCE`."""
    there, here = (
        {**_numbers(result["metrics"]), **_numbers(result["losses"]), "steps": result["steps"]}
        for result in (recorded, now)
    )
    apart = {name: _apart(there.get(name), here.get(name)) for name in {**there, **here}}
    far = {name: value for name, value in apart.items() if value > TOLERANCE}
    if far:
        pairs = "; ".join(f"{name} was {there.get(name)}, is {here.get(name)}" for name in sorted(far))
        raise ValueError(f"the run of {folder} was not reproduced, to a relative {TOLERANCE:g}: {pairs}")
    if recorded["weights"] == now["weights"]:
        return f"{folder} reproduced: the same weights, bit for bit"
    name = max(apart, key=apart.__getitem__)
    return (
        f"{folder} reproduced to a relative {TOLERANCE:g}, not bit for bit: farthest is {name}, was "
        f"{there.get(name)}, is {here.get(name)}"
    )


def _differences(recorded: Any, now: Any, name: str = "") -> list[str]:
    """What differs, by its path in nested mappings."""
    if isinstance(recorded, Mapping) and isinstance(now, Mapping):
        names = {**recorded, **now}
        return [
            line
            for key in names
            for line in _differences(recorded.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if recorded == now else [f"{name} was {recorded}, is {now}"]


def _numbers(nested: Mapping[str, Any], name: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in nested.items():
        path = f"{name}.{key}" if name else key
        flat.update(_numbers(value, path) if isinstance(value, Mapping) else {path: value})
    return flat


def _apart(one: float | None, other: float | None) -> float:
    """Relative distance; infinite where only one side has a number."""
    if one == other or (one != one and other != other):
        return 0.0
    if one is None or other is None or one != one or other != other:
        return float("inf")
    return abs(one - other) / max(abs(one), abs(other))


def _git() -> dict[str, Any] | None:
    """Commit of the working directory, and whether a tracked file was changed since; None outside of a checkout."""

    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "dirty": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
