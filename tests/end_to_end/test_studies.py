"""The programs of `studies/` run, on toys: what they write can be read, and nothing is run twice."""

import contextlib
import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from distillation_toys import write_teacher
from PIL import Image
from teacher_server import TeacherServer
from toys import make_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    Trainer,
    TrainingArguments,
)


STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture
def studies(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES))
    yield
    for name in [file.stem for file in STUDIES.glob("*.py")]:
        sys.modules.pop(name, None)


@pytest.fixture
def toy_task(tmp_path, make_bpe_tokenizer):
    from tasks import Task

    rows = Dataset.from_list([{"source": f"a{i} and b{i}", "target": f"the {i} pairs"} for i in range(40)])
    splits = DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))
    teacher = write_teacher(tmp_path / "toy" / "teacher", make_bpe_tokenizer(pad_token="<|endoftext|>"))
    return Task("toy", splits, "{source}\n", teacher)


@pytest.mark.slow
def test_quality(studies, toy_task, tmp_path, monkeypatch):
    import quality

    arms = ["base", "ce", "live", "sampled", "policy_50", "separate", "random", "adapted"]
    monkeypatch.setattr(quality, "LAYERS", (3, 2))
    monkeypatch.setattr(quality, "load_task", lambda *_: toy_task)
    (tmp_path / "plain.txt").write_text("Of what there is to read, a part is read and the rest is written.\n" * 40)
    plain = functools.partial(quality.load_plain_text, tmp_path / "plain.txt")
    monkeypatch.setattr(quality, "load_plain_text", lambda _, *args, **options: plain(*args, **options))
    monkeypatch.setitem(quality.ARMS, "adapted", dataclasses.replace(quality.ARMS["adapted"], plain_text_steps=1))
    options = ["quality", "--work", str(tmp_path), "--output", str(tmp_path / "out"), "--steps", "2"]
    options += ["--batch-size", "2", "--test-rows", "6", "--arms", *arms]
    monkeypatch.setattr(sys, "argv", [*options, "--seeds", "0", "1", "2"])
    quality.main()
    file = tmp_path / "out" / "docstrings.json"
    results = json.loads(file.read_text())
    assert set(results["arms"]) == set(arms)
    for runs in results["arms"].values():
        assert set(runs) == {"0", "1", "2"}
        assert all(run["ce"] > 0 and run["kl"] >= 0 and 0 <= run["teacher_agreement"] <= 1 for run in runs.values())
    assert results["arms"]["base"]["0"] != results["arms"]["base"]["1"]  # the seed does something
    monkeypatch.setattr(quality, "run", lambda *_: pytest.fail("ran again"))
    quality.main()
    assert json.loads(file.read_text()) == results


def test_differences_are_taken_seed_by_seed(studies):
    import quality

    def run(ce):
        return {"ce": ce, "kl": 1.0, "teacher_agreement": 0.5, "rouge_l": 0.2, "distinct": 1.0}

    runs = {
        "base": {"0": run(3.0), "1": run(4.0), "2": run(5.0)},
        "ce": {"0": run(3.1), "1": run(4.3), "2": run(5.2)},  # +0.1, +0.3, +0.2
        "half": {"0": run(2.9), "1": run(4.3)},  # either sign
    }
    setting = {"task": "toy", "steps": 1, "batch_size": 1, "layers": [1, 1], "test_rows": 1, "test_tokens": 1}
    setting |= {"generated_rows": 1, "teacher": {"ce": 2.5, "rouge_l": 0.3, "distinct": 1.0}}
    table = quality.tables({"setting": setting, "arms": runs})
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line.startswith("| ")}
    assert rows["cross-entropy alone"].split(" | ")[2:3] == ["4.200"]
    assert "**+0.200** [+0.100, +0.300]" in rows["cross-entropy alone"]
    assert "| +0.100 [-0.100, +0.300] |" in rows["weight 0.5"]


def test_heal(studies, toy_task, tmp_path, monkeypatch):
    import heal

    arms = {"only": heal.Arm("decoder-only 2", 2), "split": heal.Arm("2 + 1", 1, 2)}
    arms["likely"] = heal.Arm("2 + 1, likely answers", 1, 2, targets="likely")
    arms["pooled"] = heal.Arm("2 + 1, pooled", 1, 2, options={"encoder_pooling": 2})
    arms["shared"] = heal.Arm("2 + 2, shared", 2, 2, options={"cross_attention_sharing": 2})
    monkeypatch.setattr(heal, "ARMS", arms)
    monkeypatch.setattr(heal, "HEAL_ROWS", 40)
    monkeypatch.setattr(heal, "SHAPES", {"8/3": (8, 3), "4/2": (4, 2)})
    monkeypatch.setattr(heal, "load_task", lambda *_: toy_task)
    monkeypatch.setattr(heal, "fetch_builtin_teacher", lambda: toy_task.teacher)
    out = tmp_path / "out"
    options = ["heal", "--work", str(tmp_path), "--output", str(out), "--test-rows", "6", "--generated", "4"]

    def main(*more):
        monkeypatch.setattr(sys, "argv", [*options, *more])
        heal.main()

    main("--minutes", "0.02", "--seeds", "0", "1", "--arms", *arms)
    file = out / "docstrings-0.02.json"
    results = json.loads(file.read_text())
    assert (results["setting"]["test_rows"], results["setting"]["generated_rows"]) == (6, 4)
    for runs in results["arms"].values():
        assert set(runs) == {"0", "1"}
        for run in runs.values():
            assert run["steps"] >= 1 and run["kl"] < run["start"]["kl"] + 1 and 0 <= run["teacher_agreement"] <= 1
    monkeypatch.setattr(heal, "run", lambda *_: pytest.fail("ran again"))
    main("--minutes", "0.02", "--seeds", "0", "1", "--arms", *arms)
    main("--latency", "--rounds", "2")
    latency = json.loads((out / "latency.json").read_text())
    splits = {"2 + 1", "2 + 1, encoder_pooling=2", "2 + 2, cross_attention_sharing=2"}
    assert set(latency["rounds"]["8/3"]) == {"2", latency["teacher"], *splits}
    assert all(len(rounds) == 2 for rounds in latency["rounds"]["4/2"].values())
    main("--table")
    table = file.with_suffix(".md").read_text()
    assert "| decoder-only 2 |" in table and "8/3: first token, step, request" in table
    for name in re.findall(r'(?:src|srcset)="(.*?)"', table):
        assert (out / name).is_file()
    assert 'srcset="docstrings-0.02-8-3-dark.svg"' in table
    for timings in latency["rounds"].values():  # as after a run of an arm that is new
        del timings["2 + 1"]
    (out / "latency.json").write_text(json.dumps(latency))
    main("--table")
    table = file.with_suffix(".md").read_text()
    assert "| 2 + 1 | not timed | not timed |" in table and "| decoder-only 2 | not timed" not in table


def test_cost_table(studies):
    import cost

    def run(seconds):
        sizes = {"peak_mb": 2000.0, "before_training_mb": 1000.0, "parameters": 5_000_000}
        return {"seconds": seconds, "flops": 1.2e12, "matrix_rate": 2e12, **sizes}

    table = cost.table({"cross-entropy alone": [run(1.0), run(2.0)], "live teacher": [run(1.5), run(4.0)]})
    assert "| live teacher | 5.0 | 2.75 [1.50, 4.00] | 1.75 [1.50, 2.00] | 2.91 | 2.00 | 1.20 | 28 |" in table


def test_the_flops_of_one_step_are_counted(studies, toy_task, tmp_path, monkeypatch):
    import cost

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(16, 4)

        def forward(self, x):
            return {"loss": self.layer(x).sum()}

    def trainer(name, task, rows, tokenizer, shared, causal):
        return Trainer(Model(), TrainingArguments(**shared), train_dataset=[{"x": torch.ones(16)}] * 80)

    monkeypatch.setattr(cost, "load_task", lambda *_: toy_task)
    monkeypatch.setattr(cost, "_rows", lambda *_: None)
    monkeypatch.setattr(cost, "_our_trainer", trainer)
    measured = cost.measure("live teacher", tmp_path)
    product = 2 * cost.BATCH * 16 * 4
    assert measured["flops"] == 2 * product  # forward, and the gradient of the weights; the input needs none
    assert measured["parameters"] == 68 and measured["seconds"] > 0


def test_speed_table(studies):
    """Medians of ratios within a round, seeds in brackets, differences row by row."""
    import speed

    def run(layers, seed, scores):
        return speed.Run("run", *layers, 16000, 12.0, seed, scores, [50.0, 50.0], 1.5, 50.0)

    def row(model, source, *requests):
        measured = [{"first_token_ms": 0.1 * ms, "step_ms": 0.01 * ms, "request_ms": ms} for ms in requests]
        values = {name: {"value": measured[0][name]} for name in speed.TIMES}
        return {"model": model, "source": source, "parameters": 48_200_000, "measured": measured, **values}

    small, large = [[run((5, 6), 0, [20.0, 30.0]), run((5, 6), 1, [30.0, 30.0])], [run((20, 10), 0, [30.0, 28.0])]]
    by_label = {runs[0].label: runs for runs in (small, large)}
    first, second = by_label
    rows = [
        row(model, source, *times)
        for source in (128, 512)
        for model, times in {
            first: (20.0, 30.0, 25.0),
            second: (50.0, 50.0, 50.0),
            speed.TEACHER: (100.0, 120.0, 200.0),
        }.items()
    ]
    slower = row(speed.TEACHER, 128, 400.0, 400.0, 400.0)  # its other setting in llama.cpp
    report = {"machine": {"threads": 2, "cpu": "x"}, "spread": "3 rounds", "rows": [slower, *rows]}
    lines = speed.tables(by_label, report).splitlines()
    assert first == "5 + 6, 16,000 tokens, 12 minutes"
    assert "| 2 | 27.5 [25.0, 30.0] | 55 % | 1.50 | 50.0 % | **2.0 (0.20), 0.2 (0.20), 20.0 (0.20)** |" in lines[6]
    assert "| 1 | 29.0 | 58 % | 1.50 | 50.0 % | **5.0 (0.42), 0.5 (0.42), 50.0 (0.42)** |" in lines[7]
    assert f"- {first}, minus {second}: -1.5 points [-5.0, +2.0]" in lines
    assert speed.points(by_label, report, speed.REQUESTS[0])[first] == (0.2, (27.5, 25.0, 30.0))


def test_loss_weight_table(studies):
    """Means over the runs, shares of each run's own teacher, differences row by row."""
    import loss_weight

    def found(*scores, ce=3.0):
        return [{"rouge_l": scores, "ce": ce, "kl": 1.0, "teacher_agreement": 0.5, "steps": 7}]

    taken = {
        "a teacher": [{"rouge_l": [50.0, 50.0]}],
        "b teacher": [{"rouge_l": [40.0, 40.0]}],
        "a 0.9": found(20.0, 30.0),
        "b 0.9": found(20.0, 20.0, ce=4.0),
        "a 0.5": found(24.0, 36.0),
        "b 0.5": found(24.0, 20.0),
    }
    lines = loss_weight.table(taken, [0.9, 0.5]).splitlines()
    assert (
        "Runs of the quickstart: 2. Held-out rows: 2." in lines[2]
        and "Steps of the runs: 7, 7." in lines[2]
        and "teachers: 50.0, 40.0." in lines[2]
    )
    assert "| 0.9 | 3.50 | 1.00 | 50.0 % | 22.5 | 50, 50 % |  |" in lines
    assert "| 0.5 | 3.00 | 1.00 | 50.0 % | 26.0 | 60, 55 % | +3.5 [+3.0, +4.0] |" in lines


@torch.inference_mode()
def test_upper_layers_on_kept_states(studies, toy_task, monkeypatch):
    """They give the logits of the whole model at the targets, but for the rounding of the states."""
    import upper_layers

    monkeypatch.setattr(upper_layers, "autocast", contextlib.nullcontext)
    teacher = AutoModelForCausalLM.from_pretrained(toy_task.teacher).eval()
    rows = [{"prompt": list(range(3, 5 + i)), "labels": [7, 8, 9][: 1 + i % 3]} for i in range(11)]
    batch = upper_layers.completion_batch(rows[:8])
    targets = batch.pop("labels") != -100
    expected = teacher(**batch).logits[:, :-1][targets]
    layers = teacher.model.layers
    share = upper_layers.TimeShare(1e6, 1, 1e-3, print)
    kept = upper_layers.keep_states(teacher, 1, rows, upper_layers.Arm(len(layers) - 1, 3), share)
    assert [len(states) for states in kept] == [len(row["prompt"] + row["labels"]) for row in rows]
    teacher.eval().model.layers = layers[1:]
    batch = upper_layers._on_states([row | {"states": states} for row, states in zip(rows[:8], kept)])
    del batch["labels"]
    logits = teacher(**batch).logits[:, :-1][targets]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_upper_layers(studies, tmp_path, monkeypatch):
    """A run is tuned once with each arm, and the table has a line for each, with differences row by row."""
    import upper_layers

    asked = []

    def measure(pipeline, arm, seconds, held_out):
        asked.append(arm)
        return {"steps": 7, "rows": 56, "ce": 2.5, "rouge_l": [20.0, 30.0] if arm.upper is None else [24.0, 30.0]}

    monkeypatch.setattr(upper_layers, "open_run", lambda *_: None)
    monkeypatch.setattr(upper_layers, "Pipeline", lambda _: None)
    monkeypatch.setattr(upper_layers, "measure", measure)
    options = ["upper_layers", str(tmp_path / "a"), str(tmp_path / "b"), "--arms", "upper 10"]
    monkeypatch.setattr(sys, "argv", [*options, "--output", str(tmp_path / "out")])
    upper_layers.main()
    upper_layers.main()
    assert [arm.upper for arm in asked] == [None, 10] * 2
    lines = (tmp_path / "out" / "upper_layers.md").read_text().splitlines()
    assert "| all | 7, 7 | 56, 56 | 2.500, 2.500 | 25.0 |  |" in lines
    assert "| upper 10 | 7, 7 | 56, 56 | 2.500, 2.500 | 27.0 | +2.0 [+0.0, +4.0] |" in lines


def test_chunked_loss(studies, tmp_path, monkeypatch):
    import chunked_loss

    monkeypatch.setattr(chunked_loss, "HIDDEN", 16)
    monkeypatch.setattr(chunked_loss, "VOCABULARY", 64)

    @functools.cache
    def once(command):
        result = chunked_loss.measure(command[0], *map(int, command[1:]))
        # A toy may add nothing to what this process holds already; the study starts one for each run.
        return json.dumps(result | {"gb": max(result["gb"], 1e-3)})

    asked = []

    def run(command, **_):
        asked.append(tuple(command[command.index("--measure") + 1 :]))
        return subprocess.CompletedProcess(command, 0, stdout=once(asked[-1]))

    monkeypatch.setattr(chunked_loss.subprocess, "run", run)
    monkeypatch.setattr(chunked_loss, "TARGETS", 256)
    monkeypatch.setattr(sys, "argv", ["chunked_loss", "--output", str(tmp_path), "--rounds", "1"])
    chunked_loss.main()
    taken = json.loads((tmp_path / "chunked_loss.json").read_text())
    assert len(asked) == len(taken) and all(run["seconds"] > 0 for (run,) in taken.values())
    chunked_loss.main()  # nothing is run twice
    assert len(asked) == len(taken)


def test_served_captures(studies, make_bpe_tokenizer, tmp_path, monkeypatch):
    """Of a server with the same weights nothing differs, of one with others much does."""
    import served_captures

    tokenizer = make_bpe_tokenizer(pad_token="<|endoftext|>")
    folder = write_teacher(tmp_path / "toy", tokenizer, layers=2)
    rows = [{"source": f"a{i} and b{i}", "target": f"the {i} pairs"} for i in range(40)]
    monkeypatch.setattr(served_captures, "load_python_docstrings", lambda _: {"test": Dataset.from_list(rows)})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    model, found = AutoModelForCausalLM.from_pretrained(folder), []
    for _ in range(2):
        with TeacherServer(model, AutoTokenizer.from_pretrained(folder), max_length=4096) as server:
            options = ["--teacher", str(folder), "--rows", "6", "--k", "8", "--output", str(tmp_path)]
            monkeypatch.setattr(sys, "argv", ["served_captures", server.url, *options])
            served_captures.main()
        found.append(json.loads((tmp_path / f"{server.kind}-0.33.0-float32.json").read_text()))
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
    same, other = found
    assert same["rows"] == 6 and same["targets"] > 6
    assert same["log_prob_largest"] < 1e-4 and same["of_one_record_alone"] == same["other_first"] == 0
    assert other["log_prob_mean"] > 0.02


@pytest.mark.slow
def test_onnx_fusions(studies, tmp_path, monkeypatch):
    """Each form has the operators that it is named for, and says the same."""
    import onnx_fusions

    make_model("merged", encoder_attention="causal").save_pretrained(tmp_path / "student")
    monkeypatch.setattr(onnx_fusions, "RUNS", {("encoder", 8): 1, ("decoder", 8): 1})
    options = ["--work", str(tmp_path / "work"), "--output", str(tmp_path), "--variant", "fp32", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["onnx_fusions", str(tmp_path / "student"), *options])
    onnx_fusions.main()
    result = json.loads((tmp_path / "onnx_fusions.json").read_text())["fp32"]
    for runs in result["milliseconds"].values():
        assert all(run["difference"] < 1e-4 for run in runs.values())
    encoders = {form: counts["encoder"] for form, counts in result["operators"].items()}
    assert "Attention" in encoders["opset 23"] and "Attention" not in encoders["opset 18"]
    assert "RotaryEmbedding" in encoders["opset 23, RotaryEmbedding"]
    assert encoders["GroupQueryAttention"]["GroupQueryAttention"] == 2  # nobody reads the third layer
    assert "| fp32, GroupQueryAttention |" in (tmp_path / "onnx_fusions.md").read_text()


# --- what students read in pictures ---


@pytest.fixture
def toy_lesson(make_bpe_tokenizer, tmp_path, studies, monkeypatch):
    """The study on a toy teacher and tower."""
    monkeypatch.syspath_prepend(str(STUDIES.parent / "examples" / "vision"))
    import vision_reading

    teacher = write_teacher(tmp_path / "teacher", make_bpe_tokenizer(), layers=3)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 12, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes, image_size=112)).save_pretrained(tmp_path / "tower")
    toy = functools.partial(vision_reading.Lesson, teacher=teacher, vision_tower=tmp_path / "tower")
    monkeypatch.setattr(vision_reading, "Lesson", toy)
    monkeypatch.setattr(vision_reading, "HELD_OUT", 4)
    yield vision_reading
    sys.modules.pop("students", None)


def test_lines_that_a_student_spells(toy_lesson, tmp_path, monkeypatch):
    options = ["--output", str(tmp_path), "--work", str(tmp_path / "work"), "--texts", "6", "--pictures", "40"]
    monkeypatch.setattr(sys, "argv", ["vision_reading", "lines", "--steps", "5", *options])
    toy_lesson.main()
    found = json.loads((tmp_path / "lines-0.json").read_text())["students"]
    assert {name: row["steps"] for name, row in found.items()} == {"distilled": 5, "labels": 5, "blind": 1}
    for row in found.values():
        for held_out in ("other lines", "other lines in other fonts"):
            assert row[held_out]["character error rate"]["value"] > 0.2  # of random weights
            assert all(len(word) == 1 for word in row[held_out]["examples"][0][0].split(" "))


def test_titles_that_a_student_writes(toy_lesson, tmp_path, monkeypatch):
    """Left out are playing cards and titles that name a collection; known titles and others are told apart."""
    titles = [f"{animal} {number}" for number in range(6) for animal in ("Lion", "sea horse", "owl", "ox")]
    drawings = {f"animals/{number}": title for number, title in enumerate([*titles, "Kiwi", "Emu", *["set"] * 21])}
    drawings |= {"games/cards/ace": "ace", "shapes/odd": "24.10.2004"}
    for place, title in drawings.items():
        for kind in ("png", "svg"):
            (tmp_path / kind / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (30, 60), (0, 0, 0, 0)).save(tmp_path / "png" / f"{place}.png")
        (tmp_path / "svg" / f"{place}.svg").write_text(f"<svg><dc:title>{title}</dc:title></svg>")
    split = toy_lesson.clipart(tmp_path, 0)
    known = {picture.words for picture in split.train}
    pictures = {name: {picture.words for picture in part} for name, part in split.held_out.items()}
    assert known <= {"lion", "sea horse", "owl", "ox", "kiwi", "emu"} and len(split.train) == 26 - 8
    assert pictures["other drawings of known titles"] <= known
    assert not pictures["drawings of other titles"] & known
    assert split.train[0].image.getpixel((0, 0)) == (255, 255, 255)  # what is transparent is white
    options = ["--output", str(tmp_path), "--work", str(tmp_path / "work"), "--drawings", str(tmp_path)]
    monkeypatch.setattr(toy_lesson, "clipart", lambda *_: split)
    split.held_out.update({"drawings of other titles": split.train[:3]})
    monkeypatch.setattr(sys, "argv", ["vision_reading", "clipart", "--steps", "1", "--students", "labels", *options])
    toy_lesson.main()
    found = json.loads((tmp_path / "clipart-0.json").read_text())["students"]["labels"]
    assert 0 <= found["drawings of other titles"]["ROUGE-L"]["value"] < 0.9


def test_answers_are_judged_by_characters_and_by_titles(toy_lesson):
    lines = [toy_lesson.Picture(None, "t h e"), toy_lesson.Picture(None, "a _ b o x")]
    found = toy_lesson.judge_lines(["t h e", "a _ f o"], lines)
    assert found["character error rate"]["value"] == pytest.approx(2 / 8)  # one is wrong, one is missing
    assert found["lines without error"]["value"] == 0.5
    titles = [toy_lesson.Picture(None, "red house"), toy_lesson.Picture(None, "owl")]
    found = toy_lesson.judge_clipart(["house", "owl"], titles)
    assert found["whole titles"]["value"] == 0.5
    assert found["ROUGE-L"]["value"] == pytest.approx((2 / 3 + 1) / 2)
