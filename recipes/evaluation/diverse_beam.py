"""Diverse beam search, which transformers 5 no longer contains: groups of beams that shun each other's tokens.

Vijayakumar et al., "Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models" (arXiv 1610.02424), with their
Hamming diversity. At each step the groups choose one after the other; a token costs a group `diversity_penalty` nats for every
beam of an earlier group that goes on with it at the same step. Inside a group it is beam search, with the rules of transformers
for sequences that end: one group decodes what `generate(num_beams=...)` does, token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


# Of beams that do not exist (yet). Finite, so that the score of one plus a log-probability still orders tokens.
NO_BEAM = -1e9


def diverse_beam_search(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    groups: int = 1,
    diversity_penalty: float = 0.0,
    **model_kwargs: Any,
) -> torch.Tensor:
    """Decode by diverse beam search; for `model.generate(custom_generate=diverse_beam_search, groups=G, ...)`.

    The penalties of earlier steps stay in the score of a beam, as in transformers before version 5.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs: What `generate` hands over;
            `input_ids` is int64 of shape (B * num_beams, T), each prompt `num_beams` times. Of `generation_config`: `num_beams`,
            `num_return_sequences`, `length_penalty`, `early_stopping`.
        groups (`int`): G, a divisor of `num_beams`.
        diversity_penalty (`float`): Nats, at least 0.

    Returns:
        `torch.Tensor`: int64 of shape (B * num_return_sequences, L). For each prompt the best sequence of each group, in the
        order of the groups, then the second best of each, and so on.

    Raises:
        ValueError: The groups do not divide the beams, the penalty is negative, sampling was asked for, or the model's cache
            cannot be reordered.
    """
    beams, returned = generation_config.num_beams, generation_config.num_return_sequences
    if not 1 <= groups <= beams or beams % groups:
        raise ValueError(f"`groups={groups}` does not divide `num_beams={beams}`: give a multiple of the groups.")
    if diversity_penalty < 0:
        raise ValueError(f"`diversity_penalty={diversity_penalty}` must be at least 0 nats.")
    if generation_config.do_sample:
        raise ValueError("Diverse beam search does not sample. Pass `do_sample=False`.")
    size, batch = beams // groups, len(input_ids) // beams
    searches = [_Group(rows, generation_config) for rows in input_ids.view(batch, groups, size, -1).unbind(dim=1)]
    offsets = torch.arange(batch * groups, device=input_ids.device).view(batch, groups, 1) * size
    rows, is_first = input_ids, True
    while not all(search.is_over for search in searches):
        only_new = model_kwargs.get("use_cache", True) and not is_first
        inputs = model.prepare_inputs_for_generation(
            rows, next_sequence_length=1 if only_new else None, is_first_iteration=is_first, **model_kwargs
        )
        outputs = model(**inputs, return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        log_probs = F.log_softmax(outputs.logits[:, -1, :].float(), dim=-1)
        log_probs = logits_processor(rows, log_probs).view(batch, groups, size, -1)
        used = log_probs.new_zeros(batch, log_probs.shape[-1])
        parents = []
        for place, search in enumerate(searches):
            penalised = log_probs[:, place] - diversity_penalty * used.unsqueeze(1)
            parents.append(search.step(penalised, stopping_criteria))
            # A group that is done no longer stands in the way of others.
            used.scatter_add_(1, search.running[:, :, -1], search.is_open.expand(-1, size).to(used.dtype))
        rows = torch.stack([search.running for search in searches], dim=1).flatten(0, 2)
        _reorder_cache(model, model_kwargs, (torch.stack(parents, dim=1) + offsets).flatten())
        is_first = False
    best = [searches[place % groups].finished[:, place // groups] for place in range(returned)]
    lengths = [searches[place % groups].lengths[:, place // groups] for place in range(returned)]
    return torch.stack(best, dim=1).flatten(0, 1)[:, : int(torch.stack(lengths).max())]


@dataclass
class _Group:
    """Beam search for B prompts with `size` beams each; all sequences have the length that has been reached."""

    running: torch.Tensor  # int64, (B, size, L)
    config: Any

    def __post_init__(self) -> None:
        batch, self.size, self.prompt_length = self.running.shape
        self.scores = torch.full((batch, self.size), NO_BEAM, device=self.running.device)
        # All beams are alike at first: only one of them counts.
        self.scores[:, 0] = 0
        self.finished = self.running
        self.finished_scores = torch.full_like(self.scores, NO_BEAM)
        self.is_finished = torch.zeros_like(self.scores, dtype=torch.bool)
        self.lengths = torch.full_like(self.scores, self.prompt_length, dtype=torch.long)
        # Whether a running beam can still become better than one that has ended, (B, 1).
        self.is_open = torch.ones_like(self.is_finished[:, :1])
        self.is_over = False
        ends = self.config._eos_token_tensor
        self.kept = max(2, 1 + (0 if ends is None else len(ends))) * self.size
        pad = self.config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)

    def step(self, log_probs: torch.Tensor, stopping_criteria: Any) -> torch.Tensor:
        """Append a token to each beam by log-probabilities (B, size, V); returns int64 (B, size), the beam each comes from."""
        vocabulary = log_probs.shape[-1]
        scores, places = (self.scores.unsqueeze(-1) + log_probs).flatten(1).topk(self.kept)
        parents, tokens = places // vocabulary, places % vocabulary
        candidates = torch.cat([_gather(self.running, parents), tokens.unsqueeze(-1)], dim=-1)
        ends = stopping_criteria(candidates.flatten(0, 1), None).view_as(tokens)
        self._finish(candidates, scores, ends)
        scores, chosen = (scores + NO_BEAM * ends).topk(self.size)
        self.scores, self.running = scores, _gather(candidates, chosen)
        self._look_ahead()
        full = bool(self.is_finished.all()) and self.config.early_stopping is True
        self.is_over = self.is_over or full or bool(ends.all()) or not bool(self.is_open.any())
        self.is_open = self.is_open & (not self.is_over)
        return parents.gather(1, chosen)

    def _finish(self, candidates: torch.Tensor, scores: torch.Tensor, ends: torch.Tensor) -> None:
        """Keep the best of the sequences that have ended: those of before and those of the first `size` candidates."""
        length = candidates.shape[-1]
        may_end = ends & self.is_open & (torch.arange(self.kept, device=ends.device) < self.size)
        if self.config.early_stopping is True:
            may_end &= ~self.is_finished.all(dim=1, keepdim=True)
        ended = (scores / (length - self.prompt_length) ** self.config.length_penalty).where(may_end, NO_BEAM)
        self.finished_scores, best = torch.cat([self.finished_scores, ended], dim=1).topk(self.size)
        self.is_finished = torch.cat([self.is_finished, may_end], dim=1).gather(1, best)
        self.lengths = torch.cat([self.lengths, torch.full_like(ended, length, dtype=torch.long)], dim=1).gather(
            1, best
        )
        padded = F.pad(self.finished, (0, 1), value=self.pad)
        self.finished = _gather(torch.cat([padded, candidates], dim=1), best)

    def _look_ahead(self) -> None:
        length = self.running.shape[-1] - self.prompt_length
        if self.config.early_stopping == "never" and self.config.length_penalty > 0:
            length = self.config.max_length - self.prompt_length
        possible = self.scores[:, :1] / length**self.config.length_penalty
        worst = self.finished_scores.min(dim=1, keepdim=True).values
        self.is_open = self.is_open & (~self.is_finished.all(dim=1, keepdim=True) | (possible > worst))


def _gather(sequences: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(B, n, L) by (B, m) -> (B, m, L)."""
    return sequences.gather(1, places.unsqueeze(-1).expand(-1, -1, sequences.shape[-1]))


def _reorder_cache(model: Any, model_kwargs: dict[str, Any], rows: torch.Tensor) -> None:
    cache = model_kwargs.get("past_key_values")
    if cache is None:
        if model_kwargs.get("use_cache", True):
            raise ValueError(f"The cache of {type(model).__name__} cannot be reordered. Pass `use_cache=False`.")
    elif hasattr(model, "_reorder_cache"):
        model_kwargs["past_key_values"] = model._reorder_cache(cache, rows)
    else:
        cache.reorder_cache(rows)
