"""Fewer rows and fewer scores: slices, sampled losers, dropped weights, remembered winners, prefixes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import set_seed

import trainer_ext.trainer as trainer_module
from tests.trainer_ext.reference import (
    Gradients,
    RecordingCollator,
    adapted_llama,
    assert_same_gradients,
    count_tokens,
    frozen_copy,
    gradients_by_hand,
    log_likelihood,
    logged,
    ragged_pairs,
    ragged_rows,
    scores_by_hand,
    sequences_of,
    trainer_for,
)
from trainer_ext.batches import SequenceBatch
from trainer_ext.objectives import drop_small_weights, sample_losers
from trainer_ext.scoring import plan_scoring, score_sequences
from trainer_ext.winners import WINNERS_NAME, RememberedWinners


FROZEN = {"learning_rate": 0.0, "max_grad_norm": 0.0, "max_steps": -1, "num_train_epochs": 1, "max_length": None}


class Recorded:
    """What a run did: batches, gradients, the weights that were trained, and the sequences that were scored."""

    def __init__(self, tmp_path, monkeypatch, model=None, data=None, callbacks=(), **options):
        self.collator, gradients = RecordingCollator(), Gradients()
        self.weights, self.scored, self.rows = [], [], []
        run, score = trainer_module.MCLTrainer._run_weighted, trainer_module.score_sequences

        def record_run(trainer, model, batch, weights, is_counted):
            self.weights.append(weights.clone())
            self.rows.append(int((weights > 0).sum()))
            return run(trainer, model, batch, weights, is_counted)

        def record_score(model, positions, batch, num_hypotheses, calls, *rest):
            self.scored.append(len(batch) if calls else 0)
            return score(model, positions, batch, num_hypotheses, calls, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(trainer_module.MCLTrainer, "_run_weighted", record_run)
            patch.setattr(trainer_module, "score_sequences", record_score)
            self.trainer = trainer_for(
                tmp_path,
                model=adapted_llama() if model is None else model,
                data=ragged_rows() if data is None else data,
                callbacks=[gradients, *callbacks],
                **{"data_collator": self.collator, **FROZEN, **options},
            )
            self.trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
        self.gradients, self.batches = gradients.steps, self.collator.batches


# --------------------------------------------------------------------------------------------------------------------
# Slices


@pytest.mark.parametrize("budget", [None, *range(1, 13), 100])
def test_scores_do_not_depend_on_the_row_budget(tmp_path, budget):
    model = adapted_llama()
    reference = frozen_copy(model)
    trainer = trainer_for(tmp_path, model=model, data=ragged_rows())
    batch = RecordingCollator()([ragged_rows()[index] for index in (0, 3, 5, 7, 2)])
    expected = torch.tensor(scores_by_hand(reference, batch))
    rows = []
    base = trainer.model.get_base_model()
    hook = base.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    chosen = SequenceBatch(batch)
    calls = plan_scoring(chosen, 3, budget)
    scores = score_sequences(trainer.model, trainer._positions, chosen, 3, calls)
    hook.remove()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert max(rows) <= (budget or 99)
    assert sum(rows) == 15


def test_sequences_of_like_length_are_scored_together_without_their_padding(tmp_path):
    short, long = ([5, 6, 7], [-100, 6, 7]), ([8] * 100, [-100] * 50 + [8] * 50)
    trainer = trainer_for(tmp_path, model=adapted_llama(), data=ragged_rows())
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in [short, long, short, long] * 4]
    batch = SequenceBatch(RecordingCollator()(rows))
    shapes = []
    base = trainer.model.get_base_model()
    hook = base.model.layers[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    score_sequences(trainer.model, trainer._positions, batch, 3, plan_scoring(batch, 3))
    hook.remove()
    assert shapes[0] == (24, 3)
    assert [rows for rows, width in shapes if width == 100] == [18, 6] or sum(rows for rows, _ in shapes[1:]) == 24
    assert {width for _, width in shapes} == {3, 100}


def test_calls_have_two_thousand_positions_by_default():
    inputs = {"input_ids": torch.ones(2, 300, dtype=torch.int64)}
    batch = SequenceBatch({**inputs, "labels": inputs["input_ids"]})
    # 6 rows of 300 positions: one call for K = 3; for K = 10 one hypothesis at a time.
    assert [call.hypotheses for call in plan_scoring(batch, 3)] == ["all"]
    assert [call.hypotheses for call in plan_scoring(batch, 10)] == list(range(10))


@pytest.mark.parametrize("budget", [1, 4, None])
@pytest.mark.parametrize("objective", ["wta", "relaxed"])
def test_gradients_do_not_depend_on_the_row_budget(tmp_path, monkeypatch, budget, objective):
    model = adapted_llama(lora_dropout=0.0)
    reference = frozen_copy(model)
    options = {"objective": objective, "scoring_batch_size": budget, "sample_losers": objective == "relaxed"}
    run = Recorded(tmp_path, monkeypatch, model, **options)
    for batch, weights, gradients in zip(run.batches, run.weights, run.gradients, strict=True):
        expected = gradients_by_hand(reference, [batch], [weights.tolist()], "token")
        assert_same_gradients(gradients, expected, 2e-5)


# --------------------------------------------------------------------------------------------------------------------
# Sampled losers


def some_weights(rows=6, num_hypotheses=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(rows, num_hypotheses, generator=generator), dim=1)


def test_the_mean_of_sampled_weights_is_the_weights():
    weights, count = some_weights(), 4000
    drawn = torch.zeros_like(weights)
    for place in (torch.arange(count) + 0.5) / count:
        found = sample_losers(weights, place.expand(len(weights)))
        assert ((found > 0).sum(dim=1) == 2).all()
        assert torch.equal(found.gather(1, weights.argmax(dim=1, keepdim=True))[:, 0], weights.max(dim=1).values)
        drawn += found
    torch.testing.assert_close(drawn / count, weights, rtol=0, atol=2 / count)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0, 1 - 2**-24, width=32))
def test_only_hypotheses_with_weight_are_sampled(values, place):
    weights = torch.tensor([values])
    if weights.sum() == 0:
        weights[0, 0] = 1.0
    found = sample_losers(weights, torch.tensor([place]))
    assert not (found[weights == 0] > 0).any()
    assert int((found > 0).sum()) == min(2, int((weights > 0).sum()))
    torch.testing.assert_close(found.sum(), weights.sum())
    assert found[0, weights.argmax()] == weights.max()


@pytest.mark.parametrize("objective", ["relaxed", "annealed"])
def test_the_mean_gradient_over_the_draws_is_the_exact_one(tmp_path, monkeypatch, objective):
    """One sequence and three hypotheses: two possible draws, whose gradients are weighted by their probabilities."""
    options = {"objective": objective, "relaxed_epsilon": 0.4, "initial_temperature": 0.05, "temperature_decay": 1.0}
    data = ragged_rows(1, without_labels=())
    whole = Recorded(tmp_path, monkeypatch, adapted_llama(), data, **options)
    exact, q = whole.gradients[0], exact_weights(adapted_llama(), whole.batches[0], options)
    winner, found = max(range(3), key=q.__getitem__), {}
    for seed in range(40):
        run = Recorded(tmp_path, monkeypatch, adapted_llama(), data, sample_losers=True, seed=seed, **options)
        assert run.rows == [2]
        (loser,) = (k for k in range(3) if run.weights[0][0][k] > 0 and k != winner)
        found[loser] = run.gradients[0]
        if len(found) == 2:
            break
    assert len(found) == 2
    rest = sum(q[k] for k in found)
    mean = {name: sum(q[k] / rest * found[k][name] for k in found) for name in exact}
    assert_same_gradients(mean, exact, 2e-5)


def exact_weights(model, batch, options):
    scores = torch.tensor(scores_by_hand(model, batch)[0])
    if options["objective"] == "relaxed":
        weights = torch.full((3,), options["relaxed_epsilon"] / 2)
        weights[scores.argmax()] = 1 - options["relaxed_epsilon"]
        return weights.tolist()
    count = count_tokens(sequences_of(batch)[0][1])
    return torch.softmax(scores / count / options["initial_temperature"], dim=0).tolist()


@pytest.mark.parametrize("num_hypotheses", [3, 5])
def test_at_most_two_rows_of_each_sequence_are_trained(tmp_path, monkeypatch, num_hypotheses):
    model = adapted_llama(num_hypotheses)
    reference = frozen_copy(model)
    run = Recorded(tmp_path, monkeypatch, model, objective="relaxed", relaxed_epsilon=0.3, sample_losers=True)
    assert run.rows == [8, 8, 4]
    for batch, weights, gradients in zip(run.batches, run.weights, run.gradients, strict=True):
        expected = gradients_by_hand(reference, [batch], [weights.tolist()], "token")
        assert_same_gradients(gradients, expected, 2e-5)


# --------------------------------------------------------------------------------------------------------------------
# Small weights


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.floats(0, 1), st.integers(0, 1000))
def test_the_error_of_dropped_weights_is_within_the_bound(num_hypotheses, min_weight, seed):
    weights = some_weights(5, num_hypotheses, seed).double()
    gradients = torch.randn(5, num_hypotheses, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = drop_small_weights(weights, min_weight)
    assert torch.equal(kept.argmax(dim=1), weights.argmax(dim=1))
    assert ((kept == weights) | (kept == 0)).all()
    assert (kept[weights >= min_weight] > 0).all()
    error = ((weights - kept).unsqueeze(-1) * gradients).sum(dim=1).norm(dim=-1)
    bound = (num_hypotheses - 1) * min_weight * gradients.norm(dim=-1).max(dim=1).values
    assert (error <= bound + 1e-12).all()


def test_small_weights_are_dropped_whether_rows_are_scored_first_or_not(tmp_path, monkeypatch):
    """Without dropout the first batch is run whole, because all of its rows might carry weight; the others are not."""
    options = {"objective": "annealed", "initial_temperature": 0.02, "temperature_decay": 1.0, "num_train_epochs": 2}
    model = adapted_llama()
    reference = frozen_copy(model)
    run = Recorded(tmp_path, monkeypatch, model, min_weight=0.3, **options)
    assert 0 < len(run.rows) < len(run.batches) == 6
    for batch, gradients in zip(run.batches, run.gradients, strict=True):
        q = []
        for row, (_, labels) in enumerate(sequences_of(batch)):
            scores = torch.tensor(scores_by_hand(reference, batch)[row])
            own = torch.softmax(scores / max(count_tokens(labels), 1) / 0.02, dim=0)
            q.append(torch.where((own >= 0.3) | (own == own.max()), own, 0.0).tolist())
        assert_same_gradients(gradients, gradients_by_hand(reference, [batch], [q], "token"), 2e-5)


def test_rows_below_the_weight_are_not_trained(tmp_path, monkeypatch):
    options = {"objective": "annealed", "initial_temperature": 0.02, "temperature_decay": 1.0, "num_train_epochs": 2}
    exact = Recorded(tmp_path, monkeypatch, adapted_llama(lora_dropout=0.1), **options)
    model = adapted_llama(lora_dropout=0.1)
    fewer = Recorded(tmp_path, monkeypatch, model, min_weight=0.3, **options)
    assert sum(fewer.rows) < sum(exact.rows)
    for kept, whole in zip(fewer.weights, exact.weights, strict=True):
        assert torch.equal(kept > 0, (whole >= 0.3) | (whole == whole.max(dim=1, keepdim=True).values))
        torch.testing.assert_close(kept[kept > 0], whole[kept > 0])


# --------------------------------------------------------------------------------------------------------------------
# Remembered winners


def test_winners_are_remembered_for_as_many_visits():
    remembered = RememberedWinners(3)
    assert remembered.look_up(7) is None
    remembered.visit(7, 2)
    assert remembered.look_up(7) is None
    remembered.end_step()
    for _ in range(2):
        assert remembered.look_up(7) == 2
        remembered.visit(7, None)
        remembered.end_step()
    assert remembered.look_up(7) is None
    assert remembered.flips() is None
    remembered.visit(7, 1)
    assert remembered.flips() == 1.0
    assert remembered.look_up(7) == 1
    assert remembered.flips() is None


@pytest.mark.parametrize("layout", [{}, {"padding_free": True, "data_collator": None}], ids=["padded", "packed"])
@pytest.mark.parametrize("objective", ["wta", "relaxed"])
def test_sequences_are_scored_at_every_nth_visit(tmp_path, monkeypatch, objective, layout):
    options = {"objective": objective, "num_train_epochs": 5, "score_every": 3, "sample_losers": objective == "relaxed"}
    run = Recorded(tmp_path, monkeypatch, adapted_llama(), **options, **layout)
    # 10 sequences in batches of 4, 4 and 2; three epochs apart.
    # One of them has nothing to learn, so it never needs a score.
    epochs = [sum(run.scored[start : start + 3]) for start in range(0, 15, 3)]
    assert epochs == [9, 0, 0, 9, 0]
    assert logged(run.trainer, "winner_flips") == [0.0] * 3
    # No metric is made up where nothing was scored.
    assert len(logged(run.trainer, "wta_nll")) == 6
    assert len(logged(run.trainer, "loss")) == 15


def test_gradients_are_those_of_the_remembered_winners(tmp_path, monkeypatch):
    model = adapted_llama()
    reference = frozen_copy(model)
    run = Recorded(tmp_path, monkeypatch, model, objective="wta", num_train_epochs=3, score_every=2)
    for batch, weights, gradients in zip(run.batches, run.weights, run.gradients, strict=True):
        for row, (own, (_, labels)) in enumerate(
            zip(scores_by_hand(reference, batch), sequences_of(batch), strict=True)
        ):
            if count_tokens(labels):
                assert weights[row].argmax() == max(range(3), key=own.__getitem__)
        assert_same_gradients(gradients, gradients_by_hand(reference, [batch], [weights.tolist()], "token"), 2e-5)


def test_flips_are_counted_when_the_parameters_move(tmp_path, monkeypatch):
    run = Recorded(
        tmp_path, monkeypatch, objective="wta", num_train_epochs=8, score_every=2, learning_rate=5e-2, logging_steps=24
    )
    (flips,) = logged(run.trainer, "winner_flips")
    assert 0 < flips <= 1
    assert (flips * 27) == pytest.approx(round(flips * 27))


def test_warm_annealing_needs_all_scores(tmp_path, monkeypatch):
    options = {"objective": "annealed", "initial_temperature": 1e-3, "annealing_fraction": 0.5, "num_train_epochs": 6}
    run = Recorded(tmp_path, monkeypatch, adapted_llama(lora_dropout=0.1), score_every=5, **options)
    epochs = [sum(run.scored[start : start + 3]) for start in range(0, 18, 3)]
    assert epochs == [10, 10, 10, 9, 0, 0]


def test_the_temperature_is_logged_when_winners_are_remembered(tmp_path, monkeypatch):
    options = {"objective": "annealed", "annealing_fraction": 0.5, "num_train_epochs": 6, "score_every": 5}
    temperatures = logged(Recorded(tmp_path, monkeypatch, **options).trainer, "temperature")
    assert len(temperatures) == 18
    assert temperatures[9:] == [1e-6] * 9 < temperatures[8:9]


def test_inputs_without_rows_cannot_be_remembered(tmp_path, monkeypatch):
    def collate(rows):
        return {**RecordingCollator()(rows), "pixel_values": torch.zeros(7, 3)}

    with pytest.raises(ValueError, match="`score_every=2` needs inputs with one row for each sequence"):
        Recorded(tmp_path, monkeypatch, objective="wta", score_every=2, data_collator=collate)


def test_no_warning_of_hypotheses_that_win_by_memory(tmp_path, monkeypatch, caplog):
    options = {"objective": "wta", "num_train_epochs": 6, "score_every": 6, "no_win_warning_steps": 6}
    run = Recorded(tmp_path, monkeypatch, **options)
    winners = {int(row.argmax()) for weights in run.weights for row in weights}
    named = {int(record.args[0]) for record in caplog.records if "has won no sequence" in record.message}
    assert named == {0, 1, 2} - winners


def test_a_resumed_run_remembers(tmp_path, monkeypatch):
    options = {
        "objective": "wta",
        "num_train_epochs": 4,
        "score_every": 3,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    whole = Recorded(tmp_path / "whole", monkeypatch, **options)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert (checkpoint / WINNERS_NAME).is_file()
    rest = Recorded(tmp_path / "rest", monkeypatch, resume_from_checkpoint=str(checkpoint), **options)
    assert rest.scored == whole.scored[4:]
    assert logged(rest.trainer, "loss")[4:] == pytest.approx(logged(whole.trainer, "loss")[4:], rel=1e-6)


def test_damaged_winners_are_refused(tmp_path):
    remembered = RememberedWinners(2)
    remembered.visit(2**62 + 1, 3)
    remembered.save(tmp_path)
    again = RememberedWinners(2)
    again.load(tmp_path)
    assert (len(again), again.look_up(2**62 + 1)) == (1, 3)
    again.load(tmp_path / "elsewhere")
    assert len(again) == 1
    path = Path(tmp_path, WINNERS_NAME)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"winners\.safetensors' is truncated or corrupt"):
        again.load(tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# Prefixes


@pytest.mark.parametrize("count", [1, 2, 50])
def test_winners_are_chosen_on_the_prefix_and_trained_on_everything(tmp_path, monkeypatch, count):
    model = adapted_llama()
    reference = frozen_copy(model)
    run = Recorded(tmp_path, monkeypatch, model, ragged_rows(12, seed=4), objective="wta", score_prefix=count)
    differ = 0
    for batch, weights, gradients in zip(run.batches, run.weights, run.gradients, strict=True):
        for row, (ids, labels) in enumerate(sequences_of(batch)):
            if not count_tokens(labels):
                continue
            places = [t for t in range(1, len(labels)) if labels[t] != -100]
            prefix = [label if t in places[:count] else -100 for t, label in enumerate(labels)]
            with torch.no_grad():
                short, full = (
                    [log_likelihood(reference, ids, own, k).item() for k in range(3)] for own in (prefix, labels)
                )
            winner = max(range(3), key=short.__getitem__)
            assert weights[row].tolist() == [float(k == winner) for k in range(3)]
            differ += winner != max(range(3), key=full.__getitem__)
        assert_same_gradients(gradients, gradients_by_hand(reference, [batch], [weights.tolist()], "token"), 2e-5)
    assert (differ > 0) == (count < 50)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "wta", "score_every": 2},
        {"objective": "annealed", "initial_temperature": 0.02, "min_weight": 0.25, "score_prefix": 2},
    ],
    ids=["remembered", "prefix"],
)
def test_micro_batches_do_not_matter(tmp_path, options):
    """Not even with rows that come several times: here those of a step are in different micro-batches."""
    rows = ragged_pairs(7).to_list()
    runs = []
    for accumulation in (1, 2):
        set_seed(0)  # The first hypotheses are drawn when the trainer is made.
        trainer = trainer_for(
            tmp_path,
            data=Dataset.from_list(rows * 3),
            per_device_train_batch_size=6 // accumulation,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.5,
            max_steps=12,
            **options,
        )
        trainer.train()
        runs.append(trainer)
    one, two = (logged(trainer, "grad_norm") for trainer in runs)
    assert two == pytest.approx(one, rel=1e-4)
    assert logged(runs[1], "win_share/0") == pytest.approx(logged(runs[0], "win_share/0"))


def test_evaluation_scores_all_tokens_always(tmp_path):
    data = ragged_rows(8, without_labels=())
    options = {"model": adapted_llama(), "data": data, "eval_dataset": data}
    short = trainer_for(tmp_path, objective="wta", score_prefix=1, score_every=2, **options).evaluate()
    options["model"] = adapted_llama()
    assert short["eval_wta_nll"] == pytest.approx(trainer_for(tmp_path, **options).evaluate()["eval_wta_nll"], rel=1e-6)


def test_all_of_them_together_learn(tmp_path):
    generator = random.Random(0)
    options = {"score_every": 2, "score_prefix": 3, "scoring_batch_size": 4, "min_weight": 0.01, "sample_losers": True}
    trainer = trainer_for(
        tmp_path,
        model=adapted_llama(),
        data=ragged_rows(12, seed=generator.randrange(9)),
        objective="annealed",
        num_train_epochs=20,
        max_steps=-1,
        learning_rate=1e-1,
        **options,
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-3:]) < 0.98 * sum(losses[:3])
