"""`pipeline("image-text-to-text")` of either version of transformers with a student that reads images: its answers are
those of `generate` on tokens and pixels that are made by hand."""

import base64
import io

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from test_pipelines import elsewhere
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from vision_toys import FEATURES, make_llava, twin_of

from hf_encdec_distill import RopeEncDecVisionProcessor


IS_4 = transformers.__version__.startswith("4.")
TASK = "image-text-to-text"
TEXT = "What <image> def"
SHORT = {"max_new_tokens": 6}
OF_IMAGES = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}[end]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_bpe_tokenizer):
    torch.manual_seed(0)
    tokenizer = make_bpe_tokenizer(chat_template=None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    student = twin_of(make_llava(tokenizer), tokenizer)
    root = tmp_path_factory.mktemp("image-pipelines") / "student"
    student.save_pretrained(root)
    RopeEncDecVisionProcessor.for_model(student).save_pretrained(root)
    return root


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8))


def inputs_of(folder, text, *pictures):
    """Tokens and pixels that no processor has made."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = {"input_ids": torch.tensor([tokenizer(text.replace("<image>", "<image>" * FEATURES))["input_ids"]])}
    if pictures:
        colours = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in pictures])
        colours = (colours - np.float32(OPENAI_CLIP_MEAN)) / np.float32(OPENAI_CLIP_STD)
        inputs["pixel_values"] = torch.from_numpy(colours.transpose(0, 3, 1, 2))
    return inputs


def answer(folder, text, *pictures, **options):
    """Ids and text of an answer."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    ids = model.generate(**inputs_of(folder, text, *pictures), **{**SHORT, **options})
    return ids, AutoTokenizer.from_pretrained(folder).batch_decode(ids, skip_special_tokens=True)


class Pipe:
    """A pipeline, and what its model was given last."""

    def __init__(self, *args, **kwargs):
        self.pipe = pipeline(TASK, *args, **kwargs)
        self.processor, self.given = self.pipe.processor, {}
        generate = self.pipe.model.generate

        def noting(**inputs):
            self.given = inputs
            return generate(**inputs)

        self.pipe.model.generate = noting

    def __call__(self, *args, **kwargs):
        return self.pipe(*args, **SHORT, **kwargs)

    def assert_given(self, inputs):
        for name, values in inputs.items():
            torch.testing.assert_close(self.given[name], values, rtol=0, atol=1e-6)


def test_a_text_with_images_is_answered_as_generate_does(folder, tmp_path, capfd):
    student, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    picture(1).save(tmp_path / "one.png")
    ids, (said,) = answer(folder, TEXT, picture(1))
    for pipe in (Pipe(model=str(folder)), Pipe(model=student, processor=processor)):
        for image in (picture(1), str(tmp_path / "one.png"), [picture(1)]):
            found = pipe(images=image, text=TEXT, return_full_text=False)
            assert found == [{"input_text": TEXT, "generated_text": said}]
            pipe.assert_given(inputs_of(folder, TEXT, picture(1)))
        # By default the prompt is put in front, as for a decoder-only model.
        assert pipe(picture(1), text=TEXT) == [{"input_text": TEXT, "generated_text": TEXT + said}]
        (tensors,) = pipe(picture(1), text=TEXT, return_tensors=True)
        assert torch.equal(tensors["generated_token_ids"], ids[0])
        two = "a<image>b<image>"
        _, (said_of_two,) = answer(folder, two, picture(1), picture(2), num_beams=3)
        found = pipe([picture(1), picture(2)], text=two, return_full_text=False, generate_kwargs={"num_beams": 3})
        assert found == [{"input_text": two, "generated_text": said_of_two}]
        pipe.assert_given(inputs_of(folder, two, picture(1), picture(2)))
        _, (said_of_none,) = answer(folder, "Return")
        assert pipe(text="Return", return_full_text=False)[0]["generated_text"] == said_of_none
    said_by_transformers = capfd.readouterr()
    assert "is not supported for" not in said_by_transformers.err
    assert "custom code" not in said_by_transformers.out  # nobody is asked whether the folder's code may run


def test_lists_are_answered_one_by_one(folder):
    pipe = Pipe(model=str(folder))
    texts = [TEXT, "two<image>", "a<image>b"]
    expected = [answer(folder, text, picture(seed))[1][0] for seed, text in enumerate(texts)]
    found = pipe([picture(seed) for seed in range(3)], text=texts, return_full_text=False)
    assert [entry["generated_text"] for entry in found] == expected
    pipe.assert_given({"pixel_values": inputs_of(folder, "<image>" * 3, *map(picture, range(3)))["pixel_values"]})
    nested = pipe([[picture(seed)] for seed in range(3)], text=texts, return_full_text=False)
    assert nested == found
    rows = ({"images": picture(seed), "text": text} for seed, text in enumerate(texts))
    assert [entry for [entry] in pipe(rows, return_full_text=False)] == found


def test_an_answer_that_begins_with_the_prompt_is_whole_as_tensors(folder):
    """The pipeline takes the prompt's text off an answer, since a decoder-only model gives both."""
    pipe = Pipe(model=str(folder))
    prompt, said = "ab", "ab and more"
    outputs = {"prompt_text": prompt}
    outputs["input_ids"], outputs["generated_sequence"] = (
        torch.tensor([pipe.processor.tokenizer(text)["input_ids"]]) for text in (prompt, said)
    )
    new_text = pipe.pipe._sanitize_parameters(return_full_text=False)[2]
    assert pipe.pipe.postprocess(outputs, **new_text)[0]["generated_text"] == " and more"
    tensors = pipe.pipe._sanitize_parameters(return_tensors=True)[2]
    assert torch.equal(
        pipe.pipe.postprocess(outputs, **tensors)[0]["generated_token_ids"], outputs["generated_sequence"][0]
    )


# Chats ---------------------------------------------------------------------------------------------------------------


def chat(*parts, role="user"):
    return [{"role": role, "content": [part if isinstance(part, dict) else text(part) for part in parts]}]


def text(words):
    return {"type": "text", "text": words}


def in_base64(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_a_message_of_a_chat_is_a_text_with_images_in_it(folder, tmp_path):
    pipe = Pipe(model=str(folder))
    picture(1).save(tmp_path / "one.png")
    _, (said,) = answer(folder, TEXT, picture(1))
    for where in (
        {"image": picture(1)},
        {"path": str(tmp_path / "one.png")},
        {"url": str(tmp_path / "one.png")},
        {"base64": in_base64(picture(1))},
        {"url": "data:image/png;base64," + in_base64(picture(1))},
    ):
        messages = chat("What ", {"type": "image", **where}, " def")
        assert pipe(text=messages, return_full_text=False)[0]["generated_text"] == said
        pipe.assert_given(inputs_of(folder, TEXT, picture(1)))
        (whole,) = pipe(text=messages)
        assert whole["generated_text"][1] == {"role": "assistant", "content": said}
        assert whole["generated_text"][0]["role"] == "user" and whole["input_text"] == messages
        assert messages[0]["content"][1] == {"type": "image", **where}  # as it was
    of_openai = chat("What ", {"type": "image_url", "image_url": {"url": str(tmp_path / "one.png")}}, " def")
    assert pipe(text=of_openai, return_full_text=False)[0]["generated_text"] == said
    plain = pipe(text=[{"role": "user", "content": "Return"}], return_full_text=False)
    assert plain[0]["generated_text"] == answer(folder, "Return")[1][0]


def test_a_list_of_chats(folder):
    pipe = Pipe(model=str(folder))
    image = {"type": "image"}
    chats = [chat("a", {**image, "image": picture(1)}), chat("What", " ", {**image, "image": picture(2)}, " def")]
    expected = [answer(folder, "a<image>", picture(1))[1][0], answer(folder, TEXT, picture(2))[1][0]]
    found = pipe(text=chats, return_full_text=False)
    assert [entry["generated_text"] for [entry] in found] == expected


def test_chat_templates(folder, make_bpe_tokenizer):
    """One that knows images is taken as it is; for one of texts, images stand in them."""
    processor = AutoProcessor.from_pretrained(folder)
    of_text = make_bpe_tokenizer().chat_template
    messages = [
        *chat("You see.", role="system"),
        *chat("a ", {"type": "image", "image": picture(1)}, " b"),
    ]
    of_texts = (
        "<|im_start|>system\nYou see.<|im_end|>\n<|im_start|>user\na <image> b<|im_end|>\n<|im_start|>assistant\n"
    )
    of_images = "[system]You see.[user]a <image>\n b[end]"
    for template, expected in ((of_text, of_texts), (OF_IMAGES, of_images)):
        for whose in (processor, processor.tokenizer):
            whose.chat_template = template
            options = {"add_generation_prompt": True}
            assert processor.apply_chat_template(messages, **options) == expected
            assert processor.apply_chat_template([messages] * 2, **options) == [expected] * 2
            found = processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="pt", **options
            )
            by_hand = processor(images=picture(1), text=expected, return_tensors="pt")
            assert set(found) == set(by_hand) == {"input_ids", "attention_mask", "pixel_values"}
            assert all(torch.equal(found[name], value) for name, value in by_hand.items())
            whose.chat_template = None
        assert processor.apply_chat_template(messages, template, **options) == expected
    processor.chat_template = {"default": of_text, "seen": OF_IMAGES}
    assert processor.apply_chat_template(messages, **options) == of_texts
    assert processor.apply_chat_template(messages, "seen", **options) == of_images
    processor.chat_template = None
    begun = [*messages, *chat("It is", role="assistant")]
    assert processor.apply_chat_template(begun, of_text, continue_final_message=True).endswith("assistant\nIt is")


def test_chats_that_cannot_be_answered(folder):
    processor, pipe = AutoProcessor.from_pretrained(folder), Pipe(model=str(folder))
    for messages in (chat("Be kind.", role="system") + chat("a"), chat("a") + chat("It", role="assistant")):
        with pytest.raises(ValueError, match=r"a chat of 2 messages, roles \['.*: without a chat template"):
            pipe(text=messages)
    broken = chat({"type": "image", "base64": "no image"}, "a")
    with pytest.raises(ValueError, match="Incorrect image source"):
        processor.apply_chat_template(broken, tokenize=True, return_dict=True)
    with pytest.raises(ValueError, match="videos: this student reads texts and images"):
        processor(text="a", videos=["a.mp4"])


@pytest.mark.process
def test_where_the_package_is_not(folder, tmp_path):
    picture(1).save(tmp_path / "one.png")
    code = f"""
from transformers import pipeline
pipe = pipeline({TASK!r}, {str(folder)!r}, trust_remote_code=True)
found = pipe({str(tmp_path / "one.png")!r}, text={TEXT!r}, return_full_text=False, **{SHORT!r})
parts = [{{"type": "text", "text": "What "}}, {{"type": "image", "path": {str(tmp_path / "one.png")!r}}}]
messages = [{{"role": "user", "content": [*parts, {{"type": "text", "text": " def"}}]}}]
print([found[0]["generated_text"], pipe(text=messages, return_full_text=False, **{SHORT!r})[0]["generated_text"]])
"""
    _, (said,) = answer(folder, TEXT, picture(1))
    assert elsewhere(code, tmp_path).strip() == str([said, said])
