"""The tasks: what is learned, on which model, and what is known of its modes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from recipes.data import bible, debian, markov, smollm2


LANGUAGES = ("fr", "de", "it", "da")


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: Its name.
        data: Makes the splits `train`, `validation` and `test` for a seed.
        model: The folder of the base model for a seed.
        label: The column with the known mode.
        num_hypotheses: K.
        r: Rank of each hypothesis.
        adapter: Options of MCLoraConfig.
        training: Options of MCLConfig.
        language: Whether each mode is a language, so that decoded text tells what a hypothesis has become.
        answers: Makes the held-out prompts with all their references, rows that share a prompt; None where nothing is decoded.
        trained_base: Merge one LoRA, trained on the same mixture, into the base model first.
        base_training: Options of MCLConfig for that LoRA, besides those of `training`.
        chains: The Markov chains that the sequences are drawn from, if that is what the modes are.
        priors: How probable each of them is; `None`: all the same.
        grouped: Whether prompts have several references in training, in rows that follow each other and share a `group`.
    """

    name: str
    data: Callable[[int], dict[str, Dataset]]
    model: Callable[[int], str]
    label: str
    num_hypotheses: int
    r: int
    adapter: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    language: bool = False
    answers: Callable[[], Dataset] | None = None
    trained_base: bool = False
    base_training: dict[str, Any] = field(default_factory=dict)
    chains: tuple[markov.Chain, ...] = ()
    priors: tuple[float, ...] | None = None
    grouped: bool = False


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


def _read(folder: Path, label: str, sizes: dict[str, int], grouped: bool = False) -> dict[str, Dataset]:
    """The splits; with `grouped`, prompts for training have all their references. Held-out ones keep one, to be compared."""
    train = "train_all" if grouped else "train"
    held_out = {name: _rows(folder / f"{name}.jsonl", label, size) for name, size in sizes.items()}
    return {"train": _rows(folder / f"{train}.jsonl", label, grouped=grouped), **held_out}


def _rows(path: Path, label: str, most: int | None = None, grouped: bool = False) -> Dataset:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:most]
    columns = ["prompt", "completion", label, *(["group"] if grouped else [])]
    return Dataset.from_list([{key: row[key] for key in columns} for row in rows])


def _debian(
    languages: tuple[str, ...] = LANGUAGES, weights: tuple[float, ...] | None = None, grouped: bool = False
) -> Any:
    def data(seed: int) -> dict[str, Dataset]:
        folder = debian.prepare_dataset(languages, weights, seed)
        return _read(folder, "language", {"validation": 64, "test": 320}, grouped)

    return data


def _debian_answers() -> Dataset:
    # The held-out prompts are the same for every seed and weights.
    return _rows(debian.prepare_dataset(LANGUAGES, None, 0) / "test_all.jsonl", "language")


def _bible_answers() -> Dataset:
    return _rows(bible.prepare_dataset() / "test.jsonl", "version")


def _bible(seed: int) -> dict[str, Dataset]:
    return _read(bible.prepare_dataset(), "version", {"validation": 63, "test": 300})


def _smollm2(seed: int) -> str:
    return str(smollm2.prepare_model())


def _markov(chains: tuple[markov.Chain, ...], priors: tuple[float, ...] | None) -> Any:
    def data(seed: int) -> dict[str, Dataset]:
        folder = markov.prepare_dataset(chains, priors, seed=seed)
        splits = {
            split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
            for split in ("train", "test")
        }
        rows = {"train": splits["train"], "validation": splits["test"][:256], "test": splits["test"][256:1280]}
        return {
            split: Dataset.from_list(
                [{"input_ids": row["input_ids"], "labels": row["input_ids"], "chain": row["chain"]} for row in part]
            )
            for split, part in rows.items()
        }

    return data


def _neo(seed: int) -> str:
    return str(markov.random_neo(seed))


NEO = {
    "max_steps": 501,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 256,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "bf16": False,
    "gradient_checkpointing": False,
}
# One model at the rate of the hypotheses does not come near its optimum.
NEO_SINGLE = {"learning_rate": 3e-3}
NEO_ADAPTER = {"lora_alpha": 64, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}


def _languages(
    name: str,
    num_hypotheses: int = 4,
    steps: int = 300,
    trained_base: bool = False,
    grouped: bool = False,
    **setting: Any,
) -> Task:
    training = {**SMOLLM2, "max_steps": steps}
    data = _debian(grouped=grouped, **setting)
    return Task(
        name,
        data,
        _smollm2,
        "language",
        num_hypotheses,
        8,
        ADAPTER,
        training,
        language=True,
        answers=_debian_answers,
        trained_base=trained_base,
        grouped=grouped,
    )


def _styles(name: str, num_hypotheses: int = 3) -> Task:
    training = {**SMOLLM2, "max_steps": 200}
    return Task(name, _bible, _smollm2, "version", num_hypotheses, 8, ADAPTER, training, answers=_bible_answers)


def _chains(
    title: str,
    num_hypotheses: int,
    name: str,
    priors: tuple[float, ...] | None = None,
    trained_base: bool = False,
) -> Task:
    chains = markov.CHAINS[name]
    task = Task(title, _markov(chains, priors), _neo, "chain", num_hypotheses, 64, NEO_ADAPTER, NEO)
    return replace(task, trained_base=trained_base, base_training=NEO_SINGLE, chains=chains, priors=priors)


TASKS = {
    task.name: task
    for task in [
        _languages("languages"),
        _languages("languages, all references", grouped=True),
        _styles("styles"),
        *(_styles(f"styles, {count} hypotheses", count) for count in (2, 5, 8)),
        _languages("unequal languages", weights=(0.7, 0.1, 0.1, 0.1)),
        _languages("one language", languages=("de",)),
        _languages("8 hypotheses", num_hypotheses=8),
        _languages("trained base", steps=150, trained_base=True),
        _chains("chains 1", 2, name="transition1"),
        _chains("chains 2", 2, name="transition2"),
        _chains("three chains", 3, name="three"),
        _chains("unequal chains", 2, name="transition1", priors=(0.9, 0.1)),
        _chains("chains, 4 hypotheses", 4, name="transition1"),
        _chains("chains, trained base", 2, trained_base=True, name="transition1"),
    ]
}
