"""Recording a teacher's distributions: `capture` adds rows to a cache, which `recorded` describes and reads."""

import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...models.prompts import frozen_prompt_date, in_a_class_of_both_versions
from ..alignment.positions import IMAGES_DIGEST, asked_positions, target_positions, teacher_images, with_teacher_inputs
from ..alignment.vocabularies import SharedVocabulary, check_vocab_policy
from ..collator import DistillationCollator, tokenizer_of
from .cache_hub import write_card
from .fingerprints import adapter_digest, config_digest, row_keys, tokenizer_digest, weights_digest
from .live import LiveTeacher
from .recorded import (
    COLUMNS,
    FORMAT,
    KINDS,
    MANIFEST,
    SHARD,
    read_manifest,
    recorded_prompt_date,
    size_on_disk,
)
from .served import ServedTeacher
from .shards import ShardWriter, read_keys, remove_left_behind
from .targets import TargetGeneration, check_room, generate_targets
from .workers import Worker, join_folder


ROWS_PER_SHARD = 2048
_MOST_ROUNDS = 100_000  # of a target; they are drawn at once, in memory


def capture(
    teacher: LiveTeacher | ServedTeacher,
    dataset: "datasets.Dataset | datasets.DatasetDict | list[dict]",
    folder: str | os.PathLike,
    tokenizer=None,
    *,
    kind: str = "top_k",
    k: int | None = None,
    rounds: int = 50,
    proposal_power: float = 1.0,
    temperature: float = 1.0,
    generation: TargetGeneration | None = None,
    num_shards: int = 1,
    index: int = 0,
    batch_size: int = 8,
    rows_per_shard: int = ROWS_PER_SHARD,
    progress: bool = True,
    student_tokenizer=None,
    vocab_policy: str = "mask_padding",
    **collating: Any,
) -> int:
    """Add to a cache all rows of `dataset` that it does not hold yet; returns how many those were.

    Called again after an interruption it goes on where it stopped. Under `accelerate launch` each process takes its
    share of the rows. Independent jobs share them by `num_shards` and `index`, into one folder or into folders of
    their own (`workers.merge_caches`).

    Args:
        teacher: on the device where it is to run, or on a server, which gives `top_k` at temperature 1 only.
        dataset: rows as `DistillationCollator` takes them; the splits of a `DatasetDict` are all captured.
        folder: of the cache; made if it is not there.
        tokenizer: the teacher's; needed for text rows.
        kind: `top_k` keeps the likeliest tokens and the mass of all others, `sampled` tokens that were drawn, with
            importance weights (arXiv 2503.16870), `dense` the whole distribution in float16.
        k: tokens that `top_k` keeps for each position, 32 by default; of a teacher on a server those that it gives.
        rounds: draws that `sampled` makes for each position; the tokens kept are fewer where some come up again.
        proposal_power: `sampled` draws from what is proportional to the teacher's probability to this power: below 1
            rare tokens come up more often, above 1 less often; the weights make up for it.
        temperature: divides the teacher's logits; `dense` serves any other too.
        generation: how the teacher writes the targets itself (`targets`); they are kept in the cache, as
            splits of a data set, and their distributions are captured. None takes the targets of `dataset`.
        num_shards: independent jobs that share the rows, as in `Dataset.shard`; each may have several processes.
        index: which of these jobs this is, from 0.
        batch_size: rows that the teacher reads at once; for one on a server at least its `requests`.
        rows_per_shard: rows in a file; at most so many are lost where the process is killed.
        progress: show a bar with target tokens per second and the size of the cache.
        student_tokenizer: the student's; needed for `vocab_policy` `id_map` and `universal`, by default the teacher's.
            For the other policies its ids have to be the teacher's.
        vocab_policy: of the training, see `DistillationTrainingArguments`.
        collating: passed to `DistillationCollator`: columns, `prompt_template`, `prompt_date` (of a cache that is gone
            on with its own, else today, where a chat template names the day), length limits, `start_token_id`.

    Raises:
        ValueError: a cache in `folder` was made by another teacher, tokenizer, template or kind (the field is named);
            the student's tokenizer is not one that `vocab_policy` is for; logits of the teacher are not finite; a
            server has another model than at first; arguments out of range or at odds.
    """
    folder = Path(folder)
    if isinstance(teacher, ServedTeacher):
        _check_served(teacher, kind, k, temperature, vocab_policy, generation)
        k, batch_size = teacher.k, max(batch_size, teacher.requests)
    elif k is None:
        k = 32
    at_least_one = {"k": k, "rounds": rounds, "batch_size": batch_size, "rows_per_shard": rows_per_shard}
    _check_options(kind, vocab_policy, at_least_one, {"temperature": temperature, "proposal_power": proposal_power})
    splits = splits_with_rows(dataset)
    check_shard(num_shards, index, sum(map(len, splits.values())))
    student_size = teacher.vocab_size  # of a student with the teacher's ids nothing is read but its tokens
    if student_tokenizer is not None and vocab_policy in ("id_map", "universal"):
        student_size = 1 + max(student_tokenizer.get_vocab().values())
    vocabulary = SharedVocabulary.between(
        student_size, teacher.vocab_size, tokenizer_of(student_tokenizer), tokenizer_of(tokenizer), vocab_policy
    )
    if isinstance(teacher, LiveTeacher) and generation is not None:
        check_room(teacher, generation)
    recorded = {
        "kind": kind,
        "k": min(k, teacher.vocab_size) if kind == "top_k" else None,
        "rounds": rounds if kind == "sampled" else None,
        "proposal_power": proposal_power if kind == "sampled" else None,
        "temperature": 1.0 if kind == "dense" else temperature,
        "generation": None if generation is None else dataclasses.asdict(generation),
    }
    template, day = collating.get("prompt_template"), collating.get("prompt_date")
    if day is None and (folder / MANIFEST).exists():
        day = recorded_prompt_date(folder)
    collating["prompt_date"] = frozen_prompt_date(tokenizer, template, day)
    manifest = _manifest(teacher, tokenizer, recorded, template, collating["prompt_date"])
    collate = DistillationCollator(student_tokenizer or tokenizer, tokenizer, vocabulary=vocabulary, **collating)
    collate([next(iter(splits.values()))[0]])  # a template or columns that do not work, before anything is written

    state = PartialState(cpu=teacher.device.type == "cpu")
    worker = Worker(index, num_shards, state.process_index, state.num_processes)
    if state.is_main_process:
        join_folder(folder, manifest, worker.name, lambda partial: _save_tokenizer(tokenizer, partial))
    state.wait_for_everyone()
    remove_left_behind(folder, worker.name)
    if isinstance(teacher, ServedTeacher):
        teacher.expect(read_manifest(folder)["server"])
    progress = progress and state.is_main_process
    if isinstance(teacher, LiveTeacher) and generation is not None:
        writing = collate
        if not vocabulary.same_ids:  # what the teacher reads and writes here is in its own ids
            start = vocabulary.start_for_teacher(collating.get("start_token_id"))
            writing = DistillationCollator(tokenizer, tokenizer, **{**collating, "start_token_id": start})
        splits = {
            name: generate_targets(
                teacher,
                rows,
                folder,
                writing,
                generation,
                worker=worker,
                split=name,
                batch_size=batch_size,
                rows_per_shard=rows_per_shard,
                progress=progress,
            )
            for name, rows in splits.items()
        }
    features = {"key": datasets.Value("binary")}
    features |= {name: datasets.Sequence(datasets.Value(dtype)) for name, dtype in COLUMNS[kind].items()}
    writer = ShardWriter(folder, SHARD, worker.name, datasets.Features(features), rows_per_shard)
    # Numbered through all splits, so that workers get as much to do as each other.
    numbered = [(name, number) for name, rows in splits.items() for number in range(len(rows))]
    # What the teacher wrote are the answers to the rows of this worker.
    share = numbered if generation is not None else [numbered[place] for place in worker.share(len(numbered))]
    try:
        _capture_rows(teacher, splits, share, collate, recorded, folder, writer, batch_size, progress)
    finally:
        writer.flush()
    state.wait_for_everyone()
    if state.is_main_process:
        write_card(folder, manifest, worker.name)
    return sum(gather_object([writer.rows]))


def _check_options(
    kind: str, vocab_policy: str, at_least_one: Mapping[str, int], above_zero: Mapping[str, float]
) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    check_vocab_policy(vocab_policy)
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name}={value} is out of range; it has to be at least 1.")
    if at_least_one["rounds"] > _MOST_ROUNDS:
        raise ValueError(f"rounds={at_least_one['rounds']} is out of range; give 1 to {_MOST_ROUNDS}.")
    for name, number in above_zero.items():
        if not 0 < number < float("inf"):
            raise ValueError(f"{name}={number} is out of range; it has to be a finite number above 0.")
    if vocab_policy == "universal" and kind != "dense":
        raise ValueError(
            f"kind={kind!r} with vocab_policy='universal', which compares all probabilities: capture kind='dense'."
        )


def splits_with_rows(dataset: "datasets.Dataset | datasets.DatasetDict | list[dict]") -> dict[str, Any]:
    """By their names, `train` for rows without one; raises ValueError where there is no row."""
    splits = dataset if isinstance(dataset, dict) else {"train": dataset}
    splits = {name: rows for name, rows in splits.items() if len(rows)}
    if not splits:
        raise ValueError("dataset has no rows, so there is nothing to capture.")
    return splits


def _check_served(
    teacher: ServedTeacher,
    kind: str,
    k: int | None,
    temperature: float,
    vocab_policy: str,
    generation: TargetGeneration | None,
) -> None:
    """Raises ValueError where a server cannot give what is to be recorded."""
    if kind != "top_k":
        raise ValueError(
            f"kind={kind!r} needs the whole distribution, and a server gives the likeliest {teacher.k} tokens: "
            "capture kind='top_k', or give a teacher that is here."
        )
    if k not in (None, teacher.k):
        raise ValueError(f"k={k}, but the server is asked for {teacher.k}: give ServedTeacher(..., k={k}).")
    if generation is not None:
        raise ValueError(
            "generation with a teacher that is asked for log-probabilities: let the server write the targets, with "
            "cache --generate --server."
        )
    divergence = "universal_logit_distance" if vocab_policy == "universal" else "forward_kl"
    teacher.check(None, divergence, temperature)


@dataclass(frozen=True)
class _Question:
    """Those rows of a batch that the cache does not hold yet, and where the teacher is asked about them.

    Args:
        names: split and number of each row of the batch, for messages.
        ids, mask: `[B, L]`.
        rows, columns: `[N]` each.
        images: what the teacher is given beside tokens.
        keys: of the rows that are asked about, by their row in the batch.
    """

    names: Sequence[tuple[str, int]]
    ids: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    images: dict[str, Tensor]
    keys: dict[int, bytes]


def _capture_rows(
    teacher: LiveTeacher | ServedTeacher,
    splits: Mapping[str, Any],
    share: Sequence[tuple[str, int]],
    collate: DistillationCollator,
    recorded: dict[str, Any],
    folder: Path,
    writer: ShardWriter,
    batch_size: int,
    progress: bool,
) -> None:
    """Writes the rows of `share`, each a split and a number, that the cache does not hold yet."""
    questions = _questions(splits, share, collate, read_keys(folder, SHARD), batch_size)
    if isinstance(teacher, ServedTeacher):
        questions = _sent_ahead(teacher, questions)
    waiting: list[dict[str, Any]] = []  # until it is known that the server had its model when it gave them
    tokens, begin = 0, time.monotonic()
    with tqdm(total=len(share), unit=" rows", desc="capture", disable=not progress) as bar:
        for question in questions:
            if question.keys:
                waiting += _records(teacher, question, recorded)
                tokens += len(question.rows)
                speed = tokens / (time.monotonic() - begin)
                bar.set_postfix_str(f"{speed:.0f} tokens/s, {size_on_disk(folder) / 1e6:.1f} MB")
            if isinstance(teacher, LiveTeacher) or len(waiting) >= teacher.rows_per_comparison:
                _keep(teacher, waiting, writer)
            bar.update(len(question.names))
    _keep(teacher, waiting, writer)


def _keep(teacher: LiveTeacher | ServedTeacher, rows: list[dict[str, Any]], writer: ShardWriter) -> None:
    """Hands rows to the writer; the list is empty then."""
    if rows and isinstance(teacher, ServedTeacher):
        teacher.confirm()
    for row in rows:
        writer.add(row)
    rows.clear()


def _questions(
    splits: Mapping[str, Any],
    share: Sequence[tuple[str, int]],
    collate: DistillationCollator,
    known: set[bytes],
    batch_size: int,
) -> Iterator[_Question]:
    """One for each batch of rows; those that are asked about are added to `known`."""
    for first in range(0, len(share), batch_size):
        names = share[first : first + batch_size]
        batch = collate([splits[name][number] for name, number in names])
        if "labels" not in batch:
            name, number = names[0]
            raise ValueError(f"row {number} of {name} has no target; a teacher is asked at targets.")
        batch = {**batch, **with_teacher_inputs(batch, collate.start_token_id, collate.vocabulary)}
        rows, columns = target_positions(batch["labels"])
        ids, mask = batch["teacher_input_ids"], batch["teacher_attention_mask"]
        rows, columns, _ = asked_positions(batch, rows, columns)
        images = teacher_images(batch)
        fresh = {}
        for row, key in enumerate(row_keys(ids, mask, rows, columns, images.get(IMAGES_DIGEST))):
            if key is not None and key not in known:  # which it may be by another row of this batch
                known.add(key)
                fresh[row] = key
        wanted = torch.isin(rows, torch.tensor(list(fresh)))
        yield _Question(names, ids, mask, rows[wanted], columns[wanted], images, fresh)


def _sent_ahead(teacher: ServedTeacher, questions: Iterable[_Question]) -> Iterator[_Question]:
    """Each question when the one after it has been sent too, so that the server never waits for this process."""
    last = None
    for question in questions:
        if question.keys:
            teacher.ask(question.ids, question.mask, question.rows, question.columns)
        if last is not None:
            yield last
        last = question
    if last is not None:
        yield last


def _records(
    teacher: LiveTeacher | ServedTeacher, question: _Question, recorded: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of the cache that answer a question.

    Args:
        recorded: the part of the manifest that says what is kept of a distribution.
    """
    ids, mask, rows, columns = question.ids, question.mask, question.rows, question.columns
    if isinstance(teacher, ServedTeacher):
        found = teacher.scores(ids, mask, rows, columns, SharedVocabulary(0, 0), images=question.images)
        parts = {"ids": found.ids.int(), "log_probs": found.log_probs, "tail": found.tail}
        return [
            {"key": key, **{name: part[rows == row].flatten().numpy() for name, part in parts.items()}}
            for row, key in question.keys.items()
        ]
    of_rows = teacher.logits_at(ids.to(teacher.device), mask.to(teacher.device), rows, columns, images=question.images)
    logits = of_rows(slice(None))
    bad = ~torch.isfinite(logits).all(dim=-1).cpu()
    if bad.any():
        name, number = question.names[int(rows[bad][0])]
        raise ValueError(
            f"the teacher's logits for row {number} of {name} are not finite: run it in another dtype, or "
            "leave that row out. What was captured before is kept."
        )
    return [
        {"key": key, **_record(logits[(rows == row).to(logits.device)], recorded, key)}
        for row, key in question.keys.items()
    ]


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


def check_shard(num_shards: int, index: int, rows: int) -> None:
    """Raises ValueError where there is no such job, or no row for it."""
    if not 0 <= index < num_shards:
        raise ValueError(f"shard {index} of {num_shards}: give an index from 0 to the number of shards less 1.")
    if index >= rows:
        raise ValueError(f"shard {index} of {num_shards} has no row, for the data has {rows}: make fewer shards.")


def _save_tokenizer(tokenizer, folder: Path) -> None:
    if tokenizer is not None:
        in_a_class_of_both_versions(tokenizer).save_pretrained(folder)


def _manifest(
    teacher: LiveTeacher | ServedTeacher,
    tokenizer,
    recorded: dict[str, Any],
    prompt_template: str | None,
    prompt_date: str | None,
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        **recorded,
        "vocab_size": teacher.vocab_size,
        "tokenizer": tokenizer_digest(tokenizer),
        "prompt_template": prompt_template,
        **({} if prompt_date is None else {"prompt_date": prompt_date}),
        **({"teacher_input_names": list(teacher.input_names)} if teacher.input_names else {}),
        **(_of_server(teacher) if isinstance(teacher, ServedTeacher) else _of_model(teacher.model)),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "datasets")},
    }


def _of_model(model: PreTrainedModel) -> dict[str, Any]:
    name = model.config._name_or_path
    return {
        # Where it lies on this machine is nobody's business on the Hub.
        "teacher": Path(name).name if os.path.isdir(name) else name,
        "teacher_config": config_digest(model),
        "teacher_dtype": str(model.dtype).removeprefix("torch."),
        "teacher_adapter": adapter_digest(model),
        "teacher_weights": weights_digest(model),
    }


def _of_server(teacher: ServedTeacher) -> dict[str, Any]:
    """Weights on a server are known by what they predict."""
    described = teacher.describe()
    unknown = ("teacher_config", "teacher_dtype", "teacher_adapter", "teacher_weights")
    return {"teacher": described["model"], **dict.fromkeys(unknown), "server": described}
