"""Sharing sequences out among hypotheses by entropic optimal transport, so that each gets its part.

Pure functions of tensors. Row i of `scores` is what the K hypotheses say about sequence i, and the plan gives it to
hypothesis k with the weight

    q_ik = softmax_k( (z_ik + v_k) / T ),

where z are the scores for each token, T the temperature, and v the offsets of the hypotheses (the dual potentials of the
transport), which are such that the column means of q are the target shares. Without offsets this is the objective "annealed".
Sources: Sinkhorn 1967; Cuturi 2013 (entropic transport); Caron et al. 2020 (SwAV: online, with a queue of recent rows); Chizat
et al. 2018 (targets that may be missed at a price).
"""

from __future__ import annotations

import math

import torch


# Of the offsets, relative to the temperature, when iterating stops; and the most iterations.
TOLERANCE = 1e-6
MOST_ITERATIONS = 2000


def score_spread(scores: torch.Tensor) -> float:
    """How far the hypotheses differ about a sequence beyond one being better on all: nats for each token.

    The root mean square of the scores without the means of their rows (easy sequences) and columns (hypotheses that are ahead).

    Args:
        scores (`torch.Tensor`): float64 of shape (N, K), finite, in nats for each token; N may be 0 (the spread is 0).
    """
    if scores.shape[0] < 2 or scores.shape[1] < 2:
        return 0.0
    centred = scores - scores.mean(dim=1, keepdim=True)
    centred = centred - centred.mean(dim=0, keepdim=True)
    rows, columns = scores.shape
    # Unbiased: of N * K numbers, (N - 1) * (K - 1) are left free by the means.
    return (centred.square().sum() / ((rows - 1) * (columns - 1))).sqrt().item()


def share_offsets(
    scores: torch.Tensor, targets: torch.Tensor, temperature: float, strength: float = math.inf
) -> torch.Tensor:
    """The offsets v of the plan: float64 of shape (K,), in nats for each token, with mean zero if the shares are strict.

    Args:
        scores (`torch.Tensor`): float64 of shape (N, K), finite, in nats for each token.
        targets (`torch.Tensor`): float64 of shape (K,), positive, summing to 1: the share of each hypothesis.
        temperature (`float`): T > 0, in nats for each token.
        strength (`float`): The price, in nats for each token, of the Kullback-Leibler divergence of the shares from the
            targets: v_k = -strength * log(share_k / target_k). So a share that is far too small costs more than any difference
            of scores, while large differences buy unequal shares. Infinity: the shares are exactly the targets.
    """
    offsets = torch.zeros_like(targets)
    is_strict = math.isinf(strength)
    log_count = math.log(len(scores))
    damping = 1.0 if is_strict else strength / (strength + temperature)
    for _ in range(MOST_ITERATIONS):
        # log of the column means of softmax((z + v) / T).
        log_shares = torch.log_softmax((scores + offsets) / temperature, dim=1).logsumexp(0) - log_count
        moved = damping * (offsets + temperature * (targets.log() - log_shares))
        if is_strict:
            moved = moved - moved.mean()
        change = (moved - offsets).abs().max().item()
        offsets = moved
        if change <= TOLERANCE * temperature:
            break
    return offsets
