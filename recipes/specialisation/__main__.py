"""Train every method on every task with every seed, and report.

```bash
python -m recipes.specialisation --tasks languages styles --methods lora "balanced + shared" --seeds 0 1 2
python -m recipes.specialisation --report
```

Each cell (task, method, seed) is one result file; what is there is not computed again, so the command can be interrupted and
started anew, and several of them share the work. The report is made of the files that are there.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from datasets import disable_progress_bars
from filelock import FileLock, Timeout

from recipes.specialisation.cells import run_cell
from recipes.specialisation.methods import METHODS
from recipes.specialisation.report import report, write_whole
from recipes.specialisation.tasks import TASKS


def main() -> None:
    arguments = parse()
    disable_progress_bars()
    root = Path(arguments.output_dir)
    if arguments.report:
        report(root)
        return
    cells = [*itertools.product(arguments.seeds, arguments.tasks, arguments.methods)]
    for number, (seed, task, method) in enumerate(cells):
        path = cell_path(root, task, method, seed, arguments.steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                if path.exists():
                    continue
                print(f"[{number + 1} of {len(cells)}] {task}, {method}, seed {seed}", flush=True)
                bases = root / "bases"
                bases.mkdir(exist_ok=True)
                result = run_cell(TASKS[task], method, seed, bases, path.with_suffix(""), arguments.steps)
                write_whole(path, json.dumps(result))
                print(line_of(result), flush=True)
        except Timeout:
            # Another process is at it.
            continue


def line_of(result: dict) -> str:
    figures, agreed = result["figures"], result["agreement"]
    return (
        f"    purity {agreed['purity']:.3f}, NMI {agreed['nmi']:.3f}, dead {result['dead']}, NLL best "
        f"{figures['wta_nll']:.3f}, mixture {figures['mixture_nll']:.3f}, mean {figures['mean_nll']:.3f}, worst "
        f"{figures['worst_nll']:.3f}; {result['train_wall_seconds']:.0f} s"
    )


def cell_path(root: Path, task: str, method: str, seed: int, steps: int | None) -> Path:
    name = method.replace(" + ", "+").replace(", ", "-").replace(" ", "-")
    return root / task.replace(" ", "-") / f"{name}{'' if steps is None else f'.{steps}-steps'}.seed{seed}.json"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.specialisation", description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=None, help="Optimizer steps, in place of each task's own.")
    parser.add_argument(
        "--report", action="store_true", help="Only write tables and plots of the cells that are there."
    )
    parser.add_argument("--output_dir", default="outputs/specialisation")
    return parser.parse_args()


if __name__ == "__main__":
    main()
