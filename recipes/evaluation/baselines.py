"""What an adapter has to be better than, trained like it: the same data, the same steps, the same options but for a few."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from peft_mcl import MCLoraConfig


TRAINER = Path(__file__).parent.parent / "train_mcl.py"
ADAPTER_FILE = "adapter_model.safetensors"


def baseline_options(config: MCLoraConfig) -> dict[str, list[dict[str, object]]]:
    """The options of `train_mcl.py` that differ from those of an adapter, for each baseline: one run, or several side by side.

    Args:
        config ([`MCLoraConfig`]): Of the adapter that they are compared with. Alpha grows with the rank, so that the scale stays.
    """
    r, count = config.r, config.num_hypotheses
    total = count * r + config.shared_r

    def one_lora(rank: int) -> dict[str, object]:
        alpha = config.lora_alpha * rank / r
        return {"num_hypotheses": 1, "shared_r": 0, "lora_r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}

    return {
        f"lora, r = {r}": [one_lora(r)],
        f"lora, r = {total}": [one_lora(total)],
        f"{count} loras": [{**one_lora(r), "seed": seed} for seed in range(1, count + 1)],
        "random winners": [{"objective": "random"}],
    }


def train_baselines(configuration: str, adapter: str, output_dir: Path) -> dict[str, list[str]]:
    """Train what is missing; a folder with a whole adapter is taken as it is.

    Args:
        configuration (`str`): The YAML file of `train_mcl.py` that the adapter was trained with, model and data included.
        adapter (`str`): The adapter.
        output_dir (`Path`): One folder for each run goes in here.

    Returns:
        `dict[str, list[str]]`: The folders of each baseline by its name.

    Raises:
        ValueError: The configuration names no model or no data.
        RuntimeError: A training failed.
    """
    options = yaml.safe_load(Path(configuration).read_text(encoding="utf-8"))
    for name in ("model_name_or_path", "dataset_name"):
        if not options.get(name):
            raise ValueError(
                f"`train_baselines`: {configuration} has no `{name}`. Put into it everything that the adapter was trained with."
            )
    found: dict[str, list[str]] = {}
    for name, runs in baseline_options(MCLoraConfig.from_pretrained(adapter)).items():
        folder = name.replace(" = ", "").replace(", ", "-").replace(" ", "-")
        paths = [output_dir / folder] if len(runs) == 1 else [output_dir / folder / str(i) for i in range(len(runs))]
        for path, changed in zip(paths, runs, strict=True):
            # The trainer writes an adapter whole or not at all.
            if not (path / ADAPTER_FILE).is_file():
                print(f"Training {name}: {path}", flush=True)
                train({**options, **changed, "output_dir": str(path)}, path)
        found[name] = [str(path) for path in paths]
    return found


def train(options: dict[str, object], path: Path) -> None:
    """One run of train_mcl.py, in a process of its own so that nothing of one run is left for the next."""
    path.mkdir(parents=True, exist_ok=True)
    configuration = path / "train.yaml"
    configuration.write_text(yaml.safe_dump(options), encoding="utf-8")
    result = subprocess.run([sys.executable, str(TRAINER), "--config", str(configuration)], check=False)
    if result.returncode != 0:
        raise RuntimeError(f"Training the baseline in {path} failed, see above. The same command goes on with it.")
