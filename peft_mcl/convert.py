"""To and from ordinary LoRA adapters, one for each hypothesis."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    PeftType,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from peft_mcl.config import MCLoraConfig, require_positive_int
from peft_mcl.layer import MCLoraLayer
from peft_mcl.perturbation import add_relative_noise
from peft_mcl.saved import SavedAdapter


# The options that mean the same for MCLoraConfig and LoraConfig.
SHARED_OPTIONS = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "modules_to_save",
    "trainable_token_indices",
)
# Where an adapter came from, and its dropout (a matter of training), may differ between hypotheses.
MAY_DIFFER = ("base_model_name_or_path", "revision", "lora_dropout")
# Options of LoraConfig that change what is computed: an adapter that uses one is not plain LoRA.
VARIANT_OPTIONS = (
    "use_dora",
    "lora_bias",
    "use_bdlora",
    "use_qalora",
    "arrow_config",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
# Initialisations after which PEFT changes the base weights, each time the adapter is loaded.
BASE_CHANGING_INITIALISATIONS = ("pissa", "corda", "olora", "loftq")
# mclora_A -> lora_A.weight for linear layers, mclora_embedding_A -> lora_embedding_A for embeddings. A layer that another
# adapter of the same model wraps has one "base_layer" more in its name.
_TO_LORA = (
    (re.compile(r"(\.base_layer)*\.mclora_([AB])$"), r".lora_\2.weight"),
    (re.compile(r"(\.base_layer)*\.mclora_embedding_([AB])$"), r".lora_embedding_\2"),
)
_FROM_LORA = (
    (re.compile(r"\blora_([AB])\.weight$"), r"mclora_\1"),
    (re.compile(r"\blora_embedding_([AB])$"), r"mclora_embedding_\1"),
)
_SHARED = re.compile(r"\bmclora_shared_(?=(embedding_)?[AB]$)")
_IS_B = re.compile(r"\bmclora_(embedding_)?B$")
_HYPOTHESIS_FOLDER = re.compile(r"hypothesis_(\d+)")
PREFIX = "base_model.model."
MOST_LISTED = 12


def _rename(key: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str | None:
    """The new name of a parameter of the adapters, or None for one that all hypotheses share."""
    for pattern, replacement in rules:
        if pattern.search(key):
            return pattern.sub(replacement, key)
    return None


def refuse(headline: str, problems: Sequence[str]) -> None:
    """Raise a ValueError that lists the problems, if there are any."""
    if problems:
        listed = [f"  - {problem}" for problem in problems[:MOST_LISTED]]
        if len(problems) > MOST_LISTED:
            listed.append(f"  - and {len(problems) - MOST_LISTED} more")
        raise ValueError("\n".join([headline, *listed]))


# --------------------------------------------------------------------------------------------------------------------
# Out


def export_hypotheses(
    model: Any,
    out_dir: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    portable: bool = False,
    token: str | None = None,
) -> list[Path]:
    """Write every hypothesis as an ordinary PEFT LoRA adapter, for plain PEFT, vLLM, SGLang or LoRAX.

    A part that the hypotheses share becomes a part of each: the adapters then have the rank shared_r + r, and an alpha that
    leaves the scale as it is.

    Args:
        model ([`peft.PeftModel`], `transformers.PreTrainedModel`, `str` or `PathLike`): A model with an MCLORA adapter; or a
            saved MCLORA adapter: a folder, or on the Hub `user/name`, `user/name/folder` or `user/name/folder@revision`. The
            base model is not needed for that.
        out_dir (`str` or `PathLike`): Hypothesis k goes to `out_dir/hypothesis_k`. These directories appear whole, once
            all of them are written; those that are there are replaced, those of an earlier export with more hypotheses are
            removed, and all are kept if writing fails. Call it on one process only.
        adapter_name (`str`): The adapter to export, if `model` is a model.
        portable (`bool`): Write adapters for programs that know nothing but `lora_alpha / r` and lists of names: the scale of
            each module is multiplied into its B, smaller ranks (`rank_pattern`) are filled up with zeros, and a regular
            expression becomes the list of the modules. The same function, up to the rounding of B in its dtype.
        token (`str`, *optional*): Token of the Hub, instead of the one that is logged in.

    Returns:
        `list[Path]`: The K directories.

    Raises:
        ValueError: There is no MCLORA adapter (of that name), or its file does not hold K hypotheses.
    """
    if isinstance(model, (str, os.PathLike)):
        config, state = _read_hypotheses(SavedAdapter.find(model, token))
        lora = _lora_config(config, fan_in_fan_out=False, auto_mapping=config.auto_mapping)
    else:
        config, state = _hypotheses_of(model, adapter_name)
        base_class = type(model.get_base_model() if isinstance(model, PeftModel) else model)
        # As PEFT writes it: without a task type it tells `AutoPeftModel` the class of the base model.
        auto_mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
        lora = _lora_config(
            config,
            fan_in_fan_out=any(m.fan_in_fan_out for m in model.modules() if isinstance(m, MCLoraLayer)),
            auto_mapping=None if config.task_type else auto_mapping,
        )
    _check_stacked(config, state)
    if config.shared_r:
        lora, state = _join_shared(lora, state, config.shared_r)
    if portable:
        lora, state = _fold(lora, state)

    root = Path(out_dir)
    root.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=root, prefix=".export-"))
    try:
        for hypothesis in range(config.num_hypotheses):
            folder = staging / f"hypothesis_{hypothesis}"
            lora.save_pretrained(str(folder))
            save_file(_weights_of(state, hypothesis), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        # Only now, with all of them written.
        return _move_in(staging, root)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _hypotheses_of(model: Any, adapter_name: str) -> tuple[MCLoraConfig, dict[str, torch.Tensor]]:
    """The configuration and the stacked parameters of an adapter of a model."""
    configs = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, MCLoraConfig):
        raise ValueError(f"`model` has no MCLORA adapter named {adapter_name!r}, only {sorted(configs)}.")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    # A model that the adapter was put into by transformers' `load_adapter` is no part of a PeftModel.
    return config, {key if key.startswith(PREFIX) else PREFIX + key: tensor for key, tensor in state.items()}


def _read_hypotheses(source: SavedAdapter) -> tuple[MCLoraConfig, dict[str, torch.Tensor]]:
    config = source.read_config()
    if not isinstance(config, MCLoraConfig):
        raise ValueError(f"`model`: {source.name} has a {type(config).__name__}; it is not an MCLORA adapter.")
    return config, source.read_weights()


def _check_stacked(config: MCLoraConfig, state: dict[str, torch.Tensor]) -> None:
    """Raise a ValueError unless there are parameters of K hypotheses and of what they share, and nothing less."""
    num_hypotheses = config.num_hypotheses
    stacked = {key: tuple(tensor.shape) for key, tensor in state.items() if _rename(key, _TO_LORA)}
    problems = [
        f"{key} has the shape {shape}"
        for key, shape in stacked.items()
        if len(shape) != 3 or shape[0] != num_hypotheses or 0 in shape
    ]
    # As DeepSpeed ZeRO-3 and FSDP leave it, for one.
    refuse(
        f"`model`: an adapter of {num_hypotheses} hypotheses has three-dimensional parameters, {num_hypotheses} in the first "
        "one (if the weights are sharded over processes, save the model and export the saved adapter), but",
        problems if stacked else ["there is none"],
    )
    shared = {_SHARED.sub("mclora_", key): tuple(tensor.shape) for key, tensor in state.items() if _SHARED.search(key)}
    wanted = {
        key: (rows, config.shared_r) if _IS_B.search(key) else (config.shared_r, columns)
        for key, (_, rows, columns) in stacked.items()
        if config.shared_r
    }
    refuse(
        f"`model`: the parts that all hypotheses share do not fit `shared_r={config.shared_r}`:",
        [
            f"that of {key} is {shared.get(key, 'missing')}, and has to be {wanted.get(key, 'absent')}"
            for key in sorted({*wanted, *shared})
            if shared.get(key) != wanted.get(key)
        ],
    )


def _lora_config(config: MCLoraConfig, fan_in_fan_out: bool, auto_mapping: dict[str, str] | None) -> LoraConfig:
    options = {name: getattr(config, name) for name in SHARED_OPTIONS}
    return LoraConfig(**options, fan_in_fan_out=fan_in_fan_out, inference_mode=True, auto_mapping=auto_mapping)


def _join_shared(
    lora: LoraConfig, state: dict[str, torch.Tensor], shared_r: int
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The same adapter without a shared part, which becomes the first ranks of every hypothesis."""

    def grown(alpha: float, r: int) -> float:
        # What gives the rank shared_r + r the scale that `alpha` gives the rank r.
        alpha = alpha * math.sqrt((shared_r + r) / r) if lora.use_rslora else alpha * (shared_r + r) / r
        return int(alpha) if alpha == int(alpha) else alpha

    joined = {key: tensor for key, tensor in state.items() if not _SHARED.search(key)}
    for key in state.keys() - joined.keys():
        own = _SHARED.sub("mclora_", key)
        shared = state[key].expand(len(joined[own]), -1, -1)
        joined[own] = torch.cat([shared, joined[own]], dim=2 if _IS_B.search(own) else 1)

    alphas = {pattern: grown(alpha, lora.r) for pattern, alpha in lora.alpha_pattern.items()}
    if lora.rank_pattern:
        # How alpha grows depends on the rank, so each module gets its own.
        ranks = {
            _module_of(key): state[key].shape[1] for key in joined if _rename(key, _TO_LORA) and not _IS_B.search(key)
        }
        alphas = {"^" + re.escape(module): grown(_alpha_of(lora, module), r) for module, r in ranks.items()}
    options = {
        "r": lora.r + shared_r,
        "lora_alpha": grown(lora.lora_alpha, lora.r),
        "rank_pattern": {pattern: r + shared_r for pattern, r in lora.rank_pattern.items()},
        "alpha_pattern": alphas,
    }
    return replace(lora, **options), joined


def _module_of(key: str) -> str:
    """The module of a parameter of the adapters, by its name in the base model."""
    name = _rename(key, _TO_LORA) or key
    # `lora_embedding_A` or `lora_A.weight`, and so for B.
    return re.sub(r"\.lora_.*$", "", name.removeprefix(PREFIX))


def _alpha_of(lora: LoraConfig, module: str) -> float:
    return lora.alpha_pattern.get(get_pattern_key(lora.alpha_pattern.keys(), module), lora.lora_alpha)


def _fold(lora: LoraConfig, state: dict[str, torch.Tensor]) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The same adapter with one rank, and a scale of one, for all modules."""
    modules = {key: _module_of(key) for key in state if _rename(key, _TO_LORA)}
    rank = max(state[key].shape[1] for key in modules if not _IS_B.search(key))
    folded = dict(state)
    for key, module in modules.items():
        tensor = state[key]
        # A is (K, r, in), B is (K, out, r).
        if _IS_B.search(key):
            r = tensor.shape[2]
            scale = _alpha_of(lora, module) / (math.sqrt(r) if lora.use_rslora else r)
            folded[key] = torch.nn.functional.pad((tensor.float() * scale).to(tensor.dtype), (0, rank - r))
        else:
            folded[key] = torch.nn.functional.pad(tensor, (0, 0, 0, rank - tensor.shape[1]))
    targets = sorted(set(modules.values())) if isinstance(lora.target_modules, str) else lora.target_modules
    plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return replace(lora, **plain, target_modules=targets), folded


def _weights_of(state: dict[str, torch.Tensor], hypothesis: int) -> dict[str, torch.Tensor]:
    """The parameters of one hypothesis under the names that LoRA gives them."""
    weights = {}
    for key, tensor in state.items():
        renamed = _rename(key, _TO_LORA)
        # A clone: safetensors refuses tensors that share memory.
        weights[renamed or key] = (tensor[hypothesis] if renamed else tensor).detach().cpu().contiguous().clone()
    return weights


def _move_in(staging: Path, root: Path) -> list[Path]:
    """Move the new directories from `staging` to `root` and those of an earlier export out, or, if that fails, nothing."""
    new = sorted(staging.iterdir(), key=lambda path: int(path.name.rpartition("_")[2]))
    targets = [root / path.name for path in new]
    old = [*targets, *(path for path in root.iterdir() if path not in targets and _is_exported(path))]
    moved: list[tuple[Path, Path]] = []
    try:
        for path in old:
            if path.exists():
                moved.append((path, path.rename(staging / f"{path.name}.old")))
        for path, target in zip(new, targets, strict=True):
            moved.append((path, path.rename(target)))
    except BaseException:
        for origin, place in reversed(moved):
            place.rename(origin)
        raise
    return targets


def _is_exported(path: Path) -> bool:
    """Whether `path` is a directory that an export has written."""
    if not _HYPOTHESIS_FOLDER.fullmatch(path.name):
        return False
    try:
        return json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))["peft_type"] == PeftType.LORA
    except (OSError, ValueError, KeyError, TypeError):
        return False


# --------------------------------------------------------------------------------------------------------------------
# In


def from_lora_adapters(
    base: Any,
    adapters: Sequence[str | os.PathLike[str]],
    adapter_name: str = "default",
    is_trainable: bool = False,
    *,
    autocast_adapter_dtype: bool = True,
    check_base_name: bool = True,
    token: str | None = None,
) -> PeftModel:
    """Make one MCLORA adapter of K ordinary LoRA adapters: adapter k becomes hypothesis k.

    Args:
        base (`transformers.PreTrainedModel` or [`peft.PeftModel`]): The base model, adapted in place; or a model with MCLORA
            adapters, which gets one more, to be activated by `set_adapter`.
        adapters (`list` of `str` or `PathLike`): K plain LoRA adapters of one shape: folders, or on the Hub `user/name`,
            `user/name/folder` or `user/name/folder@revision`.
        adapter_name (`str`): Name of the new adapter.
        is_trainable (`bool`): Whether the new adapter is to be trained.
        autocast_adapter_dtype (`bool`): As in PEFT: adapters on a half-precision base get float32 weights. `False` gives them
            the dtype of the base.
        check_base_name (`bool`): Whether to refuse adapters that name a base model other than `base`, by the last part of
            its name or path.
        token (`str`, *optional*): Token of the Hub, instead of the one that is logged in.

    Returns:
        [`peft.PeftModel`]: A model with K hypotheses. Each computes what PEFT computes with its LoRA adapter, bit by bit.

    Raises:
        ValueError: An adapter is not plain LoRA, or differs from the first in options, parameters or shapes, or in a
            parameter that all hypotheses have to share, or its file is missing, no safetensors or not whole, or the adapters
            do not fit `base`. The message lists what differs, and the base model is left as it was.
    """
    if isinstance(adapters, (str, os.PathLike)):
        raise ValueError(f"`adapters` must be a list of LoRA adapters, one for each hypothesis, got {adapters!r}.")
    if not adapters:
        raise ValueError("`adapters` is empty: name at least one LoRA adapter.")
    sources = [SavedAdapter.find(adapter, token) for adapter in adapters]
    configs = _read_lora_configs(sources)
    states = [source.read_weights() for source in sources]
    problems = _different_options(sources, configs) + _different_weights(sources, states)
    refuse("`adapters` must have one shape to be hypotheses of one model, but", problems)
    stacked = {}
    for key, tensor in states[0].items():
        renamed = _rename(key, _FROM_LORA)
        stacked[renamed or key] = torch.stack([state[key] for state in states]) if renamed else tensor
    return _put_into(
        base,
        _mcl_config(configs[0], len(configs), is_trainable),
        stacked,
        adapter_name,
        autocast_adapter_dtype,
        _other_bases(base, sources, configs) if check_base_name else [],
    )


def split_lora_adapter(
    base: Any,
    adapter: str | os.PathLike[str],
    num_hypotheses: int,
    perturbation: float = 0.1,
    seed: int = 0,
    adapter_name: str = "default",
    is_trainable: bool = True,
    *,
    autocast_adapter_dtype: bool = True,
    check_base_name: bool = True,
    token: str | None = None,
) -> PeftModel:
    """Make K hypotheses of one ordinary LoRA adapter, to train them on: copies that differ a little.

    To every matrix B of hypothesis k is added `perturbation` * rms(B) * N_k with normal noise N_k of variance one: B changes by
    that part of its norm, whatever its scale, and A not at all, so the noise acts in the directions that the adapter has
    learned to read. The noise of the K hypotheses sums to zero: their mean is the LoRA adapter, and none starts ahead of the
    others, which with hard winners would take everything. A matrix B that is all zero (an untrained adapter) stays zero.

    Measured (SmolLM2-135M, float32, an adapter of 100 steps on Bible styles, 40 held-out sequences): 0.1 / 0.3 / 1 cost
    0.000 / 0.001 / 0.008 nats per token, and the scores of a sequence then differ by 0.003 / 0.008 / 0.028 between hypotheses
    (standard deviation, nats per token). A bfloat16 model rounds by about 0.007.

    Without a perturbation the hypotheses score alike, and only the random tie-breaking of the winners tells them apart.

    Args:
        base, adapter_name, is_trainable, autocast_adapter_dtype, check_base_name, token: As for [`from_lora_adapters`].
        adapter (`str` or `PathLike`): The plain LoRA adapter: a folder, or on the Hub `user/name`, `user/name/folder` or
            `user/name/folder@revision`.
        num_hypotheses (`int`): K. With 1 the model is the LoRA adapter, unperturbed.
        perturbation (`float`): Size of the noise relative to B, at least 0.
        seed (`int`): Of the noise, which depends on nothing else.

    Returns:
        [`peft.PeftModel`]: A model with K hypotheses.

    Raises:
        ValueError: As for [`from_lora_adapters`], or an argument is out of its range.
    """
    require_positive_int("num_hypotheses", num_hypotheses)
    if isinstance(perturbation, bool) or not isinstance(perturbation, (int, float)) or not 0 <= perturbation < 1e6:
        raise ValueError(f"`perturbation` must be a number of at least 0, got {perturbation!r}.")
    source = SavedAdapter.find(adapter, token)
    configs = _read_lora_configs([source])
    stacked = {}
    for key, tensor in source.read_weights().items():
        renamed = _rename(key, _FROM_LORA)
        stacked[renamed or key] = torch.stack([tensor] * num_hypotheses) if renamed else tensor
    if num_hypotheses > 1 and perturbation > 0:
        _perturb(stacked, perturbation, torch.Generator().manual_seed(seed))
    return _put_into(
        base,
        _mcl_config(configs[0], num_hypotheses, is_trainable, init_perturbation=perturbation),
        stacked,
        adapter_name,
        autocast_adapter_dtype,
        _other_bases(base, [source], configs) if check_base_name else [],
    )


def _perturb(stacked: dict[str, torch.Tensor], perturbation: float, generator: torch.Generator) -> None:
    """Add noise to the matrices B (K, out, r), in place; see `split_lora_adapter`."""
    for key in sorted(key for key in stacked if _IS_B.search(key)):
        b = stacked[key]
        noise = torch.randn(b.shape, generator=generator)
        noise -= noise.mean(dim=0)
        # Taking the mean out has left a variance of (K - 1) / K.
        noise *= (len(b) / (len(b) - 1)) ** 0.5
        stacked[key] = add_relative_noise(b[0], noise, perturbation)


def _read_lora_configs(sources: Sequence[SavedAdapter]) -> list[Any]:
    """The configurations of adapters that are all plain LoRA."""
    configs, problems = [], []
    for source in sources:
        try:
            configs.append(source.read_config())
            problems += not_plain_lora(source.name, configs[-1])
        except ValueError as error:
            problems.append(str(error))
    refuse("`adapters` must be ordinary LoRA adapters, but", problems)
    return configs


def not_plain_lora(name: str, config: Any) -> list[str]:
    """What makes an adapter something other than plain LoRA."""
    # AdaLoRA's configuration is a LoraConfig, too.
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        return [f"{name} has a {type(config).__name__}; it is not an ordinary LoRA adapter"]
    problems = []
    used = [option for option in VARIANT_OPTIONS if getattr(config, option, None)]
    if used:
        problems.append(f"{name} uses {', '.join(used)}; only plain LoRA can become a hypothesis")
    if str(config.init_lora_weights).startswith(BASE_CHANGING_INITIALISATIONS):
        problems.append(
            f"{name} was initialised by {config.init_lora_weights!r}, which changes the base weights that all hypotheses "
            "share; convert it to plain LoRA with `path_initial_model_for_weight_conversion` of PEFT's `save_pretrained`"
        )
    return problems


def _different_options(sources: Sequence[SavedAdapter], configs: Sequence[LoraConfig]) -> list[str]:
    problems = []
    for source, config in zip(sources[1:], configs[1:], strict=True):
        for option in SHARED_OPTIONS:
            ours, theirs = getattr(configs[0], option), getattr(config, option)
            if option not in MAY_DIFFER and (ours or None) != (theirs or None):
                problems.append(f"`{option}` is {ours!r} in {sources[0].name} and {theirs!r} in {source.name}")
    return problems


def _different_weights(sources: Sequence[SavedAdapter], states: Sequence[dict[str, torch.Tensor]]) -> list[str]:
    problems = []
    first, name = states[0], sources[0].name
    for source, state in zip(sources[1:], states[1:], strict=True):
        problems += [f"{name} has {key}, and {source.name} has not" for key in first if key not in state]
        problems += [f"{source.name} has {key}, and {name} has not" for key in state if key not in first]
        for key, ours in first.items():
            theirs = state.get(key, ours)
            if ours.shape != theirs.shape:
                shapes = tuple(ours.shape), tuple(theirs.shape)
                problems.append(f"{key} has the shape {shapes[0]} in {name} and {shapes[1]} in {source.name}")
            elif _rename(key, _FROM_LORA) is None and not torch.equal(ours, theirs):
                problems.append(
                    f"{key} is trained in full and differs between {name} and {source.name}, but all hypotheses share it"
                )
    return problems


def _other_bases(base: Any, sources: Sequence[SavedAdapter], configs: Sequence[LoraConfig]) -> list[str]:
    """Which adapters were trained on a model of another name than `base`, or, if it has none, than the first adapter."""
    name = getattr(getattr(base, "config", None), "_name_or_path", None)
    reference = f"the base model is {name!r}"
    problems = []
    for source, config in zip(sources, configs, strict=True):
        theirs = config.base_model_name_or_path
        if not theirs:
            continue
        if not name:
            name, reference = theirs, f"{source.name} on {theirs!r}"
        if _short(theirs) != _short(name):
            problems.append(
                f"{source.name} was trained on {theirs!r}, and {reference} (pass `check_base_name=False` if they are the same)"
            )
    return problems


def _short(name: str) -> str:
    """The name of a model without its owner or the folders above it."""
    parts = Path(os.path.abspath(name)).parts
    # A snapshot in the cache of the Hub: .../models--user--name/snapshots/<commit>.
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return (cached or list(parts))[-1].lower()


def _mcl_config(config: LoraConfig, num_hypotheses: int, is_trainable: bool, **others: Any) -> MCLoraConfig:
    options = {**{name: getattr(config, name) for name in SHARED_OPTIONS}, **others}
    return MCLoraConfig(num_hypotheses=num_hypotheses, inference_mode=not is_trainable, **options)


def _put_into(
    base: Any,
    config: MCLoraConfig,
    stacked: dict[str, torch.Tensor],
    adapter_name: str,
    autocast_adapter_dtype: bool,
    problems: list[str],
) -> PeftModel:
    """Give `base` an adapter with these stacked parameters, unless there are problems, known or found here."""
    headline = "`adapters` do not fit the base model:"
    options = {"adapter_name": adapter_name, "autocast_adapter_dtype": autocast_adapter_dtype}
    is_adapted = isinstance(base, PeftModel)
    if is_adapted and adapter_name in base.peft_config:
        raise ValueError(
            f"`adapter_name`: the model has an adapter named {adapter_name!r} already. Choose another name."
        )
    try:
        if is_adapted:
            base.add_adapter(peft_config=config, **options)
            model = base
        else:
            model = get_peft_model(base, config, **options)
    except ValueError as error:
        refuse(headline, [*problems, str(error)])
    problems = problems + _misfits(model, adapter_name, stacked)
    if problems:
        model.delete_adapter(adapter_name) if is_adapted else model.unload()
    refuse(headline, problems)
    set_peft_model_state_dict(model, stacked, adapter_name=adapter_name)
    return model


def _misfits(model: PeftModel, adapter_name: str, stacked: dict[str, torch.Tensor]) -> list[str]:
    """How the parameters differ from those that the adapter of this base model needs."""
    needed = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    # Parameters of the base model, such as resized embeddings, may come along.
    known = {**model.state_dict(), **needed}
    problems = []
    for key in {**needed, **stacked}:
        name = _rename(key, _TO_LORA) or key
        if key not in stacked:
            problems.append(f"they have no {name}")
        elif key not in known:
            problems.append(f"it has no place for {name}")
        else:
            # The first dimension of a stacked parameter is that of the hypotheses.
            stacks = int(name != key)
            theirs, ours = tuple(stacked[key].shape[stacks:]), tuple(known[key].shape[stacks:])
            if theirs != ours:
                problems.append(f"{name} has the shape {theirs}, and {ours} is needed")
    return problems
