"""What each sequence of an optimizer step trains, decided for all of them at once.

Balanced assignment, matching and temperatures in units of the spread need the scores of the whole step, of all processes and
micro-batches. So the step is scored before the first of its micro-batches is trained.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch

from trainer_ext.objectives import scores_per_token
from trainer_ext.seeding import Clusters
from trainer_ext.state_files import load_state, save_state
from trainer_ext.transport import score_spread, share_offsets


RECENT_NAME = "recent_scores.safetensors"
# Sequences for each hypothesis that are remembered unless the user says otherwise.
RECENT_PER_HYPOTHESIS = 16
# Part of the shares of clusters, and of "tracked" ones, that is equal for all hypotheses, so that none is zero.
EQUAL_PART_OF_CLUSTERS = 0.05
EQUAL_PART_OF_TRACKED = 0.2
# The spread is at least this part of the size of the scores: hypotheses that differ by rounding alone do not differ.
LEAST_SPREAD = 1e-3


class RecentScores:
    """The scores of the last sequences of training, for each token: the queue that a small batch is balanced with.

    Args:
        num_hypotheses (`int`): K.
        size (`int`, *optional*): Sequences to remember, 0 or more; 16 K by default.

    Attributes:
        scores (`torch.Tensor`): float64 of shape (N, K), finite, in nats for each token; the oldest first.
        clusters ([`Clusters`], *optional*): Those that the hypotheses began with.
    """

    def __init__(self, num_hypotheses: int, size: int | None = None) -> None:
        self.size = RECENT_PER_HYPOTHESIS * num_hypotheses if size is None else size
        self.scores = torch.zeros(0, num_hypotheses, dtype=torch.float64)
        self.clusters: Clusters | None = None

    def add(self, scores: torch.Tensor) -> torch.Tensor:
        """Add the rows (S, K) of a step; returns those before it and its own. The oldest ones are then forgotten."""
        rows = torch.cat([self.scores, scores])
        self.scores = rows[max(len(rows) - self.size, 0) :]
        return rows

    def forget(self) -> None:
        """Begin anew: the scores from now on are of another kind."""
        self.scores = self.scores[:0]

    def copy(self, source: int, target: int) -> None:
        """Hypothesis `target` has become a copy of `source`: what is remembered of it counts no more."""
        self.scores = self.scores.clone()
        self.scores[:, target] = self.scores[:, source]

    def save(self, directory: str | Path) -> None:
        """Write `recent_scores.safetensors`, whole or not at all."""
        clusters = {} if self.clusters is None else self.clusters.tensors()
        tensors = {"scores": self.scores, **clusters}
        save_state({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(directory, RECENT_NAME))

    def load(self, directory: str | Path) -> None:
        """Take over what `save` wrote. Without a file nothing is remembered: the run that is resumed did not.

        Raises:
            ValueError: The file is damaged, or of another number of hypotheses.
        """
        path = Path(directory, RECENT_NAME)
        tensors = load_state(path, "to go on without them")
        if tensors is None:
            return
        scores = tensors.pop("scores")
        if scores.dim() != 2 or scores.shape[1] != self.scores.shape[1]:
            raise ValueError(
                f"The recent scores in {path} have the shape {tuple(scores.shape)}, not (N, {self.scores.shape[1]}): they "
                "are of a run with another `num_hypotheses`."
            )
        self.scores = scores[max(len(scores) - self.size, 0) :].double()
        self.clusters = Clusters(**tensors) if tensors else None


class StepPlan:
    """The weights of the sequences of an optimizer step on this process, found again by content.

    Sequences of the same content are interchangeable, so it does not matter in which order the micro-batches come.
    """

    def __init__(self, keys: list[int], weights: torch.Tensor) -> None:
        self._weights = weights
        self._rows: defaultdict[int, list[int]] = defaultdict(list)
        for row, key in enumerate(keys):
            self._rows[key].append(row)

    def __len__(self) -> int:
        """The sequences that are still to be taken."""
        return sum(map(len, self._rows.values()))

    def take(self, keys: list[int]) -> torch.Tensor:
        """The weights (B, K) of the sequences of a micro-batch. Each can be taken once.

        Raises:
            RuntimeError: A sequence was not planned.
        """
        try:
            rows = [self._rows[key].pop(0) for key in keys]
        except IndexError:
            raise RuntimeError(
                "This batch is not one of those that the step was planned with. `training_step` must be called with the "
                "batches of `get_batch_samples`, as `train` does."
            ) from None
        return self._weights[rows]


def finite_rows(scores: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """What is known from a step of S sequences, for each token: float64 of shape (<= S, K).

    Without sequences that have no supervised tokens, or no finite score under some hypothesis.
    """
    whole = torch.isfinite(scores).all(dim=1) & (num_tokens > 0)
    return scores_per_token(scores[whole].double(), num_tokens[whole])


def spread_of(rows: torch.Tensor) -> float:
    """`transport.score_spread` of finite rows (N, K), above 0: a unit for temperatures, in nats for each token."""
    least = LEAST_SPREAD * rows.abs().mean().item() if len(rows) else 0.0
    return max(score_spread(rows), least, torch.finfo(torch.float32).tiny)


def target_shares(
    wanted: str | list[float], clusters: torch.Tensor | None, rows: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The share of the sequences that each hypothesis should get: float64 of shape (K,), above 0, summing to 1.

    Args:
        wanted (`str` or `list[float]`): `"clusters"`; `"uniform"`; `"tracked"`: those that the hypotheses would have at this
            temperature without balancing; or K numbers. A twentieth of the first and a fifth of the third is equal for all.
        clusters (`torch.Tensor`, *optional*): Shape (K,), the shares of the clusters that the hypotheses began with. Without
            any, `"clusters"` is `"uniform"`.
        rows (`torch.Tensor`): float64 of shape (N, K), in nats for each token.
        temperature (`float`): In nats for each token.
    """
    count = rows.shape[1]
    equal = torch.full((count,), 1.0 / count, dtype=torch.float64)
    if wanted == "uniform":
        return equal
    if wanted == "clusters":
        return equal if clusters is None else equal.lerp(clusters.double(), 1 - EQUAL_PART_OF_CLUSTERS)
    if wanted == "tracked":
        free = torch.softmax(rows / temperature, dim=1).mean(dim=0) if len(rows) else equal
        return equal.lerp(free, 1 - EQUAL_PART_OF_TRACKED)
    shares = torch.tensor(wanted, dtype=torch.float64)
    return shares / shares.sum()


def balanced_scores(
    scores: torch.Tensor,
    num_tokens: torch.Tensor,
    rows: torch.Tensor,
    *,
    wanted: str | list[float],
    clusters: torch.Tensor | None,
    temperature: float,
    strength: float,
) -> torch.Tensor:
    """The scores of a step with the offsets of the hypotheses: softmax_k of them, for each token / T, is the transport plan.

    Args:
        scores (`torch.Tensor`): Shape (S, K), in nats for each sequence.
        num_tokens (`torch.Tensor`): Shape (S,).
        rows (`torch.Tensor`): float64 of shape (N, K), in nats for each token: those of the step and before (`RecentScores`).
        wanted, clusters: See `target_shares`.
        temperature (`float`): T > 0, in nats for each token.
        strength (`float`): See `transport.share_offsets`.

    Returns:
        `torch.Tensor`: float64 of shape (S, K): s_k + n v_k. Where s_k is not finite, it stays so.
    """
    if len(rows) == 0:
        return scores.double()
    offsets = share_offsets(rows, target_shares(wanted, clusters, rows, temperature), temperature, strength)
    return scores.double() + num_tokens.double().unsqueeze(1) * offsets
