"""What is refused when an adapter is loaded: pickles, and tensors that are not those of the hypotheses that were asked for.

PEFT loads what fits and says little of the rest, so a hypothesis could be left as it was drawn at random.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, file_exists, try_to_load_from_cache
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn


# What PeftModel puts before the names of the base model; it is missing where layers were injected into a plain model.
_WRAPPER = "base_model.model."
# Some of these keep themselves out of state dicts, some do not.
_LAYER_WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def refuse_pickle(name: str, subfolder: str | None = None, **hub_options: Any) -> None:
    """Raise a ValueError if the only weights of an adapter are a pickle, which can run any code when it is read.

    Args:
        name (`str`): A local directory or an id on the Hub.
        subfolder (`str`, *optional*): Of the directory or repository.
        **hub_options: `revision`, `token`, `repo_type` and `cache_dir`, as for `huggingface_hub.hf_hub_download`.
    """

    def has(file: str) -> bool:
        path = Path(subfolder or "", file)
        if Path(name).is_dir():
            return Path(name, path).is_file()
        if constants.HF_HUB_OFFLINE:
            options = {key: hub_options.get(key) for key in ("revision", "repo_type", "cache_dir")}
            return isinstance(try_to_load_from_cache(name, path.as_posix(), **options), str)
        options = {key: hub_options.get(key) for key in ("revision", "repo_type", "token")}
        return file_exists(name, path.as_posix(), **options)

    if not has(SAFETENSORS_WEIGHTS_NAME) and has(WEIGHTS_NAME):
        raise ValueError(
            f"The adapter {name!r} has its weights in a pickle ({WEIGHTS_NAME}), which is not read: a pickle can run any code. "
            f"Ask its author for {SAFETENSORS_WEIGHTS_NAME} (`save_pretrained` writes it)."
        )


def check_tensors(
    model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor], prefix: str, base_name: str | None
) -> None:
    """Raise a ValueError unless tensors that are about to be loaded are those of one adapter, all of them, and finite.

    Shapes of tensors that all hypotheses share (`modules_to_save`) are left to PyTorch, which lists those that do not fit, and
    to PEFT's `ignore_mismatched_sizes`.

    Args:
        model (`nn.Module`): With the adapter in place.
        adapter_name (`str`): Its name.
        tensors (`Mapping[str, torch.Tensor]`): By name in the model.
        prefix (`str`): Of the parameters that belong to adapters.
        base_name (`str`, *optional*): The base model that the adapter names, for the message.
    """
    known = {_plain(name): tensor for name, tensor in model.state_dict().items()}
    given = {_plain(name): tensor for name, tensor in tensors.items()}
    wanted = {name for name in known if f".{prefix}" in f".{name}" and name.endswith(f".{adapter_name}")}
    missing, foreign = sorted(wanted - given.keys()), sorted(given.keys() - known)
    there = sorted(wanted & given.keys())
    problems = []
    if missing:
        problems.append(f"it lacks {len(missing)} of {len(wanted)} tensors ({_some(missing)})")
    if foreign:
        problems.append(f"it has {len(foreign)} tensors that have no place in the model ({_some(foreign)})")
    # A tensor that is sharded over processes is empty here.
    misfits = [
        f"{name} is {tuple(given[name].shape)} and has to be {tuple(known[name].shape)}"
        for name in there
        if known[name].numel() and known[name].shape != given[name].shape
    ]
    if misfits:
        problems.append(f"{len(misfits)} of its tensors have other shapes ({_some(misfits)})")
    broken = [found for name in there if (found := _broken(name, given[name]))]
    if broken:
        problems.append(f"it has NaN or infinite weights in {_some(broken)}")
    if problems:
        base = f", {base_name!r}," if base_name else ""
        raise ValueError(
            f"The adapter {adapter_name!r} was not loaded: {'; '.join(problems)}. It is damaged, or was saved from another "
            f"model or with another configuration: load it on the base model that it was made for{base} with the files it was "
            "saved with."
        )


def _plain(name: str) -> str:
    """The name of a parameter without what the model or its layers are wrapped in."""
    return _LAYER_WRAPPERS.sub("", name).removeprefix(_WRAPPER)


def _broken(name: str, tensor: torch.Tensor) -> str | None:
    """The hypotheses of a stacked tensor (K, ...) that are not finite, in words."""
    finite = torch.isfinite(tensor)
    if finite.all():
        return None
    if tensor.dim() == 2:
        return f"{name}, which all hypotheses share"
    hypotheses = (~finite).flatten(1).any(dim=1).nonzero().flatten().tolist()
    return f"hypothesis {', '.join(map(str, hypotheses))} of {name}"


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
