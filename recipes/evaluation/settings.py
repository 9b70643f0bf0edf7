"""What an evaluation decodes and measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recipes.evaluation.decoders import DECODERS
from trainer_ext.evaluation import QUALITY_METRICS


@dataclass(frozen=True)
class Settings:
    """Settings that all contenders share.

    Args:
        output_dir: Where outputs, scores and results go.
        decoders: Names in `DECODERS`, for contenders with one hypothesis.
        num_outputs: K, the outputs for each prompt of those contenders; by default the most hypotheses of a contender.
        num_beams: b, beams of each hypothesis; decoders of single models get b * K.
        max_prompts: Decode only the first prompts.
        max_new_tokens, repetition_penalty: Of all decoding.
        top_k, top_p, typical_p, temperature: Of the sampling decoders, each of which uses its own alone.
        diversity_penalty: Nats, of diverse beam search.
        seed: Of sampling and of the bootstrap.
        batch_size: Prompts decoded, and sequences scored, at once.
        max_length: Longest sequence that is scored, in tokens.
        metrics: Names in `QUALITY_METRICS`; the first one judges rankings and is drawn.
        resamples: Of the bootstrap.
        embedding_model: A name or folder for sentence-transformers; None for no semantic diversity.
        mode_column: Column with the known mode of each sequence.
        append: Text to put after each prompt that is text.
        dtype, load_in_4bit, use_bnb_nested_quant, load_in_8bit: Of the base model.
    """

    output_dir: Path
    decoders: tuple[str, ...] = tuple(DECODERS)
    num_outputs: int | None = None
    num_beams: int = 1
    max_prompts: int | None = None
    max_new_tokens: int = 64
    repetition_penalty: float = 1.0
    top_k: int = 40
    top_p: float = 0.9
    typical_p: float = 0.9
    temperature: float = 0.7
    diversity_penalty: float = 0.5
    seed: int = 0
    batch_size: int = 16
    max_length: int = 1024
    metrics: tuple[str, ...] = ("chrf", *(name for name in QUALITY_METRICS if name != "chrf"))
    resamples: int = 2000
    embedding_model: str | None = None
    mode_column: str | None = None
    append: str = ""
    dtype: str = "auto"
    load_in_4bit: bool = False
    use_bnb_nested_quant: bool = False
    load_in_8bit: bool = False

    def __post_init__(self) -> None:
        for name, known in (("decoders", tuple(DECODERS)), ("metrics", QUALITY_METRICS)):
            wrong = [value for value in getattr(self, name) if value not in known]
            if wrong or not getattr(self, name):
                raise ValueError(f"`{name}`: {wrong or 'nothing'} given; choose from {', '.join(known)}.")
        counts = (
            "num_beams",
            "max_new_tokens",
            "batch_size",
            "max_length",
            "resamples",
            "top_k",
            "num_outputs",
            "max_prompts",
        )
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}={value}` must be at least 1.")
        if self.diversity_penalty < 0:
            raise ValueError(f"`diversity_penalty={self.diversity_penalty}` must be at least 0 nats.")
        for name, largest in (("top_p", 1.0), ("typical_p", 1.0), ("temperature", None), ("repetition_penalty", None)):
            value = getattr(self, name)
            if value <= 0 or (largest is not None and value > largest):
                raise ValueError(f"`{name}={value}` must be above 0{'' if largest is None else ' and at most 1'}.")
