"""Random numbers that belong to a sequence and a step, not to a place in a batch.

Ties, the objective "random" and sampled losers draw from here. So neither the number of processes nor accumulation, the order
of a batch or a resumed run changes what is drawn.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import torch


def sequence_draws(sequences: list[tuple[int, int]], count: int, place: str) -> torch.Tensor:
    """Uniform numbers in [0, 1): float32 of shape (len(sequences), count).

    Args:
        sequences (`list[tuple[int, int]]`): What tells each from others: its content (`SequenceBatch.keys`), and how many of
            the same content came before it (`Occurrences`).
        count (`int`): Numbers for each sequence.
        place (`str`): The seed and the place in training.
    """
    draws = torch.empty(len(sequences), count)
    for row, (key, occurrence) in enumerate(sequences):
        digest = hashlib.blake2b(f"{place}/{key}/{occurrence}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        draws[row] = torch.rand(count, generator=generator)
    return draws


class Occurrences:
    """Numbers the sequences of one content at one place in training, so that they draw differently."""

    def __init__(self) -> None:
        self._place = ""
        self._counts: Counter[int] = Counter()

    def number(self, keys: list[int], place: str) -> list[tuple[int, int]]:
        """Each key with the number of times it came before at this place. Another place starts anew."""
        if place != self._place:
            self._place, self._counts = place, Counter()
        found = []
        for key in keys:
            found.append((key, self._counts[key]))
            self._counts[key] += 1
        return found
