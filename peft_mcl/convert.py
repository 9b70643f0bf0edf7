"""To and from ordinary LoRA adapters, one for each hypothesis."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    PeftType,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import save_file

from peft_mcl.config import MCLoraConfig, check_safetensors
from peft_mcl.layer import MCLoraLayer


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
# mclora_A -> lora_A.weight for linear layers, mclora_embedding_A -> lora_embedding_A for embeddings.
_TO_LORA = (
    (re.compile(r"\bmclora_([AB])$"), r"lora_\1.weight"),
    (re.compile(r"\bmclora_embedding_([AB])$"), r"lora_embedding_\1"),
)
_FROM_LORA = (
    (re.compile(r"\blora_([AB])\.weight$"), r"mclora_\1"),
    (re.compile(r"\blora_embedding_([AB])$"), r"mclora_embedding_\1"),
)


def _rename(key: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str | None:
    """The new name of a parameter of the adapters, or None for one that all hypotheses share."""
    for pattern, replacement in rules:
        if pattern.search(key):
            return pattern.sub(replacement, key)
    return None


def export_hypotheses(model: PeftModel, out_dir: str | os.PathLike[str], adapter_name: str = "default") -> list[Path]:
    """Write every hypothesis as an ordinary PEFT LoRA adapter, for plain PEFT, vLLM, SGLang or LoRAX.

    Args:
        model ([`peft.PeftModel`]): A model with an MCLORA adapter.
        out_dir (`str` or `PathLike`): Hypothesis k goes to `out_dir/hypothesis_k`. These directories appear whole, once
            all of them are written; those that are there are replaced, and kept if writing fails.
        adapter_name (`str`): The adapter to export.

    Returns:
        `list[Path]`: The K directories.

    Raises:
        ValueError: The model has no MCLORA adapter of that name.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, MCLoraConfig):
        raise ValueError(
            f"`model` has no MCLORA adapter named {adapter_name!r}, only {sorted(getattr(model, 'peft_config', {}))}."
        )
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    base_class = type(model.get_base_model())
    lora = LoraConfig(
        **{name: getattr(config, name) for name in SHARED_OPTIONS},
        fan_in_fan_out=any(m.fan_in_fan_out for m in model.modules() if isinstance(m, MCLoraLayer)),
        inference_mode=True,
        # As PEFT writes it: without a task type it tells `AutoPeftModel` the class of the base model.
        auto_mapping=None
        if config.task_type
        else {"base_model_class": base_class.__name__, "parent_library": base_class.__module__},
    )
    root = Path(out_dir)
    root.mkdir(parents=True, exist_ok=True)
    names = [f"hypothesis_{hypothesis}" for hypothesis in range(config.num_hypotheses)]
    staging = Path(tempfile.mkdtemp(dir=root, prefix=".export-"))
    try:
        for hypothesis, name in enumerate(names):
            weights = {}
            for key, tensor in state.items():
                renamed = _rename(key, _TO_LORA)
                weights[renamed or key] = (
                    (tensor[hypothesis] if renamed else tensor).detach().cpu().contiguous().clone()
                )
            lora.save_pretrained(str(staging / name))
            save_file(weights, staging / name / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        # Only now, with all of them written.
        for name in names:
            _replace(root / name, staging / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [root / name for name in names]


def _replace(directory: Path, new: Path) -> None:
    """Move `new` to `directory`. What was there goes to where `new` was, or stays if that fails."""
    old = new.with_name(f"{new.name}.old")
    if directory.exists():
        directory.rename(old)
    try:
        new.rename(directory)
    except BaseException:
        if old.exists():
            old.rename(directory)
        raise


def from_lora_adapters(
    base: Any, adapters: Sequence[str | os.PathLike[str]], adapter_name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """Make one MCLORA model of K ordinary LoRA adapters.

    Args:
        base (`transformers.PreTrainedModel`): The base model, adapted in place.
        adapters (`list` of `str` or `PathLike`): Directories or Hub ids of K plain LoRA adapters of one shape; adapter k
            becomes hypothesis k.
        adapter_name (`str`): Name of the new adapter.
        is_trainable (`bool`): Whether the new adapter is to be trained.

    Returns:
        [`peft.PeftModel`]: A model with K hypotheses.

    Raises:
        ValueError: An adapter is not plain LoRA, or differs from the first in options, parameters or shapes, or in a
            parameter that all hypotheses have to share, or its file is not whole, or the adapters do not fit `base`. The
            base model is then left as it was.
    """
    if isinstance(adapters, (str, os.PathLike)):
        raise ValueError(f"`adapters` must be a list of LoRA adapters, one for each hypothesis, got {adapters!r}.")
    if not adapters:
        raise ValueError("`adapters` is empty: name at least one LoRA adapter.")
    paths = [os.fspath(adapter) for adapter in adapters]
    configs = [LoraConfig.from_pretrained(path) for path in paths]
    for path, config in zip(paths, configs, strict=True):
        _check_plain_lora(path, config)
        _check_same_options(paths[0], configs[0], path, config)
    stacked = _stack(paths, [_load_weights(path) for path in paths])
    mcl = MCLoraConfig(
        num_hypotheses=len(paths),
        inference_mode=not is_trainable,
        **{name: getattr(configs[0], name) for name in SHARED_OPTIONS},
    )
    model = get_peft_model(base, mcl, adapter_name=adapter_name)
    try:
        _check_fit(model, adapter_name, stacked)
    except ValueError:
        model.unload()
        raise
    set_peft_model_state_dict(model, stacked, adapter_name=adapter_name)
    return model


def _check_plain_lora(path: str, config: Any) -> None:
    # AdaLoRA's configuration is a LoraConfig, too.
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise ValueError(f"`adapters`: {path} has a {type(config).__name__}; it is not an ordinary LoRA adapter.")
    used = [name for name in VARIANT_OPTIONS if getattr(config, name, None)]
    if used:
        raise ValueError(f"`adapters`: {path} uses {', '.join(used)}; only plain LoRA can become a hypothesis.")
    if str(config.init_lora_weights).startswith(BASE_CHANGING_INITIALISATIONS):
        raise ValueError(
            f"`adapters`: {path} was initialised by {config.init_lora_weights!r}, which changes the base weights that all "
            "hypotheses share. Convert it to plain LoRA with `path_initial_model_for_weight_conversion` of PEFT's "
            "`save_pretrained`."
        )


def _load_weights(path: str) -> dict[str, torch.Tensor]:
    if Path(path).is_dir():
        safetensors = Path(path, SAFETENSORS_WEIGHTS_NAME)
        if safetensors.is_file():
            check_safetensors(safetensors)
        else:
            # PEFT would fall back to a pickle file.
            raise ValueError(
                f"`adapters`: there is no {SAFETENSORS_WEIGHTS_NAME} in {path}. Save the adapter with `save_pretrained`; other "
                "formats are not read."
            )
    return load_peft_weights(path, device="cpu")


def _check_same_options(first_path: str, first: LoraConfig, path: str, config: LoraConfig) -> None:
    for name in SHARED_OPTIONS:
        # Where an adapter came from, and its dropout (a matter of training), may differ.
        if name in ("base_model_name_or_path", "revision", "lora_dropout"):
            continue
        ours, theirs = getattr(first, name), getattr(config, name)
        if (ours or None) != (theirs or None):
            raise ValueError(
                f"`adapters` must have one shape: `{name}` is {ours!r} in {first_path} and {theirs!r} in {path}."
            )


def _stack(paths: list[str], states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    stacked = {}
    for path, state in zip(paths[1:], states[1:], strict=True):
        if state.keys() != states[0].keys():
            different = sorted(state.keys() ^ states[0].keys())
            raise ValueError(f"`adapters`: {path} and {paths[0]} differ in their parameters, such as {different[0]}.")
    for key, tensor in states[0].items():
        tensors = [state[key] for state in states]
        for path, other in zip(paths, tensors, strict=True):
            if other.shape != tensor.shape:
                raise ValueError(
                    f"`adapters`: {key} has shape {tuple(other.shape)} in {path} and {tuple(tensor.shape)} in {paths[0]}."
                )
        renamed = _rename(key, _FROM_LORA)
        if renamed is None and any(not torch.equal(other, tensor) for other in tensors):
            raise ValueError(
                f"`adapters`: {key} is trained in full and differs between the adapters, but all hypotheses share it."
            )
        stacked[renamed or key] = torch.stack(tensors) if renamed else tensor
    return stacked


def _check_fit(model: PeftModel, adapter_name: str, stacked: dict[str, torch.Tensor]) -> None:
    """Raise a ValueError unless the parameters are those that the adapter of this base model needs."""
    needed = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    # Parameters of the base model, such as resized embeddings, may come along.
    known = {**model.state_dict(), **needed}
    for key in {**needed, **stacked}:
        name = _rename(key, _TO_LORA) or key
        if key not in stacked:
            raise ValueError(f"`adapters` do not fit the base model: they have no {name}.")
        if key not in known:
            raise ValueError(f"`adapters` do not fit the base model: it has no place for {name}.")
        # The first dimension of a stacked parameter is that of the hypotheses.
        theirs, ours = (tuple(shape if name == key else shape[1:]) for shape in (stacked[key].shape, known[key].shape))
        if theirs != ours:
            raise ValueError(f"`adapters` do not fit the base model: {name} has shape {theirs}, and {ours} is needed.")
