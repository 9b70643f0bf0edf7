"""The arithmetic of the adapted layers: low-rank updates of rows that belong to different hypotheses.

Two ways are left of those that `recipes/benchmark_layer.py` times. Rows of one length, whether they are one block for each
hypothesis or have one hypothesis each, are batched products. A packed row, whose sequences have all lengths, is a loop over
its runs of one hypothesis. Neither keeps more for backward than plain LoRA does: the input and the r columns in the middle.

All functions take `x`, A (K, r, in) and B (K, out, r) of one dtype, and scale the r columns in the middle rather than the
output; with the usual powers of two it is the same bit by bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch


# (hypothesis, start, stop): tokens start .. stop - 1 belong to the hypothesis.
Run = tuple[int, int, int]


def block_update(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Group k of `x` (K, tokens, in) under hypothesis k: (K, tokens, out)."""
    return torch.bmm(_middle(x, a, scaling), b.transpose(1, 2))


def decoded_update(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, decoded: tuple[int, ...], num_inputs: int, scaling: float
) -> torch.Tensor:
    """Input-major groups of `x` (inputs * hypotheses, tokens, in) under the hypotheses `decoded`: (groups, tokens, out).

    In a step of decoding the rows are few: moving them into blocks costs less than a copy of A and B for each.
    """
    if decoded != tuple(range(len(a))):
        a, b = a[list(decoded)], b[list(decoded)]
    if num_inputs == 1:
        return block_update(x, a, b, scaling)
    tokens = x.shape[1]
    blocks = x.view(num_inputs, len(decoded), tokens, -1).transpose(0, 1).reshape(len(decoded), num_inputs * tokens, -1)
    update = block_update(blocks, a, b, scaling).view(len(decoded), num_inputs, tokens, -1)
    return update.transpose(0, 1).reshape(*x.shape[:2], -1)


def mean_as_one(stacked: torch.Tensor) -> torch.Tensor:
    """The mean (rows, columns) of the factors `stacked` (K, rows, columns), with which all hypotheses train as one.

    Each hypothesis gets the gradient of the mean, g, as g / sqrt(K), and not the g / K of calculus. All get the same one, so
    under AdamW, which does not mind its scale, they move alike, as far as one LoRA adapter would. Their optimizer states are
    alike as well: when they split, nothing has to be copied, whoever holds which part of it (DDP, ZeRO, FSDP2). And the norm
    of the K gradients together, which is clipped and logged, is that of g.
    """
    return _MeanAsOne.apply(stacked)


def _middle(x: torch.Tensor, a: torch.Tensor, scaling: float) -> torch.Tensor:
    """The scaled r columns of groups (G, tokens, in) under A (G, r, in)."""
    return torch.bmm(x, a.transpose(1, 2)) * scaling


def gathered_update(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Group g of `x` (G, tokens, in) under hypothesis `index[g]`: (G, tokens, out)."""
    return _GatheredUpdate.apply(x, a, b, index, scaling)


def segmented_update(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, runs: tuple[Run, ...], scaling: float
) -> torch.Tensor:
    """Each run of the tokens of `x` (tokens, in) under its hypothesis: (tokens, out). The runs cover all tokens in order."""
    return _SegmentedUpdate.apply(x, a, b, runs, scaling)


class _MeanAsOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stacked: torch.Tensor) -> torch.Tensor:
        ctx.num_hypotheses = len(stacked)
        # Hypotheses that are alike have that very mean, unrounded.
        return stacked[0] + (stacked - stacked[0]).mean(dim=0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return (grad / math.sqrt(ctx.num_hypotheses)).expand(ctx.num_hypotheses, *grad.shape)


class _GatheredUpdate(torch.autograd.Function):
    # Autograd alone would keep the gathered copies of A and B, which for short rows are as large as the input, and add
    # their gradients up one row at a time. They are gathered again instead.
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        middle = _middle(x, a[index], scaling)
        ctx.save_for_backward(x, a, b, index, middle)
        ctx.scaling = scaling
        return torch.bmm(middle, b[index].transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, index, middle = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Second derivatives: what was kept has no graph.
            middle = _middle(x, a[index], ctx.scaling)
        # A product with the indicator of membership adds rows up in one go and, unlike atomic additions, always alike.
        members = torch.nn.functional.one_hot(index, len(a)).T.to(grad.dtype)
        grad_middle = torch.bmm(grad, b[index]) * ctx.scaling
        grad_x = torch.bmm(grad_middle, a[index]) if ctx.needs_input_grad[0] else None
        grad_a = grad_b = None
        if ctx.needs_input_grad[1]:
            grad_a = (members @ torch.bmm(grad_middle.transpose(1, 2), x).flatten(1)).view_as(a)
        if ctx.needs_input_grad[2]:
            grad_b = (members @ torch.bmm(grad.transpose(1, 2), middle).flatten(1)).view_as(b)
        return grad_x, grad_a, grad_b, None, None


class _SegmentedUpdate(torch.autograd.Function):
    # Autograd alone would make a zero-filled copy of all gradients for each slice.
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, runs: tuple[Run, ...], scaling: float
    ) -> torch.Tensor:
        middle = x.new_empty(len(x), a.shape[1])
        update = x.new_empty(len(x), b.shape[1])
        for hypothesis, start, stop in runs:
            middle[start:stop] = (x[start:stop] @ a[hypothesis].T) * scaling
            update[start:stop] = middle[start:stop] @ b[hypothesis].T
        ctx.save_for_backward(x, a, b, middle)
        ctx.runs, ctx.scaling = runs, scaling
        return update

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, middle = ctx.saved_tensors
        if torch.is_grad_enabled():
            middle = torch.cat([(x[start:stop] @ a[k].T) * ctx.scaling for k, start, stop in ctx.runs])
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        for hypothesis, start, stop in ctx.runs:
            grad_middle = (grad[start:stop] @ b[hypothesis]) * ctx.scaling
            if grad_x is not None:
                grad_x[start:stop] = grad_middle @ a[hypothesis]
            grad_a[hypothesis] += grad_middle.T @ x[start:stop]
            grad_b[hypothesis] += grad[start:stop].T @ middle[start:stop]
        return grad_x, grad_a, grad_b, None, None
