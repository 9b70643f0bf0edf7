"""The experiments of docs/specialisation.md, on a toy of the same shape."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from peft_mcl import MCLoraConfig
from recipes.data import markov
from recipes.specialisation.__main__ import main
from recipes.specialisation.cells import run_cell, trainer_of
from recipes.specialisation.decode import contenders_of
from recipes.specialisation.files import cell_path
from recipes.specialisation.methods import METHODS
from recipes.specialisation.report import report
from recipes.specialisation.tasks import TASKS
from trainer_ext import MCLConfig
from trainer_ext.batches import SequenceBatch


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_MCL_CACHE", str(tmp_path / "cache"))

    def data(seed):
        states, chains = markov.sample(num_sequences=64, seed=seed)
        rows = [
            {"input_ids": row, "labels": row, "chain": chain}
            for row, chain in zip(states.tolist(), chains.tolist(), strict=True)
        ]
        return {
            "train": Dataset.from_list(rows[:40]),
            "validation": Dataset.from_list(rows[40:48]),
            "test": Dataset.from_list(rows[48:]),
        }

    found = TASKS["chains 1"]
    training = {**found.training, "per_device_train_batch_size": 8, "max_steps": 6}
    return replace(found, data=data, training=training, model=lambda seed: str(markov.random_neo(seed)))


@pytest.mark.parametrize(
    "method", ["lora", "told the modes", "separate, r = 58", "balanced + shared", "balanced + shared + together"]
)
def test_a_cell(task, tmp_path, method):
    found = run_cell(task, method, seed=0, bases=tmp_path, keep=tmp_path / "kept")
    assert found["hypotheses"] == (1 if method == "lora" else 2)
    assert found["rank"] == {"lora": 60, "told the modes": 64}.get(method, 58)
    figures = found["figures"]
    assert figures["wta_nll"] <= figures["mean_nll"] <= figures["worst_nll"]
    assert figures["wta_nll"] <= figures["mixture_nll"] <= figures["wta_nll"] + math.log(9) / 31
    assert sum(map(sum, found["agreement"]["matrix"].values())) == 16
    assert all(math.isfinite(value) for value in figures.values())

    (tmp_path / "cells" / "chains-1").mkdir(parents=True)
    (tmp_path / "cells" / "chains-1" / "one.json").write_text(json.dumps(found))
    report(tmp_path / "cells")
    assert f"| {method} | 6 | 1 |" in (tmp_path / "cells" / "report.md").read_text()
    assert (tmp_path / "cells" / "chains-1.png").stat().st_size > 1000
    assert json.loads((tmp_path / "cells" / "results.json").read_text())[0]["figures"] == figures


def test_one_a_for_all_hypotheses(task, tmp_path):
    trainer = trainer_of(task, METHODS["balanced, one A"], 0, task.data(0), tmp_path)
    stacks = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    before = {name: tensor.detach().clone() for name, tensor in stacks.items()}
    trainer.train()
    for name, tensor in stacks.items():
        assert not torch.equal(tensor, before[name])
        assert torch.equal(tensor[0], tensor[1]) == ("mclora_A" in name)


def test_a_trained_base_is_kept(task, tmp_path):
    trained = replace(task, trained_base=True)
    first = run_cell(trained, "balanced", seed=0, bases=tmp_path, keep=tmp_path / "kept")
    merged = tmp_path / "chains 1.seed0" / "model.safetensors"
    written = merged.stat().st_mtime_ns
    second = run_cell(trained, "balanced", seed=0, bases=tmp_path, keep=tmp_path / "kept")
    assert merged.stat().st_mtime_ns == written
    assert second["figures"] == first["figures"]


@pytest.mark.parametrize("name", METHODS)
def test_options_of_each_method_exist(tmp_path, name):
    method = METHODS[name]
    adapter = {"r": 8, "lora_alpha": 16, **method.adapter}
    MCLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **method.training)
    MCLoraConfig(num_hypotheses=4, task_type="CAUSAL_LM", target_modules="all-linear", **adapter)


@pytest.mark.parametrize("name", ["wta, dropout", "wta, dropout in scores"])
def test_scores_have_noise_only_where_that_is_measured(task, tmp_path, name):
    trainer = trainer_of(task, METHODS[name], 0, task.data(0), tmp_path)
    # Before training the adapters are zero, with dropout or without.
    trainer.train()
    trainer.model.train()
    batch = SequenceBatch(next(iter(trainer.get_train_dataloader())))
    first, second = (trainer._score_part(trainer.model, batch, list(range(8)), is_training=True)[0] for _ in range(2))
    assert torch.equal(first, second) == (name == "wta, dropout")
    held_out = task.data(0)["test"].remove_columns("chain")
    assert torch.equal(trainer.score(held_out).scores, trainer.score(held_out).scores)


def test_kept_adapters_are_contenders(task, tmp_path):
    cells = {}
    for method in ("balanced + shared", "separate"):
        path = cell_path(tmp_path, task.name, method, 0, None)
        path.parent.mkdir(exist_ok=True)
        cells[method] = run_cell(task, method, seed=0, bases=tmp_path, keep=path.with_suffix(""))
        path.write_text(json.dumps(cells[method]))
    found = contenders_of(task, ["balanced + shared", "lora", "separate"], tmp_path, None)
    assert [one.name for one in found] == ["balanced + shared", "separate", "lora, r = 64"]
    assert [one.num_hypotheses for one in found] == [2, 2, 1]
    wins = [sum(column) for column in zip(*cells["balanced + shared"]["looks"][-1]["matrix"].values(), strict=True)]
    assert found[0].weights == pytest.approx([(win + 1) / (sum(wins) + 2) for win in wins])
    assert found[1].weights == (0.5, 0.5)


def test_references_of_a_prompt_are_matched(task, tmp_path):
    rows = task.data(0)["train"]
    rows = rows.add_column("group", [row // 2 for row in range(len(rows))])
    trainer = trainer_of(task, METHODS["wta + shared + matching"], 0, {"train": rows}, tmp_path)
    trainer.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    batch = SequenceBatch(inputs)
    weights, groups = trainer._plan_step([inputs]).take(batch.keys), batch.groups
    assert sorted(groups.tolist()) == sorted(2 * groups.unique().tolist())
    # Two references and two hypotheses: one each.
    for group in groups.unique():
        assert weights[groups == group].sum(dim=0).tolist() == [1.0, 1.0]


def test_nothing_is_matched_where_prompts_have_one_reference(tmp_path, monkeypatch, capsys):
    command = ["--tasks", "chains 1", "--methods", "wta + shared + matching", "--output_dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["specialisation", *command])
    main()
    assert "chains 1, wta + shared + matching: left out" in capsys.readouterr().out
    assert not [*tmp_path.rglob("*.json")]
