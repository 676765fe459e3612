"""The prompt that a student was made with stays its own: whatever tokenizer a script gives, and on every day."""

import json

import pytest
import yaml
from distillation_toys import arguments, make_t5, write_pairs, write_teacher
from tokenizers import pre_tokenizers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_encdec_distill import DistillationTrainer, RopeEncDecForConditionalGeneration
from hf_encdec_distill.cards import ModelCardCallback
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.distillation import LiveTeacher, capture


ROWS = [{"source": f"def f{i}(): return {i}", "target": f"Return {i}."} for i in range(4)]
SOURCE = ROWS[0]["source"]
TEMPLATE = "Say:\n{source}\nSaid:"
OF_THE_DAY = '{{ strftime_now("%d %b %Y") }}\n{{ messages[0]["content"] }}\nSaid:'
SHAPE = {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "layer_selection": "even"}


def make_student(teacher, template=None, tokenizer=None):
    return RopeEncDecForConditionalGeneration.from_decoder_only(
        str(teacher), tokenizer=tokenizer, prompt_template=template, calibration=[([5, 6], [7, 8])], **SHAPE
    )


def make_trainer(student, teacher, folder, **changed):
    names = ("processing_class", "teacher_processing_class")
    given = {name: changed.pop(name) for name in names if name in changed}
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, **changed}
    return DistillationTrainer(
        student, arguments(folder, **settings), teacher=str(teacher), train_dataset=ROWS, **given
    )


# A script that gives the teacher's tokenizer -------------------------------------------------------------------------


@pytest.fixture
def teacher(tmp_path, make_bpe_tokenizer):
    return write_teacher(tmp_path / "teacher", make_bpe_tokenizer(pad_token="<|endoftext|>"), layers=3)


@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("student", ["made", "loaded", "loaded without its tokenizer"])
def test_the_teachers_tokenizer_does_not_take_the_place_of_the_students(teacher, tmp_path, student, template):
    theirs = AutoTokenizer.from_pretrained(teacher)
    model = make_student(teacher, template)
    if student != "made":
        model.save_pretrained(tmp_path / "student")
        if "without" in student:
            for file in (tmp_path / "student").glob("*token*"):
                file.unlink()
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student")
        assert model.tokenizer is None
    trainer = make_trainer(model, teacher, tmp_path / "run", processing_class=theirs, prompt_template=template)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    if template is None:
        messages = [{"role": "user", "content": SOURCE}]
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = template.replace("{source}", SOURCE)
    prompt = theirs(text, add_special_tokens=False)["input_ids"]
    for folder in ("run/checkpoint-1", "saved"):
        saved = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert saved(SOURCE)["input_ids"] == prompt[:-1]
        assert saved.padding_side == "right" and saved.pad_token == "<|endoftext|>"
    assert trainer.callback_handler.processing_class is trainer.processing_class


def test_a_students_tokenizer_is_saved_for_both_versions_of_transformers(teacher, tmp_path):
    """Also one that came from `AutoTokenizer`, which 5.x would save under the name of a class that 4.57 lacks."""
    make_student(teacher, TEMPLATE).save_pretrained(tmp_path / "student")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student")
    own = AutoTokenizer.from_pretrained(tmp_path / "student")
    trainer = make_trainer(model, teacher, tmp_path / "run", processing_class=own, prompt_template=TEMPLATE)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert trainer.processing_class is own
    for folder in ("run/checkpoint-1", "saved"):
        config = json.loads((tmp_path / folder / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert not isinstance(config.get("extra_special_tokens"), list)  # which 4.57 does not read
        assert AutoTokenizer.from_pretrained(tmp_path / folder)(SOURCE)["input_ids"] == own(SOURCE)["input_ids"]


def test_a_students_own_tokenizer_stays_whatever_template_is_trained_on(teacher, tmp_path):
    """Rows that are ready may be of any prompt: the template of the arguments does not take the place of its own."""
    model = make_student(teacher, TEMPLATE)
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 2]}]
    options = {
        "teacher": str(teacher),
        "train_dataset": rows,
        "processing_class": AutoTokenizer.from_pretrained(teacher),
    }
    trainer = DistillationTrainer(model, arguments(tmp_path, max_steps=1), **options)
    trainer.train()
    assert trainer.processing_class is model.tokenizer


@pytest.mark.parametrize("prefix_space", [False, True])
def test_the_card_says_whether_the_template_is_built_in(tmp_path, make_bpe_tokenizer, prefix_space):
    theirs = make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>")
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    folder = write_teacher(tmp_path / "teacher", theirs, layers=3)
    student = make_student(folder, TEMPLATE, theirs)
    options = {"prompt_template": TEMPLATE, "teacher_processing_class": theirs}
    trainer = make_trainer(student, folder, tmp_path / "run", **options)
    trainer.add_callback(ModelCardCallback(trainer))
    trainer.train()
    reads = student.tokenizer.decode(student.tokenizer(SOURCE)["input_ids"])
    assert ("Say:" in reads) != prefix_space
    said = "does not add this prompt" if prefix_space else "so give it the bare source"
    assert said in (tmp_path / "run" / "README.md").read_text()


# Another day ---------------------------------------------------------------------------------------------------------

FIRST, LATER = "2026-11-28", "2027-03-01"


@pytest.fixture
def dated(tmp_path, make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer(chat_template=OF_THE_DAY, pad_token="<|endoftext|>")
    return write_teacher(tmp_path / "dated-teacher", tokenizer, layers=3)


def prompt_ids(teacher, source=SOURCE):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    text = tokenizer.apply_chat_template([{"role": "user", "content": source}], tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_student_and_a_cache_go_on_on_another_day(dated, tmp_path, today):
    today(FIRST)
    expected = prompt_ids(dated)
    student = make_student(dated)
    student.save_pretrained(tmp_path / "student")
    recorded = {"prompt_date": student.config.prompt_date, "progress": False, "k": 280}
    live, tokenizer = LiveTeacher.load(str(dated)), AutoTokenizer.from_pretrained(dated)
    assert capture(live, ROWS, tmp_path / "cache", tokenizer, **recorded) == len(ROWS)
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["prompt_date"] == FIRST

    today(LATER)
    assert prompt_ids(dated) != expected
    for teacher in (dated, tmp_path / "cache"):
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student")
        own = AutoTokenizer.from_pretrained(tmp_path / "student")
        trainer = make_trainer(model, teacher, tmp_path / "run", processing_class=own)
        batch = trainer.data_collator(ROWS[:1])
        assert batch["input_ids"].tolist() == [expected[:-1]] == [own(SOURCE)["input_ids"]]
        assert batch["teacher_input_ids"][0, : len(expected)].tolist() == expected
        trainer.train()
        assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "checkpoint-1").config.prompt_date == FIRST
    # A cache is gone on with, without a word on the day.
    more = [*ROWS, {"source": "z", "target": "Zed"}]
    assert capture(live, more, tmp_path / "cache", tokenizer, progress=False, k=280) == 1


def test_a_cache_of_another_day_than_the_student_is_named(dated, tmp_path, today):
    today(FIRST)
    capture(
        LiveTeacher.load(str(dated)), ROWS, tmp_path / "cache", AutoTokenizer.from_pretrained(dated), progress=False
    )
    today(LATER)
    with pytest.raises(
        ValueError, match=f"prompt_date='{LATER}', but the prompts in the cache .* name the day '{FIRST}'"
    ):
        make_trainer(make_student(dated), tmp_path / "cache", tmp_path / "run")


@pytest.mark.parametrize("kind", ["merged", "t5"])
def test_a_script_that_makes_its_student_again_resumes_on_another_day(dated, tmp_path, today, kind):
    today(FIRST)
    expected = prompt_ids(dated)

    def trainer(steps):
        model = make_student(dated) if kind == "merged" else make_t5(len(AutoTokenizer.from_pretrained(dated)))
        return make_trainer(
            model, dated, tmp_path / "run", max_steps=steps, processing_class=AutoTokenizer.from_pretrained(dated)
        )

    trainer(1).train()
    today(LATER)
    resumed = trainer(2)
    assert resumed.prompt_date == LATER
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    batch = resumed.data_collator(ROWS[:1])
    assert batch["teacher_input_ids"][0, : len(expected)].tolist() == expected
    saved = tmp_path / "run" / "checkpoint-2"
    assert json.loads((saved / "config.json").read_text())["prompt_date"] == FIRST
    if kind == "merged":
        assert AutoTokenizer.from_pretrained(saved)(SOURCE)["input_ids"] == expected[:-1]


def test_an_older_student_says_which_day_it_needs(dated, tmp_path, today):
    """One that was made before the day was kept: its tokenizer names one, its config does not."""
    today(FIRST)
    student = make_student(dated)
    del student.config.prompt_date
    make_trainer(student, dated, tmp_path / "same-day").train()
    del student.config.prompt_date
    today(LATER)
    with pytest.raises(ValueError, match=f"and prompt_date \\(this prompt names {LATER}\\) that the student was made"):
        make_trainer(student, dated, tmp_path / "run").data_collator(ROWS[:1])
    assert not hasattr(student.config, "prompt_date")
    make_trainer(student, dated, tmp_path / "run", prompt_date=FIRST).train()


def test_other_students_know_no_day(teacher, dated, tmp_path):
    assert not hasattr(make_student(teacher).config, "prompt_date")
    # Rows that are ready, as those of plain text, in no prompt: a student of another template stays as it is.
    student = make_student(dated, TEMPLATE)
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 2]}]
    DistillationTrainer(student, arguments(tmp_path / "run"), teacher=str(dated), train_dataset=rows)
    assert not hasattr(student.config, "prompt_date")


def test_the_commands_go_on_on_another_day(dated, tmp_path, today, capsys):
    pairs = str(write_pairs(tmp_path / "pairs.csv", 30))
    data = ["--dataset", pairs, "--source-column", "text", "--target-column", "short"]
    shape = ["--init.encoder-layers", "2", "--init.decoder-layers", "2"]
    run = str(tmp_path / "run")
    steps = ["--save-steps", "1", "--use-cpu", "--report-to", "none", "--disable-tqdm", "true"]
    begin = ["distill", "--teacher", str(dated), "--output", run, *data, *shape, *steps]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"seed": 0}))
    today(FIRST)
    assert main([begin[0], str(recipe), *begin[1:], "--max-steps", "1"]) == 0
    assert main(["cache", str(dated), *data, "--output", str(tmp_path / "cache"), "--student", run]) == 0
    today(LATER)
    assert main([begin[0], str(recipe), *begin[1:], "--max-steps", "2", "--resume"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["prompt_date"] == FIRST
    cached = [
        "distill",
        run,
        "--teacher",
        str(tmp_path / "cache"),
        "--output",
        str(tmp_path / "cached"),
        *data,
        *steps,
    ]
    assert main([*cached, "--max-steps", "1"]) == 0
    made = ["--init.teacher", str(dated), *shape]
    cached[1], cached[5] = str(recipe), str(tmp_path / "made")
    assert main([*cached, *made, "--max-steps", "1"]) == 0
    for folder in ("run", "cached", "made"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["prompt_date"] == FIRST
    evaluated = ["evaluate", run, "--teacher", str(dated), *data, "--metrics", "ce", "kl"]
    assert main(evaluated) == 0, capsys.readouterr().err
