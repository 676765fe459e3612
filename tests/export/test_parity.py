"""The proof: what is equal passes, what is quantised is judged by what it costs, and what is broken is caught."""

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from architectures import TARGETS
from onnx import helper, numpy_helper
from toys import make_config, make_model

from hf_encdec_distill.cards import write_model_card
from hf_encdec_distill.cards.loading import note_exports
from hf_encdec_distill.cli.export import _page
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.distillation.options.fake_quantization import fake_quantized
from hf_encdec_distill.export import mil_interpreter
from hf_encdec_distill.export.backends import backend_of, targets
from hf_encdec_distill.export.exporting import export_model
from hf_encdec_distill.export.manifest import write_manifest
from hf_encdec_distill.export.parity import _across_the_limit, _failures, prove
from hf_encdec_distill.export.recipe import BOUNDS, Shapes


CASES = [(target, variant) for variant in BOUNDS for target in TARGETS if variant in backend_of(target).variants]


def shapes_of(target):
    return Shapes() if target in ("genai", "gguf") else Shapes.parse("fixed:8,8")


def exported(model, folder, target, variant="fp32", shapes=None):
    return export_model(model, None, target, folder, variant, shapes or shapes_of(target))


@pytest.fixture(scope="module")
def exported_once(trained, tmp_path_factory):
    """The folder of `(target, variant)`, which is written once and stays as it is."""
    return functools.cache(lambda *which: exported(trained, tmp_path_factory.mktemp("once") / "exported", *which))


@pytest.mark.parametrize("target,variant", CASES)
def test_every_variant_of_every_target(target, variant, exported_once, trained, rows):
    """On weights that mean something; only int4 of 64 channels is allowed to cost more than its bounds."""
    report = prove(exported_once(target, variant), trained, rows, max_new_tokens=7)
    if variant != "int4":
        assert report["failures"] == []
    assert report["tokens"]["greedy"] >= {"int4": 0.5, "palette4": 0.75}.get(variant, 1.0)
    assert report["ce"]["pytorch"] < 0.2 and report["megabytes"]["exported"] > 0
    assert all(report["seconds"][side]["token"] > 0 for side in ("exported", "pytorch"))
    grid = {(case["batch"], case["prompt"], case["target"]) for case in report["shapes"]}
    assert (1, 1, 1) in grid and any(batch > 1 for batch, _, _ in grid)
    if variant == "fp32":
        assert report["logits"] < 1e-5


def stored_matrices(folder):
    """What MatMulNBits and GatherBlockQuantized of the graphs in a folder compute with, each `[out, in]`, as ONNX
    Runtime's documentation of these operators has it; and the names of matrices that other nodes read."""
    found, floats = [], []
    for file in sorted(folder.glob("*.onnx")):
        model = onnx.load(file)
        weights = {weight.name: numpy_helper.to_array(weight) for weight in model.graph.initializer}
        for node in model.graph.node:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            names = list(node.input)
            if node.op_type == "MatMulNBits":
                rows, columns = attributes["N"], attributes["K"]
                packed, scales, zeros = (weights[name] for name in names[1:4])
                values = np.stack((packed & 15, packed >> 4), axis=-1).reshape(rows, -1, 32)
                scales = scales.reshape(rows, -1, 1)
                zeros = zeros.reshape(rows, -1)
                zeros = np.stack((zeros & 15, zeros >> 4), axis=-1).reshape(rows, -1)[:, : scales.shape[1], None]
            elif node.op_type == "GatherBlockQuantized":
                values, scales, zeros = (weights[names[i]] for i in (0, 2, 3))
                rows, columns = values.shape
                values, scales, zeros = (a.astype(np.float32) for a in (values, scales, zeros))
                values, scales, zeros = values.reshape(rows, -1, 32), scales[..., None], zeros[..., None]
            else:
                floats += [name for name in names if name in weights and weights[name].ndim > 1]
                continue
            matrix = (values.astype(np.float32) - zeros.astype(np.float32)) * scales
            found.append(matrix.reshape(rows, -1)[:, :columns])
    return found, floats


def test_int4_is_what_a_student_is_trained_for(exported_once, trained):
    """`qat`: all matrices of the graphs are those that the student has while it is rounded; none is left in floats."""
    found, floats = stored_matrices(exported_once("onnx", "int4"))
    read = [name for name, weight in trained.named_parameters() if weight.requires_grad and weight.dim() > 1]
    with fake_quantized(trained, "int4"):
        ours = [weight.detach().numpy() for name, weight in trained.named_parameters() if name in read]

    def all_in(matrices, others):
        return all(
            any(m.shape == matrix.shape and np.allclose(m, matrix, rtol=1e-5, atol=1e-6) for m in others)
            for matrix in matrices
        )

    assert len(read) > 20 and not floats
    assert all_in(found, ours) and all_in(ours, found)


def test_what_is_stored_in_fewer_bits_is_smaller(exported_once):
    """Of the weights of matrix products; a toy's other bytes do not shrink."""
    sizes = {}
    for variant in ("fp32", "fp16", "int8"):
        sizes[variant] = sum(file.stat().st_size for file in exported_once("openvino", variant).glob("*.bin"))
    assert sizes["fp16"] < 0.6 * sizes["fp32"] and sizes["int8"] < 0.4 * sizes["fp32"]


def swap_one_weight(target, folder):
    """One number of one matrix, as far as it goes."""
    if target in ("onnx", "genai"):
        file = folder / "model.onnx_data"
        numbers = np.fromfile(file, np.float32)
        numbers[np.abs(numbers).argmax()] *= -1
        numbers.tofile(file)
    elif target == "openvino":
        file = folder / "openvino_decoder_model.bin"
        content = bytearray(file.read_bytes())
        numbers = np.frombuffer(content, np.float32, count=len(content) // 4)
        size = np.where(np.isfinite(numbers) & (np.abs(numbers) < 10), np.abs(numbers), 0)
        numbers[size.argmax()] *= -1
        file.write_bytes(content)
    elif target == "gguf":
        reader = gguf.GGUFReader(folder / "decoder.gguf", "r+")
        numbers = next(tensor.data for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight")
        numbers.flat[np.abs(numbers).argmax()] *= -1
        reader.data.flush()
    else:
        file = folder / "decoder.mlpackage" / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
        numbers = np.fromfile(file, np.float32)
        size = np.where(np.isfinite(numbers) & (np.abs(numbers) < 10), np.abs(numbers), 0)
        numbers[size.argmax()] *= -1
        numbers.tofile(file)


@pytest.mark.parametrize("target", TARGETS)
def test_one_changed_weight_is_caught(target, exported_once, trained, rows, tmp_path):
    """Even where the hashes are made to fit."""
    folder = shutil.copytree(exported_once(target, "fp32"), tmp_path / "exported")
    swap_one_weight(target, folder)
    write_manifest(folder, target, "fp32", shapes_of(target), target == "openvino", "float32")
    failures = prove(folder, trained, rows[:3], max_new_tokens=4)["failures"]
    assert any(sentence.startswith("logits differ by") for sentence in failures)


def test_one_wrong_operation_of_the_interpreter_is_caught(exported_once, trained, rows, monkeypatch):
    folder = exported_once("coreml", "fp32")
    monkeypatch.setitem(mil_interpreter.OPERATIONS, "cos", mil_interpreter.OPERATIONS["sin"])
    assert not prove(folder, trained, rows[:3], max_new_tokens=4)["failures"]  # a table: no cosine is left to compute
    monkeypatch.setitem(mil_interpreter.OPERATIONS, "silu", mil_interpreter.OPERATIONS["sigmoid"])
    assert prove(folder, trained, rows[:3], max_new_tokens=4)["failures"]


@pytest.mark.parametrize("kind", ["merged", "separate"])
def test_a_rope_that_is_wrong_beyond_its_limit_is_out_of_bounds(kind, rows, tmp_path):
    """However far the limit is from the prompts of the rows: the one export has it at 64, the other never."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "attention_factor": 1.0}
    fields = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1, "max_position_embeddings": 512}
    model, never = (
        make_model(kind, rope_parameters={**rope, "original_max_position_embeddings": limit, "factor": 8.0}, **fields)
        for limit in (64, 512)
    )
    never.load_state_dict(model.state_dict())
    wrong = prove(exported(never, tmp_path / "wrong", "onnx", shapes=Shapes()), model, rows[:1], max_new_tokens=1)
    if kind == "merged":
        right = prove(exported(model, tmp_path / "right", "onnx", shapes=Shapes()), model, rows[:1], max_new_tokens=1)
        assert right["failures"] == []
    [failure] = wrong["failures"]
    assert failure.startswith("logits differ by")
    differs = [(case["prompt"], case["target"]) for case in wrong["shapes"] if case["max"] > 1e-4]
    assert differs == [(72, 1), {"merged": (64, 1), "separate": (1, 65)}[kind]]


@pytest.mark.parametrize(
    ("rope", "shapes", "compared"),
    [
        ("dynamic", "dynamic", [(1, 136, 1), (1, 128, 1)]),
        ("dynamic", "fixed:128,4", [(1, 128, 1)]),  # no longer prompt is taken
        ("longrope", "dynamic", []),  # 131072: attention scores would fill any memory
        ("default", "dynamic", []),
    ],
)
def test_how_far_the_grid_goes(rope, shapes, compared):
    parameters = {"rope_type": rope, "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    parameters["original_max_position_embeddings"] = 131072
    config = make_config("merged", rope_parameters=parameters, max_position_embeddings=128)
    assert _across_the_limit(config, Shapes.parse(shapes)) == compared


def test_not_a_number_is_out_of_bounds(exported_once, trained, rows, monkeypatch):
    from hf_encdec_distill.export.runtime import ExportedForConditionalGeneration

    folder = exported_once("onnx", "int8")
    forward = ExportedForConditionalGeneration.forward

    def broken(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.logits = torch.full_like(outputs.logits, torch.nan)
        return outputs

    monkeypatch.setattr(ExportedForConditionalGeneration, "forward", broken)
    failures = prove(folder, trained, rows[:3], max_new_tokens=4)["failures"]
    assert any("cross-entropy rises by nan%" in sentence for sentence in failures)


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_padded_prompts_that_are_not_a_number_are_out_of_bounds(variant, exported_once, trained, rows, monkeypatch):
    """No row has pads, and of the grid's cases those without come first."""
    from hf_encdec_distill.export.runtime import ExportedForConditionalGeneration

    folder = exported_once("onnx", variant)
    forward = ExportedForConditionalGeneration.forward

    def broken(self, input_ids=None, attention_mask=None, **kwargs):
        outputs = forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if input_ids is not None and not attention_mask.all():
            outputs.logits = torch.full_like(outputs.logits, torch.nan)
        return outputs

    monkeypatch.setattr(ExportedForConditionalGeneration, "forward", broken)
    report = prove(folder, trained, rows[:3], max_new_tokens=4)
    assert np.isfinite(report["shapes"][0]["max"]) and np.isfinite(report["ce"]["exported"])
    assert "not all logits are finite numbers" in report["failures"]


@pytest.mark.parametrize("variant", ["fp32", "fp16", "int8", "int4"])
def test_an_export_that_reads_pads_is_out_of_bounds(variant, exported_once, trained, rows, monkeypatch):
    """Real rows have none, and what rounding of weights costs would hide it from the grid."""
    from hf_encdec_distill.export.runtime import ExportedForConditionalGeneration

    folder = exported_once("onnx", variant)
    forward = ExportedForConditionalGeneration.forward

    def broken(self, input_ids=None, attention_mask=None, **kwargs):
        mask = None if attention_mask is None else torch.ones_like(attention_mask)
        return forward(self, input_ids=input_ids, attention_mask=mask, **kwargs)

    monkeypatch.setattr(ExportedForConditionalGeneration, "forward", broken)
    failures = prove(folder, trained, rows[:3], max_new_tokens=4)["failures"]
    assert any(sentence.startswith("pads change logits by") for sentence in failures)


@pytest.mark.parametrize(("ce", "holds"), [((0.0, 0.0), True), ((1e-6, 2e-6), True), ((0.0, 0.01), False)])
def test_a_cross_entropy_of_next_to_nothing_may_rise_by_next_to_nothing(ce, holds):
    report = {"ce": dict(zip(("pytorch", "exported"), ce, strict=True)), "tokens": {}, "agreement": 1.0}
    report |= {"logits": 0.0, "padding": 0.0}
    assert bool(_failures(report, BOUNDS["int8"])) is not holds


def test_a_student_that_was_trained_without_its_cache(trained, rows, tmp_path):
    """`Trainer` writes `use_cache=False` into the config, for one where gradients are checkpointed."""
    trained.config.use_cache = False
    try:
        report = prove(exported(trained, tmp_path / "exported", "onnx"), trained, rows[:2], max_new_tokens=7)
    finally:
        trained.config.use_cache = True
    assert report["failures"] == []


def test_rows_that_do_not_fit(trained, tmp_path):
    folder = export_model(trained, None, "onnx", tmp_path / "exported", "fp32", Shapes.parse("fixed:4,4"))
    with pytest.raises(ValueError, match="none of 1 rows fits an export of shapes fixed:4,4"):
        prove(folder, trained, [{"inputs": [3] * 5, "labels": [3, 2]}])


def test_every_variant_has_bounds():
    assert set(BOUNDS) == {variant for target in targets() for variant in backend_of(target).variants}
    assert BOUNDS["fp32"].logits <= 1e-4 and BOUNDS["fp32"].tokens == 1.0


# The command


def export(folder, out, *options):
    data = ["--dataset", str(folder / "rows.jsonl"), "--rows", "4"]
    return main(["export", str(folder / "student"), str(out), *data, *options])


def test_export_of_several_targets_and_generate(trained_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(trained_folder, out, "--target", "onnx,coreml", "--shapes", "fixed:8,8", "--json") == 0
    reports = json.loads(capsys.readouterr().out)
    for target in ("onnx", "coreml"):
        report = json.loads((out / target / "parity.json").read_text())
        assert report == reports[target]
        assert report["failures"] == [] and report["rouge_l"]["exported"] == report["rouge_l"]["pytorch"] > 0.9
        assert main(["generate", str(out / target), "w1 w2 w3", "w9 w8", "--max-new-tokens", "6"]) == 0
        assert capsys.readouterr().out == "w3 w2 w1\nw8 w9\n"
    assert sorted(path.name for path in out.iterdir()) == ["coreml", "onnx"]
    assert main(["generate", str(trained_folder / "student"), "w1 w2 w3", "--num-beams", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"answers": [{"text": "w1 w2 w3", "answer": "w3 w2 w1"}]}
    assert main(["generate", str(out / "onnx"), "w1 " * 9]) == 2
    assert "a prompt of 9 tokens: this export (fixed:8,8) takes at most 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "variant, flags, said",
    [
        ("int8", {"avx2"}, True),
        ("int8", {"avx2", "avx_vnni"}, False),
        ("int4", {"avx2", "avx512_f"}, True),
        ("int4", {"avx2", "avx512_f", "avx512_vnni"}, False),
        ("fp32", {"avx2"}, False),
        ("int8", {"asimd"}, False),
        ("int8", set(), False),  # a system that does not tell
    ],
)
def test_a_cpu_that_multiplies_what_is_quantised_in_float32(variant, flags, said, monkeypatch):
    report = {"variant": variant, "logits": 0.0, "agreement": 1.0, "failures": []}
    report |= {"tokens": {"greedy": 1.0, "beam": 1.0}, "megabytes": {"exported": 1.0, "pytorch_fp32": 4.0}}
    report["seconds"] = {side: {"first_token": 0.1, "token": 0.01} for side in ("exported", "pytorch")}
    monkeypatch.setattr("hf_encdec_distill.devices.cpu_flags", lambda: flags)
    assert ("no VNNI" in _page({"openvino": report})) == said
    assert "no VNNI" not in _page({"onnx": report})


def test_the_students_card_lists_what_is_exported_beside_it(trained_folder, tmp_path, capsys):
    """The rest of the card stays, also what somebody wrote into it; exports of another student are not its own."""
    shutil.copytree(trained_folder, tmp_path / "run")
    folder = tmp_path / "run" / "student"
    card = write_model_card(folder, {"teacher": {"name": "a teacher"}}, "me/tiny")
    card.write_text(card.read_text().replace("## Limits", "## Mine\n\nBy hand.\n\n## Limits"))
    before = card.read_text()
    assert export(trained_folder, folder / "theirs", "--target", "onnx", "--shapes", "fixed:8,8") == 0
    assert card.read_text() == before
    shutil.rmtree(folder / "theirs")
    assert export(tmp_path / "run", folder / "onnx", "--target", "onnx", "--shapes", "fixed:8,8") == 0
    after = card.read_text()
    assert "| `onnx` | onnx, fp32, fixed:8,8 |" in after and 'snapshot_download("me/tiny"' in after
    begin, end = (re.search(f"<!-- {words}.*-->", after) for words in ("How to load", "End of"))
    assert before.startswith(after[: begin.end()]) and before.endswith(after[end.start() :])
    assert begin.end() < after.index("| `onnx`") < end.start() < after.index("By hand.")
    card.write_text(before.replace(begin[0], ""))  # as the line says
    note_exports(folder, "rope_encdec")
    assert card.read_text() == before.replace(begin[0], "")


def test_what_is_out_of_bounds_is_rejected(trained_folder, tmp_path, capsys, monkeypatch):
    from hf_encdec_distill.export import onnx

    quantized = onnx._quantized
    monkeypatch.setattr(onnx, "_quantized", lambda proto, variant: break_a_weight(quantized(proto, variant)))
    (tmp_path / "out.partial").mkdir()  # of somebody who calls it so
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    assert export(trained_folder, tmp_path / "out", "--target", "onnx", "--variant", "int8") == 2
    captured = capsys.readouterr()
    assert "not equal to PyTorch within bounds: onnx: cross-entropy rises by" in captured.err
    assert "within bounds" in captured.out and f"kept as {tmp_path / 'out'}.rejected" in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "out.rejected"]
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "out.rejected" / "parity.json").read_text())["failures"]
    assert export(trained_folder, tmp_path / "out", "--target", "onnx") == 2
    assert "out.rejected is not empty: remove it" in capsys.readouterr().err


def break_a_weight(proto):
    from onnx import TensorProto, numpy_helper

    for weight in proto.graph.initializer:
        if weight.data_type == TensorProto.FLOAT and len(weight.dims) == 1 and weight.dims[0] == 64:
            weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    return proto


@pytest.mark.parametrize(
    "options,message",
    [
        (["--target", "tflite"], "target 'tflite': choose of onnx, openvino, coreml"),
        (["--target", "onnx", "--variant", "int3"], "variant 'int3': choose of"),
        (["--target", "onnx,openvino", "--variant", "palette4"], "is for coreml, not for onnx"),
        (["--target", "onnx", "--shapes", "8x8"], "shapes '8x8': give dynamic, fixed:SRC,TGT"),
        (["--target", "onnx", "--shapes", "fixed:0,8"], "lengths in tokens of at least 1"),
        (["--target", "onnx", "--rows", "0"], "--rows 0: give at least 1"),
    ],
)
def test_errors_before_anything_is_written(options, message, trained_folder, tmp_path, capsys):
    assert export(trained_folder, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_current_folder(trained_folder, tmp_path, monkeypatch):
    """It gets the files, and stays the same folder: whoever stands in it would else be left in one that is gone."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert export(trained_folder, ".", "--target", "onnx", "--shapes", "fixed:8,8") == 0
    assert here.samefile(Path.cwd()) and [path.name for path in tmp_path.iterdir()] == ["here"]
    assert {"exported.json", "parity.json", "encoder_model.onnx"} < {path.name for path in here.iterdir()}
    assert all(path.is_file() for path in here.iterdir())


@pytest.mark.parametrize("given", [{"prompts": (5,)}, {"targets": 8}])
def test_shapes_fix_both_lengths_or_neither(given):
    with pytest.raises(ValueError, match="give both, or neither"):
        Shapes(**given)


def test_a_model_of_another_type(make_bpe_tokenizer, tmp_path, capsys):
    from toys import make_llama

    make_llama().save_pretrained(tmp_path / "llama")
    assert main(["export", str(tmp_path / "llama"), str(tmp_path / "out"), "--target", "onnx"]) == 2
    assert "is a llama: only students of this package can be exported" in capsys.readouterr().err


@pytest.mark.process
def test_commands_without_backends_say_what_to_install(trained_folder, tmp_path):
    """A process in which ONNX Runtime cannot be imported."""
    code = (
        "import sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'onnxruntime' else find(name, *a)\n"
        "from hf_encdec_distill.cli.main import main\n"
        "sys.exit(main(['export', *sys.argv[1:], '--target', 'onnx']))"
    )
    command = [sys.executable, "-c", code, str(trained_folder / "student"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and 'onnx needs onnxruntime: pip install "hf-encdec-distill[onnx]"' in result.stderr
