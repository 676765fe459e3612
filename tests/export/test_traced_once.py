"""What tests share of their exports is equal to what each would have made alone, and nothing else is shared."""

import pytest
import torch
from test_targets import SMALLEST, toy

from hf_encdec_distill.export import tracing
from hf_encdec_distill.export.exporting import export_model
from hf_encdec_distill.export.recipe import Shapes, graphs
from hf_encdec_distill.export.runtime import ExportedForConditionalGeneration


@pytest.fixture
def traces(monkeypatch):
    """The number of graphs that were traced so far."""
    traced, export = [], torch.export.export

    def count(*args, **options):
        traced.append(None)
        return export(*args, **options)

    monkeypatch.setattr(torch.export, "export", count)
    return lambda: len(traced)


def programs(model, shapes="fixed:5,4", stateful=False):
    return tracing.export_programs(model, graphs(model.config, Shapes.parse(shapes)), stateful)


def test_equal_modules_are_traced_once_and_others_are_not(traces):
    def student(**options):
        torch.manual_seed(3)
        return toy(kind="separate", **{**SMALLEST, **options})

    first = student()
    programs(first)
    assert traces() == 2
    programs(student())
    assert traces() == 2
    changed = student()
    with torch.no_grad():
        changed.model.encoder.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    for graphs_made, more in (
        (1, {"model": changed}),  # its encoder
        (2, {"model": student(encoder_attention="causal")}),
        (2, {"model": student(rms_norm_eps=1e-3)}),
        (2, {"model": first, "shapes": "fixed:6,4"}),
        (1, {"model": first, "shapes": "fixed:5,3"}),  # its decoder, as in the next
        (1, {"model": first, "stateful": True}),
        (0, {"model": first}),
    ):
        before = traces()
        programs(**more)
        assert traces() == before + graphs_made, more


@pytest.mark.parametrize("target", ["onnx", "openvino"])
@torch.no_grad()
def test_the_second_export_is_as_the_first(target, traces, tmp_path):
    """Whatever was done with the first: its weights in 8 bits, and then a student that has learnt something else."""
    torch.manual_seed(4)
    model = toy(kind="merged", **SMALLEST)
    shapes = Shapes.parse("fixed:5,4")
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[1]])}
    expected = model(**inputs).logits

    def logits(name, variant):
        export_model(model, None, target, tmp_path / name, variant, shapes)
        return ExportedForConditionalGeneration.from_pretrained(tmp_path / name)(**inputs).logits

    rounded = logits("rounded", "int8")
    before = traces()
    torch.testing.assert_close(logits("whole", "fp32"), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert traces() == before
    assert torch.equal(logits("rounded again", "int8"), rounded) and not torch.equal(rounded, expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    changed = model(**inputs).logits
    assert not torch.allclose(changed, expected, atol=0.1)
    torch.testing.assert_close(logits("changed", "fp32"), changed, rtol=0, atol=1e-5 * float(changed.abs().max()))
