"""Distil a teacher into a student on rows of text.

Every field of DistillationTrainingArguments (and so of Seq2SeqTrainingArguments) is an option too, beyond those
listed: --lr-scheduler-type, --bf16, --use-cpu, --eval-strategy, ... An interrupted run whose checkpoints are in the
output folder goes on with --resume.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ._inputs import (
    BUILT_IN,
    SCHEDULE,
    add_data_arguments,
    add_training_arguments,
    load_splits,
    prompt_template,
    teacher_path,
    training_arguments,
)


SUMMARY = "distil a teacher into a student"
EXAMPLE = (
    "hf-encdec-distill distill student --teacher HuggingFaceTB/SmolLM2-135M-Instruct --dataset pairs.csv "
    "--output distilled --max-steps 500 --learning-rate 1e-3"
)
PASSES_ARGUMENTS_ON = True

# The training arguments that nearly every run sets; the others are passed on as they come.
_TRAINING = {
    **SCHEDULE,
    "divergence": "forward_kl, reverse_kl, generalized_jsd, skew_kl, skew_reverse_kl or total_variation",
    "distill_weight": "share of the divergence in the loss; the rest is cross-entropy",
    "distill_temperature": "divides the logits in the divergence",
    "max_source_length": "cut prompts to so many tokens",
    "max_target_length": "cut targets to so many tokens",
    "prompt_template": "what the teacher reads, with {source} in it (default: its chat template)",
    "save_steps": "steps between checkpoints",
    "seed": "of the data order",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", help="folder or Hub id of an encoder-decoder, as `init` makes it")
    parser.add_argument(
        "--teacher",
        required=True,
        help=f"causal language model: folder, Hub id, or {BUILT_IN!r}; or a folder that `cache` made",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder for checkpoints and the student")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add_data_arguments(parser)
    add_training_arguments(parser, _TRAINING)


def run(args: argparse.Namespace) -> None:
    from transformers import AutoModelForSeq2SeqLM
    from transformers.trainer_utils import get_last_checkpoint

    from ..distillation import DistillationTrainer, DistillationTrainingArguments
    from ..models.prompts import PreTrainedTokenizerFast

    output = Path(args.output)
    if not args.resume and output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: go on with --resume, or choose another folder with --output")
    checkpoint = get_last_checkpoint(str(output)) if args.resume and output.is_dir() else None
    if args.resume and checkpoint is None:
        raise ValueError(f"there is no checkpoint in {output} to resume from: leave --resume out to begin")

    training = training_arguments(DistillationTrainingArguments, args, _TRAINING, output)
    training.prompt_template = prompt_template(training.prompt_template, args.dataset)

    splits = load_splits(args.dataset, args.source_column, args.target_column)
    student = AutoModelForSeq2SeqLM.from_pretrained(args.student)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.student)
    trainer = DistillationTrainer(
        model=student,
        args=training,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        teacher=teacher_path(args.teacher),
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; checkpoints in {output} go on with the same command and --resume") from None
    trainer.save_model(str(output))
    for name, value in trainer.evaluate().items():
        print(f"{name}: {value}")
