"""One picture: quality against diversity, one point for each contender and decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt

from recipes.files import save_plot


MARKERS = "os^vDP*X<>"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw best-of-K and mean quality against 1 - mBLEU-4, with intervals. Runs with one output have no diversity: a line."""
    metric = results["ranked_metric"]
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharex=True)
    contenders = list(dict.fromkeys(run["contender"] for run in results["runs"]))
    decoders = list(dict.fromkeys(run["decoder"] for run in results["runs"]))
    for axes, part in zip(panels, ("best", "mean"), strict=True):
        for run in results["runs"]:
            colour = f"C{contenders.index(run['contender']) % 10}"
            quality, diversity = run["quality"][metric][part], run["diversity"].get("mbleu_4")
            label = f"{run['contender']}, {run['decoder']}"
            if diversity is None:
                axes.axhline(quality[0], color=colour, linestyle=":", label=label)
                continue
            axes.errorbar(
                1 - diversity[0],
                quality[0],
                xerr=[[max(0, diversity[2] - diversity[0])], [max(0, diversity[0] - diversity[1])]],
                yerr=[[max(0, quality[0] - quality[1])], [max(0, quality[2] - quality[0])]],
                color=colour,
                marker=MARKERS[decoders.index(run["decoder"]) % len(MARKERS)],
                linewidth=0.8,
                label=label,
            )
        axes.set_xlabel("diversity of the K outputs (1 - mBLEU-4)")
        axes.set_ylabel(f"{metric}, {part} of K")
    panels[1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    save_plot(figure, path)
    plt.close(figure)
