"""Reviving: a hypothesis that has stopped winning goes on as a perturbed copy of one that wins too much."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from peft_mcl.layer import MCLoraLayer
from peft_mcl.perturbation import add_relative_noise
from trainer_ext.rewriting import rewrite
from trainer_ext.state_files import load_state, save_state


REVIVAL_NAME = "revival.safetensors"


def reseed(model: Any, optimizer: Any, target: int, source: int, perturbation: float, seed: str) -> None:
    """Make hypothesis `target` a copy of hypothesis `source`: its adapters, with noise, and their optimizer states.

    To be called by all processes between two optimizer steps. A is copied, and B with noise (see `add_relative_noise`) that
    depends on the seed, the target and the layer alone. What the hypotheses share is left alone, and so are optimizer states
    that `rewrite` does not know.

    Args:
        model ([`~peft.PeftModel`]): The model in training.
        optimizer: The optimizer of the trainer, as accelerate has wrapped it.
        target, source (`int`): Hypotheses.
        perturbation (`float`): Size of the noise relative to B, at least 0.
        seed (`str`): What the noise depends on: the seed and the step, say.
    """

    def copy(stacked: torch.Tensor) -> torch.Tensor:
        stacked[target] = stacked[source]
        return stacked

    adapter = model.active_adapter
    for layer in model.modules():
        if not isinstance(layer, MCLoraLayer) or adapter not in layer.stacked_a:
            continue
        # The same on all processes and for any number of them: drawn on the CPU, whole.
        digest = hashlib.blake2b(f"{seed}/{target}/{layer.module_name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

        def copy_with_noise(stacked: torch.Tensor, generator: torch.Generator = generator) -> torch.Tensor:
            noise = torch.randn(stacked.shape[1:], generator=generator)
            stacked[target] = add_relative_noise(stacked[source], noise, perturbation)
            return stacked

        rewrite(layer.stacked_a[adapter], optimizer, copy, copy)
        rewrite(layer.stacked_b[adapter], optimizer, copy_with_noise, copy)


class Revival:
    """Decides which hypotheses to re-seed, and from which.

    A hypothesis that has won no sequence in the last `after_steps` optimizer steps is re-seeded from the one that has won most
    in them. If several are, the wins of a source count for it and its copies in equal parts (D'Hondt), so they do not all come
    from one. A hypothesis that was re-seeded has as many steps to win, and nothing is re-seeded from it before that.

    Args:
        num_hypotheses (`int`): K.
        after_steps (`int`): Optimizer steps without a win.
    """

    def __init__(self, num_hypotheses: int, after_steps: int) -> None:
        self.num_hypotheses = num_hypotheses
        self.after_steps = after_steps
        # Of the last steps, one after the other: the step, and the wins of each hypothesis.
        self._window: deque[tuple[int, list[int]]] = deque(maxlen=after_steps)
        self._reseeded: dict[int, int] = {}
        self._count = 0

    def record(self, winners: Iterable[int], step: int) -> None:
        """Add the winners of (a part of) an optimizer step: those of all processes."""
        if not self._window or self._window[-1][0] != step:
            self._window.append((step, [0] * self.num_hypotheses))
        wins = self._window[-1][1]
        for winner in winners:
            wins[winner] += 1

    def wins(self, step: int) -> list[int]:
        """The sequences that each hypothesis has won in the last steps before `step`."""
        recent = [wins for recorded, wins in self._window if step - self.after_steps <= recorded < step]
        return [sum(column) for column in zip(*recent, strict=True)] or [0] * self.num_hypotheses

    def due(self, step: int) -> list[tuple[int, int]]:
        """The hypotheses to re-seed before a step and their sources, in order. They count as re-seeded from now on."""
        if not self._window or self._window[0][0] > step - self.after_steps:
            return []
        wins = self.wins(step)
        settled = [
            k for k in range(self.num_hypotheses) if step - self._reseeded.get(k, -self.after_steps) >= self.after_steps
        ]
        sources = [k for k in settled if wins[k] > 0]
        if not sources:
            return []
        copies: Counter[int] = Counter()
        pairs = []
        for target in settled:
            if wins[target] > 0:
                continue
            # `max` takes the first of equals.
            source = max(sources, key=lambda k: wins[k] / (1 + copies[k]))
            copies[source] += 1
            pairs.append((target, source))
            self._reseeded[target] = step
        self._count += len(pairs)
        return pairs

    def count(self) -> int:
        """How many hypotheses were re-seeded since the last call."""
        count, self._count = self._count, 0
        return count

    def save(self, directory: str | Path) -> None:
        """Write `revival.safetensors`, whole or not at all."""
        reseeded = list(self._reseeded.items())
        tensors = {
            "steps": torch.tensor([step for step, _ in self._window], dtype=torch.int64),
            "wins": torch.tensor([wins for _, wins in self._window], dtype=torch.int64).reshape(
                -1, self.num_hypotheses
            ),
            "reseeded": torch.tensor(reseeded, dtype=torch.int64).reshape(-1, 2),
            "count": torch.tensor(self._count),
        }
        save_state(tensors, Path(directory, REVIVAL_NAME))

    def load(self, directory: str | Path) -> None:
        """Take over what `save` wrote. Without a file, watching begins anew: the run that is resumed did not watch.

        Raises:
            ValueError: The file is damaged.
        """
        tensors = load_state(Path(directory, REVIVAL_NAME), "to count wins anew")
        if tensors is None:
            return
        self._window.clear()
        self._window.extend(zip(tensors["steps"].tolist(), tensors["wins"].tolist(), strict=True))
        self._reseeded = dict(tensors["reseeded"].tolist())
        self._count = int(tensors["count"])
