"""Capture a teacher's distributions once, train from them for ever.

A cache is a folder:

- `manifest.json`: what made it, the kind of record, and how wide a record is;
- `shard-<process>-<number>-<hash>.parquet`: rows, each with its key and one record for each of its target tokens;
- the teacher's tokenizer.

A row's key is a hash of what the teacher read and of the columns it was asked about, so rows may be shuffled, left
out or added. A shard is named by the hash of its own bytes and appears in one rename: one that was cut or altered is
found, and a capture that was killed goes on after its last shard.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from .alignment import SharedVocabulary, asked_positions, target_positions, with_teacher_inputs
from .collator import DistillationCollator
from .losses import Divergence, at_least_float32, forward_kl
from .teachers import DenseScores, LiveTeacher


MANIFEST = "manifest.json"
_FORMAT = 1
_ROWS_PER_SHARD = 2048
# What has to agree for two captures to be one. Names and versions are kept for people.
_IDENTITY = (
    "format",
    "kind",
    "width",
    "temperature",
    "vocab_size",
    "teacher_weights",
    "teacher_config",
    "tokenizer",
    "prompt_template",
)
_COLUMNS = {
    "top_k": {"ids": "int32", "log_probs": "float32", "tail": "float32"},
    "sampled": {"ids": "int32", "log_probs": "float32", "top": "int32"},
    "dense": {"log_probs": "float16"},
}
KINDS = tuple(_COLUMNS)


# Losses on what a cache holds ----------------------------------------------------------------------------------------


def top_k_divergence(
    student_logits: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    tail: Tensor,
    divergence: Divergence = forward_kl,
    temperature: float = 1.0,
) -> Tensor:
    """A divergence over K + 1 events: the teacher's K likeliest tokens, and all others as one.

    Not above the dense one for every f-divergence (data processing inequality), and 0 where the student equals the
    teacher. The tail is what keeps the student from putting mass outside of the K.

    Args:
        student_logits: `[C, V]`.
        ids: `[C, K]`; one that is not below V, or whose student logit is -inf, counts as impossible on both sides.
        log_probs: `[C, K]`, the teacher's, at `temperature`.
        tail: `[C]`, log of the teacher's mass outside of the K.
        divergence: of `losses`.
        temperature: divides the student's logits.

    Returns:
        `[C]`, nats.
    """
    vocabulary = student_logits.shape[-1]
    logits = student_logits.to(at_least_float32(student_logits.dtype)) / temperature
    # One column more, where ids beyond the student's vocabulary are sent: impossible, and in nobody's way.
    logits = F.pad(logits, (0, 1), value=-torch.inf)
    ids = ids.clamp(max=vocabulary)
    student = logits.gather(-1, ids)
    teacher = log_probs.masked_fill(student == -torch.inf, -torch.inf)
    rest = logits.scatter(-1, ids, -torch.inf)
    # Nothing is left to a student whose vocabulary is all recorded, and no gradient may come from there.
    none_left = (rest == -torch.inf).all(dim=-1, keepdim=True)
    rest = rest.masked_fill(none_left, 0.0).logsumexp(dim=-1, keepdim=True).masked_fill(none_left, -torch.inf)
    tail = tail.unsqueeze(-1).masked_fill(none_left, -torch.inf)
    return divergence(torch.cat((student, rest), dim=-1), torch.cat((teacher, tail), dim=-1), 1.0)


def sampled_forward_kl(
    student_logits: Tensor, ids: Tensor, log_probs: Tensor, weights: Tensor, temperature: float = 1.0
) -> Tensor:
    """An unbiased estimate of `forward_kl` from tokens that the teacher drew: `sum_r w_r (log p_r - log q_r)`.

    Sparse logit sampling, arXiv 2503.16870, section 3: unlike a cut to the top k, what the gradient expects is that of
    the whole distribution. A single estimate may be negative.

    Args:
        student_logits: `[C, V]`.
        ids: `[C, R]`, tokens drawn with replacement.
        log_probs: `[C, R]`, the teacher's log-probability of each, at `temperature`.
        weights: `[C, R]`, its probability over that of drawing it, divided by R.
        temperature: divides the student's logits.

    Returns:
        `[C]`, nats.
    """
    vocabulary = student_logits.shape[-1]
    logits = student_logits.to(at_least_float32(student_logits.dtype)) / temperature
    student = logits.gather(-1, ids.clamp(max=vocabulary - 1)) - logits.logsumexp(dim=-1, keepdim=True)
    shared = (ids < vocabulary) & (student > -torch.inf)
    return (weights * torch.where(shared, log_probs - student, 0.0)).sum(dim=-1)


@dataclass(frozen=True)
class TopKScores:
    """`TeacherScores` of the K likeliest tokens and the mass of all others: `[N, K]`, `[N, K]` and `[N]`.

    What of the tail is on tokens that are not shared was not recorded, and counts as shared.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor
    vocabulary: SharedVocabulary

    def divergence(self, student_logits: Tensor, chunk: slice, divergence: Divergence, temperature: float) -> Tensor:
        student_logits = self.vocabulary.restrict_student(student_logits)
        places, log_probs, tail = self.vocabulary.places(self.ids[chunk]), self.log_probs[chunk], self.tail[chunk]
        values = top_k_divergence(student_logits, places, log_probs, tail, divergence, temperature)
        if not self.vocabulary.by_mass:
            return values
        shared = places < self.vocabulary.size
        mass = (log_probs.exp() * shared).sum(dim=-1)
        return values * (mass + tail.exp() * (shared.sum(dim=-1) < self.vocabulary.size))

    def top(self, chunk: slice) -> Tensor:
        places = self.vocabulary.places(self.ids[chunk])
        first_shared = (places < self.vocabulary.size).int().argmax(dim=-1, keepdim=True)
        return places.gather(-1, first_shared).squeeze(-1)


@dataclass(frozen=True)
class SampledScores:
    """`TeacherScores` of R drawn tokens: `[N, R]` and `[N, R]`, and the likeliest token `[N]`.

    For a `MappedVocabulary` the gradient is unbiased; the value lacks -m log m, which is not in the record.
    """

    ids: Tensor
    log_probs: Tensor
    likeliest: Tensor
    vocabulary: SharedVocabulary

    def divergence(self, student_logits: Tensor, chunk: slice, divergence: Divergence, temperature: float) -> Tensor:
        ids, log_probs = self.vocabulary.places(self.ids[chunk]), self.log_probs[chunk]
        weights = torch.full_like(log_probs, 1.0 / ids.shape[-1])  # drawn from the teacher itself
        return sampled_forward_kl(
            self.vocabulary.restrict_student(student_logits), ids, log_probs, weights, temperature
        )

    def top(self, chunk: slice) -> Tensor:
        return self.vocabulary.places(self.likeliest[chunk])


# Reading -------------------------------------------------------------------------------------------------------------


class CachedTeacher:
    """A `TeacherSignal` that reads what `capture` wrote; no teacher is in memory, records are memory-mapped.

    Args:
        folder: of a cache.

    Raises:
        ValueError: it is no cache, or a shard is not what was written.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.vocab_size = self.manifest["vocab_size"]
        self._rows = _read_shards(self.folder)
        self._index = {key: row for row, key in enumerate(self._rows["key"])}
        self._rows = self._rows.with_format("numpy")

    def __len__(self) -> int:
        return len(self._index)

    def to(self, device: torch.device) -> "CachedTeacher":
        return self

    def check(self, prompt_template: str | None, divergence: str, temperature: float) -> None:
        """Raises ValueError, naming the field, where training wants what this cache cannot give."""
        recorded = self.manifest["prompt_template"]
        if prompt_template != recorded:
            raise ValueError(
                f"prompt_template={prompt_template!r}, but the cache {self.folder} was captured with {recorded!r}: "
                "train with that one, or capture anew."
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
                f"{self.manifest['temperature']}: train at that temperature, or capture anew."
            )

    def scores(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        rows: Tensor,
        columns: Tensor,
        vocabulary: SharedVocabulary,
        chunked: bool = False,
    ) -> "TopKScores | SampledScores | DenseScores":
        """See `TeacherSignal`; raises ValueError for a row that was not captured."""
        keys = row_keys(input_ids, attention_mask, rows, columns)
        missing = [row for row, key in enumerate(keys) if key is not None and key not in self._index]
        if missing:
            ids = input_ids[missing[0]][attention_mask[missing[0]].bool()].tolist()
            raise ValueError(
                f"{len(missing)} of {len(keys)} rows of the batch are not in the cache {self.folder} ({len(self)} "
                f"rows), the first of them {ids[:12]}...: capture this data set too, with the same template and "
                "length limits. Rows that are there already are not captured again."
            )
        found = self._rows[[self._index[key] for key in keys if key is not None]]
        record = {
            # The empty one: of a batch without targets no row is asked for.
            name: torch.from_numpy(np.concatenate([np.empty(0, dtype), *found[name]])).to(input_ids.device)
            for name, dtype in _COLUMNS[self.manifest["kind"]].items()
        }
        width = self.manifest["width"]
        log_probs = record["log_probs"].view(-1, width)
        if self.manifest["kind"] == "dense":
            return DenseScores(lambda chunk: log_probs[chunk].float(), vocabulary)
        ids = record["ids"].long().view(-1, width)
        if self.manifest["kind"] == "top_k":
            return TopKScores(ids, log_probs, record["tail"], vocabulary)
        return SampledScores(ids, log_probs, record["top"].long(), vocabulary)


def is_cache(folder: Any) -> bool:
    """Whether this is a folder that `capture` made."""
    return isinstance(folder, str | os.PathLike) and (Path(folder) / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no cache of a teacher: {error}") from error
    if manifest.get("format") != _FORMAT:
        raise ValueError(f"{folder} has format {manifest.get('format')}, expected {_FORMAT}: capture it anew.")
    return manifest


def row_keys(input_ids: Tensor, attention_mask: Tensor, rows: Tensor, columns: Tensor) -> list[bytes | None]:
    """The key of each row of a batch `[B, L]`: a hash of the tokens that the teacher reads and of the columns, counted
    from the first of them, that it is asked about. None for a row that it is not asked about."""
    asked = np.zeros(input_ids.shape, dtype=bool)
    asked[rows.cpu().numpy(), columns.cpu().numpy()] = True
    read = attention_mask.bool().cpu().numpy()
    keys: list[bytes | None] = []
    for ids, is_read, is_asked in zip(input_ids.cpu().numpy(), read, asked, strict=True):
        if not is_asked.any():
            keys.append(None)
            continue
        digest = hashlib.blake2b(ids[is_read].astype("<i4").tobytes(), digest_size=16)
        digest.update(np.flatnonzero(is_asked[is_read]).astype("<i4").tobytes())
        keys.append(digest.digest())
    return keys


# Capturing -----------------------------------------------------------------------------------------------------------


def capture(
    teacher: LiveTeacher,
    dataset: "datasets.Dataset | list[dict]",
    folder: str | os.PathLike,
    tokenizer=None,
    *,
    kind: str = "top_k",
    width: int = 32,
    temperature: float = 1.0,
    batch_size: int = 8,
    rows_per_shard: int = _ROWS_PER_SHARD,
    progress: bool = True,
    student_tokenizer=None,
    vocab_policy: str = "mask_padding",
    **collating: Any,
) -> int:
    """Add to a cache all rows of `dataset` that it does not hold yet; returns how many those were.

    Called again after an interruption it goes on where it stopped. Under `accelerate launch` each process takes its
    share of the rows.

    Args:
        teacher: on the device where it is to run.
        dataset: rows as `DistillationCollator` takes them.
        folder: of the cache; made if it is not there.
        tokenizer: the teacher's; needed for text rows.
        kind: `top_k` keeps the `width` likeliest tokens and the mass of all others, `sampled` keeps `width` tokens
            drawn from the teacher's distribution, `dense` all of it in float16.
        width: tokens kept for each position; of no meaning for `dense`.
        temperature: divides the teacher's logits; `dense` serves any other too.
        batch_size: rows that the teacher reads at once.
        rows_per_shard: rows in a file; at most so many are lost in an interruption.
        progress: show a bar with tokens a second and bytes on disk.
        student_tokenizer: the student's; needed for `vocab_policy` `id_map` and `universal`, by default the teacher's.
        vocab_policy: of the training, see `DistillationTrainingArguments`.
        collating: passed to `DistillationCollator`: columns, `prompt_template`, length limits, `start_token_id`.

    Raises:
        ValueError: a cache in `folder` was made by another teacher, tokenizer, template or kind (the field is named);
            logits of the teacher are not finite; arguments out of range or at odds.
    """
    folder = Path(folder)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    for name, value in (("width", width), ("batch_size", batch_size), ("rows_per_shard", rows_per_shard)):
        if value < 1:
            raise ValueError(f"{name}={value} is out of range; it has to be at least 1.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} is out of range; it has to be a finite number above 0.")
    if vocab_policy == "universal" and kind != "dense":
        raise ValueError(
            f"kind={kind!r} with vocab_policy='universal', which compares all probabilities: capture kind='dense'."
        )
    if not len(dataset):
        raise ValueError("dataset has no rows, so there is nothing to capture.")
    vocabulary = None
    if vocab_policy in ("id_map", "universal"):
        student_size = 0 if student_tokenizer is None else 1 + max(student_tokenizer.get_vocab().values())
        vocabulary = SharedVocabulary.between(
            student_size, teacher.vocab_size, student_tokenizer, tokenizer, vocab_policy
        )
    if kind == "dense":
        width, temperature = teacher.vocab_size, 1.0
    elif kind == "top_k":
        width = min(width, teacher.vocab_size)
    state = PartialState(cpu=teacher.device.type == "cpu")
    manifest = _manifest(teacher, tokenizer, kind, width, temperature, collating.get("prompt_template"))
    if state.is_main_process:
        _open_folder(folder, manifest, tokenizer)
    state.wait_for_everyone()
    known = set(_read_shards(folder, ["key"])["key"]) if _shards(folder) else set()
    collate = DistillationCollator(student_tokenizer or tokenizer, tokenizer, vocabulary=vocabulary, **collating)
    writer = _Writer(folder, state.process_index, kind, rows_per_shard)
    share = range(state.process_index, len(dataset), state.num_processes)
    tokens = 0
    with tqdm(total=len(share), unit=" rows", desc="capture", disable=not (progress and state.is_main_process)) as bar:
        for first in range(0, len(share), batch_size):
            numbers = share[first : first + batch_size]
            batch = collate([dataset[number] for number in numbers])
            if "labels" not in batch:
                raise ValueError(f"rows {numbers[0]} to {numbers[-1]} have no target; a teacher is asked at targets.")
            rows, columns = target_positions(batch["labels"])
            inputs = with_teacher_inputs(batch, collating.get("start_token_id"), vocabulary)
            ids, mask = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
            rows, columns, _ = asked_positions(inputs, rows, columns)
            keys = row_keys(ids, mask, rows, columns)
            fresh = [row for row, key in enumerate(keys) if key is not None and key not in known]
            if fresh:
                wanted = torch.isin(rows, torch.tensor(fresh))
                rows, columns = rows[wanted], columns[wanted]
                logits = teacher.logits_at(ids.to(teacher.device), mask.to(teacher.device), rows, columns)(slice(None))
                bad = ~torch.isfinite(logits).all(dim=-1).cpu()
                if bad.any():
                    raise ValueError(
                        f"the teacher's logits for row {numbers[int(rows[bad][0])]} are not finite: run it in another "
                        "dtype, or leave that row out. What was captured before is kept."
                    )
                for row in fresh:
                    if keys[row] in known:  # twice in one batch
                        continue
                    known.add(keys[row])
                    of_row = logits[(rows == row).to(logits.device)]
                    writer.add(keys[row], _record(of_row, kind, width, temperature, keys[row]))
                tokens += len(rows)
            bar.update(len(numbers))
            per_second = tokens / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{per_second:.0f} tokens/s, {writer.bytes / 1e6:.1f} MB", refresh=False)
    writer.flush()
    state.wait_for_everyone()
    return writer.rows


def _record(logits: Tensor, kind: str, width: int, temperature: float, key: bytes) -> dict[str, np.ndarray]:
    """`[T, V]` logits of one row -> its columns, flat."""
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    if kind == "dense":
        return {"log_probs": log_probs.half().flatten().cpu().numpy()}
    if kind == "top_k":
        values, ids = log_probs.topk(width, dim=-1)
        # Of what is left itself, not 1 minus the rest, which would lose a small tail to rounding.
        tail = log_probs.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
        return {"ids": _flat(ids), "log_probs": values.flatten().cpu().numpy(), "tail": tail.cpu().numpy()}
    # Seeded by the row itself: the same draw in whatever order, and on however many processes, rows are captured.
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    ids = torch.multinomial(log_probs.exp().cpu(), width, replacement=True, generator=generator)
    drawn = log_probs.cpu().gather(-1, ids)
    return {"ids": _flat(ids), "log_probs": drawn.flatten().numpy(), "top": _flat(log_probs.argmax(dim=-1))}


def _flat(ids: Tensor) -> np.ndarray:
    return ids.to(torch.int32).flatten().cpu().numpy()


class _Writer:
    """Gathers rows and writes them shard by shard."""

    def __init__(self, folder: Path, process: int, kind: str, rows_per_shard: int):
        self.folder, self.process, self.kind, self.rows_per_shard = folder, process, kind, rows_per_shard
        self.rows = self.bytes = 0
        self._number = len([shard for shard in _shards(folder) if shard.name.startswith(f"shard-{process:03}-")])
        self._buffer: list[dict[str, Any]] = []

    def add(self, key: bytes, record: Mapping[str, np.ndarray]) -> None:
        self._buffer.append({"key": key, **record})
        if len(self._buffer) >= self.rows_per_shard:
            self.flush()

    def flush(self) -> None:
        if not self._buffer:
            return
        features = {"key": datasets.Value("binary")}
        features |= {name: datasets.Sequence(datasets.Value(dtype)) for name, dtype in _COLUMNS[self.kind].items()}
        columns = {name: [row[name] for row in self._buffer] for name in features}
        partial = self.folder / f"partial-{self.process:03}"
        try:
            shard = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            with partial.open("wb") as stream:
                pyarrow.parquet.write_table(shard.with_format("arrow")[:], stream)
                stream.flush()
                os.fsync(stream.fileno())
            name = f"shard-{self.process:03}-{self._number:05}-{digest_of_file(partial)[:16]}.parquet"
            size = partial.stat().st_size
            os.replace(partial, self.folder / name)
        finally:
            partial.unlink(missing_ok=True)
        self.rows += len(self._buffer)
        self.bytes += size
        self._number += 1
        self._buffer = []


def _open_folder(folder: Path, manifest: dict[str, Any], tokenizer) -> None:
    if (folder / MANIFEST).exists():
        found = read_manifest(folder)
        for name in _IDENTITY:
            if found[name] != manifest[name]:
                raise ValueError(
                    f"the cache {folder} was captured with {name}={found[name]!r}, not {manifest[name]!r}: capture "
                    "into another folder."
                )
    else:
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and no cache: capture into another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        partial = folder / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, folder / MANIFEST)
    for left_behind in folder.glob("partial-*"):
        left_behind.unlink()


def _manifest(
    teacher: LiveTeacher, tokenizer, kind: str, width: int, temperature: float, prompt_template: str | None
) -> dict[str, Any]:
    config = teacher.model.config
    vocabulary = None if tokenizer is None else json.dumps(sorted(tokenizer.get_vocab().items()))
    described = {name: value for name, value in config.to_dict().items() if name not in _NO_PART_OF_A_TEACHER}
    return {
        "format": _FORMAT,
        "kind": kind,
        "width": width,
        "temperature": temperature,
        "vocab_size": teacher.vocab_size,
        "prompt_template": prompt_template,
        "teacher": config._name_or_path,
        "teacher_weights": weights_digest(teacher.model),
        "teacher_config": hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest(),
        "teacher_dtype": str(teacher.model.dtype).removeprefix("torch."),
        "tokenizer": None if vocabulary is None else hashlib.sha256(vocabulary.encode()).hexdigest(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "datasets")},
    }


# Where a teacher came from, in which dtype it was loaded and by which version does not make it another one.
_NO_PART_OF_A_TEACHER = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_attn_implementation_autoset",
}


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names and bytes of all weights, those of an adapter among them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.parquet"))


def _read_shards(folder: Path, columns: list[str] | None = None) -> datasets.Dataset:
    shards = _shards(folder)
    if not shards:
        raise ValueError(f"the cache {folder} holds no shard: the capture was stopped before it wrote one; go on.")
    for shard in shards:
        if not shard.stem.endswith(f"-{digest_of_file(shard)[:16]}"):
            raise ValueError(
                f"{shard} is not what was written, it was cut or altered: delete it and capture again; only its rows "
                "are captured anew."
            )
    return datasets.Dataset.from_parquet([str(shard) for shard in shards], columns=columns)


def digest_of_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
