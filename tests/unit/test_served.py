"""Teachers on a server: against the same weights here, and with everything that goes wrong on the way."""

import json
import logging
import math
import threading
import time
import traceback

import datasets
import numpy as np
import pytest
import torch
from distillation_toys import arguments, make_t5, make_teacher, ragged_rows
from teacher_server import KEY, Fault, TeacherServer

from hf_encdec_distill import DistillationTrainer
from hf_encdec_distill.distillation import CachedTeacher, LiveTeacher, ServedTeacher, TargetGeneration, capture
from hf_encdec_distill.distillation.alignment.vocabularies import SharedVocabulary
from hf_encdec_distill.distillation.teachers import http_client, served
from hf_encdec_distill.distillation.teachers.wire import log_tail, top_k


ROWS = ragged_rows(13)
TEXTS = [{"source": f"def f{n}(a): return {n} + a", "target": f"Return {n} and a."} for n in range(9)]
KINDS = ("vllm", "sglang")


@pytest.fixture
def tokenizer(make_bpe_tokenizer):
    return make_bpe_tokenizer(pad_token="<|endoftext|>")


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.delenv(http_client.API_KEY, raising=False)


@pytest.fixture(autouse=True)
def _quick_pauses(monkeypatch):
    monkeypatch.setattr(http_client, "_LONGEST_WAIT", 0.02)


@pytest.fixture(params=KINDS)
def server(request, tokenizer):
    with TeacherServer(make_teacher(), tokenizer, request.param) as server:
        yield server


@pytest.fixture
def vllm(tokenizer):
    with TeacherServer(make_teacher(), tokenizer) as server:
        yield server


def ask_for(server, tokenizer, **options):
    return ServedTeacher(server.url, tokenizer, **{"k": 8, "patience": 5.0, **options})


# What it predicts ------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_model(server, tokenizer):
    """Padding on either side, positions with gaps, the last one too."""
    ids = torch.tensor([[0, 0, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    rows, columns = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 4, 5, 1, 2])
    found = ask_for(server, tokenizer).scores(ids, mask, rows, columns, SharedVocabulary(280, 280))
    for number, (row, column) in enumerate(zip(rows, columns)):
        read = ids[row, : column + 1][mask[row, : column + 1].bool()]
        log_probs = torch.log_softmax(server.model(read[None]).logits[0, -1].double(), dim=-1)
        values, best = log_probs.topk(8)
        assert found.ids[number].tolist() == best.tolist()
        torch.testing.assert_close(found.log_probs[number].double(), values, atol=1e-5, rtol=0)
        rest = log_probs.index_fill(0, best, -math.inf).logsumexp(dim=0)
        torch.testing.assert_close(found.tail[number].double(), rest, atol=1e-5, rtol=0)


def test_a_tail_is_guarded_against_rounding():
    log_probs = np.log(np.array([[0.5, 0.25], [0.75, 0.25], [0.75 + 1e-7, 0.25]], dtype=np.float32))
    tail = log_tail(log_probs, vocab_size=9)
    assert tail[0] == pytest.approx(math.log(0.25), abs=1e-6)
    assert tail[1] == tail[2] == pytest.approx(math.log(2 * 2**-24))
    assert np.isneginf(log_tail(log_probs, vocab_size=2)).all()


def test_a_served_record_equals_a_local_one(server, tokenizer, tmp_path):
    """And trains to the same loss."""
    losses = []
    for name, teacher in {"local": LiveTeacher(server.model), "served": ask_for(server, tokenizer)}.items():
        options = {} if name == "served" else {"k": 8}
        assert capture(teacher, ROWS, tmp_path / name, tokenizer, progress=False, **options) == len(ROWS)
        trainer = DistillationTrainer(
            make_t5(),
            arguments(tmp_path / f"{name}-out", distill_weight=1.0, max_steps=3, logging_steps=3, learning_rate=0.1),
            train_dataset=ROWS,
            processing_class=tokenizer,
            teacher=str(tmp_path / name),
            teacher_processing_class=tokenizer,
        )
        losses.append(trainer.train().training_loss)
    local, remote = (CachedTeacher(tmp_path / name)._rows.sort("key").with_format("numpy") for name in ("local", "served"))
    assert local["key"] == remote["key"]
    for row, other in zip(local, remote):
        assert row["ids"].tolist() == other["ids"].tolist()
        np.testing.assert_allclose(row["log_probs"], other["log_probs"], atol=1e-5)
        np.testing.assert_allclose(row["tail"], other["tail"], atol=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
