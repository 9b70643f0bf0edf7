"""References of one prompt: sequences that are matched with hypotheses one to one in place of racing one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch.utils.data import Sampler

from trainer_ext.objectives import TIE, finite_scores, pick_winners


GROUPS = "groups"


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
    # Scores are good to this part of themselves: what differs by less is rounded to one value, so that lots decide.
    step = TIE * size
    return (wide / step).round() * step + lots.double() * step / (4 * len(scores))


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
    """A collator whose batches tell the group of each sequence.

    Args:
        collator: What makes batches of rows without the column.
        column (`str`): A column with the value that the references of a prompt have in common.
    """

    def __init__(self, collator: Any, column: str) -> None:
        self.collator = collator
        self.column = column

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [group_id(row[self.column]) for row in rows]
        batch = self.collator([{name: value for name, value in row.items() if name != self.column} for row in rows])
        return {**batch, GROUPS: torch.tensor(ids, dtype=torch.int64)}
