"""Distil the built-in teacher into a student on the built-in task: Seq2SeqTrainer's script with the class swapped.

    python examples/distill.py

The teacher should know the task; `hf-encdec-distill quickstart` adapts one first and leaves it in work/teacher of its
folder, for --teacher. Every argument of DistillationTrainingArguments is an option: --divergence reverse_kl,
--distill_weight 0.5, ...; on a CPU with bfloat16 add --use_cpu --bf16 --teacher_dtype bfloat16.
"""

from dataclasses import dataclass

from transformers import HfArgumentParser

from hf_encdec_distill import (
    DistillationTrainer,
    DistillationTrainingArguments,
    RopeEncDecForConditionalGeneration,
)
from hf_encdec_distill.data import PROMPT_TEMPLATE, fetch_builtin_teacher, load_python_docstrings


@dataclass
class ScriptArguments:
    teacher: str | None = None  # default: the built-in teacher
    encoder_layers: int = 11
    decoder_layers: int = 4
    eval_rows: int = 64


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DistillationTrainingArguments))
    parser.set_defaults(output_dir="runs/distill", max_steps=100, learning_rate=1e-3, logging_steps=10)
    script, args = parser.parse_args_into_dataclasses()
    args.prompt_template = args.prompt_template or PROMPT_TEMPLATE
    args.max_source_length = args.max_source_length or 256
    args.max_target_length = args.max_target_length or 32
    teacher = script.teacher or fetch_builtin_teacher()

    data = load_python_docstrings("stdlib")
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher,
        encoder_num_hidden_layers=script.encoder_layers,
        decoder_num_hidden_layers=script.decoder_layers,
        prompt_template=args.prompt_template,
        calibration=[(row["source"], row["target"]) for row in data["validation"].select(range(32))],
    ).float()
    trainer = DistillationTrainer(
        model=student,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"].select(range(min(script.eval_rows, len(data["test"])))),
        processing_class=student.tokenizer,
        teacher=teacher,
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
