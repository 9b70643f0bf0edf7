"""The tuner: injects the adapted layers, decides rows and routing of every call, merges one hypothesis."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.other import get_pattern_key
from torch import nn

from peft_mcl import generation, ranking, routing
from peft_mcl.card import hub_id
from peft_mcl.config import MCLoraConfig, check_weights
from peft_mcl.layer import MCLoraLayer, adapt
from peft_mcl.loading import check_tensors
from peft_mcl.routing import Route, Routing, check_hypothesis
from peft_mcl.sharing import RunOnce, modules_before_adapters, stop_running_once


class MCLoraModel(BaseTuner):
    """K LoRA hypotheses on one frozen model (LoRA-MCL, arXiv 2507.10419).

    Made by `peft.get_peft_model(model, MCLoraConfig(...))`. The forward call takes one more argument:

    ```python
    model(**inputs)                                   # B rows, under the active hypothesis (0 until set)
    model(**inputs, hypotheses=2)                     # B rows, hypothesis 2
    model(**inputs, hypotheses=torch.tensor([0, 2]))  # B rows, one hypothesis for each row
    model(**inputs, hypotheses="all")                 # K * B rows: row k * B + b is hypothesis k of input b
    model(**inputs, hypotheses="mean")                # B rows, under the mean of all A and the mean of all B: see below
    ```

    Under `"mean"` all hypotheses train as one, at the price of one: whatever the K, they get equal gradients, whose norm together
    is that of the mean's. Hypotheses that start alike (`init_perturbation`) then move as one plain LoRA adapter does.

    Rows and routing are decided in one place, a forward pre-hook on the base model, because every path ends there: the
    calls of `PeftModel` with and without a task type, each step of `generate`, and calls of the base model itself.

    Args:
        model (`nn.Module`): The model to adapt, in place.
        peft_config ([`MCLoraConfig`] or `dict[str, MCLoraConfig]`): The configuration.
        adapter_name (`str`): Name of the adapter.
        low_cpu_mem_usage (`bool`): Create the adapter on the meta device (for loading).
        state_dict (`dict[str, torch.Tensor]`, *optional*): Inject by the keys of a saved adapter.
    """

    prefix = "mclora_"
    tuner_layer_cls = MCLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    peft_config: dict[str, MCLoraConfig]

    # ------------------------------------------------------------------------------------------------------------
    # Hypotheses

    @property
    def num_hypotheses(self) -> int:
        """K of the active adapter (1 if none is active: the base model is the only answer)."""
        name = self._adapter_that_counts
        return 1 if name is None else self.peft_config[name].num_hypotheses

    @property
    def hypothesis_weights(self) -> list[float]:
        """The K weights of the active adapter in rankings, of sum 1: its `hypothesis_weights`, or all alike if it has none."""
        count, name = self.num_hypotheses, self._adapter_that_counts
        weights = None if name is None else self.peft_config[name].hypothesis_weights
        return [1 / count] * count if weights is None else check_weights("hypothesis_weights", weights, count)

    @property
    def _adapter_that_counts(self) -> str | None:
        """The first active adapter with hypotheses."""
        # Asked of the layers: `inject_adapter_in_model` and transformers' `set_adapter` tell nobody else what is active.
        for module in self.model.modules():
            if isinstance(module, MCLoraLayer):
                for name in module.active_adapters:
                    if name in module.num_hypotheses:
                        return name
        return None

    @property
    def is_merged(self) -> bool:
        """Whether a hypothesis is merged into the base weights."""
        return any(isinstance(module, MCLoraLayer) and module.merged for module in self.model.modules())

    @property
    def active_hypothesis(self) -> int:
        """The hypothesis that plain calls use."""
        return self.routing.active

    def set_hypothesis(self, hypothesis: int) -> None:
        """Make `hypothesis` the one that plain calls use.

        Args:
            hypothesis (`int`): Index in [0, K - 1].

        Raises:
            ValueError: There is no such hypothesis.
        """
        self.routing.active = check_hypothesis(hypothesis, self.num_hypotheses)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT. Adapters that are active together must have the same number of hypotheses."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        counts = {name: self.peft_config[name].num_hypotheses for name in names if name in self.peft_config}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"Adapters that are active together must have the same `num_hypotheses`, got {counts}. Activate one of them."
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._keep_active_hypothesis_valid()

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT."""
        super().delete_adapter(adapter_name)
        self._share_frozen_modules(self.model)
        self._keep_active_hypothesis_valid()

    def _keep_active_hypothesis_valid(self) -> None:
        if self.routing.active >= self.num_hypotheses:
            warnings.warn(
                f"The active adapter has {self.num_hypotheses} hypotheses, so hypothesis {self.routing.active} is no longer "
                "there. Plain calls use hypothesis 0 until `set_hypothesis` is called.",
                stacklevel=3,
            )
            self.routing.active = 0

    # ------------------------------------------------------------------------------------------------------------
    # Calls

    def forward(self, *args: Any, hypotheses: Any = None, **kwargs: Any) -> Any:
        """Run the base model under the given hypotheses (see the class), or under the active one.

        Raises:
            ValueError: `hypotheses` is of a wrong type, dtype, length or out of range.
        """
        # A plain call is explicit about the active hypothesis, so that a call made while another one runs (in a logits
        # processor, say) does not inherit the rows of that one.
        hypotheses = self.routing.active if hypotheses is None else hypotheses
        with self.routing.restored():
            return self.model(*args, hypotheses=hypotheses, **kwargs)

    def generate(self, *args: Any, rank: str | None = None, **kwargs: Any) -> Any:
        """Decode one sequence for each hypothesis. See [`peft_mcl.generation.generate`].

        With `rank` (`"likelihood"`, `"mixture"` or `"consensus"`) those of each input come best first. See
        [`peft_mcl.ranking.generate_ranked`].
        """
        if rank is None:
            return generation.generate(self, *args, **kwargs)
        return ranking.generate_ranked(self, *args, rank=rank, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PeftModel enters this around each of its calls.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "`adapter_names` is not supported by MCLORA. Use `hypotheses=` with one index for each row; to change "
                "between named adapters call `set_adapter`."
            )
        # None: what a call of `PeftModel` does inside another one, or inside `generate`, is not part of that one.
        with self.routing.use(None):
            yield

    def _enter_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the base model: takes `hypotheses` out, expands the rows, puts the route on the stack."""
        route = self.routing.offered or Route(hypothesis=self.routing.active)
        # Put on before anything can fail: the hook that leaves the call always takes one off.
        self.routing.stack.append((route, True))
        kwargs = dict(kwargs)
        hypotheses = kwargs.pop("hypotheses", None)
        if hypotheses is not None:
            names = routing.name_inputs(type(model).forward, (model, *args))[1:]
            inputs = {**dict(zip(names, args, strict=True)), **kwargs}
            batch_size = routing.find_batch_size(inputs)
            packed_ends = inputs.get("cu_seq_lens_q") if batch_size == 1 else None
            route = routing.parse_hypotheses(hypotheses, self.num_hypotheses, batch_size, packed_ends)
            if route.blocks is not None and batch_size is not None:
                inputs = routing.expand_inputs(inputs, route.blocks, batch_size)
                route = replace(route, run_once=not self._records_layers(inputs))
                args = tuple(inputs.pop(name) for name in names)
                kwargs = inputs
            self.routing.stack[-1] = (route, True)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            routing.keep_routes_in_checkpoints(model, self.routing)
        return args, kwargs

    def _records_layers(self, inputs: dict[str, Any]) -> bool:
        """Whether the call returns what is inside of the layers, which all have to see all rows then."""
        names = ("output_hidden_states", "output_attentions", "output_router_logits")
        config = getattr(self.model, "config", None)
        text_config = getattr(config, "get_text_config", lambda: None)()
        given = {name: inputs.get(name) for name in names}
        return any(getattr(text_config, name, False) if value is None else value for name, value in given.items())

    def _leave_call(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the base model, run also when its forward raised."""
        if self.routing.stack:
            self.routing.stack.pop()

    # ------------------------------------------------------------------------------------------------------------
    # Injection

    def _pre_injection_hook(self, model: nn.Module, config: MCLoraConfig, adapter_name: str) -> None:
        # A model that was adapted before (`inject_adapter_in_model` called twice) keeps its routing and its hooks.
        found = [module.routing for module in model.modules() if isinstance(module, MCLoraLayer)]
        self.routing = found[0] if found else Routing()
        if not found:
            self._attach(model)
        self._warn_of_another_base(model, config)

    def _warn_of_another_base(self, model: nn.Module, config: MCLoraConfig) -> None:
        """Told by Hub ids alone: the same model may lie in folders of many names."""
        theirs, ours = (hub_id(name) for name in (config.base_model_name_or_path, getattr(model, "name_or_path", None)))
        if theirs and ours and theirs != ours:
            warnings.warn(
                f"The adapter was made for {theirs} (`base_model_name_or_path` of its configuration), and is put on {ours}. "
                "If that is not a copy of the same model, its answers mean nothing.",
                stacklevel=2,
            )

    def _attach(self, model: nn.Module) -> None:
        self._hooks = [
            model.register_forward_pre_hook(self._enter_call, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._leave_call, always_call=True),
        ]
        # `PeftModel.generate` without a task type calls the base model's `generate`, and no hook of transformers comes
        # before its inputs are checked. So this one instance, not its class, gets ours; `_detach` takes it off.
        if hasattr(model, "generate"):
            model.__dict__["generate"] = self.generate

    def _share_frozen_modules(self, model: nn.Module) -> None:
        # The adapted layers have changed, so those before them may have, too.
        stop_running_once(model)
        for module in modules_before_adapters(model, _has_adapters):
            RunOnce(module, self.routing)

    def _detach(self, model: nn.Module) -> None:
        for hook in getattr(self, "_hooks", []):
            hook.remove()
        stop_running_once(model)
        model.__dict__.pop("generate", None)
        routing.restore_checkpoints(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; if it fails on a fresh model, the model is left as it was."""
        was_adapted = any(isinstance(module, MCLoraLayer) for module in model.modules())
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._share_frozen_modules(model)
        except Exception:
            if not was_adapted:
                self._unload_and_optionally_merge(merge=False)
            raise

    def _prepare_model(self, peft_config: MCLoraConfig, model: nn.Module) -> None:
        # Some 4-bit layers repack their weight at the first eval-mode call without a gradient, in place and for good, for a
        # CPU kernel without autograd: one scoring or generate call, and every later gradient is silently wrong. All of them
        # are kept from it, those without an adapter too, as gradients go through them.
        for name, module in model.named_modules():
            if getattr(module, "support_avx512bf16_for_cpu", False):
                _keep_bitsandbytes_from_repacking(module)
            if hasattr(module, "linear_mode") and hasattr(module, "qweight"):
                _keep_gptqmodel_from_repacking(module, name, peft_config.inference_mode)

    def _create_and_replace(
        self,
        config: MCLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), current_key), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), current_key), config.lora_alpha)
        if isinstance(target, MCLoraLayer):
            target.update_layer(adapter_name, r, alpha, config)
            return
        quantization = get_quantization_kwargs(self.model)
        layer = adapt(target, adapter_name, self.routing, current_key, r, alpha, config, **quantization)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, MCLoraLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # A base layer that comes back is whole. PEFT would give it its `weight`, which layers of GPTQ and HQQ lack.
            setattr(parent, child_name, new_module)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MCLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As in PEFT, which calls it before it loads an adapter's tensors; those of other models are refused."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_tensors(model, adapter_name, remapped, cls.prefix, config.base_model_name_or_path)
        return remapped

    # ------------------------------------------------------------------------------------------------------------
    # Merging

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, hypothesis: int | None = None
    ) -> None:
        """Add one hypothesis to the base weights; it becomes the active one, and the only one until `unmerge_adapter`.

        Args:
            adapter_names (`list[str]`, *optional*): The adapters to merge; the active ones by default.
            safe_merge (`bool`): Check first that all merged weights are finite; if not, nothing is merged.
            hypothesis (`int`, *optional*): Which one; the active hypothesis by default.

        Merging into a quantised base is lossy, and warned about: merge into one in bfloat16 or float32.

        Raises:
            ValueError: There is no such hypothesis, another one is merged, `safe_merge` found weights not finite, or the
                base is quantised in a way that allows no merging (GPTQ, AWQ and others).
        """
        hypothesis = self._prepare_merge(hypothesis, adapter_names, safe_merge)
        with self.routing.use(Route(hypothesis=hypothesis)):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=False)
        self.routing.active = hypothesis

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        hypothesis: int | None = None,
    ) -> nn.Module:
        """Add one hypothesis to the base weights and return the plain transformers model; the others are dropped.

        Args:
            progressbar (`bool`): Show a progress bar.
            safe_merge (`bool`): Check first that all merged weights are finite; if not, nothing is merged.
            adapter_names (`list[str]`, *optional*): The adapters to merge; the active ones by default.
            hypothesis (`int`, *optional*): Which one; the active hypothesis by default.

        Raises:
            ValueError: As for `merge_adapter`.
        """
        hypothesis = self._prepare_merge(hypothesis, adapter_names, safe_merge)
        with self.routing.use(Route(hypothesis=hypothesis)):
            return super().merge_and_unload(progressbar=progressbar, safe_merge=False, adapter_names=adapter_names)

    def _prepare_merge(self, hypothesis: int | None, adapter_names: list[str] | None, safe_merge: bool) -> int:
        counts = [self.peft_config[name].num_hypotheses for name in adapter_names or () if name in self.peft_config]
        hypothesis = self.routing.active if hypothesis is None else hypothesis
        hypothesis = check_hypothesis(hypothesis, min([*counts, self.num_hypotheses]))
        layers = [module for module in self.model.modules() if isinstance(module, MCLoraLayer)]
        merged = {index for layer in layers for index in layer.merged_hypothesis.values()}
        if merged - {hypothesis}:
            raise ValueError(
                f"Hypothesis {merged.pop()} is merged already, so hypothesis {hypothesis} cannot be. Call "
                "`unmerge_adapter()` first."
            )
        _check_merge_into_quantised(layers, hypothesis)
        if safe_merge:
            with self.routing.use(Route(hypothesis=hypothesis)):
                for layer in layers:
                    layer.check_merge(adapter_names)
        return hypothesis

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self._detach(model)
        return model


def _keep_bitsandbytes_from_repacking(module: Any) -> None:
    # On CPUs with AVX512-BF16.
    module.__dict__["support_avx512bf16_for_cpu"] = False
    state = getattr(module.weight, "quant_state", None)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        # The base model was called before. bitsandbytes turns the weight back in order to save it, but not (0.50.2) the scales
        # of a weight without double quantisation.
        module.state_dict()
        if state.absmax.dim() == 2:
            state.absmax = state.absmax.T.reshape(-1).float()


def _keep_gptqmodel_from_repacking(module: Any, name: str, for_inference: bool) -> None:
    if module.linear_mode is None:
        module.linear_mode = "train"  # What its first call in training mode would set, also for good.
    elif "train" not in str(module.linear_mode).lower() and not for_inference:
        raise ValueError(
            f"The quantised layer {name!r} ({type(module).__name__}) was called before it got an adapter and has turned its "
            "weight into a form without gradients. Load the base model again, and add the adapter before the first call."
        )


def _check_merge_into_quantised(layers: list[MCLoraLayer], hypothesis: int) -> None:
    """Warn that merging into quantised weights is lossy; raise a ValueError if it is not possible."""
    remedy = (
        "Load the base model without `quantization_config`, in bfloat16 or float32, the adapter on it with "
        "`PeftModel.from_pretrained`, and merge there."
    )
    for layer in layers:
        if not layer.can_be_merged:
            raise ValueError(
                f"Hypothesis {hypothesis} cannot be merged into the quantised layer {layer.module_name!r} "
                f"({type(layer.get_base_layer()).__name__}). {remedy}"
            )
    kinds = {layer.quantization_backend.backend_name for layer in layers if layer.quantization_backend is not None}
    if kinds:
        warnings.warn(
            f"Merging hypothesis {hypothesis} into a quantised base model ({', '.join(sorted(kinds))}) is lossy: the merged "
            f"weights are rounded to the same few bits, and `unmerge_adapter` does not undo that. {remedy}",
            stacklevel=4,
        )


def _has_adapters(module: nn.Module) -> bool:
    # A layer whose last adapter was deleted stays where it is, without any.
    return isinstance(module, MCLoraLayer) and bool(module.r)
