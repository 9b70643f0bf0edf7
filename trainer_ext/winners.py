"""Winners that are remembered from one epoch to the next, so that not every visit of a sequence needs scores."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer_ext.state_files import load_state, save_state


WINNERS_NAME = "winners.safetensors"


class RememberedWinners:
    """The winner of each sequence seen so far, and how often it has been trained on since it was scored.

    What is visited is remembered from the end of the optimizer step on. So sequences of the same content in one step are all
    scored or all not, however the step is divided into micro-batches.

    Args:
        score_every (`int`): A sequence is scored at its first visit and then at every `score_every`-th.
    """

    def __init__(self, score_every: int) -> None:
        self.score_every = score_every
        self._known: dict[int, tuple[int, int]] = {}
        self._visits: list[tuple[int, int | None]] = []
        self._rescored = 0
        self._flipped = 0

    def __len__(self) -> int:
        return len(self._known)

    def look_up(self, key: int) -> int | None:
        """The winner of a sequence, or None if it is due to be scored."""
        winner, visits = self._known.get(key, (0, self.score_every))
        return winner if visits < self.score_every else None

    def visit(self, key: int, scored_winner: int | None) -> None:
        """Note a visit of a sequence in the running step, with its new winner if it was scored."""
        self._visits.append((key, scored_winner))

    def end_step(self) -> None:
        """Remember the visits of the step that is over."""
        for key, scored_winner in self._visits:
            if scored_winner is None:
                winner, visits = self._known[key]
                self._known[key] = (winner, visits + 1)
                continue
            if key in self._known:
                self._rescored += 1
                self._flipped += self._known[key][0] != scored_winner
            self._known[key] = (scored_winner, 1)
        self._visits.clear()

    def flips(self) -> float | None:
        """The part of the sequences scored again since the last call whose winner had changed; None if there were none.

        Between steps, as `save`.
        """
        self.end_step()
        share = self._flipped / self._rescored if self._rescored else None
        self._rescored = self._flipped = 0
        return share

    def save(self, directory: str | Path) -> None:
        """Write `winners.safetensors`, whole or not at all."""
        self.end_step()
        values = list(self._known.values())
        tensors = {
            "keys": torch.tensor(list(self._known), dtype=torch.int64),
            "winners": torch.tensor([winner for winner, _ in values], dtype=torch.int32),
            "visits": torch.tensor([visits for _, visits in values], dtype=torch.int32),
        }
        save_state(tensors, Path(directory, WINNERS_NAME))

    def load(self, directory: str | Path) -> None:
        """Take over what `save` wrote. Without a file nothing is known: the run that is resumed did not remember.

        Raises:
            ValueError: The file is damaged.
        """
        tensors = load_state(Path(directory, WINNERS_NAME), "to score every sequence anew")
        if tensors is None:
            return
        pairs = zip(tensors["winners"].tolist(), tensors["visits"].tolist(), strict=True)
        self._known = dict(zip(tensors["keys"].tolist(), pairs, strict=True))
