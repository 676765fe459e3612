"""Targets from a server: answers are those of `generate` here; and what servers refuse, ignore or get wrong."""

import json
import threading

import datasets
import pytest
import torch
import torch.nn.functional as F
from distillation_toys import TEMPLATE, arguments, write_writer
from teacher_server import TeacherServer
from toys import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_encdec_distill import DistillationTrainer, RopeEncDecForConditionalGeneration
from hf_encdec_distill.cli import serve
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.distillation import CachedTeacher, TargetGeneration
from hf_encdec_distill.distillation.teachers import served_targets
from hf_encdec_distill.distillation.teachers.http_client import API_KEY
from hf_encdec_distill.distillation.teachers.served_targets import write_targets
from hf_encdec_distill.distillation.teachers.workers import merge_caches


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


ROWS = [{"source": "def f(): return" + " x" * (i % 5) + str(i), "target": f"Return {i}."} for i in range(8)]
SAMPLED = {"sampling_temperature": 0.9, "num_return_sequences": 3}
GREEDY = {"do_sample": False}
ANSWERED = {}  # by all servers of this file, whose model is the same
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


class WritingServer(TeacherServer):
    """Answers of a transformers model, as vLLM 0.33.0 gives them: log-probabilities of all tokens, EOS among them.

    Args:
        refuses: fields that it does not take.
        ignores: fields that it does as if they were not there.
        stop_at: how many answers it gives before it is another model.
    """

    def __init__(self, *args, refuses=(), ignores=(), stop_at=10**9, **options):
        super().__init__(*args, kind="provider", **options)
        self.refuses, self.ignores, self.stop_at, self.written = refuses, ignores, stop_at, 0

    def _dispatch(self, path, body):
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return super()._dispatch(path, body)
        for name in self.refuses:
            if name in body:
                other = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                message = f"Unsupported parameter: '{name}' is not supported with this model.{other}"
                return 400, {"error": {"message": message, "type": "invalid_request_error", "code": 400}}
        body = {name: value for name, value in body.items() if name not in self.ignores}
        if path == "/v1/completions":
            ids = self.tokenizer(body["prompt"])["input_ids"]
        else:
            text = self.tokenizer.apply_chat_template(
                body["messages"], chat_template=CHAT, tokenize=False, add_generation_prompt=True
            )
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        most = body.get("max_tokens") or body["max_completion_tokens"]
        sampling = (
            {"do_sample": True, "temperature": body["temperature"], "top_k": 0} if body["temperature"] else GREEDY
        )
        asked_for = json.dumps([path, ids, most, sampling, body.get("seed"), body.get("n"), body.get("logprobs")])
        if asked_for not in ANSWERED:
            torch.manual_seed(body.get("seed", 0))
            ANSWERED[asked_for] = [self._choice(index, ids, most, sampling, body) for index in range(body.get("n", 1))]
        self.written += 1
        name = self.name if self.written <= self.stop_at else "another/teacher"
        return 200, {"id": "1", "model": name, "choices": ANSWERED[asked_for]}

    def _choice(self, index, ids, most, sampling, body):
        prompt = torch.tensor([ids])
        options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": most, **sampling}
        tokens = self.model.generate(prompt, **options)[0, len(ids) :].tolist()
        end = self.tokenizer.eos_token_id
        reason = "stop" if end in tokens else "length"
        rows = self._log_probs(ids + tokens)[len(ids) - 1 : -1]
        values = rows[range(len(tokens)), tokens].tolist()
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        given = body.get("logprobs")
        if "prompt" in body:
            return {
                "index": index,
                "text": text,
                "finish_reason": reason,
                "logprobs": {"token_logprobs": values} if given else None,
            }
        content = [{"token": "", "logprob": value, "top_logprobs": []} for value in values]
        message = {"role": "assistant", "content": text or None}
        return {
            "index": index,
            "message": message,
            "finish_reason": reason,
            "logprobs": {"content": content} if given else None,
        }


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory, make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>")
    return write_writer(tmp_path_factory.mktemp("served") / "teacher", tokenizer)


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return AutoModelForCausalLM.from_pretrained(teacher_folder).eval()


@pytest.fixture(scope="module")
def tokenizer(teacher_folder):
    return AutoTokenizer.from_pretrained(teacher_folder)


@pytest.fixture
def write(tmp_path, teacher, tokenizer):
    """Lets a server with these options write; returns the server, and what `load_dataset` reads of the folder."""

    def run(name="cache", rows=ROWS, options=None, fields=None, **more):
        generation = TargetGeneration(**{"max_new_tokens": 30, **(fields or {})})
        more = {"prompt_template": TEMPLATE, "progress": False, "patience": 5.0, **more}
        with WritingServer(teacher, tokenizer, **(options or {})) as server:
            write_targets(server.url, rows, tmp_path / name, generation, **more)
        return server, datasets.load_dataset(str(tmp_path / name))["train"]

    return run


def asked(server):
    """The bodies of requests for answers, without the one that finds out what the server takes."""
    return [body for path, body in server.requests if path != "/v1/models"][1:]


def by_source(rows):
    return {row["source"]: row["target"] for row in rows}


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_answers_and_their_likelihood_are_those_of_the_model(write, teacher, tokenizer, template):
    server, rows = write(prompt_template=template)
    expected = {}
    for row in ROWS:
        text = template.replace("{source}", row["source"]) if template else f"<user>{row['source']}<a>"
        ids = tokenizer(text, return_tensors="pt").input_ids
        tokens = teacher.generate(ids, max_new_tokens=30, do_sample=False)
        answer = tokens[0, ids.shape[1] :]
        if tokenizer.eos_token_id in answer and tokenizer.decode(answer, skip_special_tokens=True).strip():
            with torch.no_grad():
                logits = teacher(tokens).logits[0, ids.shape[1] - 1 : -1]
            text = tokenizer.decode(answer, skip_special_tokens=True)
            expected[row["source"]] = (text, -F.cross_entropy(logits, answer).item())
    assert by_source(rows) == {source: text for source, (text, _) in expected.items()}
    assert 0 < len(expected) < len(ROWS)
    for row in rows:
        assert row["mean_log_prob"] == pytest.approx(expected[row["source"]][1], abs=1e-4)
        assert row["reference"].startswith("Return ")
    path = "/v1/completions" if template else "/v1/chat/completions"
    assert {path for path, _ in server.requests} == {"/v1/models", path}
    assert all((body["temperature"], body["max_tokens"]) == (0.0, 30) for body in asked(server))


def test_the_likeliest_of_several_is_kept(write):
    """Whether the server gives several answers at once or one for each request; twice the same."""
    server, every = write("all", fields={**SAMPLED, "keep": "all"})
    best = {}
    for row in every:
        best.setdefault(row["source"], []).append((row["mean_log_prob"], row["target"]))
    assert {body["n"] for body in asked(server)} == {3} and max(map(len, best.values())) > 1
    _, rows = write("best", fields=SAMPLED)
    assert by_source(rows) == {source: max(answers)[1] for source, answers in best.items()}
    for options in ({"ignores": ("n",)}, {"refuses": ("n",)}):
        name = next(iter(options))
        server, one = write(name, options=options, fields={**SAMPLED, "keep": "all"})
        seeds = [body["seed"] for body in asked(server)[-24:]]
        assert len(set(seeds)) == len(seeds) == 24 and len(one) > len(rows)
    _, other = write("other", fields={**SAMPLED, "seed": 1})
    assert by_source(other) != by_source(rows)


def test_what_a_server_does_not_take_is_left_out(write):
    _, rows = write("whole")
    server, some = write("some", options={"refuses": ("logprobs", "max_tokens")})
    assert by_source(some) == by_source(rows) and set(some["mean_log_prob"]) == {None}
    assert all("logprobs" not in body and body["max_completion_tokens"] == 30 for body in asked(server)[-len(ROWS) :])
    with pytest.raises(ValueError, match="gives no log-probabilities .* keep 'closest' or 'all'"):
        write("likeliest", options={"refuses": ("logprobs",)}, fields=SAMPLED)
    write("closest", options={"refuses": ("logprobs", "seed")}, fields={**SAMPLED, "keep": "closest"})
    with pytest.raises(ValueError, match="refuses /v1/completions.*'temperature' is not supported"):
        write("none", options={"refuses": ("temperature",)})


def test_a_row_is_answered_once(write, tmp_path, monkeypatch):
    """Ctrl-C in the fourth answer; then the rows that are on disk are not asked again."""
    _, whole = write("whole")
    read, answers = served_targets.rows_of, []

    def stop(request, answers_of_row, counts):
        answers.append(request.key)
        if len(answers) == 4:
            raise KeyboardInterrupt
        return read(request, answers_of_row, counts)

    with monkeypatch.context() as patch:
        patch.setattr(served_targets, "rows_of", stop)
        with pytest.raises(KeyboardInterrupt):
            write()
    server, rows = write()
    assert by_source(rows) == by_source(whole) and len(asked(server)) == len(ROWS) - 3
    server, rows = write()
    assert by_source(rows) == by_source(whole) and not asked(server)
    with pytest.raises(ValueError, match="captured with generation=.*'max_new_tokens': 30.*'max_new_tokens': 31"):
        write(fields={"max_new_tokens": 31})


def test_another_model_at_the_same_address_is_found_out(write, tmp_path):
    with pytest.raises(
        ValueError, match="answers as 'another/teacher', before as 'toy/teacher'.*with the source 'def"
    ):
        write(options={"stop_at": 4}, requests=1)
    kept = [datasets.Dataset.from_parquet(str(file)) for file in (tmp_path / "cache").glob("*.parquet")]
    assert sum(map(len, kept)) == 3  # the first of the four only told what the server takes
    with pytest.raises(ValueError, match="captured with generation=.*toy/teacher.*another/teacher"):
        write(options={"stop_at": 0})


def test_a_student_learns_them_without_a_teacher(write, tmp_path, teacher_folder, tokenizer):
    _, rows = write()
    cache = CachedTeacher(tmp_path / "cache")
    assert cache.has_targets_only and len(cache) == 0 and cache.manifest["teacher"] == "toy/teacher"
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher_folder, encoder_num_hidden_layers=3, decoder_num_hidden_layers=2, prompt_template=TEMPLATE
    )
    losses = []
    for source in (tmp_path / "cache", teacher_folder):
        trainer = DistillationTrainer(
            student,
            arguments(tmp_path, prompt_template=TEMPLATE, distill_weight=0.0, max_steps=1),
            teacher=source,
            train_dataset=rows,
            eval_dataset=rows,
        )
        losses.append(trainer.evaluate())
    of_targets, of_model = losses
    assert of_targets["eval_loss"] == of_targets["eval_ce_loss"] == pytest.approx(of_model["eval_ce_loss"])
    assert not {"eval_distill_loss", "eval_teacher_agreement"} & of_targets.keys()
    with pytest.raises(
        ValueError, match="distill_weight=0.5: .* that 'toy/teacher' wrote and no distributions.*--dataset"
    ):
        DistillationTrainer(
            student,
            arguments(tmp_path, prompt_template=TEMPLATE, distill_weight=0.5),
            teacher=tmp_path / "cache",
            train_dataset=rows,
        )


def test_jobs_share_the_rows(write, tmp_path):
    _, whole = write("whole")
    for index in range(2):
        write("shared", num_shards=2, index=index)
        write(f"part-{index}", num_shards=2, index=index)
    merge_caches([tmp_path / "part-0", tmp_path / "part-1"], tmp_path / "merged")
    for name in ("shared", "merged"):
        assert by_source(datasets.load_dataset(str(tmp_path / name))["train"]) == by_source(whole)


def test_conversations_go_as_they_are(write):
    system = {"role": "system", "content": "Be short."}
    rows = [
        {"messages": [system, {"role": "user", "content": row["source"]}, {"role": "assistant", "content": "Yes."}]}
        for row in ROWS
    ]
    server, written = write(rows=datasets.Dataset.from_list(rows), prompt_template=None)
    sent = [body["messages"] for body in asked(server)]  # side by side, so in any order
    assert sorted(sent, key=str) == sorted((row["messages"][:2] for row in rows), key=str)
    for row in written:
        assert row["messages"][0] == system and row["reference"] == "Yes."
        assert row["messages"][-1]["role"] == "assistant" and row["messages"][-1]["content"] != "Yes."
    with pytest.raises(ValueError, match="chat messages with a prompt_template"):
        write("none", rows=rows)


def test_what_cannot_be_is_said_before_anything_is_asked(write):
    for fields, more, message in (
        ({"num_beams": 2}, {}, "num_beams=2: a server gives no beams"),
        ({}, {"prompt_template": "no place"}, "has no {source}"),
        ({}, {"num_shards": 2, "index": 2}, "shard 2 of 2"),
        ({}, {"rows": [{"input_ids": [1], "labels": [2]}]}, "a teacher writes texts"),
        ({**SAMPLED, "keep": "closest"}, {"rows": [{"source": "x"}]}, "compares with a reference"),
    ):
        with pytest.raises(ValueError, match=message):
            write("none", fields=fields, **more)


def test_the_command_and_the_key(tmp_path, teacher, tokenizer, monkeypatch, capsys):
    """`cache --generate --server`; the key is in no file, and the address in none either."""
    monkeypatch.setenv(API_KEY, "sk-of-this-test")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    words = ["--dataset", str(tmp_path / "rows.jsonl"), "--splits", "train", "--output", str(tmp_path / "cache")]
    words += ["--prompt-template", TEMPLATE, "--max-target-length", "30", "--json"]
    with WritingServer(teacher, tokenizer, key="sk-of-this-test") as server:
        assert main(["cache", "toy/teacher", "--generate", "--server", server.url, *words]) == 0
        said = capsys.readouterr()
        monkeypatch.setenv(API_KEY, "sk-wrong")
        assert main(["cache", "toy/teacher", "--generate", "--server", server.url, *words]) != 0
    rows = datasets.load_dataset(str(tmp_path / "cache"))["train"]
    assert json.loads(said.out)["rows"] == json.loads(said.out)["captured_rows"] == len(rows) > 0
    refused = capsys.readouterr()
    assert "does not accept the API key" in refused.err + refused.out
    for file in (tmp_path / "cache").iterdir():
        assert b"sk-" not in file.read_bytes() and server.url.encode() not in file.read_bytes()


@pytest.mark.parametrize("template", [None, "{source}"])
def test_our_own_server(tmp_path, make_bpe_tokenizer, template):
    """`serve` gives one answer to a request and no log-probabilities; its answers are those of the model."""
    torch.manual_seed(0)
    tokenizer = make_bpe_tokenizer(chat_template=None)
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    student = make_model("merged", vocab_size=len(tokenizer), decoder_start_token_id=1, **tokens)
    with torch.no_grad():
        student.get_output_embeddings().weight[tokenizer.eos_token_id] *= 4
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    server = serve.make_server(serve.load_service(str(tmp_path / "student"), 30), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url, more = f"http://127.0.0.1:{server.server_port}/v1", {"prompt_template": template, "progress": False}
        write_targets(url, ROWS, tmp_path / "cache", TargetGeneration(max_new_tokens=30), **more)
    finally:
        server.shutdown()
        server.server_close()
    expected = {}
    for row in ROWS:
        ids = tokenizer(row["source"], return_tensors="pt")["input_ids"]
        written = student.generate(input_ids=ids, max_new_tokens=30, do_sample=False, **tokens)[0, 1:]
        text = tokenizer.decode(written, skip_special_tokens=True).lstrip()
        if tokenizer.eos_token_id in written and text.strip():
            expected[row["source"]] = text
    assert by_source(datasets.load_dataset(str(tmp_path / "cache"))["train"]) == expected != {}
