"""Winner-takes-all objectives: from the scores of the hypotheses to the weights of their losses.

Pure functions of tensors. The score of hypothesis k for a sequence is s_k = sum_t log p(x_t | x_<t, c; theta_k) over the
supervised tokens; the loss of the sequence is - sum_k q_k s_k, with the weights q of this module detached
(arXiv 2507.10419, sections 3 and 4).
"""

from __future__ import annotations

import torch


OBJECTIVES = ("wta", "relaxed", "annealed", "balanced", "random")
# Those with a temperature.
ANNEALED = ("annealed", "balanced")
# Scores that differ by less than this part of themselves are equal: some units in the last place of float32. The same rows
# in a batch of another shape give scores that differ by 2e-7 of themselves (135M parameters, float32, on a CPU).
TIE = 1e-6


def finite_scores(scores: torch.Tensor) -> torch.Tensor:
    """`scores` as float32 without infinities: NaN and -inf become the worst finite score, +inf the best."""
    limit = torch.finfo(torch.float32).max
    return torch.nan_to_num(scores.detach().float(), nan=-limit, posinf=limit, neginf=-limit)


def scores_per_token(scores: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """s_k / n of shape (B, K) from scores (B, K) and numbers of tokens (B,); a sequence without tokens is divided by 1."""
    return scores / num_tokens.to(scores.device).clamp(min=1).unsqueeze(1)


def pick_winners(scores: torch.Tensor, lots: torch.Tensor) -> torch.Tensor:
    """The best hypothesis of each sequence; among those that tie, the one with the largest lot.

    Scores tie if they are equal but for the last digits of float32 (`TIE`), which the layout of a batch decides.

    Args:
        scores (`torch.Tensor`): Shape (B, K), any float dtype, higher is better.
        lots (`torch.Tensor`): Shape (B, K), numbers in [0, 1).

    Returns:
        `torch.Tensor`: int64 of shape (B,).
    """
    scores = finite_scores(scores)
    best = scores.max(dim=1, keepdim=True).values
    # The product cannot overflow, and a difference of finite scores that does is no tie.
    ties = best - scores <= TIE * best.abs()
    return torch.where(ties, lots.to(scores.device), -1.0).argmax(dim=1)


def wta_weights(winners: torch.Tensor, num_hypotheses: int) -> torch.Tensor:
    """1 for the winner, 0 for the rest: float32 of shape (B, K) from winners of shape (B,)."""
    return torch.nn.functional.one_hot(winners, num_hypotheses).float()


def relaxed_weights(winners: torch.Tensor, num_hypotheses: int, epsilon: float) -> torch.Tensor:
    """1 - epsilon for the winner, epsilon / (K - 1) for each other: float32 of shape (B, K).

    With one hypothesis the weight is 1. Relaxed winner-takes-all, arXiv 2507.10419, section 3.
    """
    if num_hypotheses == 1:
        return wta_weights(winners, 1)
    loser = epsilon / (num_hypotheses - 1)
    return loser + (1.0 - epsilon - loser) * wta_weights(winners, num_hypotheses)


def annealed_weights(scores: torch.Tensor, num_tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax over k of (s_k / n) / T: float32 of shape (B, K).

    Args:
        scores (`torch.Tensor`): Shape (B, K), nats for each sequence.
        num_tokens (`torch.Tensor`): Shape (B,), the number n of supervised tokens.
        temperature (`float`): T > 0, in nats for each token.
    """
    per_token = scores_per_token(finite_scores(scores), num_tokens)
    # The best is subtracted before dividing, so that no temperature overflows. Beyond the range of float32 a gap would be
    # infinite, and T infinite or zero.
    limits = torch.finfo(torch.float32)
    gap = (per_token - per_token.max(dim=1, keepdim=True).values).clamp(min=limits.min)
    return torch.softmax(gap / min(max(temperature, limits.tiny), limits.max), dim=1)


def random_weights(num_hypotheses: int, draws: torch.Tensor) -> torch.Tensor:
    """1 for a hypothesis drawn uniformly for each sequence, 0 for the rest. The control experiment.

    Args:
        num_hypotheses (`int`): K.
        draws (`torch.Tensor`): Shape (B,), numbers in [0, 1).

    Returns:
        `torch.Tensor`: float32 of shape (B, K).
    """
    # The product may be rounded up to K.
    return wta_weights((draws * num_hypotheses).long().clamp(max=num_hypotheses - 1), num_hypotheses)


def assignment_weights(
    objective: str,
    scores: torch.Tensor,
    num_tokens: torch.Tensor,
    *,
    epsilon: float = 0.05,
    temperature: float | None = None,
    draws: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights q of an objective, and the winners they are built on.

    Where some hypotheses have a score that is not finite (an overflow in float16, say), the best takes over their weight.

    Args:
        objective (`str`): `"wta"`, `"relaxed"`, `"annealed"`, `"balanced"` or `"random"`. `"balanced"` is `"annealed"` on scores
            with the offsets of the hypotheses (see `planning.balanced_scores`).
        scores (`torch.Tensor`): Shape (B, K), any float dtype, in nats for each sequence.
        num_tokens (`torch.Tensor`): Shape (B,), the number of supervised tokens.
        epsilon (`float`): Of `"relaxed"`.
        temperature (`float`, *optional*): Of `"annealed"` and `"balanced"`; None once it is at its final value (the weights of
            `"wta"`).
        draws (`torch.Tensor`): Shape (B, K + 1), numbers in [0, 1): K lots for ties, and one for `"random"`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: q, float32 of shape (B, K) on the device of `scores`, rows summing to 1, finite
        for any scores; and the best hypothesis of each sequence, int64 of shape (B,).

    Raises:
        ValueError: There is no such objective.
    """
    num_hypotheses = scores.shape[1]
    draws = draws.to(scores.device)
    winners = pick_winners(scores, draws[:, :num_hypotheses])
    if needs_winners_only(objective, temperature):
        weights = winner_weights(objective, winners, num_hypotheses, epsilon)
    elif objective in ANNEALED:
        assert temperature is not None
        weights = annealed_weights(scores, num_tokens, temperature)
    elif objective == "random":
        weights = random_weights(num_hypotheses, draws[:, num_hypotheses])
    else:
        raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {objective!r}.")
    return give_broken_to_winner(weights, scores, winners), winners


def is_broken(scores: torch.Tensor) -> torch.Tensor:
    """Which hypotheses must not be trained on a sequence: those without a finite score, unless all are without: bool (B, K).

    If no hypothesis has one, it is the model or the sequence that is broken. The loss must show that, so nothing is left out.
    """
    is_finite = torch.isfinite(scores)
    return ~is_finite & is_finite.any(dim=1, keepdim=True)


def give_broken_to_winner(weights: torch.Tensor, scores: torch.Tensor, winners: torch.Tensor) -> torch.Tensor:
    """`weights` (B, K) with those of broken hypotheses moved to the winner (B,): zero times NaN would still be NaN."""
    kept = torch.where(is_broken(scores), 0.0, weights)
    return kept + wta_weights(winners, weights.shape[1]) * (weights - kept).sum(dim=1, keepdim=True)


def needs_winners_only(objective: str, temperature: float | None) -> bool:
    """Whether the weights follow from the winners alone: not from the other scores, nor from draws."""
    return objective in ("wta", "relaxed") or (objective in ANNEALED and temperature is None)


def winner_weights(objective: str, winners: torch.Tensor, num_hypotheses: int, epsilon: float) -> torch.Tensor:
    """The weights of an objective for which `needs_winners_only` is true: float32 of shape (B, K)."""
    if objective == "relaxed":
        return relaxed_weights(winners, num_hypotheses, epsilon)
    return wta_weights(winners, num_hypotheses)


# --------------------------------------------------------------------------------------------------------------------
# Fewer rows with a weight


def drop_small_weights(weights: torch.Tensor, min_weight: float) -> torch.Tensor:
    """Set weights below `min_weight` to zero, other than the largest of each sequence. The others stay as they are.

    The gradient of a sequence is g = sum_k q_k g_k, with g_k the gradient of -s_k; of the K weights at most K - 1 are
    dropped, each below `min_weight`. So what is left out is at most

        | sum_dropped q_k g_k |  <=  (sum_dropped q_k) max_k |g_k|  <  (K - 1) * min_weight * max_k |g_k|

    in any norm, and the same holds for the loss with |s_k| in place of |g_k|, and for their means over a batch. The kept
    weights are not scaled up to sum to 1: that would add an error of the same size, for the bound
    2 (K - 1) * min_weight * max_k |g_k|.

    Args:
        weights (`torch.Tensor`): Shape (B, K).
        min_weight (`float`): In [0, 1]; 0 drops nothing.
    """
    keep = (weights >= min_weight) | (weights == weights.max(dim=1, keepdim=True).values)
    return torch.where(keep, weights, 0.0)


def sample_losers(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Keep the largest weight q_w of each sequence, and one of the others, drawn by weight, in place of all of them.

    A loser j is drawn with probability q_j / (1 - q_w) and then carries the weight 1 - q_w, so its mean over the draws is
    q_j: the mean of the gradient is that of all rows. At most 2 rows for each sequence are left to train.

    Args:
        weights (`torch.Tensor`): Shape (B, K), rows summing to 1.
        draws (`torch.Tensor`): Shape (B,), numbers in [0, 1).
    """
    winner = wta_weights(weights.argmax(dim=1), weights.shape[1]).bool()
    losers = torch.where(winner, 0.0, weights)
    return torch.where(winner, weights, sample_one(losers, draws) * losers.sum(dim=1, keepdim=True))


def sample_one(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """One hypothesis of each sequence, drawn by its weight, with the weight 1: the mean of the gradient is that of all rows.

    Args:
        weights (`torch.Tensor`): Shape (B, K), at least 0; what a row sums to does not matter.
        draws (`torch.Tensor`): Shape (B,), numbers in [0, 1).

    Returns:
        `torch.Tensor`: float32 of shape (B, K), one 1 in each row.
    """
    # A place on the line of cumulated weights, whose steps are the probabilities.
    place = draws.to(weights.device) * weights.sum(dim=1)
    drawn = torch.searchsorted(weights.cumsum(dim=1), place.unsqueeze(1), right=True).clamp(max=weights.shape[1] - 1)
    # Rounding at the end of the line must not draw a hypothesis without weight.
    drawn = torch.where(weights.gather(1, drawn) > 0, drawn, weights.argmax(dim=1, keepdim=True)).squeeze(1)
    return wta_weights(drawn, weights.shape[1])


# --------------------------------------------------------------------------------------------------------------------
# Temperature


def temperature_at(step: int, initial: float, final: float, decay: float) -> float:
    """T(step) = max(final, initial * decay ** step), with `step` counted in optimizer steps from 0."""
    temperature = initial * decay**step
    # A derived decay ends exactly on the final value but for rounding.
    return final if temperature <= final * (1 + 1e-6) else temperature


def decay_for(initial: float, final: float, steps: float) -> float:
    """The decay with which the temperature falls from `initial` to `final` in `steps` optimizer steps."""
    return (final / initial) ** (1.0 / max(steps, 1.0))
