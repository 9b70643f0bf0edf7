"""Tests of the Markov chains: the theory against the paper's figures and brute force, the samples against the theory."""

from __future__ import annotations

import json
import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.data import markov


# Of the paper, in nats per token: the optimum of one model, and the band for two hypotheses.
PAPER = {"transition1": (0.5293, 0.5069, 0.5081), "transition2": (0.5751, 0.5527, 0.5535)}


@pytest.mark.parametrize("name", sorted(PAPER))
def test_theory_has_the_papers_figures(name):
    theory = markov.theory(markov.CHAINS[name])
    # The paper gives four digits, some cut off and some rounded.
    assert (theory.mixture, theory.lowest, theory.rate) == pytest.approx(PAPER[name], abs=1e-4)
    assert theory.lowest <= theory.winners <= theory.chains <= theory.mixture


def step_log(states: tuple[int, ...], chain: markov.Chain) -> float:
    matrix = [[1 - chain[0], chain[0]], [chain[1], 1 - chain[1]]]
    probability = math.prod(matrix[a][b] for a, b in pairwise(states))
    return math.log(probability) if probability else -math.inf


@pytest.mark.parametrize(
    ("chains", "priors"),
    [
        (markov.TRANSITION1, None),
        (markov.TRANSITION2, [0.9, 0.1]),
        (markov.CHAINS["three"], [5, 3, 2]),
        (((0.0, 0.5), (1.0, 0.5)), None),  # steps that never happen
        (((0.3, 0.4), (0.3, 0.4)), None),  # the same chain twice
    ],
    ids=["two", "unequal", "three", "impossible", "same"],
)
def test_theory_is_that_of_all_sequences(chains, priors):
    length = 7
    weights = np.ones(len(chains)) if priors is None else np.array(priors)
    weights = weights / weights.sum()
    mixture = given = winners = purity = 0.0
    for states in product((0, 1), repeat=length):
        logs = [step_log(states, chain) for chain in chains]
        joint = [0.5 * weight * math.exp(log) for weight, log in zip(weights, logs, strict=True)]
        total, best = sum(joint), max(logs)
        if total:
            mixture -= total * math.log(2 * total)  # the first state is given
            given -= sum(share * log for share, log in zip(joint, logs, strict=True) if share)
            winners -= total * best
            tied = [share for share, log in zip(joint, logs, strict=True) if log > best - 1e-9]
            purity += sum(tied) / len(tied)
    theory = markov.theory(chains, priors, length)
    steps = length - 1
    assert theory.mixture == pytest.approx(mixture / steps, rel=1e-12)
    assert theory.chains == pytest.approx(given / steps, rel=1e-12)
    assert theory.winners == pytest.approx(winners / steps, rel=1e-12)
    assert theory.purity == pytest.approx(purity, rel=1e-12)
    assert theory.lowest == pytest.approx((mixture - math.log(len(chains))) / steps, rel=1e-12)


def test_entropy_rate_is_where_long_sequences_arrive():
    shorter, longer = (markov.theory([(0.2, 0.9)], length=length) for length in (40, 41))
    assert shorter.mixture != pytest.approx(shorter.rate, rel=1e-3)
    assert longer.mixture * 40 - shorter.mixture * 39 == pytest.approx(longer.rate, rel=1e-9)
    assert markov.theory([(0.0, 0.0)]).rate == markov.theory([(0.0, 0.0)]).mixture == 0


def test_samples_are_those_of_the_chains():
    chains, priors = markov.CHAINS["three"], [0.5, 0.3, 0.2]
    states, chain = markov.sample(chains, priors, 6_000, seed=1)
    assert states.shape == (6_000, markov.LENGTH)
    assert np.bincount(chain) / 6_000 == pytest.approx(priors, abs=0.03)
    for k, (p, q) in enumerate(chains):
        own = states[chain == k]
        before, after = own[:, :-1], own[:, 1:]
        assert own[:, 0].mean() == pytest.approx(0.5, abs=0.05)
        assert (after[before == 0] == 1).mean() == pytest.approx(p, abs=0.02)
        assert (after[before == 1] == 0).mean() == pytest.approx(q, abs=0.02)
    # Their likelihood is what the theory says.
    logs = np.array([[step_log(tuple(row), c) for c in chains] for row in states[:2000].tolist()])
    theory = markov.theory(chains, priors)
    assert -logs.max(1).mean() / (markov.LENGTH - 1) == pytest.approx(theory.winners, abs=0.01)
    assert (logs.argmax(1) == chain[:2000]).mean() == pytest.approx(theory.purity, abs=0.02)


def test_samples_follow_the_seed():
    first, again, other = (markov.sample(num_sequences=50, seed=seed)[0] for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chains": []}, "`chains`"),
        ({"chains": [(0.5, 1.5)]}, "`chains`"),
        ({"priors": [1.0]}, "`priors` has to be one positive number for each of 2 chains"),
        ({"priors": [1.0, 0.0]}, "`priors`"),
        ({"length": 1}, "`length`"),
        ({"num_sequences": 0}, "`num_sequences`"),
        ({"num_test": -1}, "`num_test`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        markov.prepare_dataset(**options, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_folder_has_rows_and_theory(tmp_path):
    folder = markov.prepare_dataset(markov.TRANSITION2, [3, 1], 60, 20, seed=5, cache_dir=tmp_path)
    rows = {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    }
    states, chain = markov.sample(markov.TRANSITION2, [3, 1], 80, seed=5)
    assert [row["input_ids"] for row in rows["train"] + rows["test"]] == states.tolist()
    assert [row["chain"] for row in rows["train"] + rows["test"]] == chain.tolist()
    assert len(rows["train"]) == 60
    assert json.loads((folder / "theory.json").read_text()) == vars(markov.theory(markov.TRANSITION2, [3, 1]))
    others = [
        markov.prepare_dataset(markov.TRANSITION2, [3, 1], 60, 20, seed=6, cache_dir=tmp_path),
        markov.prepare_dataset(markov.TRANSITION2, None, 60, 20, seed=5, cache_dir=tmp_path),
        markov.prepare_dataset(markov.TRANSITION1, [3, 1], 60, 20, seed=5, cache_dir=tmp_path),
    ]
    assert len({folder, *others}) == 4


def test_random_neo_is_an_ordinary_folder(tmp_path):
    folder = markov.random_neo(3, tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = model.config
    assert (config.num_layers, config.hidden_size, config.window_size) == (2, 64, 5)
    other = AutoModelForCausalLM.from_pretrained(markov.random_neo(4, tmp_path))
    assert not torch.equal(model.transformer.wte.weight, other.transformer.wte.weight)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("0 1 1").input_ids == [0, 1, 1]
    assert tokenizer.decode([0, 1, 1]) == "0 1 1"
    assert tokenizer.pad_token_id == model.config.pad_token_id == 2
    # The state of the generator is the caller's.
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    markov.random_neo(5, tmp_path)
    assert torch.equal(torch.rand(1), expected)
