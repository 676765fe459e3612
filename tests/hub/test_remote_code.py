"""A saved folder carries its own code: it loads where the package is not installed, and gives the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from without_package import HIDE

from hf_encdec_distill import RopeEncDecConfig, RopeEncDecForConditionalGeneration


# Runs isolated (`-I`: no PYTHONPATH, no user site, no current folder); where the package is installed, it is hidden.
ELSEWHERE = (
    HIDE
    + """
import torch
from safetensors.torch import load_file, save_file

try:
    import hf_encdec_distill
except ImportError:
    pass
else:
    raise SystemExit("the package can be imported here, so this shows nothing: " + hf_encdec_distill.__file__)

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding

for folder, out in JOBS:
    inputs = load_file(folder + "/inputs.safetensors")
    prompt = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    encoder = AutoModelForTextEncoding.from_pretrained(folder, trust_remote_code=True)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "rope_encdec"
    try:
        model.from_decoder_only("a teacher")
    except ImportError as error:
        assert "pip install hf-encdec-distill" in str(error), error
    else:
        raise SystemExit("from_decoder_only went on without the package")
    with torch.no_grad():
        outputs = {
            "logits": model(**prompt, decoder_input_ids=inputs["decoder_input_ids"]).logits,
            "encoded": encoder(**prompt).last_hidden_state,
            "base": base(**prompt, decoder_input_ids=inputs["decoder_input_ids"]).last_hidden_state,
            "tokens": model.generate(**prompt, max_new_tokens=8, do_sample=False),
            "beams": model.generate(**prompt, max_new_tokens=8, do_sample=False, num_beams=3),
        }
    save_file({name: value.contiguous() for name, value in outputs.items()}, out + ".safetensors")
    model.save_pretrained(out)
"""
)


def run_elsewhere(jobs, modules_cache):
    """Each job is a folder and where to save it again, with what it answers beside that."""
    modules_cache.mkdir(exist_ok=True)
    script = f"JOBS = {[(str(folder), str(out)) for folder, out in jobs]!r}\n{ELSEWHERE}"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(modules_cache),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # the same sums in the same order
    }
    command = [sys.executable, "-I", "-c", script]
    result = subprocess.run(command, env=environment, cwd=modules_cache, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def model_files(folder):
    return {path.name for path in folder.glob("*.py")}


KINDS = {"separate": {}, "merged": {"encoder_sliding_window": 3, "encoder_sliding_rope_theta": 50.0}}
TRAVELLING = {"configuration_rope_encdec.py", "modeling_rope_encdec.py", "compat_rope_encdec.py"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For each kind the inputs, what the model says of them, and the folder in which it is `first`, and `second` and
    `third` as they are saved over there: all kinds in one process, and then in another."""
    from safetensors.torch import save_file

    work, made = tmp_path_factory.mktemp("travelling"), {}
    torch.manual_seed(0)
    for kind, fields in KINDS.items():
        config = RopeEncDecConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            encoder_num_hidden_layers=3,
            decoder_num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            cross_attention=kind,
            **fields,
        )
        model = RopeEncDecForConditionalGeneration(config).eval()
        model.save_pretrained(work / kind / "first")
        inputs = {
            "input_ids": torch.randint(3, 97, (3, 7)),
            "attention_mask": (torch.arange(7) >= torch.tensor([[0], [3], [5]])).long(),
            "decoder_input_ids": torch.randint(3, 97, (3, 5)),
        }
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            outputs = model(**inputs, output_hidden_states=True)
            expected = {
                "logits": outputs.logits,
                "encoded": outputs.encoder_last_hidden_state,
                "base": outputs.decoder_hidden_states[-1],
                "tokens": model.generate(**prompt, max_new_tokens=8, do_sample=False),
                "beams": model.generate(**prompt, max_new_tokens=8, do_sample=False, num_beams=3),
            }
        made[kind] = inputs, expected, work / kind
    for here, there in (("first", "second"), ("second", "third")):
        for inputs, _, folder in made.values():
            save_file(inputs, folder / here / "inputs.safetensors")
        run_elsewhere([(folder / here, folder / there) for *_, folder in made.values()], work / "modules")
    return made


@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_loads_where_the_package_is_not(kind, saved):
    """Saved again over there, it loads over there again and here."""
    from safetensors.torch import load_file

    inputs, expected, folder = saved[kind]
    assert model_files(folder / "first") == model_files(folder / "second") == TRAVELLING
    for name in ("second", "third"):
        got = load_file(folder / f"{name}.safetensors")
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, atol=0, rtol=0)
    third = folder / "third"
    again = RopeEncDecForConditionalGeneration.from_pretrained(third)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, expected["logits"], atol=0, rtol=0)
    auto_map = json.loads((third / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForSeq2SeqLM"] == "modeling_rope_encdec.RopeEncDecForConditionalGeneration"
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM", "AutoModelForTextEncoding"}


def test_model_files_import_nothing_of_ours_but_each_other():
    import ast

    from hf_encdec_distill.models import rope_encdec

    folder = Path(rope_encdec.__file__).parent
    siblings = {"configuration_rope_encdec", "compat_rope_encdec"}
    for name in ("configuration", "modeling", "compat"):
        tree = ast.parse((folder / f"{name}_rope_encdec.py").read_text())
        for node in tree.body:  # at the top: `from_decoder_only` may ask for the package when it is called
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in siblings
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in {"torch", "transformers", "dataclasses"}
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= {"torch", "copy", "inspect", "re"}
