"""A frozen encoder: what it says stays what it was, and a teacher that it was made of may say it."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from distillation_toys import EOS, InOrder, arguments, make_bart, make_t5, ragged_rows, spread
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.distillation.options.frozen_encoder import freeze_prompt_keys, step_of
from hf_encdec_distill.distillation.options.shared_prompt import SharedPrompt


ROWS = ragged_rows(8)
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": EOS}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "phi3": (Phi3ForCausalLM, Phi3Config),  # fused projections
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),  # norms of queries and keys
}


def make_deep(family="llama", **fields):
    """A teacher of four layers, weights spread."""
    model, config = FAMILIES[family]
    return spread(model(config(vocab_size=280, num_hidden_layers=4, **SIZE, **TOKENS, **fields)))


def make_student(teacher, **changed):
    """Two layers of the teacher, then two: the decoder reads the states that enter layers 0 and 2."""
    settings = {"encoder_layers": [0, 1], "decoder_layers": [0, 3], "calibration": [([5, 6, 7], [8, 9])]}
    return RopeEncDecForConditionalGeneration.from_decoder_only(teacher, **{**settings, **changed})


def make_trainer(folder, student, teacher, tokenizer, rows=ROWS, **changed):
    settings = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    settings |= {"freeze_encoder": True, "per_device_train_batch_size": 4, "num_train_epochs": 1}
    return InOrder(
        student,
        arguments(folder, **{**settings, **changed}),
        teacher=teacher,
        train_dataset=rows,
        processing_class=tokenizer,
    )


@torch.no_grad()
def encode(student, prompt):
    return student.eval().get_encoder()(prompt).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen", [True, False])
def test_keys_of_the_prompt_stay_those_of_the_encoder(tmp_path, tokenizer, family, frozen):
    """Of the teacher's layer 0, which both sides have; its layer 3, which the decoder alone has, is trained."""
    teacher = make_deep(family)
    student = make_student(teacher, heal=None)
    before = copy.deepcopy(student.state_dict())
    options = {"freeze_encoder": frozen, "freeze_prompt_keys": True, "optim": "adamw_torch", "weight_decay": 0.1}
    make_trainer(tmp_path, student, teacher, tokenizer, **options).train()
    encoder, decoder = student.model.encoder.layers, student.model.decoder.layers
    state = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for part in ("k_proj", "v_proj"):
        made = [
            getattr(layer.self_attn, part)(layer.input_layernorm(state)).detach() for layer in (encoder[0], decoder[0])
        ]
        original = teacher.model.layers[0]
        assert torch.equal(*made), part
        if family != "phi3":  # whose projections are fused
            assert torch.equal(made[0], getattr(original.self_attn, part)(original.input_layernorm(state))), part
    trained = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    kept = ("input_layernorm", "k_proj", "v_proj", "k_norm")
    ours = {name for name, _ in decoder[0].named_parameters() if not any(part in name for part in kept)}
    theirs = {name for name, _ in decoder[1].named_parameters()}
    assert {f"model.decoder.layers.0.{name}" for name in ours} <= trained
    assert {f"model.decoder.layers.1.{name}" for name in theirs} <= trained
    assert frozen != any(name.startswith("model.encoder.layers.0.mlp") for name in trained)


def test_keys_of_the_prompt_that_are_nobodys_are_not_frozen():
    teacher = make_deep()
    with pytest.raises(ValueError, match="no decoder layer of this .* give encoder_layers and decoder_layers"):
        freeze_prompt_keys(make_student(teacher, encoder_layers=[0, 1], decoder_layers=[2, 3], heal=None))
    for other in (make_student(teacher, cross_attention="separate", heal=None), make_t5()):
        with pytest.raises(ValueError, match="no decoder layer of this"):
            freeze_prompt_keys(other)
    student = make_student(teacher, heal=None)
    with torch.no_grad():
        student.model.decoder.layers[0].self_attn.v_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="no decoder layer of this"):
        freeze_prompt_keys(student)


@pytest.mark.parametrize(
    "name, checkpointing",
    [("t5", False), ("t5", True), ("bart", False), ("merged", False), ("separate", True), ("untied", True)],
)
def test_the_encoder_stays_and_all_else_learns(tmp_path, tokenizer, name, checkpointing):
    teacher = make_deep(tie_word_embeddings=name != "untied")
    make = {"t5": make_t5, "bart": partial(make_bart, dropout=0.1)}.get(name)
    kind = "separate" if name == "separate" else "merged"
    student = make() if make else make_student(teacher, cross_attention=kind)
    before, prompt = copy.deepcopy(student.state_dict()), torch.tensor([ROWS[0]["input_ids"]])
    said = encode(student, prompt)
    trainer = make_trainer(
        tmp_path, student, teacher, tokenizer, optim="adamw_torch", gradient_checkpointing=checkpointing
    )
    trainer.train()
    assert torch.equal(encode(student, prompt), said)
    ours = {id(parameter) for parameter in student.get_encoder().parameters()}
    assert any(parameter.requires_grad for parameter in student.parameters())
    for parameter_name, parameter in student.named_parameters():
        stays = torch.equal(parameter, before[parameter_name])
        assert stays == (id(parameter) in ours), parameter_name
    tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert tied == (name != "untied")


def gradients_of(trainer, batch):
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model.train(), batch).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "family, side, chunk_size",
    [("llama", "right", 1000), ("llama", "left", 3), ("phi3", "left", 1000), ("qwen3", "right", 3)],
)
def test_a_shared_prompt_pass_is_the_ordinary_one(tmp_path, tokenizer, monkeypatch, family, side, chunk_size):
    """Same loss and gradients on ragged rows, and the encoder has not run."""
    tokenizer.padding_side = side
    teacher = make_deep(family)
    trainer = make_trainer(tmp_path, make_student(teacher), teacher, tokenizer, loss_chunk_size=chunk_size)
    batch, runs = trainer.data_collator(ROWS), []
    gradients_of(trainer, batch)  # finds out about the head
    trainer.model.get_encoder().register_forward_hook(lambda *_: runs.append(1))
    shared = gradients_of(trainer, batch)
    assert not runs
    trainer._shared_prompt = SharedPrompt(None)
    alone = gradients_of(trainer, batch)
    assert runs and set(shared) == set(alone)
    for name, gradient in alone.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_run_after_a_frozen_one_says_that_the_encoder_is_frozen(tmp_path, tokenizer, warnings_of):
    teacher = make_deep()
    student = make_student(teacher)
    make_trainer(tmp_path, student, teacher, tokenizer).train()
    assert not any("encoder" in text for text in warnings_of())
    make_trainer(tmp_path, student, teacher, tokenizer, freeze_encoder=False)
    assert "freeze_encoder=True leaves it so" in warnings_of()[-1]
    told = len(warnings_of())
    student.requires_grad_(True)
    make_trainer(tmp_path, student, teacher, tokenizer, freeze_encoder=False)
    assert len(warnings_of()) == told


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_prompt_whose_rope_depends_on_the_target_is_not_shared(tmp_path, tokenizer, rope_type):
    """The teacher reads prompt and target, which are longer than its frequencies were made for; the encoder does not
    read the target."""
    rope = {"rope_type": rope_type, "factor": 4.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    teacher = make_deep(max_position_embeddings=16, rope_theta=1e4, rope_scaling=rope)  # as either version reads it
    student = make_student(teacher, heal=None)
    trainer = make_trainer(tmp_path, student, teacher, tokenizer, max_steps=1)
    rows = [{"input_ids": [3 + index, *range(20, 31)], "labels": [*range(40, 49), EOS]} for index in range(4)]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    shared = gradients_of(trainer, batch)
    trainer._shared_prompt = SharedPrompt(None)
    for name, gradient in gradients_of(trainer, batch).items():
        assert torch.equal(shared[name], gradient), name


def test_what_is_not_the_teachers_is_not_shared(tmp_path, tokenizer):
    teacher = make_deep()

    def exact(student, teacher=teacher, frozen=True):
        if frozen:
            student.get_encoder().requires_grad_(False)
        return SharedPrompt(teacher).is_exact_for(student)

    assert exact(make_student(teacher))
    assert not exact(make_student(teacher), frozen=False)
    assert not exact(make_student(teacher, encoder_layers=[0, 2]))
    assert not exact(make_student(teacher, encoder_attention="bidirectional"))
    assert not exact(make_student(teacher, encoder_sliding_window=2))
    assert not exact(make_student(teacher, cross_attention="separate"))
    assert not exact(make_student(teacher, attention_dropout=0.1))
    assert not exact(make_student(teacher), copy.deepcopy(teacher).to(torch.bfloat16))
    assert not exact(make_t5())
    other = copy.deepcopy(teacher)
    other.config.rms_norm_eps *= 2
    assert not exact(make_student(teacher), other)
    student = make_student(teacher)
    weight = student.model.encoder.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    assert not exact(student)
    # The same weights behind it: none of the states that are read has passed them.
    student = make_student(teacher, decoder_layers=[0, 1])
    with torch.no_grad():
        student.model.encoder.layers[1].mlp.down_proj.weight += 1
    assert exact(student)


def test_a_teacher_with_a_prompt_of_its_own_is_not_listened_to(tmp_path, tokenizer):
    """Two rows in which it reads other tokens: the batch is computed as if nothing were shared."""
    teacher = make_deep()
    rows = [{**row, "teacher_input_ids": [*row["input_ids"], 3, *row["labels"]]} for row in ROWS]
    trainer = make_trainer(tmp_path, make_student(teacher), teacher, tokenizer)
    runs = []
    trainer.model.get_encoder().register_forward_hook(lambda *_: runs.append(1))
    gradients_of(trainer, trainer.data_collator(rows))
    assert not runs
    rows[1]["teacher_input_ids"][0] += 1
    rows[2]["teacher_input_ids"] = [3, *rows[2]["labels"]]
    batch = trainer.data_collator(rows)
    shared = gradients_of(trainer, batch)
    assert runs
    trainer._shared_prompt = SharedPrompt(None)
    for name, gradient in gradients_of(trainer, batch).items():
        assert torch.equal(shared[name], gradient), name


def test_resumed_equals_never_stopped(tmp_path, tokenizer):
    teacher = make_deep()
    settings = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = make_trainer(tmp_path, make_student(teacher), teacher, tokenizer, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, make_student(teacher), teacher, tokenizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert whole._shared_prompt._exact and resumed._shared_prompt._exact and resumed.state.global_step == 2
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_what_would_starve_the_first_decoder_layer_is_refused(tmp_path):
    """Reentrant checkpointing gives no gradient to a layer whose input, a frozen embedding, asks for none."""
    settings = {"freeze_encoder": True, "gradient_checkpointing": True}
    assert arguments(tmp_path, **settings).gradient_checkpointing_kwargs == {"use_reentrant": False}
    with pytest.raises(ValueError, match="use_reentrant=True"):
        arguments(tmp_path, gradient_checkpointing_kwargs={"use_reentrant": True}, **settings)


# --- until it is unfrozen ---


def by_hand(student, teacher, rows, steps, after, lr, decay):
    """AdamW on 0.9 KL + 0.1 CE of batches of four rows, matrices alone decayed, the rate falling to 0; the encoder has
    no gradient in the first `after` steps."""
    of_encoder = {id(parameter) for parameter in student.get_encoder().parameters() if parameter.requires_grad}
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [[p for p in trained if p.dim() > 1], [p for p in trained if p.dim() == 1]]
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": decay}, {"params": groups[1]}], lr=lr)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    start = student.config.decoder_start_token_id
    for step in range(steps):
        total, tokens = 0.0, 0
        for row in rows[4 * (step % 2) : 4 * (step % 2) + 4]:
            source, target = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            logits = student(input_ids=source[None], labels=target[None]).logits[0]
            with torch.no_grad():
                read = torch.cat([source, torch.tensor([start]), target])[None]
                answers = teacher(read).logits[0, len(source) : -1]
            kl = F.kl_div(logits.log_softmax(-1), answers.log_softmax(-1), reduction="sum", log_target=True)
            total = total + 0.9 * kl + 0.1 * F.cross_entropy(logits, target, reduction="sum")
            tokens += len(target)
        optimizer.zero_grad()
        (total / tokens).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
            for parameter in group["params"]:
                if step < after and id(parameter) in of_encoder:
                    parameter.grad = None
        optimizer.step()


LATER = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "linear", "weight_decay": 0.1}


@pytest.mark.parametrize("after", [3, 0.5])
def test_the_encoder_learns_later(tmp_path, tokenizer, after):
    """Six steps, of which the first three train the decoder alone: as a loop of torch does it."""
    teacher = make_deep(tie_word_embeddings=True)
    student, expected = make_student(teacher), make_student(teacher)
    before = copy.deepcopy(student.get_encoder().state_dict())
    trainer = make_trainer(
        tmp_path, student, teacher, tokenizer, unfreeze_encoder_after=after, num_train_epochs=3, **LATER
    )
    trainer.train()
    by_hand(expected.train(), teacher, ROWS, 6, 3, LATER["learning_rate"], LATER["weight_decay"])
    for (name, one), other in zip(student.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5, msg=name)
    changed = {
        name for name, value in student.get_encoder().state_dict().items() if not torch.equal(value, before[name])
    }
    # All but what no decoder layer reads.
    assert changed == {name for name, value in expected.get_encoder().named_parameters() if value.requires_grad}
    assert "embed_tokens.weight" in changed


def test_a_share_of_all_steps_or_a_number():
    assert [step_of(after, 10) for after in (0.05, 0.5, 0.99, 1, 1.0, 7)] == [1, 5, 10, 1, 1, 7]


@pytest.mark.parametrize("states", [False, True])
def test_stopped_before_and_after_it_learns_equals_never_stopped(tmp_path, tokenizer, states):
    """At the step before, at that step and at the one after; a second `train` begins with a frozen encoder again."""

    def make(**changed):
        torch.manual_seed(len(changed))  # whatever the process did before must not matter
        teacher = make_deep()
        student = make_student(teacher, attention_dropout=0.2)
        settings = {"unfreeze_encoder_after": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
        settings |= {"encoder_states": str(tmp_path / "states")} if states else {}
        return make_trainer(tmp_path, student, teacher, tokenizer, **{**settings, **LATER, **changed})

    whole = make()
    whole.train()
    for stop in (1, 2, 3):
        resumed = make(save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, other), (stop, name)
    before = copy.deepcopy(whole.model.get_encoder().state_dict())
    whole.args.max_steps, whole.args.unfreeze_encoder_after, whole.args.save_strategy = 2, 1, "no"
    seen = []
    (of_encoder, *_) = whole.waiting_parameters["unfreeze_encoder_after"]
    whole.model.get_encoder().register_forward_hook(lambda *_: seen.append(of_encoder.requires_grad))
    whole.train()
    assert seen[0] is False and seen[-1] is True
    after = whole.model.get_encoder().state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_what_could_not_learn_later_is_refused(tmp_path, tokenizer, monkeypatch):
    teacher = make_deep()
    with pytest.raises(ValueError, match="unfreeze_encoder_after=2 without freeze_encoder"):
        arguments(tmp_path, unfreeze_encoder_after=2)
    with pytest.raises(ValueError, match="unfreeze_encoder_after=-1 is out of range; .* a share of them below 1"):
        arguments(tmp_path, unfreeze_encoder_after=-1, freeze_encoder=True)
    depth = {"progressive_depth_steps": 1, "final_decoder_layers": 1}
    with pytest.raises(ValueError, match="unfreeze_encoder_after=2 with progressive_depth_steps=1"):
        arguments(tmp_path, unfreeze_encoder_after=2, freeze_encoder=True, **depth)
    student = make_student(teacher)
    trainer = make_trainer(tmp_path, student, teacher, tokenizer, unfreeze_encoder_after=2)
    with pytest.raises(ValueError, match="unfreeze_encoder_after=2, but training ends at step 2"):
        trainer.train()
    trainer = make_trainer(tmp_path, student, teacher, tokenizer, unfreeze_encoder_after=1)
    with pytest.raises(ValueError, match="was frozen before the trainer was made"):
        trainer.train()
    student = make_student(teacher)
    trainer = make_trainer(tmp_path, student, teacher, tokenizer, unfreeze_encoder_after=1)
    trainer.optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="the optimizer does not hold the parameters of the encoder"):
        trainer.train()
    monkeypatch.setattr(InOrder, "is_sharded", True)
    with pytest.raises(ValueError, match="unfreeze_encoder_after=1 with FSDP, DeepSpeed or tensor parallelism"):
        make_trainer(tmp_path, make_student(teacher), teacher, tokenizer, unfreeze_encoder_after=1)
