"""One process equals two: weights, logs and evaluation, on ragged rows; those of the evaluation do not divide evenly.

As one of two processes, or alone, this file trains, evaluates, and has rank 0 write what came out.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from distillation_toys import (
    InOrder,
    arguments,
    collate,
    make_t5,
    make_teacher,
    ragged_rows,
    token_terms,
)
from forked import on_two_processes
from test_vision_student import make_trainer, without_image
from test_vision_student import rows_of as seeing_rows
from transformers import AutoTokenizer
from vision_toys import llama_of, make_llava, twin_of

from hf_encdec_distill.distillation.options.rollouts import draw


pytestmark = pytest.mark.process

ROWS = ragged_rows(8)
EVAL_ROWS = ragged_rows(7, seed=5)
SEEING = {
    "seeing": {"train_projector_first": 2, "freeze_encoder": True, "unfreeze_encoder_after": 4},
    "seeing_checkpointed": {"gradient_checkpointing": True},
}


def run(folder: Path) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    results = {}
    for name, accumulation, on_policy, options in (
        ("accumulated", 2, 0.0, {}),
        ("plain", 1, 0.0, {}),
        ("own", 1, 0.5, {}),
        ("matched", 2, 0.0, {"hidden_state_weight": 0.5, "max_grad_norm": 1.0}),
        ("decoder_only", 2, 0.0, {}),
        ("quantized", 1, 0.0, {"qat": "int4"}),
    ):
        matched = name == "matched"
        teacher = make_teacher(hidden_size=48) if matched else make_teacher()
        make_student = partial(make_teacher, seed=5) if name == "decoder_only" else make_t5
        trainer = InOrder(
            make_student(),
            arguments(
                folder,
                optim="sgd",
                learning_rate=0.1,
                lr_scheduler_type="constant",
                num_train_epochs=1,
                **{"max_grad_norm": 0.0, **options},
                per_device_train_batch_size=4 // processes // accumulation,
                gradient_accumulation_steps=accumulation,
                per_device_eval_batch_size=2,
                predict_with_generate=accumulation == 2,
                generation_max_length=6,
                distill_weight=0.7,
                distill_temperature=2.0,
                loss_chunk_size=1 if accumulation == 2 else 1000,
                on_policy_fraction=on_policy,
                sampling_temperature=0.0,
                max_target_length=6,
                seed=2,
                ddp_backend="gloo" if processes > 1 else None,
            ),
            teacher=teacher,
            train_dataset=ROWS,
            eval_dataset=EVAL_ROWS,
            data_collator=collate,
        )
        trainer.train()
        untrained = InOrder(
            make_student(), trainer.args, teacher=teacher, eval_dataset=EVAL_ROWS, data_collator=collate
        )
        assert trainer.accelerator.num_processes == processes
        assert all(p.device.type == "cpu" for p in trainer.teacher.model.parameters())
        assert not isinstance(trainer.teacher.model, torch.nn.parallel.DistributedDataParallel)
        kept = ["loss", "distill_loss"] + (not on_policy) * ["ce_loss"] + matched * ["hidden_state_loss"]
        metrics = untrained.evaluate()
        results[name] = {
            "logs": [{k: log[k] for k in kept} for log in trainer.state.log_history if "loss" in log],
            "eval": {k: v for k, v in metrics.items() if k.startswith("eval_") and ("loss" in k or "agree" in k)},
        }
        if matched:
            rank = trainer.accelerator.process_index
            torch.save(trainer._matching.state_dict(), folder / f"projections-{processes}-{rank}.pt")
        if trainer.is_world_process_zero():
            torch.save(trainer.model.state_dict(), folder / f"{name}-{processes}.pt")
    for name in SEEING:
        results[name] = {"logs": see(folder, processes, name)}
    if trainer.is_world_process_zero():
        (folder / f"results-{processes}.json").write_text(json.dumps(results))


def see(folder: Path, processes: int, name: str) -> list[float]:
    """Losses of a student with a tower: all of it is trained, or for two steps each its projector, its decoder, all.

    In each second step the second of two processes has no image, so that its tower has no gradient."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    llava, rows = make_llava(tokenizer), seeing_rows(tokenizer, 8)
    rows[6:] = [without_image(row, tokenizer) for row in rows[6:]]
    trainer = make_trainer(
        folder / "seeing",
        twin_of(llava, tokenizer),
        llama_of(llava),
        tokenizer,
        rows,
        max_steps=6,
        per_device_train_batch_size=4 // processes,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        **SEEING[name],
        ddp_backend="gloo" if processes > 1 else None,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), folder / f"{name}-{processes}.pt")
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_bpe_tokenizer):
    """Both runs' numbers, and the folder with their weights."""
    folder = tmp_path_factory.mktemp("distributed")
    tokenizer = make_bpe_tokenizer(chat_template=None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder / "tokenizer")
    on_two_processes(__file__, folder)
    run(folder)
    return folder, *(json.loads((folder / f"results-{n}.json").read_text()) for n in (1, 2))


@pytest.mark.parametrize("name", ["plain", "accumulated"])
def test_weights_and_logs_of_two_processes(runs, name):
    """Two steps of four ragged rows: 4, 2 accumulated twice, 2 on 2 processes, 1 on 2 accumulated twice agree.

    The accumulated ones take their loss token by token, where there are more than four."""
    folder, one, two = runs
    reference = torch.load(folder / "plain-1.pt", weights_only=True)
    for processes in (1, 2):
        weights = torch.load(folder / f"{name}-{processes}.pt", weights_only=True)
        for key, value in reference.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert len(one[name]["logs"]) == 2
    for single, double in zip(one[name]["logs"], two[name]["logs"], strict=True):
        assert double == pytest.approx(single, rel=1e-4, abs=1e-4)  # 4.57 rounds its loss to four digits


def test_a_decoder_only_student_of_two_processes(runs):
    folder, one, two = runs
    single, double = (torch.load(folder / f"decoder_only-{n}.pt", weights_only=True) for n in (1, 2))
    for key, value in single.items():
        torch.testing.assert_close(double[key], value, rtol=1e-4, atol=1e-6, msg=key)
    for log, other in zip(one["decoder_only"]["logs"], two["decoder_only"]["logs"], strict=True):
        assert other == pytest.approx(log, rel=1e-4, abs=1e-4)
    assert two["decoder_only"]["eval"] == pytest.approx(one["decoder_only"]["eval"], rel=1e-5)


def test_steps_on_own_targets_of_two_processes(runs):
    """Both kinds of step in two: the coin falls the same way on each process, and greedy answers are the same."""
    folder, one, two = runs
    assert [draw(2, step, 0) < 0.5 for step in range(2)] == [True, False]
    single, double, plain = (
        torch.load(folder / name, weights_only=True) for name in ("own-1.pt", "own-2.pt", "plain-1.pt")
    )
    for key, value in single.items():
        torch.testing.assert_close(double[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert any(not torch.allclose(plain[key], value, rtol=1e-3) for key, value in single.items())
    for alone, together in zip(one["own"]["logs"], two["own"]["logs"], strict=True):
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-4)


def test_hidden_states_of_two_processes(runs):
    """Accumulated twice, clipped: student, projections and numbers of one process; the projections are the same bits
    on both."""
    folder, one, two = runs
    for files in (("matched-1.pt", "matched-2.pt"), ("projections-1-0.pt", "projections-2-0.pt")):
        single, double = (torch.load(folder / file, weights_only=True) for file in files)
        for key, value in single.items():
            torch.testing.assert_close(double[key], value, rtol=1e-4, atol=1e-6, msg=key)
    of_ranks = [torch.load(folder / f"projections-2-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(value, of_ranks[1][key]) for key, value in of_ranks[0].items()) and of_ranks[0]
    for alone, together in zip(one["matched"]["logs"], two["matched"]["logs"], strict=True):
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-4)
    assert two["matched"]["eval"] == pytest.approx(one["matched"]["eval"], rel=1e-5)
    assert one["matched"]["eval"]["eval_hidden_state_loss"] > 0


def test_rounded_weights_of_two_processes(runs):
    """`qat`: what DistributedDataParallel averages are the gradients of the float weights."""
    folder, one, two = runs
    single, double, plain = (
        torch.load(folder / name, weights_only=True) for name in ("quantized-1.pt", "quantized-2.pt", "plain-1.pt")
    )
    for key, value in single.items():
        torch.testing.assert_close(double[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert any(not torch.allclose(plain[key], value, rtol=1e-3) for key, value in single.items())
    assert two["quantized"]["eval"] == pytest.approx(one["quantized"]["eval"], rel=1e-5)


@pytest.mark.parametrize("name", SEEING)
def test_a_student_that_sees_in_two_processes(name, runs):
    """One process has images, the other none."""
    folder, one, two = runs
    single, double = (torch.load(folder / f"{name}-{n}.pt", weights_only=True) for n in (1, 2))
    assert single.keys() == double.keys() and any("vision_tower" in key for key in single)
    for key, value in single.items():
        torch.testing.assert_close(double[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert len(one[name]["logs"]) == 6
    assert two[name]["logs"] == pytest.approx(one[name]["logs"], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["plain", "accumulated"])
def test_evaluation_of_two_processes(runs, name):
    """7 rows, batches of 2 on each: the row that fills up the last batch is not counted, generating or not."""
    _, one, two = runs
    ce, kl, agree = token_terms(make_t5(), make_teacher(), EVAL_ROWS, temperature=2.0)
    expected = {
        "eval_loss": (0.7 * 4 * kl + 0.3 * ce).mean().item(),
        "eval_ce_loss": ce.mean().item(),
        "eval_distill_loss": 4 * kl.mean().item(),
        "eval_teacher_agreement": agree.mean().item(),
    }
    for results in (one, two):
        assert results[name]["eval"] == pytest.approx(expected, rel=1e-5, abs=1e-6)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # or its threads may abort the process at its end
