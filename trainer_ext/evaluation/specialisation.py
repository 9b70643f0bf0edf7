"""What each hypothesis has become: what it wins, how that goes with a known mode, and the words that tell it from the others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from trainer_ext.evaluation.checks import check_texts, check_winners, required
from trainer_ext.evaluation.words import words


def agreement(modes: Sequence[str], winners: ArrayLike, num_hypotheses: int) -> dict[str, Any]:
    """How well the winning hypothesis tells the mode.

    Args:
        modes (`list[str]`): The known mode of each of N sequences.
        winners (array or CPU tensor): int64 of shape (N,).
        num_hypotheses (`int`): K.

    Returns:
        `dict`: `purity`, the share of sequences whose mode is the most frequent one of their winner; `nmi`, normalised mutual
        information (arithmetic mean of the entropies); `matrix`, sequences by mode and winning hypothesis.

    Raises:
        ValueError: A winner is no hypothesis, or there is not one for each mode.
        ImportError: scikit-learn is missing.
    """
    array = check_winners(winners, num_hypotheses, num_sequences=len(modes))
    names = sorted(set(modes))
    # Every hypothesis gets a column, also one that won nothing.
    counts = np.zeros((len(names), num_hypotheses), dtype=int)
    counts[:, np.unique(array)] = required("sklearn.metrics.cluster").contingency_matrix(modes, array)
    return {
        "purity": float(counts.max(axis=0).sum() / counts.sum()),
        "nmi": float(required("sklearn.metrics").normalized_mutual_info_score(modes, array)),
        "matrix": {name: counts[i].tolist() for i, name in enumerate(names)},
    }


def assignment_entropy(shares: Iterable[float]) -> float:
    """The entropy of win shares in nats: log K if all win alike, 0 if one wins everything.

    Args:
        shares (iterable of `float`): The part of the sequences that each hypothesis won.

    Raises:
        ValueError: The shares are negative or do not sum to 1. All of them 0, of no sequences at all, have entropy 0.
    """
    parts = [float(share) for share in shares]
    if any(not part >= 0 for part in parts) or (any(parts) and abs(sum(parts) - 1) > 1e-6):
        raise ValueError(f"`shares` is {parts}: give parts that sum to 1, counts over their sum.")
    return sum(-part * math.log(part) for part in parts if part > 0) + 0.0


def stability(winners_before: ArrayLike, winners_after: ArrayLike) -> float:
    """The part of the sequences that keep their winner from one look to the next. By chance alone: the sum over k of the
    product of hypothesis k's two win shares.

    Args:
        winners_before, winners_after (arrays or CPU tensors): int64 of shape (N,), the same sequences in the same order.

    Raises:
        ValueError: The shapes differ, or are wrong.
    """
    largest = np.iinfo(np.int64).max
    before = check_winners(winners_before, largest, "winners_before")
    after = check_winners(winners_after, largest, "winners_after", len(before))
    return float(np.mean(before == after))


def characteristic_words(
    texts: Sequence[str], winners: ArrayLike, num_hypotheses: int, top: int = 10
) -> list[list[tuple[str, float]]]:
    """The words that tell what each hypothesis wins from what the others win, so that a person can name it.

    Weighted log-odds with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008, "Fightin' Words"): the log of the odds of a word in the texts of one hypothesis against those in all others' texts, over the standard deviation. The
    prior is the frequency of each word in all texts, and counts as many words as a hypothesis has on average.

    Args:
        texts (`list[str]`): N texts: the references that were won, or what the winners answered.
        winners (array or CPU tensor): int64 of shape (N,).
        num_hypotheses (`int`): K.
        top (`int`): At most so many words for each hypothesis.

    Returns:
        `list[list[tuple[str, float]]]`: For each hypothesis its words (see `words`) with their z-score, the highest first; only words
        that it has more often than the others. A z-score below about 2 may be chance, and of many words the best is above by
        chance, too. Nothing for a hypothesis that won no words, or all.

    Raises:
        ValueError: A winner is no hypothesis, the lengths differ, or `top` is negative.
    """
    check_texts("texts", texts)
    array = check_winners(winners, num_hypotheses, num_sequences=len(texts))
    if top < 0:
        raise ValueError(f"`top` is {top!r}: give a number of words, 10 say.")
    counts: list[Counter[str]] = [Counter() for _ in range(num_hypotheses)]
    for text, winner in zip(texts, array, strict=True):
        counts[winner].update(words(text))
    vocabulary = sorted(set().union(*counts))
    won = np.array([[count[word] for word in vocabulary] for count in counts], dtype=np.float64)
    everywhere = won.sum(axis=0)
    prior = everywhere / num_hypotheses
    found: list[list[tuple[str, float]]] = []
    for mine in won:
        if len(vocabulary) < 2 or not 0 < mine.sum() < everywhere.sum():
            found.append([])
            continue
        here, elsewhere = mine + prior, everywhere - mine + prior
        log_odds = np.log(here / (here.sum() - here)) - np.log(elsewhere / (elsewhere.sum() - elsewhere))
        z = log_odds / np.sqrt(1 / here + 1 / elsewhere)
        # Stable, so that equal words keep the order of the alphabet.
        order = [i for i in np.argsort(-z, kind="stable")[:top] if z[i] > 0]
        found.append([(vocabulary[i], float(z[i])) for i in order])
    return found


class Sample(NamedTuple):
    """A sequence that a hypothesis won: its row, its text, and by how many nats its winner beat the others."""

    row: int
    text: str
    margin: float


def samples_won(
    texts: Sequence[str], winners: ArrayLike, scores: ArrayLike, count: int = 5, clearest: bool = False, seed: int = 0
) -> list[list[Sample]]:
    """A few of the sequences that each hypothesis wins.

    Args:
        texts (`list[str]`): N texts.
        winners (array or CPU tensor): int64 of shape (N,).
        scores (array or CPU tensor): Shape (N, K), log-likelihoods in nats.
        count (`int`): At most so many for each hypothesis.
        clearest (`bool`): Those with the largest margins, which show what a hypothesis has become but flatter it. Otherwise
            drawn at random, which shows what it wins.
        seed (`int`): Of the random draw.

    Returns:
        `list[list[Sample]]`: For each of the K hypotheses, the largest margin first. The margin is the winner's score minus the best
        of the others, negative if the winner was not chosen by score alone, NaN for K = 1.

    Raises:
        ValueError: The shapes do not fit, a score is NaN, a winner is no hypothesis, or `count` is negative.
    """
    check_texts("texts", texts)
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or len(table) != len(texts) or table.shape[1] == 0 or np.isnan(table).any():
        raise ValueError(
            f"`scores` has the shape {table.shape} and {np.isnan(table).sum()} NaN for {len(texts)} texts: give (N, K) log-likelihoods."
        )
    array = check_winners(winners, table.shape[1], num_sequences=len(texts))
    if count < 0:
        raise ValueError(f"`count` is {count!r}: give a number of samples, 5 say.")
    margins = _margins(table, array)
    generator = np.random.default_rng(seed)
    found = []
    for k in range(table.shape[1]):
        rows = np.flatnonzero(array == k)
        if not clearest:
            rows = generator.permutation(rows)[:count]
        rows = rows[np.argsort(-margins[rows], kind="stable")][:count]
        found.append([Sample(i, texts[i], float(margins[i])) for i in rows.tolist()])
    return found


def _margins(scores: np.ndarray, winners: np.ndarray) -> np.ndarray:
    """float64 of shape (N,): the winner's score minus the best of the others."""
    if scores.shape[1] == 1:
        return np.full(len(scores), np.nan)
    of_winner = np.take_along_axis(scores, winners[:, None], axis=1)[:, 0]
    others = scores.copy()
    np.put_along_axis(others, winners[:, None], -np.inf, axis=1)
    return of_winner - others.max(axis=1)
