"""Stopped and resumed equals never stopped: the same weights, bit for bit."""

import pytest
import torch
from distillation_toys import arguments, make_t5, make_teacher, ragged_rows

from hf_encdec_distill import DistillationTrainer


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_resumed_equals_never_stopped(tmp_path, make_bpe_tokenizer, stop):
    """Shuffled rows, dropout, AdamW, accumulation; stopped inside an epoch and at the end of one (4 steps each)."""

    def make_trainer():
        torch.manual_seed(stop)  # whatever the process did before must not matter
        return DistillationTrainer(
            make_t5(dropout=0.3),
            arguments(
                tmp_path,
                learning_rate=1e-2,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                num_train_epochs=2,
                save_strategy="steps",
                save_steps=stop,
                seed=7,
            ),
            teacher=make_teacher(),
            train_dataset=ragged_rows(15),
            processing_class=make_bpe_tokenizer(pad_token="<|endoftext|>"),
        )

    whole = make_trainer()
    whole.train()
    assert whole.state.global_step == 8
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 8
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    logs = [
        {log["step"]: (log["ce_loss"], log["distill_loss"]) for log in t.state.log_history if "ce_loss" in log}
        for t in (whole, resumed)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 8
