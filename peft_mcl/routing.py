"""Which hypothesis each row of a batch belongs to, and how the adapted layers get to know it.

A model call has one `Route`. It is put on a stack (`Routing`) when the base model is entered and taken off when it is
left; the adapted layers read the top. Gradient checkpointing runs layers again after the model was left, so the
checkpoint functions of the model are given a memory of the route of their forward pass (`RouteKeepingCheckpoint`).
"""

from __future__ import annotations

import copy
import inspect
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.utils import ModelOutput

from peft_mcl.updates import Run


ALLOWED = (
    "an int (one hypothesis for all rows), a 1-D integer tensor with one hypothesis for each row (of a packed row: for each "
    "of its sequences), 'all' (every hypothesis for every row), or 'mean' (all rows under the mean of the hypotheses)"
)


@dataclass(frozen=True)
class Route:
    """The hypothesis of each row. Exactly one of `hypothesis`, `mean`, `blocks`, `index`, `decoded` and `runs` is set.

    Attributes:
        hypothesis (`int`): Every row belongs to this hypothesis.
        mean (`bool`): Every row runs under the mean of all hypotheses (`updates.mean_as_one`).
        blocks (`int`): The rows are this many equal contiguous blocks; block k belongs to hypothesis k.
        decoded (`tuple[int, ...]`), num_inputs (`int`): The rows of `generate`: for each of `num_inputs` inputs one equal
            group of rows for each of these hypotheses.
        index (`torch.Tensor`): int64 of shape (rows,). Row i belongs to hypothesis `index[i]`. A layer that sees m times as
            many rows (beams, or tokens flattened into rows) takes each entry for m consecutive rows.
        runs (`tuple`): One packed row: `(hypothesis, start, stop)` for each run of tokens of one hypothesis, in order.
        run_once (`bool`): With `blocks`: modules before the first adapter may see one copy of the rows (`sharing.py`).
    """

    hypothesis: int | None = None
    mean: bool = False
    blocks: int | None = None
    index: torch.Tensor | None = None
    decoded: tuple[int, ...] | None = None
    num_inputs: int = 1
    runs: tuple[Run, ...] | None = None
    run_once: bool = False

    @property
    def num_groups(self) -> int:
        """Groups of rows, contiguous and of one size, of one hypothesis each. Not for packed rows, one hypothesis or the mean."""
        if self.decoded is not None:
            return self.num_inputs * len(self.decoded)
        if self.index is not None:
            return len(self.index)
        assert self.blocks is not None
        return self.blocks

    def group_hypotheses(self) -> torch.Tensor:
        """int64 of shape (num_groups,), the hypothesis of each group."""
        if self.decoded is not None:
            return torch.tensor(self.decoded).repeat(self.num_inputs)
        return torch.arange(self.num_groups) if self.index is None else self.index

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """View `x` (rows, ...) as (groups, rows of a group, ...), each group of one hypothesis.

        Raises:
            ValueError: The rows of `x` cannot be divided into the groups of this route.
        """
        groups, rows = self.num_groups, x.shape[0]
        if rows % groups != 0:
            raise ValueError(
                f"an adapted layer got an input of {rows} rows, shape {tuple(x.shape)}, in a call for {groups} rows or "
                "blocks: it does not keep the batch in dimension 0, so it can serve only one hypothesis at a time. Pass "
                "`hypotheses` as an int, or leave the layer out with `exclude_modules`."
            )
        return x.reshape(groups, rows // groups, *x.shape[1:])

    def flattened(self, x: torch.Tensor) -> torch.Tensor:
        """View `x` (..., width) as (tokens, width). For packed rows.

        Raises:
            ValueError: `x` does not have the tokens of the packed row.
        """
        assert self.runs is not None
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) != self.runs[-1][2]:
            raise ValueError(
                f"an adapted layer got an input of shape {tuple(x.shape)} in a call with a packed row of {self.runs[-1][2]} "
                "tokens: it does not see the tokens of that row, so it can serve only one hypothesis at a time. Pass "
                "`hypotheses` as an int, or leave the layer out with `exclude_modules`."
            )
        return flat


class _ThreadStack(threading.local):
    # Called for each thread. There from the start, so that a compiled model does not find something new after a call.
    def __init__(self) -> None:
        self.stack: list[tuple[Route | None, bool]] = []
        self.told_apart: Route | None = None


class Routing:
    """The stack of routes of one adapted model, one stack for each thread.

    Shared by the tuner and all of its layers. Outside of any model call a layer uses the active hypothesis.

    An entry is a route and whether a call of the base model runs under it. `generate` offers its route to the calls that
    it makes (False), and they run under it (True). A call made inside a running one, in a module hook say, is a call of its
    own and inherits nothing; neither does one that comes through `PeftModel`, which puts None on the stack.
    """

    def __init__(self) -> None:
        self.active = 0
        self._local = _ThreadStack()

    @property
    def stack(self) -> list[tuple[Route | None, bool]]:
        return self._local.stack

    @property
    def current(self) -> Route | None:
        """The route of the innermost model call of this thread, or None outside of any."""
        stack = self.stack
        return stack[-1][0] if stack else None

    @property
    def offered(self) -> Route | None:
        """The route that a call of the base model takes over from `generate`, or None if there is none."""
        stack = self.stack
        return None if not stack or stack[-1][1] else stack[-1][0]

    def tell_apart(self, route: Route) -> None:
        """Note that an adapter has run under a route with `run_once`: from here on the copies of a row differ."""
        self._local.told_apart = route

    def are_told_apart(self, route: Route) -> bool:
        """Whether an adapter has run under this very route."""
        return self._local.told_apart is route

    @contextmanager
    def use(self, route: Route | None, running: bool = False) -> Iterator[None]:
        """Route everything inside the block, and leave the stack as it was found, whatever happens."""
        with self.restored():
            self.stack.append((route, running))
            yield

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Leave the stack as it was found, even after an exception that module hooks do not see (Ctrl-C)."""
        stack = self.stack
        depth = len(stack)
        try:
            yield
        finally:
            del stack[depth:]

    # A stack belongs to running calls of this process: a copied or unpickled model starts with an empty one.
    def __getstate__(self) -> dict[str, Any]:
        return {"active": self.active}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.active = state["active"]


# --------------------------------------------------------------------------------------------------------------------
# From the user's argument to a route


def check_hypothesis(value: Any, num_hypotheses: int, argument: str = "hypothesis") -> int:
    """Return `value` as an int if it is the index of a hypothesis, else raise a ValueError that says what is allowed."""
    index = as_int(value)
    if index is None:
        raise ValueError(f"`{argument}` must be an int in [0, {num_hypotheses - 1}], got {value!r}.")
    if not 0 <= index < num_hypotheses:
        raise ValueError(
            f"`{argument}` must be in [0, {num_hypotheses - 1}] for a model with {num_hypotheses} hypotheses, got {index}."
        )
    return index


def as_int(value: Any) -> int | None:
    """`value` as an int if it is one, of Python or NumPy; None for anything else, bools and tensors included."""
    if isinstance(value, (bool, torch.Tensor)):
        return None
    try:
        return operator.index(value)
    except TypeError:  # not a number, or an array of several (which has an `__index__` all the same)
        return None


def parse_hypotheses(
    hypotheses: Any, num_hypotheses: int, batch_size: int | None, packed_ends: torch.Tensor | None = None
) -> Route:
    """Turn the `hypotheses` argument of a forward call into a route.

    Args:
        hypotheses: An int, a 1-D integer tensor of shape (batch_size,), `"all"` or `"mean"`.
        num_hypotheses (`int`): K.
        batch_size (`int`, *optional*): The rows of the call; None if they cannot be told from the inputs.
        packed_ends (`torch.Tensor`, *optional*): If the batch is one packed row, the S + 1 bounds of its sequences
            (`cu_seq_lens_q`). A tensor of hypotheses then has the shape (S,).

    Raises:
        ValueError: Wrong type, dtype, length or range; the message says what is allowed.
    """
    if isinstance(hypotheses, str):
        if hypotheses not in ("all", "mean"):
            raise ValueError(f"`hypotheses` must be {ALLOWED}, got {hypotheses!r}.")
        if num_hypotheses == 1:
            return Route(hypothesis=0)
        return Route(blocks=num_hypotheses) if hypotheses == "all" else Route(mean=True)
    if isinstance(hypotheses, torch.Tensor):
        if packed_ends is not None:
            bounds = _check_bounds(packed_ends)
            index = _check_index(hypotheses, num_hypotheses, len(bounds) - 1, "sequences of the packed row")
            return Route(runs=_merge_runs(index.tolist(), bounds))
        return Route(index=_check_index(hypotheses, num_hypotheses, batch_size))
    if as_int(hypotheses) is None:
        raise ValueError(f"`hypotheses` must be {ALLOWED}, got {hypotheses!r} of type {type(hypotheses).__name__}.")
    return Route(hypothesis=check_hypothesis(hypotheses, num_hypotheses, "hypotheses"))


def _check_bounds(packed_ends: torch.Tensor) -> list[int]:
    bounds = packed_ends.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or sorted(bounds) != bounds:
        raise ValueError(
            "`cu_seq_lens_q` must hold the bounds of the sequences of the packed row, from 0 to its number of tokens, got "
            f"{bounds}."
        )
    return bounds


def _merge_runs(hypotheses: list[int], bounds: list[int]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for hypothesis, start, stop in zip(hypotheses, bounds[:-1], bounds[1:], strict=True):
        if runs and runs[-1][0] == hypothesis:
            start = runs.pop()[1]
        runs.append((hypothesis, start, stop))
    return tuple(runs)


def _check_index(
    index: torch.Tensor, num_hypotheses: int, batch_size: int | None, what: str = "rows of the batch"
) -> torch.Tensor:
    if index.dim() != 1 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(
            f"`hypotheses` must be {ALLOWED}, got a tensor of shape {tuple(index.shape)} and dtype {index.dtype}."
        )
    if batch_size is not None and len(index) != batch_size:
        raise ValueError(
            f"`hypotheses` must have one entry for each of the {batch_size} {what}, got {len(index)} entries."
        )
    # A compiled graph cannot branch on values; there an index out of range is caught by the gather itself.
    if (
        not torch.compiler.is_compiling()
        and len(index)
        and not 0 <= int(index.min()) <= int(index.max()) < num_hypotheses
    ):
        raise ValueError(
            f"`hypotheses` must lie in [0, {num_hypotheses - 1}] for a model with {num_hypotheses} hypotheses, got values "
            f"from {int(index.min())} to {int(index.max())}."
        )
    return index.long()


# --------------------------------------------------------------------------------------------------------------------
# Expanding the inputs of a call to one copy for each hypothesis

# Tensors that describe positions or options of the whole batch rather than its rows.
NOT_BATCHED = frozenset({"cache_position", "logits_to_keep", "num_items_in_batch"})
# Inputs that may have a single row for a larger batch, which then applies to all rows.
BROADCAST = frozenset({"attention_mask", "position_ids", "decoder_attention_mask", "decoder_position_ids"})
# Where the sequences of a packed row begin and end, over all rows flattened into one.
PACKED_BOUNDS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k"})
MAIN_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "input_features", "labels")


def name_inputs(forward: Callable[..., Any], args: tuple[Any, ...]) -> list[str]:
    """Names of the positional arguments `args` of a model's `forward`."""
    parameters = list(inspect.signature(forward).parameters.values())
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return (named + [f"argument {i}" for i in range(len(named), len(args))])[: len(args)]


def find_batch_size(inputs: dict[str, Any]) -> int | None:
    """The number of rows of a call, from its main input or else from any tensor; None if there is no tensor."""
    for name in MAIN_INPUTS:
        if isinstance(inputs.get(name), torch.Tensor):
            return inputs[name].shape[0]
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.dim() > 0 and name not in NOT_BATCHED:
            return value.shape[0]
    return None


def expand_inputs(inputs: dict[str, Any], copies: int, batch_size: int) -> dict[str, Any]:
    """Repeat every batched input `copies` times along the batch, hypothesis-major: row k * batch_size + b is copy k of b.

    Tensors are concatenated with themselves whatever the length of dimension 0, so that packed image patches come out
    right. A key-value cache of `batch_size` rows is copied and expanded; one that already has all rows is used as it is.

    Raises:
        ValueError: The cache has another size.
    """
    return {name: _expand(name, value, copies, batch_size) for name, value in inputs.items()}


def _expand(name: str, value: Any, copies: int, batch_size: int) -> Any:
    return map_leaves(name, value, lambda name, leaf: _expand_leaf(name, leaf, copies, batch_size))


def map_leaves(name: str, value: Any, function: Callable[[str, Any], Any]) -> Any:
    """Apply `function(name, leaf)` to whatever is inside model outputs, dicts, lists and tuples, which are rebuilt.

    The name of a leaf is that of the input it is part of, or its own in a model output.
    """
    if isinstance(value, ModelOutput):
        return type(value)(**{key: map_leaves(key, item, function) for key, item in value.items()})
    if isinstance(value, dict):
        return {key: map_leaves(name, item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_leaves(name, item, function) for item in value)
    return function(name, value)


def _expand_leaf(name: str, value: Any, copies: int, batch_size: int) -> Any:
    if isinstance(value, Cache):
        return _expand_cache(name, value, copies, batch_size)
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or name in NOT_BATCHED:
        return value
    if name in PACKED_BOUNDS:
        # Each copy is another row, and its sequences begin where those of the last one end.
        return torch.cat([value[:1], *(value[1:] + copy * value[-1] for copy in range(copies))])
    # (3, batch, length): the position ids of multimodal rotary embeddings.
    batch_dim = 1 if name.endswith("position_ids") and value.dim() == 3 else 0
    if name in BROADCAST and value.shape[batch_dim] != batch_size:
        return value
    return torch.cat([value] * copies, dim=batch_dim)


def cache_rows(cache: Cache) -> int | None:
    """The number of rows that a key-value cache holds, or None while it is empty."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if isinstance(keys, torch.Tensor) and keys.numel() > 0:
            return keys.shape[0]
    return None


def _expand_cache(name: str, cache: Cache, copies: int, batch_size: int) -> Cache:
    rows = cache_rows(cache)
    if rows is None or rows == copies * batch_size:
        return cache
    if rows != batch_size:
        raise ValueError(
            f"`{name}` holds {rows} rows; a call with hypotheses='all' on {batch_size} rows needs {batch_size} of them, or "
            f"{copies * batch_size} from an earlier call with hypotheses='all'."
        )
    # Choosing rows makes new keys and values, so they need no copy; and those of a graph would refuse it.
    kept = [
        value for layer in _cache_layers(cache) for value in vars(layer).values() if isinstance(value, torch.Tensor)
    ]
    cache = copy.deepcopy(cache, {id(value): value for value in kept if value.dim() > 0})
    # The rule of beam search: every kind of cache has it.
    cache.reorder_cache(torch.arange(batch_size).repeat(copies))
    return cache


def _cache_layers(cache: Cache) -> list[Any]:
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache.layers + cache.cross_attention_cache.layers
    return cache.layers


# --------------------------------------------------------------------------------------------------------------------
# Gradient checkpointing


def is_in_backward() -> bool:
    """Whether this runs during a backward pass, as a layer does that is recomputed."""
    return torch._C._current_graph_task_id() != -1


class RouteKeepingCheckpoint:
    """A checkpoint function that recomputes under the route of its forward pass.

    The recomputation happens during backward, when the call that knew the route has long returned, possibly in another
    thread. So the route is stored with the checkpointed function itself.
    """

    def __init__(self, checkpoint: Callable[..., Any], routing: Routing) -> None:
        self.checkpoint = checkpoint
        self.routing = routing

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        route = self.routing.current
        # A compiled graph holds its recomputation already; a function it does not know would only break the graph.
        if route is None or torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)
        return self.checkpoint(partial(_run_routed, self.routing, route, function), *args, **kwargs)


def _run_routed(routing: Routing, route: Route, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with routing.use(route, running=True):
        return function(*args, **kwargs)


# Where transformers' layers, and torch's (FSDP's) CheckpointWrapper, keep their checkpoint function.
_CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")


def keep_routes_in_checkpoints(model: nn.Module, routing: Routing) -> None:
    """Give the checkpoint functions of `model` a memory of the route. Does nothing where they have it already."""
    for module in model.modules():
        for attribute in _CHECKPOINT_ATTRIBUTES:
            function = module.__dict__.get(attribute)
            if function is not None and not isinstance(function, RouteKeepingCheckpoint):
                setattr(module, attribute, RouteKeepingCheckpoint(function, routing))


def restore_checkpoints(model: nn.Module) -> None:
    """Undo `keep_routes_in_checkpoints`."""
    for module in model.modules():
        for attribute in _CHECKPOINT_ATTRIBUTES:
            function = module.__dict__.get(attribute)
            if isinstance(function, RouteKeepingCheckpoint):
                setattr(module, attribute, function.checkpoint)
