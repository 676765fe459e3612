"""The server, asked by huggingface_hub's client and by hand; answers are those of `generate`."""

import http.client
import json
import threading

import pytest
import torch
from huggingface_hub import InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError
from toys import make_model

from hf_encdec_distill.cli import _answers, serve
from hf_encdec_distill.export.exporting import export_model


TEXT = "def add(a, b): return a + b"
MOST = 12


@pytest.fixture(scope="module")
def folders(make_bpe_tokenizer, tmp_path_factory):
    """A student in PyTorch and its export."""
    torch.manual_seed(0)
    tokenizer = make_bpe_tokenizer(chat_template=None)
    model = make_model(
        "merged",
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=1,
    )
    folder = tmp_path_factory.mktemp("serve")
    model.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    export_model(model, tokenizer, "onnx", folder / "onnx")
    return folder, model, tokenizer


@pytest.fixture(scope="module", params=["student", "onnx"])
def running(folders, request):
    folder, model, tokenizer = folders
    service = serve.load_service(str(folder / request.param), MOST)
    server = serve.make_server(service, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def expected(folders):
    """The answer in PyTorch, and whether it has come to its end."""
    _, model, tokenizer = folders
    inputs = tokenizer(TEXT, return_tensors="pt")
    ids = model.generate(
        input_ids=inputs["input_ids"], max_new_tokens=MOST, do_sample=False, eos_token_id=tokenizer.eos_token_id
    )[0]
    return tokenizer.decode(ids, skip_special_tokens=True).lstrip(), len(ids) - 1


@pytest.fixture(autouse=True)
def online(monkeypatch, forget_sessions):
    """Of this machine's own address the client is not allowed to ask offline, nor with what it opened offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    forget_sessions()


def post(port, path, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_a_chat_client(running, expected):
    address, _ = running
    text, count = expected
    client = InferenceClient(base_url=address)
    messages = [{"role": "user", "content": TEXT}]
    answer = client.chat_completion(messages, max_tokens=MOST)
    assert answer.choices[0].message.content == text and text
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", count) == ("length", MOST)
    pieces = list(client.chat_completion(messages, max_tokens=MOST, stream=True))
    assert "".join(piece.choices[0].delta.content for piece in pieces) == text
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_pieces_are_sent_as_they_come(folders, expected, monkeypatch):
    folder, _, tokenizer = folders
    service = serve.load_service(str(folder / "student"), MOST)

    def one_by_one(model, ids, tokenizer, most, **sampling):
        answer = _answers.Answer()
        for token in tokenizer("Return the sum")["input_ids"]:
            answer.ids.append(token)
            yield answer

    monkeypatch.setattr(_answers, "stream", one_by_one)
    asked = serve.parse("/v1/completions", {"prompt": "x", "stream": True}, MOST)
    pieces = list(service.answer([3], asked))
    texts = tokenizer.batch_decode([[token] for token in tokenizer("Return the sum")["input_ids"]])
    assert [text for text, _, _ in pieces] == [*texts, ""] and len(texts) > 3
    assert [count for _, count, _ in pieces] == [*range(1, len(texts) + 1), len(texts)]


def test_completions(running, expected):
    _, port = running
    text, count = expected
    status, answer = post(port, "/v1/completions", {"model": "any", "prompt": [TEXT, "x"], "max_tokens": 500})
    assert status == 200 and answer["object"] == "text_completion"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1] and answer["choices"][0]["text"] == text
    assert answer["usage"]["completion_tokens"] <= 2 * MOST  # what the server allows
    status, one = post(port, "/v1/completions", {"prompt": TEXT, "max_tokens": 1})
    assert one["usage"]["completion_tokens"] == 1


def test_an_answer_ends_before_a_stop(running, expected):
    """Also where the stop comes in the middle of what was sent as it came."""
    address, port = running
    text, _ = expected
    stop = text[4:7]
    _, answer = post(port, "/v1/completions", {"prompt": TEXT, "stop": [stop, "never there"]})
    assert answer["choices"][0]["text"] == text[: text.index(stop)] and answer["choices"][0]["finish_reason"] == "stop"
    client = InferenceClient(base_url=address)
    pieces = client.chat_completion([{"role": "user", "content": TEXT}], stop=[stop], stream=True)
    assert "".join(piece.choices[0].delta.content for piece in pieces) == text[: text.index(stop)]


def test_sampling_draws(running):
    _, port = running
    drawn = {
        post(port, "/v1/completions", {"prompt": TEXT, "temperature": 2.0})[1]["choices"][0]["text"] for _ in range(4)
    }
    assert len(drawn) > 1
    greedy = {
        post(port, "/v1/completions", {"prompt": TEXT, "temperature": 0})[1]["choices"][0]["text"] for _ in range(2)
    }
    assert len(greedy) == 1


def test_many_ask_at_once(running, expected):
    """An export keeps the keys and values of one answer at a time."""
    _, port = running
    answers = [None] * 6

    def ask(index):
        answers[index] = post(port, "/v1/completions", {"prompt": TEXT})[1]["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(answers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) == {expected[0]}


def test_a_client_that_goes_away_stops_its_answer(running, expected):
    _, port = running
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps({"prompt": TEXT, "stream": True}).encode())
    connection.close()
    assert post(port, "/v1/completions", {"prompt": TEXT})[1]["choices"][0]["text"] == expected[0]


@pytest.mark.parametrize(
    "body,problem",
    [
        (b"{", "the body is no JSON"),
        ([], "the body has to be a JSON object"),
        ({}, "prompt=None: expected a text"),
        ({"prompt": [1, 2]}, "prompt=.*expected a text"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens=0: expected a whole number of at least 1"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens=True"),
        ({"prompt": "x", "temperature": 3}, "temperature=3: expected a number from 0 to 2"),
        ({"prompt": "x", "n": 2}, "n=2: this server takes 1 alone"),
        ({"prompt": "x", "stop": [""]}, "stop=.*not empty"),
        ({"prompt": ["x", "y"], "stream": True}, "several prompts"),
        ({"prompt": "x " * 200}, "200|send a shorter prompt"),
    ],
)
def test_bad_requests(running, body, problem):
    import re

    _, port = running
    status, answer = post(port, "/v1/completions", body)
    assert status == 400 and re.search(problem, answer["error"]["message"])


def test_conversations_are_refused(running):
    address, port = running
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "z"},
    ]
    with pytest.raises(HfHubHTTPError, match="one message, of the user"):
        InferenceClient(base_url=address).chat_completion(messages)
    assert post(port, "/v1/chat/completions", {"messages": messages})[1]["error"]["message"].startswith(
        "messages: expected"
    )
    assert post(port, "/v1/embeddings", {})[0] == 404


def test_who_is_there(running):
    _, port = running
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/v1/models")
    [model] = json.loads(connection.getresponse().read())["data"]
    assert model["id"] in ("student", "onnx")
