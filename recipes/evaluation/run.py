"""Decode, measure, write: everything that is known of the contenders on one set of questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console

from recipes.evaluation.contenders import Contender, ScoreSettings, window
from recipes.evaluation.decoders import DecodeSettings
from recipes.evaluation.outputs import Outputs, Questions, decode
from recipes.evaluation.plots import draw
from recipes.evaluation.results import (
    MAIN_METRIC,
    Values,
    compare,
    describe_hypotheses,
    measure_likelihood,
    measure_outputs,
    measure_rankings,
    summarise,
    whole_set,
)
from recipes.evaluation.tables import markdown, show


COMPARED = (f"{MAIN_METRIC}/best", f"{MAIN_METRIC}/mean", "coverage", "div_2")
JSON_NAME, MARKDOWN_NAME, PLOT_NAME = "evaluation.json", "evaluation.md", "evaluation.png"


def evaluate(
    contenders: Sequence[Contender],
    decoders: Sequence[str],
    questions: Questions,
    rows: Dataset,
    decoding: DecodeSettings,
    scoring: ScoreSettings,
    output_dir: Path,
    *,
    mode_column: str | None = None,
    embed: Callable[[list[str]], np.ndarray] | None = None,
    title: str = "",
) -> dict[str, Any]:
    """Decode the questions with every contender, score the rows, and write `evaluation.json`, `.md` and `.png`.

    Contenders of one name are seeds of one method: their figures are averaged, and intervals are over seeds as well. Several
    hypotheses decode greedily, or with `num_beams` each; a single model with every decoder, at as many outputs and beams in all.

    Args:
        contenders: What is compared. The first is compared with each other in pairs.
        decoders: Names in `DECODERS`, for single models.
        questions ([`Questions`]): Prompts with all their references.
        rows (`Dataset`): Prompts and completions, with the column of modes, whose likelihood is measured.
        decoding ([`DecodeSettings`]), scoring ([`ScoreSettings`]): How.
        output_dir (`Path`): For the three files and, in `outputs`, what was decoded, which is not decoded again.
        mode_column (`str`, *optional*): The column of known modes in `rows`.
        embed: See `measure_outputs`.
        title (`str`): Of the plot.
    """
    plain = rows if mode_column is None else rows.remove_columns(mode_column)
    modes = None if mode_column is None else list(rows[mode_column])
    cache = output_dir / "outputs"
    measured: dict[tuple[str, str], list[Values]] = {}
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    likelihoods: dict[str, list[dict[str, float]]] = {}
    hypotheses: dict[str, Any] = {}
    for contender in contenders:
        window_of_rows = window(contender, plain, scoring)
        likelihoods.setdefault(contender.name, []).append(measure_likelihood(window_of_rows, contender.weights))
        # One model, told from several and from hypotheses by what it scores, not by its name.
        is_single = window_of_rows.scores.shape[1] == 1
        if not is_single and contender.name not in hypotheses:
            hypotheses[contender.name] = describe_hypotheses(window_of_rows, list(rows["completion"]), modes)
        for decoder in decoders if is_single else (("greedy",) if decoding.num_beams == 1 else ("beam",)):
            outputs = decode(contender, decoder, questions, decoding, cache)
            values = measure_outputs(outputs, questions, embed)
            if not is_single:
                scored = window(contender, as_rows(outputs, questions), scoring)
                values.update(measure_rankings(outputs, questions, scored, contender.weights))
            key = (contender.name, decoder)
            measured.setdefault(key, []).append(values)
            entry = entries.setdefault(
                key,
                {
                    "contender": contender.name,
                    "decoder": decoder,
                    "beams": outputs.beams,
                    "generated_by": outputs.generated_by,
                    "seconds": [],
                    "corpus": [],
                },
            )
            entry["seconds"].append(outputs.seconds)
            entry["corpus"].append(whole_set(outputs, questions))
    main = next(key for key in entries if key[0] == contenders[0].name)
    for key, entry in entries.items():
        entry["figures"] = summarise(measured[key])
        if key != main:
            entry["first_contender_minus_this"] = compare(measured[main], measured[key], COMPARED)
    results = {
        "questions": len(questions.prompts),
        "references": sum(map(len, questions.references)),
        "sequences": len(rows),
        "decoding": asdict(decoding),
        "likelihood": {
            name: {key: float(np.mean([seed[key] for seed in seeds])) for key in seeds[0]}
            for name, seeds in likelihoods.items()
        },
        "likelihood_of_seeds": likelihoods,
        "outputs": list(entries.values()),
        "hypotheses": hypotheses,
    }
    write(results, output_dir, title)
    show(results, Console(markup=False))
    return results


def as_rows(outputs: Outputs, questions: Questions) -> Dataset:
    """The outputs as completions of their prompts, input by input: what the rankings score."""
    texts = [text for row in outputs.texts for text in row]
    prompts = [prompt for prompt, row in zip(questions.prompts, outputs.texts, strict=True) for _ in row]
    if prompts and not isinstance(prompts[0], str):
        return Dataset.from_dict(
            {"prompt": prompts, "completion": [[{"role": "assistant", "content": text}] for text in texts]}
        )
    return Dataset.from_dict({"prompt": prompts, "completion": texts})


def write(results: dict[str, Any], output_dir: Path, title: str) -> None:
    """The three files, each whole or not at all."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, text in ((JSON_NAME, json.dumps(results, indent=1) + "\n"), (MARKDOWN_NAME, markdown(results))):
        partial = output_dir / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(output_dir / name)
    draw(results, output_dir / PLOT_NAME, title)
