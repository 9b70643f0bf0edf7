"""How far a figure would move with other inputs, and with other seeds: percentile bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A figure and the bounds of its confidence interval, in the unit of the values."""

    estimate: float
    low: float
    high: float


def bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The confidence interval of a statistic, by resampling inputs and, where there are several, seeds.

    Rows and columns are drawn independently, each with replacement (Owen 2007, "The pigeonhole bootstrap"), since the seeds of a
    method are judged on the same inputs. A bootstrap of few seeds is too narrow: of S equal ones it sees (S - 1) / S of the variance
    between seeds.

    Args:
        values (`np.ndarray`): Shape (N,), one value for each input; or (S, N), a row for each seed, a column for each input.
        statistic: Takes resampled values, in the shape of `values`, and returns a number.
        confidence (`float`): Between 0 and 1.
        resamples (`int`): How often the values are drawn anew.
        seed (`int`): The same seed gives the same interval.

    Returns:
        [`Interval`]: The statistic of `values`, and the percentiles (1 - confidence) / 2 and (1 + confidence) / 2 of it over the
        resamples. The bounds are NaN for one input, whose like nothing is known of.

    Raises:
        ValueError: `values` has another shape or a NaN, or an option is out of range.
    """
    _check_options(confidence, resamples)
    table = _checked("values", values)
    of = _of_drawn(statistic)
    drawn = (of(table, rows, columns) for rows, columns in _draws(table, resamples, seed))
    return _interval(statistic(table), drawn, confidence, table.shape[-1])


def bootstrap_difference(
    first: np.ndarray,
    second: np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The confidence interval of statistic(first) - statistic(second), of two methods on the same inputs.

    The inputs are drawn once for both, so that what makes an input hard for both cancels. Seeds are drawn for each method on its own.

    Args:
        first (`np.ndarray`): Shape (N,) or (S, N), as in `bootstrap`.
        second (`np.ndarray`): The same inputs in the same order: (N,) or (S', N).
        statistic, confidence, resamples, seed: As in `bootstrap`.

    Returns:
        [`Interval`]: As in `bootstrap`.

    Raises:
        ValueError: The numbers of inputs differ, or as in `bootstrap`.
    """
    _check_options(confidence, resamples)
    one, other = _checked("first", first), _checked("second", second)
    if one.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"`first` has {one.shape[-1]} inputs and `second` {other.shape[-1]}: a paired difference needs the same inputs in both."
        )
    # Another stream of random numbers for the seeds of the second method.
    seeds_of_other = np.random.default_rng([seed, 1])
    of = _of_drawn(statistic)
    drawn = (
        of(one, rows, columns) - of(other, _rows(other, seeds_of_other), columns)
        for rows, columns in _draws(one, resamples, seed)
    )
    return _interval(statistic(one) - statistic(other), drawn, confidence, one.shape[-1])


def _check_options(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` is {confidence!r}: give a part between 0 and 1, 0.95 say.")
    if resamples < 1:
        raise ValueError(f"`resamples` is {resamples!r}: give at least 1; 2000 are usual.")


def _checked(name: str, values: np.ndarray) -> np.ndarray:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim not in (1, 2) or table.size == 0:
        raise ValueError(f"`{name}` has the shape {table.shape}: give (N,), or (S, N) with a row for each of S seeds.")
    undefined = np.isnan(table).reshape(-1, table.shape[-1]).any(axis=0)
    if undefined.any():
        raise ValueError(
            f"`{name}` is NaN for {undefined.sum()} of {table.shape[-1]} inputs, the first of which is {undefined.argmax()}: leave "
            "those out that the metric says nothing about."
        )
    return table


def _rows(table: np.ndarray, generator: np.random.Generator) -> np.ndarray | None:
    """Seeds drawn with replacement; None if there are no rows."""
    return generator.integers(len(table), size=len(table)) if table.ndim == 2 else None


def _draws(table: np.ndarray, resamples: int, seed: int) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
    """Rows and columns of each resample. The columns do not depend on the number of rows."""
    inputs, seeds = np.random.default_rng([seed, 2]), np.random.default_rng([seed, 0])
    for _ in range(resamples):
        columns = np.asarray(inputs.integers(table.shape[-1], size=table.shape[-1]))
        yield _rows(table, seeds), columns


def _of_drawn(
    statistic: Callable[[np.ndarray], float],
) -> Callable[[np.ndarray, np.ndarray | None, np.ndarray], float]:
    """The statistic of drawn rows and columns of a table. Means, the usual case, are had without copying what was drawn."""
    if statistic is np.mean:
        return _mean
    return lambda table, rows, columns: statistic(_take(table, rows, columns))


def _take(table: np.ndarray, rows: np.ndarray | None, columns: np.ndarray) -> np.ndarray:
    return table[columns] if rows is None else table[np.ix_(rows, columns)]


def _mean(table: np.ndarray, rows: np.ndarray | None, columns: np.ndarray) -> float:
    """The mean of what `_take` would take, without taking it: each row and column counts as often as it was drawn."""
    often = np.bincount(columns, minlength=table.shape[-1]) / len(columns)
    if rows is None:
        return float(table @ often)
    return float(np.bincount(rows, minlength=len(table)) @ (table @ often) / len(rows))


def _interval(estimate: float, drawn: Iterator[float], confidence: float, num_inputs: int) -> Interval:
    if num_inputs == 1:
        return Interval(float(estimate), math.nan, math.nan)
    low, high = np.quantile(list(drawn), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(estimate), float(low), float(high))
