"""`optim="muon"`: Muon for hidden matrices, AdamW for the rest, one schedule and one file for both."""

import pytest
import torch
from distillation_toys import STUDENTS, InOrder, arguments, make_rope, make_teacher, ragged_rows
from torch import nn
from transformers import HfArgumentParser, TrainerCallback

from hf_encdec_distill import DistillationTrainingArguments
from hf_encdec_distill.distillation.options.muon import MuonWithAdamW


ROWS = ragged_rows(8)


def make_trainer(folder, student, tokenizer, **settings):
    return InOrder(
        student,
        arguments(folder, **{"per_device_train_batch_size": 4, "optim": "muon", **settings}),
        train_dataset=ROWS,
        processing_class=tokenizer,
        teacher=make_teacher(),
    )


def hidden_matrices(model):
    """Names of the matrices that are neither a table of embeddings nor the head."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)] + [
        model.get_output_embeddings().weight
    ]
    ids = {id(weight) for weight in tables}
    return {name for name, p in model.named_parameters() if p.dim() == 2 and id(p) not in ids}


class Gradients(TrainerCallback):
    """The weights before the first step, and their gradients."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        self.seen = {name: (p.detach().clone(), p.grad.clone()) for name, p in found}


@pytest.mark.parametrize("kind", [*STUDENTS, "untied"])
def test_a_step_is_that_of_torch(tmp_path, tokenizer, kind):
    """Of torch.optim.Muon for hidden matrices and of AdamW for the rest, each on the same gradient alone."""
    student = make_rope("separate", tie_word_embeddings=False) if kind == "untied" else STUDENTS[kind]()
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": 1, "lr_scheduler_type": "constant"}
    trainer = make_trainer(tmp_path, student, tokenizer, adam_beta1=0.8, **settings)
    caught = Gradients()
    trainer.add_callback(caught)
    trainer.train()
    matrices, decayed = hidden_matrices(student), trainer.get_decay_parameter_names(student)
    assert len(caught.seen.keys() & matrices) > 10 and caught.seen.keys() - matrices
    parameters = dict(student.named_parameters())
    for name, (before, gradient) in caught.seen.items():
        alone = nn.Parameter(before.clone())
        alone.grad = gradient
        decay = {"lr": 1e-2, "weight_decay": 0.1 if name in decayed else 0.0}
        if name in matrices:
            optimizer = torch.optim.Muon([alone], adjust_lr_fn="match_rms_adamw", **decay)
        else:
            optimizer = torch.optim.AdamW([alone], betas=(0.8, 0.999), **decay)
        optimizer.step()
        torch.testing.assert_close(parameters[name], alone, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_a_step_by_hand(shape):
    """A matrix goes along its gradient after five Newton-Schulz steps, scaled to the size of a step of AdamW."""
    weight, gradient = nn.Parameter(torch.randn(shape)), torch.randn(shape)
    before = weight.detach().clone()
    optimizer = MuonWithAdamW([{"params": [weight], "weight_decay": 0.1}], 0.01, (0.9, 0.999), 1e-8, others=())
    for _ in range(2):  # the same gradient: momentum changes its length, which is divided out
        weight.grad = gradient.clone()
        optimizer.step()
    x = gradient.T if shape[0] > shape[1] else gradient
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.T if shape[0] > shape[1] else x
    step = 0.01 * 0.2 * 48**0.5 * x
    expected = (before * 0.999 - step) * 0.999 - step
    assert (weight - expected).norm() < 0.02 * (before - expected).norm()  # torch takes the steps in bfloat16
    assert step.square().mean().sqrt() == pytest.approx(0.01 * 0.2, rel=0.3)


def test_groups_have_the_decay_of_trainer(tmp_path, tokenizer):
    """The weights that `Trainer` decays decay, in both optimizers; each is in one group."""
    student = STUDENTS["t5"]()
    trainer = make_trainer(tmp_path, student, tokenizer, weight_decay=0.3)
    groups = trainer.create_optimizer().param_groups
    of = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of) == len(list(student.parameters()))
    decayed = trainer.get_decay_parameter_names(student)
    for name, parameter in student.named_parameters():
        group = of[id(parameter)]
        assert group["weight_decay"] == (0.3 if name in decayed else 0.0)
        assert (group["optimizer"] == "muon") == (name in hidden_matrices(student)), name
    assert {(group["optimizer"], group["weight_decay"]) for group in groups if group["params"]} == {
        ("muon", 0.3),
        ("adamw", 0.3),
        ("adamw", 0.0),
    }


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append({group["lr"] for group in optimizer.param_groups})


@pytest.mark.parametrize("options", [{}, {"hidden_state_weight": 0.5}, {"qat": "int4", "max_grad_norm": 0.1}])
def test_one_schedule_and_an_exact_resume(tmp_path, tokenizer, options):
    """All groups have the rate of the step; a resumed run is the same, bit for bit."""
    settings = {"max_steps": 4, "learning_rate": 1e-2, "warmup_steps": 2, "save_strategy": "steps", "save_steps": 2}
    settings |= {"weight_decay": 0.1, **options}
    whole = make_trainer(tmp_path, STUDENTS["merged"](), tokenizer, **settings)
    rates = Rates()
    whole.add_callback(rates)
    whole.train()
    assert rates.seen == [{0.005}, {0.01}, {0.005}, {0.0}]
    resumed = make_trainer(tmp_path, STUDENTS["merged"](), tokenizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    for one, other in zip(whole._matching.parameters(), resumed._matching.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, torch.eye(len(one)))


def test_the_name_is_taken_where_transformers_takes_one(tmp_path, monkeypatch):
    """On a command line too; other names mean what they meant, and without torch.optim.Muon it is one line."""
    parser = HfArgumentParser(DistillationTrainingArguments)
    for said, optim in ((["--optim", "muon"], "muon"), (["--optim", "sgd"], "sgd")):
        (parsed,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *said])
        assert parsed.optim == optim and parsed.to_dict()["optim"] == optim
    default = arguments(tmp_path)
    assert default.optim == type(default).__base__(output_dir=str(tmp_path)).optim
    with pytest.raises(ValueError, match="moun is not a valid OptimizerNames"):
        arguments(tmp_path, optim="moun")
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="optim='muon' is torch.optim.Muon, which torch .* does not have"):
        arguments(tmp_path, optim="muon")
