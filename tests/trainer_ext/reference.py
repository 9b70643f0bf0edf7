"""What the tests of the trainer share: a word tokenizer, ragged data, short runs, and brute-force references."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_mcl import MCLoraConfig
from tests.tiny import PAD, VOCABULARY, tiny_llama, with_hypotheses
from trainer_ext import MCLConfig, MCLTrainer


SPECIAL_WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
WORDS = tuple(f"w{i}" for i in range(VOCABULARY - len(SPECIAL_WORDS)))
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<assistant> {% generation %}{{ message['content'] }} <eos>{% endgeneration %} "
    "{% else %}<user> {{ message['content'] }} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# Options under which a run of a few steps takes a second on a CPU and is the same every time.
QUICK = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "dataset_num_proc": None,
    "seed": 3,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, separated by spaces; the ids of the special ones are those of the tiny models."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_WORDS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def text(generator: random.Random, shortest: int, longest: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(shortest, longest)))


def ragged_pairs(rows: int = 10, seed: int = 0) -> Dataset:
    """Prompts and completions of different lengths."""
    generator = random.Random(seed)
    return Dataset.from_list(
        [{"prompt": text(generator, 1, 5), "completion": " " + text(generator, 1, 7)} for _ in range(rows)]
    )


def tokenized(rows: Iterable[tuple[list[int], list[int]]]) -> Dataset:
    """A data set of token ids and labels."""
    return Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows])


def ragged_rows(rows: int = 10, seed: int = 0, without_labels: tuple[int, ...] = (3,)) -> Dataset:
    """Sequences of 2 to 12 tokens with masked prompts; those named have nothing to learn."""
    generator = random.Random(seed)
    found = []
    for row in range(rows):
        length = generator.randint(2, 12)
        ids = [generator.randrange(PAD + 1, VOCABULARY) for _ in range(length)]
        prompt = length if row in without_labels else generator.randint(0, length - 1)
        found.append((ids, [-100] * prompt + ids[prompt:]))
    return tokenized(found)


def settings(output_dir: Path, **options: Any) -> MCLConfig:
    return MCLConfig(output_dir=str(output_dir), **{**QUICK, "card_prompts": 0, **options})


def hypotheses(num_hypotheses: int = 3, **options: Any) -> MCLoraConfig:
    return MCLoraConfig(num_hypotheses=num_hypotheses, **{**LORA, **options})


def trainer_for(output_dir: Path, *, model: Any = None, data: Any = None, **options: Any) -> MCLTrainer:
    """An MCLTrainer on a tiny Llama; arguments of the trainer are told from those of its configuration by name."""
    names = (
        "eval_dataset",
        "callbacks",
        "compute_metrics",
        "data_collator",
        "formatting_func",
        "peft_config",
        "optimizers",
        "quantization_config",
    )
    own = {name: options.pop(name) for name in names if name in options}
    model = tiny_llama() if model is None else model
    if not isinstance(model, PeftModel):
        own.setdefault("peft_config", hypotheses())
    return MCLTrainer(
        model=model,
        args=settings(output_dir, **options),
        train_dataset=ragged_pairs() if data is None else data,
        processing_class=word_tokenizer(),
        **own,
    )


def logged(trainer: Any, name: str) -> list[Any]:
    """All values of a name in the logs, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --------------------------------------------------------------------------------------------------------------------
# What went in and what came out of a run


class RecordingCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which keeps the batches it made, in order."""

    def __init__(self) -> None:
        super().__init__(pad_token_id=PAD)
        self.batches: list[dict[str, torch.Tensor]] = []

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        self.batches.append({name: value.clone() for name, value in batch.items()})
        return batch


class Gradients(TrainerCallback):
    """Keeps the gradient of each trainable parameter before each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(
            {
                name.removeprefix("module."): parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        )


# --------------------------------------------------------------------------------------------------------------------
# The method, by brute force


def sequences_of(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """The token ids and labels of each row of a batch, without padding."""
    rows = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        rows.append((ids[:length].tolist(), labels[:length].tolist()))
    return rows


def unpacked(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """The sequences of TRL's packed row, told by the positions that start again."""
    ids, labels, positions = (batch[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
    starts = [place for place, position in enumerate(positions) if position == 0] + [len(ids)]
    return [(ids[a:b], labels[a:b]) for a, b in itertools.pairwise(starts)]


def padded_batch(sequences: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Sequences as rows, padded on the right."""
    longest = max(len(ids) for ids, _ in sequences)
    fill = [(ids + [0] * (longest - len(ids)), labels + [-100] * (longest - len(ids))) for ids, labels in sequences]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in sequences]
    return {
        "input_ids": torch.tensor([ids for ids, _ in fill]),
        "labels": torch.tensor([labels for _, labels in fill]),
        "attention_mask": torch.tensor(mask),
    }


def log_likelihood(model: nn.Module, ids: list[int], labels: list[int], hypothesis: int) -> torch.Tensor:
    """log p of the supervised tokens of one sequence under one hypothesis: a plain forward and a log_softmax."""
    logits = model(input_ids=torch.tensor([ids]), hypotheses=hypothesis).logits[0].float()
    log_probs = torch.log_softmax(logits, dim=-1)
    terms = [log_probs[t - 1, labels[t]] for t in range(1, len(ids)) if labels[t] != -100]
    return torch.stack(terms).sum() if terms else log_probs.sum() * 0.0


def count_tokens(labels: list[int]) -> int:
    return sum(label != -100 for label in labels[1:])


def weights_by_hand(
    objective: str, scores: list[float], num_tokens: int, epsilon: float, temperature: float | None
) -> list[float]:
    """q of one sequence, by the table of the method. Not for "random"."""
    best = max(range(len(scores)), key=scores.__getitem__)
    if objective == "relaxed":
        rest = epsilon / (len(scores) - 1) if len(scores) > 1 else 0.0
        return [(1 - epsilon if len(scores) > 1 else 1.0) if k == best else rest for k in range(len(scores))]
    if objective == "annealed" and temperature is not None:
        exponentials = [math.exp((score - scores[best]) / num_tokens / temperature) for score in scores]
        return [value / sum(exponentials) for value in exponentials]
    return [float(k == best) for k in range(len(scores))]


def gradients_by_hand(
    model: PeftModel,
    batches: list[dict[str, torch.Tensor]],
    weights: list[list[list[float]]],
    normalization: str,
) -> dict[str, torch.Tensor]:
    """The gradients of one optimizer step, one sequence and one hypothesis at a time, with one global normalisation.

    Args:
        model (`PeftModel`): In eval mode; its gradients are cleared.
        batches (`list`): The micro-batches of the step.
        weights (`list`): q of each sequence of each micro-batch.
        normalization (`str`): "token" or "sequence".
    """
    sequences = [sequence for batch in batches for sequence in sequences_of(batch)]
    q = [row for batch in weights for row in batch]
    tokens = [count_tokens(labels) for _, labels in sequences]
    total = sum(tokens) if normalization == "token" else sum(count > 0 for count in tokens)
    model.zero_grad()
    for (ids, labels), row, count in zip(sequences, q, tokens, strict=True):
        if count == 0:
            continue
        divisor = total if normalization == "token" else total * count
        for hypothesis, weight in enumerate(row):
            if weight:
                (-weight * log_likelihood(model, ids, labels, hypothesis) / divisor).backward()
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.zero_grad()
    return found


def scores_by_hand(model: PeftModel, batch: dict[str, torch.Tensor]) -> list[list[float]]:
    """The scores of each sequence of a batch under each hypothesis."""
    with torch.no_grad():
        return [
            [log_likelihood(model, ids, labels, k).item() for k in range(model.num_hypotheses)]
            for ids, labels in sequences_of(batch)
        ]


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """All gradients agree to a part of the largest one, and not because they are zero."""
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-4
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max().item()
        assert error <= tolerance * largest, f"{name}: off by {error:.2e}, the largest gradient is {largest:.2e}"


def adapted_llama(num_hypotheses: int = 3, **options: Any) -> PeftModel:
    """A tiny Llama with random hypotheses that disagree, so that there are no ties."""
    return with_hypotheses(tiny_llama(), num_hypotheses, lora_alpha=8, **options)


def frozen_copy(model: PeftModel) -> PeftModel:
    """A copy to compute references with: in eval mode, and untouched by TRL's fused head."""
    return copy.deepcopy(model).eval()
