"""Teachers on a server: against the same weights here, and with everything that goes wrong on the way."""

import json
import logging
import math
import socket
import subprocess
import sys
import time
import traceback

import datasets
import numpy as np
import pytest
import torch
from distillation_toys import arguments, make_t5, make_teacher, ragged_rows, write_pairs, write_teacher
from teacher_server import KEY, Fault, TeacherServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_encdec_distill import DistillationTrainer
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.distillation import CachedTeacher, LiveTeacher, ServedTeacher, TargetGeneration, capture
from hf_encdec_distill.distillation.alignment.vocabularies import SharedVocabulary
from hf_encdec_distill.distillation.teachers import http_client, served
from hf_encdec_distill.distillation.teachers.wire import log_tail, top_k
from hf_encdec_distill.distillation.teachers.workers import merge_caches
from hf_encdec_distill.export.gguf import write_decoder_only


ROWS = ragged_rows(13)
TEXTS = [{"source": f"def f{n}(a): return {n} + a", "target": f"Return {n} and a."} for n in range(9)]
KINDS = ("vllm", "sglang")


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.delenv(http_client.API_KEY, raising=False)


@pytest.fixture(autouse=True)
def _quick_pauses(monkeypatch):
    monkeypatch.setattr(http_client, "_LONGEST_WAIT", 0.02)


@pytest.fixture(params=KINDS)
def server(request, tokenizer):
    with TeacherServer(make_teacher(), tokenizer, request.param) as server:
        yield server


@pytest.fixture
def vllm(tokenizer):
    with TeacherServer(make_teacher(), tokenizer) as server:
        yield server


def ask_for(server, tokenizer, **options):
    return ServedTeacher(server.url, tokenizer, **{"k": 8, "patience": 60.0, **options})


# What it predicts ----------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_model(server, tokenizer):
    """Padding on either side, positions with gaps, the last one too."""
    ids = torch.tensor([[0, 0, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    rows, columns = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 4, 5, 1, 2])
    found = ask_for(server, tokenizer).scores(ids, mask, rows, columns, SharedVocabulary(280, 280))
    for number, (row, column) in enumerate(zip(rows, columns)):
        read = ids[row, : column + 1][mask[row, : column + 1].bool()]
        log_probs = torch.log_softmax(server.model(read[None]).logits[0, -1].double(), dim=-1)
        values, best = log_probs.topk(8)
        assert found.ids[number].tolist() == best.tolist()
        torch.testing.assert_close(found.log_probs[number].double(), values, atol=1e-5, rtol=0)
        rest = log_probs.index_fill(0, best, -math.inf).logsumexp(dim=0)
        torch.testing.assert_close(found.tail[number].double(), rest, atol=1e-5, rtol=0)


def test_a_tail_is_guarded_against_rounding():
    log_probs = np.log(np.array([[0.5, 0.25], [0.75, 0.25], [0.75 + 1e-7, 0.25]], dtype=np.float32))
    tail = log_tail(log_probs, vocab_size=9)
    assert tail[0] == pytest.approx(math.log(0.25), abs=1e-6)
    assert tail[1] == tail[2] == pytest.approx(math.log(2 * 2**-24))
    assert np.isneginf(log_tail(log_probs, vocab_size=2)).all()


def test_a_served_record_equals_a_local_one(server, tokenizer, tmp_path):
    """And trains to the same loss. With SGD: AdamW's first step divides by the gradient, rounding errors included."""
    losses = []
    settings = {"distill_weight": 1.0, "max_steps": 3, "logging_steps": 3, "learning_rate": 0.1, "optim": "sgd"}
    for name, teacher in {"local": LiveTeacher(server.model), "served": ask_for(server, tokenizer)}.items():
        options = {} if name == "served" else {"k": 8}
        assert capture(teacher, ROWS, tmp_path / name, tokenizer, progress=False, **options) == len(ROWS)
        trainer = DistillationTrainer(
            make_t5(),
            arguments(tmp_path / f"{name}-out", **settings),
            train_dataset=ROWS,
            processing_class=tokenizer,
            teacher=str(tmp_path / name),
            teacher_processing_class=tokenizer,
        )
        losses.append(trainer.train().training_loss)
    local, remote = (_rows(tmp_path / name) for name in ("local", "served"))
    assert local.keys() == remote.keys()
    for key, row in local.items():
        other = remote[key]
        assert row["ids"].tolist() == other["ids"].tolist()
        np.testing.assert_allclose(row["log_probs"], other["log_probs"], atol=1e-5)
        np.testing.assert_allclose(row["tail"], other["tail"], atol=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_text_rows_and_another_vocabulary_size(vllm, tokenizer, tmp_path):
    """The model has more ids than its tokenizer, as most have."""
    teacher = ask_for(vllm, tokenizer, vocab_size=280)
    capture(teacher, TEXTS, tmp_path / "served", tokenizer, progress=False)
    capture(LiveTeacher(vllm.model), TEXTS, tmp_path / "local", tokenizer, k=8, progress=False)
    served, local = (CachedTeacher(tmp_path / name) for name in ("served", "local"))
    assert served._keys.tolist() == local._keys.tolist() and len(served) == len(TEXTS)


# Training with it ----------------------------------------------------------------------------------------------------


def train(server, tokenizer, folder, teacher=None, rows=ROWS, **changed):
    settings = {"distill_weight": 0.8, "num_train_epochs": 1, "learning_rate": 0.1, "optim": "sgd"}
    trainer = DistillationTrainer(
        make_t5(),
        arguments(folder, **{"per_device_train_batch_size": 3, **settings, **changed}),
        train_dataset=rows,
        eval_dataset=rows[:5],
        processing_class=tokenizer,
        teacher=teacher or server.url,
        teacher_processing_class=tokenizer,
    )
    trainer.train()
    return trainer, trainer.evaluate()


def test_training_from_a_server_is_training_from_its_record(vllm, tokenizer, tmp_path):
    """With accumulation, evaluation in between and at the end; each row is asked about once each time it is used."""
    capture(ask_for(vllm, tokenizer, k=20), ROWS, tmp_path / "cache", tokenizer, progress=False)
    begun = len(vllm.scored)
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "num_train_epochs": 2}
    live, found = train(vllm, tokenizer, tmp_path / "a", **options)
    asked = len(vllm.scored) - begun - len(live.teacher._probes)
    recorded, expected = train(vllm, tokenizer, tmp_path / "b", teacher=str(tmp_path / "cache"), **options)
    evaluations = sum("eval_loss" in entry for entry in live.state.log_history)
    assert asked == 2 * len(ROWS) + evaluations * 5
    losses = ([x["loss"] for x in t.state.log_history if "loss" in x] for t in (live, recorded))
    assert next(losses) == pytest.approx(next(losses), rel=1e-4)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    assert found["eval_teacher_agreement"] == expected["eval_teacher_agreement"]
    assert not live.teacher._asked


def test_the_next_batch_is_asked_for_while_the_student_steps(vllm, tokenizer, tmp_path):
    before = []

    class Watching(DistillationTrainer):
        def training_step(self, *args, **kwargs):
            under_way = set(self.teacher._asked)
            before.append((self.state.global_step, len(under_way)))
            return super().training_step(*args, **kwargs)

    trainer = Watching(
        make_t5(),
        arguments(tmp_path, distill_weight=1.0, per_device_train_batch_size=3, num_train_epochs=1),
        train_dataset=ROWS[:9],
        processing_class=tokenizer,
        teacher=vllm.url,
        teacher_processing_class=tokenizer,
    )
    trainer.train()
    assert before == [(0, 6), (1, 6), (2, 3)]  # this batch and the next; there is none after the last


def test_on_policy_steps_are_scored_on_the_server(vllm, tokenizer, tmp_path):
    """And what the student wrote, never the rows that it would have learnt from otherwise."""
    trainer, _ = train(vllm, tokenizer, tmp_path, on_policy_fraction=1.0, max_target_length=6, max_steps=3)
    targets = {tuple(row["input_ids"] + row["labels"]) for row in ROWS}
    asked = {tuple(ids) for ids in vllm.scored[len(trainer.teacher._probes) :]}
    evaluated = {tuple(row["input_ids"] + row["labels"]) for row in ROWS[:5]}
    assert asked & targets == evaluated and len(asked) > len(evaluated)
    assert all("ce_loss" not in entry for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"distill_temperature": 2.0}, "distill_temperature=2.0 .* at temperature 1 only"),
        ({"vocab_policy": "universal"}, "vocab_policy='universal' compares all probabilities"),
        ({"hidden_state_weight": 0.1}, "hidden_state_weight=0.1 with a teacher on a server"),
        ({"teacher_dtype": "bfloat16"}, "teacher_dtype='bfloat16'.* on a server, which decides that"),
    ],
)
def test_what_a_server_cannot_give_is_refused(options, problem, vllm, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=problem):
        train(vllm, tokenizer, tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"kind": "dense"}, "kind='dense' needs the whole distribution"),
        ({"kind": "sampled"}, "kind='sampled' needs the whole distribution"),
        ({"temperature": 1.5}, "temperature 1 only"),
        ({"k": 5}, "k=5, but the server is asked for 8"),
        ({"generation": TargetGeneration()}, "let the server write the targets"),
    ],
)
def test_what_cannot_be_captured_is_refused(options, problem, vllm, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=problem):
        capture(ask_for(vllm, tokenizer), ROWS, tmp_path / "cache", tokenizer, progress=False, **options)
    assert not (tmp_path / "cache").exists()


# What is found out at the start --------------------------------------------------------------------------------------


def test_it_knows_whom_it_asks(server, tokenizer):
    teacher = ask_for(server, tokenizer)
    assert teacher.software == {"vllm": "vllm 0.33.0", "sglang": "sglang 0.5.23"}[server.kind]
    longest = {"vllm": 511, "sglang": 505}[server.kind]
    assert (teacher.model, teacher.max_positions, teacher.k) == ("toy/teacher", longest, 8)
    ids = torch.randint(5, 90, (1, longest))
    where = torch.tensor([0]), torch.tensor([longest - 2])
    assert len(teacher.scores(ids, torch.ones_like(ids), *where, SharedVocabulary(280, 280)).ids) == 1
    long = torch.ones(1, longest + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=f"{longest + 1} tokens of prompt and target, .* server has .* {longest}"):
        teacher.ask(long, long, torch.tensor([0]), torch.tensor([3]))


def test_a_token_that_no_teacher_has_is_never_sent(server, tokenizer, tmp_path):
    teacher = ask_for(server, tokenizer)
    wrong = {**ROWS[3], "input_ids": [*ROWS[3]["input_ids"], 280]}
    for run in (
        lambda: capture(teacher, [wrong], tmp_path, tokenizer, progress=False),
        lambda: train(server, tokenizer, tmp_path / "run", teacher=teacher, rows=[wrong]),
    ):
        with pytest.raises(ValueError, match="hold id 280, but the teacher has 280 ids"):
            run()
    assert server.scored and not any(280 in ids for ids in server.scored)


def test_more_log_probabilities_than_vllm_gives(vllm, tokenizer):
    with pytest.raises(ValueError, match=r"max allowed: 20\. If that .* --max-logprobs 32, or ask for fewer"):
        ask_for(vllm, tokenizer, k=32)


@pytest.mark.parametrize("owner", ["me", "llamacpp-like", "Qwen"])
def test_servers_without_log_probabilities_of_prompts_are_refused(owner, tokenizer):
    problem = f"it is of '{owner}'.*cache --generate --server"
    with TeacherServer(make_teacher(), tokenizer, owner) as server, pytest.raises(ValueError, match=problem):
        ask_for(server, tokenizer)


def test_another_tokenizer_is_noticed(server, tokenizer, make_bpe_tokenizer):
    """One more token in front, two ids exchanged, and texts that are cut otherwise."""
    shifted = make_bpe_tokenizer()
    shifted.add_tokens(["committee"])
    with pytest.raises(ValueError, match="the tokenizer of the server .* give the tokenizer of the model"):
        ask_for(server, shifted)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["q"], vocabulary["z"] = vocabulary["z"], vocabulary["q"]  # letters of no probe
    exchanged = make_bpe_tokenizer()
    exchanged._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
    with pytest.raises(ValueError, match="stand for other texts than those of the tokenizer here"):
        ask_for(server, exchanged)


def test_a_server_that_hides_its_tokenizer(vllm, tokenizer, monkeypatch):
    monkeypatch.setattr(vllm, "_dispatch", _without(vllm, "/detokenize"))
    with pytest.raises(ValueError, match="let /tokenize and /detokenize through"):
        ask_for(vllm, tokenizer)


def _without(server, hidden):
    dispatch = server._dispatch
    return lambda path, body: (404, {"detail": "Not Found"}) if path == hidden else dispatch(path, body)


def test_logits_in_place_of_log_probabilities_are_noticed(vllm, tokenizer):
    """vLLM's --logprobs-mode raw_logits."""
    vllm._log_probs = lambda ids: vllm.model(torch.tensor([ids])).logits[0].detach() * 3
    with pytest.raises(ValueError, match="--logprobs-mode raw_logprobs"):
        ask_for(vllm, tokenizer)


def test_nobody_there(tokenizer, monkeypatch):
    monkeypatch.setattr(served, "_PATIENCE_AT_START", 0.2)
    with pytest.raises(OSError, match="gave no answer to /v1/models within 0 s: ConnectError"):
        ServedTeacher("http://127.0.0.1:9", tokenizer)


# What goes wrong on the way ------------------------------------------------------------------------------------------


FAULTS = {
    "busy": Fault(status=429, retry_after="0.01"),
    "an error": Fault(status=500, times=2),
    "restarting": Fault(status=503, times=3),
    "cut": Fault(cut=True),
    "half a JSON": Fault(body='{"model": "toy/teacher", "choices": [{"prompt_log'),
    "a web page": Fault(body="<html>Bad gateway</html>"),
    "nothing of it": Fault(body="{}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_faults_cost_nothing(fault, server, tokenizer, tmp_path):
    teacher = ask_for(server, tokenizer)
    server.faults.append(Fault(**vars(FAULTS[fault])))
    assert capture(teacher, ROWS, tmp_path, tokenizer, progress=False) == len(ROWS)
    assert not server.faults
    assert len(CachedTeacher(tmp_path)) == len(ROWS)


def test_an_answer_that_does_not_come_is_asked_for_again(vllm, tokenizer, tmp_path):
    teacher = ask_for(vllm, tokenizer, timeout=1.0)
    vllm.faults.append(Fault(hang=2.0))
    assert capture(teacher, ROWS[:3], tmp_path, tokenizer, progress=False) == 3


def test_retry_after_is_kept_to(vllm, tokenizer):
    teacher = ask_for(vllm, tokenizer)
    vllm.faults.append(Fault(status=429, retry_after="1"))
    begin = time.monotonic()
    teacher.confirm()
    assert time.monotonic() - begin >= 1.0


def nan_of_vllm(answer):
    next(iter(answer["choices"][0]["prompt_logprobs"][-1].values()))["logprob"] = math.nan
    return answer


def null_of_vllm(answer):
    next(iter(answer["choices"][0]["prompt_logprobs"][-1].values()))["logprob"] = None
    return answer


def one_position_less(answer):
    answer["choices"][0]["prompt_logprobs"].pop()
    return answer


def shifted_by_one(answer):
    predicted = answer["choices"][0]["prompt_logprobs"]
    predicted.insert(1, predicted.pop())
    return answer


def beyond_the_vocabulary(answer):
    answer["choices"][0]["prompt_logprobs"][-1]["999"] = {"logprob": -0.0001}
    return answer


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (nan_of_vllm, "not finite"),
        (null_of_vllm, "not finite"),
        (one_position_less, "prompt_logprobs for .* tokens, expected"),
        (shifted_by_one, "without the prompt's token"),
        (beyond_the_vocabulary, "token 999, expected ids of 280 tokens"),
    ],
)
def test_wrong_answers_are_never_kept(broken, problem, vllm, tokenizer, tmp_path):
    """Twice they may come; a third time they end the capture, and it goes on where it was."""
    teacher = ask_for(vllm, tokenizer, vocab_size=280, requests=1)
    vllm.faults.append(Fault(times=2, broken=broken))
    capture(teacher, ROWS[:4], tmp_path, tokenizer, progress=False)
    vllm.faults.append(Fault(times=99, broken=broken))
    with pytest.raises(ValueError, match=problem):
        capture(teacher, ROWS, tmp_path, tokenizer, progress=False)
    vllm.faults.clear()
    assert len(CachedTeacher(tmp_path)) == 4
    assert capture(teacher, ROWS, tmp_path, tokenizer, progress=False) == len(ROWS) - 4


@pytest.mark.parametrize(
    "broken",
    [
        lambda meta: meta["input_top_logprobs"][-1][0].__setitem__(0, None),
        lambda meta: meta["input_top_logprobs"].pop(),
        lambda meta: meta["input_token_logprobs"][-1].__setitem__(1, 5),
    ],
)
def test_wrong_answers_of_sglang(broken, tokenizer, tmp_path):
    def break_it(answer):
        broken(answer["meta_info"])
        return answer

    with TeacherServer(make_teacher(), tokenizer, "sglang") as server:
        teacher = ask_for(server, tokenizer)
        server.faults.append(Fault(times=99, broken=break_it))
        with pytest.raises(http_client.BadAnswer):
            teacher.confirm()
        server.faults.clear()
        teacher.confirm()


def test_many_rows_at_once_and_never_more(vllm, tokenizer, tmp_path):
    vllm.delay = 0.02
    capture(ask_for(vllm, tokenizer, requests=4), ragged_rows(40), tmp_path, tokenizer, progress=False)
    assert vllm.most_at_once == 4


LLAMA_CPP = """
import sys, xllamacpp
options = xllamacpp.CommonParams()
options.model.path, options.n_ctx, options.n_parallel = sys.argv[1], 1024, 2
options.cpuparams.n_threads, options.warmup, options.verbosity, options.port = 1, False, -1, int(sys.argv[2])
server = xllamacpp.Server(options)
print("ADDRESS", server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def llama_cpp(make_bpe_tokenizer, tmp_path):
    """llama.cpp's server, with a toy: its address, and the toy."""
    folder = write_teacher(tmp_path / "toy", make_bpe_tokenizer(), layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.tokenizer = AutoTokenizer.from_pretrained(folder)
    write_decoder_only(model, tmp_path / "toy.gguf", "fp32")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-c", LLAMA_CPP, str(tmp_path / "toy.gguf"), str(port)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        address = next(line.split()[1] for line in server.stdout if line.startswith("ADDRESS"))
        yield address, model
        server.kill()


@pytest.mark.process
def test_a_capture_from_llama_cpp_is_a_local_one(llama_cpp, tmp_path):
    """To what its keys and values in float16 leave. Its probes make it draw parts of characters, of which it is
    silent unless a letter is drawn instead."""
    address, model = llama_cpp
    teacher = ServedTeacher(address, model.tokenizer, k=8, vocab_size=model.config.vocab_size, requests=2)
    assert teacher.software.startswith("llamacpp") and teacher.max_positions == 511
    rows = ragged_rows(8)
    assert capture(teacher, rows, tmp_path / "served", model.tokenizer, progress=False) == 8
    capture(LiveTeacher(model), rows, tmp_path / "local", model.tokenizer, k=8, progress=False)
    served, local = (_rows(tmp_path / name) for name in ("served", "local"))
    assert served.keys() == local.keys()
    for key, row in served.items():
        np.testing.assert_allclose(row["log_probs"], local[key]["log_probs"], atol=5e-3)
        np.testing.assert_allclose(row["tail"], local[key]["tail"], atol=5e-3)
        firsts = [np.asarray(one["ids"])[::8] for one in (row, local[key])]
        assert (firsts[0] == firsts[1]).mean() > 0.7  # of two that are as likely, either


# Another model behind the same address -------------------------------------------------------------------------------


def change_weights(server):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in server.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def test_another_model_half_way_is_noticed_before_its_rows_are_kept(server, tokenizer, tmp_path):
    teacher = ask_for(server, tokenizer, requests=2)
    teacher.rows_per_comparison = 4
    rows, scored = ragged_rows(40), server._log_probs

    def changing(ids):
        if len(server.requests) > 30 and server.most_at_once:
            server._log_probs = scored
            change_weights(server)
        return scored(ids)

    server._log_probs = changing
    with pytest.raises(ValueError, match="does not predict what it did: .* another model"):
        capture(teacher, rows, tmp_path / "cache", tokenizer, progress=False, batch_size=2)
    kept = CachedTeacher(tmp_path / "cache")
    assert 0 < len(kept) < 30
    server.model.load_state_dict(make_teacher().state_dict())
    assert capture(teacher, rows, tmp_path / "cache", tokenizer, progress=False) == len(rows) - len(kept)
    capture(LiveTeacher(make_teacher()), rows, tmp_path / "local", tokenizer, k=8, progress=False)
    found, expected = (_rows(tmp_path / name) for name in ("cache", "local"))
    assert found.keys() == expected.keys()
    for key, row in found.items():
        np.testing.assert_allclose(row["log_probs"], expected[key]["log_probs"], atol=1e-5)


@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_a_training_ends_where_the_model_is_another(on_policy, vllm, tokenizer, tmp_path):
    teacher = ask_for(vllm, tokenizer)
    teacher.rows_per_comparison = 5
    options = {"teacher": teacher, "max_steps": 4, "on_policy_fraction": on_policy, "max_target_length": 6}
    train(vllm, tokenizer, tmp_path / "same", **options)
    change_weights(vllm)
    with pytest.raises(ValueError, match="does not predict what it did: .* another model"):
        train(vllm, tokenizer, tmp_path / "other", **options)


def test_a_row_that_is_asked_about_ahead_counts_once(vllm, tokenizer, tmp_path, monkeypatch):
    teacher, compared = ask_for(vllm, tokenizer), []
    teacher.rows_per_comparison = 6
    monkeypatch.setattr(teacher, "confirm", lambda: compared.append(1))
    train(vllm, tokenizer, tmp_path, teacher=teacher)
    assert len(compared) == (len(ROWS) + len(ROWS[:5])) // 6


def test_only_captures_of_one_model_are_merged(vllm, tokenizer, tmp_path):
    rows = ragged_rows(12)
    for index in range(2):
        shard = {"num_shards": 2, "index": index, "progress": False}
        capture(ask_for(vllm, tokenizer), rows, tmp_path / f"{index}", tokenizer, **shard)
    merge_caches([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    assert len(CachedTeacher(tmp_path / "merged")) == 12
    change_weights(vllm)
    capture(ask_for(vllm, tokenizer), rows, tmp_path / "other", tokenizer, progress=False)
    with pytest.raises(ValueError, match="or there was another model under that name"):
        merge_caches([tmp_path / "0", tmp_path / "other"], tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def _rows(folder):
    return {row["key"]: row for row in CachedTeacher(folder).records}


def test_a_cache_is_not_gone_on_with_by_another_model(vllm, tokenizer, tmp_path):
    capture(ask_for(vllm, tokenizer), ROWS[:4], tmp_path, tokenizer, progress=False)
    change_weights(vllm)
    with pytest.raises(ValueError, match="does not predict what it did"):
        capture(ask_for(vllm, tokenizer), ROWS, tmp_path, tokenizer, progress=False)
    vllm.name = "other/model"
    with pytest.raises(ValueError, match="is of the model 'toy/teacher', and the server .* has 'other/model'"):
        capture(ask_for(vllm, tokenizer), ROWS, tmp_path, tokenizer, progress=False)
    with pytest.raises(ValueError, match="was captured from a teacher on a server, and this one is not"):
        capture(LiveTeacher(make_teacher()), ROWS, tmp_path, tokenizer, k=8, progress=False)
    assert len(CachedTeacher(tmp_path)) == 4


def test_the_noise_of_bfloat16_is_no_other_model(vllm, tokenizer):
    teacher = ask_for(vllm, tokenizer)
    vllm.model.bfloat16()
    teacher.confirm()


def test_answers_name_the_model(vllm, tokenizer):
    teacher = ask_for(vllm, tokenizer)
    vllm.faults.append(Fault(broken=lambda answer: {**answer, "model": "other/model"}))
    with pytest.raises(ValueError, match="'other/model' answers in place of 'toy/teacher'"):
        teacher.confirm()


# What nobody is to read ----------------------------------------------------------------------------------------------


def test_the_key_is_nowhere(tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(http_client.API_KEY, KEY)
    caplog.set_level(logging.DEBUG)
    with TeacherServer(make_teacher(), tokenizer, name="/data/private/teacher", key=KEY) as server:
        teacher = ask_for(server, tokenizer, patience=0.5)
        capture(teacher, ROWS, tmp_path / "cache", tokenizer, progress=False)
        said = [repr(teacher), repr(teacher._client), str(vars(teacher))]
        for fault in (
            Fault(times=99, status=500),
            Fault(times=99, body=f"Invalid key {KEY}"),
            Fault(times=99, broken=lambda answer: {"error": f"not {KEY}"}),
            Fault(times=99, cut=True),
        ):
            server.faults = [fault]
            with pytest.raises((OSError, ValueError)) as error:
                teacher.confirm()
            said.append("".join(traceback.format_exception(error.value)))
        server.faults = []
        server.key = "sk-another"
        with pytest.raises(ValueError, match=r"does not accept the API key .*HF_ENCDEC_TEACHER_API_KEY") as error:
            teacher.confirm()
        said.append("".join(traceback.format_exception(error.value)))
        port = str(server.port)
    files = {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert not any(KEY in text for text in [*said, caplog.text])
    assert not [file for file, content in files.items() if KEY.encode() in content]
    # What is on the Hub does not say where in a private network the server was, nor where on it the model.
    assert not [file for file, content in files.items() if b"127.0.0.1" in content or b"/data/private" in content]
    assert not [file for file in files if file.suffix in (".md", ".json") and f":{port}" in file.read_text()]
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["teacher"] == manifest["server"]["model"] == "teacher"
    assert manifest["server"]["software"] == "vllm 0.33.0"
    assert "vllm 0.33.0, under the name `teacher`" in (tmp_path / "cache" / "README.md").read_text()


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@host:80", "http://host/?key=hunter2", "user:hunter2@host", "http://host#hunter2"]
)
def test_addresses_with_secrets_are_refused_without_saying_them(url, tokenizer):
    with pytest.raises(ValueError) as error:
        ServedTeacher(url, tokenizer)
    assert "hunter2" not in str(error.value)


def test_log_probabilities_that_cannot_be():
    for entries in ([[(0.5, 1), (-1.0, 2)]], [[(-0.1, 1)]], [[(-0.1, -1), (-2.0, 3)]], [[(None, 1), (-2.0, 3)]]):
        with pytest.raises(http_client.BadAnswer):
            top_k(entries, 2, vocab_size=9)
    ids, log_probs = top_k([[(-9999.0, 7), (-0.1, 1), (-3.0, 2)]], 3, vocab_size=9)
    assert ids.tolist() == [[1, 2, 7]] and np.isneginf(log_probs[0, 2])


# Commands ------------------------------------------------------------------------------------------------------------


def test_commands(make_bpe_tokenizer, tmp_path, capsys):
    """`cache --server` and `distill --teacher URL`; neither reads the weights, which are not there."""
    folder = write_teacher(tmp_path / "teacher", make_bpe_tokenizer(), layers=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation"):
        write_pairs(data / f"{split}.csv", 5)
    make_t5().save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    columns = ["--dataset", str(data), "--source-column", "text", "--target-column", "short"]
    with TeacherServer(model, tokenizer) as server:
        words = ["cache", str(folder), "--server", server.url, "--k", "8", "--requests", "4", *columns]
        assert main([*words, "--output", str(tmp_path / "cache"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["captured_rows"] == 5  # the splits have the same rows
        for extra, problem in (
            (["--teacher-dtype", "float16"], "--server, which decides that"),
            (["--k", "40"], "--k"),
        ):
            assert main([*words, *extra, "--output", str(tmp_path / "other")]) != 0
            assert problem in capsys.readouterr().err
        run = ["distill", str(tmp_path / "student"), "--output", str(tmp_path / "out"), *columns, "--max-steps", "2"]
        run += [
            "--teacher",
            server.url,
            "--teacher-tokenizer",
            str(folder),
            "--report-to",
            "none",
            "--use-cpu",
            "true",
        ]
        assert main(run) == 0
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["fingerprints"]["teacher"] == {"server": "toy/teacher"}
    assert "toy/teacher" in (tmp_path / "out" / "README.md").read_text()
