"""Cached teachers: against the live one, against explicit distributions, and after everything that can go wrong."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import torch
from distillation_toys import arguments, make_t5, make_teacher, ragged_rows, write_teacher
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizer_toys import wordpiece
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_encdec_distill import DistillationTrainer, RopeEncDecForConditionalGeneration
from hf_encdec_distill.distillation.alignment.vocabularies import SharedVocabulary
from hf_encdec_distill.distillation.losses import DIVERGENCES, forward_kl, select_divergence
from hf_encdec_distill.distillation.teachers.capture import capture
from hf_encdec_distill.distillation.teachers.live import LiveTeacher
from hf_encdec_distill.distillation.teachers.recorded import CachedTeacher
from hf_encdec_distill.distillation.teachers.recorded_losses import sampled_forward_kl, top_k_divergence
from hf_encdec_distill.distillation.teachers.shards import file_digest


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


ROWS = ragged_rows(13)
TARGETS = sum(len(row["labels"]) for row in ROWS)


def make_cache(folder, tokenizer, rows=ROWS, teacher=None, **options):
    teacher = LiveTeacher(teacher or make_teacher())
    return capture(teacher, rows, folder, tokenizer, batch_size=4, progress=False, **options)


def logits_pair(rows=6, vocabulary=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    return student, teacher


# The losses ----------------------------------------------------------------------------------------------------------


def top_k(teacher, k, temperature=1.0):
    log_probs = torch.log_softmax(teacher / temperature, -1)
    values, ids = log_probs.topk(k, -1)
    return ids, values, torch.log1p(-values.exp().sum(-1))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_is_the_divergence_of_the_merged_events(name, temperature):
    student, teacher = logits_pair()
    ids, log_probs, tail = top_k(teacher, 4, temperature)
    divergence = select_divergence(name, 0.3, 0.2)
    ours = top_k_divergence(student, ids, log_probs, tail, divergence, temperature)

    def merged(logits):
        probs = torch.softmax(logits / temperature, -1)
        kept = probs.gather(-1, ids)
        return torch.cat((kept, 1 - kept.sum(-1, keepdim=True)), -1).log()

    torch.testing.assert_close(ours, divergence(merged(student), merged(teacher)))
    assert (ours <= divergence(student, teacher, temperature) + 1e-12).all()  # data processing inequality
    same = top_k_divergence(teacher, ids, log_probs, tail, divergence, temperature)
    torch.testing.assert_close(same, torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: top_k_divergence(logits, ids, log_probs, tail, divergence, temperature), student
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_of_all_tokens_is_dense(name):
    student, teacher = logits_pair()
    student.requires_grad_()
    ids, log_probs, _ = top_k(teacher, 9)
    ours = top_k_divergence(student, ids, log_probs, torch.full((6,), -torch.inf), select_divergence(name))
    dense = select_divergence(name)(student, teacher)
    torch.testing.assert_close(ours, dense)
    for gradient in torch.autograd.grad(ours.sum() - dense.sum(), student):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_without_its_tail_a_student_could_put_mass_elsewhere():
    """All of the student's mass on a token that the teacher's top 2 does not name: the tail says what that costs."""
    teacher = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    student = torch.tensor([[0.05, 0.03, 0.9, 0.02]]).log()
    ours = top_k_divergence(student, *top_k(teacher, 2))
    by_hand = kl_divergence(Categorical(torch.tensor([0.5, 0.3, 0.2])), Categorical(torch.tensor([0.05, 0.03, 0.92])))
    torch.testing.assert_close(ours, by_hand[None])


def test_ids_that_the_student_lacks_are_taken_out_of_top_k():
    student, teacher = logits_pair(vocabulary=9)
    ids, log_probs, tail = top_k(teacher, 4)
    student[:, 5] = -torch.inf  # an id that only one side has
    ours = top_k_divergence(student[:, :7], ids, log_probs, tail)  # and the student ends at 7

    def merged(logits):
        probs = logits.exp()
        probs[:, 5], probs[:, 7:] = 0, 0
        kept = torch.where(ids < 7, probs.gather(-1, ids), 0.0)
        return kept, probs

    kept, probs = merged(torch.log_softmax(student, -1))
    student_events = torch.cat((kept, (probs.sum(-1) - kept.sum(-1))[:, None]), -1)
    of_teacher = torch.where((ids < 7) & (ids != 5), log_probs.exp(), 0.0)
    teacher_events = torch.cat((of_teacher, tail.exp()[:, None]), -1)
    torch.testing.assert_close(ours, kl_divergence(Categorical(teacher_events), Categorical(student_events)))


@pytest.mark.parametrize("power", [1.0, 0.7, 1.3])
def test_samples_are_unbiased(power):
    """The expectation over what is drawn, taken exactly: value and gradient are those of the dense KL."""
    student, teacher = logits_pair()
    student.requires_grad_()
    p = torch.softmax(teacher / 1.7, -1)
    proposal = p**power / (p**power).sum(-1, keepdim=True)
    expected = 0.0
    for token in range(9):
        ids = torch.full((6, 1), token)
        weights = p[:, [token]] / proposal[:, [token]]
        loss = sampled_forward_kl(student, ids, p[:, [token]].log(), weights, 1.7)
        expected = expected + proposal[:, token] * loss
    dense = forward_kl(student, teacher, 1.7)
    torch.testing.assert_close(expected, dense)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), student)[0] for v in (expected, dense)))


# Training from a cache -----------------------------------------------------------------------------------------------


def train(folder, teacher, tokenizer, rows=ROWS, student=None, **changed):
    settings = {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 1, "per_device_train_batch_size": 4}
    trainer = DistillationTrainer(
        student or make_t5(),
        arguments(folder, **{**settings, **changed}),
        teacher=teacher,
        train_dataset=rows,
        eval_dataset=rows[:6],
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "kind, k, divergence, tolerance",
    [("top_k", 280, "generalized_jsd", 1e-5), ("dense", 1, "reverse_kl", 2e-3), ("top_k", 279, "skew_kl", 1e-5)],
)
@pytest.mark.parametrize("chunk_size", [1000, 3])
def test_all_of_the_distribution_trains_as_the_live_teacher(
    tmp_path, tokenizer, kind, k, divergence, tolerance, chunk_size
):
    assert make_cache(tmp_path / "cache", tokenizer, kind=kind, k=k) == len(ROWS)
    settings = {"divergence": divergence, "loss_chunk_size": chunk_size}
    live = train(tmp_path / "live", make_teacher(), tokenizer, **settings)
    cached = train(tmp_path / "cached", tmp_path / "cache", tokenizer, **settings)
    assert isinstance(cached.teacher, CachedTeacher)
    for (name, ours), theirs in zip(cached.model.named_parameters(), live.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)
    ours, theirs = cached.evaluate(), live.evaluate()
    for name in ("eval_loss", "eval_ce_loss", "eval_distill_loss", "eval_teacher_agreement"):
        assert ours[name] == pytest.approx(theirs[name], rel=2 * tolerance)


@pytest.mark.parametrize("kind, more", [("top_k", {}), ("sampled", {}), ("sampled", {"proposal_power": 0.6})])
def test_part_of_the_distribution_gives_the_loss_by_hand(tmp_path, tokenizer, kind, more):
    make_cache(tmp_path / "cache", tokenizer, kind=kind, k=5, rounds=5, temperature=2.0, **more)
    args = arguments(tmp_path, distill_weight=1.0, distill_temperature=2.0)
    trainer = DistillationTrainer(
        make_t5(), args, teacher=tmp_path / "cache", processing_class=tokenizer, train_dataset=ROWS
    )
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(ROWS[3:7]))
    expected = []
    student, teacher, record = make_t5(), make_teacher(), CachedTeacher(tmp_path / "cache")
    for row in ROWS[3:7]:
        source, target = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            sequence = torch.cat((source, target), 1)
            log_p = torch.log_softmax(teacher(sequence).logits[0, source.shape[1] - 1 : -1] / 2, -1)
            log_q = torch.log_softmax(student(input_ids=source, labels=target).logits[0] / 2, -1)
        if kind == "top_k":
            ids = log_p.topk(5).indices
            p, q = (
                torch.cat((x.gather(1, ids), (1 - x.gather(1, ids).sum(1))[:, None]), 1)
                for x in (log_p.exp(), log_q.exp())
            )
            expected.append((p * (p / q).log()).sum(1))
        else:
            columns = torch.arange(source.shape[1] - 1, sequence.shape[1] - 1)
            scores = record.scores(
                sequence, torch.ones_like(sequence), torch.zeros_like(columns), columns, trainer._vocabulary
            )
            assert len(scores.ids) == len(columns) and scores.ids.shape[1] <= 5
            used = scores.weights > 0
            ours, theirs = (torch.where(used, x.gather(1, scores.ids), 0.0) for x in (log_p, log_q))
            torch.testing.assert_close(scores.log_probs, ours, rtol=1e-5, atol=1e-5)
            power = more.get("proposal_power", 1.0)
            log_proposal = power * log_p - torch.logsumexp(power * log_p, 1, keepdim=True)
            counts = 5 * scores.weights * (log_proposal - log_p).exp().gather(1, scores.ids)
            torch.testing.assert_close(counts, counts.round(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(counts.sum(1), torch.full((len(columns),), 5.0), rtol=1e-4, atol=1e-4)
            expected.append((scores.weights * (ours - theirs)).sum(1))
    torch.testing.assert_close(loss, 4 * torch.cat(expected).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_samples_are_drawn_from_the_teacher(tmp_path, tokenizer, power):
    """4,000 draws at one position against the probabilities of the proposal, within five standard deviations; the mean
    loss against the dense one; and the same draws in whatever order rows are captured."""
    row = ROWS[0]
    options = {"kind": "sampled", "rounds": 4000, "proposal_power": power}
    make_cache(tmp_path / "one", tokenizer, rows=[row], **options)
    make_cache(tmp_path / "two", tokenizer, rows=[ROWS[1], row], **options)
    sequence = torch.tensor([row["input_ids"] + row["labels"]])
    columns = torch.arange(len(row["input_ids"]) - 1, sequence.shape[1] - 1)
    where = (
        sequence,
        torch.ones_like(sequence),
        torch.zeros_like(columns),
        columns,
        SharedVocabulary.between(280, 280),
    )
    one, two = (CachedTeacher(tmp_path / name).scores(*where) for name in ("one", "two"))
    first, second = (
        torch.zeros(len(columns), 280).scatter_add(1, scores.ids.long(), scores.weights) for scores in (one, two)
    )
    # Rows beside it move the rounding, and a draw that falls between two tokens then goes to the other one.
    assert ((first - second).abs() > 1e-4 * torch.maximum(first, second)).sum() <= 2
    logits = make_teacher()(sequence).logits[0, columns].detach()
    assert torch.equal(one.top(slice(None)), logits.argmax(-1))
    probs = torch.softmax(logits[0], -1)
    proposal = probs**power / (probs**power).sum()
    used = one.weights[0] > 0
    ids = one.ids[0, used]
    assert len(ids.unique()) == len(ids)
    counts = torch.zeros(280).index_add(0, ids, 4000 * one.weights[0, used] * (proposal / probs)[ids])
    spread = (4000 * proposal * (1 - proposal)).sqrt() + 1
    assert ((counts - 4000 * proposal).abs() <= 5 * spread).all()
    student = torch.randn(logits.shape)
    estimate = one.divergence(student, slice(None), forward_kl, 1.0)
    assert (estimate - forward_kl(student, logits)).abs().max() < 0.5  # of some 5 nats


@pytest.mark.parametrize("kind", ["top_k", "sampled", "dense"])
def test_a_batch_without_targets_costs_nothing(tmp_path, tokenizer, kind):
    make_cache(tmp_path / "cache", tokenizer, kind=kind)
    trainer = DistillationTrainer(
        make_t5(), arguments(tmp_path), teacher=tmp_path / "cache", processing_class=tokenizer, train_dataset=ROWS
    )
    batch = trainer.data_collator(ROWS[:2])
    loss = trainer.compute_loss(trainer.model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert loss.item() == 0.0


def test_rows_may_be_shuffled_left_out_and_padded_on_either_side(tmp_path, make_bpe_tokenizer):
    right = make_bpe_tokenizer(pad_token="<|endoftext|>")
    make_cache(tmp_path / "cache", right, k=280)
    left = make_bpe_tokenizer(pad_token="<|endoftext|>")
    left.padding_side = "left"
    rows = [ROWS[index] for index in (7, 2, 11)]
    for tokenizer in (right, left):
        losses = []
        for teacher in (tmp_path / "cache", make_teacher()):
            trainer = DistillationTrainer(
                make_t5(), arguments(tmp_path), teacher=teacher, processing_class=tokenizer, train_dataset=rows
            )
            losses.append(trainer.compute_loss(trainer.model, trainer.data_collator(rows)))
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("template", ["{source}\n# In short:", None])
def test_text_rows_of_a_merged_student(tmp_path, make_bpe_tokenizer, template):
    """Without any template it starts from a token of its own, which a capture cannot guess."""
    teacher = write_teacher(tmp_path / "teacher", make_bpe_tokenizer(chat_template=None))
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, encoder_num_hidden_layers=3, decoder_num_hidden_layers=2, prompt_template=template
    )
    live = LiveTeacher.load(teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    rows = [{"source": f"def f{i}(): return {i}", "target": f"Return {i}."} for i in range(9)]
    options = {"k": len(tokenizer), "progress": False, "prompt_template": template}
    start = {"start_token_id": student.config.decoder_start_token_id} if template is None else {}
    capture(live, rows, tmp_path / "cache", tokenizer, **options, **start)
    losses = []
    for source in (str(tmp_path / "cache"), str(teacher)):
        trainer = DistillationTrainer(
            student, arguments(tmp_path, prompt_template=template), teacher=source, train_dataset=rows
        )
        losses.append(trainer.compute_loss(trainer.model, trainer.data_collator(rows)))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    if template is None:
        capture(live, rows, tmp_path / "other", tokenizer, **options)
        trainer = DistillationTrainer(
            student, arguments(tmp_path), teacher=str(tmp_path / "other"), train_dataset=rows
        )
        with pytest.raises(ValueError, match="not in the cache.*start_token_id"):
            trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    else:
        with pytest.raises(ValueError, match="prompt_template=None.*In short"):
            DistillationTrainer(student, arguments(tmp_path), teacher=str(tmp_path / "cache"), train_dataset=rows)


# What goes wrong -----------------------------------------------------------------------------------------------------


def test_a_capture_goes_on_where_it_was_stopped(tmp_path, tokenizer, monkeypatch):
    asked = []
    logits_at = LiveTeacher.logits_at

    def spy(self, ids, mask, rows, columns, **options):
        asked.append(len(rows))
        return logits_at(self, ids, mask, rows, columns, **options)

    monkeypatch.setattr(LiveTeacher, "logits_at", spy)
    assert make_cache(tmp_path / "cache", tokenizer, rows=ROWS[:8], rows_per_shard=3) == 8
    (tmp_path / "cache" / "partial-000-torn").write_bytes(b"torn")
    asked.clear()
    assert make_cache(tmp_path / "cache", tokenizer, rows=ROWS, rows_per_shard=3) == 5
    assert sum(asked) == sum(len(row["labels"]) for row in ROWS[8:])
    assert not list((tmp_path / "cache").glob("partial-*"))
    assert len(CachedTeacher(tmp_path / "cache")) == len(ROWS)
    assert make_cache(tmp_path / "cache", tokenizer) == 0


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_shard_is_found_and_captured_again(tmp_path, tokenizer, damage):
    make_cache(tmp_path / "cache", tokenizer, rows_per_shard=4)
    shard = sorted((tmp_path / "cache").glob("shard-*"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content if damage == "flipped" else content[:-1])
    for use in (lambda: CachedTeacher(tmp_path / "cache"), lambda: make_cache(tmp_path / "cache", tokenizer)):
        with pytest.raises(ValueError, match=f"{shard.name} is not what was written.*delete it"):
            use()
    shard.unlink()
    assert make_cache(tmp_path / "cache", tokenizer) == 4
    assert len(CachedTeacher(tmp_path / "cache")) == len(ROWS)


def test_another_teacher_tokenizer_template_or_kind_is_refused(tmp_path, tokenizer, make_bpe_tokenizer):
    make_cache(tmp_path / "cache", tokenizer)
    before = sorted((tmp_path / "cache").iterdir())
    other = make_bpe_tokenizer(pad_token="<|endoftext|>")
    other.add_tokens("more")
    for name, changed in {
        "teacher_weights": {"teacher": make_teacher(seed=5)},
        "teacher_dtype": {"teacher": make_teacher().bfloat16()},
        "kind": {"kind": "dense"},
        "k": {"k": 7},
        "temperature": {"temperature": 2.0},
        "prompt_template": {"prompt_template": "{source}!"},
    }.items():
        with pytest.raises(ValueError, match=f"captured with {name}="):
            make_cache(tmp_path / "cache", tokenizer, **changed)
    with pytest.raises(ValueError, match="captured with tokenizer="):
        make_cache(tmp_path / "cache", other)
    assert sorted((tmp_path / "cache").iterdir()) == before
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ValueError, match="not empty and no cache"):
        make_cache(tmp_path / "used", tokenizer)


def test_the_teachers_tokenizer_in_a_cache_is_for_both_versions_of_transformers(tmp_path, tokenizer):
    make_cache(tmp_path / "cache", tokenizer)
    config = json.loads((tmp_path / "cache" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("k", "4", "has the str '4' as 'k', expected type integer"),
        ("k", None, "has the NoneType None as 'k', expected type integer"),
        ("k", -1, "has the int -1 as 'k', expected a finite number above 0"),
        ("k", 2, "has k=2, and its first record"),
        ("vocab_size", 0, "has the int 0 as 'vocab_size', expected a finite number above 0"),
        ("temperature", math.nan, "has the float nan as 'temperature', expected a finite number above 0"),
        ("temperature", 10**400, "as 'temperature', expected a finite number above 0"),
        ("prompt_template", 5, "has the int 5 as 'prompt_template', expected type text"),
        ("prompt_date", 5, "has the int 5 as 'prompt_date', expected type text"),
        ("teacher_input_names", "pixel_values", "as 'teacher_input_names', expected type list"),
        ("teacher_input_names", [3], "has 3 among its 'teacher_input_names', expected names of columns"),
        ("server", None, "has the NoneType None as 'server', expected type object"),
        ("server", {"model": "m", "software": "s"}, "server, has no 'probe', expected one of type text"),
    ],
)
def test_a_manifest_of_a_stranger_is_checked_field_by_field(tmp_path, tokenizer, field, value, message):
    folder = tmp_path / "cache"
    capture(LiveTeacher(make_teacher()), ragged_rows(2), folder, tokenizer, k=4, progress=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, field: value}))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        CachedTeacher(folder)
    assert str(folder / "manifest.json") in str(error.value)


def rewrite(folder, name, change):
    """A cache in which one column is another, in shards that have the names of their bytes."""
    for shard in folder.glob("shard-*.parquet"):
        table = pyarrow.parquet.read_table(shard)
        kind, values = table.schema.field(name).type, [change(value) for value in table[name].to_pylist()]
        same = isinstance(values[0][0], int if pyarrow.types.is_integer(kind.value_type) else float)
        column = pyarrow.array(values, kind if same else None)
        table = table.set_column(table.schema.get_field_index(name), name, column).replace_schema_metadata(None)
        pyarrow.parquet.write_table(table, shard)
        shard.rename(shard.with_name(f"{shard.stem.rpartition('-')[0]}-{file_digest(shard)}.parquet"))


@pytest.mark.parametrize(
    ("kind", "column", "change", "message"),
    [
        ("top_k", "ids", lambda ids: [10**6] * len(ids), "has ids that no teacher"),
        ("top_k", "ids", lambda ids: [-1] * len(ids), "has ids that no teacher"),
        ("top_k", "ids", lambda ids: [one + 0.5 for one in ids], "has ids as"),
        ("top_k", "ids", lambda ids: ["a"] * len(ids), "has ids as"),
        ("top_k", "log_probs", lambda values: [50.0] * len(values), "has log_probs that no teacher"),
        ("top_k", "log_probs", lambda values: [math.nan] * len(values), "has log_probs that no teacher"),
        ("top_k", "log_probs", lambda values: values[:-1], "has log_probs that no teacher"),
        ("top_k", "tail", lambda values: values[:-1], "its first record"),
        ("sampled", "weights", lambda values: [-5.0] * len(values), "has weights that no teacher"),
        ("sampled", "distinct", lambda values: [0] * len(values), "has distinct that no teacher"),
        ("sampled", "distinct", lambda values: [2**31 - 1] * len(values), "has distinct that no teacher"),
        ("dense", "log_probs", lambda values: values[:-1], "has log_probs"),
    ],
)
def test_a_record_that_no_teacher_gives_is_refused(tmp_path, tokenizer, kind, column, change, message):
    make_cache(tmp_path / "cache", tokenizer, kind=kind)
    rewrite(tmp_path / "cache", column, change)
    with pytest.raises(ValueError, match=message):
        trainer = DistillationTrainer(
            make_t5(),
            arguments(tmp_path),
            teacher=tmp_path / "cache",
            processing_class=tokenizer,
            train_dataset=ROWS,
        )
        trainer.compute_loss(make_t5(), trainer.data_collator(ROWS[:2]))


def test_what_a_cache_cannot_give_is_said_before_training(tmp_path, tokenizer):
    make_cache(tmp_path / "sampled", tokenizer, kind="sampled")
    make_cache(tmp_path / "cool", tokenizer, temperature=0.5)

    def trainer(name, **changed):
        return DistillationTrainer(
            make_t5(),
            arguments(tmp_path, **changed),
            teacher=tmp_path / name,
            processing_class=tokenizer,
            train_dataset=ROWS,
        )

    with pytest.raises(ValueError, match="divergence='reverse_kl'.*samples"):
        trainer("sampled", divergence="reverse_kl")
    with pytest.raises(ValueError, match=r"distill_temperature=1.0.*at 0.5"):
        trainer("cool")
    strangers = ragged_rows(3, seed=9)
    with pytest.raises(ValueError, match=r"2 of 3 rows of the batch are not in the cache.*capture this data set"):
        trainer("sampled").compute_loss(make_t5(), trainer("sampled").data_collator([ROWS[0], *strangers[1:]]))


def test_rows_without_target_are_left_out_and_bad_input_is_named(tmp_path, tokenizer):
    masked = {**ROWS[0], "labels": [-100] * len(ROWS[0]["labels"])}
    assert make_cache(tmp_path / "cache", tokenizer, rows=[masked, *ROWS[1:3]]) == 2
    with pytest.raises(ValueError, match="no rows"):
        make_cache(tmp_path / "none", tokenizer, rows=[])
    with pytest.raises(ValueError, match="kind='top'"):
        make_cache(tmp_path / "none", tokenizer, kind="top")
    with pytest.raises(ValueError, match="k=0"):
        make_cache(tmp_path / "none", tokenizer, k=0)
    broken = make_teacher()
    with torch.no_grad():
        broken.model.embed_tokens.weight[ROWS[5]["input_ids"][0]] = torch.nan
    with pytest.raises(ValueError, match=r"logits for row \d+ of train are not finite"):
        make_cache(tmp_path / "nan", tokenizer, teacher=broken)
    assert not list((tmp_path / "nan").glob("partial-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_policy": "mask_paddings"}, "vocab_policy='mask_paddings' is unknown; choose one of mask_padding,"),
        ({"max_source_length": 0}, "max_source_length=0 is out of range"),
        ({"max_target_length": -5}, "max_target_length=-5 is out of range"),
    ],
)
def test_what_a_capture_cannot_mean_is_refused_before_there_is_a_folder(tmp_path, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        make_cache(tmp_path / "none", tokenizer, **options)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("policy", ["mask_padding", "strict"])
def test_a_student_of_other_ids_is_refused_without_the_policy_for_it(tmp_path, tokenizer, policy):
    with pytest.raises(ValueError, match="vocab_policy='id_map' if its tokens are the teacher's under other ids"):
        make_cache(tmp_path / "none", tokenizer, student_tokenizer=wordpiece(), vocab_policy=policy)
    assert not (tmp_path / "none").exists()
    make_cache(tmp_path / "same", tokenizer, student_tokenizer=tokenizer, vocab_policy=policy)


def test_a_full_disk_loses_no_shard(tmp_path, tokenizer, monkeypatch):
    write, calls = pyarrow.parquet.write_table, []

    def fails_late(table, stream):
        calls.append(1)
        if len(calls) >= 3:
            stream.write(b"half of it")
            raise OSError(28, "No space left on device")
        return write(table, stream)

    with monkeypatch.context() as patch:
        patch.setattr(pyarrow.parquet, "write_table", fails_late)
        with pytest.raises(OSError, match="No space left"):
            make_cache(tmp_path / "cache", tokenizer, rows_per_shard=4)
    assert len(CachedTeacher(tmp_path / "cache")) == 8
    assert not list((tmp_path / "cache").glob("partial-*"))
    assert make_cache(tmp_path / "cache", tokenizer) == len(ROWS) - 8


@pytest.mark.parametrize("loaded_by", ["peft", "transformers"])
def test_another_adapter_on_the_same_base_is_refused(tmp_path, tokenizer, loaded_by):
    write_teacher(tmp_path / "base", tokenizer, layers=2)

    def teacher(name, seed, **changed):
        config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **changed})
        torch.manual_seed(seed)
        get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(
            tmp_path / name
        )
        if loaded_by == "transformers":  # a folder with adapter_config.json, as `teach --adapter` writes it
            return LiveTeacher.load(tmp_path / name).model
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / name)

    assert make_cache(tmp_path / "cache", tokenizer, teacher=teacher("one", 1)) == len(ROWS)
    assert make_cache(tmp_path / "cache", tokenizer, teacher=teacher("the same elsewhere", 1)) == 0
    base_alone = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for other in (teacher("other weights", 2), teacher("other scale", 1, lora_alpha=3), base_alone):
        with pytest.raises(ValueError, match="captured with teacher_adapter="):
            make_cache(tmp_path / "cache", tokenizer, teacher=other)
    row = ROWS[0]
    ids = torch.tensor([row["input_ids"] + row["labels"]])
    live = teacher("one", 1)(ids).logits[0, len(row["input_ids"]) - 1 : -1].detach()
    columns = torch.arange(len(row["input_ids"]) - 1, ids.shape[1] - 1)
    scores = CachedTeacher(tmp_path / "cache").scores(
        ids, torch.ones_like(ids), torch.zeros_like(columns), columns, SharedVocabulary.between(280, 280)
    )
    torch.testing.assert_close(scores.log_probs, torch.log_softmax(live, -1).topk(32).values, rtol=1e-4, atol=1e-5)


# For each operation on the files of the folder a process that dies right before it, and another one that goes on.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import datasets, pyarrow.parquet, torch
from transformers import AutoTokenizer
from hf_encdec_distill.distillation import LiveTeacher, TargetGeneration, capture
from hf_encdec_distill.distillation.teachers import targets
from hf_encdec_distill.distillation.teachers.shards import read_keys

torch.set_num_threads(1)
datasets.disable_progress_bars()
folder, teacher = Path(sys.argv[1]), sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(teacher)
rows = [{"source": f"def f{i}"} for i in range(2)]
answers = {"def f0": [40, 2, 0], "def f1": [43, 44, 45]}  # EOS is 2; the second has none
targets._write = lambda teacher, requests, *_: torch.tensor([answers[request.source] for request in requests])


def child(kill_at):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    count = 0

    def hook(event, args):
        nonlocal count
        if event in ("open", "os.rename", "os.link", "os.remove", "os.mkdir") and str(args[0]).startswith(str(folder)):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        generation = TargetGeneration(max_new_tokens=3, keep="all")
        capture(
            LiveTeacher.load(teacher), rows, folder, tokenizer, generation=generation, batch_size=1, rows_per_shard=1,
            progress=False, prompt_template="{source}:",
        )
        left = sorted(file.name for file in folder.iterdir() if "shard-" not in file.name)
        kept = [pyarrow.parquet.read_table(file)["target"].to_pylist() for file in folder.glob("generated-*")]
        Path(sys.argv[3]).write_text(repr((read_keys(folder, "shard"), left, kept)))
        os._exit(0)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)


def result():
    return Path(sys.argv[3]).read_text()


assert child(None) == 0
expected, point = result(), 0
while True:
    shutil.rmtree(folder)
    point += 1
    if child(point) == 0:
        break
    assert child(None) == 0, point
    assert result() == expected, (point, result(), expected)
print(point, "points", expected)
"""


@pytest.mark.process
def test_killed_at_any_file_operation_it_goes_on(tmp_path, make_bpe_tokenizer, command):
    environment = command[0]
    teacher = write_teacher(tmp_path / "teacher", make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>"))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    words = [sys.executable, str(script), str(tmp_path / "cache"), str(teacher), str(tmp_path / "result")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert int(done.stdout.split(" points ")[0].split()[-1]) > 15, done.stdout


CAPTURE = """
import sys
from hf_encdec_distill.distillation import LiveTeacher, capture
from distillation_toys import make_teacher, ragged_rows
folder, rows = sys.argv[1], ragged_rows(int(sys.argv[2]))
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[3])
capture(LiveTeacher(make_teacher()), rows, folder, tokenizer, batch_size=2, rows_per_shard=2, progress=False)
"""


@pytest.fixture
def command(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "capture.py").write_text(CAPTURE)
    here = Path(__file__)
    paths = [str(here.parents[1]), str(Path(sys.modules["hf_encdec_distill"].__file__).parents[1])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "theirs"),
    }
    return environment, [str(tmp_path / "capture.py"), str(tmp_path / "cache")], str(tmp_path / "tokenizer")


@pytest.mark.process
def test_killed_at_any_moment_it_goes_on(tmp_path, tokenizer, command):
    environment, words, where = command
    rows, cache = 400, tmp_path / "cache"
    process = subprocess.Popen([sys.executable, *words, str(rows), where], env=environment)
    deadline = time.monotonic() + 120
    while len(list(cache.glob("shard-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    held = len(CachedTeacher(cache))
    assert 6 <= held < rows and held % 2 == 0
    assert json.loads((cache / "manifest.json").read_text())["kind"] == "top_k"
    teacher = LiveTeacher(make_teacher())
    assert capture(teacher, ragged_rows(rows), cache, tokenizer, progress=False) == rows - held
    assert len(CachedTeacher(cache)) == rows


# As above, on texts whose targets the teacher samples.
GENERATE = """
import os
import re
import sys
from hf_encdec_distill.distillation import LiveTeacher, TargetGeneration, capture
from transformers import AutoTokenizer
folder, count, teacher = sys.argv[1:]
# Two neighbours end alike, for the processes take turns and the toy teacher answers some endings only.
rows = [{"source": f"def f{i}(): return" + " x" * (i // 2 % 4)} for i in range(int(count))]
captured = capture(
    LiveTeacher.load(teacher), rows, folder, AutoTokenizer.from_pretrained(teacher), batch_size=2, rows_per_shard=2,
    generation=TargetGeneration(max_new_tokens=30, sampling_temperature=1.0, num_return_sequences=16, keep="all"),
    prompt_template="{source}:", progress=False,
)
os.write(1, f"{captured}\\n".encode())  # at once: two processes write to one pipe
"""


@pytest.mark.process
def test_two_processes_share_the_work(tmp_path, command, make_bpe_tokenizer):
    environment, _, _ = command
    teacher = write_teacher(tmp_path / "teacher", make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>"))
    (tmp_path / "generate.py").write_text(GENERATE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    answers = {}
    for name, words in (("one", []), ("two", launcher)):
        words = [*words, str(tmp_path / "generate.py"), str(tmp_path / name), "13", str(teacher)]
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = datasets.load_dataset(str(tmp_path / name))["train"]
        answers[name] = sorted(zip(rows["source"], rows["target"], strict=True))
        # Each process says how many rows all of them captured.
        assert {int(word) for word in done.stdout.split()} == {len(rows)} == {len(CachedTeacher(tmp_path / name))}
    assert answers["one"] == answers["two"]
    for prefix in ("shard", "generated-train"):
        processes = {shard.stem.split("-")[-3] for shard in (tmp_path / "two").glob(f"{prefix}-*")}
        assert processes == {"000", "001"}, prefix
