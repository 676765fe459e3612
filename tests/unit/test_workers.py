"""Jobs that know nothing of each other fill one cache: at the same moment, killed, and in folders that are merged."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import torch
from distillation_toys import make_teacher, ragged_rows, write_teacher
from transformers import AutoTokenizer

from hf_encdec_distill.distillation.teachers import workers
from hf_encdec_distill.distillation.teachers.capture import capture
from hf_encdec_distill.distillation.teachers.live import LiveTeacher
from hf_encdec_distill.distillation.teachers.recorded import CachedTeacher
from hf_encdec_distill.distillation.teachers.shards import count_keys
from hf_encdec_distill.distillation.teachers.targets import TargetGeneration
from hf_encdec_distill.distillation.teachers.workers import Worker, merge_caches


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


ROWS = ragged_rows(13)


def make_cache(folder, tokenizer, rows=ROWS, **options):
    return capture(LiveTeacher(make_teacher()), rows, folder, tokenizer, batch_size=4, progress=False, **options)


def records(folder):
    """Key -> likeliest tokens, of all shards; each key once."""
    found = {}
    for shard in Path(folder).glob("shard-*"):
        for row in pyarrow.parquet.read_table(shard).to_pylist():
            assert row["key"] not in found
            found[row["key"]] = row["ids"]
    return found


def test_the_shares_are_those_of_datasets():
    rows = datasets.Dataset.from_dict({"number": range(23)})
    for index in range(3):
        shard = rows.shard(num_shards=3, index=index, contiguous=False)["number"][:]
        shares = [list(Worker(index, 3, process, 2).share(23)) for process in range(2)]
        assert sorted(shares[0] + shares[1]) == shard and abs(len(shares[0]) - len(shares[1])) <= 1


def test_jobs_make_one_cache_in_one_folder(tmp_path, tokenizer):
    make_cache(tmp_path / "whole", tokenizer)
    for index in (2, 0, 1):
        assert make_cache(tmp_path / "shared", tokenizer, num_shards=3, index=index, rows_per_shard=2) in (4, 5)
    assert records(tmp_path / "shared") == records(tmp_path / "whole")
    assert make_cache(tmp_path / "shared", tokenizer) == 0
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("shared", "whole")]
    assert manifests[0] == manifests[1]
    card = datasets.load_dataset(str(tmp_path / "shared"), "records")["train"]
    assert len(card) == len(ROWS)


# Four jobs that begin at the same moment, each in a process of its own; the last of them dies in its second shard.
AT_ONCE = """
import multiprocessing, os, signal, sys
import datasets, torch
from transformers import AutoTokenizer
from distillation_toys import make_teacher, ragged_rows
from hf_encdec_distill.distillation import LiveTeacher, capture
from hf_encdec_distill.distillation.teachers import shards

torch.set_num_threads(1)
folder, tokenizer, teacher = sys.argv[1], AutoTokenizer.from_pretrained(sys.argv[2]), LiveTeacher(make_teacher())
rows, jobs = ragged_rows(80), 4
begin = multiprocessing.Barrier(jobs)


def die_in_second_shard():
    digest, written = shards.file_digest, []

    def die(file):
        written.extend([file] if file.name.startswith("partial-") else [])
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return digest(file)

    shards.file_digest = die


def start(index, *first):
    pid = os.fork()
    if pid:
        return pid
    try:
        for action in first:
            action()
        options = {"num_shards": jobs, "index": index, "batch_size": 2, "rows_per_shard": 4, "progress": False}
        capture(teacher, rows, folder, tokenizer, **options)
        os._exit(0)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)


started = [start(index, begin.wait) for index in range(3)] + [start(3, die_in_second_shard, begin.wait)]
ends = [os.waitpid(pid, 0)[1] for pid in started]
assert ends == [0, 0, 0, signal.SIGKILL], ends
left = [name for name in os.listdir(folder) if name.startswith("partial-")]
assert len(left) == 1 and left[0].startswith("partial-003of004."), left
assert os.waitpid(start(0), 0)[1] == 0 and left[0] in os.listdir(folder)  # for all that it knows, somebody writes it
assert os.waitpid(start(3), 0)[1] == 0 and left[0] not in os.listdir(folder)
"""


@pytest.mark.process
def test_jobs_that_begin_at_the_same_moment(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    here = Path(__file__)
    paths = [str(here.parents[1]), str(Path(sys.modules["hf_encdec_distill"].__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", AT_ONCE, str(tmp_path / "cache"), str(tmp_path / "tokenizer")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    make_cache(tmp_path / "whole", tokenizer, rows=ragged_rows(80))
    assert records(tmp_path / "cache") == records(tmp_path / "whole")
    assert not list((tmp_path / "cache").glob("partial-*"))
    assert AutoTokenizer.from_pretrained(tmp_path / "cache").get_vocab() == tokenizer.get_vocab()
    assert len(datasets.load_dataset(str(tmp_path / "cache"))["train"]) == 80  # by the card


def test_only_what_nobody_writes_any_more_is_removed(tmp_path, tokenizer):
    make_cache(tmp_path / "cache", tokenizer, rows=ROWS[:3])
    own, running, old = (
        tmp_path / "cache" / f"partial-{name}" for name in ("001of002.000-a", "000-b", "000of002.000-c")
    )
    for file in (own, running, old):
        file.write_bytes(b"torn")
    os.utime(old, (time.time() - 7200,) * 2)
    make_cache(tmp_path / "cache", tokenizer, num_shards=2, index=1)
    assert (own.exists(), running.exists(), old.exists()) == (False, True, False)


def test_a_folder_that_was_left_half_made_is_made(tmp_path, tokenizer):
    (tmp_path / "cache" / "partial-000-torn").mkdir(parents=True)
    (tmp_path / "cache" / "tokenizer.json").write_text("{}")
    make_cache(tmp_path / "cache", tokenizer)
    assert len(CachedTeacher(tmp_path / "cache")) == len(ROWS)
    assert AutoTokenizer.from_pretrained(tmp_path / "cache").get_vocab() == tokenizer.get_vocab()


def test_another_capture_does_not_join(tmp_path, tokenizer):
    make_cache(tmp_path / "cache", tokenizer, num_shards=2, index=0)
    with pytest.raises(ValueError, match="captured with k=32, not 7"):
        make_cache(tmp_path / "cache", tokenizer, num_shards=2, index=1, k=7)
    manifest = workers.read_manifest(tmp_path / "cache")
    of_another_version = {**manifest, "teacher_config": "0"}
    with pytest.raises(ValueError, match=r"the weights are the same: perhaps by another version of transformers"):
        workers.check_agrees(of_another_version, manifest, "cache")
    with pytest.raises(ValueError, match=r"captured with teacher_config='0', not '\w+': capture into another"):
        workers.check_agrees({**of_another_version, "teacher_weights": "0"}, manifest, "cache")
    for index, num_shards in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"shard {index} of {num_shards}: give an index from 0"):
            make_cache(tmp_path / "none", tokenizer, num_shards=num_shards, index=index)
    with pytest.raises(ValueError, match="shard 13 of 20 has no row, for the data has 13"):
        make_cache(tmp_path / "none", tokenizer, num_shards=20, index=13)
    assert not (tmp_path / "none").exists()


def test_what_is_merged_has_no_file_of_another_folder(tmp_path, tokenizer):
    """Which a push would then publish."""
    make_cache(tmp_path / "cache", tokenizer)
    (tmp_path / "key").write_text("theirs")
    (tmp_path / "cache" / "notes.txt").symlink_to(tmp_path / "key")
    with pytest.raises(ValueError, match="is a link that leads out of the folder"):
        merge_caches([tmp_path / "cache"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("same_disk", [True, False])
def test_folders_are_merged_without_a_rewrite(tmp_path, tokenizer, monkeypatch, same_disk):
    sources = [tmp_path / f"part-{index}" for index in range(3)]
    for index, source in enumerate(sources):
        make_cache(source, tokenizer, num_shards=3, index=index, rows_per_shard=2)
    make_cache(sources[2], tokenizer, rows=ROWS[:2])  # rows that the first and the second have too
    make_cache(tmp_path / "whole", tokenizer)
    if not same_disk:

        def link(*_args):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", link)
    shards = [shard for source in sources for shard in source.glob("*.parquet")]
    assert len(shards) >= 8
    merge_caches(sources, tmp_path / "merged")
    for shard in shards:
        merged = tmp_path / "merged" / shard.name
        assert merged.read_bytes() == shard.read_bytes() and merged.samefile(shard) is same_disk
    assert count_keys(tmp_path / "merged", "shard") == (13, 2)
    assert len(CachedTeacher(tmp_path / "merged")) == 13
    names = {file.name for file in (tmp_path / "merged").iterdir() if file.suffix != ".parquet"}
    assert names == {file.name for file in (tmp_path / "whole").iterdir() if file.suffix != ".parquet"}
    assert len(datasets.load_dataset(str(tmp_path / "merged"))["train"]) == 15
    merge_caches(sources, tmp_path / "merged")  # nothing more
    assert count_keys(tmp_path / "merged", "shard") == (13, 2)


def test_a_manifest_that_came_in_between_stays(tmp_path, tokenizer):
    """Of two jobs that begin together, the second finds the manifest of the first when it comes to put its own."""
    make_cache(tmp_path / "first", tokenizer, rows=ROWS[:2], k=7)
    make_cache(tmp_path / "second", tokenizer, rows=ROWS[:2])
    first, second = (workers.read_manifest(tmp_path / name) for name in ("first", "second"))
    folder = tmp_path / "both"

    def the_first_is_done(_):
        (folder / workers.MANIFEST).write_text(json.dumps(first))

    with pytest.raises(ValueError, match="captured with k=7, not 32"):
        workers.join_folder(folder, second, "000", the_first_is_done)
    assert workers.read_manifest(folder) == first


def test_what_does_not_belong_together_is_not_merged(tmp_path, tokenizer):
    make_cache(tmp_path / "one", tokenizer, rows=ROWS[:4])
    make_cache(tmp_path / "other", tokenizer, rows=ROWS[4:], k=7)
    with pytest.raises(ValueError, match="other was captured with k=7, not 32"):
        merge_caches([tmp_path / "one", tmp_path / "other"], tmp_path / "merged")
    make_cache(tmp_path / "two", tokenizer, rows=ROWS[4:])
    shard = next((tmp_path / "two").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{shard.name} is not what was written"):
        merge_caches([tmp_path / "one", tmp_path / "two"], tmp_path / "merged")
    with pytest.raises(ValueError, match="is no cache"):
        merge_caches([tmp_path / "one", tmp_path], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_jobs_let_the_teacher_write(tmp_path, make_bpe_tokenizer):
    """In folders of their own and in one: the answers of a single job, and a record of each."""
    folder = write_teacher(tmp_path / "teacher", make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>"))
    teacher, tokenizer = LiveTeacher.load(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():  # so that answers come to an end
        teacher.model.model.embed_tokens.weight[teacher.model.config.eos_token_id] *= 3
    rows = [{"source": f"def f{i}(): return" + " x" * (i // 2 % 4)} for i in range(9)]
    options = {
        "generation": TargetGeneration(
            max_new_tokens=30, sampling_temperature=1.0, num_return_sequences=16, keep="all"
        ),
        **{"prompt_template": "{source}:", "batch_size": 2, "progress": False},
    }
    capture(teacher, rows, tmp_path / "whole", tokenizer, **options)
    for index in range(2):
        shard = {"num_shards": 2, "index": index}
        capture(teacher, rows, tmp_path / "shared", tokenizer, **options, **shard)
        capture(teacher, rows, tmp_path / f"part-{index}", tokenizer, **options, **shard)
    merge_caches([tmp_path / "part-0", tmp_path / "part-1"], tmp_path / "merged")
    expected = datasets.load_dataset(str(tmp_path / "whole"))["train"]
    for name in ("shared", "merged"):
        written = datasets.load_dataset(str(tmp_path / name))["train"]
        pairs = [sorted(zip(data["source"], data["target"], strict=True)) for data in (written, expected)]
        assert pairs[0] == pairs[1] and len(pairs[0]) > 3
        assert records(tmp_path / name).keys() == records(tmp_path / "whole").keys()


def test_a_card_that_two_write_names_all_shards(tmp_path, tokenizer, monkeypatch):
    """The other job's last shard comes while this one writes its card."""
    make_cache(tmp_path / "other", tokenizer, rows=ROWS[9:])
    make_cache(tmp_path / "cache", tokenizer, rows=ROWS[:9])
    late = next((tmp_path / "other").glob("shard-*"))
    replace = os.replace

    def replaced(source, target):
        replace(source, target)
        if Path(target).name == "README.md" and not (tmp_path / "cache" / late.name).exists():
            os.link(late, tmp_path / "cache" / late.name)

    monkeypatch.setattr(os, "replace", replaced)
    workers.write_card(tmp_path / "cache", json.loads((tmp_path / "cache" / "manifest.json").read_text()), "000")
    assert late.name in (tmp_path / "cache" / "README.md").read_text()
