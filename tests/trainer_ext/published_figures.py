"""Writes published_figures.json: what pycocoevalcap says of the texts below. Run it to make the file again; tests only read it.

pycocoevalcap is a wheel of 100 MB, and no dependency of the project. In an environment of its own (pycocoevalcap 1.2, numpy 2.4.6,
Python 3.11; its tokeniser, which needs Java, is not used: the texts are in lower case and without punctuation):

    python -m venv golden && golden/bin/pip install pycocoevalcap==1.2 numpy==2.4.6
    golden/bin/python tests/trainer_ext/published_figures.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.cider.cider_scorer import CiderScorer


# Texts of four words and more: pycocoevalcap gives shorter ones a BLEU of its tiny constants.
OUTPUTS = [
    [
        "a brown dog runs over the wet grass",
        "the dog the dog runs and runs again",
        "an animal is playing outside in the rain today with a very small red ball",
    ],
    [
        "two people ride their bikes along the river",
        "two people ride their bikes along the river",
        "people ride along a river on bikes",
    ],
    ["rain falls on a tin roof", "water drips down from the old roof", "a storm is passing over the small house"],
    ["un élève lit près de la fenêtre", "une élève écrit près de la fenêtre ouverte", "la fenêtre est ouverte"],
    ["a man speaks while birds sing", "birds sing and a man speaks to a dog", "a a a a a"],
]
REFERENCES = [
    ["a dog runs across the wet grass", "the brown dog is running through grass in the rain", "dog runs"],
    ["two people ride bikes by the river"],
    ["rain is falling on a metal roof", "heavy rain hits a tin roof while a storm is passing"],
    ["un élève lit un livre près de la fenêtre ouverte", "l élève lit"],
    ["a man is speaking and birds are singing", "birds sing while a man speaks", "a man speaks", "birds"],
]
# Equally many words and none twice, so that pycocoevalcap's clipping changes nothing and CIDEr-D is the cosine.
EVEN_OUTPUTS = [
    ["a dog runs over wet grass", "the dog sleeps on wet grass", "birds sing while a man speaks"],
    ["two people ride along the river", "two people walk along the river", "people ride bikes by a river"],
    ["rain falls on the tin roof", "rain falls on a metal roof", "water drips from an old roof"],
]


def cider_d() -> list[list[float]]:
    """Of hypothesis k of every input, for each k: (K, N)."""
    references = dict(enumerate(REFERENCES))
    rows = [{n: [row[k]] for n, row in enumerate(OUTPUTS)} for k in range(len(OUTPUTS[0]))]
    return [Cider().compute_score(references, row)[1].tolist() for row in rows]


def bleu_against_the_others() -> tuple[list[float], list[list[float]]]:
    """BLEU-4 of output k against those of the same input: of the corpus (K,), of each input (K, N)."""
    corpus, sentences = [], []
    for k in range(len(OUTPUTS[0])):
        rest = {n: row[:k] + row[k + 1 :] for n, row in enumerate(OUTPUTS)}
        score, scores = Bleu(4).compute_score(rest, {n: [row[k]] for n, row in enumerate(OUTPUTS)}, verbose=0)
        corpus.append(float(score[3]))
        sentences.append([float(value) for value in scores[3]])
    return corpus, sentences


def self_cider() -> list[float]:
    """Of each input of EVEN_OUTPUTS, which are the documents: the eigenvalues of CIDEr over 10, as Wang and Chan take them."""
    documents = CiderScorer()
    for row in EVEN_OUTPUTS:
        documents += (row[0], row)
    documents.compute_doc_freq()
    found = []
    for row in EVEN_OUTPUTS:
        kernel = np.zeros((3, 3))
        for i in range(3):
            # As many pairs as documents, whose number is that of the pairs to the scorer.
            scorer = CiderScorer()
            for other in row:
                scorer += (row[i], [other])
            scorer.document_frequency = documents.document_frequency
            kernel[i] = np.array(scorer.compute_cider()) / 10
        roots = np.sqrt(np.linalg.eigvalsh(kernel))
        found.append(float(-np.log(roots.max() / roots.sum()) / np.log(3)))
    return found


if __name__ == "__main__":
    bleu, sentence_bleu = bleu_against_the_others()
    figures = {
        "outputs": OUTPUTS,
        "references": REFERENCES,
        "even_outputs": EVEN_OUTPUTS,
        "cider_d": cider_d(),
        "bleu_4": bleu,
        "sentence_bleu_4": sentence_bleu,
        "self_cider": self_cider(),
    }
    text = json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
    Path(__file__).with_name("published_figures.json").write_text(text, encoding="utf-8")
