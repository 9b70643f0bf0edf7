"""From result files to one table for each task, plots, and one file with all figures."""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from recipes.files import save_plot, write_whole
from recipes.language import identify
from recipes.specialisation.methods import METHODS
from recipes.specialisation.tasks import LANGUAGES, TASKS


FIGURES = ("wta_nll", "mixture_nll", "mean_nll", "worst_nll")
# Too long for the file that is kept.
LEFT_OUT = ("logs", "texts")


def report(root: Path) -> None:
    """Write `results.json`, `report.md` and the plots beside the result files."""
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(root.glob("*/*.json"))]
    for cell in cells:
        if TASKS[cell["task"]].language and len(cell["texts"]) > 1:
            cell["decoded"] = decoded_languages(cell)
    kept = [{key: value for key, value in cell.items() if key not in LEFT_OUT} for cell in cells]
    write_whole(root / "results.json", json.dumps(kept, indent=1) + "\n")
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        groups[cell["task"]].append(cell)
    parts = [table(name, groups[name]) for name in TASKS if name in groups]
    write_whole(root / "report.md", "\n\n".join(parts) + "\n")
    for name, group in groups.items():
        title = name.replace(" ", "-").replace(",", "")
        draw(name, group, root / f"{title}.png")
        draw_winners(name, group, root / f"{title}-winners.png")
    print(f"Wrote {root / 'report.md'}, {root / 'results.json'} and plots of {len(groups)} tasks.")


def decoded_languages(cell: dict[str, Any]) -> dict[str, Any]:
    """Which language each hypothesis writes.

    Returns:
        `dict`: `main`, the most frequent one of each hypothesis; `share`, its part of the decoded texts; `own`, whether every
        hypothesis writes another one, as far as there are as many.
    """
    main, share = [], []
    for texts in cell["texts"]:
        found = [language for language, _ in identify(texts, LANGUAGES)]
        main.append(max(LANGUAGES, key=found.count))
        share.append(found.count(main[-1]) / len(found))
    return {"main": main, "share": share, "own": len(set(main)) == min(len(main), len(LANGUAGES))}


def table(task: str, cells: list[dict[str, Any]]) -> str:
    """A table in Markdown: one row for each method and number of steps, means and ranges over seeds."""
    rows: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        rows[cell["asked_steps"], cell["method"]].append(cell)
    has_text = any("decoded" in cell for cell in cells)
    head = ["method", "steps", "seeds", "purity", "NMI", "dead", "best", "mixture", "mean", "worst", "CPU s"]
    head += ["own language"] if has_text else []
    lines = [f"### {task}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    order = {method: place for place, method in enumerate(METHODS)}
    # Results of methods that are no longer run come last.
    for (steps, method), group in sorted(
        rows.items(), key=lambda item: (item[0][0], order.get(item[0][1], len(order)))
    ):
        competes = group[0]["hypotheses"] > 1
        line = [method, str(steps), str(len(group))]
        line += [spread([cell["agreement"][name] for cell in group]) if competes else "" for name in ("purity", "nmi")]
        line += [f"{max(cell['dead'] for cell in group)}" if competes else ""]
        line += [spread([cell["figures"][name] for cell in group]) for name in FIGURES]
        line += [f"{np.mean([cell['train_cpu_seconds'] for cell in group]):.0f}"]
        if has_text:
            own = [cell["decoded"]["own"] for cell in group if "decoded" in cell]
            line += [f"{sum(own)} of {len(own)}" if own else ""]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def spread(values: list[float], digits: int = 3) -> str:
    """The mean, and the range if there are several."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def draw(task: str, cells: list[dict[str, Any]], path: Path) -> None:
    """Purity against the likelihood of the mixture, and how purity grows."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2), layout="constrained")
    methods = sorted({cell["method"] for cell in cells})
    colours = plt.get_cmap("tab20")(np.linspace(0, 1, max(len(methods), 2)))
    for method, colour in zip(methods, colours, strict=False):
        group = [cell for cell in cells if cell["method"] == method]
        purity = [cell["agreement"]["purity"] for cell in group]
        left.scatter([cell["figures"]["mixture_nll"] for cell in group], purity, color=colour, label=method)
        for cell in group:
            looks = cell.get("looks") or []
            if looks:
                right.plot([look["step"] for look in looks], [look["purity"] for look in looks], color=colour)
    left.set_xlabel("NLL of the mixture (nats per token, held out)")
    left.set_ylabel("purity (held out)")
    right.set_xlabel("optimizer step")
    right.set_ylabel("purity (validation)")
    left.set_title(task)
    # Beside the plots, where it hides no point.
    figure.legend(loc="outside right upper", fontsize=7)
    save_plot(figure, path)
    plt.close(figure)


def draw_winners(task: str, cells: list[dict[str, Any]], path: Path) -> None:
    """Who wins what over time: a row for each method (its first seed), a column for each look, modes by hypotheses."""
    first: dict[str, dict[str, Any]] = {}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        if cell["looks"]:
            first.setdefault(cell["method"], cell)
    if not first:
        return
    columns = max(len(cell["looks"]) for cell in first.values())
    figure, grid = plt.subplots(
        len(first), columns, figsize=(2.2 * columns + 1.5, 1.7 * len(first)), layout="constrained", squeeze=False
    )
    for row, (method, cell) in zip(grid, first.items(), strict=True):
        for place, look in zip(row, cell["looks"], strict=False):
            counts = np.array(list(look["matrix"].values()), dtype=float)
            place.imshow(
                counts / counts.sum(axis=1, keepdims=True).clip(min=1), vmin=0, vmax=1, cmap="Blues", aspect="auto"
            )
            place.set_yticks(range(len(counts)), list(look["matrix"]), fontsize=7)
            place.set_xticks(range(counts.shape[1]))
            place.set_title(f"step {look['step']}", fontsize=8)
        row[0].set_ylabel(textwrap.fill(method, 20), fontsize=7)
        for place in row[len(cell["looks"]) :]:
            place.axis("off")
    figure.suptitle(f"{task}: part of each mode (rows) that each hypothesis wins", fontsize=9)
    save_plot(figure, path)
    plt.close(figure)
