"""Files of tensors beside a checkpoint, for what the trainer remembers from step to step."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


def save_state(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    os.replace(partial, path)


def load_state(path: Path, effect: str) -> dict[str, torch.Tensor] | None:
    """Read what `save_state` wrote; None if there is no file.

    Args:
        path (`Path`): The file.
        effect (`str`): What deleting the file is good for, as in "to count anew".

    Raises:
        ValueError: The file is damaged.
    """
    if not path.is_file():
        return None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is truncated or corrupt ({error}). Delete the file {effect}, or resume from another checkpoint."
        ) from error
