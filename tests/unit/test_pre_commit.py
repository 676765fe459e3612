"""What is checked before a commit is what lint checks."""

import re
from pathlib import Path

import yaml
from packaging.specifiers import SpecifierSet


REPOSITORY = Path(__file__).parents[2]


def test_lint_and_pre_commit_have_one_ruff():
    (hooks,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    for file in ("noxfile.py", "pyproject.toml"):
        wanted = re.search(r'"ruff(>=[^"]*)"', (REPOSITORY / file).read_text(encoding="utf-8"))
        assert hooks["rev"].removeprefix("v") in SpecifierSet(wanted[1]), file
