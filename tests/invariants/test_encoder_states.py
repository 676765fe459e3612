"""States of a frozen encoder that are kept: what the live one says, in whatever order rows come, and never twice.

As one of two processes, or alone, this file trains and has rank 0 write what came out.
"""

import copy
import os
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from distillation_toys import (
    STUDENTS,
    InOrder,
    Stream,
    arguments,
    collate,
    make_bart,
    make_rope,
    make_t5,
    make_teacher,
    ragged_rows,
    spread,
)
from forked import on_two_processes
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM, Seq2SeqTrainingArguments

from hf_encdec_distill import DistillationTrainer, RopeEncDecForConditionalGeneration
from hf_encdec_distill.distillation import DistillationCollator
from hf_encdec_distill.distillation.options import encoder_states as module
from hf_encdec_distill.distillation.options.encoder_states import EncoderStates, capture_encoder_states, fingerprint


ROWS = ragged_rows(8)


def make_adapted():
    """T5 with LoRA that does something, in encoder and decoder."""
    torch.manual_seed(4)
    return get_peft_model(make_t5(), LoraConfig(target_modules=["q", "v"], init_lora_weights=False)).eval()


MAKE = {
    **STUDENTS,
    "lora": make_adapted,
    "bart": make_bart,
    "states": lambda: make_rope("separate", cross_attention_layers=[1, 2]),
    "pooled": lambda: make_rope("merged", cross_attention_layers=[1, 2], encoder_pooling=2),
}


def make_trainer(folder, student, cls=InOrder, states="states", rows=ROWS, **changed):
    settings = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    settings |= {"freeze_encoder": True, "per_device_train_batch_size": 4, "num_train_epochs": 1}
    settings |= {"encoder_states": states and str(folder / states)}
    data = {"data_collator": collate} if "processing_class" not in changed else {}
    data |= {
        name: changed.pop(name) for name in ("processing_class", "eval_dataset", "compute_metrics") if name in changed
    }
    teacher = changed.pop("teacher", None) or make_teacher()
    return cls(student, arguments(folder, **{**settings, **changed}), teacher=teacher, train_dataset=rows, **data)


def count_runs(trainer):
    """A list that grows by the number of rows whenever the encoder runs."""
    runs = []
    trainer.model.get_encoder().register_forward_hook(
        lambda module, args, kwargs, _output: runs.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return runs


def gradients_of(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    return {"loss": loss.detach()} | {
        n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None
    }


def kept(folder):
    """All tensors in a folder of states."""
    tensors = {}
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            tensors |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("exact", [True, False])
def test_kept_states_give_the_loss_of_the_live_encoder(tmp_path, make_bpe_tokenizer, monkeypatch, name, side, exact):
    """Loss and gradients, of rows kept in another batch; to 1e-5 in float32, and to float16's rounding as they are."""
    if exact:
        monkeypatch.setattr(module, "_KEPT_IN", torch.float32)
    tokenizer = make_bpe_tokenizer(pad_token="<|endoftext|>")
    tokenizer.padding_side = side
    live = make_trainer(tmp_path, MAKE[name](), states=None, processing_class=tokenizer)
    trainer = make_trainer(tmp_path, MAKE[name](), processing_class=tokenizer)
    expected = gradients_of(live, live.data_collator(ROWS[2:]))
    runs = count_runs(trainer)
    found = gradients_of(trainer, trainer.data_collator(ROWS[2:]))
    assert runs == [6]
    gradients_of(trainer, trainer.data_collator(ROWS[:4]))
    gradients_of(trainer, trainer.data_collator(ROWS[4:]))
    # Pads in front may move positions, which are columns in BART: there a row with others is another one.
    assert runs[1:] == ([4] if side == "left" and name in ("t5", "lora", "bart") else [2])
    other_batch = gradients_of(trainer, trainer.data_collator(ROWS[2:]))
    for values in (found, other_batch):
        assert set(values) == set(expected)
        for key, value in expected.items():
            if exact:
                torch.testing.assert_close(values[key], value, rtol=1e-4, atol=1e-5, msg=key)
            else:
                assert (values[key] - value).norm() <= 1e-2 * value.norm() + 1e-6, key
    trainer._encoder_states.flush()
    tensors = kept(tmp_path / "states").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32 if exact else torch.float16}
    if side == "right":
        prompt = torch.tensor([ROWS[0]["input_ids"]])
        output = MAKE[name]().get_encoder()(input_ids=prompt)
        said = output.get("cross_attention_states", output.last_hidden_state)[0].detach()
        closest = min((tensor.float() - said).abs().max() for tensor in tensors if tensor.shape == said.shape)
        assert closest <= (1e-5 if exact else 1e-3) * said.abs().max()


@pytest.mark.parametrize(
    "name, how", [("t5", "gradient_checkpointing"), ("merged", "gradient_checkpointing"), ("merged", "accumulation")]
)
def test_training_is_that_of_the_live_encoder(tmp_path, monkeypatch, name, how):
    """Two passes in another order each, evaluation after each; the encoder reads each row once."""
    monkeypatch.setattr(module, "_KEPT_IN", torch.float32)

    def train(**changed):
        settings = {"num_train_epochs": 2, "eval_strategy": "epoch", "optim": "adamw_torch", "learning_rate": 1e-2}
        settings |= {"eval_dataset": ragged_rows(3, seed=5), "per_device_eval_batch_size": 2}
        settings |= (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
            if how == "accumulation"
            else {how: True}
        )
        trainer = make_trainer(tmp_path, MAKE[name](), DistillationTrainer, **settings, **changed)
        runs = count_runs(trainer)
        trainer.train()
        return trainer, runs

    (live, all_runs), (trainer, runs) = train(states=None), train()
    assert sum(all_runs) > 2 * sum(runs) - 1 and sum(runs) == len(ROWS) + 3
    for (key, value), other in zip(live.model.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4, msg=key)
    evaluated = [[log for log in each.state.log_history if "eval_loss" in log] for each in (live, trainer)]
    names = ("eval_loss", "eval_ce_loss", "eval_distill_loss", "eval_teacher_agreement")
    for one, other in zip(*evaluated, strict=True):
        assert [other[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)

    again, runs = train()
    assert not runs
    for (key, value), other in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(value, other), key


@pytest.mark.parametrize("data", ["stream", "by length"])
def test_rows_are_found_however_they_come(tmp_path, data):
    by_length = {"group_by_length": True}
    if not hasattr(Seq2SeqTrainingArguments, "group_by_length"):
        by_length = {"train_sampling_strategy": "group_by_length"}
    settings = {"max_steps": 6} if data == "stream" else {"num_train_epochs": 3, **by_length}
    rows = Stream(ROWS) if data == "stream" else ROWS
    trainer = make_trainer(tmp_path, MAKE["merged"](), DistillationTrainer, rows=rows, **settings)
    runs = count_runs(trainer)
    trainer.train()
    assert trainer.state.global_step == 6 and sum(runs) == len(ROWS)


def test_other_weights_precision_and_states_are_others(tmp_path):
    """None is read for another; what training and saving add to a config is no part of an encoder."""
    student = MAKE["merged"]()
    mark = fingerprint(student, "no")
    student.config.prompt_date, student.config.use_cache = "2026-01-01", False
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student")
    assert fingerprint(loaded, "no") == mark == fingerprint(make_rope("merged", cross_attention_layers=[1, 2]), "no")
    others = [fingerprint(student, "bf16"), fingerprint(copy.deepcopy(student).to(torch.bfloat16), "no")]
    others += [fingerprint(make_rope("merged", cross_attention_layers=[0, 2]), "no")]
    others += [fingerprint(make_rope("merged", cross_attention_layers=[1, 2], encoder_attention="causal"), "no")]
    others += [fingerprint(make_rope("merged", cross_attention_layers=[1, 2], rms_norm_eps=1e-3), "no")]
    changed = copy.deepcopy(student)
    with torch.no_grad():
        weight = changed.get_encoder().layers[0].mlp.up_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
        student.get_decoder().layers[0].mlp.up_proj.weight[0, 0] += 1  # the decoder's are its own business
    others.append(fingerprint(changed, "no"))
    assert fingerprint(student, "no") == mark and len({mark, *others}) == 1 + len(others)

    trainer = make_trainer(tmp_path, MAKE["merged"]())
    trainer.train()
    other = make_trainer(tmp_path, changed)
    runs = count_runs(other)
    other.train()
    assert sum(runs) == len(ROWS) and len(list((tmp_path / "states").iterdir())) == 2
    # Between two evaluations too.
    batch = trainer.data_collator(ROWS)
    with torch.no_grad():
        trainer.model.get_encoder().layers[0].mlp.up_proj.weight.mul_(0.5)
    trainer.eval_dataset = ROWS
    live = make_trainer(tmp_path, copy.deepcopy(trainer.model), states=None, eval_dataset=ROWS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(live.evaluate()["eval_loss"], rel=1e-3)
    assert batch


def test_the_encoder_computes_in_the_precision_of_the_training(tmp_path):
    """bf16: the loss of a live encoder under autocast, from states of its own."""
    losses = []
    for states in (None, "states"):
        trainer = make_trainer(tmp_path, MAKE["merged"](), states=states, bf16=True, num_train_epochs=2)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    student, prompt = MAKE["merged"](), torch.tensor([ROWS[0]["input_ids"]])
    (place,) = (tmp_path / "states").iterdir()
    assert place.name == fingerprint(student, "bf16")
    said = []
    for enabled in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            said.append(student.get_encoder()(input_ids=prompt).cross_attention_states[0])
    distances = [min((t - one).abs().max() for t in kept(place).values() if t.shape == one.shape) for one in said]
    assert distances[0] < 0.1 * distances[1]


def test_a_number_too_large_for_float16_is_kept_as_it_is(tmp_path):
    """The residual stream of language models has some in the thousands; one row with 1e5 in it."""
    student = MAKE["merged"]()
    with torch.no_grad():
        student.get_input_embeddings().weight[ROWS[0]["input_ids"][0], 0] = 1e5
    states = EncoderStates(tmp_path, Accelerator(cpu=True))
    student.requires_grad_(False)
    batch = collate(ROWS)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    (_, found) = states.encoder_outputs(student, inputs)["encoder_outputs"]
    said = student.get_encoder()(**inputs).cross_attention_states
    mask = batch["attention_mask"].bool()
    assert torch.equal(found[0][mask[0]], said[0][mask[0]]) and found.abs().max() >= 1e5
    torch.testing.assert_close(found[mask], said[mask], rtol=2**-11, atol=1e-6)
    states.flush()
    large = {bool(row["input_ids"].count(ROWS[0]["input_ids"][0])) for row in ROWS}
    assert large == {True, False} and {t.dtype for t in kept(tmp_path).values()} == {torch.float16, torch.float32}


def test_dropout_is_left_out_and_no_random_number_is_drawn(tmp_path):
    """The states of BART in eval mode, by BART in train mode."""
    student = make_bart(dropout=0.5).train()
    student.get_encoder().requires_grad_(False)
    batch = collate(ROWS)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    found = EncoderStates(tmp_path, Accelerator(cpu=True)).encoder_outputs(student, inputs)["encoder_outputs"]
    assert torch.equal(torch.rand(2), expected)
    assert all(part.training for part in student.modules())
    said = student.eval().get_encoder()(**inputs).last_hidden_state
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(found.last_hidden_state[mask], said[mask], rtol=1e-3, atol=1e-3)


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    student, inputs = MAKE["merged"](), {"input_ids": collate(ROWS)["input_ids"][:2, :2]}
    student.requires_grad_(False)
    states = EncoderStates(tmp_path, Accelerator(cpu=True))
    states.encoder_outputs(student, inputs)

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", stopped)
        states.flush()
    (place,) = tmp_path.iterdir()
    assert not list(place.iterdir())
    states.flush()  # what was computed is still there
    (file,) = place.iterdir()

    for name, age in (("partial-old", 7200), ("partial-new", 0)):
        (place / name).write_bytes(b"half")
        os.utime(place / name, (time.time() - age,) * 2)
    (place / "partial-renamed").symlink_to("nowhere")  # listed, and not there any more when it is looked at
    assert EncoderStates(tmp_path, Accelerator(cpu=True)).rows(student) == 2
    (place / "partial-renamed").unlink()
    assert sorted(path.name for path in place.iterdir()) == ["partial-new", file.name]

    whole = file.read_bytes()
    save_file({key: torch.ones_like(state) for key, state in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=f"{file.name} is not what was written, .* delete it; its rows are computed"):
        EncoderStates(tmp_path, Accelerator(cpu=True)).encoder_outputs(student, inputs)
    file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=f"{file.name} is not what was written, .* delete it; its rows are computed"):
        EncoderStates(tmp_path, Accelerator(cpu=True)).encoder_outputs(student, inputs)


def test_resumed_equals_never_stopped(tmp_path):
    """Stopped in the first pass and in the second, with states as they are kept; with and without the folder."""

    def make(folder):
        torch.manual_seed(len(str(folder)))  # whatever the process did before must not matter
        settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
        student = make_rope("merged", cross_attention_layers=[1, 2], attention_dropout=0.2)
        return make_trainer(folder, student, DistillationTrainer, **settings)

    whole = make(tmp_path)
    whole.train()
    for stop in (1, 2, 3):
        resumed = make(tmp_path if stop == 2 else tmp_path / f"again-{stop}")
        resumed.args.save_strategy = "no"
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
            if stop == 2:
                assert torch.equal(one, other), name
            else:  # rows are computed in other batches, and may be rounded the other way
                torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3, msg=name)


def test_outputs_that_are_looked_at_are_those_of_the_encoder(tmp_path):
    """With `compute_metrics` predictions hold the encoder's last state; generated ones come of the encoder too."""
    seen = {}

    def train(name, **changed):
        def look(prediction):
            seen[name] = prediction.predictions
            return {}

        trainer = make_trainer(tmp_path, MAKE["merged"](), eval_dataset=ROWS, compute_metrics=look, **changed)
        return trainer.evaluate()["eval_loss"]

    assert train("kept") == pytest.approx(train("live", states=None), rel=1e-3)
    assert all((one == other).all() for one, other in zip(seen["kept"], seen["live"], strict=True))
    written = {"predict_with_generate": True, "generation_max_length": 6}
    assert train("kept", **written) == pytest.approx(train("live", states=None, **written), rel=1e-3)
    assert (seen["kept"] == seen["live"]).all()


def test_on_policy_steps_read_the_states_of_the_same_prompts(tmp_path):
    settings = {"on_policy_fraction": 1.0, "max_target_length": 4, "sampling_temperature": 0.0, "num_train_epochs": 2}
    weights = []
    for states in ("states", None):
        trainer = make_trainer(tmp_path, MAKE["merged"](), states=states, **settings)
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-2, atol=1e-3, msg=name)
    assert len(kept(tmp_path / "states")) == len(ROWS)


def test_layers_that_go_make_it_another_encoder(tmp_path):
    """One layer less before the second step and the fourth: each encoder has states of its own."""
    teacher = spread(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=280,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                bos_token_id=3,
                eos_token_id=2,
                pad_token_id=0,
            )
        ),
        0.15,
    )
    losses = []
    for states in ("states", None):
        student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher)
        settings = {"progressive_depth_steps": 1, "final_encoder_layers": 3, "final_decoder_layers": 3, "max_steps": 4}
        trainer = make_trainer(tmp_path, student, states=states, teacher=copy.deepcopy(teacher), **settings)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert len(list((tmp_path / "states").iterdir())) == 3


def test_a_teacher_that_could_share_its_pass_does_not(tmp_path):
    """States that are kept need no pass; once the encoder is trained there is none to share either."""
    teacher = make_teacher()
    student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher)
    trainer = make_trainer(tmp_path, student, teacher=teacher, unfreeze_encoder_after=2, num_train_epochs=2)
    runs = count_runs(trainer)
    batch = trainer.data_collator(ROWS)
    live = make_trainer(tmp_path, copy.deepcopy(student), states=None, teacher=copy.deepcopy(teacher))
    expected = gradients_of(live, batch)
    assert live._shared_prompt._exact
    for _ in range(2):
        for name, value in gradients_of(trainer, batch).items():
            assert (value - expected[name]).norm() <= 1e-2 * expected[name].norm() + 1e-5, name
    assert runs == [len(ROWS)]
    trainer.train()
    assert runs == [len(ROWS), 4, 4]  # the two steps of the second pass


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"freeze_encoder": False}, "encoder_states=.* without freeze_encoder"),
        ({"neftune_noise_alpha": 5.0}, "with neftune_noise_alpha=5.0"),
        ({"bidirectional_warmup_steps": 2}, "with bidirectional_warmup_steps=2"),
        ({"student": "dynamic"}, "rope_type='dynamic'"),
        ({"column": "position_ids"}, "the batch has position_ids"),
        ({"sharded": True}, "with FSDP, DeepSpeed or tensor parallelism"),
    ],
)
def test_what_changes_from_step_to_step_is_refused(tmp_path, monkeypatch, settings, message):
    settings = dict(settings)
    if settings.pop("sharded", False):
        monkeypatch.setattr(DistillationTrainer, "is_sharded", True)
    column, kind = settings.pop("column", None), settings.pop("student", None)
    rope = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}} if kind else {}
    with pytest.raises(ValueError, match=message):
        trainer = make_trainer(tmp_path, make_rope("merged", cross_attention_layers=[1, 2], **rope), **settings)
        batch = trainer.data_collator(ROWS)
        if column is not None:
            batch[column] = batch["attention_mask"].cumsum(-1) - 1
        trainer.compute_loss(trainer.model, batch)


def test_a_folder_is_filled_ahead_of_time(tmp_path, make_bpe_tokenizer):
    """In two calls, the second with more rows; training then runs no encoder."""
    tokenizer = make_bpe_tokenizer(pad_token="<|endoftext|>")
    student, folder = MAKE["merged"](), tmp_path / "states"
    collator = DistillationCollator(tokenizer, tokenizer, start_token_id=1)
    fill = partial(capture_encoder_states, folder=folder, collator=collator, batch_size=3, progress=False)
    assert fill(student, ROWS[:3]) == 3
    assert fill(MAKE["merged"](), DatasetDict({"train": Dataset.from_list(ROWS)})) == len(ROWS)
    assert len(kept(folder)) == len(ROWS)
    trainer = make_trainer(tmp_path, student, processing_class=tokenizer)
    runs = count_runs(trainer)
    trainer.train()
    assert not runs


# --- two processes ---


def run(folder: Path) -> None:
    """Four passes over eight rows, each in another order; the second half of the steps trains the encoder too. Resumed
    before that and after, it ends in the same bits."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    module._KEPT_IN = torch.float32

    def make(**changed):
        return make_trainer(
            folder / f"run-{processes}",
            MAKE["merged"](),
            DistillationTrainer,
            num_train_epochs=4,
            per_device_train_batch_size=4 // processes,
            unfreeze_encoder_after=0.5,
            ddp_backend="gloo" if processes > 1 else None,
            **changed,
        )

    trainer = make(save_strategy="steps", save_steps=3)
    runs = count_runs(trainer)
    trainer.train()
    assert trainer.accelerator.num_processes == processes
    rank = trainer.accelerator.process_index
    torch.save(runs, folder / f"runs-{processes}-{rank}.pt")
    torch.save(trainer.model.state_dict(), folder / f"weights-{processes}-{rank}.pt")
    for stop in (3, 6):
        resumed = make()
        resumed.train(resume_from_checkpoint=str(folder / f"run-{processes}" / f"checkpoint-{stop}"))
        for (name, one), other in zip(trainer.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, other), (stop, name)


@pytest.mark.process
def test_two_processes_share_the_states(tmp_path):
    """Weights of one process, the same bits on both; a row that the other has computed is read."""
    on_two_processes(__file__, tmp_path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_KEPT_IN", torch.float32)
        run(tmp_path)
    load = partial(torch.load, weights_only=True)
    runs = [load(tmp_path / f"runs-{name}.pt") for name in ("1-0", "2-0", "2-1")]
    # First the states, four rows a process, then the two passes in which the encoder is trained.
    assert runs == [[4, 4] + 4 * [4], [2, 2] + 4 * [2], [2, 2] + 4 * [2]]
    assert len(kept(tmp_path / "run-2" / "states")) == len(ROWS)
    one, two, other = (load(tmp_path / f"weights-{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(two[name], other[name]), name
    assert not torch.equal(
        one["model.encoder.layers.0.mlp.up_proj.weight"],
        MAKE["merged"]().state_dict()["model.encoder.layers.0.mlp.up_proj.weight"],
    )


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # or its threads may abort the process at its end
