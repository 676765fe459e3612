"""Two ways to meet the Hub of server.py: in this process, and in one of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from server import TOKEN, Hub


@pytest.fixture
def run_script(tmp_path):
    """Runs Python code with `words` as arguments in a process of its own, and returns the lines that it printed: the
    client reads where the Hub is when it is imported. Nothing that is said or written has the token in it."""
    tests = Path(__file__).parents[1]
    package = Path(sys.modules["hf_encdec_distill"].__file__).parents[1]

    def start(script, *words, **environment):
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": os.pathsep.join((str(package), str(tests))),
            **environment,
        }
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, words)],
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,  # nobody is there to answer whether code may be trusted
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert TOKEN not in done.stdout + done.stderr
        assert not [file for file in tmp_path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
        return done.stdout.splitlines()

    return start


@pytest.fixture
def hub(monkeypatch, forget_sessions):
    """A Hub that `HfApi` of this process uploads to; downloads have the address of the import in them."""
    with Hub(TOKEN) as hub:
        for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        forget_sessions()
        yield hub
