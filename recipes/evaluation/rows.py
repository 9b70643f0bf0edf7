"""The held-out rows: prompts, their references, and the sequences that are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset


FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def read_rows(name: str, mode_column: str | None = None, max_sequences: int | None = None) -> Dataset:
    """The rows of a local file.

    Raises:
        ValueError: There is no such file, it is of another format, or it lacks the column.
    """
    suffix = Path(name).suffix
    if suffix not in FILE_FORMATS or not Path(name).is_file():
        raise ValueError(f"`dataset_name` must be a {', '.join(FILE_FORMATS)} file, and {name!r} is none.")
    dataset = load_dataset(FILE_FORMATS[suffix], data_files=name, split="train")
    if mode_column is not None and mode_column not in dataset.column_names:
        raise ValueError(f"`mode_column`: there is no column {mode_column!r}, only {dataset.column_names}.")
    return dataset if max_sequences is None else dataset.select(range(min(max_sequences, len(dataset))))


def text_of(value: Any) -> str:
    """The text of a prompt or completion, which may be chat messages."""
    return value if isinstance(value, str) else value[-1]["content"]


def prompts_and_references(rows: Dataset, max_prompts: int | None = None) -> tuple[list[Any], list[list[str]]]:
    """The different prompts, in order, and for each its references: the completions of all rows that have this prompt.

    Raises:
        ValueError: There is no column with prompts or completions, or a completion is empty.
    """
    for column in ("prompt", "completion"):
        if column not in rows.column_names:
            raise ValueError(
                f"`dataset_name`: decoding needs the columns prompt and completion, and {column!r} is not among "
                f"{rows.column_names}. Without decoders only likelihoods are measured."
            )
    prompts: dict[str, Any] = {}
    references: dict[str, list[str]] = {}
    for number, (prompt, completion) in enumerate(zip(rows["prompt"], rows["completion"], strict=True)):
        reference = text_of(completion).strip() if completion else ""
        if not reference:
            raise ValueError(f"`dataset_name`: row {number} has no reference, its completion is {completion!r}.")
        key = json.dumps(prompt)
        prompts.setdefault(key, prompt)
        known = references.setdefault(key, [])
        if reference not in known:
            known.append(reference)
    if not prompts:
        raise ValueError("`dataset_name`: there are no rows.")
    return list(prompts.values())[:max_prompts], list(references.values())[:max_prompts]
