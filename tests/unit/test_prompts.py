"""The teacher's prompt, compared with transformers' own `apply_chat_template` and tokenizer calls."""

import json

import pytest
from tokenizer_toys import merging_blanks
from tokenizers import pre_tokenizers, processors
from transformers import AutoTokenizer

from hf_encdec_distill.distillation import DistillationCollator
from hf_encdec_distill.models.prompts import (
    PreTrainedTokenizerFast,
    distinct_pad_token,
    encode_prompt,
    frozen_prompt_date,
    prompt_start_token_id,
    student_tokenizer,
)


SOURCE = "def add(a, b):\n    return a + b"
TEMPLATE = "{source}\n# In short:"


def chat_ids(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_chat_template_is_used_without_a_template_of_the_users(make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer()
    messages = [{"role": "user", "content": SOURCE}]
    assert encode_prompt(tokenizer, SOURCE) == chat_ids(tokenizer, messages)
    assert encode_prompt(tokenizer, messages) == chat_ids(tokenizer, messages)


@pytest.mark.parametrize("template", [TEMPLATE, "<s>" + TEMPLATE, None])
@pytest.mark.parametrize(
    "chat_template", [None, "{{ bos_token }}{{ messages[0]['content'] }}\n", "{{ messages[0]['content'] }}\n"]
)
def test_there_is_exactly_one_bos(make_bpe_tokenizer, template, chat_template):
    tokenizer = make_bpe_tokenizer(add_bos=True, chat_template=chat_template)
    ids = encode_prompt(tokenizer, SOURCE, template)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_adds_no_bos_gets_none(make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer(chat_template=None)
    assert encode_prompt(tokenizer, SOURCE) == tokenizer(SOURCE)["input_ids"]
    assert encode_prompt(tokenizer, SOURCE, TEMPLATE) == tokenizer(SOURCE + "\n# In short:")["input_ids"]


def test_braces_in_the_source_are_left_alone(make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer()
    assert tokenizer.decode(encode_prompt(tokenizer, "{x: {source}}", TEMPLATE)) == "{x: {source}}\n# In short:"


@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("room", [1, 5, 12])
def test_what_is_cut_is_the_end_of_the_source(make_bpe_tokenizer, template, room):
    tokenizer = make_bpe_tokenizer()
    whole = encode_prompt(tokenizer, SOURCE, template)
    around = len(whole) - len(tokenizer(SOURCE)["input_ids"])
    ids = encode_prompt(tokenizer, SOURCE, template, max_length=around + room)
    assert len(ids) <= around + room
    cut = tokenizer.decode(tokenizer(SOURCE)["input_ids"][:room])
    assert ids == encode_prompt(tokenizer, cut, template)


@pytest.mark.parametrize("limit", [0, -5])
def test_a_limit_below_one_is_no_limit_at_all_nor_counted_from_the_end(make_bpe_tokenizer, limit):
    tokenizer = make_bpe_tokenizer()
    with pytest.raises(ValueError, match=rf"max_length={limit} is out of range; it has to be at least 1"):
        encode_prompt(tokenizer, SOURCE, TEMPLATE, max_length=limit)
    for name in ("max_source_length", "max_target_length"):
        with pytest.raises(ValueError, match=rf"{name}={limit} is out of range; it has to be at least 1"):
            DistillationCollator(tokenizer, tokenizer, **{name: limit})


def test_messages_are_cut_in_the_last_one(make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": SOURCE}]
    ids = encode_prompt(tokenizer, messages, max_length=len(encode_prompt(tokenizer, messages)) - 4)
    text = tokenizer.decode(ids)
    assert "Be brief." in text and text.endswith("<|im_start|>assistant\n")
    assert SOURCE not in text and SOURCE[:10] in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": SOURCE, "prompt_template": "no place"}, "{source}"),
        ({"source": SOURCE, "prompt_template": TEMPLATE, "max_length": 3}, "max_source_length=3"),
        ({"source": [{"role": "user", "content": "x"}], "prompt_template": TEMPLATE}, "prompt_template"),
    ],
)
def test_what_cannot_work_is_a_value_error(make_bpe_tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        encode_prompt(make_bpe_tokenizer(), **arguments)


def test_messages_need_a_chat_template(make_bpe_tokenizer):
    with pytest.raises(ValueError, match="chat_template"):
        encode_prompt(make_bpe_tokenizer(chat_template=None), [{"role": "user", "content": "x"}])


def test_the_start_token_is_the_constant_last_token(make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer()
    newline = tokenizer("\n")["input_ids"][-1]
    assert prompt_start_token_id(tokenizer) == newline
    assert prompt_start_token_id(tokenizer, TEMPLATE) == tokenizer(":")["input_ids"][-1]
    assert prompt_start_token_id(tokenizer, "Sum up: {source}") is None
    assert prompt_start_token_id(make_bpe_tokenizer(chat_template=None)) is None


def test_the_pad_token_is_not_eos_where_one_can_be_had(make_bpe_tokenizer):
    assert distinct_pad_token(make_bpe_tokenizer(pad_token="<|im_end|>")) == "<|endoftext|>"
    assert distinct_pad_token(make_bpe_tokenizer(pad_token="<s>")) == "<s>"


@pytest.mark.parametrize("template", [TEMPLATE, "Summarise:\n{source}\n\n", None])
@pytest.mark.parametrize("add_bos", [False, True])
def test_the_template_is_built_into_the_students_tokenizer(make_bpe_tokenizer, tmp_path, template, add_bos):
    teacher = make_bpe_tokenizer(add_bos=add_bos)
    student_tokenizer(teacher, template).save_pretrained(tmp_path)
    student = AutoTokenizer.from_pretrained(tmp_path)
    for source in (SOURCE, "x", "Grüße, 42!"):
        assert student(source)["input_ids"] == encode_prompt(teacher, source, template)[:-1]
    limit = len(encode_prompt(teacher, SOURCE, template)) - 3
    cut = student(SOURCE, truncation=True, max_length=limit - 1)["input_ids"]
    assert cut == encode_prompt(teacher, SOURCE, template, max_length=limit)[:-1]
    assert student.pad_token == "<|endoftext|>" and student.padding_side == "right"
    batch = student([SOURCE, "x"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    target = student(text_target="Add.", add_special_tokens=False)["input_ids"]
    assert target == teacher("Add.", add_special_tokens=False)["input_ids"]


def test_either_version_of_transformers_loads_what_the_other_one_saved(make_bpe_tokenizer, tmp_path):
    student_tokenizer(make_bpe_tokenizer(), TEMPLATE).save_pretrained(tmp_path / "made")
    PreTrainedTokenizerFast.from_pretrained(tmp_path / "made").save_pretrained(tmp_path / "trained")
    for folder in ("made", "trained"):
        saved = json.loads((tmp_path / folder / "tokenizer_config.json").read_text())
        assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"  # 5.x alone would write "TokenizersBackend"


DATES = ["2026-11-28", "2027-03-01"]
OF_THE_DAY = {
    # As Llama 3.2's template does it, as SmolLM3's does, and what else they might.
    "llama": "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    '{%- endif %}\n{{ "Today Date: " + date_string }}:{{ messages[0]["content"] }}<|im_end|>\n#',
    "smollm": '{%- set today = strftime_now("%d %B %Y") -%}\n  {% if true %}\n{{ today }}{% endif %}\n'
    '{{ messages[0]["content"] }}<|im_end|>#',
    "other": '\n{{ strftime_now("%A %-d.%-m. (%j, %y) %Y-%m-%d %H:%M:%S %p %x %U") }}{{ messages[0]["content"] }}#',
}


@pytest.mark.parametrize("template", OF_THE_DAY)
def test_a_chat_template_is_told_the_day(make_bpe_tokenizer, today, template):
    """What transformers renders on that day, on any other; without a day, that of today."""
    teacher = make_bpe_tokenizer(chat_template=OF_THE_DAY[template])
    of_day = {}
    for day in DATES:
        today(day)
        of_day[day] = chat_ids(teacher, [{"role": "user", "content": SOURCE}])
        assert encode_prompt(teacher, SOURCE) == of_day[day]
        assert frozen_prompt_date(teacher) == day and frozen_prompt_date(teacher, None, DATES[0]) == DATES[0]
    assert of_day[DATES[0]] != of_day[DATES[1]]
    for day, ids in of_day.items():
        assert encode_prompt(teacher, SOURCE, prompt_date=day) == ids
        assert encode_prompt(teacher, [{"role": "user", "content": SOURCE}], prompt_date=day) == ids
        assert student_tokenizer(teacher, prompt_date=day)(SOURCE)["input_ids"] == ids[:-1]


def test_a_prompt_that_names_no_day_has_none(make_bpe_tokenizer):
    ours = make_bpe_tokenizer(chat_template=OF_THE_DAY["llama"])
    assert frozen_prompt_date(ours, TEMPLATE, DATES[0]) is None
    assert frozen_prompt_date(make_bpe_tokenizer(), None, DATES[0]) is None
    assert frozen_prompt_date(make_bpe_tokenizer(chat_template=None)) is frozen_prompt_date(None) is None
    with pytest.raises(ValueError, match="prompt_date='28.11.2026' is no date: give YYYY-MM-DD"):
        frozen_prompt_date(ours, None, "28.11.2026")


def test_a_separate_student_reads_the_bare_source(make_bpe_tokenizer):
    teacher = make_bpe_tokenizer()
    assert student_tokenizer(teacher, TEMPLATE, "separate")(SOURCE)["input_ids"] == teacher(SOURCE)["input_ids"]


@pytest.mark.parametrize("add_prefix_space", [False, True])
@pytest.mark.parametrize("begin", ["<s> ", ""])
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_what_a_tokenizer_puts_behind_a_text_is_not_in_a_prompt(
    make_bpe_tokenizer, template, begin, add_prefix_space, tmp_path
):
    """Nor in what a merged student reads, with a template in its tokenizer, with one that it cannot hold, or none."""
    teacher = make_bpe_tokenizer(chat_template=None)
    backend = teacher.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    special = [(token, teacher.convert_tokens_to_ids(token)) for token in ("<s>", "<|im_end|>")]
    backend.post_processor = processors.TemplateProcessing(single=f"{begin}$A <|im_end|>", special_tokens=special)
    student_tokenizer(teacher, template).save_pretrained(tmp_path)
    student = AutoTokenizer.from_pretrained(tmp_path)
    bos = [teacher.bos_token_id] if begin else []
    bare = [*bos, *teacher(SOURCE, add_special_tokens=False)["input_ids"]]
    prompt = encode_prompt(teacher, SOURCE, template)
    cannot_hold = template is not None and add_prefix_space
    assert student(SOURCE)["input_ids"] == (bare if cannot_hold or template is None else prompt[:-1])
    assert teacher.eos_token_id not in prompt and (template is not None or prompt == bare)


BLANKS = [SOURCE, "x", "x ", "x \n", " x", "\n\n x\t", " ", ""]


@pytest.mark.parametrize(
    "template", ["{source}\n", "Package: {source} Synopsis:", "{source}:", "a b {source} a b", None]
)
@pytest.mark.parametrize("add_bos", [False, True])
def test_blanks_at_the_ends_of_a_source_stay_outside_of_the_template(make_bpe_tokenizer, template, add_bos):
    """Whatever the source ends in, or is cut at, the student reads the teacher's prompt but the last token."""
    teacher = merging_blanks(make_bpe_tokenizer(add_bos=add_bos))
    assert len(teacher(" \n", add_special_tokens=False)["input_ids"]) == 1
    student, start = student_tokenizer(teacher, template), prompt_start_token_id(teacher, template)
    around = len(encode_prompt(teacher, "", template))
    for source in BLANKS:
        prompt = encode_prompt(teacher, source, template)
        assert prompt == [*student(source)["input_ids"], start]
        for limit in range(around + 1, len(prompt)):
            cut = student(source, truncation=True, max_length=limit - 1)["input_ids"]
            assert encode_prompt(teacher, source, template, max_length=limit) == [*cut, start]
    if template is not None:
        assert teacher.decode(encode_prompt(teacher, "x \n", template)).endswith(template.replace("{source}", "x \n"))


def test_a_blank_of_a_template_that_would_join_a_word_is_told(make_bpe_tokenizer, caplog):
    teacher = merging_blanks(make_bpe_tokenizer(chat_template=None))
    student_tokenizer(teacher, "Package:\n{source}\nSynopsis:")
    assert not caplog.text
    student_tokenizer(teacher, "a b {source} a b")
    assert "line breaks around {source}" in caplog.text


def test_a_template_that_ends_in_the_source_is_built_in(make_bpe_tokenizer):
    """A student starts from a token of its own then; its encoder reads all of the prompt."""
    teacher = merging_blanks(make_bpe_tokenizer(add_bos=True))
    student = student_tokenizer(teacher, "Say:\n{source}")
    assert student(SOURCE)["input_ids"] == encode_prompt(teacher, SOURCE, "Say:\n{source}")
    assert student.decode(student(SOURCE)["input_ids"]) == f"<s>Say:\n{SOURCE}"


def test_a_template_that_changes_its_source_is_encoded_whole(make_bpe_tokenizer, caplog):
    teacher = make_bpe_tokenizer(chat_template="{{ messages[0]['content'] | upper }}:")
    assert encode_prompt(teacher, SOURCE) == teacher(SOURCE.upper() + ":")["input_ids"]
    assert student_tokenizer(teacher)(SOURCE)["input_ids"] == teacher(SOURCE)["input_ids"]
    twice = encode_prompt(teacher, SOURCE, "{source}\n{source}\n")
    assert twice == teacher(f"{SOURCE}\n{SOURCE}\n")["input_ids"]
    assert "cannot be built into" in caplog.text


def test_a_template_that_does_not_fit_a_prefix_space_is_not_built_in(make_bpe_tokenizer, caplog):
    teacher = make_bpe_tokenizer(chat_template=None)
    # A tokenizer that puts a space in front of every text it encodes: a source alone differs from one inside a text.
    teacher.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    student = student_tokenizer(teacher, "Sum up:{source}\n")
    assert student(SOURCE)["input_ids"] == teacher(SOURCE, add_special_tokens=False)["input_ids"]
    assert encode_prompt(teacher, SOURCE, "Sum up:{source}\n") == teacher(f"Sum up:{SOURCE}\n")["input_ids"]
    assert "encode_prompt" in caplog.text
