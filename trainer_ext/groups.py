"""References of one prompt: sequences that are matched with hypotheses one to one in place of racing one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch.utils.data import Sampler

from trainer_ext.objectives import (
    TIE,
    finite_scores,
    give_broken_to_winner,
    is_broken,
    pick_winners,
    winner_weights,
)


# What the groups are called in a batch. No model has an input of this name.
GROUPS = "mcl_groups"


def group_id(value: Any) -> int:
    """A number in [0, 2^63) for a value of the group column, by its content: the same in every process and run.

    Raises:
        ValueError: The value is null.
    """
    if value is None:
        raise ValueError("`group_column` has a null value: give every row the value of its prompt, or remove the row.")
    text = json.dumps(value, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def match_groups(scores: torch.Tensor, groups: torch.Tensor, lots: torch.Tensor) -> torch.Tensor:
    """The hypothesis of each sequence, so that the sum of the scores of a group is largest.

    Within a group of R sequences a hypothesis takes at most ceil(R / K) of them: up to K sequences go to different ones. A
    group of one goes to its best hypothesis (`pick_winners`). Matchings whose sums tie are chosen by lot, not by index:
    each pair of a sequence and a hypothesis adds its lot, scaled so that all of them together stay below the size of a tie.

    Args:
        scores (`torch.Tensor`): Shape (N, K), any float dtype, higher is better. What is not finite is worse than all that is
            (+inf: better).
        groups (`torch.Tensor`): int64 of shape (N,); equal numbers are one group, wherever they stand.
        lots (`torch.Tensor`): Shape (N, K), numbers in [0, 1).

    Returns:
        `torch.Tensor`: int64 of shape (N,), on the device of `scores`.
    """
    winners = pick_winners(scores, lots)
    num_hypotheses = scores.shape[1]
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(row)
    for rows in members.values():
        if len(rows) == 1:
            continue
        gains = _gains(scores[rows].cpu(), lots[rows].cpu())
        most = -(-len(rows) // num_hypotheses)
        # Column k + K * j is the j-th place of hypothesis k.
        chosen, columns = linear_sum_assignment(gains.repeat(1, most).numpy(), maximize=True)
        assert chosen.tolist() == list(range(len(rows)))
        winners[rows] = torch.from_numpy(columns % num_hypotheses).to(winners)
    return winners


def matched_weights(
    weights: torch.Tensor,
    scores: torch.Tensor,
    groups: torch.Tensor,
    *,
    objective: str,
    epsilon: float,
    draws: torch.Tensor,
) -> torch.Tensor:
    """The weights of an objective, but with matched winners for the sequences of groups of more than one.

    Those have the weights of `objectives.winner_weights`, also while a temperature is warm: a softmax for each sequence on its
    own could not keep two references of a prompt from the same hypothesis. A hypothesis that is broken on the sequence it is
    matched with gives its weight to the best.

    Args:
        weights (`torch.Tensor`): Shape (N, K), as `objectives.assignment_weights` gives them. Groups of one keep theirs.
        scores (`torch.Tensor`): Shape (N, K), those that decide.
        groups (`torch.Tensor`): int64 of shape (N,).
        objective, epsilon: See `objectives.assignment_weights`; not `"random"`.
        draws (`torch.Tensor`): Shape (N, K + 1), numbers in [0, 1), the first K of which are lots.

    Returns:
        `torch.Tensor`: float32 of shape (N, K), rows summing to 1.
    """
    num_hypotheses = scores.shape[1]
    lots = draws[:, :num_hypotheses].to(scores.device)
    winners = match_groups(scores, groups, lots)
    is_lost = is_broken(scores).gather(1, winners[:, None]).squeeze(1)
    winners = torch.where(is_lost, pick_winners(scores, lots), winners)
    matched = give_broken_to_winner(winner_weights(objective, winners, num_hypotheses, epsilon), scores, winners)
    _, places, sizes = groups.unique(return_inverse=True, return_counts=True)
    has_others = (sizes[places] > 1).to(weights.device)
    return torch.where(has_others[:, None], matched, weights)


def _gains(scores: torch.Tensor, lots: torch.Tensor) -> torch.Tensor:
    """Scores of a group as float64 in which sums can be compared, and lots decide between those that tie."""
    is_finite = torch.isfinite(scores)
    wide = finite_scores(scores).double()
    known = wide[is_finite]
    if len(known) == 0:
        known = wide.new_zeros(1)
    size = known.abs().max().clamp(min=torch.finfo(torch.float32).tiny).item()
    # So far away that one pair less that is not finite is worth more than all others; but the sum keeps its digits.
    far = 4 * size * len(scores)
    top = known.max() + far
    low = known.min() - far
    wide = torch.where(is_finite, wide, torch.where(wide > 0, top, low))
    # Scores are good to this part of themselves: hypotheses of a sequence that differ by less get one value, so that lots decide.
    # Not by rounding to a grid: two that tie can lie on both sides of a boundary.
    step = TIE * size
    ordered, places = wide.sort(dim=1, descending=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, :-1] - ordered[:, 1:] > step
    levels = torch.where(begins, ordered, torch.inf).cummin(dim=1).values
    return wide.scatter(1, places, levels) + lots.double() * step / (4 * len(scores))


class GroupSampler(Sampler[int]):
    """Shuffles groups and keeps their sequences side by side.

    The order of an epoch follows from the seed and the epoch alone, so a resumed run has the order of a whole one, and all
    processes have one order. A step takes the next sequences of it, so that only groups at its ends are cut: the parts of a
    cut group are matched each on their own.

    Args:
        groups (`list[int]`): The group of each sequence of the data set.
        seed (`int`): As `data_seed` or `seed` of the trainer.
    """

    def __init__(self, groups: list[int], seed: int) -> None:
        self.seed = seed
        self.epoch = 0
        members: dict[int, list[int]] = {}
        for row, group in enumerate(groups):
            members.setdefault(group, []).append(row)
        self._members = list(members.values())
        self._length = len(groups)

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        digest = hashlib.blake2b(f"{self.seed}/{self.epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        for place in torch.randperm(len(self._members), generator=generator).tolist():
            yield from self._members[place]


class GroupCollator:
    """A collator whose batches tell the group of each sequence, unless a row has none (data to evaluate on need not).

    Args:
        collator: What makes batches of rows without the column.
        column (`str`): A column with the value that the references of a prompt have in common.
    """

    def __init__(self, collator: Any, column: str) -> None:
        self.collator = collator
        self.column = column

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        values = [row.get(self.column) for row in rows]
        batch = self.collator([{name: value for name, value in row.items() if name != self.column} for row in rows])
        if any(value is None for value in values):
            return batch
        return {**batch, GROUPS: torch.tensor([group_id(value) for value in values], dtype=torch.int64)}
