"""A capture from a server, whose client or server is killed, ends as one that nothing disturbed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_client_and_server_killed_at_twenty_points(make_bpe_tokenizer, tmp_path):
    make_bpe_tokenizer(pad_token="<|endoftext|>").save_pretrained(tmp_path / "tokenizer")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "theirs")
    words = [TESTS / "killed_capture.py", tmp_path / "cache", tmp_path / "tokenizer", 20]
    done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    gone_on, restarted = map(int, done.stdout.split())
    assert gone_on >= 10 and restarted >= 15
