"""What people switch on in any `Trainer`: it does the same here, on both versions of transformers."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from distillation_toys import STUDENTS, KeepLogs, arguments, make_bart, make_rope, make_t5, make_teacher, ragged_rows
from safetensors.torch import load_file
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    EarlyStoppingCallback,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import BestRun, HPSearchBackend

from hf_encdec_distill import DistillationTrainer, DistillationTrainingArguments
from hf_encdec_distill.metrics import texts as metrics


ROWS = ragged_rows(8)
OPTIONS = ("callbacks", "compute_metrics", "model_init", "teacher_processing_class")
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}


def make_trainer(folder, tokenizer, student=None, rows=ROWS, *, collator=None, cls=DistillationTrainer, **settings):
    options = {name: settings.pop(name) for name in OPTIONS if name in settings}
    kind = settings.pop(
        "kind", DistillationTrainingArguments if cls is DistillationTrainer else Seq2SeqTrainingArguments
    )
    if cls is DistillationTrainer:
        options["teacher"] = make_teacher()
    return cls(
        None if "model_init" in options else (student or make_t5()),
        arguments(folder, kind, **{"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, **settings}),
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        **options,
    )


def logged(trainer, name="loss"):
    return [log[name] for log in trainer.state.log_history if name in log]


# --- rows ---

BY_LENGTH = (
    {"group_by_length": True}
    if hasattr(Seq2SeqTrainingArguments, "group_by_length")
    else {"train_sampling_strategy": "group_by_length"}
)
TEXTS = [{"source": "x" * (1 + 7 * i % 23), "target": "yz"[: 1 + i % 2]} for i in range(24)]


@pytest.mark.parametrize("kind", ["list", "dataset", "messages", "ready"])
def test_texts_are_grouped_by_their_length(tmp_path, tokenizer, kind):
    """The batches are those of Seq2SeqTrainer on the same rows encoded beforehand, and are of one length each."""
    ready = [{"input_ids": tokenizer(row["source"])["input_ids"], "labels": [7, 8]} for row in TEXTS]
    teachers = {"teacher_processing_class": tokenizer}
    rows = {"list": TEXTS, "dataset": Dataset.from_list(TEXTS), "ready": ready, "messages": []}[kind]
    if kind == "messages":
        roles = (("user", "source"), ("assistant", "target"))
        rows = [{"messages": [{"role": role, "content": row[name]} for role, name in roles]} for row in TEXTS]
        # Without a chat template, which would be part of the student's source.
        tokenizer = type(tokenizer)(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<s>"
        )
    batches = []
    for cls, data in ((DistillationTrainer, rows), (Seq2SeqTrainer, Dataset.from_list(ready))):
        collator = DataCollatorForSeq2Seq(tokenizer) if cls is Seq2SeqTrainer else None
        options = BY_LENGTH | (teachers if cls is DistillationTrainer else {})
        trainer = make_trainer(tmp_path, tokenizer, rows=data, cls=cls, collator=collator, **options)
        torch.manual_seed(5)
        batches.append([batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()])
        if cls is DistillationTrainer:
            grouped = trainer.evaluate()
            in_order = make_trainer(tmp_path, tokenizer, rows=data, **teachers).evaluate()
            assert grouped["eval_loss"] == pytest.approx(in_order["eval_loss"], rel=1e-5)
    assert batches[0] == batches[1]
    assert len({len(batch[0]) for batch in batches[0]}) > 3


def test_a_column_of_lengths_counts_for_texts_too(tmp_path, tokenizer):
    """The longest source is said to be the shortest: the batches are those of Seq2SeqTrainer with the same column."""
    rows = [{**row, "size": 99 - len(row["source"])} for row in TEXTS]
    ready = [{"input_ids": [5] * len(row["source"]), "labels": [7, 8], "size": row["size"]} for row in rows]
    options = BY_LENGTH | {"length_column_name": "size", "remove_unused_columns": False}
    orders = []
    for cls, data in ((DistillationTrainer, rows), (Seq2SeqTrainer, ready)):
        trainer = make_trainer(tmp_path, tokenizer, rows=Dataset.from_list(data), cls=cls, **options)
        torch.manual_seed(5)
        orders.append(list(trainer._get_train_sampler(trainer.train_dataset)))
    assert orders[0] == orders[1]


def test_packed_batches_are_refused(tmp_path, tokenizer):
    """Flattened by a collator, from ready rows or texts, or packed beforehand; padded positions are no packing."""
    for rows in (ROWS, TEXTS):
        trainer = make_trainer(tmp_path, tokenizer, rows=rows, collator=DataCollatorWithFlattening(), max_steps=1)
        with pytest.raises(ValueError, match=r"the batch is packed \(a batch of 1 rows made of 4\)"):
            trainer.train()
    trainer = make_trainer(tmp_path, tokenizer, make_rope("separate"))
    batch = {"input_ids": torch.tensor([[0, 0, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    batch |= {"labels": torch.tensor([[8, 9, 2]]), "position_ids": torch.tensor([[1, 1, 0, 1, 2]])}
    one = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(one, trainer.compute_loss(trainer.model, {**batch, "position_ids": None}))
    for name, value in (
        ("position_ids", torch.tensor([[0, 0, 0, 1, 0]])),
        ("decoder_position_ids", torch.tensor([[0, 1, 0]])),
        ("seq_idx", torch.tensor([[0, 0, 0, 0, 1]])),
        ("cu_seq_lens_q", torch.tensor([0, 2, 3])),
    ):
        with pytest.raises(ValueError, match=rf"the batch is packed \({name} .*DataCollatorForSeq2Seq"):
            trainer.compute_loss(trainer.model, {**batch, name: value})


# --- the learning rate ---


@pytest.mark.parametrize(
    "said, steps, rates", [(0.4, 5, [0.5, 1, 1, 1, 1]), (2.0, 5, [0.5, 1, 1, 1, 1]), (0, 2, [1, 1])]
)
def test_warm_up_is_a_share_of_the_steps(tmp_path, tokenizer, said, steps, rates):
    """Below 1, as in transformers 5; in a script, on a command line, and after a copy."""
    settings = {"learning_rate": 1.0, "lr_scheduler_type": "constant_with_warmup", "optim": "sgd", "max_steps": steps}
    seen = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append(optimizer.param_groups[0]["lr"])

    keeper = Rates()
    make_trainer(tmp_path, tokenizer, warmup_steps=said, callbacks=[keeper], **settings).train()
    # The rate of step i is set behind step i - 1, and that of the first is 0 where there is a warm-up.
    assert seen == pytest.approx(([0.0] if said else [1.0]) + rates[: steps - 1])
    parser = HfArgumentParser(DistillationTrainingArguments)
    (parsed,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--warmup_steps", str(said)])
    for args in (parsed, dataclasses.replace(parsed)):
        assert args.get_warmup_steps(1000) == (400 if said == 0.4 else said)


# --- how the forward is run ---


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_same_step_in_other_ways(tmp_path, tokenizer, kind):
    """Checkpointed: the same weights. Compiled: the same, saved under plain names. In bf16: near, and kept in fp32."""
    ways = {
        "plain": {},
        "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
        "bf16": {"bf16": True, "loss_chunk_size": 3},
    }
    if kind != "merged":  # tracing takes longer than all else here
        del ways["compiled"]
    weights, losses = {}, {}
    for way, settings in ways.items():
        saving = {"save_strategy": "steps", "save_steps": 1} if way == "compiled" else {}
        trainer = make_trainer(tmp_path, tokenizer, STUDENTS[kind](), max_steps=1, **SGD, **settings, **saving)
        trainer.train()
        weights[way] = {name: value.detach() for name, value in trainer.model.named_parameters()}
        losses[way] = (logged(trainer, "ce_loss")[0], logged(trainer, "distill_loss")[0])
        assert all(value.dtype == torch.float32 for value in trainer.model.parameters())
        if way == "compiled":
            assert set(load_file(tmp_path / "checkpoint-1" / "model.safetensors")) <= set(
                STUDENTS[kind]().state_dict()
            )
            assert trainer.evaluate()["eval_loss"] < losses["plain"][0]
    before = dict(STUDENTS[kind]().named_parameters())
    for way in ways.keys() - {"plain", "bf16"}:
        assert losses[way] == pytest.approx(losses["plain"], rel=1e-5)
        for name, value in weights["plain"].items():
            torch.testing.assert_close(weights[way][name], value, rtol=1e-4, atol=1e-6, msg=f"{way} {name}")
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=0.03) and losses["bf16"] != losses["plain"]
    moves = [torch.cat([(w[n] - before[n]).flatten() for n in before]) for w in (weights["plain"], weights["bf16"])]
    assert torch.cosine_similarity(*moves, dim=0) > 0.95


class WatchEmbeddings(TrainerCallback):
    """How far what the token embeddings give is from their table, in units of 1 / sqrt(length * width)."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def on_train_begin(self, *_args, **_kwargs):
        table = self.model.get_input_embeddings().weight
        for module in self.model.modules():
            if isinstance(module, nn.Embedding) and module.weight is table:
                module.register_forward_hook(self.see)  # behind the noise

    def see(self, module, args, output):
        noise = output - nn.functional.embedding(args[0], module.weight)
        size = (output.shape[1] * output.shape[2]) ** 0.5
        self.seen.append((module.training, (noise.abs().max() * size).item()))


@pytest.mark.parametrize("kind", [*STUDENTS, "bart"])
def test_neftune(tmp_path, tokenizer, kind):
    """Uniform noise up to alpha / sqrt(length * width) on both sides in training, none in rollouts and evaluation."""
    student = make_bart(encoder_layers=1, decoder_layers=1) if kind == "bart" else STUDENTS[kind]()
    watch = WatchEmbeddings(student)
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        student,
        max_steps=2,
        neftune_noise_alpha=5.0,
        on_policy_fraction=1.0,
        max_target_length=3,
        eval_strategy="steps",
        eval_steps=1,
        callbacks=[watch],
        **{**SGD, "learning_rate": 0.0},
    )
    before = trainer.evaluate()
    trainer.train()
    noisy = [size for training, size in watch.seen if training]
    assert len(noisy) == 2 * 2  # encoder and decoder, two steps
    assert all(0.9 * 5.0 < size <= 5.0 + 1e-3 for size in noisy)
    quiet = [size for training, size in watch.seen if not training]
    assert len(quiet) > 10 and max(quiet) < 1e-5
    assert logged(trainer, "eval_loss") == pytest.approx([before["eval_loss"]] * 2, rel=1e-6)
    assert not any(hasattr(module, "neftune_noise_alpha") for module in student.modules())
    watch.seen.clear()
    trainer.compute_loss(student.train(), trainer.data_collator(ROWS))
    assert max(size for _, size in watch.seen) < 1e-5


# --- what is reported, kept and chosen ---


def test_best_model_by_rouge_stops_early(tmp_path, tokenizer):
    """A rate so small that no answer changes: the first evaluation stays the best, the second ends the run."""
    keeper = KeepLogs()
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        num_train_epochs=5,
        learning_rate=1e-6,
        eval_strategy="epoch",
        save_strategy="epoch",
        predict_with_generate=True,
        generation_max_length=8,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rougeL",
        include_for_metrics=["inputs", "loss"],
        eval_accumulation_steps=1,
        compute_metrics=lambda p: {**score(p), "rows": len(p.inputs), "width": p.inputs.shape[1]},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1), keeper],
    )
    score = metrics.generation_metrics(tokenizer)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    batch = DataCollatorForSeq2Seq(tokenizer)(ROWS)
    model = make_t5()
    written = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_length=8, num_beams=1
    )
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    references = tokenizer.batch_decode([row["labels"] for row in ROWS], skip_special_tokens=True)
    expected = metrics.Rouge().compute(predictions=texts, references=references)["rougeL"]
    assert trainer.state.best_metric == pytest.approx(expected, rel=1e-6)
    evaluations = [log for log in keeper.logs if "eval_loss" in log]
    assert [log["eval_rows"] for log in evaluations] == [8, 8] and evaluations[0]["eval_width"] == 7
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4))
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in best.items())
    assert any(not torch.equal(last[name], value) for name, value in best.items())
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    for logs in (history, keeper.logs):
        steps = [log for log in logs if "loss" in log]
        assert len(steps) == 4
        for log in steps:
            assert log["loss"] == pytest.approx(0.9 * log["distill_loss"] + 0.1 * log["ce_loss"], abs=1e-4)


class TooLarge(DistillationTrainer):
    """Batches of more than two rows do not fit, from the second step on."""

    calls = 0

    def training_step(self, model, inputs, *args):
        self.calls += 1
        if self.calls > 1 and len(inputs["labels"]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return super().training_step(model, inputs, *args)


def test_a_batch_that_does_not_fit_is_halved(tmp_path, tokenizer):
    """`auto_find_batch_size`: the second try logs its own steps, nothing of the first."""
    trainer = TooLarge(
        make_t5(),
        arguments(
            tmp_path,
            auto_find_batch_size=True,
            per_device_train_batch_size=4,
            num_train_epochs=1,
            logging_steps=2,
            **{**SGD, "learning_rate": 0.0},
        ),
        teacher=make_teacher(),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer._train_batch_size == 2 and trainer.state.global_step == 4
    for log in (log for log in trainer.state.log_history if "ce_loss" in log):
        assert log["loss"] == pytest.approx(0.9 * log["distill_loss"] + 0.1 * log["ce_loss"], abs=1e-4)


def test_model_init_makes_a_student_for_each_run(tmp_path, tokenizer):
    """Two runs of one trainer are the same run; the teacher is kept. `resume_from_checkpoint=True` finds the last."""
    made = Counter()

    def model_init():
        made["students"] += 1
        return make_t5(dropout=0.2)

    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model_init=model_init,
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=3,
        data_seed=3,
    )
    teacher, runs = trainer.teacher.model, []
    for resume in (None, None, True):
        trainer.train(resume_from_checkpoint=resume)
        runs.append((logged(trainer, "distill_loss"), [p.detach().clone() for p in trainer.model.parameters()]))
    assert made["students"] >= 3 and trainer.teacher.model is teacher
    for losses, weights in runs[1:]:
        assert losses == runs[0][0] and len(losses) == 4
        assert all(map(torch.equal, weights, runs[0][1]))


@pytest.mark.parametrize(
    ("before", "trial"),
    [
        ({}, {"divergence": "reverse_kl"}),
        ({"divergence": "generalized_jsd"}, {"jsd_beta": 0.1}),
        ({"divergence": "skew_kl"}, {"skew_alpha": 0.8}),
        ({}, {"distill_weight": 0.5, "distill_temperature": 3.0}),
        ({"hidden_state_weight": 0.5}, {"hidden_state_weight": 2.0}),
    ],
)
def test_a_trial_of_a_search_trains_as_it_is_told(tmp_path, tokenizer, before, trial):
    """As a trainer of its own with the same arguments."""
    options = {"model_init": lambda trial=None: make_t5(), "max_steps": 2, "logging_steps": 1}
    searching = make_trainer(tmp_path / "search", tokenizer, **options, **before)
    searching.hp_search_backend = HPSearchBackend.WANDB  # as `hyperparameter_search` sets it
    searching._hp_search_setup(dict(trial))
    searching.train()
    fresh = make_trainer(tmp_path / "fresh", tokenizer, **options, **{**before, **trial})
    fresh.train()
    assert logged(searching) == logged(fresh) and len(logged(fresh)) == 2
    started = make_trainer(tmp_path / "started", tokenizer, **options, **before)
    started.train()
    assert logged(started) != logged(fresh)


@pytest.mark.parametrize("kind", [DistillationTrainingArguments, Seq2SeqTrainingArguments])
@pytest.mark.parametrize(
    ("trial", "name"),
    [({"freeze_encoder": True}, "freeze_encoder"), ({"hidden_state_weight": 1.0}, "hidden_state_weight")],
)
def test_a_trial_may_not_set_what_has_no_effect(tmp_path, tokenizer, trial, name, kind):
    trainer = make_trainer(tmp_path, tokenizer, model_init=lambda trial=None: make_t5(), max_steps=1, kind=kind)
    trainer.hp_search_backend = HPSearchBackend.WANDB
    with pytest.raises(ValueError, match=f"a trial sets {name}=.*leave it out of the search"):
        trainer._hp_search_setup(trial)


@pytest.mark.parametrize(
    ("measures", "compute_objective", "objective"),
    [
        ({}, None, "loss"),
        ({"score": 3.0, "other": 0.5}, None, 3.5),
        ({"score": 3.0}, lambda metrics: metrics["eval_ce_loss"], "ce_loss"),
    ],
)
def test_a_search_is_judged_by_the_loss_or_by_measures(
    tmp_path, tokenizer, monkeypatch, measures, compute_objective, objective
):
    """Never by the sum of the terms of the loss, which `Trainer` would take for measures."""
    found = {}

    class OneTrial:
        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, direction):
            found.update(trainer.evaluate())
            return BestRun("0", trainer.compute_objective(found), {})

    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.WANDB, OneTrial)
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model_init=lambda trial=None: make_t5(),
        hidden_state_weight=0.5,
        compute_metrics=(lambda prediction: dict(measures)) if measures else None,
    )
    best = trainer.hyperparameter_search(lambda trial: {}, compute_objective, n_trials=1, backend="wandb")
    assert best.objective == (found[f"eval_{objective}"] if isinstance(objective, str) else objective)
    assert {"eval_ce_loss", "eval_distill_loss", "eval_hidden_state_loss", "eval_teacher_agreement"} <= found.keys()


def test_measures_may_evaluate_other_rows(tmp_path, tokenizer):
    """Each evaluation has the numbers that it has alone."""
    alone = make_trainer(tmp_path, tokenizer)
    whole, probe = alone.evaluate(), alone.evaluate(ROWS[:2], metric_key_prefix="probe")
    inner = []

    def look_at_a_probe(prediction):
        if not inner:
            inner.append({})  # the probe is measured too
            inner[0].update(trainer.evaluate(ROWS[:2], metric_key_prefix="probe"))
        return {}

    trainer = make_trainer(tmp_path, tokenizer, compute_metrics=look_at_a_probe)
    outer = trainer.evaluate()
    for ours, expected, prefix in ((outer, whole, "eval"), (inner[0], probe, "probe")):
        for name in ("loss", "ce_loss", "distill_loss", "teacher_agreement"):
            assert ours[f"{prefix}_{name}"] == pytest.approx(expected[f"{prefix}_{name}"], rel=1e-6), name
    assert abs(whole["eval_loss"] - probe["probe_loss"]) > 1e-3


class ListsForLoaders(DistillationTrainer):
    """Loaders of a script's own need be no `DataLoader`: here they are lists, which have no `dataset`."""

    def get_train_dataloader(self):
        return list(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None):
        return list(super().get_eval_dataloader(eval_dataset))


def test_loaders_of_a_subclass_may_be_lists(tmp_path, tokenizer):
    found = []
    for cls in (DistillationTrainer, ListsForLoaders):
        options = {"teacher": make_teacher(), "train_dataset": ROWS, "eval_dataset": ROWS}
        trainer = cls(make_t5(), arguments(tmp_path, max_steps=1, **SGD), processing_class=tokenizer, **options)
        before = trainer.evaluate()
        trainer.train()
        found.append([before["eval_loss"], before["eval_teacher_agreement"], *logged(trainer)])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


class WithPenalty(DistillationTrainer):
    """Twice the loss, and the mean of the labels."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        found = super().compute_loss(model, inputs, return_outputs, **kwargs)
        labels = inputs["labels"]
        added = labels[labels != -100].float().mean()
        return (2 * found[0] + added, found[1]) if return_outputs else 2 * found + added


@pytest.mark.parametrize("settings", [{}, {"predict_with_generate": True, "generation_max_length": 4}])
def test_the_loss_of_a_subclass_is_the_evaluations_too(tmp_path, tokenizer, settings):
    """A mean over target tokens, as ours; the terms stay what they are."""
    options = {"teacher": make_teacher(), "train_dataset": ROWS, "eval_dataset": ROWS, "processing_class": tokenizer}
    sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 3}
    plain, other = (
        cls(make_t5(), arguments(tmp_path, max_steps=1, **sizes, **settings, **SGD), **options)
        for cls in (DistillationTrainer, WithPenalty)
    )
    expected, found = plain.evaluate(), other.evaluate()
    assert found["eval_ce_loss"] == expected["eval_ce_loss"]
    labels = [token for row in ROWS for token in row["labels"]]
    assert found["eval_loss"] == pytest.approx(2 * expected["eval_loss"] + np.mean(labels), rel=1e-6)
    other.train()
    assert logged(other)[0] == pytest.approx(found["eval_loss"], rel=1e-4)  # of the same rows, before the step
    assert other.evaluate([{"input_ids": [5], "labels": [-100]}, *ROWS[:1]])["eval_loss"] > 2


def test_the_students_own_tokenizer_is_found_where_it_is_made(tmp_path, tokenizer):
    def model_init():
        student = make_t5()
        student.tokenizer = tokenizer
        return student

    trainer = make_trainer(tmp_path, None, model_init=model_init, rows=TEXTS, teacher_processing_class=tokenizer)
    assert trainer.evaluate()["eval_loss"] > 0


def test_rows_without_a_target_have_no_loss(tmp_path, tokenizer, warnings_of):
    """As with `Seq2SeqTrainer`, and never the best loss of all."""
    dead = [{"input_ids": [5, 6, 7], "labels": [-100, -100]}] * 4
    base = make_trainer(tmp_path / "base", tokenizer, cls=Seq2SeqTrainer)
    ours = make_trainer(tmp_path / "ours", tokenizer)
    assert np.isnan(base.evaluate(dead)["eval_loss"])
    found = ours.evaluate(dead)
    assert all(np.isnan(found[f"eval_{name}"]) for name in ("loss", "ce_loss", "distill_loss", "teacher_agreement"))
    assert any("no row of the data set to evaluate (eval) has a target token" in said for said in warnings_of())
    some = ours.evaluate(dead + ROWS[:4])
    assert some["eval_ce_loss"] == pytest.approx(ours.evaluate(ROWS[:4])["eval_ce_loss"], rel=1e-5)
