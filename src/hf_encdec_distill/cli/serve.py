"""Serve a student or an exported folder over HTTP, as OpenAI's API has it: /v1/completions, /v1/chat/completions.

A prompt is the text that the student answers; of a chat it is the one message of the user, since a student answers a
text and holds no conversation. Answers can be streamed. Without `temperature` they are greedy. Requests wait for each
other. There is no authentication: put it behind something that has one.
"""

from __future__ import annotations

import argparse
import json
import math
import threading
import time
import uuid
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from ._display import say_result
from ._inputs import check_at_least_one, check_free, check_texts, public_name


SUMMARY = "an OpenAI-compatible server for a student"
EXAMPLE = "hf-encdec-distill serve exported"
_LARGEST = 2**24  # bytes of a request
_DIGITS = 20  # of a Content-Length; Python reads no number of thousands


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="exported folder, or folder or Hub id of a student")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="TOKENS",
        help="most tokens of an answer (default: %(default)s)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 is any free one (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    check_at_least_one(args, "max_new_tokens")
    check_free(args.host, args.port)
    server = make_server(load_service(args.model, args.max_new_tokens), args.host, args.port)
    address = f"http://{args.host}:{server.server_port}/v1"
    say_result(args, {"url": address}, f"{address} (Ctrl-C ends it)")
    with server:
        server.serve_forever()


class BadRequest(ValueError):
    """A request that cannot be answered; the message goes back to who sent it."""


@dataclass(frozen=True)
class Completion:
    """What a request asks for."""

    texts: list[str]
    max_tokens: int
    stream: bool
    stop: list[str]
    sampling: dict[str, Any]
    seed: int | None = None
    stream_usage: bool = False


@dataclass
class Service:
    """A loaded student. One answer is written at a time: an export keeps the keys and values of one.

    Args:
        most: tokens of an answer that no request may exceed.
    """

    name: str
    model: Any
    tokenizer: Any
    most: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, text: str) -> list[int]:
        """
        Raises:
            BadRequest: the prompt is empty or longer than the model takes, or is for an image.
        """
        from ..distillation.checks.limits import check_rows

        ids = self.tokenizer(text)["input_ids"]
        if not ids:
            raise BadRequest(f"prompt={text!r}: expected a text of at least one token")
        if getattr(self.model.config, "image_token_id", None) in ids:
            raise BadRequest("the text has an image token, and no image can be sent here: leave it out")
        try:
            check_rows(self.name, self.model.config, [len(ids)], [1], "send a shorter prompt")
            if self._graphs is not None:
                self._graphs.shapes.padded(len(ids))
        except ValueError as error:
            raise BadRequest(str(error)) from error
        room = self._graphs and self._graphs.room_for_target(len(ids))
        if room is not None and room < 1:
            raise BadRequest(
                f"the prompt has {len(ids)} tokens, which leave no place for an answer: send a shorter one"
            )
        return ids

    @property
    def _graphs(self):
        """Of an exported model; None in PyTorch."""
        return getattr(self.model, "graphs", None)

    def most_tokens(self, ids: list[int], asked: Completion) -> int:
        """Of an answer to the prompt `ids`: as many as are asked for, and as there are positions and slots for."""
        from ..distillation.checks.limits import room_for_target

        slots = self._graphs and self._graphs.room_for_target(len(ids))
        limits = (asked.max_tokens, room_for_target(self.model.config, len(ids)), slots)
        return min(limit for limit in limits if limit is not None)

    def answer(self, ids: list[int], asked: Completion) -> Generator[tuple[str, int, str | None], None, None]:
        """Pieces of text as they come, each with the number of tokens so far and, with the last, why it ended."""
        import torch

        from ..distillation.teachers.targets import end_tokens
        from ._answers import stream

        if asked.seed is not None:
            torch.manual_seed(asked.seed)
        sent = ""
        hold = max(map(len, asked.stop), default=1) - 1  # what may be the beginning of a stop
        count, text, cut = 0, "", None
        most = self.most_tokens(ids, asked)
        answers = stream(self.model, ids, self.tokenizer, most, **asked.sampling)
        try:
            for answer in answers:
                count = len(answer.ids)
                text = self.tokenizer.decode(answer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                ends = [place for place in (text.find(stop) for stop in asked.stop) if place >= 0]
                if ends:
                    cut = text[: min(ends)]
                    break
                ready = text.rstrip("\N{REPLACEMENT CHARACTER}")  # of a character that is not whole yet
                ready = ready[: max(len(ready) - hold, 0)].lstrip()
                if len(ready) > len(sent):
                    yield ready[len(sent) :], count, None
                    sent = ready
        finally:
            answers.close()
        last = (cut if cut is not None else text).lstrip()
        # By `stop`, by stop_strings of the generation config, or by the last token that there was room for.
        ended = cut is not None or count < most or answer.ids[-1] in end_tokens(self.model, self.tokenizer)
        yield last[len(sent) :], count, "stop" if ended else "length"


def load_service(name: str, most: int) -> Service:
    """
    Raises:
        ValueError: it is a decoder-only model.
    """
    from ..models.loading import load_config, load_tokenizer
    from ..models.prompts import warn_of_lacking_prompt
    from .generate import load_answering

    config = load_config(name)
    if not config.is_encoder_decoder:
        raise ValueError(
            f"{name} is a decoder-only model ({config.model_type}): serve it with `transformers serve`, or with "
            "llama.cpp or vLLM, which know its architecture"
        )
    tokenizer = load_tokenizer(name)
    warn_of_lacking_prompt(name, tokenizer, config)
    return Service(public_name(name), load_answering(name), tokenizer, most)


# Of fields of OpenAI's API that would change the answer, what leaves it as it is.
_NEUTRAL: dict[str, Any] = {
    **{"n": 1, "best_of": 1, "echo": False, "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0},
    **{"logit_bias": {}, "suffix": "", "tools": [], "functions": [], "response_format": {"type": "text"}},
    **{"tool_choice": "none", "modalities": ["text"]},
}
_READ = {
    *("messages", "prompt", "max_completion_tokens", "max_tokens", "stop", "temperature", "top_p", "seed"),
    *("stream", "stream_options"),
}
# What clients send along that no answer depends on.
_WITHOUT_EFFECT = {
    *("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("parallel_tool_calls", "top_logprobs"),
}
_LEAST_TEMPERATURE = 1e-4  # below it logits divided by it overflow; the likeliest token is all that is drawn


def _field(body: Mapping, name: str, kinds: tuple[type, ...], default, what: str, low=None, high=None):
    value = body.get(name)
    if value is None:
        return default
    other = bool not in kinds and isinstance(value, bool)
    other |= isinstance(value, float) and not math.isfinite(value)
    outside = (low is not None and isinstance(value, (int, float)) and value < low) or (
        high is not None and isinstance(value, (int, float)) and value > high
    )
    if other or not isinstance(value, kinds) or outside:
        raise BadRequest(f"{name}={value!r}: expected {what}")
    return value


def parse(path: str, body: Any, most: int) -> Completion:
    """What the body of a request asks for.

    Raises:
        BadRequest: a field is wrong, or asks for what is not offered.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body has to be a JSON object")
    if path == "/v1/chat/completions":
        texts: list[Any] = [_only_message(body.get("messages"))]
    else:
        prompt = body.get("prompt")
        texts = prompt if isinstance(prompt, list) else [prompt]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise BadRequest(f"prompt={prompt!r}: expected a text, or a list of texts")
    try:
        check_texts(texts)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    for name, only in _NEUTRAL.items():
        given = body.get(name)
        if given is not None and (given != only or isinstance(given, bool) != isinstance(only, bool)):
            raise BadRequest(f"{name}={given!r}: this server takes {only!r} alone")
    known = _READ | _WITHOUT_EFFECT | _NEUTRAL.keys()
    if unknown := sorted(name for name in body.keys() - known if body[name] is not None):
        raise BadRequest(f"{', '.join(unknown)}: this server does not know it, and the answer may depend on it")
    limit = _field(body, "max_completion_tokens", (int,), None, "a whole number of at least 1", low=1)
    limit = limit or _field(body, "max_tokens", (int,), most, "a whole number of at least 1", low=1)
    stop = _field(body, "stop", (str, list), [], "a text, or a list of texts")
    stop = [stop] if isinstance(stop, str) else stop
    if not all(isinstance(text, str) and text for text in stop):
        raise BadRequest(f"stop={stop!r}: expected texts that are not empty")
    temperature = _field(body, "temperature", (int, float), 0, "a number from 0 to 2", low=0, high=2)
    temperature = 0 if temperature < _LEAST_TEMPERATURE else temperature
    top_p = _field(body, "top_p", (int, float), 1, "a number above 0, up to 1", low=1e-6, high=1)
    # Of all tokens, as in OpenAI's API; transformers would take the 50 likeliest.
    sampling = {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p), "top_k": 0}
    seed = _field(body, "seed", (int,), None, "a whole number of 64 bits", low=-(2**63), high=2**63 - 1)
    stream = _field(body, "stream", (bool,), False, "true or false")
    if stream and len(texts) > 1:
        raise BadRequest("stream with several prompts: send them one by one")
    options = _field(body, "stream_options", (dict,), {}, "an object")
    usage = stream and _field(options, "include_usage", (bool,), False, "true or false")
    return Completion(texts, min(limit, most), stream, stop, sampling if temperature else {}, seed, usage)


def _only_message(messages: Any) -> str:
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        raise BadRequest(
            "messages: expected one message, of the user; a student answers a text and holds no conversation, and its "
            "system prompt is built into its tokenizer"
        )
    [message] = messages
    content = message.get("content")
    if isinstance(content, list):  # parts, as newer clients send them
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        content = "".join(texts) if len(texts) == len(content) else None
    if message.get("role") != "user" or not isinstance(content, str):
        raise BadRequest(f"messages[0]={message!r}: expected the role 'user' with a text as content")
    return content


def make_server(service: Service, host: str, port: int) -> ThreadingHTTPServer:
    class Handler(_Handler):
        pass

    Handler.service = service
    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    return server


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _usage(read: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


_FAILED = _error("the model failed; the server's log says how", "server_error")


class _Handler(BaseHTTPRequestHandler):
    service: Service
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass  # prompts are nobody's business

    def do_GET(self) -> None:
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # a body that nobody reads would be taken for the next request
        model = {"id": self.service.name, "object": "model", "created": 0, "owned_by": "hf-encdec-distill"}
        if self._route == "/health":
            self._send(200, {"status": "ok"})
        elif self._route == "/v1/models":
            self._send(200, {"object": "list", "data": [model]})
        elif unquote(self._route) == f"/v1/models/{self.service.name}":
            self._send(200, model)
        else:
            self._refuse(404, f"no such path: {self.path}")

    def do_POST(self) -> None:
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            self._refuse(411, "send the body with a Content-Length, not chunked")
            return
        length = ", ".join(self.headers.get_all("Content-Length", []))
        if not length.isdecimal() or len(length) > _DIGITS or int(length) > _LARGEST:
            self.close_connection = True
            self._refuse(413, f"Content-Length={length[:_DIGITS]!r}: expected at most {_LARGEST} bytes")
            return
        content = self.rfile.read(int(length))  # in any case: what is left would be taken for the next request
        if self._route not in ("/v1/completions", "/v1/chat/completions"):
            self._refuse(404, f"no such path: {self.path}")
            return
        try:
            try:
                body = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise BadRequest(f"the body is not JSON: {error}") from error
            asked = parse(self._route, body, self.service.most)
            prompts = [self.service.read(text) for text in asked.texts]
        except BadRequest as error:
            self._refuse(400, str(error))
            return
        with self.service.lock:
            if asked.stream:
                self._stream(prompts[0], asked)
                return
            try:
                answer = self._answer(prompts, asked)
            except Exception:
                self.close_connection = True
                self._send(500, _FAILED)
                raise  # to the server's log
            self._send(200, answer)

    def _answer(self, prompts: list[list[int]], asked: Completion) -> dict[str, Any]:
        choices, written = [], 0
        for index, ids in enumerate(prompts):
            pieces = list(self.service.answer(ids, asked))
            text = "".join(piece for piece, _, _ in pieces)
            _, count, reason = pieces[-1]
            written += count
            content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            choices.append({"index": index, **content, "finish_reason": reason, "logprobs": None})
        return {**self._head(""), "choices": choices, "usage": _usage(sum(map(len, prompts)), written)}

    def _stream(self, ids: list[int], asked: Completion) -> None:
        head = self._head(".chunk")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        pieces = self.service.answer(ids, asked)
        if asked.stream_usage:
            head["usage"] = None  # but in the last, as OpenAI's API has it
        try:
            first, written = {"role": "assistant"}, 0
            for text, count, reason in pieces:
                content = {"delta": {**first, "content": text}} if self._chat else {"text": text}
                first, written = {}, count
                self._event(json.dumps({**head, "choices": [{"index": 0, **content, "finish_reason": reason}]}))
            if asked.stream_usage:
                self._event(json.dumps({**head, "choices": [], "usage": _usage(len(ids), written)}))
            self._event("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # who asked is gone
            self.close_connection = True
        except Exception:
            self._event(json.dumps(_FAILED))
            raise  # to the server's log, and the connection ends
        finally:
            pieces.close()

    @property
    def _route(self) -> str:
        """The path without its query."""
        return self.path.partition("?")[0]

    @property
    def _chat(self) -> bool:
        return self._route == "/v1/chat/completions"

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self._chat else "text_completion"
        name = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.service.name}

    def _event(self, data: str) -> None:
        content = f"data: {data}\n\n".encode()
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, _error(message, "invalid_request_error"))

    def _send(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)
