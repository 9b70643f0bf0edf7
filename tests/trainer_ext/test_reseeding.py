"""Hypotheses that win nothing go on as copies of those that win too much. Under several processes: test_launches.py."""

from __future__ import annotations

import random

import pytest
import torch

from tests.trainer_ext.reference import (
    adapted_llama,
    logged,
    ragged_pairs,
    settings,
    trainer_for,
)
from trainer_ext.reseeding import REVIVAL_NAME, Revival, reseed
from trainer_ext.rewriting import rewrite


# Equal hypotheses keep equal weights, so they go the same way whoever wins.
WARM = {"objective": "annealed", "initial_temperature": 1.0, "temperature_decay": 1.0}


# ---------------------------------------------------------------------------------------------------------------------
# Who is re-seeded, and from whom


def naive(history, after, step, reseeded):
    """The rule, word by word, on the winners of each step so far."""
    if step < after:
        return []
    window = [winner for winners in history[step - after : step] for winner in winners]
    hypotheses = range(4)
    settled = [k for k in hypotheses if k not in reseeded or step - reseeded[k] >= after]
    found = []
    for target in settled:
        shares = {
            k: window.count(k) / (1 + [source for _, source in found].count(k)) for k in settled if window.count(k)
        }
        if window.count(target) == 0 and shares:
            best = max(shares.values())
            found.append((target, min(k for k, share in shares.items() if share == best)))
            reseeded[target] = step
    return found


def histories():
    generator = random.Random(0)
    for _ in range(60):
        alive = generator.sample(range(4), generator.randint(1, 3))
        history = []
        for _ in range(30):
            if generator.random() < 0.1:
                alive = generator.sample(range(4), generator.randint(1, 3))
            history.append(generator.choices(alive, k=generator.randint(0, 5)))
        yield generator.randint(1, 7), history


def test_the_rule_is_followed():
    revived = total = 0
    for after, history in histories():
        revival, reseeded = Revival(4, after), {}
        for step in range(len(history) + 1):
            found = revival.due(step)
            assert found == naive(history, after, step, reseeded)
            total += len(found)
            if step < len(history):
                # In micro-batches.
                revival.record(history[step][:2], step)
                revival.record(history[step][2:], step)
        revived += revival.count()
        assert revival.count() == 0
    assert revived == total > 100


def test_several_copies_are_shared_out():
    revival = Revival(5, 1)
    revival.record([1] * 6 + [4] * 5, 0)
    # 6 and 5, then 3 and 5, then 3 and 2.5.
    assert revival.due(1) == [(0, 1), (2, 4), (3, 1)]


def test_ties_go_by_index_and_nothing_comes_of_nothing():
    revival = Revival(3, 1)
    assert revival.due(0) == []
    revival.record([2, 1], 0)
    assert revival.due(1) == [(0, 1)]
    revival = Revival(3, 1)
    revival.record([], 0)
    assert revival.due(1) == []


def test_a_copy_has_time_to_win_and_is_not_copied_before():
    revival = Revival(3, 2)
    for step in range(2):
        revival.record([0, 0, 1], step)
    assert revival.due(2) == [(2, 0)]
    # Now the copy wins everything; hypothesis 1 is the next to starve.
    for step in (2, 3):
        revival.record([2, 2, 0], step)
        if step == 2:
            assert revival.due(3) == []
    assert revival.due(4) == [(1, 2)]
    revival.record([2, 2, 2], 4)
    assert revival.due(5) == []


@pytest.mark.parametrize("cut", [3, 7, 11])
def test_a_resumed_watch_goes_on(cut, tmp_path):
    for after, history in histories():
        whole, first, second = (Revival(4, after) for _ in range(3))
        expected, found = [], []
        for step, winners in enumerate(history):
            if step == cut:
                first.save(tmp_path)
                second.load(tmp_path)
            watch = first if step < cut else second
            expected.append(whole.due(step))
            found.append(watch.due(step))
            whole.record(winners, step)
            watch.record(winners, step)
        assert found == expected
        assert second.count() == whole.count()


def test_a_longer_patience_after_resuming_waits_for_enough_steps(tmp_path):
    watch, longer = Revival(2, 2), Revival(2, 4)
    for step in range(6):
        watch.record([0], step)
    watch.save(tmp_path)
    longer.load(tmp_path)
    found = []
    for step in range(6, 10):
        found.append(longer.due(step))
        longer.record([0], step)
    # Steps 4 to 7 are the first four that it knows.
    assert found == [[], [], [(1, 0)], []]


def test_a_damaged_file_is_named(tmp_path):
    revival = Revival(2, 2)
    revival.load(tmp_path)
    (tmp_path / REVIVAL_NAME).write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"revival\.safetensors' is truncated or corrupt .*to count wins anew"):
        revival.load(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Re-seeding


def in_training(tmp_path, **options):
    trainer = trainer_for(tmp_path, model=adapted_llama(), **{**WARM, "max_steps": 3, **options})
    trainer.train()
    return trainer


def snapshot(trainer):
    """Every trained parameter and every state of it."""
    found = {}
    for name, parameter in trainer.model.named_parameters():
        found[name] = parameter.detach().clone()
        for key, state in trainer.optimizer.state.get(parameter, {}).items():
            found[f"{name} {key}"] = state.clone() if isinstance(state, torch.Tensor) else state
    return found


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_only_the_target_changes_and_becomes_the_source(tmp_path, optim):
    trainer = in_training(tmp_path, optim=optim)
    before = snapshot(trainer)
    reseed(trainer.model, trainer.optimizer, 2, 0, 0.1, "seed")
    after = snapshot(trainer)
    copied = 0
    for name, old in before.items():
        new = after[name]
        if "mclora_" not in name or not isinstance(old, torch.Tensor) or old.dim() < 2:
            assert new is old or torch.equal(torch.as_tensor(new), torch.as_tensor(old)), name
            continue
        assert torch.equal(new[:2], old[:2]), name
        assert not torch.equal(old[2], old[0]), name
        copied += 1
        if name.endswith("mclora_B.default"):
            noise = new[2] - old[0]
            size = noise.square().mean().sqrt() / old[0].square().mean().sqrt()
            assert size.item() == pytest.approx(0.1, rel=0.4)
        else:
            assert torch.equal(new[2], old[0]), name
    # 14 layers with A and B, each with two states of AdamW, and two of Adafactor.
    assert copied == 28 * {"adamw_torch": 3, "adafactor": 3, "sgd": 1}[optim]


def test_the_noise_depends_on_seed_target_and_layer(tmp_path):
    trainer = in_training(tmp_path, max_steps=1)
    noises = {}
    for seed, target in (("one", 1), ("one", 2), ("two", 2), ("one", 2)):
        before = snapshot(trainer)
        reseed(trainer.model, trainer.optimizer, target, 0, 1.0, seed)
        for name, new in snapshot(trainer).items():
            if name.endswith("mclora_B.default"):
                noise = (new[target] - before[name][0]) / before[name][0].square().mean().sqrt()
                key = (seed, target, name)
                if key in noises:
                    torch.testing.assert_close(noise, noises[key])
                noises[key] = noise
    together = torch.cat([noise.flatten() for noise in noises.values()])
    assert together.mean().item() == pytest.approx(0.0, abs=0.03)
    assert together.std().item() == pytest.approx(1.0, abs=0.03)
    first = [noise.flatten()[:16] for noise in noises.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])


def reviving(tmp_path, monkeypatch=None, **options):
    """A run of six steps with eight hypotheses, four sequences a step, and who was re-seeded from whom."""
    pairs = []

    def record(model, optimizer, target, source, *rest):
        pairs.append((target, source))
        reseed(model, optimizer, target, source, *rest)

    if monkeypatch is not None:
        monkeypatch.setattr("trainer_ext.trainer.reseed", record)
    defaults = {"max_steps": 6, "revive_after_steps": 3, **WARM}
    return trainer_for(tmp_path, model=adapted_llama(8), data=ragged_pairs(12), **{**defaults, **options}), pairs


def test_without_noise_both_answer_alike_and_learn_alike(tmp_path, monkeypatch):
    """In all steps that follow, too, with the states that AdamW had collected for the source."""
    trainer, pairs = reviving(tmp_path, monkeypatch, revive_perturbation=0.0)
    trainer.train()
    assert logged(trainer, "revived")[:3] == [0, 0, 0]
    assert logged(trainer, "revived")[3] > 0
    assert sum(logged(trainer, "revived")) == len(pairs)
    scores = trainer.score(ragged_pairs(5)).scores
    for target, source in pairs:
        for name, parameter in trainer.model.named_parameters():
            if "mclora_" in name:
                assert torch.equal(parameter[target], parameter[source]), name
                for state in trainer.optimizer.state[parameter].values():
                    assert state.dim() == 0 or torch.equal(state[target], state[source])
        assert torch.equal(scores[:, target], scores[:, source])
    assert len({tuple(column) for column in scores.T.tolist()}) == 8 - len(pairs)


def test_answers_of_a_copy_differ_by_the_noise(tmp_path):
    trainer = in_training(tmp_path)
    data, gaps = ragged_pairs(8), []
    for noise in (0.0, 0.01, 0.1):
        reseed(trainer.model, trainer.optimizer, 2, 0, noise, "seed")
        scores = trainer.score(data).scores
        gaps.append((scores[:, 2] - scores[:, 0]).abs().mean().item())
    assert gaps[0] == 0
    assert 0 < gaps[1] < gaps[2]
    assert gaps[2] / gaps[1] == pytest.approx(10, rel=0.3)


def test_states_of_unknown_kinds_are_left_alone():
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    states = {"bytes": torch.ones(2, 3, dtype=torch.uint8), "step": torch.tensor(1.0), "own": torch.ones(2, 3)}
    optimizer.state[parameter] = states
    rewrite(parameter, optimizer, lambda w: w + 1, lambda s: s + 2)
    assert parameter.tolist() == [[2.0] * 3] * 2
    assert states["own"].tolist() == [[3.0] * 3] * 2
    assert states["bytes"].tolist() == [[1] * 3] * 2
    assert states["step"].item() == 1


# ---------------------------------------------------------------------------------------------------------------------
# In the trainer


@pytest.mark.parametrize("options", [{}, {"score_every": 2}, {"gradient_accumulation_steps": 2, "max_steps": 4}])
def test_a_run_says_who_is_revived(tmp_path, monkeypatch, options, caplog):
    wta = {"objective": "wta", "logging_steps": 2, "revive_perturbation": 0.5}
    trainer, pairs = reviving(tmp_path, monkeypatch, **{**wta, **options})
    trainer.train()
    assert pairs
    assert sum(logged(trainer, "revived")) == len(pairs)
    lines = [record.getMessage() for record in caplog.records if "goes on as a copy" in record.getMessage()]
    for line, (target, source) in zip(lines, pairs, strict=True):
        assert line.startswith(f"Hypothesis {target} has won no sequence for 3 steps (up to step ")
        assert f"it goes on as a copy of hypothesis {source}, which has won " in line
        assert line.endswith("with noise of 0.5.")


def test_a_resumed_run_revives_as_the_whole_one(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 1}
    whole, _ = reviving(tmp_path, **saved)
    whole.train()
    assert logged(whole, "revived")[3] > 0
    # Just before and just after hypotheses are revived; the last is in the middle of an epoch.
    for step in (3, 4):
        resumed, _ = reviving(tmp_path, **saved)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert logged(resumed, "loss") == logged(whole, "loss")
        assert logged(resumed, "revived") == logged(whole, "revived")
        for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_one_hypothesis_is_never_revived(tmp_path):
    trainer = trainer_for(tmp_path, model=adapted_llama(1), revive_after_steps=1)
    trainer.train()
    assert logged(trainer, "revived") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revive_after_steps": -1}, "`revive_after_steps` must be an integer, 0 .*got -1"),
        ({"revive_after_steps": 2.0}, "`revive_after_steps` must be an integer, 0 .*got 2.0"),
        ({"revive_after_steps": True}, "`revive_after_steps` must be an integer, 0 .*got True"),
        ({"revive_perturbation": -0.1}, "`revive_perturbation` must be a number of at least 0, got -0.1"),
        ({"revive_perturbation": float("nan")}, "`revive_perturbation` must be .*got nan"),
        ({"revive_after_steps": 5, "objective": "random"}, "`revive_after_steps=5` does not go with .*Set it to 0"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **options)
