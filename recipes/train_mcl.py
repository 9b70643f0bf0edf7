"""Train the hypotheses of a causal language model on a data set of the Hub or a local file.

```bash
accelerate launch recipes/train_mcl.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name train.jsonl \
    --num_hypotheses 3 --lora_r 2 --lora_alpha 4 --lora_target_modules all-linear \
    --shared_r 56 --learning_rate 1e-3 --num_train_epochs 1 \
    --output_dir outputs/mcl
```

With `--init_adapters` training goes on from ordinary LoRA adapters in place of a random start: one, which becomes
`--num_hypotheses` copies that differ a little, or one for each hypothesis.

Every option can stand in a YAML file, `--config file.yaml`; the command line overrides it. The options are those of
`trl.ScriptArguments`, `trl.ModelConfig` (model, quantisation, LoRA) and `trainer_ext.MCLConfig`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from huggingface_hub.constants import ENDPOINT
from peft import PeftModel
from transformers import BitsAndBytesConfig
from trl import ModelConfig, ScriptArguments, TrlParser, get_quantization_config
from trl.trainer.utils import create_model_from_path

from peft_mcl import MCLoraConfig, from_lora_adapters, split_lora_adapter
from trainer_ext import MCLConfig, MCLTrainer, PushFailed


FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class HypothesisArguments:
    """The options that LoRA alone does not have."""

    num_hypotheses: int = field(default=3, metadata={"help": "Number of LoRA hypotheses (K)."})
    shared_r: int = field(
        default=0, metadata={"help": "Rank of a part of the update that all hypotheses share; 0 for none."}
    )
    init_perturbation: float | None = field(
        default=None,
        metadata={
            "help": "Start all hypotheses alike but for noise of this size, relative to their weights: random ones (without the "
            "option each has its own), or those of one init adapter (0.1 without the option)."
        },
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "A local file to evaluate on, where `dataset_name` is a file too."}
    )
    init_adapters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Ordinary LoRA adapters to start from, folders or 'user/name[/folder][@revision]': one, or K. Rank, alpha "
            "and targets are theirs; the LoRA options of this command are not used."
        },
    )


def main(
    script_args: ScriptArguments,
    training_args: MCLConfig,
    model_args: ModelConfig,
    hypothesis_args: HypothesisArguments,
) -> None:
    try:
        run(script_args, training_args, model_args, hypothesis_args)
    except KeyboardInterrupt:
        if training_args.process_index == 0:
            print(
                "\nInterrupted. Run the same command with `--resume_from_checkpoint True` to go on from the last whole "
                f"checkpoint in {training_args.output_dir}, if there is one."
            )
        sys.exit(130)


def run(
    script_args: ScriptArguments,
    training_args: MCLConfig,
    model_args: ModelConfig,
    hypothesis_args: HypothesisArguments,
) -> None:
    # Parse -> build -> train -> save.
    train_dataset, eval_dataset = load_data(script_args, training_args, hypothesis_args)
    model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    training_args.model_init_kwargs = {**model_init_kwargs, **(training_args.model_init_kwargs or {})}

    if hypothesis_args.init_adapters:
        model = {"model": warm_start(model_args, training_args, hypothesis_args)}
        training_args.model_init_kwargs = None
    else:
        model = {
            "model": model_args.model_name_or_path,
            "quantization_config": quantization_config(model_args),
            "peft_config": peft_config(model_args, hypothesis_args),
        }
    trainer = MCLTrainer(args=training_args, train_dataset=train_dataset, eval_dataset=eval_dataset, **model)
    # Kept for all cards, also those of checkpoints.
    trainer.create_model_card(dataset_name=script_args.dataset_name)
    trainer.train(resume_from_checkpoint=resume_argument(training_args.resume_from_checkpoint))
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.accelerator.print(f"The adapter is in {training_args.output_dir}.")
    if eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
        # Now with this evaluation.
        trainer.create_model_card()
    failure = None
    if training_args.push_to_hub:
        try:
            trainer.push_to_hub()
            trainer.accelerator.print(f"Pushed to {ENDPOINT}/{trainer.hub_model_id}.")
        except PushFailed as error:
            # By now everything is on disk.
            failure = str(error)
    # Finish the trackers and leave the process group, together: a process that is left behind can abort another.
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    if failure:
        sys.exit(failure)


def quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """The options of bitsandbytes, from those of TRL."""
    if model_args.load_in_4bit and model_args.dtype == "auto":
        raise ValueError(
            "`dtype='auto'` does not say what 4-bit layers compute in. With `load_in_4bit` give `--dtype bfloat16` (or float32)."
        )
    return get_quantization_config(model_args)


def peft_config(model_args: ModelConfig, hypothesis_args: HypothesisArguments) -> MCLoraConfig:
    """The adapter, from the LoRA options of TRL."""
    for name in ("use_dora", "lora_target_parameters"):
        if getattr(model_args, name):
            raise ValueError(f"`{name}` is not supported: each hypothesis is plain LoRA. Leave the option out.")
    return MCLoraConfig(
        num_hypotheses=hypothesis_args.num_hypotheses,
        shared_r=hypothesis_args.shared_r,
        init_perturbation=hypothesis_args.init_perturbation,
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        use_rslora=model_args.use_rslora,
        target_modules=model_args.lora_target_modules,
        modules_to_save=model_args.lora_modules_to_save,
    )


def warm_start(model_args: ModelConfig, training_args: MCLConfig, hypothesis_args: HypothesisArguments) -> PeftModel:
    """The base model with hypotheses made of ordinary LoRA adapters."""
    adapters, count = hypothesis_args.init_adapters or [], hypothesis_args.num_hypotheses
    perturbation = hypothesis_args.init_perturbation
    if hypothesis_args.shared_r:
        raise ValueError(
            f"`shared_r={hypothesis_args.shared_r}` cannot be used with `init_adapters`: ordinary LoRA adapters have no shared "
            "part. Leave one of them out."
        )
    if len(adapters) not in (1, count):
        raise ValueError(
            f"`init_adapters` names {len(adapters)} adapters: give 1, or one for each of {count} hypotheses."
        )
    if len(adapters) > 1 and perturbation is not None:
        raise ValueError(
            f"`init_perturbation={perturbation}` cannot be used with {len(adapters)} `init_adapters`: each hypothesis starts from "
            "its own. Leave the option out, or name one adapter."
        )
    options = training_args.model_init_kwargs or {}
    # As the trainer loads it, which places it on its device.
    base = create_model_from_path(
        model_args.model_name_or_path,
        **{**options, "quantization_config": quantization_config(model_args), "device_map": None},
    )
    if len(adapters) == 1:
        perturbation = 0.1 if perturbation is None else perturbation
        return split_lora_adapter(base, adapters[0], count, perturbation, seed=training_args.seed)
    return from_lora_adapters(base, adapters, is_trainable=True)


def load_data(
    script_args: ScriptArguments, training_args: MCLConfig, hypothesis_args: HypothesisArguments
) -> tuple[Dataset, Dataset | None]:
    """The training and the evaluation split, of a data set on the Hub, a local folder or a local file."""
    name = script_args.dataset_name
    if not name:
        raise ValueError("`dataset_name` is required: a data set on the Hub, or a local JSONL, Parquet or CSV file.")
    if Path(name).suffix in FILE_FORMATS:
        dataset: Any = DatasetDict(train=load_file(name, script_args.dataset_streaming))
        if hypothesis_args.eval_dataset_name:
            dataset["test"] = load_file(hypothesis_args.eval_dataset_name, script_args.dataset_streaming)
    else:
        dataset = load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    train = split_of(dataset, script_args.dataset_train_split, "dataset_train_split")
    if training_args.eval_strategy == "no" and not hypothesis_args.eval_dataset_name:
        return train, None
    return train, split_of(dataset, script_args.dataset_test_split, "dataset_test_split")


def load_file(path: str, streaming: bool) -> Any:
    if not os.path.isfile(path):
        raise ValueError(f"There is no file {path!r}. Check the path, or name a data set on the Hub.")
    if os.path.getsize(path) == 0:
        raise ValueError(f"The file {path!r} is empty: there is nothing to learn from or to evaluate on.")
    return load_dataset(FILE_FORMATS[Path(path).suffix], data_files=path, split="train", streaming=streaming)


def split_of(dataset: DatasetDict | IterableDatasetDict, split: str, option: str) -> Any:
    if split not in dataset:
        raise ValueError(f"`{option}`: the data set has no split {split!r}, only {sorted(dataset)}.")
    return dataset[split]


def resume_argument(value: Any) -> Any:
    """`--resume_from_checkpoint True` arrives as text."""
    return {"true": True, "false": None}.get(str(value).lower(), value)


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, MCLConfig, ModelConfig, HypothesisArguments))
    main(*parser.parse_args_and_config())
