"""A teacher that sees in the trainer, live and cached, against transformers' own models called on each row alone."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from distillation_toys import InOrder, arguments, make_rope, make_teacher
from toys import VOCAB
from vision_toys import IMAGE, SEEING, make_llava, make_seeing_teacher, pixels, seen, twin_of

from hf_encdec_distill.distillation.alignment.positions import target_positions, teacher_columns, teacher_images
from hf_encdec_distill.distillation.collator import DistillationCollator
from hf_encdec_distill.distillation.decoder_only_student import left_padded
from hf_encdec_distill.distillation.teachers.capture import capture
from hf_encdec_distill.distillation.teachers.live import LiveTeacher
from hf_encdec_distill.distillation.teachers.recorded import CachedTeacher


COUNTS = (2, 0, 1, 1)  # images of each row


def rows_of(kind, counts=COUNTS):
    """Text alone for the student; text and images for the teacher."""
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(12, 90, (length,), generator=generator).tolist()

    rows = []
    for number, count in enumerate(counts):
        images, tokens = seen(kind, count)
        prompt, target, source = [*ids(1 + number), *tokens, *ids(2)], ids(2 + number % 3), ids(3 + number % 2)
        rows.append(
            {
                "input_ids": source,
                "attention_mask": [1] * len(source),
                "labels": target,
                "teacher_input_ids": [*prompt, *target],
                "teacher_labels_start": len(prompt),
                **{f"teacher_{name}": value for name, value in images.items()},
            }
        )
    return rows


def alone(teacher, row):
    """The teacher's logits at the target tokens of one row, `[T, V]`, without padding."""
    ids = torch.tensor([row["teacher_input_ids"]])
    images = {
        name: row[f"teacher_{name}"]
        for name in ("pixel_values", "pixel_attention_mask", "image_grid_thw")
        if f"teacher_{name}" in row
    }
    if "image_grid_thw" in images and hasattr(teacher.model, "compute_3d_position_ids"):  # transformers 5
        images["mm_token_type_ids"] = (ids == IMAGE).long()
    with torch.no_grad():
        logits = teacher(input_ids=ids, **images).logits[0]
    return logits[row["teacher_labels_start"] - 1 : -1]


def expected_loss(student, teacher, rows):
    """Half the cross-entropy and half the KL, row by row."""
    ce, kl = [], []
    for row in rows:
        target = torch.tensor(row["labels"])
        with torch.no_grad():
            logits = student(input_ids=torch.tensor([row["input_ids"]]), labels=target[None]).logits[0]
        log_q, log_p = logits.log_softmax(-1), alone(teacher, row).log_softmax(-1)
        ce.append(F.cross_entropy(logits, target, reduction="none"))
        kl.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
    return 0.5 * torch.cat(ce).mean().item() + 0.5 * torch.cat(kl).mean().item()


def make_trainer(folder, teacher, tokenizer, rows, student=None, **changed):
    settings = {"per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.1, "max_steps": 1}
    return InOrder(
        student or make_rope("separate", vocab_size=VOCAB),
        arguments(folder, **{**settings, "max_grad_norm": 0.0, "distill_weight": 0.5, **changed}),
        teacher=teacher,
        train_dataset=rows,
        processing_class=tokenizer,
    )


def logged_loss(trainer):
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.fixture(params=SEEING)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(make_bpe_tokenizer):
    return make_bpe_tokenizer(chat_template=None)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_of_a_ragged_batch_are_those_of_each_row_alone(kind, side, chunked, tokenizer):
    teacher, rows = make_seeing_teacher(kind), rows_of(kind)
    batch = DistillationCollator(tokenizer)(rows)
    ids, mask = batch["teacher_input_ids"], batch["teacher_attention_mask"]
    places, columns = target_positions(batch["labels"])
    columns = teacher_columns(batch["teacher_labels_start"], places, columns)
    if side == "left":
        columns += (mask == 0).sum(dim=1)[places]
        ids, mask = left_padded(ids, mask)
    ours = LiveTeacher(teacher).logits_at(ids, mask, places, columns, chunked, teacher_images(batch))(slice(None))
    torch.testing.assert_close(ours, torch.cat([alone(teacher, row) for row in rows]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("as_dataset", [False, True])
def test_the_loss_is_that_of_each_row_alone(kind, as_dataset, tokenizer, tmp_path):
    """Rows in memory, and rows that went through Arrow, which knows lists alone."""
    teacher, rows = make_seeing_teacher(kind, len(tokenizer)), rows_of(kind)
    student = make_rope("separate", vocab_size=len(tokenizer))
    expected = expected_loss(student, teacher, rows)
    given = [{**dict.fromkeys(rows[0]), **row} for row in rows]  # None for the row without images
    given = [{name: getattr(value, "numpy", lambda v=value: v)() for name, value in row.items()} for row in given]
    trainer = make_trainer(tmp_path, teacher, tokenizer, Dataset.from_list(given) if as_dataset else rows, student)
    assert logged_loss(trainer) == pytest.approx(expected, rel=1e-3)
