"""What the page of `demo` shows, without a browser: against `generate`, a teacher asked token by token, by hand."""

import io
import socket
from html import escape, unescape

import numpy as np
import pytest
import torch
from distillation_toys import TEMPLATE, write_teacher
from PIL import Image
from tokenizer_toys import wordpiece
from transformers import AutoModelForCausalLM
from vision_toys import FEATURES, make_llava, twin_of

from hf_encdec_distill import RopeEncDecForConditionalGeneration, RopeEncDecVisionProcessor
from hf_encdec_distill.cli import demo
from hf_encdec_distill.cli._answers import Answer, Choice, ImageReader, Reader, stream, teacher_choices, token_texts
from hf_encdec_distill.cli._page import Side, answers, marked
from hf_encdec_distill.cli.main import build_parser, main
from hf_encdec_distill.export.exporting import export_model
from hf_encdec_distill.export.recipe import Shapes


TEXT = "def add(a, b): return a + b"


@pytest.fixture
def tokenizer(make_bpe_tokenizer):
    return make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>")


@pytest.fixture
def teacher(tmp_path, tokenizer):
    return AutoModelForCausalLM.from_pretrained(write_teacher(tmp_path / "teacher", tokenizer)).eval()


@pytest.fixture
def student(teacher, tokenizer):
    return RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher,
        tokenizer=tokenizer,
        prompt_template=TEMPLATE,
        encoder_num_hidden_layers=4,
        decoder_num_hidden_layers=2,
    ).eval()


@pytest.fixture
def reader(student, teacher, tokenizer):
    return Reader(student.tokenizer, student.config, teacher, tokenizer, TEMPLATE, 64)


def generated(model, ids, tokenizer, length):
    """Ids that `generate` adds, greedily."""
    options = {"max_new_tokens": length, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    tokens = model.generate(torch.tensor([ids]), pad_token_id=tokenizer.pad_token_id, **options)[0].tolist()
    return tokens[1 if model.config.is_encoder_decoder else len(ids) :]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_stream_is_what_generate_gives(side, request, reader, tokenizer):
    model = request.getfixturevalue(side)
    question = reader.read(TEXT)
    ids = question.inputs if side == "student" else question.prompt
    seen = [list(answer.ids) for answer in stream(model, ids, tokenizer, 12)]
    expected = generated(model, ids, tokenizer, 12)
    assert seen[-1] == expected and len(expected) > 1
    assert all(ids == expected[: len(ids)] for ids in seen)


def test_times_are_those_of_the_tokens(teacher, tokenizer):
    *_, answer = stream(teacher, [5, 6, 7], tokenizer, 6)
    assert len(answer.times) == len(answer.ids)
    assert answer.times[0] > 0 and answer.times == sorted(answer.times)
    assert Answer([1, 2, 3], [1.0, 1.5, 2.0]).tokens_per_second == 2.0
    assert Answer([1], [1.0]).tokens_per_second is None


def test_who_stops_asking_stops_the_model(teacher, tokenizer):
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    teacher.config.eos_token_id = teacher.generation_config.eos_token_id = tokenizer.eos_token_id = None
    answer = stream(teacher, [5, 6, 7], tokenizer, 5000)
    next(answer)
    answer.close()  # returns when the thread has ended
    assert len(calls) < 2500


def test_an_error_in_generate_is_raised(teacher, tokenizer):
    with pytest.raises(IndexError):
        list(stream(teacher, [10_000], tokenizer, 4))


def test_choices_are_those_of_a_teacher_asked_token_by_token(reader, teacher):
    question = reader.read(TEXT)
    answer = generated(teacher, question.prompt, reader.tokenizer, 8)
    answer[3] = (answer[3] + 1) % 250
    choices = teacher_choices(teacher, question.prompt, answer, reader.vocabulary)
    assert len(choices) == len(answer)
    for place, choice in enumerate(choices):
        with torch.no_grad():
            logits = teacher(torch.tensor([[*question.prompt, *answer[:place]]])).logits[0, -1]
        probability, token_id = logits.softmax(-1).max(-1)
        assert choice.token_id == token_id and choice.agrees == (token_id == answer[place])
        assert choice.probability == pytest.approx(float(probability), abs=1e-5)
    assert [choice.agrees for choice in choices[:4]] == [True, True, True, False]


def test_a_merged_student_and_its_teacher_read_the_same_prompt(reader, tokenizer):
    question = reader.read(TEXT)
    assert question.prompt == tokenizer(TEMPLATE.replace("{source}", TEXT))["input_ids"]
    assert question.inputs == question.prompt[:-1] and question.tokens == len(question.inputs)
    cut = reader.read(TEXT, most=10)
    assert len(cut.inputs) == 9 and cut.tokens == question.tokens


def test_tokens_inside_a_character_wait_for_it(tokenizer):
    text = "Zoé 日本 a  b"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, [*ids, tokenizer.eos_token_id])
    assert "".join(texts) == text and len(texts) == len(ids) + 1
    assert "" in texts and not any("\N{REPLACEMENT CHARACTER}" in part for part in texts)


def test_tokens_are_marked_by_agreement_and_escaped(tokenizer):
    ids = [*tokenizer("<b>é")["input_ids"], tokenizer.eos_token_id]
    other = tokenizer("x")["input_ids"][0]
    wrong = {1, 3}  # "b", and the first byte of "é"
    choices = [Choice(other, 0.25, i not in wrong) for i in range(len(ids))]
    assert len(ids) == 6
    assert marked(tokenizer, ids, choices) == (
        '<span class="agree">&lt;</span>'
        '<mark class="differ" title="the teacher: &#x27;x&#x27; (25 %)">b</mark>'
        '<span class="agree">&gt;</span>'
        '<mark class="differ" title="the teacher: &#x27;x&#x27; (25 %)">é</mark>'
        '<span class="agree end">end</span>'
    )


def shown(text, student, teacher, reader):
    sides = {"PyTorch": Side(student, reader.tokenizer, "as a toy")}
    beside = teacher and Side(teacher, reader.teacher_tokenizer, "as a toy")
    return list(answers(text, "PyTorch", sides, beside, reader, max_new_tokens=6))


def test_both_answer_and_the_student_is_marked(reader, student, teacher):
    *_, (told, of_student, of_teacher) = shown(TEXT, student, teacher, reader)
    question = reader.read(TEXT)
    answer = generated(student, question.inputs, reader.tokenizer, 6)
    choices = teacher_choices(teacher, question.prompt, answer, reader.vocabulary)
    assert told == ""
    assert marked(reader.tokenizer, answer, choices) in of_student
    assert f"{100 * sum(choice.agrees for choice in choices) / len(choices):.0f} %" in of_student
    assert "tokens/s" in of_student and "tokens/s" in of_teacher and "differ" not in of_teacher


def test_without_a_teacher_the_student_answers_alone(student, tokenizer):
    reader = Reader(student.tokenizer, student.config, None, None, None, 64)
    *_, (told, of_student, of_teacher) = shown(TEXT, student, None, reader)
    assert (told, of_teacher) == ("", "") and "tokens/s" in of_student and "agree" not in of_student


def test_an_empty_text_is_answered_by_a_note(reader, student, teacher):
    [(told, of_student, _)] = shown(" \n", student, teacher, reader)
    assert "pick an example" in told and "<dd>" not in of_student


def test_a_long_text_is_cut_and_says_so(reader, student, teacher):
    told = shown(TEXT * 20, student, teacher, reader)[-1][0]
    assert f"first 63 of {len(student.tokenizer(TEXT * 20)['input_ids'])} tokens" in told


@pytest.mark.export
def test_an_export_of_fixed_shapes_is_given_what_it_takes(tmp_path, reader, student, teacher, tokenizer):
    folder = export_model(student, student.tokenizer, "onnx", tmp_path / "fixed", shapes=Shapes.parse("fixed:10,4"))
    backend, side = demo._student(str(folder))
    beside = Side(teacher, tokenizer, "as a toy")
    *_, (told, of_student, _) = answers(TEXT, backend, {backend: side}, beside, reader, max_new_tokens=6)
    cut = student.tokenizer(TEXT, truncation=True, max_length=10)["input_ids"]
    answer = generated(student, cut, tokenizer, 4)
    assert backend == side.detail == "ONNX Runtime fp32 fixed:10,4"
    assert "first 10 of" in told
    choices = teacher_choices(teacher, reader.read(TEXT, side.most_prompt).prompt, answer, reader.vocabulary)
    assert marked(tokenizer, answer, choices) in of_student


def test_a_teacher_with_another_tokenizer_answers_without_marks(tmp_path, student):
    other = wordpiece()
    teacher = AutoModelForCausalLM.from_pretrained(write_teacher(tmp_path / "other", other)).eval()
    reader = Reader(student.tokenizer, student.config, teacher, other, TEMPLATE, 64)
    *_, (told, of_student, of_teacher) = shown(TEXT, student, teacher, reader)
    assert "different tokenizers" in told and "tokens/s" in of_teacher and "agree" not in of_student
    assert reader.read(TEXT).prompt == other(TEMPLATE.replace("{source}", TEXT), add_special_tokens=False)["input_ids"]


# Images --------------------------------------------------------------------------------------------------------------


def picture(seed, size=(8, 8), format="PNG"):
    """The bytes of a file."""
    file = io.BytesIO()
    colours = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(colours).save(file, format)
    return file.getvalue()


@pytest.fixture
def sees(image_tokenizer):
    return twin_of(make_llava(image_tokenizer), image_tokenizer)


@pytest.fixture
def image_reader(sees):
    return ImageReader(RopeEncDecVisionProcessor.for_model(sees), 12)


def shown_with(images, text, sees, image_reader):
    sides = {"PyTorch": Side(sees, image_reader.processor.tokenizer, "as a toy")}
    return list(answers(text, "PyTorch", sides, None, image_reader, max_new_tokens=6, images=images))


def test_images_are_read_in_the_order_of_their_tokens(image_reader):
    tokenizer, one, two = image_reader.processor.tokenizer, picture(1), picture(2)
    question = image_reader.read("a<image>b<image>", images=[one, two])
    assert question.inputs == tokenizer("a" + "<image>" * FEATURES + "b" + "<image>" * FEATURES)["input_ids"]
    expected = [image_reader.processor.image_processor(image)["pixel_values"] for image in (one, two)]
    assert torch.equal(question.images["pixel_values"], torch.from_numpy(np.concatenate(expected)))
    # Where the text does not say so, they stand in front.
    assert image_reader.read("ab", images=[one]).inputs == tokenizer("<image>" * FEATURES + "ab")["input_ids"]
    assert image_reader.read("ab").images == {}


def test_a_student_that_reads_images_answers_with_them(sees, image_reader):
    tokenizer = image_reader.processor.tokenizer
    question = image_reader.read("def", images=[picture(1)])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    expected = sees.generate(torch.tensor([question.inputs]), pad_token_id=0, **question.images, **options)[0, 1:]
    *_, (told, of_student, of_teacher) = shown_with([picture(1)], "def", sees, image_reader)
    assert (told, of_teacher) == ("", "")
    assert escape(tokenizer.decode(expected, skip_special_tokens=True).strip()) in of_student
    *_, (_, alone, _) = shown_with([picture(1)], " ", sees, image_reader)
    assert "tokens/s" in alone


def test_the_limit_of_a_text_does_not_count_its_images(sees, image_reader):
    told = shown_with([picture(1), picture(2)], "def " * 20, sees, image_reader)[-1][0]
    length = len(image_reader.processor.tokenizer("<image>" * 2 * FEATURES + "def " * 20)["input_ids"])
    assert f"first {2 * FEATURES + 12} of {length} tokens" in told


def test_what_is_wrong_with_images_is_told(sees, image_reader):
    image_reader.processor.image_processor.max_pixels = 100
    for images, text, problem in (
        ([picture(1)[:100]], "a", "image 0 is no image that can be read"),
        ([b"no image"], "a", "image 0 is no image that can be read: its format is none of"),
        ([picture(1), picture(2, (20, 20))], "a", "image 1 has 20 x 20 pixels, more than max_pixels=100"),
        ([picture(1)], "<image> and <image>", "1 images for 2 times"),
        ([], "<image>", "0 images for 1 times"),
        ([picture(1)] * 9, "a", "There are 9 images: give at most 8."),
        ([], " ", "Drop an image, or type a text."),
    ):
        [(told, of_student, _)] = shown_with(images, text, sees, image_reader)
        assert problem in unescape(told) and "<dd>" not in of_student


def test_a_student_that_reads_images_is_loaded_with_its_processor(sees, tmp_path, capsys):
    folder = str(tmp_path / "student")
    sees.save_pretrained(folder)
    parse = build_parser().parse_args
    with pytest.raises(OSError, match="has no processor: save it there"):
        demo.load_page(parse(["demo", folder]))
    RopeEncDecVisionProcessor.for_model(sees).save_pretrained(folder)
    with pytest.raises(ValueError, match="--teacher with .*, which reads images"):
        demo.load_page(parse(["demo", folder, "--teacher", folder]))
    kinds = [type(block).__name__ for block in demo.load_page(parse(["demo", folder])).blocks.values()]
    assert "Gallery" in kinds and "Dataset" not in kinds


def error_of(capsys, *argv):
    assert main(["demo", *argv]) == 2
    return capsys.readouterr().err


def test_errors(capsys, monkeypatch, tmp_path, student):
    folder = str(tmp_path / "student")
    student.save_pretrained(folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen" in error_of(capsys, folder, "--port", str(taken.getsockname()[1]))
    assert "--port 99999" in error_of(capsys, folder, "--port", "99999")
    assert "--max-new-tokens 0" in error_of(capsys, folder, "--max-new-tokens", "0")
    assert "a second PyTorch" in error_of(capsys, folder, "--exported", folder, "--port", "7999")
    find_spec = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "gradio" else find_spec(name))
    assert 'pip install "hf-encdec-distill[demo-ui]"' in error_of(capsys, folder)
