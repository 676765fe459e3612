"""The site builds without a warning: no broken link, anchor or reference, and nothing that is fetched from afar."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
# What a browser loads by itself; links that a person may follow are no part of it.
SHOWN = re.compile(r"""<(?:img|source)\b[^>]*?\b(?:src|srcset)=["']?([^"' >:#]+)(?=["' >])""")
LOADED = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=["']?(https?:)?//[^"' >]+""")


@pytest.mark.process
def test_site_builds_strictly_and_loads_nothing_from_afar(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 15
    assert {page: found for page in pages if (found := LOADED.findall(page.read_text(encoding="utf-8")))} == {}
    shown = [page.parent / name for page in pages for name in SHOWN.findall(page.read_text(encoding="utf-8"))]
    assert len(shown) > 3 and [path for path in shown if not path.is_file()] == []
    api = (tmp_path / "site" / "api" / "distillation.html").read_text(encoding="utf-8")
    assert "distill_temperature" in api and "skew_reverse_kl" in api
    for page, of_a_file in (("export", "makeState"), ("examples", "question_answering.yaml")):  # included, no copies
        assert of_a_file in (tmp_path / "site" / f"{page}.html").read_text(encoding="utf-8")
