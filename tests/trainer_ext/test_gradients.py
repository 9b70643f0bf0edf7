"""The gradients of whole optimizer steps, against one sequence and one hypothesis at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import trainer_ext.trainer as trainer_module
from tests.tiny import tiny_llama, with_hypotheses
from tests.trainer_ext.reference import (
    Gradients,
    RecordingCollator,
    adapted_llama,
    assert_same_gradients,
    count_tokens,
    frozen_copy,
    gradients_by_hand,
    logged,
    ragged_rows,
    scores_by_hand,
    sequences_of,
    tokenized,
    trainer_for,
    weights_by_hand,
)


# Name: options, and the temperature at optimizer step s (None: as wta).
OBJECTIVES: dict[str, tuple[dict[str, Any], Any]] = {
    "wta": ({"objective": "wta"}, lambda step: None),
    "relaxed": ({"objective": "relaxed", "relaxed_epsilon": 0.1}, lambda step: None),
    "relaxed, epsilon 0": ({"objective": "relaxed", "relaxed_epsilon": 0.0}, lambda step: None),
    "relaxed, epsilon 1": ({"objective": "relaxed", "relaxed_epsilon": 1.0}, lambda step: None),
    "annealed, warm": (
        {"objective": "annealed", "initial_temperature": 0.5, "temperature_decay": 0.9},
        lambda step: 0.5 * 0.9**step,
    ),
    # So cold that some of the weights are zero in float32, and others are not.
    "annealed, cold": (
        {"objective": "annealed", "initial_temperature": 1.2e-4, "temperature_decay": 1.0},
        lambda step: 1.2e-4,
    ),
    "annealed, final": (
        {"objective": "annealed", "initial_temperature": 0.5, "final_temperature": 0.5, "temperature_decay": 1.0},
        lambda step: None,
    ),
    "random": ({"objective": "random"}, None),
}
ROWS, BATCH_SIZE = 10, 4


@dataclass
class Run:
    """What was recorded of a training run at learning rate zero."""

    trainer: Any
    gradients: list[dict[str, torch.Tensor]]
    batches: list[dict[str, torch.Tensor]]
    weights: list[torch.Tensor] = field(default_factory=list)
    winners: list[torch.Tensor] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)

    def steps(self, accumulation: int) -> list[list[int]]:
        """The micro-batches of each optimizer step; the last of an epoch may be fewer."""
        in_epoch = len(self.trainer.get_train_dataloader())
        found = []
        for first in range(0, in_epoch * int(self.trainer.args.num_train_epochs), in_epoch):
            own = list(range(first, first + in_epoch))
            found += [own[start : start + accumulation] for start in range(0, in_epoch, accumulation)]
        return found


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train without moving the parameters, and record batches, weights, gradients and the calls of the model."""

    def run(model, data=None, **options) -> Run:
        collator, gradients = RecordingCollator(), Gradients()
        found = Run(None, gradients.steps, collator.batches)

        def record_weights(*args, **kwargs):
            weights, winners = assignment(*args, **kwargs)
            found.weights.append(weights.clone())
            found.winners.append(winners.clone())
            return weights, winners

        def recorded(function, rows_of, is_all):
            """Add what a call of the trainer did to the model: rows, dropout, graph."""

            def call(model, positions, batch, *args):
                with_noise = any(module.training for module in model.modules())
                entered = []
                base = found.trainer.model.get_base_model()
                hook = base.register_forward_pre_hook(lambda *_: entered.append(torch.is_grad_enabled()))
                result = function(model, positions, batch, *args)
                hook.remove()
                assert len(set(entered)) <= 1
                found.calls.append(
                    {"rows": rows_of(batch), "all": is_all(*args), "graph": entered[0], "dropout": with_noise}
                )
                return result

            return call

        assignment = trainer_module.assignment_weights
        running, scoring = trainer_module.score_tokens, trainer_module.score_sequences
        monkeypatch.setattr(trainer_module, "assignment_weights", record_weights)
        run_calls = recorded(running, len, lambda hypotheses: isinstance(hypotheses, str))
        monkeypatch.setattr(trainer_module, "score_tokens", run_calls)
        monkeypatch.setattr(trainer_module, "score_sequences", recorded(scoring, len, lambda *args: True))
        defaults = {
            "learning_rate": 0.0,
            "max_grad_norm": 0.0,
            "max_length": None,
            "max_steps": -1,
            "num_train_epochs": 1,
            "per_device_train_batch_size": BATCH_SIZE,
        }
        found.trainer = trainer_for(
            tmp_path,
            model=model,
            data=ragged_rows() if data is None else data,
            data_collator=collator,
            callbacks=[gradients],
            **{**defaults, **options},
        )
        found.trainer.train()
        monkeypatch.setattr(trainer_module, "assignment_weights", assignment)
        monkeypatch.setattr(trainer_module, "score_tokens", running)
        monkeypatch.setattr(trainer_module, "score_sequences", scoring)
        return found

    return run


def assert_steps_equal_brute_force(run, reference, objective, normalization, accumulation, tolerance=2e-5):
    """Every optimizer step of a run has the gradient, the weights and the winners of the definition."""
    options, temperature_of = OBJECTIVES[objective]
    steps = run.steps(accumulation)
    assert len(run.gradients) == len(steps)
    for step, micro_batches in enumerate(steps):
        q = []
        for index in micro_batches:
            batch = run.batches[index]
            if objective == "random":
                q.append(run.weights[index].tolist())
                assert all(sorted(row) == [0.0] * (len(row) - 1) + [1.0] for row in q[-1])
                continue
            rows = []
            scores = scores_by_hand(reference, batch)
            for row, (own, (_, labels)) in enumerate(zip(scores, sequences_of(batch), strict=True)):
                count = sum(label != -100 for label in labels[1:])
                if count == 0:
                    rows.append([0.0] * len(own))  # Whatever its weights are, it has no loss.
                    continue
                assert run.winners[index][row] == max(range(len(own)), key=own.__getitem__)
                rows.append(
                    weights_by_hand(
                        options["objective"], own, count, options.get("relaxed_epsilon", 0.0), temperature_of(step)
                    )
                )
                torch.testing.assert_close(run.weights[index][row], torch.tensor(rows[-1]), rtol=2e-2, atol=1e-5)
            q.append(rows)
        batches = [run.batches[index] for index in micro_batches]
        assert_same_gradients(run.gradients[step], gradients_by_hand(reference, batches, q, normalization), tolerance)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_equal_brute_force(train, objective, normalization, accumulation):
    # 10 rows in batches of 4: the last micro-batch has 2 rows, and with 2 micro-batches to a step, the last step has one.
    model = adapted_llama()
    reference = frozen_copy(model)
    options, _ = OBJECTIVES[objective]
    run = train(model, loss_normalization=normalization, gradient_accumulation_steps=accumulation, **options)
    assert [len(batch["input_ids"]) for batch in run.batches[:3]] == [4, 4, 2]
    # float32 knows q to about 1e-7 * score / T.
    tolerance = 2e-3 if objective == "annealed, cold" else 2e-5
    assert_steps_equal_brute_force(run, reference, objective, normalization, accumulation, tolerance)


def test_gradients_over_several_epochs(train):
    model = adapted_llama()
    reference = frozen_copy(model)
    options, _ = OBJECTIVES["annealed, warm"]
    run = train(model, num_train_epochs=3, gradient_accumulation_steps=2, **options)
    assert len(run.gradients) == 6
    assert_steps_equal_brute_force(run, reference, "annealed, warm", "token", 2)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("objective", ["wta", "relaxed", "annealed, warm", "annealed, cold", "random"])
def test_gradients_under_gradient_checkpointing(train, objective, reentrant):
    model = adapted_llama()
    reference = frozen_copy(model)
    options, _ = OBJECTIVES[objective]
    run = train(
        model,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        gradient_accumulation_steps=2,
        **options,
    )
    tolerance = 2e-3 if objective == "annealed, cold" else 2e-5
    assert_steps_equal_brute_force(run, reference, objective, "token", 2, tolerance)


@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["wta", "relaxed", "annealed, warm"])
def test_micro_batches_with_nothing_to_learn(train, objective, normalization):
    # One row to a micro-batch, so row 3 is alone, and the two before it share a step with it or with each other.
    model = adapted_llama()
    reference = frozen_copy(model)
    options, _ = OBJECTIVES[objective]
    run = train(
        model,
        data=ragged_rows(rows=6, without_labels=(1, 3)),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        loss_normalization=normalization,
        **options,
    )
    assert_steps_equal_brute_force(run, reference, objective, normalization, 3)


def test_a_batch_of_single_tokens_has_nothing_to_learn(train):
    for normalization in ("token", "sequence"):
        run = train(adapted_llama(), data=tokenized([([5], [5])] * 4), loss_normalization=normalization)
        assert logged(run.trainer, "loss") == [0.0]


@pytest.mark.parametrize("objective", ["wta", "relaxed"])
def test_sequence_normalization_with_a_model_that_takes_no_loss_arguments(train, objective):
    # For such models Trainer counts nothing (several vision-language classes declare themselves so).
    model = adapted_llama()
    reference = frozen_copy(model)
    model.get_base_model().accepts_loss_kwargs = False
    options, _ = OBJECTIVES[objective]
    run = train(model, loss_normalization="sequence", gradient_accumulation_steps=2, **options)
    assert_steps_equal_brute_force(run, reference, objective, "sequence", 2)


@pytest.mark.parametrize("num_hypotheses", [1, 2, 5])
def test_gradients_for_other_numbers_of_hypotheses(train, num_hypotheses):
    for objective in ("relaxed", "annealed, warm", "relaxed, epsilon 1"):
        model = adapted_llama(num_hypotheses)
        reference = frozen_copy(model)
        options, _ = OBJECTIVES[objective]
        assert_steps_equal_brute_force(train(model, **options), reference, objective, "token", 1)


# --- which rows are run, and how ---


@pytest.mark.parametrize("objective", ["wta", "relaxed, epsilon 0", "random"])
def test_only_weighted_rows_have_a_graph(train, objective):
    run = train(adapted_llama(), gradient_accumulation_steps=2, **OBJECTIVES[objective][0])
    scoring, training = run.calls[::2], run.calls[1::2]
    assert all(call["all"] and not call["graph"] and not call["dropout"] for call in scoring)
    assert all(call["graph"] and not call["all"] for call in training)
    # One sequence has nothing to learn.
    learns = [[count_tokens(labels) > 0 for _, labels in sequences_of(batch)] for batch in run.batches]
    assert [call["rows"] for call in training] == [sum(rows) for rows in learns]
    assert sum(sum(rows) for rows in learns) == ROWS - 1


def test_rows_with_a_weight_of_zero_are_left_out(train):
    options, _ = OBJECTIVES["annealed, cold"]
    run = train(adapted_llama(), per_device_train_batch_size=ROWS, num_train_epochs=2, **options)
    weighted = [int((weights > 0).sum()) for weights in run.weights]
    # The first batch assumes that all rows carry weight; the second has seen that they do not.
    assert run.calls[:3] == [{"rows": ROWS, "all": False, "graph": True, "dropout": True}] * 3
    assert [call["rows"] for call in run.calls[3:] if not call["graph"]] == [ROWS]
    trained = [call["rows"] for call in run.calls[3:] if call["graph"]]
    # One sequence has nothing to learn, whatever its weights.
    assert sum(trained) == weighted[1] - 3
    assert max(trained) <= ROWS < weighted[1] < 2 * ROWS


@pytest.mark.parametrize("objective", ["relaxed", "annealed, warm"])
def test_all_rows_are_run_once_when_all_carry_weight(train, objective):
    run = train(adapted_llama(), **OBJECTIVES[objective][0])
    # One hypothesis after the other, so that the temporary memory is that of the batch.
    assert [call["graph"] for call in run.calls] == [True] * 9
    assert sum(call["rows"] for call in run.calls) == 3 * ROWS


@pytest.mark.parametrize("num_hypotheses", [2, 3])
def test_selected_rows_and_all_rows_give_the_same_for_every_token(train, num_hypotheses):
    options, _ = OBJECTIVES["annealed, cold"]
    run = train(adapted_llama(num_hypotheses), num_train_epochs=2, **options)
    trainer, batch = run.trainer, run.batches[0]
    outputs = []
    for trains_all_rows in (True, False):
        trainer._trains_all_rows = lambda answer=trains_all_rows: answer
        outputs.append(trainer._compete(trainer.model.train(), batch))
    count = sum(count_tokens(labels) for _, labels in sequences_of(batch))
    for output in outputs:
        assert output.log_probs.shape == output.label_mask.shape == output.entropy.shape
        assert output.label_mask.sum() == count
    assert outputs[0].log_probs.shape == (num_hypotheses, count)
    # TRL sums them, each for itself.
    for name in ("log_probs", "entropy", "is_top1", "label_mask"):
        sums = [getattr(output, name).float().sum() for output in outputs]
        torch.testing.assert_close(sums[1], sums[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", ["lora_dropout", "attention_dropout", "neftune"])
@pytest.mark.parametrize("objective", ["wta", "relaxed", "annealed, warm", "random"])
def test_winners_are_chosen_without_noise_and_trained_with_it(train, objective, source):
    base = tiny_llama(attention_dropout=0.5) if source == "attention_dropout" else tiny_llama()
    model = with_hypotheses(base, lora_alpha=8, lora_dropout=0.5 if source == "lora_dropout" else 0.0)
    reference = frozen_copy(model)
    options, _ = OBJECTIVES[objective]
    noise = {"neftune_noise_alpha": 5.0} if source == "neftune" else {}
    run = train(model, max_steps=3, **options, **noise)
    for batch, weights, winners in zip(run.batches, run.weights, run.winners, strict=False):
        scores = scores_by_hand(reference, batch)
        for row, (own, (_, labels)) in enumerate(zip(scores, sequences_of(batch), strict=True)):
            if any(label != -100 for label in labels[1:]):
                assert winners[row] == max(range(3), key=own.__getitem__)
                if objective == "wta":
                    assert weights[row].argmax() == winners[row]
    assert all(call["dropout"] == call["graph"] for call in run.calls)
    assert sum(not call["graph"] for call in run.calls) == 3
    weighted = sum(int((weights > 0).sum()) for weights in run.weights)
    # The rows of the sequence with nothing to learn are left out.
    left_out = 3 if weighted > ROWS else 1
    assert sum(call["rows"] for call in run.calls if call["graph"]) == weighted - left_out
    # The noise reached the gradient.
    batch = run.batches[0]
    without = gradients_by_hand(reference, [batch], [run.weights[0].tolist()], "token")
    largest = max(gradient.abs().max() for gradient in without.values())
    assert any((run.gradients[0][name] - without[name]).abs().max() > 0.05 * largest for name in without)


def test_modules_are_put_back_as_they_were():
    model = adapted_llama().train()
    frozen = model.get_base_model().model.layers[0]
    frozen.eval()
    before = {name: module.training for name, module in model.named_modules()}
    with trainer_module.evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(RuntimeError, match="stop"), trainer_module.evaluation_mode(model):
        raise RuntimeError("stop")
    assert {name: module.training for name, module in model.named_modules()} == before
