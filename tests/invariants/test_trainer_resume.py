"""Stopped and resumed equals never stopped: the same weights, bit for bit."""

import pytest
import torch
from distillation_toys import arguments, make_t5, make_teacher, ragged_rows

from hf_encdec_distill import DistillationTrainer


def whole_and_resumed(folder, make_bpe_tokenizer, stop, **options):
    """Two trainers of two epochs, one of which went on from its checkpoint after `stop` steps: their weights are the
    same."""

    def make_trainer():
        torch.manual_seed(stop)  # whatever the process did before must not matter
        return DistillationTrainer(
            make_t5(dropout=0.3),
            arguments(
                folder,
                learning_rate=1e-2,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                num_train_epochs=2,
                save_strategy="steps",
                save_steps=stop,
                seed=7,
                **options,
            ),
            teacher=make_teacher(),
            train_dataset=ragged_rows(15),
            processing_class=make_bpe_tokenizer(pad_token="<|endoftext|>"),
        )

    whole, resumed = make_trainer(), make_trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    return whole, resumed


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_resumed_equals_never_stopped(tmp_path, make_bpe_tokenizer, stop):
    """Shuffled rows, dropout, AdamW, accumulation; stopped inside an epoch and at the end of one (4 steps each)."""

    whole, resumed = whole_and_resumed(tmp_path, make_bpe_tokenizer, stop)
    assert whole.state.global_step == resumed.state.global_step == 8
    logs = [
        {log["step"]: (log["ce_loss"], log["distill_loss"]) for log in t.state.log_history if "ce_loss" in log}
        for t in (whole, resumed)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 8


@pytest.mark.parametrize("end", [3, 4])
def test_resumed_at_its_end_nothing_is_trained(tmp_path, make_bpe_tokenizer, end):
    """Inside an epoch too, where the base class would make one more step."""
    whole, resumed = whole_and_resumed(tmp_path, make_bpe_tokenizer, end, max_steps=end)
    assert whole.state.global_step == resumed.state.global_step == end
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{end}"]
