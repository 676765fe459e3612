"""A student with LoRA trains, is saved, resumed and merged as any PEFT model is; so may its teacher be one."""

import pytest
import torch
from distillation_toys import STUDENTS, arguments, make_teacher, ragged_rows, token_terms
from huggingface_hub import ModelCard
from peft import AutoPeftModelForSeq2SeqLM, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from toys import KINDS, make_model, ragged
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_encdec_distill import DistillationTrainer


ROWS = ragged_rows(8)
REENTRANT = {"use_reentrant": True}


def with_lora(model, seed=4, **fields):
    """LoRA on all linear layers but the head, away from its start at zero."""
    torch.manual_seed(seed)
    return get_peft_model(
        model,
        LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules="all-linear", r=4, **fields),
    )


def make_trainer(folder, tokenizer, student, teacher=None, **settings):
    return DistillationTrainer(
        student,
        arguments(folder, learning_rate=1e-2, per_device_train_batch_size=4, max_grad_norm=0.0, **settings),
        teacher=teacher or make_teacher(),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=tokenizer,
    )


def adapter_of(model):
    return {name: value for name, value in model.named_parameters() if "lora_" in name}


def assert_same_adapters(one, other, **tolerance):
    ours, theirs = adapter_of(one), adapter_of(other)
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("kind", STUDENTS)
def test_an_adapter_learns_what_it_learns_in_seq2seq_trainer(tmp_path, tokenizer, kind):
    """Without weight on the teacher: the same adapter. The base keeps every bit and gets no gradient."""
    student, reference = (with_lora(STUDENTS[kind]()) for _ in range(2))
    trainer = make_trainer(tmp_path, tokenizer, student, distill_weight=0.0, num_train_epochs=2, optim="sgd")
    before = {name: value.clone() for name, value in student.named_parameters()}
    trainer.train()
    settings = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_grad_norm": 0.0, "optim": "sgd"}
    theirs = Seq2SeqTrainer(
        reference,
        arguments(tmp_path, Seq2SeqTrainingArguments, num_train_epochs=2, **settings),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=ROWS,
        processing_class=tokenizer,
    )
    theirs.train()
    assert_same_adapters(student, reference, rtol=1e-4, atol=1e-7)
    for name, value in student.named_parameters():
        if "lora_" not in name:
            assert torch.equal(value, before[name]) and value.grad is None, name
        elif "lora_A" in name:
            continue  # their gradient is zero until lora_B has moved
        else:
            assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", STUDENTS)
def test_chunks_and_checkpoints_change_nothing(tmp_path, tokenizer, kind):
    """The loss in chunks, and activations made again (reentrant, the default of 4.57, sees only frozen inputs)."""

    def gradients(**settings):
        student = with_lora(STUDENTS[kind](), init_lora_weights=False)
        trainer = make_trainer(tmp_path, tokenizer, student, max_steps=1, optim="sgd", **settings)
        start = {name: value.detach().clone() for name, value in adapter_of(student).items()}
        trainer.train()
        loss = trainer.state.log_history[0]["loss"]
        return loss, {name: value.detach() - start[name] for name, value in adapter_of(student).items()}

    loss, whole = gradients()
    for settings in (
        {"loss_chunk_size": 3},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": REENTRANT},
    ):
        again, parts = gradients(**settings)
        assert again == pytest.approx(loss, rel=1e-5)
        for name, value in whole.items():
            assert value.abs().max() > 0, name
            torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-6, msg=f"{settings} {name}")


@pytest.mark.parametrize("kind", STUDENTS)
def test_saved_resumed_and_merged(tmp_path, tokenizer, kind):
    """Stopped and resumed equals never stopped; folders hold the adapter alone; a merged student is the same one."""

    def trainer():
        STUDENTS[kind]().save_pretrained(tmp_path / "base")
        base = type(STUDENTS[kind]()).from_pretrained(tmp_path / "base")
        student = with_lora(base, lora_dropout=0.2)
        settings = {"save_strategy": "steps", "save_steps": 3, "predict_with_generate": True}
        return make_trainer(
            tmp_path / "run", tokenizer, student, num_train_epochs=3, generation_max_length=8, **settings
        )

    whole, resumed = trainer(), trainer()
    whole.train()
    folder = tmp_path / "run" / "checkpoint-3"
    files = {file.name for file in folder.iterdir()}
    assert "adapter_model.safetensors" in files and not files & {"model.safetensors", "pytorch_model.bin"}
    torch.rand(5)  # whatever the process did before must not matter
    resumed.train(resume_from_checkpoint=str(folder))
    assert whole.state.global_step == resumed.state.global_step == 6
    assert_same_adapters(whole.model, resumed.model, rtol=0, atol=0)

    written = whole.predict(ROWS).predictions
    assert len({tuple(row) for row in written.tolist()}) > 1
    batch = DataCollatorForSeq2Seq(tokenizer)(ROWS)
    whole.model.eval()
    with torch.no_grad():
        logits = whole.model(**batch).logits
    whole.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    merged = loaded.merge_and_unload().eval()
    assert type(merged) is type(STUDENTS[kind]()) and not adapter_of(merged)
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, logits, rtol=1e-4, atol=1e-4)
        plain = type(merged).from_pretrained(tmp_path / "base")(**batch).logits
    assert (plain - logits).abs().max() > 1e-2
    args = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=8)
    alone = Seq2SeqTrainer(
        merged, args, data_collator=DataCollatorForSeq2Seq(tokenizer), processing_class=tokenizer
    ).predict(ROWS)
    assert alone.predictions.tolist() == written.tolist()


def test_adapters_of_student_and_teacher_in_folders(tmp_path, tokenizer):
    """Both bases in one folder each, both adapters beside them: the teacher answers with its adapter."""
    make_teacher().save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    base = type(make_teacher()).from_pretrained(tmp_path / "teacher")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(0)
    teacher = get_peft_model(base, config).eval()
    teacher.save_pretrained(tmp_path / "teacher-adapter")
    student = with_lora(STUDENTS["t5"](), init_lora_weights=False).eval()
    student.save_pretrained(tmp_path / "student-adapter")
    reread = PeftModel.from_pretrained(STUDENTS["t5"](), tmp_path / "student-adapter", is_trainable=True)
    ce, kl, _ = token_terms(student, teacher, ROWS)
    _, without, _ = token_terms(student, make_teacher(), ROWS)
    assert abs(kl.mean() - without.mean()) > 1e-2
    trainer = make_trainer(tmp_path, tokenizer, reread, str(tmp_path / "teacher-adapter"), max_steps=2)
    metrics = trainer.evaluate()
    assert metrics["eval_distill_loss"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert metrics["eval_ce_loss"] == pytest.approx(ce.mean().item(), rel=1e-4)
    trainer.train()
    assert all(not torch.equal(a, b) for a, b in zip(adapter_of(student).values(), adapter_of(reread).values()))


@pytest.mark.parametrize("kind", [*KINDS, "pooled"])
def test_a_tuned_prefix_generates_what_a_whole_pass_says(kind):
    """Token by token as all at once, and a row of a batch as the row alone."""
    student = get_peft_model(make_model(kind), PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4))
    student.eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids, mask, rows = ragged("left")
    written = student.generate(input_ids=ids, attention_mask=mask, **settings)
    with torch.no_grad():
        logits = student(input_ids=ids, attention_mask=mask, decoder_input_ids=written[:, :-1]).logits
    assert torch.equal(logits.argmax(-1), written[:, 1:])
    for row, tokens in zip(rows, written):
        assert torch.equal(student.generate(input_ids=row, **settings)[0], tokens)


def test_the_empty_card_of_peft_gives_way_to_the_draft(tmp_path, tokenizer):
    """As in `Seq2SeqTrainer`, at each push; a card that somebody has written something into stays."""
    trainer = make_trainer(tmp_path, tokenizer, with_lora(STUDENTS["t5"]()), max_steps=1)
    trainer.train()
    card = tmp_path / "README.md"
    for license in ("mit", "apache-2.0"):  # what `push_to_hub` does before it uploads
        trainer.save_model()
        trainer.create_model_card(license=license)
        draft = ModelCard.load(card)
        assert draft.data.license == license and draft.data.library_name == "peft"
        assert "learning_rate: 0.01" in draft.text and "[More Information Needed]" not in draft.text
    card.unlink()
    trainer.save_model()
    for mine in (card.read_text().replace("# Model Card for Model ID", "# Mine"), "---\nlicense: mit\n---\n# Mine\n"):
        card.write_text(mine)
        trainer.create_model_card(license="mit")
        assert card.read_text() == mine
