"""The one place that computes scores: log-probabilities of the supervised tokens under the hypotheses of a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


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
        log_probs = self.log_probs.detach().float()
        scores = log_probs.new_zeros(len(log_probs), len(self.num_tokens))
        return scores.index_add(1, self.sequence, log_probs)


class SupervisedPositions:
    """Lets only the supervised positions through to the LM head, on every device.

    TRL's fused head projects all positions of a batch except on devices with Triton. With a vocabulary of 49,152 and prompts
    of half the length, the rest of them is a quarter of a scoring pass. A forward hook on the backbone hands the head the
    wanted hidden states only; outside of `selected` it does nothing.

    Args:
        base_model (`transformers.PreTrainedModel`): The causal language model with TRL's fused head.
    """

    def __init__(self, base_model: Any) -> None:
        self._where: tuple[torch.Tensor, torch.Tensor, int] | None = None
        base_model.base_model.register_forward_hook(self._select)

    @contextmanager
    def selected(self, sequence: torch.Tensor, column: torch.Tensor, batch_size: int) -> Iterator[None]:
        """Inside, the backbone returns hidden states of shape (C, N, width) for C copies of a batch."""
        self._where = (sequence, column, batch_size)
        try:
            yield
        finally:
            self._where = None

    def _select(self, backbone: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._where is None:
            return None
        sequence, column, batch_size = self._where
        hidden = output.last_hidden_state
        copies = hidden.view(len(hidden) // batch_size, batch_size, *hidden.shape[1:])
        output.last_hidden_state = copies[:, sequence.to(hidden.device), column.to(hidden.device)]
        return output


def score_tokens(
    model: nn.Module, positions: SupervisedPositions, inputs: dict[str, Any], hypotheses: Any
) -> TokenScores:
    """Run a batch and score its supervised tokens, without ever making the logits of the whole batch.

    Args:
        model (`nn.Module`): The (wrapped) MCLORA model with TRL's fused head.
        positions ([`SupervisedPositions`]): Of that model.
        inputs (`dict`): Model inputs with `labels` of shape (B, T), -100 where not supervised.
        hypotheses: The argument of the forward call: an int or a tensor of shape (B,) for C = 1, `"all"` for C = K.
    """
    inputs = dict(inputs)
    # Position t predicts token t + 1.
    labels = inputs.pop("labels")[:, 1:]
    is_supervised = labels != -100
    sequence, column = is_supervised.nonzero(as_tuple=True)
    with positions.selected(sequence, column, len(labels)):
        # `shift_labels` are scored as they are; one row of N labels, which the model repeats for each hypothesis.
        outputs = model(
            **inputs, shift_labels=labels[is_supervised].unsqueeze(0), hypotheses=hypotheses, fused_lm_head=True
        )
    return TokenScores(
        log_probs=outputs.log_probs,
        entropy=outputs.entropy,
        is_top1=outputs.is_top1,
        sequence=sequence,
        num_tokens=is_supervised.sum(dim=1),
        aux_loss=outputs.aux_loss,
    )
