"""Many workers that fill one cache: the share of each, the folder that they join, and their own folders made one."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from ...hub import upload
from .cache_hub import CARD, card, files_of, write_card
from .recorded import IDENTITY, MANIFEST, local_cache, read_manifest
from .served import is_same_model
from .shards import PARTIAL, check_shards, partial_name, remove_left_behind


_MERGING = "merge"  # the name of who merges


@dataclass(frozen=True)
class Worker:
    """One of the processes that capture: process `process` of `processes` in job `index` of `num_shards`.

    Jobs know nothing of each other; the processes of a job wait for each other.
    """

    index: int
    num_shards: int
    process: int
    processes: int

    @property
    def name(self) -> str:
        """In the names of its shards."""
        job = "" if self.num_shards == 1 else f"{self.index:03}of{self.num_shards:03}."
        return f"{job}{self.process:03}"

    def share(self, count: int) -> range:
        """Which of `count` rows are its own; the shares of all workers are disjoint and all rows together."""
        return range(count)[self.index :: self.num_shards][self.process :: self.processes]


def join_folder(
    folder: Path, manifest: dict[str, Any], worker: str, add_files: Callable[[Path], None] = lambda folder: None
) -> None:
    """Make the folder of a cache, unless it is there; of workers that come at the same time, the first one makes it.

    Args:
        manifest: of this worker.
        worker: its name.
        add_files: writes what else belongs to a new cache into the folder that it is given.

    Raises:
        ValueError: the folder holds something else, or a cache with another manifest (the field is named).
    """
    names = {file.name for file in folder.iterdir() if not _has_encoder_states(file)} if folder.exists() else set()
    half_made = any(name.startswith(PARTIAL) for name in names)
    if not (folder / MANIFEST).exists():  # looked at last: whoever makes the folder removes the partial one after this
        if names and not half_made:
            raise ValueError(f"{folder} is not empty and no cache: capture into another folder.")
        partial = folder / partial_name(worker)
        partial.mkdir(parents=True)
        add_files(partial)
        for file in [file for file in partial.rglob("*") if file.is_file()]:
            place = folder / file.relative_to(partial)
            place.parent.mkdir(exist_ok=True)
            os.replace(file, place)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
        _put(partial / MANIFEST, folder / MANIFEST, worker)
        shutil.rmtree(partial)
    check_agrees(read_manifest(folder), manifest, folder)


def _has_encoder_states(folder: Path) -> bool:
    """Which may lie beside the records of the teacher (`options.encoder_states`)."""
    return any(folder.glob("states-*.safetensors"))


def check_agrees(found: dict[str, Any], manifest: dict[str, Any], where: Any) -> None:
    """Raises ValueError, naming the field, where the two manifests are not of one capture."""
    if ("server" in found) != ("server" in manifest):
        of = ("was", "is not") if "server" in found else ("was not", "is")
        raise ValueError(
            f"the cache {where} {of[0]} captured from a teacher on a server, and this one {of[1]}: capture into "
            "another folder."
        )
    for name in IDENTITY:
        ours = manifest.get(name)
        if found.get(name, ours) != ours:  # older caches do not say their prompt_date
            same_weights = name == "teacher_config" and found.get("teacher_weights") == manifest["teacher_weights"]
            raise ValueError(
                f"the cache {where} was captured with {name}={found[name]!r}, not {ours!r}"
                + (" (the weights are the same: perhaps by another version of transformers)" if same_weights else "")
                + ": capture into another folder."
            )


def _check_one_capture(found: dict[str, Any], manifest: dict[str, Any], where: Any) -> None:
    """The same for two that were captured apart, of which no `ServedTeacher` has compared the probes."""
    check_agrees(found, manifest, where)
    if "server" in found and not is_same_model(found["server"], manifest["server"]):
        raise ValueError(
            f"the cache {where} was captured from {found['server']['model']!r} on a server, the other from "
            f"{manifest['server']['model']!r}, or there was another model under that name: leave one of them out."
        )


def merge_caches(folders: Sequence[str | os.PathLike], output: str | os.PathLike) -> None:
    """Put the shards of several caches, captured by different workers, into one folder.

    No shard is rewritten: they are named by the hash of their bytes, and linked where the file system can, else
    copied. The folders stay as they are.

    Args:
        folders: of caches, or `hf://datasets/user/name`.
        output: a new folder, or a cache that the others are added to.

    Raises:
        ValueError: one is no cache, two were not captured alike (the field is named), a shard is not what was
            written, or a file is a link that leads out of its cache.
        OSError: one cannot be had from the Hub.
    """
    output, sources = Path(output), [local_cache(folder) for folder in folders]
    manifests = [read_manifest(source) for source in sources]
    for source, manifest in zip(sources, manifests, strict=True):
        _check_one_capture(manifest, manifests[0], source)
    shards = [shard for source in sources for shard in check_shards(source)]
    beside = {name: file for name, file in files_of(sources[0]).items() if _is_beside_shards(Path(name))}

    def add_files(partial: Path) -> None:
        for name, file in beside.items():
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, partial / name)

    join_folder(output, manifests[0], _MERGING, add_files)
    remove_left_behind(output, _MERGING)
    for shard in shards:
        _put(shard.resolve(), output / shard.name, _MERGING)
    write_card(output, read_manifest(output), _MERGING)


def add_to_hub(folder: str | os.PathLike, repo_id: str, private: bool | None = None) -> str:
    """Upload a worker's shards, in a commit of its own, to a dataset that others upload theirs to at the same time.

    Args:
        folder: of a cache.
        repo_id: `user/name`; made if it is not there.
        private: of a repository that is made; None leaves it to the user's or the organisation's default.

    Returns:
        The address of the commit.

    Raises:
        OSError: the Hub refused, or cannot be reached, or a cache with another manifest is there (the field is named).
    """
    manifest, files = read_manifest(Path(folder)), files_of(Path(folder))

    def card_of_all(commit: str, there: list[str]) -> dict[str, bytes]:
        once = {}
        if MANIFEST in there:
            theirs = hf_hub_download(repo_id, MANIFEST, repo_type="dataset", revision=commit)
            _check_one_capture(read_manifest(Path(theirs).parent), manifest, repo_id)
            once = {MANIFEST: Path(theirs).read_bytes()}
        return {CARD: card(sorted({*files, *there}), manifest).encode(), **once}

    message = "Add shards to a cache of a teacher"
    return upload(
        files, repo_id, "dataset", message, replaces=lambda _: [], follows=card_of_all, private=private
    ).commit_url


def _is_beside_shards(name: Path) -> bool:
    return name.suffix != ".parquet" and name.parts[0] not in (MANIFEST, CARD) and not name.parts[0].startswith(".")


def _put(file: Path, place: Path, worker: str) -> None:
    """`file` at `place` too, whole, unless there is one: whoever is first wins."""
    try:
        os.link(file, place)
    except FileExistsError:
        pass
    except OSError:  # another disk, or a file system without hard links: there two could come at the same moment
        if not place.exists():
            partial = place.parent / partial_name(worker)
            shutil.copyfile(file, partial)
            os.replace(partial, place)
