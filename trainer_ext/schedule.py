"""What a step of training is for: all hypotheses learn as one, then clusters decide who trains what, then the scores do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer_ext.config import MCLConfig
from trainer_ext.objectives import ANNEALED, decay_for, temperature_at


@dataclass(frozen=True)
class Schedule:
    """The place of an optimizer step in training.

    Args:
        args ([`MCLConfig`]): The fractions and temperatures.
        num_hypotheses (`int`): K; one has nothing to learn together with, and nobody to part from.
        step (`int`): The optimizer step, from 0.
        max_steps (`int`): Their number.
    """

    args: MCLConfig
    num_hypotheses: int
    step: int
    max_steps: int

    def _steps(self, fraction: float) -> int:
        # A product that should be whole may be a little more.
        return math.ceil(fraction * self.max_steps - 1e-9) if self.num_hypotheses > 1 else 0

    @property
    def split(self) -> int:
        """The first step in which the hypotheses are many."""
        return self._steps(self.args.together_fraction)

    @property
    def seeded(self) -> int:
        """The first step in which the scores decide."""
        return self.split + self._steps(self.args.seeding_fraction or 0.0)

    @property
    def is_together(self) -> bool:
        """Whether all hypotheses learn as one."""
        return self.step < self.split

    @property
    def is_seeding(self) -> bool:
        """Whether clusters decide."""
        return self.split <= self.step < self.seeded

    @property
    def temperature(self) -> float:
        """The temperature in units of `temperature_unit`. It falls from the step on in which the scores decide.

        Clusters are found before they decide: for them it is the final one.
        """
        args = self.args
        assert args.initial_temperature is not None
        assert args.final_temperature is not None
        if self.is_seeding:
            return args.final_temperature
        decay = args.temperature_decay
        if decay is None:
            assert args.annealing_fraction is not None
            steps = args.annealing_fraction * self.max_steps - self.seeded
            decay = decay_for(args.initial_temperature, args.final_temperature, steps)
        return temperature_at(max(self.step - self.seeded, 0), args.initial_temperature, args.final_temperature, decay)

    @property
    def is_warm(self) -> bool:
        """Whether the temperature still falls, if the objective has one."""
        assert self.args.final_temperature is not None
        return self.args.objective in ANNEALED and self.temperature > self.args.final_temperature
