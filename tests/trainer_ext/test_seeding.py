"""The clusters that hypotheses begin with: features against plain loops, centres, and what is trained while they decide."""

from __future__ import annotations

import pytest
import torch

from tests.trainer_ext.reference import (
    Gradients,
    RecordingCollator,
    adapted_llama,
    assert_same_gradients,
    frozen_copy,
    gradients_by_hand,
    logged,
    ragged_pairs,
    ragged_rows,
    sequences_of,
    trainer_for,
    unpacked,
)
from trainer_ext.batches import SequenceBatch
from trainer_ext.seeding import closeness, find_centres


def features_by_hand(model, ids, labels):
    """Mean hidden state of the supervised tokens less that of the prompt, of length 1; one sequence, the base model alone."""
    with torch.no_grad(), model.disable_adapter():
        hidden = model.get_base_model().model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    said = [state for state, label in zip(hidden, labels, strict=True) if label != -100]
    asked = [state for state, label in zip(hidden, labels, strict=True) if label == -100]
    mean = sum(said) / len(said)
    if asked:
        mean = mean - sum(asked) / len(asked)
    return mean / mean.norm()


@pytest.mark.parametrize("packed", [False, True])
def test_features(tmp_path, packed):
    options = {"padding_free": True, "max_length": None} if packed else {}
    model = adapted_llama()
    reference = frozen_copy(model)
    trainer = trainer_for(tmp_path, model=model, objective="balanced", **options)
    trainer.model_wrapped = trainer.model
    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer._features(SequenceBatch(dict(batch)))
    expected = [features_by_hand(reference, *one) for one in (unpacked(batch) if packed else sequences_of(batch))]
    assert len(expected) == 4
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_centres_are_those_of_blobs():
    generator = torch.Generator().manual_seed(0)
    true = 3 * torch.randn(4, 16, generator=generator)
    # Of very different sizes.
    labels = torch.tensor([0] * 80 + [1] * 10 + [2] * 10 + [3] * 10)
    points = true[labels] + 0.1 * torch.randn(len(labels), 16, generator=generator)
    centres = find_centres(points, 4, seed=1)
    nearest = closeness(points, centres).argmax(dim=1)
    for blob in range(4):
        assert len(set(nearest[labels == blob].tolist())) == 1
    assert len(set(nearest.tolist())) == 4
    assert torch.equal(centres, find_centres(points, 4, seed=1))
    distance = (points[7] - centres[2]).square().sum()
    assert closeness(points, centres)[7, 2].item() == pytest.approx(-distance.item(), rel=1e-4)


def test_clusters_decide_what_is_trained(tmp_path):
    model, collator, gradients = adapted_llama(), RecordingCollator(), Gradients()
    reference = frozen_copy(model)
    trainer = trainer_for(
        tmp_path,
        model=model,
        data=ragged_rows(12, without_labels=()),
        data_collator=collator,
        callbacks=[gradients],
        objective="balanced",
        seeding_fraction=0.4,
        # So cold, and the shares so free, that each goes to the nearest centre.
        initial_temperature=1e-5,
        final_temperature=1e-6,
        balance_strength=1e-6,
        learning_rate=0.0,
        max_grad_norm=0.0,
        max_length=None,
        max_steps=-1,
        num_train_epochs=1,
    )
    trainer.train()
    rows = [trainer.train_dataset[i] for i in range(12)]
    # The centres are found from all rows, in an order of the seed.
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    features = torch.stack([features_by_hand(reference, rows[i]["input_ids"], rows[i]["labels"]) for i in order])
    centres = find_centres(features, 3, seed=3)
    batch = collator.batches[0]  # It was fetched before those that the clusters were made from.
    weights = []
    for ids, labels in sequences_of(batch):
        close = closeness(features_by_hand(reference, ids, labels)[None], centres)[0]
        weights.append([float(k == close.argmax()) for k in range(3)])
    assert_same_gradients(gradients.steps[0], gradients_by_hand(reference, [batch], [weights], "token"), 1e-4)


def test_fewer_sequences_than_hypotheses(tmp_path):
    features = torch.eye(2, 5)
    assert torch.equal(find_centres(features, 3, seed=0), torch.eye(2, 5)[[0, 1, 0]])
    assert find_centres(features[:0], 3, seed=0).shape == (3, 5)
    trainer = trainer_for(tmp_path, objective="balanced", data=ragged_pairs(2), max_steps=10)
    trainer.train()
    assert trainer.state.global_step == 10


def test_spread_is_that_of_the_scores_once_they_decide(tmp_path):
    trainer = trainer_for(
        tmp_path,
        objective="balanced",
        seeding_fraction=0.25,
        annealing_fraction=0.8,
        max_steps=8,
        data=ragged_pairs(30),
    )
    trainer.train()
    spreads = logged(trainer, "score_spread")
    assert min(spreads[:2]) > 10 * max(spreads[2:])
    assert trainer._recent.centres is None
