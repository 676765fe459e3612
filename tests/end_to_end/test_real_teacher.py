"""The built-in teacher as users get it (PyPI, then the cache), and a student that starts as this teacher."""

import inspect
import statistics
from pathlib import Path

import pytest
import torch
import yaml

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.data import PROMPT_TEMPLATE, load_builtin_teacher
from hf_encdec_distill.models.prompts import encode_prompt, prompt_start_token_id, student_tokenizer


RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
SOURCES = [inspect.getsource(f) for f in (statistics.median, statistics.mode, statistics.fmean)]


@pytest.fixture(scope="module")
def teacher_and_tokenizer():
    teacher, tokenizer = load_builtin_teacher(dtype=torch.float32)
    return teacher.eval(), tokenizer


def test_the_teacher_is_smollm2(teacher_and_tokenizer):
    teacher, tokenizer = teacher_and_tokenizer
    config = teacher.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size) == (
        "llama",
        30,
        576,
        49152,
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.tie_word_embeddings) == (9, 3, True)
    for source in SOURCES:
        assert tokenizer.decode(tokenizer(source)["input_ids"]) == source


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_template_of_a_recipe_is_built_into_the_students_tokenizer(teacher_and_tokenizer, recipe):
    """The teacher reads what it would of the whole text, whatever the source ends in."""
    _, tokenizer = teacher_and_tokenizer
    template = yaml.safe_load(recipe.read_text()).get("prompt_template", PROMPT_TEMPLATE)
    student, start = student_tokenizer(tokenizer, template), prompt_start_token_id(tokenizer, template)
    sources = [*(source.rstrip() for source in SOURCES), "A package.", "a", "42 ways, 3.5%", "(see there)"]
    for source in sources:
        assert (
            encode_prompt(tokenizer, source, template) == tokenizer(template.replace("{source}", source))["input_ids"]
        )
    for source in (*sources, "a ", "a \n", "\ta\n\n", " "):
        assert encode_prompt(tokenizer, source, template) == [*student(source)["input_ids"], start]


def test_at_full_depth_the_student_writes_what_the_teacher_writes(teacher_and_tokenizer):
    teacher, tokenizer = teacher_and_tokenizer
    student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher, tokenizer=tokenizer)
    prompts = [encode_prompt(tokenizer, source) for source in SOURCES]
    inputs = student.tokenizer(SOURCES, padding=True, return_tensors="pt")
    ours = student.generate(**inputs, max_new_tokens=8, do_sample=False)[:, 1:]
    for prompt, tokens in zip(prompts, ours, strict=True):
        theirs = teacher.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
        )[0, len(prompt) :]
        assert torch.equal(tokens[: len(theirs)], theirs)


def test_the_default_student_has_81_million_parameters(teacher_and_tokenizer):
    teacher, _ = teacher_and_tokenizer
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, encoder_layers=list(range(11)), decoder_layers=[0, 1, 24, 29], calibration=[([1, 2, 3], [4, 5])]
    )
    total = sum(parameter.numel() for parameter in student.parameters())
    # One embedding (49152 x 576), 15 blocks of 3,540,096 and two final norms.
    assert total == 49152 * 576 + 15 * 3_540_096 + 2 * 576 == 81_414_144
