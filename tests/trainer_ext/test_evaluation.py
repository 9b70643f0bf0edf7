"""Quality, diversity, specialisation and intervals: plain loops, properties, bad input."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from trainer_ext.evaluation import (
    QUALITY_METRICS,
    agreement,
    assignment_entropy,
    best_mean_worst,
    bootstrap,
    bootstrap_difference,
    characteristic_words,
    corpus_quality,
    coverage,
    diversity,
    leave_one_out_bleu,
    quality,
    samples_won,
    semantic_diversity,
    stability,
)
from trainer_ext.evaluation.words import words


REFERENCES = [
    ["a man rides a brown horse on the beach", "a person on a horse near the sea"],
    ["two dogs play with a ball in the park", "dogs run after a red ball", "two dogs in the grass"],
    ["a bowl of soup with bread"],
    ["a man stands on a bridge over the river at night", "night view of a bridge", "a man on a bridge"],
]
OUTPUTS = [
    ["a man on a horse on the beach", "a horse", "a man rides a brown horse on the beach"],
    ["two dogs play in the park with a red ball", "dogs dogs dogs dogs dogs dogs", "a cat"],
    ["soup", "a bowl of soup with bread and a glass of water on the table", "a bowl of soup with bread"],
    ["a man on a bridge at night over the river", "night", "the city at night"],
]
TEXTS = st.text(alphabet="ab éß日,. ", max_size=12)


def tables(least=1, most=4):
    """N inputs with K outputs each."""
    return st.integers(least, most).flatmap(
        lambda count: st.lists(st.lists(TEXTS, min_size=count, max_size=count), min_size=2, max_size=4)
    )


def test_quality_by_hand():
    found = quality(OUTPUTS, REFERENCES)
    assert set(found) == set(QUALITY_METRICS)
    bleu, chrf = sacrebleu.BLEU(effective_order=True), sacrebleu.CHRF()
    for n, k in itertools.product(range(4), range(3)):
        output, texts = OUTPUTS[n][k], REFERENCES[n]
        assert found["bleu"][n, k] == pytest.approx(bleu.sentence_score(output, texts).score)
        assert found["chrf"][n, k] == pytest.approx(max(chrf.sentence_score(output, [text]).score for text in texts))
        assert found["exact_match"][n, k] == float(output in texts)
        assert found["rouge_l"][n, k] == pytest.approx(max(rouge_by_hand(output, text) for text in texts))
    # A text that is its own reference: one chunk, so hardly any penalty.
    assert found["meteor"][2, 2] > 0.98
    assert found["meteor"][1, 2] < 0.2


def rouge_by_hand(output, reference):
    a, b = output.split(), reference.split()
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, j in itertools.product(range(len(a)), range(len(b))):
        table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1], table[i + 1][j])
    return 2 * table[-1][-1] / (len(a) + len(b))


def test_best_mean_worst_and_the_corpus():
    scores = quality(OUTPUTS, REFERENCES, ["bleu"])["bleu"]
    found = best_mean_worst(scores)
    for n, row in enumerate(scores.tolist()):
        assert [found[name][n] for name in ("best", "mean", "worst")] == pytest.approx(
            [max(row), sum(row) / 3, min(row)]
        )
    chosen = [row[int(np.argmax(score))] for row, score in zip(OUTPUTS, scores, strict=True)]
    streams = [[row[i] if i < len(row) else None for row in REFERENCES] for i in range(3)]
    corpus = corpus_quality(OUTPUTS, REFERENCES)["bleu"]
    assert corpus["best"] == pytest.approx(sacrebleu.BLEU().corpus_score(chosen, streams).score)
    second = sacrebleu.BLEU().corpus_score([row[1] for row in OUTPUTS], streams).score
    assert corpus["hypotheses"][1] == pytest.approx(second)


def test_coverage_and_leave_one_out():
    # The first output is nearest to the third reference, the others to the second.
    assert coverage([["a man on a bridge", "night view", "night"]], [REFERENCES[3]]).tolist() == pytest.approx([2 / 3])
    assert coverage([["zzz"]], [["aaa", "bbb"]]).tolist() == [0.0]
    found = leave_one_out_bleu(REFERENCES)
    bleu = sacrebleu.BLEU(effective_order=True)
    for n, texts in enumerate(REFERENCES):
        if len(texts) == 1:
            assert math.isnan(found[n])
            continue
        rest = [texts[:i] + texts[i + 1 :] for i in range(len(texts))]
        each = [bleu.sentence_score(text, others).score for text, others in zip(texts, rest, strict=True)]
        assert found[n] == pytest.approx(sum(each) / len(each))
        outputs = [[bleu.sentence_score(text, others).score for text in OUTPUTS[n]] for others in rest]
        assert leave_one_out_bleu(REFERENCES, OUTPUTS)[n] == pytest.approx(np.mean(outputs))


def test_diversity_by_hand():
    found = diversity(OUTPUTS, REFERENCES)
    for n, row in enumerate(OUTPUTS):
        tokens = [text.split() for text in row]
        total = sum(map(len, tokens))
        assert found["div_1"][n] == pytest.approx(len({word for text in tokens for word in text}) / total)
        pairs = {pair for text in tokens for pair in itertools.pairwise(text)}
        assert found["div_2"][n] == pytest.approx(len(pairs) / total)
        bleu = sacrebleu.BLEU(effective_order=True)
        scores = [bleu.sentence_score(one, [other]).score for one, other in itertools.permutations(row, 2)]
        assert found["pairwise_bleu"][n] == pytest.approx(sum(scores) / 6)
        assert found["self_cider"][n] == pytest.approx(self_cider_by_hand(row))


def self_cider_by_hand(row):
    def weights(text, order):
        tokens = text.split()
        counts = Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))
        documents = {
            ngram: sum(any(" ".join(ngram) in f" {ref} " and has(ref, ngram) for ref in refs) for refs in REFERENCES)
            for ngram in counts
        }
        return {ngram: n * math.log(4 / max(1, documents[ngram])) for ngram, n in counts.items()}

    def has(text, ngram):
        tokens = text.split()
        return any(tuple(tokens[i : i + len(ngram)]) == ngram for i in range(len(tokens)))

    def cosine(one, other):
        values = []
        for order in range(1, 5):
            a, b = weights(one, order), weights(other, order)
            norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
            values.append(sum(a[g] * b.get(g, 0) for g in a) / norm if norm else 0.0)
        return sum(values) / 4

    kernel = np.array([[cosine(one, other) for other in row] for one in row])
    roots = np.sqrt(np.clip(np.linalg.eigvalsh(kernel), 0, None))
    return -math.log(roots.max() / roots.sum()) / math.log(len(row))


def test_semantic_diversity_by_hand():
    vectors = {text: np.random.default_rng(len(text)).normal(size=5) for row in OUTPUTS for text in row}
    asked = []

    def embed(texts):
        asked.extend(texts)
        return np.stack([vectors[text] for text in texts])

    found = semantic_diversity(OUTPUTS, embed)
    assert len(asked) == len(set(asked))
    for n, row in enumerate(OUTPUTS):
        units = [vectors[text] / np.linalg.norm(vectors[text]) for text in row]
        each = [1 - float(one @ other) for one, other in itertools.combinations(units, 2)]
        assert found[n] == pytest.approx(sum(each) / 3)
    assert np.isnan(semantic_diversity([["one"]], embed)).all()
    with pytest.raises(ValueError, match="`embed` returned"):
        semantic_diversity(OUTPUTS, lambda texts: np.zeros((1, 3)))


@settings(deadline=None, max_examples=25)
@given(outputs=tables(2), data=st.data())
def test_properties_of_outputs(outputs, data):
    references = [data.draw(st.lists(TEXTS, min_size=1, max_size=3)) for _ in outputs]
    order = data.draw(st.permutations(range(len(outputs[0]))))
    turned = [[row[k] for k in order] for row in outputs]
    for name, scores in quality(outputs, references).items():
        assert scores.shape == (len(outputs), len(order))
        assert (scores >= 0).all(), name
        np.testing.assert_allclose(scores[:, order], quality(turned, references, [name])[name], atol=1e-9)
    first, second = diversity(outputs, references), diversity(turned, references)
    for name in first:
        # Of equal eigenvalues and rounding: the same but for the last digits.
        np.testing.assert_allclose(first[name], second[name], atol=1e-6, err_msg=name)
    assert ((coverage(outputs, references) >= 0) & (coverage(outputs, references) <= 1)).all()
    same = [[row[0]] * 3 for row in outputs]
    alike = diversity(same, references)
    assert alike["self_cider"].tolist() == [0.0] * len(outputs)
    assert alike["distinct"].tolist() == pytest.approx([1 / 3] * len(outputs))
    assert alike["pairwise_bleu"].tolist() == [100.0] * len(outputs)


def test_one_output_has_no_diversity_of_pairs():
    found = diversity([["a b"], ["c"]])
    assert np.isnan(found["mbleu_4"]).all()
    assert found["distinct"].tolist() == [1.0, 1.0]


def test_words_of_other_languages():
    assert words("L'été, déjà 2 fois!") == ["l", "été", "déjà", "2", "fois"]
    assert words("日本 ok") == ["日", "本", "ok"]
    assert quality([["Straße über"], ["x"]], [["Straße über"], ["y"]], ["rouge_l"])["rouge_l"][0, 0] == 1.0


def test_agreement_entropy_stability():
    modes, winners = ["x", "x", "y", "y", "y"], np.array([0, 0, 2, 2, 0])
    found = agreement(modes, winners, 3)
    assert found["purity"] == pytest.approx(4 / 5)
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(modes, winners))
    assert found["matrix"] == {"x": [2, 0, 0], "y": [1, 0, 2]}
    assert assignment_entropy([0.5, 0.5, 0.0]) == pytest.approx(math.log(2))
    assert assignment_entropy([1.0]) == 0.0
    assert stability([0, 1, 1, 2], [0, 1, 2, 2]) == 0.75


def test_characteristic_words():
    texts = ["der Hund und die Katze", "der Baum", "le chien et le chat", "le bois"]
    found = characteristic_words(texts, [0, 0, 1, 1], 3, top=2)
    assert found[0][0][0] == "der"
    assert found[1][0][0] == "le"
    assert found[2] == []
    # By hand for "le": 3 of its own 7 words and 0 of the other 7, with a prior of the frequencies over 3.
    prior = {word: count / 3 for word, count in Counter(word for text in texts for word in words(text)).items()}
    total = sum(prior.values())
    mine, theirs = 3 + prior["le"], 0 + prior["le"]
    log_odds = math.log(mine / (7 + total - mine)) - math.log(theirs / (7 + total - theirs))
    assert found[1][0][1] == pytest.approx(log_odds / math.sqrt(1 / mine + 1 / theirs))


def test_samples_won():
    scores = np.array([[-1.0, -9.0], [-5.0, -2.0], [-4.0, -1.5], [-3.0, -2.9]])
    found = samples_won(["a", "b", "c", "d"], [0, 1, 1, 1], scores, count=2, clearest=True)
    assert [sample.text for sample in found[0]] == ["a"]
    assert [sample.text for sample in found[1]] == ["b", "c"]
    assert found[1][0].margin == pytest.approx(3.0)
    drawn = samples_won(["a", "b", "c", "d"], [0, 1, 1, 1], scores, count=2, seed=1)
    assert drawn == samples_won(["a", "b", "c", "d"], [0, 1, 1, 1], scores, count=2, seed=1)


def test_intervals():
    values = np.random.default_rng(0).normal(loc=3.0, size=400)
    found = bootstrap(values)
    assert found.estimate == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)
    assert found == bootstrap(values)
    # Seeds that differ make it wider, and pairs narrower than what the two alone would say.
    assert bootstrap(np.stack([values, values + 1])).high - found.high > 0.5
    other = values + np.random.default_rng(1).normal(scale=0.1, size=400)
    difference = bootstrap_difference(other, values)
    assert difference.high - difference.low < 0.2 * (found.high - found.low)
    assert math.isnan(bootstrap(np.array([1.0])).low)
    # The short way of means draws what the long one does.
    for table in (values, np.stack([values, values**2])):
        long = bootstrap(table, statistic=lambda drawn: float(drawn.mean()), resamples=50)
        assert bootstrap(table, resamples=50) == pytest.approx(long)
    doubled = bootstrap(values, statistic=lambda drawn: 2 * float(np.median(drawn)))
    assert doubled.estimate == pytest.approx(2 * np.median(values))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quality([["a", "b"], ["c"]], [["a"], ["c"]]), "`outputs` has 1 texts for input 1"),
        (lambda: quality([["a"]], [[]]), r"`references\[0\]` is empty"),
        (lambda: quality([["a"]], [["a"], ["b"]]), "`references` has 2 inputs, but `outputs` has 1"),
        (lambda: quality(["a"], [["a"]]), r"`outputs\[0\]` is 'a', not a list of texts"),
        (lambda: quality([["a"]], [["a"]], ["blue"]), "`metrics` is"),
        (lambda: quality([[None]], [["a"]]), r"`outputs\[0\]\[0\]` is None, not a text"),
        (lambda: best_mean_worst(np.zeros(3)), r"`scores` has the shape \(3,\)"),
        (lambda: agreement(["a"], [3], 2), r"`winners\[0\]` is 3, but there are 2 hypotheses"),
        (lambda: stability([0, 1], [0]), "`winners_after` has 1 entries for 2 sequences"),
        (lambda: assignment_entropy([0.5, 0.2]), "`shares` is"),
        (lambda: samples_won(["a"], [0], [[math.nan]]), "`scores` has the shape"),
        (lambda: characteristic_words(["a"], [0], 1, top=-1), "`top` is -1"),
        (lambda: bootstrap(np.array([1.0, math.nan])), "`values` is NaN for 1 of 2 inputs"),
        (lambda: bootstrap(np.zeros(3), confidence=95), "`confidence` is 95"),
        (lambda: bootstrap_difference(np.zeros(3), np.zeros(2)), "`first` has 3 inputs and `second` 2"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-mcl\[evaluation\]'"):
        quality([["a"]], [["a"]], ["bleu"])
