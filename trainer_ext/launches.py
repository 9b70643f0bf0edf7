"""Launches that would train something else than was asked for are refused: fewer processes, no sharding, parts of sequences."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

# Where torchrun, MPI and Slurm's srun tell how many processes they have started.
_PROCESSES_LAUNCHED = (
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)


def check_launch(world_size: int, num_devices: int) -> None:
    """Raise a RuntimeError if fewer processes run than the user has launched, asked for, or needs.

    Args:
        world_size (`int`): The processes that take part, as transformers has found them.
        num_devices (`int`): The GPUs that this one would use (`TrainingArguments.n_gpu`).
    """
    if num_devices > 1:
        raise RuntimeError(
            f"One process would spread its rows over {num_devices} GPUs (nn.DataParallel), which cannot route them to hypotheses. "
            f"Launch a process for each with `accelerate launch --num_processes {num_devices}` or `torchrun --nproc_per_node "
            f"{num_devices}`, or show it one with CUDA_VISIBLE_DEVICES=0."
        )
    for name in _PROCESSES_LAUNCHED:
        launched = int(os.environ.get(name) or 1)
        if launched > world_size:
            raise RuntimeError(
                f"{launched} processes were launched ({name}={launched}), but they do not know of each other: each would train "
                "alone and overwrite the files of the others. Without accelerators pass `use_cpu=True` (`--use_cpu`); under srun "
                "start one `torchrun` for each machine."
            )
    # What `accelerate launch` leaves behind if it was asked for several processes and starts only one.
    asked_for_several = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if world_size == 1 and asked_for_several and not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        raise RuntimeError(
            "`accelerate launch` was asked for several processes, but it starts only one on CPUs (more need its "
            "`--mpirun_hostfile`). Launch them with `torchrun --nproc_per_node N recipes/train_mcl.py --use_cpu ...`, or ask "
            "for one process."
        )


def check_sharding(accelerator: Any) -> None:
    """Raise a RuntimeError if the model is not sharded although the user has asked for it."""
    for name, kind in (("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP")):
        wanted = os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
        if wanted and accelerator.distributed_type != name:
            raise RuntimeError(
                f"{kind} was asked for, but training would run as {accelerator.distributed_type.value}: accelerate does not "
                f"use {kind} on {accelerator.device.type} devices with this launch. Use a configuration without {kind} (see "
                "recipes/accelerate), or one of DeepSpeed with `use_cpu: true` for several processes on CPUs."
            )


def check_mixed_precision(args: Any) -> None:
    """Raise a ValueError if float16 is asked for on a CPU, where accelerate trains in float32 without a word."""
    if args.mixed_precision == "fp16" and args.device.type == "cpu":
        raise ValueError(
            f"Mixed precision in float16 (`fp16={args.fp16}`, or `--mixed_precision fp16` of accelerate) needs an accelerator, "
            "and this run is on the CPU. Set `bf16=True`, or `fp16=False` for float32."
        )


def wants_deepspeed(deepspeed: Any) -> bool:
    """Whether DeepSpeed was asked for, by `accelerate launch` or by the argument `deepspeed`."""
    return bool(deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def check_deepspeed(deepspeed: Any) -> None:
    """Raise an ImportError if DeepSpeed was asked for and is not installed."""
    if wants_deepspeed(deepspeed) and importlib.util.find_spec("deepspeed") is None:
        raise ImportError("DeepSpeed was asked for, but it is not installed: pip install 'peft-mcl[deepspeed]'")


def check_compiler(args: Any) -> None:
    """Build now what DeepSpeed would build once the model is loaded; a RuntimeError if that fails.

    DeepSpeed compiles its communication between processes on CPUs, and its optimizers for states that are offloaded to the CPU.
    What was built before is found again, and needs no compiler. (A `FusedAdam` on GPUs, which only DeepSpeed's own
    configuration can ask for, is not looked at.)
    """
    if not wants_deepspeed(args.deepspeed):
        return
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__ as compatible

    names = []
    config = args.deepspeed_plugin.deepspeed_config
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        other = next((kind for kind in ("Adagrad", "Lion") if kind.lower() in str(args.optim)), "Adam")
        names.append(f"CPU{other}Builder")
    if get_accelerator().device_name() == "cpu":
        names.append("ShareMemCommBuilder")
    for name in names:
        builder = get_accelerator().create_op_builder(name)
        if builder is None or not compatible.get(builder.NAME, False):
            continue
        _refuse_forgotten_lock(builder.name)
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError) as error:
            raise RuntimeError(
                f"DeepSpeed has to build its extension {builder.NAME!r} on this machine, and that failed: {_cause(error)} "
                "It needs a C++ compiler and ninja: `apt-get install g++` (or set CXX) and `pip install ninja`, both on the PATH."
            ) from error


def _refuse_forgotten_lock(extension: str, minutes: float = 15) -> None:
    """Raise a RuntimeError if a build that was killed left its lock, on which PyTorch would wait for ever without a word."""
    # Imports setuptools, which takes its time.
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob(f"**/{extension}/lock"):
        age = (time.time() - lock.stat().st_mtime) / 60
        if age > minutes:
            raise RuntimeError(
                f"The lock {str(lock)!r} of a build of DeepSpeed is {age:.0f} minutes old: that build was killed, and all later "
                "ones would wait for it. Remove the file if no other process is compiling."
            )
        logger.warning("Waiting for another process that builds %s; if there is none, remove %s.", extension, lock)


def _cause(error: Exception) -> str:
    """The line that tells most in the long message of a failed build."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "not found" in line or "error:" in line.lower()]
    return f"{(telling or lines or [type(error).__name__])[-1][:300]!r}."


def check_parallelism(accelerator: Any) -> None:
    """Raise a ValueError if sequences are split over processes, whose scores would be in parts, or unevenly spread."""
    config = accelerator.parallelism_config
    for name in ("sp", "cp"):
        if config is not None and getattr(config, f"{name}_enabled", False):
            raise ValueError(
                f"Sequence parallelism (`{name}_size={getattr(config, f'{name}_size')}`) is not supported by MCLTrainer: each "
                "process would see a part of a sequence and score the hypotheses on it alone. Set the size to 1."
            )
    if accelerator.num_processes > 1 and not accelerator.even_batches:
        raise ValueError(
            "`accelerator_config={'even_batches': False}` gives processes different numbers of batches, so some would wait for "
            "ever. Leave it at True: sequences that fill up the last batch are not learned from twice."
        )


def check_trained_head(model: Any, accelerator: Any) -> None:
    """Raise a ValueError if FSDP would leave the gradient of the LM head in parts.

    TRL's fused head reads the weight of the head outside of the modules that FSDP watches, so each process would go on with
    the gradient of its own rows.
    """
    if accelerator.distributed_type != "FSDP":
        return
    head = model.get_base_model().get_output_embeddings()
    if head is not None and any(parameter.requires_grad for parameter in head.parameters()):
        raise ValueError(
            "The LM head cannot be trained under FSDP: its gradients would not be added up over the processes. Leave it out of "
            "`modules_to_save` (and the input embeddings, if they are tied to it), or launch with DDP or DeepSpeed."
        )


def check_reviving(after_steps: int, accelerator: Any) -> None:
    """Raise a ValueError if hypotheses are to be re-seeded where their weights cannot be told from others."""
    if after_steps and accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError(
            f"`revive_after_steps={after_steps}` needs parameters that are sharded one by one, and FSDP1 shards them flat. Use "
            "FSDP2 (`fsdp_version: 2`, as in recipes/accelerate/fsdp2.yaml), DDP or DeepSpeed, or set it to 0."
        )


def check_first_training(trainer: Any) -> None:
    """Raise a RuntimeError if DeepSpeed has an engine for the model already, which cannot train (again)."""
    if trainer.is_deepspeed_enabled and trainer.model_wrapped is not trainer.model:
        raise RuntimeError(
            "Under DeepSpeed a trainer can train once, and not after it has evaluated: its engine cannot be made anew. Make a "
            "new trainer, with a new model."
        )


def check_same_processes(checkpoint: Path, saved: int, accelerator: Any) -> None:
    """Raise a ValueError if a checkpoint is from another number of processes and its parts do not fit this one.

    Args:
        checkpoint (`Path`): For the message.
        saved (`int`): The processes that wrote it.
        accelerator: Of the run that would go on.
    """
    running = accelerator.num_processes
    if saved == running:
        return
    if accelerator.distributed_type in ("DEEPSPEED", "FSDP"):
        raise ValueError(
            f"`resume_from_checkpoint`: {str(checkpoint)!r} was written by {saved} processes, each with its own shard of the "
            f"optimizer, but {running} are running. Launch {saved}, or start a new run from its adapter."
        )
    logger.warning(
        "The checkpoint %s was written by %d processes, and %d are running: random states (dropout, say) are not restored, and "
        "the steps are the same only if `per_device_train_batch_size` and `gradient_accumulation_steps` give the same batch.",
        checkpoint,
        saved,
        running,
    )
