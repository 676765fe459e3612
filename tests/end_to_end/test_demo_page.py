"""The page of `demo` in a headless Chromium, with toy models: what it says is what `generate` says."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from distillation_toys import TEMPLATE, write_pairs, write_teacher
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from transformers import AutoModelForCausalLM, AutoTokenizer
from vision_toys import make_llava, twin_of

from hf_encdec_distill import (
    RopeEncDecForConditionalGeneration,
    RopeEncDecForImageTextToText,
    RopeEncDecVisionProcessor,
    devices,
)
from hf_encdec_distill.cli._page import launch
from hf_encdec_distill.cli.demo import load_page
from hf_encdec_distill.cli.main import build_parser
from hf_encdec_distill.export.exporting import export_model


pytestmark = pytest.mark.browser

SPACE = Path(__file__).parents[2] / "examples" / "space"
TEXT = "black 15 red and <something> that is longer"
NEW_TOKENS = 12
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
QUIET += ("--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_bpe_tokenizer):
    """A folder with a toy `teacher`, a `student` of half its decoder, its `onnx` export and `pairs.csv`."""
    folder = tmp_path_factory.mktemp("demo")
    tokenizer = make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>")
    teacher = AutoModelForCausalLM.from_pretrained(write_teacher(folder / "teacher", tokenizer))
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher,
        tokenizer=tokenizer,
        prompt_template=TEMPLATE,
        encoder_num_hidden_layers=4,
        decoder_num_hidden_layers=2,
    ).eval()
    student.save_pretrained(folder / "student")
    export_model(student, student.tokenizer, "onnx", folder / "onnx")
    write_pairs(folder / "pairs.csv", 200)
    return folder


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "this test needs Chromium: apt-get install chromium, or chromium.org"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """A page of the browser; afterwards nothing may have left this machine, and nothing been complained about."""
    context = browser.new_context()
    page = context.new_page()
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()
    assert asked, "nothing was seen"
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []
    # Gradio's page ends its own stream of events when an answer is there or the page closes. Now and then it does not
    # catch that.
    assert [text for text in complaints if not text.startswith("AbortError: signal is aborted without reason")] == []


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@contextmanager
def shown(page, tab):
    """`page` in `tab`, which leaves before the server stops: Gradio would complain in a stream that is still open."""
    try:
        tab.goto(launch(page, "127.0.0.1", free_port()))
        yield
        tab.goto("about:blank")
    finally:
        page.close()


def data(folder):
    return ["--dataset", str(folder / "pairs.csv"), "--source-column", "text", "--target-column", "short"]


def generated(folder, side, dtype=torch.float32):
    """Number of tokens and text of what transformers gives for TEXT."""
    cls = RopeEncDecForConditionalGeneration if side == "student" else AutoModelForCausalLM
    model = cls.from_pretrained(folder / side, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / side)
    text = TEXT if side == "student" else TEMPLATE.replace("{source}", TEXT)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    tokens = model.generate(ids, eos_token_id=tokenizer.eos_token_id, **options)[0]
    tokens = tokens[1 if side == "student" else ids.shape[1] :]
    return len(tokens), tokenizer.decode(tokens, skip_special_tokens=True).strip()


def ask(tab, text=TEXT):
    expect(tab.locator("#answer")).to_be_visible(timeout=90_000)  # the field may be there before it
    tab.wait_for_load_state("networkidle")  # Gradio empties the field once more, some ms after both are there
    tab.locator("#text textarea").fill(text)
    tab.locator("#text textarea").press("Control+Enter")


def figures(tab, side):
    """The numbers under an answer, by their names."""
    names, values = (tab.locator(f"{side} {tag}").all_text_contents() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def expect_answer(tab, side, expected):
    """Waits for all tokens; then the text is the very same, blanks and all."""
    length, text = expected
    expect(tab.locator(f"{side} dd").nth(2)).to_have_text(str(length), timeout=90_000)
    assert tab.locator(f"{side} .text").text_content() == text


def test_student_and_teacher_answer_side_by_side(models, tab, monkeypatch):
    monkeypatch.setattr(devices, "working_dtype", lambda: torch.float32)  # so that ONNX in fp32 says the same
    options = ["--teacher", str(models / "teacher"), "--exported", str(models / "onnx"), *data(models)]
    command = ["demo", str(models / "student"), *options, "--max-new-tokens", str(NEW_TOKENS)]
    with shown(load_page(build_parser().parse_args(command)), tab):
        _look(tab, models)


def _look(tab, models):
    of_student, of_teacher = generated(models, "student"), generated(models, "teacher")
    assert of_student[1] != of_teacher[1]

    tab.get_by_role("button", name="Answer", exact=True).click()
    expect(tab.locator("#told .note")).to_contain_text("Type a text")

    ask(tab)
    expect_answer(tab, "#teacher", of_teacher)
    expect(tab.locator("#told .note")).to_have_count(0)
    parts = tab.locator("#student .text > :not(.end)").all_text_contents()
    assert "".join(parts) == of_student[1]
    of_side = figures(tab, "#student")
    assert of_side["first token"].endswith(" ms") and of_side["then"].endswith(" tokens/s")
    assert set(figures(tab, "#teacher")) == {"first token", "then", "tokens"}
    apart = tab.locator("#student .text .differ")
    assert apart.count() > 0
    assert apart.first.get_attribute("title").startswith("the teacher: ")
    tinted = apart.first.evaluate("e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).borderBottomStyle]")
    assert tinted == ["rgba(230, 159, 0, 0.32)", "dotted"]

    # An export says the same, and the marks with it.
    tab.get_by_label("ONNX Runtime fp32").check()
    ask(tab)
    expect(tab.locator("#student h2")).to_contain_text("ONNX Runtime fp32", timeout=90_000)
    expect_answer(tab, "#teacher", of_teacher)
    assert tab.locator("#student .text > :not(.end)").all_text_contents() == parts

    # An example fills the field; side by side, and below each other where there is no room.
    tab.locator("button.gallery-item").first.click()
    expect(tab.locator("#text textarea")).not_to_have_value(TEXT)
    student, teacher = (tab.locator(f"{side} .panel") for side in ("#student", "#teacher"))
    assert student.bounding_box()["y"] == teacher.bounding_box()["y"]
    tab.set_viewport_size({"width": 420, "height": 900})
    assert student.bounding_box()["y"] + student.bounding_box()["height"] <= teacher.bounding_box()["y"]


def test_images_are_dropped_seen_and_asked_about(image_tokenizer, tab, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "working_dtype", lambda: torch.float32)
    student = twin_of(make_llava(image_tokenizer), image_tokenizer)
    processor = RopeEncDecVisionProcessor.for_model(student)
    student.save_pretrained(tmp_path / "student")
    processor.save_pretrained(tmp_path / "student")
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("navy", "olive")]
    files = [tmp_path / f"{index}.png" for index in range(2)]
    for file, image in zip(files, pictures):
        image.save(file)
    (tmp_path / "broken.png").write_bytes(files[0].read_bytes()[:40])
    page = load_page(build_parser().parse_args(["demo", str(tmp_path / "student"), "--max-new-tokens", "5"]))
    question = "def <image> and <image>"
    inputs = processor(images=pictures, text=question, return_tensors="pt")
    tokens = student.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=image_tokenizer.eos_token_id)
    given, generate = [], RopeEncDecForImageTextToText.generate
    monkeypatch.setattr(
        RopeEncDecForImageTextToText,
        "generate",
        lambda self, **kwargs: given.append(kwargs["pixel_values"]) or generate(self, **kwargs),
    )
    with shown(page, tab):
        expect(tab.locator("#answer")).to_be_visible(timeout=90_000)
        tab.locator("#images input[type=file]").set_input_files([str(file) for file in files])
        expect(tab.locator("#images .thumbnail-item img, #images .thumbnail-lg img")).to_have_count(2, timeout=90_000)
        ask(tab, question)
        text = image_tokenizer.decode(tokens[0, 1:], skip_special_tokens=True).strip()
        expect_answer(tab, "#student", (tokens.shape[1] - 1, text))
        torch.testing.assert_close(given[-1], inputs["pixel_values"])
        ask(tab, "one <image> too few")
        expect(tab.locator("#told .note")).to_contain_text("2 images for 1 times", timeout=90_000)
        tab.locator("#images").get_by_label("Clear").click()
        tab.locator("#images input[type=file]").set_input_files(str(tmp_path / "broken.png"))
        expect(tab.locator("#images img")).to_have_count(1, timeout=90_000)
        ask(tab, "what")
        expect(tab.locator("#told .note")).to_contain_text("image 0 is no image that can be read", timeout=90_000)


def test_the_space_runs_as_it_is(models, tab, tmp_path):
    port = free_port()
    environment = os.environ | {"STUDENT": str(models / "student"), "GRADIO_ANALYTICS_ENABLED": "True"}
    options = [*data(models), "--port", str(port), "--max-new-tokens", str(NEW_TOKENS)]
    space = subprocess.Popen(
        [sys.executable, str(SPACE / "app.py"), *options],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        # Children of a shell's background job would ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert str(port) in space.stdout.readline()
        tab.goto(f"http://127.0.0.1:{port}")
        ask(tab)
        expect_answer(tab, "#student", generated(models, "student", devices.working_dtype()))
        expect(tab.locator("#teacher")).not_to_be_visible()
        assert list(tmp_path.iterdir()) == [], "the page writes where it was started"
        tab.goto("about:blank")
        space.send_signal(signal.SIGINT)
        assert space.wait(20) == 0, "Ctrl-C is the way to end it, no error"
    finally:
        space.kill()
