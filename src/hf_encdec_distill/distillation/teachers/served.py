"""A teacher on a server, which gives the log-probabilities of given tokens: vLLM, SGLang or llama.cpp (`wire`).

Of each position it gives the k likeliest tokens; the mass of all others is 1 minus their sum. That is what a cache of
kind `top_k` holds, so training on either is the same. It gives no whole distributions and no hidden states.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ...models.loading import load_tokenizer
from ..alignment.vocabularies import SharedVocabulary, check_teacher_ids
from ..checks.limits import check_length
from .fingerprints import row_keys
from .recorded_losses import TopKScores
from .signal import TeacherSignal


if TYPE_CHECKING:
    from .http_client import HttpClient
    from .wire import Wire

# vLLM gives no more unless it is told to, with --max-logprobs.
DEFAULT_K = 20
# Nats, on average over the log-probabilities of the likeliest tokens of the probes. SmolLM2-135M in bfloat16: 0.01 on
# one server, 0.04 between engines and from float32. Its weights in 6 bits: 0.11, in 4 bits: 0.76, before tuning: 0.73.
TOLERANCE = 0.1
_PROBES = (
    "The committee met on 3 March 1987 in Zürich, and nobody knew why. It was",
    "def area(radius):\n    return 3.14159 * radius ** 2  # in m²\n\n\nprint(",
    "  Two  spaces, a\ttab, 東京, naïve, 🙂 and so on; then",
)
_PATIENCE_AT_START = 60.0  # seconds; a wrong address should not take a quarter of an hour
_IDS_AT_ONCE = 4096
_MOST_WAITING = 8192  # rows that were asked about and not looked at


def is_served(teacher: Any) -> TypeGuard[str]:
    """Whether this is the address of a server."""
    return isinstance(teacher, str) and teacher.startswith(("http://", "https://"))


class ServedTeacher(TeacherSignal):
    """A `TeacherSignal` that asks a server, many rows at once.

    At the start it finds out which software and model the server runs and how long a row may be, asks for k
    log-probabilities, and proves that the server's tokenizer is `tokenizer`: texts have to be cut into the same ids,
    and every id of the vocabulary has to stand for the same text (white space aside).

    Rows that were announced with `ask` are under way while the caller does something else; `scores` waits for them.

    Args:
        url: of the server, such as `http://localhost:8000`. An API key comes from the environment variable
            HF_ENCDEC_TEACHER_API_KEY, never from here.
        tokenizer: of the teacher, on this side; by default the one found under the model's name on the server.
        k: likeliest tokens at each position.
        vocab_size: of the teacher's config, which may have more ids than its tokenizer; by default the tokenizer's.
        model: its name on a server of several.
        requests: most requests in flight.
        timeout: seconds to wait for one answer.
        patience: seconds in which a request that fails is tried again.

    Raises:
        ValueError: the server is of a kind that gives no log-probabilities of given tokens, has another tokenizer, or
            does not give k of them; a wrong API key or model.
        OSError: nothing answers there.
        ImportError: httpx or tenacity is missing.
    """

    input_names: tuple[str, ...] = ()
    device = torch.device("cpu")  # where its scores are made; they go where its inputs are
    rows_per_comparison = 256  # of its probes with what it predicted at first, which `confirm` makes

    def __init__(
        self,
        url: str,
        tokenizer=None,
        *,
        k: int = DEFAULT_K,
        vocab_size: int | None = None,
        model: str | None = None,
        requests: int = 32,
        timeout: float = 300.0,
        patience: float = 900.0,
    ):
        if k < 1 or requests < 1:
            raise ValueError(f"k={k}, requests={requests}: both have to be at least 1.")
        self.requests = requests
        self._client = client_of(url, requests, timeout, patience)
        self._asked: dict[bytes, Future[tuple[np.ndarray, np.ndarray]]] = {}
        self._wire, card = self._find_out(model)
        self.model = card["id"]
        self.tokenizer = self._tokenizer_of_model() if tokenizer is None else tokenizer
        ids = sorted(set(self.tokenizer.get_vocab().values()))
        self.vocab_size = ids[-1] + 1 if vocab_size is None else vocab_size
        self.k = min(k, self.vocab_size)
        about: dict[str, Any] = self._client.ask(self._wire.about, patience=_PATIENCE_AT_START).result()
        self.software = f"{self._wire.software} {self._wire.version(about)}"
        self.max_positions = self._wire.max_length(card, about)
        self._prove_tokenizer(self.tokenizer, ids)
        probes = [self.tokenizer.encode(text, add_special_tokens=False) for text in _PROBES]
        self._probes = [probe[: self.max_positions] for probe in probes]
        self._expected = _probe_text(self._probe(first=True))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._client.url!r}, {self.software}, model={self.model!r}, k={self.k})"

    # --- what the server is ---

    def _find_out(self, model: str | None) -> "tuple[Wire, dict[str, Any]]":
        """The kind of server, and the entry of the model in its list."""
        from .wire import WIRES

        url = self._client.url
        cards = self._client.ask("/v1/models", read=lambda found: list(found["data"]), patience=_PATIENCE_AT_START)
        found = {card["id"]: card for card in cards.result()}
        names = [name for name, card in found.items() if not card.get("parent")]  # others are adapters
        if model is None and len(names) != 1:
            raise ValueError(f"the server {url} has the models {names}: give the name of one as model.")
        model = names[0] if model is None else model
        if model not in found:
            raise ValueError(f"the server {url} has no model {model!r}, only {', '.join(found)}.")
        owner = str(found[model].get("owned_by"))
        if owner not in WIRES:
            raise ValueError(
                f"the server {url} says that it is of {owner!r}; log-probabilities of given tokens, by ids, are had "
                f"of {', '.join(WIRES)}. llama-cpp-python names tokens by their texts, and transformers serve and "
                "most hosted models give none: let such a teacher write the targets (cache --generate --server)."
            )
        return WIRES[owner], found[model]

    def _tokenizer_of_model(self) -> Any:
        try:
            return load_tokenizer(self.model)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no tokenizer under the name that the server {self._client.url} has for its model, {self.model!r} "
                f"({error}): give the teacher's as tokenizer (of a trainer: teacher_processing_class)."
            ) from error

    def _prove_tokenizer(self, tokenizer, ids: Sequence[int]) -> None:
        """Raises ValueError where the server's tokenizer is another; one shifted token would spoil every row."""
        wire, ask, url = self._wire, self._client.ask, self._client.url
        texts = [*_PROBES, "".join(tokenizer.all_special_tokens)]
        cut = [ask(*wire.tokenize(self.model, text), lambda answer: list(answer["tokens"])) for text in texts]
        parts = [list(ids[first : first + _IDS_AT_ONCE]) for first in range(0, len(ids), _IDS_AT_ONCE)]
        read = [ask(*wire.detokenize(self.model, part), wire.text) for part in parts]
        for text, cut_there in zip(texts, cut):
            theirs, here = self._of_tokenizer(cut_there), tokenizer.encode(text, add_special_tokens=False)
            if theirs != here:
                raise ValueError(
                    f"the tokenizer of the server {url} makes {theirs[:12]} of {text!r}, the one here {here[:12]}: "
                    f"give the tokenizer of the model that it serves, {self.model!r}."
                )
        for part, read_there in zip(parts, read):
            text = tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if _bare(self._of_tokenizer(read_there)) != _bare(text):
                raise ValueError(
                    f"the tokens {part[0]} to {part[-1]} of the server {url} stand for other texts than those of the "
                    f"tokenizer here: give the tokenizer of the model that it serves, {self.model!r}."
                )

    def _of_tokenizer(self, future: Future) -> Any:
        from .http_client import Refused

        try:
            return future.result()
        except Refused as error:
            raise ValueError(
                f"{error}. Its tokenizer has to be compared with the one here: let /tokenize and /detokenize through, "
                "as to /v1, and give the tokenizer of the model that it serves."
            ) from None

    def _probe(self, first: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and log-probabilities at each position of the probes, likeliest first, `[T, k]` each."""
        from .http_client import Refused

        try:
            under_way = [self._send(probe, range(len(probe) - 1)) for probe in self._probes]
            return [future.result() for future in under_way]
        except Refused as error:
            if first:
                mend = self._wire.allows_more.format(k=self.k)
                raise ValueError(f"{error}. If that is about {self.k} log-probabilities: {mend}.") from None
            raise

    def expect(self, described: Mapping[str, Any]) -> None:
        """From here on the server has to be the one that `describe` described; raises ValueError where it is not."""
        if described["model"] != self.describe()["model"]:
            raise ValueError(
                f"the cache is of the model {described['model']!r}, and the server {self._client.url} has "
                f"{self.model!r}: capture into another folder."
            )
        self._expected = described["probe"]
        self._forget()
        self.confirm()

    def confirm(self) -> None:
        """Raises ValueError where the server's predictions are no longer those of the start: another model."""
        expected = [pair.split(":") for pair in self._expected.split()]
        now = [position for answer in self._probe() for position in zip(*answer)]
        apart = math.inf
        if len(expected) == len(now):
            each = [_apart(int(token), float(value), *there) for (token, value), there in zip(expected, now)]
            apart = float(np.mean(each))
        if not apart <= TOLERANCE:
            self._forget()
            raise ValueError(
                f"the server {self._client.url} does not predict what it did: log-probabilities of the probe differ "
                f"by {apart:.3f} nats on average, more than {TOLERANCE}. It serves another model, other weights or "
                f"another quantization under the name {self.model!r}, perhaps for the last {self.rows_per_comparison} "
                "rows. A capture has kept none of those; resume a training from a checkpoint before them."
            )

    def _forget(self) -> None:
        """Rows that are under way are asked about another time: who knows which model answers."""
        for future in self._asked.values():
            future.cancel()
        self._asked.clear()

    def describe(self) -> dict[str, Any]:
        """What a manifest says of the server: no address, and no path on that machine."""
        return {
            "software": self.software,
            "model": without_place(self.model),
            "probe": self._expected,
        }

    # --- what it predicts ---

    def to(self, device: torch.device) -> "ServedTeacher":
        return self

    def check(
        self, prompt_template: str | None, divergence: str, temperature: float, prompt_date: str | None = None
    ) -> None:
        """Raises ValueError where training asks for what no top k can tell."""
        if divergence == "universal_logit_distance":
            raise ValueError(
                "vocab_policy='universal' compares all probabilities of a position, and a server gives the likeliest "
                f"{self.k}: use 'mask_padding' or 'id_map', or a teacher that is here."
            )
        if temperature != 1:
            raise ValueError(
                f"distill_temperature={temperature} with a teacher on a server: the mass of what is not among its "
                f"likeliest {self.k} tokens is known at temperature 1 only. Train at 1, or with a teacher that is "
                "here."
            )

    def ask(self, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, columns: Tensor) -> list[bytes]:
        """Sends the rows of a batch off, unless they are under way; the key of each that is asked about.

        Args:
            input_ids, attention_mask: `[B, L]`; padding may be on either side.
            rows, columns: `[N]` each, the positions whose next-token log-probabilities are wanted, in order.

        Raises:
            ValueError: a row has more tokens than the server reads, or a token that is not in the vocabulary.
        """
        check_length("teacher's server", self.max_positions, "prompt and target", attention_mask)
        keys = []
        for row, key in enumerate(row_keys(input_ids, attention_mask, rows, columns)):
            if key is None:
                continue
            keys.append(key)
            if key not in self._asked:
                is_read = attention_mask[row].bool()
                places = (is_read.cumsum(dim=0) - 1)[columns[rows == row]]
                ids = input_ids[row][is_read]
                check_teacher_ids(ids, self.vocab_size)  # one beyond ends an SGLang, again at each try
                self._asked[key] = self._send(ids.tolist(), places.tolist())
        while len(self._asked) > _MOST_WAITING:
            self._asked.pop(next(iter(self._asked))).cancel()
        return keys

    def scores(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        rows: Tensor,
        columns: Tensor,
        vocabulary: SharedVocabulary,
        chunked: bool = False,
        images: Mapping[str, Tensor] | None = None,
    ) -> TopKScores:
        """See `TeacherSignal`; raises ValueError for images, and what `HttpClient.ask` raises."""
        from .wire import log_tail

        if images:
            raise ValueError(f"the batch has {', '.join(images)}, and a teacher on a server is given tokens only.")
        keys = self.ask(input_ids, attention_mask, rows, columns)
        try:
            answers = [self._asked[key].result() for key in keys]
        finally:  # one that failed can be asked again
            for key in keys:
                self._asked.pop(key, None)
        nothing = np.empty((0, self.k))
        ids = np.concatenate([nothing, *(ids for ids, _ in answers)]).astype(np.int64)
        log_probs = np.concatenate([nothing, *(values for _, values in answers)]).astype(np.float32)
        tail = log_tail(log_probs, self.vocab_size)
        parts = [torch.from_numpy(part).to(input_ids.device) for part in (ids, log_probs, tail)]
        return TopKScores(parts[0], parts[1], parts[2], vocabulary)

    def _send(self, ids: list[int], columns: Sequence[int]) -> "Future[tuple[np.ndarray, np.ndarray]]":
        """`[T, k]` ids and log-probabilities at the T columns of a row, in the future."""
        from .http_client import BadAnswer
        from .wire import ModelChanged, top_k

        def read(answer: Any) -> tuple[np.ndarray, np.ndarray]:
            try:
                return top_k(self._wire.entries(answer, self.model, ids, columns), self.k, self.vocab_size)
            except (BadAnswer, ModelChanged) as error:
                raise type(error)(f"the server {self._client.url}, to the row {ids[:12]}...: {error}.") from None

        return self._client.ask(*self._wire.score(self.model, ids, columns, self.k), read)


def client_of(url: str, requests: int, timeout: float, patience: float) -> "HttpClient":
    """See `HttpClient`, whose packages only those need who ask a server; raises ImportError where they are missing."""
    try:
        from .http_client import HttpClient
    except ImportError as error:
        raise ImportError('a teacher on a server needs: pip install "hf-encdec-distill[served]"') from error
    return HttpClient(url, requests=requests, timeout=timeout, patience=patience)


def without_place(model: str) -> str:
    """Where a file lies on the server's machine is nobody's business on the Hub."""
    return PurePath(model).name if model.startswith("/") else model


def _probe_text(answers: list[tuple[np.ndarray, np.ndarray]]) -> str:
    """The likeliest token at each position and its log-probability, `id:log_prob` in a row."""
    return " ".join(
        f"{ids[0]}:{value:.4f}" for ids_Tk, values_Tk in answers for ids, value in zip(ids_Tk, values_Tk[:, 0])
    )


def is_same_model(described: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two of `ServedTeacher.describe` are of one model: by its name, and by what it predicts of the probes."""
    pairs, others = ([pair.split(":") for pair in one["probe"].split()] for one in (described, other))
    if described["model"] != other["model"] or len(pairs) != len(others):
        return False
    # Of two tokens that are nearly as likely, either may come first.
    apart = [
        max(abs(float(value) - float(there)), 0.5 if token != instead else 0.0)
        for (token, value), (instead, there) in zip(pairs, others)
    ]
    return bool(np.mean(apart) <= TOLERANCE)


def _bare(text: str) -> str:
    """Without white space, which versions clean up or not, and without what is no UTF-8, which they replace or not."""
    return "".join(text.split()).replace("\ufffd", "")


def _apart(token: int, value: float, ids: np.ndarray, log_probs: np.ndarray) -> float:
    """How far the log-probability of a token is from `value`, or at least is where it is not among the likeliest."""
    found = np.flatnonzero(ids == token)
    return abs(value - float(log_probs[found[0]])) if len(found) else max(value - float(log_probs[-1]), 1.0)
