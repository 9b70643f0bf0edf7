"""How good K outputs of one input are, each against one or several references."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from trainer_ext.evaluation.checks import check_outputs, check_references, required
from trainer_ext.evaluation.cider import DocumentFrequencies, cider_d
from trainer_ext.evaluation.words import words


QUALITY_METRICS: tuple[str, ...] = ("bleu", "chrf", "rouge_l", "cider_d", "meteor", "exact_match")
CORPUS_METRICS: tuple[str, ...] = ("bleu", "chrf")

# One output and the references of its input.
Score = Callable[[str, Sequence[str]], float]


def quality(
    outputs: Sequence[Sequence[str]], references: Sequence[Sequence[str]], metrics: Sequence[str] = QUALITY_METRICS
) -> dict[str, np.ndarray]:
    """Score every output against the references of its input.

    Args:
        outputs (`list[list[str]]`): K texts for each of N inputs, K the same for all.
        references (`list[list[str]]`): One or several texts for each input; their number may differ.
        metrics (sequence of `str`): Which of `QUALITY_METRICS`.

    Returns:
        `dict[str, np.ndarray]`: For each metric, float64 of shape (N, K):

        - `bleu`, 0 to 100: sacrebleu's sentence BLEU (tokens of 13a, exponential smoothing, effective order);
        - `chrf`, 0 to 100: sacrebleu's sentence chrF2, against the best reference;
        - `rouge_l`, 0 to 1: F1 of the longest common subsequence (Lin 2004), by rouge-score, against the best reference, on the
          words of `words` (rouge-score's own know no letters but a to z);
        - `cider_d`, 0 to 10: CIDEr-D (Vedantam et al. 2015) on the words of `words`, document frequencies from `references`. NaN
          if there is one input, which has no document frequencies;
        - `meteor`, 0 to 1: METEOR-like, nltk's METEOR (alpha .9, beta 3, gamma .5, as of Lavie and Agarwal 2007) with exact matches
          and those of English Porter stems, without the synonyms of WordNet, against the best reference. No other
          implementation's METEOR compares with it;
        - `exact_match`, 0 or 1: whether the output is a reference, but for white space.

    Raises:
        ValueError: An argument has the wrong shape, or a metric is unknown.
        ImportError: A library of the extra `evaluation` is missing.
    """
    check_outputs(outputs)
    check_references(references, len(outputs))
    _check_metrics(metrics, QUALITY_METRICS)
    return {name: _table(_SCORES[name](references), outputs, references) for name in metrics}


def best_mean_worst(scores: np.ndarray) -> dict[str, np.ndarray]:
    """The best, the mean and the worst of the K outputs of each input.

    Args:
        scores (`np.ndarray`): Shape (N, K), more is better.

    Returns:
        `dict[str, np.ndarray]`: `best` (the oracle's choice), `mean`, `worst`: float64 of shape (N,).

    Raises:
        ValueError: `scores` has another shape, or K is 0.
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] == 0:
        raise ValueError(f"`scores` has the shape {table.shape}: give (N, K), a score for each output of each input.")
    return {"best": table.max(axis=1), "mean": table.mean(axis=1), "worst": table.min(axis=1)}


def corpus_quality(
    outputs: Sequence[Sequence[str]], references: Sequence[Sequence[str]], metrics: Sequence[str] = CORPUS_METRICS
) -> dict[str, dict[str, Any]]:
    """sacrebleu's corpus scores, which are no means of sentence scores, of each hypothesis and of the oracle's choice.

    Args:
        outputs (`list[list[str]]`): K texts for each of N inputs; text k is hypothesis k's.
        references (`list[list[str]]`): One or several texts for each input; their number may differ.
        metrics (sequence of `str`): Which of `CORPUS_METRICS`.

    Returns:
        `dict`: For each metric a dict, 0 to 100: `hypotheses`, the corpus score of each of the K, a list; `best`, that of the
        outputs with the highest sentence score of the same metric (the first of equal ones).

    Raises:
        ValueError: An argument has the wrong shape, or a metric is unknown.
        ImportError: sacrebleu is missing.
    """
    count = check_outputs(outputs)
    check_references(references, len(outputs))
    _check_metrics(metrics, CORPUS_METRICS)
    # Reference i of every input; sacrebleu takes None for those that an input lacks.
    streams = [list(stream) for stream in itertools.zip_longest(*references)]
    library = required("sacrebleu")
    found = {}
    for name in metrics:
        scorer = {"bleu": library.BLEU, "chrf": library.CHRF}[name]()
        best = _table(_SCORES[name](references), outputs, references).argmax(axis=1)
        chosen = [row[k] for row, k in zip(outputs, best, strict=True)]
        found[name] = {
            "best": scorer.corpus_score(chosen, streams).score,
            "hypotheses": [scorer.corpus_score([row[k] for row in outputs], streams).score for k in range(count)],
        }
    return found


def coverage(outputs: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> np.ndarray:
    """The part of the references that some output comes closest to (after Shen et al. 2019, arXiv 1902.07816, with chrF).

    An output covers the reference with which it has the highest sentence chrF, all of them if several have it, and none if
    that is 0. Equal references count as one. K outputs thus hardly cover more than K of the references, whatever their quality.

    Args:
        outputs (`list[list[str]]`): K texts for each of N inputs.
        references (`list[list[str]]`): One or several texts for each input.

    Returns:
        `np.ndarray`: float64 of shape (N,), 0 to 1.

    Raises:
        ValueError: An argument has the wrong shape.
        ImportError: sacrebleu is missing.
    """
    check_outputs(outputs)
    check_references(references, len(outputs))
    score = _chrf(references)
    found = []
    for row, texts in zip(outputs, references, strict=True):
        different = list(dict.fromkeys(texts))
        scores = np.array([[score(output, [reference]) for reference in different] for output in dict.fromkeys(row)])
        closest = (scores == scores.max(axis=1, keepdims=True)) & (scores > 0)
        found.append(closest.any(axis=0).mean())
    return np.array(found, dtype=np.float64)


def leave_one_out_bleu(
    references: Sequence[Sequence[str]], outputs: Sequence[Sequence[str]] | None = None
) -> np.ndarray:
    """Sentence BLEU with one reference left out: what people reach, and what compares with it (after Shen et al. 2019).

    Without `outputs`, the mean over the references of an input of the BLEU of one against the others: the human ceiling. With
    them, the mean over outputs and left-out references of the BLEU of an output against the references that remain, as many as
    a human was compared with.

    Args:
        references (`list[list[str]]`): The texts of each of N inputs.
        outputs (`list[list[str]]`, *optional*): K texts for each input.

    Returns:
        `np.ndarray`: float64 of shape (N,), 0 to 100; NaN for inputs with a single reference. Sentence BLEU as in `quality`.

    Raises:
        ValueError: An argument has the wrong shape.
        ImportError: sacrebleu is missing.
    """
    check_references(references)
    if outputs is not None:
        check_outputs(outputs)
        check_references(references, len(outputs))
    score = _bleu(references)
    found = np.full(len(references), np.nan)
    for n, texts in enumerate(references):
        if len(texts) > 1:
            judged = [[text] for text in texts] if outputs is None else [outputs[n]] * len(texts)
            found[n] = np.mean(
                [score(text, [*texts[:i], *texts[i + 1 :]]) for i, row in enumerate(judged) for text in row]
            )
    return found


def _check_metrics(metrics: Sequence[str], known: tuple[str, ...]) -> None:
    for name in [metrics] if isinstance(metrics, str) else metrics:
        if isinstance(metrics, str) or name not in known:
            raise ValueError(f"`metrics` is {metrics!r}: give a list of some of {list(known)}.")


def _table(score: Score, outputs: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> np.ndarray:
    """float64 of shape (N, K)."""
    rows = [[score(output, texts) for output in row] for row, texts in zip(outputs, references, strict=True)]
    return np.array(rows, dtype=np.float64)


# Each of these makes a `Score`; what it needs to know of all references, it learns from `references`.


def _bleu(references: Sequence[Sequence[str]]) -> Score:
    scorer = required("sacrebleu").BLEU(effective_order=True)
    return lambda output, texts: scorer.sentence_score(output, texts).score


def _chrf(references: Sequence[Sequence[str]]) -> Score:
    scorer = required("sacrebleu").CHRF()
    return lambda output, texts: scorer.sentence_score(output, texts).score


def _rouge_l(references: Sequence[Sequence[str]]) -> Score:
    tokenizer = SimpleNamespace(tokenize=functools.cache(words))
    scorer = required("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=tokenizer)
    return lambda output, texts: scorer.score_multi(texts, output)["rougeL"].fmeasure


def _cider_d(references: Sequence[Sequence[str]]) -> Score:
    if len(references) == 1:
        return lambda output, texts: float("nan")
    vector = functools.cache(DocumentFrequencies(references).vector)
    return lambda output, texts: cider_d(vector(output), [vector(text) for text in texts])


def _meteor(references: Sequence[Sequence[str]]) -> Score:
    meteor_score = required("nltk.translate.meteor_score").meteor_score
    stemmer = SimpleNamespace(stem=functools.cache(required("nltk.stem.porter").PorterStemmer().stem))
    # WordNet is data that nltk would download; without synonyms, a word is like none but itself.
    wordnet = SimpleNamespace(synsets=lambda word: [])
    tokens = functools.cache(words)
    return lambda output, texts: meteor_score(
        [tokens(text) for text in texts], tokens(output), preprocess=str, stemmer=stemmer, wordnet=wordnet
    )


def _exact_match(references: Sequence[Sequence[str]]) -> Score:
    return lambda output, texts: float(output.split() in [text.split() for text in texts])


_SCORES: dict[str, Callable[[Sequence[Sequence[str]]], Score]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge_l": _rouge_l,
    "cider_d": _cider_d,
    "meteor": _meteor,
    "exact_match": _exact_match,
}
