"""The results as tables, for a terminal and in Markdown."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markdown import Markdown


QUALITY_SHOWN = ("best", "mean", "worst")
DIVERSITY_SHOWN = ("div_2", "mbleu_4", "distinct", "semantic")


def show(results: dict[str, Any]) -> None:
    console = Console()
    Console(width=console.width if console.is_terminal else 160).print(Markdown(markdown(results)))


def markdown(results: dict[str, Any]) -> str:
    """All tables: estimates with their 95 % intervals."""
    parts = [
        f"# Evaluation\n\n{results['prompts']} prompts with {results['references']} references, {results['sequences']} scored "
        "sequences. In brackets: 95 % bootstrap intervals over inputs and seeds.",
        _decoded(results),
        _by_mode(results),
        _ranked(results),
        _likelihood(results),
        *(_specialised(name, seeds[0]) for name, seeds in results["specialisation"].items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _decoded(results: dict[str, Any]) -> str:
    metric = results["ranked_metric"]
    shown = [name for name in DIVERSITY_SHOWN if any(name in run["diversity"] for run in results["runs"])]
    head = [
        "contender",
        "decoder",
        "K",
        "beams",
        "seeds",
        *(f"{metric} {name}" for name in QUALITY_SHOWN),
        "coverage",
        *shown,
    ]
    lines = [
        [
            run["contender"], run["decoder"], str(run["outputs"]), str(run["beams"] or ""), str(run["seeds"]),
            *(_figure(run["quality"][metric][name]) for name in QUALITY_SHOWN), _figure(run["quality"]["coverage"]),
            *(_figure(run["diversity"].get(name)) for name in shown),
        ]
        for run in results["runs"]
    ]  # fmt: skip
    return f"## Outputs: quality and diversity\n\n{_table(head, lines)}"


def _by_mode(results: dict[str, Any]) -> str:
    modes = sorted({mode for run in results["runs"] for mode in run["best_of_mode"]})
    if not modes:
        return ""
    lines = [
        [run["contender"], run["decoder"], *(_figure(run["best_of_mode"].get(mode)) for mode in modes)]
        for run in results["runs"]
    ]
    title = f"## {results['ranked_metric']} of the best output against the references of one mode"
    return f"{title}\n\n{_table(['contender', 'decoder', *modes], lines)}"


def _ranked(results: dict[str, Any]) -> str:
    names = ("random", "likelihood", "mixture", "consensus", "oracle")
    runs = [run for run in results["runs"] if run["top1"]]
    if not runs:
        return ""
    greedy = sorted({name for run in runs for name in run["top1_minus_greedy"]})
    head = ["contender", "decoder", *names, *(f"consensus - greedy of {name}" for name in greedy)]
    lines = [
        [
            run["contender"], run["decoder"], *(_figure(run["top1"].get(name)) for name in names),
            *(_figure(run["top1_minus_greedy"].get(name, {}).get("consensus")) for name in greedy),
        ]
        for run in runs
    ]  # fmt: skip
    return f"## One of K outputs: {results['ranked_metric']} of the one that is chosen by\n\n{_table(head, lines)}"


def _likelihood(results: dict[str, Any]) -> str:
    names = ("best", "mixture", "mean", "worst")
    lines = [
        [name, str(found["hypotheses"]), *(_figure(found[part]) for part in names), f"{found['log_k']:.3f}"]
        for name, found in results["likelihood"].items()
    ]
    head = ["contender", "K", *names, "log K per token"]
    note = "The best of K is worth something only as far as it is below one model minus log K per token."
    return f"## Likelihood, nats per token\n\n{_table(head, lines)}\n\n{note}"


def _specialised(name: str, found: dict[str, Any]) -> str:
    agreed = found.get("agreement")
    modes = list(agreed["matrix"]) if agreed else []
    head = [
        "hypothesis",
        "win share",
        *(f"of {mode}" for mode in modes),
        "characteristic words",
        "a sequence that it wins",
    ]
    lines = []
    for k, share in enumerate(found["win_shares"]):
        counts = [str(agreed["matrix"][mode][k]) for mode in modes] if agreed else []
        words = ", ".join(word for word, _ in found["words"][k][:6])
        sample = " ".join(found["samples"][k][0].split())[:80] if found["samples"][k] else ""
        lines.append([str(k), f"{share:.2f}", *counts, words, sample])
    agreement = f" Purity {_figure(found['purity'])}, NMI {_figure(found['nmi'])}." if agreed else ""
    entropy = f"Entropy of the win shares {found['assignment_entropy']:.3f} nats."
    return f"## What the hypotheses of {name} win\n\n{entropy}{agreement}\n\n{_table(head, lines)}"


def _figure(interval: list[float] | None) -> str:
    if interval is None:
        return ""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval)


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
