"""The paper's toy: do two hypotheses become the two Markov chains of the data, and how close is that to what theory allows?

```bash
python -m recipes.markov                                                  # the paper's two set-ups, three seeds
python -m recipes.markov --set_ups three unequal trained --seeds 0        # and what the paper does not show
python -m recipes.markov --set_ups transition1 --methods wta --seeds 0 --check
python -m recipes.markov --report
```

Each cell (set-up, method, seed) is one result file; what is there is not computed again, so the command can be interrupted and
started anew, and several of them share the work. Then come tables, `results.json` and a plot for each set-up.

The band of theory is narrow, .001 nats, and the mean of some thousand held-out sequences is not as sharp. So each loss is
compared with that of the true chains on the same sequences, and the difference is added to the latter's exact value: nearly
all that is due to the draw of the sequences is in both and drops out. What was measured without that is in the results, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from transformers import PrinterCallback, TrainerCallback

from recipes.data import markov
from recipes.files import save_plot, write_whole
from recipes.specialisation.cells import cpu_seconds, measure, trainer_of
from recipes.specialisation.files import Cell, cell_path, compute_missing
from recipes.specialisation.methods import METHODS as ALL_METHODS
from recipes.specialisation.methods import Method
from recipes.specialisation.report import spread
from recipes.specialisation.tasks import NEO_SINGLE, TASKS, Task
from trainer_ext import MCLTrainer


SET_UPS = {
    "transition1": TASKS["chains 1"],
    "transition2": TASKS["chains 2"],
    "three": TASKS["three chains"],
    "unequal": TASKS["unequal chains"],
    "trained": TASKS["chains, trained base"],
}
METHODS = {
    "lora": Method(NEO_SINGLE, plain=True),
    **{name: ALL_METHODS[name] for name in ("wta", "annealed", "balanced", "random")},
    **{name: ALL_METHODS[name] for name in ALL_METHODS if name.startswith(("relaxed, ", "annealed, ", "wta, "))},
    # Shares of a batch are not those of the chains, and need not be equal at all: here they cost next to nothing.
    "balanced, weakly": Method({"balance_strength": 0.05}),
    "balanced, tracked": Method({"target_shares": "tracked"}),
    # What the paper says of its toy, and nothing else.
    "paper": Method({"objective": "relaxed", "relaxed_epsilon": 0.1, "learning_rate": 1e-4}),
}
PAPER_SET_UPS = ("transition1", "transition2")
# What has to be met, by this method on the paper's set-ups.
MAIN_METHOD = "wta"
MOST_MATRIX_ERROR = 0.03
LEAST_ASSIGNMENT = 0.99
MOST_CPU_SECONDS = 300
HELD_OUT_SEQUENCES = 8_192
# Of the sequences that are held out: far from the seeds of training.
HELD_OUT_SEED = 1_000_000
# How often the loss is measured in training.
LOOKS = 20
PARTS = 256


def main() -> None:
    arguments = parse()
    disable_progress_bars()
    root = Path(arguments.output_dir)
    if not arguments.report:
        bases = root / "bases"
        bases.mkdir(parents=True, exist_ok=True)
        cells = []
        for seed, set_up, method in itertools.product(arguments.seeds, arguments.set_ups, arguments.methods):
            path = cell_path(root, set_up, method, seed, arguments.steps)
            run = partial(run_cell, SET_UPS[set_up], method, seed, bases, path.with_suffix(""), arguments.steps)
            cells.append(Cell(f"{set_up}, {method}, seed {seed}", path, partial(named, set_up, run)))
        compute_missing(cells, line_of)
    results = report(root)
    if arguments.check:
        sys.exit(0 if check(results, arguments.set_ups, arguments.seeds, arguments.steps) else 1)


def named(set_up: str, run: Any) -> dict[str, Any]:
    return {"set_up": set_up, **run()}


# ----------------------------------------------------------------------------------------------------------------------
# One cell


def run_cell(task: Task, name: str, seed: int, bases: Path, keep: Path, steps: int | None = None) -> dict[str, Any]:
    """Train one method on the chains and measure it; returns everything that the report needs.

    Args:
        task ([`Task`]): What is learned; its `chains` are known.
        name (`str`): A name in `METHODS`.
        seed (`int`): Of the data, the base model, the first hypotheses and the order of training.
        bases (`Path`): For what the trainer writes, and for base models that are trained first.
        keep (`Path`): Where the trained adapter goes.
        steps (`int`, *optional*): Optimizer steps, in place of the task's.
    """
    data = task.data(seed)
    # One LoRA has the rank of one hypothesis, as in the paper.
    trainer = trainer_of(task, METHODS[name], seed, data, bases, steps, r=task.r)
    trainer.remove_callback(PrinterCallback)
    curve = Curve(trainer, task, data["validation"])
    trainer.add_callback(curve)
    wall, cpu = time.monotonic(), cpu_seconds()
    trainer.train()
    spent = {"train_wall_seconds": time.monotonic() - wall, "train_cpu_seconds": cpu_seconds() - cpu}
    trainer.model.save_pretrained(keep)

    states, chain = markov.sample(
        task.chains, task.priors, HELD_OUT_SEQUENCES, markov.LENGTH, seed=HELD_OUT_SEED + seed
    )
    window = trainer.score(Dataset.from_list([{"input_ids": row, "labels": row} for row in states.tolist()]))
    count = window.scores.shape[1]
    matrices = transition_matrices(trainer.model, torch.from_numpy(states), window.winners)
    return {
        "method": name,
        "seed": seed,
        "asked_steps": steps or task.training["max_steps"],
        "steps": trainer.state.global_step,
        "learning_rate": trainer.args.learning_rate,
        "hypotheses": count,
        "theory": vars(markov.theory(task.chains, task.priors)),
        "base_nll": curve.found[0]["nll"],
        "curve": curve.found,
        **loss_of(task, window.scores.numpy(), states),
        **measure(window, trainer.score(data["validation"].remove_columns(task.label)), chain.tolist()),
        **compare(task, matrices, window.winners.numpy(), chain),
        **spent,
        "cpu_seconds": cpu_seconds() - cpu,
        "threads": torch.get_num_threads(),
    }


class Curve(TrainerCallback):
    """Measures the best-of-K loss on held-out sequences before training and `LOOKS` times during it."""

    def __init__(self, trainer: MCLTrainer, task: Task, rows: Dataset) -> None:
        self.trainer, self.task = trainer, task
        self.rows = rows.remove_columns(task.label)
        self.states = np.array(rows["input_ids"])
        self.found: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % -(-state.max_steps // LOOKS) == 0 or state.global_step == state.max_steps:
            self._look(state.global_step)

    def _look(self, step: int) -> None:
        scores = self.trainer.score(self.rows).scores.numpy()
        self.found.append({"step": step, "nll": loss_of(self.task, scores, self.states)["nll"]})


def loss_of(task: Task, scores: NDArray[np.floating], states: NDArray[np.int64]) -> dict[str, float]:
    """The best-of-K loss, in nats per predicted token.

    Args:
        task ([`Task`]): With the chains that the sequences are drawn from.
        scores (`NDArray`): (N, K), nats for each sequence.
        states (`NDArray`): (N, T), the sequences.

    Returns:
        `dict[str, float]`: `measured_nll`, the plain mean, and `measured_error`, its standard error; `nll`, what is left of it
        without the luck of the draw: the exact loss of the true chains (of their mixture, for K = 1), and how far the
        measured loss is from theirs on these sequences; `nll_error`, its standard error.
    """
    logs = markov.log_likelihoods(states, task.chains)
    theory = markov.theory(task.chains, task.priors, states.shape[1])
    if scores.shape[1] == 1:
        priors = np.ones(len(task.chains)) if task.priors is None else np.array(task.priors)
        best_possible, exact = np.logaddexp.reduce(logs + np.log(priors / priors.sum()), axis=1), theory.mixture
    else:
        best_possible, exact = logs.max(1), theory.winners
    predicted = states.shape[1] - 1
    measured = -scores.astype(np.float64).max(1) / predicted
    beyond = measured + best_possible / predicted
    root = math.sqrt(len(measured))
    return {
        "nll": exact + float(beyond.mean()),
        "nll_error": float(beyond.std(ddof=1)) / root,
        "measured_nll": float(measured.mean()),
        "measured_error": float(measured.std(ddof=1)) / root,
    }


@torch.no_grad()
def transition_matrices(model: Any, states: torch.Tensor, winners: torch.Tensor) -> dict[str, list[Any]]:
    """How each hypothesis goes on from each state: its probabilities of the next token, averaged over all places of that state.

    Args:
        model: With K hypotheses, whose first two tokens are the states.
        states (`torch.Tensor`): int64 of shape (N, T), the sequences.
        winners (`torch.Tensor`): int64 of shape (N,), the hypothesis that explains each of them best.

    Returns:
        `dict[str, list]`: For each hypothesis a matrix (2, 2), from state to state. Its rows sum to less than 1 by what the
        model gives to other tokens. `won`: over the sequences that the hypothesis wins, and None if those do not have both
        states; `all`: over all of them.
    """
    model.eval()
    found: dict[str, list[Any]] = {"won": [], "all": []}
    before = states[:, :-1]
    for k in range(model.num_hypotheses):
        parts = [model(input_ids=part, hypotheses=k).logits[:, :-1] for part in states.split(PARTS)]
        probabilities = torch.cat(parts).double().softmax(-1)[..., :2]
        for name, rows in (("won", winners == k), ("all", torch.ones_like(winners, dtype=torch.bool))):
            places = [(before == state) & rows[:, None] for state in (0, 1)]
            has_both = all(bool(place.any()) for place in places)
            found[name].append([probabilities[place].mean(0).tolist() for place in places] if has_both else None)
    return found


def compare(
    task: Task, matrices: dict[str, list[Any]], winners: NDArray[np.int64], chain: NDArray[np.int64]
) -> dict[str, Any]:
    """Which hypothesis is which chain, and how close it is.

    Args:
        task ([`Task`]): With the chains.
        matrices (`dict`): See `transition_matrices`.
        winners (`NDArray`): int64 of shape (N,), of K hypotheses.
        chain (`NDArray`): int64 of shape (N,), where each sequence comes from.

    Returns:
        `dict`: `hypothesis_of`, the hypothesis that stands for each chain, such that together they win as much of their own
        chain as possible; `assignment`, the part of the sequences whose winner is that of their chain; `matrix_error`, the
        largest difference between the matrices (won sequences) and the true ones, infinite if one is missing, and
        `matrix_error_all`, over all sequences. With one hypothesis, it is compared with the averaged chain.
    """
    count = len(matrices["all"])
    if count == 1:
        truth, order = [markov.averaged_chain(task.chains, task.priors)], np.array([0])
    else:
        truth = list(task.chains)
        wins = np.zeros((len(truth), count))
        np.add.at(wins, (chain, winners), 1)
        order = linear_sum_assignment(-wins)[1]
    found: dict[str, Any] = {"matrices": matrices, "truth": truth, "hypothesis_of": order.tolist()}
    found["assignment"] = float((order[chain] == winners).mean()) if count > 1 else None
    for name, key in (("won", "matrix_error"), ("all", "matrix_error_all")):
        errors = [
            np.abs(np.array(matrices[name][k]) - [[1 - p, p], [q, 1 - q]]).max() if matrices[name][k] else math.inf
            for k, (p, q) in zip(order, truth, strict=True)
        ]
        found[key] = float(max(errors))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The report


def criteria(cell: dict[str, Any]) -> dict[str, bool]:
    """What a cell with several hypotheses has to meet, and whether it does."""
    return {
        "loss inside the band": cell["nll"] <= cell["theory"]["rate"],
        "matrices": cell["matrix_error"] <= MOST_MATRIX_ERROR,
        "assignment": cell["assignment"] >= LEAST_ASSIGNMENT,
        "CPU time": cell["cpu_seconds"] <= MOST_CPU_SECONDS,
    }


def line_of(cell: dict[str, Any]) -> str:
    theory = cell["theory"]
    if cell["hypotheses"] == 1:
        return (
            f"NLL {cell['nll']:.4f} (optimum {theory['mixture']:.4f}), at most {cell['matrix_error']:.3f} from the averaged "
            f"chain; {cell['cpu_seconds']:.0f} CPU s"
        )
    verdicts = ", ".join(f"{name} {'PASS' if met else 'FAIL'}" for name, met in criteria(cell).items())
    return (
        f"NLL {cell['nll']:.4f} (band {theory['lowest']:.4f} to {theory['rate']:.4f}), assignment {cell['assignment']:.4f}, "
        f"matrices at most {cell['matrix_error']:.3f} off; {cell['cpu_seconds']:.0f} CPU s: {verdicts}"
    )


def check(
    cells: Sequence[dict[str, Any]], set_ups: Sequence[str], seeds: Sequence[int], steps: int | None = None
) -> bool:
    """Print whether the main method meets each criterion in each seed on the paper's set-ups, as far as they are asked for.

    Args:
        cells (`Sequence[dict]`): Results, of any method and number of steps.
        set_ups (`Sequence[str]`): Names in `SET_UPS`; those that are ours alone have no criteria.
        seeds (`Sequence[int]`): All of them have to be there.
        steps (`int`, *optional*): Optimizer steps, in place of the task's: cells of other lengths do not count.

    Returns:
        `bool`: Whether all are met. A cell that was not computed does not meet them.
    """
    wanted = [(set_up, seed) for set_up in PAPER_SET_UPS if set_up in set_ups for seed in seeds]
    there = {
        (cell["set_up"], cell["seed"]): cell
        for cell in cells
        if cell["method"] == MAIN_METHOD
        and cell["asked_steps"] == (steps or SET_UPS[cell["set_up"]].training["max_steps"])
    }
    passes = bool(wanted)
    if not wanted:
        print(f"FAIL: nothing to check, --set_ups has none of {', '.join(PAPER_SET_UPS)}")
    for set_up, seed in wanted:
        cell = there.get((set_up, seed))
        for name, met in criteria(cell).items() if cell else [("computed", False)]:
            print(f"{'PASS' if met else 'FAIL'}: {set_up}, {MAIN_METHOD}, seed {seed}: {name}")
            passes &= met
    return passes


def report(root: Path) -> list[dict[str, Any]]:
    """Write `results.json`, `report.md` and the plots beside the result files; returns the results."""
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(root.glob("*/*.json"))]
    write_whole(root / "results.json", json.dumps(cells, indent=1) + "\n")
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        groups[cell["set_up"]].append(cell)
    there = [(name, groups[name]) for name in SET_UPS if name in groups]
    write_whole(root / "report.md", "\n\n".join(table(name, group) for name, group in there) + "\n")
    for name, group in there:
        draw(name, group, root / f"{name}.png")
    print(f"Wrote {root / 'report.md'}, {root / 'results.json'} and {len(there)} plots.")
    return cells


def table(set_up: str, cells: Sequence[dict[str, Any]]) -> str:
    """Two tables in Markdown: figures for each method and number of steps, over seeds; and the matrices for each seed."""
    rows: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        rows[cell["asked_steps"], cell["method"]].append(cell)
    places = {method: place for place, method in enumerate(METHODS)}
    groups = [rows[key] for key in sorted(rows, key=lambda key: (key[0], places[key[1]]))]
    theory = cells[0]["theory"]
    names = ["method", "steps", "seeds", "NLL", "assignment", "matrix error", "on all", "mean", "CPU s", "passes"]
    lines = [
        f"### {set_up}",
        "",
        f"One model: at least {theory['mixture']:.4f}. Hypotheses: {theory['lowest']:.4f} to {theory['rate']:.4f}; those that "
        f"equal the chains: {theory['winners']:.4f}, assignment {theory['purity']:.4f}.",
        "",
        "| " + " | ".join(names) + " |",
        "|---" * len(names) + "|",
    ]
    for group in groups:
        competes = group[0]["hypotheses"] > 1
        passed = sum(all(criteria(cell).values()) for cell in group) if competes else 0
        line = [
            group[0]["method"],
            str(group[0]["asked_steps"]),
            str(len(group)),
            spread([cell["nll"] for cell in group], 4),
            spread([cell["assignment"] for cell in group]) if competes else "",
            spread([cell["matrix_error"] for cell in group]),
            spread([cell["matrix_error_all"] for cell in group]),
            spread([cell["figures"]["mean_nll"] for cell in group]),
            f"{np.mean([cell['cpu_seconds'] for cell in group]):.0f}",
            f"{passed} of {len(group)}" if competes else "",
        ]
        lines.append("| " + " | ".join(line) + " |")
    lines += ["", "| method | seed | from 0 to 1 and back, true | as learned |", "|---" * 4 + "|"]
    for cell in itertools.chain(*groups):
        truth = ", ".join(f"{p:.3f} {q:.3f}" for p, q in cell["truth"])
        pairs = [leaving(cell["matrices"]["won"][k]) for k in cell["hypothesis_of"]]
        learned = ", ".join(f"{pair[0]:.3f} {pair[1]:.3f}" if pair else "wins nothing" for pair in pairs)
        lines.append(f"| {cell['method']} | {cell['seed']} | {truth} | {learned} |")
    return "\n".join(lines)


def leaving(matrix: list[list[float]] | None) -> tuple[float, float] | None:
    """The probability of leaving each state."""
    return (matrix[0][1], matrix[1][0]) if matrix else None


def draw(set_up: str, cells: Sequence[dict[str, Any]], path: Path) -> None:
    """The loss against the band of theory, and the transitions of each hypothesis against the true ones."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    methods = [method for method in METHODS if any(cell["method"] == method for cell in cells)]
    for place, method in enumerate(methods):
        colour, label = f"C{place}", method
        for cell in cells:
            if cell["method"] != method:
                continue
            steps = [look["step"] for look in cell["curve"]]
            left.plot(steps, [look["nll"] for look in cell["curve"]], color=colour, label=label)
            label = "_"
            pairs = [pair for matrix in cell["matrices"]["won"] if (pair := leaving(matrix))]
            right.scatter(*zip(*pairs, strict=True), color=colour, s=25, alpha=0.7, zorder=3)
    theory = cells[0]["theory"]
    left.axhspan(theory["lowest"], theory["rate"], color="black", alpha=0.25, label="band of theory")
    left.axhline(theory["mixture"], color="black", linestyle="--", label="best single model")
    # What matters is near the band; the first steps are far above it.
    left.set_ylim(theory["lowest"] - 0.005, theory["mixture"] + 0.045)
    left.set_xlabel("optimizer step")
    left.set_ylabel("best-of-K NLL (nats per token, held out)")
    left.set_title(set_up)
    left.legend(fontsize=7)
    task = SET_UPS[set_up]
    right.scatter(
        *zip(*task.chains, strict=True), marker="*", s=220, facecolors="none", edgecolors="black", label="chains"
    )
    averaged = markov.averaged_chain(task.chains, task.priors)
    right.scatter(*averaged, marker="D", s=90, facecolors="none", edgecolors="black", label="averaged chain")
    right.set_xlim(0, 1)
    right.set_ylim(0, 1)
    right.set_xlabel("probability of leaving state 0")
    right.set_ylabel("probability of leaving state 1")
    right.legend(fontsize=7)
    save_plot(figure, path)
    plt.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.markov", description=__doc__.split("\n")[0])
    parser.add_argument("--set_ups", nargs="+", default=list(PAPER_SET_UPS), choices=list(SET_UPS))
    methods = ["lora", "wta", "annealed", "balanced"]
    parser.add_argument("--methods", nargs="+", default=methods, choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=None, help="Optimizer steps, in place of 501.")
    parser.add_argument("--report", action="store_true", help="Compute nothing, report what is there.")
    parser.add_argument(
        "--check", action="store_true", help=f"Fail unless {MAIN_METHOD} passes on the paper's set-ups."
    )
    parser.add_argument("--output_dir", default="outputs/markov")
    return parser.parse_args()


if __name__ == "__main__":
    main()
