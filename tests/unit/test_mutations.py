"""`studies/mutations.py` breaks lines that are there, with tests that are there, and its table is of today."""

import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture
def mutations(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    import mutations

    yield mutations
    del sys.modules["mutations"]


def test_every_line_and_every_test_is_there(mutations):
    for mutation in mutations.MUTATIONS:
        changed = mutations.broken((ROOT / mutations.PACKAGE / mutation.file).read_text(encoding="utf-8"), mutation)
        compile(changed, mutation.file, "exec")  # a test that fails on a syntax error has shown nothing
        file, _, name = mutation.test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), mutation.test
    assert {mutation.number for mutation in mutations.MUTATIONS} == set(mutations.PROPERTIES) == set(range(1, 14))


def test_the_table_is_of_today(mutations):
    assert mutations.OUTPUT.read_text(encoding="utf-8").endswith("\n\n" + mutations.table())
