"""CIDEr-D, mBLEU-4 and self-CIDEr against the figures of pycocoevalcap, which published_figures.py has written down."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trainer_ext.evaluation import corpus_diversity, diversity, quality


@pytest.fixture(scope="module")
def published():
    return json.loads(Path(__file__).with_name("published_figures.json").read_text(encoding="utf-8"))


def test_cider_d_of_several_references_lengths_and_languages(published):
    found = quality(published["outputs"], published["references"], ["cider_d"])["cider_d"]
    np.testing.assert_allclose(found.T, published["cider_d"], atol=1e-12)


def test_mbleu_4_of_the_corpus_and_of_each_input(published):
    found = corpus_diversity(published["outputs"])["mbleu_4"]
    assert found == pytest.approx(np.mean(published["bleu_4"]), abs=1e-8)
    # pycocoevalcap adds 1e-15 to counts of 0, whose fourth root is not that small.
    each = diversity(published["outputs"])["mbleu_4"]
    np.testing.assert_allclose(each, np.mean(published["sentence_bleu_4"], axis=0), atol=2e-4)
    assert each[3] > 0.2


def test_self_cider_where_clipping_and_lengths_change_nothing(published):
    found = diversity(published["even_outputs"])["self_cider"]
    np.testing.assert_allclose(found, published["self_cider"], atol=1e-9)
