"""Answer texts with an exported folder, in its own runtime, or with a student in PyTorch.

A student that reads images sees one, given with --image, wherever a text has its image token, <image>.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..progress import progress
from ._display import say_result
from ._inputs import check_at_least_one, check_texts


SUMMARY = "answer texts with an exported folder or a student"
EXAMPLE = 'hf-encdec-distill generate exported "def area(radius): return 3.14159 * radius ** 2"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="exported folder, or folder or Hub id of a student")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="what to answer")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="what to see at an <image> of the texts; once for each, in their order",
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="TOKENS", help="default: %(default)s")
    parser.add_argument("--num-beams", type=int, default=1, metavar="N", help="default: %(default)s, greedy")


def run(args: argparse.Namespace) -> None:
    from ..distillation.checks.limits import check_rows

    check_at_least_one(args, "max_new_tokens", "num_beams")
    check_texts(args.texts)
    config, prompts, answer = _greedy(args) or _with_transformers(args)
    lengths = [len(prompt["input_ids"]) for prompt in prompts]
    if not all(lengths):
        number = lengths.index(0) + 1
        raise ValueError(f"text {number} of {len(lengths)} is a prompt of 0 tokens: give a text of at least one")
    mend = "give a shorter text, or fewer --max-new-tokens"
    check_rows(args.model, config, lengths, [args.max_new_tokens] * len(lengths), mend)
    answers = []
    with progress("generate") as update:
        for prompt in prompts:  # one by one: some graphs take no batch, and their answers are the same
            answers.append(answer(prompt))
            update(len(answers) / len(args.texts), f"{len(answers)} of {len(args.texts)} texts")
    pairs = [{"text": text, "answer": answer} for text, answer in zip(args.texts, answers, strict=True)]
    say_result(args, {"answers": pairs}, "\n".join(answers))


# `input_ids`, and `pixel_values` where there are images.
Prompt = Mapping[str, Any]
# The config of a model, the prompts of the texts, and what makes an answer of a prompt.
Answering = tuple[Any, list[Prompt], Callable[[Prompt], str]]


def _greedy(args: argparse.Namespace) -> Answering | None:
    """Of an exported folder, in a second instead of ten; `None` where it takes transformers."""
    from ..export.answering import ExportedStudent, NeedsTransformers
    from ..export.manifest import MANIFEST

    if args.num_beams > 1 or args.image or not (Path(args.model) / MANIFEST).is_file():
        return None
    try:
        student = ExportedStudent(args.model)
    except NeedsTransformers:
        return None
    prompts: list[Prompt] = [{"input_ids": student.encode(text)} for text in args.texts]

    def answer(prompt: Prompt) -> str:
        return student.decode(student.generate(prompt["input_ids"], args.max_new_tokens))

    return student.config, prompts, answer


def _with_transformers(args: argparse.Namespace) -> Answering:
    import torch

    from ..models.loading import load_config, load_processor, load_tokenizer, reads_images
    from ..models.prompts import encode_prompt, warn_of_lacking_prompt

    config = load_config(args.model)
    if args.image and not reads_images(config):
        raise ValueError(f"--image: {args.model} is a {config.model_type}, which reads text alone: leave it out")
    model = load_answering(args.model)
    processor = load_processor(args.model) if args.image else None
    tokenizer = load_tokenizer(args.model) if processor is None else processor.tokenizer
    decoder_only = not config.is_encoder_decoder
    prompts: list[Prompt]
    if decoder_only:
        day = getattr(config, "prompt_date", None)
        prompts = [{"input_ids": encode_prompt(tokenizer, text, prompt_date=day)} for text in args.texts]
    elif processor is not None:
        prompts = _with_images(processor, args)
    else:
        warn_of_lacking_prompt(args.model, tokenizer, config)
        prompts = [{"input_ids": tokenizer(text)["input_ids"]} for text in args.texts]

    def answer(prompt: Prompt) -> str:
        input_ids = torch.tensor([prompt["input_ids"]])
        images = {"pixel_values": torch.from_numpy(prompt["pixel_values"])} if "pixel_values" in prompt else {}
        tokens = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            **images,
            max_new_tokens=args.max_new_tokens,
            num_beams=args.num_beams,
            num_return_sequences=1,
            do_sample=False,
            return_dict_in_generate=False,
            tokenizer=tokenizer,  # for stop_strings of the generation config
        )
        # Behind the prompt, or the token from which an encoder-decoder starts: the prompt's last, if it is merged.
        tokens = tokens[0, input_ids.shape[1] if decoder_only else 1 :]
        return tokenizer.decode(tokens, skip_special_tokens=True).strip()

    return config, prompts, answer


def _with_images(processor, args: argparse.Namespace) -> list[Prompt]:
    """
    Raises:
        ValueError: there are not as many images as image tokens in the texts, or a file is none.
    """
    left = iter(args.image)
    images = [list(islice(left, text.count(processor.image_token))) for text in args.texts]
    images[-1] += left  # too many, which the processor says
    read = [processor(images=of_text, text=text) for of_text, text in zip(images, args.texts, strict=True)]
    return [{**one, "input_ids": one["input_ids"][0]} for one in read]


def load_answering(name: str, **options):
    """An exported folder on the runtime of its target, else a student in PyTorch; `options` are for the latter."""
    from ..export.manifest import MANIFEST
    from ..export.runtime import ExportedForConditionalGeneration
    from ..models.loading import load_student_of_any_kind

    if (Path(name) / MANIFEST).is_file():
        return ExportedForConditionalGeneration.from_pretrained(name)
    return load_student_of_any_kind(name, **options)
