"""The arithmetic of the layers against loops over tokens, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_mcl.updates import block_update, gathered_update, segmented_update


SCALING = 0.7


def parameters(num_hypotheses, rank, width, out, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(num_hypotheses, rank, width, generator=generator, dtype=dtype)
    b = torch.randn(num_hypotheses, out, rank, generator=generator, dtype=dtype)
    return a.requires_grad_(), b.requires_grad_()


def token_by_token(x, a, b, hypotheses):
    """x (tokens, in), with a hypothesis for each token."""
    return torch.stack([SCALING * (b[k] @ (a[k] @ token)) for token, k in zip(x, hypotheses, strict=True)])


def assert_same(update, expected, inputs):
    torch.testing.assert_close(update, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn(update.shape, generator=torch.Generator().manual_seed(1), dtype=update.dtype)
    ours = torch.autograd.grad((update * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)
    assert max(gradient.abs().max() for gradient in ours) > 0


shapes = st.tuples(*[st.integers(1, 5)] * 4)


@settings(max_examples=40, deadline=None)
@given(shapes, st.data())
def test_gathered_rows(shape, data):
    num_hypotheses, rank, width, out = shape
    index = data.draw(st.lists(st.integers(0, num_hypotheses - 1), min_size=1, max_size=6))
    tokens = data.draw(st.integers(1, 4))
    a, b = parameters(num_hypotheses, rank, width, out)
    x = torch.randn(len(index), tokens, width, dtype=torch.float64, requires_grad=True)
    update = gathered_update(x, a, b, torch.tensor(index), SCALING)
    expected = token_by_token(x.flatten(0, 1), a, b, [k for k in index for _ in range(tokens)])
    assert_same(update.flatten(0, 1), expected, (x, a, b))


@settings(max_examples=40, deadline=None)
@given(shapes, st.data())
def test_segments(shape, data):
    num_hypotheses, rank, width, out = shape
    pairs = st.tuples(st.integers(0, num_hypotheses - 1), st.integers(1, 4))
    segments = data.draw(st.lists(pairs, min_size=1, max_size=5))
    a, b = parameters(num_hypotheses, rank, width, out)
    of_token = [k for k, length in segments for _ in range(length)]
    x = torch.randn(len(of_token), width, dtype=torch.float64, requires_grad=True)
    runs, start = [], 0
    for k, length in segments:
        runs.append((k, start, start + length))
        start += length
    update = segmented_update(x, a, b, tuple(runs), SCALING)
    assert_same(update, token_by_token(x, a, b, of_token), (x, a, b))


@settings(max_examples=20, deadline=None)
@given(shapes, st.integers(1, 4))
def test_blocks(shape, tokens):
    num_hypotheses, rank, width, out = shape
    a, b = parameters(num_hypotheses, rank, width, out)
    x = torch.randn(num_hypotheses, tokens, width, dtype=torch.float64, requires_grad=True)
    expected = token_by_token(x.flatten(0, 1), a, b, [k for k in range(num_hypotheses) for _ in range(tokens)])
    assert_same(block_update(x, a, b, SCALING).flatten(0, 1), expected, (x, a, b))


@pytest.mark.parametrize("which", ["gathered", "segmented"])
def test_gradients_by_finite_differences_for_whatever_needs_one(which):
    a, b = parameters(3, 2, 4, 3)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def update(x, a, b):
        if which == "gathered":
            return gathered_update(x.view(3, 2, 4), a, b, torch.tensor([2, 0, 2]), SCALING)
        return segmented_update(x, a, b, ((2, 0, 1), (0, 1, 4), (2, 4, 6)), SCALING)

    assert torch.autograd.gradcheck(update, (x, a, b))
    assert torch.autograd.gradgradcheck(update, (x, a, b))
    assert torch.autograd.gradcheck(lambda x: update(x, a.detach(), b.detach()), (x,))
    assert torch.autograd.gradcheck(lambda a: update(x.detach(), a, b.detach()), (a,))


def saved_bytes(function, known):
    """Bytes kept for backward that are not those of the known tensors."""
    known = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    return sum(kept.values())


def test_nothing_but_the_r_columns_is_kept_for_backward():
    a, b = parameters(4, 2, 64, 64, torch.float32)
    x = torch.randn(6, 8, 64, requires_grad=True)
    columns, index = 6 * 8 * 2 * 4, torch.tensor([0, 1, 2, 3, 0, 1])
    assert saved_bytes(lambda: gathered_update(x, a, b, index, SCALING), (x, a, b, index)) == columns
    runs = ((0, 0, 10), (3, 10, 48))
    assert saved_bytes(lambda: segmented_update(x.view(48, 64), a, b, runs, SCALING), (x, a, b)) == columns
