"""Writes the students of this release that later releases load: PYTHONPATH=src:tests python tests/hub/freeze.py

A folder `frozen/MAJOR.MINOR` for each release, with a student of either cross-attention as `save_pretrained` leaves it
(weights, config, tokenizer, and the model files as they are today) and, in `expected.safetensors`, what it answered.
One that reads images is there for each version of transformers that this was run with, since a processor's files are
not the same. What is written is never changed again; `test_there_and_back.py` and `test_vision_there_and_back.py` hold
this and all later versions to it.
"""

import sys
from pathlib import Path

import torch
import transformers
from distillation_toys import spread
from safetensors.torch import save_file
from tokenizer_toys import unigram
from transformers import AutoProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from hf_encdec_distill import (
    RopeEncDecForConditionalGeneration,
    RopeEncDecForImageTextToText,
    RopeEncDecVisionProcessor,
    __version__,
)


FROZEN = Path(__file__).parent / "frozen"
TEXTS = ["Return the sum of two numbers.", "Two dogs."]


PROMPT = "<image> Two<image> dogs."


def make_text_student(cross_attention: str) -> RopeEncDecForConditionalGeneration:
    tokenizer = unigram(96)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        LlamaForCausalLM(config),
        tokenizer=tokenizer,
        prompt_template="{source} sum",
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=1,
        cross_attention=cross_attention,
    )
    return spread(student, std=0.3)


def freeze(folder: Path, cross_attention: str) -> None:
    student = make_text_student(cross_attention)
    student.save_pretrained(folder)
    inputs = student.tokenizer(TEXTS, padding=True, return_tensors="pt")
    write_answers(folder, student, {name: inputs[name] for name in ("input_ids", "attention_mask")})


def freeze_vision(folder: Path) -> None:
    student = make_text_student("merged")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = spread(CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **sizes)), std=0.3)
    student = RopeEncDecForImageTextToText.from_parts(student, tower)
    processor = RopeEncDecVisionProcessor.for_model(student)
    student.save_pretrained(folder)
    processor.save_pretrained(folder)
    AutoProcessor.from_pretrained(folder).save_pretrained(folder)  # as somebody does who has only loaded it
    write_answers(folder, student, dict(processor(images=pictures(), text=PROMPT, return_tensors="pt")))


def pictures() -> list[torch.Tensor]:
    """Two of 8 x 8 pixels, so that none has to be fitted."""
    colours = torch.arange(2 * 8 * 8 * 3).view(2, 8, 8, 3) * 37 % 256
    return list(colours.to(torch.uint8))


def write_answers(folder: Path, student, inputs: dict[str, torch.Tensor]) -> None:
    rows = len(inputs["input_ids"])
    decoder_input_ids = torch.arange(10, 10 + 5 * rows).view(rows, 5)
    with torch.no_grad():
        expected = {
            **inputs,
            "decoder_input_ids": decoder_input_ids,
            "logits": student(**inputs, decoder_input_ids=decoder_input_ids).logits,
            "tokens": student.generate(**inputs, max_new_tokens=8, do_sample=False),
        }
    save_file({name: value.contiguous() for name, value in expected.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    release = FROZEN / ".".join(__version__.split(".")[:2])
    of_version = "vision-" + ".".join(transformers.__version__.split(".")[:2])
    missing = [kind for kind in ("separate", "merged", of_version) if not (release / kind).exists()]
    if not missing:
        sys.exit(f"{release} is there: what is frozen stays as it is")
    for kind in missing:
        freeze_vision(release / kind) if kind == of_version else freeze(release / kind, kind)
        print(release / kind)
