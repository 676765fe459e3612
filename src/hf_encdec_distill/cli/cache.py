"""Record a teacher's distribution at every target of a data set; `distill --teacher FOLDER` then needs no teacher.

Rows that are in the folder already are not captured again: the same command goes on after an interruption, and adds
the rows of another data set. Template and length limits have to be those of the training. Under `accelerate launch`
the processes share the rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ._inputs import BUILT_IN, add_data_arguments, add_prompt_arguments, load_splits, prompt_template, teacher_path


SUMMARY = "record a teacher once, to train from it without it"
EXAMPLE = "hf-encdec-distill cache built-in --output teacher-cache --kind top_k --width 32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help=f"causal language model: folder, Hub id, or {BUILT_IN!r}")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder, or a cache to go on with")
    parser.add_argument(
        "--kind",
        choices=("top_k", "sampled", "dense"),
        default="top_k",
        help="the likeliest tokens and the mass of all others; tokens drawn from the distribution (unbiased, forward "
        "KL only); or all of it (default: %(default)s)",
    )
    parser.add_argument(
        "--width", type=int, default=32, metavar="N", help="tokens kept a target (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="distill_temperature of the training (default: 1)"
    )
    parser.add_argument(
        "--vocab-policy",
        default="mask_padding",
        metavar="POLICY",
        help="vocab_policy of the training; id_map and universal need --student (default: %(default)s)",
    )
    parser.add_argument("--student", metavar="FOLDER", help="the student, whose tokenizer cuts the targets")
    add_data_arguments(parser)
    parser.add_argument(
        "--splits", nargs="+", default=["train", "validation"], metavar="NAME", help="default: train validation"
    )
    add_prompt_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at once (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    from datasets import concatenate_datasets
    from transformers import AutoTokenizer

    from ..distillation.cache import capture
    from ..distillation.teachers import LiveTeacher
    from ._training import device, working_dtype

    splits = load_splits(args.dataset, args.source_column, args.target_column)
    unknown = [name for name in args.splits if name not in splits]
    if unknown:
        raise ValueError(f"--splits {unknown[0]}: the data has {', '.join(splits)}")
    path = teacher_path(args.teacher)
    dtype = str(working_dtype()).removeprefix("torch.")
    captured = capture(
        LiveTeacher.load(path, dtype).to(device()),
        concatenate_datasets([splits[name] for name in args.splits]),
        args.output,
        AutoTokenizer.from_pretrained(path),
        kind=args.kind,
        width=args.width,
        temperature=args.temperature,
        student_tokenizer=AutoTokenizer.from_pretrained(args.student) if args.student else None,
        vocab_policy=args.vocab_policy,
        batch_size=args.batch_size,
        prompt_template=prompt_template(args.prompt_template, args.dataset),
        max_source_length=args.max_source_length,
        max_target_length=args.max_target_length,
    )
    shards = list(Path(args.output).glob("shard-*.parquet"))
    size = sum(shard.stat().st_size for shard in shards)
    print(f"{args.output}: {captured} rows captured, {len(shards)} shards, {size / 1e6:.1f} MB")
