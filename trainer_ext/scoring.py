"""The one place that computes scores: log-probabilities of the supervised tokens under the hypotheses of a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from trainer_ext.batches import SequenceBatch, plan_slices


# Positions whose logits exist at one time while scoring. Of 32 to 512, this was the fastest on CPU for 32,000 and 49,152
# words in float32 and bfloat16: large enough for the product, small enough to stay near the caches.
POSITIONS_OF_LOGITS = 128
# Without a budget of the user's, a scoring call has this many positions, or the rows of the training batch if they have
# more: calls of fewer leave a 135M model on two cores waiting for its weights, calls of more for memory.
POSITIONS_OF_A_CALL = 2048
# What a call costs besides its positions, in positions, on the same model.
OVERHEAD_OF_A_CALL = 200


@dataclass
class TokenScores:
    """What one call says about the N supervised tokens of B sequences, in C copies (hypotheses) of the batch.

    Attributes:
        log_probs (`torch.Tensor`): float of shape (C, N), nats.
        entropy (`torch.Tensor`): float of shape (C, N), nats, of the prediction of each token.
        is_top1 (`torch.Tensor`): bool of shape (C, N), whether the token was the most likely one.
        sequence (`torch.Tensor`): int64 of shape (N,), the sequence in [0, B - 1] of each token.
        num_tokens (`torch.Tensor`): int64 of shape (B,), the supervised tokens of each sequence.
        aux_loss (`torch.Tensor`, *optional*): Load-balancing loss of a mixture-of-experts model.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    sequence: torch.Tensor
    num_tokens: torch.Tensor
    aux_loss: torch.Tensor | None

    def per_sequence(self) -> torch.Tensor:
        """s_k of each sequence: detached float32 of shape (C, B), nats."""
        return _sum_by_sequence(self.log_probs.detach().float(), self.sequence, len(self.num_tokens))


def _sum_by_sequence(log_probs: torch.Tensor, sequence: torch.Tensor, num_sequences: int) -> torch.Tensor:
    # In float64 the order of the sum, which differs between devices and batches, does not decide between near ties.
    wide = log_probs.to(torch.float32 if log_probs.device.type == "mps" else torch.float64)
    return wide.new_zeros(len(wide), num_sequences).index_add(1, sequence, wide).float()


class SupervisedPositions:
    """Lets only the supervised positions through to the LM head, on every device.

    TRL's fused head projects all positions of a batch except on devices with Triton. With a vocabulary of 49,152 and prompts
    of half the length, the rest of them is a quarter of a scoring pass. A forward hook on the backbone hands the head the
    wanted hidden states only; outside of `selected` and `scored` it does nothing.

    Args:
        base_model (`transformers.PreTrainedModel`): The causal language model with TRL's fused head.
    """

    def __init__(self, base_model: Any) -> None:
        self.base_model = base_model
        self._batch: SequenceBatch | None = None
        self._scores: list[torch.Tensor] | None = None
        self._pooled: list[torch.Tensor] | None = None
        base_model.base_model.register_forward_hook(self._select)

    @contextmanager
    def selected(self, batch: SequenceBatch) -> Iterator[None]:
        """Inside, the backbone returns hidden states of shape (C, N, width) for C copies of a batch."""
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None

    @contextmanager
    def scored(self, batch: SequenceBatch) -> Iterator[list[torch.Tensor]]:
        """Inside, the backbone returns no positions; their log-probabilities (C, N) are put into the list that is given.

        TRL's head computes entropies and the most likely words as well. A scoring pass needs neither, and half of its head's
        time on a CPU goes into them and into temporary copies of the logits.
        """
        self._scores = []
        try:
            with self.selected(batch):
                yield self._scores
        finally:
            self._scores = None

    @contextmanager
    def pooled(self, batch: SequenceBatch) -> Iterator[list[torch.Tensor]]:
        """Inside, the backbone returns no positions; the features (B, 2, width) of B sequences are put into the list."""
        self._pooled = []
        try:
            with self.selected(batch):
                yield self._pooled
        finally:
            self._pooled = None

    # A compiled backbone would be compiled anew for each batch that it finds here.
    @torch.compiler.disable
    def _select(self, backbone: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._batch is None:
            return None
        batch, hidden = self._batch, output.last_hidden_state
        if self._pooled is not None:
            if getattr(output, "hidden_states", None) is None:
                raise ValueError(
                    f"{type(backbone).__name__} does not return its hidden states, from which clusters of sequences are made. "
                    "Pass `seeding_fraction=0`."
                )
            self._pooled.append(_pool(output.hidden_states[len(output.hidden_states) // 2], batch))
            output.hidden_states = None
            output.last_hidden_state = hidden[None, 0, :0]
            return output
        rows = len(batch.labels)
        copies = hidden.view(len(hidden) // rows, rows, *hidden.shape[1:])
        copies = copies[:, batch.row.to(hidden.device), batch.column.to(hidden.device)]
        if self._scores is not None:
            self._scores.append(self._log_probs(copies, batch.targets))
            copies = copies[:, :0]
        output.last_hidden_state = copies
        return output

    def _log_probs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log p of the targets (N,) for hidden states (C, N, width): float32 of shape (C, N)."""
        head = self.base_model.get_output_embeddings()
        weight, bias = (
            tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in (head.weight, head.bias)
        )
        scale, cap = logit_transform(self.base_model.config)
        device = weight.device
        # Once, and not by autocast for every part: it keeps no copy of a frozen weight.
        is_autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_autocast else hidden.dtype
        flat = hidden.flatten(0, 1).to(device, dtype)
        labels = targets.to(device).repeat(len(hidden))
        parts = [flat.new_zeros(0, dtype=torch.float32)]
        with maybe_gather_lm_head_ctx(weight, bias):
            weight = weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
            for start in range(0, len(flat), POSITIONS_OF_LOGITS):
                stop = start + POSITIONS_OF_LOGITS
                logits = F.linear(flat[start:stop], weight, bias).float()
                if scale != 1.0:
                    logits *= scale
                if cap is not None:
                    logits = torch.tanh(logits / cap) * cap
                parts.append(-F.cross_entropy(logits, labels[start:stop], reduction="none"))
        return torch.cat(parts).view(hidden.shape[:2])


def _pool(hidden: torch.Tensor, batch: SequenceBatch) -> torch.Tensor:
    """Means of hidden states (rows, T, width) over the supervised tokens of each sequence and over the others, the prompt.

    float32 of shape (B, 2, width); zero where there are none.
    """
    sequence = batch.sequence_of_positions.to(hidden.device)
    learned = (batch.labels != -100).to(hidden.device)
    means = []
    for place in (learned, ~learned):
        place = place & (sequence >= 0)
        ones = torch.ones_like(sequence[place], dtype=torch.float32)
        count = hidden.new_zeros(len(batch), dtype=torch.float32).index_add(0, sequence[place], ones)
        total = hidden.new_zeros(len(batch), hidden.shape[-1], dtype=torch.float32)
        total = total.index_add(0, sequence[place], hidden[place].float())
        means.append(total / count.clamp(min=1).unsqueeze(1))
    return torch.stack(means, dim=1)


def logit_transform(config: Any) -> tuple[float, float | None]:
    """What a model does to its logits: a factor, and the cap of a tanh (None for none). The rules are those of TRL's head."""
    text = config.get_text_config()
    factors = (getattr(text, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
    factor = next((value for value in factors if value is not None), None)
    divisor = getattr(text, "logits_scaling", None)
    if factor is None and divisor is not None:
        factor = divisor if text.model_type == "hyperclovax" else 1 / divisor
    return 1.0 if factor is None else factor, getattr(text, "final_logit_softcapping", None) or None


def score_tokens(
    model: nn.Module, positions: SupervisedPositions, batch: SequenceBatch, hypotheses: Any
) -> TokenScores:
    """Run a batch by TRL's fused head, without ever making the logits of the whole batch.

    Args:
        model (`nn.Module`): The (wrapped) MCLORA model with TRL's fused head.
        positions ([`SupervisedPositions`]): Of that model.
        batch ([`SequenceBatch`]): B sequences.
        hypotheses: The argument of the forward call: an int or a tensor of shape (B,) for C = 1, `"all"` for C = K.
    """
    inputs = {name: value for name, value in batch.inputs.items() if name != "labels"}
    with positions.selected(batch):
        # `shift_labels` are scored as they are; one row of N labels, which the model repeats for each hypothesis.
        outputs = model(**inputs, shift_labels=batch.targets.unsqueeze(0), hypotheses=hypotheses, fused_lm_head=True)
    return TokenScores(
        log_probs=outputs.log_probs,
        entropy=outputs.entropy,
        is_top1=outputs.is_top1,
        sequence=batch.sequence,
        num_tokens=batch.num_tokens,
        aux_loss=outputs.aux_loss,
    )


def join_copies(runs: list[TokenScores]) -> TokenScores:
    """Runs of the same sequences, with C = 1, as one with a copy for each."""
    return _join(runs, 0, runs[0].sequence, runs[0].num_tokens)


def join_rows(runs: list[TokenScores]) -> TokenScores:
    """The rows of several runs with C = 1 as those of one."""
    counts = [len(run.num_tokens) for run in runs]
    sequence = torch.cat([run.sequence + sum(counts[:place]) for place, run in enumerate(runs)])
    return _join(runs, 1, sequence, torch.cat([run.num_tokens for run in runs]))


def _join(runs: list[TokenScores], dim: int, sequence: torch.Tensor, num_tokens: torch.Tensor) -> TokenScores:
    return TokenScores(
        log_probs=torch.cat([run.log_probs for run in runs], dim),
        entropy=torch.cat([run.entropy for run in runs], dim),
        is_top1=torch.cat([run.is_top1 for run in runs], dim),
        sequence=sequence,
        num_tokens=num_tokens,
        # That of a mixture of experts is the one of a single call.
        aux_loss=runs[0].aux_loss if len(runs) == 1 else None,
    )


def plan_rows(batch: SequenceBatch, sequences: list[int], hypotheses: list[int], in_parts: bool) -> list[list[int]]:
    """Group rows that are to be trained into calls that are no larger than one of plain LoRA on the batch.

    Args:
        batch ([`SequenceBatch`]): B sequences.
        sequences, hypotheses (`list[int]`): Of each of R rows.
        in_parts (`bool`): False for one call.

    Returns:
        `list[list[int]]`: Indices in [0, R - 1] of the rows of each call. Padded rows of like length are together, packed ones
        of one hypothesis.
    """
    if not batch.is_packed:
        if not in_parts:
            return [list(range(len(sequences)))]
        return plan_slices([batch.needed_tokens[index] for index in sequences], 1, len(batch), OVERHEAD_OF_A_CALL)
    parts: list[list[int]] = [[]]
    tokens = 0
    for row in sorted(range(len(sequences)), key=lambda row: hypotheses[row]):
        tokens += batch.needed_tokens[sequences[row]] + 1
        if in_parts and parts[-1] and tokens > batch.labels.shape[1]:
            parts.append([])
            tokens = batch.needed_tokens[sequences[row]] + 1
        parts[-1].append(row)
    return parts


@dataclass(frozen=True)
class ScoringCall:
    """One forward pass of the scoring of a batch.

    Attributes:
        sequences (`list[int]`, *optional*): The sequences that take part; None for the batch as it is.
        hypotheses (`int` or `str`): One hypothesis, or `"all"`.
    """

    sequences: list[int] | None
    hypotheses: int | str


def plan_scoring(batch: SequenceBatch, num_hypotheses: int, max_rows: int | None = None) -> list[ScoringCall]:
    """The calls that score every sequence of a batch under every hypothesis.

    Args:
        batch ([`SequenceBatch`]): B sequences.
        num_hypotheses (`int`): K.
        max_rows (`int`, *optional*): The most rows of a call (a packed row is one row). By default as many as have 2,048
            positions, and at least as many as the batch.
    """
    rows, width = batch.labels.shape
    max_positions = POSITIONS_OF_A_CALL if max_rows is None else 0
    max_rows = rows if max_rows is None else max_rows
    if batch.is_packed or not batch.can_select:
        groups: list[list[int] | None] = [None]
        copies = num_hypotheses * rows
        together = copies <= max_rows or copies * width <= max_positions
    else:
        together = num_hypotheses <= max_rows or num_hypotheses * max(batch.needed_tokens) <= max_positions
        copies = num_hypotheses if together else 1
        overhead = OVERHEAD_OF_A_CALL * (1 if together else num_hypotheses)
        groups = [*plan_slices(batch.needed_tokens, copies, max_rows, overhead, max_positions)]
        if len(groups) == 1 and max(batch.needed_tokens) + 1 >= width:
            groups = [None]  # Nothing would be cut.
    hypotheses: list[int | str] = ["all"] if together else [*range(num_hypotheses)]
    return [ScoringCall(group, hypothesis) for group in groups for hypothesis in hypotheses]


@torch.no_grad()
def score_sequences(
    model: nn.Module,
    positions: SupervisedPositions,
    batch: SequenceBatch,
    num_hypotheses: int,
    calls: list[ScoringCall],
    multiple_of: int | None = None,
) -> torch.Tensor:
    """s_k of every sequence under every hypothesis, without a graph: float32 of shape (B, K), nats.

    Args:
        model, positions: As for `score_tokens`.
        batch ([`SequenceBatch`]): B sequences.
        num_hypotheses (`int`): K.
        calls (`list[ScoringCall]`): From `plan_scoring`. Every process must make as many.
        multiple_of (`int`, *optional*): Of the columns of padded rows.
    """
    scores = torch.zeros(len(batch), num_hypotheses, device=batch.labels.device)
    has_router = getattr(positions.base_model.config.get_text_config(), "output_router_logits", False)
    chosen = batch
    for number, call in enumerate(calls):
        if number == 0 or call.sequences != calls[number - 1].sequences:
            chosen = batch if call.sequences is None else batch.select(call.sequences, multiple_of)
        inputs = {name: value for name, value in chosen.inputs.items() if name != "labels"}
        if "output_router_logits" in inputs or has_router:
            inputs["output_router_logits"] = False  # The load-balancing loss of experts has no use here.
        nothing = chosen.labels.new_zeros(1, 0)
        with positions.scored(chosen) as found:
            model(**inputs, shift_labels=nothing, hypotheses=call.hypotheses, fused_lm_head=True)
        sums = _sum_by_sequence(found[0].to(scores.device), chosen.sequence, len(chosen)).T
        sequences = list(range(len(batch))) if call.sequences is None else call.sequences
        if isinstance(call.hypotheses, int):
            scores[sequences, call.hypotheses] = sums[:, 0]
        else:
            scores[sequences] = sums
    return scores


@torch.no_grad()
def pool_sequences(model: nn.Module, positions: SupervisedPositions, batch: SequenceBatch) -> torch.Tensor:
    """Features of the sequences of a batch from hidden states in the middle of the model, under hypothesis 0.

    Args:
        model, positions: As for `score_tokens`. With its adapters disabled, the features are the base model's.
        batch ([`SequenceBatch`]): B sequences.

    Returns:
        `torch.Tensor`: float32 of shape (B, 2, width): the mean over the completion, and the mean over the prompt.
    """
    inputs = {name: value for name, value in batch.inputs.items() if name != "labels"}
    inputs["output_hidden_states"] = True
    if getattr(positions.base_model.config.get_text_config(), "output_router_logits", False):
        inputs["output_router_logits"] = False
    with positions.pooled(batch) as found:
        model(**inputs, shift_labels=batch.labels.new_zeros(1, 0), hypotheses=0, fused_lm_head=True)
    return found[0]
