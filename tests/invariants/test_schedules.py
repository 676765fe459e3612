"""Layers taken out in training, and an encoder that learns to look ahead: what is computed, and after a stop too.

As one of two processes, or alone, this file trains with layers taken out and has rank 0 write what came out.
"""

import contextlib
import copy
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from distillation_toys import InOrder, arguments, collate, make_t5, ragged_rows, spread
from forked import on_two_processes
from transformers import AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_encdec_distill import DistillationTrainer, RopeEncDecForConditionalGeneration
from hf_encdec_distill.models.rope_encdec.depth import remove_layer, without_layer


VOCAB, LAYERS, START = 60, 4, 3
ROWS = ragged_rows(8, vocab_size=VOCAB)
SIDES = ("encoder", "decoder")


def make_llama(**fields):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=START,
        eos_token_id=2,
        pad_token_id=0,
        **fields,
    )
    return spread(LlamaForCausalLM(config), std=0.15)


def make_student(kind="merged", dropout=0.0, **fields):
    return RopeEncDecForConditionalGeneration.from_decoder_only(
        make_llama(), cross_attention=kind, attention_dropout=dropout, **fields
    )


def make_trainer(folder, student, cls=DistillationTrainer, **changed):
    settings = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "distill_weight": 0.7,
        "loss_chunk_size": 5,
    }
    return cls(
        student,
        arguments(folder, **{**settings, **changed}),
        teacher=make_llama(),
        train_dataset=ROWS,
        eval_dataset=ROWS[:2],
        data_collator=collate,
    )


def prompts(side="right"):
    """Ragged prompts, `(B, S)` ids and mask."""
    lengths, generator = (6, 4, 2), torch.Generator().manual_seed(3)
    ids, mask = torch.zeros(2, len(lengths), 6, dtype=torch.long)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(6 - length, 6)
        ids[row, where] = torch.randint(4, VOCAB, (length,), generator=generator)
        mask[row, where] = 1
    return ids, mask


# --- one layer at a time ---


@torch.no_grad()
def loss_of(student, teacher):
    """0.7 KL + 0.3 CE over the target tokens of `ROWS`, one row at a time."""
    total, tokens = 0.0, 0
    for row in ROWS:
        source, target = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        start = torch.tensor([START] if student.config.cross_attention == "merged" else [])
        logits = student(input_ids=source[None], labels=target[None]).logits[0]
        sequence = torch.cat([source, start.long(), target])
        answers = teacher(sequence[None]).logits[0, len(sequence) - len(target) - 1 : -1]
        kl = F.kl_div(logits.log_softmax(-1), answers.log_softmax(-1), reduction="sum", log_target=True)
        total += 0.7 * kl.item() + 0.3 * F.cross_entropy(logits, target, reduction="sum").item()
        tokens += len(target)
    return total / tokens


def built_without(student, side, layer):
    """A new model of the config and the tensors of all other layers."""
    config, kept = copy.deepcopy(student.config), {name: list(range(LAYERS)) for name in SIDES}
    kept[side].remove(layer)
    config.encoder_num_hidden_layers, config.decoder_num_hidden_layers = (len(kept[name]) for name in SIDES)
    if config.cross_attention == "merged":
        config.cross_attention_layers = [sum(e < d for e in kept["encoder"]) for d in kept["decoder"]]

    def renamed(name):
        found = re.match(rf"model\.{side}\.layers\.(\d+)\.(.*)", name)
        if not found:
            return name
        at = int(found[1])
        return None if at == layer else f"model.{side}.layers.{at - (at > layer)}.{found[2]}"

    state = {renamed(name): tensor for name, tensor in student.state_dict().items()}
    state.pop(None)
    model = RopeEncDecForConditionalGeneration(config)
    model.load_state_dict(state)
    return model.eval()


class BeforeRemoval(TrainerCallback):
    """A copy of the student as it is when the second step has been made."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            self.student = copy.deepcopy(model).eval()


@pytest.mark.parametrize("kind", ["merged", "separate"])
def test_the_layer_of_least_loss_goes(tmp_path, kind):
    """Every two steps one, the cheapest by models that were built without; what is left is a model like any other."""
    student, teacher, seen = make_student(kind), make_llama(), BeforeRemoval()
    if kind == "merged":  # it starts as the teacher
        ids, _ = prompts()
        logits = student(input_ids=ids[:1], decoder_input_ids=torch.tensor([[START, 7, 8, 9]])).logits
        whole = torch.cat([ids[:1], torch.tensor([[START, 7, 8, 9]])], dim=1)
        torch.testing.assert_close(logits, teacher(whole).logits[:, -4:], rtol=1e-5, atol=1e-5)
    trainer = make_trainer(
        tmp_path,
        student,
        progressive_depth_steps=2,
        final_encoder_layers=3,
        final_decoder_layers=3,
        max_steps=5,
    )
    trainer.add_callback(seen)
    trainer.train()

    logs = [log for log in trainer.state.log_history if "encoder_layers" in log]
    assert [log["step"] for log in logs] == [2, 4]
    losses = {
        (side, layer): loss_of(built_without(seen.student, side, layer), teacher)
        for side in SIDES
        for layer in range(LAYERS)
    }
    side, layer = min(losses, key=losses.get)
    assert logs[0][f"removed_{side}_layer"] == layer
    assert logs[0]["loss_after_removal"] == pytest.approx(losses[side, layer], rel=1e-4)
    assert sorted(losses.values())[1] > losses[side, layer] * (1 + 1e-3)

    assert (logs[-1]["encoder_layers"], logs[-1]["decoder_layers"]) == (3, 3)
    trainer.model.save_pretrained(tmp_path / "small")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "small")
    ids, mask = prompts()
    asked = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :4]}
    assert torch.equal(loaded(**asked).logits, trainer.model.eval()(**asked).logits)
    written = [trainer.model.generate(ids, attention_mask=mask, max_new_tokens=5, use_cache=c) for c in (True, False)]
    assert torch.equal(*written)


class WatchesOptimizer(DistillationTrainer):
    """Holds the optimizer's state to what it was before a layer went, parameter by parameter."""

    checked = 0

    def get_batch_samples(self, *args, **kwargs):
        before = {p: {k: v.clone() for k, v in s.items()} for p, s in self.optimizer.state.items()}
        names = {p: name for name, p in self.model.named_parameters()}
        result = super().get_batch_samples(*args, **kwargs)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        assert {id(p) for group in self.optimizer.param_groups for p in group["params"]} == {id(p) for p in trainable}
        if len(names) > len(list(self.model.parameters())):
            assert set(self.optimizer.state) == set(trainable)
            for parameter in trainable:
                for key, value in self.optimizer.state[parameter].items():
                    assert torch.equal(value, before[parameter][key]), names[parameter]
            self.checked += 1
        return result


def test_optimizer_goes_on(tmp_path):
    """AdamW keeps moments and step counts of what is left, and nothing of what is not.

    Without final_encoder_layers no encoder layer may become one that nobody reads."""
    trainer = make_trainer(
        tmp_path, make_student(), WatchesOptimizer, progressive_depth_steps=1, final_decoder_layers=1, max_steps=4
    )
    trainer.train()
    assert trainer.checked == 3
    assert trainer.model.config.encoder_states_read == [LAYERS - 1]
    assert [log["learning_rate"] for log in trainer.state.log_history if "loss" in log] == pytest.approx(
        [1e-2, 7.5e-3, 5e-3, 2.5e-3]
    )


SCHEDULES = {
    "depth": {"progressive_depth_steps": 1, "final_encoder_layers": 3, "final_decoder_layers": 3},
    "look ahead": {"bidirectional_warmup_steps": 2},
}


def test_layers_that_slide_still_do_when_others_go(tmp_path):
    student = make_student(encoder_sliding_window=2)  # a full layer, two that slide, a full one
    ids, mask = prompts()
    asked = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :4]}
    with torch.no_grad():
        with without_layer(student, "encoder", 0):
            expected = student(**asked, use_cache=False).logits
        remove_layer(student, "encoder", 0)
        assert student.config.encoder_layer_types == ["sliding_attention"] * 2 + ["full_attention"]
        student.save_pretrained(tmp_path)
        loaded = RopeEncDecForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(loaded(**asked).logits, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resumed_equals_never_stopped(tmp_path, schedule):
    """Stopped before each change: dropout, shuffled rows, AdamW. The student given again is that of the beginning, or,
    after the second stop, that of the checkpoint."""

    def make(student, folder, **changed):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, **SCHEDULES[schedule], **changed}
        torch.manual_seed(len(changed))  # whatever the process did before must not matter
        return make_trainer(folder, student, **settings)

    whole = make(make_student(dropout=0.2), tmp_path)
    whole.train()
    for stop, given in ((1, None), (2, "checkpoint-2"), (3, None)):
        student = make_student(dropout=0.2)
        if given is not None:
            student = RopeEncDecForConditionalGeneration.from_pretrained(tmp_path / given)
        resumed = make(student, tmp_path / "again", save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        weights = resumed.model.state_dict()
        assert weights.keys() == whole.model.state_dict().keys()
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(weights[name], tensor), (stop, name)
        assert resumed.model.config.encoder_states_read == whole.model.config.encoder_states_read
        assert resumed.model.config.encoder_attention == whole.model.config.encoder_attention
    if schedule == "depth":
        with pytest.raises(ValueError, match="3 \\+ 3 layers of a student that began with 4 \\+ 4.* has 3 \\+ 4"):
            student = make_student(encoder_layers=[0, 1, 2], calibration=[([5, 6], [7, 8])])
            make(student, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# --- from causal to bidirectional ---


@torch.no_grad()
def first_probabilities(student, attention, ids, mask):
    """Attention `(B, N, S, S)` of the first encoder layer of a new model of these weights."""
    config = copy.deepcopy(student.config)
    config.encoder_attention, config._attn_implementation = attention, "eager"
    model = RopeEncDecForConditionalGeneration(config).eval()
    model.load_state_dict(student.state_dict())
    return model.get_encoder()(ids, attention_mask=mask, output_attentions=True).attentions[0]


class Attends(TrainerCallback):
    """Holds attention after each step to the bidirectional one, with `exp(log a) = a` of the weight on later keys."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.compare(model, state.global_step)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.compare(model, 0)

    @torch.no_grad()
    def compare(self, model, step):
        training, model = model.training, model.eval()
        a = min(1.0, step / 4)
        for side in ("left", "right", None):
            ids, mask = prompts(side)
            if side is None:
                mask = torch.ones_like(mask)
            real = mask.bool()
            both = first_probabilities(model, "bidirectional", ids, mask)
            later = torch.ones(6, 6).triu(1).bool()
            expected = torch.where(later, a * both, both)
            expected = expected / expected.sum(-1, keepdim=True)
            model.set_attn_implementation("eager")
            output = model.get_encoder()(ids, attention_mask=mask, output_attentions=True)
            for row in range(len(ids)):
                found, wanted = output.attentions[0][row][:, real[row]], expected[row][:, real[row]]
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
            model.set_attn_implementation("sdpa")
            fast = model.get_encoder()(ids, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(fast[real], output.last_hidden_state[real], rtol=1e-4, atol=1e-5)
            if a in (0, 1):
                causal = first_probabilities(model, "causal" if a == 0 else "bidirectional", ids, mask)
                assert torch.equal(output.attentions[0], causal)
        model.train(training)
        self.weights.append(a)


@pytest.mark.parametrize("window", [None, 3])
def test_encoder_learns_to_look_ahead(tmp_path, window):
    """The weight of later keys after each step; a checkpoint of the end is the student that was trained."""
    types = None if window is None else ["sliding_attention"] * LAYERS
    student = make_student(encoder_layer_types=types, encoder_sliding_window=window)
    trainer = make_trainer(
        tmp_path, student, bidirectional_warmup_steps=4, max_steps=5, save_strategy="steps", save_steps=5
    )
    attends = Attends()
    trainer.add_callback(attends)
    trainer.train()
    assert attends.weights == [0, 0.25, 0.5, 0.75, 1, 1]
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "checkpoint-5")
    assert loaded.config.encoder_attention == "bidirectional"
    ids, mask = prompts()
    asked = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :4]}
    assert torch.equal(loaded(**asked).logits, trainer.model.eval()(**asked).logits)


class Stop(TrainerCallback):
    """After step 2, by the flag or by an exception."""

    def __init__(self, how):
        self.how = how

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and self.how == "exception":
            raise KeyboardInterrupt
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("how", ["flag", "exception"])
def test_a_student_whose_training_ends_amid_the_warm_up_is_what_is_saved(tmp_path, how, warnings_of):
    student = make_student()
    trainer = make_trainer(tmp_path, student, bidirectional_warmup_steps=4, max_steps=5)
    trainer.add_callback(Stop(how))
    with pytest.raises(KeyboardInterrupt) if how == "exception" else contextlib.nullcontext():
        trainer.train()
    assert "ended before step 4" in warnings_of()[-1]
    trainer.save_model()
    ids, mask = prompts()
    asked = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :4]}
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**asked).logits, student.eval()(**asked).logits)


# --- what does not go ---


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"progressive_depth_steps": 2}, "at least one of the others"),
        ({"final_decoder_layers": 2}, "progressive_depth_steps=0"),
        ({"progressive_depth_steps": 2, "final_encoder_layers": 5}, "final_encoder_layers=5.* has 4 layers"),
        (
            {"progressive_depth_steps": 2, "final_encoder_layers": 2, "max_steps": 4},
            "2 layers to take out needs more than 4 steps.* ends at step 4",
        ),
        ({"bidirectional_warmup_steps": 4, "max_steps": 3}, "ends at step 3"),
        ({"bidirectional_warmup_steps": 2, "attention": "flex_attention"}, "attn_implementation='flex_attention'"),
        ({"bidirectional_warmup_steps": 2, "encoder": "bidirectional"}, "nothing to change"),
        (
            {"progressive_depth_steps": 2, "final_decoder_layers": 2, "sharing": 2},
            "cross_attention_sharing=2: .* cannot be taken out one by one",
        ),
        ({"bidirectional_warmup_steps": 2, "student": "t5"}, "got T5ForConditionalGeneration"),
        ({"progressive_depth_steps": 2, "final_encoder_layers": 2, "best": True}, "load_best_model_at_end"),
        ({"progressive_depth_steps": 2, "final_encoder_layers": 2, "auto_find_batch_size": True}, "begins again"),
        ({"bidirectional_warmup_steps": 2, "best": True}, "load_best_model_at_end"),
    ],
)
def test_what_does_not_go(tmp_path, settings, message):
    settings = {"max_steps": 8, **settings}
    attention, encoder = settings.pop("attention", "sdpa"), settings.pop("encoder", "causal")
    if settings.pop("best", False):
        settings |= {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    student = make_student(encoder_attention=encoder, cross_attention_sharing=settings.pop("sharing", 1))
    student = make_t5(VOCAB) if settings.pop("student", None) else student
    student.config._attn_implementation = attention
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, student, **settings).train()


# --- two processes ---


def run(folder: Path) -> None:
    """Three layers less in four steps of four rows, and an encoder that looks ahead, on as many processes as there
    are."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    trainer = make_trainer(
        folder,
        make_student(),
        InOrder,
        optim="sgd",
        learning_rate=0.1,
        max_steps=5,
        per_device_train_batch_size=4 // processes,
        gradient_accumulation_steps=1,
        progressive_depth_steps=1,
        final_encoder_layers=3,
        final_decoder_layers=2,
        bidirectional_warmup_steps=3,
        ddp_backend="gloo" if processes > 1 else None,
    )
    trainer.train()
    assert trainer.accelerator.num_processes == processes
    logs = [{k: v for k, v in log.items() if "layer" in k} for log in trainer.state.log_history]
    torch.save(
        {"logs": [log for log in logs if log], "weights": trainer.model.state_dict()},
        folder / f"{processes}-{trainer.accelerator.process_index}.pt",
    )


@pytest.mark.process
def test_two_processes(tmp_path):
    """Both take out the layers that one alone takes out, and hold the same weights afterwards."""
    on_two_processes(__file__, tmp_path)
    run(tmp_path)
    alone, *both = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert len(alone["logs"]) == 3
    for one in both:
        for log, expected in zip(one["logs"], alone["logs"], strict=True):
            assert log == pytest.approx(expected, rel=1e-4)
        assert one["weights"].keys() == alone["weights"].keys()
        for name, tensor in alone["weights"].items():
            assert torch.equal(one["weights"][name], both[0]["weights"][name])
            torch.testing.assert_close(one["weights"][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # or its threads may abort the process at its end
