"""What makes a training forward pass random, and how to do without: winners are chosen without noise (Shen et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and put every module back as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def has_dropout(model: Any) -> bool:
    """Whether a training forward of `model` is random: dropout modules, or dropout rates in its configuration."""
    modules = (module.p > 0 for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd))
    config = model.config.to_dict() if hasattr(model, "config") else {}
    return any(modules) or _has_dropout_rate(config)


def _has_dropout_rate(config: dict[str, Any]) -> bool:
    for name, value in config.items():
        if isinstance(value, dict) and _has_dropout_rate(value):  # The parts of a multimodal model.
            return True
        # Not all keys are strings (`id2label`).
        if "drop" in str(name) and isinstance(value, (int, float)) and value > 0:
            return True
    return False
