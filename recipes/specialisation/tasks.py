"""The tasks: what is learned, on which model, and what is known of its modes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from recipes.data import bible, debian, smollm2


LANGUAGES = ("fr", "de", "it", "da")


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: Its name.
        data: Makes the splits `train`, `validation` and `test` for a seed.
        model: The folder of the base model.
        label: The column with the known mode.
        num_hypotheses: K.
        r: Rank of each hypothesis.
        training: Options of MCLConfig.
        language: Whether each mode is a language, so that decoded text tells what a hypothesis has become.
        trained_base: Merge one LoRA, trained on the same mixture, into the base model first.
    """

    name: str
    data: Callable[[int], dict[str, Dataset]]
    model: Callable[[int], str]
    label: str
    num_hypotheses: int
    r: int = 8
    adapter: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    language: bool = False
    trained_base: bool = False


# As in the quickstart; short enough for two CPU cores.
SMOLLM2 = {
    "max_length": 96,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 24,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "bf16": True,
    "gradient_checkpointing": False,
}
ADAPTER = {"lora_alpha": 16, "target_modules": "all-linear"}


def _read(folder: Path, label: str, sizes: dict[str, int]) -> dict[str, Dataset]:
    splits = {}
    for name in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = rows[: sizes.get(name)]
        splits[name] = Dataset.from_list([{key: row[key] for key in ("prompt", "completion", label)} for row in rows])
    return splits


def _debian(languages: tuple[str, ...] = LANGUAGES, weights: tuple[float, ...] | None = None) -> Any:
    def data(seed: int) -> dict[str, Dataset]:
        folder = debian.prepare_dataset(languages, weights, seed)
        return _read(folder, "language", {"validation": 96, "test": 400})

    return data


def _bible(seed: int) -> dict[str, Dataset]:
    return _read(bible.prepare_dataset(), "version", {"validation": 96, "test": 360})


def _smollm2(seed: int) -> str:
    return str(smollm2.prepare_model())


TASKS = {
    task.name: task
    for task in [
        Task("languages", _debian(), _smollm2, "language", 4, adapter=ADAPTER, training={**SMOLLM2, "max_steps": 300}, language=True),
        Task("styles", _bible, _smollm2, "version", 3, adapter=ADAPTER, training={**SMOLLM2, "max_steps": 200}),
        Task(
            "unequal languages",
            _debian(weights=(0.7, 0.1, 0.1, 0.1)),
            _smollm2,
            "language",
            4,
            adapter=ADAPTER,
            training={**SMOLLM2, "max_steps": 300},
            language=True,
        ),
        Task(
            "8 hypotheses",
            _debian(),
            _smollm2,
            "language",
            8,
            adapter=ADAPTER,
            training={**SMOLLM2, "max_steps": 300},
            language=True,
        ),
        Task(
            "trained base",
            _debian(),
            _smollm2,
            "language",
            4,
            adapter=ADAPTER,
            training={**SMOLLM2, "max_steps": 150},
            language=True,
            trained_base=True,
        ),
        Task(
            "one language",
            _debian(("de",)),
            _smollm2,
            "language",
            4,
            adapter=ADAPTER,
            training={**SMOLLM2, "max_steps": 300},
            language=True,
        ),
    ]
}
