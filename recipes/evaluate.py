"""Measure the hypotheses of an adapter on held-out data: likelihood, how they share it, agreement with a known mode.

```bash
python recipes/evaluate.py --adapter outputs/mcl --dataset_name test.jsonl --mode_column version --baseline outputs/lora
```

A low best-of-K loss alone proves nothing: any balanced split of the data in K parts reaches the loss of one model minus
log K nats for each sequence. So the best, the mean and the mixture stand beside that line, beside a single LoRA
(`--baseline`, trained with `--num_hypotheses 1`), and beside the agreement with the mode label.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from rich.table import Table
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from transformers import PrinterCallback
from trl import ModelConfig, TrlParser, get_quantization_config

from peft_mcl import MCLoraConfig  # also registers the adapter type
from trainer_ext import MCLConfig, MCLTrainer
from trainer_ext.metrics import ScoreWindow


FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class EvaluateArguments:
    """What to measure, and on what."""

    adapter: str = field(metadata={"help": "Directory or Hub id of an MCLORA adapter."})
    dataset_name: str = field(metadata={"help": "A local JSONL, Parquet or CSV file, in a format of TRL."})
    mode_column: str | None = field(default=None, metadata={"help": "Column with the known mode of each sequence."})
    baseline: str | None = field(default=None, metadata={"help": "An adapter with one hypothesis to compare with."})
    max_sequences: int | None = field(default=None, metadata={"help": "Take only the first ones."})
    batch_size: int = field(default=16, metadata={"help": "Sequences scored at once, times K rows."})
    max_length: int = field(default=1024, metadata={"help": "Longest sequence, in tokens."})
    dtype: str = field(default="auto", metadata={"help": "Of the base model: 'auto', 'bfloat16', 'float32'..."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the base model to 4 bits (NF4)."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "With it: quantise its scales, too."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the base model to 8 bits."})
    output: str | None = field(default=None, metadata={"help": "Also write the figures to this JSON file."})


def main(args: EvaluateArguments) -> None:
    disable_progress_bars()
    suffix = Path(args.dataset_name).suffix
    if suffix not in FILE_FORMATS or not Path(args.dataset_name).is_file():
        raise ValueError(f"`dataset_name` must be a {', '.join(FILE_FORMATS)} file, and {args.dataset_name!r} is none.")
    dataset = load_dataset(FILE_FORMATS[suffix], data_files=args.dataset_name, split="train")
    if args.mode_column is not None and args.mode_column not in dataset.column_names:
        raise ValueError(f"`mode_column`: there is no column {args.mode_column!r}, only {dataset.column_names}.")
    if args.max_sequences is not None:
        dataset = dataset.select(range(min(args.max_sequences, len(dataset))))

    window = score(args.adapter, dataset, args)
    figures: dict[str, Any] = {"sequences": len(dataset), **window.summary()}
    if args.baseline:
        baseline = score(args.baseline, dataset, args).summary()["wta_nll"]
        # One model's loss minus log K for each sequence: what splitting the data at will can reach.
        tokens_per_sequence = window.num_tokens.float().mean().item()
        figures["baseline_nll"] = baseline
        figures["log_k_line"] = baseline - math.log(window.scores.shape[1]) / tokens_per_sequence
    if args.mode_column:
        figures["agreement"] = agreement(dataset[args.mode_column], window.winners, window.scores.shape[1])
    show(figures)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def score(adapter: str, dataset: Dataset, args: EvaluateArguments) -> ScoreWindow:
    """Scores of all sequences under all hypotheses of an adapter."""
    model = load_model(adapter, args)
    with tempfile.TemporaryDirectory() as scratch:
        config = MCLConfig(
            output_dir=scratch,
            per_device_eval_batch_size=args.batch_size,
            max_length=args.max_length,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=model.dtype == torch.bfloat16,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        columns = [name for name in dataset.column_names if name == args.mode_column]
        data = dataset.remove_columns(columns)
        trainer = MCLTrainer(model=model, args=config, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        return trainer.score(data)


def load_model(adapter: str, args: EvaluateArguments) -> Any:
    """The hypotheses on their base model, which is quantised as `train_mcl.py` does it if that is asked for."""
    # Refuses what is no adapter with hypotheses, before the base model is loaded.
    MCLoraConfig.from_pretrained(adapter)
    quantisation = ModelConfig(
        dtype="bfloat16" if args.dtype == "auto" else args.dtype,  # What 4-bit layers compute in.
        load_in_4bit=args.load_in_4bit,
        use_bnb_nested_quant=args.use_bnb_nested_quant,
        load_in_8bit=args.load_in_8bit,
    )
    return AutoPeftModelForCausalLM.from_pretrained(
        adapter,
        dtype=args.dtype,
        quantization_config=get_quantization_config(quantisation),
        device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
    ).eval()


def agreement(modes: list[str], winners: torch.Tensor, num_hypotheses: int) -> dict[str, Any]:
    """How well the winning hypothesis tells the mode.

    Args:
        modes (`list[str]`): The known mode of each of N sequences.
        winners (`torch.Tensor`): int64 of shape (N,).
        num_hypotheses (`int`): K.

    Returns:
        `dict`: `purity`, the share of sequences whose mode is the most frequent one of their winner; `nmi`, normalised mutual
        information; `matrix`, sequences by mode and winning hypothesis.
    """
    names = sorted(set(modes))
    # Every hypothesis gets a column, also one that won nothing.
    counts = np.zeros((len(names), num_hypotheses), dtype=int)
    counts[:, np.unique(winners.numpy())] = contingency_matrix(modes, winners.numpy())
    return {
        "purity": float(counts.max(axis=0).sum() / counts.sum()),
        "nmi": float(normalized_mutual_info_score(modes, winners.numpy())),
        "matrix": {name: counts[i].tolist() for i, name in enumerate(names)},
    }


def show(figures: dict[str, Any]) -> None:
    console = Console(markup=False)
    shares = [value for name, value in figures.items() if name.startswith("win_share/")]
    nll = Table(title=f"Nats per token, {figures['sequences']} held-out sequences", title_justify="left")
    nll.add_column("")
    nll.add_column("NLL", justify="right")
    labels = {
        "wta_nll": "best hypothesis of each sequence",
        "mixture_nll": "mixture of the hypotheses",
        "mean_nll": "mean of the hypotheses",
        "worst_nll": "worst hypothesis of each sequence",
        "baseline_nll": "one LoRA",
        "log_k_line": f"one LoRA minus log {len(shares)} per sequence",
    }
    for name, label in labels.items():
        if name in figures:
            nll.add_row(label, f"{figures[name]:.3f}")
    console.print(nll)
    if "agreement" in figures:
        result = figures["agreement"]
        title = f"Winning hypothesis and mode: purity {result['purity']:.3f}, NMI {result['nmi']:.3f}"
        matrix = Table(title=title, title_justify="left")
        matrix.add_column("sequences of mode")
        for hypothesis in range(len(shares)):
            matrix.add_column(f"won by {hypothesis}", justify="right")
        for name, counts in result["matrix"].items():
            matrix.add_row(name, *map(str, counts))
        console.print(matrix)
    console.print("Win shares: " + ", ".join(f"{k}: {share:.2f}" for k, share in enumerate(shares)))


if __name__ == "__main__":
    main(*TrlParser((EvaluateArguments,)).parse_args_and_config())
