"""Sequence-level distillation: the teacher writes the targets that the student learns.

Kim and Rush, arXiv 1606.07947: section 3.2 trains on the teacher's best beam in place of the reference; section 3.3 on
that of its n best which is closest to the reference. What was written is kept in the folder of a cache
([`~hf_encdec_distill.distillation.capture`]), as data that `load_dataset` reads:

- `generated-<split>-*.parquet`: one row for each answer that was kept, the source as it was, the answer in the place
  of the target, and in `reference` the target that was there; `mean_log_prob`, nats per token, where the teacher wrote
  several;
- `refused-<split>-*.parquet`: the keys of rows without any answer worth keeping, and why.
"""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from ..alignment.positions import IGNORED, target_positions, teacher_columns
from ..checks.limits import max_positions
from ..collator import MESSAGES, DistillationCollator, split_conversation
from ..images import refuse_images_of_text
from ..losses import cross_entropy
from .live import LiveTeacher
from .shards import ShardWriter, read_keys, read_shards, shard_files
from .workers import Worker


if TYPE_CHECKING:
    from .live import GenerativeModel

logger = logging.get_logger(__name__)

GENERATED = "generated"  # how the names of shards with answers begin
KEEP = ("likeliest", "closest", "all")
_MOST_ANSWERS = 1000  # of a row; they are written side by side, in memory
_TEXT = datasets.Value("string")
_CONVERSATION = [{"role": _TEXT, "content": _TEXT}]


@dataclass(frozen=True)
class TargetGeneration:
    """How a teacher writes targets.

    Args:
        max_new_tokens: most tokens of an answer, EOS among them; one that is not finished by then is dropped.
        num_beams: of beam search; 1 is greedy.
        sampling_temperature: above 0 the answers are sampled, at this temperature, in place of greedy or beam search.
        num_return_sequences: answers for each row; without sampling at most `num_beams`.
        keep: of the answers that are finished, not empty and differ: the one that is `likeliest` to the teacher itself
            (mean log-probability of its tokens), the one `closest` to the reference (ROUGE-L, and chrF among those
            that are alike to it, as texts in scripts other than Latin are), or `all`.
        seed: of the sampling.

    Raises:
        ValueError: a value out of range, or values that do not go together.
    """

    max_new_tokens: int = 128
    num_beams: int = 1
    sampling_temperature: float = 0.0
    num_return_sequences: int = 1
    keep: str = "likeliest"
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} is out of range; it has to be at least 1.")
        for name in ("num_beams", "num_return_sequences"):
            if not 1 <= getattr(self, name) <= _MOST_ANSWERS:
                raise ValueError(f"{name}={getattr(self, name)} is out of range; give 1 to {_MOST_ANSWERS}.")
        if not 0 <= self.sampling_temperature < float("inf"):
            raise ValueError(
                f"sampling_temperature={self.sampling_temperature} is out of range; it has to be a finite number, at "
                "least 0."
            )
        if self.keep not in KEEP:
            raise ValueError(f"keep={self.keep!r} is unknown; choose one of {', '.join(KEEP)}.")
        if self.sampling_temperature > 0 and self.num_beams > 1:
            raise ValueError(
                f"num_beams={self.num_beams} with sampling_temperature={self.sampling_temperature}: answers come from "
                "beam search or are sampled; set one of the two."
            )
        if self.sampling_temperature == 0 and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} with num_beams={self.num_beams}: give as many "
                "beams, or a sampling_temperature above 0."
            )


def check_room(teacher: LiveTeacher, generation: TargetGeneration, prompt_tokens: int = 1) -> None:
    """Raises ValueError where a prompt and an answer of `max_new_tokens` do not fit the teacher's positions."""
    limit = max_positions(teacher.model.config)
    if limit is not None and prompt_tokens + generation.max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and an answer of up to max_new_tokens={generation.max_new_tokens} do "
            f"not fit the {limit} positions of the teacher (max_position_embeddings): lower max_new_tokens (on the "
            "command line --max-target-length), or cut prompts with max_source_length."
        )


def generate_targets(
    teacher: LiveTeacher,
    rows: "datasets.Dataset | list[dict]",
    folder: Path,
    collator: DistillationCollator,
    generation: TargetGeneration,
    *,
    worker: Worker,
    split: str,
    batch_size: int,
    rows_per_shard: int,
    progress: bool,
) -> datasets.Dataset:
    """Lets the teacher answer the worker's share of the rows; returns the answers to these that are in the folder.

    What is sampled for a row is seeded by the row alone: the same in whatever order, in whatever batches and on
    however many processes, up to the rounding of the logits.

    Args:
        teacher: on the device where it is to run; its generation config is honoured but for what `generation` says.
        rows: text rows, with `source` (and `target`) or `messages`.
        folder: of a cache.
        collator: with the teacher's ids on both sides, and the template and length limits of the training.
        generation: how answers are written and which are kept.
        worker: which of those that fill the folder this is.
        split: name of the data set's part that these rows are.
        batch_size: rows that the teacher answers at once.
        rows_per_shard: rows in a file; at most so many are lost in an interruption.
        progress: show a bar.

    Raises:
        ValueError: rows are not text, or their messages have other fields than role and content; `closest` and no
            reference; a prompt and an answer of `max_new_tokens` are longer than the teacher has positions for; no
            answer at all was worth keeping, of a job that is alone.
    """

    def request_of(row: Mapping[str, Any]) -> Request:
        columns = (collator.source_column, collator.target_column)
        source, reference, is_conversation = source_and_reference(row, *columns, generation)
        ready = collator.encode({collator.source_column: source, collator.target_column: ""})
        prompt = ready["teacher_input_ids"][: ready["teacher_labels_start"]]
        check_room(teacher, generation, len(prompt))
        read = torch.tensor(prompt, dtype=torch.int32).numpy().tobytes()
        return Request(request_key(read, reference), prompt, source, reference, is_conversation, *columns)

    asked = collect_answers(
        rows,
        folder,
        generation,
        request_of,
        lambda requests, counts: _answer(teacher, requests, collator, generation, batch_size, counts),
        worker=worker,
        split=split,
        rows_per_shard=rows_per_shard,
        progress=progress,
    )
    if not shard_files(folder, f"{GENERATED}-{split}"):
        return datasets.Dataset.from_dict({})
    answers = read_shards(folder, f"{GENERATED}-{split}")
    return answers.select([number for number, key in enumerate(answers["key"]) if key in asked])


def collect_answers(
    rows: "datasets.Dataset | list[dict]",
    folder: Path,
    generation: TargetGeneration,
    request_of: "Callable[[Mapping[str, Any]], Request]",
    answer: "Callable[[Iterator[Request], Counter[str]], Iterable[tuple[Request, list[dict], str]]]",
    *,
    worker: Worker,
    split: str,
    rows_per_shard: int,
    seconds_per_shard: float = math.inf,
    progress: bool,
) -> set[bytes]:
    """Writes what `answer` gives for those rows of the worker's share that have no answer yet.

    What was answered when an error or Ctrl-C comes is written.

    Args:
        request_of: what is asked for a row.
        answer: each request that it is given, with the rows that are kept for it, and why the last answer was dropped
            if none is; it counts answers that are `written`, `kept`, and dropped, by their reasons.
        seconds_per_shard: after which a shard is written that has fewer rows.

    Returns:
        The keys of all rows of the share.

    Raises:
        ValueError: no answer at all was worth keeping, and no other job has rows of the split.
    """
    state = PartialState()
    kept_prefix, refused_prefix = f"{GENERATED}-{split}", f"refused-{split}"
    known = read_keys(folder, kept_prefix) | read_keys(folder, refused_prefix)
    share, sizes = worker.share(len(rows)), (rows_per_shard, seconds_per_shard)
    refused = datasets.Features({"key": datasets.Value("binary"), "reason": _TEXT})
    writer = ShardWriter(folder, kept_prefix, worker.name, _features(request_of(rows[0])), *sizes)
    refusals = ShardWriter(folder, refused_prefix, worker.name, refused, *sizes)
    asked: set[bytes] = set()
    counts: Counter[str] = Counter()

    def new_requests() -> Iterator[Request]:
        for number in share:
            request = request_of(rows[number])
            asked.add(request.key)
            if request.key not in known:
                known.add(request.key)
                yield request
            bar.update()

    description = f"generate {split}"
    try:
        with tqdm(
            total=len(share), unit=" rows", desc=description, disable=not (progress and state.is_main_process)
        ) as bar:
            for request, kept, reason in answer(new_requests(), counts):
                if kept:
                    writer.add(*kept)
                else:
                    refusals.add({"key": request.key, "reason": reason})
    finally:
        writer.flush()
        refusals.flush()
    state.wait_for_everyone()
    counts = sum((Counter(part) for part in gather_object([dict(counts)])), Counter())
    if state.is_main_process and counts["written"]:
        dropped = ", ".join(f"{counts[reason]} {reason}" for reason in ("unfinished", "empty", "duplicate"))
        logger.warning(f"{split}: {counts['kept']} of {counts['written']} answers kept; dropped: {dropped}.")
    # One of many jobs may have no row of a small split, or none that is answered.
    if worker.num_shards == 1 and not shard_files(folder, kept_prefix):
        raise ValueError(
            f"none of the teacher's answers to the rows of {split} is worth keeping ({dict(counts)}): raise "
            f"max_new_tokens={generation.max_new_tokens} (on the command line --max-target-length) where they are "
            "unfinished, and see that prompt_template is the one that the teacher knows."
        )
    return asked


@dataclass(frozen=True)
class Request:
    """One row: what the teacher reads, what is kept of the row, and its key, which also seeds what is sampled."""

    key: bytes
    prompt: Any  # ids; for a server a text, or messages
    source: "str | list[dict]"
    reference: str | None
    is_conversation: bool
    source_column: str
    target_column: str

    def row_with(self, answer: str) -> dict[str, Any]:
        if self.is_conversation:
            return {MESSAGES: [*self.source, {"role": "assistant", "content": answer}]}
        return {self.source_column: self.source, self.target_column: answer}


def source_and_reference(
    row: Mapping[str, Any], source_column: str, target_column: str, generation: TargetGeneration
) -> "tuple[str | list[dict], str | None, bool]":
    """The source of a text row, its target if it has one, and whether it is a conversation in one column."""
    refuse_images_of_text(row)
    is_conversation = row.get(MESSAGES) is not None
    source: str | list[dict] | None
    if is_conversation:
        source, reference = split_conversation(row[MESSAGES])
    else:
        source, reference = row.get(source_column), row.get(target_column)
    if source is None or "input_ids" in row:
        raise ValueError(
            f"a row has the columns {sorted(row)}: a teacher writes texts, so give {source_column!r} or {MESSAGES!r}, "
            "and no 'input_ids'."
        )
    fields = {name for one in source for name in one if one[name] is not None} if isinstance(source, list) else set()
    if fields - {"role", "content"}:
        raise ValueError(
            f"chat messages with {min(fields - {'role', 'content'})!r}: of messages that a teacher answers role and "
            "content are kept, so the answers would be to others. Put it into the content, or take it out."
        )
    if generation.keep == "closest" and reference is None:
        raise ValueError("keep='closest' compares with a reference, and a row has none: keep 'likeliest' or 'all'.")
    return source, reference, is_conversation


def request_key(read: bytes, reference: str | None) -> bytes:
    """The key of a row, from what the teacher reads and the target that is there."""
    digest = hashlib.blake2b(read, digest_size=16)
    digest.update(b"" if reference is None else b"\0" + reference.encode(errors="surrogatepass"))
    return digest.digest()


def _features(request: Request) -> datasets.Features:
    if request.is_conversation:
        texts = {MESSAGES: _CONVERSATION}
    else:
        is_text = isinstance(request.source, str)
        texts = {request.source_column: _TEXT if is_text else _CONVERSATION, request.target_column: _TEXT}
    return datasets.Features(
        {"key": datasets.Value("binary"), **texts, "reference": _TEXT, "mean_log_prob": datasets.Value("float32")}
    )


@dataclass(frozen=True)
class Answer:
    """What a teacher wrote; nats per token, where it says how likely that was."""

    text: str
    is_finished: bool
    mean_log_prob: float | None = None


def rows_of(request: Request, answers: Iterable[Answer], counts: Counter) -> tuple[list[dict], str]:
    """A row for each answer that is finished, not empty and not there already; why the last one is none."""
    rows: dict[str, dict] = {}
    reason = ""
    for answer in answers:
        counts["written"] += 1
        if not answer.is_finished:
            reason = "unfinished"
        elif not answer.text.strip():
            reason = "empty"
        elif answer.text in rows:
            reason = "duplicate"
        else:
            fixed = {"key": request.key, "reference": request.reference, "mean_log_prob": answer.mean_log_prob}
            rows[answer.text] = {**request.row_with(answer.text), **fixed, "text": answer.text}
            continue
        counts[reason] += 1
    return list(rows.values()), reason


def keep(rows: list[dict], generation: TargetGeneration, counts: Counter) -> list[dict]:
    """Those of the answers to one row that are kept."""
    if len(rows) > 1 and generation.keep != "all":
        worth = _closeness if generation.keep == "closest" else itemgetter("mean_log_prob")
        rows = [max(rows, key=worth)]
    counts["kept"] += len(rows)
    return rows


def _closeness(row: dict) -> tuple[float, float]:
    # `evaluate` brings SciPy along, a good part of what importing the trainer takes.
    from ...metrics.texts import chrf, rouge_l

    text, reference = row["text"], row["reference"]
    # ROUGE knows words of Latin letters alone: all texts in another script are alike to it.
    return rouge_l(text, reference), chrf([text], [reference])["chrf"]


def _answer(
    teacher: LiveTeacher,
    requests: Iterator[Request],
    collator: DistillationCollator,
    generation: TargetGeneration,
    batch_size: int,
    counts: Counter,
) -> Iterator[tuple[Request, list[dict], str]]:
    """See `collect_answers`; `batch_size` rows at a time."""
    tokenizer = collator.teacher_tokenizer
    ends = end_tokens(teacher.model, tokenizer)

    def read(tokens: list[int]) -> Answer:
        length = next((place for place, token in enumerate(tokens) if token in ends), None)
        text = tokenizer.decode(tokens[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text, length is not None)

    while batch := list(itertools.islice(requests, batch_size)):
        written = map(read, _write(teacher, batch, generation, ends, tokenizer).tolist())
        of_each = [rows_of(one, itertools.islice(written, generation.num_return_sequences), counts) for one in batch]
        if generation.num_return_sequences > 1 and generation.keep != "closest":
            of_all = [row for rows, _ in of_each for row in rows]
            for first in range(0, len(of_all), len(batch)):
                some = of_all[first : first + len(batch)]
                for row, value in zip(some, _mean_log_probs(teacher, some, collator), strict=True):
                    row["mean_log_prob"] = value
        for request, (rows, reason) in zip(batch, of_each, strict=True):
            yield request, keep(rows, generation, counts), reason


def end_tokens(model: "GenerativeModel", tokenizer) -> list[int]:
    """What ends an answer: the tokenizer's EOS, where there is a tokenizer, and the model's own, of which chat models
    have several."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [getattr(tokenizer, "eos_token_id", None), *(own if isinstance(own, list) else [own])]
    return [token for token in dict.fromkeys(ends) if token is not None]


def _write(
    teacher: LiveTeacher, requests: Sequence[Request], generation: TargetGeneration, ends: list[int], tokenizer
) -> Tensor:
    """`[requests * num_return_sequences, T]`, what the teacher wrote."""
    prompts, count = [request.prompt for request in requests], generation.num_return_sequences
    options: dict[str, Any] = {"num_beams": generation.num_beams, "num_return_sequences": count}
    if generation.sampling_temperature > 0:
        prompts = [prompt for prompt in prompts for _ in range(count)]
        numbers = torch.cat(
            [_numbers(request.key, generation.seed, count, generation.max_new_tokens) for request in requests]
        )
        options = {"logits_processor": LogitsProcessorList([_Draw(numbers, generation.sampling_temperature)])}
    return generate_tokens(
        teacher.model,
        prompts,
        tokenizer.pad_token_id,
        max_new_tokens=generation.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=ends,
        **options,
    )


def _numbers(key: bytes, seed: int, count: int, length: int) -> Tensor:
    """`[count, length]` in [0, 1), from nothing but the row and the seed."""
    digest = hashlib.blake2b(key + str(seed).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.rand(count, length, generator=generator, dtype=torch.float64)


class _Draw(LogitsProcessor):
    """Makes greedy decoding sample: token t of row b is where the cumulative probability passes `numbers[b, t]`.

    `generate` draws all rows of a batch from one stream, so what a row got would depend on its neighbours.
    """

    def __init__(self, numbers: Tensor, temperature: float):
        self.numbers, self.temperature = numbers, temperature
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = torch.softmax(scores.double() / self.temperature, dim=-1).cumsum(dim=-1)
        number = self.numbers[:, self._step, None].to(scores.device) * cumulative[:, -1:]
        self._step += 1
        # The first that is above, so that a token without probability is never met.
        token = torch.searchsorted(cumulative, number, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


def generate_tokens(
    model: "GenerativeModel", prompts: Sequence[Sequence[int]], pad_token_id: int | None, **options: Any
) -> Tensor:
    """What a decoder-only model or an encoder-decoder writes after each prompt, `[B, T]`, padded on the right.

    Args:
        prompts: ragged ids; what an encoder reads where there is one.
        pad_token_id: the tokenizer's; where it has none, rows are padded with the end of sequence in `options`.
        options: of `generate`; with `num_return_sequences`, B is that many for each prompt.
    """
    if pad_token_id is None:
        ends = options["eos_token_id"]
        pad_token_id = ends if isinstance(ends, int) else ends[0]
    encdec = model.config.is_encoder_decoder
    rows, side = [torch.tensor(prompt) for prompt in prompts], "right" if encdec else "left"
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id, padding_side=side)
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]  # Module.__getattr__
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pad_token_id=pad_token_id,
            return_dict_in_generate=False,
            **options,
        )
    # What comes back begins with the prompt, or with the token that the decoder started from.
    return tokens[:, 1 if encdec else ids.shape[1] :]


def _mean_log_probs(teacher: LiveTeacher, rows: list[dict], collator: DistillationCollator) -> list[float]:
    """The teacher's mean log-probability of each row's target tokens, EOS among them, in nats."""
    batch = collator(rows)
    numbers, columns = target_positions(batch["labels"])
    columns = teacher_columns(batch["teacher_labels_start"], numbers, columns)
    ids, mask = (batch[f"teacher_{name}"].to(teacher.device) for name in ("input_ids", "attention_mask"))
    logits = teacher.logits_at(ids, mask, numbers, columns)(slice(None)).cpu()
    losses = cross_entropy(logits, batch["labels"][batch["labels"] != IGNORED])
    sums = losses.new_zeros(len(rows)).index_add_(0, numbers, losses)
    return (-sums / torch.bincount(numbers, minlength=len(rows))).tolist()
