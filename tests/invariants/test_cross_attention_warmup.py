"""Cross-attention first: what is trained in the first steps, and that nothing else is moved by anything."""

import copy
from functools import partial

import pytest
import torch
from distillation_toys import InOrder, arguments, make_bart, make_rope, make_t5, make_teacher, ragged_rows


ROWS = ragged_rows(8)


# Students, and what their cross-attentions are made of, spelt out.
STUDENTS = {
    "t5": (
        make_t5,
        {f"decoder.block.{i}.layer.1.EncDecAttention.{part}.weight" for i in range(2) for part in "qkvo"}
        | {f"decoder.block.{i}.layer.1.layer_norm.weight" for i in range(2)},
    ),
    "bart": (
        make_bart,
        {
            f"model.decoder.layers.{i}.{part}.{kind}"
            for i in range(2)
            for part in (*(f"encoder_attn.{p}_proj" for p in ("q", "k", "v", "out")), "encoder_attn_layer_norm")
            for kind in ("weight", "bias")
        },
    ),
    "rope": (
        partial(make_rope, "separate"),
        {
            f"model.decoder.layers.{i}.{part}.weight"
            for i in range(2)
            for part in (*(f"cross_attn.{p}_proj" for p in "qkvo"), "cross_attn_layernorm")
        },
    ),
}


def train(folder, student, tokenizer, resume=None, **changed):
    """AdamW with weight decay and gradients that are clipped: both would move or shrink what they should not."""
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.1, "seed": 3}
    settings |= {"per_device_train_batch_size": 2, "num_train_epochs": 1, "lr_scheduler_type": "constant"}
    trainer = InOrder(
        student,
        arguments(folder, **{**settings, **changed}),
        teacher=make_teacher(),
        train_dataset=ROWS,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_warmup_is_training_with_all_else_frozen(tmp_path, tokenizer, name, accumulation):
    """The first two steps are bit for bit those of a student whose other parameters take no gradient at all."""
    make, theirs = STUDENTS[name]
    student, frozen = make(), make()
    for model in (student, frozen):
        model.set_attn_implementation("eager")  # SDPA takes another kernel where nothing wants a gradient
    before = copy.deepcopy(student.state_dict())
    assert theirs <= set(before)
    for parameter_name, parameter in frozen.named_parameters():
        parameter.requires_grad_(parameter_name in theirs)
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 2}
    trainer = train(tmp_path, student, tokenizer, cross_attention_warmup_steps=2, **settings)
    reference = train(tmp_path, frozen, tokenizer, **settings)
    for parameter_name, parameter in student.named_parameters():
        assert torch.equal(parameter, frozen.get_parameter(parameter_name)), parameter_name
        assert torch.equal(parameter, before[parameter_name]) == (parameter_name not in theirs), parameter_name
    norms = [[log["grad_norm"] for log in t.state.log_history if "grad_norm" in log] for t in (trainer, reference)]
    assert norms[0] == norms[1]  # what is clipped is what is trained
    assert len(trainer.optimizer.state) == len(theirs)  # others have no moments yet


def test_afterwards_all_is_trained(tmp_path, tokenizer):
    student = make_rope("separate")
    before = copy.deepcopy(student.state_dict())
    train(tmp_path, student, tokenizer, cross_attention_warmup_steps=2, max_steps=3)
    assert not any(torch.equal(parameter, before[name]) for name, parameter in student.named_parameters())


@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_equals_never_stopped(tmp_path, tokenizer, stop):
    """Stopped inside of the warm-up, and behind it; four steps, two of them warm-up."""
    settings = {"cross_attention_warmup_steps": 2, "save_strategy": "steps", "save_steps": stop}
    whole = train(tmp_path, make_t5(dropout=0.3), tokenizer, **settings)
    resumed = train(tmp_path, make_t5(dropout=0.3), tokenizer, resume=str(tmp_path / f"checkpoint-{stop}"), **settings)
    assert whole.state.global_step == resumed.state.global_step == 4
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_what_has_no_cross_attention_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="cross_attention_warmup_steps=2 with cross_attention='merged'.*'separate'"):
        train(tmp_path, make_rope("merged"), tokenizer, cross_attention_warmup_steps=2)
    student = make_t5()
    for parameter in student.decoder.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no cross-attention that is trained"):
        train(tmp_path, student, tokenizer, cross_attention_warmup_steps=2)
    with pytest.raises(ValueError, match="layerwise optimizers"):
        train(tmp_path, make_t5(), tokenizer, cross_attention_warmup_steps=2, optim="galore_adamw_layerwise")
    with pytest.raises(ValueError, match="cross_attention_warmup_steps=-1"):
        arguments(tmp_path, cross_attention_warmup_steps=-1)


def test_a_warmup_that_never_ends_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="cross_attention_warmup_steps=9, but training ends at step 2"):
        train(tmp_path, make_rope("separate"), tokenizer, cross_attention_warmup_steps=9, max_steps=2)
