r"""Distil a causal language model into an encoder-decoder: transformers' `run_summarization.py` with a teacher.

    python examples/run_distillation.py --do_train --do_eval --do_predict --predict_with_generate \
        --max_source_length 256 --max_target_length 32 --output_dir runs/distillation

Without further arguments the built-in teacher is distilled on the built-in task, Python functions to the first
sentence of their docstring. The teacher should know the task; `hf-encdec-distill quickstart` teaches one first and
leaves it in work/teacher of its folder, for --teacher_name_or_path. Every field of DistillationTrainingArguments is an
option: --divergence reverse_kl, --distill_weight 0.5, ...; on a CPU with bfloat16 add --use_cpu --bf16 --teacher_dtype
bfloat16. A YAML or JSON file with the names of the options as keys will do in place of them. A run that was stopped
goes on from its last checkpoint.
"""

import logging
import os
import sys
from dataclasses import dataclass, field

import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_encdec_distill import DistillationTrainer, DistillationTrainingArguments, RopeEncDecForConditionalGeneration
from hf_encdec_distill.data import (
    PROMPT_TEMPLATE,
    fetch_builtin_teacher,
    load_pairs,
    load_python_docstrings,
    save_pairs,
)
from hf_encdec_distill.distillation import is_cache
from hf_encdec_distill.metrics import bleu, chrf, decode_texts, generation_metrics, rouge, squad


logger = logging.getLogger(__name__)

METRICS = {"rouge": rouge, "squad": squad, "chrf": chrf, "bleu": bleu}


@dataclass
class ModelArguments:
    """Who learns, and from whom."""

    teacher_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Causal language model, folder or Hub id, or a folder that `hf-encdec-distill cache` made. "
            "Default: the built-in teacher."
        },
    )
    student_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Encoder-decoder, folder or Hub id. Default: one is made out of the teacher's layers."},
    )
    encoder_layers: int = field(default=5, metadata={"help": "Encoder layers of a student that is made."})
    decoder_layers: int = field(default=6, metadata={"help": "Decoder layers of a student that is made."})
    calibration_samples: int = field(
        default=200,
        metadata={
            "help": "Training rows that say which of the teacher's layers it keeps, and that these are fitted on."
        },
    )


@dataclass
class DataTrainingArguments:
    """The rows, beside source_column, target_column and the length limits of DistillationTrainingArguments."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub, or a folder of files. Default: the built-in task."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, TSV, JSON, JSON lines or Parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "Default: rows out of the training file."})
    test_file: str | None = field(default=None, metadata={"help": "Default: rows out of the training file."})
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
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, DistillationTrainingArguments))
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

    # Rows, with the columns `source` and `target` whatever they were called. Splits that are missing are carved out of
    # train by a hash of the source text.
    if data_args.dataset_name is None and not data_args.files():
        training_args.prompt_template = training_args.prompt_template or PROMPT_TEMPLATE
        rows = load_python_docstrings("stdlib")
    else:
        dataset = data_args.dataset_name or data_args.files()
        columns = training_args.source_column, training_args.target_column
        rows = load_pairs(dataset, *columns, data_args.dataset_config_name)
    training_args.source_column, training_args.target_column = "source", "target"
    needed = {
        "train": training_args.do_train or model_args.student_name_or_path is None,
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

    # Student and teacher
    teacher = model_args.teacher_name_or_path or str(fetch_builtin_teacher())
    if model_args.student_name_or_path is not None:
        student = AutoModelForSeq2SeqLM.from_pretrained(model_args.student_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(model_args.student_name_or_path)
    elif is_cache(teacher):
        raise ValueError(f"{teacher} is a cache, of which no student can be made: name one with student_name_or_path.")
    else:
        calibration = rows["train"].select(range(min(model_args.calibration_samples, len(rows["train"]))))
        student = RopeEncDecForConditionalGeneration.from_decoder_only(
            teacher,
            encoder_num_hidden_layers=model_args.encoder_layers,
            decoder_num_hidden_layers=model_args.decoder_layers,
            prompt_template=training_args.prompt_template,
            calibration=list(zip(calibration["source"], calibration["target"])),
        ).float()
        tokenizer = student.tokenizer

    if training_args.generation_max_length is None:
        training_args.generation_max_length = training_args.max_target_length
    metrics = generation_metrics(
        tokenizer, student.config.decoder_start_token_id, [METRICS[metric] for metric in data_args.metrics]
    )
    trainer = DistillationTrainer(
        model=student,
        args=training_args,
        train_dataset=rows["train"] if training_args.do_train else None,
        eval_dataset=rows["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        compute_metrics=metrics if training_args.predict_with_generate else None,
        teacher=teacher,
    )

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        report(trainer, "train", {**result.metrics, "train_samples": len(rows["train"])})
        trainer.save_state()

    if training_args.do_eval:
        report(trainer, "eval", {**trainer.evaluate(), "eval_samples": len(rows["validation"])})

    if training_args.do_predict:
        result = trainer.predict(rows["test"], metric_key_prefix="predict")
        report(trainer, "predict", {**result.metrics, "predict_samples": len(rows["test"])})
        if training_args.predict_with_generate and trainer.is_world_process_zero():
            texts = decode_texts(result.predictions, tokenizer, student.config.decoder_start_token_id)
            predictions = (
                {"source": row["source"], "target": row["target"], "prediction": text}
                for row, text in zip(rows["test"], texts, strict=True)
            )
            save_pairs(predictions, os.path.join(training_args.output_dir, "generated_predictions.jsonl"))

    card = {}
    if not os.path.isdir(teacher):
        card["finetuned_from"] = teacher
    if data_args.dataset_name is not None and not os.path.isdir(data_args.dataset_name):
        card["dataset_tags"] = data_args.dataset_name
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def report(trainer: DistillationTrainer, split: str, metrics: dict[str, float]) -> None:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


if __name__ == "__main__":
    main()
