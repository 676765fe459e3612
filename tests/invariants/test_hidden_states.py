"""Matching of hidden states, against rows run one by one and steps written by hand."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from distillation_toys import (
    InOrder,
    arguments,
    make_bart,
    make_rope,
    make_t5,
    make_teacher,
    ragged_rows,
    write_teacher,
)
from safetensors.torch import load_file
from transformers import HfArgumentParser

from hf_encdec_distill import DistillationTrainer, DistillationTrainingArguments
from hf_encdec_distill.distillation import LiveTeacher, capture
from hf_encdec_distill.distillation.options.hidden_states import layer_pairs, refuse_hidden_states


ROWS = ragged_rows(8)
START = 5  # of a merged student's decoder
WEIGHT = 0.5
SETTINGS = {"distill_weight": 0.7, "distill_temperature": 2.0, "hidden_state_weight": WEIGHT}


STUDENTS = {
    "merged": partial(make_rope, "merged", encoder_num_hidden_layers=3, decoder_start_token_id=START),
    "separate": partial(make_rope, "separate", encoder_num_hidden_layers=3, decoder_start_token_id=START),
    "t5": make_t5,
    "bart": partial(make_bart, decoder_start_token_id=START, forced_eos_token_id=None),
}


def make_trainer(tmp_path, tokenizer, student=None, teacher=None, rows=ROWS, seed=3, **changed):
    """With projections that are no start of anything."""
    settings = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = InOrder(
        student or make_t5(),
        arguments(tmp_path, **{**settings, **SETTINGS, **changed}),
        teacher=teacher or make_teacher(hidden_size=48),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    stir(trainer)
    trainer._matching.reset = lambda: None
    return trainer


def stir(trainer):
    generator = torch.Generator().manual_seed(3)
    for projection in trainer._matching.parameters():
        projection.data.normal_(0.0, 0.2, generator=generator)


def dense_terms(student, teacher, projections, rows, layers, loss="mse", temperature=2.0):
    """CE, KL(teacher || student) and distance of states, `[N]` each: one row at a time, without padding.

    Args:
        projections: `[W, H]` for each pair of `layers`, (student's, teacher's) as in `hidden_states`.
    """
    merged = getattr(student.config, "cross_attention", None) == "merged"
    terms = []
    for row in rows:
        source, target = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        ours = student(input_ids=source, labels=target[None], output_hidden_states=True)
        prompt = torch.cat([source[0], torch.tensor([START])]) if merged else source[0]
        with torch.no_grad():
            theirs = teacher(torch.cat([prompt, target])[None], output_hidden_states=True)
        predicting = slice(len(prompt) - 1, -1)
        distances = []
        for projection, (i, j) in zip(projections, layers, strict=True):
            a, b = ours.decoder_hidden_states[i][0] @ projection.T, theirs.hidden_states[j][0, predicting]
            if loss == "mse":
                distances.append(((a - b) ** 2).sum(-1) / a.shape[-1])
            else:
                distances.append(1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)))
        q = F.log_softmax(ours.logits[0] / temperature, -1)
        p = F.log_softmax(theirs.logits[0, predicting] / temperature, -1)
        ce = F.cross_entropy(ours.logits[0], target, reduction="none")
        terms.append(torch.stack([ce, (p.exp() * (p - q)).sum(-1), sum(distances) / len(distances)]))
    return torch.cat(terms, dim=1)


def total(ce, kl, distance):
    return 0.7 * 4 * kl + 0.3 * ce + WEIGHT * distance


@pytest.mark.parametrize("chunk_size, loss", [(1000, "mse"), (3, "cosine")])
@pytest.mark.parametrize("name", STUDENTS)
def test_loss_and_gradients(tmp_path, tokenizer, name, chunk_size, loss):
    layers = {0: 1, 1: 2, 2: 1}
    settings = {"loss_chunk_size": chunk_size, "hidden_state_loss": loss, "hidden_state_layers": layers}
    trainer = make_trainer(tmp_path, tokenizer, STUDENTS[name](), **settings)
    value = trainer.compute_loss(trainer.model, trainer.data_collator(ROWS))
    value.backward()

    reference = STUDENTS[name]()
    projections = [p.detach().clone().requires_grad_() for p in trainer._matching.parameters()]
    expected = total(*dense_terms(reference, make_teacher(hidden_size=48), projections, ROWS, layers.items(), loss))
    expected.mean().backward()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-5, atol=1e-6)
    ours = [p.grad for p in (*trainer.model.parameters(), *trainer._matching.parameters())]
    theirs = [p.grad for p in (*reference.parameters(), *projections)]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
    assert all(p.grad.abs().max() > 1e-3 for p in projections)


@pytest.mark.parametrize("batch_size, accumulation", [(4, 1), (1, 4)])
def test_steps_clipped_and_decayed_as_if_the_projections_were_the_students(
    tmp_path, tokenizer, batch_size, accumulation
):
    """SGD with one gradient norm over all that is trained, by hand; and what is logged."""
    rows = ROWS[:6]
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        rows=rows,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        max_grad_norm=0.5,
        weight_decay=0.1,
        loss_chunk_size=2,
    )
    reference, teacher = make_t5().train(), make_teacher(hidden_size=48)
    projections = [p.detach().clone().requires_grad_() for p in trainer._matching.parameters()]
    trainer.train()
    undecayed = [name for name, _ in reference.named_parameters() if "norm" in name or "bias" in name]
    everything = [*reference.parameters(), *projections]
    logged = []
    for part in (rows[:4], rows[4:]):
        ce, kl, distance = dense_terms(reference, teacher, projections, part, [(1, 1), (2, 2)])
        gradients = torch.autograd.grad(total(ce, kl, distance).mean(), everything)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 0.5
        decayed = [name not in undecayed for name, _ in reference.named_parameters()] + [True] * len(projections)
        with torch.no_grad():
            for parameter, gradient, decay in zip(everything, gradients, decayed, strict=True):
                parameter -= 0.1 * (gradient * 0.5 / norm + 0.1 * decay * parameter)
        logged.append((total(ce, kl, distance).mean().item(), distance.mean().item(), norm.item()))
    ours = [*trainer.model.parameters(), *trainer._matching.parameters()]
    torch.testing.assert_close(ours, everything, rtol=1e-4, atol=1e-6)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    history = [(log["loss"], log["hidden_state_loss"], log["grad_norm"]) for log in logs]
    assert history == [pytest.approx(step, rel=1e-4, abs=6e-5) for step in logged]


@pytest.mark.parametrize("name, reentrant", [("merged", True), ("t5", True), ("bart", True), ("bart", False)])
def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer, name, reentrant):
    changed = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainers = [
        make_trainer(tmp_path, tokenizer, STUDENTS[name](), loss_chunk_size=2, max_steps=1, **extra)
        for extra in ({}, changed)
    ]
    for trainer in trainers:
        trainer.train()
    plain, checkpointed = ([*t.model.parameters(), *t._matching.parameters()] for t in trainers)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-5)


def test_bf16_autocast_leaves_projections_and_distance_alone(tmp_path, tokenizer):
    """The student's states are rounded, nothing else: the distance is close to float32, gradients too."""
    plain, mixed = (
        make_trainer(tmp_path, tokenizer, max_steps=1, loss_chunk_size=2, per_device_train_batch_size=8, bf16=bf16)
        for bf16 in (False, True)
    )
    for trainer in (plain, mixed):
        trainer.train()
    one, other = (t.state.log_history[0]["hidden_state_loss"] for t in (plain, mixed))
    assert one != other and other == pytest.approx(one, rel=0.01)
    for p, q in zip(plain._matching.parameters(), mixed._matching.parameters(), strict=True):
        assert q.dtype == q.grad.dtype == torch.float32
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.999


def test_evaluation_and_predictions(tmp_path, tokenizer):
    """Means over the tokens of the whole set; logits come as they would have without."""
    trainer = make_trainer(tmp_path, tokenizer, per_device_eval_batch_size=3)
    expected = dense_terms(
        make_t5(), make_teacher(hidden_size=48), list(trainer._matching.parameters()), ROWS, [(1, 1), (2, 2)]
    )
    metrics = trainer.evaluate()
    assert metrics["eval_hidden_state_loss"] == pytest.approx(expected[2].mean().item(), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(total(*expected).mean().item(), rel=1e-5)
    without = make_trainer(tmp_path, tokenizer, per_device_eval_batch_size=3, hidden_state_weight=0.0)
    ours, theirs = (t.predict(ROWS).predictions for t in (trainer, without))
    assert len(ours) == len(theirs) and (ours[0] == theirs[0]).all()


def test_labels_that_the_teacher_is_not_asked_about(tmp_path, tokenizer):
    """They have no distance and count in the mean; without weight on the divergence as well."""
    positions = [[len(row["input_ids"]) - 1 + t if t % 2 else -1 for t in range(len(row["labels"]))] for row in ROWS]
    rows = [
        {**row, "teacher_input_ids": row["input_ids"] + row["labels"], "teacher_label_positions": where}
        for row, where in zip(ROWS, positions, strict=True)
    ]
    trainer = make_trainer(tmp_path, tokenizer, rows=rows, distill_weight=0.0, loss_chunk_size=3)
    value = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    ce, _, distance = dense_terms(
        make_t5(), make_teacher(hidden_size=48), list(trainer._matching.parameters()), ROWS, [(1, 1), (2, 2)]
    )
    asked = torch.tensor([t != -1 for where in positions for t in where])
    torch.testing.assert_close(value, (ce + WEIGHT * distance * asked).mean(), rtol=1e-5, atol=1e-6)


def test_steps_on_own_targets(tmp_path, tokenizer):
    """The states are those at what the student wrote."""
    changed = {"on_policy_fraction": 1.0, "sampling_temperature": 0.0, "max_target_length": 6, "max_steps": 1}
    trainer = make_trainer(tmp_path, tokenizer, per_device_train_batch_size=8, **changed)
    projections = [p.detach().clone() for p in trainer._matching.parameters()]
    trainer.train()
    written = []
    for row in ROWS:
        ids = make_t5().generate(torch.tensor([row["input_ids"]]), do_sample=False, max_new_tokens=6)[0, 1:].tolist()
        written.append({**row, "labels": ids[: ids.index(2) + 1] if 2 in ids else ids})
    _, kl, distance = dense_terms(make_t5(), make_teacher(hidden_size=48), projections, written, [(1, 1), (2, 2)])
    log = trainer.state.log_history[0]
    assert log["hidden_state_loss"] == pytest.approx(distance.mean().item(), rel=1e-4)
    assert log["loss"] == pytest.approx((0.7 * 4 * kl + WEIGHT * distance).mean().item(), rel=1e-4)


def test_resumed_equals_never_stopped(tmp_path, tokenizer):
    """Shuffled rows, dropout, AdamW, accumulation, clipping; and the student's folder holds the student alone."""

    def make(**changed):
        torch.manual_seed(len(changed))
        return DistillationTrainer(
            make_t5(dropout=0.3),
            arguments(
                tmp_path,
                learning_rate=1e-2,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                num_train_epochs=2,
                save_strategy="steps",
                save_steps=3,
                loss_chunk_size=2,
                **SETTINGS | changed,
            ),
            teacher=make_teacher(hidden_size=48),
            train_dataset=ragged_rows(15),
            processing_class=tokenizer,
        )

    whole, resumed = make(), make(seed=42)
    start = [p.detach().clone() for p in whole._matching.parameters()]
    for projection in start:
        torch.testing.assert_close(projection.T @ projection, torch.eye(32))  # keeps lengths
    whole.train()
    checkpoint = tmp_path / "checkpoint-3"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert whole.state.global_step == resumed.state.global_step == 8
    everything = [[*t.model.parameters(), *t._matching.parameters()] for t in (whole, resumed)]
    assert all(torch.equal(one, other) for one, other in zip(*everything, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(start, whole._matching.parameters(), strict=True))

    whole.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", checkpoint):
        assert set(load_file(folder / "model.safetensors")) <= set(make_t5().state_dict())
    assert not list((tmp_path / "final").glob("*projections*"))
    Path(checkpoint / "hidden_state_projections.pt").unlink()
    with pytest.raises(ValueError, match="checkpoint-3 has no hidden_state_projections.pt"):
        make(seed=42).train(resume_from_checkpoint=str(checkpoint))


def test_layers(tmp_path):
    teacher = make_teacher()
    assert layer_pairs(STUDENTS["bart"](), teacher, None) == {1: 1, 2: 2}
    teacher.config.num_hidden_layers = 30
    assert layer_pairs(STUDENTS["merged"](), teacher, None) == {1: 15, 2: 30}
    assert layer_pairs(make_t5(), teacher, {2: 7}) == {2: 7}
    with pytest.raises(ValueError, match=r"no pair \(3, 1\).*decoder, 0 \(its embedding\) to 2.*0 to 30"):
        layer_pairs(make_t5(), teacher, {1: 1, 3: 1})
    words = ["--output_dir", str(tmp_path), "--hidden_state_layers", '{"1": 15, "2": 30}', "--use_cpu", "true"]
    (parsed,) = HfArgumentParser(DistillationTrainingArguments).parse_args_into_dataclasses(words)
    assert parsed.hidden_state_layers == {1: 15, 2: 30}
    saved = json.loads(parsed.to_json_string())["hidden_state_layers"]
    assert DistillationTrainingArguments(str(tmp_path), use_cpu=True, hidden_state_layers=saved) is not None
    with pytest.raises(ValueError, match="hidden_state_layers='all'"):
        arguments(tmp_path, hidden_state_layers="all")


def test_projections_are_trained_with_an_optimizer_of_a_subclass(tmp_path, tokenizer):
    """As with the trainer's own of the same kind; one that nobody can add to is refused."""

    class OwnOptimizer(InOrder):
        def create_optimizer(self, *args, **kwargs):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    class OwnOfBoth(OwnOptimizer):
        def create_scheduler(self, *args, **kwargs):
            self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer)
            return self.lr_scheduler

    settings = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 2}
    projections = []
    for cls in (InOrder, OwnOptimizer, OwnOfBoth):
        trainer = cls(
            make_t5(),
            arguments(tmp_path, max_grad_norm=0.0, **settings, **SETTINGS),
            teacher=make_teacher(),
            train_dataset=ROWS,
            processing_class=tokenizer,
        )
        if cls is OwnOfBoth:
            with pytest.raises(ValueError, match="hidden_state_weight=0.5, but the optimizer does not hold the proj"):
                trainer.train()
            continue
        trainer.train()
        projections.append([p.detach() for p in trainer._matching.parameters()])
    torch.testing.assert_close(*projections)
    assert not torch.equal(projections[0][0], torch.eye(32))


def test_what_cannot_be_matched_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="hidden_state_weight=0.5 with vocab_policy='universal'"):
        arguments(tmp_path, vocab_policy="universal", hidden_state_weight=0.5)
    with pytest.raises(ValueError, match="hidden_state_loss='l1' is unknown; choose one of mse, cosine"):
        arguments(tmp_path, hidden_state_loss="l1")
    with pytest.raises(ValueError, match="optim=.galore_adamw_layerwise"):
        make_trainer(tmp_path, tokenizer, optim="galore_adamw_layerwise")
    student = make_t5()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    settings = {"teacher": make_teacher(), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="a scheduler of your own"):
        DistillationTrainer(student, arguments(tmp_path, **SETTINGS), optimizers=(optimizer, scheduler), **settings)
    trainer = DistillationTrainer(student, arguments(tmp_path, **SETTINGS), optimizers=(optimizer, None), **settings)
    assert set(trainer._matching.parameters()) <= set(optimizer.param_groups[-1]["params"])
    assert all(torch.equal(p, torch.eye(32)) for p in trainer._matching.parameters())  # both widths are the same

    folder = write_teacher(tmp_path / "teacher", tokenizer)
    lengths = {"max_source_length": None, "max_target_length": None}
    capture(LiveTeacher.load(folder), [{"source": "a", "target": "b"}], tmp_path / "cache", tokenizer, **lengths)
    with pytest.raises(ValueError, match="hidden_state_weight=0.5 with the cache .*live teacher"):
        make_trainer(tmp_path, tokenizer, teacher=tmp_path / "cache", distill_temperature=1.0)

    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        trainer = make_trainer(tmp_path, tokenizer)
        setattr(trainer, name, True)
        with pytest.raises(ValueError, match="DistributedDataParallel instead of FSDP, DeepSpeed"):
            refuse_hidden_states(trainer)
