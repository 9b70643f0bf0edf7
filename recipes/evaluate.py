"""Measure what hypotheses have become, and what they are worth beside honest baselines.

```bash
python recipes/evaluate.py --adapter outputs/mcl --dataset_name test.jsonl --mode_column version --baseline outputs/lora
python recipes/evaluate.py --adapter outputs/mcl --dataset_name test.jsonl --mode_column version --output_dir outputs/evidence \
    --contenders lora=outputs/lora seeds=outputs/lora0,outputs/lora1,outputs/lora2 base --decoders beam diverse_beam nucleus
```

The first form scores held-out data: a low best-of-K loss alone proves nothing, since any balanced split of the data in K parts reaches
the loss of one model minus log K nats for each sequence. So the best, the mean and the mixture stand beside that line, beside a single
LoRA (`--baseline`, trained with `--num_hypotheses 1`), and beside the agreement with the mode label.

The second form also decodes the prompts with all contenders (`recipes/evaluation`), and writes `evaluation.json`, `.md` and `.png`:
quality and diversity of K outputs at equal numbers of sequences and beams, how good one chosen output is, what each hypothesis wins.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from trl import TrlParser


# Run by path, Python looks for `recipes` beside this file.
sys.path.insert(0, str(Path(__file__).parents[1]))

from recipes.evaluation import tables
from recipes.evaluation.baselines import train_baselines
from recipes.evaluation.contenders import contender, parse_contenders
from recipes.evaluation.decoders import DECODERS
from recipes.evaluation.results import evaluate
from recipes.evaluation.rows import read_rows
from recipes.evaluation.runs import score_rows
from recipes.evaluation.settings import Settings
from recipes.files import write_whole
from recipes.generate import load_model
from trainer_ext.evaluation import QUALITY_METRICS, agreement
from trainer_ext.metrics import ScoreWindow


@dataclass
class EvaluateArguments:
    """What to measure, and on what."""

    adapter: str = field(metadata={"help": "Directory or Hub id of an MCLORA adapter."})
    dataset_name: str = field(metadata={"help": "A local JSONL, Parquet or CSV file, in a format of TRL."})
    mode_column: str | None = field(default=None, metadata={"help": "Column with the known mode of each sequence."})
    baseline: str | None = field(default=None, metadata={"help": "An adapter with one hypothesis to compare with."})
    max_sequences: int | None = field(default=None, metadata={"help": "Take only the first ones."})
    batch_size: int = field(
        default=16, metadata={"help": "Sequences scored, or prompts decoded, at once, times K rows."}
    )
    max_length: int = field(default=1024, metadata={"help": "Longest sequence, in tokens."})
    dtype: str = field(default="auto", metadata={"help": "Of the base model: 'auto', 'bfloat16', 'float32'..."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the base model to 4 bits (NF4)."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "With it: quantise its scales, too."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the base model to 8 bits."})
    output: str | None = field(
        default=None, metadata={"help": "Without `output_dir`: write the figures to this JSON file."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Decode, too; for results and for outputs, which are not decoded again."}
    )
    contenders: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What to compare with, beside `adapter` (named mcl) and `baseline`: NAME=PATH (MCLORA or LoRA), "
            "NAME=PATH,PATH (LoRAs side by side), base. A name given again, mcl too, is another seed of it."
        },
    )
    train_baselines: str | None = field(
        default=None,
        metadata={"help": "The YAML file that `adapter` was trained with: train and compare with the usual baselines."},
    )
    train_dataset_name: str | None = field(
        default=None, metadata={"help": "For it: training data, if not in the file."}
    )
    decoders: list[str] = field(
        default_factory=lambda: list(DECODERS), metadata={"help": f"Of single models: {', '.join(DECODERS)}."}
    )
    num_outputs: int | None = field(default=None, metadata={"help": "Outputs of single models; as many as hypotheses."})
    num_beams: int = field(default=1, metadata={"help": "Beams of each hypothesis; single models get K times as many."})
    max_prompts: int | None = field(default=None, metadata={"help": "Decode only the first ones."})
    append: str = field(default="", metadata={"help": "Text to put after each prompt, such as '\\n'."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest output, in tokens."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1: repeat less."})
    top_k: int = field(default=40, metadata={"help": "Of top_k."})
    top_p: float = field(default=0.9, metadata={"help": "Of nucleus."})
    typical_p: float = field(default=0.9, metadata={"help": "Of typical."})
    temperature: float = field(default=0.7, metadata={"help": "Of temperature."})
    diversity_penalty: float = field(default=0.5, metadata={"help": "Of diverse_beam, in nats."})
    seed: int = field(default=0, metadata={"help": "Of sampling and bootstrap; the n-th seed of a contender adds n."})
    metrics: list[str] = field(
        default_factory=lambda: list(Settings.metrics),
        metadata={"help": f"Of {', '.join(QUALITY_METRICS)}; the first one judges choices and is drawn."},
    )
    resamples: int = field(default=2000, metadata={"help": "Of the bootstrap."})
    embedding_model: str | None = field(
        default=None, metadata={"help": "A sentence-transformers model or folder: measure semantic diversity."}
    )


def main(args: EvaluateArguments) -> None:
    disable_progress_bars()
    dataset = read_rows(args.dataset_name, args.mode_column, args.max_sequences)
    if args.output_dir is None:
        needing = [name for name in ("contenders", "train_baselines") if getattr(args, name)]
        if needing:
            raise ValueError(f"`{needing[0]}` needs `output_dir`, where outputs and results go: give `--output_dir`.")
        likelihood(args, dataset)
        return
    names = {one.name for one in fields(Settings)} & {one.name for one in fields(EvaluateArguments)}
    given = {name: getattr(args, name) for name in names}
    lists = {"output_dir": Path(args.output_dir), "decoders": tuple(args.decoders), "metrics": tuple(args.metrics)}
    settings = Settings(**{**given, **lists})
    contenders = [contender("mcl", [args.adapter])]
    contenders += [contender("baseline", [args.baseline])] if args.baseline else []
    contenders += parse_contenders(args.contenders, contenders[0].base)
    if args.train_baselines:
        folder = settings.output_dir / "baselines"
        contenders += train_baselines(args.adapter, Path(args.train_baselines), args.train_dataset_name, folder)
    tables.show(evaluate(contenders, dataset, settings))
    print(f"Wrote {settings.output_dir / 'evaluation.json'}, evaluation.md and evaluation.png.")


def likelihood(args: EvaluateArguments, dataset: Dataset) -> None:
    """Score the data, show the figures, and write them."""
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
        write_whole(Path(args.output), json.dumps(figures, indent=2) + "\n")


def score(adapter: str, dataset: Dataset, args: EvaluateArguments) -> ScoreWindow:
    """Scores of all sequences under all hypotheses of an adapter."""
    columns = [name for name in dataset.column_names if name == args.mode_column]
    return score_rows(load_model(adapter, args), dataset.remove_columns(columns), args.batch_size, args.max_length)


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
