"""How one model gives K outputs for a prompt: options of `generate` for each decoder, at equal numbers of sequences and beams.

Sources: diverse beam search, Vijayakumar et al. 2016 (see `diverse_beam.py`); top-k sampling, Fan et al. 2018 (arXiv 1805.04833);
nucleus sampling, Holtzman et al. 2019 (arXiv 1904.09751); typical sampling, Meister et al. 2022 (arXiv 2202.00666).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track

from peft_mcl import rank_sequences
from recipes.evaluation.diverse_beam import diverse_beam_search
from recipes.generate import answers_of, texts_of


if TYPE_CHECKING:
    from recipes.evaluation.settings import Settings

RANKINGS = ("likelihood", "mixture")


def _sample(settings: Settings, outputs: int, *own: str) -> dict[str, Any]:
    # Named in full: the model's own defaults would fill in what is missing.
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0}
    options |= {name: getattr(settings, name) for name in own}
    return {**options, "num_beams": 1, "num_return_sequences": outputs}


def _beam(settings: Settings, outputs: int) -> dict[str, Any]:
    return {"do_sample": False, "num_beams": settings.num_beams * outputs, "num_return_sequences": outputs}


def _diverse_beam(settings: Settings, outputs: int) -> dict[str, Any]:
    groups = {"groups": outputs, "diversity_penalty": settings.diversity_penalty}
    return {**_beam(settings, outputs), **groups, "custom_generate": diverse_beam_search}


DECODERS: dict[str, Callable[[Settings, int], dict[str, Any]]] = {
    # One output: what a user of one model gets.
    "greedy": lambda settings, outputs: {"do_sample": False, "num_beams": 1},
    "beam": _beam,
    "diverse_beam": _diverse_beam,
    "top_k": lambda settings, outputs: _sample(settings, outputs, "top_k"),
    "nucleus": lambda settings, outputs: _sample(settings, outputs, "top_p"),
    "typical": lambda settings, outputs: _sample(settings, outputs, "typical_p"),
    "temperature": lambda settings, outputs: _sample(settings, outputs, "temperature"),
}


def own_decoder(settings: Settings) -> str:
    """How contenders with several hypotheses decode: each hypothesis the best sequence that it finds with its beams."""
    return "greedy" if settings.num_beams == 1 else "beam"


def options_of(decoder: str, settings: Settings, outputs: int, hypotheses: int) -> dict[str, Any]:
    """The arguments of `generate` for a decoder and a contender with `hypotheses` hypotheses."""
    # Several hypotheses give an output each, so each is decoded as one model that gives one.
    options = DECODERS[decoder](settings, outputs if hypotheses == 1 else 1)
    return {
        **options,
        "max_new_tokens": settings.max_new_tokens,
        "repetition_penalty": settings.repetition_penalty,
    }


@torch.no_grad()
def decode(
    model: Any, tokenizer: Any, prompts: list[Any], options: dict[str, Any], settings: Settings
) -> list[dict[str, Any]]:
    """Decode all prompts.

    Returns:
        `list[dict]`: For each prompt `prompt`, `outputs` (texts) and, with several hypotheses, `orders`: for each ranking of
        `RANKINGS` the places of the outputs, best first.
    """
    torch.manual_seed(settings.seed)
    rows: list[dict[str, Any]] = []
    starts = range(0, len(prompts), settings.batch_size)
    for start in track(starts, description="Decoding"):
        batch = prompts[start : start + settings.batch_size]
        inputs = tokenizer(texts_of(tokenizer, batch), return_tensors="pt", padding=True).to(model.device)
        arguments = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "pad_token_id": tokenizer.pad_token_id,
            **options,
        }
        sequences = model.generate(**arguments)
        answers = answers_of(tokenizer, sequences, inputs["input_ids"].shape[1], len(batch))
        orders: dict[str, list[list[int]]] = {}
        if model.num_hypotheses > 1:
            for ranking in RANKINGS:
                orders[ranking] = rank_sequences(model, sequences, method=ranking, **arguments).order.tolist()
        for place, (prompt, texts) in enumerate(zip(batch, answers, strict=True)):
            row = {"prompt": prompt, "outputs": texts}
            rows.append({**row, "orders": {name: found[place] for name, found in orders.items()}} if orders else row)
    return rows
