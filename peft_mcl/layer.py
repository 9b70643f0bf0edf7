"""The adapted layers: `base_layer(x)` plus the low-rank update of the hypothesis that each row belongs to.

The adapters of all hypotheses are stacked in one tensor for each layer, A (K, r, in) and B (K, out, r). There may be a part
that all of them share, A (shared_r, in) and B (out, shared_r): a call runs under factors of rank shared_r + r, in which it
comes first. How they are applied is the matter of `updates.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from peft_mcl.config import MCLoraConfig
from peft_mcl.routing import Route, Routing, is_in_backward
from peft_mcl.updates import block_update, decoded_update, gathered_update, mean_as_one, segmented_update


class MCLoraLayer(nn.Module, BaseTunerLayer):
    """What the adapted layers have in common: parameters, life cycle and merging.

    Args:
        base_layer (`nn.Module`): The frozen layer.
        adapter_name (`str`): Name of the first adapter.
        routing ([`Routing`]): Tells the route of the running call; shared by all layers of the model.
        module_name (`str`): Name of the layer in the model, for messages.
        r (`int`): Rank of each hypothesis, without the part that they share.
        lora_alpha (`float`): Alpha of each hypothesis.
        config ([`MCLoraConfig`]): The other options.
        **kwargs: What PEFT needs to know of a quantised base (`get_quantization_kwargs`).
    """

    # The names of the stacked parameters; of two kinds, so that PEFT tells apart what LoRA tells apart.
    name_a: str
    name_b: str
    name_shared_a: str
    name_shared_b: str
    adapter_layer_names: tuple[str, ...] = (
        "mclora_A",
        "mclora_B",
        "mclora_embedding_A",
        "mclora_embedding_B",
        "mclora_shared_A",
        "mclora_shared_B",
        "mclora_shared_embedding_A",
        "mclora_shared_embedding_B",
    )
    other_param_names: tuple[str, ...] = (
        "num_hypotheses",
        "r",
        "lora_alpha",
        "scaling",
        "use_rslora",
        "mclora_dropout",
        "merged_hypothesis",
    )

    base_layer: nn.Module
    in_features: int
    out_features: int

    if TYPE_CHECKING:
        # The attributes of BaseTunerLayer, which is not typed.
        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        routing: Routing,
        module_name: str,
        r: int,
        lora_alpha: float,
        config: MCLoraConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.routing = routing
        self.module_name = module_name
        self.num_hypotheses: dict[str, int] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.merged_hypothesis: dict[str, int] = {}
        self.mclora_dropout = nn.ModuleDict()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        base = self.get_base_layer()
        # Conv1D (GPT-2) stores its weight as (in, out).
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self.quantization_backend = resolve_quantization_backend(base, **kwargs)
        self.in_features, self.out_features = _get_in_out_features(base)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    @property
    def stacked_a(self) -> nn.ParameterDict:
        """A of all hypotheses by adapter name, each of shape (K, r, in_features)."""
        return getattr(self, self.name_a)

    @property
    def stacked_b(self) -> nn.ParameterDict:
        """B of all hypotheses by adapter name, each of shape (K, out_features, r)."""
        return getattr(self, self.name_b)

    @property
    def shared_a(self) -> nn.ParameterDict:
        """A that all hypotheses share, by adapter name, each of shape (shared_r, in_features); not of adapters without one."""
        return getattr(self, self.name_shared_a)

    @property
    def shared_b(self) -> nn.ParameterDict:
        """B that all hypotheses share, by adapter name, each of shape (out_features, shared_r)."""
        return getattr(self, self.name_shared_b)

    # ------------------------------------------------------------------------------------------------------------
    # Parameters

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: MCLoraConfig) -> None:
        """Create the K hypotheses of a named adapter."""
        self.num_hypotheses[adapter_name] = config.num_hypotheses
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = self._initial_scaling(adapter_name)
        dropout = nn.Dropout(p=config.lora_dropout) if config.lora_dropout > 0.0 else nn.Identity()
        self.mclora_dropout[adapter_name] = dropout
        a, b = self._new_hypotheses(r, config)
        self.stacked_a[adapter_name], self.stacked_b[adapter_name] = nn.Parameter(a), nn.Parameter(b)
        if config.shared_r:
            a, b = self._new_pair(config.shared_r, config.init_lora_weights)
            self.shared_a[adapter_name], self.shared_b[adapter_name] = nn.Parameter(a), nn.Parameter(b)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _new_hypotheses(self, r: int, config: MCLoraConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """A (K, r, in) and B (K, out, r) of all hypotheses."""
        count, perturbation = config.num_hypotheses, config.init_perturbation
        if perturbation is None:
            pairs = [self._new_pair(r, config.init_lora_weights) for _ in range(count)]
            return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
        a, b = self._new_pair(r, config.init_lora_weights)
        return _perturbed_copies(a, count, perturbation), _perturbed_copies(b, count, perturbation)

    def _new_pair(self, r: int, init: bool | str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r) of one hypothesis, or of what all share."""
        raise NotImplementedError

    def _initial_scaling(self, adapter_name: str) -> float:
        r = self.r[adapter_name]
        return self.lora_alpha[adapter_name] / (math.sqrt(r) if self.use_rslora[adapter_name] else r)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter to its initial one times `scale`, as LoRA layers do."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._initial_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of all active adapters by `scale`, as LoRA layers do."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of all active adapters by `scale`; None sets the initial one again."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] = (
                    self._initial_scaling(adapter) if scale is None else self.scaling[adapter] / scale
                )

    # ------------------------------------------------------------------------------------------------------------
    # Forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        route = self._current_route()
        if self.merged:
            self._check_route_is_merged(route)
            return self.base_layer(x, *args, **kwargs)

        if route.run_once and not torch.compiler.is_compiling():
            self.routing.tell_apart(route)
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        dtype = result.dtype
        for adapter_name in self.active_adapters:
            if adapter_name not in self.stacked_a:
                continue
            update = self._update(x, adapter_name, route)
            # PEFT adds in the wider dtype for plain layers and in the base layer's for quantised ones.
            result = result + (update if self.quantization_backend is None else update.to(dtype))
        return result.to(dtype)

    def _update(self, x: torch.Tensor, adapter_name: str, route: Route) -> torch.Tensor:
        """The scaled low-rank update of one adapter, of shape (rows, ..., out_features)."""
        raise NotImplementedError

    def _factors(self, adapter_name: str, route: Route) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B that a call runs under, shared part and all.

        Returns:
            Of shapes (rank, in) and (out, rank) if all rows run under the same factors, else those of all hypotheses,
            (K, rank, in) and (K, out, rank); rank is shared_r + r.
        """
        a, b = self.stacked_a[adapter_name], self.stacked_b[adapter_name]
        if route.hypothesis is not None:
            a, b = a[route.hypothesis], b[route.hypothesis]
        elif route.mean:
            a, b = mean_as_one(a), mean_as_one(b)
        if adapter_name in self.shared_a:
            shared_a, shared_b = self.shared_a[adapter_name], self.shared_b[adapter_name]
            a = torch.cat([shared_a.expand(*a.shape[:-2], -1, -1), a], dim=-2)
            b = torch.cat([shared_b.expand(*b.shape[:-2], -1, -1), b], dim=-1)
        return a, b

    def _current_route(self) -> Route:
        route = self.routing.current
        if route is not None:
            return route
        # A layer that runs during backward without a route is being recomputed by a checkpoint function that was not
        # given a memory; guessing a hypothesis here would silently give wrong gradients.
        has_choice = max(self.num_hypotheses.values(), default=1) > 1
        if has_choice and not torch.compiler.is_compiling() and is_in_backward():
            raise RuntimeError(
                f"The adapted layer {self.module_name!r} is recomputed during backward by an unknown checkpoint function, "
                "so the hypotheses of its rows are lost. Enable checkpointing with "
                "`model.gradient_checkpointing_enable()`, or checkpoint the whole model instead of its parts."
            )
        return Route(hypothesis=self.routing.active)

    # ------------------------------------------------------------------------------------------------------------
    # Merging

    def get_delta_weight(self, adapter: str, hypothesis: int | None = None) -> torch.Tensor:
        """The weight update of one hypothesis (the active one by default), in the layout of the base weight."""
        hypothesis = self._hypothesis_to_merge() if hypothesis is None else hypothesis
        a, b = self._factors(adapter, Route(hypothesis=hypothesis))
        dtype = b.dtype
        # Half-precision products are slow and inexact on CPU.
        if b.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            a, b = a.float(), b.float()
        delta = (b @ a) * self.scaling[adapter]
        return (delta.T if self._transposed else delta).to(dtype)

    @property
    def _transposed(self) -> bool:
        return self.fan_in_fan_out

    def _hypothesis_to_merge(self) -> int:
        route = self.routing.current
        return self.routing.active if route is None or route.hypothesis is None else route.hypothesis

    @property
    def can_be_merged(self) -> bool:
        """Whether the base weight can be read and written: not for all quantised layers."""
        if self.quantization_backend is not None:
            return self.quantization_backend.supports_merge
        # Quantised tensors that PEFT does not know (optimum-quanto) would be written as if they were plain ones.
        return type(self.get_base_layer().weight) in (nn.Parameter, torch.Tensor, DTensor)

    def merged_weight(self, adapter_names: Sequence[str]) -> torch.Tensor:
        """The base weight with one hypothesis of each named adapter added, as a new tensor."""
        weight = self.get_base_weight().detach().clone()
        for adapter_name in adapter_names:
            if adapter_name in self.stacked_a:
                weight += self.get_delta_weight(adapter_name).detach().to(weight.dtype)
        return weight

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise a ValueError if merging would give weights that are not finite."""
        names = self.active_adapters if adapter_names is None else adapter_names
        if not torch.isfinite(self.merged_weight([n for n in names if n not in self.merged_adapters])).all():
            raise ValueError(
                f"NaNs detected in the merged weights of {self.module_name!r}: the adapter {', '.join(names)} seems to be "
                "broken. Nothing was merged."
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add one hypothesis of the named adapters to the base weight (see `MCLoraModel.merge_adapter`)."""
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.stacked_a]
        if not names:
            return
        if safe_merge:
            self.check_merge(names)
        hypothesis = self._hypothesis_to_merge()
        self.set_base_weight(self.merged_weight(names))
        self.merged_adapters.extend(names)
        self.merged_hypothesis.update(dict.fromkeys(names, hypothesis))

    def unmerge(self) -> None:
        """Take the merged hypotheses out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_weight().detach().clone()
        for adapter_name in reversed(self.merged_adapters):
            hypothesis = self.merged_hypothesis.pop(adapter_name)
            weight -= self.get_delta_weight(adapter_name, hypothesis).detach().to(weight.dtype)
        self.set_base_weight(weight)
        self.merged_adapters.clear()

    def _check_route_is_merged(self, route: Route) -> None:
        merged = set(self.merged_hypothesis.values())
        if merged != {route.hypothesis}:
            raise ValueError(
                f"Hypothesis {', '.join(map(str, sorted(merged)))} is merged into the base weights, so no other can run. "
                "Call `unmerge_adapter()` first."
            )

    def __repr__(self) -> str:
        return "mclora." + super().__repr__()


def _perturbed_copies(tensor: torch.Tensor, count: int, perturbation: float) -> torch.Tensor:
    """`count` copies, stacked, each with normal noise of `perturbation` times the standard deviation of `tensor` added."""
    copies = torch.stack([tensor] * count)
    if perturbation > 0:
        copies += perturbation * tensor.std(correction=0) * torch.randn_like(copies)
    return copies


class MCLoraLinear(MCLoraLayer):
    """K low-rank updates around nn.Linear, transformers' Conv1D, or any quantised linear layer."""

    name_a, name_b = "mclora_A", "mclora_B"
    name_shared_a, name_shared_b = "mclora_shared_A", "mclora_shared_B"

    def _new_pair(self, r: int, init: bool | str) -> tuple[torch.Tensor, torch.Tensor]:
        # The random draws are LoRA's, one for one: with the same seed, K = 1 starts from the very weights of plain LoRA.
        a = nn.Linear(self.in_features, r, bias=False).weight.detach()
        b = nn.Linear(r, self.out_features, bias=False).weight.detach()
        if init:
            if init == "gaussian":
                nn.init.normal_(a, std=1 / r)
            else:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(b)
        return a, b

    def _update(self, x: torch.Tensor, adapter_name: str, route: Route) -> torch.Tensor:
        a, b = self._factors(adapter_name, route)
        dropout, scaling = self.mclora_dropout[adapter_name], self.scaling[adapter_name]
        # Under autocast the products choose their own dtype, so a wider copy of x would be made for nothing. Dropout is
        # computed in the dtype that PEFT gives it.
        if not torch.is_autocast_enabled(x.device.type) or not isinstance(dropout, nn.Identity):
            x = self._cast_input_dtype(x, a.dtype)
        x = dropout(x)
        if a.dim() == 2:
            return F.linear(F.linear(x, a), b) * scaling
        x, a, b = (_as_autocast(tensor) for tensor in (x, a, b))
        if route.runs is not None:
            update = segmented_update(route.flattened(x), a, b, route.runs, scaling)
            return update.view(*x.shape[:-1], self.out_features)
        groups = route.grouped(x).flatten(1, -2)
        if route.decoded is not None:
            update = decoded_update(groups, a, b, route.decoded, route.num_inputs, scaling)
        elif route.index is not None:
            update = gathered_update(groups, a, b, route.index.to(a.device), scaling)
        else:
            update = block_update(groups, a, b, scaling)
        return update.view(*x.shape[:-1], self.out_features)


def _as_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the dtype that autocast gives to matrix products, which it does not reach inside autograd functions."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


class MCLoraEmbedding(MCLoraLayer):
    """K low-rank updates around nn.Embedding."""

    name_a, name_b = "mclora_embedding_A", "mclora_embedding_B"
    name_shared_a, name_shared_b = "mclora_shared_embedding_A", "mclora_shared_embedding_B"

    def _new_pair(self, r: int, init: bool | str) -> tuple[torch.Tensor, torch.Tensor]:
        # As in LoRA it is A that is zero: the rows of an embedding are looked up in A, and most are never seen.
        a = torch.randn(r, self.in_features)
        b = torch.randn(self.out_features, r)
        if init:
            nn.init.zeros_(a)
            nn.init.normal_(b)
        return a, b

    @property
    def _transposed(self) -> bool:
        return True

    def _update(self, x: torch.Tensor, adapter_name: str, route: Route) -> torch.Tensor:
        a, b = self._factors(adapter_name, route)
        padding_idx = self.get_base_layer().padding_idx
        if a.dim() == 2:
            update = F.embedding(x, a.T, padding_idx=padding_idx) @ b.T
        else:
            rows, hypotheses = self._rows(x, route)
            # One table of K * vocabulary rows; the ids of hypothesis k start at k * vocabulary.
            table = a.transpose(1, 2).reshape(-1, a.shape[1])
            looked_up = F.embedding(rows + (hypotheses * a.shape[2]).unsqueeze(1), table)
            if padding_idx is not None:
                # nn.Embedding gives no gradient to the padding row.
                looked_up = torch.where((rows == padding_idx).unsqueeze(-1), looked_up.detach(), looked_up)
            if route.runs is None:
                update = torch.bmm(looked_up, b[hypotheses].transpose(1, 2))
            else:
                update = torch.cat([looked_up[start:stop, 0] @ b[k].T for k, start, stop in route.runs])
            update = update.view(*x.shape, self.out_features)
        update = update * self.scaling[adapter_name]
        # Some embeddings scale their output (Gemma 3).
        scale = self._get_embed_scale()
        return update if scale is None else update * scale.to(update.dtype)

    @staticmethod
    def _rows(x: torch.Tensor, route: Route) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids as groups (G, ids) of one hypothesis each, and these hypotheses (G,). A packed id is its own group."""
        if route.runs is not None:
            hypotheses, starts, stops = torch.tensor(route.runs).T
            return route.flattened(x.unsqueeze(-1)), hypotheses.repeat_interleave(stops - starts).to(x.device)
        return route.grouped(x).flatten(1), route.group_hypotheses().to(x.device)


def adapt(
    base_layer: nn.Module,
    adapter_name: str,
    routing: Routing,
    module_name: str,
    r: int,
    lora_alpha: float,
    config: MCLoraConfig,
    **kwargs: Any,
) -> MCLoraLinear | MCLoraEmbedding:
    """Wrap `base_layer` in the adapted layer for its type.

    That may be a layer that an adapter of another type has wrapped (an ordinary LoRA adapter, say). Its update is then part
    of `base_layer(x)`, while that adapter is active.

    Raises:
        TypeError: The layer is of a type that cannot be adapted; the message names the module and its class.
    """
    innermost = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
    backend = resolve_quantization_backend(innermost, **kwargs)
    layer_class: type[MCLoraLinear] | type[MCLoraEmbedding]
    if isinstance(innermost, (nn.Linear, Conv1D)) or (backend is not None and backend.layer_type == "linear"):
        layer_class = MCLoraLinear
    elif isinstance(innermost, nn.Embedding):
        for option in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(innermost, option):
                raise TypeError(
                    f"Target module {module_name!r} is an nn.Embedding with `{option}`, which is not supported."
                )
        layer_class = MCLoraEmbedding
    else:
        raise TypeError(
            f"Target module {module_name!r} is a {type(innermost).__name__}, which is not supported. Supported are "
            "nn.Linear, Conv1D (transformers), quantised linear layers and nn.Embedding: change `target_modules` or name "
            "the module in `exclude_modules`."
        )
    return layer_class(base_layer, adapter_name, routing, module_name, r, lora_alpha, config, **kwargs)
