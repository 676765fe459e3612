"""Decoder-only students, against dense formulas on rows run one by one, and against plain `Trainer` and `generate`."""

import pytest
import torch
import torch.nn.functional as F
from distillation_toys import EOS, InOrder, arguments, make_teacher, ragged_rows
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenizer_toys import renumbered, wordpiece
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_encdec_distill import DistillationTrainer
from hf_encdec_distill.distillation.decoder_only_student import logits_of_labels
from hf_encdec_distill.distillation.options.rollouts import roll_out
from hf_encdec_distill.distillation.teachers.capture import capture
from hf_encdec_distill.distillation.teachers.live import LiveTeacher
from hf_encdec_distill.models.prompts import encode_prompt


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


ROWS = ragged_rows(8)
TEXT = [
    {"source": "def f(x): return x", "target": "Identity."},
    {"source": "def add(a, b): return a + b", "target": "Return the sum of two numbers."},
    {"source": "z", "target": "Zoé lit 日本."},
]


def make_student(vocab_size=280):
    return make_teacher(vocab_size, seed=5)


def make_gpt2():
    """Learned positions, which padding moves unless the model is told; a head that is tied."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=280, n_layer=2, n_embd=32, n_head=4, n_positions=64, initializer_range=0.2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config).eval()


def make_trainer(tmp_path, tokenizer, student=None, teacher=None, rows=ROWS, collator=None, **changed):
    settings = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    return InOrder(
        student or make_student(),
        arguments(tmp_path, **{**settings, **changed}),
        teacher=make_teacher() if teacher is None else teacher,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=collator,
    )


def dense_logits(model, row):
    """`[T, V]`, one row alone, nothing padded."""
    sequence = torch.tensor([row["input_ids"] + row["labels"]])
    return model(sequence).logits[0, len(row["input_ids"]) - 1 : -1]


def dense_terms(student, teacher, rows, temperature=1.0):
    """CE, KL(teacher || student) and top-1 agreement, `[N]` each."""
    ce, kl, agree = [], [], []
    for row in rows:
        ours, target = dense_logits(student, row), torch.tensor(row["labels"])
        with torch.no_grad():
            theirs = dense_logits(teacher, row)[:, : ours.shape[-1]]
        ce.append(F.cross_entropy(ours, target, reduction="none"))
        log_q, log_p = (F.log_softmax(logits / temperature, -1) for logits in (ours, theirs))
        kl.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
        agree.append((ours.argmax(-1) == theirs.argmax(-1)).float())
    return torch.cat(ce), torch.cat(kl), torch.cat(agree)


def assert_same_weights(one, other, **tolerance):
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name, **(tolerance or {"rtol": 1e-4, "atol": 1e-6}))


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_student, make_gpt2])
@pytest.mark.parametrize("chunk_size", [1000, 3])
@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_and_gradient_of_a_ragged_batch(tmp_path, tokenizer, side, chunk_size, make):
    """0.7 T^2 KL + 0.3 CE, a mean over target tokens: value and gradient, whichever side the tokenizer pads."""
    tokenizer.padding_side = side
    settings = {"distill_weight": 0.7, "distill_temperature": 2.0, "loss_chunk_size": chunk_size}
    trainer = make_trainer(tmp_path, tokenizer, make(), **settings)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(ROWS))
    loss.backward()

    reference = make()
    ce, kl, _ = dense_terms(reference, make_teacher(), ROWS, temperature=2.0)
    expected = (0.7 * 4.0 * kl + 0.3 * ce).sum() / len(ce)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("chunk_size", [1000, 1])
@pytest.mark.parametrize("batch_size, accumulation", [(4, 1), (2, 2), (1, 4)])
def test_a_step_is_the_same_however_it_is_cut(tmp_path, tokenizer, batch_size, accumulation, chunk_size):
    rows = ROWS[:6]
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        rows=rows,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        loss_chunk_size=chunk_size,
        num_train_epochs=1,
    )
    trainer.train()
    reference, teacher, logged = make_student().train(), make_teacher(), []
    for step_rows in (rows[:4], rows[4:]):
        ce, kl, _ = dense_terms(reference, teacher, step_rows)
        loss = 0.9 * kl.mean() + 0.1 * ce.mean()
        reference.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.1 * parameter.grad
        logged.append({"loss": loss.item(), "ce_loss": ce.mean().item(), "distill_loss": kl.mean().item()})
    assert_same_weights(trainer.model, reference)
    history = [log for log in trainer.state.log_history if "loss" in log]
    for ours, theirs in zip(history, logged, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4, abs=6e-5)


class TrainerInOrder(Trainer):
    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def in_one(row):
    """A row as `Trainer` takes it: prompt and target in one, labels that are -100 at the prompt."""
    ids = row["input_ids"] + row["labels"]
    labels = [-100] * len(row["input_ids"]) + row["labels"]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": [0] * len(ids), "labels": labels}


@pytest.mark.parametrize("rows", ["apart", "in one"])
def test_with_cross_entropy_alone_it_is_trainer(tmp_path, tokenizer, rows):
    """Weights and logged losses of 4 steps, two batches each, equal those of plain `Trainer` on rows in one."""
    settings = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "num_train_epochs": 2}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    theirs = TrainerInOrder(
        make_student(),
        arguments(tmp_path, TrainingArguments, **settings),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=[in_one(row) for row in ROWS],
    )
    theirs.train()
    ours = make_trainer(
        tmp_path,
        tokenizer,
        rows=[in_one(row) for row in ROWS] if rows == "in one" else ROWS,
        **{**settings, "max_grad_norm": 1.0, "distill_weight": 0.0},
    )
    ours.train()
    assert_same_weights(ours.model, theirs.model)
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=6e-5) and len(losses[0]) == 4  # 4.57 rounds to four digits


def test_a_student_that_is_the_teacher_has_nothing_to_learn_from_it(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, make_teacher(), per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    assert metrics["eval_distill_loss"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["eval_teacher_agreement"] == 1.0
    ce, _, _ = dense_terms(make_teacher(), make_teacher(), ROWS)
    assert metrics["eval_ce_loss"] == pytest.approx(ce.mean().item(), rel=1e-5)


def test_evaluation_is_a_mean_over_target_tokens(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    ce, kl, agree = dense_terms(make_student(), make_teacher(), ROWS)
    expected = {"eval_ce_loss": ce, "eval_distill_loss": kl, "eval_teacher_agreement": agree}
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(values.mean().item(), rel=1e-5), name


@pytest.mark.parametrize("kind", [{"kind": "dense"}, {"kind": "top_k", "k": 280}])
def test_a_recorded_teacher_is_the_live_one(tmp_path, tokenizer, kind):
    """The cache is made without a student: all students read what the teacher reads."""
    capture(LiveTeacher(make_teacher()), ROWS, tmp_path / "cache", tokenizer, batch_size=4, progress=False, **kind)
    found = []
    for teacher in (None, tmp_path / "cache"):
        trainer = make_trainer(tmp_path, tokenizer, teacher=teacher, num_train_epochs=1, per_device_train_batch_size=4)
        before = trainer.evaluate()
        trainer.train()
        found.append((trainer.model, before))
    assert_same_weights(found[0][0], found[1][0], rtol=1e-2, atol=1e-3)  # records are in half precision
    for name in ("eval_loss", "eval_ce_loss", "eval_distill_loss", "eval_teacher_agreement"):
        assert found[0][1][name] == pytest.approx(found[1][1][name], rel=1e-3)


def test_states_are_compared_where_the_targets_are_predicted(tmp_path, tokenizer):
    settings = {"hidden_state_weight": 0.5, "hidden_state_layers": {1: 1, 2: 2}, "num_train_epochs": 1}
    trainer = make_trainer(tmp_path, tokenizer, per_device_eval_batch_size=3, **settings)
    distances, student, teacher = [], make_student(), make_teacher()
    for row in ROWS:
        sequence, where = torch.tensor([row["input_ids"] + row["labels"]]), slice(len(row["input_ids"]) - 1, -1)
        with torch.no_grad():
            ours, theirs = (m(sequence, output_hidden_states=True).hidden_states for m in (student, teacher))
        pairs = [F.mse_loss(ours[i][0, where], theirs[i][0, where], reduction="none").mean(-1) for i in (1, 2)]
        distances.append(torch.stack(pairs).mean(0))
    expected = torch.cat(distances).mean().item()  # equally wide: the projections start as the identity
    assert trainer.evaluate()["eval_hidden_state_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_teacher_with_a_longer_vocabulary(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, teacher=make_teacher(304))
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(ROWS))
    ce, kl, _ = dense_terms(make_student(), make_teacher(304), ROWS)
    torch.testing.assert_close(loss, 0.9 * kl.mean() + 0.1 * ce.mean(), rtol=1e-5, atol=1e-6)


def test_the_teacher_may_read_something_else(tmp_path, tokenizer):
    """With `teacher_input_ids` the student reads its own prompt, and the teacher that."""
    rows = [{**row, "teacher_input_ids": [3, 50, 51, *row["labels"]]} for row in ROWS]
    trainer = make_trainer(tmp_path, tokenizer, rows=rows)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    student, teacher, kl, ce = make_student(), make_teacher(), [], []
    for row in ROWS:
        ours, theirs = dense_logits(student, row), dense_logits(teacher, {**row, "input_ids": [3, 50, 51]})
        kl.append(F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1))
        ce.append(F.cross_entropy(ours, torch.tensor(row["labels"]), reduction="none"))
    torch.testing.assert_close(loss, 0.9 * torch.cat(kl).mean() + 0.1 * torch.cat(ce).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [True, False])
def test_the_head_runs_at_the_targets_alone(tmp_path, tokenizer, kept):
    """Where the model takes `logits_to_keep`; the loss is that of all logits."""
    trainer = make_trainer(tmp_path, tokenizer)
    batch = trainer.data_collator(ROWS)
    expected = trainer.compute_loss(trainer.model, batch)
    if not kept:
        trainer._signature_columns.remove("logits_to_keep")
    seen = []
    hook = trainer.model.lm_head.register_forward_hook(lambda _module, _args, logits: seen.append(logits.shape[1]))
    loss = trainer.compute_loss(trainer.model, batch)
    hook.remove()
    torch.testing.assert_close(loss, expected)
    longest = max(len(row["input_ids"] + row["labels"]) for row in ROWS)
    assert seen == [max(len(row["labels"]) for row in ROWS) + 1 if kept else longest]


@pytest.mark.parametrize("chunk_size", [1000, 3])
def test_a_student_of_other_ids_has_the_loss_of_the_plain_one(tmp_path, tokenizer, chunk_size):
    """`id_map`: the same student with its tokens in another order, on ready rows and on texts."""
    order = torch.randperm(280, generator=torch.Generator().manual_seed(7))
    ids = order.argsort().tolist()
    settings = {"loss_chunk_size": chunk_size, "distill_temperature": 1.5}

    def permuted():
        student = make_student()
        with torch.no_grad():
            for module in (student.model.embed_tokens, student.lm_head):
                module.weight.copy_(module.weight[order].clone())
        return student

    renamed = [{**row, **{name: [ids[i] for i in row[name]] for name in ("input_ids", "labels")}} for row in ROWS]
    for plain_rows, rows in ((ROWS, renamed), (TEXT, TEXT)):
        losses = []
        for student, own, policy, given in (
            (make_student(), tokenizer, "strict", plain_rows),
            (permuted(), renumbered(tokenizer, ids), "id_map", rows),
        ):
            trainer = DistillationTrainer(
                student,
                arguments(tmp_path, vocab_policy=policy, **settings),
                teacher=make_teacher(),
                processing_class=own,
                teacher_processing_class=tokenizer,
            )
            losses.append(trainer.compute_loss(trainer.model, trainer.data_collator([dict(row) for row in given])))
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


def test_a_teacher_with_another_tokenizer(tmp_path, tokenizer):
    """`universal`: each reads its own encoding of the prompt, and sorted probabilities are compared."""
    theirs = wordpiece()
    teacher, template = make_teacher(len(theirs)), "Shorten: {source}\n"
    trainer = DistillationTrainer(
        make_student(),
        arguments(tmp_path, vocab_policy="universal", prompt_template=template),
        teacher=teacher,
        processing_class=tokenizer,
        teacher_processing_class=theirs,
    )
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(TEXT))
    student, distance, ce = make_student(), [], []
    for row in TEXT:
        batch = trainer.data_collator([row])
        assert batch["input_ids"][0].tolist() == encode_prompt(tokenizer, row["source"], template)
        target, positions = batch["labels"][0], batch["teacher_label_positions"][0]
        ours = dense_logits(student, {"input_ids": batch["input_ids"][0].tolist(), "labels": target.tolist()})
        with torch.no_grad():
            logits = teacher(batch["teacher_input_ids"]).logits[0]
        ce.append(F.cross_entropy(ours, target, reduction="none"))
        for step, position in enumerate(positions.tolist()):
            q = ours[step].softmax(-1).sort(descending=True).values
            p = logits[max(position, 0)].softmax(-1).sort(descending=True).values
            distance.append((F.pad(p, (0, len(q) - len(p))) - q).abs().sum() * (position >= 0))
    assert any(value > 0 for value in distance)
    expected = 0.9 * torch.stack(distance).mean() + 0.1 * torch.cat(ce).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_on_the_student(tmp_path, tokenizer, checkpointing):
    """LoRA, also with gradient checkpointing: the loss by hand, a gradient for each adapter, answers of the model."""

    def with_lora():
        torch.manual_seed(4)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, init_lora_weights=False)
        return get_peft_model(make_student(), config)

    settings = {"predict_with_generate": True, "generation_max_length": 6, "gradient_checkpointing": checkpointing}
    trainer = make_trainer(tmp_path, tokenizer, with_lora(), max_steps=1, per_device_train_batch_size=8, **settings)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    metrics = trainer.evaluate()
    ce, kl, _ = dense_terms(with_lora().eval(), make_teacher(), ROWS)
    assert metrics["eval_loss"] == pytest.approx((0.9 * kl + 0.1 * ce).mean().item(), rel=1e-5)
    answers = trainer.predict(ROWS[:2]).predictions
    prompt = torch.tensor([ROWS[0]["input_ids"]])
    expected = with_lora().eval().generate(input_ids=prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
    assert answers[0, : len(expected)].tolist() == expected.tolist()
    trainer.train()
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_a_learned_prompt_is_refused(tmp_path, tokenizer, kind):
    student = get_peft_model(make_student(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="adapter 'default' of the student is a learned prompt .*use one of weights"):
        make_trainer(tmp_path, tokenizer, student)


def test_a_load_balancing_loss_is_refused(tmp_path, tokenizer):
    """Not trained without it. Without being asked for it, a mixture of experts has the loss by hand."""
    sizes = {"vocab_size": 280, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    student = MixtralForCausalLM(config).eval()
    loss = make_trainer(tmp_path, tokenizer, student, distill_weight=0.0).evaluate()["eval_loss"]
    assert loss == pytest.approx(dense_terms(student, make_teacher(), ROWS)[0].mean().item(), rel=1e-5)
    student.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits=True.*set it to False"):
        make_trainer(tmp_path, tokenizer, student)


# Rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "Shorten: {source}\n"])
def test_texts_are_read_with_the_prompt_of_the_teacher(tmp_path, tokenizer, template):
    rows = TEXT
    if template is None:
        chat = [{"role": "user", "content": TEXT[1]["source"]}, {"role": "assistant", "content": TEXT[1]["target"]}]
        rows = [TEXT[0], {"messages": chat}]
        trainer = make_trainer(tmp_path, tokenizer, rows=rows)
        batches = [trainer.data_collator([row]) for row in rows]
    else:
        trainer = make_trainer(tmp_path, tokenizer, rows=rows, prompt_template=template, max_source_length=30)
        batches = [trainer.data_collator([row]) for row in rows]
    for batch, row in zip(batches, TEXT):
        prompt = encode_prompt(tokenizer, row["source"], template, 30 if template else None)
        target = [*tokenizer(row["target"])["input_ids"], EOS]
        assert batch["input_ids"].tolist() == [prompt] and batch["labels"].tolist() == [target]
        assert batch["teacher_input_ids"].tolist() == [prompt + target]
    # What is saved knows the prompt.
    assert encode_prompt(trainer.processing_class, "a") == encode_prompt(tokenizer, "a", template)
    trainer.evaluate(rows[:1])


def test_another_chat_template_than_the_teachers_is_told(tmp_path, make_bpe_tokenizer, tokenizer, caplog):
    other = make_bpe_tokenizer(pad_token="<|endoftext|>", chat_template="{{ messages[0]['content'] }}!")
    for given, told in ((tokenizer, 0), (other, 1)):
        trainer = DistillationTrainer(
            make_student(),
            arguments(tmp_path),
            teacher=make_teacher(),
            processing_class=given,
            teacher_processing_class=tokenizer,
        )
        caplog.clear()
        batch = trainer.data_collator(TEXT)
        assert batch["input_ids"][0, batch["attention_mask"][0].bool()].tolist() == encode_prompt(
            tokenizer, TEXT[0]["source"]
        )
        trainer.data_collator(TEXT)
        assert sum("makes another prompt" in record.message for record in caplog.records) == told


def test_rows_that_say_nothing_of_a_target_are_refused(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, collator=DataCollatorForLanguageModeling(tokenizer, mlm=False))
    with pytest.raises(ValueError, match="labels repeat input_ids.*-100 at the prompt"):
        trainer.compute_loss(trainer.model, trainer.data_collator([{"input_ids": row["labels"]} for row in ROWS]))
    trainer = make_trainer(tmp_path, tokenizer)
    rows = [{"input_ids": [], "attention_mask": [], "labels": [5, EOS]}, ROWS[0]]
    with pytest.raises(ValueError, match="a target and no prompt"):
        trainer.compute_loss(trainer.model, trainer.data_collator(rows))


def test_prompt_and_target_together_have_to_fit(tmp_path, tokenizer):
    student = make_student()
    student.config.max_position_embeddings = 12
    trainer = make_trainer(tmp_path, tokenizer, student)
    with pytest.raises(ValueError, match="tokens of prompt and target, but the student has positions for 12"):
        trainer.compute_loss(trainer.model, trainer.data_collator(ROWS))


@pytest.mark.parametrize(
    "options",
    [
        {"freeze_encoder": True},
        {"cross_attention_warmup_steps": 2},
        {"bidirectional_warmup_steps": 2},
        {"progressive_depth_steps": 2, "final_decoder_layers": 1},
    ],
)
def test_what_is_for_encoder_decoders_is_refused(tmp_path, tokenizer, options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"^{name}={value} is for encoder-decoders.*from_decoder_only.$"):
        make_trainer(tmp_path, tokenizer, **options)


# Predictions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_predictions_are_logits_of_the_labels(tmp_path, tokenizer, side):
    tokenizer.padding_side = side
    seen = []
    trainer = make_trainer(tmp_path, tokenizer, per_device_eval_batch_size=3)
    trainer.compute_metrics = lambda prediction: seen.append(prediction) or {}
    trainer.evaluate()
    for row, logits, labels in zip(ROWS, seen[0].predictions, seen[0].label_ids, strict=True):
        count = len(row["labels"])
        assert labels[:count].tolist() == row["labels"] and (labels[count:] == -100).all()
        with torch.no_grad():
            expected = dense_logits(make_student(), row)
        torch.testing.assert_close(torch.tensor(logits[:count]), expected, rtol=1e-4, atol=1e-5)


def test_logits_of_labels_with_gaps_at_either_end():
    logits, labels = torch.arange(24.0).reshape(2, 4, 3), torch.tensor([[7, 8, 9], [-100, 7, -100]])
    columns = [[0, 1, 2], [1, 2, 3]]  # of 4: the last target token of a row is predicted by the last but one
    expected = torch.stack([logits[row, columns[row]] for row in range(2)])
    assert torch.equal(logits_of_labels(logits, labels)[labels != -100], expected[labels != -100])


@pytest.mark.parametrize("side", ["right", "left"])
def test_generated_tokens_are_answers_without_the_prompt(tmp_path, tokenizer, side):
    tokenizer.padding_side = side
    settings = {"predict_with_generate": True, "generation_max_length": 7, "per_device_eval_batch_size": 3}
    student = make_student()
    before = student.generate
    trainer = make_trainer(tmp_path, tokenizer, student, **settings)
    output = trainer.predict(ROWS)
    for row, tokens in zip(ROWS, output.predictions, strict=True):
        prompt = torch.tensor([row["input_ids"]])
        expected = make_student().generate(prompt, max_new_tokens=7, do_sample=False)[0, prompt.shape[1] :].tolist()
        assert tokens[: len(expected)].tolist() == expected
        assert set(tokens[len(expected) :]) <= {-100, tokenizer.pad_token_id}
    ce, kl, _ = dense_terms(make_student(), make_teacher(), ROWS)
    assert output.metrics["test_loss"] == pytest.approx((0.9 * kl + 0.1 * ce).mean().item(), rel=1e-5)
    assert student.generate == before and "generate" not in vars(student)
    without_labels = trainer.predict([{"input_ids": row["input_ids"]} for row in ROWS])
    width = min(output.predictions.shape[1], without_labels.predictions.shape[1])
    assert (without_labels.predictions[:, :width] == output.predictions[:, :width]).all()


# The student's own answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_rollout_is_what_generate_gives(tmp_path, tokenizer, side):
    tokenizer.padding_side = side
    student = make_student()
    written = []
    for row in ROWS:
        prompt = torch.tensor([row["input_ids"]])
        written.append(
            make_student().generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :].tolist()
        )
    eos = next(row[place] for row in written for place in range(1, 5) if row[place] not in row[:place])
    student.generation_config.eos_token_id = eos
    trainer = make_trainer(tmp_path, tokenizer, student)
    rolled = roll_out(student, trainer.data_collator(ROWS), max_new_tokens=6, temperature=0.0, seed=1)
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in written]
    assert any(1 < len(row) < 6 for row in expected) and any(len(row) == 6 for row in expected)
    assert [[label for label in row if label != -100] for row in rolled["labels"].tolist()] == expected


def test_a_step_on_own_targets_by_hand(tmp_path, tokenizer):
    settings = {"on_policy_fraction": 1.0, "sampling_temperature": 0.0, "max_target_length": 6}
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, per_device_train_batch_size=8, **settings)
    trainer.train()
    reference, own = make_student(), []
    for row in ROWS:
        prompt = torch.tensor([row["input_ids"]])
        tokens = reference.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :].tolist()
        own.append({**row, "labels": tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens})
    _, kl, _ = dense_terms(reference, make_teacher(), own)
    (0.9 * kl.mean()).backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter -= 0.1 * parameter.grad
    assert_same_weights(trainer.model, reference)


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_resumed_equals_never_stopped_and_loads_without_the_package_in_its_way(tmp_path, tokenizer):
    def make(stop):
        torch.manual_seed(stop)
        student = make_student()
        student.config.attention_dropout = 0.3
        for layer in student.model.layers:
            layer.self_attn.attention_dropout = 0.3
        return DistillationTrainer(
            student,
            arguments(
                tmp_path,
                learning_rate=1e-2,
                per_device_train_batch_size=2,
                num_train_epochs=2,
                save_strategy="steps",
                save_steps=3,
                prompt_template="Shorten: {source}\n",
            ),
            teacher=make_teacher(),
            train_dataset=TEXT * 3,
            processing_class=tokenizer,
        )

    whole, resumed = make(1), make(2)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert whole.state.global_step == resumed.state.global_step == 10
    assert_same_weights(whole.model, resumed.model, rtol=0, atol=0)
    whole.save_model(str(tmp_path / "student"))
    loaded, own = (auto.from_pretrained(tmp_path / "student") for auto in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([ROWS[0]["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, whole.model.eval()(ids).logits)
    assert encode_prompt(own, "a") == encode_prompt(tokenizer, "a", "Shorten: {source}\n")


def test_an_adapter_is_saved_and_resumed(tmp_path, tokenizer):
    def make():
        torch.manual_seed(4)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4, lora_dropout=0.2)
        student = get_peft_model(make_student(), config)
        settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
        return make_trainer(tmp_path, tokenizer, student, num_train_epochs=2, **settings)

    whole, resumed = make(), make()
    whole.train()
    folder = tmp_path / "checkpoint-2"
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "config.json").exists()
    resumed.train(resume_from_checkpoint=str(folder))
    assert whole.state.global_step == resumed.state.global_step == 4
    assert_same_weights(whole.model, resumed.model, rtol=0, atol=0)
    loaded = PeftModel.from_pretrained(make_student(), tmp_path / "checkpoint-4").eval()
    ids = torch.tensor([ROWS[0]["input_ids"]])
    with torch.no_grad():
        logits = whole.model.eval()(ids).logits
        assert torch.equal(loaded(ids).logits, logits) and not torch.equal(make_student()(ids).logits, logits)
