"""Pixels and prompts of the vision student's processor, against numbers worked out by hand."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from vision_toys import make_llava, twin_of

from hf_encdec_distill.models.rope_encdec.processing_rope_encdec_vision import (
    RopeEncDecImageProcessor,
    RopeEncDecVisionProcessor,
)


PLAIN = {"size": {"height": 8, "width": 8}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def image_processor(**options):
    return RopeEncDecImageProcessor(**{**PLAIN, **options})


@pytest.fixture
def processor(image_tokenizer):
    return RopeEncDecVisionProcessor(image_processor(), image_tokenizer, patch_size=4)  # 4 tokens of an image


def coloured(width, height, colour=(255, 0, 51), mode="RGB"):
    return Image.new(mode, (width, height), colour)


def test_an_image_of_the_right_size_is_only_normalised():
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    found = image_processor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])(Image.fromarray(values))
    expected = (values / 255 - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6]
    np.testing.assert_allclose(found["pixel_values"][0], expected.transpose(2, 0, 1), atol=1e-6)
    assert found["pixel_values"].dtype == np.float32 and found["num_tiles"] == [1]


def test_others_are_fitted_whole_on_a_ground_of_the_mean():
    (found,) = image_processor()(coloured(32, 16))["pixel_values"]
    assert np.allclose(found[:, 2:6], np.array([1.0, -1.0, -0.6])[:, None, None], atol=1e-6)
    ground = np.concatenate((found[:, :2], found[:, 6:]), axis=1)
    assert np.allclose(ground, 2 * 128 / 255 - 1, atol=1e-6)  # 0.5 * 255, rounded


@pytest.mark.parametrize("kind", ["array", "planes", "floats", "tensor", "grey", "bytes", "path", "grey image"])
def test_what_an_image_may_be(kind, tmp_path):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    if kind.startswith("grey"):
        values = np.repeat(values[:, :, :1], 3, axis=2)
    image, file = Image.fromarray(values), io.BytesIO()
    image.save(file, "PNG")
    image.save(tmp_path / "image.png")
    given = {
        "array": values,
        "planes": values.transpose(2, 0, 1),
        "floats": values / 255,
        "tensor": torch.from_numpy(values.transpose(2, 0, 1).copy()),
        "grey": values[:, :, 0],
        "bytes": file.getvalue(),
        "path": tmp_path / "image.png",
        "grey image": image.convert("L"),
    }[kind]
    found = image_processor()(given)["pixel_values"]
    np.testing.assert_array_equal(found, image_processor()(image)["pixel_values"])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(mode):
    colour = (10, 20, 30, 0) if mode == "RGBA" else (10, 0)
    assert np.allclose(image_processor()(coloured(8, 8, colour, mode))["pixel_values"], 1.0)


def test_a_photograph_that_lies_on_its_side_is_turned(tmp_path):
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    image.save(tmp_path / "photo.png", exif=exif)
    (found,) = image_processor()(tmp_path / "photo.png")["pixel_values"]
    assert (found[:, :, 4:] > 0.9).all() and (found[:, :, :4] < -0.9).all()


@pytest.mark.parametrize(
    ("size", "most", "tiles"),
    [
        ((8, 8), 4, 1),
        ((16, 16), 4, 5),
        ((32, 8), 4, 5),
        ((16, 8), 4, 3),
        ((9, 9), 1, 1),
        ((4, 4), 4, 1),
        ((80, 8), 4, 5),
    ],
)
def test_a_large_image_is_tiled(size, most, tiles):
    found = image_processor(max_tiles=most)(coloured(*size))
    assert found["num_tiles"] == [tiles] and found["pixel_values"].shape == (tiles, 3, 8, 8)


def test_tiles_are_the_image_row_by_row():
    values = np.random.default_rng(2).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    whole, *tiles = image_processor(max_tiles=4)(Image.fromarray(values))["pixel_values"]
    pixels = (values / 255 - 0.5) / 0.5
    corners = [(0, 0), (0, 8), (8, 0), (8, 8)]
    for tile, (row, column) in zip(tiles, corners, strict=True):
        expected = pixels[row : row + 8, column : column + 8].transpose(2, 0, 1)
        np.testing.assert_allclose(tile, expected, atol=1e-6)
    assert abs(whole.mean() - pixels.mean()) < 0.02


def test_images_that_are_refused(tmp_path):
    read = image_processor()
    (tmp_path / "text.png").write_text("not an image")
    cut = io.BytesIO()
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(cut, "PNG")
    for given, problem in [
        (tmp_path / "text.png", "text.png' is no image that can be read"),
        (tmp_path / "missing.png", "missing.png' is no image that can be read: .*No such file"),
        (cut.getvalue()[:200], "image 0 is no image that can be read"),
        (b"", "image 0 is no image that can be read"),
        (Image.new("I;16", (4, 4)), "image 0 has the mode 'I;16': expected one of"),
        (Image.new("F", (4, 4)), "image 0 has the mode 'F'"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"image 0 is a ndarray of shape \(2, 4, 4, 3\): expected an image"),
        (np.full((4, 4, 3), 2.0), "image 0 has values from 2 to 2: expected 0 to 1 in floating point"),
        (np.full((4, 4, 3), np.nan), "image 0 has values from nan"),
        (np.full((4, 4, 3), 300), "image 0 has values from 300 to 300: expected 0 to 255"),
        (np.zeros((0, 5, 3)), "image 0 has 5 x 0 pixels"),
        (np.zeros((4, 4, 3), complex), "image 0 is an array of complex128"),
        ([], "no image was given"),
    ]:
        with pytest.raises(ValueError, match=problem):
            read(given)
    with pytest.raises(ValueError, match="image 1 has the mode"):
        read([coloured(4, 4), Image.new("F", (4, 4))])


def test_no_other_program_is_started_for_a_picture(tmp_path, monkeypatch):
    """As Pillow starts Ghostscript for PostScript, whatever the file is called."""
    file = io.BytesIO()
    coloured(8, 8).save(file, "EPS")
    (tmp_path / "picture.png").write_bytes(file.getvalue())
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ValueError, match="picture.png' is no image that can be read: its format is none of"):
        image_processor()(tmp_path / "picture.png")
    assert not (tmp_path / "started").exists()


Image.init()
_KINDS = [kind for kind in ("AVIF", "BMP", "GIF", "JPEG", "TIFF", "WEBP") if kind in Image.SAVE]  # AVIF from 11.3 on


@pytest.mark.parametrize("kind", _KINDS)
def test_damaged_files_of_each_format_are_told(kind):
    """Their decoders raise errors of many types."""
    file, generator = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(file, kind)
    whole, read, refused = file.getvalue(), image_processor(), 0
    assert read(whole)["pixel_values"].shape == (1, 3, 8, 8)
    for _ in range(200):
        damaged = bytearray(whole[: generator.integers(1, len(whole) + 1)])
        for place in generator.integers(0, len(damaged), 8):
            damaged[place] = generator.integers(0, 256)
        try:
            read(bytes(damaged))
        except ValueError:
            refused += 1
    assert refused


def test_a_tensor_in_bfloat16():
    values = torch.tensor([0.0, 1.0]).repeat(3, 8, 4)
    expected = image_processor()(values)["pixel_values"]
    np.testing.assert_array_equal(image_processor()(values.bfloat16())["pixel_values"], expected)


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path):
    """A file of a few kilobytes, 400 million pixels."""
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png", optimize=True)
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(ValueError, match="bomb.png' (has 20000 x 20000 pixels|is no image that can be read: .*bomb)"):
        image_processor()(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="16 x 16 pixels, more than max_pixels=100"):
        image_processor(max_pixels=100)(coloured(16, 16))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"size": {"height": 0, "width": 8}}, "height=0: expected a whole number"),
        ({"size": {"shortest_edge": 8}}, "expected height and width"),
        ({"max_tiles": 0}, "max_tiles=0"),
        ({"max_pixels": 1.5}, "max_pixels=1.5"),
    ],
)
def test_an_image_processor_that_does_not_work(options, problem):
    with pytest.raises(ValueError, match=problem):
        image_processor(**options)


# Texts ----------------------------------------------------------------------------------------------------


def count(ids, processor):
    return [sum(token == processor.image_token_id for token in row) for row in ids]


def test_an_image_token_is_written_once_for_each_feature(processor):
    texts = ["a <image> b", "none", "<image><image>"]
    found = processor(images=[coloured(8, 8)] * 3, text=texts, padding=True)
    assert count(found["input_ids"], processor) == [4, 0, 8]
    assert found["pixel_values"].shape == (3, 3, 8, 8)
    nested = processor(images=[[coloured(8, 8)], [], [coloured(8, 8)] * 2], text=texts, padding=True)
    assert nested["input_ids"] == found["input_ids"]
    plain = processor.tokenizer("a" + "<image>" * 4 + "b")["input_ids"]
    assert processor(images=coloured(8, 8), text="a<image>b")["input_ids"] == [plain]


def test_tiles_have_tokens_of_their_own(processor):
    processor.image_processor.max_tiles = 4
    found = processor(images=[coloured(8, 8), coloured(16, 16)], text=["<image>", "x <image>"], return_tensors=None)
    assert count(found["input_ids"], processor) == [4, 20] and found["pixel_values"].shape == (6, 3, 8, 8)


def test_a_prompt_without_images_has_no_pixels(processor):
    found = processor(text="plain", return_tensors="pt")
    assert "pixel_values" not in found and found["input_ids"].shape[0] == 1


def test_texts_and_images_that_do_not_match(processor):
    image = coloured(8, 8)
    for images, text, problem in [
        (image, "no place for it", "1 images for 0 times '<image>' in 1 texts: write it where each image stands"),
        (None, "a <image>", "0 images for 1 times"),
        ([image], ["<image>", "<image>"], "1 images for 2 times"),
        ([[image, image], []], ["<image>", "<image>"], r"\[2, 0\] images for \[1, 1\] times"),
        (image, None, "text is missing"),
        (image, [3], "expected a string or a list of strings"),
    ]:
        with pytest.raises(ValueError, match=problem):
            processor(images=images, text=text)
    with pytest.raises(ValueError, match="3 image tokens are left of 4: a limit of 4 tokens has cut them"):
        processor(images=image, text="a<image>", max_length=4, truncation=True)


def test_options_that_are_for_images_are_refused_and_others_are_taken(processor):
    """Not handed to the tokenizer, which passes over what it does not know in transformers 5."""
    image = coloured(8, 8)
    for options in ({"max_tiles": 4}, {"size": {"height": 16, "width": 16}}, {"do_rescale": False}):
        for given in (options, {"images_kwargs": options}):
            with pytest.raises(ValueError, match="set them on the image processor"):
                processor(images=image, text="<image>a", **given)
    expected = processor(images=image, text="<image>a", return_tensors="pt")["input_ids"]
    for given in ({"common_kwargs": {"return_tensors": "pt"}}, {"text_kwargs": {"return_tensors": "pt"}}):
        assert torch.equal(processor(images=image, text="<image>a", **given)["input_ids"], expected)
    with pytest.raises(ValueError, match="expected a string or a list of strings"):
        processor(text=[])


def test_chat_templates_of_a_tokenizer_that_have_names(image_tokenizer):
    image_tokenizer.chat_template = {
        "default": "{{ messages[0]['content'] }}!",
        "tool": "{{ messages[0]['content'] }}?",
    }
    processor = RopeEncDecVisionProcessor(image_processor(), image_tokenizer, patch_size=4)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
    assert processor.apply_chat_template(chat) == "<image>what!"
    assert processor.apply_chat_template(chat, chat_template="tool") == "<image>what?"
    assert processor.apply_chat_template(chat, chat_template="{{ messages[0]['content'] }}.") == "<image>what."
    image_tokenizer.chat_template = {"tool": "?"}
    processor = RopeEncDecVisionProcessor(image_processor(), image_tokenizer, patch_size=4)
    with pytest.raises(ValueError, match="no default among the chat templates tool"):
        processor.apply_chat_template(chat)


def test_a_size_that_is_changed_changes_the_tokens(processor):
    processor.image_processor.size = {"height": 16, "width": 8}
    assert count(processor(images=coloured(8, 8), text="<image>")["input_ids"], processor) == [8]


def test_a_processor_that_does_not_work(make_bpe_tokenizer, image_tokenizer):
    with pytest.raises(ValueError, match="image_token='<image>' is [0-9]+ tokens of this tokenizer"):
        RopeEncDecVisionProcessor(image_processor(), make_bpe_tokenizer(), patch_size=4)
    with pytest.raises(ValueError, match="a token is made of 6 x 6 pixels .patch_size=3, pixel_shuffle=2."):
        RopeEncDecVisionProcessor(image_processor(), image_tokenizer, patch_size=3, pixel_shuffle=2)
    unknown = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, "[UNK]")), unk_token="[UNK]"
    )
    with pytest.raises(ValueError, match="or unknown to it"):
        RopeEncDecVisionProcessor(image_processor(), unknown, patch_size=4)


def test_a_processor_of_a_student(image_tokenizer):
    student = twin_of(make_llava(image_tokenizer), image_tokenizer)
    student.tokenizer = None  # as of one that was loaded
    with pytest.raises(ValueError, match="carries no tokenizer, as one that was loaded: give it as tokenizer="):
        RopeEncDecVisionProcessor.for_model(student)
    own = RopeEncDecVisionProcessor.for_model(student, image_tokenizer)
    assert own.image_token_id == student.config.image_token_id
    student.config.image_token_id -= 1
    with pytest.raises(ValueError, match="and the student reads images at token"):
        RopeEncDecVisionProcessor.for_model(student, image_tokenizer)
