"""`train_projector_first`: the projector, then the decoder, then all, as a loop of torch does it."""

import pickle

import pytest
import torch
from distillation_toys import arguments
from test_vision_student import expected_loss, make_trainer, rows_of, without_image
from toys import make_model
from transformers import TrainerCallback
from vision_toys import llama_of, make_llava, twin_of


STEPS, FIRST, AFTER = 6, 2, 4
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "adam_epsilon": 1e-4}
IN_TURN = {"train_projector_first": FIRST, "freeze_encoder": True, "unfreeze_encoder_after": AFTER}


@pytest.fixture
def llava(image_tokenizer):
    return make_llava(image_tokenizer)


def begins(name, decoder=FIRST, encoder=AFTER, tower=AFTER):
    """The step from which a parameter is trained."""
    if "multi_modal_projector" in name:
        return 0
    if "vision_tower" in name:
        return tower
    return encoder if name.startswith("model.encoder.") else decoder


class Watch(TrainerCallback):
    """Which parameters each step has moved, and whether the teacher's pass over the prompt may stand in for ours."""

    def __init__(self, trainer):
        self.trainer, self.moved, self.shared = trainer, [], []
        self.before = self.weights()

    def weights(self):
        return {name: weight.detach().clone() for name, weight in self.trainer.model.named_parameters()}

    def on_step_end(self, *args, **kwargs):
        now = self.weights()
        self.moved.append({name for name, weight in now.items() if not torch.equal(weight, self.before[name])})
        self.before = now
        self.shared.append(self.trainer._shared_prompt.is_exact_for(self.trainer.model))


def those_with_a_gradient(moved):
    """Without the bias of keys, which a softmax does not see: it moves by what is left of rounding, or not at all."""
    return [{name for name in names if not name.endswith("k_proj.bias")} for names in moved]


def by_hand(student, teacher, rows, **stages):
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-4)
    trained = []
    for step in range(STEPS):
        optimizer.zero_grad()
        expected_loss(student, teacher, rows).backward()
        for name, parameter in student.named_parameters():
            if step < begins(name, **stages):
                parameter.grad = None
        trained.append({name for name, parameter in student.named_parameters() if parameter.grad is not None})
        optimizer.step()
    return those_with_a_gradient(trained)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_projector_then_decoder_then_all(share, checkpointing, llava, image_tokenizer, tmp_path):
    student, expected, teacher = twin_of(llava, image_tokenizer), twin_of(llava, image_tokenizer), llama_of(llava)
    rows = rows_of(image_tokenizer)
    steps = {"train_projector_first": FIRST / STEPS, "unfreeze_encoder_after": AFTER / STEPS} if share else {}
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        image_tokenizer,
        rows,
        max_steps=STEPS,
        gradient_checkpointing=checkpointing,
        **{**IN_TURN, **ADAM, **steps},
    )
    trainer.add_callback(watch := Watch(trainer))
    trainer.train()
    assert those_with_a_gradient(watch.moved) == by_hand(expected.train(), llama_of(llava), rows)
    assert not any(watch.shared)
    for (name, one), other in zip(student.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5, msg=name)
    for step, trained in enumerate(watch.moved):
        parts = {
            part for part in ("projector", "decoder.", "tower", "encoder.layers") if any(part in n for n in trained)
        }
        assert (
            parts
            == [{"projector"}, {"projector", "decoder."}, {"projector", "decoder.", "tower", "encoder.layers"}][
                step // 2
            ]
        )


def test_a_batch_of_texts_alone_moves_nothing(llava, image_tokenizer, tmp_path):
    student, rows = twin_of(llava, image_tokenizer), rows_of(image_tokenizer)
    rows[:2] = [without_image(row, image_tokenizer) for row in rows[:2]]
    options = {"per_device_train_batch_size": 2, "max_steps": 3, "train_projector_first": 2, "logging_steps": 1}
    trainer = make_trainer(tmp_path, student, llama_of(llava), image_tokenizer, rows, **options)
    trainer.add_callback(watch := Watch(trainer))
    trainer.train()
    texts, images, again = watch.moved
    assert not texts
    assert images and all("multi_modal_projector" in name for name in images)
    assert any("decoder" in name for name in again)
    assert all(log["loss"] > 0 for log in trainer.state.log_history if "loss" in log)


def test_nothing_of_it_stays_on_the_student(llava, image_tokenizer, tmp_path):
    """A frozen copy would have a graph into another model, and the student could not be pickled."""
    student, rows = twin_of(llava, image_tokenizer), rows_of(image_tokenizer)
    options = {"max_steps": 3, "train_projector_first": 2}
    trainer = make_trainer(tmp_path, student, llama_of(llava), image_tokenizer, rows, **options)
    trainer.train()
    assert not student.get_decoder()._forward_hooks
    assert pickle.dumps(student)


def test_all_but_a_tower_that_was_frozen_before(llava, image_tokenizer, tmp_path):
    """LLaVA's two stages: the projector, then all but the tower."""
    student, expected, rows = (
        twin_of(llava, image_tokenizer),
        twin_of(llava, image_tokenizer),
        rows_of(image_tokenizer),
    )
    student.get_encoder(modality="image").requires_grad_(False)
    trainer = make_trainer(
        tmp_path,
        student,
        llama_of(llava),
        image_tokenizer,
        rows,
        max_steps=STEPS,
        train_projector_first=FIRST,
        **ADAM,
    )
    trainer.add_callback(watch := Watch(trainer))
    trainer.train()
    trained = by_hand(expected.train(), llama_of(llava), rows, encoder=FIRST, tower=STEPS)
    assert those_with_a_gradient(watch.moved) == trained
    for (name, one), other in zip(student.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5, msg=name)


def test_stopped_in_each_stage_equals_never_stopped(llava, image_tokenizer, tmp_path):
    rows = rows_of(image_tokenizer)

    def make(**changed):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, **IN_TURN, **ADAM}
        settings |= {"train_projector_first": 1, "unfreeze_encoder_after": 3}
        student = twin_of(llava, image_tokenizer)
        return make_trainer(tmp_path, student, llama_of(llava), image_tokenizer, rows, **{**settings, **changed})

    whole = make()
    whole.train()
    for stop in (1, 2, 3):
        resumed = make(save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, other), (stop, name)


def test_what_has_no_projector_and_what_does_not_go_together(llava, image_tokenizer, tmp_path):
    text = make_model("merged", vocab_size=len(image_tokenizer))
    with pytest.raises(
        ValueError, match="RopeEncDecForConditionalGeneration, whose encoder has no multi_modal_projector"
    ):
        make_trainer(tmp_path, text, llama_of(llava), image_tokenizer, [], train_projector_first=1)
    student = twin_of(llava, image_tokenizer)
    student.get_encoder().multi_modal_projector.requires_grad_(False)
    with pytest.raises(ValueError, match="no multi_modal_projector that is trained"):
        make_trainer(tmp_path, student, llama_of(llava), image_tokenizer, [], train_projector_first=1)
    student = twin_of(llava, image_tokenizer)
    rows = rows_of(image_tokenizer)
    trainer = make_trainer(tmp_path, student, llama_of(llava), image_tokenizer, rows, train_projector_first=1)
    with pytest.raises(ValueError, match="train_projector_first=1, but training ends at step 1"):
        trainer.train()
    with pytest.raises(ValueError, match="train_projector_first=1 is for encoder-decoders"):
        make_trainer(tmp_path, llama_of(llava), llama_of(llava), image_tokenizer, rows, train_projector_first=1)
    states = {"freeze_encoder": True, "encoder_states": str(tmp_path / "states")}
    depth = {"progressive_depth_steps": 1, "final_decoder_layers": 1}
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    for options, problem in (
        ({"train_projector_first": -1}, "train_projector_first=-1 is out of range"),
        ({"train_projector_first": 1, **states}, "train_projector_first=1 with encoder_states="),
        ({"train_projector_first": 1, "cross_attention_warmup_steps": 2}, "with cross_attention_warmup_steps=2"),
        ({"train_projector_first": 1, **depth}, "train_projector_first=1 with progressive_depth_steps=1"),
        ({**IN_TURN, "unfreeze_encoder_after": 1}, "the encoder would be trained before the decoder"),
        ({"train_projector_first": 1, **reentrant}, "use_reentrant=True .* with train_projector_first=1"),
    ):
        with pytest.raises(ValueError, match=problem):
            arguments(tmp_path, **options)
