"""Decode with the adapters that the experiments kept, and compare: quality against diversity, with all baselines.

```bash
python -m recipes.specialisation.decode --tasks languages styles --steps 120
```

One LoRA (`lora`, of all ranks together, and `lora, r = 8`, the first of `separate`) decodes by every decoder; hypotheses and
separate LoRAs greedily. What is decoded already is not decoded again.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

from recipes.evaluation.contenders import Contender, contender
from recipes.evaluation.decoders import DECODERS
from recipes.evaluation.results import evaluate
from recipes.evaluation.settings import Settings
from recipes.specialisation.files import cell_path
from recipes.specialisation.methods import METHODS
from recipes.specialisation.tasks import TASKS, Task
from trainer_ext.metrics import win_weights


# What is decoded of a task unless the command says otherwise; the first is compared with each other.
COMPARED = ("balanced + shared", "lora", "separate", "random")


def main() -> None:
    arguments = parse()
    disable_progress_bars()
    root = Path(arguments.output_dir)
    for name in arguments.tasks:
        task = TASKS[name]
        if task.answers is None:
            raise ValueError(f"`tasks`: nothing is decoded of {name!r}.")
        contenders = contenders_of(task, arguments.methods, root, arguments.steps)
        if not contenders:
            print(f"{name}: no cell under {root} has kept its adapter.")
            continue
        rows = task.answers()
        # Whole groups of references, of the first prompts.
        first = set(list(dict.fromkeys(rows["prompt"]))[: arguments.max_prompts])
        rows = rows.select([place for place, prompt in enumerate(rows["prompt"]) if prompt in first])
        beams = "" if arguments.num_beams == 1 else f"-{arguments.num_beams}-beams"
        settings = Settings(
            output_dir=root / name.replace(" ", "-") / f"evaluation{beams}",
            decoders=tuple(arguments.decoders),
            num_outputs=task.num_hypotheses,
            num_beams=arguments.num_beams,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
            max_length=task.training["max_length"],
            embedding_model=arguments.embedding_model,
            mode_column=task.label,
        )
        evaluate(contenders, rows, settings)
        print(f"Figures, tables and plot of {name}: {settings.output_dir}")


def contenders_of(task: Task, methods: list[str], root: Path, steps: int | None) -> list[Contender]:
    """The adapters that are there, seeds of a method under one name; with the win shares on the validation split as weights."""
    found = []
    for method in methods:
        pattern = re.escape(cell_path(root, task.name, method, 0, steps).name).replace("seed0", r"seed(\d+)")
        folder = cell_path(root, task.name, method, 0, steps).parent
        for path in sorted(folder.glob("*.json")):
            kept = path.with_suffix("")
            if not re.fullmatch(pattern, path.name) or not kept.is_dir():
                continue
            cell = json.loads(path.read_text(encoding="utf-8"))
            parts = sorted(part for part in kept.iterdir() if part.is_dir())
            one = contender(method, [str(part) for part in parts] or [str(kept)])
            found.append(replace(one, weights=weights_of(cell) or one.weights))
            if METHODS[method].separate:
                found.append(contender(f"lora, r = {cell['rank']}", [str(parts[0])]))
    return found


def weights_of(cell: dict[str, Any]) -> tuple[float, ...] | None:
    """By the wins on the validation split at the end of training."""
    if not cell["looks"]:
        return None
    return tuple(win_weights([sum(column) for column in zip(*cell["looks"][-1]["matrix"].values(), strict=True)]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.specialisation.decode", description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["languages", "styles"], choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(COMPARED), choices=list(METHODS))
    parser.add_argument("--decoders", nargs="+", default=list(DECODERS), choices=list(DECODERS))
    parser.add_argument("--steps", type=int, default=None, help="As the cells were trained.")
    parser.add_argument("--num_beams", type=int, default=1, help="Beams of each hypothesis.")
    parser.add_argument("--max_prompts", type=int, default=40, help="The first ones; each with all its references.")
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--batch_size", type=int, default=16, help="Prompts decoded at once.")
    parser.add_argument("--embedding_model", default=None, help="See recipes/evaluate.py.")
    parser.add_argument("--output_dir", default="outputs/specialisation")
    return parser.parse_args()


if __name__ == "__main__":
    main()
