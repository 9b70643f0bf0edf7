"""From outputs to figures: one number for each input, then their means with confidence intervals.

Numbers of inputs are kept as long as possible, so that inputs can be drawn anew, seeds joined and methods compared in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from peft_mcl import consensus_order
from recipes.evaluation.outputs import Outputs, Questions
from trainer_ext.evaluation import (
    QUALITY_METRICS,
    Interval,
    assignment_entropy,
    best_mean_worst,
    bootstrap,
    bootstrap_difference,
    characteristic_words,
    corpus_diversity,
    corpus_quality,
    coverage,
    diversity,
    leave_one_out_bleu,
    quality,
    samples_won,
    semantic_diversity,
)
from trainer_ext.evaluation.specialisation import agreement
from trainer_ext.metrics import ScoreWindow


# By this one outputs are chosen, modes compared and plots drawn: it needs no words, so it serves all languages alike.
MAIN_METRIC = "chrf"
RANKINGS = ("likelihood", "mixture", "consensus")
# What each hypothesis wins is shown by so many sequences.
SAMPLES = 3

# float64 of shape (N,) by name; NaN for inputs that a figure says nothing about.
Values = dict[str, np.ndarray]


def measure_outputs(
    outputs: Outputs,
    questions: Questions,
    embed: Callable[[list[str]], np.ndarray] | None = None,
    metrics: Sequence[str] = QUALITY_METRICS,
) -> Values:
    """Quality and diversity of the K outputs of each of N inputs.

    Args:
        outputs ([`Outputs`]): The texts.
        questions ([`Questions`]): Their inputs, with the references.
        embed: Sentence embeddings, float of shape (M, width) for M texts; without it nothing is said about meaning.
        metrics: Some of `QUALITY_METRICS`.

    Returns:
        `dict[str, np.ndarray]`: `chrf/best`, `chrf/mean`, `chrf/worst`, `chrf/0` (the first output: the most likely one of a
        decoder, or hypothesis 0) and so on for each metric; `chrf/best, mode de`, against the references of one mode alone;
        `coverage`, `leave_one_out_bleu`, and what `diversity` and `semantic_diversity` say.
    """
    texts, references = outputs.texts, questions.references
    values: Values = {}
    for name, scores in quality(texts, references, metrics).items():
        values.update({f"{name}/{which}": column for which, column in best_mean_worst(scores).items()})
        values[f"{name}/first"] = scores[:, 0]
    values["coverage"] = coverage(texts, references)
    values["leave_one_out_bleu"] = leave_one_out_bleu(references, texts)
    values.update(diversity(texts, references))
    if embed is not None:
        values["semantic_diversity"] = semantic_diversity(texts, embed)
    if questions.modes is not None:
        for mode in sorted({mode for row in questions.modes for mode in row}):
            values[f"{MAIN_METRIC}/best, mode {mode}"] = _best_of_mode(texts, questions, mode)
    return values


def _best_of_mode(texts: list[list[str]], questions: Questions, mode: str) -> np.ndarray:
    """The best output against the references of one mode: (N,), NaN where an input has none."""
    assert questions.modes is not None
    own = [
        [text for text, label in zip(row, labels, strict=True) if label == mode]
        for row, labels in zip(questions.references, questions.modes, strict=True)
    ]
    having = [n for n, row in enumerate(own) if row]
    found = np.full(len(own), math.nan)
    scores = quality([texts[n] for n in having], [own[n] for n in having], [MAIN_METRIC])[MAIN_METRIC]
    found[having] = scores.max(axis=1)
    return found


def measure_rankings(
    outputs: Outputs, questions: Questions, window: ScoreWindow, weights: Sequence[float] | None = None
) -> Values:
    """How good the output is that comes first, by each way of choosing among K without references.

    Args:
        outputs ([`Outputs`]): Output k of an input is hypothesis k's.
        questions ([`Questions`]): The inputs.
        window (`ScoreWindow`): Of the N * K outputs as completions of their prompts, input by input: scores of shape
            (N * K, K), the likelihood of every output under every hypothesis.
        weights: The K weights of the hypotheses; equal ones without them.

    Returns:
        `dict[str, np.ndarray]`: `chrf/top-1 by likelihood`, `... mixture` and `... consensus`, of shape (N,). The scores are those
        of `peft_mcl.rank_sequences`, with the end of an output that was cut off counted in.
    """
    size, count = len(outputs.texts), len(outputs.texts[0])
    shares = torch.full((count,), 1 / count, dtype=torch.float64)
    if weights is not None:
        shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    scores = window.scores.double().view(size, count, count)
    lengths = window.num_tokens.double().view(size, count).clamp(min=1)
    weighted = scores + shares.log()
    chosen = {
        "likelihood": (weighted.diagonal(dim1=1, dim2=2) / lengths).argmax(dim=1).tolist(),
        "mixture": (weighted.logsumexp(dim=2) / lengths).argmax(dim=1).tolist(),
        "consensus": [consensus_order(row, shares.tolist())[0][0] for row in outputs.texts],
    }
    table = quality(outputs.texts, questions.references, [MAIN_METRIC])[MAIN_METRIC]
    return {f"{MAIN_METRIC}/top-1 by {name}": table[range(size), chosen[name]] for name in RANKINGS}


def measure_likelihood(window: ScoreWindow, weights: Sequence[float] | None = None) -> dict[str, float]:
    """Nats per token of held-out references: best, mean and worst hypothesis, and the mixture.

    Args:
        window (`ScoreWindow`): Scores of shape (N, K).
        weights: The K weights of the mixture. Without them, the win shares on these very sequences, which flatters a little.
    """
    figures = window.summary()
    if weights is not None:
        shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        counted = window.num_tokens > 0
        mixture = torch.logsumexp(window.scores[counted].double() + shares.log(), dim=1)
        figures["mixture_nll"] = -mixture.sum().item() / max(int(window.num_tokens.sum()), 1)
    return {name: figures[name] for name in ("wta_nll", "mean_nll", "worst_nll", "mixture_nll")}


def describe_hypotheses(window: ScoreWindow, texts: list[str], modes: list[str] | None) -> dict[str, Any]:
    """What each hypothesis has become: its wins, with the known modes if there are any, words to name it by, and samples.

    Args:
        window (`ScoreWindow`): Of N references, (N, K).
        texts (`list[str]`): The N references.
        modes (`list[str]`, *optional*): Their labels.
    """
    count = window.scores.shape[1]
    winners = window.winners
    shares = (torch.bincount(winners, minlength=count).double() / max(len(winners), 1)).tolist()
    found: dict[str, Any] = {
        "win_shares": shares,
        "assignment_entropy": assignment_entropy(shares),
        "words": [[word for word, _ in row] for row in characteristic_words(texts, winners, count)],
        "samples": [[sample.text for sample in row] for row in samples_won(texts, winners, window.scores, SAMPLES)],
    }
    if modes is not None:
        found["agreement"] = agreement(modes, winners, count)
    return found


def whole_set(outputs: Outputs, questions: Questions) -> dict[str, Any]:
    """The corpus figures that papers report, which are no means over inputs."""
    return {
        "quality": corpus_quality(outputs.texts, questions.references),
        "diversity": corpus_diversity(outputs.texts),
    }


def summarise(seeds: Sequence[Values]) -> dict[str, list[float]]:
    """Mean and 95 % interval of each figure, by resampling inputs, and seeds where there are several.

    Inputs of which a figure says nothing (NaN under any seed) are left out of it. A figure that says nothing at all is left out.

    Returns:
        `dict[str, list[float]]`: `[estimate, low, high]` by name.
    """
    found = {}
    for name in seeds[0]:
        table = _table(seeds, name)
        if table.size:
            found[name] = list(bootstrap(table))
    return found


def compare(first: Sequence[Values], second: Sequence[Values], names: Sequence[str]) -> dict[str, list[float]]:
    """The differences of two methods on the same inputs, first minus second, with 95 % intervals."""
    found: dict[str, list[float]] = {}
    for name in names:
        one, other = _rows(first, name), _rows(second, name)
        known = ~(np.isnan(one).any(axis=0) | np.isnan(other).any(axis=0))
        if known.any():
            difference: Interval = bootstrap_difference(one[:, known], other[:, known])
            found[name] = list(difference)
    return found


def _rows(seeds: Sequence[Values], name: str) -> np.ndarray:
    return np.stack([values[name] for values in seeds])


def _table(seeds: Sequence[Values], name: str) -> np.ndarray:
    """(S, M), the M inputs of which all seeds say something; (M,) for one seed."""
    rows = _rows(seeds, name)
    rows = rows[:, ~np.isnan(rows).any(axis=0)]
    return rows[0] if len(rows) == 1 else rows
