"""Frozen modules that come before the first adapted layer run once for all hypotheses.

In a call with `hypotheses="all"` the rows are K copies of a batch until the first adapter tells them apart. So the token
embeddings, and the decoder layers below the first adapted one (`layers_to_transform`), get the rows of one copy, and their
output is repeated. The rest of the model sees K * B rows throughout.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from peft_mcl.routing import PACKED_BOUNDS, Routing


def modules_before_adapters(model: nn.Module, is_adapted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The modules whose input cannot depend on a hypothesis.

    These are the input embeddings, and the leading entries of the list of decoder layers; the latter only if nothing outside
    of the list is adapted but the output embeddings, because it might feed the layers.

    Args:
        model (`nn.Module`): The base model.
        is_adapted (`Callable`): Whether a module is itself an adapted layer.
    """
    adapted = {name for name, module in model.named_modules() if is_adapted(module)}
    if not adapted:
        return []
    found: list[nn.Module] = []
    embeddings = _embeddings(model, "get_input_embeddings")
    if embeddings is not None and not any(is_adapted(module) for module in embeddings.modules()):
        found.append(embeddings)

    head = _embeddings(model, "get_output_embeddings")
    in_head = {id(module) for module in head.modules()} if head is not None else set()
    trunks: dict[str, set[int]] = {}
    for name in adapted:
        if id(model.get_submodule(name)) in in_head:
            continue
        place = _place_in_list(model, name)
        if place is None:
            return found
        trunks.setdefault(place[0], set()).add(place[1])
    if len(trunks) == 1:
        (trunk, indices) = next(iter(trunks.items()))
        found += list(model.get_submodule(trunk).children())[: min(indices)]
    return found


def _embeddings(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # not every model has both
        return None


def _place_in_list(model: nn.Module, name: str) -> tuple[str, int] | None:
    """The outermost nn.ModuleList on the way to a module, and the index in it."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        if isinstance(model.get_submodule(path), nn.ModuleList):
            return path, int(parts[depth])
    return None


class RunOnce:
    """Forward hooks that let a module see one copy of the rows of a call with `hypotheses="all"`.

    They do nothing where its output would not be the same for all copies (dropout) or its rows are not in dimension 0.

    Args:
        module (`nn.Module`): One of `modules_before_adapters`.
        routing ([`Routing`]): Of its model.
    """

    def __init__(self, module: nn.Module, routing: Routing) -> None:
        self.routing = routing
        self.is_random = _has_dropout(module)
        self._running = _Running()
        # Bound methods: they are copied and pickled with the model.
        self.handles = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return None
        copies = 1 if self.is_random and module.training else self._copies((args, kwargs))
        self._running.copies.append(copies)
        if copies == 1:
            return None
        all_rows = _rows((args, kwargs))
        return _map((args, kwargs), lambda tensor: tensor[: all_rows // copies] if len(tensor) == all_rows else tensor)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if torch.compiler.is_compiling() or not self._running.copies:
            return None
        copies = self._running.copies.pop()
        if copies == 1 or output is None:
            return None
        rows = _rows((args, kwargs))
        return _map(output, lambda tensor: torch.cat([tensor] * copies) if len(tensor) == rows else tensor)

    def _copies(self, inputs: Any) -> int:
        """K, or 1 if the call has to run as it is."""
        route = self.routing.current
        if route is None or route.blocks is None or not route.run_once or not _is_shareable(inputs):
            return 1
        return route.blocks if _rows(inputs) % route.blocks == 0 else 1

    # Running calls belong to this process.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_running"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _running=_Running())


def stop_running_once(model: nn.Module) -> None:
    """Take all hooks of `RunOnce` off a model."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, RunOnce):
                owner.remove()


class _Running(threading.local):
    def __init__(self) -> None:
        self.copies: list[int] = []


def _is_shareable(inputs: Any) -> bool:
    """No cache that would have to hold all rows, no bounds of packed rows, no tensor whose rows are not in dimension 0."""
    _, kwargs = inputs
    if any(kwargs.get(name) is not None for name in PACKED_BOUNDS):
        return False
    found = _leaves(inputs)
    if any(isinstance(leaf, Cache) for leaf in found):
        return False
    # (3, rows, ...): the positions of multimodal rotary embeddings.
    return not any(isinstance(leaf, torch.Tensor) and leaf.dim() >= 3 and len(leaf) == 3 for leaf in found)


def _rows(inputs: Any) -> int:
    """Dimension 0 of the first tensor: the ids or the hidden states."""
    first = next((leaf for leaf in _leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0), None)
    return 0 if first is None else len(first)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _map(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value) if value.dim() > 0 else value
    if isinstance(value, ModelOutput):
        return type(value)(**{key: _map(item, function) for key, item in value.items()})
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map(item, function) for item in value)
    return value


def _has_dropout(module: nn.Module) -> bool:
    """Whether a training forward is random: dropout modules, or rates that attention keeps as attributes."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return True
        if any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(part).items()):
            return True
    return False
