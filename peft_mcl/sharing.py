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

from peft_mcl.routing import Routing, is_in_backward, map_leaves, name_inputs


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

    They do nothing where its output would not be the same for all copies (dropout, layers that run again), or where it takes
    inputs other than those of an ordinary decoder layer.

    Args:
        module (`nn.Module`): One of `modules_before_adapters`.
        routing ([`Routing`]): Of its model.
    """

    def __init__(self, module: nn.Module, routing: Routing) -> None:
        self.routing = routing
        self.is_random = _has_noise(module)
        self.is_repeated = False
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
        copies = self._copies(module, args, kwargs)
        self._running.copies.append(copies)
        if copies == 1:
            return None
        rows = len(_first(args, kwargs)) // copies
        # A single dimension is that of the tokens.
        return _map_tensors(
            (args, kwargs),
            lambda tensor: tensor[:rows] if tensor.dim() > 1 and len(tensor) == rows * copies else tensor,
        )

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if torch.compiler.is_compiling() or not self._running.copies:
            return None
        copies = self._running.copies.pop()
        if copies == 1 or output is None:
            return None
        rows = len(_first(args, kwargs))
        return _map_tensors(output, lambda tensor: torch.cat([tensor] * copies) if len(tensor) == rows else tensor)

    def _copies(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """K, or 1 if the call has to run as it is."""
        route = self.routing.current
        if route is None or route.blocks is None or not route.run_once or self.is_repeated:
            return 1
        if self.routing.are_told_apart(route) and not is_in_backward():
            # A model that runs its layers several times: the second time the rows differ.
            self.is_repeated = True
            return 1
        if (self.is_random and module.training) or not _has_known_inputs(module, args, kwargs, route.blocks):
            return 1
        return route.blocks

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


# What the decoder layers of transformers take, and its number of dimensions: rows in dimension 0, or a single row for all,
# or tokens alone. Others (a cache, attention biases by head, keys and values of other layers, bounds of packed rows, positions
# of multimodal rotary embeddings) may depend on the rows in ways unknown here.
_LAYER_INPUTS = {
    "attention_mask": (2, 3, 4),
    "position_ids": (1, 2),
    "position_embeddings": (3,),
    "cache_position": (1,),
}


def _has_known_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], copies: int) -> bool:
    """Whether the inputs are ids (rows, T) or hidden states (rows, T, width), and what belongs to the same rows."""
    first = _first(args, kwargs)
    if first is None or first.dim() not in (2, 3) or len(first) % copies != 0:
        return False
    names = name_inputs(type(module).forward, (module, *args))[1:]
    known = True

    def check(name: str, leaf: Any) -> None:
        nonlocal known
        if isinstance(leaf, torch.Tensor):
            known &= leaf is first or (
                leaf.dim() in _LAYER_INPUTS.get(name, ()) and (leaf.dim() == 1 or len(leaf) in (1, len(first)))
            )
        else:
            known &= leaf is None or isinstance(leaf, (bool, int, float, str))

    for name, value in (*zip(names, args, strict=True), *kwargs.items()):
        map_leaves(name, value, check)
    return known


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The ids or the hidden states."""
    first = args[0] if args else kwargs.get("hidden_states", kwargs.get("input"))
    return first if isinstance(first, torch.Tensor) else None


def _map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def apply(name: str, leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 else leaf

    return map_leaves("", value, apply)


def _has_noise(module: nn.Module) -> bool:
    """Whether a training forward is random: dropout modules, or rates (of attention, of a router) kept as attributes."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return True
        for name, value in vars(part).items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0:
                return True
    return False
