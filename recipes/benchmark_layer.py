"""Time the ways to apply K low-rank updates in one layer: which arithmetic should `peft_mcl/layer.py` use?

```bash
python recipes/benchmark_layer.py                      # the grid of docs/speed.md, about 15 minutes on 2 CPU cores
python recipes/benchmark_layer.py --widths 576 --ranks 8 --hypotheses 3 --dtypes float32
```

Three situations: `scoring` (K equal contiguous blocks, no graph), `training` (every sequence under its own hypothesis, forward
and backward) and `packed` (one long row of ragged sequences, sorted by hypothesis, forward and backward). Times are
interleaved medians, printed in per cent of the frozen linear layer's own forward (and, with a graph, its input gradient):
100 means that the update costs as much as the layer it adapts. `MB` is what a method keeps for backward beside its input.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table


# Run by path, Python looks for `recipes` beside this file.
sys.path.insert(0, str(Path(__file__).parents[1]))

from peft_mcl.updates import gathered_update, segmented_update
from recipes.files import write_whole


Update = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[int]], torch.Tensor]


# --------------------------------------------------------------------------------------------------------------------
# The ways. Each takes x (N, d), the tokens of all sequences; A (K, r, d); B (K, out, r); the hypothesis of each sequence,
# ascending; and the number of tokens of each sequence. Each returns (N, out).


def blocks(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Batched products over K equal blocks."""
    rows = x.view(len(a), -1, x.shape[1])
    return torch.bmm(torch.bmm(rows, a.transpose(1, 2)), b.transpose(1, 2)).flatten(0, 1)


def gathered(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """Batched products over rows, with A and B copied for each row. Rows must be of one length."""
    rows = x.view(len(index), -1, x.shape[1])
    return torch.bmm(torch.bmm(rows, a[index].transpose(1, 2)), b[index].transpose(1, 2)).flatten(0, 1)


def segments(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """A loop over the runs of one hypothesis."""
    parts, start = [], 0
    for hypothesis, group in itertools.groupby(zip(index.tolist(), lengths, strict=True), key=lambda pair: pair[0]):
        stop = start + sum(length for _, length in group)
        parts.append(F.linear(F.linear(x[start:stop], a[hypothesis]), b[hypothesis]))
        start = stop
    return torch.cat(parts)


def masked(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """One product with all K * r rows of A, masked for each token, and one with all of B."""
    count, rank, width = a.shape
    token = index.repeat_interleave(torch.tensor(lengths))
    keep = F.one_hot(token, count).to(x.dtype).unsqueeze(-1)
    hidden = F.linear(x, a.view(count * rank, width)).view(-1, count, rank) * keep
    return F.linear(hidden.flatten(1), b.permute(1, 0, 2).reshape(b.shape[1], count * rank))


def grouped_mm(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """torch's grouped matrix product."""
    tokens = torch.zeros(len(a), dtype=torch.int64).index_add(0, index, torch.tensor(lengths))
    ends = tokens.cumsum(0).int()
    return F.grouped_mm(F.grouped_mm(x, a.transpose(1, 2), offs=ends), b.transpose(1, 2), offs=ends)


def regathered(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """`gathered`, but gathering again in the backward pass: what the package does with padded rows."""
    return gathered_update(x.view(len(index), -1, x.shape[1]), a, b, index, 1.0).flatten(0, 1)


def runs(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """`segments`, with gradients written in place: what the package does with packed rows."""
    found, start = [], 0
    for hypothesis, group in itertools.groupby(zip(index.tolist(), lengths, strict=True), key=lambda pair: pair[0]):
        stop = start + sum(length for _, length in group)
        found.append((hypothesis, start, stop))
        start = stop
    return segmented_update(x, a, b, tuple(found), 1.0)


WAYS: dict[str, Update] = {
    "blocks": blocks,
    "gathered": gathered,
    "regathered": regathered,
    "segments": segments,
    "runs": runs,
    "masked": masked,
    "grouped_mm": grouped_mm,
}
# Which ways apply: blocks need equal shares, gathering needs rows of one length. Without a graph `regathered` and `runs` do
# what `gathered` and `segments` do.
SITUATIONS = {
    "scoring": ("blocks", "gathered", "segments", "masked", "grouped_mm"),
    "training": ("gathered", "regathered", "segments", "runs", "masked", "grouped_mm"),
    "packed": ("segments", "runs", "masked", "grouped_mm"),
}


# --------------------------------------------------------------------------------------------------------------------
# One cell of the grid


def measure_cell(
    situation: str, width: int, rank: int, count: int, rows: int, tokens: int, dtype: torch.dtype, repeats: int
) -> dict[str, dict[str, float | None]]:
    """Median seconds and kept megabytes of each way; None where torch refuses."""
    generator = torch.Generator().manual_seed(0)
    with_graph = situation != "scoring"
    if situation == "scoring":
        index = torch.arange(count).repeat_interleave(rows)
    else:
        index = torch.randint(count, (rows,), generator=generator).sort().values
    lengths = [tokens] * len(index)
    if situation == "packed":
        lengths = torch.randint(tokens // 4, 2 * tokens - tokens // 4, (rows,), generator=generator).tolist()

    x = torch.randn(sum(lengths), width, generator=generator).to(dtype).requires_grad_(with_graph)
    a = (torch.randn(count, rank, width, generator=generator) * width**-0.5).to(dtype).requires_grad_(with_graph)
    b = (torch.randn(count, width, rank, generator=generator) * rank**-0.5).to(dtype).requires_grad_(with_graph)
    weight = torch.randn(width, width, generator=generator).to(dtype)
    ones = torch.ones(len(x), width, dtype=dtype)

    def run(function: Callable[[], torch.Tensor], wanted: list[torch.Tensor]) -> None:
        if with_graph:
            torch.autograd.grad(function(), wanted, ones)
        else:
            with torch.no_grad():
                function()

    runs: dict[str, Callable[[], None]] = {"frozen layer": lambda: run(lambda: F.linear(x, weight), [x])}
    for name in SITUATIONS[situation]:
        way = WAYS[name]
        runs[name] = lambda way=way: run(lambda: way(x, a, b, index, lengths), [x, a, b])  # type: ignore[misc]

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    refused = set()
    for repeat in range(repeats + 1):
        for name, function in runs.items():
            if name in refused:
                continue
            begin = time.perf_counter()
            try:
                function()
            except RuntimeError:
                refused.add(name)
                continue
            if repeat > 0:
                seconds[name].append(time.perf_counter() - begin)
    return {
        name: {
            "seconds": statistics.median(times) if times else None,
            "kept_mb": kept_megabytes(WAYS[name], x, a, b, index, lengths)
            if with_graph and name in WAYS and times
            else None,
        }
        for name, times in seconds.items()
    }


def kept_megabytes(
    way: Update, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor, lengths: list[int]
) -> float:
    """What is kept for backward beside x and the parameters."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, a, b)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = way(x, a, b, index, lengths)
    megabytes = sum(kept.values()) / 1e6
    del output
    return megabytes


# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the ways to apply K low-rank updates in one layer.")
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 2048, 4096], help="input and output features")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--hypotheses", type=int, nargs="+", default=[1, 5, 16])
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 32], help="sequences of a batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a sequence (their mean in a packed row)")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--situations", nargs="+", choices=list(SITUATIONS), default=list(SITUATIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_layer.json"))
    args = parser.parse_args()
    for name in ("repeats", "threads", "tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}.")
    torch.set_num_threads(args.threads)
    console = Console(width=120)
    console.print(
        f"torch {torch.__version__}, {args.threads} CPU threads, medians of {args.repeats}, {args.tokens} tokens a row"
    )

    cells = []
    for situation in args.situations:
        table = Table(title=f"{situation}: per cent of the frozen layer (MB kept for backward)")
        for column in ("dtype", "width", "rank", "K", "rows", *SITUATIONS[situation]):
            table.add_column(column, justify="right")
        grid = itertools.product(args.dtypes, args.widths, args.ranks, args.hypotheses, args.rows)
        for dtype, width, rank, count, rows in grid:
            if situation == "scoring" and count * rows * args.tokens * width > 2**26:
                continue  # such a batch is scored in slices
            found = measure_cell(situation, width, rank, count, rows, args.tokens, getattr(torch, dtype), args.repeats)
            cells.append(
                {
                    "situation": situation,
                    "dtype": dtype,
                    "width": width,
                    "rank": rank,
                    "hypotheses": count,
                    "rows": rows,
                }
                | {"ways": found}
            )
            table.add_row(dtype, str(width), str(rank), str(count), str(rows), *shown(found, SITUATIONS[situation]))
        console.print(table)
        console.print(summary(situation, cells))

    write_whole(
        args.output, json.dumps({"torch": torch.__version__, "threads": args.threads, "cells": cells}, indent=1)
    )
    console.print(f"Written to {args.output}.")


def summary(situation: str, cells: list[dict[str, Any]]) -> Table:
    """How the ways compare over all cells of a situation."""
    own = [cell["ways"] for cell in cells if cell["situation"] == situation]
    table = Table(title=f"{situation}, {len(own)} cells", title_justify="left")
    for column in ("way", "median % of the frozen layer", "times the best, median", "worst", "best in"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way in SITUATIONS[situation]:
        shares, times_best = [], []
        for found in own:
            if found[way]["seconds"] is not None:
                best = min(found[name]["seconds"] or float("inf") for name in SITUATIONS[situation])
                shares.append(100 * found[way]["seconds"] / found["frozen layer"]["seconds"])
                times_best.append(found[way]["seconds"] / best)
        if times_best:
            middle, worst = statistics.median(times_best), max(times_best)
            won = sum(value == 1.0 for value in times_best)
            table.add_row(
                way, f"{statistics.median(shares):.0f}", f"{middle:.2f}", f"{worst:.2f}", f"{won} of {len(shares)}"
            )
    return table


def shown(found: dict[str, dict[str, float | None]], ways: tuple[str, ...]) -> list[str]:
    base = found["frozen layer"]["seconds"] or float("nan")
    best = min(found[way]["seconds"] or float("inf") for way in ways)
    texts = []
    for way in ways:
        seconds, kept = found[way]["seconds"], found[way]["kept_mb"]
        if seconds is None:
            texts.append("refused")
            continue
        text = f"{100 * seconds / base:.0f}" + ("" if kept is None else f" ({kept:.1f})")
        texts.append(f"[bold]{text}[/bold]" if seconds == best else text)
    return texts


if __name__ == "__main__":
    main()
