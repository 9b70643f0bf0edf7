"""Bad input is refused before a model is loaded or a step is lost."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from safetensors import safe_open

from peft_mcl import MCLoraConfig
from trainer_ext.config import MCLConfig
from trainer_ext.groups import group_id


logger = logging.getLogger(__name__)


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


def check_start(model: Any, peft_config: PeftConfig | None, args: MCLConfig) -> None:
    """Raise a ValueError if the hypotheses cannot be trained as the arguments say; `check_model` comes first."""
    config: Any = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else peft_config
    count = config.num_hypotheses
    if args.together_fraction and count > 1 and config.init_perturbation is None:
        raise ValueError(
            f"`together_fraction={args.together_fraction!r}` trains the mean of the hypotheses, and hypotheses with random "
            "matrices of their own have no meaningful one. Let them start almost alike: `MCLoraConfig(init_perturbation=0.1)`."
        )
    shares = args.target_shares
    if args.objective == "balanced" and not isinstance(shares, str) and len(shares) != count:
        raise ValueError(
            f"`target_shares` has {len(shares)} numbers ({shares}), but there are {count} hypotheses: give one for each."
        )


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


def check_groups(dataset: Any, column: str | None) -> None:
    """Raise a ValueError unless each row of the training data has a group, and some group has several; `check_dataset` comes first."""
    if column is None:
        return
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`group_column={column!r}` needs a `train_dataset` of known length, whose groups can be kept together, not a "
            f"{type(dataset).__name__}. Load it without streaming, or leave the option out."
        )
    if "seq_lengths" in dataset.column_names:
        raise ValueError(
            f"`group_column={column!r}` needs a row for each sequence, but `train_dataset` has packed rows (the column 'seq_lengths'). "
            "Give it without packing."
        )
    if column not in dataset.column_names:
        raise ValueError(
            f"`group_column` is {column!r}, but `train_dataset` has the columns {sorted(dataset.column_names)}. Name the one "
            "whose value the references of a prompt have in common."
        )
    of_images = ("prompt", "completion") if {"image", "images"} & {*dataset.column_names} else ()
    of_text = ("input_ids", "labels", "messages", "conversations")
    if column in (*of_text, "image", "images", *of_images):
        raise ValueError(
            f"`group_column={column!r}` is a column that the sequences themselves are made from. Put what the references of a prompt "
            "have in common into a column of its own, with `dataset.map`."
        )
    seen: set[int] = set()
    for row, value in enumerate(dataset[column]):
        if value is None:
            raise ValueError(
                f"`group_column={column!r}` is null in row {row} of `train_dataset`. Give every row the value of its prompt, or "
                "remove the row."
            )
        seen.add(group_id(value))
    if len(seen) == len(dataset):
        raise ValueError(
            f"`group_column={column!r}` has another value in each row of `train_dataset`, so there is nothing to match. Name the "
            "column whose value the references of a prompt have in common, or leave the option out."
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
