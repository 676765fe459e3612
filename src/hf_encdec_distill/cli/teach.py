"""Fine-tune a teacher on a task with LoRA before a student learns from it. The loss is on the targets alone.

The result is a merged model, or with --adapter the adapter alone, which names its base model. Either is a TEACHER for
the other commands.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files import alone_in
from ._checkpoints import holds_only_a_start
from ._display import say_result
from ._inputs import (
    BUILT_IN,
    SCHEDULE,
    add_data_arguments,
    add_prompt_arguments,
    add_training_arguments,
    check_at_least_one,
    check_trained,
    load_splits,
    prompt_template,
    teacher_path,
    training_arguments,
)
from .init import new_folder


SUMMARY = "fine-tune a teacher on a task with LoRA"
EXAMPLE = (
    "hf-encdec-distill teach HuggingFaceTB/SmolLM2-135M-Instruct --dataset pairs.csv --output taught --max-steps 300 "
    "--learning-rate 1e-3"
)
PASSES_ARGUMENTS_ON = True

_TRAINING = {
    **SCHEDULE,
    "seed": "seed of the adapter's initial weights and the data order",
}
_TRAINING_FOLDER = "training"  # in the output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help=f"causal language model: folder, Hub id, or {BUILT_IN!r}")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the taught teacher")
    parser.add_argument("--rank", type=int, default=16, metavar="N", help="rank of the adapter (default: %(default)s)")
    parser.add_argument(
        "--adapter", action="store_true", help="save the adapter alone (default: merged into the model)"
    )
    add_prompt_arguments(parser)
    add_data_arguments(parser)
    add_training_arguments(parser, _TRAINING, "transformers' TrainingArguments")


def run(args: argparse.Namespace) -> None:
    import torch
    from transformers import TrainingArguments, set_seed

    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ImportError(f'{error}; teach needs pip install "hf-encdec-distill[peft]"') from error

    from ..distillation import DistillationCollator
    from ..evaluation.scoring import completion_batch
    from ..models.either_version import save_teacher
    from ..models.loading import base_of, load_merged_teacher, load_tokenizer
    from .quickstart.tuning import CompletionTrainer

    check_at_least_one(args, "rank", "max_source_length", "max_target_length")
    output = Path(args.output)
    if not (holds_only_a_start(output / _TRAINING_FOLDER) and len(list(output.iterdir())) == 1):
        new_folder(args.output)
    training = training_arguments(TrainingArguments, args, _TRAINING, output / _TRAINING_FOLDER)
    training.remove_unused_columns = False  # the collator reads the texts
    splits = load_splits(args.dataset, args.source_column, args.target_column)
    path = teacher_path(args.teacher)
    if args.adapter and base_of(path) != path:
        raise ValueError(
            f"--adapter, and {args.teacher} is an adapter itself, which cannot be the base of another: leave "
            "--adapter out, which writes one merged model"
        )
    tokenizer = load_tokenizer(path)
    encode = DistillationCollator(
        tokenizer,
        tokenizer,
        prompt_template=prompt_template(args.prompt_template, args.dataset),
        max_source_length=args.max_source_length,
        max_target_length=args.max_target_length,
    ).encode

    def collate(rows: list[dict]) -> dict:
        ready = [encode(row) for row in rows]
        completions = [
            {"prompt": row["teacher_input_ids"][: row["teacher_labels_start"]], "labels": row["labels"]}
            for row in ready
        ]
        return completion_batch(completions, tokenizer.pad_token_id or 0)

    set_seed(training.seed)  # the adapter's first weights are drawn
    adapter = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_merged_teacher(path, dtype=torch.float32), adapter)
    trainer = CompletionTrainer(
        model=model,
        args=training,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=collate,
    )
    if trainer.is_world_process_zero():
        args.until_end.enter_context(alone_in(output))
    trainer.train()
    check_trained(trainer)
    taught = trainer.accelerator.unwrap_model(trainer.model)
    if not args.adapter:
        taught = taught.merge_and_unload()
    save_teacher(taught, tokenizer, output)
    kind, steps = "adapter" if args.adapter else "merged model", trainer.state.global_step
    text = f"{output}: {kind} after {steps} step{'s' * (steps != 1)}"
    say_result(args, {"output": str(output), "kind": kind, "steps": steps}, text)
