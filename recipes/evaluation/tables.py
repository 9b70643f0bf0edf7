"""The results as tables, for the terminal and for a page."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


# What a table shows, and as what. All but the last column of diversity: more is better.
COLUMNS = {
    "chrf/best": "chrF best",
    "chrf/mean": "mean",
    "chrf/worst": "worst",
    "bleu/best": "BLEU best",
    "rouge_l/best": "ROUGE-L best",
    "cider_d/best": "CIDEr-D best",
    "coverage": "coverage",
    "div_2": "Div-2",
    "mbleu_4": "mBLEU-4",
    "self_cider": "self-CIDEr",
    "semantic_diversity": "semantic",
}
LIKELIHOODS = {"wta_nll": "best", "mixture_nll": "mixture", "mean_nll": "mean", "worst_nll": "worst"}


def quality_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the main table: one row for each contender and decoder."""
    shown = [name for name in COLUMNS if any(name in entry["figures"] for entry in results["outputs"])]
    head = ["contender", "decoder", *(COLUMNS[name] for name in shown)]
    rows = []
    for entry in results["outputs"]:
        cells = [_figure(entry["figures"].get(name), wide=name.split("/")[0] in ("chrf", "bleu")) for name in shown]
        rows.append([entry["contender"], entry["decoder"], *cells])
    return head, rows


def mode_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The best output against the references of each mode."""
    modes = sorted({name for entry in results["outputs"] for name in entry["figures"] if ", mode " in name})
    head = ["contender", "decoder", *(name.split(", mode ")[1] for name in modes)]
    rows = [
        [entry["contender"], entry["decoder"], *(_figure(entry["figures"].get(name), wide=True) for name in modes)]
        for entry in results["outputs"]
    ]
    return head, rows if modes else []


def likelihood_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Nats per token of the references."""
    head = ["contender", *LIKELIHOODS.values()]
    rows = [
        [name, *(f"{figures[key]:.3f}" for key in LIKELIHOODS)] for name, figures in results["likelihood"].items()
    ]
    return head, rows


def ranking_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The output that comes first by each ranking, between the mean and the best."""
    names = ["chrf/mean", *(f"chrf/top-1 by {name}" for name in ("likelihood", "mixture", "consensus")), "chrf/best"]
    head = ["contender", *(name.removeprefix("chrf/") for name in names)]
    entries = [entry for entry in results["outputs"] if names[1] in entry["figures"]]
    rows = [[entry["contender"], *(_figure(entry["figures"][name], wide=True) for name in names)] for entry in entries]
    singles = [entry for entry in results["outputs"] if entry["decoder"] == "greedy" and entry not in entries]
    for entry in singles if rows else []:
        first = _figure(entry["figures"]["chrf/first"], wide=True)
        rows.append([f"{entry['contender']}, greedy", first, "", "", "", first])
    return head, rows


PARTS = {
    "Quality and diversity": quality_rows,
    "chrF of the best output against the references of one mode": mode_rows,
    "Nats per token of the references": likelihood_rows,
    "chrF of the output that is ranked first": ranking_rows,
}


def show(results: dict[str, Any], console: Console) -> None:
    """Print the tables and what each hypothesis has become."""
    for title, make in PARTS.items():
        head, rows = make(results)
        if rows:
            table = Table(title=title, title_justify="left")
            for place, name in enumerate(head):
                table.add_column(name, justify="left" if place < 2 else "right")
            for row in rows:
                table.add_row(*row)
            console.print(table)
    for name, found in results["hypotheses"].items():
        for k, words in enumerate(found["words"]):
            console.print(f"{name}, hypothesis {k} wins {found['win_shares'][k]:.2f}: {', '.join(words)}")


def markdown(results: dict[str, Any]) -> str:
    """The same in Markdown."""
    parts = []
    for title, make in PARTS.items():
        head, rows = make(results)
        if rows:
            lines = [f"### {title}", "", _line(head), "|" + "---|" * len(head), *map(_line, rows)]
            parts.append("\n".join(lines))
    for name, found in results["hypotheses"].items():
        lines = [f"### What the hypotheses of {name} win", ""]
        for k, (words, samples) in enumerate(zip(found["words"], found["samples"], strict=True)):
            sample = f" For example: {samples[0]!r}." if samples else ""
            lines.append(f"- {k} ({found['win_shares'][k]:.2f}): {', '.join(words)}.{sample}")
        if "agreement" in found:
            lines.append(f"\nPurity {found['agreement']['purity']:.3f}, NMI {found['agreement']['nmi']:.3f}.")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _figure(interval: list[float] | None, wide: bool) -> str:
    if interval is None:
        return ""
    estimate, low, high = interval
    digits = 1 if wide else 2
    return f"{estimate:.{digits}f} ±{(high - low) / 2:.{digits}f}"
