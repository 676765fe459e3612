"""A trainer in mixed precision leaves that behind for the whole process; here no test inherits it."""

import os

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _own_precision():
    before = os.environ.get("ACCELERATE_MIXED_PRECISION")
    yield
    # transformers 4.57 sets the variable and reads it again in the next trainer; accelerate keeps what it read.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if before is not None:
        os.environ["ACCELERATE_MIXED_PRECISION"] = before
    AcceleratorState._reset_state()
