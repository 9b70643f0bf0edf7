"""The ways of training that are compared: options of MCLConfig and of the adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """One way of training.

    Args:
        training: Options of MCLConfig.
        adapter: Options of MCLoraConfig.
        plain: One LoRA of the total rank of the hypotheses, in place of K of them.
        separate: K LoRAs with seeds of their own, each trained on all data as if it were alone.
        told: One LoRA for each mode, trained on the sequences of that mode alone, for its part of the steps: what hypotheses
            could be that knew the modes from the start.
        noisy_scores: Leave dropout on while sequences are scored for training, which the trainer never does.
        one_a: One A for all hypotheses and K different B, as no adapter of ours has it.
    """

    training: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    separate: bool = False
    told: bool = False
    noisy_scores: bool = False
    one_a: bool = False


# Most of the rank for what all learn, little for what tells them apart. With four hypotheses, 64 in all.
SHARED = {"r": 2, "shared_r": 56}
# What is recommended, less one thing, or with one more.
UNSEEDED = {"seeding_fraction": 0.0}
STRICT = {"balance_strength": math.inf}
TOGETHER = {"together_fraction": 0.2, "annealing_fraction": 0.6}
ALIKE = {"init_perturbation": 0.1}
ANNEALED = {"objective": "annealed", "initial_temperature": 0.5, "final_temperature": 1e-3}
# Where the references of a prompt share a `group`.
MATCHING = {"group_column": "group"}
DROPOUT = {"lora_dropout": 0.1}

METHODS = {
    "lora": Method(plain=True),
    "lora, dropout": Method({}, DROPOUT, plain=True),
    "separate": Method(separate=True),
    # Each with as many ranks as one hypothesis has with the shared part.
    "separate, r = 58": Method({}, {"r": SHARED["r"] + SHARED["shared_r"]}, separate=True),
    "told the modes": Method(told=True),
    "random": Method({"objective": "random"}),
    "wta": Method({"objective": "wta"}),
    "wta, dropout": Method({"objective": "wta"}, DROPOUT),
    "wta, dropout in scores": Method({"objective": "wta"}, DROPOUT, noisy_scores=True),
    **{
        f"relaxed, {epsilon}": Method({"objective": "relaxed", "relaxed_epsilon": epsilon})
        for epsilon in (0.005, 0.05, 0.1, 0.2)
    },
    "annealed": Method(ANNEALED),
    "annealed, a quarter": Method({**ANNEALED, "annealing_fraction": 0.25}),
    "annealed, all": Method({**ANNEALED, "annealing_fraction": 1.0}),
    "annealed, dropout": Method(ANNEALED, DROPOUT),
    "annealed, dropout in scores": Method(ANNEALED, DROPOUT, noisy_scores=True),
    "random + shared": Method({"objective": "random"}, SHARED),
    "wta + shared": Method({"objective": "wta"}, SHARED),
    "wta + shared + reviving": Method({"objective": "wta", "revive_after_steps": 10}, SHARED),
    "annealed + shared": Method(ANNEALED, SHARED),
    "balanced": Method(),
    "balanced, one A": Method(one_a=True),
    "balanced + shared, one A": Method({}, SHARED, one_a=True),
    "balanced + shared": Method({}, SHARED),
    **{
        f"balanced + shared, r = {own}, shared_r = {shared}": Method({}, {"r": own, "shared_r": shared})
        for own, shared in ((4, 48), (8, 32), (8, 8), (16, 32))
    },
    "balanced + shared, dropout": Method({}, {**SHARED, **DROPOUT}),
    "balanced + shared, dropout in scores": Method({}, {**SHARED, **DROPOUT}, noisy_scores=True),
    "balanced + shared, not seeded": Method(UNSEEDED, SHARED),
    "balanced + shared, strict": Method(STRICT, SHARED),
    "balanced + shared, not seeded, strict": Method({**UNSEEDED, **STRICT}, SHARED),
    "balanced + shared, uniform": Method({"target_shares": "uniform"}, SHARED),
    "balanced + shared, tracked": Method({"target_shares": "tracked"}, SHARED),
    "balanced + shared + together": Method(TOGETHER, {**SHARED, **ALIKE}),
    "wta + shared + matching": Method({"objective": "wta", **MATCHING}, SHARED),
    "balanced + shared + matching": Method(MATCHING, SHARED),
}
