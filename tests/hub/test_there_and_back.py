"""Students go to a Hub by each of the ways that there are, and load from it where the package is not installed."""

import json
from pathlib import Path

import pytest
import torch
from distillation_toys import make_rope, write_teacher
from safetensors.torch import load_file, save_file
from server import TOKEN, Hub, LargeFile
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from without_package import HIDE

from hf_encdec_distill.cli.main import main


FROZEN = Path(__file__).parent / "frozen"
RELEASES = sorted(
    str(folder.relative_to(FROZEN)) for folder in FROZEN.glob("*/*") if not folder.name.startswith("vision")
)
TEXTS = ["Return the sum of two numbers.", "Two dogs."]
CARD = "---\nlicense: apache-2.0\n---\n\n# Written by hand\n"

PUSH = """
import os
import sys
from pathlib import Path

import torch
from distillation_toys import arguments, ragged_rows
from huggingface_hub import snapshot_download
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers import DataCollatorForSeq2Seq, TrainerCallback

import hf_encdec_distill
from hf_encdec_distill import DistillationTrainer
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.export.exporting import export_model
from hf_encdec_distill.export.runtime import ExportedForConditionalGeneration

student, teacher, card = sys.argv[1:]
token = os.environ["HF_TOKEN"]


def load():
    return AutoModelForSeq2SeqLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)


model, tokenizer = load()
export_model(model, tokenizer, "onnx", Path(student, "onnx"))
Path(student, "onnx", "parity.json").write_text('{"failures": []}')
assert main(["push", student, "ann/by-command"]) == 0
folder = snapshot_download("ann/by-command", allow_patterns="onnx/*")
exported = ExportedForConditionalGeneration.from_pretrained(Path(folder, "onnx"))
prompt = dict(tokenizer("Return the sum.", return_tensors="pt", return_token_type_ids=False))
assert torch.equal(exported.generate(**prompt, max_new_tokens=8), model.generate(**prompt, max_new_tokens=8))
there = AutoModelForSeq2SeqLM.from_pretrained("ann/by-command")  # the package is there: nothing has to be trusted
assert type(there) is hf_encdec_distill.RopeEncDecForConditionalGeneration

model, tokenizer = load()
model.tokenizer = tokenizer
model.push_to_hub("ann/by-method", max_shard_size="60kB", private=True)
model.save_pretrained("by-saving", push_to_hub=True, repo_id="ann/by-saving", private=True)


class WaitForPush(TrainerCallback):
    # So that each save is a commit, of what was saved then.

    def on_save(self, *args, **kwargs):
        trainer._finish_current_push()


# The arguments have a token of their own, which the trainer pickles and pushes.
options = dict(push_to_hub=True, hub_private_repo=True, max_steps=2, save_strategy="steps", save_steps=1)
rows = ragged_rows(4)
model, tokenizer = load()
args = arguments("by-trainer", hub_token=token, **options)
trainer = DistillationTrainer(
    model, args, teacher=teacher, processing_class=tokenizer, train_dataset=rows, callbacks=[WaitForPush()]
)
Path("by-trainer/README.md").write_text(card)
trainer.train()
trainer.push_to_hub()
trainer.save_model("by-trainer-here")

model, tokenizer = load()
args = arguments("by-plain-trainer", cls=Seq2SeqTrainingArguments, **options)
collator = DataCollatorForSeq2Seq(tokenizer, model=model)
trainer = Seq2SeqTrainer(model, args, data_collator=collator, processing_class=tokenizer, train_dataset=rows)
trainer.train()
trainer.push_to_hub()
trainer.save_model("by-plain-trainer-here")
"""

LOAD = (
    HIDE
    + """
import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

for name, revision, inputs, out in json.loads(sys.argv[1]):
    try:
        AutoModelForSeq2SeqLM.from_pretrained(name, revision=revision)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise SystemExit(name + " was loaded without trust_remote_code")
    options = {"revision": revision, "trust_remote_code": True}
    assert AutoConfig.from_pretrained(name, **options).model_type == "rope_encdec"
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    model = AutoModelForSeq2SeqLM.from_pretrained(name, **options).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    inputs = load_file(inputs)
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    texts = ["Return the sum of two numbers.", "Two dogs."]
    with torch.no_grad():
        outputs = {
            "input_ids": tokenizer(texts, padding=True, return_tensors="pt").input_ids,
            "logits": model(**prompt, decoder_input_ids=inputs["decoder_input_ids"]).logits,
            "tokens": model.generate(**prompt, max_new_tokens=8, do_sample=False),
        }
    save_file({key: value.contiguous() for key, value in outputs.items()}, out)
"""
)


PUSH_COMMAND = "import sys; from hf_encdec_distill.cli.main import main; sys.exit(main(sys.argv[1:]))"
# Room for no file of more than 60 kB, in which the weights do not fit; then for all.
NO_ROOM = """
import resource
import signal

from transformers import AutoModelForSeq2SeqLM

import hf_encdec_distill

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
try:
    AutoModelForSeq2SeqLM.from_pretrained("ann/student")
except OSError as error:
    print(error)
else:
    raise SystemExit("it was loaded without room for it")
"""
# huggingface_hub 0.36 leaves it to whoever asked to ask again; later ones do so themselves.
TAKE_UP = """
from huggingface_hub import snapshot_download
from transformers import AutoModelForSeq2SeqLM

import hf_encdec_distill

try:
    AutoModelForSeq2SeqLM.from_pretrained("ann/student")
except OSError as error:
    print(error)
    AutoModelForSeq2SeqLM.from_pretrained("ann/student")
snapshot_download("ann/student")
"""


@pytest.fixture
def student(tmp_path, make_bpe_tokenizer):
    """A folder with a student of 280 tokens and its tokenizer."""
    folder = tmp_path / "student"
    make_rope("separate").save_pretrained(folder)
    make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>").save_pretrained(folder)
    return folder


def make_inputs():
    mask = (torch.arange(7) >= torch.tensor([[0], [3]])).long()
    return {
        "input_ids": torch.randint(4, 280, (2, 7)),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(4, 280, (2, 5)),
    }


def expected_of(folder, inputs):
    """What a folder answers with the package's own code."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return {
            "input_ids": AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt").input_ids,
            "logits": model(**prompt, decoder_input_ids=inputs["decoder_input_ids"]).logits,
            "tokens": model.generate(**prompt, max_new_tokens=8, do_sample=False),
        }


@pytest.mark.process
def test_each_way_to_the_hub_leads_back(run_script, student, tmp_path, make_bpe_tokenizer):
    teacher = write_teacher(tmp_path / "teacher", make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>"))
    save_file(inputs := make_inputs(), tmp_path / "inputs.safetensors")
    came_from = {
        "by-command": student,
        "by-method": student,
        "by-saving": student,
        "by-trainer": tmp_path / "by-trainer-here",
        "by-plain-trainer": tmp_path / "by-plain-trainer-here",
    }
    with Hub(TOKEN) as hub:
        run_script(PUSH, student, teacher, CARD, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        repositories = {name: hub.repositories[f"models/ann/{name}"] for name in came_from}
        heads = {name: repository.branches["main"] for name, repository in repositories.items()}
        for name, repository in repositories.items():
            repository.commit("main", {}, "what comes after does not touch what is pinned")
            assert repository.private == (name != "by-command")
            for files in repository.commits.values():
                assert not [path for path, content in files.items() if TOKEN.encode() in content]
        jobs = [
            [f"ann/{name}", head, str(tmp_path / "inputs.safetensors"), str(tmp_path / f"{name}.out")]
            for name, head in heads.items()
        ]
        run_script(LOAD, json.dumps(jobs), HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    for name, folder in came_from.items():
        got = load_file(tmp_path / f"{name}.out")
        for key, value in expected_of(folder, inputs).items():
            torch.testing.assert_close(got[key], value, atol=1e-6, rtol=0)

    with_weights = [files for files in repositories["by-saving"].commits.values() if "model.safetensors" in files]
    assert len(with_weights) == 1 and "tokenizer.json" in with_weights[0]
    by_method = repositories["by-method"].commits[heads["by-method"]]
    shards = [path for path, content in by_method.items() if isinstance(content, LargeFile)]
    assert len(shards) > 1 and "model.safetensors.index.json" in by_method
    by_trainer, by_plain_trainer = (repositories[name] for name in ("by-trainer", "by-plain-trainer"))
    assert by_trainer.commits[heads["by-trainer"]]["README.md"].decode() == CARD
    assert b"generated automatically" in by_plain_trainer.commits[heads["by-plain-trainer"]]["README.md"]
    weights = [files for files in by_trainer.commits.values() if "model.safetensors" in files]
    assert len(weights) >= 2  # pushed while it trained, and then already with the code that loads it
    assert all("modeling_rope_encdec.py" in files for files in weights)
    # In a class that 4.57 knows, which `AutoTokenizer` of 5.x does not give.
    classes = [json.loads(files["tokenizer_config.json"])["tokenizer_class"] for files in weights]
    assert set(classes) == {"PreTrainedTokenizerFast"}


@pytest.mark.process
def test_a_download_that_is_cut_or_does_not_fit_is_taken_up_again(run_script, student, hub):
    assert main(["push", str(student), "ann/student"]) == 0
    run_script(NO_ROOM, HF_ENDPOINT=hub.url)
    before = sum(asked.startswith("GET /storage/") for asked in hub.requests)
    hub.fail("GET /storage/", cut=True)
    run_script(TAKE_UP, HF_ENDPOINT=hub.url)
    assert sum(asked.startswith("GET /storage/") for asked in hub.requests) >= before + 2 > 2


@pytest.mark.parametrize("release", RELEASES)
def test_what_an_earlier_release_wrote_loads(release):
    expected = load_file(FROZEN / release / "expected.safetensors")
    got = expected_of(FROZEN / release, expected)
    torch.testing.assert_close(got["logits"], expected["logits"], atol=1e-5, rtol=0)
    assert torch.equal(got["tokens"], expected["tokens"])
    assert torch.equal(got["input_ids"], expected["input_ids"])


@pytest.mark.process
def test_what_an_earlier_release_wrote_loads_with_its_own_code(run_script, tmp_path):
    folders = [FROZEN / release for release in RELEASES]
    outs = [tmp_path / f"{index}.out" for index in range(len(folders))]
    jobs = [
        [str(folder), None, str(folder / "expected.safetensors"), str(out)]
        for folder, out in zip(folders, outs, strict=True)
    ]
    run_script(LOAD, json.dumps(jobs), HF_HUB_OFFLINE="1")
    for folder, out in zip(folders, outs, strict=True):
        got, expected = load_file(out), load_file(folder / "expected.safetensors")
        torch.testing.assert_close(got["logits"], expected["logits"], atol=1e-5, rtol=0)
        assert torch.equal(got["tokens"], expected["tokens"])
        assert torch.equal(got["input_ids"], expected["input_ids"])
