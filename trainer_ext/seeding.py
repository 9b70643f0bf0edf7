"""Where hypotheses begin: clusters of what the base model sees in the sequences.

Which hypothesis takes which kind of sequence is decided early, by differences that are noise then, and is hard to change
later. So for the first part of the competition the sequences go to hypotheses by clusters of their features, as the centres of
k-means are seeded before its own rounds begin; then the scores decide.
"""

from __future__ import annotations

import torch
from scipy.cluster.vq import kmeans2


ATTEMPTS = 10


def find_centres(features: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """The centres of the best of ten runs of k-means: float32 of shape (count, width).

    With fewer sequences than centres some are the same: nothing tells those hypotheses apart then.

    Args:
        features (`torch.Tensor`): Shape (N, width).
        count (`int`): K.
        seed (`int`): Of the first centres (k-means++).
    """
    if len(features) <= count:
        places = torch.arange(count) % max(len(features), 1)
        return features.float().cpu()[places] if len(features) else torch.zeros(count, features.shape[1])
    points = features.double().cpu().numpy()
    best, least = points[:count], float("inf")
    for attempt in range(ATTEMPTS):
        # Empty clusters are not an error here: a worse attempt than others.
        centres, labels = kmeans2(points, count, iter=50, minit="++", missing="warn", seed=seed * ATTEMPTS + attempt)
        distortion = float(((points - centres[labels]) ** 2).sum())
        if distortion < least:
            best, least = centres, distortion
    return torch.from_numpy(best).float()


def closeness(features: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Minus the squared distance of each of B sequences to each of K centres: float32 of shape (B, K)."""
    return -torch.cdist(features, centres.to(features.device)).square()
