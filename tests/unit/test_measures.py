"""Which points nothing beats."""

import itertools

import numpy as np

from hf_encdec_distill.metrics import pareto_front


def test_the_front_is_what_no_other_point_beats():
    """Against the definition, pair by pair."""
    generator = np.random.default_rng(0)
    points = {str(i): tuple(generator.integers(0, 12, 2).tolist()) for i in range(60)}
    front = pareto_front(points)
    for name, other in itertools.product(front, points):
        (time, quality), (quicker, better) = points[name], points[other]
        assert not (quicker <= time and better > quality) and not (quicker < time and better >= quality)
    best = {min((-quality, time) for time, quality in points.values() if time <= limit) for limit in range(12)}
    assert {points[name] for name in front} == {(time, -quality) for quality, time in best}
    times = [points[name][0] for name in front]
    assert times == sorted(times) and len(set(times)) == len(times)
