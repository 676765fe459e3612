"""Steps on the student's own targets, against generate and token-by-token losses of transformers' models."""

import pytest
import torch
from distillation_toys import (
    EOS,
    InOrder,
    arguments,
    make_rope,
    make_t5,
    make_teacher,
    ragged_rows,
    token_terms,
    write_teacher,
)
from peft import LoraConfig, get_peft_model

from hf_encdec_distill import DistillationTrainer, RopeEncDecForConditionalGeneration
from hf_encdec_distill.distillation.options.rollouts import OnPolicy, draw, on_policy_fraction_at, roll_out
from hf_encdec_distill.distillation.teachers.capture import capture
from hf_encdec_distill.distillation.teachers.live import LiveTeacher


ROWS = ragged_rows(8)


def make_trainer(tmp_path, tokenizer, student=None, teacher=None, rows=ROWS, **changed):
    settings = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    settings |= {"on_policy_fraction": 1.0, "sampling_temperature": 0.0, "max_target_length": 6, "num_train_epochs": 1}
    return InOrder(
        student or make_t5(),
        arguments(tmp_path, **{**settings, **changed}),
        teacher=teacher or make_teacher(),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )


def own_rows(student, rows, eos=EOS):
    """The rows with what the student answers, greedily and one by one: no batch, no padding."""
    answered = []
    for row in rows:
        tokens = (
            student.eval()
            .generate(input_ids=torch.tensor([row["input_ids"]]), do_sample=False, num_beams=1, max_new_tokens=6)[
                0, 1:
            ]
            .tolist()
        )
        end = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        answered.append({**row, "labels": tokens[:end]})
    return answered


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_rollout_is_what_generate_gives(tmp_path, tokenizer, side):
    tokenizer.padding_side = side
    student, reference = make_t5(dropout=0.5).train(), make_t5()
    written = [row["labels"] for row in own_rows(reference, ROWS)]
    # A token with which some answer ends early, but not at once.
    eos = next(row[place] for row in written for place in range(1, 5) if row[place] not in row[:place])
    student.generation_config.eos_token_id = reference.generation_config.eos_token_id = eos
    student.encoder.eval()  # somebody's choice
    modes = [module.training for module in student.modules()]
    trainer = make_trainer(tmp_path, tokenizer, student)
    batch = trainer.data_collator(ROWS)
    before = torch.random.get_rng_state()
    read = []
    hook = student.decoder.register_forward_pre_hook(
        lambda _module, _args, inputs: read.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    rolled = roll_out(student, batch, max_new_tokens=6, temperature=0.0, seed=1)
    hook.remove()
    assert read == [1] * 6  # the rest is in its cache
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in student.modules()] == modes
    expected = own_rows(reference, ROWS, eos)
    assert any(1 < len(row["labels"]) < 6 for row in expected) and any(len(row["labels"]) == 6 for row in expected)
    assert [[label for label in row if label != -100] for row in rolled["labels"].tolist()] == [
        row["labels"] for row in expected
    ]
    assert set(rolled) == {"input_ids", "attention_mask", "labels"}


def test_the_teacher_reads_its_own_prompt_and_what_the_student_wrote(tmp_path, tokenizer):
    rows = [{**row, "teacher_input_ids": [3, 50, 51, *row["labels"]]} for row in ROWS]
    trainer = make_trainer(tmp_path, tokenizer, rows=rows)
    rolled = roll_out(trainer.model, trainer.data_collator(rows), max_new_tokens=6, temperature=0.0, seed=1)
    for row, ids, mask, start in zip(
        own_rows(make_t5(), ROWS),
        rolled["teacher_input_ids"],
        rolled["teacher_attention_mask"],
        rolled["teacher_labels_start"],
        strict=True,
    ):
        assert ids[mask.bool()].tolist() == [3, 50, 51, *row["labels"]] and start == 3


def test_sampling_is_seeded_and_in_proportion_to_its_temperature(tmp_path, tokenizer):
    student, row = make_t5(), ROWS[0]
    batch = {"input_ids": torch.tensor([row["input_ids"]] * 3000), "labels": torch.tensor([row["labels"]] * 3000)}
    one, same, other = (
        roll_out(student, batch, max_new_tokens=1, temperature=2.0, seed=seed)["labels"] for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    logits = student(input_ids=batch["input_ids"][:1], labels=torch.tensor([[0]])).logits[0, 0]
    probs = torch.softmax(logits.detach() / 2.0, -1)
    counts = torch.bincount(one[:, 0], minlength=280)
    assert ((counts - 3000 * probs).abs() <= 5 * (3000 * probs * (1 - probs)).sqrt() + 1).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("adapter", [False, True])
def test_only_the_arguments_say_how_a_student_writes(tmp_path, tokenizer, temperature, adapter):
    """Its generation config, often the teacher's, has defaults for those who use it; drawn from is what it learns."""

    def written(**defaults):
        student = make_t5()
        if adapter:
            student = get_peft_model(student, LoraConfig(target_modules=["q", "v"]))
        config = student.generation_config
        for name, value in defaults.items():
            setattr(config, name, value)
        batch = {"input_ids": torch.tensor([ROWS[0]["input_ids"]] * 50), "labels": torch.tensor([[5]] * 50)}
        rolled = roll_out(student, batch, max_new_tokens=5, temperature=temperature, seed=1)
        base = student.get_base_model() if adapter else student
        assert student.generation_config is config and base.generation_config is config
        return rolled["labels"]

    others = {"temperature": 0.3, "top_p": 0.3, "top_k": 2, "min_p": 0.5, "do_sample": True, "num_beams": 4}
    others |= {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_length": 5}
    assert torch.equal(written(**others), written())


def test_ids_that_the_teacher_lacks_are_never_written(tmp_path, tokenizer):
    student = make_t5(300)
    with torch.no_grad():
        student.shared.weight[290:] *= 30  # what it would say, if it might
    trainer = make_trainer(tmp_path, tokenizer, student, num_train_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("batch_size, accumulation, chunk_size", [(4, 1, 1000), (2, 2, 1000), (1, 4, 1)])
def test_a_step_on_own_targets_by_hand(tmp_path, tokenizer, batch_size, accumulation, chunk_size):
    """0.7 T^2 KL and no cross-entropy, a mean over the tokens the student wrote; the second step from new weights."""
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        loss_chunk_size=chunk_size,
        distill_weight=0.7,
        distill_temperature=2.0,
    )
    trainer.train()
    reference, teacher, logged = make_t5(), make_teacher(), []
    for rows in (ROWS[:4], ROWS[4:]):
        _, kl, _ = token_terms(reference, teacher, own_rows(reference, rows), temperature=2.0)
        loss = 0.7 * 4 * kl.mean()
        reference.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.1 * parameter.grad
        logged.append(loss.item())
    for (name, ours), theirs in zip(trainer.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
    history = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["loss"] for log in history] == pytest.approx(logged, rel=1e-3)
    assert [0.7 * log["distill_loss"] for log in history] == pytest.approx(logged, rel=1e-4)
    assert not any("ce_loss" in log for log in history)
    ce, kl, _ = token_terms(reference, teacher, ROWS, temperature=2.0)
    expected = (0.3 * ce + 0.7 * 4 * kl).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)  # of the given targets, whole


def test_a_merged_student_of_full_depth_agrees_with_its_teacher_on_what_it_writes(tmp_path, make_bpe_tokenizer):
    """It is its teacher: any column or prompt out of place on either side would show."""
    template = "{source}\n# In short:"
    teacher = write_teacher(tmp_path / "teacher", make_bpe_tokenizer(chat_template=None))
    student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher, prompt_template=template)
    rows = [{"source": f"def f{'g' * i}(): return {i}", "target": f"Return {i}."} for i in range(6)]
    args = arguments(
        tmp_path,
        prompt_template=template,
        learning_rate=0.0,
        max_steps=3,
        on_policy_fraction=1.0,
        sampling_temperature=2.0,
        max_target_length=9,
    )
    trainer = DistillationTrainer(student, args, teacher=str(teacher), train_dataset=rows)
    trainer.train()
    losses = [log["distill_loss"] for log in trainer.state.log_history if "distill_loss" in log]
    assert len(losses) == 3 and max(losses) < 1e-5


def test_the_coin_is_the_same_for_all_and_fair():
    tosses = [draw(3, step, 0) < 0.3 for step in range(4000)]
    assert tosses == [draw(3, step, 0) < 0.3 for step in range(4000)]
    assert sum(tosses) / 4000 == pytest.approx(0.3, abs=0.03)
    assert tosses != [draw(4, step, 0) < 0.3 for step in range(4000)]
    assert [on_policy_fraction_at(step, 0.8, 4) for step in (0, 1, 4, 9)] == pytest.approx([0, 0.2, 0.8, 0.8])
    assert on_policy_fraction_at(0, 0.8, 0) == 0.8


def test_only_a_share_of_the_steps_is_on_policy(tmp_path, tokenizer, monkeypatch):
    """Both kinds in one run: the terms are logged as means over the steps that have them."""
    trainer = make_trainer(
        tmp_path, tokenizer, on_policy_fraction=0.5, per_device_train_batch_size=1, num_train_epochs=2, seed=5
    )
    trainer.train()
    own = [draw(5, step, 0) < 0.5 for step in range(16)]
    assert 4 <= sum(own) <= 12
    history = [log for log in trainer.state.log_history if "loss" in log]
    assert ["ce_loss" not in log for log in history] == own


@pytest.mark.parametrize("stop", [3, 5])
def test_resumed_equals_never_stopped_with_replay(tmp_path, make_bpe_tokenizer, stop):
    def make(folder):
        torch.manual_seed(stop)
        return DistillationTrainer(
            make_t5(dropout=0.3),
            arguments(
                folder,
                learning_rate=1e-2,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                num_train_epochs=3,
                save_strategy="steps",
                save_steps=stop,
                seed=7,
                on_policy_fraction=0.9,
                sampling_temperature=1.3,
                max_target_length=5,
                replay_buffer_size=3,
                replay_fraction=0.5,
            ),
            teacher=make_teacher(),
            train_dataset=ragged_rows(11),
            processing_class=make_bpe_tokenizer(pad_token="<|endoftext|>"),
        )

    whole = make(tmp_path)
    whole.train()
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert len(whole._on_policy.replay) == len(resumed._on_policy.replay) == 3
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    (tmp_path / f"checkpoint-{stop}" / "replay_buffer-0.pt").unlink()  # as `save_only_model` leaves it
    with pytest.raises(ValueError, match="has no replay_buffer-0.pt.* save_only_model.*without replay_buffer_size"):
        make(tmp_path).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))


def test_replayed_batches_are_earlier_ones(tmp_path, tokenizer, monkeypatch):
    rolled = []
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        per_device_train_batch_size=4,
        num_train_epochs=8,
        replay_buffer_size=2,
        replay_fraction=0.6,
        seed=1,
    )
    roll_out, seen = OnPolicy.roll_out, []
    monkeypatch.setattr(OnPolicy, "roll_out", lambda *args: rolled.append(roll_out(*args)) or rolled[-1])
    score = trainer.compute_loss
    monkeypatch.setattr(
        trainer, "compute_loss", lambda model, batch, **kw: seen.append(batch["labels"]) or score(model, batch, **kw)
    )
    trainer.train()
    replayed = [step for step in range(1, 16) if draw(1, step, 1) < 0.6]
    assert len(rolled) == 16 - len(replayed) and 3 < len(replayed) < 13
    made = [batch["labels"] for batch in rolled]
    for step in replayed:
        assert any(torch.equal(seen[step], labels) for labels in made)


def test_what_does_not_go_together_is_said(tmp_path, tokenizer):
    for changed, message in (
        ({"on_policy_fraction": 1.5}, "on_policy_fraction=1.5"),
        ({"distill_weight": 0.0}, "on_policy_fraction=1.0 with distill_weight=0"),
        ({"replay_fraction": 0.5}, "needs replay_buffer_size"),
        ({"sampling_temperature": -1.0}, "sampling_temperature=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, tokenizer, **changed)
    capture(LiveTeacher(make_teacher()), ROWS, tmp_path / "cache", tokenizer, progress=False)
    with pytest.raises(ValueError, match="nobody can have recorded"):
        make_trainer(tmp_path, tokenizer, teacher=tmp_path / "cache")


def test_rows_without_a_mask_are_read_whole(tmp_path):
    """As `default_data_collator` makes them of rows of equal length."""
    bare = [{"input_ids": [5, 6, 7 + row], "labels": [9 + row] * 6} for row in range(4)]
    trained = []
    for rows in (bare, [{**row, "attention_mask": [1] * 3} for row in bare]):
        trainer = make_trainer(tmp_path, None, rows=rows, max_steps=1)
        trainer.train()
        trained.append(trainer.model.state_dict())
    for name, weight in trained[0].items():
        torch.testing.assert_close(weight, trained[1][name], msg=name)


def test_answers_are_as_long_as_there_are_positions(tmp_path, tokenizer):
    """One long prompt and one long target in a batch: each row fits, the longest answer to the prompt would not."""
    student = make_rope("merged", cross_attention_layers=[1, 2], max_position_embeddings=20)
    long = {"input_ids": list(range(4, 20)), "attention_mask": [1] * 16, "labels": [5, EOS]}
    rows = [long] + [{"input_ids": [4, 5], "attention_mask": [1] * 2, "labels": [*range(30, 44), EOS]}] * 2
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, per_device_train_batch_size=3, on_policy_fraction=1.0, max_steps=2),
        train_dataset=rows,
        processing_class=tokenizer,
        teacher=make_teacher(),
    )
    trainer.train()
    assert trainer.state.global_step == 2
