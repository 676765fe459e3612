"""The exporters of transformers 5: our two modules through ONNX and OpenVINO, and Core ML as a backend of theirs."""

import pytest
import torch
from toys import KINDS, make_model, random_ids
from transformers.exporters import AutoExportConfig
from transformers.exporters.base import ExportedModel

from hf_encdec_distill.export import transformers_coreml
from hf_encdec_distill.export.modules import ExportedDecoder, ExportedEncoder
from hf_encdec_distill.export.recipe import EXAMPLE_SIZES, Shapes, graphs


class Named(torch.nn.Module):
    """A module whose inputs have the recipe's names, as the exporters want them."""

    def __init__(self, module, graph):
        super().__init__()
        self.module, self.names = module, [port.name.replace(".", "_") for port in graph.inputs]
        self.outputs = [port.name.replace(".", "_") for port in graph.outputs]

    def forward(self, **inputs):
        return dict(zip(self.outputs, self.module(*(inputs[name] for name in self.names)), strict=True))


def modules(model, shapes):
    recipe = graphs(model.config, shapes)
    return {
        "encoder": Named(ExportedEncoder(model), recipe["encoder"]).eval(),
        "decoder": Named(ExportedDecoder(model, fixed=shapes.targets is not None), recipe["decoder"]).eval(),
    }, recipe


def inputs_of(graph, sizes):
    inputs = {}
    for port in graph.inputs:
        example = port.example(sizes, torch.float32)
        if port.name == "input_ids":
            example = random_ids(*example.shape)
        inputs[port.name.replace(".", "_")] = torch.randn_like(example) if example.is_floating_point() else example
    return inputs


def exporter(name):
    if name == "onnx":
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        return OnnxExporter(), OnnxConfig
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    return OpenVINOExporter(), lambda **options: OpenVINOConfig(stateful=False, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["onnx", "openvino"])
@torch.no_grad()
def test_our_modules_have_the_same_contract_there(name, kind):
    model = make_model(kind)
    named, recipe = modules(model, Shapes())
    for part, graph in recipe.items():
        inputs = inputs_of(graph, EXAMPLE_SIZES)
        free = {
            port.name.replace(".", "_"): {
                i: torch.export.Dim.DYNAMIC for i, axis in enumerate(port.axes) if isinstance(axis, str)
            }
            for port in graph.inputs
        }
        export, config = exporter(name)
        exported = export.export(named[part], inputs, config(dynamic=True, dynamic_shapes=free))
        if name == "openvino":  # whose own choice is bfloat16 on a CPU that has it
            exported.to(config={"INFERENCE_PRECISION_HINT": "f32"})
        for sizes in (EXAMPLE_SIZES, {"batch": 1, "prompt": 6, "target": 1, "past": 2}):
            inputs = inputs_of(graph, sizes)
            expected, found = named[part](**inputs), exported(**inputs)
            assert list(found) == list(expected) == [port.name.replace(".", "_") for port in graph.outputs]
            for output in expected:
                torch.testing.assert_close(found[output], expected[output], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_core_ml_is_a_backend(kind, tmp_path):
    named, recipe = modules(make_model(kind), Shapes.parse("fixed:5,4"))
    for part, graph in recipe.items():
        inputs = inputs_of(graph, {})
        if "position" in inputs:
            inputs["position"] = torch.tensor([2])
        config = AutoExportConfig.from_dict({"export_format": "coreml", "compute_precision": "float32"})
        assert isinstance(config, transformers_coreml.CoreMlConfig)
        exported = transformers_coreml.CoreMlExporter().export(named[part], inputs, config)
        exported.save_pretrained(tmp_path / part)
        for each in (exported, ExportedModel.from_pretrained(tmp_path / part)):
            found, expected = each(**inputs), named[part](**inputs)
            for output in expected:
                torch.testing.assert_close(found[output], expected[output], rtol=0, atol=2e-5)


def test_core_ml_says_what_it_cannot():
    named, recipe = modules(make_model("merged"), Shapes.parse("fixed:5,4"))
    with pytest.raises(ValueError, match="dynamic shapes: this backend exports fixed ones"):
        transformers_coreml.CoreMlExporter().export(
            named["encoder"], inputs_of(recipe["encoder"], {}), transformers_coreml.CoreMlConfig(dynamic=True)
        )
