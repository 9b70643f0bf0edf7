"""Quality against diversity: one point for each contender and decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt


MARKERS = {"greedy": "*", "beam": "s", "diverse_beam": "D", "top_k": "^", "nucleus": "v", "typical": "<"}
QUALITIES = {"chrf/best": "chrF of the best output", "chrf/mean": "mean chrF of the outputs"}
DIVERSITY = "div_2"


def draw(results: dict[str, Any], path: Path, title: str = "") -> None:
    """Write the plot, whole or not at all: best and mean quality, each against Div-2, with 95 % intervals.

    Outputs without diversity (K = 1) have no place in it.
    """
    entries = [entry for entry in results["outputs"] if len(entry["generated_by"]) > 1]
    names = list(dict.fromkeys(entry["contender"] for entry in entries))
    colours = dict(zip(names, plt.get_cmap("tab10")(range(len(names))), strict=True))
    figure, panels = plt.subplots(1, len(QUALITIES), figsize=(12, 4.8), layout="constrained")
    for panel, (quality, label) in zip(panels, QUALITIES.items(), strict=True):
        for entry in entries:
            x, y = entry["figures"][DIVERSITY], entry["figures"][quality]
            panel.errorbar(
                x[0],
                y[0],
                xerr=[[x[0] - x[1]], [x[2] - x[0]]],
                yerr=[[y[0] - y[1]], [y[2] - y[0]]],
                color=colours[entry["contender"]],
                marker=MARKERS.get(entry["decoder"], "o"),
                markersize=9,
                elinewidth=0.6,
                linestyle="none",
                label=f"{entry['contender']}, {entry['decoder']}",
            )
        panel.set_xlabel("Div-2 (more is more diverse)")
        panel.set_ylabel(label)
    panels[0].legend(fontsize=7)
    figure.suptitle(title)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)
    plt.close(figure)
