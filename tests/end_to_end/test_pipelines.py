"""Pipelines, streamers and batches with a student and with what was exported of it, as people have them on either
version of transformers; the answers are held against `generate`, and 4.57's own pipeline against ours."""

import importlib
import os
import subprocess
import sys
from threading import Thread

import pytest
import torch
import transformers
from datasets import Dataset
from distillation_toys import write_teacher
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, TextIteratorStreamer, TextStreamer, pipeline
from transformers.pipelines import PIPELINE_REGISTRY, check_task
from transformers.pipelines.pt_utils import KeyDataset

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.export.exporting import export_model
from hf_encdec_distill.export.runtime import ExportedForConditionalGeneration
from hf_encdec_distill.pipelines import TASK, Text2TextGenerationPipeline


IS_4 = transformers.__version__.startswith("4.")
TEXTS = ["def add(a, b): return a + b", "Return the sum.", "a", "two numbers of def add"]
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
GREEDY = {"max_new_tokens": 7, "num_beams": 1, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_bpe_tokenizer):
    """A student of a toy, with the prompt template in its tokenizer; as `init` leaves it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("pipelines")
    tokenizer = make_bpe_tokenizer(chat_template=None)
    teacher = write_teacher(root / "teacher", tokenizer)
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        transformers.AutoModelForCausalLM.from_pretrained(teacher),
        tokenizer=tokenizer,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        layer_selection="even",
        prompt_template="Say: {source}\n#",
    )
    student.save_pretrained(root / "runs/quickstart/student")
    return root / "runs/quickstart/student"


@pytest.fixture(scope="module")
def exported(folder):
    """The folder of each target, exported once."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        target: export_model(model, tokenizer, target, folder.parents[2] / "exported" / target)
        for target in ("onnx", "openvino")
    }


def generated(folder, text, **options):
    """Ids and texts that `generate` gives for one text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    ids = model.generate(**tokenizer(text, return_tensors="pt"), **options)
    return ids, tokenizer.batch_decode(ids, skip_special_tokens=True)


def elsewhere(code, tmp_path):
    """Run where the package cannot be imported: isolated, and hidden where it is installed."""
    hidden = "import sys\nsys.modules['hf_encdec_distill'] = None\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", "-c", hidden + code]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


# Tasks ---------------------------------------------------------------------------------------------------------------


def test_a_text_is_answered_as_generate_does(folder):
    pipe = pipeline(TASK, model=str(folder))
    for text in TEXTS:
        # What the pipeline does where nobody says otherwise, in 4.57: 4 beams and 256 tokens.
        assert pipe(text, max_new_tokens=6) == [
            {"generated_text": generated(folder, text, num_beams=4, max_new_tokens=6)[1][0]}
        ]
    ids, texts = generated(folder, TEXTS[0], num_beams=4, max_new_tokens=6, num_return_sequences=3)
    options = {"max_new_tokens": 6, "num_return_sequences": 3}
    assert pipe(TEXTS[0], **options) == [{"generated_text": text} for text in texts]
    tensors = pipe(TEXTS[0], return_tensors=True, **options)
    assert all(torch.equal(entry["generated_token_ids"], row) for entry, row in zip(tensors, ids, strict=True))
    # What was said when the pipeline was made counts for each call that says nothing.
    silent = pipeline(TASK, model=str(folder), return_tensors=True, **GREEDY)
    assert torch.equal(silent(TEXTS[1])[0]["generated_token_ids"], generated(folder, TEXTS[1], **GREEDY)[0][0])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_list_is_answered_as_its_texts_are(folder, batch_size):
    pipe = pipeline(TASK, model=str(folder))
    one_by_one = [generated(folder, text, **GREEDY)[1] for text in TEXTS]
    assert pipe(TEXTS, batch_size=batch_size, **GREEDY) == [{"generated_text": text} for (text,) in one_by_one]
    several = {"max_new_tokens": 7, "num_beams": 2, "num_return_sequences": 2}
    assert pipe(TEXTS, batch_size=batch_size, **several) == [
        [{"generated_text": text} for text in generated(folder, source, **several)[1]] for source in TEXTS
    ]


def test_what_is_no_text_is_an_error(folder):
    pipe = pipeline(TASK, model=str(folder))
    with pytest.raises(TypeError if IS_4 else ValueError, match="7|str"):
        pipe(7)
    with pytest.raises(ValueError, match="no_such_option"):
        pipe("a", no_such_option=1)


if IS_4:

    def test_our_pipeline_gives_what_that_of_4_57_gives(folder):
        theirs = pipeline(TASK, model=str(folder))
        assert type(theirs) is transformers.Text2TextGenerationPipeline
        ours = pipeline(TASK, model=str(folder), pipeline_class=Text2TextGenerationPipeline)
        torch.manual_seed(0)
        for inputs in (TEXTS[0], TEXTS, TEXTS[:1]):
            for options in (
                {"max_new_tokens": 5},
                {"max_new_tokens": 5, "num_beams": 2, "num_return_sequences": 2, "batch_size": 2},
                {"max_new_tokens": 5, "clean_up_tokenization_spaces": True, "return_text": True},
                {"max_new_tokens": 5, "return_tensors": False, "truncation": True},
                {"max_length": 4, "return_text": False},
                {"generation_config": transformers.GenerationConfig(max_new_tokens=4, decoder_start_token_id=5)},
            ):
                assert ours(inputs, **options) == theirs(inputs, **options)
        (our_ids,) = ours(TEXTS[0], return_tensors=True, max_new_tokens=5)
        (their_ids,) = theirs(TEXTS[0], return_tensors=True, max_new_tokens=5)
        assert our_ids.keys() == their_ids.keys()
        assert torch.equal(our_ids["generated_token_ids"], their_ids["generated_token_ids"])

    @pytest.mark.process
    @pytest.mark.parametrize(
        ("task", "key"),
        [
            (TASK, "generated_text"),
            ("summarization", "summary_text"),
            ("translation", "translation_text"),
            ("translation_en_to_fr", "translation_text"),
        ],
    )
    def test_tasks_of_4_57(task, key, folder, tmp_path, capfd):
        expected = [{key: generated(folder, text, num_beams=4, max_new_tokens=6)[1][0]} for text in TEXTS[:2]]
        assert pipeline(task, model=str(folder))(TEXTS[:2], max_new_tokens=6) == expected
        assert "is not supported for" not in capfd.readouterr().err
        code = (
            f"from transformers import pipeline\npipe = pipeline({task!r}, {str(folder)!r}, trust_remote_code=True)\n"
        )
        assert elsewhere(f"{code}print(pipe({TEXTS[:2]!r}, max_new_tokens=6))", tmp_path).strip() == str(expected)

    @pytest.mark.parametrize("package", ["optimum.pipelines", "optimum.intel.pipelines"])
    def test_pipelines_of_optimum(folder, package):
        options, name = {
            "optimum.pipelines": ({"accelerator": "ort"}, "ORTModelForSeq2SeqLM"),
            "optimum.intel.pipelines": (
                # By itself OpenVINO computes in bfloat16 where the CPU has instructions for it.
                {"accelerator": "openvino", "model_kwargs": {"export": True, "ov_config": F32}},
                "OVModelForSeq2SeqLM",
            ),
        }[package]
        pipe = importlib.import_module(package).pipeline(TASK, model=str(folder), **options)
        assert type(pipe.model).__name__ == name
        expected = [{"generated_text": generated(folder, text, **GREEDY)[1][0]} for text in TEXTS]
        assert pipe(TEXTS, **GREEDY) == expected

else:

    def test_only_what_was_dropped_is_given_back():
        assert PIPELINE_REGISTRY.check_task(TASK)[1]["impl"] is Text2TextGenerationPipeline
        for task in ("summarization", "translation", "translation_en_to_fr"):
            with pytest.raises(KeyError, match="removed|Unknown task"):
                check_task(task)

    @pytest.mark.process
    def test_a_pipeline_that_was_there_before_stays():
        code = f"""
from transformers import pipelines
class Other(pipelines.TextGenerationPipeline):
    pass
pipelines.PIPELINE_REGISTRY.register_pipeline({TASK!r}, Other)
import hf_encdec_distill
print(pipelines.PIPELINE_REGISTRY.supported_tasks[{TASK!r}]["impl"].__name__)
"""
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.stdout.strip() == "Other", run.stderr

    @pytest.mark.process
    def test_a_saved_pipeline_carries_its_code(folder, tmp_path):
        pipeline(TASK, model=str(folder)).save_pretrained(tmp_path / "saved")
        expected = [{"generated_text": generated(folder, text, **GREEDY)[1][0]} for text in TEXTS]
        code = f"""
from transformers import pipeline
pipe = pipeline({TASK!r}, {str(tmp_path / "saved")!r}, trust_remote_code=True)
print(pipe({TEXTS!r}, **{GREEDY!r}))
"""
        assert elsewhere(code, tmp_path).strip() == str(expected)


# Exports -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_an_exported_folder_in_the_pipeline(target, folder, exported, capfd):
    model = ExportedForConditionalGeneration.from_pretrained(exported[target])
    pipe = pipeline(TASK, model=model, tokenizer=str(exported[target]))
    assert "is not supported for" not in capfd.readouterr().err
    options = {"max_new_tokens": 7, "num_beams": 2, "num_return_sequences": 2}
    assert pipe(TEXTS, batch_size=2, **options) == pipeline(TASK, model=str(folder))(TEXTS, batch_size=2, **options)


# Streams and data sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["PyTorch", "onnx", "openvino"])
def test_streamers(target, folder, exported, capsys):
    _, (expected,) = generated(folder, TEXTS[0], **GREEDY)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if target == "PyTorch":
        model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    else:
        model = ExportedForConditionalGeneration.from_pretrained(exported[target])
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    capsys.readouterr()
    model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_special_tokens=True), **GREEDY)
    assert capsys.readouterr().out == expected + "\n"

    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True, timeout=60)
    thread = Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected and len(pieces) > 2

    pipe = pipeline(TASK, model=model, tokenizer=tokenizer)
    assert pipe(TEXTS[0], streamer=TextStreamer(tokenizer, skip_special_tokens=True), **GREEDY) == [
        {"generated_text": expected}
    ]
    assert capsys.readouterr().out == expected + "\n"


def test_a_data_set_with_progress(folder):
    rows = Dataset.from_dict({"text": TEXTS * 2})
    pipe = pipeline(TASK, model=str(folder))
    seen = tqdm(pipe(KeyDataset(rows, "text"), batch_size=3, **GREEDY), total=len(rows), disable=False)
    answers = [answer["generated_text"] for (answer,) in seen]
    assert answers == [generated(folder, text, **GREEDY)[1][0] for text in TEXTS] * 2
    assert seen.n == len(rows)


# What does not serve encoder-decoders --------------------------------------------------------------------------------


def test_transformers_serve_and_chat_do_not_load_a_student(folder):
    """`serve` takes the class from transformers by its name, `chat` of 4.57 loads decoder-only models alone."""
    if IS_4:
        from transformers.commands.serving import ServeArguments, ServeCommand

        command = ServeCommand.__new__(ServeCommand)
        command.args = ServeArguments(dtype="auto")
        load = command._load_model_and_data_processor
    else:
        from transformers.cli.serving.model_manager import ModelManager

        load = ModelManager(device="cpu")._load_model
    with pytest.raises(AttributeError, match="RopeEncDecForConditionalGeneration"):
        load(f"{folder}@main")
    with pytest.raises(ValueError, match="for this kind of AutoModel: AutoModelForCausalLM"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
