"""All figures, from what was computed with models, with confidence intervals over inputs and, where there are several, seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset

from peft_mcl import consensus_order
from recipes.evaluation.contenders import Contender
from recipes.evaluation.picture import draw
from recipes.evaluation.rows import prompts_and_references, text_of
from recipes.evaluation.runs import Evidence, Run, collect, known_modes
from recipes.evaluation.settings import Settings
from recipes.evaluation.tables import markdown
from recipes.files import write_whole
from trainer_ext.evaluation import (
    agreement,
    assignment_entropy,
    best_mean_worst,
    bootstrap,
    bootstrap_difference,
    characteristic_words,
    corpus_diversity,
    corpus_quality,
    coverage,
    diversity,
    leave_one_out_bleu,
    quality,
    samples_won,
    semantic_diversity,
)


def evaluate(contenders: list[Contender], rows: Dataset, settings: Settings) -> dict[str, Any]:
    """Score, decode and measure; writes `evaluation.json`, `.md` and `.png` into `settings.output_dir`.

    Args:
        contenders: From `contender` or `parse_contenders`. Those of one name are seeds of one.
        rows: Held-out rows with `prompt` and `completion`; rows that share a prompt are its references.
        settings: See [`Settings`].

    Returns:
        `dict`: What `evaluation.json` holds. A figure with its interval is `[estimate, low, high]`.

    Raises:
        ValueError: As for `collect`.
    """
    embed = None if settings.embedding_model is None else embedder(settings.embedding_model)
    evidence = collect(contenders, rows, settings)
    results = measure(evidence, rows, settings, embed)
    folder = settings.output_dir
    write_whole(folder / "evaluation.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_whole(folder / "evaluation.md", markdown(results))
    draw(results, folder / "evaluation.png")
    return results


def embedder(name: str) -> Callable[[list[str]], np.ndarray]:
    """Sentence embeddings: N texts to float32 (N, width).

    Raises:
        ImportError: sentence-transformers is missing.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "`embedding_model` needs the package sentence-transformers: pip install sentence-transformers."
        ) from error
    model = SentenceTransformer(name, trust_remote_code=False)
    return lambda texts: np.asarray(model.encode(texts, show_progress_bar=False))


def measure(
    evidence: Evidence, rows: Dataset, settings: Settings, embed: Callable[[list[str]], np.ndarray] | None = None
) -> dict[str, Any]:
    """All figures of the evidence; see `evaluate`."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in evidence.runs:
        groups.setdefault((run.contender.name, run.decoder), []).append(run)
    first = settings.metrics[0]
    of_run = {key: [_scores(run, evidence, settings) for run in runs] for key, runs in groups.items()}
    # Consensus compares all outputs in pairs: once for each run.
    chosen = {key: _chosen([scores[first] for scores in of_run[key]], runs) for key, runs in groups.items()}
    by_mode = _references_by_mode(rows, evidence, settings)
    found = [
        {
            "contender": name,
            "decoder": decoder,
            "seeds": len(runs),
            "outputs": len(runs[0].rows[0]["outputs"]),
            "beams": settings.num_beams * len(runs[0].rows[0]["outputs"]) if "beam" in decoder else None,
            "quality": _quality(of_run[name, decoder], runs, evidence, settings),
            "diversity": _diversity(runs, evidence, settings, embed),
            "top1": _top1([scores[first] for scores in of_run[name, decoder]], chosen[name, decoder], settings),
            "corpus": [_corpus(run, evidence) for run in runs],
            "best_of_mode": _best_of_mode(runs, by_mode, settings),
        }
        for (name, decoder), runs in groups.items()
    ]
    # What a user of one model gets: the output that any choice among K has to beat.
    greedy = {
        name: np.stack([scores[first][:, 0] for scores in of_run[name, decoder]])
        for (name, decoder), runs in groups.items()
        if decoder == "greedy" and runs[0].contender.num_hypotheses == 1
    }
    for entry in found:
        tops = chosen[entry["contender"], entry["decoder"]]
        entry["top1_minus_greedy"] = {
            name: {
                ranking: list(bootstrap_difference(values, alone, resamples=settings.resamples, seed=settings.seed))
                for ranking, values in tops.items()
            }
            for name, alone in greedy.items()
            if tops
        }
    by_name: dict[str, list[tuple[Contender, list[dict[str, Any]]]]] = {}
    for one, scored in evidence.scores:
        by_name.setdefault(one.name, []).append((one, scored))
    texts = [text_of(completion) for completion in rows["completion"]]
    return {
        "prompts": len(evidence.prompts),
        "references": sum(map(len, evidence.references)),
        "sequences": len(texts),
        "settings": {name: str(v) if name == "output_dir" else v for name, v in vars(settings).items()},
        "ranked_metric": first,
        # What people reach, each reference against the others of its prompt.
        "leave_one_out_bleu_of_references": _interval(leave_one_out_bleu(evidence.references), settings),
        "likelihood": {name: _likelihood(group, settings) for name, group in by_name.items()},
        "runs": found,
        "specialisation": {
            name: [_specialisation(scored, texts, known_modes(rows, settings), settings) for _, scored in group]
            for name, group in by_name.items()
            if group[0][0].num_hypotheses > 1
        },
    }


def _interval(values: Any, settings: Settings) -> list[float] | None:
    """A mean over inputs and seeds with its interval. Inputs that a figure says nothing about are left out."""
    table = np.asarray(values, dtype=np.float64)
    table = table[..., ~np.isnan(table.reshape(-1, table.shape[-1])).any(axis=0)]
    return list(bootstrap(table, resamples=settings.resamples, seed=settings.seed)) if table.size else None


def _scores(run: Run, evidence: Evidence, settings: Settings) -> dict[str, np.ndarray]:
    return quality([row["outputs"] for row in run.rows], evidence.references, settings.metrics)


def _quality(
    of_seed: list[dict[str, np.ndarray]], runs: list[Run], evidence: Evidence, settings: Settings
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for metric in settings.metrics:
        parts = [best_mean_worst(scores[metric]) for scores in of_seed]
        found[metric] = {name: _interval([part[name] for part in parts], settings) for name in parts[0]}
    texts = [[row["outputs"] for row in run.rows] for run in runs]
    covered = [coverage(outputs, evidence.references) for outputs in texts]
    left_out = [leave_one_out_bleu(evidence.references, outputs) for outputs in texts]
    return {
        **found,
        "coverage": _interval(covered, settings),
        "leave_one_out_bleu": _interval(left_out, settings),
    }


def _corpus(run: Run, evidence: Evidence) -> dict[str, Any]:
    """The figures of the whole set that papers report, which are no means over inputs."""
    outputs = [row["outputs"] for row in run.rows]
    diverse = corpus_diversity(outputs)
    # JSON has no NaN.
    return {
        **corpus_quality(outputs, evidence.references),
        **{name: None if math.isnan(value) else value for name, value in diverse.items()},
    }


def _references_by_mode(rows: Dataset, evidence: Evidence, settings: Settings) -> dict[str, dict[int, list[str]]]:
    """For each known mode, the references of that mode alone by the places of the prompts that have any."""
    modes = known_modes(rows, settings) or []
    places = {json.dumps(prompt): place for place, prompt in enumerate(evidence.prompts)}
    found: dict[str, dict[int, list[str]]] = {}
    for mode in sorted(set(modes)):
        own = rows.select([row for row, label in enumerate(modes) if label == mode])
        prompts, references = prompts_and_references(own)
        keys = map(json.dumps, prompts)
        told = {places[key]: texts for key, texts in zip(keys, references, strict=True) if key in places}
        if told:
            found[mode] = told
    return found


def _best_of_mode(
    runs: list[Run], by_mode: dict[str, dict[int, list[str]]], settings: Settings
) -> dict[str, list[float] | None]:
    """The best of the K outputs against the references of one mode alone, for each known mode: does one lose?"""
    metric = settings.metrics[0]
    found = {}
    for mode, wanted in by_mode.items():
        parts = [
            quality([run.rows[place]["outputs"] for place in wanted], list(wanted.values()), [metric])[metric].max(
                axis=1
            )
            for run in runs
        ]
        found[mode] = _interval(parts, settings)
    return found


def _diversity(
    runs: list[Run], evidence: Evidence, settings: Settings, embed: Callable[[list[str]], np.ndarray] | None
) -> dict[str, Any]:
    outputs = [[row["outputs"] for row in run.rows] for run in runs]
    if len(outputs[0][0]) == 1:
        return {}
    parts = [diversity(texts, evidence.references) for texts in outputs]
    if embed is not None:
        for part, texts in zip(parts, outputs, strict=True):
            part["semantic"] = semantic_diversity(texts, embed)
    return {name: _interval([part[name] for part in parts], settings) for name in parts[0]}


def _chosen(of_seed: list[np.ndarray], runs: list[Run]) -> dict[str, np.ndarray]:
    """For each way to choose one of K outputs, the quality of the chosen ones: shape (S, N)."""
    if of_seed[0].shape[1] == 1:
        return {}
    orders: dict[str, list[list[int]]] = {}
    for run in runs:
        # Samples and beams of one model all weigh the same.
        weights = run.contender.weights if run.contender.num_hypotheses > 1 else None
        orders.setdefault("consensus", []).append([consensus_order(row["outputs"], weights)[0][0] for row in run.rows])
        for ranking in run.rows[0].get("orders", {}):
            orders.setdefault(ranking, []).append([row["orders"][ranking][0] for row in run.rows])
    return {
        name: np.stack([scores[np.arange(len(scores)), tops] for scores, tops in zip(of_seed, seeds, strict=True)])
        for name, seeds in orders.items()
    }


def _top1(of_seed: list[np.ndarray], chosen: dict[str, np.ndarray], settings: Settings) -> dict[str, Any]:
    """How good the chosen output is, between a random one (the mean of K) and the oracle's choice (the best of K)."""
    if not chosen:
        return {}
    whole = {
        "oracle": [scores.max(axis=1) for scores in of_seed],
        "random": [scores.mean(axis=1) for scores in of_seed],
    }
    return {name: _interval(values, settings) for name, values in {**chosen, **whole}.items()}


def _likelihood(group: list[tuple[Contender, list[dict[str, Any]]]], settings: Settings) -> dict[str, Any]:
    """Teacher-forced nats per token: best, mean, worst and mixture of the hypotheses."""
    tokens = np.array([row["tokens"] for row in group[0][1]], dtype=np.float64)
    parts: dict[str, list[np.ndarray]] = {}
    for one, scored in group:
        scores = np.array([row["scores"] for row in scored], dtype=np.float64)
        weighted = scores + np.log(np.maximum(one.weights, 1e-300))
        top = weighted.max(axis=1, keepdims=True)
        losses = {
            "best": -scores.max(axis=1),
            "mean": -scores.mean(axis=1),
            "worst": -scores.min(axis=1),
            "mixture": -(top[:, 0] + np.log(np.exp(weighted - top).sum(axis=1))),
        }
        for name, loss in losses.items():
            # A ratio of sums, made a mean of values by its first-order expansion, so that it can be resampled.
            ratio = loss.sum() / tokens.sum()
            parts.setdefault(name, []).append(ratio + (loss - ratio * tokens) / tokens.mean())
    count = group[0][0].num_hypotheses
    return {
        "hypotheses": count,
        "seeds": len(group),
        "weights": [list(one.weights) for one, _ in group],
        **{name: _interval(values, settings) for name, values in parts.items()},
        # What a split of the data among K copies could take off the best of K for nothing.
        "log_k": math.log(count) / tokens.mean(),
    }


def _specialisation(
    scored: list[dict[str, Any]], texts: list[str], modes: list[str] | None, settings: Settings
) -> dict[str, Any]:
    """What the hypotheses of one seed have become."""
    scores = np.array([row["scores"] for row in scored], dtype=np.float64)
    winners = scores.argmax(axis=1)
    count = scores.shape[1]
    shares = np.bincount(winners, minlength=count) / len(winners)
    found: dict[str, Any] = {
        "win_shares": shares.tolist(),
        "assignment_entropy": assignment_entropy(shares.tolist()),
        "words": characteristic_words(texts, winners, count),
        "samples": [
            [sample.text for sample in samples]
            for samples in samples_won(texts, winners, scores, count=3, seed=settings.seed)
        ],
    }
    if modes is not None:
        found["agreement"] = agreement(modes, winners, count)
        # Rows are resampled by their numbers, so that a mode stays with its winner.
        for name in ("purity", "nmi"):

            def statistic(places: np.ndarray, name: str = name) -> float:
                chosen = places.astype(int)
                return agreement([modes[place] for place in chosen], winners[chosen], count)[name]

            found[name] = list(
                bootstrap(
                    np.arange(len(winners)), statistic, resamples=min(settings.resamples, 500), seed=settings.seed
                )
            )
    return found
