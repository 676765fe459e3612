"""What tests of a trainer share. One in mixed precision leaves that behind for the process; here none inherits it."""

import logging
import os

import pytest
from accelerate.state import AcceleratorState
from transformers.utils import logging as transformers_logging


@pytest.fixture(autouse=True)
def _own_precision():
    before = os.environ.get("ACCELERATE_MIXED_PRECISION")
    yield
    # transformers 4.57 sets the variable and reads it again in the next trainer; accelerate keeps what it read.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if before is not None:
        os.environ["ACCELERATE_MIXED_PRECISION"] = before
    AcceleratorState._reset_state()


@pytest.fixture
def warnings_of(caplog, monkeypatch):
    """What was warned of so far. Our logger is of transformers' kind, whose messages do not reach the root."""
    monkeypatch.setattr(logging.getLogger("hf_encdec_distill"), "propagate", True)
    transformers_logging.warning_once.cache_clear()  # what a test of another file was told already
    return lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
