"""Each target against PyTorch: every option of the architecture, every kind of shapes, states or none."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from architectures import OPTIONS, TARGETS, TOGETHER
from toys import make_model, ragged, random_ids

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.export.backends import backend_of
from hf_encdec_distill.export.exporting import export_model
from hf_encdec_distill.export.manifest import sha256
from hf_encdec_distill.export.mil_interpreter import MilProgram
from hf_encdec_distill.export.parity import prove
from hf_encdec_distill.export.recipe import Shapes
from hf_encdec_distill.export.runtime import ExportedForConditionalGeneration


TOLERANCE = 1e-5  # of the largest logit


def export(model, folder, target, **options):
    torch.manual_seed(0)
    shapes = Shapes.parse(options.pop("shapes", "ranged:12,10" if target == "coreml" else "dynamic"))
    export_model(model, None, target, folder, shapes=shapes, **options)
    return ExportedForConditionalGeneration.from_pretrained(folder)


def toy(**options):
    model = make_model(**options)
    # Random weights end when they like; all rows shall go on to the last token.
    model.generation_config.eos_token_id = None
    return model


# Tracing takes its time layer by layer; two of the decoder show that each has keys and values of its own.
SMALLEST = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
SMALL = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 2}


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory):
    """`(kind, target, shapes)` -> the toy of this kind, and the folder and model of its export, made once."""
    made = {}

    def find(*which):
        if which not in made:
            kind, target, shapes = which
            torch.manual_seed(0)
            model = toy(kind=kind, **SMALL)
            folder = tmp_path_factory.mktemp("once") / "exported"
            made[which] = model, folder, export(model, folder, target, shapes=shapes)
        return made[which]

    return find


@torch.no_grad()
def assert_logits_equal(exported, model, batch, prompt, target, side="right"):
    ids, mask = random_ids(batch, prompt), torch.ones(batch, prompt, dtype=torch.long)
    for row in range(1, batch):
        pads = min(row, prompt - 1)
        mask[row, slice(0, pads) if side == "left" else slice(prompt - pads, None)] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": random_ids(batch, target)}
    expected = model(**inputs).logits
    torch.testing.assert_close(
        exported(**inputs).logits, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max())
    )


def assert_answers_equal(exported, model, tokens=6, **options):
    for side in ("right", "left"):
        ids, mask, _ = ragged(side)
        inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": tokens, "do_sample": False, **options}
        assert exported.generate(**inputs).tolist() == model.generate(**inputs).tolist()


# llama.cpp runs what its own architectures can hold; test_gguf.py has what is refused.
IN_LLAMA_CPP = ("merged",)


@pytest.mark.parametrize(
    "target,name",
    [(target, name) for target in TARGETS for name in (IN_LLAMA_CPP if target == "gguf" else TOGETHER)],
)
def test_every_architecture(target, name, tmp_path):
    """A grid of shapes, then greedy and beam answers, then the first again: nothing is left over from a call."""
    options = TOGETHER[name]
    if target == "genai":  # which takes no other kind, and a prompt as it is; all other options go with it
        options = options | {"kind": "merged", "encoder_pooling": 1}
    model = toy(**options)
    exported = export(model, tmp_path / "exported", target)
    grid = [(1, 1, 1), (3, 7, 4), (1, 12, 1), (2, 1, 3), (2, 5, 1)]
    for shape in [*grid, grid[0]]:
        for side in ("left", "right"):
            assert_logits_equal(exported, model, *shape, side)
    assert_answers_equal(exported, model)
    assert_answers_equal(exported, model, num_beams=3)
    assert_answers_equal(exported, model)


def test_every_option_is_exported():
    """To each target, since a toy goes to all."""

    def settings(toys):
        return {f"{name}={value}" for toy in toys.values() for name, value in toy.items()}

    missing = settings(OPTIONS) - settings(TOGETHER)
    assert not missing


SIZES = {
    "onnx": ["fixed:9,8"],
    "openvino": ["fixed:9,8"],
    "coreml": ["fixed:9,8", "enumerated:4,9,8"],
}


@pytest.mark.parametrize("kind", ["separate", "merged"])
@pytest.mark.parametrize("target,shapes", [(target, shapes) for target in SIZES for shapes in SIZES[target]])
def test_sizes_that_are_fixed(target, shapes, kind, exported_once):
    """Short prompts are padded, and past the sizes there is an error, not a wrong answer."""
    model, _, exported = exported_once(kind, target, shapes)
    for shape in [(1, 1, 1), (2, 4, 3), (1, 9, 8)]:
        assert_logits_equal(exported, model, *shape)
    assert_answers_equal(exported, model, num_beams=2)
    with pytest.raises(ValueError, match=f"a prompt of 10 tokens: this export .{shapes}. takes at most 9"):
        exported.generate(random_ids(1, 10))
    with pytest.raises(ValueError, match="9 target tokens: this export .* has 8 slots"):
        exported.generate(random_ids(1, 9), max_new_tokens=9, do_sample=False)


@pytest.mark.parametrize("kind", ["separate", "merged"])
@pytest.mark.parametrize("shapes", ["dynamic", "fixed:9,8"])
def test_openvino_without_states(shapes, kind, tmp_path):
    model = toy(kind=kind, **SMALL)
    exported = export(model, tmp_path / "exported", "openvino", shapes=shapes, stateful=False)
    assert_logits_equal(exported, model, 2, 7, 3)
    assert_answers_equal(exported, model, num_beams=3)


def operations(compiled):
    return [op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ops()]


@pytest.mark.parametrize("kind", ["separate", "merged"])
def test_openvino_appends_to_its_states_within_the_attention(kind, exported_once):
    """One operation for each layer's own keys and values; with `merged` the prompt is in the same states."""
    model, _, exported = exported_once(kind, "openvino", "dynamic")
    request, layers = exported.graphs.request, model.config.decoder_num_hidden_layers
    found = operations(exported.graphs.compiled["decoder"])
    assert found.count("ScaledDotProductAttention") == layers
    ids = random_ids(2, 7)
    exported(input_ids=ids, decoder_input_ids=random_ids(2, 3))
    lengths = {state.state.shape[2] for state in request.query_state()}
    assert lengths == {10 if kind == "merged" else 3}


def test_one_set_of_states_serves_one_generation(exported_once):
    _, _, exported = exported_once("merged", "openvino", "dynamic")
    inputs = {"input_ids": random_ids(1, 4), "decoder_input_ids": random_ids(1, 1)}
    first = exported(**inputs)
    exported(**inputs)
    cache = first.get("cache", first.get("past_key_values"))
    with pytest.raises(ValueError, match="another generation has begun on it"):
        exported(**inputs, past_key_values=cache)


CALIBRATION = [{"inputs": [3, 4, 5], "labels": [6, 7, 2]}, {"inputs": [8, 9], "labels": [9, 2]}]


@pytest.mark.parametrize(
    ("kind", "shapes", "stateful"),
    [
        ("separate", "dynamic", True),
        ("merged", "dynamic", True),
        ("merged", "fixed:9,8", True),
        ("merged", "dynamic", False),
    ],
)
def test_int4_from_calibration(kind, shapes, stateful, tmp_path):
    """What the rows say moves weights: other rows, other logits."""
    model = toy(kind=kind, intermediate_size=64, **SMALLEST)  # blocks of 32
    ids, labels = random_ids(1, 6), random_ids(1, 4)
    logits = []
    for name, rows in (("one", CALIBRATION), ("other", [{"inputs": [40, 50, 60, 70], "labels": [80, 90, 91]}])):
        options = {"shapes": shapes, "variant": "int4", "stateful": stateful, "calibration": rows}
        exported = export(model, tmp_path / name, "openvino", **options)
        assert exported.manifest["calibration"] == len(rows)
        logits.append(exported(input_ids=ids, decoder_input_ids=labels).logits)
    assert not torch.equal(*logits) and all(found.isfinite().all() for found in logits)


@pytest.mark.parametrize("shapes", ["dynamic", "fixed:9,8"])
def test_calibration_does_no_harm_to_other_rows(shapes, trained, rows, tmp_path):
    """Of a model that has learnt something. How much it helps is decided on real students: on this toy it is a coin's
    toss that differs from CPU to CPU, since training does."""
    cross_entropy = {}
    for name, calibration in (("without", None), ("with", rows[:6])):
        exported = export(trained, tmp_path / name, "openvino", shapes=shapes, variant="int4", calibration=calibration)
        found = []
        for row in rows[6:]:
            ids, labels = torch.tensor([row["inputs"]]), torch.tensor([row["labels"]])
            tokens = trained.prepare_decoder_input_ids_from_labels(labels)
            logits = exported(input_ids=ids, decoder_input_ids=tokens).logits
            found.append(torch.nn.functional.cross_entropy(logits[0], labels[0]).item())
        cross_entropy[name] = sum(found) / len(found)
    assert cross_entropy["with"] < 1.1 * cross_entropy["without"]


def test_calls_of_fixed_graphs_are_decoding_steps():
    """Each token goes in alone, with the keys and values of those before it, and there are as many as are promised."""
    from hf_encdec_distill.export.openvino import _Calls
    from hf_encdec_distill.export.recipe import graphs

    model, shapes = toy(kind="merged"), Shapes.parse("fixed:9,8")
    calls = _Calls("decoder", model, graphs(model.config, shapes), shapes, CALIBRATION, joined=False)
    seen = list(calls)
    assert [int(call["position"][0]) for call in seen] == [0, 1, 2, 0, 1] and len(calls) == len(seen)
    start = model.config.decoder_start_token_id
    assert [int(call["input_ids"][0, 0]) for call in seen] == [start, 6, 7, start, 9]
    filled = [int(call["past_key_values.0.decoder.key"].any((0, 1, 3)).sum()) for call in seen]
    assert filled == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("kind", ["separate", "merged"])
def test_kv_cache_precision_is_written_and_used(kind, tmp_path):
    """In a step that reads states 8 bits are seen, and in fp32 nothing is."""
    import openvino

    model = toy(kind=kind, **SMALLEST)
    ids, labels = random_ids(1, 6), random_ids(1, 4)
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=labels).logits[:, -1]
    off = {}
    for precision in ("f32", "u8"):
        folder = tmp_path / precision
        exported = export(model, folder, "openvino", kv_cache_precision=precision)
        assert exported.manifest["kv_cache_precision"] == precision
        written = openvino.Core().read_model(folder / "openvino_decoder_model.xml").get_rt_info()
        assert written["runtime_options"]["KV_CACHE_PRECISION"].value == precision
        decoder = exported.graphs.compiled["decoder"]
        assert decoder.get_property("KV_CACHE_PRECISION") == getattr(openvino.Type, precision)
        encoded = exported.encoder(ids)
        first = exported(encoder_outputs=encoded, decoder_input_ids=labels[:, :3])
        cache = first.get("cache", first.get("past_key_values"))
        found = exported(encoder_outputs=encoded, decoder_input_ids=labels[:, 3:], past_key_values=cache).logits[:, -1]
        off[precision] = float((found - expected).abs().max() / expected.abs().max())
    assert off["f32"] < TOLERANCE < 1e-4 < off["u8"] < 0.05


def test_fixed_openvino_graphs_have_no_open_dimension(exported_once):
    import openvino

    _, folder, _ = exported_once("merged", "openvino", "fixed:9,8")
    files = list(folder.glob("*.xml"))
    assert len(files) == 2
    for file in files:
        model = openvino.Core().read_model(file)
        assert all(port.get_partial_shape().is_static for op in model.get_ops() for port in op.outputs()), (
            f"{file.name} has a dimension that an NPU cannot compile"
        )


@pytest.mark.parametrize("stateful", [True, False])
@pytest.mark.parametrize("kind", ["separate", "merged"])
def test_core_ml_in_half_precision(kind, stateful, tmp_path):
    """In states, whose only type it is, and without: rounding apart, the same."""
    model = toy(kind=kind, **SMALLEST)
    exported = export(model, tmp_path / "exported", "coreml", variant="fp16", shapes="fixed:9,8", stateful=stateful)
    ids, labels = random_ids(2, 9), random_ids(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=labels).logits
    found = exported(input_ids=ids, decoder_input_ids=labels).logits
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    assert any(op.startswith("write_state") for op in _operations(tmp_path / "exported")) is stateful


def _operations(folder):
    import coremltools

    spec = coremltools.utils.load_spec(str(folder / "decoder.mlpackage"))
    main = spec.mlProgram.functions["main"]
    return [op.type for op in main.block_specializations[main.opset].operations]


def test_states_that_cannot_be_copied(trained, rows, tmp_path, monkeypatch):
    """As Core ML's own on a Mac. In the first step of a beam search all beams go on from one."""
    folder = export_model(trained, None, "coreml", tmp_path / "exported", "fp16", Shapes.parse("fixed:8,8"))
    make_state, predict = MilProgram.make_state, MilProgram.predict
    monkeypatch.setattr(MilProgram, "make_state", lambda self: SimpleNamespace(arrays=make_state(self)))
    monkeypatch.setattr(
        MilProgram, "predict", lambda self, inputs, state=None: predict(self, inputs, state and state.arrays)
    )
    report = prove(folder, trained, rows[:4], max_new_tokens=7)
    assert report["failures"] == [] and report["tokens"] == {"greedy": 1.0, "beam": 1.0}


@pytest.mark.parametrize("kind", ["separate", "merged"])
def test_large_states_do_not_overflow_half_precision(kind, tmp_path):
    """A residual stream of a thousand, as real models have: squared it is beyond fp16."""
    model = toy(kind=kind, **SMALLEST)
    with torch.no_grad():
        model.model.encoder.embed_tokens.weight[:, 0] = 1000.0
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    exported = export(model, tmp_path / "exported", "coreml", variant="fp16", shapes="fixed:9,8")
    ids, labels = random_ids(1, 9), random_ids(1, 4)
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=labels).logits
    found = exported(input_ids=ids, decoder_input_ids=labels).logits
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("target", ["openvino", "coreml"])
def test_positions_keep_their_precision_far_out(target, tmp_path):
    """Angles rounded to fp16 are off by half a radian at position 1000."""
    model = toy(kind="merged", max_position_embeddings=1100, **SMALLEST)
    shapes = "dynamic" if target == "openvino" else "fixed:1000,8"
    exported = export(model, tmp_path / "exported", target, variant="fp16", shapes=shapes)
    ids, labels = random_ids(1, 1000), random_ids(1, 3)
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=labels).logits
    found = exported(input_ids=ids, decoder_input_ids=labels).logits
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_weights_of_onnx_are_stored_once(tmp_path):
    """Embedding, head and shared projections: one file, less than the model's own parameters and a little."""
    model = toy(kind="merged", vocab_size=4096, **SMALLEST)
    export(model, tmp_path / "exported", "onnx")
    parameters = sum(p.numel() for p in model.parameters()) * 4
    assert os.path.getsize(tmp_path / "exported" / "model.onnx_data") < 1.05 * parameters
    assert all(os.path.getsize(file) < 0.3 * parameters for file in (tmp_path / "exported").glob("*.onnx"))


def test_onnx_graphs_say_what_they_are(exported_once):
    import onnx

    _, folder, _ = exported_once("merged", "onnx", "dynamic")
    decoder = onnx.load(folder / "decoder_model.onnx", load_external_data=False)
    axes = {
        port.name: [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim]
        for port in (*decoder.graph.input, *decoder.graph.output)
    }
    assert axes["input_ids"] == ["batch", "target"]
    assert axes["past_key_values.1.decoder.key"] == ["batch", 2, "past", 8]
    assert axes["past_key_values.0.encoder.value"] == ["batch", 2, "prompt", 8]
    assert axes["present.0.decoder.value"] == ["batch", 2, "past + target", 8]
    assert axes["logits"] == ["batch", "target", 97]
    assert "encoder_hidden_states" not in axes
    assert [entry.version for entry in decoder.opset_import if entry.domain == ""] == [18]


def test_what_xcode_shows(tmp_path):
    import coremltools

    model = toy(kind="merged", **SMALLEST)
    export(model, tmp_path / "exported", "coreml", variant="fp16", shapes="fixed:9,8", license="mit")
    for name in ("encoder", "decoder"):
        package = tmp_path / "exported" / f"{name}.mlpackage"
        described = coremltools.utils.load_spec(str(package)).description
        assert described.metadata.license == "mit" and described.metadata.author.startswith("hf-encdec-distill")
        assert described.metadata.shortDescription and described.metadata.userDefined["shapes"] == "fixed:9,8"
        assert all(port.shortDescription for port in (*described.input, *described.output))


@pytest.mark.parametrize("target", TARGETS)
def test_a_changed_file_is_found(target, exported_once, tmp_path):
    _, whole, _ = exported_once("merged", target, "fixed:9,8" if target == "coreml" else "dynamic")
    folder = shutil.copytree(whole, tmp_path / "exported")
    name = next(name for name in json.loads((folder / "exported.json").read_text())["files"] if "decoder" in name)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{Path(name).name} is changed after the export"):
        ExportedForConditionalGeneration.from_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{Path(name).name} is missing"):
        ExportedForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "coreml"])
def test_a_graph_that_no_runtime_reads_is_a_value_error(target, exported_once, tmp_path):
    """Whoever writes graphs for others can write their hashes too."""
    _, whole, _ = exported_once("merged", target, "dynamic")
    folder = shutil.copytree(whole, tmp_path / "exported")
    manifest = json.loads((folder / "exported.json").read_text())
    name = next(name for name in manifest["files"] if "decoder" in name and not name.endswith(("data", ".bin")))
    (folder / name).write_bytes(b"no graph")
    manifest["files"][name] = sha256(folder / name)
    (folder / "exported.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="[Ee]xport"):
        ExportedForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("target", TARGETS)
def test_a_file_whose_hash_is_missing_is_not_read(target, exported_once, tmp_path):
    _, whole, _ = exported_once("merged", target, "fixed:9,8" if target == "coreml" else "dynamic")
    folder = shutil.copytree(whole, tmp_path / "exported")
    manifest = json.loads((folder / "exported.json").read_text())
    largest = max(manifest["files"], key=lambda name: (folder / name).stat().st_size)  # it has the weights
    (folder / largest).parent.joinpath("._note").touch()  # macOS
    for files in ({name: of_one for name, of_one in manifest["files"].items() if name != largest}, {}):
        (folder / "exported.json").write_text(json.dumps({**manifest, "files": files}))
        with pytest.raises(ValueError, match=f"exported.json has no hash of .*{Path(largest).name}.*, expected one"):
            ExportedForConditionalGeneration.from_pretrained(folder)
    (folder / "exported.json").write_text(json.dumps(manifest))
    assert ExportedForConditionalGeneration.from_pretrained(folder).manifest == manifest


@pytest.mark.parametrize(
    "change,message",
    [
        ({"target": "tflite"}, "target 'tflite': choose of onnx, openvino, coreml"),
        ({"variant": "int2"}, "variant 'int2': choose of fp32"),
        ({"variant": "palette4"}, "variant 'palette4' is for coreml, not for onnx: choose of fp32, fp16, int8, int4"),
        ({"shapes": "ranged:8,8"}, "onnx takes dynamic and fixed"),
        ({"shapes": "fixed:128,8"}, "need 136 positions, the model has max_position_embeddings=128"),
        ({"stateful": True}, "ONNX graphs have no states"),
        ({"target": "coreml", "stateful": True}, "Core ML keeps states in fp16: export variant fp32 stateless"),
        (
            {"variant": "int4", "calibration": CALIBRATION},
            "calibration rows are for target openvino with variant int4",
        ),
        ({"target": "openvino", "variant": "int8", "calibration": CALIBRATION}, "not for openvino with int8"),
        ({"target": "openvino", "variant": "int4", "calibration": []}, "none of 0 rows fits"),
        (
            {"target": "openvino", "variant": "int4"},
            "a scale for each 32 weights of a row, and intermediate_size=48, decoder_intermediate_size=48 does",
        ),
        ({"kv_cache_precision": "u8"}, "a KV-cache precision is for target openvino, not for onnx"),
        ({"target": "openvino", "kv_cache_precision": "u2"}, "KV-cache precision 'u2': choose of f32, f16, bf16, u8"),
        (
            {"target": "openvino", "kv_cache_precision": "u8", "stateful": False},
            "'u8' is for a stateful decoder of dynamic shapes only, this one is stateless and dynamic",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_what_cannot_be_exported(change, message, tmp_path):
    options = {"target": "onnx", **change}
    with pytest.raises(ValueError, match=message):
        export(toy(kind="merged"), tmp_path / "exported", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rope_that_is_ruled_by_the_longest_sequence(rope, tmp_path):
    """Both sides of the limit, in one graph; Core ML looks positions up in one table."""
    parameters = {"rope_type": rope, "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    parameters["original_max_position_embeddings"] = 8
    positions = {"dynamic": 8, "longrope": 64}[rope]  # of dynamic they are the limit
    model = toy(kind="merged", max_position_embeddings=positions, rope_parameters=parameters, **SMALLEST)
    for target in ("onnx", "openvino"):
        exported = export(model, tmp_path / target, target)
        for prompt, tokens in ((4, 3), (7, 3), (8, 1), (9, 1), (12, 3)):
            assert_logits_equal(exported, model, 1, prompt, tokens)
        prompt = random_ids(1, 6)  # from 6 to 12, token by token
        answers = [one.generate(prompt, max_new_tokens=6, do_sample=False).tolist() for one in (exported, model)]
        assert answers[0] == answers[1]
    with pytest.raises(ValueError, match=f"rope_type='{rope}' chooses its frequencies .* coreml"):
        export(model, tmp_path / "coreml", "coreml", shapes="fixed:4,4")


@pytest.mark.parametrize("target", TARGETS)
def test_ids_of_32_bits(target, exported_once):
    model, _, exported = exported_once("merged", target, "fixed:9,8" if target == "coreml" else "dynamic")
    ids = random_ids(1, 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :2]}
    found = exported(**{name: tensor.int() for name, tensor in inputs.items()}).logits
    assert torch.equal(found, exported(**inputs).logits)


def test_a_model_of_another_type(tmp_path):
    from toys import make_llama

    with pytest.raises(ValueError, match="LlamaForCausalLM of model type 'llama' cannot be exported"):
        export_model(make_llama(), None, "onnx", tmp_path / "exported")


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_a_model_that_is_not_in_float32(target, tmp_path):
    """As transformers 5 loads one that was saved in bfloat16. It is exported and proven in float32, and stays as it
    was in every part."""
    toy(kind="merged", **SMALLEST).bfloat16().save_pretrained(tmp_path / "student")
    model, whole = (
        RopeEncDecForConditionalGeneration.from_pretrained(tmp_path / "student", dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    model.train().model.encoder.eval()

    def state():
        tensors = {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in model.state_dict().items()}
        return tensors, {name: module.training for name, module in model.named_modules()}, model.tokenizer

    before = state()
    exported = export(model, tmp_path / "exported", target)
    assert state() == before
    assert_logits_equal(exported, whole.eval(), 2, 5, 3)
    report = prove(tmp_path / "exported", model, [{"inputs": [9, 8, 7], "labels": [6, 5]}], max_new_tokens=4)
    assert report["failures"] == [] and state() == before


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_in_training_stays_so(fails, tmp_path, monkeypatch):
    model = toy(kind="merged", **SMALLEST).train()
    if fails:
        monkeypatch.setattr(backend_of("onnx"), "export", lambda *_: (_ for _ in ()).throw(OSError("No space left")))
        with pytest.raises(OSError, match="No space left"):
            export(model, tmp_path / "exported", "onnx")
    else:
        export(model, tmp_path / "exported", "onnx")
    assert all(module.training for module in model.modules())


def test_nothing_half_done_is_left(tmp_path, monkeypatch):
    from hf_encdec_distill.export import onnx

    monkeypatch.setattr(onnx, "_name_ports", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        export(toy(kind="merged"), tmp_path / "exported", "onnx")
    assert not list(tmp_path.iterdir())
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "mine").touch()
    with pytest.raises(ValueError, match="is not empty"):
        export(toy(kind="merged"), tmp_path / "exported", "onnx")


def test_a_missing_backend_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(backend_of("onnx"), "packages", ("onnxruntime", "no_such_package"))
    with pytest.raises(ImportError, match=r'onnx needs no_such_package: pip install "hf-encdec-distill\[onnx\]"'):
        export(toy(kind="merged"), tmp_path / "exported", "onnx")


def test_what_is_given_is_used_or_refused(exported_once, tmp_path):
    """Labels as PyTorch has them; what no graph takes is said, and not passed over."""
    model, _, exported = exported_once("separate", "onnx", "dynamic")
    ids, labels = random_ids(2, 5), torch.tensor([[7, 9, 4], [8, 5, -100]])
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = model(**prompt, labels=labels)
    found = exported(**prompt, labels=labels)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-4)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    loss, logits, *_ = exported(**prompt, labels=labels, return_dict=False)
    assert float(loss) == float(found.loss) and torch.equal(logits, found.logits)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    for given, message in (
        (prompt, "decoder_input_ids, or labels"),
        ({"decoder_input_ids": labels}, "the encoder needs input_ids"),
        ({**prompt, "decoder_input_ids": ids, "decoder_attention_mask": mask}, "decoder_attention_mask has zeros"),
        ({"inputs_embeds": torch.zeros(2, 5, 8), "decoder_input_ids": ids}, "inputs_embeds: an export takes token"),
    ):
        with pytest.raises(ValueError, match=message):
            exported(**given)
    with pytest.raises(ValueError, match="decoder_attention_mask"):
        exported.generate(**prompt, decoder_input_ids=ids[:, :3], decoder_attention_mask=mask, max_new_tokens=2)
    for guess in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": model}):
        with pytest.raises(ValueError, match="the cache of an export cannot"):
            exported.generate(**prompt, max_new_tokens=2, do_sample=False, **guess)
    with pytest.raises(ValueError, match="copy that to"):
        exported.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
