r"""Fine-tune an encoder-decoder with transformers' own `Seq2SeqTrainer`: nothing in the training knows this package.

    python examples/finetune_seq2seq.py --do_train --do_eval --do_predict --predict_with_generate \
        --output_dir runs/finetune

Without further arguments a student is made out of the built-in teacher and trained on the built-in task, Python
functions to the first sentence of their docstring. Every training argument is an option; on a CPU with bfloat16 add
--use_cpu --bf16. A YAML or JSON file with the names of the options as keys will do in place of them. A run that was
stopped goes on from its last checkpoint.
"""

import logging
import os
import sys
from dataclasses import dataclass, field

import transformers
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.data import (
    PROMPT_TEMPLATE,
    fetch_builtin_teacher,
    load_pairs,
    load_python_docstrings,
    save_pairs,
)
from hf_encdec_distill.metrics import bleu, chrf, decode_texts, generation_metrics, rouge, squad


logger = logging.getLogger(__name__)

METRICS = {"rouge": rouge, "squad": squad, "chrf": chrf, "bleu": bleu}


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Encoder-decoder, folder or Hub id; or a causal language model, out of whose layers one is made. "
            "Default: the built-in teacher."
        },
    )
    encoder_layers: int = field(default=5, metadata={"help": "Encoder layers of one that is made."})
    decoder_layers: int = field(default=6, metadata={"help": "Decoder layers of one that is made."})
    calibration_samples: int = field(
        default=200,
        metadata={
            "help": "Training rows that say which layers of the causal model it keeps, and that these are fitted on."
        },
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "What it reads, with {source} where the text goes. Default: the causal model's chat template."
        },
    )


@dataclass
class DataTrainingArguments:
    """The rows, and how much of them."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub, or a folder of files. Default: the built-in task."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, TSV, JSON, JSON lines or Parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "Default: rows out of the training file."})
    test_file: str | None = field(default=None, metadata={"help": "Default: rows out of the training file."})
    source_column: str = field(default="source", metadata={"help": "Column with the text that is read."})
    target_column: str = field(default="target", metadata={"help": "Column with the text that shall be written."})
    max_source_length: int = field(default=256, metadata={"help": "Cut what is read to so many tokens."})
    max_target_length: int = field(default=32, metadata={"help": "Cut what shall be written to so many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Cut the training rows to so many."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Cut the validation rows to so many."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Cut the test rows to so many."})
    metrics: list[str] = field(
        default_factory=lambda: ["rouge"],
        metadata={"help": f"What is measured with --predict_with_generate: any of {', '.join(METRICS)}."},
    )

    def __post_init__(self):
        if self.dataset_name is not None and self.files():
            raise ValueError(f"Both dataset_name={self.dataset_name!r} and files are named: leave one of them out.")
        unknown = set(self.metrics) - set(METRICS)
        if unknown:
            raise ValueError(f"metrics={self.metrics}: {min(unknown)!r} is none of {', '.join(METRICS)}.")

    def files(self) -> dict[str, str]:
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: file for split, file in files.items() if file is not None}


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, Seq2SeqTrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".json", ".yaml", ".yml")):
        parse = parser.parse_json_file if sys.argv[1].endswith(".json") else parser.parse_yaml_file
        model_args, data_args, training_args = parse(os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    logger.info("Training/evaluation parameters %s", training_args)
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("There is nothing to do: pass do_train, do_eval or do_predict.")
    checkpoint = training_args.resume_from_checkpoint
    begin_again = getattr(training_args, "overwrite_output_dir", False)  # of transformers 4.57
    if training_args.do_train and checkpoint is None and not begin_again and os.path.isdir(training_args.output_dir):
        checkpoint = get_last_checkpoint(training_args.output_dir)
        if checkpoint is None and os.listdir(training_args.output_dir):
            raise ValueError(
                f"output_dir={training_args.output_dir!r} is not empty and has no checkpoint: choose another."
            )
    set_seed(training_args.seed)

    name = model_args.model_name_or_path or str(fetch_builtin_teacher())
    is_made = not AutoConfig.from_pretrained(name).is_encoder_decoder

    # Rows, with the columns `source` and `target` whatever they were called. Splits that are missing are carved out of
    # train by a hash of the source text.
    is_built_in = data_args.dataset_name is None and not data_args.files()
    prompt_template = PROMPT_TEMPLATE if is_built_in and not model_args.prompt_template else model_args.prompt_template
    if is_built_in:
        rows = load_python_docstrings("stdlib")
    else:
        dataset = data_args.dataset_name or data_args.files()
        rows = load_pairs(dataset, data_args.source_column, data_args.target_column, data_args.dataset_config_name)
    needed = {
        "train": training_args.do_train or is_made,
        "validation": training_args.do_eval,
        "test": training_args.do_predict,
    }
    missing = [split for split in needed if needed[split] and split not in rows]
    if missing:
        raise ValueError(f"There are no {missing[0]} rows, which are needed: name {missing[0]}_file.")
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    for split, limit in limits.items():
        if limit is not None and split in rows:
            rows[split] = rows[split].select(range(min(limit, len(rows[split]))))

    # The model
    if not is_made:
        model = AutoModelForSeq2SeqLM.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    else:
        calibration = rows["train"].select(range(min(model_args.calibration_samples, len(rows["train"]))))
        model = RopeEncDecForConditionalGeneration.from_decoder_only(
            name,
            encoder_num_hidden_layers=model_args.encoder_layers,
            decoder_num_hidden_layers=model_args.decoder_layers,
            prompt_template=prompt_template,
            calibration=list(zip(calibration["source"], calibration["target"])),
        ).float()
        tokenizer = model.tokenizer

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        inputs = tokenizer(batch["source"], truncation=True, max_length=data_args.max_source_length)
        targets = tokenizer(batch["target"], add_special_tokens=False)["input_ids"]
        labels = [[*ids[: data_args.max_target_length - 1], tokenizer.eos_token_id] for ids in targets]
        return {**inputs, "labels": labels}

    with training_args.main_process_first(desc="encoding"):
        encoded = rows.map(encode, batched=True, remove_columns=next(iter(rows.values())).column_names)

    if training_args.generation_max_length is None:
        training_args.generation_max_length = data_args.max_target_length
    metrics = generation_metrics(
        tokenizer, model.config.decoder_start_token_id, [METRICS[metric] for metric in data_args.metrics]
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=encoded["train"] if training_args.do_train else None,
        eval_dataset=encoded["validation"] if training_args.do_eval else None,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=metrics if training_args.predict_with_generate else None,
    )

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        report(trainer, "train", {**result.metrics, "train_samples": len(rows["train"])})
        trainer.save_state()

    if training_args.do_eval:
        report(trainer, "eval", {**trainer.evaluate(), "eval_samples": len(rows["validation"])})

    if training_args.do_predict:
        result = trainer.predict(encoded["test"], metric_key_prefix="predict")
        report(trainer, "predict", {**result.metrics, "predict_samples": len(rows["test"])})
        if training_args.predict_with_generate and trainer.is_world_process_zero():
            texts = decode_texts(result.predictions, tokenizer, model.config.decoder_start_token_id)
            predictions = (
                {"source": row["source"], "target": row["target"], "prediction": text}
                for row, text in zip(rows["test"], texts, strict=True)
            )
            save_pairs(predictions, os.path.join(training_args.output_dir, "generated_predictions.jsonl"))

    card = {}
    if not os.path.isdir(name):
        card["finetuned_from"] = name
    if data_args.dataset_name is not None and not os.path.isdir(data_args.dataset_name):
        card["dataset_tags"] = data_args.dataset_name
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def report(trainer: Seq2SeqTrainer, split: str, metrics: dict[str, float]) -> None:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


if __name__ == "__main__":
    main()
