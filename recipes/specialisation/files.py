"""The result files of an experiment: one for each cell, computed once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from recipes.files import write_whole


@dataclass(frozen=True)
class Cell:
    """One result file and what makes it.

    Args:
        title: What is shown while it is computed.
        path: The file.
        run: Computes what goes into it, as JSON.
    """

    title: str
    path: Path
    run: Callable[[], dict[str, Any]]


def compute_missing(cells: Sequence[Cell], line_of: Callable[[dict[str, Any]], str]) -> None:
    """Compute the cells that have no file yet. Several processes share the work: a cell that another is at is left to it.

    Args:
        cells: All cells.
        line_of: What to print of a result.
    """
    for number, cell in enumerate(cells):
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(cell.path.with_suffix(".lock"), timeout=0):
                if cell.path.exists():
                    continue
                print(f"[{number + 1} of {len(cells)}] {cell.title}", flush=True)
                result = cell.run()
                write_whole(cell.path, json.dumps(result))
                print(f"    {line_of(result)}", flush=True)
        except Timeout:
            continue


def cell_path(root: Path, group: str, method: str, seed: int, steps: int | None) -> Path:
    """The result file of a cell."""
    name = method.replace(" + ", "+").replace(", ", "-").replace(" ", "-")
    return root / group.replace(" ", "-") / f"{name}{'' if steps is None else f'.{steps}-steps'}.seed{seed}.json"
