"""CIDEr and CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726): n-grams weighted by how few documents they occur in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from trainer_ext.evaluation.words import ngrams, words


ORDERS = (1, 2, 3, 4)
# The width, in words, of the Gaussian by which CIDEr-D punishes a difference in length.
SIGMA = 6.0


class Vector(NamedTuple):
    """A text: for each order its n-grams' weights (term frequency times inverse document frequency) and their norm."""

    weights: list[dict[tuple[str, ...], float]]
    norms: list[float]
    length: int


class DocumentFrequencies:
    """In how many documents each n-gram occurs.

    Args:
        documents (iterable of sequences of `str`): The texts of each document; one document for each input, made of all its
            references, for the usual CIDEr. An n-gram in every document weighs nothing, so that one document alone weighs
            nothing at all.
    """

    def __init__(self, documents: Iterable[Sequence[str]]) -> None:
        self._counts: Counter[tuple[str, ...]] = Counter()
        self.num_documents = 0
        for texts in documents:
            self.num_documents += 1
            tokens = [words(text) for text in texts]
            self._counts.update({ngram for text in tokens for order in ORDERS for ngram in ngrams(text, order)})

    def vector(self, text: str) -> Vector:
        """The weights of a text. An n-gram that no document has weighs as much as one that a single document has."""
        tokens = words(text)
        weights = [
            {ngram: count * self._inverse(ngram) for ngram, count in ngrams(tokens, order).items()} for order in ORDERS
        ]
        norms = [math.sqrt(sum(weight**2 for weight in of_order.values())) for of_order in weights]
        return Vector(weights, norms, len(tokens))

    def _inverse(self, ngram: tuple[str, ...]) -> float:
        return math.log(self.num_documents) - math.log(max(1, self._counts[ngram]))


def cider_d(output: Vector, references: Sequence[Vector]) -> float:
    """CIDEr-D of one output, from 0 to 10: the mean over its references, n-gram counts clipped, other lengths punished."""
    similarities = []
    for reference in references:
        penalty = math.exp(-((output.length - reference.length) ** 2) / (2 * SIGMA**2))
        for mine, theirs, *norms in zip(output.weights, reference.weights, output.norms, reference.norms, strict=True):
            product = sum(min(mine[ngram], theirs[ngram]) * theirs[ngram] for ngram in mine.keys() & theirs.keys())
            similarities.append(_ratio(product, *norms) * penalty)
    return 10 * sum(similarities) / len(similarities)


def cosine(one: Vector, other: Vector) -> float:
    """CIDEr of two texts, from 0 to 1: the mean over the orders of the cosine of their weights. Symmetric, a kernel."""
    cosines = []
    for mine, theirs, *norms in zip(one.weights, other.weights, one.norms, other.norms, strict=True):
        cosines.append(_ratio(sum(mine[ngram] * theirs[ngram] for ngram in mine.keys() & theirs.keys()), *norms))
    return sum(cosines) / len(cosines)


def _ratio(product: float, one: float, other: float) -> float:
    """A product over two norms, 0 for texts too short for an n-gram and for those whose n-grams weigh nothing."""
    return product / (one * other) if product else 0.0
