"""Heal a student on plain text before it is distilled on a task: it learns again to continue text as its teacher does.

With prefix_lm the encoder reads the first part of a window of text and the decoder writes the rest. With
span_denoising the student restores spans that were removed. ul2 mixes the two. The result is a STUDENT for `distill`.
--resume continues an interrupted run with the same rows in the same order.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from ..files import alone_in
from ._checkpoints import checkpoint_in
from ._display import say_result
from ._inputs import BUILT_IN, add_training_arguments, teacher_path, training_arguments
from .distill import TRAINING, student_and_tokenizer, train_and_save


SUMMARY = "heal a student on plain text before its task"
EXAMPLE = (
    "hf-encdec-distill heal student --teacher HuggingFaceTB/SmolLM2-135M-Instruct --text corpus --output healed "
    "--max-steps 2000 --learning-rate 5e-4"
)
PASSES_ARGUMENTS_ON = True

_NAMES = (
    "max_steps",
    "learning_rate",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "divergence",
    "distill_weight",
    "distill_temperature",
    "save_steps",
    "seed",
)
_TRAINING = {name: TRAINING[name] for name in _NAMES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", help="folder or Hub id of a student, for instance from `init`")
    parser.add_argument("--teacher", required=True, help=f"causal language model: folder, Hub id, or {BUILT_IN!r}")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder for the checkpoints and the student")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --output")
    parser.add_argument(
        "--text",
        default=BUILT_IN,
        metavar="DATA",
        help="a text file or a folder of them (.txt, .md, .rst, .py), a CSV, TSV, JSON, JSON Lines or Parquet file or "
        "folder, or the name of a dataset on the Hub (default: source and documentation of this Python and its "
        "packages)",
    )
    parser.add_argument(
        "--text-column", default="text", metavar="NAME", help="column of a table with the text (default: %(default)s)"
    )
    parser.add_argument(
        "--objective",
        choices=("prefix_lm", "span_denoising", "ul2"),
        default="prefix_lm",
        help="what the student learns from it (default: %(default)s)",
    )
    parser.add_argument(
        "--window", type=int, default=512, metavar="TOKENS", help="length of a window of text (default: %(default)s)"
    )
    parser.add_argument(
        "--prefix-share",
        type=float,
        nargs=2,
        default=(0.5, 0.5),
        metavar=("LEAST", "MOST"),
        help="share of a window that the encoder reads (default: half)",
    )
    parser.add_argument(
        "--sentinels",
        nargs="+",
        metavar="TOKEN",
        help="tokens that mark removed spans (default: unused special tokens of the teacher)",
    )
    parser.add_argument(
        "--eval-rows",
        type=int,
        default=200,
        metavar="N",
        help="held-out windows that the student is measured on at the end; 0 for none (default: %(default)s)",
    )
    add_training_arguments(
        parser,
        _TRAINING,
        "DistillationTrainingArguments (`distill --help`)\nand of transformers' Seq2SeqTrainingArguments",
    )


def run(args: argparse.Namespace) -> None:
    from datasets import Dataset
    from transformers.trainer_pt_utils import AcceleratorConfig

    from ..data import load_plain_text
    from ..distillation import DistillationTrainer, DistillationTrainingArguments
    from ..distillation.checks.limits import room_for_target
    from ..distillation.collator import tokenizer_of
    from ..models.families import merged_start_token_id
    from ..models.loading import load_config, load_tokenizer

    output = Path(args.output)
    text = Path(args.text).expanduser()
    if args.text != BUILT_IN and text.is_dir() and output.resolve().is_relative_to(text.resolve()):
        raise ValueError(
            f"--output {output} lies in --text {args.text}, and what is saved there would be read as text when the "
            "run goes on: choose a folder outside of it with --output"
        )
    checkpoint = checkpoint_in(output, args.resume)
    training = training_arguments(DistillationTrainingArguments, args, _TRAINING, output)
    if args.eval_rows < 0:
        raise ValueError(f"--eval-rows {args.eval_rows} is below 0: give a number of rows, 0 for no evaluation")
    if training.max_steps < 1:
        raise ValueError("text is read without end: say with --max-steps how many steps to train for")
    processes = training.accelerator_config
    if isinstance(processes, AcceleratorConfig) and processes.dispatch_batches is None:
        # Each process reads its own rows; batches that one reads for all have to be of one length.
        processes.dispatch_batches = False

    for name in ("max_source_length", "max_target_length"):
        if getattr(training, name) is not None:
            raise ValueError(f"--{name} {getattr(training, name)}: healing cuts text into windows; give --window")

    student, own = student_and_tokenizer(args.student)
    tokenizer = tokenizer_of(own)
    teacher = teacher_path(args.teacher)
    teacher_tokenizer = load_tokenizer(teacher)
    _check_same_ids(args, tokenizer, teacher_tokenizer)
    for who, config in (("student", student.config), ("teacher", load_config(teacher))):
        room = room_for_target(config, args.window)  # behind it, where a model reads all of it in a row
        if room is not None and room < 0:
            limit = args.window + room
            raise ValueError(f"--window {args.window}: the {who} has positions for {limit} tokens; give a shorter one")

    def rows(split: Literal["train", "validation"]):
        return load_plain_text(
            None if args.text == BUILT_IN else args.text,
            teacher_tokenizer,
            objective=args.objective,
            window=args.window,
            start_token_id=merged_start_token_id(student.config),
            prefix_share=tuple(args.prefix_share),
            sentinels=_ids(args.sentinels, tokenizer),
            split=split,
            text_column=args.text_column,
            seed=training.seed if training.data_seed is None else training.data_seed,
        )

    held_out = Dataset.from_list(list(rows("validation").take(args.eval_rows))) if args.eval_rows else None
    trainer = DistillationTrainer(
        model=student,
        args=training,
        train_dataset=rows("train"),
        eval_dataset=held_out,
        processing_class=own,
        teacher=teacher,
    )
    if trainer.is_world_process_zero():
        args.until_end.enter_context(alone_in(output))
    train_and_save(trainer, checkpoint)
    metrics = {} if held_out is None else trainer.evaluate()
    if trainer.is_world_process_zero():
        steps = trainer.state.global_step
        lines = [
            f"{output}: healed for {steps} step{'s' * (steps != 1)}",
            *(f"{name}: {value}" for name, value in metrics.items()),
        ]
        say_result(args, {"output": str(output), "steps": steps, "metrics": metrics}, "\n".join(lines))


def _check_same_ids(args: argparse.Namespace, tokenizer, teacher_tokenizer) -> None:
    """Raises ValueError where the windows, in ids of the teacher, would be other tokens to the student, or none."""
    ours, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    never_text = {token.content for token in teacher_tokenizer.added_tokens_decoder.values() if token.special}
    other = [token for token, i in theirs.items() if ours.get(token) != i and token not in never_text]
    if other:
        raise ValueError(
            f"{len(other)} tokens of {args.teacher}, such as {other[0]!r}, have other ids in {args.student}, or none: "
            "heal takes students with their teacher's tokenizer, made without --vocabulary; skip healing for this one"
        )


def _ids(tokens: list[str] | None, tokenizer) -> list[int] | None:
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in tokens or () if token not in vocabulary]
    if unknown:
        raise ValueError(f"--sentinels {unknown[0]}: the student's tokenizer has no such token")
    return None if tokens is None else [vocabulary[token] for token in tokens]
