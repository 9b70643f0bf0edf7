"""How different K outputs of one input are. Diversity alone is worth nothing (noise is diverse): read it beside `quality`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trainer_ext.evaluation.checks import check_outputs, check_references, required
from trainer_ext.evaluation.cider import DocumentFrequencies, cosine
from trainer_ext.evaluation.words import ngrams, words


def diversity(
    outputs: Sequence[Sequence[str]], references: Sequence[Sequence[str]] | None = None
) -> dict[str, np.ndarray]:
    """How different the outputs of each input are, by their words.

    Figures about pairs are NaN where there is one output (K = 1). Two outputs without any word count as equal.

    Args:
        outputs (`list[list[str]]`): K texts for each of N inputs, K the same for all.
        references (`list[list[str]]`, *optional*): Texts of each input for the document frequencies of `self_cider`, as in the
            literature. Without them the outputs themselves serve, and figures of different methods compare less well.

    Returns:
        `dict[str, np.ndarray]`: For each metric, float64 of shape (N,); words are those of `words`:

        - `div_1`, `div_2`, more is more diverse: different words, or pairs of adjacent ones, of all K outputs, over the number of
          words of all K (of words for both, as Shetty et al. 2017, arXiv 1703.10476, and image captioning since). 0 without words;
        - `mbleu_4`, 0 to 1, less is more diverse: mean over the outputs of the BLEU-4 of one against the K - 1 others (Shetty et al.),
          unsmoothed. Captioning reports the corpus figure, see `corpus_diversity`. Orders longer than the output are left out;
        - `pairwise_bleu`, 0 to 100, less is more diverse: mean over ordered pairs of sacrebleu's sentence BLEU, as in `quality`;
        - `distinct`, 1 / K to 1: different outputs over K, white space apart;
        - `self_cider`, 0 to 1, more is more diverse (Wang and Chan 2019, CVPR): -log_K of sqrt(largest) / sum of sqrt(all) of the
          eigenvalues of the K x K matrix of CIDEr between outputs. It is the paper's cosine, not the CIDEr-D of its program, whose
          matrix is not symmetric. Each input is one document. NaN also if all n-grams weigh nothing, as with one document.

    Raises:
        ValueError: An argument has the wrong shape.
        ImportError: sacrebleu is missing.
    """
    count = check_outputs(outputs)
    if references is not None:
        check_references(references, len(outputs))
    frequencies = DocumentFrequencies(outputs if references is None else references)
    found = {
        "div_1": [_div(row, 1) for row in outputs],
        "div_2": [_div(row, 2) for row in outputs],
        "mbleu_4": [math.nan] * len(outputs),
        "pairwise_bleu": [math.nan] * len(outputs),
        "distinct": [len({_squeezed(text) for text in row}) / count for row in outputs],
        "self_cider": [math.nan] * len(outputs),
    }
    if count > 1:
        library = required("sacrebleu")
        against_rest = library.BLEU(tokenize="none", smooth_method="none", effective_order=True)
        against_one = library.BLEU(effective_order=True)
        found["mbleu_4"] = [_mbleu(row, against_rest) for row in outputs]
        found["pairwise_bleu"] = [_pairwise_bleu(row, against_one) for row in outputs]
        found["self_cider"] = [_self_cider(row, frequencies) for row in outputs]
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def corpus_diversity(outputs: Sequence[Sequence[str]]) -> dict[str, float]:
    """The figures of a whole set of inputs that papers report, which are no means of those of `diversity`.

    Args:
        outputs (`list[list[str]]`): K texts for each of N inputs; text k is hypothesis k's.

    Returns:
        `dict[str, float]`: `mbleu_4`, 0 to 1: mean over k of the corpus BLEU-4 of outputs k against the K - 1 others of their inputs,
        unsmoothed, on the words of `words` (Shetty et al. 2017, arXiv 1703.10476). `pairwise_bleu`, 0 to 100: sacrebleu's corpus
        BLEU over all ordered pairs of outputs of an input (Shen et al. 2019, arXiv 1902.07816). NaN for K = 1. `vocabulary`: the
        number of different words in all outputs.

    Raises:
        ValueError: `outputs` has the wrong shape.
        ImportError: sacrebleu is missing.
    """
    count = check_outputs(outputs)
    tokens = [[words(text) for text in row] for row in outputs]
    found = {"mbleu_4": math.nan, "pairwise_bleu": math.nan}
    if count > 1:
        library = required("sacrebleu")
        streams = [[" ".join(row[k]) for row in tokens] for k in range(count)]
        against_rest = library.BLEU(tokenize="none", smooth_method="none")
        scores = [against_rest.corpus_score(streams[k], streams[:k] + streams[k + 1 :]).score for k in range(count)]
        found["mbleu_4"] = sum(scores) / count / 100
        pairs = [(one, other) for row in outputs for i, one in enumerate(row) for other in (*row[:i], *row[i + 1 :])]
        hypotheses, against = zip(*pairs, strict=True)
        found["pairwise_bleu"] = library.BLEU().corpus_score(hypotheses, [against]).score
    return {**found, "vocabulary": float(len({word for row in tokens for text in row for word in text}))}


def semantic_diversity(outputs: Sequence[Sequence[str]], embed: Callable[[list[str]], np.ndarray]) -> np.ndarray:
    """Mean distance of the outputs of each input in meaning: over their pairs, 1 - cosine of sentence embeddings.

    Args:
        outputs (`list[list[str]]`): K texts for each of N inputs.
        embed: A sentence-embedding model: called once with all M different texts, returns real numbers of shape (M, d).

    Returns:
        `np.ndarray`: float64 of shape (N,), 0 (same direction) to 2; NaN for K = 1.

    Raises:
        ValueError: `outputs` has the wrong shape, or `embed` returns another shape, NaN, or a zero vector.
    """
    count = check_outputs(outputs)
    if count == 1:
        return np.full(len(outputs), np.nan)
    rows = {text: i for i, text in enumerate(dict.fromkeys(text for row in outputs for text in row))}
    vectors = np.asarray(embed(list(rows)), dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) != len(rows):
        raise ValueError(
            f"`embed` returned the shape {vectors.shape} for {len(rows)} texts: return one vector for each."
        )
    norms = np.linalg.norm(vectors, axis=1)
    useless = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if len(useless):
        raise ValueError(
            f"`embed` returned a vector of norm {norms[useless[0]]} for {list(rows)[useless[0]]!r}, which has no direction: leave "
            "such texts out, or embed them as something."
        )
    units = vectors / norms[:, None]
    of_input = units[[[rows[text] for text in row] for row in outputs]]
    # The sum over ordered pairs of u_i . u_j is |sum u_i|^2 - K, for unit vectors.
    pairs = np.square(of_input.sum(axis=1)).sum(axis=1) - count
    return 1 - pairs / (count * (count - 1))


def _squeezed(text: str) -> str:
    """The text with single spaces."""
    return " ".join(text.split())


def _div(row: Sequence[str], order: int) -> float:
    tokens = [words(text) for text in row]
    different = {ngram for text in tokens for ngram in ngrams(text, order)}
    return len(different) / max(1, sum(map(len, tokens)))


def _mbleu(row: Sequence[str], bleu: Any) -> float:
    texts = [" ".join(words(text)) for text in row]
    rest = [texts[:i] + texts[i + 1 :] for i in range(len(texts))]
    return sum(_bleu(text, others, bleu) for text, others in zip(texts, rest, strict=True)) / len(texts) / 100


def _pairwise_bleu(row: Sequence[str], bleu: Any) -> float:
    texts = [_squeezed(text) for text in row]
    pairs = [(one, other) for i, one in enumerate(texts) for other in texts[:i] + texts[i + 1 :]]
    return sum(_bleu(one, [other], bleu) for one, other in pairs) / len(pairs)


def _bleu(text: str, references: list[str], bleu: Any) -> float:
    """Sentence BLEU, 0 to 100; 100 for a text that is among its references, also for an empty one, for which sacrebleu gives 0."""
    return 100.0 if text in references else bleu.sentence_score(text, references).score


def _self_cider(row: Sequence[str], frequencies: DocumentFrequencies) -> float:
    if len({tuple(words(text)) for text in row}) == 1:
        return 0.0
    vectors = [frequencies.vector(text) for text in row]
    kernel = np.array([[cosine(one, other) for other in vectors] for one in vectors])
    # Rounding makes zeros of a singular kernel slightly negative.
    roots = np.sqrt(np.clip(np.linalg.eigvalsh(kernel), 0, None))
    return float(-np.log(roots[-1] / roots.sum()) / np.log(len(row))) if roots[-1] > 0 else math.nan
