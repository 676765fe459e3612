"""NaN and infinity end training with an error that says where they began, and are never saved, exported or pushed.

Logits of the teacher that are NaN are in `test_bad_input`.
"""

import json
import re

import pytest
import torch
from distillation_toys import (
    TEMPLATE,
    arguments,
    collate,
    make_rope,
    make_t5,
    make_teacher,
    ragged_rows,
    write_pairs,
    write_teacher,
)
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_encdec_distill import DistillationTrainer
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.cli.quickstart import timed_training, tuning
from hf_encdec_distill.distillation.checks import finite_training
from hf_encdec_distill.distillation.checks.finite_training import FiniteTraining
from hf_encdec_distill.export.recipe import Shapes, check_exportable
from hf_encdec_distill.models.finite import check_finite_files


ROWS = ragged_rows(16)


class Poison(TrainerCallback):
    """Puts a value into one number of a gradient, or into all of them, at the end of a step's backward."""

    def __init__(self, step, value, parameter, everywhere=True):
        self.step, self.value, self.parameter, self.everywhere = step, value, parameter, everywhere

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            gradient = self.parameter.grad
            (gradient if self.everywhere else gradient[-1:]).fill_(self.value)


@pytest.fixture
def make_trainer(tmp_path, make_bpe_tokenizer):
    def make(student, **changed):
        settings = {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-3, **changed}
        return DistillationTrainer(
            model=student,
            args=arguments(tmp_path / "run", **settings),
            train_dataset=ROWS,
            processing_class=make_bpe_tokenizer(pad_token="<|endoftext|>"),
            teacher=make_teacher(),
        )

    return make


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Where it began ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_student_that_was_loaded_so(make_trainer, tmp_path, value):
    student = make_rope("merged")
    with torch.no_grad():
        student.model.decoder.layers[1].mlp.up_proj.weight[3, 5] = value
    trainer = make_trainer(student)
    message = r"weight 'model.decoder.layers.1.mlp.up_proj.weight' is not finite before the first step"
    for action in (trainer.train, lambda: trainer.evaluate(ROWS), trainer.save_model):
        with pytest.raises(ValueError, match=message):
            action()
    assert not list(tmp_path.glob("run/*.safetensors"))


@pytest.mark.parametrize("everywhere", [True, False], ids=["in use", "not in use"])
def test_a_gradient_that_is_not_finite_ends_before_the_next_save(make_trainer, tmp_path, everywhere):
    """The weight that it spoilt is named and the checkpoint before it stays, also if no forward reads that weight."""
    student = make_rope("merged", tie_word_embeddings=False)
    trainer = make_trainer(student, save_strategy="steps", save_steps=2, save_total_limit=1, max_grad_norm=0.0)
    name, parameter = "model.encoder.embed_tokens.weight", student.model.encoder.embed_tokens.weight
    trainer.add_callback(Poison(2, torch.nan, parameter, everywhere))
    steps = 3 if everywhere else 4  # the next forward finds it, or the next save
    with pytest.raises(ValueError, match=rf"weight '{name}' is not finite after {steps} optimizer steps"):
        trainer.train()
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(
        tensor.isfinite().all() for tensor in load_file(tmp_path / "run/checkpoint-2/model.safetensors").values()
    )
    assert json.loads((tmp_path / "run/checkpoint-2/trainer_state.json").read_text())["global_step"] == 2


def test_a_gradient_that_is_not_finite_in_the_last_step(make_trainer):
    """Nothing reads the weights any more, and nothing would be saved."""
    student = make_rope("merged")
    trainer = make_trainer(student, max_steps=2)
    trainer.add_callback(Poison(1, torch.nan, student.model.decoder.norm.weight))
    with pytest.raises(ValueError, match=r"is not finite after 2 optimizer steps"):
        trainer.train()


@pytest.mark.parametrize("chunk_size", [3, 1000])
def test_a_loss_that_is_not_finite_names_its_term(make_trainer, chunk_size):
    """Weights that are finite, and so large that logits are not."""
    student = make_rope("separate", tie_word_embeddings=False)
    with torch.no_grad():
        student.lm_head.weight[7] = 3e38
    before = weights_of(student)
    trainer = make_trainer(student, loss_chunk_size=chunk_size)
    message = (
        r"the loss is (nan|inf) after 0 optimizer steps, while all weights are finite: ce_loss is not finite at \d+ "
        r"of its \d+ target tokens, in the rows \[\d.*\] of the batch; distill_loss is not finite"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert equal(weights_of(student), before)


def test_a_distance_of_hidden_states_that_is_not_finite(make_trainer):
    trainer = make_trainer(make_rope("merged"), hidden_state_weight=1.0)
    with torch.no_grad():
        next(trainer._matching.parameters()).fill_(1e30)
    message = r"finite: hidden_state_loss is not finite at (\d+) of its \1 target tokens"
    with pytest.raises(ValueError, match=message):
        trainer.compute_loss(trainer.model.train(), trainer.data_collator(ROWS[:4]))
    with torch.no_grad():
        next(trainer._matching.parameters())[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weight 'projections.0' is not finite"):
        trainer.save_model()


def test_the_student_draws_no_tokens_from_nan(make_trainer):
    student = make_rope("merged")
    trainer = make_trainer(student, on_policy_fraction=1.0)
    trainer.add_callback(Poison(0, torch.nan, student.model.decoder.norm.weight))
    with pytest.raises(ValueError, match=r"is not finite after 1 optimizer steps"):
        trainer.train()


# float16: a scaler skips steps -------------------------------------------------------------------------------------


def test_a_step_that_a_gradient_scaler_skips_is_no_error(make_trainer):
    student = make_rope("merged")
    trainer = make_trainer(student, max_steps=3)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append((weights_of(student), trainer.accelerator.scaler.get_scale()))

    for callback in (Poison(1, torch.inf, student.model.decoder.norm.weight), Watch()):
        trainer.add_callback(callback)
    trainer.train()
    (first, _), (second, scale), (third, _) = seen
    assert equal(first, second) and scale == 512.0
    assert not equal(second, third) and all(tensor.isfinite().all() for tensor in third.values())


def test_a_loss_that_overflows_is_left_to_the_scaler_but_not_for_ever(make_trainer, monkeypatch):
    student = make_rope("separate", tie_word_embeddings=False)
    before = weights_of(student)
    trainer = make_trainer(student, max_steps=40)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with torch.no_grad():
        before["lm_head.weight"][7] = student.lm_head.weight[7] = 3e38
    monkeypatch.setattr(finite_training, "_OVERFLOWS", 5)
    message = r"the loss is (nan|inf) in each of the last 5 batches after 4 optimizer steps, .* ce_loss"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert equal(weights_of(student), before)


# Any trainer, the commands -------------------------------------------------------------------------------------------


class Plain(FiniteTraining, Trainer):
    pass


def test_a_trainer_of_transformers_with_the_mix_in(tmp_path):
    """Without it, its log says 0.0 and the checkpoint is NaN."""

    def trainer(cls):
        student = make_t5()
        settings = arguments(tmp_path / cls.__name__, TrainingArguments, max_steps=3, per_device_train_batch_size=2)
        made = cls(model=student, args=settings, train_dataset=ROWS, data_collator=collate)
        made.add_callback(Poison(0, torch.nan, student.lm_head.weight))
        return made

    silent = trainer(Trainer)
    silent.train()
    assert silent.state.log_history[-2]["loss"] == 0.0
    with pytest.raises(ValueError, match=r"weight 'shared.weight' is not finite after 1 optimizer steps"):
        trainer(Plain).train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_bpe_tokenizer):
    folder = tmp_path_factory.mktemp("finite")
    write_teacher(folder / "teacher", make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>"))
    write_pairs(folder / "pairs.csv", 60)
    words = ["init", folder / "teacher", "--prompt-template", TEMPLATE, "--output", folder / "student"]
    assert main([*map(str, words), *data(folder)]) == 0
    return folder


def data(folder):
    return ["--dataset", str(folder / "pairs.csv"), "--source-column", "text", "--target-column", "short"]


def error_of(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("hf-encdec-distill")]
    assert len(errors) == 1 and not output.out
    return errors[0]


DIVERGES = ["--learning-rate", "1e38", "--max-steps", "4", "--use-cpu", "--disable-tqdm", "true"]


@pytest.mark.parametrize("command", ["distill", "teach"])
def test_a_command_that_diverges_fails_and_saves_nothing(folder, tmp_path, capsys, command):
    output = tmp_path / "run"
    models = [folder / "student", "--teacher", folder / "teacher"] if command == "distill" else [folder / "teacher"]
    words = [*models, *data(folder), "--output", output, "--prompt-template", TEMPLATE, *DIVERGES]
    error = error_of(capsys, command, *words)
    assert re.search(r"the loss is nan after \d optimizer steps|is not finite after \d optimizer steps", error)
    assert not list(output.glob("*.safetensors"))


def test_the_teacher_of_the_quickstart_does_not_become_nan(tmp_path, make_bpe_tokenizer):
    rows = [{"prompt": row["input_ids"], "labels": row["labels"]} for row in ROWS]
    share = timed_training.TimeShare(1e3, 4, 1e38, lambda *_: None)
    with pytest.raises(ValueError, match=r"not finite|the loss is nan"):
        tuning.tune_teacher(
            make_teacher(), make_bpe_tokenizer(), rows * 2, rows[:4], 8, tmp_path / "work", share, 2, 0
        )


def test_an_interrupted_tuning_knows_its_best_pass(tmp_path, make_bpe_tokenizer):
    rows = [{"prompt": row["input_ids"], "labels": row["labels"]} for row in ROWS]
    model = make_teacher()
    best = tuning._BestPass(model, rows[:4], 1, tmp_path)
    best.measure()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():  # the pass after that makes it worse
        model.lm_head.weight.mul_(100)
    again = tuning._BestPass(model, rows[:4], 1, tmp_path)
    again.restore()
    assert again.losses[0] == best.losses[0] < again.losses[1]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(tmp_path):
    student = make_rope("merged")
    with torch.no_grad():
        student.model.encoder.layers[0].mlp.down_proj.weight[0, 0] = torch.inf
    student.save_pretrained(tmp_path / "spoilt", max_shard_size="40KB")
    return tmp_path / "spoilt"


def test_weights_that_are_not_finite_are_not_exported(tmp_path, folder, capsys):
    student = make_rope("merged")
    name = "model.encoder.layers.0.mlp.down_proj.weight"
    check_exportable(student, "onnx", "fp32", Shapes())
    with torch.no_grad():
        student.get_parameter(name)[0, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"weight '{name}' is not finite"):
        check_exportable(student, "onnx", "fp32", Shapes())
    student.save_pretrained(tmp_path / "student")
    for file in folder.glob("student/*token*"):
        (tmp_path / "student" / file.name).write_bytes(file.read_bytes())
    assert name in error_of(capsys, "export", tmp_path / "student", tmp_path / "out", "--target", "onnx")
    assert not list(tmp_path.glob("out*"))


def test_weights_that_are_not_finite_are_not_pushed(spoilt, folder, capsys):
    """Of all shards; the network is asked nothing."""
    assert len(list(spoilt.glob("*.safetensors"))) > 2
    for file in folder.glob("student/*token*"):
        (spoilt / file.name).write_bytes(file.read_bytes())
    error = error_of(capsys, "push", spoilt, "ann/student")
    assert "the weight 'model.encoder.layers.0.mlp.down_proj.weight' is not finite" in error


def test_files_of_any_type_are_looked_at(tmp_path):
    whole = {"a": torch.ones(3), "b": torch.tensor([1, 2]), "c": torch.ones(2).to(torch.float8_e4m3fn)}
    save_file(whole, tmp_path / "model.safetensors")
    check_finite_files([tmp_path / "model.safetensors"])
    for name, dtype in (("a", torch.bfloat16), ("d", torch.float8_e4m3fn)):
        save_file({**whole, name: torch.tensor([1.0, torch.nan]).to(dtype)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"weight '{name}' is not finite"):
            check_finite_files([tmp_path / "model.safetensors"])
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        check_finite_files([tmp_path / "model.safetensors"])
