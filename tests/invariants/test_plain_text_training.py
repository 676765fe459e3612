"""Training on plain text: what the teacher is asked, against its logits on the text; stopped equals never stopped."""

import pytest
import torch
import torch.nn.functional as F
from distillation_toys import EOS, arguments, make_t5, make_teacher

from hf_encdec_distill import DistillationTrainer, RopeEncDecForConditionalGeneration
from hf_encdec_distill.data import load_plain_text


SENTINELS = [3, 4]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(30):
        lines = (f"    return {number} + {line}\n" for line in range(4))
        (folder / f"{number}.py").write_text(f"def add_{number}(a, b):\n" + "".join(lines))
    return folder


@pytest.fixture
def tokenizer(make_bpe_tokenizer):
    return make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>")


def place_of_labels(row):
    """The place in the text of each label, from the row alone: None for sentinels and the end."""
    if row["labels"][0] not in SENTINELS:
        return [len(row["teacher_input_ids"]) - len(row["labels"]) + i for i in range(len(row["labels"]))]
    places, column, following = [], -1, iter(row["input_ids"])
    for label in row["labels"]:
        if label in SENTINELS:
            for token in following:  # up to the same sentinel in the input
                if token in SENTINELS:
                    break
                column += 1
            places.append(None)
        elif label == EOS:
            places.append(None)
        else:
            column += 1
            places.append(column)
    return places


def dense_terms(student, teacher, row):
    """CE of each label and, where the text has it, KL(teacher || student); no padding, no part of the package."""
    labels = torch.tensor(row["labels"])
    student_logits = student(input_ids=torch.tensor([row["input_ids"]]), labels=labels[None]).logits[0]
    log_p = F.log_softmax(teacher(torch.tensor([row["teacher_input_ids"]])).logits[0], -1)
    ce = F.cross_entropy(student_logits, labels, reduction="none")
    kl = torch.zeros(len(labels))
    for column, place in enumerate(place_of_labels(row)):
        if place is not None:
            assert row["teacher_input_ids"][place] == row["labels"][column]
            log_q = F.log_softmax(student_logits[column], -1)
            kl[column] = (log_p[place - 1].exp() * (log_p[place - 1] - log_q)).sum()
    return ce, kl


@pytest.mark.parametrize("chunk", [1000, 3])
@pytest.mark.parametrize("objective", ["prefix_lm", "span_denoising", "ul2"])
def test_the_teacher_is_compared_on_the_plain_text(tmp_path, corpus, tokenizer, objective, chunk):
    options = {"window": 48, "sentinels": SENTINELS, "seed": 3}
    rows = list(load_plain_text(corpus, tokenizer, objective=objective, **options).take(8))
    student, teacher = make_t5(), make_teacher()
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, distill_weight=0.7, loss_chunk_size=chunk),
        teacher=teacher,
        processing_class=tokenizer,
    )
    with torch.no_grad():
        ce, kl = map(torch.cat, zip(*(dense_terms(student, teacher, row) for row in rows)))
        loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows))
    assert loss.item() == pytest.approx((0.7 * kl + 0.3 * ce).mean().item(), rel=1e-5)
    assert (kl == 0).any() == (objective != "prefix_lm")


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path, corpus, tokenizer):
    """Encoder, start token and decoder read the text as the teacher does, wherever it is split."""
    teacher = make_teacher()
    template = "{source}\n"
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        make_teacher(), tokenizer=tokenizer, prompt_template=template
    )
    start = student.config.decoder_start_token_id
    assert tokenizer.decode([start]) == "\n"
    rows = load_plain_text(corpus, tokenizer, window=48, start_token_id=start, prefix_share=(0.2, 0.8)).take(16)
    rows = [row for row in rows if start in row["teacher_input_ids"][12:36]]
    assert len(rows) > 8
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, prompt_template=template, per_device_eval_batch_size=4),
        teacher=teacher,
        eval_dataset=rows,
        processing_class=student.tokenizer,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_distill_loss"] < 1e-6 and metrics["eval_teacher_agreement"] == 1.0
    assert metrics["eval_ce_loss"] > 1.0


def test_labels_that_only_the_student_has_may_be_sentinels(tmp_path, corpus, tokenizer):
    """Tokens that were added for the spans; the teacher has no such ids and is not asked about them."""
    own = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    sentinels = list(range(len(own), len(own) + 2))
    own.add_special_tokens({"additional_special_tokens": ["<extra_id_0>", "<extra_id_1>"]})
    assert own.convert_ids_to_tokens(sentinels) == ["<extra_id_0>", "<extra_id_1>"]
    rows = list(load_plain_text(corpus, tokenizer, objective="span_denoising", window=48, sentinels=sentinels).take(4))
    trainer = DistillationTrainer(
        make_t5(vocab_size=sentinels[-1] + 1),
        arguments(tmp_path),
        teacher=make_teacher(vocab_size=sentinels[0]),
        teacher_processing_class=tokenizer,
        processing_class=own,
    )
    assert torch.isfinite(trainer.compute_loss(trainer.model, trainer.data_collator(rows)))


@pytest.mark.parametrize("stop", [3, 13])
def test_resumed_equals_never_stopped(tmp_path, corpus, tokenizer, stop):
    """In the first pass over the text and in a later one; with accumulation, dropout and a shuffle buffer."""

    def make_trainer():
        torch.manual_seed(stop)
        return DistillationTrainer(
            make_t5(dropout=0.3),
            arguments(
                tmp_path / "out",
                learning_rate=1e-2,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                max_steps=stop + 3,
                save_strategy="steps",
                save_steps=stop,
                seed=7,
            ),
            teacher=make_teacher(),
            train_dataset=load_plain_text(
                corpus, tokenizer, objective="ul2", window=48, sentinels=SENTINELS, seed=7, shuffle_buffer=16
            ),
            processing_class=tokenizer,
        )

    whole, resumed = make_trainer(), make_trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{stop}"))
    assert whole.state.global_step == resumed.state.global_step == stop + 3
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    logs = [[log["loss"] for log in trainer.state.log_history if "ce_loss" in log] for trainer in (whole, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == stop + 3
