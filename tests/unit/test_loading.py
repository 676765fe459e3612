"""Models of folders that anybody may have made: each kind of damage is one line, in the reader and in the commands."""

import json
import random
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_files import PAGE, POINTER
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from vision_toys import make_seeing_teacher

from hf_encdec_distill.distillation.teachers.fingerprints import config_digest
from hf_encdec_distill.models.loading import (
    load_config,
    load_generation_config,
    load_merged_teacher,
    load_student,
    load_teacher,
    load_tokenizer,
)


@pytest.fixture
def copy(whole, tmp_path):
    def of(name):
        return shutil.copytree(whole / name, tmp_path / name)

    return of


def refused(load, folder, kind=ValueError) -> str:
    with pytest.raises(kind) as error:
        load(folder)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700, message
    assert folder.name in message
    return message


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_what_is_whole_loads_as_transformers_loads_it(whole):
    for load, auto, name in (
        (load_teacher, AutoModelForCausalLM, "teacher"),
        (load_student, AutoModelForSeq2SeqLM, "student"),
    ):
        ours, theirs = load(whole / name, dtype=torch.float32), auto.from_pretrained(whole / name)
        assert not ours.training and type(ours) is type(theirs)
        for key, weight in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[key], weight)


def test_a_teacher_that_sees_is_loaded_with_its_eyes(tmp_path):
    llava = make_seeing_teacher("llava")
    llava.save_pretrained(tmp_path / "llava")
    ours = load_teacher(tmp_path / "llava", dtype=torch.float32)
    assert type(ours) is type(llava) and not ours.training
    for key, weight in llava.state_dict().items():
        assert torch.equal(ours.state_dict()[key], weight)
    assert config_digest(ours) == config_digest(llava)  # a cache goes on, whoever loads its teacher


NO_WEIGHTS = {
    "empty": (lambda data: b"", "it is empty; download"),
    "pointer": (lambda data: POINTER, "Git LFS pointer, not the file itself; run `git lfs pull`"),
    "page": (lambda data: PAGE, "it is a web page, it begins with '<!DOCTYPE html>'"),
    "cut in the header": (lambda data: data[:50], "it was cut or altered, it has 50 bytes of a header of"),
    "cut in the data": (lambda data: data[:-100], "it was cut or altered, it has"),
    "too much": (lambda data: data + b"more", "it was cut or altered, it has"),
    "noise": (lambda data: random.Random(0).randbytes(1000), "download or save it again"),
    "a header of noise": (lambda data: (40).to_bytes(8, "little") + b"{" + b"\xff" * 60, "download or save it again"),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
@pytest.mark.parametrize("of", ["teacher", "student"])
def test_weights_that_are_none(copy, of, name):
    folder = copy(of)
    file = folder / "model.safetensors"
    damage, message = NO_WEIGHTS[name]
    file.write_bytes(damage(file.read_bytes()))
    said = refused(load_teacher if of == "teacher" else load_student, folder)
    assert f"{file} holds no weights: " in said and message in said


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "has no 'weight_map'"),
        ("[]", "holds the list \\[\\]"),
        ("", "it is empty"),
        (POINTER.decode(), "Git LFS pointer"),
        ('{"weight_map": []}', "as 'weight_map', expected type object"),
        ('{"weight_map": {}}', "names no weights"),
        ('{"weight_map": {"a": 3}}', "3 is named in"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "expected the name of a file in that folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "expected the name of a file in that folder"),
        ('{"weight_map": {"a": "model-2-of-2.safetensors"}}', "names model-2-of-2.safetensors, not there"),
        ('{"weight_map": {"a": "part.safetensors"}}', "part.safetensors holds no weights: it is empty"),
    ],
)
def test_an_index_of_weights_that_is_none(copy, index, message):
    folder = copy("student")
    (folder / "model.safetensors").unlink()
    (folder / "part.safetensors").touch()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        load_student(folder)
    refused(load_student, folder)


CONFIGS = {
    "empty": ("", "it is empty"),
    "page": (PAGE.decode(), "it is a web page"),
    "list": ("[]", "expected a JSON object"),
    "no model type": ("{}", "has no 'model_type'"),
    "odd model type": ('{"model_type": 3}', "as 'model_type', expected type text"),
    "unknown model type": ('{"model_type": "perpetuum_mobile"}', "perpetuum_mobile"),
    "odd auto_map": ('{"model_type": "llama", "auto_map": ["x"]}', "has the auto_map"),
    "odd entry of auto_map": ('{"model_type": "llama", "auto_map": {"AutoConfig": 3}}', "has the auto_map"),
    "odd size": ('{"model_type": "llama", "hidden_size": "wide"}', "does not load as"),
    "odd number of layers": ('{"model_type": "llama", "num_hidden_layers": [2]}', "does not load as"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_none(copy, name):
    folder = copy("teacher")
    content, message = CONFIGS[name]
    (folder / "config.json").write_text(content)
    assert message in refused(load_teacher, folder)


def test_a_folder_without_a_config_or_a_tokenizer_says_so(copy, tmp_path):
    (tmp_path / "bare").mkdir()
    for load in (load_config, load_teacher, load_student):
        assert "there is no config.json" in refused(load, tmp_path / "bare", OSError)
    folder = copy("teacher")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    assert "has no tokenizer: save it there" in refused(load_tokenizer, folder, OSError)
    (folder / "model.safetensors").unlink()
    assert "does not load as a teacher" in refused(load_teacher, folder, OSError)


@pytest.mark.parametrize("content", ["", "[]", "{", PAGE.decode(), POINTER.decode(), '{"model": 3}'])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_none(copy, file, content):
    if (file, content) == ("tokenizer_config.json", '{"model": 3}'):
        content = '{"tokenizer_class": 3}'
    folder = copy("teacher")
    (folder / file).write_text(content)
    refused(load_tokenizer, folder)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_generation_config_that_is_none_is_not_passed_over(copy, content):
    folder = copy("student")
    (folder / "generation_config.json").write_text(content)
    for load in (load_generation_config, load_student):
        assert "generation_config.json" in refused(load, folder)


# Tensors that would be drawn at random ----------


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_missing_tensors_are_refused_by_name(copy, of):
    folder = copy(of)
    weights = load_file(folder / "model.safetensors")
    gone = next(key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = refused(load_teacher if of == "teacher" else load_student, folder)
    assert f"{gone} missing" in said and "config" in said


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_more_layers_than_the_file_has_are_refused_by_name(copy, of, caplog):
    folder = copy(of)
    field = "num_hidden_layers" if of == "teacher" else "encoder_num_hidden_layers"
    edit(folder / "config.json", lambda config: config.update({field: config[field] + 1}))
    said = refused(load_teacher if of == "teacher" else load_student, folder)
    assert "layers.2." in said and " more missing" in said
    assert "newly initialized" not in caplog.text and "MISSING" not in caplog.text  # one line, not twenty


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_tensors_of_another_shape_are_refused_by_name(copy, of):
    folder = copy(of)
    edit(folder / "config.json", lambda config: config.update(intermediate_size=48))
    said = refused(load_teacher if of == "teacher" else load_student, folder)
    assert ".mlp." in said and "48" in said and "of another shape" in said


def test_an_untied_model_without_its_head_is_refused_and_a_tied_one_is_not(copy):
    folder = copy("teacher")  # tied: its file has no head
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_teacher(folder)
    edit(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))
    assert "lm_head.weight missing" in refused(load_teacher, folder)


def test_an_adapter_loads_on_its_base_and_a_broken_one_does_not(copy, tmp_path):
    base = copy("teacher")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(load_teacher(folder)(ids).logits, model.eval()(ids).logits)
    merged = load_merged_teacher(folder)
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == load_merged_teacher(base).state_dict().keys()
    assert not merged.training and all(weight.requires_grad for weight in merged.parameters())

    weights = load_file(folder / "adapter_model.safetensors")
    gone = next(key for key in weights if "layers.1" in key)
    save_file({key: value for key, value in weights.items() if key != gone}, folder / "adapter_model.safetensors")
    loads = (load_teacher, load_merged_teacher)
    assert all("lora_" in refused(load, folder) for load in loads)
    (folder / "adapter_model.safetensors").write_bytes(POINTER)
    assert all("Git LFS pointer" in refused(load, folder) for load in loads)
    (folder / "adapter_config.json").write_text("{}")
    assert all("has no 'base_model_name_or_path'" in refused(load, folder) for load in loads)
