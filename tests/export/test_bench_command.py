"""`bench`: contenders answer as transformers does, what is missing is named, and its numbers by hand."""

import argparse
import json
import os
import signal

import pytest
import torch
import transformers
from distillation_toys import spread
from packaging.version import Version
from toys import make_config, make_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.bench import contenders as registry
from hf_encdec_distill.bench import model_cost, race
from hf_encdec_distill.bench.contenders import Model, contender_of, contenders
from hf_encdec_distill.bench.contenders.ctranslate2 import CTranslate2
from hf_encdec_distill.bench.contenders.llama_cpp import LlamaCppDecoderOnly
from hf_encdec_distill.bench.contenders.onnxruntime_genai import OnnxRuntimeGenAi
from hf_encdec_distill.bench.floors import counted, floor, measure_rates
from hf_encdec_distill.bench.race import Request, _Bench, _size, check_answer, plan
from hf_encdec_distill.bench.results import VERSION, check_against, compare, headlines, read_report
from hf_encdec_distill.bench.worker import Failed, Worker
from hf_encdec_distill.cli import bench
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.models.decoder_only import config_of_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_bpe_tokenizer):
    """A teacher, and a student of it, `merged`, whose prompts end in its start token."""
    folder = tmp_path_factory.mktemp("bench")
    tokenizer = make_bpe_tokenizer(pad_token="<|endoftext|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    teacher = spread(LlamaForCausalLM(config), std=0.3)
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher,
        tokenizer=tokenizer,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        layer_selection="even",
        heal=None,
    )
    student.save_pretrained(folder / "student")
    return folder


def model(folder, name):
    from hf_encdec_distill.models.loading import load_config

    return Model(name, folder / name, load_config(folder / name))


def find(folder, name, backend, precision):
    return next(
        contender
        for contender in contenders(model(folder, name))
        if (contender.backend, contender.precision) == (backend, precision)
    )


def prompts_for(student, rows=2, length=12):
    """Of ordinary tokens, with the student's start token at the end."""
    ids = torch.randint(4, 260, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = student.decoder_start_token_id
    return ids


# Contenders ----------------------------------------------------------------------------------------------------------


def expected(folder, name, ids, new_tokens):
    """Greedy tokens of transformers' own `generate`, in fp32. No token ends an answer, and none is chosen to."""
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    if name == "student":
        loaded = RopeEncDecForConditionalGeneration.from_pretrained(folder / name).eval()
        ids = ids[:, :-1]
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder / name).eval()
    return loaded.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, -new_tokens:].tolist()


# GenAI's builder wants a newer transformers than 4.57, optimum-intel an older one than 5.6.
OF_THIS_LANE = "onnxruntime-genai" if Version(transformers.__version__) >= Version("5") else "openvino"


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("student", "pytorch"),
        ("student", "onnx"),
        ("student", "openvino"),
        ("student", "gguf"),
        ("teacher", "pytorch"),
        ("teacher", "llama.cpp -fa off"),
        ("teacher", "ctranslate2"),
        ("teacher", OF_THIS_LANE),
    ],
)
def test_a_contender_answers_as_transformers_does(folder, tmp_path, name, backend):
    """In fp32: fewer bits turn a token, and all that follow."""
    if backend == "ctranslate2":
        contender = CTranslate2(name, str(folder / name), backend, "float32")
    else:
        contender = find(folder, name, backend, "fp32")
    assert contender.missing() is None
    contender = contender_of(json.loads(json.dumps(contender.to_dict())))
    (tmp_path / "converted").mkdir()
    contender.prepare(tmp_path / "converted")
    contender.load(tmp_path / "converted", threads=1)
    ids = prompts_for(model(folder, "student").config)
    theirs = expected(folder, name, ids, 8)
    for rows in (ids, ids[:1]):
        tokens, times = contender.answer(rows.tolist(), 8)
        assert all(early < late for early, late in zip([0.0, *times], times, strict=False)) and len(times) == 8
        assert tokens == theirs[: len(rows)]
    assert len({token for row in theirs for token in row}) > 2


def test_llama_cpp_answers_requests_of_all_sizes_one_after_the_other(tmp_path):
    """Sequences share no cells: a long prompt needs those that eight short ones had among them."""
    torch.manual_seed(0)
    teacher = make_llama(1, max_position_embeddings=1024)
    teacher.save_pretrained(tmp_path / "teacher")
    contender = LlamaCppDecoderOnly("teacher", str(tmp_path / "teacher"), "llama.cpp -fa off", "fp32")
    contender.prepare(tmp_path)
    contender.load(tmp_path, threads=1)
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "eos_token_id": None}
    for rows, length in ((8, 16), (1, 600), (8, 16)):
        ids = torch.randint(3, teacher.config.vocab_size, (rows, length))
        theirs = teacher.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, length:].tolist()
        assert contender.answer(ids.tolist(), 8)[0] == theirs


def test_every_target_has_a_contender_of_the_student(folder):
    from hf_encdec_distill.export.backends import targets

    found = contenders(model(folder, "student"))
    assert {contender.backend for contender in found} == {*targets(), "pytorch", "pytorch cuda"}
    assert ("onnx", "int8") in {(contender.backend, contender.precision) for contender in found}


def test_what_people_deploy_is_made_ready_first(folder):
    """So that a bench that is short of time has both sides in 8 bits."""
    from types import SimpleNamespace

    from hf_encdec_distill.cli.bench import _chosen

    found = [contender for name in ("teacher", "student") for contender in contenders(model(folder, name))]
    chosen = _chosen(found, SimpleNamespace(backend="onnx,ctranslate2,pytorch", precision="fp32,int8"))
    assert [(contender.model, contender.backend, contender.precision) for contender in chosen] == [
        ("student", "onnx", "int8"),
        ("teacher", "ctranslate2", "int8"),
        ("student", "onnx", "fp32"),
        ("student", "pytorch", "fp32"),
        ("teacher", "pytorch", "fp32"),
    ]


def test_what_is_missing_is_named(folder, monkeypatch):
    names = {"onnxruntime_genai", "ctranslate2", "optimum.intel", "onnxruntime"}
    real = registry.importlib.util.find_spec
    monkeypatch.setattr(
        registry.importlib.util, "find_spec", lambda name, *more: None if name in names else real(name, *more)
    )
    found = [*contenders(model(folder, "teacher")), *contenders(model(folder, "student"))]
    said = {contender.backend: contender.missing() for contender in found if contender.missing()}
    assert said["ctranslate2"] == "ctranslate2 not installed: pip install ctranslate2"
    assert said["onnxruntime-genai"] == "onnxruntime_genai not installed: pip install onnxruntime-genai"
    assert "hf-encdec-distill[optimum]" in said["openvino"]
    assert said["onnx"].startswith("onnx needs onnxruntime") and "hf-encdec-distill[onnx]" in said["onnx"]
    assert "pytorch" not in said
    if not torch.cuda.is_available():
        assert said["pytorch cuda"] == "no CUDA device here"


# Processes -----------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_worker_has_the_threads_it_is_told_and_its_own_memory(folder):
    contender = find(folder, "student", "pytorch", "fp32")
    ids = prompts_for(model(folder, "student").config, rows=1).tolist()
    with Worker(contender, threads=1) as worker:
        worker.ask("load", folder=str(folder / "student"), threads=1)
        answers = [worker.ask("answer", prompts=ids, new_tokens=4) for _ in range(3)]
        with open(f"/proc/{worker._process.pid}/environ", "rb") as stream:
            environment = stream.read().split(b"\0")
        assert b"OMP_NUM_THREADS=1" in environment and b"OMP_WAIT_POLICY=PASSIVE" not in environment
        # The last one: caches of the first are being filled.
        assert answers[-1]["cores"] < 1.5
        assert answers[-1]["tokens"] == expected(folder, "student", torch.tensor(ids), 4)
        assert 0 < answers[-1]["memory_mb"] < answers[-1]["peak_mb"]
        with pytest.raises(Failed, match="too many dimensions"):
            worker.ask("answer", prompts=[["no token"]], new_tokens=4)
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(Failed, match="SIGKILL"):
            worker.ask("answer", prompts=ids, new_tokens=4)


@pytest.mark.process
def test_the_current_folders_python_files_are_not_asked(folder, tmp_path, monkeypatch):
    """Neither by a worker nor by what converts for it. A `random.py` of the user would break both."""
    (tmp_path / "random.py").write_text("open('asked', 'w')\nraise ImportError('not for you')")
    monkeypatch.chdir(tmp_path)
    with Worker(find(folder, "student", "pytorch", "fp32"), threads=1) as worker:
        worker.ask("load", folder=str(folder / "student"), threads=1)
    (tmp_path / "no_model").mkdir()
    with pytest.raises(ValueError, match="its builder .* failed"):  # once it has imported what it needs
        OnnxRuntimeGenAi("teacher", str(tmp_path / "no_model"), "onnxruntime-genai", "fp32").prepare(tmp_path / "out")
    assert not (tmp_path / "asked").exists()


@pytest.mark.process
def test_rates_that_cannot_be_measured(tmp_path):
    """As where a graphics card is there for the contenders, and not for what measures it."""
    unfinished = _Bench({}, None, tmp_path, 1, 1.0, None)
    said = "what abacus reads and multiplies .* could not be measured: .*--backend"
    with Worker(None, threads=1) as worker, pytest.raises(ValueError, match=said):
        unfinished._rates(worker, "abacus")


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def output(folder):
    """A bench of PyTorch and ONNX with two requests, and with ONNX Runtime GenAI as if it were not installed."""
    words = ["bench", folder / "student", "--teacher", folder / "teacher", "--output", folder / "bench"]
    words += ["--source", "12,16", "--target", "3,4", "--batch", "1,2", "--rounds", 3, "--threads", 1]
    words += ["--backend", "pytorch,onnx,onnxruntime-genai", "--precision", "fp32", "--minutes", 30]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxRuntimeGenAi, "packages", {"no_such_module": "onnxruntime-genai"})
        assert main([str(word) for word in words]) == 0
    return folder / "bench"


@pytest.mark.process
@pytest.mark.export
def test_a_whole_bench(folder, output):
    report = read_report(output / "bench.json")
    assert report["rounds"] == 3 and report["machine"]["threads"] == 1
    rows = report["rows"]
    assert {(row["model"], row["backend"]) for row in rows} == {
        ("student", "onnx"),
        ("student", "pytorch"),
        ("teacher", "pytorch"),
        ("same-size decoder", "pytorch"),
    }
    assert {(row["source"], row["target"], row["batch"]) for row in rows} == {(12, 3, 1), (16, 4, 2)}
    for row in rows:
        assert len(row["measured"]) == 3
        assert 0 < row["first_token_ms"]["value"] < row["request_ms"]["value"]
        assert row["request_ms"]["low"] <= row["request_ms"]["value"] <= row["request_ms"]["high"]
        assert row["requests_per_second"] == pytest.approx(1e3 * row["batch"] / row["request_ms"]["value"])
        assert row["over_floor"]["step_ms"] == pytest.approx(row["step_ms"]["value"] / row["floor"]["step_ms"])
        assert row["disk_mb"] > 0 and row["memory_mb"] > 0
    student, decoder = (
        next(row["parameters"] for row in rows if row["model"] == name) for name in ("student", "same-size decoder")
    )
    assert 0.6 * student < decoder <= student
    assert {out["why"] for out in report["left_out"]} == {
        "no_such_module not installed: pip install onnxruntime-genai"
    }
    assert {out["model"] for out in report["left_out"]} == {"teacher", "same-size decoder"}
    assert [entry["student"]["model"] for entry in report["headlines"]] == ["student"] * 2
    for name in ("bench.png", "bench.svg", "bench-dark.svg"):
        assert (output / name).stat().st_size > 1000
    assert not list(output.rglob("*.new")) and not list(output.rglob("*.tmp"))


@pytest.mark.process
@pytest.mark.export
def test_a_second_bench_converts_nothing_again_and_is_held_against_the_first(folder, output, capsys, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (output / "converted").rglob("*") if path.is_file()}
    report = read_report(output / "bench.json")
    for entry in report["headlines"]:
        entry["ratio"] = {"value": 1.0, "low": 0.9, "high": 1.1}

    def slower(rows):  # by more than three rounds spread, however busy the machine is
        return [{**entry, "ratio": {"value": 2.0, "low": 1.9, "high": 2.1}} for entry in headlines(rows)]

    monkeypatch.setattr(race, "headlines", slower)
    (folder / "baseline.json").write_text(json.dumps(report))
    words = ["bench", folder / "student", "--teacher", folder / "teacher", "--output", output]
    words += ["--source", "12", "--target", "3", "--rounds", 3, "--threads", 1, "--backend", "onnx,pytorch"]
    words += ["--precision", "fp32", "--minutes", 30, "--against", folder / "baseline.json"]
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    assert "student / decoder-only rose by more than its spread: 12 in, 3 out, batch 1" in said.err
    page = " ".join(said.out.split())
    assert "student, onnx fp32" in page
    assert "of the time of the fastest decoder-only model whose weights take no more bytes each (" in page
    assert {path: path.stat().st_mtime_ns for path in (output / "converted").rglob("*") if path.is_file()} == before
    assert main(["bench", "--compare", str(folder / "baseline.json"), str(output / "bench.json"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {(row["model"], row["source"]) for row in rows} == {
        ("student", 12),
        ("teacher", 12),
        ("same-size decoder", 12),
    }


def test_a_student_that_a_target_cannot_run_is_said_to_be_one(tmp_path):
    """More minutes would not help."""
    config = make_config("merged", encoder_pooling=2, teacher_num_hidden_layers=3)
    config.save_pretrained(tmp_path)
    pooled = contenders(Model("student", tmp_path, config))
    for backend in ("gguf", "genai"):
        assert all("pool" in one.missing() for one in pooled if one.backend == backend)
    there = [one for one in pooled if one.backend in ("onnx", "openvino") and one.precision != "int4"]
    assert there and all(one.missing() is None for one in there)


@pytest.fixture
def error(capsys):
    def of_bench(*words):
        assert main(["bench", *map(str, words)]) == 2
        return capsys.readouterr().err

    return of_bench


def test_mistakes_on_the_command_line(folder, tmp_path, error):
    student = folder / "student"
    assert "name a student to time" in error()
    assert "is a llama, expected a student" in error(folder / "teacher")
    assert "give whole numbers of at least 2" in error(student, "--source", "1", "--target", "4")
    assert "give as many of each" in error(student, "--source", "16,32", "--target", "4")
    assert "give more than 0" in error(student, "--minutes", "0")
    assert "choose from onnx" in error(student, "--backend", "abacus", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "'teacher' in this bench" in error(
        student, "--teacher", folder / "teacher", "--decoder-only", folder / "teacher", "--output", tmp_path / "out"
    )
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    said = error(student, "--decoder-only", tmp_path / "gpt2", "--output", tmp_path / "out")
    assert f"{tmp_path / 'gpt2'}: cannot count the cost of model_type 'gpt2'" in said
    assert said.endswith("leave it out of --decoder-only\n") and not list(tmp_path.rglob("converted"))
    (tmp_path / "no.json").write_text('{"version": 1, "rounds": 1, "headlines": [], "rows": [{"model": 3}]}')
    assert "no.json, rows[0], has the int 3 as 'model'" in error(
        "--compare", tmp_path / "no.json", tmp_path / "no.json"
    )
    (tmp_path / "no.json").write_text('{"version": 99, "rounds": 1, "headlines": [], "rows": []}')
    assert "of version 99" in error(student, "--against", tmp_path / "no.json")


def test_a_baseline_that_cannot_be_held_against_is_refused_at_once(folder, error, tmp_path):
    """Before minutes are measured, and never written over."""
    student, file = folder / "student", tmp_path / "bench.json"
    report = {"version": VERSION, "headlines": [], "rows": []}
    file.write_text(json.dumps({**report, "rounds": 7}))
    assert "give another --output" in error(student, "--against", file, "--output", tmp_path)
    assert "leave the student and --against out" in error("--compare", file, file, "--against", file)
    assert "leave the student and --against out" in error(student, "--compare", file, file)
    assert "this bench has 2 rounds" in error(student, "--against", file, "--rounds", "2")
    file.write_text(json.dumps({**report, "rounds": 1}))
    assert "bench.json has 1 rounds, and a spread takes 3" in error(student, "--against", file)
    assert json.loads(file.read_text())["rounds"] == 1 and [path.name for path in tmp_path.iterdir()] == ["bench.json"]


# Numbers by hand -----------------------------------------------------------------------------------------------------


def test_answers_of_another_length_are_refused():
    request = Request(source=8, target=3, batch=2)
    check_answer([[1, 2, 3], [4, 5, 6]], [0.1, 0.2, 0.3], request, "student, onnx int8")
    for tokens, times in (
        ([[1, 2, 3]], [0.1, 0.2, 0.3]),
        ([[1, 2, 3], [4, 5]], [0.1, 0.2, 0.3]),
        ([[1, 2, 3, 4], [4, 5, 6, 7]], [0.1, 0.2, 0.3]),
        ([[1, 2, 3], [4, 5, 6]], [0.1, 0.2]),
        ([], []),
    ):
        with pytest.raises(ValueError, match="student, onnx int8 answered .* expected 2 of 3"):
            check_answer(tokens, times, request, "student, onnx int8")


def test_rounds_are_given_up_before_contenders():
    costs = {"a": 1.0, "b": 2.0, "c": 7.0}
    assert plan(costs, seconds=100, rounds=5) == (5, {"a", "b", "c"})
    assert plan(costs, seconds=35, rounds=5) == (3, {"a", "b", "c"})
    assert plan(costs, seconds=10, rounds=5) == (1, {"a", "b", "c"})
    assert plan(costs, seconds=9, rounds=5) == (3, {"a", "b"})
    assert plan(costs, seconds=0, rounds=5) == (1, {"a"})
    assert plan(costs, 0, 5, {"a": "student", "b": "student", "c": "decoder-only"}.get) == (1, {"a", "c"})


@pytest.mark.process
@pytest.mark.export
def test_however_short_the_time_a_student_and_a_decoder_are_measured(folder, tmp_path):
    words = [
        "bench",
        folder / "student",
        "--teacher",
        folder / "teacher",
        "--output",
        tmp_path / "bench",
        "--threads",
        1,
    ]
    words += ["--source", 8, "--target", 3, "--rounds", 3, "--minutes", 1e-3, "--backend", "pytorch,llama.cpp"]
    assert main([str(word) for word in [*words, "--precision", "fp32"]]) == 0
    report = read_report(tmp_path / "bench" / "bench.json")
    assert [row["model"] == "student" for row in report["rows"]] == [True, False] and report["rounds"] == 1
    assert report["headlines"] and all("--minutes more" in out["why"] for out in report["left_out"])
    # The backend's settings go with its name.
    assert {out["backend"] for out in report["left_out"]} >= {"llama.cpp", "llama.cpp -fa off"}


@pytest.mark.export
def test_decoders_of_the_students_size_have_the_teachers_vocabulary_and_its_own(folder, tmp_path):
    def models_beside(vocab_size):
        config = LlamaConfig.from_pretrained(folder / "teacher", vocab_size=vocab_size)
        LlamaForCausalLM(config).save_pretrained(tmp_path / str(vocab_size))
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        words = [folder / "student", "--teacher", tmp_path / str(vocab_size), "--output", tmp_path / "out"]
        models, random, left_out = bench._models(parser.parse_args([str(word) for word in words]))
        assert random.keys() == models.keys() - {"student", "teacher"}
        return {name: (model.config.vocab_size, model.config.num_hidden_layers) for name, model in models.items()}, [
            out["model"] for out in left_out
        ]

    own = model(folder, "student").config.vocab_size
    same, with_own = "same-size decoder", "same-size decoder, student's vocabulary"
    models, left_out = models_beside(own + 300)
    assert models[same][0] == own + 300 and models[with_own][0] == own and left_out == []
    assert models[with_own][1] > models[same][1] > 0
    models, left_out = models_beside(8192)  # an embedding larger than the student
    assert models.keys() == {"student", "teacher", with_own} and left_out == [same]
    assert not (tmp_path / "out").exists()


def test_floors_by_hand():
    """One layer: h 4, MLP 6, 2 heads of 2, vocabulary 10, all of it tied and without biases."""
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    cost = model_cost(config, prompt_length=3, new_tokens=3, dtype=torch.float32)
    matrices = 4 * 16 + 3 * 24
    first = 2 * 3 * matrices + 4 * 3 * 3 * 4 + 2 * 40
    step = 2 * matrices + 4 * 4.5 * 4 + 2 * 40  # steps over 4 and 5 keys
    weights = matrices + 2 * 4 + 4 + 40 + 4  # two norms, the last one, head, a row of the embedding
    cache = 2 * 4 * 4.5
    assert counted(cost, "fp32", batch=1) == {
        "first_token_flops": first,
        "step_flops": step,
        "step_bytes": 4 * weights + 4 * cache,
    }
    counts = counted(cost, "int4", batch=3)
    assert counts == {
        "first_token_flops": 3 * first,
        "step_flops": 3 * step,
        "step_bytes": 0.5 * weights + 3 * 2 * cache,
    }
    rates = {"read": 1e3, "fp32": 1e4, "bf16": 2e4, "int8": 4e4}
    least = floor(counts, "int4", 5, rates)
    assert least["first_token_ms"] == pytest.approx(1e3 * 3 * first / 4e4)
    assert least["step_ms"] == pytest.approx(1e3 * (0.5 * weights + 6 * cache) / 1e3)
    assert least["request_ms"] == pytest.approx(least["first_token_ms"] + 4 * least["step_ms"])
    assert floor(counts, "fp32", 5, rates)["first_token_ms"] == pytest.approx(1e3 * 3 * first / 1e4)
    assert floor(counts, "bf16", 5, rates)["first_token_ms"] == pytest.approx(1e3 * 3 * first / 2e4)
    # Where memory is fast, a step takes its FLOPs.
    fast = {**rates, "read": 1e9}
    assert floor(counts, "fp32", 5, fast)["step_ms"] == pytest.approx(1e3 * 3 * step / 1e4)


def test_rates_are_those_of_this_machine():
    rates = measure_rates(1)
    assert {"read", "fp32", "bf16"} <= rates.keys()
    assert 1e8 < rates["read"] < 1e13 and 1e8 < rates["fp32"] < 1e15


def test_the_decoder_of_the_students_size():
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
    )

    def parameters(layers):
        other = config_of_size(config, 10**9)
        other.num_hidden_layers = layers
        return sum(p.numel() for p in LlamaForCausalLM(other).parameters())

    for layers in (1, 3, 6):  # more than the teacher has, too
        assert config_of_size(config, parameters(layers)).num_hidden_layers == layers
        assert config_of_size(config, parameters(layers + 1) - 1).num_hidden_layers == layers
    assert config_of_size(config, parameters(1) - 1) is None
    assert config.num_hidden_layers == 4


def row(model, precision, requests, backend="onnx"):
    value = sorted(requests)[len(requests) // 2]
    times = {"value": value, "low": min(requests), "high": max(requests)}
    return {
        "model": model,
        "backend": backend,
        "precision": precision,
        "source": 8,
        "target": 4,
        "batch": 1,
        "first_token_ms": times,
        "step_ms": times,
        "request_ms": times,
        "measured": [{"request_ms": request} for request in requests],
    }


def test_the_headline_by_hand():
    rows = [
        row("student", "int8", [10.0, 20.0, 12.0]),
        row("student", "fp32", [30.0, 30.0, 30.0]),
        row("teacher", "fp32", [1.0, 1.0, 1.0]),  # of more bytes a weight than the student's best
        row("teacher", "int4", [40.0, 40.0, 40.0]),
        row("same-size decoder", "int8", [50.0, 40.0, 30.0], backend="ctranslate2"),
        row("same-size decoder", "int8", [20.0, 80.0, 24.0]),
    ]
    (headline,) = headlines(rows)
    assert headline["student"]["precision"] == "int8"
    assert (headline["decoder_only"]["model"], headline["decoder_only"]["backend"]) == ("same-size decoder", "onnx")
    # Within the rounds: 10 / 20, 20 / 80, 12 / 24.
    assert headline["ratio"] == pytest.approx({"value": 0.5, "low": 0.375, "high": 0.5})
    assert headlines(rows[:3]) == []  # nobody to be held against


def test_two_reports_by_hand():
    before, after = [row("student", "int8", [10.0])], [row("student", "int8", [15.0]), row("teacher", "int8", [1.0])]
    (found,) = compare({"rows": before}, {"rows": after})
    assert found["ratio"] == {"first_token_ms": 1.5, "step_ms": 1.5, "request_ms": 1.5}
    with pytest.raises(ValueError, match="no row in common"):
        compare({"rows": before}, {"rows": after[1:]})


@pytest.mark.parametrize("number", ["0", "-1.5", "NaN", "Infinity", "1" + "0" * 400])
@pytest.mark.parametrize("part, name", [("rows", "step_ms"), ("headlines", "ratio")])
def test_a_number_that_no_clock_shows_is_refused(tmp_path, part, name, number):
    """It would fail in a division, or let any ratio pass."""
    file, spread = tmp_path / "bench.json", {"value": 1.0, "low": 1.0, "high": 1.0}
    entry = {"model": "student", "backend": "onnx", "precision": "int8", "source": 8, "target": 4, "batch": 1}
    report = {
        "version": VERSION,
        "rounds": 3,
        "rows": [{**entry, "first_token_ms": spread, "step_ms": spread, "request_ms": spread}],
        "headlines": [{**entry, "ratio": spread}],
    }
    file.write_text(json.dumps(report))
    assert read_report(file) == report
    report[part][0][name] = {**spread, "high": json.loads(number)}
    file.write_text(json.dumps(report))
    with pytest.raises(ValueError, match=rf"bench.json, {part}\[0\], {name} has the .* as 'high', expected a finite"):
        read_report(file)


def test_a_ratio_may_rise_by_its_spread(tmp_path):
    def report(value, low, high, rounds=3, source=8):
        request = {"source": source, "target": 4, "batch": 1}
        headlines = [{**request, "ratio": {"value": value, "low": low, "high": high}}]
        return {"rounds": rounds, "headlines": headlines, "rows": [request], "left_out": []}

    file, baseline = tmp_path / "before.json", report(0.5, 0.45, 0.55)
    check_against(report(0.6, 0.6, 0.6), baseline, file)
    check_against(report(0.7, 0.6, 0.8), baseline, file)
    with pytest.raises(ValueError, match="8 in, 4 out, batch 1: 0.50 before, 0.61 now, spread 0.10"):
        check_against(report(0.61, 0.6, 0.62), baseline, file)
    with pytest.raises(ValueError, match="this bench has 2 rounds"):
        check_against(report(0.6, 0.6, 0.6, rounds=2), baseline, file)
    with pytest.raises(ValueError, match="no request of this bench"):
        check_against(report(0.6, 0.6, 0.6, source=9), baseline, file)


def test_a_ratio_that_is_gone_is_a_failure(tmp_path):
    """Of a request that was asked for again; one that was not may be missing."""

    def request(source):
        return {"source": source, "target": 4, "batch": 1}

    def out(model, why, **request):
        return {"model": model, "backend": "onnx", "precision": "int8", "why": why, **request}

    ratio = {"value": 0.5, "low": 0.5, "high": 0.5}
    file = tmp_path / "before.json"
    before = {"rounds": 3, "headlines": [{**request(source), "ratio": ratio} for source in (8, 16)]}
    now = {"rounds": 3, "headlines": before["headlines"][:1], "rows": [row("student", "int8", [1.0])], "left_out": []}
    check_against(now, before, file)
    with pytest.raises(ValueError, match="16 in, 4 out, batch 1, where no model was left out, so give --backend"):
        check_against({**now, "rows": [*now["rows"], {**now["rows"][0], **request(16)}]}, before, file)
    late = [out("student", "no time to warm up", **request(16)), out("student", "too hot", **request(8))]
    gone = [out("teacher", "onnx not installed")]
    reason = r"16 in, 4 out, batch 1, left out: student onnx int8 \(no time to warm up\); teacher .*not installed\)\."
    with pytest.raises(ValueError, match=reason):
        check_against({**now, "left_out": late + gone}, before, file)
    # And where no request has a ratio left.
    with pytest.raises(ValueError, match="8 in, 4 out, batch 1, left out: teacher onnx int8"):
        check_against({**now, "headlines": [], "left_out": gone}, before, file)


def test_sizes_on_disk_by_hand(folder, tmp_path):
    """A conversion is counted with its folders, such as an `.mlpackage`; a source without, such as its exports."""
    for path, size in (("a.bin", 5), ("encoder.mlpackage/Data/weight.bin", 70)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(bytes(size))
    contender = find(folder, "student", "coreml", "int8")
    assert _size(contender, tmp_path) == 75
    contender.source = str(tmp_path)
    assert _size(contender, tmp_path) == 5
