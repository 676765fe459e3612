"""Capture a teacher's distributions once, train from them for ever.

A cache is a folder:

- `manifest.json`: what made it and the kind of record;
- `shard-*.parquet` (see `shards`): rows, each with its key and one record for each of its target tokens;
- `generated-<split>-*.parquet`: where the teacher wrote the targets itself (`sequence_level`), sources and targets;
- the teacher's tokenizer, and `README.md`, the card of a data set on the Hub (`cache_hub`).

A row's key is a hash of what the teacher read and of the columns it was asked about, so rows may be shuffled, left
out or added. A capture that was killed goes on after its last shard.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ..files import check_fields, inside, read_json
from ..models.prompts import frozen_prompt_date, in_a_class_of_both_versions
from .alignment import SharedVocabulary, asked_positions, check_vocab_policy, target_positions, with_teacher_inputs
from .cache_hub import fetch, is_on_hub, push, write_card
from .collator import DistillationCollator
from .losses import Divergence, at_least_float32, forward_kl
from .sequence_level import TargetGeneration, check_room, generate_targets
from .shards import ShardWriter, read_keys, read_shards, shard_files
from .teachers import DenseScores, LiveTeacher


MANIFEST = "manifest.json"
_UNFINISHED_MANIFEST = f"{MANIFEST}.partial"
_FORMAT = 2
_SHARD = "shard"
_ROWS_PER_SHARD = 2048
_MOST_ROUNDS = 100_000  # of a target; they are drawn at once, in memory
# What has to agree for two captures to be one, what explains the most first. Names and versions are kept for people.
_IDENTITY = (
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
_COLUMNS = {
    "top_k": {"ids": "int32", "log_probs": "float32", "tail": "float32"},
    "sampled": {"ids": "int32", "log_probs": "float32", "weights": "float32", "distinct": "int32", "top": "int32"},
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
    """An unbiased estimate of `forward_kl` from tokens that were drawn: `sum_r w_r (log p_r - log q_r)`.

    Sparse logit sampling, arXiv 2503.16870: unlike a cut to the top k, what the gradient expects is that of the whole
    distribution. The paper divides the weights by their sum; that is biased where tokens are not drawn from the
    teacher itself, and the same where they are. A single estimate may be negative.

    Args:
        student_logits: `[C, V]`.
        ids: `[C, R]`, tokens drawn with replacement; one that came up n times may stand there once.
        log_probs: `[C, R]`, the teacher's log-probability of each, at `temperature`.
        weights: `[C, R]`, the importance weights: n times its probability over that of drawing it, divided by the
            number of draws. 0 fills up a row.
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
    """`TeacherScores` of R drawn tokens, `[N, R]` three times, and the likeliest token `[N]`.

    For a `MappedVocabulary` the gradient is unbiased; the value lacks -m log m, which is not in the record.
    """

    ids: Tensor
    log_probs: Tensor
    weights: Tensor
    likeliest: Tensor
    vocabulary: SharedVocabulary

    def divergence(self, student_logits: Tensor, chunk: slice, divergence: Divergence, temperature: float) -> Tensor:
        record = (self.vocabulary.places(self.ids[chunk]), self.log_probs[chunk], self.weights[chunk])
        return sampled_forward_kl(self.vocabulary.restrict_student(student_logits), *record, temperature)

    def top(self, chunk: slice) -> Tensor:
        return self.vocabulary.places(self.likeliest[chunk])


# Reading -------------------------------------------------------------------------------------------------------------


class CachedTeacher:
    """A `TeacherSignal` that reads what `capture` wrote; no teacher is in memory, records are memory-mapped.

    Args:
        folder: of a cache, or `hf://datasets/user/name`, with `@revision` if need be, for one on the Hub.

    Raises:
        ValueError: it is no cache, or a shard is not what was written.
        OSError: it is not on the Hub, or the Hub cannot be reached.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = _local(folder)
        self.manifest = read_manifest(self.folder)
        self.vocab_size = self.manifest["vocab_size"]
        self.prompt_date = self.manifest.get("prompt_date")
        if not shard_files(self.folder, _SHARD):
            raise ValueError(
                f"the cache {self.folder} holds no shard: the capture was stopped before it wrote one; go on with it."
            )
        self._rows = read_shards(self.folder, _SHARD).with_format("numpy")
        # 24 bytes a row; a dict of bytes takes six times as much, in each process.
        keys = np.concatenate([np.array(part.to_pylist(), dtype="S16") for part in self._rows.data["key"].chunks])
        self._keys, self._row_of_key = np.unique(keys, return_index=True)

    def __len__(self) -> int:
        return len(self._keys)

    def to(self, device: torch.device) -> "CachedTeacher":
        return self

    def check(
        self, prompt_template: str | None, divergence: str, temperature: float, prompt_date: str | None = None
    ) -> None:
        """Raises ValueError, naming the field, where training wants what this cache cannot give."""
        recorded = self.manifest["prompt_template"]
        if prompt_template != recorded:
            raise ValueError(
                f"prompt_template={prompt_template!r}, but the cache {self.folder} was captured with {recorded!r}: "
                "train with that one, or capture anew."
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
        asked = np.array([key for key in keys if key is not None], dtype="S16")
        places = np.searchsorted(self._keys, asked).clip(max=len(self) - 1)
        there = self._keys[places] == asked
        if not there.all():
            with_target = [row for row, key in enumerate(keys) if key is not None]
            missing = [row for row, is_there in zip(with_target, there, strict=True) if not is_there]
            ids = input_ids[missing[0]][attention_mask[missing[0]].bool()].tolist()
            raise ValueError(
                f"{len(missing)} of {len(keys)} rows of the batch are not in the cache {self.folder} ({len(self)} "
                f"rows), the first of them {ids[:12]}...: capture this data set too, with the same template and "
                "length limits and, for a merged student of a teacher without any template, with its start_token_id "
                "(cache --student). Rows that are there already are not captured again."
            )
        found = self._rows[self._row_of_key[places].tolist()]
        record = {
            # A batch without any target still has columns, of their dtype.
            name: torch.from_numpy(np.concatenate([np.empty(0, dtype), *found[name]])).to(input_ids.device)
            for name, dtype in _COLUMNS[self.manifest["kind"]].items()
        }
        if self.manifest["kind"] == "dense":
            log_probs = record["log_probs"].view(-1, self.vocab_size)
            return DenseScores(lambda chunk: log_probs[chunk].float(), vocabulary)
        ids, log_probs = record["ids"].long(), record["log_probs"]
        if self.manifest["kind"] == "top_k":
            k = self.manifest["k"]
            return TopKScores(ids.view(-1, k), log_probs.view(-1, k), record["tail"], vocabulary)
        distinct = record["distinct"]
        drawn = torch.arange(max(distinct.tolist(), default=0), device=ids.device) < distinct[:, None]
        ids, log_probs, weights = (_fill(drawn, flat) for flat in (ids, log_probs, record["weights"]))
        return SampledScores(ids, log_probs, weights, record["top"].long(), vocabulary)

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


def is_cache(folder: Any) -> bool:
    """Whether this is a folder that `capture` made, or names one on the Hub."""
    return is_on_hub(folder) or (isinstance(folder, str | os.PathLike) and (Path(folder) / MANIFEST).is_file())


def _local(folder: str | os.PathLike) -> Path:
    return fetch(folder) if is_on_hub(folder) else Path(folder)


def recorded_prompt_date(folder: str | os.PathLike) -> str | None:
    """The day that the prompts of a cache name, if they name one; raises what `CachedTeacher` raises."""
    return read_manifest(_local(folder)).get("prompt_date")  # which older caches do not say


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_json(inside(folder, MANIFEST))
        if manifest.get("format") != _FORMAT:
            raise ValueError(f"its format is {manifest.get('format')!r}, expected {_FORMAT}: capture it again")
        check_fields(manifest, {"kind": str, "vocab_size": int, "temperature": float}, str(folder / MANIFEST))
        required = (name for name in (*_IDENTITY, "teacher") if name != "prompt_date")  # which few prompts name
        missing = [name for name in required if name not in manifest]
        if missing or manifest["kind"] not in KINDS or (manifest["kind"] == "top_k" and not manifest["k"]):
            raise ValueError(f"{folder / MANIFEST} lacks {', '.join(missing) or 'a kind of record'}: capture it again")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no cache of a teacher: {error}") from error
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
    dataset: "datasets.Dataset | datasets.DatasetDict | list[dict]",
    folder: str | os.PathLike,
    tokenizer=None,
    *,
    kind: str = "top_k",
    k: int = 32,
    rounds: int = 50,
    proposal_power: float = 1.0,
    temperature: float = 1.0,
    generation: TargetGeneration | None = None,
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
        dataset: rows as `DistillationCollator` takes them; the splits of a `DatasetDict` are all captured.
        folder: of the cache; made if it is not there.
        tokenizer: the teacher's; needed for text rows.
        kind: `top_k` keeps the likeliest tokens and the mass of all others, `sampled` tokens that were drawn, with
            importance weights (arXiv 2503.16870), `dense` the whole distribution in float16.
        k: tokens that `top_k` keeps for each position.
        rounds: draws that `sampled` makes for each position; the tokens kept are fewer where some come up again.
        proposal_power: `sampled` draws from what is proportional to the teacher's probability to this power: below 1
            rare tokens come up more often, above 1 less often; the weights make up for it.
        temperature: divides the teacher's logits; `dense` serves any other too.
        generation: how the teacher writes the targets itself (`sequence_level`); they are kept in the cache, as
            splits of a data set, and their distributions are captured. None takes the targets of `dataset`.
        batch_size: rows that the teacher reads at once.
        rows_per_shard: rows in a file; at most so many are lost in an interruption.
        progress: show a bar with target tokens a second and the size of the cache.
        student_tokenizer: the student's; needed for `vocab_policy` `id_map` and `universal`, by default the teacher's.
        vocab_policy: of the training, see `DistillationTrainingArguments`.
        collating: passed to `DistillationCollator`: columns, `prompt_template`, `prompt_date` (of a cache that is gone
            on with its own, else today, where a chat template names the day), length limits, `start_token_id`.

    Raises:
        ValueError: a cache in `folder` was made by another teacher, tokenizer, template or kind (the field is named);
            logits of the teacher are not finite; arguments out of range or at odds.
    """
    folder = Path(folder)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    check_vocab_policy(vocab_policy)
    for name, value in (("k", k), ("rounds", rounds), ("batch_size", batch_size), ("rows_per_shard", rows_per_shard)):
        if value < 1:
            raise ValueError(f"{name}={value} is out of range; it has to be at least 1.")
    if rounds > _MOST_ROUNDS:
        raise ValueError(f"rounds={rounds} is out of range; give 1 to {_MOST_ROUNDS}.")
    for name, value in (("temperature", temperature), ("proposal_power", proposal_power)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} is out of range; it has to be a finite number above 0.")
    if vocab_policy == "universal" and kind != "dense":
        raise ValueError(
            f"kind={kind!r} with vocab_policy='universal', which compares all probabilities: capture kind='dense'."
        )
    splits = dataset if isinstance(dataset, dict) else {"train": dataset}
    splits = {name: rows for name, rows in splits.items() if len(rows)}
    if not splits:
        raise ValueError("dataset has no rows, so there is nothing to capture.")
    vocabulary = None
    if vocab_policy in ("id_map", "universal"):
        student_size = 0 if student_tokenizer is None else 1 + max(student_tokenizer.get_vocab().values())
        vocabulary = SharedVocabulary.between(
            student_size, teacher.vocab_size, student_tokenizer, tokenizer, vocab_policy
        )
    if generation is not None:
        check_room(teacher, generation)
    recorded = {
        "kind": kind,
        "k": min(k, teacher.vocab_size) if kind == "top_k" else None,
        "rounds": rounds if kind == "sampled" else None,
        "proposal_power": proposal_power if kind == "sampled" else None,
        "temperature": 1.0 if kind == "dense" else temperature,
        "generation": None if generation is None else dataclasses.asdict(generation),
    }
    state = PartialState(cpu=teacher.device.type == "cpu")
    template, day = collating.get("prompt_template"), collating.get("prompt_date")
    if day is None and (folder / MANIFEST).exists():
        day = recorded_prompt_date(folder)
    collating["prompt_date"] = frozen_prompt_date(tokenizer, template, day)
    manifest = _manifest(teacher, tokenizer, recorded, template, collating["prompt_date"])
    collate = DistillationCollator(student_tokenizer or tokenizer, tokenizer, vocabulary=vocabulary, **collating)
    collate([next(iter(splits.values()))[0]])  # a template or columns that do not work, before anything is written
    if state.is_main_process:
        _open_folder(folder, manifest, tokenizer)
    state.wait_for_everyone()
    if generation is not None:
        options = {"batch_size": batch_size, "rows_per_shard": rows_per_shard, "progress": progress}
        splits = {
            name: generate_targets(teacher, rows, folder, collate, generation, split=name, **options)
            for name, rows in splits.items()
        }
    known = read_keys(folder, _SHARD)
    features = {"key": datasets.Value("binary")}
    features |= {name: datasets.Sequence(datasets.Value(dtype)) for name, dtype in _COLUMNS[kind].items()}
    writer = ShardWriter(folder, _SHARD, state.process_index, datasets.Features(features), rows_per_shard)
    # Numbered through all splits, so that processes get as much to do as each other.
    numbered = [(name, number) for name, rows in splits.items() for number in range(len(rows))]
    share = numbered[state.process_index :: state.num_processes]
    tokens, seconds = 0, 0.0
    with tqdm(total=len(share), unit=" rows", desc="capture", disable=not (progress and state.is_main_process)) as bar:
        for first in range(0, len(share), batch_size):
            names = share[first : first + batch_size]
            batch = collate([splits[name][number] for name, number in names])
            if "labels" not in batch:
                name, number = names[0]
                raise ValueError(f"row {number} of {name} has no target; a teacher is asked at targets.")
            rows, columns = target_positions(batch["labels"])
            inputs = with_teacher_inputs(batch, collating.get("start_token_id"), vocabulary)
            ids, mask = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
            rows, columns, _ = asked_positions(inputs, rows, columns)
            keys = row_keys(ids, mask, rows, columns)
            fresh = [row for row, key in enumerate(keys) if key is not None and key not in known]
            if fresh:
                begin = time.monotonic()
                wanted = torch.isin(rows, torch.tensor(fresh))
                rows, columns = rows[wanted], columns[wanted]
                logits = teacher.logits_at(ids.to(teacher.device), mask.to(teacher.device), rows, columns)(slice(None))
                bad = ~torch.isfinite(logits).all(dim=-1).cpu()
                if bad.any():
                    name, number = names[int(rows[bad][0])]
                    raise ValueError(
                        f"the teacher's logits for row {number} of {name} are not finite: run it in another dtype, or "
                        "leave that row out. What was captured before is kept."
                    )
                for row in fresh:
                    if keys[row] in known:  # twice in one batch
                        continue
                    known.add(keys[row])
                    of_row = logits[(rows == row).to(logits.device)]
                    writer.add({"key": keys[row], **_record(of_row, recorded, keys[row])})
                tokens, seconds = tokens + len(rows), seconds + time.monotonic() - begin
                bar.set_postfix_str(f"{tokens / seconds:.0f} tokens/s, {size_on_disk(folder) / 1e6:.1f} MB")
            bar.update(len(names))
    writer.flush()
    state.wait_for_everyone()
    if state.is_main_process:
        write_card(folder, manifest)
    return sum(gather_object([writer.rows]))


def size_on_disk(folder: str | os.PathLike) -> int:
    """Bytes of all that is in the folder of a cache."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.parquet"))


def _record(logits: Tensor, recorded: dict[str, Any], key: bytes) -> dict[str, np.ndarray]:
    """`[T, V]` logits of one row -> its columns, flat."""
    log_probs = torch.log_softmax(logits.float() / recorded["temperature"], dim=-1)
    if recorded["kind"] == "dense":
        return {"log_probs": log_probs.half().flatten().cpu().numpy()}
    if recorded["kind"] == "top_k":
        values, ids = log_probs.topk(recorded["k"], dim=-1)
        # Of what is left itself, not 1 minus the rest, which would lose a small tail to rounding.
        tail = log_probs.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
        return {"ids": _flat(ids), "log_probs": values.flatten().cpu().numpy(), "tail": tail.cpu().numpy()}
    log_probs = log_probs.cpu()
    log_proposal = torch.log_softmax(recorded["proposal_power"] * log_probs, dim=-1)
    # Seeded by the row itself: the same draw in whatever order, and on however many processes, rows are captured.
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    drawn = torch.multinomial(log_proposal.exp(), recorded["rounds"], replacement=True, generator=generator)
    counts = torch.zeros_like(log_probs).scatter_add_(-1, drawn, torch.ones(drawn.shape))
    came_up = counts > 0
    weights = counts / recorded["rounds"] * (log_probs - log_proposal).exp()
    return {
        "ids": _flat(came_up.nonzero()[:, 1]),
        "log_probs": log_probs[came_up].numpy(),
        "weights": weights[came_up].numpy(),
        "distinct": _flat(came_up.sum(dim=-1)),
        "top": _flat(log_probs.argmax(dim=-1)),
    }


def _flat(ids: Tensor) -> np.ndarray:
    return ids.to(torch.int32).flatten().cpu().numpy()


def _open_folder(folder: Path, manifest: dict[str, Any], tokenizer) -> None:
    if (folder / MANIFEST).exists():
        found = read_manifest(folder)
        for name in _IDENTITY:
            ours = manifest.get(name)
            if found.get(name, ours) != ours:  # older caches do not say their prompt_date
                raise ValueError(
                    f"the cache {folder} was captured with {name}={found[name]!r}, not {ours!r}: capture "
                    "into another folder."
                )
    else:
        # What is to become the manifest is the first file of a folder, so that one that was left half made is known.
        partial = folder / _UNFINISHED_MANIFEST
        if folder.exists() and any(folder.iterdir()) and not partial.exists():
            raise ValueError(f"{folder} is not empty and no cache: capture into another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
        if tokenizer is not None:
            in_a_class_of_both_versions(tokenizer).save_pretrained(folder)
        os.replace(partial, folder / MANIFEST)
    for left_behind in folder.glob("partial-*"):
        left_behind.unlink()


def _manifest(
    teacher: LiveTeacher, tokenizer, recorded: dict[str, Any], prompt_template: str | None, prompt_date: str | None
) -> dict[str, Any]:
    config = teacher.model.config
    name = config._name_or_path
    vocabulary = None if tokenizer is None else json.dumps(sorted(tokenizer.get_vocab().items()))
    described = {name: value for name, value in config.to_dict().items() if name not in _NO_PART_OF_A_TEACHER}
    return {
        "format": _FORMAT,
        **recorded,
        "vocab_size": teacher.vocab_size,
        "tokenizer": None if vocabulary is None else hashlib.sha256(vocabulary.encode()).hexdigest(),
        "prompt_template": prompt_template,
        **({} if prompt_date is None else {"prompt_date": prompt_date}),
        # Where it lies on this machine is nobody's business on the Hub.
        "teacher": Path(name).name if os.path.isdir(name) else name,
        "teacher_config": _digest_of(described),
        "teacher_dtype": str(teacher.model.dtype).removeprefix("torch."),
        "teacher_adapter": _adapter_digest(teacher.model),
        "teacher_weights": weights_digest(teacher.model),
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
_NO_PART_OF_AN_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}


def _adapter_digest(model: torch.nn.Module) -> str | None:
    """SHA-256 over the configurations of PEFT's active adapters and their weights; None for a model without."""
    if not getattr(model, "peft_config", None):
        return None
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    # Asked of the layers: models that transformers put an adapter into answer only with PEFT's very newest version.
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    described = []
    for name in sorted({name for layer in layers for name in layer.active_adapters}):
        config = {
            key: value for key, value in model.peft_config[name].to_dict().items() if key not in _NO_PART_OF_AN_ADAPTER
        }
        described.append([_digest_of(config), _digest_of_tensors(get_peft_model_state_dict(model, adapter_name=name))])
    return _digest_of(described)


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names and bytes of all weights, those of an adapter among them."""
    return _digest_of_tensors(model.state_dict())


def _digest_of(described: Any) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=_jsonable).encode()).hexdigest()


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _digest_of_tensors(tensors: "dict[str, Tensor]") -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
