"""Students that read images go to a Hub by each of the ways that there are, with their processor, and answer from
there as they did; what either version of transformers wrote is read by the one that runs."""

import json
import re
from pathlib import Path

import pytest
import torch
from freeze import FROZEN, PROMPT, freeze_vision, pictures
from safetensors.torch import load_file
from server import TOKEN, Hub
from transformers import AutoModelForImageTextToText, AutoProcessor
from without_package import HIDE

from hf_encdec_distill.cards import write_model_card
from hf_encdec_distill.cli.main import main


WRITTEN = sorted(str(folder.relative_to(FROZEN)) for folder in FROZEN.glob("*/vision-*"))
OF_PROCESSOR = {"processor_config.json", "preprocessor_config.json", "processing_rope_encdec_vision.py"}
CODE = {
    f"{part}_rope_encdec{kind}.py"
    for part, kind in (
        ("configuration", ""),
        ("configuration", "_vision"),
        ("modeling", ""),
        ("modeling", "_vision"),
        ("compat", ""),
    )
}

PUSH = """
import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

import hf_encdec_distill
from hf_encdec_distill.cli.main import main

folder = sys.argv[1]
assert main(["push", folder, "ann/by-command"]) == 0
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
model.push_to_hub("ann/by-method")
processor.push_to_hub("ann/by-method")
model.save_pretrained("saved", push_to_hub=True, repo_id="ann/by-saving")
processor.save_pretrained("saved-processor", push_to_hub=True, repo_id="ann/by-saving")
there = AutoModelForImageTextToText.from_pretrained("ann/by-command")  # the package is there: nothing is to be trusted
assert type(there) is hf_encdec_distill.RopeEncDecForImageTextToText
assert type(AutoProcessor.from_pretrained("ann/by-command")) is hf_encdec_distill.RopeEncDecVisionProcessor
"""

LOAD = (
    HIDE
    + """
import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

prompt = sys.argv[2]
for name, inputs, out in json.loads(sys.argv[1]):
    for cls in (AutoModelForImageTextToText, AutoProcessor):
        try:
            cls.from_pretrained(name)
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        else:
            raise SystemExit(name + " was loaded without trust_remote_code")
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    for loaded in (model, processor, processor.image_processor):
        assert type(loaded).__module__.startswith("transformers_modules"), type(loaded).__module__
    inputs = load_file(inputs)
    read = processor(images=list(inputs["pictures"]), text=prompt, return_tensors="pt")
    with torch.no_grad():
        outputs = {
            **read,
            "logits": model(**read, decoder_input_ids=inputs["decoder_input_ids"]).logits,
            "tokens": model.generate(**read, max_new_tokens=8, do_sample=False),
        }
    save_file({key: value.contiguous() for key, value in outputs.items()}, out)
"""
)


def check(found, expected):
    for name in ("input_ids", "attention_mask", "tokens"):
        assert torch.equal(found[name], expected[name]), name
    for name in ("pixel_values", "logits"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)


def load_elsewhere(run_script, tmp_path, expected_of, then="", **environment):
    """What each name of `expected_of` answers where the package is not, against what is expected of it; `then` runs
    there too. Returns the lines that were printed."""
    from safetensors.torch import save_file

    jobs = []
    for index, (name, expected) in enumerate(expected_of.items()):
        inputs, out = (str(tmp_path / f"{index}.{what}") for what in ("inputs", "out"))
        save_file({"pictures": torch.stack(pictures()), "decoder_input_ids": expected["decoder_input_ids"]}, inputs)
        jobs.append([str(name), inputs, out])
    said = run_script(LOAD + then, json.dumps(jobs), PROMPT, **environment)
    for (_, _, out), expected in zip(jobs, expected_of.values(), strict=True):
        check(load_file(out), expected)
    return said


@pytest.mark.process
def test_each_way_to_the_hub_leads_back(run_script, tmp_path):
    folder = tmp_path / "student"
    freeze_vision(folder)
    write_model_card(folder, {"student": {"model_type": "rope_encdec_vision"}})
    expected = load_file(folder / "expected.safetensors")
    with Hub(TOKEN) as hub:
        run_script(PUSH, folder, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        names = ("by-command", "by-method", "by-saving")
        files = {name: hub.repositories[f"models/ann/{name}"].at("main")[1] for name in names}
        expected_of = {f"ann/{name}": expected for name in names}
        card = files["by-command"]["README.md"].decode()
        with_remote_code, with_package, answers = re.findall("```python\n(.*?)```", card, re.DOTALL)
        there = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        # On a line of its own: what was not trusted was asked about on the one before.
        then = "print()\n" + with_remote_code + answers
        said = load_elsewhere(run_script, tmp_path, expected_of, then=then, **there)
        expected_answer = run_script(with_package + answers, **there)
        assert expected_answer and said[-len(expected_answer) :] == expected_answer
    for name in names:
        assert set(files[name]) >= OF_PROCESSOR | CODE, name
    assert "pipeline_tag: image-text-to-text" in card and 'AutoProcessor.from_pretrained("ann/by-command"' in card


def test_a_folder_without_its_processor_is_not_pushed(tmp_path, capsys):
    folder = tmp_path / "student"
    freeze_vision(folder)
    assert main(["push", str(folder), "ann/student", "--dry-run", "--json"]) == 0
    going = {file["path"] for file in json.loads(capsys.readouterr().out)["files"]}
    assert going >= OF_PROCESSOR | CODE and "expected.safetensors" not in going
    (folder / "preprocessor_config.json").unlink()
    assert main(["push", str(folder), "ann/student", "--dry-run"]) == 2
    assert "has no processor, preprocessor_config.json: save it there first" in capsys.readouterr().err
    (folder / "processing_rope_encdec_vision.py").unlink()
    assert main(["push", str(folder), "ann/student", "--dry-run"]) == 2
    assert "names processing_rope_encdec_vision.py, not there" in capsys.readouterr().err


@pytest.mark.parametrize("folder", WRITTEN)
def test_what_either_version_wrote_is_read(folder):
    expected = load_file(FROZEN / folder / "expected.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(FROZEN / folder).eval()
    read = AutoProcessor.from_pretrained(FROZEN / folder)(images=pictures(), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        logits = model(**read, decoder_input_ids=expected["decoder_input_ids"]).logits
        tokens = model.generate(**read, max_new_tokens=8, do_sample=False)
    check({**read, "logits": logits, "tokens": tokens}, expected)


@pytest.mark.process
def test_what_either_version_wrote_is_read_with_its_own_code(run_script, tmp_path):
    assert {Path(folder).name.split("-")[1][0] for folder in WRITTEN} == {"4", "5"}
    expected_of = {FROZEN / folder: load_file(FROZEN / folder / "expected.safetensors") for folder in WRITTEN}
    load_elsewhere(run_script, tmp_path, expected_of, HF_HUB_OFFLINE="1")
