"""What holds for Optimum whatever it exports to."""

import importlib
import sys

import pytest
from optimum_toys import run

from hf_encdec_distill import registration


@pytest.mark.process
def test_optimum_cli_does_not_pay_for_us():
    code = (
        "import sys\n"
        "import optimum.commands.register.register_hf_encdec_distill as ours\n"
        "assert ours.REGISTER_COMMANDS == []\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert run(sys.executable, "-c", code).split() == ["False", "False"]


def test_optimum_goes_on_working_if_a_recipe_cannot_be_imported(monkeypatch):
    before = list(sys.meta_path)
    monkeypatch.setitem(registration._MODULES, "this", "no_such_recipe")
    with pytest.warns(RuntimeWarning, match="rope_encdec: ModuleNotFoundError.*no_such_recipe.*pip install"):
        importlib.import_module("this")
    registration.register()
    assert sys.meta_path == before
