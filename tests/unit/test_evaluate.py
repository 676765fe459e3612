"""The command `evaluate`, against the libraries whose measures it reports; what it refuses."""

import json
import re
import shutil

import numpy as np
import pytest
import sacrebleu
import yaml
from distillation_toys import TEMPLATE, write_teacher
from huggingface_hub import ModelCard
from rouge_score.rouge_scorer import RougeScorer
from test_cli import one_line_error
from tokenizer_toys import wordpiece
from tokenizers import pre_tokenizers
from toys import make_config
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config

from hf_encdec_distill import files
from hf_encdec_distill.cli import evaluate
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.cli.serve import load_service
from hf_encdec_distill.distillation.checks.limits import check_rows
from hf_encdec_distill.metrics import METRICS
from hf_encdec_distill.metrics.texts import f1
from hf_encdec_distill.models.either_version import save_teacher


def test_evaluate_agrees_with_the_teachers_own_loss(student_folder, teacher_folder, data_arguments, capsys):
    """A student of full depth is the teacher: the same cross-entropy, and nothing between the two."""
    options = ["--rows", "6", "--max-target-length", "8", "--prompt-template", TEMPLATE, *data_arguments]
    options += ["--teacher", str(teacher_folder)]
    names = [str(student_folder), str(teacher_folder)]
    assert main(["evaluate", *names, *options, "--json", "--output", str(student_folder / "measured")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((student_folder / "measured" / "metrics.json").read_text()) == result
    assert (student_folder / "measured" / "quality.png").read_bytes().startswith(b"\x89PNG")
    student, teacher = (result["models"][name] for name in names)
    assert student["n"] == teacher["n"] == 6
    assert teacher["kl"]["value"] == 0.0 and teacher["teacher_agreement"]["value"] == 1.0
    assert student["ce"]["value"] == pytest.approx(teacher["ce"]["value"], abs=0.05)  # bfloat16 where the CPU has it
    assert student["kl"]["value"] < 0.01
    (difference,) = result["differences"]
    assert (difference["of"], difference["minus"]) == (names[1], names[0])
    assert difference["ce"]["value"] == pytest.approx(teacher["ce"]["value"] - student["ce"]["value"])
    assert main(["evaluate", *names, *options]) == 0
    shown = capsys.readouterr().out
    assert "\nteacher minus student\n" in shown
    # As in README: shares times 100, the unit at the head of each line; the baseline has no logits to be measured by.
    # Three columns with intervals are wider than a terminal: the baseline has a table of its own.
    cells = {}
    for block in shown.split("\n\n")[:2]:
        head, _, *lines = block.splitlines()
        assert head.split("  ")[0] == "6 rows"
        for line in lines:
            cells.setdefault(line[: line.index("  ")], []).extend(re.split(r"\s{2,}", line)[1:])
    assert head.endswith("lead-sentence baseline")
    assert list(cells) == [
        "ROUGE-L, 0 to 100",
        "CE, nats/token",
        "KL to teacher, nats/token",
        "Agreement with teacher, %",
        "Distinct outputs, %",
    ]
    rouge = result["models"]["lead_baseline"]["rouge_l"]
    expected = "{value:.1f} [{low:.1f}, {high:.1f}]".format(**{k: 100 * x for k, x in rouge.items()})
    assert cells["ROUGE-L, 0 to 100"][2] == expected and rouge["value"] > 0.05
    assert cells["Agreement with teacher, %"][1:] == ["100.0 [100.0, 100.0]", "-"]
    assert cells["CE, nats/token"][1].startswith(f"{teacher['ce']['value']:.3f} [")
    assert main(["evaluate", names[0], *options[:-2]]) == 0  # alone, and without a teacher
    assert "minus" not in capsys.readouterr().out
    assert "named twice" in one_line_error(capsys, "evaluate", names[0], names[0], *options)


def test_a_student_whose_tokenizer_cannot_hold_the_prompt_is_measured_on_it(
    make_bpe_tokenizer, data_arguments, tmp_path, capsys, caplog
):
    """Of full depth, and so with the teacher's cross-entropy; its tokenizer puts a space in front of a source."""
    tokenizer = make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    save_teacher(
        AutoModelForCausalLM.from_pretrained(write_teacher(tmp_path / "bare", tokenizer)), tokenizer, tmp_path / "of"
    )
    names = [str(tmp_path / name) for name in ("student", "of")]
    template = ["--prompt-template", TEMPLATE]
    assert main(["init", names[1], "--output", names[0], *template, *data_arguments]) == 0
    capsys.readouterr()
    options = ["--rows", "6", "--max-target-length", "8", "--metrics", "ce", *data_arguments]
    assert main(["evaluate", *names, *options, *template, "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    student, teacher = (models[name] for name in names)
    assert student["ce"]["value"] == pytest.approx(teacher["ce"]["value"], abs=0.05)
    assert main(["evaluate", *names, *options]) == 2
    assert "cannot hold its prompt, which ends in" in capsys.readouterr().err
    for ask in (lambda: main(["generate", names[0], "a", "--max-new-tokens", "1"]), lambda: load_service(names[0], 1)):
        caplog.clear()
        ask()
        assert f"The tokenizer of {names[0]} cannot hold the prompt" in caplog.text


def test_evaluate_measures_what_it_is_asked_for(student_folder, teacher_folder, data_arguments, tmp_path, capsys):
    """Numbers against those of the libraries on the answers that were written down; the rest is where it should be."""
    names = [str(teacher_folder), str(student_folder)]
    (student_folder / "README.md").write_text("---\nlicense: mit\npipeline_tag: summarization\n---\n\n# Mine\n")
    options = ["--rows", "7", "--max-target-length", "8", "--prompt-template", TEMPLATE, *data_arguments]
    every = [*evaluate._DEFAULT, *evaluate._OTHERS]
    output = tmp_path / "out"
    both = ["--teacher", str(teacher_folder), "--metrics", *every, "--judge", str(teacher_folder)]
    both += ["--judge-template", "{reference} or {prediction}?", "--output", str(output), "--update-card"]
    assert main(["evaluate", *names, *options, *both]) == 0
    printed = capsys.readouterr()
    assert "writes a digit" in printed.err and "Entropy minus teacher's, nats/token" in printed.out
    result = json.loads((output / "metrics.json").read_text())
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == result["data"]["test_rows"] == 7
    assert set(result["models"][names[0]]) == {*METRICS, "n", "label"} == {*every, "judge", "n", "label"}
    references, scorer = [row["reference"] for row in answers], RougeScorer(["rougeL"], use_stemmer=True)
    # The rows are no functions and end in no full stop: their first sentence is all of them.
    assert [row["lead_baseline"]["answer"] for row in answers] == [f"{row['source']}." for row in answers]
    of_answers = {"rouge_l", "exact_match", "f1", "chrf", "bleu", "distinct", "judge"}
    assert set(result["models"]["lead_baseline"]) == {*of_answers, "n"}
    for name in [*names, "lead_baseline"]:
        texts, numbers = [row[name]["answer"] for row in answers], result["models"][name]
        assert numbers["bleu"]["value"] == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score)
        assert numbers["chrf"]["value"] == pytest.approx(sacrebleu.corpus_chrf(texts, [references]).score)
        assert numbers["f1"]["value"] == pytest.approx(np.mean([f1(*pair) for pair in zip(texts, references)]))
        assert numbers["judge"]["value"] == pytest.approx(np.mean([row[name]["judge"] for row in answers]))
        assert 1 < numbers["judge"]["value"] < 5
        rouge = [scorer.score(reference, text)["rougeL"].fmeasure for text, reference in zip(texts, references)]
        assert numbers["rouge_l"]["value"] == pytest.approx(np.mean(rouge))
        assert numbers["distinct"] == len(set(texts)) / len(texts)
        assert name == "lead_baseline" or 0 < numbers["ece"]["value"] < 1
    assert result["models"][names[0]]["entropy_gap"]["value"] == 0
    assert result["judge"]["name"] == "teacher" and result["judge"]["template"] == "{reference} or {prediction}?"
    assert result["signatures"]["chrf"].startswith("nrefs:1|")
    (difference,) = result["differences"]
    assert all(0 < difference[measure]["p"] <= 1 for measure in ("bleu", "ece", "judge"))
    # What a card gets is in a file for each model, and in the card of that which has one; nothing names a path.
    snippet = yaml.safe_load((output / f"model-index-{names[1].strip('/').replace('/', '--')}.yml").read_text())
    card = ModelCard.load(student_folder / "README.md")
    assert card.text.strip() == "# Mine" and card.data.license == "mit"
    (entry,) = snippet["model-index"]
    assert entry["name"] == card.data.model_name == "student"
    written = card.data.to_dict()["model-index"][0]["results"][0]
    assert (written["metrics"], written["dataset"]) == (entry["results"][0]["metrics"], entry["results"][0]["dataset"])
    assert written["dataset"] == {"name": "pairs.csv", "type": "pairs.csv", "split": "test"}
    assert written["task"]["type"] == "summarization"
    assert str(tmp_path) not in (student_folder / "README.md").read_text()
    assert not (teacher_folder / "README.md").exists()

    # Few measures cost little: without one of texts nothing is generated.
    assert main(["evaluate", names[1], *options, "--metrics", "ece", "--json", "--output", str(tmp_path / "few")]) == 0
    assert set(json.loads(capsys.readouterr().out)["models"][names[1]]) == {"ece", "n", "label"}
    assert not (tmp_path / "few" / "answers.jsonl").exists()


def test_evaluate_and_generate_do_not_read_past_the_positions_of_a_model(
    student_folder, teacher_folder, data_arguments, tmp_path, capsys
):
    """A merged student and a decoder-only model read prompt and target in a row."""
    text = "red 3 green"
    longest = len(AutoTokenizer.from_pretrained(student_folder)(text)["input_ids"])

    def limited(folder, positions, **fields):
        copy = shutil.copytree(folder, tmp_path / f"{folder.name}-{positions}{''.join(fields)}")
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions, **fields}))
        return str(copy)

    fits, short = limited(student_folder, longest + 4), limited(student_folder, longest + 3)
    assert main(["generate", fits, text, "--max-new-tokens", "4"]) == 0
    assert main(["generate", short, "r", text, "--max-new-tokens", "4"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"row 1 has {longest + 4} tokens of prompt and target" in error
    assert f"{short} has positions for {longest + 3} (max_position_embeddings): give a shorter text, or" in error

    options = ["--rows", "4", "--max-source-length", "14", "--prompt-template", TEMPLATE, *data_arguments]
    for model in (limited(student_folder, 21), limited(teacher_folder, 22)):
        assert main(["evaluate", model, *options, "--max-target-length", "5", "--metrics", "rouge_l", "ce"]) == 0
        for measure in ("rouge_l", "ce"):  # the one generates, the other reads
            capsys.readouterr()
            assert main(["evaluate", model, *options, "--max-target-length", "9", "--metrics", measure]) == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert re.search(r"row \d has \d+ tokens of prompt and target, but .* has positions for 2\d", error), error
            assert model in error and "max_source_length" in error
    assert main(["evaluate", str(student_folder), *options, "--teacher", limited(teacher_folder, 20)]) == 2
    assert "the teacher has positions for 20" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["merged", "separate"])
def test_lengths_of_rows_against_the_positions_of_a_model(kind):
    config = make_config(kind, max_position_embeddings=10)
    if kind == "merged":
        check_rows("it", config, [7, 2], [3, 8])
        with pytest.raises(ValueError, match="row 1 has 11 tokens of prompt and target, but it has positions for 10"):
            check_rows("it", config, [7, 3], [3, 8])
    else:
        check_rows("it", config, [10, 2], [10, 8])
        for sources, targets, what in (([1, 11], [2, 2], "source"), ([1, 1], [2, 11], "target")):
            with pytest.raises(ValueError, match=f"row 1 has 11 tokens of {what}, but it has positions for 10"):
                check_rows("it", config, sources, targets)
    check_rows("it", T5Config(), [5000], [5000])  # has no positions that could end


def test_other_ids_than_the_teachers_are_not_compared(student_folder, data_arguments, tmp_path, capsys):
    """What needs both is refused; the student's own cross-entropy is of its own tokens."""
    student, teacher = str(student_folder), ["--teacher", str(write_teacher(tmp_path / "other", wordpiece()))]
    options = ["--rows", "6", "--max-target-length", "8", "--prompt-template", TEMPLATE, *data_arguments]
    assert main(["evaluate", student, *options, *teacher, "--metrics", "kl", "ce"]) == 2
    assert "have other tokens, so that kl cannot compare their ids" in capsys.readouterr().err
    found = []
    for more in (teacher, []):
        assert main(["evaluate", student, *options, *more, "--metrics", "ce", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["models"][student]["ce"])
    assert found[0] == found[1]


def test_a_model_whose_path_is_longer_than_the_name_of_a_file(student_folder, data_arguments, tmp_path, capsys):
    deep = tmp_path / ("a folder " * 12) / ("dé" * 60)
    deep.mkdir(parents=True)
    names = [str(student_folder.rename(deep / "student")), str(shutil.copytree(deep / "student", deep / "other"))]
    options = ["--rows", "2", "--max-target-length", "4", "--metrics", "rouge_l", *data_arguments]
    assert main(["evaluate", *names, *options, "--output", str(tmp_path / "measured")]) == 0
    files = [file.name for file in (tmp_path / "measured").glob("model-index-*")]
    assert {file[-11:] for file in files} == {"student.yml", "--other.yml"} and len(files) == 2


def test_a_disk_that_is_full_does_not_take_the_numbers_along(
    student_folder, data_arguments, tmp_path, monkeypatch, capsys
):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    options = ["--rows", "2", "--metrics", "ce", "--json", *data_arguments, "--output", str(tmp_path / "measured")]
    assert main(["evaluate", str(student_folder), *options]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["models"][str(student_folder)]["ce"]["value"] > 0
    assert said.err.splitlines()[-1].endswith("error: [Errno 28] No space left on device")


def test_a_limit_that_leaves_no_room_for_the_source(student_folder, data_arguments, capsys):
    options = ["--rows", "2", "--max-source-length", "2", "--metrics", "ce", *data_arguments]
    assert main(["evaluate", str(student_folder), *options]) == 2
    assert "max_source_length=2 leaves no token for the source" in capsys.readouterr().err


def test_an_export_is_not_evaluated(student_folder, data_arguments, tmp_path, capsys):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "exported.json").write_text("{}")
    assert "name the student that it was made from" in one_line_error(
        capsys, "evaluate", str(tmp_path / "onnx"), *data_arguments
    )


def test_data_in_the_home_folder_are_no_data_of_the_hub(student_folder, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(pairs_file.parent))
    data = [f"--dataset=~/{pairs_file.name}", "--source-column", "text", "--target-column", "short"]
    options = ["--rows", "2", "--metrics", "exact_match", "--output", str(tmp_path / "measured")]
    assert main(["evaluate", str(student_folder), *data, *options]) == 0
    data = json.loads((tmp_path / "measured" / "metrics.json").read_text())["data"]
    assert data["name"] == pairs_file.name and "hub_id" not in data


def test_evaluate_refuses_before_it_measures(student_folder, data_arguments, capsys):
    command = ["evaluate", str(student_folder), *data_arguments]
    assert "name one with --teacher" in one_line_error(capsys, *command, "--metrics", "f1", "kl")
    assert "no README.md" in one_line_error(capsys, *command, "--update-card")
    assert "invalid choice: 'meteor'" in one_line_error(capsys, *command, "--metrics", "meteor")
    assert "rate it" in one_line_error(capsys, *command, "--judge", str(student_folder), "--judge-template", "rate it")
    assert "--judge-template without --judge" in one_line_error(capsys, *command, "--judge-template", "rate it")
