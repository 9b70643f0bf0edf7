"""Weights and optimizer states that are changed between two steps of training, wherever they are.

A parameter may be a tensor (one process, DDP), a shard of one (FSDP2), or a view of DeepSpeed's own buffers, whose optimizer
holds the values that count; what the model computes with is a copy of them then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


Change = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def rewrite(parameter: torch.Tensor, optimizer: Any, weights: Change, states: Change) -> None:
    """Put `weights(w)` in the place of a parameter w, and `states(s)` in the place of each of its optimizer states s.

    All processes call it between two optimizer steps, with functions that give the same on each of them. Whole tensors go into
    and come out of these functions, of one shape, dtype and device. States are floating-point tensors of the shape of w, or of
    that shape without the last dimension or the one before it (Adafactor). Others are left alone: the number of steps, 8-bit
    states.

    Args:
        parameter (`torch.nn.Parameter`): Trained, of the model that was prepared for training.
        optimizer: The optimizer of the trainer, as accelerate has wrapped it.
        weights, states: From a tensor to one like it. They may change the one that they are given.
    """
    if hasattr(parameter, "ds_id"):
        _rewrite_zero3(parameter, _states_of_deepspeed(optimizer), weights, states)
    elif hasattr(parameter, "_hp_mapping"):
        _rewrite_zero(parameter, _states_of_deepspeed(optimizer), weights, states)
    else:
        _rewrite_tensor(parameter, weights)
        for state in optimizer.state.get(parameter, {}).values():
            if _is_like(state, parameter):
                _rewrite_tensor(state, states)


def _is_like(state: Any, parameter: torch.Tensor) -> bool:
    if type(state) not in (torch.Tensor, torch.nn.Parameter, DTensor) or not state.is_floating_point():
        return False
    shape = parameter.shape
    # Adafactor keeps the means over the last dimension, and over the one before it.
    is_factor = len(shape) > 2 and state.shape in (shape[:-1], shape[:-2] + shape[-1:])
    return state.shape == shape or is_factor


def _rewrite_tensor(tensor: torch.Tensor, change: Change) -> None:
    if not isinstance(tensor, DTensor):
        tensor.copy_(change(tensor.detach().clone()))
        return
    mesh = tensor.device_mesh
    # Shards that are offloaded to the CPU are put together where the processes talk to each other.
    gathered: Any = tensor.detach().to(mesh.device_type)
    # Each process has all of it: nothing needs to be sent.
    changed = distribute_tensor(change(gathered.full_tensor()), mesh, tensor.placements, src_data_rank=None)
    tensor.to_local().copy_(changed.to_local())


def _states_of_deepspeed(optimizer: Any) -> list[str]:
    """The names of the states that have the shape of the weights; the same on each process, which holds a part of them."""
    sharded = optimizer.optimizer
    found = sharded.optimizer.state.items()
    # Otherwise DeepSpeed finds the states of a resumed run only after its first step, and those of a new run never.
    if any(found) and hasattr(sharded, "_lazy_init_hp_params_optimizer_state"):
        sharded._lazy_init_hp_params_optimizer_state()
    return sorted({name for flat, own in found for name, state in own.items() if _is_like(state, flat)})


def _rewrite_zero(parameter: Any, names: list[str], weights: Change, states: Change) -> None:
    """ZeRO-1 and 2, and the optimizer for bfloat16: the model has all weights, the optimizer of each process a part."""
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    changed = weights(safe_get_full_fp32_param(parameter))
    safe_set_full_fp32_param(parameter, changed)
    # Which leaves what the model computes with as it was.
    parameter.copy_(changed)
    for name in names:
        safe_set_full_optimizer_state(parameter, states(safe_get_full_optimizer_state(parameter, name)), name)


def _rewrite_zero3(parameter: Any, names: list[str], weights: Change, states: Change) -> None:
    """ZeRO-3: both the model and the optimizer of each process have a part."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    changed = weights(safe_get_full_fp32_param(parameter))
    safe_set_local_fp32_param(parameter, _own_part(parameter, changed))
    with GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(changed)
    for name in names:
        state = states(safe_get_full_optimizer_state(parameter, name))
        safe_set_local_optimizer_state(parameter, _own_part(parameter, state), name)


def _own_part(parameter: Any, whole: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds, filled up: DeepSpeed's own function for whole tensors forgets to."""
    import deepspeed.comm

    size = parameter.ds_tensor.numel()
    first = size * deepspeed.comm.get_rank(group=parameter.ds_process_group)
    part = whole.flatten()[first : first + size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))
