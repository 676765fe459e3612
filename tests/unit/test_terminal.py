"""What a command shows fits a terminal of 80 columns, and nothing of it is cut off."""

import dataclasses
import json
from argparse import Namespace
from pathlib import Path

import pytest
from transformers import LlamaConfig, Seq2SeqTrainingArguments

from hf_encdec_distill import DistillationTrainingArguments
from hf_encdec_distill.bench import compare_cost
from hf_encdec_distill.cli import distill, doctor, evaluate, export, info, push
from hf_encdec_distill.cli._display import table
from hf_encdec_distill.cli._inputs import said_training_arguments
from hf_encdec_distill.cli.main import COMMANDS, build_parser, main
from hf_encdec_distill.cli.quickstart.report import summary
from hf_encdec_distill.metrics.measures import METRICS


RUN = Path(__file__).parents[2] / "docs" / "runs" / "quickstart-120-minutes" / "metrics.json"
LONG = "runs/of-a-student-with-a-long-name-that-says-all-about-it/student"


def check(text, *whole):
    """No line is too long, and what is given is there, on one line or on several."""
    assert max(map(len, text.splitlines())) <= 80
    # A name that goes on in a second line has the numbers of its first between.
    names = [line.strip().split("  ")[0] for line in text.splitlines()]
    flat, names = "".join(text.split()), "".join("".join(names).split())
    for words in whole:
        assert "".join(words.split()) in flat or "".join(words.split()) in names, words


def cells_of(text):
    """Of all tables in a text, what is not a rule."""
    return [cell for line in text.splitlines() for cell in line.split("  ") if cell.strip(" -")]


def page_of_evaluate(models):
    names = [f"runs/{index}/{LONG}" for index in range(models)]
    numbers = {name: {"value": 0.9876, "low": 0.9765, "high": 0.9987} for name in METRICS}
    entries = {name: {"n": 200, **numbers, "label": f"the student of run {index}"} for index, name in enumerate(names)}
    entries["lead_baseline"] = {"n": 200, "rouge_l": numbers["rouge_l"], "distinct": 0.9}
    differences = [
        {"of": name, "minus": names[0], **{measure: {**x, "p": 0.0123} for measure, x in numbers.items()}}
        for name in names[1:]
    ]
    result = {"models": entries, "differences": differences, "data": {"test_rows": 200}}
    return evaluate._page(Namespace(models=names), result)


@pytest.mark.parametrize("models", [1, 2, 3, 7])
def test_evaluate_fits_a_terminal(models):
    text = page_of_evaluate(models)
    titles = (f"the student of run {index} minus the student of run 0" for index in range(1, models))
    check(text, *titles, *(METRICS[name][0] for name in METRICS))
    assert text.count("98.8 [97.7, 99.9]") >= 5 * (2 * models - 1) and text.count("0.0123") == 12 * (models - 1)
    for index in range(models):
        check(text, f"the student of run {index}"[-16:])


def test_info_fits_a_terminal():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = LlamaConfig(vocab_size=32, **sizes)
    content = compare_cost(config, config, 96, 5).to_dict()
    costs, ratio = {"model": content["student"], "teacher": content["teacher"]}, content["ratio"]
    for side in costs.values():
        side["parameters"]["total"] = 70e9
    args = Namespace(model=LONG, prompt_length=100_000, new_tokens=1_000, dtype="bfloat16")
    text = info._page(args, costs, {**ratio, "total": 1.0})
    check(text, "70000.00", "model / teacher", LONG, "each further token, GFLOP", "100000 tokens in, 1000 out")


def test_the_report_of_the_quickstart_fits_a_terminal():
    """With the numbers of a run of two hours, each as `metrics.json` has it."""
    metrics = json.loads(RUN.read_text(encoding="utf-8"))
    text = summary(metrics, Path("runs/quickstart"))
    check(
        text, metrics["spread"], "distilled minus cross-entropy alone", "from_pretrained(path, trust_remote_code=True)"
    )
    cells = [cell.strip() for cell in cells_of(text)]
    for name, difference in metrics["differences"][0].items():
        if name in METRICS:
            heading, factor, decimals, _ = METRICS[name]
            low, high = (f"{factor * difference[side]:+.{decimals}f}" for side in ("low", "high"))
            assert f"[{low}, {high}]" in cells and heading in cells
    for entry in metrics["models"].values():
        if "rouge_l" in entry:
            assert f"{100 * entry['rouge_l']['value']:.1f}" in cells
    assert {"81.4 M", "134.5 M", "student / teacher"} <= set(cells)
    assert "The student reaches 88 % of the tuned teacher's ROUGE-L." in text.splitlines()
    assert "--resume" not in text  # nothing is wrong with it, by a file that has no verdict


def test_the_report_of_the_quickstart_has_its_verdict():
    sentences = ["Below the untuned teacher. " + "These weights score lower. " * 4, "Still learning. The loss falls."]
    metrics = json.loads(RUN.read_text(encoding="utf-8"))
    text = summary({**metrics, "verdict": {"sentences": sentences, "command": "no"}}, Path("my runs/one"))
    check(text, *sentences)
    assert "\n    hf-encdec-distill quickstart --resume --minutes 60 --output 'my runs/one'\n" in text
    assert summary({**metrics, "verdict": {"sentences": []}}, Path("x")) == summary(metrics, Path("x"))


def test_the_parity_of_exports_fits_a_terminal():
    pair = {"exported": 12.3456, "pytorch": 12.3467}
    report = {
        "variant": "palette4",
        "failures": [],
        "logits": 0.0512,
        "tokens": {"greedy": 1.0, "beam": 1.0},
        "agreement": 0.9876,
        "ce": pair,
        "rouge_l": pair,
        "seconds": {side: {"first_token": 1.2345, "token": 0.5432} for side in pair},
        "megabytes": {"exported": 1234.56, "pytorch_fp32": 4321.09},
    }
    text = export._page(dict.fromkeys(("onnx", "openvino", "coreml"), report))
    check(text, "openvino palette4", "coreml palette4", "largest logit difference", "1234.6 / 4321.1")
    assert text.count("\n\n") == 1 and text.count("1234.5 / 1234.5") == text.count("543.2 / 543.2") == 3


def test_doctor_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_torch_devices", lambda: [f"CPU {'of a very long name ' * 6}".strip(), "GPU.0"])
    monkeypatch.setattr(doctor, "_unmet", lambda requirements: list(requirements)[:9])  # as if nothing were there
    with pytest.raises(ValueError):
        doctor.run(Namespace(json=False, stdout=None))
    text = capsys.readouterr().out
    check(
        text,
        f"CPU {'of a very long name ' * 6}, GPU.0",
        'pip install "hf-encdec-distill[quantization]"',
        "missing: peft",
    )
    assert "broken: torch" in text


def test_push_fits_a_terminal():
    names = [f"{LONG}/onnx_int8/{index}-model.onnx" for index in range(3)]
    result = {"repo_id": f"someone/{'x' * 60}", "files": [{"path": n, "bytes": 123_456_789} for n in names]}
    left = [f"checkpoint-{index}" for index in range(12)]
    text = push._page({**result, "left_out": left})
    check(text, result["repo_id"], *names, f"Left out: {', '.join(left)}")
    assert text.count("123.457") == 3 and "370.370" in text


def test_help_of_distill_has_every_field_of_ours_with_its_help(capsys, monkeypatch):
    """The fields are read from the source, so that --help imports nothing: these are what the class itself has."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    text = capsys.readouterr().out.rpartition("example:")[0]
    inherited = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    ours = [field for field in dataclasses.fields(DistillationTrainingArguments) if field.name not in inherited]
    assert len(ours) > 25
    for field in ours:
        assert f"  --{field.name.replace('_', '-')} " in text
        if field.name == "divergence":
            check(text, *field.metadata["choices"])
        elif field.name not in ("source_column", "target_column"):  # as every command with data calls them
            default = "" if field.default is None else f" (default: {field.default})"
            check(text, field.metadata["help"] + default)
    assert "https://huggingface.co/docs/transformers/main_classes/trainer" in text


def test_every_help_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words in ([], *([name] for name in COMMANDS)):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        text = capsys.readouterr().out
        check(text.rpartition("example:")[0] or text)  # a command to copy stays on one line


def test_a_field_in_the_help_is_an_option(tmp_path):
    """Also before the student, where an option that the parser does not know would leave its value in his place."""
    words = ["distill", "--jsd-beta", "0.3", "--freeze-encoder", "--on-policy-fraction", "0.5", "student"]
    words += ["--teacher", "teacher", "--output", str(tmp_path)]
    args, extra = build_parser().parse_known_args(words)
    assert (args.begin, args.jsd_beta, extra) == ("student", "0.3", [])
    args.extra = extra
    said = said_training_arguments(DistillationTrainingArguments, args, distill.TRAINING)
    assert said == {"jsd_beta": 0.3, "freeze_encoder": True, "on_policy_fraction": 0.5}


def test_a_table_that_fits_stays_as_it_is():
    assert table(["", "a", "bb"], [["first", 1, 2.5], ["x", "", "long one"]]) == (
        "       a        bb\n-----  -  --------\nfirst  1       2.5\nx         long one"
    )


def test_columns_that_do_not_fit_go_on_below():
    text = table(["of a name"] + [f"column {index}" for index in range(9)], [["row"] + ["9" * 14] * 9])
    check(text)
    blocks = [block.splitlines() for block in text.split("\n\n")]
    assert [len(block) for block in blocks] == [3] * 3
    assert [line.split()[0] for _, _, line in blocks] == ["row"] * 3
    assert " ".join(block[0] for block in blocks).split("column ")[1:][0].split() == ["0"]
    assert sum(block[2].count("9" * 14) for block in blocks) == 9
