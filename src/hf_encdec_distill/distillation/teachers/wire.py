"""How servers of language models are asked for the log-probabilities of given tokens, one class for each kind.

Read in vLLM 0.33.0 (`vllm/entrypoints/openai/completion/`, `vllm/v1/engine/logprobs.py`), SGLang 0.5.23
(`sglang/srt/managers/`, `sglang/srt/layers/logits_processor.py`) and llama.cpp (`tools/server/README.md` of October
2026); run were vLLM 0.32.0, SGLang 0.5.23 and llama.cpp (docs/measured.md). All three give log-softmax in float32 of
the model's logits as they are, before any temperature or penalty.

A column c of a row predicts its token c + 1; k tokens are wanted at each of T columns.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .http_client import BadAnswer


Question = tuple[str, dict[str, Any]]  # path and body of a POST
Entries = list[list[tuple[float | None, int]]]  # T times at least k pairs of log-probability and id, in any order


class Wire(Protocol):
    """What is particular to one kind of server."""

    software: str
    allows_more: str  # how its user gets a larger k
    about: str  # the path where it tells of itself

    def version(self, about: dict[str, Any]) -> str:
        """Of the server's software."""

    def max_length(self, card: dict[str, Any], about: dict[str, Any]) -> int | None:
        """Tokens of a prompt that leave room for the one token that is always generated.

        Args:
            card: the model's entry in `/v1/models`.
            about: what is at the path `about`.
        """

    def score(self, model: str, ids: list[int], columns: Sequence[int], k: int) -> Question:
        """Asks for the likeliest tokens at ascending `columns` of a row."""

    def entries(self, answer: Any, model: str, ids: list[int], columns: Sequence[int]) -> Entries:
        """What the answer says at each of the columns; raises BadAnswer where it is about something else."""

    def tokenize(self, model: str, text: str) -> Question:
        """Asks for the ids of a text, of which `tokens` of the answer is the list."""

    def detokenize(self, model: str, ids: list[int]) -> Question:
        """Asks for the text of ids."""

    def text(self, answer: Any) -> str:
        """The text in what comes back from `detokenize`."""


class ModelChanged(ValueError):
    """Another model answers than the one that was asked first."""


class _VLLMAndSGLang:
    """What the two answer alike."""

    def version(self, about: dict[str, Any]) -> str:
        return about["version"]

    def tokenize(self, model: str, text: str) -> Question:
        return "/tokenize", {"model": model, "prompt": text, "add_special_tokens": False}


class VLLM(_VLLMAndSGLang):
    """vLLM's `/v1/completions` with `prompt_logprobs`.

    Entry p of `prompt_logprobs` is an object, by the ids of tokens, of what is predicted for token p: the k likeliest
    and token p itself, so k or k + 1. The first entry is null. k is at most `--max-logprobs`, 20 by default, and
    prompts with `prompt_logprobs` do not read the prefix cache. `--logprobs-mode raw_logits` gives logits.
    """

    software = "vllm"
    allows_more = "start vLLM with --max-logprobs {k}, or ask for fewer with k (--k)"
    about = "/version"

    def max_length(self, card: dict[str, Any], about: dict[str, Any]) -> int | None:
        return None if card.get("max_model_len") is None else card["max_model_len"] - 1

    def score(self, model: str, ids: list[int], columns: Sequence[int], k: int) -> Question:
        options = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        return "/v1/completions", {"model": model, "prompt": _reaching(ids, columns), **options}

    def entries(self, answer: Any, model: str, ids: list[int], columns: Sequence[int]) -> Entries:
        if answer["model"] != model:
            raise ModelChanged(f"{answer['model']!r} answers in place of {model!r}")
        predicted = answer["choices"][0]["prompt_logprobs"]
        ids = _reaching(ids, columns)
        if len(predicted) != len(ids):
            raise BadAnswer(f"prompt_logprobs for {len(predicted)} tokens, expected {len(ids)}")
        for column in columns:
            if str(ids[column + 1]) not in predicted[column + 1]:
                raise BadAnswer(f"prompt_logprobs {column + 1} without the prompt's token {ids[column + 1]}")
        return [
            [(value["logprob"], int(token)) for token, value in predicted[column + 1].items()] for column in columns
        ]

    def detokenize(self, model: str, ids: list[int]) -> Question:
        return "/detokenize", {"model": model, "tokens": ids}

    def text(self, answer: Any) -> str:
        return answer["prompt"]


class SGLang(_VLLMAndSGLang):
    """SGLang's `/generate` with `return_logprob`.

    `input_top_logprobs` has an entry for each token from `logprob_start_len` on, triples of log-probability, id and
    text; the first is null. What lies before that is read from the prefix cache. k has no limit.
    """

    software = "sglang"
    allows_more = "ask for fewer with k (--k)"
    about = "/server_info"

    def max_length(self, card: dict[str, Any], about: dict[str, Any]) -> int | None:
        # Less than the model's length by a few tokens, and than what the server has memory for; as long is too long.
        return about["max_req_input_len"] - 1 if "max_req_input_len" in about else None

    def score(self, model: str, ids: list[int], columns: Sequence[int], k: int) -> Question:
        return "/generate", {
            "input_ids": _reaching(ids, columns),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": columns[0],
            "top_logprobs_num": k,
        }

    def entries(self, answer: Any, model: str, ids: list[int], columns: Sequence[int]) -> Entries:
        said = answer["meta_info"]
        read = _reaching(ids, columns)[columns[0] :]
        tokens = [token for _, token, _ in said["input_token_logprobs"]]
        predicted = said["input_top_logprobs"]
        # It puts 0 for the last id of the vocabulary.
        if len(tokens) != len(read) or any(ours != theirs for ours, theirs in zip(read, tokens) if theirs):
            raise BadAnswer(f"input_token_logprobs for tokens {tokens[:12]}..., expected {read[:12]}...")
        if len(predicted) != len(read):
            raise BadAnswer(f"input_top_logprobs for {len(predicted)} tokens, expected {len(read)}")
        wanted = (predicted[column + 1 - columns[0]] for column in columns)
        return [[(value, token) for value, token, _ in entry] for entry in wanted]

    def detokenize(self, model: str, ids: list[int]) -> Question:
        return "/detokenize", {"model": model, "tokens": ids, "skip_special_tokens": False}

    def text(self, answer: Any) -> str:
        return answer["text"]


class LlamaCpp:
    """llama.cpp's `/completion` with `n_probs`.

    It gives log-probabilities of generated tokens only, so each column is a prompt of its own that generates one
    token, all those of a row in one request. `cache_prompt` lets it evaluate only what is new, one token for most.
    """

    software = "llamacpp"
    allows_more = "ask for fewer with k (--k)"
    about = "/props"

    def version(self, about: dict[str, Any]) -> str:
        return about["build_info"]

    def max_length(self, card: dict[str, Any], about: dict[str, Any]) -> int | None:
        return about["default_generation_settings"]["n_ctx"] - 1

    def score(self, model: str, ids: list[int], columns: Sequence[int], k: int) -> Question:
        prompts = [ids[: column + 1] for column in columns]
        options = {"n_predict": 1, "n_probs": k, "cache_prompt": True}
        # It says nothing of a token that is a part of a character, so a letter is drawn; the log-probabilities are
        # those before any bias.
        return "/completion", {"prompt": prompts, **options, "logit_bias": [["a", 1000.0]]}

    def entries(self, answer: Any, model: str, ids: list[int], columns: Sequence[int]) -> Entries:
        answers = answer if isinstance(answer, list) else [answer]
        if len(answers) != len(columns):
            raise BadAnswer(f"{len(answers)} completions, expected {len(columns)}")
        if any(one["tokens_evaluated"] != column + 1 for one, column in zip(answers, columns)):
            raise BadAnswer("completions of other prompts than those that were sent")
        firsts = (one["completion_probabilities"][0]["top_logprobs"] for one in answers)
        return [[(entry["logprob"], entry["id"]) for entry in first] for first in firsts]

    def tokenize(self, model: str, text: str) -> Question:
        return "/tokenize", {"content": text, "add_special": False, "parse_special": True}

    def detokenize(self, model: str, ids: list[int]) -> Question:
        return "/detokenize", {"tokens": ids}

    def text(self, answer: Any) -> str:
        return answer["content"]


WIRES: dict[str, Wire] = {wire.software: wire for wire in (VLLM(), SGLang(), LlamaCpp())}


def _reaching(ids: list[int], columns: Sequence[int]) -> list[int]:
    """With one token more, whichever, where what comes after the last is asked too."""
    return [*ids, ids[0]] if columns[-1] == len(ids) - 1 else ids


def top_k(entries: Entries, k: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The k likeliest of each entry, likeliest first: ids and log-probabilities, `[T, k]` each.

    Raises:
        BadAnswer: fewer than k, NaN or null, ids outside of the vocabulary, or values that are no log-probabilities.
    """
    ids = np.empty((len(entries), k), dtype=np.int32)
    log_probs = np.empty((len(entries), k), dtype=np.float32)
    for position, entry in enumerate(entries):
        if any(value is None or value != value for value, _ in entry):
            raise BadAnswer("log-probabilities that are not finite: the model is not, in the dtype it is served in")
        best = sorted(entry, reverse=True)[:k]
        if len(best) < k:
            raise BadAnswer(f"{len(best)} tokens at a position, expected {k}")
        log_probs[position], ids[position] = zip(*best)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise BadAnswer(f"token {ids.max() if ids.min() >= 0 else ids.min()}, expected ids of {vocab_size} tokens")
    # What JSON has no minus infinity for: vLLM puts -9999, llama.cpp the lowest number.
    log_probs[log_probs <= -9999] = -np.inf
    mass = np.exp(log_probs.astype(np.float64)).sum(axis=-1)
    if (mass > 1.01).any() or (mass == 0).any():
        raise BadAnswer(
            f"probabilities whose sum is {mass[np.abs(mass - 0.5).argmax()]:.3g}, expected at most 1: the server "
            "gives no log-probabilities (vLLM: --logprobs-mode raw_logprobs)"
        )
    return ids, log_probs


def log_tail(log_probs: np.ndarray, vocab_size: int) -> np.ndarray:
    """`[T, k]` -> `[T]`, log of the mass of all other tokens: 1 minus the sum of those.

    Not below what the rounding of k numbers to float32 leaves open, for a tail of no mass makes some divergences
    infinite; minus infinity where k is the whole vocabulary.
    """
    if log_probs.shape[-1] == vocab_size:
        return np.full(len(log_probs), -np.inf, dtype=np.float32)
    rest = 1.0 - np.exp(log_probs.astype(np.float64)).sum(axis=-1)
    return np.log(np.maximum(rest, log_probs.shape[-1] * 2.0**-24)).astype(np.float32)
