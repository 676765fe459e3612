"""The parts of a quickstart that know its time: the rates of a training, the plan, what a resumed run knows, and the
order of rows."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from hf_encdec_distill.cli.quickstart import planning, recipe, timed_training
from hf_encdec_distill.cli.quickstart.planning import Plan
from hf_encdec_distill.cli.quickstart.state import open_run


class Clock:
    now = 5000.0

    def __call__(self):
        return self.now


def simulate(share, clock, step_seconds):
    """The calls of a trainer; `step_seconds(step)` says how long each step takes."""
    control, state = SimpleNamespace(should_training_stop=False, should_save=False), SimpleNamespace(global_step=0)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
    share.on_train_begin(None, state, control)
    while not control.should_training_stop:
        clock.now += 0.9 * step_seconds(state.global_step)
        share.on_pre_optimizer_step(None, state, control, optimizer=optimizer)
        clock.now += 0.1 * step_seconds(state.global_step)
        state.global_step += 1
        share.on_step_end(None, state, control)
    return share


def timed(seconds, steps=100_000, **more):
    clock = Clock()
    return clock, timed_training.TimeShare(seconds, steps, 0.1, lambda *_: None, now=clock, **more)


@pytest.mark.parametrize("fits", [3, 13, 100])
def test_warm_up_and_decay_are_shares_of_the_steps_that_fit(fits):
    clock, share = timed(10.0 * fits + 4.0)
    rates = np.array(simulate(share, clock, lambda step: 10.0).rates)
    assert len(rates) == fits and share.used <= share.seconds
    warm = max(round(recipe.WARMUP * fits), 1)
    assert rates.argmax() == pytest.approx(warm - 1, abs=1)
    assert rates.max() > 0.1 * (1 - 2 / fits) * 0.99
    assert (np.diff(rates[warm:]) < 0).all() and rates[-1] < 2 * 0.1 / fits


def test_a_first_step_that_takes_longer_and_a_machine_that_slows_down():
    clock, share = timed(1000.0)
    simulate(share, clock, lambda step: 40.0 if step == 0 else 10.0 if share.used < 500 else 20.0)
    assert 960 <= share.used <= 1000
    assert share.rates[-1] < 0.1 * share.peak * 3 and max(share.rates) > 0.8 * share.peak


def test_steps_may_end_before_the_time():
    clock, share = timed(1e6, steps=50)
    simulate(share, clock, lambda step: 10.0)
    assert len(share.rates) == 50 and share.rates[-1] == pytest.approx(0.1 / 46)


def test_the_time_lasts_for_the_twin_too():
    clock, share = timed(620.0, twin_step=5.0)
    simulate(share, clock, lambda step: 10.0)
    assert share.twin_cost == pytest.approx(0.5)
    assert len(share.rates) == 41 and 1.5 * share.used <= 620
    clock, share = timed(620.0, twin_step=50.0)  # measured while the machine did something else
    assert len(simulate(share, clock, lambda step: 10.0).rates) == 31 and share.twin_cost == 1.0
    clock, share = timed(620.0, twin_cost=1.0)
    assert len(simulate(share, clock, lambda step: 10.0).rates) == 31


def test_a_twin_replays_the_rates_whatever_its_time():
    clock, share = timed(float("inf"), steps=3, replay=[0.02, 0.1, 0.05])
    assert simulate(share, clock, lambda step: 1e6).rates == [0.02, 0.1, 0.05]


def test_as_many_rows_as_the_time_allows():
    slow = Plan(load=2.0, score=0.3, generate=0.7, request=2.0, student_size=0.5, trained=2)
    a_row = 1.0 + 2.5 * 0.3 + 2 * 0.7
    assert slow.evaluation(10) == pytest.approx(8 + 10 * (a_row - 1.0))
    two_hours = slow.for_run(7200.0, 8, 10_000)
    assert two_hours.held_out == int((recipe.EVALUATION_SHARE * 7200 - 8) / a_row) > 64
    assert slow.for_run(7200.0, 8, 229).held_out == 229
    assert slow.for_run(1e9, 8, 10_000).held_out == recipe.MOST_ROWS
    twelve = slow.for_run(720.0, 8, 229)
    assert twelve.held_out == 64 and twelve.rounds == 6  # its share would be fewer
    assert twelve.latency() == pytest.approx(2 * 2.0 + 7 * 1.5 * 2.0)
    four = slow.for_run(240.0, 8, 229)
    assert four.held_out == int((0.35 * 240 - 8) / a_row) < 64
    assert slow.for_run(5.0, 8, 229).held_out == 8 and slow.for_run(5.0, 8, 229).rounds == 2
    # Where the untuned teacher was measured before, a row costs less.
    assert slow.for_run(240.0, 8, 229, first=False).held_out == int((0.35 * 240 - 8) / (a_row - 1.0))


def test_rows_are_measured_in_groups_of_like_length_in_random_order():
    lengths = np.random.default_rng(0).integers(1, 300, size=100)
    groups = planning.groups_of_like_length(lengths, 16, seed=3)
    assert sorted(index for group in groups for index in group) == list(range(100))
    spans = [(lengths[group].min(), lengths[group].max()) for group in groups]
    assert all(high <= low for (_, high), (low, _) in zip(sorted(spans), sorted(spans)[1:], strict=False))
    assert spans != sorted(spans) and groups != planning.groups_of_like_length(lengths, 16, seed=4)


def test_a_resumed_run_knows_what_was_done_and_asked_for(tmp_path):
    folder = tmp_path / "run"
    state = open_run(folder, {"minutes": 3.0, "seed": 5}, resume=False)
    assert not folder.exists()
    state.begin("data")
    state.finish("data", {"sizes": {"train": 7}, "teacher": "some/teacher", "tokens": []})
    assert open_run(folder, {"seed": 6}, resume=False).results == {}  # nothing is lost
    state.begin("before")
    state.finish("before", {"plan": dataclasses.asdict(Plan(1.0, 1.0, 1.0, 1.0, 1.0, 1))})
    state.begin("teach")
    again = open_run(folder, {"seed": 5}, resume=True)
    assert (again.settings.minutes, again.settings.seed, again.results["data"]["sizes"]) == (3.0, 5, {"train": 7})
    assert again.begun == state.begun and list(again.begun) == ["data", "before", "teach"]
    assert 0 < again.seconds_used < 180 and again.seconds_left == pytest.approx(180 - again.seconds_used, abs=1)
    with pytest.raises(ValueError, match="seed=5, not 6"):
        open_run(folder, {"seed": 6}, resume=True)
    with pytest.raises(ValueError, match=r"--resume.*--output"):
        open_run(folder, {}, resume=False)
    del state.results["data"]["teacher"]  # of a version without a smaller vocabulary
    state.save()
    with pytest.raises(ValueError, match="no 'teacher'.*another version began this run.*--output"):
        open_run(folder, {}, resume=True)


def test_the_order_of_training_uses_each_row_once_a_pass_in_batches_of_like_length():
    lengths = np.random.default_rng(1).integers(5, 200, size=1000)
    order = np.array(timed_training.training_order(lengths, 8, 125 * 2, seed=3)).reshape(-1, 8)
    for one_pass in (order[:125], order[125:]):
        assert sorted(one_pass.ravel()) == list(range(1000))
    padding = (lengths[order].max(axis=1, keepdims=True) - lengths[order]).sum() / lengths[order].sum()
    shuffled = lengths[np.random.default_rng(0).permutation(1000)].reshape(-1, 8)
    assert padding < 0.25 * (shuffled.max(axis=1, keepdims=True) - shuffled).sum() / shuffled.sum()
    # A run that lays out more steps begins with the same ones: a twin sees the same rows.
    assert order[:30].ravel().tolist() == timed_training.training_order(lengths, 8, 30, seed=3)
    assert order[:30].ravel().tolist() != timed_training.training_order(lengths, 8, 30, seed=4)
    with pytest.raises(ValueError, match="cannot fill a batch"):
        timed_training.training_order(lengths[:7], 8, 1, seed=0)
