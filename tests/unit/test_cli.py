"""The command line, held against transformers, torch and numbers done by hand."""

import io
import json
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from distillation_toys import TEMPLATE
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_encdec_distill import progress
from hf_encdec_distill.cli.main import COMMANDS, build_parser, main
from hf_encdec_distill.distillation import LiveTeacher
from hf_encdec_distill.distillation.options.encoder_states import EncoderStates
from hf_encdec_distill.models.rope_encdec.budget import Budget


# What a person sees --------------------------------------------------------------------------------------------------


def test_the_commands_are_those_that_work():
    assert set(COMMANDS) == {
        "quickstart",
        "plan",
        "init",
        "teach",
        "heal",
        "cache",
        "distill",
        "evaluate",
        "export",
        "generate",
        "push",
        "demo",
        "convert-mu",
        "info",
        "bench",
        "serve",
        "doctor",
    }


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_shows_an_example_that_the_parser_understands(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    example = capsys.readouterr().out.rpartition("example:\n")[2].split()
    assert example[:2] == ["hf-encdec-distill", command]
    args, extra = build_parser().parse_known_args(example[1:])
    assert (args.command, extra) == (command, [])


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_option_says_what_it_is(command):
    parser = build_parser().parse_args(COMMANDS[command].EXAMPLE.split()[1:]).parser
    assert [action.dest for action in parser._actions if not action.help] == []


def test_help_names_the_words_that_an_option_takes(capsys):
    with pytest.raises(SystemExit):
        main(["cache", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--keep {likeliest,closest,all}" in said and "a CSV, TSV, JSON, JSON Lines or Parquet file" in said


def one_line_error(capsys, *argv) -> str:
    capsys.readouterr()
    try:
        code = main(list(argv))
    except SystemExit as stop:  # argparse's way
        code = stop.code
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1 and "Traceback" not in output.err
    return output.err


def test_errors_are_one_line_with_exit_code_2(capsys, tmp_path, teacher_folder):
    missing = str(tmp_path / "nothing")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    assert "invalid choice: 'teleport'" in one_line_error(capsys, "teleport")
    assert "--turbo" in one_line_error(capsys, "info", missing, "--turbo")
    assert "nothing" in one_line_error(capsys, "info", missing)
    assert "invalid int value: 'many'" in one_line_error(capsys, "evaluate", missing, "--rows", "many")
    assert "choose another folder" in one_line_error(capsys, "init", missing, "--output", str(full))
    assert "--resume" in one_line_error(capsys, "quickstart", "--output", str(full))
    assert "no run" in one_line_error(capsys, "quickstart", "--output", missing, "--resume")
    assert "minutes=0.0" in one_line_error(capsys, "quickstart", "--output", missing, "--minutes", "0")
    assert "minutes=12: so few are for one student; give --minutes 30" in one_line_error(
        capsys, "quickstart", "--output", missing, "--twin"
    )
    for command in (["init", missing], ["quickstart"]):
        error = one_line_error(capsys, *command, "--output", str(tmp_path / "new"), "--source-column", "text")
        assert "--source-column 'text' names a column" in error and "give --dataset" in error
    shape = ["init", missing, "--output", str(tmp_path / "new"), "--encoder-pooling-layer", "2"]
    assert "encoder_pooling=1 pools none" in one_line_error(capsys, *shape)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("distil", "distill"),
        ("Evaluate", "evaluate"),
        ("convert_mu", "convert-mu"),
        ("info ", "info"),
        ("adapt", "heal"),
    ],
)
def test_a_misspelt_command_suggests_the_right_one(capsys, said, meant):
    error = one_line_error(capsys, "--debug", said, "student")
    assert f"invalid choice: {said!r}, maybe you meant {meant!r}? (choose from quickstart, plan, " in error


def test_a_word_that_is_like_no_command_gets_the_list_alone(capsys):
    assert "invalid choice: 'zzz' (choose from quickstart, plan, " in one_line_error(capsys, "zzz")


@pytest.mark.parametrize(
    "command",
    [
        ["cache", "teacher", "--output"],
        ["teach", "teacher", "--output"],
        ["evaluate", "student", "--output"],
        ["distill", "student", "--teacher", "teacher", "--output"],
        ["heal", "student", "--teacher", "teacher", "--max-steps", "1", "--output"],
    ],
    ids=lambda words: words[0],
)
def test_a_limit_of_length_below_one_is_refused_before_anything_is_loaded(capsys, tmp_path, command):
    """`[:-5]` would cut five tokens from the end."""
    for name in ("source", "target"):
        for value in ("0", "-5"):
            words = [*command, str(tmp_path / "out"), f"--max-{name}-length", value]
            error = one_line_error(capsys, *words)
            assert value in error and f"max-{name}-length" in error.replace("_", "-") and "at least" in error
    if command[0] == "cache":
        error = one_line_error(capsys, *command, str(tmp_path / "out"), "--vocab-policy", "mask_paddings")
        assert "vocab_policy='mask_paddings' is unknown" in error
    assert not (tmp_path / "out").exists()


def test_more_layers_than_the_teacher_has_are_refused_before_anything_is_trained(capsys, tmp_path, teacher_folder):
    options = ["--encoder-layers", "9", "--teacher", str(teacher_folder), "--output", str(tmp_path / "run")]
    assert main(["quickstart", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--encoder-layers 9: the teacher has 4 layers" in error
    assert not (tmp_path / "run").exists()


def test_debug_shows_where(tmp_path):
    with pytest.raises(ValueError, match="no run"):
        main(["quickstart", "--output", str(tmp_path / "nothing"), "--resume", "--debug"])


def test_an_interrupt_is_130_and_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt("go on with --resume")

    monkeypatch.setattr(COMMANDS["info"], "run", interrupted)
    assert main(["info", "model"]) == 130
    assert capsys.readouterr().err == "hf-encdec-distill info: go on with --resume\n"
    monkeypatch.setattr(COMMANDS["cache"], "run", lambda args: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert main(["cache", "built-in", "--output", "new"]) == 130
    assert "the same command goes on from the rows" in capsys.readouterr().err


def test_lines_in_place_of_bars_where_there_is_no_terminal(monkeypatch):
    stream = io.StringIO()
    times = iter([0.0, 0.0, 16.0, 16.0, 17.0, 75.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    display = progress.Display(lambda: 3700.0, stages=2, stream=stream)
    with display.stage("train") as update:
        update(0.25, "step 7")
        update(0.5, "step 8")  # a second after the last line: nothing is printed
    assert stream.getvalue().splitlines() == [
        "[1/2] train ... 1:01:40 left",
        "     25% step 7, 1:01:40 left",
        "[1/2] train: 1:15, 1:01:40 left",
    ]


def test_a_run_that_will_be_late_says_so_in_minutes():
    stream, late = io.StringIO(), iter([29.0, 31.0, 125.0])
    display = progress.Display(lambda: 100.0, stages=1, stream=stream, seconds_late=lambda: next(late))
    for _ in range(3):
        display.say(display._left())
    left = "1:40 left"
    assert stream.getvalue().splitlines() == [
        left,
        f"{left}, 1 min later than asked for",
        f"{left}, 2 min later than asked for",
    ]


def test_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with progress.Display(lambda: 60.0, stages=1, stream=stream).stage("train") as update:
        update(0.5, "step 7")
    assert "step 7" in stream.getvalue() and "\x1b[" in stream.getvalue()


# Commands ------------------------------------------------------------------------------------------------------------


def test_init_keeps_the_teacher_whole_where_no_layer_is_taken_out(student_folder, teacher_folder):
    student = AutoModelForSeq2SeqLM.from_pretrained(student_folder).eval()
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    prompt, target = torch.arange(20, 31)[None], torch.arange(40, 45)[None]
    start = torch.full((1, 1), student.config.decoder_start_token_id)
    with torch.no_grad():
        ours = student(input_ids=prompt, decoder_input_ids=torch.cat([start, target[:, :-1]], 1)).logits
        theirs = teacher(torch.cat([prompt, start, target[:, :-1]], 1)).logits[:, prompt.shape[1] :]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_init_fits_the_layers_that_are_kept(teacher_folder, data_arguments, tmp_path, capsys):
    """To as many rows as it is told; none leaves the teacher's weights."""
    command = [
        "init",
        str(teacher_folder),
        *data_arguments,
        "--encoder-layers",
        "2",
        "--decoder-layers",
        "2",
        "--encoder-sliding-window",
        "8",
        "--json",
    ]
    said, students = {}, {}
    for rows in ("20", "0"):
        folder = str(tmp_path / rows)
        assert main([*command, "--heal-rows", rows, "--output", folder]) == 0
        said[rows] = json.loads(capsys.readouterr().out)["healing"]
        students[rows] = AutoModelForSeq2SeqLM.from_pretrained(folder)
    healing = said["20"]
    assert students["0"].config.encoder_sliding_window == 8
    assert said["0"] is None and healing["rows"] + healing["held_out_rows"] == 20
    assert healing["taken"] is (healing["kl_after"] < healing["kl_before"])
    layers = AutoModelForCausalLM.from_pretrained(teacher_folder).model.layers
    theirs = [layer.mlp.down_proj.weight for layer in layers]
    for rows, copied in (("0", True), ("20", not healing["taken"])):
        ours = students[rows].model.decoder.layers[1].mlp.down_proj.weight
        assert any(torch.equal(ours, weight) for weight in theirs) is copied
    error = one_line_error(capsys, *command, "--heal-rows", "-1", "--output", str(tmp_path / "x"))
    assert "heal_rows=-1 does not work" in error


def test_init_with_a_narrower_decoder(teacher_folder, data_arguments, tmp_path, capsys):
    command = ["init", str(teacher_folder), *data_arguments, "--encoder-layers", "2", "--decoder-layers", "2"]
    command += ["--heal-rows", "8", "--decoder-intermediate-size"]
    assert main([*command, "8", "--output", str(tmp_path / "narrow")]) == 0
    student = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "narrow")
    teacher = AutoConfig.from_pretrained(teacher_folder)
    widths = {
        side: {layer.mlp.down_proj.in_features for layer in getattr(student.model, side).layers}
        for side in ("encoder", "decoder")
    }
    assert widths == {"encoder": {teacher.intermediate_size}, "decoder": {8}}
    assert main([*command, "0", "--output", str(tmp_path / "none")]) == 2
    assert "decoder_intermediate_size=0 does not work" in capsys.readouterr().err


def test_a_student_of_fewer_tokens(teacher_folder, data_arguments, tmp_path, capsys):
    """It is made, distilled and asked as any other; a recipe that makes it compares by token without being told."""
    data = [
        *data_arguments,
        "--teacher",
        str(teacher_folder),
        "--max-steps",
        "2",
        "--per-device-train-batch-size",
        "4",
    ]
    shape = ["--encoder-layers", "2", "--decoder-layers", "2", "--heal-rows", "8"]
    student = str(tmp_path / "student")
    assert (
        main(["init", str(teacher_folder), *data_arguments, *shape, "--vocabulary", "270", "--output", student]) == 0
    )
    config = AutoConfig.from_pretrained(student)
    assert config.vocab_size <= 270 < AutoConfig.from_pretrained(teacher_folder).vocab_size
    assert len(AutoTokenizer.from_pretrained(student)) == config.vocab_size
    distilled = str(tmp_path / "distilled")
    assert main(["distill", student, *data, "--vocab-policy", "id_map", "--output", distilled]) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({"init": {"encoder_layers": 2, "decoder_layers": 2, "heal_rows": 8, "vocabulary": 270}})
    )
    again = str(tmp_path / "again")
    assert main(["distill", str(recipe), *data, "--output", again]) == 0
    assert AutoConfig.from_pretrained(again).vocab_size == config.vocab_size
    capsys.readouterr()
    assert main(["generate", distilled, "def add(a, b): return a + b", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["answers"]) == 1
    error = one_line_error(
        capsys,
        "init",
        str(teacher_folder),
        "--decoder-only",
        "2",
        "--vocabulary",
        "270",
        "--output",
        str(tmp_path / "x"),
    )
    assert "vocabulary=270 is for one that has it" in error


def test_info_counts_what_the_models_have(student_folder, teacher_folder, capsys):
    assert main(["info", str(student_folder), "--teacher", str(teacher_folder), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    for side, model in (
        ("student", AutoModelForSeq2SeqLM.from_pretrained(student_folder)),
        ("teacher", AutoModelForCausalLM.from_pretrained(teacher_folder)),
    ):
        assert content[side]["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    # Without --teacher, the model that the student came from is counted out of the student's own config.
    assert main(["info", str(student_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == content
    assert main(["info", str(student_folder)]) == 0
    assert "model / teacher" in capsys.readouterr().out
    assert main(["info", str(teacher_folder)]) == 0
    assert "decoder-only" in capsys.readouterr().out


def test_the_home_folder_where_no_shell_has_put_it(teacher_folder, data_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(teacher_folder)
    assert main(["init", "~/teacher", "--output=~/made", *data_arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == str(tmp_path / "made")
    assert (tmp_path / "made" / "config.json").is_file() and not (teacher_folder / "~").exists()
    assert main(["bench", "no/model", "--output", "~/bench"]) == 2  # a path to its parser
    assert "no/model" in capsys.readouterr().err


def test_distill_passes_training_arguments_on(student_folder, teacher_folder, data_arguments, tmp_path, capsys):
    output = tmp_path / "distilled"
    options = [
        "--teacher",
        str(teacher_folder),
        "--output",
        str(output),
        "--prompt-template",
        TEMPLATE,
        *data_arguments,
    ]
    options += ["--max-steps", "2", "--learning-rate", "1e-2", "--save-steps", "1"]
    options += ["--lr_scheduler_type", "constant", "--logging-steps", "1", "--use-cpu", "--report-to", "none"]
    assert "--no-such-thing" in one_line_error(capsys, "distill", str(student_folder), *options, "--no-such-thing")
    assert main(["distill", str(student_folder), *options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)  # what the trainer logs is not among it
    assert said["output"] == str(output) and 0 <= said["metrics"]["eval_teacher_agreement"] <= 1
    card = ModelCard.load(output / "README.md")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["teacher_agreement"].metric_value == pytest.approx(
        100 * said["metrics"]["eval_teacher_agreement"], abs=0.05
    )
    assert results["ce"].dataset_name == "pairs.csv" and str(tmp_path) not in card.content
    log = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [row["learning_rate"] for row in log if "loss" in row] == [1e-2, 1e-2]
    before, after = (AutoModelForSeq2SeqLM.from_pretrained(folder) for folder in (student_folder, output))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert "not empty" in one_line_error(capsys, "distill", str(student_folder), *options)


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_teach_trains_on_targets_alone(teacher_folder, data_arguments, tmp_path, capsys, kind):
    """What it saves loads as a teacher, computes what peft's own adapter does, and knows the targets better."""
    taught = tmp_path / "taught"
    options = ["--output", str(taught), "--prompt-template", TEMPLATE, *data_arguments, "--rank", "4"]
    options += ["--max-steps", "30", "--learning-rate", "2e-2", "--use-cpu", "--report-to", "none", "--logging-steps"]
    options += ["1", *(["--adapter"] if kind == "adapter" else [])]
    assert main(["teach", str(teacher_folder), *options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert kind in said.pop("kind") and said == {"output": str(taught), "steps": 30}
    assert (taught / "adapter_model.safetensors").exists() == (kind == "adapter")
    before = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    after = LiveTeacher.load(taught).model
    tokenizer = AutoTokenizer.from_pretrained(taught)
    prompt, target = (tokenizer(text)["input_ids"] for text in ("red 3 green\n#", "It is red and green."))
    ids = torch.tensor([prompt + target])
    on_target, on_prompt = [-100] * len(prompt) + target, prompt + [-100] * len(target)
    losses = [
        [model(ids, labels=torch.tensor([labels])).loss.item() for labels in (on_target, on_prompt)]
        for model in (before, after)
    ]
    assert losses[1][0] < losses[0][0] - 1.0  # the target
    assert losses[1][1] > losses[0][1] - 0.5 * (losses[0][0] - losses[1][0])  # nobody asked for the prompt
    assert "not empty" in one_line_error(capsys, "teach", str(teacher_folder), *options)

    made = ["init", str(taught), "--output", str(tmp_path / "made"), "--prompt-template", TEMPLATE, *data_arguments]
    assert main(made) == 0  # of all layers: it computes what the teacher does
    student = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "made")
    inputs = {"input_ids": ids[:, : len(prompt) - 1], "decoder_input_ids": ids[:, len(prompt) - 1 :]}
    torch.testing.assert_close(student(**inputs).logits, after(ids).logits[:, len(prompt) - 1 :], atol=1e-4, rtol=1e-4)


def test_teach_goes_on_from_an_adapter(teacher_folder, data_arguments, tmp_path, capsys):
    """And the other commands take one where a teacher is asked for."""
    options = [*data_arguments, "--prompt-template", TEMPLATE, "--rank", "2", "--use-cpu", "--report-to", "none"]
    words = ["teach", str(teacher_folder), *options, "--output", str(tmp_path / "first"), "--adapter"]
    assert main([*words, "--max-steps", "10", "--learning-rate", "5e-2"]) == 0
    words = ["teach", str(tmp_path / "first"), *options, "--output", str(tmp_path / "second"), "--max-steps", "1"]
    assert "is an adapter itself" in one_line_error(capsys, *words, "--adapter")
    assert main([*words, "--learning-rate", "1e-12"]) == 0
    ids = torch.arange(4, 40).unsqueeze(0)
    base, first, second = (
        LiveTeacher.load(folder, "float32").model(ids).logits
        for folder in (teacher_folder, tmp_path / "first", tmp_path / "second")
    )
    torch.testing.assert_close(second, first, atol=1e-4, rtol=1e-4)
    assert (first - base).abs().max() > 0.1

    made = ["init", str(teacher_folder), *data_arguments, "--output", str(tmp_path / "made"), "--decoder-layers", "2"]
    assert main([*made, "--prompt-template", TEMPLATE]) == 0
    adapter = ["--teacher", str(tmp_path / "first"), "--json"]
    capsys.readouterr()
    for command in (["info", str(tmp_path / "made")], ["plan", "--student", str(tmp_path / "made"), "--tokens", "1M"]):
        assert main([*command, *adapter]) == 0
        json.loads(capsys.readouterr().out)
    assert "is an adapter, and a whole model is needed" in one_line_error(
        capsys, "generate", str(tmp_path / "first"), "a"
    )


def test_init_by_a_budget(teacher_folder, data_arguments, tmp_path, capsys):
    request = ["--prompt-tokens", "100", "--answer-tokens", "10"]
    init = ["init", str(teacher_folder), *data_arguments, "--output", str(tmp_path / "fast"), *request]
    assert "--speedup" in one_line_error(capsys, *init)
    for option in ("--decoder-layers", "--encoder-pooling-layer"):
        assert option in one_line_error(capsys, *init, "--speedup", "2", option, "2", "--encoder-pooling", "2")
    assert main([*init, "--speedup", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    student, teacher = (AutoConfig.from_pretrained(folder) for folder in (tmp_path / "fast", teacher_folder))
    assert Budget(100, 10, 2).time(student) * 2 <= Budget(100, 10, 2).time(teacher)
    assert said["encoder_layers"] == student.encoder_num_hidden_layers


def test_a_cache_for_a_student_without_a_template(teacher_folder, data_arguments, tmp_path):
    student, cache = str(tmp_path / "bare"), str(tmp_path / "cache")
    shape = ["--encoder-layers", "2", "--decoder-layers", "2", "--layer-selection", "even"]
    assert main(["init", str(teacher_folder), *data_arguments, *shape, "--output", student]) == 0
    assert main(["cache", str(teacher_folder), "--output", cache, "--student", student, *data_arguments]) == 0
    options = ["--teacher", cache, "--output", str(tmp_path / "out"), *data_arguments, "--max-steps", "1", "--use-cpu"]
    assert main(["distill", student, *options, "--report-to", "none"]) == 0


def test_distill_from_a_cache(student_folder, teacher_folder, data_arguments, tmp_path, capsys):
    """As with the live teacher, whose vocabulary is recorded whole; a second `cache` has nothing to do."""
    capture = ["cache", str(teacher_folder), "--output", str(tmp_path / "cache"), "--k", "280"]
    capture += ["--prompt-template", TEMPLATE, *data_arguments]
    for rows in (list(range(1, 200)), [0]):
        assert main([*capture, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["captured_rows"] in rows and said["rows"] > 0 and said["bytes"] > 0
    logs = {}
    for teacher in ("cache", "teacher"):
        options = ["--teacher", str(tmp_path / teacher), "--output", str(tmp_path / f"by-{teacher}"), *data_arguments]
        options += ["--max-steps", "2", "--save-steps", "2", "--use-cpu", "--logging-steps", "1"]
        options += ["--prompt-template", TEMPLATE, "--report-to", "none"]
        assert main(["distill", str(student_folder), *options]) == 0
        state = tmp_path / f"by-{teacher}" / "checkpoint-2" / "trainer_state.json"
        logs[teacher] = [row["ce_loss"] + row["distill_loss"] for row in json.loads(state.read_text())["log_history"]]
    assert logs["cache"] == pytest.approx(logs["teacher"], rel=0.02)  # the command captures in bfloat16 where it can
    assert "--splits x" in one_line_error(capsys, *capture, "--splits", "x")


def test_cache_in_shards_and_merged(teacher_folder, data_arguments, tmp_path, capsys):
    """Two jobs in folders of their own, and both in one: all rows."""
    capture = ["cache", str(teacher_folder), *data_arguments, "--k", "4", "--json"]
    said = {}
    for name, shard in (("whole", []), ("0", ["--shard", "0/2"]), ("1", ["--shard", "1/2"])):
        assert main([*capture, "--output", str(tmp_path / name), *shard]) == 0
        said[name] = json.loads(capsys.readouterr().out)
    assert "rows" not in said["0"]  # a job does not read what others wrote
    rows = said["whole"]["rows"]
    assert said["0"]["captured_rows"] + said["1"]["captured_rows"] >= rows > said["0"]["captured_rows"]
    parts = [str(tmp_path / name) for name in ("0", "1")]
    assert main(["cache", "--merge", *parts, "--output", str(tmp_path / "merged"), "--json"]) == 0
    merged = json.loads(capsys.readouterr().out)
    assert merged["rows"] == rows and "captured_rows" not in merged
    assert main([*capture, "--output", parts[0]]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    for given in ("2", "a/b", "2/2", "-1/2"):
        error = one_line_error(capsys, *capture, "--output", str(tmp_path / "none"), f"--shard={given}")
        assert "give INDEX/NUM" in error or "give an index from 0" in error
    assert "not allowed with argument" in one_line_error(capsys, *capture, "--output", "x", "--merge", "y")


def test_distill_on_states_that_cache_recorded(
    student_folder, teacher_folder, data_arguments, tmp_path, capsys, monkeypatch
):
    """As with the frozen encoder, which does not run any more; a second `cache` has nothing to do."""
    states = tmp_path / "states"
    record = ["cache", str(teacher_folder), "--encoder-states", str(student_folder), "--output", str(states)]
    record += ["--prompt-template", TEMPLATE, *data_arguments]
    assert "--generate with --encoder-states" in one_line_error(capsys, *record, "--generate")
    for option in ("--kind dense", "--k 7", "--temperature 3", "--student nowhere", "--teacher-quantization 4bit"):
        assert f"{option.split()[0]} with --encoder-states" in one_line_error(capsys, *record, *option.split())
    assert "--num-beams says how targets are written" in one_line_error(capsys, *record, "--num-beams", "2")
    assert main([*record, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["output"] == str(states) and said["rows"] > 150 and said["bytes"] > 0
    files = list(states.rglob("*.safetensors"))
    assert main(record) == 0
    assert f"states of {said['rows']} rows" in capsys.readouterr().out and list(states.rglob("*.safetensors")) == files
    of_teacher = ["cache", str(teacher_folder), "--output", str(states), "--prompt-template", TEMPLATE]
    assert main([*of_teacher, *data_arguments]) == 0  # the teacher's records beside them
    assert "in the cache" in capsys.readouterr().out and list(states.rglob("*.safetensors")) == files

    logs = {}
    for name, more in (("live", []), ("kept", ["--encoder-states", str(states)])):
        if more:
            monkeypatch.setattr(EncoderStates, "_compute", None)
        options = ["--teacher", str(teacher_folder), "--output", str(tmp_path / name), "--prompt-template", TEMPLATE]
        options += [*data_arguments, "--freeze-encoder", "--max-steps", "2", "--save-steps", "2", "--use-cpu", *more]
        assert main(["distill", str(student_folder), *options, "--logging-steps", "1", "--report-to", "none"]) == 0
        state = json.loads((tmp_path / name / "checkpoint-2" / "trainer_state.json").read_text())
        logs[name] = [row["loss"] for row in state["log_history"]]
    assert logs["kept"] == pytest.approx(logs["live"], rel=5e-3, abs=1e-4)


def test_distill_on_targets_that_the_teacher_wrote(student_folder, teacher_folder, pairs_file, tmp_path, capsys):
    """Sources alone come from the data; the folder is teacher and data set of the training."""
    cache = tmp_path / "cache"
    sources = ["--dataset", str(pairs_file), "--source-column", "text", "--target-column", "short"]
    capture = ["cache", "--teacher", str(teacher_folder), "--out", str(cache), "--prompt-template", TEMPLATE, *sources]
    assert "--num-beams says how targets are written" in one_line_error(capsys, *capture, "--num-beams", "2")
    assert "keep='worst'" in one_line_error(capsys, *capture, "--generate", "--keep", "worst")
    assert "not allowed with argument" in one_line_error(capsys, *capture, "other-teacher")
    capture += [
        "--generate",
        "--max-target-length",
        "12",
        "--sampling-temperature",
        "1",
        "--num-return-sequences",
        "3",
    ]
    capture += ["--teacher-dtype", "float32", "--batch-size", "32", "--kind", "sampled", "--rounds", "20"]
    assert main(capture) == 0
    assert "MB" in capsys.readouterr().out
    written = load_dataset(str(cache))
    assert set(written) == {"train", "validation"} and not set(written["train"]["target"]) & {"It is red and red."}
    options = ["--teacher", str(cache), "--dataset", str(cache), "--output", str(tmp_path / "distilled")]
    options += ["--max-steps", "2", "--use-cpu", "--logging-steps", "1", "--save-strategy", "no"]
    options += ["--prompt-template", TEMPLATE, "--report-to", "none", "--max-target-length", "12"]
    assert main(["distill", str(student_folder), *options]) == 0
    said = capsys.readouterr().out
    assert "eval_teacher_agreement" in said and max(map(len, said.splitlines())) <= 80


def test_heal_reads_text(student_folder, teacher_folder, tmp_path, capsys):
    """Two steps on a folder of text: the student is another one, is measured on held-out text, and loads."""
    corpus, output = tmp_path / "corpus", tmp_path / "healed"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.txt").write_text(f"Number {number} is followed by {number + 1}, as everybody knows. " * 6)
    options = ["--teacher", str(teacher_folder), "--text", str(corpus), "--output", str(output), "--window", "24"]
    options += ["--max-steps", "2", "--learning-rate", "1e-2", "--eval-rows", "4", "--use-cpu", "--report-to", "none"]
    assert main(["heal", str(student_folder), *options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["output"], said["steps"]) == (str(output), 2) and said["metrics"]["eval_loss"] > 0
    before, after = (AutoModelForSeq2SeqLM.from_pretrained(folder) for folder in (student_folder, output))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_convert_mu_writes_what_auto_model_loads(tmp_path, capsys):
    data = Path(__file__).parents[1] / "model" / "data"
    tensors = load_file(data / "mu_weights.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    torch.save({"model_state_dict": tensors}, tmp_path / "mu.pt")
    options = ["--eos-token-id", "2", "--output", str(tmp_path / "mu")]
    assert main(["convert-mu", str(tmp_path / "mu.pt"), str(data / "mu_config.json"), *options, "--json"]) == 0
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "mu", dtype="auto")
    said = json.loads(capsys.readouterr().out)
    assert said == {"output": str(tmp_path / "mu"), "parameters": model.num_parameters()}
    torch.testing.assert_close(model.get_input_embeddings().weight, tensors["lm_head.weight"], atol=0, rtol=0)
