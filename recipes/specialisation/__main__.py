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
from functools import partial
from pathlib import Path

from datasets import disable_progress_bars

from recipes.specialisation.cells import run_cell
from recipes.specialisation.files import Cell, cell_path, compute_missing
from recipes.specialisation.methods import METHODS
from recipes.specialisation.report import report
from recipes.specialisation.tasks import TASKS


def main() -> None:
    arguments = parse()
    disable_progress_bars()
    root = Path(arguments.output_dir)
    if arguments.report:
        report(root)
        return
    bases = root / "bases"
    bases.mkdir(parents=True, exist_ok=True)
    cells = []
    for seed, task, method in itertools.product(arguments.seeds, arguments.tasks, arguments.methods):
        if "group_column" in METHODS[method].training and not TASKS[task].grouped:
            print(f"{task}, {method}: left out, as a prompt has one reference there, so nothing to match.")
            continue
        path = cell_path(root, task, method, seed, arguments.steps)
        run = partial(run_cell, TASKS[task], method, seed, bases, path.with_suffix(""), arguments.steps)
        cells.append(Cell(f"{task}, {method}, seed {seed}", path, run))
    compute_missing(cells, line_of)


def line_of(result: dict) -> str:
    figures, agreed = result["figures"], result["agreement"]
    return (
        f"purity {agreed['purity']:.3f}, NMI {agreed['nmi']:.3f}, dead {result['dead']}, NLL best "
        f"{figures['wta_nll']:.3f}, mixture {figures['mixture_nll']:.3f}, mean {figures['mean_nll']:.3f}, worst "
        f"{figures['worst_nll']:.3f}; {result['train_wall_seconds']:.0f} s"
    )


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
