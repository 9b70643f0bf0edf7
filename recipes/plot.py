"""Draw the win shares and the losses of a training run.

```bash
python recipes/plot.py --run outputs/mcl --output outputs/mcl/training.png
```
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
from trl import TrlParser


# Run by path, Python looks for `recipes` beside this file.
sys.path.insert(0, str(Path(__file__).parents[1]))

from recipes.files import save_plot


@dataclass
class PlotArguments:
    """Which run to draw, and where to."""

    run: str = field(metadata={"help": "Output directory of a training run (with trainer_state.json)."})
    output: str = field(default="training.png", metadata={"help": "The picture to write."})
    baseline: str | None = field(default=None, metadata={"help": "A run with one hypothesis to draw beside it."})


def main(args: PlotArguments) -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    logs = training_logs(args.run)
    steps = [log["step"] for log in logs]
    for name, label in (("wta_nll", "best"), ("mixture_nll", "mixture"), ("mean_nll", "mean"), ("worst_nll", "worst")):
        top.plot(steps, [log[name] for log in logs], label=label)
    if args.baseline:
        baseline = training_logs(args.baseline)
        top.plot([log["step"] for log in baseline], [log["wta_nll"] for log in baseline], "k--", label="one LoRA")
    top.set_ylabel("training NLL (nats per token)")
    top.legend()

    shares = sorted(name for name in logs[0] if name.startswith("win_share/"))
    bottom.stackplot(steps, [[log[name] for log in logs] for name in shares], labels=shares, alpha=0.8)
    bottom.set_ylim(0, 1)
    bottom.set_ylabel("win share")
    bottom.set_xlabel("optimizer step")
    bottom.legend(loc="lower left")
    split = [log["step"] for log in logs if log.get("together") == 1.0]
    if split:
        for axes in (top, bottom):
            axes.axvline(max(split), color="gray", linestyle="--")
        top.annotate("split", (max(split), 1), xycoords=("data", "axes fraction"), va="top")
    warm = [log for log in logs if "temperature" in log]
    if warm:
        right = bottom.twinx()
        right.plot([log["step"] for log in warm], [log["temperature"] for log in warm], "k:", label="temperature")
        right.set_yscale("log")
        right.set_ylabel("temperature (nats per token)")

    path = Path(args.output)
    save_plot(figure, path)
    print(f"Wrote {path}")


def training_logs(run: str) -> list[dict[str, Any]]:
    """The training logs of a run, in order."""
    path = Path(run, "trainer_state.json")
    if not path.is_file():
        raise ValueError(f"`run`: there is no {path}. Train with recipes/train_mcl.py first.")
    history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    logs = [log for log in history if "wta_nll" in log]
    if not logs:
        raise ValueError(f"{path} has no training logs: train for at least `logging_steps` steps.")
    return logs


if __name__ == "__main__":
    main(*TrlParser((PlotArguments,)).parse_args_and_config())
