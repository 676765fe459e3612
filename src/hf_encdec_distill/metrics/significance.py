"""How far a number measured on rows can be trusted: intervals and paired tests for whatever is a function of sums.

A mean over tokens, BLEU and the calibration error have that in common: each row adds to a few sums, and the number is
made of these. So rows can be resampled, or swapped between two models, and the number computed again from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


_RESAMPLES = 2000


class Sums(NamedTuple):
    """A measure of a set of rows: what each row adds, `[rows, K]`, and the number `[...]` that sums `[..., K]` give.

    `signature` are its settings, where a number means little without them.
    """

    rows: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]
    signature: str | None = None


def mean(sums: np.ndarray, weights: np.ndarray) -> Sums:
    """`sum(sums) / sum(weights)`, of `[rows]` each: a mean over tokens, from their sum and number in each row."""
    return Sums(np.column_stack([sums, weights]), lambda totals: totals[..., 0] / totals[..., 1])


def calibration_error(gaps: np.ndarray, weights: np.ndarray) -> Sums:
    """The ECE, from `fidelity.calibration_gaps` summed over each row's tokens, `[rows, bins]`, and their number."""
    return Sums(
        np.column_stack([gaps, weights]), lambda totals: np.abs(totals[..., :-1]).sum(axis=-1) / totals[..., -1]
    )


def _check(measure: Sums, minus: Sums | None) -> None:
    if not len(measure.rows):
        raise ValueError("there are no rows, of which nothing can be said: give at least one")
    if minus is not None and minus.rows.shape != measure.rows.shape:
        raise ValueError(
            f"{len(measure.rows)} rows of one model and {len(minus.rows)} of the other: give the same rows of both"
        )


def interval(measure: Sums, minus: Sums | None = None) -> dict[str, float]:
    """`value`, `low` and `high`: the 95 % interval of a bootstrap over the rows.

    Args:
        minus: the same measure of another model on the same rows, which is subtracted; both are drawn together.

    Raises:
        ValueError: there are no rows, or not as many of both.
    """

    def number(counts: np.ndarray) -> np.ndarray:
        value = measure.value(counts @ measure.rows)
        return value if minus is None else value - minus.value(counts @ minus.rows)

    _check(measure, minus)
    count = len(measure.rows)
    # A draw with replacement, as how often each row is in it.
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    value = float(number(np.ones(count, dtype=drawn.dtype)))
    with np.errstate(invalid="ignore"):
        numbers = number(drawn)
    # A draw of nothing but rows without a token has no mean.
    low, high = np.percentile(numbers[~np.isnan(numbers)], [2.5, 97.5]) if np.isfinite(value) else (value, value)
    # A value may lie outside its own percentile interval: by rounding where all rows are alike, and a calibration
    # error since noise, of which a draw has more than the rows, only ever raises it.
    return {"value": value, "low": min(float(low), value), "high": max(float(high), value)}


def p_value(measure: Sums, minus: Sums) -> float:
    """Two-sided p of "for each row it is a coin toss which model is which": a paired permutation test.

    Of `_RESAMPLES` random swaps the share whose difference is at least as far from 0, the one observed among them
    (Phipson and Smyth 2010), so never below 1 / (`_RESAMPLES` + 1). sacrebleu calls it approximate randomisation.
    NaN if one of the two numbers is not finite.

    Raises:
        ValueError: there are no rows, or not as many of both.
    """
    _check(measure, minus)
    swapped = np.random.default_rng(0).integers(2, size=(_RESAMPLES, len(measure.rows)))
    moved = swapped @ (minus.rows - measure.rows)
    ours, theirs = measure.rows.sum(axis=0), minus.rows.sum(axis=0)
    observed = (measure.value(ours), minus.value(theirs))
    if not np.isfinite(observed).all():
        return float("nan")
    differences = measure.value(ours + moved) - minus.value(theirs - moved)
    # What rounding makes of equal differences must not count as smaller.
    as_far = np.abs(differences) >= abs(observed[0] - observed[1]) - 1e-9 * np.abs(observed).max()
    return float((as_far.sum() + 1) / (_RESAMPLES + 1))
