"""A cache as a data set: its card, and its way to the Hub and back."""

import json
import os
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import DatasetCardData, snapshot_download

from ...files import inside
from ...hub import upload
from .shards import PARTIAL, partial_name, shard_files


CARD = "README.md"
_SCHEME = "hf://datasets/"
_BY_KIND = {
    "top_k": "the {k} likeliest tokens of each target position, with their log-probabilities, and the log of the mass "
    "of all others (`tail`)",
    "sampled": "the distinct ones of {rounds} tokens drawn at each target position from p^{proposal_power}, with "
    "their log-probabilities and importance weights, how many they are (`distinct`) and the likeliest token (`top`); "
    "sparse logit sampling, arXiv 2503.16870",
    "dense": "the log-probabilities of all {vocab_size} tokens at each target position",
}
_OF_A_SERVER = (
    "The model ran on a server, {software}, under the name `{model}`, and gave the log-probabilities of the likeliest "
    "tokens; `tail` is 1 minus the sum of theirs. `probe` in the manifest is what it predicted for fixed texts, the "
    "id and log-probability of the likeliest token at each position, by which another model would be noticed."
)


def is_on_hub(teacher: Any) -> TypeGuard[str]:
    return isinstance(teacher, str) and teacher.startswith(_SCHEME)


def fetch(address: str) -> Path:
    """`hf://datasets/user/name[@revision]` -> a folder with a snapshot of it; OSError where it cannot be had."""
    repo_id, _, revision = address.removeprefix(_SCHEME).strip("/").partition("@")
    return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision or None))


def push(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload a cache of a teacher",
) -> str:
    """See `CachedTeacher.push_to_hub`."""
    commit = upload(
        files_of(folder),
        repo_id,
        "dataset",
        commit_message,
        # What an earlier push left that is no part of the cache any more.
        replaces=lambda names: [name for name in names if name.endswith(".parquet")],
        private=private,
        revision=revision,
        token=token,
    )
    return commit.commit_url


def files_of(folder: Path) -> dict[str, Path]:
    """All that belongs to a cache, by its name in a repository; raises ValueError where a link leads out of it."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return {name: inside(folder, name) for name in names if not name.startswith(PARTIAL)}


def write_card(folder: Path, manifest: dict[str, Any], worker: str) -> None:
    """`README.md`, whose metadata tell `load_dataset` which file is what."""
    names: list[str] | None = None
    while (now := [file.name for file in shard_files(folder)]) != names:  # another worker may have put one there
        names = now
        partial = folder / partial_name(worker)
        partial.write_text(card(names, manifest), encoding="utf-8")
        os.replace(partial, folder / CARD)


def card(names: list[str], manifest: dict[str, Any]) -> str:
    """That of a cache with these files, sorted."""
    # By name, which has a hash in it: datasets 5 keeps what it made of a folder by the text of these entries alone
    # and, for a pattern, would give the rows of another folder of the same name.
    splits: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("generated-") and name.endswith(".parquet"):
            splits.setdefault(name.split("-")[1], []).append(name)
    configs = []
    if splits:
        data_files = [{"split": split, "path": paths} for split, paths in sorted(splits.items())]
        configs.append({"config_name": "targets", "default": True, "data_files": data_files})
    records = [name for name in names if name.startswith("shard-") and name.endswith(".parquet")]
    if records:
        configs.append({"config_name": "records", "data_files": [{"split": "train", "path": records}]})
    data = DatasetCardData(
        pretty_name=f"Cache of {manifest['teacher']}",
        tags=["knowledge-distillation", "hf-encdec-distill"],
        configs=configs,
    )
    teacher, server, weight = manifest["teacher"], manifest.get("server"), ""
    if records:
        about = [
            f"What the teacher `{teacher}` predicts, recorded by `hf-encdec-distill cache` for distillation: "
            f"{_BY_KIND[manifest['kind']].format(**manifest)}.",
            *([] if server is None else [_OF_A_SERVER.format(**server)]),
            "A row of `records` belongs to one row of the data that was captured; its `key` is a hash of the tokens "
            "that the teacher read and of the positions it was asked about."
            + (" `targets` has the sources and the answers that the teacher wrote for them." if splits else ""),
        ]
    else:
        about = [
            f"What the teacher `{teacher}` wrote on a server, asked by `hf-encdec-distill cache --generate --server` "
            "for distillation: a source in each row, and an answer to it in place of the target. `mean_log_prob` is "
            "the mean log-probability of the answer's tokens in nats, where the server gave it."
        ]
        weight = "  # distill_weight=0"
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {data.pretty_name}",
        *about,
        "```python\nfrom hf_encdec_distill import DistillationTrainer\n\n"
        'trainer = DistillationTrainer(model=student, args=args, teacher="hf://datasets/USER/NAME", ...)'
        f"{weight}\n```",
        f"```json\n{json.dumps(manifest, indent=1, ensure_ascii=False)}\n```",
    ]
    return "\n\n".join(lines) + "\n"
