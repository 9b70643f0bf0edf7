"""What the trainer reports about the competition, from the scores of a window of sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_mcl.card import CardFigures
from trainer_ext.evaluation.specialisation import assignment_entropy
from trainer_ext.objectives import finite_scores


class ScoreWindow:
    """Collects the scores of sequences until they are summarised, exactly: no averages of averages."""

    def __init__(self) -> None:
        self._scores: list[torch.Tensor] = []
        self._num_tokens: list[torch.Tensor] = []
        self._winners: list[torch.Tensor] = []

    def __len__(self) -> int:
        """The number of batches added so far."""
        return len(self._scores)

    def add(self, scores: torch.Tensor, num_tokens: torch.Tensor, winners: torch.Tensor) -> None:
        """Add B sequences: scores of shape (B, K) in nats, numbers of supervised tokens and winners of shape (B,)."""
        self._scores.append(scores.detach().float().cpu())
        self._num_tokens.append(num_tokens.cpu())
        self._winners.append(winners.cpu())

    @property
    def scores(self) -> torch.Tensor:
        """float32 of shape (N, K), nats for each sequence."""
        return torch.cat(self._scores)

    @property
    def num_tokens(self) -> torch.Tensor:
        """int64 of shape (N,), supervised tokens of each sequence."""
        return torch.cat(self._num_tokens)

    @property
    def winners(self) -> torch.Tensor:
        """int64 of shape (N,), the best hypothesis of each sequence."""
        return torch.cat(self._winners)

    def summary(self) -> dict[str, float]:
        """The metrics of everything added so far; see `competition_metrics`."""
        return competition_metrics(self.scores, self.num_tokens, self.winners)

    def for_card(self) -> CardFigures:
        """The same for a model card, with what it takes to judge them. Sequences without supervised tokens do not count."""
        counted = self.num_tokens[self.num_tokens > 0]
        tokens = counted.double().mean().item() if len(counted) else 0.0
        return CardFigures(self.summary(), len(counted), tokens)

    def clear(self) -> None:
        self._scores.clear()
        self._num_tokens.clear()
        self._winners.clear()


def win_weights(wins: Sequence[float]) -> list[float]:
    """The weights of the hypotheses by their wins, for mixtures and rankings: as if each had won one more, so that none is 0.

    With n_k wins of N sequences that is (n_k + 1) / (N + K), the mean of the posterior under a uniform prior (Laplace).
    """
    total = sum(wins) + len(wins)
    return [(count + 1) / total for count in wins]


class WinWatch:
    """Notices hypotheses that have not won for a while.

    Args:
        num_hypotheses (`int`): K.
        patience (`int`): Optimizer steps without a win.
        step (`int`): The step at which watching begins.
    """

    def __init__(self, num_hypotheses: int, patience: int, step: int) -> None:
        self.patience = patience
        self._last_win = [step] * num_hypotheses
        self._named: set[int] = set()

    def update(self, winners: set[int], step: int) -> list[tuple[int, int]]:
        """Tell who won at a step; returns each hypothesis that has just run out of patience, and its steps without a win."""
        found = []
        for hypothesis, last in enumerate(self._last_win):
            if hypothesis in winners:
                self._last_win[hypothesis] = step
                self._named.discard(hypothesis)
            elif step - last >= self.patience and hypothesis not in self._named:
                self._named.add(hypothesis)
                found.append((hypothesis, step - last))
        return found


def competition_metrics(scores: torch.Tensor, num_tokens: torch.Tensor, winners: torch.Tensor) -> dict[str, float]:
    """How well the hypotheses explain the sequences, and how they share them.

    Args:
        scores (`torch.Tensor`): Shape (N, K), nats for each sequence.
        num_tokens (`torch.Tensor`): Shape (N,), supervised tokens of each sequence. Sequences without any do not count.
        winners (`torch.Tensor`): int64 of shape (N,).

    Returns:
        `dict[str, float]`: In nats for each supervised token: `wta_nll` (best of K), `mean_nll`, `worst_nll` (of the K for
        each sequence) and `mixture_nll`, -log of the likelihood under the mixture of the hypotheses weighted by their win
        shares. `win_share/k`, the part of the sequences that hypothesis k won; `assignment_entropy` of the shares, in
        nats.
    """
    counted = num_tokens > 0
    scores, num_tokens, winners = finite_scores(scores[counted]).double(), num_tokens[counted], winners[counted]
    num_hypotheses = scores.shape[1]
    tokens = max(int(num_tokens.sum()), 1)
    shares = torch.bincount(winners, minlength=num_hypotheses).double() / max(len(winners), 1)
    mixture = torch.logsumexp(scores + shares.log(), dim=1)
    metrics = {
        "wta_nll": -scores.max(dim=1).values.sum().item() / tokens,
        "mean_nll": -scores.mean(dim=1).sum().item() / tokens,
        "worst_nll": -scores.min(dim=1).values.sum().item() / tokens,
        "mixture_nll": -mixture.sum().item() / tokens,
    }
    metrics.update({f"win_share/{k}": share.item() for k, share in enumerate(shares)})
    metrics["assignment_entropy"] = assignment_entropy(shares.tolist())
    return metrics
