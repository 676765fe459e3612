"""The built-in teacher as users get it (PyPI, then the cache), and a student that starts as this teacher."""

import inspect
import statistics

import pytest
import torch

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.data import load_builtin_teacher
from hf_encdec_distill.models.prompts import encode_prompt


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
