"""Runs that ended in the middle of something: which checkpoint they go on from, and that they can begin again."""

import json
import shutil

import pytest
import torch
from distillation_toys import TEMPLATE, arguments, collate, make_t5, ragged_rows, write_pairs, write_teacher
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_encdec_distill.cli import _checkpoints
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.cli.quickstart import timed_training
from hf_encdec_distill.files import alone_in


ROWS = ragged_rows(12)
RATES = [1e-3, 2e-3, 3e-3, 2e-3, 1e-3, 5e-4]


def shorten(file, by):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - by])


GONE = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
HARM = {
    "killed before the state was written": lambda folder: (folder / "trainer_state.json").unlink(),
    "killed while it was written": lambda folder: shorten(folder / "trainer_state.json", 20),
    "the state never reached the disk": lambda folder: (folder / "trainer_state.json").write_bytes(b""),
    "weights without their last byte": lambda folder: shorten(folder / "model.safetensors", 1),
    "weights without their header": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "half an optimizer": lambda folder: shorten(
        folder / "optimizer.pt", (folder / "optimizer.pt").stat().st_size // 2
    ),
    "no random numbers": lambda folder: (folder / "rng_state.pth").write_bytes(b""),
    "a config that never reached the disk": lambda folder: (folder / "config.json").write_bytes(b""),
    **{f"{name} is gone": lambda folder, name=name: (folder / name).unlink() for name in GONE},
}


class InOrder(timed_training.InOrder, Trainer):
    pass


def train(folder, stop_at=None):
    """Six steps within a share of time, as the quickstart does, or until Ctrl-C at one; what came out."""
    share = timed_training.TimeShare(float("inf"), len(RATES), 3e-3, lambda *_: None, RATES)

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 == stop_at:
                share._stop.set()

    student = make_t5()
    settings = arguments(folder, TrainingArguments, per_device_train_batch_size=2, max_steps=len(RATES))
    trainer = InOrder(model=student, args=settings, train_dataset=ROWS, data_collator=collate)
    trainer.add_callback(Interrupt())
    if stop_at is None:
        result = timed_training.train(trainer, share)
    else:
        with pytest.raises(KeyboardInterrupt):
            timed_training.train(trainer, share)
        result = None
    return result, {name: tensor.clone() for name, tensor in student.state_dict().items()}


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def stopped_twice(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    for step in (2, 4):
        train(folder, step)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    return folder


@pytest.mark.parametrize("harm", HARM)
def test_a_quickstart_goes_on_from_the_newest_checkpoint_that_is_whole(
    stopped_twice, never_stopped, tmp_path, caplog, harm
):
    """With the clock and the rates of that checkpoint, to the same weights."""
    folder = shutil.copytree(stopped_twice, tmp_path / "run")
    assert _checkpoints.last_whole_checkpoint(folder) == str(folder / "checkpoint-4")
    assert not caplog.text
    HARM[harm](folder / "checkpoint-4")
    assert _checkpoints.last_whole_checkpoint(folder) == str(folder / "checkpoint-2")
    assert "checkpoint-4 is not whole, and passed over" in caplog.text
    result, weights = train(folder)
    expected, theirs = never_stopped
    assert result["steps"] == 6 and result["rates"] == expected["rates"] == pytest.approx(RATES)
    assert [row["step"] for row in result["curve"]] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)


# Names of transformers 5.24 and 4.57, accelerate 1.x, DeepSpeed 0.18 and PEFT; a folder's name ends in a slash.
STATE = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
LAYOUTS = {
    "save_only_model": ["model.safetensors"],
    "save_safetensors=False": ["pytorch_model.bin", *STATE],
    "an adapter": ["adapter_model.safetensors", *STATE],
    "an adapter with a name": ["mine/adapter_model.safetensors", *STATE],
    "DDP": ["model.safetensors", *STATE[:2], "rng_state_0.pth", "rng_state_1.pth"],
    "FSDP, full": ["pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt", "rng_state_0.pth"],
    "FSDP, sharded": ["pytorch_model_fsdp_0/", "optimizer_0/", "scheduler.pt", "rng_state_0.pth"],
    "DeepSpeed": ["global_step2/", "rng_state_0.pth"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_checkpoints_of_all_kinds(tmp_path, layout):
    (tmp_path / "trainer_state.json").write_text("{}")
    for name in LAYOUTS[layout]:
        (tmp_path / name if name.endswith("/") else (tmp_path / name).parent).mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"weight": torch.zeros(1)}, tmp_path / name)
        elif not name.endswith("/"):
            torch.save({}, tmp_path / name)
    assert _checkpoints.is_whole(tmp_path)


def test_a_shard_that_is_gone(stopped_twice, tmp_path):
    folder = shutil.copytree(stopped_twice / "checkpoint-4", tmp_path / "checkpoint-4")
    (folder / "model.safetensors").unlink()
    make_t5().save_pretrained(folder, max_shard_size="20KB")
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 1 and _checkpoints.is_whole(folder)
    shards[0].unlink()
    assert not _checkpoints.is_whole(folder)


def test_a_quickstart_whose_only_checkpoint_is_torn_begins_that_training_again(stopped_twice, never_stopped, tmp_path):
    folder = shutil.copytree(stopped_twice, tmp_path / "run")
    for checkpoint in folder.iterdir():
        (checkpoint / "trainer_state.json").unlink()
    result, weights = train(folder)
    assert result["rates"] == pytest.approx(RATES)
    assert all(torch.equal(weights[name], never_stopped[1][name]) for name in weights)


def test_nothing_of_the_time_is_written_after_the_state_that_says_a_checkpoint_is_whole(stopped_twice):
    """Else a run that was killed in between would have a whole checkpoint that cannot be gone on from."""
    checkpoint = stopped_twice / "checkpoint-4"
    state = (checkpoint / "trainer_state.json").stat().st_mtime_ns
    assert all(file.stat().st_mtime_ns <= state for file in checkpoint.iterdir())


# Before the first checkpoint -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_bpe_tokenizer):
    folder = tmp_path_factory.mktemp("inputs")
    write_teacher(folder / "teacher", make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>"))
    write_pairs(folder / "pairs.csv", 60)
    (folder / "text.txt").write_text("Something that a student can read and go on with. " * 20)
    words = ["init", folder / "teacher", "--prompt-template", TEMPLATE, "--output", folder / "student", *data(folder)]
    assert main(list(map(str, words))) == 0
    return folder


def data(folder):
    return ["--dataset", folder / "pairs.csv", "--source-column", "text", "--target-column", "short"]


def command(folder, name, output):
    options = ["--output", output, "--max-steps", 2, "--use-cpu", "--disable-tqdm", "true"]
    if name == "teach":
        return [name, folder / "teacher", *data(folder), "--prompt-template", TEMPLATE, *options]
    models = [name, folder / "student", "--teacher", folder / "teacher"]
    if name == "heal":
        text = ["--text", folder / "text.txt", "--window", 16, "--eval-rows", 0]
        return [*models, *text, *options]
    return [*models, *data(folder), "--prompt-template", TEMPLATE, *options]


def run(words):
    return main(list(map(str, words)))


class Torn(TrainerCallback):
    """A run that ends in its second step: by an error, or while it writes a checkpoint."""

    def __init__(self, checkpoint=False, error=None):
        self.checkpoint, self.error = checkpoint, error or OSError(28, "No space left on device")

    def on_step_end(self, args, state, control, **kwargs):
        if self.checkpoint:
            kwargs["model"].save_pretrained(f"{args.output_dir}/checkpoint-1")
        if state.global_step == 2:
            raise self.error


def fail(monkeypatch, words, code=2, **how):
    with monkeypatch.context() as patch:
        begin = Trainer.train

        def train(self, *args, **kwargs):
            self.add_callback(Torn(**how))
            return begin(self, *args, **kwargs)

        patch.setattr(Trainer, "train", train)
        assert run(words) == code


@pytest.mark.parametrize("name", ["distill", "heal"])
def test_ctrl_c_says_how_to_go_on_from_what_is_there(folder, tmp_path, monkeypatch, capsys, name):
    words = command(folder, name, tmp_path / "run")
    fail(monkeypatch, words, code=130, error=KeyboardInterrupt())
    assert "begin with the same command again" in capsys.readouterr().err.splitlines()[-1]
    fail(monkeypatch, [*words, "--save-steps", 1], code=130, error=KeyboardInterrupt())
    assert "go on with the same command and --resume" in capsys.readouterr().err.splitlines()[-1]
    assert run([*words, "--resume"]) == 0


@pytest.mark.parametrize("checkpoint", [False, True], ids=["nothing yet", "half a checkpoint"])
@pytest.mark.parametrize("resume", [False, True], ids=["same command", "with --resume"])
def test_distill_begins_again_where_it_ended_before_its_first_checkpoint(
    folder, tmp_path, monkeypatch, caplog, resume, checkpoint
):
    output = tmp_path / "run"
    words = command(folder, "distill", output)
    fail(monkeypatch, words, checkpoint=checkpoint)
    left = {path.name for path in output.iterdir()}
    assert left == {"recipe.yaml", "provenance.json"} | ({"checkpoint-1"} if checkpoint else set())
    (output / "provenance.json.1f2e.tmp").touch()  # as after a kill in the middle of a write
    (output / "runs" / "Nov28_machine").mkdir(parents=True)  # as TensorBoard has it
    (output / "runs" / "Nov28_machine" / "events.out.tfevents.1.machine.1.0").touch()
    assert run([*words, *(["--resume"] if resume else [])]) == 0
    assert json.loads((output / "provenance.json").read_text())["result"]["steps"] == 2
    assert (output / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["heal", "teach"])
def test_other_trainings_begin_again_too(folder, tmp_path, monkeypatch, capsys, name):
    output = tmp_path / "run"
    words = command(folder, name, output)
    fail(monkeypatch, words, checkpoint=True)
    assert any(output.rglob("checkpoint-1"))
    assert run([*words, "--max-steps", 1]) == 0
    assert (output / "model.safetensors").is_file()
    assert " 1 step\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["distill", "heal", "teach", "quickstart"])
def test_a_run_that_another_process_is_at_work_on_is_left_alone(folder, tmp_path, capsys, name):
    """Two that write checkpoints of one name would make one that looks whole, of two trainings."""
    output = tmp_path / "run"
    words = ["quickstart", "--output", output] if name == "quickstart" else command(folder, name, output)
    with alone_in(output):
        assert run(words) == 2
        assert "another process is at work in" in capsys.readouterr().err.splitlines()[-1]
        assert not any(file.is_file() for file in output.rglob("*"))
    if name != "quickstart":
        assert run(words) == 0


def test_a_folder_with_anything_else_in_it_is_left_alone(folder, tmp_path, monkeypatch, capsys):
    """A recipe that a person wrote, or a run that came to its end, among them."""
    output = tmp_path / "run"
    words = command(folder, "distill", output)
    fail(monkeypatch, words)
    theirs = {path.name: path.read_text() for path in output.iterdir()}
    finished = json.dumps({**json.loads(theirs["provenance.json"]), "result": {"steps": 2}})
    for name, content in {
        "notes.txt": "mine",
        "recipe.yaml": "student: mine\n",
        "provenance.json": finished,
        "model.safetensors": "",
        "runs/notes.txt": "mine",
    }.items():
        folder_of = tmp_path / name.replace("/", "-")
        shutil.copytree(output, folder_of)
        (folder_of / name).parent.mkdir(exist_ok=True)
        (folder_of / name).write_text(content)
        for more in ([], ["--resume"]):
            capsys.readouterr()
            assert run([*command(folder, "distill", folder_of), *more]) == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert "is not empty" in error and "choose another folder" in error and "leave --resume" not in error
        assert (folder_of / name).read_text() == content
        assert {path.name for path in folder_of.iterdir()} == {*theirs, name.partition("/")[0]}


def test_what_is_said_of_a_folder_that_holds_a_run_or_none(stopped_twice, tmp_path):
    with pytest.raises(ValueError, match=r"is not empty: go on with --resume"):
        _checkpoints.checkpoint_in(stopped_twice, resume=False)
    assert _checkpoints.checkpoint_in(stopped_twice, resume=True) == str(stopped_twice / "checkpoint-4")
    for output in (tmp_path, tmp_path / "nothing"):
        assert _checkpoints.checkpoint_in(output, resume=False) is None
        with pytest.raises(ValueError, match=r"no checkpoint in .* leave --resume out to begin"):
            _checkpoints.checkpoint_in(output, resume=True)
