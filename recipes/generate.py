"""Decode prompts under every hypothesis of an adapter, and show the continuations side by side.

```bash
python recipes/generate.py --adapter outputs/mcl --prompts "The sun rose over the hills."
python recipes/generate.py --adapter user/my-adapter --prompts_file prompts.jsonl --output continuations.jsonl
```
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from trl import ModelConfig, TrlParser, get_quantization_config


# Run by path, Python looks for `recipes` beside this file.
sys.path.insert(0, str(Path(__file__).parents[1]))

from peft_mcl import MCLoraConfig, rank_sequences  # also registers the adapter type
from recipes.files import write_whole


@dataclass
class GenerateArguments:
    """What to decode, and how."""

    adapter: str = field(metadata={"help": "Directory or Hub id of an MCLORA adapter."})
    prompts: list[str] | None = field(default=None, metadata={"help": "Prompts, as text."})
    prompts_file: str | None = field(
        default=None,
        metadata={"help": "A text file (one prompt a line), or JSONL with the key `prompt`: text or chat messages."},
    )
    max_prompts: int | None = field(default=None, metadata={"help": "Take only the first ones."})
    append: str = field(default="", metadata={"help": "Text to put after each prompt, such as '\\n'."})
    hypotheses: list[int] | None = field(default=None, metadata={"help": "Only these hypotheses, in this order."})
    rank: str | None = field(
        default=None,
        metadata={"help": "Show the best first, by 'likelihood', 'mixture' or 'consensus', in place of by hypothesis."},
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Longest continuation, in tokens."})
    num_beams: int = field(default=1, metadata={"help": "Beams of each hypothesis."})
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the most likely."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Of sampling."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1: repeat less."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    batch_size: int = field(default=8, metadata={"help": "Prompts decoded at once."})
    dtype: str = field(default="auto", metadata={"help": "Of the base model: 'auto', 'bfloat16', 'float32'..."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the base model to 4 bits (NF4)."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "With it: quantise its scales, too."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the base model to 8 bits."})
    output: str | None = field(default=None, metadata={"help": "Also write the continuations to this JSONL file."})


def main(args: GenerateArguments) -> None:
    rows = read_prompts(args)
    model = load_model(args.adapter, args)
    tokenizer = load_tokenizer(args.adapter, model)
    torch.manual_seed(args.seed)

    for start in range(0, len(rows), args.batch_size):
        batch = rows[start : start + args.batch_size]
        for row, decoded in zip(batch, decode(model, tokenizer, [r["prompt"] for r in batch], args), strict=True):
            row.update(decoded)
    show(rows)
    if args.output:
        write_jsonl(rows, Path(args.output))


def read_prompts(args: GenerateArguments) -> list[dict[str, Any]]:
    """The prompts of the command line and of the file, as rows with the key `prompt`."""
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in args.prompts or []]
    if args.prompts_file:
        lines = Path(args.prompts_file).read_text(encoding="utf-8").splitlines()
        lines = [line for line in lines if line.strip()]
        if args.prompts_file.endswith(".jsonl"):
            rows += [json.loads(line) for line in lines]
        else:
            rows += [{"prompt": line} for line in lines]
    if any("prompt" not in row for row in rows):
        raise ValueError(f"`prompts_file` {args.prompts_file!r} has a row without the key 'prompt'.")
    # Several rows of a data set can share a prompt, one for each reference.
    unique: dict[str, Any] = {}
    for row in rows:
        unique.setdefault(json.dumps(row["prompt"]), row["prompt"])
    rows = [{"prompt": prompt} for prompt in unique.values()]
    if not rows:
        raise ValueError("There is nothing to decode: give `--prompts` or `--prompts_file`.")
    for row in rows:
        if isinstance(row["prompt"], str):
            row["prompt"] += args.append
    return rows[: args.max_prompts]


def load_model(adapter: str, args: Any) -> Any:
    """The hypotheses on their base model, which is quantised as `train_mcl.py` does it if that is asked for."""
    # Refuses what is no adapter with hypotheses, before the base model is loaded.
    MCLoraConfig.from_pretrained(adapter)
    return AutoPeftModelForCausalLM.from_pretrained(adapter, **base_options(args)).eval()


def base_options(args: Any) -> dict[str, Any]:
    """How a base model is loaded: the arguments of `from_pretrained` for `dtype`, `load_in_4bit`, ... of `args`."""
    quantisation = ModelConfig(
        dtype="bfloat16" if args.dtype == "auto" else args.dtype,  # What 4-bit layers compute in.
        load_in_4bit=args.load_in_4bit,
        use_bnb_nested_quant=args.use_bnb_nested_quant,
        load_in_8bit=args.load_in_8bit,
    )
    return {
        "dtype": args.dtype,
        "quantization_config": get_quantization_config(quantisation),
        "device_map": {"": "cuda" if torch.cuda.is_available() else "cpu"},
    }


def load_tokenizer(adapter: str, model: Any) -> Any:
    """The tokenizer saved with the adapter, or else that of the base model; padded on the left, for decoding."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(adapter)
    except (OSError, ValueError):
        tokenizer = AutoTokenizer.from_pretrained(model.active_peft_config.base_model_name_or_path)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@torch.no_grad()
def decode(model: Any, tokenizer: Any, prompts: list[Any], args: GenerateArguments) -> list[dict[str, list[Any]]]:
    """For each prompt (text or chat messages) its `continuations` and their `hypotheses`; if they are ranked, their `scores`."""
    inputs = tokenizer(texts_of(tokenizer, prompts), return_tensors="pt", padding=True).to(model.device)
    sampling = {"temperature": args.temperature, "top_p": args.top_p} if args.do_sample else {}
    call = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "hypotheses": args.hypotheses,
        "max_new_tokens": args.max_new_tokens,
        "num_beams": args.num_beams,
        "do_sample": args.do_sample,
        "repetition_penalty": args.repetition_penalty,
        "pad_token_id": tokenizer.pad_token_id,
        **sampling,
    }
    sequences = model.generate(**call)
    hypotheses = args.hypotheses or list(range(model.num_hypotheses))
    decoded: list[dict[str, list[Any]]] = [{"hypotheses": hypotheses} for _ in prompts]
    if args.rank is not None:
        ranking = rank_sequences(model, sequences, method=args.rank, tokenizer=tokenizer, **call)
        sequences = sequences[ranking.rows]
        decoded = [
            {"hypotheses": order, "scores": scores}
            for order, scores in zip(ranking.hypotheses.tolist(), ranking.scores.tolist(), strict=True)
        ]
    answers = answers_of(tokenizer, sequences, inputs["input_ids"].shape[1], len(prompts))
    return [{"continuations": texts, **row} for texts, row in zip(answers, decoded, strict=True)]


def texts_of(tokenizer: Any, prompts: list[Any]) -> list[str]:
    """Prompts (text or chat messages) as the model reads them."""
    return [
        prompt if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]  # fmt: skip


def answers_of(tokenizer: Any, sequences: torch.Tensor, prompt_length: int, num_prompts: int) -> list[list[str]]:
    """The texts of what was generated, for each prompt, from sequences (num_prompts * K, T)."""
    answers = tokenizer.batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)
    count = len(answers) // num_prompts
    return [[text.strip() for text in answers[i * count : (i + 1) * count]] for i in range(num_prompts)]


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table: a prompt in each row, and in each column a hypothesis, or a rank and who has it."""
    is_ranked = "scores" in rows[0]
    table = Table(show_lines=True)
    table.add_column("prompt", style="bold", ratio=1)
    for place, hypothesis in enumerate(rows[0]["hypotheses"]):
        table.add_column(f"rank {place + 1}" if is_ranked else f"hypothesis {hypothesis}", ratio=1)
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        cells = row["continuations"]
        if is_ranked:
            told = zip(row["hypotheses"], row["scores"], cells, strict=True)
            cells = [f"hypothesis {hypothesis} ({score:.2f}): {text}" for hypothesis, score, text in told]
        table.add_row(prompt.strip(), *cells)
    # Away from a terminal (a file, a pipe) the width is unknown; the table needs room.
    console = Console(markup=False)
    Console(markup=False, width=console.width if console.is_terminal else 150).print(table)


def write_jsonl(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows to `path`, whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main(*TrlParser((GenerateArguments,)).parse_args_and_config())
