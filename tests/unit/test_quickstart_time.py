"""The time of a quickstart, by a clock that moves as on a slow machine, whatever the real one does; and runs that are
interrupted, resumed and continued."""

import contextlib
import io
import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import datasets
import peft
import pytest
import sacrebleu
import torch
from distillation_toys import write_pairs, write_teacher
from safetensors.torch import load_file
from tokenizer_toys import unigram
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, Trainer

from hf_encdec_distill.cli.quickstart import pipeline, recipe, recording, state
from hf_encdec_distill.cli.quickstart.pipeline import Pipeline, quickstart
from hf_encdec_distill.cli.quickstart.state import open_run
from hf_encdec_distill.cli.quickstart.trimming import trim_teacher
from hf_encdec_distill.distillation import CachedTeacher
from hf_encdec_distill.files import write_json
from hf_encdec_distill.models.loading import load_tokenizer
from hf_encdec_distill.models.prompts import encode_prompt


class Machine:
    """A clock, and how many seconds things take by it."""

    load, save, plot, request, mine = 3.0, 2.0, 1.0, 2.0, 10.0
    generate, score = 0.5, 0.3  # a row of the teacher
    of_student = 0.6  # against the teacher
    teach, distill, twin = 12.0, 10.0, 6.0  # a step
    record = 0.0  # a row
    interrupt_capture = None  # after so many calls

    def __init__(self, factor=1.0):
        self.now, self.factor, self.rows_trained, self.interrupt_at = 5000.0, factor, [], None
        self.rows_read: list[int] = []
        self.batch_sizes: list[int] = []  # of all students' steps

    def __call__(self):
        return self.now

    def takes(self, seconds):
        self.now += seconds * self.factor


def build(monkeypatch, machine):
    def slower(where, name, seconds):
        original = getattr(where, name)

        def call(*args, **kwargs):
            machine.takes(seconds(*args) if callable(seconds) else seconds)
            return original(*args, **kwargs)

        monkeypatch.setattr(where, name, call)

    def size(model):
        return machine.of_student if model.config.is_encoder_decoder else 1.0

    def scoring(models, rows, teacher=None, *_):
        return machine.score * len(rows) * sum(map(size, models.values()))  # the teacher is one of them

    def generate(model, tokenizer, rows, *_):
        machine.takes(machine.generate * len(rows) * size(model))
        return [f"It is {row['source']}." for row in rows]

    step = Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        kind = "teach"
        if isinstance(self, pipeline._StudentTrainer):
            kind = "distill" if self.args.distill_weight else "twin"
            machine.rows_trained.append((kind, inputs["input_ids"].sum().item()))
            machine.batch_sizes.append(len(inputs["input_ids"]))
        machine.takes(getattr(machine, kind))
        if machine.interrupt_at == (kind, self.state.global_step):
            machine.interrupt_at = None
            # Its handler, not the signal: real ones are in tests/end_to_end, to a process of their own.
            signal.getsignal(signal.SIGINT)(signal.SIGINT, None)
        return step(self, model, inputs, *args, **kwargs)

    capture = recording.capture

    def capturing(teacher, rows, *args, **kwargs):
        machine.rows_read.append(len(rows))
        new = capture(teacher, rows, *args, **kwargs)
        machine.takes(machine.record * new)
        if len(machine.rows_read) == machine.interrupt_capture:
            raise KeyboardInterrupt
        return new

    monkeypatch.setattr(Trainer, "training_step", training_step)
    monkeypatch.setattr(recording, "capture", capturing)
    monkeypatch.setattr(pipeline, "generate", generate)
    slower(pipeline, "score", scoring)
    slower(pipeline, "greedy_decode", machine.request)
    slower(pipeline, "compare_latency", lambda s, t, prompts: (len(prompts) + 1) * 1.6 * machine.request)
    slower(pipeline, "load_splits", machine.mine)
    for name in ("plot_loss_curves", "plot_quality"):  # matplotlib takes seconds of ours
        monkeypatch.setattr(pipeline, name, lambda *args, **kwargs: machine.takes(machine.plot))
    monkeypatch.setattr(recipe, "LATENCY_TOKENS", 2)
    for name in ("load_teacher", "load_student"):
        slower(Pipeline, name, machine.load)
    slower(pipeline, "save_teacher", machine.save)
    slower(pipeline.RopeEncDecForConditionalGeneration, "save_pretrained", machine.save)
    return machine


@pytest.fixture(scope="module")
def given(tmp_path_factory, make_bpe_tokenizer):
    folder = tmp_path_factory.mktemp("inputs")
    write_teacher(folder / "teacher", make_bpe_tokenizer(chat_template=None), std=0.15)
    (folder / "pairs").mkdir()
    for split, rows in (("train", 300), ("validation", 20), ("test", 100)):
        write_pairs(folder / "pairs" / f"{split}.csv", rows)
    columns = {"source_column": "text", "target_column": "short", "encoder_layers": 2, "decoder_layers": 1}
    return {"teacher": str(folder / "teacher"), "dataset": str(folder / "pairs"), **columns}


def run(machine, folder, given, resume=False):
    """The metrics and the minutes that it took; ten seconds are for the imports."""
    begun = machine.now
    metrics = quickstart(folder, given, resume, machine, begun - 10.0)
    return metrics, (machine.now - begun + 10.0) / 60


def results(folder):
    return json.loads((folder / "state.json").read_text())["results"]


FROZEN_MINUTES = 5


def unfreezes(monkeypatch, from_minutes=12.0):
    """All weights are trained in runs of so many minutes, after five for the decoder alone."""
    monkeypatch.setattr(state, "FROZEN_BELOW_MINUTES", from_minutes)
    monkeypatch.setattr(recipe, "FROZEN_MINUTES", FROZEN_MINUTES)


@pytest.fixture(scope="module", params=["on records", "with all weights later", "with a twin"])
def finished(request, given, tmp_path_factory):
    """A run of twelve minutes, what it said, the rows that its students trained on, and the clock that it showed.

    As a short run; as if twelve minutes were many, so that the encoder is frozen for five of them; with a twin.
    """
    folder, said = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
    is_short, has_twin = request.param == "on records", request.param == "with a twin"
    with pytest.MonkeyPatch.context() as monkeypatch:
        unfreezes(monkeypatch, recipe.FROZEN_BELOW_MINUTES if is_short else 12.0)
        machine, shown = build(monkeypatch, Machine()), []

        class Watched(pipeline.Display):
            def stage(self, title):
                shown.append((machine.now, self.seconds_left()))
                return super().stage(title)

        monkeypatch.setattr(pipeline, "Display", Watched)
        with contextlib.redirect_stderr(said):
            asked = {"minutes": 12.0, "vocabulary": 270 if is_short else 0, "twin": has_twin}
            metrics, minutes = run(machine, folder, {**given, **asked})
    shown = [(machine.now - now, left) for now, left in shown]
    return SimpleNamespace(
        folder=folder,
        is_short=is_short,
        has_twin=has_twin,
        metrics=metrics,
        minutes=minutes,
        said=said.getvalue(),
        shown=shown,
        results=results(folder),
        rows_read=machine.rows_read,
        batch_sizes=machine.batch_sizes,
    )


# The whole run -------------------------------------------------------------------------------------------------------


def test_twelve_minutes_are_twelve_on_a_slow_machine(finished):
    metrics, done = finished.metrics, finished.results
    assert 11.0 < finished.minutes <= 12.0
    assert {entry["n"] for entry in metrics["models"].values()} == {64}
    # Few steps: the learning rate arrives all the same, and falls.
    frozen = done.get("frozen", {}).get("steps", 0)
    assert (frozen > 0) is not (finished.is_short or finished.has_twin)
    taught, distilled = done["teach"]["rates"], done["distill"]["rates"]
    last = recipe.STUDENT_LEARNING_RATE if finished.is_short else recipe.ALL_WEIGHTS_LEARNING_RATE
    trainings = [(taught, recipe.TEACHER_LEARNING_RATE), (distilled[frozen:], last)]
    trainings += [(distilled[:frozen], recipe.STUDENT_LEARNING_RATE)] if frozen else []
    for rates, peak in trainings:
        most = 25 if rates is taught or finished.has_twin else 50
        assert 3 <= len(rates) < most and 0.8 * peak < max(rates) <= peak and rates[-1] < 0.4 * peak
        assert rates.index(max(rates)) <= len(rates) // 3
    assert done["distill"]["steps"] == metrics["recipe"]["steps"]
    if finished.has_twin:
        assert done["twin"]["rates"] == pytest.approx(done["distill"]["rates"])
        assert done["twin"]["steps"] == done["distill"]["steps"]
    assert sum(stage["seconds"] for stage in metrics["stages"]) == pytest.approx(60 * finished.minutes, abs=20)


def encoder_weights(folder):
    weights = AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict()
    return {name: tensor for name, tensor in weights.items() if ".encoder." in name}


def test_a_run_trains_the_decoder_alone_on_recorded_rows_and_a_long_one_then_all_weights(finished):
    start, student = (encoder_weights(finished.folder / name) for name in ("work/start", "student"))
    unchanged = [torch.equal(start[name], student[name]) for name in start]
    assert unchanged and all(unchanged) is finished.is_short
    said = finished.metrics["recipe"]
    if finished.has_twin:
        assert finished.results["start"]["recorded"] == 0
        assert said["encoder"] == "trained" and said["batch_size"] == 16 and set(finished.batch_sizes) == {16}
        return
    before = finished.results["distill" if finished.is_short else "frozen"]["steps"] + recipe.TIMED_STEPS
    then = finished.results["distill"]["steps"] + recipe.TIMED_STEPS - before
    assert finished.batch_sizes == [8] * before + [16] * then
    assert said["batch_size"] == (8 if finished.is_short else "8, then 16")
    peaks = (
        [recipe.STUDENT_LEARNING_RATE]
        if finished.is_short
        else [recipe.STUDENT_LEARNING_RATE, recipe.ALL_WEIGHTS_LEARNING_RATE]
    )
    assert [float(rate) for rate in str(said["learning_rate"]).split(", then ")] == pytest.approx(peaks, rel=0.2)
    stage = finished.results["distill" if finished.is_short else "frozen"]
    recorded, steps = finished.results["start"]["recorded"], stage["steps"]
    assert sum(finished.rows_read) == recorded < 300 and len(finished.rows_read) > 2  # step by step, none again
    assert recipe.PASSES - 0.1 < steps * recipe.BATCH_SIZE / recorded < recipe.PASSES + 0.2
    assert len(CachedTeacher(finished.folder / "work" / "records")) == recorded
    (states,) = (finished.folder / "work" / "states").iterdir()
    assert sum(len(load_file(file)) for file in states.iterdir()) == recorded
    more = "" if finished.is_short else ", then all weights on all rows"
    assert said["encoder"] == f"frozen, the decoder is trained on {recorded} rows{more}"
    if not finished.is_short:
        seconds = sum(finished.results[name]["seconds"] for name in ("start", "frozen"))
        assert seconds == pytest.approx(60 * FROZEN_MINUTES, abs=15)
        assert said["schedule"].endswith(", 2 times")


def test_rows_that_are_dear_to_record_are_read_more_often(given, tmp_path, monkeypatch):
    machine = build(monkeypatch, Machine())
    machine.record = 4.0  # more than three passes over a row take
    run(machine, tmp_path / "run", {**given, "minutes": 20.0})
    recorded, distill = results(tmp_path / "run")["start"]["recorded"], results(tmp_path / "run")["distill"]
    assert recorded == sum(machine.rows_read)
    assert distill["steps"] * recipe.BATCH_SIZE > 2 * recorded
    recording = machine.record * recorded
    assert recording / (recording + distill["steps"] * machine.distill) == pytest.approx(
        recipe.RECORDING_SHARE, abs=0.08
    )


def test_a_run_that_is_interrupted_with_and_without_a_frozen_encoder_goes_on(given, tmp_path, monkeypatch):
    unfreezes(monkeypatch)
    machine, distill = build(monkeypatch, Machine()), Pipeline.distill

    def distilling(self, update):
        if "later" not in asked:
            asked.append("later")
            machine.interrupt_at = ("distill", self.state.steps_before + 1)
        return distill(self, update)

    asked: list[str] = []
    monkeypatch.setattr(Pipeline, "distill", distilling)
    machine.interrupt_at = ("distill", recipe.TIMED_STEPS + 1)
    with pytest.raises(KeyboardInterrupt):
        run(machine, tmp_path / "run", {**given, "minutes": 12.0})
    assert list(results(tmp_path / "run")) == ["teacher", "data", "before", "teach", "start"]
    with pytest.raises(KeyboardInterrupt):
        run(machine, tmp_path / "run", {}, resume=True)
    frozen = results(tmp_path / "run")["frozen"]
    metrics, _ = run(machine, tmp_path / "run", {}, resume=True)
    done = results(tmp_path / "run")
    assert done["frozen"] == frozen and done["distill"]["steps"] > frozen["steps"] + 5
    assert len(machine.rows_trained) == recipe.TIMED_STEPS + done["distill"]["steps"]  # none twice
    assert 10.0 < sum(stage["seconds"] for stage in metrics["stages"]) / 60 <= 12.1
    assert metrics["curves"]["student_kd"][-1]["step"] == done["distill"]["steps"]
    before = recipe.TIMED_STEPS + frozen["steps"]
    assert machine.batch_sizes == [8] * before + [16] * (len(machine.batch_sizes) - before)


def test_teacher_and_student_have_the_tokens_of_the_training_rows(finished, given):
    sizes = [AutoConfig.from_pretrained(finished.folder / name).vocab_size for name in ("work/teacher", "student")]
    whole = AutoConfig.from_pretrained(given["teacher"]).vocab_size
    assert sizes == ([270, 270] if finished.is_short else [whole, whole]) and whole > 270
    assert (f"270 of {whole} tokens" in finished.said) is finished.is_short
    assert (f"270 of its {whole} tokens" in finished.metrics["teacher"]["adaptation"]) is finished.is_short


@pytest.mark.parametrize(
    "tokenizer,problem", [(unigram, "only fast byte-pair tokenizers"), (None, "a vocabulary of 9 tokens is too small")]
)
def test_a_vocabulary_that_cannot_be_trimmed_is_refused(tokenizer, problem, make_bpe_tokenizer, tmp_path):
    teacher = write_teacher(tmp_path / "teacher", tokenizer() if tokenizer else make_bpe_tokenizer())
    rows = {"source": ["a"], "target": ["b"]}
    with pytest.raises(ValueError, match=rf"{re.escape(problem)}.*\. Keep the teacher's tokens with --vocabulary 0"):
        trim_teacher(str(teacher), 9, rows, "{source}:", tmp_path / "trimmed")
    assert not (tmp_path / "trimmed").exists()
    assert trim_teacher(str(teacher), 0, rows, "{source}:", tmp_path / "trimmed") == (str(teacher), [])


def first_stages(folder, **given):
    """Of a run that is not timed: the results of fetching the teacher and the data, and the pipeline."""
    pipeline = Pipeline(open_run(folder, given, False))
    for name in ("teacher", "data"):
        pipeline.state.begin(name)
        pipeline.state.finish(name, getattr(pipeline, name)(lambda *_: None))
    return pipeline.state.results, pipeline


def test_targets_that_are_cut_are_counted_and_have_no_eos(given, tmp_path, monkeypatch):
    plain, _ = first_stages(tmp_path / "plain", **given)
    assert "cut" not in plain["data"]["note"]
    monkeypatch.setattr(recipe, "MAX_TARGET", 5)
    encoded = []
    encode = pipeline.encode_rows

    def encoding(pairs, *args):
        encoded.append(len(pairs))
        return encode(pairs, *args)

    monkeypatch.setattr(pipeline, "encode_rows", encoding)
    found, run = first_stages(tmp_path / "cut", **given)
    lengths = [
        len(run.tokenizer(row["target"], add_special_tokens=False)["input_ids"])
        for rows in run.rows.values()
        for row in rows
    ]
    cut = sum(length + 1 > 5 for length in lengths)  # with EOS
    told = f"; {cut} of {len(lengths)} targets have more than 5 tokens with EOS and are cut"
    assert found["data"]["note"].endswith(told)
    labels = [row["labels"] for rows in run.rows.values() for row in rows]
    assert [run.tokenizer.eos_token_id not in ids for ids in labels] == [length + 1 > 5 for length in lengths]
    assert sum(encoded) == len(lengths)  # once
    resumed = Pipeline(open_run(tmp_path / "cut", {}, True))
    assert resumed.rows == run.rows


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({"max_position_embeddings": 80}, 48),
        ({"model_type": "mistral", "sliding_window": 64}, 32),
        ({"model_type": "mistral", "sliding_window": 40}, None),
        ({"max_position_embeddings": 4096}, 256),
    ],
)
def test_prompts_leave_the_student_room_for_its_answer(given, tmp_path, fields, longest):
    teacher = shutil.copytree(given["teacher"], tmp_path / "teacher")
    write_json(teacher / "config.json", json.loads((teacher / "config.json").read_text()) | fields)
    rows = [{"text": "x y " * (3 * row), "short": "z"} for row in range(1, 61)]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "long.csv")
    asked = given | {"teacher": str(teacher), "dataset": str(tmp_path / "long.csv"), "vocabulary": 0}
    if longest is None:
        with pytest.raises(ValueError, match="reads 40 tokens at once, expected at least 64.*choose another teacher"):
            first_stages(tmp_path / "run", **asked)
        return
    found, run = first_stages(tmp_path / "run", **asked)
    whole = [len(encode_prompt(run.tokenizer, row["text"], run.template)) for row in rows]
    assert max(len(row["prompt"]) for split in run.rows.values() for row in split) == longest < max(whole)
    cut = sum(length > longest for length in whole)
    told = f"{cut} of 60 prompts have more than {longest} tokens and their sources are cut"
    assert found["data"]["note"].endswith(told)


def test_answers_in_another_script_are_scored_by_chrf(given, tmp_path, monkeypatch):
    rows = [{"text": f"{row} 木地", "short": "木地金土"[row % 4 :] + "水" * (row % 3)} for row in range(120)]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "pairs.csv")
    asked = {**given, "dataset": str(tmp_path / "pairs.csv"), "vocabulary": 0}
    metrics, _ = run(build(monkeypatch, Machine()), tmp_path / "run", asked)
    held_out = Pipeline(open_run(tmp_path / "run", {}, True)).held_out
    answers, references = [f"It is {row['source']}." for row in held_out], [[row["target"] for row in held_out]]
    for name in ("teacher", "student_kd"):
        assert "rouge_l" not in metrics["models"][name]
        value = metrics["models"][name]["chrf"]["value"]
        assert value == pytest.approx(sacrebleu.corpus_chrf(answers, references).score) and value > 1
    assert metrics["task"] == {"prompt_template": recipe.OTHER_TEMPLATE, "built_in": True, "name": "pairs.csv"}
    settings = json.loads((tmp_path / "run" / "student" / "recipe.json").read_text())["settings"]
    # Where they lie is nobody's business.
    assert (settings["teacher"], settings["dataset"]) == ("teacher", "pairs.csv")


@pytest.mark.parametrize("after", [2, 3])
def test_interrupted_while_recording_it_plans_as_if_it_had_not_been(given, tmp_path, monkeypatch, after):
    found = {}
    for name in ("whole", "interrupted"):
        machine = build(monkeypatch, Machine())
        machine.record, machine.distill, machine.teach = 1.0, 3.0, 3.0
        if name == "interrupted":
            machine.interrupt_capture = after
            with pytest.raises(KeyboardInterrupt):
                run(machine, tmp_path / name, given)
        run(machine, tmp_path / name, given, resume=name == "interrupted")
        stages = results(tmp_path / name)
        recorded, steps = stages["start"]["recorded"], stages["distill"]["steps"]
        assert steps * recipe.BATCH_SIZE > (recipe.PASSES - 0.15) * recorded
        found[name] = recorded
    assert found["interrupted"] == pytest.approx(found["whole"], rel=0.15)


def test_fewer_rows_than_a_batch_are_refused_before_anything_is_trained(given, tmp_path):
    write_pairs(tmp_path / "few.csv", 9)
    with pytest.raises(ValueError, match=r"few.csv has 7 rows to train on, expected at least 8.*--dataset"):
        first_stages(tmp_path / "run", **given | {"dataset": str(tmp_path / "few.csv")})


@pytest.mark.parametrize("vocabulary", [270, 0])
def test_a_teacher_that_is_an_adapter_is_merged(given, tmp_path, vocabulary):
    base = AutoModelForCausalLM.from_pretrained(given["teacher"])
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    load_tokenizer(given["teacher"]).save_pretrained(tmp_path / "adapter")
    asked = given | {"teacher": str(tmp_path / "adapter"), "vocabulary": vocabulary}
    _, run = first_stages(tmp_path / "run", **asked)
    assert run.teacher_path == str(tmp_path / "run" / "work" / "teacher-before")
    merged = run.load_teacher(run.teacher_path, torch.float32)
    assert merged.config.vocab_size == (vocabulary or base.config.vocab_size)
    weight = merged.model.layers[1].self_attn.q_proj.weight
    assert weight.requires_grad  # it will be taught
    lora = base.model.layers[1].self_attn.q_proj
    delta = lora.scaling["default"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    torch.testing.assert_close(weight, lora.base_layer.weight + delta)


@pytest.mark.parametrize("older", [False, True], ids=["of now", "of an older version"])
def test_a_run_that_was_moved_reads_its_own_teacher(given, tmp_path, monkeypatch, older):
    monkeypatch.chdir(tmp_path)
    results, _ = first_stages(Path("run"), **given, vocabulary=270)
    assert "work/teacher-before" not in Path("run", "state.json").read_text()
    if older:
        results["data"]["teacher"] = str(Path("run", "work", "teacher-before"))
        write_json(Path("run", "state.json"), json.loads(Path("run", "state.json").read_text()) | {"results": results})
    Path("run").rename("moved")
    first_stages(Path("run"), **given, vocabulary=280)  # another run at the old place
    moved = Pipeline(open_run(Path("moved"), {}, True))
    assert len(moved.tokenizer) == moved.load_teacher(moved.teacher_path, torch.float32).config.vocab_size == 270


@pytest.mark.parametrize(
    "wrong", [{"source_column": "txt"}, {"vocabulary": 9}, {"dataset": "nobody/nowhere"}, {"dataset": "pairs.txt"}]
)
def test_a_command_that_is_corrected_begins(given, tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    Path("pairs.txt").touch()
    with pytest.raises(ValueError):
        first_stages(tmp_path / "run", **given | wrong)
    first_stages(tmp_path / "run", **given)
    resumed = Pipeline(open_run(tmp_path / "run", given, True))
    assert resumed.teacher_path == given["teacher"]


@pytest.mark.parametrize("dataset", ["./nowhere", "pairs.csv"])
def test_data_that_are_not_there_are_said_before_a_teacher_is_fetched(tmp_path, monkeypatch, dataset):
    def fetch(name):
        raise AssertionError("fetched")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "teacher_path", fetch)
    with pytest.raises(ValueError, match=f"^{dataset} is not there"):
        first_stages(tmp_path / "run", dataset=dataset)


def test_only_a_run_that_was_asked_for_it_has_a_twin(finished):
    metrics, said = finished.metrics, (finished.folder / "student" / "README.md").read_text()
    for there in (
        "twin" in finished.results,
        "student_ce" in metrics["models"],
        "student_ce" in metrics["curves"],
        bool(metrics["differences"]),
        "cross-entropy alone" in said,
        (finished.folder / "work" / "student-ce").exists(),
        any("twin" in stage["name"] for stage in metrics["stages"]),
    ):
        assert there is finished.has_twin
    for difference in metrics["differences"]:
        for name in ("ce", "kl", "teacher_agreement", "rouge_l"):
            models = metrics["models"]
            expected = models["student_kd"][name]["value"] - models["student_ce"][name]["value"]
            assert difference[name]["value"] == pytest.approx(expected, abs=1e-6)
            assert difference[name]["low"] <= difference[name]["value"] <= difference[name]["high"]


def test_the_clock_that_is_shown_is_honest(finished):
    """What is to come, at the beginning of each stage, against what came."""
    for came, left in finished.shown:
        assert came == pytest.approx(left, abs=60), finished.shown
    assert "later than asked for" not in finished.said
    assert re.search(r"^12 minutes were asked for, and 11:\d\d taken$", finished.said, re.MULTILINE)


def test_a_machine_that_slows_down_after_the_plan_leaves_out_rows_for_all_models(given, tmp_path, monkeypatch):
    machine, evaluate = build(monkeypatch, Machine()), Pipeline.evaluate

    def others_come(self, update):
        machine.factor = 1.6
        return evaluate(self, update)

    monkeypatch.setattr(Pipeline, "evaluate", others_come)
    metrics, minutes = run(machine, tmp_path / "run", {**given, "minutes": 12.0})
    assert minutes <= 12.2
    counts = {entry["n"] for entry in metrics["models"].values()}
    assert len(counts) == 1 and counts < {16, 32, 48}
    assert metrics["data"]["test_rows"] == min(counts)
    assert any(sentence.startswith("Few rows. ") for sentence in metrics["verdict"]["sentences"])


def test_a_run_that_cannot_end_in_time_says_by_how_much(given, tmp_path, capsys, monkeypatch):
    machine = build(monkeypatch, Machine(factor=4.0))
    metrics, minutes = run(machine, tmp_path / "run", {**given, "minutes": 2.0})
    assert {entry["n"] for entry in metrics["models"].values()} == {8}
    assert metrics["recipe"]["steps"] == metrics["recipe"]["teacher_steps"] == 1
    said = capsys.readouterr().err
    late = [int(number) for number in re.findall(r"left, (\d+) min later than asked for", said)]
    # From the first rows on, when nothing was trained yet; the part of a minute is not said.
    assert late[0] + 1 > (minutes - 2) / 2
    assert late[-1] == pytest.approx(minutes - 2, abs=1)
    assert "8 held-out rows, since 2 minutes do not allow 64" in said
    assert any("did not allow more than 8 held-out rows" in sentence for sentence in metrics["verdict"]["sentences"])


def test_a_training_that_begins_slowly_is_not_said_to_be_late(given, tmp_path, capsys, monkeypatch):
    """Many rows are put in order before the first step; the clock ends the training all the same."""
    machine = build(monkeypatch, Machine())
    order = pipeline.training_order
    monkeypatch.setattr(pipeline, "training_order", lambda *args: machine.takes(40.0) or order(*args))
    _, minutes = run(machine, tmp_path / "run", {**given, "minutes": 12.0})
    assert 11.0 < minutes <= 12.0
    assert "later than asked for" not in capsys.readouterr().err


# Continued -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def again(finished, tmp_path, monkeypatch):
    """A copy of the finished run, and a machine for it."""
    unfreezes(monkeypatch, recipe.FROZEN_BELOW_MINUTES if finished.is_short else 12.0)
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    return SimpleNamespace(**{**vars(finished), "folder": folder, "machine": build(monkeypatch, Machine())})


def check_continued(again, metrics):
    """What holds for the students of a finished run that were trained on, however often that was interrupted."""
    done, before, machine = results(again.folder), again.results, again.machine
    first, steps = before["distill"]["steps"], metrics["recipe"]["steps"]
    assert steps == done["distill"]["steps"] > first
    assert done["distill"]["rates"][:first] == before["distill"]["rates"]
    fresh = done["distill"]["rates"][first:]
    peak = recipe.ALL_WEIGHTS_LEARNING_RATE
    assert 0.8 * peak < max(fresh) <= peak and fresh[-1] < 0.3 * peak
    assert done["teach"] == before["teach"] and done["start"] == before["start"]
    assert metrics["recipe"]["minutes"] == 22.0
    assert metrics["curves"]["student_kd"][-1]["step"] == steps
    assert metrics["curves"]["student_kd"][:first] == again.metrics["curves"]["student_kd"]
    recorded = json.loads((again.folder / "recipe.json").read_text())
    assert recorded["recipe"]["steps"] == steps and recorded["settings"]["minutes"] == 22.0
    assert f"| steps | {steps} |" in (again.folder / "student" / "README.md").read_text()
    assert json.loads((again.folder / "metrics.json").read_text()) == metrics
    # The data go on where they ended: both students read the same batches.
    read = {kind: [rows for name, rows in machine.rows_trained if name == kind] for kind in ("distill", "twin")}
    assert len(read["distill"]) == steps - first
    if not again.has_twin:
        assert "twin" not in done and not read["twin"]
    else:
        assert done["twin"]["steps"] == steps and metrics["curves"]["student_ce"][-1]["step"] == steps
        assert done["twin"]["rates"] == pytest.approx(done["distill"]["rates"])
        assert read["twin"] == read["distill"]
    seconds = sum(stage["seconds"] for stage in metrics["stages"])
    assert 20 < seconds / 60 < 22.5


def test_a_finished_run_trains_on_for_more_minutes(again, monkeypatch):
    """From the last weights and the state of the optimizer."""
    saved = AutoModelForSeq2SeqLM.from_pretrained(again.folder / "student").state_dict()
    seen, step = [], Trainer.training_step

    def training_step(self, model, *args, **kwargs):
        if not seen:
            moments = next(iter(self.optimizer.state.values()))
            seen.append(({name: t.clone() for name, t in model.state_dict().items()}, moments["step"].item()))
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    metrics, minutes = run(again.machine, again.folder, {"minutes": 10.0}, resume=True)
    assert 9.0 < minutes <= 10.0
    check_continued(again, metrics)
    weights, steps = seen[0]
    assert steps == again.results["distill"]["steps"]
    assert all(torch.equal(saved[name], weights[name]) for name in saved)
    start, student = (encoder_weights(again.folder / name) for name in ("work/start", "student"))
    assert not torch.equal(*(weights["model.encoder.embed_tokens.weight"] for weights in (start, student)))
    assert metrics["recipe"]["encoder"].endswith("trained" if again.has_twin else "then all weights on all rows")
    student, before = (m["models"]["student_kd"]["ce"]["value"] for m in (metrics, again.metrics))
    assert student < before
    assert metrics["models"]["teacher_before"] == again.metrics["models"]["teacher_before"]


def test_a_continued_run_that_is_interrupted_goes_on(again):
    card = again.folder / "student" / "README.md"
    given = {"minutes": 10.0}
    for kind in ("distill", "twin") if again.has_twin else ("distill",):
        again.machine.interrupt_at = (kind, again.results["distill"]["steps"] + 2)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            run(again.machine, again.folder, given, resume=True)
        given = {}
        assert "report" not in results(again.folder)
        assert card.exists() == (kind == "distill")  # weights that are new have no card of the old ones
    with pytest.raises(ValueError, match=r"begun with minutes=10\.0, not 60\.0.*once it is finished"):
        run(again.machine, again.folder, {"minutes": 60.0}, resume=True)
    with pytest.raises(ValueError, match="seed=0, not 1"):
        run(again.machine, again.folder, {"seed": 1}, resume=True)
    again.machine.now += 100_000.0  # a night later
    metrics, _ = run(again.machine, again.folder, {}, resume=True)
    check_continued(again, metrics)


def test_a_short_run_that_is_continued_for_long_reads_all_packages(again, tmp_path, monkeypatch):
    """The held-out rows, the vocabulary and what was recorded stay; an interruption while it reads costs nothing."""
    file, folder = again.folder / "state.json", again.folder / "work"
    content = json.loads(file.read_text())
    # As if it were the built-in task, which the toy teacher knows by its own prompt.
    columns = {"source_column": "source", "target_column": "target"}
    content["settings"] |= {"dataset": "built-in", "prompt_template": recipe.OTHER_TEMPLATE, **columns}
    file.write_text(json.dumps(content))
    short, long = ({"minutes": minutes} for minutes in (recipe.FROZEN_BELOW_MINUTES - 20.0, 30.0))
    assert not open_run(again.folder, short, True, again.machine).reads_more
    assert open_run(again.folder, long, True, again.machine).reads_more is not again.has_twin
    if not again.is_short:
        return
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for split, rows in (("train", 900), ("validation", 5), ("test", 5)):
        write_pairs(pairs / f"{split}.csv", rows)
    asked, load = [], pipeline.load_splits

    def load_splits(dataset, source, target, packages):
        asked.append((dataset, packages))
        if len(asked) == 1:
            raise KeyboardInterrupt
        return load(str(pairs), "text", "short", packages)

    rows_trained, order = [], pipeline.training_order
    monkeypatch.setattr(
        pipeline, "training_order", lambda lengths, *rest: rows_trained.append(len(lengths)) or order(lengths, *rest)
    )
    monkeypatch.setattr(pipeline, "load_splits", load_splits)
    data = [path.read_bytes() for path in sorted((folder / "data").rglob("*.arrow"))]
    vocabulary = (folder / "teacher-before" / "tokenizer.json").read_bytes()
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        run(again.machine, again.folder, long, resume=True)
    metrics, minutes = run(again.machine, again.folder, {}, resume=True)
    assert asked == [("built-in", "all")] * 2 and 27.0 < minutes <= 30.0
    assert (again.metrics["data"]["train_rows"], metrics["data"]["train_rows"]) == (300, 900)
    assert [path.read_bytes() for path in sorted((folder / "data").rglob("*.arrow"))] == data
    assert (folder / "teacher-before" / "tokenizer.json").read_bytes() == vocabulary
    assert metrics["data"]["test_rows"] == again.metrics["data"]["test_rows"]
    assert metrics["models"]["teacher_before"] == again.metrics["models"]["teacher_before"]
    assert rows_trained == [900]
    open_run(again.folder, short, True, again.machine).save()
    run(again.machine, again.folder, {}, resume=True)
    assert len(asked) == 2 and results(again.folder)["more"]["rows"] == 900


def test_a_continued_run_has_as_many_rows_as_its_minutes_allow(again):
    file = again.folder / "state.json"

    def go_on(minutes):
        return open_run(again.folder, {"minutes": minutes}, True, again.machine).results

    assert go_on(60.0)["before"]["plan"]["held_out"] == 64  # what is known of the untuned teacher
    load, a_row = (12, 2.225) if again.has_twin else (9, 1.625)
    assert go_on(3.0)["before"]["plan"]["held_out"] == int((0.35 * 180 - load) / a_row)
    content = json.loads(file.read_text())
    content["results"]["before"]["ce"] = content["results"]["before"]["ce"][:20]
    file.write_text(json.dumps(content))
    assert "before" not in go_on(60.0)  # now there is time for more
    assert go_on(1.0)["before"]["plan"]["held_out"] == 8


def test_a_finished_run_without_its_last_checkpoints_is_not_continued(again):
    name = "training-student-ce" if again.has_twin else "training-student"
    (checkpoint,) = (again.folder / "work" / name).iterdir()
    (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=rf"{name} has no whole checkpoint of step \d+"):
        run(again.machine, again.folder, {"minutes": 10.0}, resume=True)
    assert run(again.machine, again.folder, {}, resume=True)[0] == again.metrics  # nothing was lost
