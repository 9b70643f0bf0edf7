"""Packed and padding-free training: one row holds many sequences, each with its own winner; exact against unpacked rows."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

import trainer_ext.trainer as trainer_module
from tests.tiny import tiny_gpt2, with_hypotheses
from tests.trainer_ext.reference import (
    Gradients,
    adapted_llama,
    assert_same_gradients,
    count_tokens,
    frozen_copy,
    gradients_by_hand,
    log_likelihood,
    logged,
    padded_batch,
    ragged_pairs,
    ragged_rows,
    trainer_for,
    unpacked,
    weights_by_hand,
)


OBJECTIVES = {
    "wta": {"objective": "wta"},
    "relaxed": {"objective": "relaxed", "relaxed_epsilon": 0.1},
    "annealed": {"objective": "annealed", "initial_temperature": 0.5, "temperature_decay": 0.9},
    "annealed, cold": {"objective": "annealed", "initial_temperature": 1.2e-4, "temperature_decay": 1.0},
}
LAYOUTS = {
    "packing": {"packing": True, "max_length": 24, "per_device_train_batch_size": 2},
    "padding_free": {"padding_free": True, "max_length": None, "per_device_train_batch_size": 4},
    "padded to a multiple": {
        "padding_free": True,
        "max_length": None,
        "per_device_train_batch_size": 4,
        "pad_to_multiple_of": 16,
    },
}
FROZEN = {"learning_rate": 0.0, "max_grad_norm": 0.0, "max_steps": -1, "num_train_epochs": 1}


def train_packed(tmp_path, monkeypatch, model, data=None, **options):
    """A run at learning rate zero; the batches and weights it saw, and the gradients of its steps."""
    batches, weights, gradients = [], [], Gradients()
    original = trainer_module.assignment_weights

    def record(*args, **kwargs):
        found = original(*args, **kwargs)
        weights.append(found[0].clone())
        return found

    monkeypatch.setattr(trainer_module, "assignment_weights", record)
    trainer = trainer_for(
        tmp_path,
        model=model,
        data=ragged_rows(16) if data is None else data,
        callbacks=[gradients],
        **{**FROZEN, **options},
    )
    collate = trainer.data_collator
    trainer.data_collator = lambda examples: batches.append(collate(examples)) or batches[-1]
    trainer.train()
    monkeypatch.setattr(trainer_module, "assignment_weights", original)
    return trainer, batches, weights, gradients.steps


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_equal_brute_force_on_the_unpacked_sequences(tmp_path, monkeypatch, layout, normalization, objective):
    model = adapted_llama()
    reference = frozen_copy(model)
    options = {**OBJECTIVES[objective], **LAYOUTS[layout], "loss_normalization": normalization}
    _, batches, weights, steps = train_packed(tmp_path, monkeypatch, model, **options)
    assert len(steps) == len(batches) >= 2
    assert max(len(unpacked(batch)) for batch in batches) >= 4
    for step, (batch, own, gradients) in enumerate(zip(batches, weights, steps, strict=True)):
        sequences = unpacked(batch)
        assert len(own) == len(sequences)
        q, winners = [], set()
        for row, (ids, labels) in enumerate(sequences):
            count = count_tokens(labels)
            if count == 0:
                q.append([0.0] * 3)
                continue
            with torch.no_grad():
                scores = [log_likelihood(reference, ids, labels, k).item() for k in range(3)]
            winners.add(max(range(3), key=scores.__getitem__))
            given = OBJECTIVES[objective]
            temperature = (
                None
                if "annealed" not in objective
                else given["initial_temperature"] * given["temperature_decay"] ** step
            )
            q.append(weights_by_hand(given["objective"], scores, count, given.get("relaxed_epsilon", 0.0), temperature))
            torch.testing.assert_close(own[row], torch.tensor(q[-1]), rtol=2e-2, atol=1e-5)
        assert len(winners) > 1 or len(sequences) < 3, "one row should hold several winners"
        padded = padded_batch(sequences)
        assert_same_gradients(gradients, gradients_by_hand(reference, [padded], [q], normalization), 2e-5)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_checkpointing_and_accumulation(tmp_path, monkeypatch, options):
    model = adapted_llama()
    reference = frozen_copy(model)
    _, batches, weights, steps = train_packed(
        tmp_path, monkeypatch, model, objective="wta", **LAYOUTS["packing"], **options
    )
    accumulation = options.get("gradient_accumulation_steps", 1)
    groups = [range(start, min(start + accumulation, len(batches))) for start in range(0, len(batches), accumulation)]
    for group, gradients in zip(groups, steps, strict=True):
        padded = [padded_batch(unpacked(batches[index])) for index in group]
        expected = gradients_by_hand(reference, padded, [weights[index].tolist() for index in group], "token")
        assert_same_gradients(gradients, expected, 2e-5)


@pytest.mark.parametrize("layout", ["packing", "padding_free"])
def test_one_hypothesis_is_the_unpacked_run(tmp_path, layout):
    """With all sequences in one batch, the order of packing does not matter."""
    data = ragged_pairs(8)
    losses = []
    for options in ({**LAYOUTS[layout]}, {}):
        trainer = trainer_for(
            tmp_path, model=adapted_llama(1), data=data, max_steps=3, **{**options, "per_device_train_batch_size": 8}
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("layout", ["packing", "padding_free"])
@pytest.mark.parametrize("objective", ["wta", "relaxed"])
def test_packed_and_unpacked_runs_have_the_same_curves_and_metrics(tmp_path, layout, objective):
    data, curves = ragged_pairs(8), []
    for options in ({**LAYOUTS[layout], "eval_packing": layout == "packing"}, {}):
        trainer = trainer_for(
            tmp_path,
            model=adapted_llama(),
            data=data,
            eval_dataset=ragged_pairs(7, seed=5),
            max_steps=4,
            objective=objective,
            **{**options, "per_device_train_batch_size": 8},
        )
        trainer.train()
        metrics = trainer.evaluate()
        names = ("loss", "wta_nll", "mean_nll", "worst_nll", "mixture_nll", "win_share/0", "assignment_entropy")
        found = [value for name in names for value in logged(trainer, name)]
        found += [metrics[f"eval_{name}"] for name in names] + logged(trainer, "mean_token_accuracy")[:4]
        curves.append(found)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_scores_keep_their_order_without_padding_and_are_refused_when_packed(tmp_path):
    model, data = adapted_llama(), ragged_pairs(9)
    plain = trainer_for(tmp_path, model=model, data=data).score(data)
    free = trainer_for(tmp_path, model=adapted_llama(), data=data, padding_free=True, max_length=None).score(data)
    torch.testing.assert_close(free.scores, plain.scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(free.winners, plain.winners)
    packed = trainer_for(tmp_path, model=adapted_llama(), data=data, packing=True, max_length=24)
    with pytest.raises(ValueError, match="eval_packing=False"):
        packed.score(data)


def test_evaluation_unpacked_while_training_packed(tmp_path):
    data = ragged_pairs(9)
    options = {"packing": True, "max_length": 24, "eval_packing": False, "per_device_eval_batch_size": 2}
    trainer = trainer_for(tmp_path, model=adapted_llama(), data=data, eval_dataset=data, **options)
    plain = trainer_for(tmp_path, model=adapted_llama(), data=data, eval_dataset=data)
    for name in ("eval_loss", "eval_mean_nll", "eval_win_share/0"):
        assert trainer.evaluate()[name] == pytest.approx(plain.evaluate()[name], rel=1e-5)


def test_learned_positions_are_counted_from_the_start_of_each_sequence(tmp_path, monkeypatch):
    model = with_hypotheses(tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), lora_alpha=8)
    reference = frozen_copy(model)
    _, batches, weights, steps = train_packed(tmp_path, monkeypatch, model, objective="wta", **LAYOUTS["packing"])
    for batch, own, gradients in zip(batches, weights, steps, strict=True):
        expected = gradients_by_hand(reference, [padded_batch(unpacked(batch))], [own.tolist()], "token")
        assert_same_gradients(gradients, expected, 2e-5)


def test_a_packed_row_without_anything_to_learn(tmp_path, monkeypatch):
    data = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100] * 3} for _ in range(8)])
    _, _, _, steps = train_packed(
        tmp_path, monkeypatch, adapted_llama(), data, objective="wta", **LAYOUTS["padding_free"]
    )
    assert all(gradient.abs().sum() == 0 for step in steps for gradient in step.values())
