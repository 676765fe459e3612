"""Writes the students of this release that later releases load: PYTHONPATH=src:tests python tests/hub/freeze.py

A folder `frozen/MAJOR.MINOR` for each release, with a student of either cross-attention as `save_pretrained` leaves it
(weights, config, tokenizer, and the model files as they are today) and, in `expected.safetensors`, what it answered.
What is written is never changed again; `test_frozen.py` holds this and all later versions to it.
"""

import sys
from pathlib import Path

import torch
from distillation_toys import spread
from safetensors.torch import save_file
from tokenizer_toys import unigram
from transformers import LlamaConfig, LlamaForCausalLM

from hf_encdec_distill import RopeEncDecForConditionalGeneration, __version__


FROZEN = Path(__file__).parent / "frozen"
TEXTS = ["Return the sum of two numbers.", "Two dogs."]


def freeze(folder: Path, cross_attention: str) -> None:
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
    student = spread(student, std=0.3)
    student.save_pretrained(folder)
    inputs = student.tokenizer(TEXTS, padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    decoder_input_ids = torch.arange(10, 20).view(2, 5)
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
    if release.exists():
        sys.exit(f"{release} is there: what is frozen stays as it is")
    for kind in ("separate", "merged"):
        freeze(release / kind, kind)
    print(release)
