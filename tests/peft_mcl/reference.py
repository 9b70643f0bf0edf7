"""The brute-force reference that the tests of the tuner compare with: one hypothesis at a time, merged by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_mcl import MCLoraConfig
from peft_mcl.layer import MCLoraLayer
from tests.tiny import PAD, VOCABULARY


class PlainNet(nn.Module):
    """A module of one's own: no config, no `generate`, inputs by position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16, padding_idx=PAD)
        self.hidden = nn.Linear(16, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 7)

    def forward(self, ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.head(self.norm(torch.tanh(self.hidden(self.embedding(ids)) * scale)))


def plain_net() -> PlainNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PlainNet().eval()


def adapted_layers(model: nn.Module) -> dict[str, MCLoraLayer]:
    """The adapted layers by the name they have in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, MCLoraLayer)
    }


def randomize(model: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    """Give A and B of all adapters random values, so that every hypothesis computes something of its own."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        for factors in (layer.stacked_a, layer.stacked_b, layer.shared_a, layer.shared_b):
            for parameter in factors.values():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def adapt(base: nn.Module, num_hypotheses: int = 3, adapter_name: str = "default", **options: object) -> PeftModel:
    """`base`, in place, with random hypotheses (both A and B drawn), in eval mode."""
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
    config = getattr(base, "config", None)
    if config is not None:
        defaults["task_type"] = "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
    mcl = MCLoraConfig(num_hypotheses=num_hypotheses, **{**defaults, **options})
    return randomize(get_peft_model(base, mcl, adapter_name=adapter_name)).eval()


def merged_by_hand(base: nn.Module, model: nn.Module, hypothesis: int, adapters: Iterable[str] = ("default",)):
    """A copy of the plain `base` with `W + scaling * (B_s A_s + B_k A_k)` for its weights, differentiable in A and B of `model`.

    Args:
        base (`nn.Module`): The plain model, with the weights that `model` was made of.
        model (`nn.Module`): The adapted model. Gradients of what is returned flow to its A and B.
        hypothesis (`int`): k.
        adapters (`Iterable[str]`): The adapters that are active.
    """
    plain = copy.deepcopy(base)
    for name, layer in adapted_layers(model).items():
        target = plain.get_submodule(name)
        weight = target.weight.detach()
        padding = getattr(target, "padding_idx", None)
        target.padding_idx = None
        for adapter in adapters:
            if adapter in layer.stacked_a:
                a, b = layer.stacked_a[adapter][hypothesis], layer.stacked_b[adapter][hypothesis]
                pairs = [(a, b)]
                if adapter in layer.shared_a:
                    pairs.append((layer.shared_a[adapter], layer.shared_b[adapter]))
                for a, b in pairs:
                    if padding is not None:
                        # As in LoRA, the padding row of an embedding gives no gradient to A, but it gives one to B.
                        a = torch.where(torch.arange(a.shape[1]) == padding, a.detach(), a)
                    delta = (b @ a) * layer.scaling[adapter]
                    weight = weight + (delta.T if isinstance(target, (Conv1D, nn.Embedding)) else delta)
        # A plain tensor in the place of the parameter, so that the gradient flows on to A and B.
        del target._parameters["weight"]
        target.weight = weight
    return plain


def take_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of every trainable parameter (zeros where there is none); clears them."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
    return found


def assert_same_gradients(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = 1e-4
) -> None:
    """All gradients agree to `relative` of the largest entry of their tensor, and not because all are zero."""
    assert actual.keys() == expected.keys()
    largest = {name: gradient.abs().max().item() for name, gradient in expected.items()}
    overall = max(largest.values())
    assert overall > 0
    for name, gradient in expected.items():
        # A tensor that is zero but for rounding is measured by the others.
        allowed = relative * max(largest[name], 1e-3 * overall)
        error = (actual[name] - gradient).abs().max().item()
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed is {allowed:.3g}"


def batch(rows: int = 2, length: int = 7, seed: int = 0, padding: str | None = None) -> dict[str, torch.Tensor]:
    """Token ids with an attention mask, of ragged lengths if `padding` is "left" or "right"."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows if padding else 0):
        missing = (2 * row + 1) % length
        mask[row, slice(missing) if padding == "left" else slice(length - missing, None)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
