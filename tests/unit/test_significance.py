"""Intervals and p-values against all sign flips, formulas of means, and sacrebleu's own significance tests."""

import itertools

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from hf_encdec_distill.metrics.significance import Sums, calibration_error, interval, mean, p_value
from hf_encdec_distill.metrics.texts import text_statistics


def a_mean(values):
    return mean(np.asarray(values), np.ones(len(values)))


def p_of(differences):
    return p_value(a_mean(differences), a_mean(np.zeros(len(differences))))


def test_the_p_value_is_that_of_all_sign_flips():
    """Against all 2^n flips, and uniform where there is nothing to find."""
    differences = np.array([0.4, -0.1, 0.3, 0.5, 0.2, -0.2, 0.6, 0.1, 0.3, -0.05])
    signs = np.array(list(itertools.product((-1, 1), repeat=10)))
    exact = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean()
    assert p_of(differences) == pytest.approx(exact, abs=0.012)
    # What both models have in common changes nothing.
    common = 50 + 10 * np.sin(np.arange(10))
    assert p_value(a_mean(common + differences), a_mean(common)) == p_of(differences)
    assert p_of(np.zeros(5)) == 1.0
    assert p_of(np.full(40, 1.0)) == pytest.approx(1 / 2001)
    noise = np.random.default_rng(1).normal(size=(200, 30))
    assert 0.02 <= np.mean([p_of(row) < 0.05 for row in noise]) <= 0.09


def test_what_is_no_number_is_not_significant():
    broken, whole = mean([1.0, np.nan, 0.0], [2, 3, 1]), mean([1.0, 1.0, 0.0], [2, 3, 1])
    assert np.isnan(p_value(broken, whole)) and np.isnan(interval(broken)["low"])
    # Many draws of three rows hold none but the one without a token, which says nothing.
    found = interval(mean([1.0, 2.0, 0.0], [2, 4, 0]))
    assert found == {"value": 0.5, "low": 0.5, "high": 0.5}
    with pytest.raises(ValueError, match="no rows"):
        interval(mean([], []))
    for compare in (interval, p_value):
        with pytest.raises(ValueError, match="3 rows of one model and 1 of the other"):
            compare(whole, mean([1.0], [2]))


def test_the_interval_is_that_of_a_ratio_of_sums():
    generator = np.random.default_rng(7)
    weights = np.full(400, 10.0)
    sums = 10 * generator.normal(3.0, 1.0, size=400)
    estimate = interval(mean(sums, weights))
    assert estimate["value"] == pytest.approx(sums.sum() / 4000)
    # A mean of 400 numbers of standard deviation s: plus and minus 1.96 s / 20.
    half = 1.96 * (sums / 10).std() / 20
    assert estimate["high"] - estimate["value"] == pytest.approx(half, rel=0.15)
    assert estimate["value"] - estimate["low"] == pytest.approx(half, rel=0.15)
    assert interval(mean(np.zeros(5), np.ones(5))) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_the_interval_of_a_difference_is_paired():
    """What is common to both rows of a pair is not in it: drawn apart, the interval would be twenty times wider."""
    generator = np.random.default_rng(3)
    common, noise = generator.normal(size=300), 0.05 * generator.normal(size=300)
    found = interval(a_mean(common + noise), a_mean(common))
    assert found["value"] == pytest.approx(noise.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * noise.std() / np.sqrt(300), rel=0.15)


WORDS = ["the", "sum", "of", "two", "numbers", "is", "returned", "as", "a", "list", "when", "it", "was", "given"]


def answers(generator, changed):
    references = [" ".join(generator.choice(WORDS, 9)) for _ in range(60)]
    return references, [
        [
            " ".join(generator.choice(WORDS) if generator.random() < share else word for word in text.split())
            for text in references
        ]
        for share in changed
    ]


@pytest.mark.parametrize(("name", "metric"), [("bleu", BLEU), ("chrf", CHRF)])
def test_corpus_scores_are_drawn_and_swapped_as_sacrebleu_does(name, metric, monkeypatch):
    """The score of the whole corpus is taken of each draw: a mean of scores of sentences is another number."""
    references, (better, worse) = answers(np.random.default_rng(5), (0.3, 0.34))
    ours = [Sums(*text_statistics(name, texts, references)) for texts in (worse, better)]
    # Approximate randomisation, with 2000 trials as ours.
    monkeypatch.setenv("SACREBLEU_SEED", "11")
    systems = [("better", better), ("worse", worse)]
    test = PairedTest(systems, {"it": metric()}, [references], test_type="ar", n_samples=2000, n_jobs=1)
    theirs = next(reversed(test()[1].values()))[1]
    assert interval(ours[0])["value"] == pytest.approx(theirs.score)
    assert 0.02 < theirs.p_value < 0.9
    assert p_value(*ours) == pytest.approx(theirs.p_value, abs=0.05)
    # Their interval is symmetric, of the mean of 2000 draws: half of its width is what they give.
    score = metric().corpus_score(worse, [references], n_bootstrap=2000)
    found = interval(ours[0])
    assert (found["high"] - found["low"]) / 2 == pytest.approx(score._ci, rel=0.15)


def test_the_calibration_error_of_sums_over_rows():
    """Gaps of one bin cancel between rows, those of two bins do not."""
    gaps = np.array([[0.5, 0.0], [-0.5, 0.25], [0.0, 0.75]])
    tokens = np.array([2, 2, 1])
    measure = calibration_error(gaps, tokens)
    assert interval(measure)["value"] == pytest.approx((0 + 1.0) / 5)
    found = interval(calibration_error(np.array([[0.2, -0.1]] * 9), np.full(9, 2)))
    assert list(found.values()) == pytest.approx([0.15] * 3)
