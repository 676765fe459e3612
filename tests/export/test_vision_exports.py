"""Exports of students that read images, against the same student in PyTorch."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from architectures import TARGETS
from PIL import Image
from toys import make_model
from vision_export_toys import DIGITS, FIRST_WORD, WORDS, batch, make_student, make_tokenizer

from hf_encdec_distill.cli.main import main
from hf_encdec_distill.cli.serve import BadRequest, Service
from hf_encdec_distill.export.answering import ExportedStudent
from hf_encdec_distill.export.backends import backend_of
from hf_encdec_distill.export.exporting import export_model
from hf_encdec_distill.export.manifest import write_manifest
from hf_encdec_distill.export.parity import prove
from hf_encdec_distill.export.recipe import Shapes
from hf_encdec_distill.export.runtime import ExportedForConditionalGeneration


TOLERANCE = 1e-5  # of the largest number
READING = [target for target in TARGETS if backend_of(target).reads_images]
MIXED = [[1, "image", 2, "image", 1], ["image", 3], [4]]  # two images in a prompt, one, and none


def export(model, processor, folder, target, shapes="dynamic", **options):
    export_model(model, processor, target, folder, shapes=Shapes.parse(shapes), **options)
    return ExportedForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory):
    """Target, shapes and options of the student -> it, its processor, and the folder and model of its export."""

    @functools.cache
    def make(target, shapes, options):
        model, processor = make_student(**dict(options))
        folder = tmp_path_factory.mktemp("once") / "exported"
        return model, processor, folder, export(model, processor, folder, target, shapes)

    def find(target, shapes="dynamic", **options):
        return make(target, shapes, frozenset({"tower": "clip", "shuffle": 1, **options}.items()))

    return find


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@torch.no_grad()
def assert_equal(exported, model, inputs, beams=(1, 3)):
    """Features, logits of three target tokens, and answers."""
    if "pixel_values" in inputs:
        found = exported.graphs.image_features(inputs["pixel_values"].numpy())
        assert_close(torch.from_numpy(found), model.get_image_features(inputs["pixel_values"]))
    labels = torch.randint(FIRST_WORD, FIRST_WORD + DIGITS, (len(inputs["input_ids"]), 3))
    both = {**inputs, "decoder_input_ids": labels}
    assert_close(exported(**both).logits, model(**both).logits)
    for number in beams:
        options = {"max_new_tokens": 5, "num_beams": number, "do_sample": False}
        assert exported.generate(**inputs, **options).tolist() == model.generate(**inputs, **options).tolist()


@pytest.mark.parametrize(
    ("target", "tower", "shuffle"),
    [
        ("onnx", "clip", 1),
        ("onnx", "siglip", 2),
        ("onnx", "dinov2", 1),
        ("openvino", "siglip", 1),
        ("openvino", "dinov2_with_registers", 2),
    ],
)
def test_a_batch_with_two_images_one_and_none(target, tower, shuffle, exported_once):
    model, processor, _, exported = exported_once(target, tower=tower, shuffle=shuffle)
    for side in ("right", "left"):
        assert_equal(exported, model, batch(processor, MIXED, side))
    assert_equal(exported, model, batch(processor, [[3], [1]]), beams=(1,))
    assert_equal(exported, model, batch(processor, [["image"]]), beams=(1,))
    inputs = batch(processor, MIXED)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"])
    assert (features[0] - features[1]).abs().max() > 0.1 * features.abs().max()  # or one could stand for the other


@pytest.mark.parametrize(
    ("target", "shapes", "options"),
    [
        ("onnx", "fixed:40,8", {"shuffle": 1}),
        ("openvino", "fixed:12,8", {"shuffle": 2, "kind": "separate", "encoder_pooling": 3}),
        ("coreml", "fixed:12,8", {"shuffle": 2}),
        ("coreml", "ranged:40,8", {"tower": "siglip", "kind": "separate"}),
        ("coreml", "enumerated:9,40,8", {"tower": "dinov2"}),
        ("coreml", "fixed:12,8", {"tower": "dinov2_with_registers", "shuffle": 2}),
    ],
    ids=str,
)
def test_graphs_of_one_image(target, shapes, options, exported_once):
    """With sizes that are fixed the encoder takes as many as the longest prompt has room for, and prompts may have
    fewer."""
    model, processor, _, exported = exported_once(target, shapes, **options)
    for rows in (MIXED, [[3], [1]]):
        assert_equal(exported, model, batch(processor, rows), beams=(1, 2))


def test_fixed_openvino_graphs_have_no_open_dimension(exported_once):
    import openvino

    _, _, folder, _ = exported_once("openvino", "fixed:12,8", shuffle=2, kind="separate", encoder_pooling=3)
    files = list(folder.glob("*.xml"))
    assert len(files) == 3
    for file in files:
        model = openvino.Core().read_model(file)
        assert all(port.get_partial_shape().is_static for op in model.get_ops() for port in op.outputs())


@pytest.mark.parametrize("tower", ["clip", "dinov2_with_registers"])
def test_the_size_is_the_processors(tower, tmp_path):
    """Positions are fitted to it, once: no resampling is left in the graph."""
    import onnx

    model, processor = make_student(tower, size=(8, 12))
    exported = export(model, processor, tmp_path / "exported", "onnx")
    assert exported.manifest["image_size"] == [8, 12]
    assert_equal(exported, model, batch(processor, MIXED))
    nodes = onnx.load(tmp_path / "exported" / "vision_model.onnx", load_external_data=False).graph.node
    assert "Resize" not in {node.op_type for node in nodes}


def test_onnx_graphs_say_what_they_are(exported_once):
    import onnx

    _, _, folder, _ = exported_once("onnx", tower="siglip", shuffle=2)
    axes = {}
    for name in ("vision", "encoder"):
        graph = onnx.load(folder / f"{name}_model.onnx", load_external_data=False).graph
        for port in (*graph.input, *graph.output):
            axes[name, port.name] = [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim]
    assert axes["vision", "pixel_values"] == ["images", 3, 8, 8]
    assert axes["vision", "image_features"] == axes["encoder", "image_features"] == ["images", 4, 32]
    assert axes["encoder", "input_ids"] == ["batch", "prompt"]
    assert "vision_model.onnx" in json.loads((folder / "exported.json").read_text())["files"]


def test_what_xcode_shows(exported_once):
    import coremltools

    _, _, folder, _ = exported_once("coreml", "fixed:12,8", shuffle=2)
    for name in ("vision", "encoder"):
        described = coremltools.utils.load_spec(str(folder / f"{name}.mlpackage")).description
        assert described.metadata.shortDescription and described.metadata.userDefined["image_token_id"] == "14"
        assert all(port.shortDescription for port in (*described.input, *described.output))


def test_images_that_are_not_those_of_the_prompt(exported_once):
    model, processor, _, exported = exported_once("onnx")
    one, none = batch(processor, [["image", 2]]), batch(processor, [[3]])
    with pytest.raises(ValueError, match=r"\[16\] image tokens \(id 14\) in the prompts for 0 images of 16"):
        exported.generate(input_ids=one["input_ids"])
    with pytest.raises(ValueError, match=r"\[0\] image tokens \(id 14\) in the prompts for 1 images of 16"):
        exported.generate(input_ids=none["input_ids"], pixel_values=one["pixel_values"])
    halves = torch.cat((one["input_ids"][:, :8], none["input_ids"]), dim=1)
    halves = torch.cat((halves, halves))  # as many in all, but no prompt has a whole one
    with pytest.raises(ValueError, match=r"\[8, 8\] image tokens"):
        exported.generate(input_ids=halves, pixel_values=one["pixel_values"])
    with pytest.raises(
        ValueError, match=r"pixel_values of shape \(1, 3, 4, 8\): this export takes \(images, 3, 8, 8\)"
    ):
        exported.generate(input_ids=one["input_ids"], pixel_values=one["pixel_values"][:, :, :4])


@pytest.mark.parametrize("target", [target for target in TARGETS if target not in READING])
def test_targets_that_read_no_images(target, tmp_path):
    model, processor = make_student()
    message = f"a student that reads images is exported to onnx, openvino, coreml, not to {target}: choose one of them"
    with pytest.raises(ValueError, match=message):
        export(model, processor, tmp_path / "exported", target)
    assert not list(tmp_path.iterdir())


def test_prompts_too_short_for_an_image(tmp_path):
    model, processor = make_student()
    with pytest.raises(ValueError, match="shapes fixed:15,8: an image of 8 x 8 pixels is 16 tokens of a prompt"):
        export(model, processor, tmp_path / "exported", "onnx", "fixed:15,8")


@pytest.mark.parametrize("text", ["w1 w2", "w3"])
def test_answers_without_transformers(text, exported_once):
    """To a text, and to pixels that somebody else has made."""
    model, processor, folder, exported = exported_once("onnx")
    student = ExportedStudent(folder)
    for images, prompt in ((None, text), ([np.eye(8, dtype=np.uint8) * 255], f"{text} <image> w5")):
        inputs = processor(images=images, text=prompt, return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, 1:].tolist()
        ids, pixels = inputs["input_ids"][0].tolist(), inputs.get("pixel_values")
        found = student.generate(ids, 5, None if pixels is None else pixels.numpy())
        assert list(found) == expected
    assert student.encode(text) == processor(text=text)["input_ids"][0]


def test_the_server_reads_text(exported_once):
    _, processor, _, exported = exported_once("onnx")
    service = Service("student", exported, processor.tokenizer, most=8)
    assert service.read("w1 w2") == processor(text="w1 w2")["input_ids"][0]
    with pytest.raises(BadRequest, match="the text has an image token, and no image can be sent here"):
        service.read("w1 <image>")


@pytest.mark.parametrize("size", [8, [8], [8, 0], ["8", 8]])
def test_a_manifest_with_a_size_that_is_none(size, exported_once, tmp_path):
    folder = shutil.copytree(exported_once("onnx")[2], tmp_path / "exported")
    manifest = json.loads((folder / "exported.json").read_text())
    (folder / "exported.json").write_text(json.dumps({**manifest, "image_size": size}))
    with pytest.raises(ValueError, match=r"image_size=.*, expected \[height, width\]"):
        ExportedForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize(
    ("target", "variant"),
    [
        *(("onnx", variant) for variant in ("fp16", "int8", "int4")),
        *(("openvino", variant) for variant in ("int8", "int4")),
        *(("coreml", variant) for variant in ("fp16", "palette4")),
    ],
)
@torch.no_grad()
def test_fewer_bits(target, variant, tmp_path):
    """Of the tower never less than 8."""
    model, processor = make_student(shuffle=2, intermediate_size=64)  # int4 of OpenVINO has blocks of 32
    inputs = batch(processor, MIXED)
    rows = [{"inputs": inputs["input_ids"][1, :7].tolist(), "labels": [3, 2], "pixel_values": np.ones((1, 3, 8, 8))}]
    calibration = rows if (target, variant) == ("openvino", "int4") else None
    folder = tmp_path / "exported"
    exported = export(model, processor, folder, target, "fixed:12,8", variant=variant, calibration=calibration)
    found = torch.from_numpy(exported.graphs.image_features(inputs["pixel_values"].numpy())).float()
    expected = model.get_image_features(inputs["pixel_values"])
    assert 0 < (found - expected).abs().max() < (0.01 if variant == "fp16" else 0.05) * expected.abs().max()
    assert exported(**inputs, decoder_input_ids=inputs["input_ids"][:, :2]).logits.isfinite().all()
    if target == "onnx":
        import onnx

        nodes = {}
        for name in ("vision", "encoder"):
            graph = onnx.load(folder / f"{name}_model.onnx", load_external_data=False).graph
            nodes[name] = {node.op_type for node in graph.node}
        of_int8, of_int4 = "MatMulInteger", "MatMulNBits"
        assert (of_int8 in nodes["vision"]) is (variant != "fp16") and of_int4 not in nodes["vision"]
        assert (of_int4 in nodes["encoder"]) is (variant == "int4")


def test_one_changed_weight_of_the_tower_is_caught(exported_once, tmp_path):
    """Even where the hashes are made to fit."""
    model, processor, whole, _ = exported_once("openvino", tower="siglip")
    rows = []
    for seed in range(2):
        inputs = batch(processor, [["image", 2]], seed=seed)
        ids, pixels = inputs["input_ids"][0].tolist(), inputs["pixel_values"].numpy()
        rows.append({"inputs": ids, "labels": [4, 5, 2], "pixel_values": pixels})
    report = prove(whole, model, rows, max_new_tokens=3)
    assert report["failures"] == [] and report["image_features"] < 1e-5 and report["tokens"]["greedy"] == 1.0
    assert {case["images"] for case in report["shapes"]} == {0, 1, 3}
    folder = shutil.copytree(whole, tmp_path / "exported")
    file = folder / "openvino_vision_model.bin"
    numbers = np.frombuffer(file.read_bytes(), np.float32).copy()
    numbers[np.where(np.abs(numbers) < 10, np.abs(numbers), 0).argmax()] *= -1
    file.write_bytes(numbers.tobytes())
    write_manifest(folder, "openvino", "fp32", Shapes(), True, "float32", {"image_size": [8, 8]})
    failures = prove(folder, model, rows[:1], max_new_tokens=1)["failures"]
    assert any(sentence.startswith("image features differ by") for sentence in failures)
    with pytest.raises(ValueError, match="none of 1 rows has an image"):
        prove(folder, model, [{"inputs": [3, 4], "labels": [4, 3, 2]}], max_new_tokens=1)


# The commands --------------------------------------------------------------------------------------------------------


def picture(number):
    """One of three: a bright patch in one of three places."""
    pixels = np.full((8, 8, 3), 40, np.uint8)
    pixels[2 * number : 2 * number + 2, 4:] = (250, 60, 240)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student as a person has it, its export by the command, and pictures."""
    model, processor = make_student(shuffle=2)
    folder = tmp_path_factory.mktemp("command")
    model.save_pretrained(folder / "student")
    processor.save_pretrained(folder / "student")
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(60):
            words = [WORDS[number % DIGITS], WORDS[number // DIGITS]]
            file.write(json.dumps({"source": " ".join(words), "target": " ".join(words[::-1])}) + "\n")
    options = ["--target", "onnx", "--dataset", str(folder / "rows.jsonl"), "--rows", "3"]
    assert main(["export", str(folder / "student"), str(folder / "exported"), *options]) == 0
    return folder


def test_the_command_exports_and_proves_it(folders):
    report = json.loads((folders / "exported" / "parity.json").read_text())
    assert report["failures"] == [] and 0 < report["image_features"] < 1e-5 and report["rows"] == 3
    assert report["tokens"] == {"greedy": 1.0, "beam": 1.0}


@pytest.mark.parametrize("name", ["exported", "student"])
def test_the_command_answers_to_images(name, folders, capsys):
    """Several texts, each with its own images, one of them with none."""
    model, processor = make_student(shuffle=2)
    texts, of_text = ["w1 <image> w2 <image>", "w3", "<image> w1"], [[2, 0], [], [1]]
    expected = []
    for text, numbers in zip(texts, of_text, strict=True):
        inputs = processor(images=[picture(number) for number in numbers], text=text, return_tensors="pt")
        [answer] = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        expected.append(processor.tokenizer.decode(answer[1:], skip_special_tokens=True).strip())
    given = [part for numbers in of_text for n in numbers for part in ("--image", str(folders / f"{n}.png"))]
    command = ["generate", str(folders / name), "--max-new-tokens", "4", "--json"]
    assert main([*command, *given, *texts]) == 0
    assert [pair["answer"] for pair in json.loads(capsys.readouterr().out)["answers"]] == expected
    assert main([*command, "w3"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == [{"text": "w3", "answer": expected[1]}]
    assert len(set(expected)) == 3


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        (["<image> w1"], [], "image tokens"),
        (["w1"], ["0.png"], "1 images for 0 times '<image>' in 1 texts"),
        (["<image> <image>", "w1"], ["0.png"], "1 images for 2 times '<image>' in 1 texts"),
        (["<image>", "w1"], ["0.png", "1.png"], "1 images for 0 times '<image>' in 1 texts"),
        (["<image> w1"], ["rows.jsonl"], "rows.jsonl' is no image that can be read"),
        (["<image> w1"], ["none.png"], "none.png' is no image that can be read"),
    ],
)
def test_images_that_do_not_fit_the_texts(texts, images, message, folders, capsys):
    given = [part for name in images for part in ("--image", str(folders / name))]
    assert main(["generate", str(folders / "exported"), *texts, *given]) == 2
    assert message in capsys.readouterr().err


def test_the_benchmark_gives_texts_alone(folders, capsys):
    assert main(["bench", str(folders / "student"), "--output", str(folders / "bench")]) == 2
    assert "student reads images, and the benchmark gives it texts alone" in capsys.readouterr().err


def test_images_for_a_student_that_reads_none(folders, tmp_path, capsys):
    tokenizer = make_tokenizer()
    make_model("merged", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    assert main(["generate", str(tmp_path / "text"), "w1", "--image", str(folders / "0.png")]) == 2
    assert "is a rope_encdec, which reads text alone: leave it out" in capsys.readouterr().err
