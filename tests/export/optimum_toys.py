"""What the tests of Optimum's exports share: exported models held against ours, and its command line."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from toys import make_model, ragged, random_ids

import hf_encdec_distill
from hf_encdec_distill.export.manifest import write_manifest
from hf_encdec_distill.export.recipe import Shapes


OPTIMUM_CLI = (sys.executable, "-m", "optimum.commands.optimum_cli")


@torch.no_grad()
def logits(model, prompt, mask, target):
    return model(input_ids=prompt, attention_mask=mask, decoder_input_ids=target).logits


def assert_same(exported, model):
    """Logits and tokens, of prompts and targets of several lengths (one among them), each model asked repeatedly."""
    for prompt, mask, _ in (ragged("left"), ragged("right"), ragged("right", (3, 1)), ragged("left", (1,))):
        for target in (random_ids(len(prompt), 1), random_ids(len(prompt), 5)):
            expected = logits(model, prompt, mask, target)
            got = logits(exported, prompt, mask, target)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        for beams in (1, 3):
            arguments = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": beams}
            assert torch.equal(exported.generate(prompt, **arguments), model.generate(prompt, **arguments))


def run(*command):
    """A command in a process of its own, with the package that these tests see."""
    source = str(Path(hf_encdec_distill.__file__).parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def written_by_our_export(folder, *files):
    """A folder as `export` of ours leaves it, but for what is in its graphs."""
    folder.mkdir()
    make_model("merged").config.save_pretrained(folder)
    for name in files:
        (folder / name).touch()
    write_manifest(folder, "onnx", "fp32", Shapes(), False, "float32")
    return folder
