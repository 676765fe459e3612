"""The tests of a module are in the file of its name, or where the table of CONTRIBUTING.md says."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path.relative_to(ROOT / "src" / "hf_encdec_distill").with_suffix("").as_posix()
    for path in (ROOT / "src" / "hf_encdec_distill").rglob("*.py")
    if path.name != "__init__.py"
)
TESTS = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
SECTION = re.search(
    r"^## Which test covers what$(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M | re.S
)[1]
ROWS = [
    [re.findall(r"`([\w/]+)`", cell) for cell in line.strip("|").split("|")]
    for line in SECTION.splitlines()
    if line.startswith("| `")
]
LISTED = [name for names, _ in ROWS for name in names]


def is_listed(module):
    return any(f"/{module}".endswith(f"/{name}") for name in LISTED)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_tests_by_its_name_or_by_the_table(module):
    file = f"test_{Path(module).name.strip('_')}"
    assert file in TESTS or is_listed(module), f"no {file}.py: say in CONTRIBUTING.md which tests cover {module}.py"


def test_the_table_names_what_is_there():
    assert {test for _, tests in ROWS for test in tests} <= TESTS
    assert len(LISTED) == len(set(LISTED)), "a module has two rows"
    assert [name for name in LISTED if not any(f"/{module}".endswith(f"/{name}") for module in MODULES)] == []
