"""Shards change nothing: FSDP2 and DistributedDataParallel on two processes do what one process does.

As one of two processes, or alone, this file trains, resumes and evaluates, and writes what came out.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import gather_object
from distillation_toys import (
    InOrder,
    arguments,
    collate,
    make_rope,
    make_t5,
    make_teacher,
    ragged_rows,
)
from forked import on_two_processes
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from hf_encdec_distill import DistillationTrainer


pytestmark = pytest.mark.process

STUDENTS = ("merged", "separate", "t5")
LAYERS = {"RopeEncDecEncoderLayer", "RopeEncDecDecoderLayer"}
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
ON_POLICY = {
    "on_policy_fraction": 1.0,
    "sampling_temperature": 0.0,
    "max_target_length": 6,
    "replay_buffer_size": 3,  # keeps all rollouts, for the test to see
}
LOGGED = ("loss", "ce_loss", "distill_loss", "grad_norm")
EVAL_ROWS = ragged_rows(7, vocab_size=VOCABULARY, seed=5)


def make_student(kind):
    if kind == "t5":
        return make_t5(vocab_size=VOCABULARY)
    sizes = {"vocab_size": VOCABULARY, "encoder_num_hidden_layers": 3}
    return make_rope(kind, **sizes, tie_word_embeddings=kind == "merged")


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
        loss_chunk_size=1,
        seed=2,
        ddp_backend="gloo" if processes > 1 else None,
        **changed,
    )
    args.device  # noqa: B018, where processes meet: from here on weights may be divided among them
    dropped = {"dropout_rate": dropout} if kind == "t5" else {"attention_dropout": dropout}
    student = AutoModelForSeq2SeqLM.from_pretrained(models / kind, **dropped)
    if args.on_policy_fraction:  # so that some answers end before others
        student.generation_config.eos_token_id = list(range(0, VOCABULARY, 4))
    trainer = cls(
        student,
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
        "units": sorted(
            {type(module).__name__ for module in trainer.model.modules() if "FSDP" in type(module).__name__}
        ),
        "chunked": trainer._chunked_logits.head_is_last,
        "logs": [{k: log[k] for k in LOGGED if k in log} for log in trainer.state.log_history if "loss" in log],
        "eval": {k: v for k, v in metrics.items() if "loss" in k or "agree" in k},
    }


def rollouts(trainer):
    """What the student wrote in each step, row by row, of all processes."""
    own = [batch["labels"].tolist() for batch in trainer._on_policy.replay._batches]
    return [
        [[token for token in row if token != -100] for part in parts for row in part]
        for parts in zip(*gather_object([own]), strict=True)
    ]


def train_beside_another(models):
    """With a teacher that this process alone has."""
    args = arguments(models / "own", ddp_backend="gloo")
    teacher = make_teacher(vocab_size=VOCABULARY, seed=args.process_index)
    DistillationTrainer(make_student("merged"), args, teacher=teacher, data_collator=collate)


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
        trainer = train(
            InOrder,
            models,
            models / wrapper / "generating",
            "merged",
            predict_with_generate=True,
            generation_max_length=6,
        )
        own = train(InOrder, models, models / wrapper / "own", "merged", **ON_POLICY)
        own.save_model()
        results["own"] = what_came_out(own)
        results["rollouts"] = rollouts(own)
        if wrapper == "FSDP2":
            results["teacher"] = gather_object([refusal(lambda: train_beside_another(models))])
        results["generated"] = trainer.predict(EVAL_ROWS).predictions.tolist()
        if trainer.is_world_process_zero():
            (models / wrapper / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with three students, a teacher, and what two processes made of them."""
    folder = tmp_path_factory.mktemp("many_devices")
    for kind in STUDENTS:
        make_student(kind).save_pretrained(folder / kind)
    make_teacher(vocab_size=VOCABULARY).save_pretrained(folder / "teacher")
    on_two_processes(__file__, folder)
    return folder


@pytest.fixture(scope="module")
def alone(models):
    """What one process makes of each student: the trained model, and the numbers."""
    trainers = {kind: train(InOrder, models, models / "one" / kind, kind) for kind in STUDENTS}
    return {kind: (trainer.model, what_came_out(trainer)) for kind, trainer in trainers.items()}


def results_of(models, wrapper):
    return json.loads((models / wrapper / "results.json").read_text())


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_do_what_one_does(models, alone, wrapper, kind):
    """Weights, losses, gradient norms, evaluation; one process takes its loss three tokens at a time, as does DDP."""
    model, expected = alone[kind]
    got = results_of(models, wrapper)[kind]
    saved = AutoModelForSeq2SeqLM.from_pretrained(models / wrapper / kind)
    assert type(saved) is type(model)
    for (name, one), two in zip(model.state_dict().items(), saved.state_dict().values(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6, msg=name)
    assert len(got["logs"]) == 3
    for one, two in zip(expected["logs"], got["logs"], strict=True):
        assert two == pytest.approx(one, rel=3e-4)  # 4.57 rounds its loss to four digits
    assert got["eval"] == pytest.approx(expected["eval"], rel=1e-5)
    assert got["chunked"] is expected["chunked"] is True


def test_each_layer_is_a_unit_of_fsdp(models, alone):
    """And the embedding, shared by encoder, decoder and head; a model with no layers named would be one unit."""
    for kind, layers in (("merged", LAYERS), ("separate", LAYERS), ("t5", {"T5Block"})):
        got = results_of(models, "FSDP2")[kind]
        assert got["wrapped"] == f"FSDP{type(alone[kind][0]).__name__}"
        assert {f"FSDP{name}" for name in layers} <= set(got["units"])
        assert {"FSDPEmbedding", "FSDPLinear"} <= set(got["units"])
    assert results_of(models, "DDP")["merged"]["wrapped"] == "DistributedDataParallel"


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_student_is_saved_as_one_process_saves_it(models, wrapper, tmp_path):
    """The same files, its code among them, with the same names of weights; nothing of the teacher."""
    make_student("merged").save_pretrained(tmp_path)
    folder = models / wrapper / "merged"
    written = {path.name for path in folder.iterdir() if path.is_file()}
    assert written == {path.name for path in tmp_path.iterdir()} | {"training_args.bin"}
    assert "modeling_rope_encdec.py" in written
    names = [sorted(load_file(path / "model.safetensors")) for path in (folder, tmp_path)]
    assert names[0] == names[1]
    whole = folder / "checkpoint-2" / "model.safetensors"
    assert sorted(load_file(whole)) == names[0]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_resume_exactly(models, wrapper):
    """Shuffled rows, dropout on each process, Adam's moments: bit for bit."""
    whole, resumed = (load_file(models / wrapper / name / "model.safetensors") for name in ("whole", "resumed"))
    stopped = load_file(models / wrapper / "whole" / "checkpoint-2" / "model.safetensors")
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name
    assert any(not torch.equal(stopped[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_generate_what_one_does(models, alone, wrapper):
    """`predict_with_generate`, greedily; rows that are done first wait with the others."""
    generated = results_of(models, wrapper)["generated"][: len(EVAL_ROWS)]  # 4.57 also gives the row that fills up
    for tokens, row in zip(generated, EVAL_ROWS, strict=True):
        own = alone["merged"][0].generate(torch.tensor([row["input_ids"]]), do_sample=False, max_length=6)[0].tolist()
        assert tokens[: len(own)] == own


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_write_and_learn_what_one_does(models, wrapper):
    """On-policy steps: greedy rollouts of the student as it is in each step, some done before others, and weights."""
    alone = train(InOrder, models, models / wrapper / "own-alone", "merged", **ON_POLICY)
    got = results_of(models, wrapper)
    written = rollouts(alone)
    assert got["rollouts"] == written and len(written) == 3 and written[0] != written[2]
    assert len({len(row) for step in written for row in step}) > 1
    saved = AutoModelForSeq2SeqLM.from_pretrained(models / wrapper / "own")
    for (name, one), two in zip(alone.model.state_dict().items(), saved.state_dict().values(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6, msg=name)
    for one, two in zip(what_came_out(alone)["logs"], got["own"]["logs"], strict=True):
        assert two == pytest.approx(one, rel=3e-4)


def test_a_teacher_that_one_process_alone_has_is_refused(models):
    results = results_of(models, "FSDP2")
    for process in results["teacher"]:  # both stop, or the others would wait for ever
        assert re.search("the teacher of process 1 has not got the weights that process 0 has", process)


if __name__ == "__main__":
    import cpu_fsdp

    cpu_fsdp.admit()
    run(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # or its threads may abort the process at its end
