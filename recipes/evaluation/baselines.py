"""Train what an adapter with hypotheses is to be compared with, by the command and the configuration that trained it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from peft_mcl import MCLoraConfig
from recipes import train_mcl
from recipes.data.cache import sha256_of
from recipes.evaluation.contenders import Contender, contender


DONE = "trained.json"


def train_baselines(adapter: str, config: Path, dataset: str | None, folder: Path) -> list[Contender]:
    """Train plain LoRA at the rank of one hypothesis (r + shared_r) and of all, K such LoRAs, and random winners.

    Args:
        adapter: The MCLORA adapter whose K, ranks and base model they get.
        config: The YAML file that it was trained with.
        dataset: Its training data, if that is not in the file.
        folder: Each baseline goes into a folder there. What was trained to its end is not trained again.

    Returns:
        `list[Contender]`: The baselines. The LoRA at the rank of one hypothesis is the first of the K, which have seeds of
            their own.

    Raises:
        ValueError: There is no such file, or a folder holds a baseline that was trained otherwise.
        RuntimeError: A training failed.
    """
    if not config.is_file():
        raise ValueError(f"`train_baselines`: there is no file {str(config)!r}.")
    mine = MCLoraConfig.from_pretrained(adapter)
    count, r, shared = mine.num_hypotheses, mine.r, mine.shared_r
    one, total = r + shared, count * r + shared

    def train(name: str, **options: object) -> str:
        given = {"model_name_or_path": mine.base_model_name_or_path, **options}
        if dataset is not None:
            given["dataset_name"] = dataset
        return _train(folder / name, config, given)

    def alpha(rank: int) -> int:
        # The same scale at every rank; the command takes whole numbers only, and a saved adapter has 16.0.
        return round(mine.lora_alpha * rank / r)

    def plain(rank: int, seed: int) -> dict[str, object]:
        return {"num_hypotheses": 1, "shared_r": 0, "lora_r": rank, "lora_alpha": alpha(rank), "seed": seed}

    seeds = [train(f"lora-r{one}/{k}", **plain(one, 42 + k)) for k in range(count)]
    whole = train(f"lora-r{total}", **plain(total, 42))
    # Clusters decide nothing where chance does.
    by_chance = {"objective": "random", "seeding_fraction": 0}
    chance = train("random", num_hypotheses=count, shared_r=shared, lora_r=r, lora_alpha=alpha(r), **by_chance)
    return [
        contender(f"lora r={one}", seeds[:1]),
        contender(f"lora r={total}", [whole]),
        contender(f"{count} seeds of lora r={one}", seeds),
        contender("random winners", [chance]),
    ]


def _train(folder: Path, config: Path, options: dict[str, object]) -> str:
    settings = {"config": sha256_of(config), **{name: str(value) for name, value in options.items()}}
    done = folder / DONE
    if done.is_file() and (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        if json.loads(done.read_text(encoding="utf-8")) != settings:
            raise ValueError(
                f"`train_baselines`: {folder} was trained with other settings. Remove it, or take another `output_dir`."
            )
        return str(folder)
    # Half of a training with unknown settings is no start.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, train_mcl.__file__, "--config", str(config), "--output_dir", str(folder)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    print(f"Training {folder} ...", flush=True)
    if subprocess.run(command, check=False).returncode:
        raise RuntimeError(f"Training the baseline {folder} failed; see above. The command was: {' '.join(command)}")
    done.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return str(folder)
