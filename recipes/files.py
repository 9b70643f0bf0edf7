"""Files of the recipes, written whole or not at all."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING


# Programs that write no picture need not load matplotlib.
if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, or leave what was there. Folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        partial = Path(file.name)
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.close()
            # Temporary files are for their owner alone.
            partial.chmod(0o644)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def save_plot(figure: Figure, path: Path) -> None:
    """Write a picture (PNG), or leave what was there."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_whole(path, image.getvalue())
