"""A server of a transformers model that speaks as vLLM 0.33.0 or SGLang 0.5.23 do, errors included, and faults on top.

Faithful to `vllm/entrypoints/openai/completion/serving.py`, `vllm/v1/engine/logprobs.py`, `vllm/sampling_params.py`
and `vllm/entrypoints/serve/tokenize/`, and to `sglang/srt/entrypoints/http_server.py` and
`sglang/srt/managers/scheduler_components/logprob_result_processor.py`, in what a client sees of log-probabilities of a
prompt. `server.faults.append(Fault(...))` makes the next scoring requests go wrong.
"""

import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


KEY = "sk-of-the-tests"
SCORES = ("/v1/completions", "/generate")


@dataclass
class Fault:
    """What happens to the next `times` requests for log-probabilities.

    Args:
        status: of the answer, with `retry_after` seconds in its header.
        body: the text in place of the answer.
        cut: the connection ends in the middle of the answer.
        broken: called with the answer, returns another.
        hang: seconds before the answer.
    """

    times: int = 1
    status: int = 200
    retry_after: str | None = None
    body: str | None = None
    cut: bool = False
    broken: "object | None" = None
    hang: float = 0.0


class TeacherServer:
    """`with TeacherServer(model, tokenizer, "vllm") as server:` answers at `server.url`.

    Args:
        model: a causal language model of transformers.
        tokenizer: its own.
        kind: "vllm", "sglang", or the `owned_by` of another server, which has nothing but a list of models.
        name: of the model.
        key: that requests have to bring; None for a server without.
        max_logprobs: of vLLM.
        max_length: tokens of a prompt and what is generated.
        delay: seconds that each scoring takes longer.
    """

    def __init__(
        self,
        model,
        tokenizer,
        kind="vllm",
        name="toy/teacher",
        key=None,
        max_logprobs=20,
        max_length=512,
        delay=0.0,
        port=0,
    ):
        self.model, self.tokenizer, self.kind, self.name = model.eval(), tokenizer, kind, name
        self.key, self.max_logprobs, self.max_length, self.delay = key, max_logprobs, max_length, delay
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, dict]] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"server_of_teacher": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._http.daemon_threads = True
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    @property
    def scored(self):
        """The rows of ids that were asked for log-probabilities, in order."""
        return [body.get("prompt", body.get("input_ids")) for path, body in self.requests if path in SCORES]

    def answer(self, path, body):
        """Status and object."""
        with self._lock:
            self.requests.append((path, body))
            fault = None
            if path in SCORES and self.faults:
                fault = self.faults[0]
                fault.times -= 1
                if not fault.times:
                    self.faults.pop(0)
            self._at_once += path in SCORES
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if path in SCORES:
                time.sleep(self.delay + (fault.hang if fault else 0))
            if fault and fault.status != 200:
                return fault.status, {"error": {"message": "fault of the test"}}, fault
            with self._lock:
                status, found = self._dispatch(path, body)
            if fault and fault.broken:
                found = fault.broken(found)
            return status, found, fault
        finally:
            with self._lock:
                self._at_once -= path in SCORES

    def _dispatch(self, path, body):
        if path == "/v1/models":
            card = {"id": self.name, "object": "model", "owned_by": self.kind, "root": self.name, "parent": None}
            return 200, {"object": "list", "data": [{**card, "max_model_len": self.max_length}]}
        own = {
            "vllm": {
                "/version": lambda: (200, {"version": "0.33.0"}),
                "/v1/completions": lambda: self._completions(body),
                "/detokenize": lambda: (200, {"prompt": self.tokenizer.decode(body["tokens"])}),
            },
            "sglang": {
                "/server_info": lambda: (
                    200,
                    {
                        "version": "0.5.23",
                        "api_key": self.key,
                        "model_path": "/secret/path",
                        "max_req_input_len": self.max_length - 6,
                    },
                ),
                "/generate": lambda: self._generate(body),
                "/detokenize": lambda: (
                    200,
                    {"text": self.tokenizer.decode(body["tokens"], skip_special_tokens=body["skip_special_tokens"])},
                ),
            },
        }.get(self.kind, {})
        if own and path == "/tokenize":
            ids = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
            return 200, {"count": len(ids), "max_model_len": self.max_length, "tokens": ids}
        return own[path]() if path in own else (404, {"detail": "Not Found"})

    def _log_probs(self, ids):
        with torch.no_grad():
            return torch.log_softmax(self.model(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)

    def _completions(self, body):
        ids, k = body["prompt"], body["prompt_logprobs"]
        vocabulary = self.model.config.vocab_size
        if body["model"] != self.name:
            return _vllm_error(404, "NotFoundError", f"The model `{body['model']}` does not exist.")
        if max(ids) >= vocabulary:
            return _vllm_error(400, "BadRequestError", f"Token id {max(ids)} is out of vocabulary")
        if len(ids) + body["max_tokens"] > self.max_length:
            message = f"This model's maximum context length is {self.max_length} tokens."
            return _vllm_error(400, "BadRequestError", message)
        if k > self.max_logprobs:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            return _vllm_error(400, "BadRequestError", message)
        predicted = [None]
        for row, token in zip(self._log_probs(ids), ids[1:]):
            values, best = row.topk(k)
            # The prompt's token comes first, then the likeliest; once where it is among them.
            pairs = {token: row[token].item()} | dict(zip(best.tolist(), values.tolist()))
            ranks = {token: 1 + int((row > row[token]).sum()) for token in pairs}
            predicted.append(
                {
                    str(token): {
                        "logprob": -9999.0 if value == -float("inf") else value,
                        "rank": ranks[token],
                        "decoded_token": self.tokenizer.decode([token]),
                    }
                    for token, value in pairs.items()
                }
            )
        if any(value["logprob"] != value["logprob"] for entry in predicted[1:] for value in entry.values()):
            # Starlette's JSONResponse has no NaN.
            return 500, {"error": {"message": "Out of range float values are not JSON compliant", "code": 500}}
        choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length", "prompt_logprobs": predicted}
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        return 200, {
            "id": "cmpl-1",
            "object": "text_completion",
            "model": self.name,
            "choices": [choice],
            "usage": usage,
        }

    def _generate(self, body):
        ids, first, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
        longest = self.max_length - 6
        if len(ids) >= longest:
            message = f"Input length ({len(ids)} tokens) exceeds the maximum allowed length ({longest} tokens)."
            return 400, {"error": {"message": message}}
        log_probs = self._log_probs(ids)[first:-1]
        own = [None, *(row[token].item() for row, token in zip(log_probs, ids[first + 1 :]))]
        last = self.model.config.vocab_size - 1
        tokens = [token if token < last else 0 for token in ids[first:]]
        values, best = log_probs.topk(k, dim=-1)
        top = [None, *([list(pair) + [None] for pair in zip(*row)] for row in zip(values.tolist(), best.tolist()))]
        meta = {
            "id": "1",
            "finish_reason": {"type": "length", "length": 1},
            "prompt_tokens": len(ids),
            "weight_version": "default",
            "input_token_logprobs": [[value, token, None] for value, token in zip(own, tokens)],
            "input_top_logprobs": top,
            "output_token_logprobs": [[-1.0, 5, None]],
            "output_top_logprobs": [[[-1.0, 5, None]]],
        }
        return 200, {"text": "x", "output_ids": [5], "meta_info": _without_nan(meta)}


def _vllm_error(status, kind, message):
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _without_nan(value):
    """orjson writes NaN and infinity as null."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_teacher: TeacherServer

    def do_GET(self):
        self._serve({})

    def do_POST(self):
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _serve(self, body):
        server = self.server_of_teacher
        guarded = server.kind != "vllm" or self.path.startswith("/v1")  # vLLM guards nothing else
        if server.key and guarded and self.headers["Authorization"] != f"Bearer {server.key}":
            return self._send(401, json.dumps({"error": "Unauthorized"}), None)
        status, found, fault = server.answer(self.path, body)
        text = json.dumps(found) if fault is None or fault.body is None else fault.body
        self._send(status, text, fault)

    def _send(self, status, text, fault):
        content = text.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if fault and fault.retry_after:
                self.send_header("Retry-After", fault.retry_after)
            self.end_headers()
            if fault and fault.cut:
                content = content[: len(content) // 2]
                self.close_connection = True
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):  # a client that gave up
            self.close_connection = True

    def log_message(self, *_):
        pass
