"""The loss and what is logged of it, against rows run one by one, Seq2SeqTrainer and hand-written steps."""

import functools
import math

import pytest
import torch
from distillation_toys import (
    EOS,
    STUDENTS,
    InOrder,
    LargestTensor,
    arguments,
    make_t5,
    make_teacher,
    ragged_rows,
    spread,
    token_terms,
)
from transformers import (
    DataCollatorForSeq2Seq,
    GraniteConfig,
    GraniteForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from transformers.trainer_pt_utils import LabelSmoother

from hf_encdec_distill import DistillationTrainer
from hf_encdec_distill.distillation.teachers.live import LiveTeacher


ROWS = ragged_rows(8)


class Seq2SeqInOrder(Seq2SeqTrainer):
    _get_train_sampler = InOrder._get_train_sampler


def make_trainer(tmp_path, tokenizer, cls=InOrder, student=None, rows=ROWS, collator=None, **changed):
    args = arguments(tmp_path, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", **changed)
    return cls(
        student or make_t5(),
        args,
        teacher=make_teacher(),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=collator,
    )


@pytest.mark.parametrize("chunk_size", [1000, 3])
@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "<|im_end|>"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_and_gradient_of_a_padded_batch(tmp_path, make_bpe_tokenizer, side, pad_token, chunk_size):
    """weight * T^2 * KL + (1 - weight) * CE, a mean over target tokens: value and gradient, pad == EOS, both sides."""
    tokenizer = make_bpe_tokenizer(pad_token=pad_token)
    tokenizer.padding_side = side
    settings = {"distill_weight": 0.7, "distill_temperature": 2.0, "loss_chunk_size": chunk_size}
    trainer = make_trainer(tmp_path, tokenizer, **settings)
    batch = trainer.data_collator(ROWS)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    reference = make_t5()
    ce, kl, _ = token_terms(reference, make_teacher(), ROWS, temperature=2.0)
    expected = (0.7 * 4.0 * kl + 0.3 * ce).sum() / len(ce)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["t5", "separate"])
@pytest.mark.parametrize("collator", [None, "of the tokenizer", "of tokenizer and model"])
def test_a_tokenizer_that_pads_on_the_left_changes_no_loss(tmp_path, tokenizer, kind, collator):
    """Four rows at once, two by two and one by one have the loss of rows that nothing pads, whatever collator pads."""
    tokenizer.padding_side = "left"
    student = STUDENTS[kind]()
    if collator is not None:
        collator = DataCollatorForSeq2Seq(tokenizer, student if "model" in collator else None)
    trainer = make_trainer(tmp_path, tokenizer, student=student, collator=collator)
    ce, kl, _ = token_terms(STUDENTS[kind](), make_teacher(), ROWS[:4])
    tokens = torch.tensor(len(ce))
    for size in (4, 2, 1):
        batches = [trainer.data_collator(ROWS[first : first + size]) for first in range(0, 4, size)]
        loss = sum(trainer.compute_loss(trainer.model, batch, num_items_in_batch=tokens) for batch in batches)
        torch.testing.assert_close(loss, (0.9 * kl + 0.1 * ce).mean(), rtol=1e-5, atol=1e-6)


def test_loss_is_the_same_for_a_padded_vocabulary(tmp_path, tokenizer):
    """A teacher with 24 rows more than the student: they get probability 0 and the rest is renormalised."""
    trainer = DistillationTrainer(
        make_t5(), arguments(tmp_path), teacher=make_teacher(304), processing_class=tokenizer, train_dataset=ROWS
    )
    ce, kl, _ = token_terms(make_t5(), make_teacher(304), ROWS)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(ROWS))
    torch.testing.assert_close(loss, 0.9 * kl.mean() + 0.1 * ce.mean(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="280 output rows and the teacher 304"):
        DistillationTrainer(
            make_t5(), arguments(tmp_path, vocab_policy="strict"), teacher=make_teacher(304), train_dataset=ROWS
        )


@pytest.mark.parametrize("chunk_size", [1000, 1])
@pytest.mark.parametrize("batch_size, accumulation", [(4, 1), (2, 2), (1, 4)])
def test_a_step_is_the_same_however_it_is_cut(tmp_path, tokenizer, batch_size, accumulation, chunk_size):
    """6 ragged rows in 2 steps, the second one short, equal SGD written by hand on the whole step's token mean."""
    rows = ROWS[:6]
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        rows=rows,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        loss_chunk_size=chunk_size,
        num_train_epochs=1,
        max_grad_norm=0.0,
    )
    trainer.train()
    reference, teacher, logged = make_t5().train(), make_teacher(), []
    for step_rows in (rows[:4], rows[4:]):
        ce, kl, _ = token_terms(reference, teacher, step_rows)
        loss = 0.9 * kl.mean() + 0.1 * ce.mean()
        reference.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.1 * parameter.grad
        logged.append({"loss": loss.item(), "ce_loss": ce.mean().item(), "distill_loss": kl.mean().item()})
    for (name, ours), theirs in zip(trainer.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
    history = [log for log in trainer.state.log_history if "loss" in log]
    for ours, theirs in zip(history, logged, strict=True):
        # 4.57 rounds its loss to four digits.
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4, abs=6e-5)


def test_logs_are_means_over_the_steps_between_them(tmp_path, tokenizer):
    """With a learning rate of 0 the logged numbers are those of the untouched model."""
    trainer = make_trainer(tmp_path, tokenizer, per_device_train_batch_size=3, num_train_epochs=1, logging_steps=2)
    trainer.args.learning_rate = 0.0
    trainer.train()
    steps = [[term.mean().item() for term in token_terms(make_t5(), make_teacher(), part)] for part in chunks(ROWS, 3)]
    history = [log for log in trainer.state.log_history if "loss" in log]
    expected = [[sum(pair) / 2 for pair in zip(*steps[:2], strict=True)], steps[2]]
    # The third step is logged at the end of training only if the strategy says so: 2 of 3 steps make one log.
    assert len(history) == 1
    assert history[0]["ce_loss"] == pytest.approx(expected[0][0], rel=1e-5)
    assert history[0]["distill_loss"] == pytest.approx(expected[0][1], rel=1e-5)
    # A second run starts from nothing.
    trainer.args.logging_steps = trainer.state.logging_steps = 3
    trainer.train()
    last = [log for log in trainer.state.log_history if "loss" in log][-1]
    assert last["ce_loss"] == pytest.approx(sum(step[0] for step in steps) / 3, rel=1e-5)


def chunks(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_without_weight_on_the_teacher_it_is_seq2seq_trainer(tmp_path, tokenizer, smoothing, monkeypatch):
    """distill_weight=0: the same weights as Seq2SeqTrainer, label smoothing too, and no teacher call in training."""
    settings = {
        "label_smoothing_factor": smoothing,
        "optim": "sgd",
        "learning_rate": 0.1,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
    }
    collator = DataCollatorForSeq2Seq(tokenizer, model=make_t5())
    theirs = Seq2SeqInOrder(
        make_t5(),
        arguments(tmp_path, Seq2SeqTrainingArguments, **settings),
        data_collator=collator,
        train_dataset=ROWS,
    )
    theirs.train()
    ours = InOrder(
        make_t5(),
        arguments(tmp_path, distill_weight=0.0, **settings),
        data_collator=collator,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        teacher=make_teacher(),
    )
    with monkeypatch.context() as patch:
        patch.delattr(LiveTeacher, "logits_at")
        ours.train()
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    our_logs, their_logs = ([x for x in t.state.log_history if "loss" in x] for t in (ours, theirs))
    assert [x["loss"] for x in our_logs] == pytest.approx([x["loss"] for x in their_logs], abs=1e-4)
    assert all(x["ce_loss"] == pytest.approx(x["loss"], abs=1e-4) and "distill_loss" not in x for x in our_logs)
    assert ours.evaluate()["eval_teacher_agreement"] >= 0  # evaluation asks the teacher all the same


def test_a_batch_without_any_target_changes_nothing(tmp_path, tokenizer):
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS[:4]]
    trainer = make_trainer(tmp_path, tokenizer, rows=rows, per_device_train_batch_size=2, max_steps=1)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and torch.equal(p.grad, torch.zeros_like(p)) for p in trainer.model.parameters())
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))
    log = trainer.state.log_history[0]
    assert log["loss"] == log["ce_loss"] == log["distill_loss"] == 0.0
    assert math.isnan(trainer.evaluate()["eval_loss"])  # as with `Seq2SeqTrainer`: there is nothing to measure


def test_a_masked_batch_beside_others_leaves_the_mean_alone(tmp_path, tokenizer):
    """Accumulating rows of which one has no target equals leaving that row out."""
    masked = {**ROWS[2], "labels": [-100] * len(ROWS[2]["labels"])}
    with_masked = make_trainer(
        tmp_path, tokenizer, rows=[ROWS[0], masked, ROWS[1]], gradient_accumulation_steps=3, num_train_epochs=1
    )
    with_masked.args.per_device_train_batch_size = with_masked._train_batch_size = 1
    without = make_trainer(tmp_path, tokenizer, rows=ROWS[:2], per_device_train_batch_size=2, num_train_epochs=1)
    for trainer in (with_masked, without):
        trainer.train()
    for one, other in zip(with_masked.model.parameters(), without.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_is_a_mean_over_tokens(tmp_path, tokenizer, batch_size, generate):
    """Every number over the whole set, whatever the batch size, the last batch short, generating or not."""
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        per_device_eval_batch_size=batch_size,
        predict_with_generate=generate,
        generation_max_length=5,
        distill_weight=0.6,
        distill_temperature=3.0,
    )
    ce, kl, agree = token_terms(make_t5(), make_teacher(), ROWS, temperature=3.0)
    by_batch = [token_terms(make_t5(), make_teacher(), part)[0].mean().item() for part in chunks(ROWS, 3)]
    assert abs(sum(by_batch) / 3 - ce.mean().item()) > 1e-3  # a mean of batch means is another number
    expected = {
        "loss": 0.6 * 9 * kl.mean().item() + 0.4 * ce.mean().item(),
        "ce_loss": ce.mean().item(),
        "distill_loss": 9 * kl.mean().item(),
        "teacher_agreement": agree.mean().item(),
    }
    metrics = trainer.evaluate()
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    metrics = trainer.predict(ROWS, metric_key_prefix="test").metrics
    assert {name: metrics[f"test_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert metrics["test_loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_evaluation_with_label_smoothing(tmp_path, tokenizer):
    """The cross-entropy is the smoothed one, as in training, generating or not."""
    logits, labels = [], []
    for row in ROWS:
        labels.append(torch.tensor(row["labels"]))
        logits.append(make_t5()(input_ids=torch.tensor([row["input_ids"]]), labels=labels[-1][None]).logits[0])
    expected = LabelSmoother(epsilon=0.3)({"logits": torch.cat(logits)}, torch.cat(labels)).item()
    for generate in (False, True):
        trainer = make_trainer(tmp_path, tokenizer, label_smoothing_factor=0.3, predict_with_generate=generate)
        metrics = trainer.predict(ROWS, max_length=6).metrics  # evaluate() generates only where there are metrics
        assert metrics["test_ce_loss"] == pytest.approx(expected, rel=1e-5)


def test_agreement_counts_the_same_first_choice(tmp_path, tokenizer):
    """A student that copies the teacher's first choice agrees always, one that avoids it never."""
    trainer = make_trainer(tmp_path, tokenizer)
    forward = trainer.model.forward
    for wanted in (1.0, 0.0):

        @functools.wraps(forward)  # the trainer reads the signature
        def steered(*args, wanted=wanted, **kwargs):
            outputs = forward(*args, **kwargs)
            for i, row in enumerate(ROWS):
                sequence = torch.tensor([row["input_ids"] + row["labels"]])
                first = trainer.teacher.model(sequence).logits[0, len(row["input_ids"]) - 1 : -1].argmax(-1)
                outputs.logits[i, torch.arange(len(first)), first] = 1e3 if wanted else -1e3
            return outputs

        trainer.model.forward = steered
        assert trainer.evaluate()["eval_teacher_agreement"] == wanted


@pytest.mark.parametrize("generate", [False, True])
def test_predictions_equal_those_of_seq2seq_trainer(tmp_path, tokenizer, generate):
    """Logits or generated tokens, labels and their padding, with the teacher's columns in the batch."""
    settings = {
        "predict_with_generate": generate,
        "per_device_eval_batch_size": 3,
        "generation_max_length": 7,
        "generation_num_beams": 2,
    }
    collator = DataCollatorForSeq2Seq(tokenizer, model=make_t5())
    theirs = Seq2SeqTrainer(
        make_t5(),
        arguments(tmp_path, Seq2SeqTrainingArguments, **settings),
        data_collator=collator,
        processing_class=tokenizer,
    ).predict([dict(row) for row in ROWS])
    with_columns = [{**row, "teacher_input_ids": row["input_ids"] + row["labels"]} for row in ROWS]
    metrics_saw = []
    trainer = make_trainer(tmp_path, tokenizer, collator=collator, **settings)
    trainer.compute_metrics = lambda prediction: metrics_saw.append(prediction) or {"seen": 1}
    ours = trainer.predict(with_columns)
    ours_predictions, theirs_predictions = (p if generate else p[0] for p in (ours.predictions, theirs.predictions))
    assert ours_predictions.shape == theirs_predictions.shape
    torch.testing.assert_close(torch.tensor(ours_predictions), torch.tensor(theirs_predictions))
    assert (ours.label_ids == theirs.label_ids).all()
    assert ours.metrics["test_seen"] == 1 and (metrics_saw[0].label_ids == theirs.label_ids).all()


@pytest.mark.parametrize("generate", [False, True])
def test_prediction_without_targets(tmp_path, tokenizer, generate):
    """No labels, no loss: generation works, and a forward pass says what the model says about it."""
    trainer = make_trainer(tmp_path, tokenizer, predict_with_generate=generate, generation_max_length=6)
    sources = [{"input_ids": row["input_ids"]} for row in ROWS]
    if not generate:
        with pytest.raises(ValueError, match="decoder_input_ids|inputs_embeds"):
            trainer.predict(sources)
        return
    output = trainer.predict(sources)
    batch = trainer.data_collator(sources)
    expected = make_t5().generate(**batch, max_length=6)
    assert output.predictions[:, : expected.shape[1]].tolist() == expected.tolist()
    assert output.label_ids is None and "test_loss" not in output.metrics
    with pytest.raises(ValueError, match="the batch has no labels"):
        trainer.compute_loss(trainer.model, batch)


def test_outputs_come_with_the_loss(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    batch = trainer.data_collator(ROWS)
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.loss is loss and outputs[0] is loss
    expected = make_t5()(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).logits
    torch.testing.assert_close(outputs.logits, expected)
    trainer.model.forward = lambda **inputs: (expected, "rest")
    loss_of_tuple, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(loss_of_tuple, loss)
    assert outputs == (loss_of_tuple, expected, "rest")


def test_tokens_of_the_step_scale_the_loss(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    batch = trainer.data_collator(ROWS)
    tokens = sum(len(row["labels"]) for row in ROWS)
    whole = trainer.compute_loss(trainer.model, batch)
    assert trainer._get_num_items_in_batch([batch, batch], torch.device("cpu")).item() == 2 * tokens
    for count in (2 * tokens, torch.tensor(2 * tokens)):
        half = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        torch.testing.assert_close(half, whole / 2)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_several_devices_in_one_process_count_the_whole_batch(tmp_path, tokenizer, accumulation):
    """DataParallel gathers logits before the loss, so the denominator is the whole batch's, undivided."""
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.args._n_gpu = 2
    batches = [trainer.data_collator(part) for part in chunks(ROWS, 8 // accumulation)]
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert count.shape == () and count.item() == sum(len(row["labels"]) for row in ROWS)
    total = sum(trainer.compute_loss(trainer.model, batch, num_items_in_batch=count) for batch in batches)
    trainer.args._n_gpu = 1
    torch.testing.assert_close(total, trainer.compute_loss(trainer.model, trainer.data_collator(ROWS)))


def test_bf16_autocast_leaves_teacher_and_divergence_alone(tmp_path, tokenizer, monkeypatch):
    """Student in bf16 autocast: the teacher's logits are those of its own float32, the loss is close to float32's."""
    plain = make_trainer(tmp_path, tokenizer, per_device_train_batch_size=8, max_steps=1)
    mixed = make_trainer(tmp_path, tokenizer, per_device_train_batch_size=8, max_steps=1, bf16=True)
    seen, logits_at = [], LiveTeacher.logits_at

    def spy(*args, **kwargs):
        at = logits_at(*args, **kwargs)
        seen.append(at(slice(None)))
        return at

    monkeypatch.setattr(LiveTeacher, "logits_at", spy)
    plain.train()
    mixed.train()
    assert seen[0].dtype == seen[1].dtype == torch.float32
    torch.testing.assert_close(seen[0], seen[1])
    one, other = (t.state.log_history[0] for t in (plain, mixed))
    assert one["ce_loss"] != other["ce_loss"]  # autocast was on
    assert other["loss"] == pytest.approx(one["loss"], rel=0.03)
    mixed.train()


def test_teacher_in_half_precision(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, teacher_dtype="bfloat16")
    assert trainer.teacher.model.dtype == torch.bfloat16 and trainer.model.dtype == torch.float32
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(ROWS))
    ce, kl, _ = token_terms(make_t5(), make_teacher().bfloat16(), ROWS)
    assert loss.item() == pytest.approx((0.9 * kl.mean() + 0.1 * ce.mean()).item(), rel=0.02)


def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer):
    plain = make_trainer(tmp_path, tokenizer, num_train_epochs=1)
    checkpointed = make_trainer(
        tmp_path,
        tokenizer,
        num_train_epochs=1,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    for trainer in (plain, checkpointed):
        trainer.train()
    for one, other in zip(plain.model.parameters(), checkpointed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_labels_that_only_the_student_has(tmp_path):
    rows = [{"input_ids": [5, 6], "labels": [270, EOS]}]
    trainer = DistillationTrainer(make_t5(), arguments(tmp_path), teacher=make_teacher(64), train_dataset=rows)
    with pytest.raises(ValueError, match="labels hold id 270"):
        trainer.train()


# The loss chunk by chunk ---------------------------------------------------------------------------------------------


def test_no_side_holds_logits_of_all_targets(tmp_path, tokenizer):
    vocabulary, rows = 5000, ragged_rows(12)
    largest = {}
    for chunk_size in (1000, 4):
        args = arguments(tmp_path, loss_chunk_size=chunk_size)
        student, teacher = make_t5(vocabulary), make_teacher(vocabulary)
        trainer = InOrder(student, args, teacher=teacher, processing_class=tokenizer, train_dataset=rows)
        batch = trainer.data_collator(rows)
        trainer.compute_loss(trainer.model, batch)  # finds out about the heads
        with LargestTensor() as watch:
            trainer.compute_loss(trainer.model, batch).backward()
        largest[chunk_size] = watch.elements
    targets = sum(len(row["labels"]) for row in rows)
    assert targets > 40
    assert largest[1000] >= targets * vocabulary
    assert largest[4] == 32 * vocabulary  # the gradient of the head: less than of seven targets
    for chunk_size, whole in ((targets // 4 + 1, True), (targets // 4, False)):
        trainer.args.loss_chunk_size = chunk_size  # up to four chunks' targets are taken together
        with LargestTensor() as watch:
            trainer.compute_loss(trainer.model, batch).backward()
        assert (watch.elements >= targets * vocabulary) is whole


class SoftCapped(type(make_t5())):
    """A student that does something to what its head gives."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        outputs.logits = 3.0 * torch.tanh(outputs.logits / 3.0)
        return outputs


def test_a_head_that_is_not_last_is_left_whole(tmp_path, tokenizer):
    """On either side: T5 with a cap, and a teacher that scales its logits."""
    losses = {}
    for chunk_size in (1000, 3):
        student = make_t5()
        student.__class__ = SoftCapped
        config = GraniteConfig(**make_teacher().config.to_diff_dict() | {"logits_scaling": 2.0})
        args = arguments(tmp_path, loss_chunk_size=chunk_size)
        teacher = spread(GraniteForCausalLM(config))
        trainer = InOrder(student, args, teacher=teacher, processing_class=tokenizer, train_dataset=ROWS)
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(ROWS))
        loss.backward()
        losses[chunk_size] = (loss, [parameter.grad for parameter in trainer.model.parameters()])
        ce, kl, _ = token_terms(student, teacher, ROWS)
        torch.testing.assert_close(loss, 0.9 * kl.mean() + 0.1 * ce.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses[3], losses[1000])


def test_finding_out_about_the_head_draws_no_random_numbers(tmp_path, tokenizer):
    """Or a run that was resumed, and finds out again, would have other dropout masks."""
    student = make_t5(dropout=0.3).train()
    trainer = make_trainer(tmp_path, tokenizer, student=student, loss_chunk_size=3)
    batch = trainer.data_collator(ROWS)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(trainer.compute_loss(trainer.model, batch))
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_chunks_under_autocast_are_those_of_the_whole(tmp_path, tokenizer):
    results = {}
    for chunk_size in (1000, 3):
        trainer = make_trainer(tmp_path, tokenizer, bf16=True, loss_chunk_size=chunk_size, max_steps=1)
        trainer.train()
        assert trainer._chunked_logits.head_is_last is (True if chunk_size == 3 else None)
        results[chunk_size] = [parameter.detach() for parameter in trainer.model.parameters()]
    for ours, theirs, before in zip(results[3], results[1000], make_t5().parameters(), strict=True):
        step = (theirs - before).norm()
        assert (ours - theirs).norm() <= 0.05 * step + 1e-6  # bfloat16 has 8 bits
