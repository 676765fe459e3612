"""The examples run on toys: the scripts as they are printed in their docstrings and from a config file."""

import ast
import gettext
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import humanize
import nbclient
import nbformat
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from distillation_toys import write_pairs, write_teacher
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    Dinov2Config,
    Dinov2Model,
)

from hf_encdec_distill.cli.main import main
from hf_encdec_distill.data import load_python_docstrings, save_pairs


EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = Path(__file__).parent / "data"
PACKAGES = Path(humanize.__file__).parents[1]  # where packages are that bring translations along
SCRIPTS = {
    "run_distillation.py": ("teacher_name_or_path", {"ce_loss", "distill_loss"}, {"eval_teacher_agreement"}),
    "finetune_seq2seq.py": ("model_name_or_path", set(), set()),
}
TOY_SHAPE = {"encoder_layers": 2, "decoder_layers": 2, "calibration_samples": 4}
TOY_TRAINING = {"max_steps": 2, "use_cpu": True, "logging_steps": 1, "save_steps": 2, "report_to": "none"}
TOY_LIMITS = {"max_train_samples": 8, "max_eval_samples": 4, "max_predict_samples": 4}


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory, make_bpe_tokenizer):
    return write_teacher(tmp_path_factory.mktemp("toy") / "teacher", make_bpe_tokenizer(chat_template=None), layers=3)


def options(values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def metrics_of(output, split):
    return json.loads((output / f"{split}_results.json").read_text())


@pytest.mark.process
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_as_printed(script, teacher_folder, tmp_path):
    model, of_training, of_evaluation = SCRIPTS[script]
    printed = ast.get_docstring(ast.parse((EXAMPLES / script).read_text())).split("\n\n")[1].replace("\\", "").split()
    assert printed[:2] == ["python", f"examples/{script}"]
    output = tmp_path / "run"
    toy = {model: teacher_folder, "output_dir": output, **TOY_SHAPE, **TOY_TRAINING, **TOY_LIMITS}
    # Here and not in a test of this process: to fork one that OpenVINO has run in can end it with SIGSEGV.
    toy["dataloader_num_workers"] = 1
    command = [sys.executable, str(EXAMPLES / script), *printed[2:], *options(toy)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert {"loss", *of_training} <= {key for row in state["log_history"] for key in row}
    assert {"train_loss", "train_samples"} <= set(metrics_of(output, "train"))
    assert {"eval_loss", "eval_rougeL", "eval_samples", *of_evaluation} <= set(metrics_of(output, "eval"))
    assert metrics_of(output, "predict")["predict_samples"] == 4
    predictions = [json.loads(line) for line in (output / "generated_predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 4 and all(set(row) == {"source", "target", "prediction"} for row in predictions)
    card = (output / "README.md").read_text()
    assert f"Rougel: {round(metrics_of(output, 'eval')['eval_rougeL'], 4)}" in card
    start = AutoModelForSeq2SeqLM.from_pretrained(output / "checkpoint-2")
    saved = AutoModelForSeq2SeqLM.from_pretrained(output)
    assert saved.config.model_type == "rope_encdec"
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), saved.parameters(), strict=True))


def run_script(script, monkeypatch, *arguments):
    """In this process: another would have to import torch again."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script), *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_takes_a_config_file_and_goes_on(script, teacher_folder, tmp_path, monkeypatch):
    model, *_ = SCRIPTS[script]
    output = tmp_path / "run"
    recipe = {
        model: str(teacher_folder),
        "train_file": str(write_pairs(tmp_path / "train.csv", 20)),
        "validation_file": str(write_pairs(tmp_path / "validation.csv", 6)),
        "source_column": "text",
        "target_column": "short",
        "prompt_template": "{source}\n",
        "metrics": ["chrf", "squad"],
        "output_dir": str(output),
        "max_target_length": 8,
        "do_train": True,
        "do_eval": True,
        "predict_with_generate": True,
        **TOY_SHAPE,
        **TOY_TRAINING,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_script(script, monkeypatch, tmp_path / "recipe.yaml")
    first = metrics_of(output, "eval")
    assert first["eval_samples"] == 6 and {"eval_chrf", "eval_f1"} <= set(first) and "eval_rougeL" not in first
    (tmp_path / "recipe.json").write_text(json.dumps({**recipe, "max_steps": 3}))
    run_script(script, monkeypatch, tmp_path / "recipe.json")
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3]
    steps = [row["loss"] for row in history if "loss" in row]
    before = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert steps[:2] == [row["loss"] for row in before if "loss" in row]  # not trained again


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_which_rows_are_missing(script, teacher_folder, tmp_path, monkeypatch):
    toy = {SCRIPTS[script][0]: teacher_folder, "output_dir": tmp_path / "run", "do_eval": True, "report_to": "none"}
    toy |= {"validation_file": write_pairs(tmp_path / "a.csv", 6), "source_column": "text", "target_column": "short"}
    with pytest.raises(ValueError, match="no train rows"):  # to make a student with
        run_script(script, monkeypatch, *options(toy))


def test_no_student_is_made_of_a_cache(teacher_folder, tmp_path, monkeypatch):
    pairs = write_pairs(tmp_path / "a.csv", 20)
    columns = ["--source-column", "text", "--target-column", "short", "--prompt-template", "{source} in short:"]
    cache = ["cache", str(teacher_folder), "--dataset", str(pairs), *columns, "--output", str(tmp_path / "cache")]
    assert main(cache) == 0
    toy = {"teacher_name_or_path": tmp_path / "cache", "train_file": pairs, "output_dir": tmp_path / "run"}
    toy |= {"source_column": "text", "target_column": "short", "prompt_template": "{source} in short:"}
    toy |= {"do_train": True, **TOY_TRAINING}
    with pytest.raises(ValueError, match="is a cache"):
        run_script("run_distillation.py", monkeypatch, *options(toy))
    # With a student it trains, and needs no teacher.
    student = ["--encoder-layers", "2", "--decoder-layers", "2", "--output", str(tmp_path / "student")]
    assert main(["init", str(teacher_folder), "--dataset", str(pairs), *columns, *student]) == 0
    run_script("run_distillation.py", monkeypatch, *options({**toy, "student_name_or_path": tmp_path / "student"}))
    assert metrics_of(tmp_path / "run", "train")["train_loss"] > 0


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "nothing to do"),
        ({"do_train": True}, "is not empty and has no checkpoint"),
        ({"do_eval": True, "metrics": "accuracy"}, "'accuracy' is none of rouge, squad, chrf, bleu"),
        ({"do_eval": True, "train_file": "a.csv", "dataset_name": "b"}, "leave one of them out"),
    ],
)
def test_what_a_script_refuses(script, wrong, message, tmp_path, monkeypatch):
    (tmp_path / "something").touch()
    with pytest.raises(ValueError, match=message):
        run_script(script, monkeypatch, *options({**wrong, "output_dir": tmp_path, "report_to": "none"}))


# --- the tasks ---


def lines_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
TASKS = dict(re.findall(r"<!-- task: (\S+) -->\n```bash\n(.*?)```", README, re.S))
# What stands in for data that come over the network.
OFFLINE = {
    "summarization": ["--index", DATA / "Translation-en"],
    "question_answering": ["--train", DATA / "squad.json", "--test", DATA / "squad.json"],
    "translation": ["--catalogues", PACKAGES],
}


def test_readme_has_the_four_tasks():
    assert set(TASKS) == {*OFFLINE, "built-in"}


@pytest.mark.parametrize("task", TASKS)
def test_the_commands_of_a_task_run_as_printed(task, teacher_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    few = {"max-steps": 2, "use_cpu": True, "per_device_train_batch_size": 4, "report_to": "none"}
    toy = {
        "teach": options(few),
        "distill": options({**few, "init.encoder_layers": 2, "init.decoder_layers": 2, "eval_strategy": "no"}),
        "evaluate": ["--rows", "4", "--max-target-length", "8", "--json"],
    }
    if task == "built-in":  # the packages of a machine take their time to read
        save_pairs(load_python_docstrings("stdlib")["test"].select(range(20)), "docstrings.jsonl")
        toy = {command: [*words, "--dataset", "docstrings.jsonl"] for command, words in toy.items()}
    for line in TASKS[task].splitlines():
        program, *words = shlex.split(line)
        if program == "python":
            assert words[0] == f"examples/tasks/{task}.py"
            run_script(f"tasks/{task}.py", monkeypatch, words[1], *OFFLINE[task])
            continue
        assert program == "hf-encdec-distill"
        command, *words = words
        if command == "teach":
            words[0] = str(teacher_folder)
        capsys.readouterr()
        assert main([command, *words, *toy[command]]) == 0
    (_, measured), (baseline, _) = json.loads(capsys.readouterr().out)["models"].items()
    assert baseline == "lead_baseline"
    asked = words[words.index("--metrics") + 1 :]
    assert len(asked) > 1
    for metric in asked:
        assert 0 <= measured[metric]["value"] <= (100 if metric in ("chrf", "bleu", "ce") else 1)
    assert AutoModelForSeq2SeqLM.from_pretrained(f"runs/{task}").config.decoder_num_hidden_layers == 2


def test_synopses_of_debian_packages(tmp_path, monkeypatch):
    run_script("tasks/summarization.py", monkeypatch, tmp_path, *OFFLINE["summarization"])
    splits = {split: lines_of(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 12, "validation": 3, "test": 4}
    assert splits["train"][0] == {
        "source": "Fpath is an OCaml module for handling file system paths with POSIX or\nWindows conventions. Fpath "
        "processes paths without accessing the file\nsystem and is independent from any system library.\n\nThis "
        "package contains the runtime files.",
        "target": "OCaml library for handling file system paths (runtime)",
    }
    more = tmp_path / "status"  # the same text under another name, and one that is too short
    more.write_text(
        (DATA / "Translation-en").read_text() + "\nPackage: a\nStatus: ok\nDescription: one\n " + 60 * "x" + "\n"
        "\nPackage: b\nDescription: two\n " + 60 * "x" + "\n\nPackage: c\nDescription: three\n short\n"
    )
    run_script("tasks/summarization.py", monkeypatch, tmp_path / "more", "--index", more)
    assert lines_of(tmp_path / "more" / "train.jsonl") == [*splits["train"], {"source": 60 * "x", "target": "one"}]


def test_questions_in_squads_format(tmp_path, monkeypatch):
    run_script("tasks/question_answering.py", monkeypatch, tmp_path / "of-files", *OFFLINE["question_answering"])
    rows = lines_of(tmp_path / "of-files" / "test.jsonl")
    assert rows[1] == {
        "source": "question: When were the notes published? context: Ada Lovelace was an English mathematician. She "
        "wrote notes on Charles Babbage's Analytical Engine, published in 1843, and in them an algorithm for "
        "Bernoulli numbers.",
        "target": "1843",
    }
    first = ["Charles Babbage's", "1843", "Bernoulli numbers", "Earth", "384,399 km", "the Sun", "the Moon"]
    assert [row["target"] for row in rows] == first
    # The columns that the Hub's squad has.
    row = {"id": "m1", "title": "Moon", "context": "The Moon is Earth's.", "question": "Whose is the Moon?"}
    squad = Dataset.from_list([{**row, "answers": {"text": ["Earth's", "Earth"], "answer_start": [12, 12]}}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name: DatasetDict(train=squad, validation=squad))
    run_script("tasks/question_answering.py", monkeypatch, tmp_path / "of-hub", "--dataset", "rajpurkar/squad")
    pair = {"source": "question: Whose is the Moon? context: The Moon is Earth's.", "target": "Earth's"}
    assert lines_of(tmp_path / "of-hub" / "train.jsonl") == lines_of(tmp_path / "of-hub" / "test.jsonl") == [pair]


def test_messages_and_what_gettext_says_of_them(tmp_path, monkeypatch):
    run_script("tasks/translation.py", monkeypatch, tmp_path / "pairs.jsonl", *OFFLINE["translation"])
    rows = lines_of(tmp_path / "pairs.jsonl")
    assert len(rows) >= 8 and len({row["source"] for row in rows}) == len(rows)
    catalogues = [
        gettext.GNUTranslations(file.open("rb"))
        for folder in ("de", "de_DE")
        for file in PACKAGES.rglob(f"{folder}/LC_MESSAGES/*.mo")
    ]
    for row in rows:
        assert row["target"] in {catalogue.gettext(row["source"]) for catalogue in catalogues}, row
        assert row["target"] != row["source"]
    nothing = ["--language", "xx", "--catalogues", PACKAGES]
    with pytest.raises(ValueError, match="no rows to write"):
        run_script("tasks/translation.py", monkeypatch, tmp_path / "none.jsonl", *nothing)
    assert not list(tmp_path.glob("none*"))
    books = Dataset.from_list([{"id": "0", "translation": {"de": "Ein Haus.", "en": "A house."}}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: books)
    of_hub = ["--dataset", "Helsinki-NLP/opus_books", "--config", "de-en"]
    run_script("tasks/translation.py", monkeypatch, tmp_path / "books.jsonl", *of_hub)
    assert lines_of(tmp_path / "books.jsonl") == [{"source": "A house.", "target": "Ein Haus."}]


# --- the student that reads cards ---


def test_cards_that_a_student_reads(make_bpe_tokenizer, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "vision"))
    teacher = write_teacher(tmp_path / "teacher", make_bpe_tokenizer(), layers=3)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 5, "patch_size": 14, "image_size": 84}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "tower")
    toy = ["--output", tmp_path / "run", "--teacher", teacher, "--vision-tower", tmp_path / "tower"]
    run_script(
        "vision/read_cards.py",
        monkeypatch,
        *toy,
        "--minutes",
        0.01,
        "--pictures",
        104,
        "--students",
        "distilled",
        "labels",
        "blind",
    )
    found = json.loads((tmp_path / "run/metrics.json").read_text())["students"]
    assert set(found) == {"distilled", "labels", "blind"}
    for row in found.values():
        assert row["steps"] >= 1
        assert all(0 <= row[part]["low"] <= row[part]["high"] <= 1 for part in ("card", "rank", "suit"))
    # The teacher has read each of the 52 names once, and the student is one that users can load.
    (manifest,) = (tmp_path / "run/records").glob("manifest.json")
    shards = [str(file) for file in manifest.parent.glob("shard-*.parquet")]
    assert datasets.Dataset.from_parquet(shards, cache_dir=str(tmp_path / "cache")).num_rows == 52
    student = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/student")
    processor = AutoProcessor.from_pretrained(tmp_path / "run/student")
    inputs = processor(images=np.zeros((90, 60, 3), dtype=np.uint8), text="<image>", return_tensors="pt")
    assert inputs["input_ids"].shape[-1] == 9 and student.generate(**inputs, max_new_tokens=2).shape[0] == 1
    kept = student.model.encoder.vision_tower.embeddings.cls_token
    assert torch.equal(kept, Dinov2Model.from_pretrained(tmp_path / "tower").embeddings.cls_token)  # frozen


def test_all_cards_are_drawn_and_differ(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "vision"))
    from cards import draw_cards

    drawn = draw_cards(104, 0, (84, 56))
    assert {picture.image.size for picture in drawn} == {(56, 84)}
    assert len({picture.words for picture in drawn}) == 52 and drawn[0].words == drawn[52].words == "ace of spades"
    assert len({picture.image.tobytes() for picture in drawn}) == 104
    again, other = draw_cards(1, 0, (84, 56))[0], draw_cards(1, 1, (84, 56))[0]
    assert again.image.tobytes() == drawn[0].image.tobytes() != other.image.tobytes()
    # Red ink on hearts and diamonds alone: nothing else on a card is that red, and tables are dark.
    for picture in drawn[:52]:
        pixels = np.asarray(picture.image).astype(int)
        red = ((pixels[..., 0] > 150) & (pixels[..., 1] < 80) & (pixels[..., 2] < 80)).sum()
        assert (red > 40) == picture.words.endswith(("hearts", "diamonds")), picture.words


# --- the notebook ---


def test_the_notebook_goes_from_teacher_to_export(teacher_folder, tmp_path):
    notebook = nbformat.read(EXAMPLES / "from_teacher_to_export.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    toy = {"teacher_name": str(teacher_folder), "encoder_layers": 2, "decoder_layers": 2}
    toy |= {"train_rows": 8, "test_rows": 4, "steps": 4, "batch_size": 4, "max_source_length": 48}
    toy |= {"max_target_length": 8, "work": str(tmp_path / "work")}
    names = {node.id for node in ast.walk(ast.parse(parameters.source)) if isinstance(node, ast.Name)}
    assert names == set(toy)
    # As papermill does it: in a cell of their own, after the defaults.
    place = notebook.cells.index(parameters) + 1
    injected = "\n".join(f"{name} = {value!r}" for name, value in toy.items())
    notebook.cells.insert(place, nbformat.v4.new_code_cell(injected))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES.parent)}}).execute()
    assert (tmp_path / "work" / "student" / "model.safetensors").is_file()
    assert (tmp_path / "work" / "onnx" / "decoder_model.onnx").is_file()
    printed = "".join(
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "text" in output
    )
    assert "equal answers: {'greedy': 1.0, 'beam': 1.0}" in printed
    before, after = map(float, re.search(r"eval_ce_loss +(\S+) +(\S+)", printed).groups())
    assert 0 < after < before
