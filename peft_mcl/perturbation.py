"""Noise that tells copies of a hypothesis apart."""

from __future__ import annotations

import torch


def add_relative_noise(b: torch.Tensor, noise: torch.Tensor, perturbation: float) -> torch.Tensor:
    """B and noise of the size of `perturbation` times the root mean square of B.

    It goes to the matrices B of a hypothesis alone, so it acts in the directions that the hypothesis has learned to read, and B
    changes by that part of its norm, whatever its scale. A matrix B that is all zero stays so.

    Args:
        b (`torch.Tensor`): B of one hypothesis, shape (out, r).
        noise (`torch.Tensor`): Of variance one, shape (..., out, r).
        perturbation (`float`): At least 0.

    Returns:
        `torch.Tensor`: Shape of `noise`, dtype and device of `b`; computed in float32.
    """
    wide = b.float()
    return (wide + perturbation * wide.square().mean().sqrt() * noise.to(b.device)).to(b.dtype)
