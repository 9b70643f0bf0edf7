"""Bad input is refused before a model is loaded or a step is lost."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from safetensors import safe_open

from peft_mcl import MCLoraConfig


logger = logging.getLogger(__name__)


# Where torchrun, MPI and Slurm's srun tell how many processes they have started.
_PROCESSES_LAUNCHED = (
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)


def check_model(model: Any, peft_config: PeftConfig | None) -> None:
    """Raise a ValueError unless training will act on an MCLORA model."""
    advice = (
        "Pass `peft_config=MCLoraConfig(num_hypotheses=..., task_type='CAUSAL_LM')`, or a model made by "
        "`get_peft_model(model, MCLoraConfig(...))`."
    )
    if peft_config is not None and not isinstance(peft_config, MCLoraConfig):
        raise ValueError(
            f"`peft_config` must be an MCLoraConfig, got {type(peft_config).__name__}: MCLTrainer trains several hypotheses."
        )
    if isinstance(model, PeftModel):
        active = model.peft_config[model.active_adapter]
        if not isinstance(active, MCLoraConfig):
            raise ValueError(
                f"`model` is a PeftModel with a {type(active).__name__} adapter, not an MCLORA model. {advice}"
            )
    elif peft_config is None:
        raise ValueError(f"`model` is not an MCLORA model and there is no `peft_config`. {advice}")


def check_trainable(model: Any) -> None:
    """Raise a ValueError if no parameter of the model is to be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "`model` has no trainable parameters: its adapter was loaded for inference. Load it with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`."
        )


def check_finite(model: Any) -> None:
    """Raise a ValueError that names the first trainable parameter with a NaN or an infinity."""
    broken = not_finite(model, trainable=True)
    if broken:
        raise ValueError(
            f"`model` has NaN or infinite weights in {len(broken)} of its trainable parameters, the first of which is "
            f"{broken[0]!r}: nothing can be learned from them, and nothing is saved. Load an earlier checkpoint; if training "
            "made them, lower `learning_rate`, set `max_grad_norm`, or use bf16 in place of fp16."
        )


def not_finite(model: Any, trainable: bool) -> list[str]:
    """The names of the parameters, those that are trained or the others, in which this process finds a NaN or an infinity."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad == trainable and not torch.isfinite(_own_part(parameter)).all()
    ]


def _own_part(parameter: Any) -> torch.Tensor:
    """The values of a parameter that this process holds: of sharded weights (FSDP2, ZeRO-3) its part."""
    for name in ("_local_tensor", "ds_tensor"):
        if hasattr(parameter, name):
            return getattr(parameter, name)
    return parameter


def check_saved_adapter(file: Path, model: Any) -> None:
    """Raise a RuntimeError if an adapter file lacks tensors of the active adapter: PEFT leaves out those of wrapped layers.

    Args:
        file (`Path`): What was just saved. If it is not there, the weights were saved in shards.
        model ([`~peft.PeftModel`]): The trained model.
    """
    if not file.is_file():
        return
    ending = f".{model.active_adapter}"
    wanted = sum(".mclora_" in name and name.endswith(ending) for name, _ in model.named_parameters())
    with safe_open(str(file), framework="pt") as saved:
        names = saved.keys()
    found = sum(".mclora_" in name for name in names)
    if found < wanted:
        raise RuntimeError(
            f"PEFT has saved only {found} of {wanted} tensors of the adapter, so it was not put in place. It leaves out layers in "
            "torch's checkpoint wrapper (`fsdp_activation_checkpointing`): use `gradient_checkpointing=True` in its place."
        )


def check_output_dir(output_dir: str | None) -> None:
    """Raise a ValueError unless a file can be written to `output_dir`, which is made if it is missing."""
    path = Path(output_dir or ".")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".writable-"):
            pass
    except OSError as error:
        raise ValueError(
            f"`output_dir` {str(path)!r} cannot be written: {error.strerror or error}. Choose another directory."
        ) from error


def check_dataset(name: str, dataset: Any, args: Any, formatting_func: Callable[..., Any] | None = None) -> None:
    """Raise a ValueError if a data set is missing, is empty, lacks its columns, or has an empty completion."""
    if dataset is None:
        raise ValueError(f"`{name}` is required.")
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return  # SFTTrainer names the types it takes.
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{name}` is empty: there is nothing to train on. Check the file, the split and any filters.")
    if formatting_func is None and not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        _check_columns(name, first, args.dataset_text_field)
    if isinstance(dataset, Dataset) and "completion" in first and "input_ids" not in first:
        for row, completion in enumerate(dataset["completion"]):
            if _is_empty(completion):
                raise ValueError(
                    f"`{name}` has an empty completion in row {row}: there is nothing to learn from it. Remove such rows, for "
                    "instance with `dataset.filter(lambda row: row['completion'])`."
                )


def check_prepared_dataset(name: str, dataset: Any, max_length: int | None) -> None:
    """Raise a ValueError if nothing was left of a data set when it was cut to `max_length`."""
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(
            f"`{name}` has no example left with a token to learn: all of them lost their completion when they were cut to "
            f"`max_length={max_length}`. Raise `max_length` or shorten the prompts."
        )


def _check_columns(name: str, first: dict[str, Any], text_field: str) -> None:
    formats = (("input_ids",), (text_field,), ("messages",), ("conversations",), ("prompt", "completion"))
    if not any(all(column in first for column in columns) for columns in formats):
        wanted = "; ".join(" and ".join(repr(column) for column in columns) for columns in formats)
        raise ValueError(
            f"`{name}` has the columns {sorted(first)}, but training needs one of these sets: {wanted}. Rename your columns "
            "with `dataset.rename_column`, or set `dataset_text_field`."
        )


def _is_empty(completion: Any) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    if isinstance(completion, list):  # Messages of a conversation.
        return not any(_has_content(message) for message in completion)
    return completion is None


def _has_content(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else message
    if isinstance(content, str):
        return bool(content.strip())
    return bool(content) or bool(isinstance(message, dict) and message.get("tool_calls"))


def check_offloading(args: Any) -> None:
    """Raise a ValueError if activations are to be offloaded to the CPU from nowhere else."""
    if args.activation_offloading and torch.accelerator.current_accelerator() is None:
        raise ValueError(
            "`activation_offloading=True` moves activations from an accelerator to the CPU, but there is no accelerator. Set "
            "it to False."
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


def check_first_training(trainer: Any) -> None:
    """Raise a RuntimeError if DeepSpeed has an engine for the model already, which cannot train (again)."""
    if trainer.is_deepspeed_enabled and trainer.model_wrapped is not trainer.model:
        raise RuntimeError(
            "Under DeepSpeed a trainer can train once, and not after it has evaluated: its engine cannot be made anew. Make a "
            "new trainer, with a new model."
        )


def packs_evaluation(args: Any) -> bool:
    """Whether sequences are packed for evaluation, by TRL's rule."""
    return bool(args.packing if args.eval_packing is None else args.eval_packing)


def check_packed_evaluation(args: Any, padding_free: bool, num_processes: int) -> None:
    """Raise a ValueError if sequences that are evaluated twice, to fill up the last batch, could not be told from others."""
    packs = packs_evaluation(args)
    if num_processes == 1 or not (packs or (padding_free and args.pad_to_multiple_of)):
        return
    name, fix = ("eval_packing", "False") if packs else ("pad_to_multiple_of", "None")
    raise ValueError(
        f"Evaluation on {num_processes} processes needs batches whose sequences can be counted, but `{name}` is "
        f"{getattr(args, name) or args.packing!r}. Set it to {fix}."
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
