"""A cache goes to a Hub and comes back, with either client library; the Hub is a small one of this machine."""

import pytest
import yaml
from distillation_toys import make_teacher, ragged_rows, write_pairs, write_teacher
from huggingface_hub import HfApi
from server import TOKEN, Hub

from hf_encdec_distill.distillation import CachedTeacher, LiveTeacher, capture


# In processes of their own: the client reads where the Hub is when it is imported.
THERE_AND_BACK = """
import sys

import datasets, torch
from distillation_toys import arguments, make_t5
from transformers import AutoTokenizer

from hf_encdec_distill import DistillationTrainer
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.distillation import CachedTeacher

folder, teacher, pairs = sys.argv[1:]
words = ["cache", "--teacher", teacher, "--dataset", pairs, "--source-column", "text", "--target-column", "short"]
words += ["--out", folder, "--prompt-template", "{source}:", "--splits", "train", "--batch-size", "4"]
assert main([*words, "--push-to-hub", "ann/records", "--private"]) == 0
here, there = CachedTeacher(folder), CachedTeacher("hf://datasets/ann/records")
assert there.folder != here.folder and there.manifest == here.manifest
assert len(there) == len(here) == len(datasets.load_dataset("ann/records")["train"])

tokenizer = AutoTokenizer.from_pretrained(teacher)
row = {"source": "red 0 red", "target": "It is red and red."}
losses = []
for source in (folder, "hf://datasets/ann/records"):
    args = arguments(folder + "-trainer", prompt_template="{source}:")
    student = make_t5(len(tokenizer))
    trainer = DistillationTrainer(student, args, teacher=source, processing_class=tokenizer, train_dataset=[row])
    losses.append(trainer.compute_loss(student, trainer.data_collator([row])).item())
assert losses[0] == losses[1] > 0, losses

# A second push takes away what is no part of the cache any more, on a branch of its own.
next(here.folder.glob("shard-*")).unlink()
(here.folder / "partial-000-torn").touch()
here.push_to_hub("ann/records", revision="cut")
try:
    CachedTeacher("hf://datasets/ann/records@cut")
except ValueError as error:
    assert "holds no shard" in str(error), error
else:
    raise SystemExit("the other revision has the shards of main")
"""
REFUSED = """
import sys
from hf_encdec_distill.distillation import CachedTeacher
for use in (lambda: CachedTeacher(sys.argv[1]).push_to_hub("ann/more"), lambda: CachedTeacher("hf://datasets/ann/none")):
    try:
        use()
    except OSError as error:
        print(" ".join(str(error).split()))
    else:
        raise SystemExit("it was not refused")
"""


@pytest.mark.process
def test_there_and_back(run_script, tmp_path, make_bpe_tokenizer):
    teacher = write_teacher(tmp_path / "teacher", make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>"))
    pairs = write_pairs(tmp_path / "pairs.csv", 40)
    with Hub(TOKEN) as hub:
        said = run_script(THERE_AND_BACK, tmp_path / "cache", teacher, pairs, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        repository = hub.repositories["datasets/ann/records"]
        (oid, files), (_, cut) = repository.at("main"), repository.at("cut")
        assert said[-1] == f"{hub.url}/datasets/ann/records/commit/{oid}"
        assert repository.private
        card = yaml.safe_load(files["README.md"].decode().split("---")[1])
        records = sorted(name for name in files if name.startswith("shard-"))
        assert [config["data_files"][0]["path"] for config in card["configs"]] == [records]
        assert str(tmp_path).encode() not in files["README.md"] + files["manifest.json"]
        shards = {name for name in files if name.endswith(".parquet")}
        assert len(shards) == 1 and set(files) - shards == set(cut)
        assert {"README.md", "manifest.json", "tokenizer.json"} <= set(cut)


MANY = """
import sys
from concurrent.futures import ThreadPoolExecutor

import datasets
from transformers import AutoTokenizer

from distillation_toys import make_teacher, ragged_rows
from hf_encdec_distill.distillation import CachedTeacher, LiveTeacher, capture
from hf_encdec_distill.distillation.teachers.workers import add_to_hub

folder, tokenizer = sys.argv[1], AutoTokenizer.from_pretrained(sys.argv[2])
for index in range(3):
    options = {"num_shards": 3, "index": index, "progress": False}
    capture(LiveTeacher(make_teacher()), ragged_rows(13), f"{folder}-{index}", tokenizer, **options)
with ThreadPoolExecutor(3) as pool:
    list(pool.map(lambda index: add_to_hub(f"{folder}-{index}", "ann/records"), range(3)))
add_to_hub(f"{folder}-0", "ann/records")  # once more
assert len(CachedTeacher("hf://datasets/ann/records")) == len(datasets.load_dataset("ann/records")["train"]) == 13
capture(LiveTeacher(make_teacher()), ragged_rows(3), f"{folder}-other", tokenizer, k=7, progress=False)
try:
    add_to_hub(f"{folder}-other", "ann/records")
except OSError as error:
    assert "ann/records was captured with k=32, not 7" in str(error), error
else:
    raise SystemExit("it was not refused")
"""


@pytest.mark.process
def test_jobs_add_their_shards_to_one_dataset(run_script, tmp_path, make_bpe_tokenizer):
    """At the same time, and a commit of somebody else comes in between: each adds its own, and the card names all."""
    make_bpe_tokenizer(pad_token="<|endoftext|>").save_pretrained(tmp_path / "tokenizer")
    with Hub(TOKEN) as hub:
        hub.fail("POST .*/commit/main", status=412)
        run_script(MANY, tmp_path / "part", tmp_path / "tokenizer", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        files = hub.repositories["datasets/ann/records"].at("main")[1]
    shards = {name for name in files if name.endswith(".parquet")}
    assert {name.split("-")[1] for name in shards} == {"000of003.000", "001of003.000", "002of003.000"}
    assert len(shards) == 3 and all(name in files["README.md"].decode() for name in shards)


@pytest.mark.process
def test_a_hub_that_refuses_or_is_offline_is_named(run_script, tmp_path, make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer(pad_token="<|endoftext|>")
    capture(LiveTeacher(make_teacher()), ragged_rows(3), tmp_path / "cache", tokenizer, progress=False)
    with Hub(TOKEN) as hub:
        pushing, reading = run_script(REFUSED, tmp_path / "cache", HF_ENDPOINT=hub.url, HF_TOKEN="hf_wrong")
        assert "401" in pushing and "ann/none" in reading
        assert not hub.repositories
    pushing, reading = run_script(REFUSED, tmp_path / "cache", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1", HF_TOKEN=TOKEN)
    assert "offline" in pushing and "outgoing traffic has been disabled" in reading


def test_what_the_http_library_says_becomes_one_line(tmp_path, make_bpe_tokenizer, monkeypatch):
    tokenizer = make_bpe_tokenizer(pad_token="<|endoftext|>")
    capture(LiveTeacher(make_teacher()), ragged_rows(3), tmp_path / "cache", tokenizer, progress=False)

    def nobody(*args, **kwargs):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(HfApi, "create_repo", nobody)
    with pytest.raises(OSError, match=r"ann/more was not uploaded to http.*: no route to host"):
        CachedTeacher(tmp_path / "cache").push_to_hub("ann/more", token=TOKEN)
