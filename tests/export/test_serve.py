"""The server, asked by huggingface_hub's client and by hand; answers are those of `generate`."""

import contextlib
import http.client
import json
import re
import shutil
import socket
import threading
import time

import pytest
import torch
from huggingface_hub import InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError
from toys import make_model
from transformers import GenerationConfig

from hf_encdec_distill.cli import _answers, serve
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.export.exporting import export_model
from hf_encdec_distill.export.recipe import Shapes


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


@pytest.fixture(scope="module")
def serving():
    """A function that serves, and says on which port."""
    servers = []

    def serving(service):
        server = serve.make_server(service, "127.0.0.1", 0)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server.server_port

    yield serving
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module", params=["student", "onnx"])
def running(folders, serving, request):
    port = serving(serve.load_service(str(folders[0] / request.param), MOST))
    return f"http://127.0.0.1:{port}/v1", port


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


def post(port, path, body, connection=None):
    connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=60)
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


@pytest.fixture
def writing(folders, monkeypatch):
    """A function that makes a service whose model writes a given text, token by token."""

    def service(written):
        def one_by_one(model, ids, tokenizer, most, **sampling):
            answer = _answers.Answer()
            for token in tokenizer(written)["input_ids"]:
                answer.ids.append(token)
                yield answer

        monkeypatch.setattr(_answers, "stream", one_by_one)
        return serve.load_service(str(folders[0] / "student"), MOST)

    return service


def test_pieces_are_sent_as_they_come(folders, writing):
    _, _, tokenizer = folders
    service = writing("Return the sum")
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


@pytest.mark.parametrize(
    "stop", ["Return\n###END###", "###END###", "nd", "never there, however long one waits for it"]
)
def test_nothing_of_a_stop_is_sent(stop, writing):
    """However much of an answer it is: the whole, its end, a part of a token, longer than all of it."""
    text = "Return\n###END### more"
    asked = serve.parse("/v1/completions", {"prompt": "x", "stop": stop}, MOST)
    pieces = list(writing(text).answer([3], asked))
    assert "".join(piece for piece, _, _ in pieces) == text.partition(stop)[0]


@pytest.mark.parametrize(("stop", "sent"), [("\n", ""), ("\nR", ""), ("t", "Re"), ("!", "Return\nit")])
def test_a_stop_may_be_in_what_is_stripped(stop, sent, writing):
    """Space at the beginning of an answer is not sent, but read."""
    asked = serve.parse("/v1/completions", {"prompt": "x", "stop": stop}, 20)
    assert "".join(piece for piece, _, _ in writing("\n\nReturn\nit").answer([3], asked)) == sent


def test_a_generation_config_with_more_than_greedy_search(folders, tmp_path, expected, capsys):
    """Its stop strings end an answer, and of several sequences the first is written; by `serve` and by `generate`."""
    text, _ = expected
    stop = next(letter for letter in text if letter.isascii() and letter.isprintable() and letter != " ")
    shutil.copytree(folders[0] / "onnx", tmp_path / "onnx")
    file = tmp_path / "onnx" / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "stop_strings": [stop], "num_return_sequences": 2, "num_beams": 2}))
    service = serve.load_service(str(tmp_path / "onnx"), MOST)
    pieces = list(service.answer(service.read(TEXT), serve.parse("/v1/completions", {"prompt": TEXT}, MOST)))
    written = "".join(piece for piece, _, _ in pieces)
    assert text.startswith(written) and stop in written and written != text
    assert pieces[-1][1] < MOST and pieces[-1][2] == "stop"
    assert main(["generate", str(tmp_path / "onnx"), TEXT, "--max-new-tokens", str(MOST)]) == 0
    assert capsys.readouterr().out.strip() == written.strip()


def test_a_seed_draws_the_same_again(running):
    _, port = running

    def drawn(seed):
        body = {"prompt": TEXT, "temperature": 2.0, "seed": seed}
        return post(port, "/v1/completions", body)[1]["choices"][0]["text"]

    assert drawn(1) == drawn(1) and len({drawn(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_ends_with_its_usage_where_it_is_asked_for(running, expected, path):
    _, port = running
    body = {"prompt": TEXT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": TEXT}]}

    def events(**more):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        content = json.dumps({**body, "stream": True, "user": "me", "tool_choice": None, **more})
        connection.request("POST", path, content, {"Content-Type": "application/json"})
        lines = connection.getresponse().read().decode().split("\n\n")
        return [line.removeprefix("data: ") for line in lines if line]

    *pieces, last, end = events(stream_options={"include_usage": True})
    assert end == "[DONE]" and all(json.loads(piece)["usage"] is None for piece in pieces)
    last = json.loads(last)
    whole = post(port, path, body)[1]["usage"]
    assert last["choices"] == [] and last["usage"] == whole and whole["completion_tokens"] == expected[1]
    *pieces, end = events()
    assert end == "[DONE]" and all("usage" not in json.loads(piece) for piece in pieces)


def test_all_tokens_are_drawn_from():
    """transformers would draw from the 50 likeliest."""
    neutral = {"n": 1, "frequency_penalty": 0.0, "logit_bias": {}, "stream_options": {"include_usage": True}}
    neutral |= {"tool_choice": "none", "modalities": ["text"]}
    assert serve.parse("/v1/completions", {"prompt": "x", "temperature": 1e-40, **neutral}, MOST).sampling == {}
    asked = serve.parse("/v1/completions", {"prompt": "x", "temperature": 1.0}, MOST)
    assert GenerationConfig(**asked.sampling).top_k == 0


def test_any_end_of_the_generation_config_ends_an_answer(folders, tmp_path):
    """As it does for `generate`; the tokenizer knows one of them only."""
    folder, model, tokenizer = folders
    inputs = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    *_, last = written = model.generate(inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, 1:].tolist()
    assert last not in written[:-1]
    shutil.copytree(folder / "student", tmp_path / "student")
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, last], decoder_start_token_id=1).save_pretrained(
        tmp_path / "student"
    )
    service = serve.load_service(str(tmp_path / "student"), MOST)
    *_, end = service.answer(service.read(TEXT), serve.parse("/v1/completions", {"prompt": TEXT}, MOST))
    assert end[1:] == (4, "stop")


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "kind,fields,prompt,room",
    [
        ("merged", {}, 30, 2),
        ("separate", {}, 30, MOST),  # prompt and answer have positions of their own
        ("merged", {"rope_parameters": YARN}, 120, 8),  # four times as many positions
    ],
)
def test_an_answer_is_as_long_as_there_are_positions(kind, fields, prompt, room, folders):
    _, _, tokenizer = folders
    model = make_model(kind, vocab_size=len(tokenizer), max_position_embeddings=32, **fields)
    service = serve.Service("toy", model, tokenizer, MOST)
    ids = service.read("!" * prompt)
    assert len(ids) == prompt
    asked = serve.parse("/v1/completions", {"prompt": "x"}, MOST)
    assert service.most_tokens(ids, asked) == room
    *_, (_, count, _) = service.answer(ids, asked)
    assert count == room


def test_an_export_of_fixed_sizes(folders, tmp_path, serving):
    """It writes what there are slots for, and says how long a prompt may be."""
    _, model, tokenizer = folders
    export_model(model, tokenizer, "onnx", tmp_path / "fixed", shapes=Shapes.parse("fixed:32,4"))
    port = serving(serve.load_service(str(tmp_path / "fixed"), MOST))
    status, answer = post(port, "/v1/completions", {"prompt": TEXT})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 4)
    assert answer["choices"][0]["finish_reason"] == "length"
    status, answer = post(port, "/v1/completions", {"prompt": "!" * 33})
    assert status == 400 and "takes at most 32" in answer["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails_is_told(stream, folders, serving, monkeypatch, capfd):
    """To who asked, and with its traceback to who serves; the next request is answered."""
    folder, model, _ = folders
    service = serve.load_service(str(folder / "student"), MOST)
    port = serving(service)
    with monkeypatch.context() as broken:
        broken.setattr(service.model, "generate", lambda **_: 1 / 0)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": TEXT, "stream": stream}).encode())
        response = connection.getresponse()
        try:
            content = response.read()
        except http.client.IncompleteRead as error:  # the stream ends there
            content = error.partial
    assert response.status == (200 if stream else 500)
    assert json.loads(content.removeprefix(b"data: "))["error"]["type"] == "server_error"
    assert post(port, "/v1/completions", {"prompt": TEXT})[0] == 200
    said, end = "", time.monotonic() + 60
    while "ZeroDivisionError" not in said:  # another thread writes it, after the answer
        assert time.monotonic() < end, said
        time.sleep(0.05)
        said += capfd.readouterr().err


def test_a_refusal_leaves_the_connection_usable(running):
    _, port = running
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for path, body, status in [
        ("/v1/embeddings", {"input": "x"}, 404),
        ("/v1/completions", {"prompt": ""}, 400),
        ("/v1/completions", {"prompt": TEXT}, 200),
    ]:
        assert post(port, path, body, connection)[0] == status


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
        (b"{", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b'{"prompt": "x \\ud83d"}', "not valid Unicode text"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature=nan: expected a number from 0 to 2"),
        ({"prompt": ""}, "at least one token"),
        ({"prompt": "x", "seed": 2**64}, "seed=.*64 bits"),
        ([], "the body has to be a JSON object"),
        ({}, "prompt=None: expected a text"),
        ({"prompt": [1, 2]}, "prompt=.*expected a text"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens=0: expected a whole number of at least 1"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens=True"),
        ({"prompt": "x", "temperature": 3}, "temperature=3: expected a number from 0 to 2"),
        ({"prompt": "x", "frequency_penalty": 2}, "frequency_penalty=2: this server takes 0 alone"),
        ({"prompt": "x", "logprobs": 0}, "logprobs=0: this server takes False alone"),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, "this server takes {'type': 'text'} alone"),
        ({"prompt": "x", "n": 2}, "n=2: this server takes 1 alone"),
        ({"prompt": "x", "tool_choice": "auto"}, "tool_choice='auto': this server takes 'none' alone"),
        ({"prompt": "x", "top_k": 1}, "top_k: this server does not know it"),
        ({"prompt": "x", "grammar": "g", "min_p": 0.5}, "grammar, min_p: this server does not know it"),
        ({"prompt": "x", "stream": True, "stream_options": {"include_usage": 1}}, "include_usage=1: expected true"),
        ({"prompt": "x", "stop": [""]}, "stop=.*not empty"),
        ({"prompt": ["x", "y"], "stream": True}, "several prompts"),
        ({"prompt": "x " * 200}, "200|send a shorter prompt"),
    ],
)
def test_bad_requests(running, body, problem):
    _, port = running
    status, answer = post(port, "/v1/completions", body)
    assert status == 400 and re.search(problem, answer["error"]["message"])


def test_parts_of_a_message_are_text():
    def parse(*parts):
        return serve.parse("/v1/chat/completions", {"messages": [{"role": "user", "content": list(parts)}]}, MOST)

    assert parse({"type": "text", "text": "a"}, {"type": "text", "text": "b"}).texts == ["ab"]
    for other in ({"type": "image_url", "text": "b"}, {"text": "b"}, {"type": "text"}, "b"):
        with pytest.raises(serve.BadRequest, match="expected the role 'user' with a text as content"):
            parse({"type": "text", "text": "a"}, other)


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


@pytest.mark.parametrize("name", ["student", "onnx"])
@pytest.mark.parametrize(
    "command,problem",
    [
        (["serve", "--port", "70000"], "cannot listen on --host 127.0.0.1 --port 70000"),
        (["generate", ""], "a prompt of 0 tokens: give a text"),
        (["generate", "caf\udce9"], "is not valid Unicode text"),  # as Python reads a byte that is no UTF-8
    ],
)
def test_commands_refuse_what_cannot_be_answered(name, command, problem, folders, capsys):
    verb, *rest = command
    assert main([verb, str(folders[0] / name), *rest]) == 2
    output = capsys.readouterr()
    assert problem in output.err and output.out == "" and "Traceback" not in output.err


def test_who_is_there(running):
    _, port = running
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/v1/models")
    [model] = json.loads(connection.getresponse().read())["data"]
    assert model["id"] in ("student", "onnx")
    connection.request("GET", f"/v1/models/{model['id']}?x=1")
    assert json.loads(connection.getresponse().read()) == model
    connection.request("GET", "/v1/models/another")
    assert connection.getresponse().status == 404


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        (b"POST /v1/completions?x=1", b"Content-Length: 2\r\n\r\n{}", [400, 200]),
        (b"POST /v1/completions", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", [411]),
        (b"POST /v1/completions", b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [411]),
        (b"POST /v1/completions", b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", [413]),
        (b"POST /v1/completions", b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", [413]),
        (b"POST /v1/completions", b"Content-Length: " + b"0" * 5000 + b"\r\n\r\n", [413]),
        (b"GET /health", b"Content-Length: 5\r\n\r\nhello", [200]),
        (b"GET /health", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [200]),
        (b"GET /health", b"Content-Length: 0\r\n\r\n", [200, 200]),
    ],
)
def test_no_body_becomes_the_next_request(running, head, body, status, capfd):
    """What follows in the connection is answered, or it is closed."""
    _, port = running
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head + b" HTTP/1.1\r\nHost: x\r\n" + body + HEALTH)
        answered = b""
        with contextlib.suppress(ConnectionResetError):  # as it is closed on what was not read
            while more := connection.recv(65536):
                answered += more
    assert [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+)", answered)] == status
    assert capfd.readouterr().err == ""
