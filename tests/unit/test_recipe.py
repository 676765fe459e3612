"""Recipes and what `distill` writes beside a student, held against TRL's and transformers' way of reading YAML."""

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from distillation_toys import TEMPLATE, write_pairs, write_teacher
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, HfArgumentParser

from hf_encdec_distill import DistillationTrainingArguments
from hf_encdec_distill.cli import _provenance, distill
from hf_encdec_distill.cli._recipe import read_recipe, training_part, write_recipe
from hf_encdec_distill.cli.main import build_parser, main


RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_bpe_tokenizer):
    """With `teacher` and `pairs.csv`."""
    folder = tmp_path_factory.mktemp("recipe")
    write_teacher(folder / "teacher", make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>"))
    write_pairs(folder / "pairs.csv", 60)
    return folder


def contents(folder, **changed):
    recipe = {
        "teacher": str(folder / "teacher"),
        "dataset": str(folder / "pairs.csv"),
        "source_column": "text",
        "target_column": "short",
        "init": {"encoder_layers": 3, "decoder_layers": 2},
        "prompt_template": TEMPLATE,
        "max_steps": 4,
        "learning_rate": "1e-2",  # PyYAML takes it for text, without a dot
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **changed,
    }
    return {name: value for name, value in recipe.items() if value is not None}


def write(file, recipe):
    file.write_text(yaml.safe_dump(recipe).replace("'1e-2'", "1e-2"))
    return file


@pytest.fixture(scope="module")
def distilled(folder):
    """A student, what made it beside it."""
    output = folder / "distilled"
    assert main(["distill", str(write(folder / "recipe.yaml", contents(folder))), "--output", str(output)]) == 0
    return output


def error_of(capsys, *words) -> str:
    """The one line that a person sees."""
    capsys.readouterr()
    try:
        assert main(["distill", *map(str, words)]) == 2
    except SystemExit as stop:
        assert stop.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# Reading -------------------------------------------------------------------------------------------------------------


def test_a_recipe_means_what_it_means_to_transformers(folder, tmp_path):
    """Every kind of value that a training argument has."""
    recipe = {
        "output_dir": str(tmp_path / "x"),
        "learning_rate": 2.0e-4,
        "max_steps": 7,
        "warmup_steps": 3,
        "bf16": False,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "report_to": ["none"],
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1.0e-5},
        "label_names": ["labels"],
        "generation_max_length": 9,
        "divergence": "skew_kl",
        "distill_weight": 1,
        "prompt_template": "Q: {source}\nA:",
        "use_cpu": True,
    }
    (theirs,) = HfArgumentParser(DistillationTrainingArguments).parse_yaml_file(write(tmp_path / "hf.yaml", recipe))
    recipe["output"] = recipe.pop("output_dir")
    ours = read_recipe(write(tmp_path / "ours.yaml", {**recipe, "run_name": None}))
    assert ours == recipe
    made = DistillationTrainingArguments(output_dir=ours["output"], **training_part(ours)).to_dict()
    assert {k: v for k, v in made.items() if k != "logging_dir"} == {
        k: v for k, v in theirs.to_dict().items() if k != "logging_dir"
    }
    write_recipe(tmp_path / "again.yaml", {**ours, "hub_token": "secret"})
    assert read_recipe(tmp_path / "again.yaml") == ours and "secret" not in (tmp_path / "again.yaml").read_text()


def test_a_number_without_a_dot_is_a_number(tmp_path):
    (tmp_path / "r.yaml").write_text("learning_rate: 1e-3\nweight_decay: 1\n")
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["learning_rate"] == "1e-3"
    assert read_recipe(tmp_path / "r.yaml") == {"learning_rate": 1e-3, "weight_decay": 1}


def test_a_number_without_a_dot_is_a_number_in_a_mapping_too(tmp_path):
    text = "lr_scheduler_kwargs: {min_lr: 1e-5, a: [-2E+3, {b: 1.e2}], c: 1e5x, d: e5, e: 5}\n"
    (tmp_path / "r.yaml").write_text(text)
    assert yaml.safe_load(text)["lr_scheduler_kwargs"]["min_lr"] == "1e-5"
    kwargs = {"min_lr": 0.00001, "a": [-2000.0, {"b": 100.0}], "c": "1e5x", "d": "e5", "e": 5}
    assert read_recipe(tmp_path / "r.yaml") == {"lr_scheduler_kwargs": kwargs}


def test_a_date_needs_no_quotes(tmp_path):
    (tmp_path / "recipe.yaml").write_text("prompt_date: 2026-11-28\n")
    assert read_recipe(tmp_path / "recipe.yaml") == {"prompt_date": "2026-11-28"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat', the closest valid one is 'learning_rate'"),
        ("distil_weight: 1", "the closest valid one is 'distill_weight'"),
        ("output_dir: x", "the closest valid one is 'output'"),
        ("init: {encoder_layer: 3}", "r.yaml, init: unknown key 'encoder_layer', the closest valid one is 'encoder_l"),
        ("learning_rate: fast", "learning_rate='fast' is of type str, expected float"),
        ("learning_rate: true", "learning_rate=True is of type bool, expected float"),
        ("eval_strategy: no", "eval_strategy is False to YAML, expected a text: put the word in quotes"),
        ("init: {depth: 3}", "keys are `teacher` and .*encoder_layers"),
        ("max_steps: 1.5", "max_steps=1.5 is of type float, expected int"),
        ("bf16: 1", "bf16=1 is of type int, expected bool"),
        ("prompt_template: [a]", r"prompt_template=\['a'\] is of type list, expected str"),
        ("label_names: labels", "label_names='labels' is of type str, expected list"),
        ("teacher: 3", "teacher=3 is of type int, expected str"),
        ("init: merged", "init='merged' is of type str, expected dict"),
        ("init: {encoder_layers: four}", "encoder_layers='four' is of type str, expected int"),
        ("init: {cross_attention: none}", "expected merged or separate"),
        ("student: a\ninit: {}", "both a student and an init section"),
        ("- a\n- b", "holds a list, expected a mapping"),
        ("a: [", "cannot be read as YAML"),
        ("seed: 1\nmax_steps: 2\nseed: 3", "has 'seed' twice"),
        ("init: {encoder_layers: 2, encoder_layers: 3}", "has 'encoder_layers' twice"),
        ("seed: &a 1\ndata_seed: *a", r"line 2 has the alias \*a"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.name)
def test_shipped_recipes_are_valid(recipe, tmp_path):
    read = read_recipe(recipe)
    assert read == yaml.safe_load(recipe.read_text())  # no type needed mending
    assert {"teacher", "dataset", "output", "init", "seed"} <= set(read)
    DistillationTrainingArguments(output_dir=str(tmp_path), **training_part(read))


def test_the_small_recipe_runs(folder, tmp_path):
    (small,) = (file for file in RECIPES if file.name == "small.yaml")
    options = ["--teacher", folder / "teacher", "--dataset", folder / "pairs.csv", "--output", tmp_path / "run"]
    options += ["--source_column", "text", "--target-column", "short", "--init.encoder_layers", 3, "--max-steps", 1]
    assert main(["distill", str(small), *map(str, options)]) == 0
    config = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run").config
    assert (config.encoder_num_hidden_layers, config.decoder_num_hidden_layers) == (3, 2)


# What is written -----------------------------------------------------------------------------------------------------


def test_the_whole_recipe_is_beside_the_student(folder, distilled):
    resolved = yaml.safe_load((distilled / "recipe.yaml").read_text())
    shape = {"cross_attention": "merged", "encoder_attention": "causal", "layer_selection": "influence"}
    shape |= {"cross_attention_sharing": 1, "encoder_pooling": 1, "heal_rows": 200}
    assert resolved == {
        **contents(folder, learning_rate=0.01),
        "init": {"encoder_layers": 3, "decoder_layers": 2, **shape},
        "output": str(distilled),
        "seed": 42,
    }
    assert not list(distilled.glob("*.tmp"))


def test_provenance_says_what_went_in_and_what_came_out(folder, distilled):
    content = json.loads((distilled / "provenance.json").read_text())
    rows = content["fingerprints"]["dataset"]
    assert rows["train"]["rows"] + rows["validation"]["rows"] < 60  # a test split was carved as well
    weights = load_file(folder / "teacher" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} torch.float32 {tuple(weights[name].shape)}".encode() + weights[name].numpy().tobytes())
    assert content["fingerprints"]["teacher"] == {"weights": digest.hexdigest()}
    assert content["seeds"] == {"seed": 42, "data_seed": None, "full_determinism": False}
    # The wheels of PyPI say in their metadata less than in `torch.__version__`.
    assert content["versions"]["torch"] == metadata.version("torch")
    assert content["versions"]["python"] == sys.version.split()[0]
    assert content["machine"]["threads"] == torch.get_num_threads() and content["machine"]["device"] == "cpu"
    here = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    assert (content["git"] or {"commit": ""})["commit"] == here.stdout.strip()
    result = content["result"]
    log = json.loads((distilled / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in log if "loss" in row]
    assert result["losses"]["loss"] == {"first": losses[0], "last": losses[-1], "mean": pytest.approx(sum(losses) / 4)}
    assert result["steps"] == 4 and "eval_loss" in result["metrics"] and "eval_runtime" not in result["metrics"]
    file = hashlib.sha256((distilled / "model.safetensors").read_bytes()).hexdigest()
    assert result["weights"] == hashlib.sha256(file.encode()).hexdigest()


def test_a_fitted_start_is_said_and_may_differ_by_rounding(distilled, caplog):
    """Not so the weights of a student that was only read, which are its fingerprint."""
    content = json.loads((distilled / "provenance.json").read_text())
    start = content["start"]
    assert start["taken"] and start["kl_after"] < start["kl_before"] and "student" not in content["fingerprints"]
    said = json.loads((distilled / "metrics.json").read_text())["recipe"]["start"]
    assert f"{start['rows']} rows" in said and said in (distilled / "README.md").read_text()
    elsewhere = {**content, "start": {**start, "weights": "of another machine"}}
    _provenance.check_inputs(elsewhere, content, distilled)
    assert "start.weights was of another machine" in caplog.text
    read = {**content["fingerprints"], "student": {"weights": "others"}}
    with pytest.raises(ValueError, match="student was"):
        _provenance.check_inputs({**content, "fingerprints": read}, content, distilled)


def test_the_fingerprint_of_rows_is_that_of_their_texts(tmp_path):
    """Not of names and times of files, nor of a process."""
    texts = {"source": ["a", "b\N{GRINNING FACE}", "c"], "target": ["x", "y", "z"]}
    expected = hashlib.sha256(b"".join(json.dumps(list(pair)).encode() for pair in zip(*texts.values()))).hexdigest()
    rows = datasets.Dataset.from_dict({**texts, "other": [1, 2, 3]})
    assert _provenance.rows_digest(rows) == expected
    assert _provenance.rows_digest(rows.select([2, 0, 1]).select([1, 2, 0])) == expected
    assert _provenance.rows_digest(rows.select([1, 0, 2])) != expected
    moved = datasets.Dataset.from_dict({"source": ["ax", "b\N{GRINNING FACE}", "c"], "target": ["", "y", "z"]})
    assert _provenance.rows_digest(moved) != expected


# Doing it again ------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_student_is_reproduced_bit_for_bit(distilled, tmp_path):
    """In another process, another folder, and with other threads than the run had."""
    paths = [str(Path(sys.modules["hf_encdec_distill"].__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "2"}
    words = ["distill", "--reproduce", str(distilled), "--output", str(tmp_path / "again")]
    run = subprocess.run(
        [sys.executable, "-m", "hf_encdec_distill", *words],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "reproduced: the same weights, bit for bit" in run.stdout
    first, again = (load_file(folder / "model.safetensors") for folder in (distilled, tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    recorded, now = (
        json.loads((folder / "provenance.json").read_text()) for folder in (distilled, tmp_path / "again")
    )
    assert all(now[part] == recorded[part] for part in ("result", "fingerprints", "machine"))


def test_what_is_not_the_same_is_refused_or_found(folder, distilled, tmp_path, capsys, caplog, monkeypatch):
    recorded = json.loads((distilled / "provenance.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    recipe = (distilled / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe)
    words = ["--reproduce", copy, "--output", tmp_path / "again"]
    assert "no record of its run" in error_of(capsys, *words)
    (copy / "provenance.json").write_text(json.dumps({**recorded, "result": None}))
    assert "was not finished" in error_of(capsys, *words)
    (copy / "provenance.json").write_text(json.dumps(recorded))
    write_pairs(tmp_path / "other.csv", 61)
    message = error_of(capsys, *words, "--dataset", tmp_path / "other.csv")
    assert "dataset.train.sha256" in message and "teacher.weights" not in message and "--dataset" in message
    assert not (tmp_path / "again").exists() or not list((tmp_path / "again").iterdir())
    assert "leave learning_rate out" in error_of(capsys, *words, "--learning-rate", "1")
    assert "leave init.encoder_layers out" in error_of(capsys, *words, "--init.encoder-layers", 2)
    assert "leave folder out" in error_of(capsys, "folder", *words)
    # A recorded number that is not the one that comes out, though the weights are; and other versions, named.
    altered = json.loads(json.dumps(recorded))
    altered["result"]["metrics"]["eval_loss"] *= 1.01
    altered["versions"]["torch"] = "1.0"
    (copy / "provenance.json").write_text(json.dumps(altered))
    message = error_of(capsys, *words)
    assert "was not reproduced" in message and "eval_loss was" in message and "eval_ce_loss" not in message
    assert f"versions.torch was 1.0, is {metadata.version('torch')}" in caplog.text


def test_doing_it_again_publishes_and_reports_nothing(distilled, tmp_path, capsys):
    """Whatever the recipe of the folder says: without the network here, each of these would end the run."""
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "provenance.json").write_bytes((distilled / "provenance.json").read_bytes())
    recipe = yaml.safe_load((distilled / "recipe.yaml").read_text())
    publish = {"push_to_hub": True, "hub_model_id": "stranger/catch", "hub_strategy": "all_checkpoints"}
    report = {"report_to": ["comet_ml", "wandb"], "run_name": "catch", "project": "catch"}
    (copy / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **publish, **report}))
    words = ["distill", "--reproduce", str(copy), "--output", str(tmp_path / "again")]
    assert main(words) == 0
    assert "reproduced: the same weights, bit for bit" in capsys.readouterr().out
    done = yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text())
    assert not {*publish, "run_name", "project"} & set(done) and done["report_to"] == "none"
    (copy / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "deepspeed": {"wandb": {"enabled": True}}}))
    assert "DeepSpeed" in error_of(capsys, *words[1:3], "--output", tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_numbers_within_the_tolerance_are_called_near():
    recorded = {"steps": 3, "metrics": {"eval_loss": 2.0}, "losses": {"loss": {"last": 1.0}}, "weights": "a"}
    near = {**recorded, "metrics": {"eval_loss": 2.0 * (1 + 0.9e-3)}, "weights": "b"}
    line = _provenance.compare_results(recorded, near, Path("run"))
    assert "not bit for bit: farthest is eval_loss" in line
    for other in (
        {**near, "metrics": {"eval_loss": 2.0 * (1 + 1.2e-3)}},
        {**near, "metrics": {"eval_loss": float("nan")}},
        {**near, "losses": {}},
        {**near, "steps": 4},
    ):
        with pytest.raises(ValueError, match="was not reproduced, to a relative 0.001"):
            _provenance.compare_results(recorded, other, Path("run"))
    with pytest.raises(ValueError, match="steps was 3, is 4"):
        _provenance.compare_results(recorded, {**near, "steps": 4}, Path("run"))


# The command ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_in_a_recipe_is_not_passed_over(folder, tmp_path, capsys):
    """As `Trainer` passes it over, which would begin again."""
    recipe = write(tmp_path / "r.yml", contents(folder, resume_from_checkpoint="checkpoint-2"))
    said = error_of(capsys, recipe, "--output", tmp_path / "output")
    assert "resume_from_checkpoint='checkpoint-2': leave it out; --resume goes on" in said
    assert not (tmp_path / "output").exists()


def test_an_option_counts_for_more_than_the_recipe(folder, tmp_path):
    """Of every kind: training, data, the student's shape, booleans on and off."""

    def resolve(*options):
        args, args.extra = build_parser().parse_known_args(["distill", file, *options])
        return distill._recipe(args)

    file = str(write(tmp_path / "r.yml", contents(folder, output="mine", average_tokens_across_devices=True)))
    options = ["--output", "yours", "--learning-rate", "3e-4", "--init.decoder_layers", "1", "--bf16", "--use_cpu"]
    options += ["false", "--no_average_tokens_across_devices", "--max_steps", "9", "--teacher", "other"]
    changed = {"output": "yours", "learning_rate": 3e-4, "bf16": True, "use_cpu": False, "max_steps": 9}
    changed |= {"teacher": "other", "average_tokens_across_devices": False}
    shape = {"encoder_layers": 3, "decoder_layers": 1}
    assert resolve(*options) == {**contents(folder), **changed, "init": shape}
    unchanged = {**contents(folder, learning_rate=1e-2), "output": "mine", "average_tokens_across_devices": True}
    assert resolve("--student", "that") == {**{k: v for k, v in unchanged.items() if k != "init"}, "student": "that"}


def test_the_home_folder_in_a_recipe(folder, tmp_path, monkeypatch):
    """`Trainer` writes to the home folder, and what comes after has to look there."""
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    paths = {
        "teacher": "~/teacher",
        "teacher_tokenizer": "~/teacher",
        "dataset": "~/pairs.csv",
        "output": "~/home-run",
    }
    init = {"encoder_layers": 2, "teacher": "~/teacher"}
    recipe = str(write(tmp_path / "r.yaml", contents(folder, **paths, init=init)))
    assert main(["distill", recipe]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
    done = read_recipe(folder / "home-run" / "recipe.yaml")
    found = [done["init"]["teacher"], *(done[name] for name in paths)]
    assert found == [f"{folder}/{name}" for name in ("teacher", "teacher", "teacher", "pairs.csv", "home-run")]
    assert main(["distill", recipe, "--output", "~/home-run", "--max-steps", "5", "--resume"]) == 0
    assert (folder / "home-run" / "checkpoint-5").is_dir()


def test_states_of_an_encoder_that_are_reproduced_stay_in_the_output(folder, tmp_path):
    recipe = contents(folder, freeze_encoder=True, encoder_states=str(tmp_path / "elsewhere"))
    write(tmp_path / "recipe.yaml", recipe)
    words = ["distill", "--reproduce", str(tmp_path), "--output", str(tmp_path / "again")]
    args, args.extra = build_parser().parse_known_args(words)
    assert distill._recipe(args)["encoder_states"] == str(tmp_path / "again" / "encoder_states")


def test_what_is_lacking_is_asked_for(folder, tmp_path, capsys):
    assert "required: --teacher, --output" in error_of(capsys, "student")
    bare = write(tmp_path / "r.yaml", contents(folder, teacher=None, init=None, output=None))
    assert "required: --teacher, --output, --student, or an init section" in error_of(capsys, bare)
    assert "none.yaml is not there" in error_of(capsys, tmp_path / "none.yaml", "--output", "o")
    assert "give that folder with --output" in error_of(capsys, "s", "--teacher", "t", "--output_dir", "o")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "manifest.json").write_text("{}")
    recipe = write(tmp_path / "c.yaml", contents(folder, teacher=str(cache)))
    assert "name its teacher as init.teacher" in error_of(capsys, recipe, "--output", tmp_path / "o")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_row_that_is_too_long_is_found_before_the_first_step(folder, tmp_path, capsys, split):
    (tmp_path / "pairs").mkdir()
    for name in ("train", "validation"):
        rows = [{"text": f"red {row}", "short": "It is red."} for row in range(12)]
        if name == split:
            rows[7]["text"] = "red " * 4000
        datasets.Dataset.from_list(rows).to_csv(tmp_path / "pairs" / f"{name}.csv")
    recipe = contents(folder, dataset=str(tmp_path / "pairs"))
    error = error_of(capsys, write(tmp_path / "r.yaml", recipe), "--output", tmp_path / "run")
    assert re.search(
        rf"{split}: row 7 has \d+ tokens .* the student has positions for 2048 .*max_source_length", error
    )
    assert not (tmp_path / "run").exists()


def test_resume_passes_over_a_checkpoint_that_is_not_whole(folder, distilled, tmp_path, capsys, caplog):
    """The disk was full, or the process killed, in the middle of one; what comes out is what never stopped."""
    save, calls = torch.save, []

    def full(content, *args, **options):
        calls.append(1)
        if len(calls) > 2 and (tmp_path / "run" / "checkpoint-4").exists():
            raise OSError(28, "No space left on device")
        return save(content, *args, **options)

    file = write(tmp_path / "r.yaml", contents(folder, output=str(tmp_path / "run")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert "No space left" in error_of(capsys, file)
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["result"] is None
    assert main(["distill", str(file), "--resume"]) == 0
    assert "checkpoint-4 is not whole" in caplog.text
    assert "begun with something else" not in caplog.text
    whole, resumed = (json.loads((f / "provenance.json").read_text())["result"] for f in (distilled, tmp_path / "run"))
    assert resumed == whole
