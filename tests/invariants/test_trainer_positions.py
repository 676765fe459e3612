"""Labels that the teacher predicts at columns of its own, or is not asked about: against rows run one by one."""

import pytest
import torch
import torch.nn.functional as F
from distillation_toys import arguments, make_t5, make_teacher, ragged_rows

from hf_encdec_distill import DistillationTrainer
from hf_encdec_distill.distillation.teachers.capture import capture
from hf_encdec_distill.distillation.teachers.live import LiveTeacher


def with_positions(rows):
    """The teacher reads other tokens, and more of them, and is asked about two labels of three."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for row in rows:
        length = 2 * len(row["labels"]) + 3
        positions = [2 + 2 * t if (t + len(made)) % 3 else -1 for t in range(len(row["labels"]))]
        ids = torch.randint(4, 60, (length,), generator=generator).tolist()
        made.append({**row, "teacher_input_ids": ids, "teacher_label_positions": positions})
    return made


ROWS = with_positions(ragged_rows(8))


def by_hand(student, teacher, rows):
    """CE and KL `[N]` over all target tokens, and agreement `[M]` over those asked; one row at a time, no padding."""
    ce, kl, agree = [], [], []
    for row in rows:
        source, target = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        ours = student(input_ids=source, labels=target[None]).logits[0]
        with torch.no_grad():
            theirs = teacher(torch.tensor([row["teacher_input_ids"]])).logits[0]
        ce.append(F.cross_entropy(ours, target, reduction="none"))
        for t, position in enumerate(row["teacher_label_positions"]):
            if position == -1:
                kl.append(torch.zeros(()))
                continue
            log_q, log_p = ours[t].log_softmax(-1), theirs[position].log_softmax(-1)
            kl.append(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
            agree.append(float(ours[t].argmax() == theirs[position].argmax()))
    return torch.cat(ce), torch.stack(kl), torch.tensor(agree)


def make_trainer(tmp_path, tokenizer, rows=ROWS, teacher=None, **changed):
    return DistillationTrainer(
        make_t5(),
        arguments(tmp_path, **changed),
        teacher=teacher or make_teacher(),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("chunk_size", [1000, 3])
def test_loss_and_gradient(tmp_path, tokenizer, chunk_size):
    """What is not asked has no divergence, and still counts in the mean."""
    trainer = make_trainer(tmp_path, tokenizer, distill_weight=0.7, loss_chunk_size=chunk_size)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(ROWS))
    loss.backward()
    reference = make_t5()
    ce, kl, _ = by_hand(reference, make_teacher(), ROWS)
    expected = (0.7 * kl + 0.3 * ce).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("settings", [{}, {"predict_with_generate": True, "generation_max_length": 4}])
def test_evaluation(tmp_path, tokenizer, settings):
    trainer = make_trainer(tmp_path, tokenizer, per_device_eval_batch_size=3, **settings)
    # A student that is not as far from the teacher as random weights are: of some tokens it has the same first choice.
    with torch.no_grad():
        trainer.model.shared.weight[5] *= 4
        trainer.teacher.model.lm_head.weight[5] *= 4
    ce, kl, agree = by_hand(trainer.model, trainer.teacher.model, ROWS)
    assert 0 < agree.mean() < 1
    metrics = trainer.evaluate()
    expected = {"ce_loss": ce.mean(), "distill_loss": kl.mean(), "teacher_agreement": agree.mean()}
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx((0.9 * kl + 0.1 * ce).mean().item(), rel=1e-5)
    assert "eval_teacher_asked" not in metrics


def test_columns_that_follow_each_other_are_the_default(tmp_path, tokenizer):
    """Positions that say what teacher_labels_start says give the same loss to the bit, on either padding side."""
    rows = [{**row, "teacher_input_ids": [7, *row["input_ids"], *row["labels"]]} for row in ragged_rows(6)]
    spelt_out = []
    for row in rows:
        prompt = len(row["teacher_input_ids"]) - len(row["labels"])
        positions = [prompt - 1 + t for t in range(len(row["labels"]))]
        spelt_out.append({**row, "teacher_label_positions": positions})
    for side in ("right", "left"):
        tokenizer.padding_side = side
        one, other = (make_trainer(tmp_path, tokenizer, rows=part) for part in (rows, spelt_out))
        losses = [trainer.compute_loss(trainer.model, trainer.data_collator(trainer.train_dataset))
                  for trainer in (one, other)]  # fmt: skip
        assert torch.equal(*losses)


@pytest.mark.parametrize("kind, tolerance", [("top_k", 1e-5), ("dense", 2e-3)])
def test_a_cache_holds_what_was_asked(tmp_path, tokenizer, kind, tolerance):
    capture(LiveTeacher(make_teacher()), ROWS, tmp_path / "cache", tokenizer, kind=kind, k=280, progress=False)
    live, cached = (make_trainer(tmp_path, tokenizer, teacher=teacher) for teacher in (None, tmp_path / "cache"))
    order = [5, 2, 7, 0]
    losses = [t.compute_loss(t.model, t.data_collator([ROWS[i] for i in order])) for t in (live, cached)]
    torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
    # Asked about other columns of the same sequence: that was not recorded.
    other = {**ROWS[0], "teacher_label_positions": [1 + 2 * t for t in range(len(ROWS[0]["labels"]))]}
    with pytest.raises(ValueError, match="1 of 1 rows of the batch are not in the cache"):
        cached.compute_loss(cached.model, cached.data_collator([other]))
    nothing = {**ROWS[0], "teacher_label_positions": [-1] * len(ROWS[0]["labels"])}
    loss = cached.compute_loss(cached.model, cached.data_collator([nothing]))
    ce, _, _ = by_hand(make_t5(), make_teacher(), [nothing])
    assert loss.item() == pytest.approx(0.1 * ce.mean().item(), rel=1e-5)


def test_an_answer_that_is_not_written_yet_has_no_positions(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, on_policy_fraction=1.0, max_steps=1)
    with pytest.raises(ValueError, match="teacher_label_positions with on_policy_fraction"):
        trainer.train()


def test_training_keeps_the_column(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, num_train_epochs=1, per_device_train_batch_size=8, learning_rate=0.0)
    trainer.train()
    _, kl, _ = by_hand(make_t5(), make_teacher(), ROWS)
    assert trainer.state.log_history[0]["distill_loss"] == pytest.approx(kl.mean().item(), rel=1e-4)
