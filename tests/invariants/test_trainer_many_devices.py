"""Shards change nothing: FSDP2 and DistributedDataParallel on two processes do what one process does.

Run as a script (by torchrun, or alone) this file trains, resumes and evaluates, and writes what came out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distillation_toys import arguments, make_t5, make_teacher, ragged_rows, spread
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_encdec_distill import DistillationTrainer, RopeEncDecConfig, RopeEncDecForConditionalGeneration


STUDENTS = ("merged", "separate", "t5")
WRAPPERS = ("DDP", "FSDP2")
VOCABULARY = 97
# What `accelerate launch` makes of examples/accelerate/fsdp2.yaml.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
ROWS = ragged_rows(12, vocab_size=VOCABULARY)
LOGGED = ("loss", "ce_loss", "distill_loss", "grad_norm")
EVAL_ROWS = ragged_rows(7, vocab_size=VOCABULARY, seed=5)


class InOrder(DistillationTrainer):
    """Rows in their order, so that the same rows make up a step however many processes share it."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def collate(rows):
    """Padded on the right with 0, without a tokenizer."""

    def pad(values, fill):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(v) for v in values], True, padding_value=fill)

    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: pad([row[name] for row in rows], fill) for name, fill in fills.items()}


def make_student(kind):
    if kind == "t5":
        return make_t5(vocab_size=VOCABULARY)
    config = RopeEncDecConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        encoder_num_hidden_layers=3,
        decoder_num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        cross_attention=kind,
        tie_word_embeddings=kind == "merged",
    )
    return spread(RopeEncDecForConditionalGeneration(config))


def train(cls, models, output, kind, dropout=0.0, resume=None, **changed):
    """Three steps of four rows on however many processes; models are loaded where and as a script would."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    args = arguments(
        output,
        optim="adamw_torch",
        learning_rate=0.01,
        adam_epsilon=1e-2,  # at 1e-8 the first steps are the signs of gradients, and no rounding is small
        max_grad_norm=0.5,
        max_steps=3,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=4 // processes,
        per_device_eval_batch_size=2,
        distill_weight=0.7,
        distill_temperature=2.0,
        loss_chunk_size=3,
        seed=2,
        ddp_backend="gloo" if processes > 1 else None,
        **changed,
    )
    args.device  # noqa: B018, where processes meet: from here on weights may be divided among them
    dropped = {"dropout_rate": dropout} if kind == "t5" else {"attention_dropout": dropout}
    trainer = cls(
        AutoModelForSeq2SeqLM.from_pretrained(models / kind, **dropped),
        args,
        teacher=str(models / "teacher"),
        train_dataset=ROWS,
        eval_dataset=EVAL_ROWS,
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def what_came_out(trainer):
    """The numbers of a trained trainer that is now evaluated, and how it was wrapped."""
    metrics = trainer.evaluate()
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "units": sorted({type(module).__name__ for module in trainer.model.modules() if "FSDP" in type(module).__name__}),
        "chunked": trainer._student_head_is_last,
        "logs": [{k: log[k] for k in LOGGED} for log in trainer.state.log_history if "loss" in log],
        "eval": {k: v for k, v in metrics.items() if "loss" in k or "agree" in k},
    }


def refusal(action):
    """What a ValueError says on this process."""
    try:
        action()
    except ValueError as error:
        return str(error)


def run(models: Path) -> None:
    """Both wrappers in the same two processes."""
    for wrapper in WRAPPERS:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        if wrapper == "FSDP2":
            os.environ |= FSDP2
        results = {}
        for kind in STUDENTS:
            trainer = train(InOrder, models, models / wrapper / kind, kind)
            trainer.save_model()
            results[kind] = what_came_out(trainer)
        for name in ("whole", "resumed"):  # shuffled rows and dropout
            output = models / wrapper / name
            checkpoint = str(models / wrapper / "whole" / "checkpoint-2") if name == "resumed" else None
            train(DistillationTrainer, models, output, "merged", dropout=0.3, resume=checkpoint).save_model()
        trainer = train(InOrder, models, models / wrapper / "generating", "merged", predict_with_generate=True)
        if wrapper == "FSDP2":
            results["own"] = refusal(lambda: train(InOrder, models, models / "own", "merged", on_policy_fraction=0.5))
            teacher = AutoModelForCausalLM.from_pretrained(models / "teacher")
            results["teacher"] = refusal(
                lambda: DistillationTrainer(trainer.model, trainer.args, teacher=teacher, data_collator=collate)
            )
            results["teacher"] = trainer.accelerator.gather_for_metrics([results["teacher"]], use_gather_object=True)
        results["generated"] = trainer.predict(EVAL_ROWS).predictions.tolist()
        if trainer.is_world_process_zero():
            (models / wrapper / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with three students and a teacher in it."""
    folder = tmp_path_factory.mktemp("many_devices")
    for kind in STUDENTS:
        make_student(kind).save_pretrained(folder / kind)
    make_teacher(vocab_size=VOCABULARY).save_pretrained(folder / "teacher")
    return folder


if __name__ == "__main__":
    import cpu_fsdp

    cpu_fsdp.admit()
    run(Path(sys.argv[1]))
