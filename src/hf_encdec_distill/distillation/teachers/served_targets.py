"""Targets that a teacher on a server writes, through OpenAI's API as most servers and providers speak it.

`/v1/chat/completions` puts a source into the teacher's chat template on the server's side; with a `prompt_template`,
`/v1/completions` is given the prompt as text. Both are asked for the log-probabilities of the answer's own tokens.
Neither gives those of other tokens, so the cache has no record of distributions, and no tokenizer is needed here.

Fields as in OpenAI's reference of 2026-10; vLLM 0.33 (`vllm/entrypoints/openai/`) and llama-cpp-python 0.3.36
(`llama_cpp/server/types.py`) take them too.
"""

import dataclasses
import importlib.metadata
import json
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from accelerate import PartialState
from accelerate.utils import gather_object

from ...models.prompts import PLACEHOLDER, check_template
from .cache_hub import write_card
from .capture import ROWS_PER_SHARD, check_shard, splits_with_rows
from .recorded import FORMAT, TARGETS, read_manifest
from .served import client_of, without_place
from .shards import remove_left_behind
from .targets import (
    Answer,
    Request,
    TargetGeneration,
    collect_answers,
    keep,
    request_key,
    rows_of,
    source_and_reference,
)
from .workers import Worker, join_folder


if TYPE_CHECKING:
    from .http_client import HttpClient

_SECONDS_PER_SHARD = 60.0  # of answers that may have been paid for
_PATIENCE_AT_START = 30.0  # seconds; a wrong address or option should not take a quarter of an hour


def write_targets(
    url: str,
    dataset: "datasets.Dataset | datasets.DatasetDict | list[dict]",
    folder: str | os.PathLike,
    generation: TargetGeneration,
    *,
    model: str | None = None,
    prompt_template: str | None = None,
    source_column: str = "source",
    target_column: str = "target",
    num_shards: int = 1,
    index: int = 0,
    requests: int = 32,
    timeout: float = 300.0,
    patience: float = 900.0,
    progress: bool = True,
) -> int:
    """Let a server answer all rows of `dataset` that it has not answered yet; returns how many answers were added.

    The folder is then a data set to train on (`load_dataset`, or `--dataset`) with `distill_weight=0`, and as
    `teacher=` a `CachedTeacher` that has no distributions. Called again after an interruption it goes on where it
    stopped: at most the answers of the last minute are asked for once more.

    Args:
        url: of the server; an API key comes from the environment variable HF_ENCDEC_TEACHER_API_KEY.
        dataset: text rows; the splits of a `DatasetDict` are all answered.
        folder: new, or one to go on with.
        generation: as for a local teacher. A server samples with its own defaults of what is not said here, such as
            `top_p`, and whether it honours the seed is its own affair. It gives no beams.
        model: its name on a server of several.
        prompt_template: text with `{source}` in it; without one, the server's chat template.
        source_column, target_column: of the rows.
        num_shards, index: see `capture`.
        requests: most requests in flight.
        timeout: seconds to wait for one answer.
        patience: seconds in which a request that fails is tried again.
        progress: show a bar.

    Raises:
        ValueError: what the server or these rows cannot give; a folder with the answers of another model, or to other
            `generation`.
        OSError: the server does not answer.
        ImportError: httpx or tenacity is missing.
    """
    if generation.num_beams > 1:
        raise ValueError(
            f"num_beams={generation.num_beams}: a server gives no beams. Leave it out, or sample several answers "
            "(sampling_temperature, num_return_sequences)."
        )
    if prompt_template is not None:
        check_template(prompt_template)
    folder, splits = Path(folder), splits_with_rows(dataset)
    check_shard(num_shards, index, sum(map(len, splits.values())))

    def request_of(row: Mapping[str, Any]) -> Request:
        columns = (source_column, target_column)
        source, reference, is_conversation = source_and_reference(row, *columns, generation)
        if prompt_template is None:
            messages = [{"role": "user", "content": source}] if isinstance(source, str) else source
            # Tables have all fields in all messages.
            prompt: Any = [{name: value for name, value in one.items() if value is not None} for one in messages]
        elif isinstance(source, str):
            prompt = prompt_template.replace(PLACEHOLDER, source)
        else:
            raise ValueError("chat messages with a prompt_template: leave it out, a server has its own chat template.")
        read = json.dumps(prompt, sort_keys=True).encode()
        return Request(request_key(read, reference), prompt, source, reference, is_conversation, *columns)

    first = request_of(next(iter(splits.values()))[0])
    client = client_of(url, requests, timeout, patience)
    writer = _Writer(client, model or _only_model(client), generation, is_chat=prompt_template is None)
    writer.find_out(first)
    state = PartialState(cpu=True)
    worker = Worker(index, num_shards, state.process_index, state.num_processes)
    manifest = writer.manifest(prompt_template)
    if state.is_main_process:
        join_folder(folder, manifest, worker.name)
    state.wait_for_everyone()
    remove_left_behind(folder, worker.name)
    kept: Counter[str] = Counter()
    for name, rows in splits.items():
        collect_answers(
            rows,
            folder,
            generation,
            request_of,
            lambda requests, counts: writer.answer(requests, counts, kept),
            worker=worker,
            split=name,
            rows_per_shard=ROWS_PER_SHARD,
            seconds_per_shard=_SECONDS_PER_SHARD,
            progress=progress,
        )
    if state.is_main_process:
        write_card(folder, read_manifest(folder), worker.name)
    return sum(gather_object([kept["kept"]]))


def _only_model(client: "HttpClient") -> str:
    names = client.ask(
        "/v1/models", read=lambda answer: [card["id"] for card in answer["data"]], patience=_PATIENCE_AT_START
    ).result()
    if len(names) != 1:
        raise ValueError(
            f"the server {client.url} has {len(names)} models, {', '.join(names[:8])}...: name one of them."
        )
    return names[0]


class _Writer:
    """Asks a server for answers, many at once, with the fields that it turned out to take.

    Args:
        client: of the server.
        model: its name there.
        generation: how answers are written.
        is_chat: messages for the server's chat template, else text.
    """

    def __init__(self, client: "HttpClient", model: str, generation: TargetGeneration, is_chat: bool):
        self._client, self._model, self._generation, self._is_chat = client, model, generation, is_chat
        self._path = "/v1/chat/completions" if is_chat else "/v1/completions"
        self._length = "max_tokens"
        # Fields that not every server takes, with their values; `n` answers in a request.
        self._optional: dict[str, Any] = {"logprobs": True if is_chat else 1}
        if generation.sampling_temperature > 0:
            self._optional["seed"] = generation.seed
        self._n = generation.num_return_sequences
        self._answering: str | None = None  # the model that the server says it is

    def manifest(self, prompt_template: str | None) -> dict[str, Any]:
        """Of a cache of its answers; nothing is known of the teacher but its name."""
        unknown = ("k", "rounds", "proposal_power", "tokenizer", "teacher_config", "teacher_dtype", "teacher_adapter")
        return {
            "format": FORMAT,
            "kind": TARGETS,
            **dict.fromkeys((*unknown, "teacher_weights")),
            "temperature": 1.0,
            "vocab_size": 0,
            "prompt_template": prompt_template,
            "generation": {
                **dataclasses.asdict(self._generation),
                "model": without_place(self._answering or self._model),
                "api": self._path,
            },
            "teacher": without_place(self._model),
            "versions": {"datasets": importlib.metadata.version("datasets")},
        }

    def find_out(self, request: Request) -> None:
        """Which fields the server takes, and the name by which it answers; costs one token of an answer."""
        while True:
            try:
                answers = self._ask(request, 0, most=1, n=min(self._n, 2), patience=_PATIENCE_AT_START).result()
            except (ValueError, OSError) as error:  # some refuse a field with the status of a crash
                if not self._leave_out(str(error)):
                    raise
            else:
                break
        if len(answers) < min(self._n, 2):
            self._n = 1
        if answers[0].mean_log_prob is None and self._needs_log_probs:
            raise ValueError(
                f"the server {self._client.url} gives no log-probabilities of its answers, by which "
                "keep='likeliest' chooses: keep 'closest' or 'all'."
            )

    @property
    def _needs_log_probs(self) -> bool:
        return self._generation.num_return_sequences > 1 and self._generation.keep == "likeliest"

    def _leave_out(self, message: str) -> bool:
        """Whether there is a field that the server complained about and that need not be there."""
        if self._length == "max_tokens" and "max_completion_tokens" in message:  # OpenAI's newer models
            self._length = "max_completion_tokens"
            return True
        for name in self._optional:
            if name in message:
                del self._optional[name]
                return True
        if self._n > 1 and re.search(r"\bn\b", message):
            self._n = 1
            return True
        return False

    def answer(
        self, requests: Iterator[Request], counts: Counter, total: Counter
    ) -> Iterator[tuple[Request, list[dict], str]]:
        """See `collect_answers`; twice as many rows are asked for as are in flight, so that none waits for another."""
        waiting: deque[tuple[Request, Sequence[Future[list[Answer]]]]] = deque()

        def next_one() -> tuple[Request, list[dict], str]:
            request, parts = waiting[0]
            try:
                answers = [answer for part in parts for answer in part.result()]
            except ValueError as error:
                raise ValueError(f"{error} This was about the row with the source {_cut(request.source)}.") from None
            waiting.popleft()
            rows, reason = rows_of(request, answers, counts)
            kept = keep(rows, self._generation, counts)
            total["kept"] += len(kept)
            return request, kept, reason

        try:
            for request in requests:
                places = range(0, self._generation.num_return_sequences, self._n)
                waiting.append((request, [self._ask(request, place, self._n) for place in places]))
                if len(waiting) >= 2 * self._client.requests:
                    yield next_one()
            while waiting:
                yield next_one()
        finally:
            for _, parts in waiting:
                for part in parts:
                    part.cancel()

    def _ask(
        self, request: Request, place: int, n: int, most: int | None = None, patience: float | None = None
    ) -> "Future[list[Answer]]":
        """`n` answers to a request, from the one at `place` of all that are wanted on."""
        from .http_client import BadAnswer

        n = min(n, self._generation.num_return_sequences - place)
        body = {
            "model": self._model,
            "messages" if self._is_chat else "prompt": request.prompt,
            self._length: most or self._generation.max_new_tokens,
            "temperature": self._generation.sampling_temperature,
            **({"n": n} if n > 1 else {}),
            **self._optional,
        }
        if "seed" in body:
            body["seed"] = _seed(request.key, self._generation.seed, place)

        def read(answer: Any) -> list[Answer]:
            name = answer.get("model") or self._model
            if self._answering is None:
                self._answering = name
            if name != self._answering:
                raise ValueError(f"the server {self._client.url} answers as {name!r}, before as {self._answering!r}.")
            answers = [_read(choice) for choice in answer["choices"]]
            if not answers or (most is None and len(answers) != n):
                raise BadAnswer(f"the server {self._client.url} gave {len(answers)} answers, expected {n}.")
            if most is None and self._needs_log_probs and any(one.mean_log_prob is None for one in answers):
                raise BadAnswer(f"the server {self._client.url} gave an answer without log-probabilities.")
            return answers

        return self._client.ask(self._path, body, read, patience)


def _read(choice: Mapping[str, Any]) -> Answer:
    """One of the `choices`, of a chat or not; what a model thought before it answered is no part of it."""
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    given = choice.get("logprobs") or {}
    values = given.get("token_logprobs") or [token["logprob"] for token in given.get("content") or ()]
    values = [value for value in values if value is not None]
    return Answer(
        text or "",  # None where a tool is called instead, or a filter was at work
        choice["finish_reason"] == "stop",
        sum(values) / len(values) if values else None,
    )


def _seed(key: bytes, seed: int, place: int) -> int:
    """From nothing but the row, the place of the answer, and the seed; below 2**31, as most servers want it."""
    digest = request_key(key, f"{seed} {place}")
    return int.from_bytes(digest[:4], "big") >> 1


def _cut(source: Any) -> str:
    text = repr(source)
    return text if len(text) <= 80 else f"{text[:80]}..."
