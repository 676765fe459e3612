"""Fine-tune an encoder-decoder with transformers' own Seq2SeqTrainer: nothing in the training knows this package.

    python examples/finetune_seq2seq.py

Without --student one is made out of the built-in teacher; any folder of `hf-encdec-distill init` or `quickstart` will
do too. The task is the built-in one, a Python function to the first sentence of its docstring. Every training argument
is an option; on a CPU with bfloat16 add --use_cpu --bf16.
"""

from dataclasses import dataclass

from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.data import PROMPT_TEMPLATE, fetch_builtin_teacher, load_python_docstrings
from hf_encdec_distill.distillation.metrics import generation_metrics


@dataclass
class ScriptArguments:
    student: str | None = None
    teacher: str | None = None  # what the student is made from; default: the built-in teacher
    encoder_layers: int = 11
    decoder_layers: int = 4
    prompt_template: str = PROMPT_TEMPLATE
    eval_rows: int = 64
    max_source_length: int = 256
    max_target_length: int = 32


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, Seq2SeqTrainingArguments))
    parser.set_defaults(output_dir="runs/finetune", max_steps=100, learning_rate=1e-3, logging_steps=10)
    script, args = parser.parse_args_into_dataclasses()
    args.predict_with_generate, args.generation_max_length = True, script.max_target_length

    if script.student is not None:
        student = AutoModelForSeq2SeqLM.from_pretrained(script.student)
        tokenizer = AutoTokenizer.from_pretrained(script.student)
    else:
        student = RopeEncDecForConditionalGeneration.from_decoder_only(
            script.teacher or fetch_builtin_teacher(),
            encoder_num_hidden_layers=script.encoder_layers,
            decoder_num_hidden_layers=script.decoder_layers,
            prompt_template=script.prompt_template,
        ).float()
        tokenizer = student.tokenizer

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        inputs = tokenizer(batch["source"], truncation=True, max_length=script.max_source_length)
        targets = tokenizer(batch["target"], add_special_tokens=False)["input_ids"]
        labels = [[*ids[: script.max_target_length - 1], tokenizer.eos_token_id] for ids in targets]
        return {**inputs, "labels": labels}

    data = load_python_docstrings("stdlib")
    data["test"] = data["test"].select(range(min(script.eval_rows, len(data["test"]))))
    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)
    trainer = Seq2SeqTrainer(
        model=student,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=student),
        processing_class=tokenizer,
        compute_metrics=generation_metrics(tokenizer, student.config.decoder_start_token_id),
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
