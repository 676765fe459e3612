"""Decoder-only students on the command line: made, distilled, measured, asked and pushed, against transformers."""

import json
import re

import pytest
import torch
from distillation_toys import TEMPLATE, write_pairs, write_teacher
from huggingface_hub import ModelCard
from test_cli import one_line_error
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_encdec_distill.cards import write_model_card
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.evaluation import generate
from hf_encdec_distill.models.loading import load_student
from hf_encdec_distill.models.prompts import encode_prompt


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_bpe_tokenizer):
    """A folder with a teacher, pairs, and a student of two layers that `init` made."""
    folder = tmp_path_factory.mktemp("made")
    write_teacher(folder / "teacher", make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>"))
    write_pairs(folder / "pairs.csv", 120)
    options = [
        "--decoder-only",
        "2",
        "--prompt-template",
        TEMPLATE,
        "--output",
        str(folder / "student"),
        *data(folder),
    ]
    assert main(["init", str(folder / "teacher"), *options]) == 0
    return folder


def data(folder):
    return ["--dataset", str(folder / "pairs.csv"), "--source-column", "text", "--target-column", "short"]


def asked(folder, text, new_tokens):
    """What transformers alone answers, with the prompt written out."""
    model, tokenizer = (auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([tokenizer(TEMPLATE.format(source=text), add_special_tokens=False)["input_ids"]])
    answer = model.generate(ids, max_new_tokens=new_tokens, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_init_makes_a_model_of_transformers(made, tmp_path, capsys):
    options = ["--decoder-only", "3", "--layer-selection", "first", "--heal-rows", "0", *data(made)]
    options += ["--output", str(tmp_path / "three")]
    assert main(["init", str(made / "teacher"), *options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "three")
    numbers = {"layers": 3, "parameters": loaded.num_parameters(), "healing": None}
    assert said == {"output": str(tmp_path / "three"), **numbers}
    teacher = AutoModelForCausalLM.from_pretrained(made / "teacher")
    for ours, theirs in zip(loaded.model.layers, [teacher.model.layers[i] for i in (0, 1, 3)], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    for name in ("encoder_layers", "decoder_intermediate_size"):
        option = f"--{name.replace('_', '-')}"
        wrong = [option, "2", "--dataset", "missing.csv"]  # which is not looked for: options are read first
        told = one_line_error(capsys, "init", "x", "--decoder-only", "3", *wrong, "--output", "y")
        assert "decoder_only=3" in told and f"{name}=2" in told


def test_generate_answers_with_the_prompt_of_the_training(made, capsys):
    texts = ["red 1 blue", "a green one"]
    assert main(["generate", str(made / "student"), *texts, "--max-new-tokens", "5", "--json"]) == 0
    answers = [pair["answer"] for pair in json.loads(capsys.readouterr().out)["answers"]]
    assert answers == [asked(made / "student", text, 5) for text in texts]


@pytest.mark.parametrize("teacher", ["teacher", "cache"])
def test_distill(made, tmp_path, capsys, teacher):
    """From a student's folder and in one go with `init`, by a live teacher and a recorded one: the same student."""
    if teacher == "cache":
        capture = ["cache", str(made / "teacher"), "--output", str(tmp_path / "cache"), "--k", "280"]
        capture += ["--teacher-dtype", "float32", "--prompt-template", TEMPLATE, *data(made)]
        assert main(capture) == 0
    path = tmp_path / "cache" if teacher == "cache" else made / "teacher"
    options = ["--teacher", str(path), *data(made), "--prompt-template", TEMPLATE, "--max-steps", "2", "--use-cpu"]
    options += ["--learning-rate", "1e-2", "--save-steps", "1", "--report-to", "none"]
    one, other = tmp_path / "one", tmp_path / "other"
    capsys.readouterr()
    assert main(["distill", str(made / "student"), "--output", str(one), *options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert 0 <= said["metrics"]["eval_teacher_agreement"] <= 1
    (tmp_path / "recipe.yaml").write_text(f"init:\n  decoder_only: 2\n  teacher: {made / 'teacher'}\n")
    assert main(["distill", str(tmp_path / "recipe.yaml"), "--output", str(other), *options]) == 0
    before, after, again = (AutoModelForCausalLM.from_pretrained(f) for f in (made / "student", one, other))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    for a, b in zip(after.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert encode_prompt(AutoTokenizer.from_pretrained(one), "x") == encode_prompt(
        AutoTokenizer.from_pretrained(made / "teacher"), "x", TEMPLATE
    )
    assert (
        main(["distill", str(made / "student"), "--output", str(one), *options, "--max-steps", "3", "--resume"]) == 0
    )

    # The card.
    card = ModelCard.load(one / "README.md")
    assert "encoder" not in card.content.replace("hf-encdec", "").replace("RopeEncDec", "")
    assert "A decoder-only model of type `llama`" in card.text and "2 layers" in card.text
    assert "give it the bare source as a user's message" in card.text
    run_card(card.text, one)
    capsys.readouterr()
    assert main(["push", str(one), "user/small", "--dry-run", "--json"]) == 0
    files = {file["path"] for file in json.loads(capsys.readouterr().out)["files"]}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json", "generation_config.json"} <= files


def run_card(text, folder):
    """Runs the block that loads the model, and compares its answer with that of transformers."""
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert "AutoModelForCausalLM" in code
    printed = []
    scope = {"print": printed.append}
    exec(re.sub(r'from_pretrained\(".*?"', f'from_pretrained("{folder}"', code), scope)
    assert printed[0].strip() == asked(folder, scope["source"], 48)


def test_a_card_names_the_repository_and_still_loads_a_decoder_only_model(made, tmp_path):
    from hf_encdec_distill.cards.loading import with_loading

    for chats in (True, False):
        student = {"layers": 2, "model_type": "llama", "chat_template": chats, "parameters": 1_000_000}
        card = write_model_card(tmp_path / "README.md", {"student": student}).read_text()
        moved = with_loading(card, "llama", {}, "user/small")
        assert moved.count('AutoModelForCausalLM.from_pretrained("user/small")') == 1
        assert ("apply_chat_template" in moved) == chats and "Seq2Seq" not in moved
        if chats:
            run_card(moved, made / "student")


def test_evaluate_reads_the_prompt_of_the_training(made, capsys):
    """Without --prompt-template and beside a teacher without a chat template, as with it."""
    options = ["--rows", "6", "--max-target-length", "8", "--metrics", "ce", "kl", "rouge_l", "--json"]
    student = str(made / "student")
    assert main(["evaluate", student, "--teacher", str(made / "teacher"), *data(made), *options]) == 0
    ours = json.loads(capsys.readouterr().out)["models"][student]
    options = ["--prompt-template", TEMPLATE, *options]
    assert main(["evaluate", student, "--teacher", str(made / "teacher"), *data(made), *options]) == 0
    assert json.loads(capsys.readouterr().out)["models"][student] == ours


def test_answers_do_not_need_a_pad_token(made, make_bpe_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(made / "teacher")
    rows = [{"prompt": list(range(5, 5 + length))} for length in (9, 3, 6)]
    bare, padding = (make_bpe_tokenizer(pad_token=token) for token in (None, "<|endoftext|>"))
    often = model.generate(torch.tensor([rows[1]["prompt"]]), max_new_tokens=3)[0, 5].item()
    with torch.no_grad():  # one of the rows ends before the others
        model.lm_head.weight[[often, bare.eos_token_id]] = model.lm_head.weight[[bare.eos_token_id, often]]
    answers = generate(model, bare, rows, 12)
    assert answers == generate(model, padding, rows, 12) and len(set(map(len, answers))) > 1


def test_info_counts_it(made, capsys):
    assert main(["info", str(made / "student"), "--teacher", str(made / "teacher"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    models = [AutoModelForCausalLM.from_pretrained(made / name) for name in ("student", "teacher")]
    assert [said[side]["parameters"]["total"] for side in ("student", "teacher")] == [
        m.num_parameters() for m in models
    ]
    assert said["student"]["kind"] == "decoder-only"


def test_heal_trains_it_on_text(made, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.txt").write_text(f"Number {number} is followed by {number + 1}, as everybody knows. " * 6)
    options = ["--teacher", str(made / "teacher"), "--text", str(corpus), "--window", "16"]
    options += ["--max-steps", "2", "--eval-rows", "4", "--use-cpu", "--report-to", "none"]
    assert main(["heal", str(made / "student"), "--output", str(tmp_path / "healed"), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["eval_teacher_agreement"] >= 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "healed")


def test_what_needs_an_encoder_decoder_says_so(made, tmp_path, capsys):
    student = str(made / "student")
    assert "Optimum exports that as it is" in one_line_error(
        capsys, "export", student, str(tmp_path / "out"), "--target", "onnx"
    )
    record = ["cache", str(made / "teacher"), "--encoder-states", student, "--output", str(tmp_path / "states")]
    assert main([*record, *data(made)]) == 2
    assert "has no encoder states to keep" in capsys.readouterr().err.splitlines()[-1]
    assert "the page is for encoder-decoders" in one_line_error(capsys, "demo", student, *data(made))
    with pytest.raises(ValueError, match="is a decoder-only model"):
        load_student(student)
