"""What tests of folders that anybody may have made start from."""

import pytest
from distillation_toys import write_pairs, write_teacher
from transformers import AutoModelForCausalLM

from hf_encdec_distill import RopeEncDecForConditionalGeneration


@pytest.fixture(scope="session")
def whole(tmp_path_factory, make_bpe_tokenizer):
    """A teacher, a student with its tokenizer, and pairs, as they should be; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = make_bpe_tokenizer(pad_token="<|endoftext|>")
    write_teacher(folder / "teacher", tokenizer, layers=2)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher, tokenizer=tokenizer)
    student.save_pretrained(folder / "student")
    write_pairs(folder / "pairs.csv", 120)
    return folder
