"""Answer texts with an exported folder, in its own runtime, or with a student in PyTorch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..progress import progress
from ._display import say_result
from ._inputs import check_at_least_one


SUMMARY = "answer texts with an exported folder or a student"
EXAMPLE = 'hf-encdec-distill generate exported "def area(radius): return 3.14159 * radius ** 2"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="exported folder, or folder or Hub id of a student")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="what to answer")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="TOKENS", help="default: %(default)s")
    parser.add_argument("--num-beams", type=int, default=1, metavar="N", help="default: %(default)s, greedy")


def run(args: argparse.Namespace) -> None:
    from ..distillation.checks.limits import check_rows
    from ..models.loading import load_tokenizer

    check_at_least_one(args, "max_new_tokens", "num_beams")
    model = load_answering(args.model)
    tokenizer = load_tokenizer(args.model)
    batches = [tokenizer(text, return_tensors="pt") for text in args.texts]
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    mend = "give a shorter text, or fewer --max-new-tokens"
    check_rows(args.model, model.config, lengths, [args.max_new_tokens] * len(lengths), mend)
    answers = []
    with progress("generate") as update:
        for encoded in batches:  # one by one: some graphs take no batch, and their answers are the same
            tokens = model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=args.max_new_tokens,
                num_beams=args.num_beams,
                do_sample=False,
            )
            answers.append(tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
            update(len(answers) / len(args.texts), f"{len(answers)} of {len(args.texts)} texts")
    pairs = [{"text": text, "answer": answer} for text, answer in zip(args.texts, answers, strict=True)]
    say_result(args, {"answers": pairs}, "\n".join(answers))


def load_answering(name: str, **options):
    """An exported folder on the runtime of its target, else a student in PyTorch; `options` are for the latter."""
    from ..export.runtime import MANIFEST, ExportedForConditionalGeneration
    from ..models.loading import load_student

    if (Path(name) / MANIFEST).is_file():
        return ExportedForConditionalGeneration.from_pretrained(name)
    return load_student(name, **options)
