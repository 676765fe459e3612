"""A target is one file: a fourth, written here, goes the way of the three without a change to the package."""

import json
import subprocess
import sys

import pytest
import torch
from toys import make_model, ragged

from hf_encdec_distill.cards import write_model_card
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.export import backends
from hf_encdec_distill.export.backends import Backend, backend_of, register_backend, targets
from hf_encdec_distill.export.exporting import export_model
from hf_encdec_distill.export.graphs import Graphs
from hf_encdec_distill.export.parity import prove
from hf_encdec_distill.export.runtime import ExportedForConditionalGeneration
from hf_encdec_distill.export.tracing import export_programs


SMALLEST = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}


class ToyGraphs(Graphs):
    def __init__(self, folder, graphs, shapes, dtype):
        super().__init__(graphs, shapes, dtype)
        self.programs = {name: torch.export.load(folder / f"{name}.pt2").module() for name in graphs}

    @torch.no_grad()
    def run(self, graph, inputs):
        tensors = (torch.as_tensor(inputs[port.name]) for port in self.graphs[graph].inputs)
        return [output.numpy() for output in self.programs[graph](*tensors)]


class ToyBackend(Backend):
    """PyTorch's own programs, run by PyTorch."""

    name = "toy"
    label = "a toy"
    runtime = "PyTorch's programs"
    packages = ("numpy", "torch")
    variants = ("fp32",)
    files = ("*.pt2",)
    rows = 3

    def settle(self, config, variant, shapes, stateful, options):
        if stateful:
            raise ValueError("toys have no states: leave stateful out")
        return shapes, False

    def cache_dtype(self, variant):
        return "float32"

    def export(self, model, graphs, shapes, variant, stateful, folder, license, options):
        for name, program in export_programs(model, graphs).items():
            torch.export.save(program, folder / f"{name}.pt2")

    def load(self, folder, graphs, shapes, dtype, stateful):
        return ToyGraphs(folder, graphs, shapes, dtype)

    def devices(self):
        return ["a desk"]


@pytest.fixture
def toy():
    """The toy is a target during a test."""
    assert register_backend(ToyBackend) is ToyBackend
    yield
    del backends._BACKENDS["toy"]


@pytest.fixture(scope="module")
def student(make_bpe_tokenizer, tmp_path_factory):
    """A folder with a small `student`, `rows.jsonl` beside it, and the model that is in it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    tokenizer = make_bpe_tokenizer(chat_template=None)
    model = make_model("merged", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **SMALLEST)
    model.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    rows = [
        {"source": f"def add_{i}(a): return a + {i}", "target": f"Return the sum of a and {i}."} for i in range(60)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model.folder = folder / "student"
    return model


def export(student, out, *options):
    data = ["--dataset", str(student.folder.parent / "rows.jsonl")]
    return main(["export", str(student.folder), str(out), "--target", "toy", *data, *options])


def test_a_target_more_is_exported_proven_and_answers(toy, student, tmp_path):
    assert targets() == ("onnx", "openvino", "coreml", "genai", "gguf", "toy")
    folder = export_model(student, None, "toy", tmp_path / "exported")
    manifest = json.loads((folder / "exported.json").read_text())
    assert manifest["target"] == "toy" and set(manifest["files"]) == {"encoder.pt2", "decoder.pt2"}
    report = prove(folder, student, [{"inputs": [9, 8, 7], "labels": [6, 5]}], max_new_tokens=4)
    assert report["failures"] == [] and report["target"] == "toy" and report["logits"] < 1e-5
    assert report["tokens"] == {"greedy": 1.0, "beam": 1.0}
    model = ExportedForConditionalGeneration.from_pretrained(folder)
    ids, mask, _ = ragged("left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), student.generate(ids, **options))
    (folder / "decoder.pt2").write_bytes(b"another")
    with pytest.raises(ValueError, match="decoder.pt2 is changed after the export"):
        ExportedForConditionalGeneration.from_pretrained(folder)


def test_a_fourth_target_from_the_command_line_to_the_card(toy, student, tmp_path, capsys):
    """And through the commands that read an exported folder."""
    from hf_encdec_distill.cli.demo import _student
    from hf_encdec_distill.cli.push import files_to_push

    folder = student.folder
    card = write_model_card(folder, {}, "me/tiny")
    assert export(student, folder / "toy", "--json") == 0
    report = json.loads(capsys.readouterr().out)["toy"]
    assert report["failures"] == [] and report["rows"] == 3
    answers = []
    for model in (folder, folder / "toy"):
        assert main(["generate", str(model), "add two numbers", "--max-new-tokens", "6"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != "\n"
    text = card.read_text()
    assert "### PyTorch's programs\n\n```bash\n" in text and "| `toy` | toy, fp32, dynamic |" in text
    assert 'allow_patterns="toy/*"' in text
    assert _student(str(folder / "toy"))[0] == "PyTorch's programs fp32"
    assert {"toy/encoder.pt2", "toy/decoder.pt2", "toy/exported.json"} <= set(files_to_push(folder))


@pytest.mark.parametrize(
    "options,message",
    [
        (
            ["--variant", "int8"],
            "variant 'int8' is for onnx and openvino and coreml and genai and gguf, not for toy: choose of fp32",
        ),
        (
            ["--shapes", "ranged:8,8"],
            "shapes ranged:8,8: toy takes dynamic and fixed:SRC,TGT; the others are for core",
        ),
        (["--calibration-rows", "2"], "calibration rows are for target openvino with variant int4, not for toy with"),
        (["--kv-cache-precision", "u8"], "a KV-cache precision is for target openvino, not for toy: leave it out"),
    ],
)
def test_what_a_fourth_target_does_not_do_is_said(toy, options, message, student, tmp_path, capsys):
    assert export(student, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_fourth_target_lacks_is_named(toy, student, tmp_path, monkeypatch):
    monkeypatch.setattr(backend_of("toy"), "packages", ("numpy", "no_such_package"))
    with pytest.raises(ImportError, match=r'toy needs no_such_package: pip install "hf-encdec-distill\[toy\]"'):
        export_model(student, None, "toy", tmp_path / "exported")


def test_a_target_more_is_in_help_and_doctor(toy, capsys, monkeypatch):
    from hf_encdec_distill.cli import doctor

    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "any of onnx, openvino, coreml, genai, gguf and toy" in " ".join(capsys.readouterr().out.split())
    requirements = doctor._requirements()
    monkeypatch.setattr(doctor, "_requirements", lambda: requirements | {"toy": []})
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["extras"]["toy"]["adds"] == "export to a toy" and said["runtimes"]["numpy"] == ["a desk"]


def test_the_name_of_a_target_is_its_own(toy):
    with pytest.raises(ValueError, match="ToyBackend: ToyBackend has the name 'toy': choose another"):
        register_backend(ToyBackend)


def test_a_target_that_lacks_a_part_is_refused(toy):
    class Half(ToyBackend):
        name = "half"
        load = Backend.load

    with pytest.raises(TypeError, match="load"):
        register_backend(Half)


@pytest.mark.parametrize("target", ["onnx", "openvino", "coreml", "genai", "gguf"])
def test_the_help_of_export_is_true_of_each_target(target, capsys):
    """What it says in words of a target's rows and variants."""
    backend = backend_of(target)
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"(default: {Backend.rows}, or 6 for coreml)" in text
    assert backend.rows == {"coreml": 6}.get(target, Backend.rows)
    assert "fp32, fp16, int8, int4, palette4 for coreml, or q4_k_m for gguf" in text
    own = {"coreml": ["palette4"], "gguf": ["q4_k_m"]}.get(target, [])
    assert backend.variants == ("fp32", "fp16", "int8", "int4", *own)


def modules_after(code):
    """Names of the packages that a fresh interpreter has loaded after `code`."""
    program = f"{code}\nimport sys\nprint('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_names_of_targets_need_no_package():
    code = "from hf_encdec_distill.export.backends import targets\nassert targets()[0] == 'onnx'"
    assert not modules_after(code) & {"torch", "numpy", "transformers", "onnx", "openvino", "coremltools"}


def test_a_backend_imports_its_packages_only_to_use_them():
    code = "from hf_encdec_distill.export.backends import backend_of, targets\nlist(map(backend_of, targets()))"
    packages = {package for target in targets() for package in backend_of(target).packages}
    assert packages >= {"onnx", "onnxruntime", "openvino", "nncf", "coremltools"}
    assert not modules_after(code) & packages
