"""States of a frozen encoder that are kept: what the live one says, in whatever order rows come, and never twice.

Run as a script (by torchrun, or alone) this file trains and has rank 0 write what came out.
"""

import pytest
import torch
from distillation_toys import (
    STUDENTS,
    InOrder,
    arguments,
    collate,
    make_bart,
    make_rope,
    make_teacher,
    ragged_rows,
)
from safetensors import safe_open

from hf_encdec_distill.distillation.options import encoder_states as module


ROWS = ragged_rows(8)
MAKE = {**STUDENTS, "bart": make_bart, "states": lambda: make_rope("separate", cross_attention_layers=[1, 2])}


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
    assert runs[1:] == ([4] if side == "left" and name in ("t5", "bart") else [2])
    other_batch = gradients_of(trainer, trainer.data_collator(ROWS[2:]))
    for values in (found, other_batch):
        assert set(values) == set(expected)
        for key, value in expected.items():
            if exact:
                torch.testing.assert_close(values[key], value, rtol=1e-4, atol=1e-5, msg=key)
            else:
                assert (values[key] - value).norm() <= 1e-2 * value.norm() + 1e-6, key
    trainer._encoder_states.flush()
    assert {t.dtype for t in kept(tmp_path / "states").values()} == {torch.float32 if exact else torch.float16}
