"""Results of long computations in JSONL files: written whole, read again only under the same settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.generate import write_jsonl


def kept(
    folder: Path, title: str, settings: dict[str, Any], compute: Callable[[], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Compute rows, or read what was computed before under the same settings.

    Args:
        folder: Where the file goes. Its name has the title and a hash of the settings; the settings are its first line.
        title: For a person who looks for the file.
        settings: Everything that the rows depend on, as JSON.
        compute: Makes the rows.
    """
    settings = json.loads(json.dumps(settings))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', title)}.{digest}.jsonl"
    if path.is_file():
        first, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if first == {"settings": settings}:
            return rows
    rows = compute()
    write_jsonl([{"settings": settings}, *rows], path)
    return rows
