"""The experiment on Markov chains: what it measures, by hand; and a few steps of it, from data to report."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from recipes import markov as experiment
from recipes.data import markov


class Known(torch.nn.Module):
    """A model whose hypotheses are Markov chains: the next token depends on the last one alone."""

    def __init__(self, chains):
        super().__init__()
        self.num_hypotheses = len(chains)
        self.logits = [torch.tensor([[1 - p, p, 1e-9], [q, 1 - q, 1e-9]]).log() for p, q in chains]

    def forward(self, input_ids, hypotheses):
        return SimpleNamespace(logits=self.logits[hypotheses][input_ids])


def test_matrices_are_those_of_the_model():
    chains = [(0.2, 0.9), (0.8, 0.25)]
    states, chain = markov.sample(chains, None, 64, 16, seed=0)
    winners = torch.from_numpy(chain)
    task = replace(experiment.SET_UPS["transition1"], chains=tuple(chains))
    matrices = experiment.transition_matrices(Known(chains[::-1]), torch.from_numpy(states), winners)
    for k, (p, q) in enumerate(chains[::-1]):
        for name in ("won", "all"):
            np.testing.assert_allclose(matrices[name][k], [[1 - p, p], [q, 1 - q]], atol=1e-6)
    # Hypothesis 0 is the second chain, and wins what hypothesis 1 should.
    found = experiment.compare(task, matrices, chain, chain)
    assert found["hypothesis_of"] == [0, 1]
    assert found["assignment"] == 1.0
    assert found["matrix_error"] == pytest.approx(0.65, abs=1e-6)
    found = experiment.compare(task, matrices, 1 - chain, chain)
    assert found["hypothesis_of"] == [1, 0]
    assert found["matrix_error"] == pytest.approx(0.0, abs=1e-6)
    # A hypothesis that wins nothing has no matrix.
    alone = experiment.transition_matrices(Known(chains), torch.from_numpy(states), torch.zeros(64, dtype=torch.int64))
    assert alone["won"][1] is None
    assert experiment.compare(task, alone, np.zeros(64, dtype=np.int64), chain)["matrix_error"] == math.inf


def test_the_true_chains_have_the_loss_of_theory():
    task = experiment.SET_UPS["transition2"]
    states, _ = markov.sample(task.chains, None, 200, markov.LENGTH, seed=3)
    scores = markov.log_likelihoods(states, task.chains)
    by_hand = []
    for row in states.tolist():
        logs = []
        for p, q in task.chains:
            step = {(0, 0): 1 - p, (0, 1): p, (1, 0): q, (1, 1): 1 - q}
            logs.append(sum(math.log(step[pair]) for pair in itertools.pairwise(row)))
        by_hand.append(logs)
    np.testing.assert_allclose(scores, by_hand)
    found = experiment.loss_of(task, scores, states)
    assert found["nll"] == pytest.approx(markov.theory(task.chains).winners)
    assert found["measured_nll"] == pytest.approx(-np.max(by_hand, axis=1).mean() / (markov.LENGTH - 1))
    assert found["nll_error"] == pytest.approx(0.0, abs=1e-12)
    worse = experiment.loss_of(task, scores - 0.31, states)
    assert worse["nll"] - found["nll"] == pytest.approx(0.31 / (markov.LENGTH - 1))


def test_the_averaged_chain():
    chains, priors = [(0.2, 0.9), (0.8, 0.25)], [0.9, 0.1]
    states, _ = markov.sample(chains, priors, 20_000, markov.LENGTH, seed=1)
    before, after = states[:, :-1].ravel(), states[:, 1:].ravel()
    p, q = markov.averaged_chain(chains, priors)
    assert p == pytest.approx(float((after[before == 0] == 1).mean()), abs=0.01)
    assert q == pytest.approx(float((after[before == 1] == 0).mean()), abs=0.01)


@pytest.mark.parametrize("method", ["lora", "wta"])
def test_a_few_steps(tmp_path, monkeypatch, method, capsys):
    monkeypatch.setenv("PEFT_MCL_CACHE", str(tmp_path / "cache"))

    def data(seed):
        states, chain = markov.sample(markov.TRANSITION1, None, 96, markov.LENGTH, seed=seed)
        rows = [
            {"input_ids": row, "labels": row, "chain": label}
            for row, label in zip(states.tolist(), chain.tolist(), strict=True)
        ]
        return {"train": Dataset.from_list(rows[:64]), "validation": Dataset.from_list(rows[64:])}

    task = experiment.SET_UPS["transition1"]
    small = replace(task, data=data, training={**task.training, "per_device_train_batch_size": 8})
    monkeypatch.setitem(experiment.SET_UPS, "transition1", small)
    monkeypatch.setattr(experiment, "HELD_OUT_SEQUENCES", 32)
    command = ["markov", "--set_ups", "transition1", "--methods", method, "--seeds", "0", "--steps", "4"]
    monkeypatch.setattr("sys.argv", [*command, "--output_dir", str(tmp_path)])
    experiment.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert [cell["set_up"] for cell in results] == ["transition1"]
    assert results[0]["hypotheses"] == (1 if method == "lora" else 2)
    assert len(results[0]["curve"]) == 5
    assert (tmp_path / "transition1.png").stat().st_size > 1000
    assert f"| {method} | 4 | 1 |" in (tmp_path / "report.md").read_text()

    # Again: nothing is computed, and four steps are not enough to pass.
    written = {path: path.stat().st_mtime_ns for path in Path(tmp_path, "transition1").glob("*.json")}
    monkeypatch.setattr("sys.argv", [*command, "--output_dir", str(tmp_path), "--check"])
    with pytest.raises(SystemExit) as ended:
        experiment.main()
    assert ended.value.code == 1
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert "FAIL: transition1, wta, seed 0" in capsys.readouterr().out


def test_check_wants_each_criterion_of_each_cell(capsys):
    theory = vars(markov.theory(markov.TRANSITION1))
    good = {
        "set_up": "transition1",
        "method": "wta",
        "asked_steps": 501,
        "theory": theory,
        "nll": theory["winners"],
        "matrix_error": 0.03,
        "assignment": 0.99,
        "cpu_seconds": 300,
    }
    cells = [{**good, "seed": seed} for seed in (0, 1)]
    assert experiment.check(cells, ["transition1", "three"], [0, 1])
    assert not experiment.check(cells, ["transition1", "transition2"], [0, 1])
    assert not experiment.check(cells, ["transition1"], [0, 1, 2])
    # Another length, or another method, is not what was asked for; nor is a set-up without criteria.
    assert not experiment.check(cells, ["transition1"], [0], steps=500)
    assert not experiment.check([{**good, "seed": 0, "method": "balanced"}], ["transition1"], [0])
    assert not experiment.check(cells, ["three"], [0])
    for key, value in [
        ("nll", theory["rate"] + 1e-5),
        ("matrix_error", 0.031),
        ("assignment", 0.989),
        ("cpu_seconds", 301),
    ]:
        capsys.readouterr()
        assert not experiment.check([cells[0], {**good, "seed": 1, key: value}], ["transition1"], [0, 1])
        assert capsys.readouterr().out.count("FAIL") == 1
