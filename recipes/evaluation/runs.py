"""From adapters to evidence: score and decode with each contender, keep that, then measure."""

from __future__ import annotations

import gc
import json
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback

from recipes.evaluation.contenders import Contender
from recipes.evaluation.decoders import decode, options_of, own_decoder
from recipes.evaluation.kept import kept
from recipes.evaluation.rows import prompts_and_references
from recipes.evaluation.settings import Settings
from trainer_ext import MCLConfig, MCLTrainer
from trainer_ext.metrics import ScoreWindow


# What the trainer knows; a label must not reach it.
SCORED_COLUMNS = ("prompt", "completion", "messages", "text", "chat_template_kwargs", "tools")


@dataclass(frozen=True)
class Run:
    """What one seed of a contender decodes with one decoder."""

    contender: Contender
    decoder: str
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Evidence:
    """All that was computed with models.

    Args:
        prompts: N prompts.
        references: For each its references.
        scores: For each contender (a seed each) the rows `scores` (K log-likelihoods, nats) and `tokens`, one for each sequence.
        runs: What was decoded.
    """

    prompts: list[Any]
    references: list[list[str]]
    scores: list[tuple[Contender, list[dict[str, Any]]]]
    runs: list[Run]


def collect(contenders: list[Contender], rows: Dataset, settings: Settings) -> Evidence:
    """Score all rows and decode all prompts with all contenders. Everything is kept in `settings.output_dir`, and what is there is
    not computed again.

    Raises:
        ValueError: There are no contenders, prompts or references.
    """
    if not contenders:
        raise ValueError("`contenders` is empty: there is nothing to evaluate.")
    prompts, references = prompts_and_references(rows, settings.max_prompts)
    asked = [prompt + settings.append if isinstance(prompt, str) else prompt for prompt in prompts]
    outputs = settings.num_outputs or max(one.num_hypotheses for one in contenders)
    scores, runs, seeds = [], [], {}
    for number, one in enumerate(contenders):
        seed = seeds[one.name] = seeds.get(one.name, -1) + 1
        own = replace(settings, seed=settings.seed + seed)
        loaded = _Lazily(one, settings)
        title = f"[{number + 1} of {len(contenders)}] {one.name}, seed {seed}"
        about = {"contender": one.fingerprint(), "dtype": settings.dtype, "quantised": _quantised(settings)}
        data = rows.select_columns([name for name in rows.column_names if name in SCORED_COLUMNS])
        found = kept(
            settings.output_dir / "scored",
            f"{one.name}.{seed}",
            {**about, "rows": data.to_list(), "max_length": settings.max_length, "batch_size": settings.batch_size},
            partial(_score, loaded, data, settings, f"{title}: likelihoods of {len(data)} sequences"),
        )
        scores.append((one, found))
        for decoder in [own_decoder(settings)] if one.num_hypotheses > 1 else settings.decoders:
            options = options_of(decoder, own, outputs, one.num_hypotheses)
            named = {name: getattr(value, "__name__", value) for name, value in options.items()}
            keys = {"seed": own.seed, "batch_size": settings.batch_size, "weights": one.weights}
            decoded = kept(
                settings.output_dir / "decoded",
                f"{one.name}.{seed}.{decoder}",
                {**about, **keys, "options": named, "prompts": asked},
                partial(_decode, loaded, asked, options, own, f"{title}: {decoder}"),
            )
            runs.append(Run(one, decoder, decoded))
        loaded.forget()
    return Evidence(prompts, references, scores, runs)


class _Lazily:
    """A contender's model, loaded when something has to be computed with it."""

    def __init__(self, contender: Contender, settings: Settings) -> None:
        self.contender, self.settings = contender, settings
        self._found: tuple[Any, Any] | None = None

    def __call__(self) -> tuple[Any, Any]:
        if self._found is None:
            self._found = self.contender.load(self.settings)
        return self._found

    def forget(self) -> None:
        self._found = None
        gc.collect()


def _quantised(settings: Settings) -> list[bool]:
    return [settings.load_in_4bit, settings.use_bnb_nested_quant, settings.load_in_8bit]


def _decode(
    loaded: _Lazily, prompts: list[Any], options: dict[str, Any], settings: Settings, title: str
) -> list[dict[str, Any]]:
    print(title, flush=True)
    model, tokenizer = loaded()
    return decode(model, tokenizer, prompts, options, settings)


def _score(loaded: _Lazily, rows: Dataset, settings: Settings, title: str) -> list[dict[str, Any]]:
    print(title, flush=True)
    model, tokenizer = loaded()
    window = score_rows(model, rows, settings.batch_size, settings.max_length, tokenizer)
    pairs = zip(window.scores.tolist(), window.num_tokens.tolist(), strict=True)
    return [{"scores": scores, "tokens": tokens} for scores, tokens in pairs]


def score_rows(model: Any, rows: Dataset, batch_size: int, max_length: int, tokenizer: Any = None) -> ScoreWindow:
    """Scores of all sequences under all hypotheses of a model.

    Args:
        model: With MCLORA hypotheses.
        rows: In a format of TRL.
        batch_size: Sequences scored at once, times K rows.
        max_length: Longest sequence, in tokens.
        tokenizer: By default that of the base model.
    """
    side = getattr(tokenizer, "padding_side", None)
    with tempfile.TemporaryDirectory() as scratch:
        config = MCLConfig(
            output_dir=scratch,
            per_device_eval_batch_size=batch_size,
            max_length=max_length,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=model.dtype == torch.bfloat16,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = MCLTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        window = trainer.score(rows)
    if tokenizer is not None:
        tokenizer.padding_side = side
    model.eval()
    return window


def known_modes(rows: Dataset, settings: Settings) -> list[str] | None:
    """The mode of each row, as text; None without such a column."""
    if settings.mode_column is None:
        return None
    return [value if isinstance(value, str) else json.dumps(value) for value in rows[settings.mode_column]]
