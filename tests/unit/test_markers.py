"""What conftest.py does with tests: those that start Python say so by their marker, those that are lost run again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import lost_processes
import pytest


def start_python():
    subprocess.run([sys.executable, "-S", "-c", ""], check=True)


@pytest.mark.process
def test_one_that_says_so_starts_python():
    start_python()


# conftest.py fails it; strict, so that this is red once conftest.py no longer does.
@pytest.mark.xfail(strict=True)
def test_one_that_does_not_say_so_fails():
    start_python()


# With two files to each process, the second of which it has not begun when it dies in the last test of the first.
DIES = """
import os
import pathlib
import signal
import time
import pytest

@pytest.mark.parametrize("number", range(4))
def test_number(number):
    time.sleep(0.1)
    seen = pathlib.Path(__file__).with_suffix(".seen")
    if {dies} and number == 3 and ({always} or not seen.exists()):
        seen.touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""


# The process that replaces another is still collecting when a test takes a second one down.
STARTS_SLOWLY = """
import os
import time
from lost_processes import *

def pytest_collection():
    if os.environ.get("PYTEST_XDIST_WORKER") in ("gw3", "gw4"):
        time.sleep(8)  # longer than the others need to get to that test again
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("always", "code", "said"), [(False, 0, "36 passed, 1 lost"), (True, 1, "1 failed, 35 passed, 1 lost")]
)
def test_one_whose_process_dies_is_run_once_more(tmp_path, always, code, said):
    for name in "abcdefghi":  # enough for others to take up what the dead process leaves
        (tmp_path / f"test_{name}.py").write_text(DIES.format(dies=name == "a", always=always))
    (tmp_path / "conftest.py").write_text(STARTS_SLOWLY)
    shutil.copy(Path(lost_processes.__file__), tmp_path)
    words = ["-n", "3", "--dist", "loadfile", "--no-loadscope-reorder", "-p", "no:cacheprovider", "-c", os.devnull]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "--rootdir", str(tmp_path), str(tmp_path)],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        cwd=tmp_path,
        timeout=120,
    )
    assert run.returncode == code and said in run.stdout.splitlines()[-1], run.stdout + run.stderr
    assert "LOST test_a.py::test_number[3]: worker" in run.stdout and "(exit code -9)" in run.stdout
