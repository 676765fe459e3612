"""Students whose ids, or whose tokens, are not the teacher's: against dense formulas and the student unchanged."""

import pytest
import torch
import torch.nn.functional as F
from distillation_toys import EOS, arguments, make_t5, make_teacher, ragged_rows, write_teacher
from tokenizer_toys import renumbered, unigram, wordpiece
from transformers import LlamaConfig, LlamaForCausalLM, T5ForConditionalGeneration

from hf_encdec_distill import DistillationTrainer, RopeEncDecForConditionalGeneration
from hf_encdec_distill.distillation.losses import select_divergence
from hf_encdec_distill.distillation.teachers.capture import capture
from hf_encdec_distill.distillation.teachers.live import LiveTeacher
from hf_encdec_distill.distillation.teachers.recorded import CachedTeacher
from hf_encdec_distill.distillation.teachers.recorded_losses import SampledScores, TopKScores
from hf_encdec_distill.distillation.teachers.signal import DenseScores
from hf_encdec_distill.models.either_version import save_teacher
from hf_encdec_distill.models.loading import load_teacher
from hf_encdec_distill.models.vocabulary import trim_tokenizer, trim_vocabulary


TEXT = [
    {"source": "def f(x): return x", "target": "Identity."},
    {"source": "def add(a, b): return a + b", "target": "Return the sum of two numbers."},
    {"source": "z", "target": "Zoé lit 日本 in a café."},
    {"source": "def g(): pass", "target": "a  b\n"},
]
FEW = [TEXT[0], TEXT[2], TEXT[3]]
ROWS = ragged_rows(6)
SIZE = 280  # of the tokenizer, the teacher and the plain student
OWN = 3  # tokens of the trimmed student that the teacher does not have


def of_own_ids(student, teacher_ids):
    """The same student with row `teacher_ids[i]` of its embedding at i."""
    config = type(student.config)(**{**student.config.to_dict(), "vocab_size": len(teacher_ids)})
    config.decoder_start_token_id = config.pad_token_id = teacher_ids.tolist().index(0)
    config.eos_token_id = teacher_ids.tolist().index(EOS)
    own = T5ForConditionalGeneration(config)
    own.load_state_dict(
        {name: value[teacher_ids] if len(value) == SIZE else value for name, value in student.state_dict().items()}
    )
    return own.eval()


def renamed(rows, teacher_ids):
    ids = {theirs: ours for ours, theirs in reversed([*enumerate(teacher_ids.tolist())])}
    return [{**row, **{name: [ids[i] for i in row[name]] for name in ("input_ids", "labels")}} for row in rows]


def make_trainer(tmp_path, student, rows, processing_class=None, teacher=None, teacher_tokenizer=None, **changed):
    return DistillationTrainer(
        student,
        arguments(tmp_path, per_device_eval_batch_size=2, **changed),
        teacher=teacher or make_teacher(),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processing_class,
        teacher_processing_class=teacher_tokenizer,
    )


def loss_and_gradient(trainer, rows):
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([dict(row) for row in rows]))
    loss.backward()
    return loss.detach(), trainer.model.get_input_embeddings().weight.grad


# id_map --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1000, 3])
def test_a_permuted_student_has_the_loss_of_the_plain_one(tmp_path, tokenizer, chunk_size):
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(7))
    settings = {"loss_chunk_size": chunk_size, "distill_weight": 0.8, "distill_temperature": 1.5}
    ids = order.argsort().tolist()
    permuted = renumbered(tokenizer, ids)
    assert permuted("def add")["input_ids"] == [ids[i] for i in tokenizer("def add")["input_ids"]]
    plain = make_trainer(tmp_path, make_t5(), ROWS, tokenizer, None, tokenizer, vocab_policy="strict", **settings)
    rows = renamed(ROWS, order)
    ours = make_trainer(
        tmp_path, of_own_ids(make_t5(), order), rows, permuted, None, tokenizer, vocab_policy="id_map", **settings
    )
    with pytest.raises(ValueError, match="different tokenizers.*vocab_policy='id_map'"):
        make_trainer(tmp_path, of_own_ids(make_t5(), order), rows, permuted, None, tokenizer)
    (loss, gradient), (other, expected) = loss_and_gradient(ours, rows), loss_and_gradient(plain, ROWS)
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected[order], rtol=1e-4, atol=1e-6)
    got, wanted = ours.evaluate(), plain.evaluate()
    for name in ("eval_loss", "eval_ce_loss", "eval_distill_loss", "eval_teacher_agreement"):
        assert got[name] == pytest.approx(wanted[name], rel=1e-5)


@pytest.fixture
def trimmed(tokenizer):
    """The student's tokenizer, and the teacher's id of each of its tokens but its OWN."""
    trimmed = trim_tokenizer(tokenizer, ["def add"])
    kept = torch.tensor(tokenizer.convert_tokens_to_ids(trimmed.convert_ids_to_tokens(range(len(trimmed)))))
    assert len(kept) < SIZE - 10
    trimmed.add_tokens([f"own{i}" for i in range(OWN)])
    return trimmed, kept


def make_trimmed(tmp_path, tokenizer, trimmed, rows=None, **changed):
    student = of_own_ids(make_t5(), torch.cat((trimmed[1], trimmed[1][:OWN])))
    rows = renamed(ROWS, trimmed[1]) if rows is None else rows
    return make_trainer(
        tmp_path, student, rows, trimmed[0], teacher_tokenizer=tokenizer, **{"vocab_policy": "id_map", **changed}
    )


def dense(student, kept, rows, divergence, temperature):
    """m D(p(. | S), q(. | S)) and CE, written out, and agreement: `[N]` each; `rows` have the teacher's ids."""
    terms, ce, agree = [], [], []
    teacher = make_teacher()
    for row, own in zip(rows, renamed(rows, kept), strict=True):
        target = torch.tensor(own["labels"])
        ours = student(input_ids=torch.tensor([own["input_ids"]]), labels=target[None]).logits[0]
        with torch.no_grad():
            theirs = teacher(torch.tensor([row["input_ids"] + row["labels"]])).logits[
                0, len(row["input_ids"]) - 1 : -1
            ]
        p = torch.softmax(theirs / temperature, -1)[:, kept]
        q = torch.softmax(ours / temperature, -1)[:, : len(kept)]
        mass = p.sum(-1)
        p, q = p / mass[:, None], q / q.sum(-1, keepdim=True)
        if divergence == "forward_kl":
            values = (p * (p / q).log()).sum(-1)
        elif divergence == "reverse_kl":
            values = (q * (q / p).log()).sum(-1)
        else:
            values = (p - q).abs().sum(-1) / 2
        terms.append(mass * values)
        ce.append(F.cross_entropy(ours, target, reduction="none"))
        agree.append((p.argmax(-1) == q.argmax(-1)).float())
    return torch.cat(terms), torch.cat(ce), torch.cat(agree)


@pytest.mark.parametrize("chunk_size", [1000, 3])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "total_variation"])
def test_a_trimmed_student_by_hand(tmp_path, tokenizer, trimmed, divergence, chunk_size):
    settings = {"divergence": divergence, "distill_temperature": 2.0, "distill_weight": 0.6}
    trainer = make_trimmed(tmp_path, tokenizer, trimmed, loss_chunk_size=chunk_size, **settings)
    loss, gradient = loss_and_gradient(trainer, trainer.train_dataset)
    reference = make_trimmed(tmp_path, tokenizer, trimmed).model
    terms, ce, agree = dense(reference, trimmed[1], ROWS, divergence, 2.0)
    expected = (0.6 * 4 * terms + 0.4 * ce).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, reference.get_input_embeddings().weight.grad, rtol=1e-3, atol=1e-5)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["eval_teacher_agreement"] == pytest.approx(agree.mean().item())


def test_a_cache_serves_a_trimmed_student(tmp_path, tokenizer, trimmed):
    """All of the distribution gives the live loss; a few of it those events, without what the student lacks."""
    live = make_trimmed(tmp_path, tokenizer, trimmed)
    rows = live.train_dataset
    options = {"student_tokenizer": trimmed[0], "vocab_policy": "id_map", "progress": False}
    for number, (kind, size, tolerance) in enumerate(
        (
            ("top_k", {"k": SIZE}, 1e-5),
            ("dense", {}, 2e-3),
            ("top_k", {"k": 12}, None),
            ("sampled", {"rounds": 9}, None),
        )
    ):
        folder = tmp_path / f"cache-{number}"
        capture(LiveTeacher(make_teacher()), rows, folder, tokenizer, kind=kind, **size, **options)
        cached = make_trimmed(tmp_path, tokenizer, trimmed, teacher=folder)
        losses = [t.compute_loss(t.model, t.data_collator([dict(r) for r in rows[1:4]])) for t in (live, cached)]
        if tolerance is not None:
            torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
            agreement = (t.evaluate()["eval_teacher_agreement"] for t in (live, cached))
            assert next(agreement) == next(agreement)
        else:
            assert torch.isfinite(losses[1]) and not torch.equal(*losses)


@pytest.mark.parametrize("name", ["forward_kl", "generalized_jsd"])
def test_recorded_tokens_that_the_student_lacks(tmp_path, tokenizer, trimmed, name):
    """Top k: shared ones and the tail are the events, weighed by their mass; the others are known to be outside."""
    trainer = make_trimmed(tmp_path, tokenizer, trimmed)
    vocabulary, kept = trainer._vocabulary, trimmed[1].tolist()
    lacking = next(i for i in range(SIZE) if i not in kept)
    generator = torch.Generator().manual_seed(5)
    teacher, student = (torch.randn(1, n, generator=generator, dtype=torch.float64) for n in (SIZE, len(kept) + OWN))
    recorded = torch.tensor([[kept[3], lacking, kept[0], kept[9]]])
    p = torch.softmax(teacher, -1)
    q = torch.softmax(student[:, : len(kept)], -1)
    tail = 1 - p[0, recorded[0]].sum()
    scores = TopKScores(recorded, p.log()[:, recorded[0]], tail.log()[None], vocabulary)
    ours = scores.divergence(student, slice(None), select_divergence(name), 1.0)
    events_p = torch.stack([p[0, kept[3]], p[0, kept[0]], p[0, kept[9]], tail])
    events_q = torch.stack([q[0, 3], q[0, 0], q[0, 9], 1 - q[0, [3, 0, 9]].sum()])
    mass = events_p.sum()
    expected = mass * select_divergence(name)(events_q.log()[None], (events_p / mass).log()[None])
    torch.testing.assert_close(ours, expected)
    order = sorted(range(len(kept)), key=kept.__getitem__)
    assert scores.top(slice(None)).item() == order.index(3)
    scores = TopKScores(recorded[:, 1:], p.log()[:, recorded[0, 1:]], tail.log()[None], vocabulary)
    assert scores.top(slice(None)).item() == order.index(0)  # the first that the student could say
    # Samples: the gradient is that of the dense loss, in expectation over what is drawn.
    student.requires_grad_()
    values = 0.0
    for token in range(SIZE):
        ids = torch.tensor([[token]])
        drawn = SampledScores(ids, p.log()[:, [token]], torch.ones(1, 1), ids[:, 0], vocabulary)
        values = values + p[0, token] * drawn.divergence(student, slice(None), None, 1.0)
    whole = DenseScores(lambda chunk: teacher[chunk], vocabulary)
    exact = whole.divergence(student, slice(None), select_divergence("forward_kl"), 1.0)
    m = p[0, kept].sum()
    torch.testing.assert_close(values - m * m.log(), exact)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), student)[0] for v in (values, exact)))


@pytest.fixture
def exact_pair(tmp_path, make_bpe_tokenizer):
    """A teacher and the student of full depth that it is, with fewer tokens."""
    tokenizer = make_bpe_tokenizer(add_bos=True, pad_token="<|endoftext|>")
    teacher = write_teacher(tmp_path / "teacher", tokenizer)
    template = "{source}\n# In short:"
    texts = [template.replace("{source}", row["source"]) for row in FEW] + [row["target"] for row in FEW]
    small = trim_tokenizer(tokenizer, texts)
    assert len(small) < len(tokenizer) and small(texts)["input_ids"] != tokenizer(texts)["input_ids"]
    assert [small.tokenize(text) for text in texts] == [tokenizer.tokenize(text) for text in texts]
    assert small.decode(small("anything else, é")["input_ids"]) == "<s>anything else, é"
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, prompt_template=template, trimmed_tokenizer=small
    )
    assert student.config.vocab_size == len(student.tokenizer) == student.lm_head.weight.shape[0]
    return student, teacher, template


def test_a_trimmed_decoder_only_model_says_of_its_tokens_what_it_said(tmp_path, make_bpe_tokenizer):
    """In a head of its own and in one tied to the embedding, also after saving and loading."""
    tokenizer = make_bpe_tokenizer(add_bos=True, pad_token="<|endoftext|>")
    text = "def add(a, b): return a"
    small = trim_tokenizer(tokenizer, [text])
    kept = tokenizer.convert_tokens_to_ids(small.convert_ids_to_tokens(range(len(small))))
    for tied in (False, True):
        config = LlamaConfig.from_pretrained(write_teacher(tmp_path / f"teacher-{tied}", tokenizer))
        config.tie_word_embeddings = tied
        config.eos_token_id = [tokenizer.eos_token_id, tokenizer.bos_token_id]
        model = LlamaForCausalLM(config).eval()
        expected = model(**tokenizer(text, return_tensors="pt")).logits[..., kept]
        trim_vocabulary(model, tokenizer, small)
        assert model.config.vocab_size == len(small) < len(tokenizer)
        save_teacher(model, small, tmp_path / f"small-{tied}")
        loaded = load_teacher(tmp_path / f"small-{tied}")
        assert torch.equal(loaded(**small(text, return_tensors="pt")).logits, expected)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
        assert loaded.generation_config.eos_token_id == [small.eos_token_id, small.bos_token_id]
        assert loaded.generation_config.pad_token_id == small.pad_token_id


def test_a_trimmed_student_of_full_depth_is_its_teacher(tmp_path, exact_pair):
    """On given targets and on its own, also after saving and loading; a wrong id anywhere would show."""
    student, teacher, template = exact_pair
    student.save_pretrained(tmp_path / "student")
    student.tokenizer.save_pretrained(tmp_path / "student")
    loaded = RopeEncDecForConditionalGeneration.from_pretrained(tmp_path / "student")
    args = arguments(
        tmp_path,
        vocab_policy="id_map",
        prompt_template=template,
        learning_rate=0.0,
        max_steps=2,
        on_policy_fraction=1.0,
        sampling_temperature=2.0,
        max_target_length=40,
    )
    trainer = DistillationTrainer(
        loaded,
        args,
        teacher=str(teacher),
        processing_class=student.tokenizer,
        train_dataset=FEW,
        eval_dataset=FEW,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_distill_loss"] < 1e-5 and metrics["eval_teacher_agreement"] == 1.0
    trainer.train()
    losses = [log["distill_loss"] for log in trainer.state.log_history if "distill_loss" in log]
    assert len(losses) == 2 and max(losses) < 1e-5


def test_what_id_map_cannot_do_is_said(tmp_path, tokenizer, trimmed, exact_pair):
    with pytest.raises(ValueError, match="vocab_policy='id_map' aligns two tokenizers, but the teacher's"):
        make_trainer(tmp_path, make_t5(), ROWS, tokenizer, vocab_policy="id_map")
    with pytest.raises(ValueError, match="WordPiece"):
        make_trainer(tmp_path, make_t5(), ROWS, wordpiece(), teacher_tokenizer=tokenizer, vocab_policy="id_map")
    own = len(trimmed[1])
    for name in ("labels", "input_ids"):
        rows = [
            {
                **renamed(ROWS[:1], trimmed[1])[0],
                name: [own, 5],
                **({"attention_mask": [1, 1]} if name == "input_ids" else {}),
            }
        ]
        trainer = make_trimmed(tmp_path, tokenizer, trimmed, rows)
        with pytest.raises(ValueError, match=f"the student's id {own} stands for a token that the teacher does not"):
            trainer.compute_loss(trainer.model, trainer.data_collator([dict(row) for row in rows]))
    student, teacher, _ = exact_pair
    args = arguments(tmp_path, vocab_policy="id_map", prompt_template="{source}\n# In brief:")
    trainer = DistillationTrainer(student, args, teacher=str(teacher), train_dataset=FEW)
    with pytest.raises(ValueError, match=r"Give the teacher_processing_class .* and prompt_template"):
        trainer.data_collator(FEW)


# universal -----------------------------------------------------------------------------------------------------------


def universal_by_hand(student, teacher, batch, temperature):
    """Sorted probabilities row by row; `batch` says where the teacher is asked."""
    distance, ce = [], []
    for b in range(len(batch["labels"])):
        keep, read = batch["labels"][b] != -100, batch["teacher_attention_mask"][b].bool()
        source = batch["input_ids"][b][batch["attention_mask"][b].bool()][None]
        target, positions = batch["labels"][b][keep], batch["teacher_label_positions"][b][keep]
        ours = student(input_ids=source, labels=target[None]).logits[0]
        with torch.no_grad():
            theirs = teacher(batch["teacher_input_ids"][b][read][None]).logits[0]
        ce.append(F.cross_entropy(ours, target, reduction="none"))
        for t, position in enumerate(positions.tolist()):
            q = torch.softmax(ours[t] / temperature, -1).sort(descending=True).values
            p = torch.softmax(theirs[max(position, 0)] / temperature, -1).sort(descending=True).values
            width = max(len(p), len(q))
            p, q = (torch.cat((x, x.new_zeros(width - len(x)))) for x in (p, q))
            distance.append((p - q).abs().sum() * (position >= 0))
    return torch.stack(distance), torch.cat(ce)


@pytest.mark.parametrize("chunk_size", [1000, 3])
@pytest.mark.parametrize("other", [wordpiece, unigram])
def test_universal_by_hand(tmp_path, tokenizer, other, chunk_size):
    theirs = other()
    teacher = make_teacher(len(theirs))
    settings = {"vocab_policy": "universal", "distill_temperature": 2.0, "loss_chunk_size": chunk_size}
    trainer = make_trainer(tmp_path, make_t5(), TEXT, tokenizer, teacher, theirs, **settings)
    batch = trainer.data_collator(TEXT)
    loss, gradient = loss_and_gradient(trainer, TEXT)
    reference = make_t5()
    distance, ce = universal_by_hand(reference, teacher, batch, 2.0)
    expected = (0.9 * 4 * distance + 0.1 * ce).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, reference.shared.weight.grad, rtol=1e-3, atol=1e-5)
    metrics = trainer.evaluate()
    asked = (batch["teacher_label_positions"] >= 0).sum() / (batch["labels"] != -100).sum()
    assert 0.1 < asked < 0.9
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["eval_teacher_asked"] == pytest.approx(asked.item())
    assert "eval_teacher_agreement" not in metrics
    capture(
        LiveTeacher(teacher),
        TEXT,
        tmp_path / "cache",
        theirs,
        kind="dense",
        student_tokenizer=tokenizer,
        vocab_policy="universal",
        progress=False,
    )
    cached = make_trainer(tmp_path, make_t5(), TEXT, tokenizer, tmp_path / "cache", theirs, **settings)
    assert isinstance(cached.teacher, CachedTeacher)
    assert cached.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=2e-3)


def test_universal_with_one_tokenizer_compares_all(tmp_path, tokenizer):
    one = make_trainer(tmp_path, make_t5(), TEXT, tokenizer, None, tokenizer, vocab_policy="universal")
    plain = make_trainer(tmp_path, make_t5(), TEXT, tokenizer, None, tokenizer)
    batch, expected = one.data_collator(TEXT[:2]), plain.data_collator(TEXT[:2])
    assert torch.equal(batch["labels"], expected["labels"])
    for b in range(2):
        count = int((batch["labels"][b] != -100).sum())
        first = int(expected["teacher_labels_start"][b]) - 1
        assert batch["teacher_label_positions"][b].tolist()[:count] == list(range(first, first + count))
        read = batch["teacher_input_ids"][b, : first + count]
        assert torch.equal(read, expected["teacher_input_ids"][b, : first + count])


def test_what_universal_cannot_do_is_said(tmp_path, tokenizer):
    theirs = wordpiece()
    teacher = make_teacher(len(theirs))

    def trainer(rows=TEXT, teacher=teacher, teacher_tokenizer=theirs, **changed):
        settings = {"vocab_policy": "universal", **changed}
        return make_trainer(tmp_path, make_t5(), rows, tokenizer, teacher, teacher_tokenizer, **settings)

    with pytest.raises(ValueError, match="divergence='reverse_kl' with vocab_policy='universal'"):
        trainer(divergence="reverse_kl")
    with pytest.raises(ValueError, match="on_policy_fraction=0.5 with vocab_policy='universal'"):
        trainer(on_policy_fraction=0.5)
    with pytest.raises(ValueError, match="but the teacher's is not known"):
        trainer(teacher_tokenizer=None)
    ready = trainer(ROWS)
    for extra in ({}, {"teacher_input_ids": [5, *ROWS[0]["labels"]]}):
        with pytest.raises(ValueError, match="ids of the student say nothing to the teacher"):
            ready.compute_loss(ready.model, ready.data_collator([{**ROWS[0], **extra}]))
    for kind in ("top_k", "sampled"):
        capture(LiveTeacher(teacher), TEXT, tmp_path / kind, theirs, kind=kind, progress=False)
        with pytest.raises(ValueError, match=f"holds kind='{kind}': capture kind='dense'"):
            trainer(teacher=tmp_path / kind)
        with pytest.raises(ValueError, match="kind='dense'"):
            capture(
                LiveTeacher(teacher),
                TEXT,
                tmp_path / "new",
                theirs,
                kind=kind,
                student_tokenizer=tokenizer,
                vocab_policy="universal",
                progress=False,
            )
