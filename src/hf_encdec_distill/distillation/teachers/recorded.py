"""A teacher's distributions that `capture` recorded, in place of the teacher.

A cache is a folder:

- `manifest.json`: what made it and the kind of record;
- `shard-*.parquet` (see `shards`): rows, each with its key and one record for each of its target tokens;
- `generated-<split>-*.parquet`: where the teacher wrote the targets itself (`targets`), sources and targets; nothing
  else where it was on a server that gives no distributions (`served_targets`);
- the teacher's tokenizer, and `README.md`, the card of a data set on the Hub (`cache_hub`).

A row's key is a hash of what the teacher read, images too, and of the columns it was asked about, so rows may be
shuffled, left out or added. A capture that was killed goes on after its last shard.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ...files import check_fields, check_positive, inside, read_json
from ..alignment.positions import IMAGES_DIGEST
from ..alignment.vocabularies import SharedVocabulary
from .cache_hub import fetch, is_on_hub, push
from .fingerprints import row_keys
from .recorded_losses import SampledScores, TopKScores
from .shards import read_shards, shard_files
from .signal import DenseScores, TeacherSignal


MANIFEST = "manifest.json"
FORMAT = 2
SHARD = "shard"
# What has to agree for two captures to be one, what explains the most first. Names and versions are kept for people.
IDENTITY = (
    "format",
    "kind",
    "k",
    "rounds",
    "proposal_power",
    "temperature",
    "generation",
    "vocab_size",
    "tokenizer",
    "prompt_template",
    "prompt_date",
    "teacher_config",
    "teacher_dtype",
    "teacher_adapter",
    "teacher_weights",
)
COLUMNS = {
    "top_k": {"ids": "int32", "log_probs": "float32", "tail": "float32"},
    "sampled": {"ids": "int32", "log_probs": "float32", "weights": "float32", "distinct": "int32", "top": "int32"},
    "dense": {"log_probs": "float16"},
}
KINDS = tuple(COLUMNS)
TARGETS = "targets"  # the kind of a cache without records: answers of a teacher that gives no distributions


class CachedTeacher(TeacherSignal):
    """A `TeacherSignal` that reads what `capture` wrote; no teacher is in memory, records are memory-mapped.

    A cache that `write_targets` wrote `has_targets_only`: it is something to train on, with `distill_weight=0`.

    Args:
        folder: of a cache, or `hf://datasets/user/name`, with `@revision` if need be, for one on the Hub.

    Attributes:
        manifest (`dict`): Of `manifest.json`: what was recorded, of which teacher.
        records (`datasets.Dataset`): A row for each row captured, in the columns of `COLUMNS` and its `key`; not there
            if the cache `has_targets_only`.

    Raises:
        ValueError: it is no cache, or a shard is not what was written.
        OSError: it is not on the Hub, or the Hub cannot be reached.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = local_cache(folder)
        self.manifest = read_manifest(self.folder)
        self.vocab_size = self.manifest["vocab_size"]
        self.prompt_date = self.manifest.get("prompt_date")
        self.input_names = tuple(self.manifest.get("teacher_input_names", ()))  # those of teachers that see have them
        self.has_targets_only = self.manifest["kind"] == TARGETS
        if self.has_targets_only:
            self._keys = np.empty(0, dtype="S16")
            return
        if not shard_files(self.folder, SHARD):
            raise ValueError(
                f"the cache {self.folder} holds no shard: the capture was stopped before it wrote one; go on with it."
            )
        self.records = read_shards(self.folder, SHARD).with_format("numpy")
        columns = {name: getattr(of, "feature", of) for name, of in self.records.features.items()}
        for name, dtype in {"key": "binary", **COLUMNS[self.manifest["kind"]]}.items():
            found = getattr(columns.get(name), "dtype", None)
            if found != dtype:
                raise ValueError(f"{self.folder} has {name} as {found}, expected {dtype}: capture it again")
        if self.manifest["kind"] == "top_k":
            k, first = self.manifest["k"], self.records[0]
            if len(first["ids"]) != k * len(first["tail"]):
                raise ValueError(
                    f"{self.folder / MANIFEST} has k={k}, and its first record {len(first['ids'])} tokens for "
                    f"{len(first['tail'])} positions: capture it again"
                )
        # 24 bytes per row; a dict of bytes takes six times as much, in each process.
        keys = np.concatenate([np.array(part.to_pylist(), dtype="S16") for part in self.records.data["key"].chunks])
        self._keys, self._row_of_key = np.unique(keys, return_index=True)

    def __len__(self) -> int:
        return len(self._keys)

    def to(self, device: torch.device) -> "CachedTeacher":
        return self

    def check(
        self, prompt_template: str | None, divergence: str, temperature: float, prompt_date: str | None = None
    ) -> None:
        """Raises ValueError, naming the field, where training wants what this cache cannot give."""
        if self.has_targets_only:  # of which nothing is asked
            return
        recorded = self.manifest["prompt_template"]
        if prompt_template != recorded:
            raise ValueError(
                f"prompt_template={prompt_template!r}, but the cache {self.folder} was captured with {recorded!r}: "
                "train with that one, or capture again."
            )
        if self.prompt_date not in (None, prompt_date):
            raise ValueError(
                f"prompt_date={prompt_date!r}, but the prompts in the cache {self.folder} name the day "
                f"{self.prompt_date!r}: make the student with that one, or capture with the student's."
            )
        if self.manifest["kind"] != "dense" and divergence == "universal_logit_distance":
            raise ValueError(
                f"vocab_policy='universal' compares all probabilities of a position, but the cache {self.folder} "
                f"holds kind={self.manifest['kind']!r}: capture kind='dense', or give a live teacher."
            )
        if self.manifest["kind"] == "sampled" and divergence != "forward_kl":
            raise ValueError(
                f"divergence={divergence!r} cannot be estimated from samples, which the cache {self.folder} holds: "
                "use forward_kl, or capture kind='top_k'."
            )
        if self.manifest["kind"] != "dense" and temperature != self.manifest["temperature"]:
            raise ValueError(
                f"distill_temperature={temperature}, but the cache {self.folder} was captured at "
                f"{self.manifest['temperature']}: train at that temperature, or capture again."
            )

    def scores(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        rows: Tensor,
        columns: Tensor,
        vocabulary: SharedVocabulary,
        chunked: bool = False,
        images: Mapping[str, Tensor] | None = None,
    ) -> "TopKScores | SampledScores | DenseScores":
        """See `TeacherSignal`; raises ValueError for a row that was not captured."""
        if self.has_targets_only:
            raise ValueError(self.how_to_train())
        images = images or {}
        if images and IMAGES_DIGEST not in images:
            raise ValueError(
                f"the batch has {', '.join(images)} and no teacher_{IMAGES_DIGEST}, by which the cache {self.folder} "
                "knows the images of a row: make batches with DistillationCollator."
            )
        keys = row_keys(input_ids, attention_mask, rows, columns, images.get(IMAGES_DIGEST))
        asked = np.array([key for key in keys if key is not None], dtype="S16")
        places = np.searchsorted(self._keys, asked).clip(max=len(self) - 1)
        there = self._keys[places] == asked
        if not there.all():
            with_target = [row for row, key in enumerate(keys) if key is not None]
            missing = [row for row, is_there in zip(with_target, there, strict=True) if not is_there]
            ids = input_ids[missing[0]][attention_mask[missing[0]].bool()].tolist()
            raise ValueError(
                f"{len(missing)} of {len(keys)} rows of the batch are not in the cache {self.folder} ({len(self)} "
                f"rows), the first of them {ids[:12]}...: capture this data set too, with the same template, images "
                "and length limits and, for a merged student of a teacher without any template, with its "
                "start_token_id (cache --student). Rows that are there already are not captured again."
            )
        found = self.records[self._row_of_key[places].tolist()]
        record: dict[str, Tensor] = {
            # A batch without any target still has columns, of their dtype.
            name: torch.from_numpy(np.concatenate([np.empty(0, dtype), *found[name]])).to(input_ids.device)
            for name, dtype in COLUMNS[self.manifest["kind"]].items()
        }
        self._check_record(record, len(rows))
        if self.manifest["kind"] == "dense":
            log_probs = record["log_probs"].view(-1, self.vocab_size)
            return DenseScores(lambda chunk: log_probs[chunk].float(), vocabulary)
        token_ids, log_probs = record["ids"].long(), record["log_probs"]
        if self.manifest["kind"] == "top_k":
            k = self.manifest["k"]
            return TopKScores(token_ids.view(-1, k), log_probs.view(-1, k), record["tail"], vocabulary)
        distinct = record["distinct"]
        drawn = torch.arange(max(distinct.tolist(), default=0), device=token_ids.device) < distinct[:, None]
        token_ids, log_probs, weights = (_fill(drawn, flat) for flat in (token_ids, log_probs, record["weights"]))
        return SampledScores(token_ids, log_probs, weights, record["top"].long(), vocabulary)

    def _check_record(self, record: Mapping[str, Tensor], positions: int) -> None:
        """Raises ValueError where the records of a batch with so many target positions cannot be a teacher's."""
        kind, vocab_size = self.manifest["kind"], self.vocab_size
        log_probs = record["log_probs"]
        each = {"top_k": ("tail",), "sampled": ("distinct", "top"), "dense": ()}[kind]
        wrong = [name for name in each if len(record[name]) != positions]
        if kind == "sampled" and not wrong:
            distinct = record["distinct"]
            wrong += ["distinct"] * bool(((distinct < 1) | (distinct > self.manifest["rounds"])).any())
            kept = int(distinct.sum())
            wrong += ["weights"] * bool(len(record["weights"]) != kept or (record["weights"] < 0).any())
        else:
            kept = positions * (self.manifest["k"] if kind == "top_k" else vocab_size)
        # Rounding may leave the one token that is certain a little above 0.
        wrong += ["log_probs"] * bool(len(log_probs) != kept or not (log_probs <= 1e-2).all())
        if kind != "dense":
            ids = record["ids"]
            wrong += ["ids"] * bool(len(ids) != kept or ((ids < 0) | (ids >= vocab_size)).any())
        if wrong:
            raise ValueError(
                f"the cache {self.folder} has {wrong[0]} that no teacher of {vocab_size} tokens gives at {positions} "
                "positions: capture it again."
            )

    def how_to_train(self) -> str:
        """On a cache that has targets only."""
        return (
            f"the cache {self.folder} holds the targets that {self.manifest['teacher']!r} wrote and no distributions, "
            "which its server does not give: train on the targets with distill_weight=0 (on the command line "
            f"--dataset {self.folder} --distill-weight 0)."
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str = "Upload a cache of a teacher",
    ) -> str:
        """Uploads the cache as a dataset with its card; returns the address of the commit.

        `CachedTeacher("hf://datasets/<repo_id>")` reads it, and `load_dataset("<repo_id>")` its rows.

        Args:
            repo_id: `user/name`; made if it is not there.
            private: of a repository that is made; None leaves it to the user's or the organisation's default.
            revision: branch; made if it is not there.
            token: of the Hub; by default the one that `hf auth login` stored.

        Raises:
            OSError: the Hub refused, or cannot be reached.
        """
        return push(self.folder, repo_id, private, revision, token, commit_message)


def _fill(where: Tensor, flat: Tensor) -> Tensor:
    """`[N, R]` bool and as many values as are true -> `[N, R]`, 0 elsewhere."""
    return flat.new_zeros(where.shape).masked_scatter(where, flat)


def is_cache(folder: Any) -> TypeGuard[str | os.PathLike]:
    """Whether this is a folder that `capture` made, or names one on the Hub."""
    return is_on_hub(folder) or (isinstance(folder, str | os.PathLike) and (Path(folder) / MANIFEST).is_file())


def local_cache(folder: str | os.PathLike) -> Path:
    """The folder of a cache, fetched first where it is an address on the Hub."""
    return fetch(folder) if is_on_hub(folder) else Path(folder)


def recorded_prompt_date(folder: str | os.PathLike) -> str | None:
    """The day that the prompts of a cache name, if they name one; raises what `CachedTeacher` raises."""
    return read_manifest(local_cache(folder)).get("prompt_date")  # which older caches do not say


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ValueError where there is none, or a field cannot be what `capture` wrote."""
    where = str(folder / MANIFEST)
    try:
        manifest = read_json(inside(folder, MANIFEST))
        if manifest.get("format") != FORMAT:
            raise ValueError(f"its format is {manifest.get('format')!r}, expected {FORMAT}: capture it again")
        check_fields(manifest, {"kind": str, "vocab_size": int, "temperature": float}, where)
        required = (name for name in (*IDENTITY, "teacher") if name != "prompt_date")  # which few prompts name
        missing = [name for name in required if name not in manifest]
        if missing or manifest["kind"] not in (*KINDS, TARGETS):
            raise ValueError(f"{where} lacks {', '.join(missing) or 'a kind of record'}: capture it again")
        _check_values(manifest, where)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} is no cache of a teacher, it has no {MANIFEST}: name a folder that `cache` wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no cache of a teacher: {error}") from error
    return manifest


def _check_values(manifest: dict[str, Any], where: str) -> None:
    """Raises ValueError, naming the field, where one that is read cannot be what `capture` wrote."""
    check_fields(manifest, {"top_k": {"k": int}, "sampled": {"rounds": int}}.get(manifest["kind"], {}), where)
    of_kind = {"top_k": ("vocab_size", "k"), TARGETS: ()}  # answers from a server say nothing of a vocabulary
    check_positive(manifest, ("temperature", *of_kind.get(manifest["kind"], ("vocab_size",))), where)
    texts = (name for name in ("prompt_template", "prompt_date") if manifest.get(name) is not None)
    check_fields(manifest, dict.fromkeys(texts, str), where)
    if "teacher_input_names" in manifest:
        check_fields(manifest, {"teacher_input_names": list}, where)
        for name in manifest["teacher_input_names"]:
            if not isinstance(name, str):
                raise ValueError(f"{where} has {name!r} among its 'teacher_input_names', expected names of columns")
    if "server" in manifest:
        check_fields(manifest, {"server": dict}, where)
        check_fields(manifest["server"], dict.fromkeys(("software", "model", "probe"), str), f"{where}, server,")


def record_bytes(kind: str, k: int, rounds: int, vocab_size: int) -> int:
    """Bytes of the record of one target token, before Parquet stores it; of `sampled` at most, if no token came up
    twice."""
    kept = {"top_k": k, "sampled": rounds, "dense": vocab_size}[kind]
    once = ("tail", "distinct", "top")  # not one for each kept token
    return sum(np.dtype(dtype).itemsize * (1 if name in once else kept) for name, dtype in COLUMNS[kind].items())


def size_on_disk(folder: str | os.PathLike) -> int:
    """Bytes of all that is in the folder of a cache."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.parquet"))
