"""The clusters that hypotheses begin with: features against plain loops, mixtures, and what is trained while they decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

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
from trainer_ext.seeding import find_clusters


def features_by_hand(model, ids, labels):
    """Means of the middle hidden states over the supervised tokens and over the prompt; one sequence, the base model alone."""
    with torch.no_grad(), model.disable_adapter():
        states = model.get_base_model().model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    hidden = states[len(states) // 2][0]
    said = [state for state, label in zip(hidden, labels, strict=True) if label != -100]
    asked = [state for state, label in zip(hidden, labels, strict=True) if label == -100]
    return torch.stack([sum(part) / len(part) if part else torch.zeros_like(hidden[0]) for part in (said, asked)])


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


def blobs(sizes, seed=0, width=16):
    """Points (N, 2, width) around means of their own, stretched along one direction that all share; and which is whose."""
    generator = torch.Generator().manual_seed(seed)
    true = 3 * torch.randn(len(sizes), width, generator=generator)
    labels = torch.tensor([blob for blob, size in enumerate(sizes) for _ in range(size)])
    stretch = 0.5 * torch.randn(len(labels), 1, generator=generator) * torch.randn(width, generator=generator)
    points = true[labels] + stretch + 0.1 * torch.randn(len(labels), width, generator=generator)
    return torch.stack([points, torch.zeros_like(points)], dim=1), labels


def test_clusters_are_those_of_unequal_blobs():
    # Of very different sizes: k-means cuts the large one.
    features, labels = blobs([160, 20, 20, 20])
    found = find_clusters(features, 4, seed=1)
    nearest = found.closeness(features).argmax(dim=1)
    for blob in range(4):
        assert len(set(nearest[labels == blob].tolist())) == 1
    assert len(set(nearest.tolist())) == 4
    torch.testing.assert_close(found.shares, torch.tensor([160.0, 20.0, 20.0, 20.0]) / 220, rtol=1e-3, atol=1e-3)
    for name, tensor in find_clusters(features, 4, seed=1).tensors().items():
        assert torch.equal(tensor, found.tensors()[name])


def test_closeness_is_the_posterior_of_the_mixture():
    features, _ = blobs([60, 30, 20], seed=2, width=10)
    found = find_clusters(features, 3, seed=0)
    # By hand: the prompt says nothing here, so what is left is the completion less its mean.
    said = features[:, 0].double() - features[:, 0].double().mean(dim=0)
    said = (said / said.norm(dim=1, keepdim=True)).numpy()
    main = PCA(6).fit(said)  # 110 sequences: a direction for each 16.
    mixture = GaussianMixture(3, covariance_type="tied", n_init=20, random_state=0).fit(main.transform(said) * 10)
    order = np.argsort(-mixture.weights_)
    expected = torch.from_numpy(mixture.predict_proba(main.transform(said) * 10)[:, order])
    torch.testing.assert_close(found.closeness(features).exp().double(), expected, rtol=1e-2, atol=1e-3)


def test_what_the_prompt_tells_is_no_cluster():
    generator = torch.Generator().manual_seed(0)
    subject, answer = torch.randint(2, (2, 400), generator=generator)
    noise = 0.1 * torch.randn(400, 2, 24, generator=generator)
    axes = torch.eye(24)
    features = noise.clone()
    features[:, 1] += 5 * subject[:, None] * axes[0]
    # The subject moves the completion, along another direction, far more than the kind of answer does.
    features[:, 0] += 8 * subject[:, None] * axes[1] + answer[:, None] * axes[2]
    nearest = find_clusters(features, 2, seed=0).closeness(features).argmax(dim=1)
    agreeing = (nearest == answer).float().mean().item()
    assert max(agreeing, 1 - agreeing) > 0.99


def test_clusters_in_the_order_of_given_shares():
    features, _ = blobs([80, 40, 20])
    found = find_clusters(features, 3, seed=0)
    turned = found.arranged([2, 0, 1])
    assert torch.equal(turned.shares, found.shares[[2, 0, 1]])
    torch.testing.assert_close(turned.closeness(features), found.closeness(features)[:, [2, 0, 1]])


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
        # So cold, and the shares so free, that each goes to the nearest cluster.
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
    # The clusters are found from all rows, in an order of the seed.
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    features = torch.stack([features_by_hand(reference, rows[i]["input_ids"], rows[i]["labels"]) for i in order])
    clusters = find_clusters(features, 3, seed=3)
    batch = collator.batches[0]  # It was fetched before those that the clusters were made from.
    weights = []
    for ids, labels in sequences_of(batch):
        close = clusters.closeness(features_by_hand(reference, ids, labels)[None])[0]
        weights.append([float(k == close.argmax()) for k in range(3)])
    assert_same_gradients(gradients.steps[0], gradients_by_hand(reference, [batch], [weights], "token"), 1e-4)


def test_fewer_sequences_than_hypotheses(tmp_path):
    features = torch.randn(2, 2, 5)
    for few in (features, features[:0]):
        found = find_clusters(few, 3, seed=0)
        torch.testing.assert_close(found.closeness(features), torch.full((2, 3), 1 / 3).log())
        assert found.shares.tolist() == pytest.approx([1 / 3] * 3)
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
    # Their shares are aimed at to the end.
    assert trainer._recent.clusters is not None
