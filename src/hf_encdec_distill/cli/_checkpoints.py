"""From which checkpoint an interrupted training goes on, and whether there is anything to go on from."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path

from ..files import is_used, named_inside, read_json


logger = logging.getLogger(__name__)

RECIPE, PROVENANCE = "recipe.yaml", "provenance.json"
RECIPE_HEADER = (
    "# hf-encdec-distill distill --reproduce FOLDER --output NEW runs this again, FOLDER being where this file is.\n"
)
_STATE = "trainer_state.json"
_LOGS = "runs"
_INDEX = "*.index.json"
# Of a model whole or in shards, in parts of FSDP, and of an adapter, which has a folder if it is not the default one.
_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    _INDEX,
    "pytorch_model_fsdp*",
    "adapter_model.*",
    "*/adapter_model.*",
)
_TRAINING = ("*optimizer*", "scheduler.pt", "rng_state*.pth")  # none of them with save_only_model; FSDP has a folder
_DEEPSPEED = "global_step*"  # which has all of these in it


def checkpoint_in(output: Path, resume: bool) -> str | None:
    """Where training goes on from; None at the beginning, also in the folder of a run that has no checkpoint yet.

    Raises:
        ValueError: to begin in the folder of something else or of a run with a checkpoint, or to go on from nothing.
    """
    checkpoint = last_whole_checkpoint(output)
    used = is_used(output)
    if checkpoint is not None:
        if not resume:
            raise ValueError(f"{output} is not empty: go on with --resume, or choose another folder with --output")
        return checkpoint
    if resume and not used:
        raise ValueError(f"there is no checkpoint in {output} to resume from: leave --resume out to begin")
    if used and not holds_only_a_start(output):
        why = "is not empty and has no checkpoint to go on from" if resume else "is not empty"
        raise ValueError(f"{output} {why}: choose another folder with --output")
    return None


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in a folder of which nothing is lacking; others are passed over, and named in the log."""
    for checkpoint in sorted(_checkpoints(folder), key=lambda path: -int(path.name.rpartition("-")[2])):
        if is_whole(checkpoint):
            return str(checkpoint)
        logger.warning("%s is not whole, and passed over", checkpoint)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether the run did not end, nor the disk fill up, while a checkpoint was written.

    Its state is written last. A file can be shorter than it was written all the same, or gone, after a loss of power.
    """
    from safetensors import SafetensorError, safe_open

    def has(pattern: str) -> bool:
        return any(checkpoint.glob(pattern))

    if not has(_DEEPSPEED) and (not any(map(has, _WEIGHTS)) or len(set(map(has, _TRAINING))) > 1):
        return False
    try:
        for file in {checkpoint / _STATE, *checkpoint.glob("*.json")}:
            json.loads(file.read_text(encoding="utf-8"))
        for index in checkpoint.glob(_INDEX):
            for shard in read_json(index, fields={"weight_map": dict})["weight_map"].values():
                named_inside(checkpoint, shard).stat()
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, framework="np"):  # which compares the length of the file with its header
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    pickled = (file for file in checkpoint.iterdir() if file.suffix in (".pt", ".pth", ".bin"))
    return all(map(zipfile.is_zipfile, pickled))  # as `torch.save` writes them, with the table of contents at the end


def holds_only_a_start(folder: Path) -> bool:
    """Whether a folder has only what a run leaves in it that ends before its first checkpoint is whole."""
    return folder.is_dir() and all(map(_is_of_a_start, folder.iterdir()))


def _is_of_a_start(path: Path) -> bool:
    if path.is_dir():
        if path.name == _LOGS:
            return all(file.is_dir() or file.name.startswith("events.out.tfevents") for file in path.rglob("*"))
        return path in _checkpoints(path.parent) and not is_whole(path)
    if path.suffix == ".tmp" and path.name.startswith((f"{RECIPE}.", f"{PROVENANCE}.")):
        return True
    try:
        text = path.read_text(encoding="utf-8") if path.name in (RECIPE, PROVENANCE) else ""
        return text.startswith(RECIPE_HEADER) or (path.name == PROVENANCE and json.loads(text)["result"] is None)
    except (ValueError, KeyError, TypeError):  # of someone else
        return False


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
