"""A student that reads images in the trainer: ready rows with `pixel_values`, and a teacher that reads words."""

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from distillation_toys import InOrder, arguments, logged_loss
from vision_toys import FEATURES, llama_of, make_llava, pixels, twin_of

from hf_encdec_distill.cards import ModelCardCallback
from hf_encdec_distill.distillation import DistillationCollator, capture_encoder_states


@pytest.fixture
def llava(image_tokenizer):
    return make_llava(image_tokenizer)


def rows_of(tokenizer, count=4):
    """An image and text for the student, words for the teacher, of other lengths."""
    image, generator = tokenizer.convert_tokens_to_ids("<image>"), torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(5, 90, (length,), generator=generator).tolist()

    rows = []
    for number in range(count):
        prompt, target, words = (
            [*ids(1 + number % 3), *[image] * FEATURES, *ids(2)],
            ids(2 + number % 2),
            ids(3 + number),
        )
        rows.append(
            {
                "input_ids": prompt,
                "attention_mask": [1] * len(prompt),
                "labels": target,
                "pixel_values": pixels(1)[0].numpy(),
                "teacher_input_ids": [*words, *target],
                "teacher_labels_start": len(words),
            }
        )
    return rows


def without_image(row, tokenizer):
    image = tokenizer.convert_tokens_to_ids("<image>")
    prompt = [token for token in row["input_ids"] if token != image]
    return {**row, "input_ids": prompt, "attention_mask": [1] * len(prompt), "pixel_values": None}


def make_trainer(folder, student, teacher, tokenizer, rows, **changed):
    settings = {"per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.1, "max_steps": 1}
    return InOrder(
        student,
        arguments(folder, **{**settings, "max_grad_norm": 0.0, "distill_weight": 0.5, **changed}),
        teacher=teacher,
        train_dataset=rows,
        processing_class=tokenizer,
    )


def expected_loss(student, teacher, rows):
    """Half the cross-entropy and half the KL, row by row, without padding."""
    ce, kl = [], []
    for row in rows:
        target = torch.tensor(row["labels"])
        images = torch.from_numpy(row["pixel_values"])[None]
        logits = student(input_ids=torch.tensor([row["input_ids"]]), pixel_values=images, labels=target[None]).logits[
            0
        ]
        start = row["teacher_labels_start"]
        of_teacher = teacher(torch.tensor([row["teacher_input_ids"]])).logits[0, start - 1 : -1]
        log_q, log_p = logits.log_softmax(-1), of_teacher.log_softmax(-1)
        ce.append(F.cross_entropy(logits, target, reduction="none"))
        kl.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
    return 0.5 * torch.cat(ce).mean() + 0.5 * torch.cat(kl).mean()


@pytest.mark.parametrize("frozen", [False, True])
def test_it_learns_from_a_teacher_that_reads_words_where_it_sees_the_picture(frozen, llava, image_tokenizer, tmp_path):
    student, teacher, rows = twin_of(llava, image_tokenizer), llama_of(llava), rows_of(image_tokenizer)
    with torch.no_grad():
        expected = expected_loss(student, teacher, rows)
    before = {name: weight.clone() for name, weight in student.named_parameters()}
    trainer = make_trainer(tmp_path, student, teacher, image_tokenizer, rows, freeze_encoder=frozen)
    assert logged_loss(trainer) == pytest.approx(expected.item(), rel=1e-3)
    moved = {name for name, weight in student.named_parameters() if not torch.equal(weight, before[name])}
    for part in ("vision_tower", "multi_modal_projector"):
        assert any(part in name for name in moved) is not frozen
    assert any("decoder" in name for name in moved)


def test_images_count_where_the_teacher_reads_the_same_tokens(llava, image_tokenizer, tmp_path):
    """The frozen encoder is the teacher's own first layers, and the teacher reads the prompt token by token.

    Its states of an image token are the same for all images, and must not be taken for the student's.
    """
    student, teacher = twin_of(llava, image_tokenizer), llama_of(llava)
    rows = rows_of(image_tokenizer)
    for row in rows:
        prompt = [*row["input_ids"], student.config.decoder_start_token_id]
        row |= {"teacher_input_ids": [*prompt, *row["labels"]], "teacher_labels_start": len(prompt)}
    with torch.no_grad():
        expected = expected_loss(student, teacher, rows)
    trainer = make_trainer(tmp_path, student, teacher, image_tokenizer, rows, freeze_encoder=True)
    assert trainer._shared_prompt.is_exact_for(student)  # all but the images are the same
    assert logged_loss(trainer) == pytest.approx(expected.item(), rel=1e-3)


def test_a_stream_has_as_many_images_as_its_rows(llava, image_tokenizer, tmp_path):
    """accelerate cuts the batches of a stream by their rows, unless it is told not to."""
    student, teacher = twin_of(llava, image_tokenizer), llama_of(llava)
    rows = rows_of(image_tokenizer, 8)
    token = image_tokenizer.convert_tokens_to_ids("<image>")
    for row in rows[::2]:  # two images each
        row["input_ids"] = [*row["input_ids"], *[token] * FEATURES]
        row["attention_mask"] = [1] * len(row["input_ids"])
    for number, row in enumerate(rows):
        row["pixel_values"] = pixels(2 - number % 2).numpy()
    losses = []
    for data in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        trainer = make_trainer(
            tmp_path / str(len(losses)),
            copy.deepcopy(student),
            teacher,
            image_tokenizer,
            data,
            max_steps=2,
            per_device_train_batch_size=3,
            logging_steps=1,
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2
    with pytest.raises(ValueError, match="dispatch_batches, which cuts batches up by their rows"):
        make_trainer(
            tmp_path / "no", student, teacher, image_tokenizer, rows, accelerator_config={"dispatch_batches": True}
        )


def test_texts_that_name_images_are_refused(llava, image_tokenizer, tmp_path):
    """The column with the pictures is dropped before a batch is made; the student would learn without seeing any."""
    student, teacher = twin_of(llava, image_tokenizer), llama_of(llava)
    rows = [{"source": "<image>what is it", "target": "a b"}] * 4
    trainer = make_trainer(tmp_path, student, teacher, image_tokenizer, rows, prompt_template="{source}!")
    with pytest.raises(ValueError, match="a row has '<image>' in its source and no input_ids"):
        trainer.train()
    batch = {"input_ids": [[5, 6]], "labels": [7]}
    with pytest.raises(ValueError, match="input_ids of a row have two dimensions"):
        DistillationCollator(image_tokenizer, image_tokenizer)([batch])


def test_kept_states_are_refused_since_they_go_by_the_tokens_alone(llava, image_tokenizer, tmp_path):
    student, rows = twin_of(llava, image_tokenizer), rows_of(image_tokenizer)
    options = {"freeze_encoder": True, "encoder_states": str(tmp_path / "states")}
    trainer = make_trainer(tmp_path, student, llama_of(llava), image_tokenizer, rows, **options)
    with pytest.raises(ValueError, match="the batch has pixel_values"):
        trainer.train()
    collator = DistillationCollator(image_tokenizer)
    with pytest.raises(ValueError, match="the batch has pixel_values"):
        capture_encoder_states(student, rows, tmp_path / "ahead", collator, progress=False)


def test_its_card_names_the_tower(llava, image_tokenizer, tmp_path):
    student = twin_of(llava, image_tokenizer)
    trainer = make_trainer(tmp_path, student, llama_of(llava), image_tokenizer, rows_of(image_tokenizer))
    assert ModelCardCallback(trainer).metrics()["vision_tower"] == {"model_type": "clip_vision_model"}
    student.config.vision_config._name_or_path = "someone/tower"
    found = ModelCardCallback(trainer).metrics()
    assert (
        found["vision_tower"]["hub_id"] == "someone/tower" and found["student"]["model_type"] == "rope_encdec_vision"
    )
    trainer.add_callback(ModelCardCallback(trainer))
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "base_model: someone/tower" in card
    # The name of a folder is for nobody else.
    tower = llava.model.vision_tower
    for name, kept in ((str(tmp_path), ""), ("someone/tower", "someone/tower")):
        tower.config._name_or_path = name
        assert twin_of(llava, image_tokenizer).config.vision_config._name_or_path == kept
