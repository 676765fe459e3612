"""Images of rows -> of a batch, against the image processors of transformers, which make batches themselves."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import CLIPImageProcessor, Idefics3ImageProcessor, Qwen2VLImageProcessor

from hf_encdec_distill.distillation.collator import DistillationCollator
from hf_encdec_distill.distillation.images import images_of, one_after_another


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


ROWS = [[picture(12, 8), picture(20, 9)], [], [picture(8, 8)]]


def flat(processor):
    return lambda rows: processor([image for row in rows for image in row], return_tensors="pt")


def nested(processor):
    return lambda rows: processor([row for row in rows if row], return_tensors="pt")


PROCESSORS = {
    "llava": lambda: flat(CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8)),
    "idefics3": lambda: nested(Idefics3ImageProcessor(size={"longest_edge": 16}, max_image_size={"longest_edge": 8})),
    "qwen2_vl": lambda: flat(Qwen2VLImageProcessor(min_pixels=16, max_pixels=2000, patch_size=2, merge_size=2)),
}


def row_of(**columns):
    row = {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [7]}
    return {**row, "teacher_input_ids": [8, 9, 7], **columns}


@pytest.mark.parametrize("as_lists", [False, True])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_batch_is_what_the_processor_makes_of_the_rows_as_one(kind, as_lists):
    process = PROCESSORS[kind]()
    rows = [process([images]) if images else {} for images in ROWS]
    rows = [row_of(**{f"teacher_{name}": value.numpy() for name, value in row.items()}) for row in rows]
    if as_lists:  # Arrow has no None for what the first row lacks, and no arrays
        rows = list(Dataset.from_list([{**dict.fromkeys(rows[0]), **row} for row in rows]))
    batch, expected = DistillationCollator()(rows), process(ROWS)
    assert {name for name in batch if name.startswith("teacher_")} - set(DistillationCollator()([row_of()])) == {
        "teacher_images_digest",
        *(f"teacher_{name}" for name in expected),
    }
    for name, value in expected.items():
        torch.testing.assert_close(batch[f"teacher_{name}"], value)
    assert batch["teacher_images_digest"].any(dim=1).tolist() == [True, False, True]


def test_the_students_images_come_one_after_another():
    images = [torch.randn(2, 3, 4, 4), None, torch.randn(3, 4, 4).numpy(), np.zeros((0, 3, 4, 4))]
    batch = DistillationCollator()([row_of(pixel_values=image) for image in images])
    expected = torch.cat([images[0], torch.from_numpy(images[2])[None]])
    torch.testing.assert_close(batch["pixel_values"], expected, atol=0, rtol=0)
    assert "teacher_images_digest" not in batch  # the teacher reads words
    assert "pixel_values" not in DistillationCollator()([row_of(pixel_values=None)])


def test_a_collator_of_ones_own_keeps_its_images():
    def collator(rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    rows = [row_of(pixel_values=[[[1.0]]]), row_of(pixel_values=[[[2.0]]])]
    assert DistillationCollator(student_collator=collator)(rows)["pixel_values"].shape == (2, 1, 1, 1)


def test_types_of_the_teachers_tokens_are_as_long_as_those():
    """Of the prompt, as its processor gives them; what is behind it is text. `mm_token_type_ids` the tokens tell."""
    rows = [
        row_of(teacher_token_type_ids=[[1, 0]], teacher_mm_token_type_ids=[[1, 0]]),
        {**row_of(teacher_token_type_ids=[0, 1, 1]), "teacher_input_ids": [8, 9, 9, 7]},
    ]
    batch = DistillationCollator()(rows)
    assert batch["teacher_token_type_ids"].tolist() == [[1, 0, 0, 0], [0, 1, 1, 0]]
    assert "teacher_mm_token_type_ids" not in batch
    with pytest.raises(ValueError, match="1 of 2 rows have teacher_token_type_ids"):
        DistillationCollator()([rows[0], row_of()])


REFUSED = {
    "of other sizes": ([(1, 3, 4, 4), (1, 3, 4, 6)], r"pixel_values in a batch have the shapes \(1, 3, 4, 4\), "),
    "with a dimension taken off": ([(1, 2, 3, 4, 4), (2, 3, 4, 4)], "what the same processor makes of it"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", ["pixel_values", "teacher_pixel_values"])
def test_images_that_do_not_go_together_are_refused(case, name):
    shapes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        DistillationCollator()([row_of(**{name: torch.randn(shape)}) for shape in shapes])


def test_sizes_may_differ_where_a_mask_tells_pixels_from_filling():
    rows = [{"pixel_values": torch.ones(1, 1, 3, *size), "mask": torch.ones(1, 1, *size)} for size in ((2, 4), (4, 2))]
    batch = one_after_another(rows)
    assert batch["pixel_values"].shape == (2, 1, 3, 4, 4)
    torch.testing.assert_close(batch["pixel_values"][:, 0, 0], batch["mask"][:, 0])


@pytest.mark.parametrize("value", ["a picture", [[1.0], [1.0, 2.0]], [torch.ones(2), torch.ones(3)]])
def test_what_is_no_array_is_refused(value):
    with pytest.raises(ValueError, match="pixel_values of a row is not an array of numbers"):
        images_of({"pixel_values": value}, "pixel_values")


def test_a_row_of_texts_has_no_images(make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer()
    row = {"source": "What is this?", "target": "A cat.", "pixel_values": torch.ones(1, 3, 4, 4)}
    with pytest.raises(ValueError, match="a row has pixel_values and no input_ids: nothing says where"):
        DistillationCollator(tokenizer, tokenizer)([row])


def test_images_of_a_teacher_need_its_tokens():
    row = {"input_ids": [5], "attention_mask": [1], "labels": [7], "teacher_pixel_values": torch.ones(1, 3, 4, 4)}
    with pytest.raises(ValueError, match="teacher_pixel_values without teacher_input_ids, which"):
        DistillationCollator()([row])
