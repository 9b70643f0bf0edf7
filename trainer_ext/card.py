"""What a trainer can tell on the model card of its adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import datasets
import torch
import trl

from peft_mcl.card import TrainingFacts
from trainer_ext.config import MCLConfig
from trainer_ext.noise import evaluation_mode


if TYPE_CHECKING:
    from trainer_ext.trainer import MCLTrainer


logger = logging.getLogger(__name__)

# Of an example on the card.
MAX_PROMPT_TOKENS = 256
MAX_NEW_TOKENS = 32
# Where all tokens are supervised, an example goes on from the first ones.
OPENING_TOKENS = 8


def training_facts(trainer: MCLTrainer) -> TrainingFacts:
    """What is known of the training so far; the examples, the licence and the tags are not."""
    evaluated = {name: figures for name, figures in trainer.figures.items() if name != "training"}
    return TrainingFacts(
        settings=_settings(trainer),
        figures=evaluated or trainer.figures,
        versions={"TRL": trl.__version__, "Datasets": datasets.__version__},
    )


def _settings(trainer: MCLTrainer) -> dict[str, Any]:
    args, defaults = trainer.args, MCLConfig.__dataclass_fields__
    names = ["objective"]
    if args.objective == "relaxed":
        names.append("relaxed_epsilon")
    if args.objective == "annealed":
        names += ["initial_temperature", "final_temperature"]
        names.append("annealing_fraction" if args.temperature_decay is None else "temperature_decay")
    names += ["loss_normalization"]
    unusual = ("sample_losers", "min_weight", "score_every", "score_prefix", "packing", "padding_free")
    names += [name for name in unusual if getattr(args, name) != defaults[name].default]
    names += ["learning_rate", "seed"]
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        **{name: getattr(args, name) for name in names},
        "optimizer steps": trainer.state.global_step,
        "sequences per step": batch,
    }


def decode_examples(trainer: MCLTrainer, count: int) -> list[tuple[str, list[str]]]:
    """Greedy continuations of the first prompts of the evaluation data, or else of the training data.

    Args:
        trainer ([`MCLTrainer`]): On one process; its tokenizer decodes.
        count (`int`): How many different prompts.

    Returns:
        `list` of `(str, list[str])`: Each prompt with the continuation of each of the K hypotheses. Empty if the data have no
        tokens to start from, as those of pictures.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer: Any = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    found = []
    with evaluation_mode(trainer.model), torch.no_grad():
        for tokens in islice(_different(_prompts(trainer)), count):
            input_ids = torch.tensor([tokens], device=trainer.accelerator.device)
            sequences = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            answers = tokenizer.batch_decode(sequences[:, len(tokens) :], skip_special_tokens=True)
            found.append((tokenizer.decode(tokens, skip_special_tokens=True), answers))
    return found


def _prompts(trainer: MCLTrainer) -> Iterator[tuple[int, ...]]:
    dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    for row in dataset:
        if "input_ids" not in row:
            return
        # Of a packed row, the first sequence.
        length = (row.get("seq_lengths") or [len(row["input_ids"])])[0]
        labels = row.get("labels", row["input_ids"])[:length]
        start = next((place for place, label in enumerate(labels) if label != -100), 0)
        tokens = row["input_ids"][: start or min(OPENING_TOKENS, length - 1)]
        if len(tokens):
            yield tuple(tokens[-MAX_PROMPT_TOKENS:])


def _different(prompts: Iterator[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Several rows of a data set can share a prompt, one for each reference."""
    seen = set()
    for prompt in prompts:
        if prompt not in seen:
            seen.add(prompt)
            yield prompt
