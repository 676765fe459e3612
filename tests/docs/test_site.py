"""The site builds without a warning, fetches nothing from elsewhere, and says all that its reader looks for."""

import dataclasses
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright
from transformers import Seq2SeqTrainingArguments

from hf_encdec_distill import DistillationTrainingArguments
from hf_encdec_distill.cli.main import COMMANDS


pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[2]
# What a browser loads by itself; links that a person may follow are no part of it.
SHOWN = re.compile(r"""<(?:img|source)\b[^>]*?\b(?:src|srcset)=["']?([^"' >:#]+)(?=["' >])""")
LOADED = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=["']?(https?:)?//[^"' >]+""")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


def read(page):
    return page.read_text(encoding="utf-8")


def words(html):
    return " ".join(unescape(re.sub(r"<[^>]+>", "", html)).split())


def test_site_builds_strictly_and_loads_nothing_from_afar(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    assert {page: found for page in pages if (found := LOADED.findall(read(page)))} == {}
    shown = [page.parent / name for page in pages for name in SHOWN.findall(read(page))]
    assert len(shown) > 3 and [path for path in shown if not path.is_file()] == []
    assert "skew_reverse_kl" in read(site / "api" / "distillation.html")
    for page, of_a_file in (("export", "makeState"), ("examples", "question_answering.yaml")):  # included, no copies
        assert of_a_file in read(site / f"{page}.html")


def test_every_field_of_the_training_arguments_has_its_help(site):
    page = read(site / "api" / "distillation.html")
    cls = DistillationTrainingArguments
    ours = [field for field in dataclasses.fields(cls) if field not in dataclasses.fields(Seq2SeqTrainingArguments)]
    assert len(ours) > 20
    for field in ours:
        # A heading each, with an anchor for links and search.
        _, found, rest = page.partition(f'{cls.__name__}.{field.name}" class="doc doc-heading"')
        entry = words(rest.partition("doc doc-heading")[0])
        assert found and words(field.metadata["help"]) in entry, field.name
        assert f"= {field.default!r} " in entry, field.name
        assert all(choice in entry for choice in field.metadata.get("choices", ())), field.name


def test_every_command_has_a_heading(site):
    page = read(site / "commands.html")
    assert [name for name in COMMANDS if f'<h2 id="{name}"' not in page] == []


@pytest.mark.browser
def test_search_works_without_a_server(site):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "this test needs Chromium: apt-get install chromium, or chromium.org"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "index.html").as_uri())
        page.locator(".md-search__input").fill("progressive_depth_steps")
        found = page.locator(".md-search-result__link")
        expect(found.first).to_be_visible(timeout=30_000)
        assert any("api/distillation.html" in link.get_attribute("href") for link in found.all())
        assert [url for url in asked if url.startswith("http")] == []
        browser.close()
