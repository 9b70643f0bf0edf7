"""Measure what K hypotheses cost beside plain LoRA: time, memory and saved activations of a step, time of generation.

```bash
python recipes/benchmark.py --model tiny --hypotheses 1 2 3 5 8 --repeats 5 --output outputs/benchmark.json
```

It prints one table of the training step and one of generation, each with ratios, and says which targets were met; the
JSON file holds every single measurement, the picture beside it shows the ratios. All sides of a comparison train through
their own trainer on the same model, rows and tokens. Each has a process of its own, and they take turns: a step of the
first, a step of the second, and so on, so that whatever else the machine does hits all of them.

- `lora`: plain LoRA through `SFTTrainer`, the denominator of every ratio.
- `wta`, `relaxed`, `annealed` (warm: all hypotheses have weight), `random`: `MCLTrainer` by objective.
- `joint`: the same with one graph over all hypotheses, instead of scoring first and training the winners.
- `loop`: K ordinary LoRA adapters called one after the other, all graphs kept.
- `sampled`, `prefix`: the options `sample_losers` (with `relaxed`) and `score_prefix=8` (with `wta`). What `score_every` saves
  takes several epochs to see: `recipes/savings.py`.

With one hypothesis there is only `lora` and `wta`: all objectives are the same then.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer, TrlParser


# Run by path, Python looks for `recipes` beside this file.
sys.path.insert(0, str(Path(__file__).parents[1]))

from peft_mcl import MCLoraConfig
from recipes.files import save_plot, write_whole
from trainer_ext import MCLConfig, MCLTrainer


SEED = 0
WARMUP_STEPS = 2
# After the timed ones: trimming the heap makes the next step slower, so no step is used for both.
MEMORY_STEPS = 3
TINY = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
MEGABYTE = 1e6


@dataclass
class BenchmarkArguments:
    """What to measure, and on what."""

    model: str = field(
        default="tiny",
        metadata={"help": "'tiny' (a random Llama of 58 million parameters), or a directory or Hub id of a causal LM."},
    )
    hypotheses: list[int] = field(default_factory=lambda: [1, 2, 3, 5, 8], metadata={"help": "The K to measure."})
    repeats: int = field(default=5, metadata={"help": "Measured steps, and measured calls of generate."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads of a process; all cores by default."})
    batch_size: int = field(default=4, metadata={"help": "Sequences in a training step."})
    length: int = field(default=128, metadata={"help": "Tokens in a sequence; with `dataset` the most of them."})
    dtype: str = field(default="float32", metadata={"help": "Of the base model.", "choices": ["float32", "bfloat16"]})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations in training."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "A JSONL file with the columns prompt and completion, instead of random tokens."},
    )
    variants: list[str] | None = field(
        default=None, metadata={"help": "Variants of the training step beside lora; all by default."}
    )
    prompts: list[int] = field(default_factory=lambda: [1, 4], metadata={"help": "Prompts in a call of generate."})
    prompt_length: int = field(default=32, metadata={"help": "Random tokens in a prompt."})
    new_tokens: int = field(default=32, metadata={"help": "Tokens to generate after a prompt, neither fewer nor more."})
    skip_training: bool = field(default=False, metadata={"help": "Measure generation alone."})
    skip_generation: bool = field(default=False, metadata={"help": "Measure training alone."})
    output: str = field(
        default="outputs/benchmark.json",
        metadata={"help": "The JSON file to write; the picture gets its name and .png."},
    )


# --- the variants of the training step ---


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        trainer: `"mcl"`, `"joint"`, `"lora"` or `"loop"`, see `build_trainer`.
        options: From K to options of MCLConfig.
    """

    trainer: str
    options: Callable[[int], dict[str, Any]] = lambda k: {}


VARIANTS = {
    "lora": Variant("lora"),
    "wta": Variant("mcl", lambda k: {"objective": "wta"}),
    "relaxed": Variant("mcl", lambda k: {"objective": "relaxed", "relaxed_epsilon": 0.05}),
    # The temperature stays at 1, far above the differences between hypotheses, so every one of them keeps its weight.
    "annealed": Variant("mcl", lambda k: {"objective": "annealed", "temperature_decay": 1.0}),
    "random": Variant("mcl", lambda k: {"objective": "random"}),
    "joint": Variant("joint", lambda k: {"objective": "wta"}),
    "loop": Variant("loop"),
    "sampled": Variant("mcl", lambda k: {"objective": "relaxed", "relaxed_epsilon": 0.05, "sample_losers": True}),
    "prefix": Variant("mcl", lambda k: {"objective": "wta", "score_prefix": 8}),
}
# With one hypothesis the others do the same work.
VARIANTS_OF_ONE = ("lora", "wta")


class JointTrainer(MCLTrainer):
    """Runs all rows in one call and keeps one graph over all hypotheses."""

    def __init__(self, **arguments: Any) -> None:
        # Without what is overridden, this would quietly measure `wta`.
        for name in ("_trains_all_rows", "_runs_in_parts"):
            if not hasattr(MCLTrainer, name):
                raise RuntimeError(f"MCLTrainer has no `{name}` any more: adapt JointTrainer to what replaced it.")
        super().__init__(**arguments)

    def _trains_all_rows(self) -> bool:
        return True

    @property
    def _runs_in_parts(self) -> bool:
        return False


class LoopTrainer(SFTTrainer):
    """Trains K ordinary LoRA adapters by winner-takes-all: one forward pass for each, all graphs kept."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.adapter_parameters = [p for name, p in self.model.named_parameters() if "lora_" in name]
        self._enable_all()

    def _enable_all(self) -> None:
        """PEFT freezes the adapters that are not active, but all of them need a gradient and a place in the optimizer."""
        for parameter in self.adapter_parameters:
            parameter.requires_grad_(True)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        inputs["use_cache"] = False
        scores = []
        for adapter in self.model.peft_config:
            self.model.set_adapter(adapter)
            self._enable_all()
            outputs = model(**inputs, fused_lm_head=True)
            scores.append(outputs.log_probs.sum(dim=1))
        # With gradient checkpointing all are recomputed under the last adapter: the wrong gradient, at the same cost.
        num_tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        return -torch.stack(scores).max(dim=0).values.sum() / num_tokens


def build_trainer(
    variant: Variant, num_hypotheses: int, steps: int, args: BenchmarkArguments, scratch: str
) -> SFTTrainer:
    """A trainer with its own model; all have the same base weights, rows and order of rows."""
    options = {
        "output_dir": scratch,
        "max_steps": steps,
        "per_device_train_batch_size": args.batch_size,
        "max_length": args.length,
        "learning_rate": 1e-4,
        "seed": SEED,
        "bf16": args.dtype == "bfloat16",
        "gradient_checkpointing": args.gradient_checkpointing,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        # A smaller last batch of an epoch would be a cheaper step.
        "dataloader_drop_last": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    base = build_base(args)
    data: dict[str, Any] = {
        "train_dataset": training_rows(args, vocabulary_size(base.config), steps * args.batch_size),
        "processing_class": tokenizer_for(args),
    }
    set_seed(SEED)
    if variant.trainer == "lora":
        return SFTTrainer(model=base, args=SFTConfig(**options), peft_config=LoraConfig(**LORA), **data)
    if variant.trainer == "loop":
        return LoopTrainer(model=with_adapters(base, num_hypotheses), args=SFTConfig(**options), **data)
    trainer_class = {"mcl": MCLTrainer, "joint": JointTrainer}[variant.trainer]
    return trainer_class(
        model=base,
        args=MCLConfig(**options, **variant.options(num_hypotheses)),
        peft_config=MCLoraConfig(num_hypotheses=num_hypotheses, **LORA),
        **data,
    )


def with_adapters(base: PreTrainedModel, count: int) -> PeftModel:
    """`base` with `count` ordinary LoRA adapters."""
    model = get_peft_model(base, LoraConfig(**LORA), adapter_name="hypothesis_0")
    for index in range(1, count):
        model.add_adapter(f"hypothesis_{index}", LoraConfig(**LORA))
    return model


# --- models and data ---


def build_base(args: BenchmarkArguments) -> PreTrainedModel:
    """The frozen model, the same in every process."""
    dtype = getattr(torch, args.dtype)
    if args.model != "tiny":
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    set_seed(SEED)
    return LlamaForCausalLM(LlamaConfig(**TINY)).to(dtype)


def vocabulary_size(config: Any) -> int:
    return config.get_text_config().vocab_size


def random_tokens(rows: int, length: int, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocabulary, (rows, length), generator=generator)


def training_rows(args: BenchmarkArguments, vocabulary: int, rows: int) -> Dataset:
    """As many rows as are needed, of random tokens that are all supervised, or those of the file."""
    if args.dataset is None:
        tokens = random_tokens(rows, args.length, vocabulary).tolist()
        return Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    dataset = load_dataset("json", data_files=args.dataset, split="train").select_columns(["prompt", "completion"])
    return dataset.select(range(min(rows, len(dataset))))


def tokenizer_for(args: BenchmarkArguments) -> PreTrainedTokenizerBase:
    """That of the model for text; for random tokens one that only has what the trainer asks every tokenizer for."""
    if args.dataset is not None:
        return AutoTokenizer.from_pretrained(args.model)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


# --- measuring a step, in the process that trains ---


class StepGate(TrainerCallback):
    """Holds every step until the parent asks for it by the name of a measurement, and reports what it took."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.connection.send(("ready", None))

    def on_step_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.measurement = self.connection.recv()
        gc.collect()
        if self.measurement == "memory":
            self.memory = MemoryPeaks()
        elif self.measurement == "saved":
            self.saved = SavedActivations(model)
            self.saved.__enter__()
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        result: dict[str, float | None] = {"seconds": time.perf_counter() - self.start}
        if self.measurement == "memory":
            result.update(self.memory.read())
        elif self.measurement == "saved":
            self.saved.__exit__(None, None, None)
            result["saved_mb"] = self.saved.megabytes
        self.connection.send(("step", result))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class MemoryPeaks:
    """The peak from its creation to `read`, beyond what the process holds at its creation: weights, adapters, optimizer.

    The resident set can be measured on Linux alone, where writing 5 to clear_refs sets its high-water mark back.
    """

    def __init__(self) -> None:
        trim_heap()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.resident = resident_megabytes("VmRSS")
        except OSError:
            self.resident = None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.allocated = torch.cuda.memory_allocated()

    def read(self) -> dict[str, float | None]:
        peaks: dict[str, float | None] = {"peak_mb": None, "cuda_peak_mb": None}
        if self.resident is not None:
            peaks["peak_mb"] = resident_megabytes("VmHWM") - self.resident
        if torch.cuda.is_available():
            peaks["cuda_peak_mb"] = (torch.cuda.max_memory_allocated() - self.allocated) / MEGABYTE
        return peaks


def resident_megabytes(name: str) -> float:
    """`VmRSS`, the resident set, or `VmHWM`, the most it was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 / MEGABYTE for line in lines if line.startswith(f"{name}:"))


def trim_heap() -> None:
    """Give free memory back to the system, or a step would take it again unseen. Only glibc can."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class SavedActivations(torch.autograd.graph.saved_tensors_hooks):
    """Counts the memory that is kept for the backward pass, without the weights; each storage once."""

    def __init__(self, model: nn.Module) -> None:
        known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                self.sizes[storage.data_ptr()] = max(storage.nbytes(), self.sizes.get(storage.data_ptr(), 0))
            # Keeping the tensor itself would be a cycle, where it is the output of the operation that saves it.
            return tensor.detach()

        super().__init__(pack, lambda tensor: tensor)

    @property
    def megabytes(self) -> float:
        return sum(self.sizes.values()) / MEGABYTE


def train_worker(
    connection: Connection, args: BenchmarkArguments, name: str, num_hypotheses: int, steps: int, scratch: str
) -> None:
    with reporting(connection, args):
        trainer = build_trainer(VARIANTS[name], num_hypotheses, steps, args, scratch)
        trainer.add_callback(StepGate(connection))
        trainer.train()


@contextmanager
def reporting(connection: Connection, args: BenchmarkArguments) -> Iterator[None]:
    """Inside, what goes wrong in a worker is told to the parent."""
    try:
        torch.set_num_threads(args.threads)
        yield
    except (EOFError, BrokenPipeError):
        traceback.print_exc()  # The parent is gone; if it is not, it shows this.
    except Exception:
        connection.send(("error", traceback.format_exc()))


# --- the parent: processes and turns ---


class WorkerFailed(RuntimeError):
    """A worker raised an exception or died."""


class Worker:
    """A process and the pipe to it. What it prints is kept, and shown if it dies."""

    def __init__(self, label: str, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.label = label
        self.connection, theirs = context.Pipe()
        self.printed = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        self.process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        with deaf_and_printing_to(self.printed.fileno()):
            self.process.start()
        # So that the pipe ends with the process.
        theirs.close()

    def receive(self) -> tuple[str, Any]:
        """The next message. Raises WorkerFailed if there will be none."""
        wait([self.connection, self.process.sentinel])
        try:
            kind, content = self.connection.recv() if self.connection.poll() else ("died", None)
        except (EOFError, ConnectionResetError):
            kind, content = "died", None
        if kind == "died":
            self.process.join()
            self.printed.seek(0)
            raise WorkerFailed(
                f"The process of {self.label} died with exit code {self.process.exitcode}. If that is -9, memory ran out: "
                "take a smaller `batch_size` or `length`, or fewer `hypotheses` or `variants`. It had printed:\n"
                + self.printed.read().decode(errors="replace")
            )
        if kind == "error":
            raise WorkerFailed(f"The process of {self.label} failed:\n{content}")
        return kind, content

    def step(self, measurement: str) -> dict[str, float | None]:
        """Let it train one step and wait for the end of it."""
        with suppress(BrokenPipeError, ConnectionResetError):  # `receive` tells why.
            self.connection.send(measurement)
        return self.receive()[1]

    def close(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()
        self.printed.close()


@contextmanager
def deaf_and_printing_to(file: int) -> Iterator[None]:
    """A process that is started inside ignores Ctrl-C, which is for the parent to act on, and prints to `file`."""
    sys.stdout.flush()
    sys.stderr.flush()
    copies = {stream: os.dup(stream) for stream in (1, 2)}
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for stream in copies:
            os.dup2(file, stream)
        yield
    finally:
        for stream, copy in copies.items():
            os.dup2(copy, stream)
            os.close(copy)
        signal.signal(signal.SIGINT, handler)


@contextmanager
def closing(workers: list[Worker]) -> Iterator[list[Worker]]:
    """Ends the workers, also those that are added inside, whatever happens."""
    try:
        yield workers
    finally:
        for worker in workers:
            worker.close()


def measure_training(args: BenchmarkArguments, num_hypotheses: int) -> list[dict[str, Any]]:
    """All variants for one K, taking turns. One row for each, lora first."""
    names = list(dict.fromkeys(["lora", *(args.variants or VARIANTS)]))
    if num_hypotheses == 1:
        names = [name for name in names if name in VARIANTS_OF_ONE]
    counts = {"warm-up": WARMUP_STEPS, "time": args.repeats, "memory": MEMORY_STEPS, "saved": 1}
    plan = [kind for kind, count in counts.items() for _ in range(count)]

    steps: dict[str, dict[str, list[Any]]] = {name: {kind: [] for kind in counts} for name in names}
    with tempfile.TemporaryDirectory() as scratch, closing([]) as workers:
        for name in names:
            label = f"variant {name} with K = {num_hypotheses}"
            workers.append(Worker(label, train_worker, args, name, num_hypotheses, len(plan), scratch))
        for worker in workers:
            worker.receive()  # Building a model beside the first steps would disturb them.
        for kind in plan:
            for name, worker in zip(names, workers, strict=True):
                steps[name][kind].append(worker.step(kind))
    rows = [training_row(name, num_hypotheses, steps[name]) for name in names]
    for row in rows:
        row["ratios"] = {
            key: ratio(row[key], rows[0][key]) for key in ("seconds", "peak_mb", "cuda_peak_mb", "saved_mb")
        }
    return rows


def training_row(name: str, num_hypotheses: int, steps: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What the steps of one variant took."""

    def median(kind: str, key: str) -> float | None:
        values = [step[key] for step in steps[kind]]
        return None if None in values else statistics.median(values)

    return {
        "hypotheses": num_hypotheses,
        "variant": name,
        "seconds": median("time", "seconds"),
        "all_seconds": [step["seconds"] for step in steps["time"]],
        "peak_mb": median("memory", "peak_mb"),
        "cuda_peak_mb": median("memory", "cuda_peak_mb"),
        "saved_mb": median("saved", "saved_mb"),
    }


def ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


def measure_generation(args: BenchmarkArguments) -> Iterator[dict[str, Any]]:
    """One row for each K and number of prompts."""
    with closing([Worker("generation", generation_worker, args)]) as (worker,):
        while (message := worker.receive())[0] == "row":
            yield message[1]


# --- measuring generation, in one process ---


def generation_worker(connection: Connection, args: BenchmarkArguments) -> None:
    with reporting(connection, args):
        # Random B, or all hypotheses would be the base model and none could be told from another.
        lora = on_device(get_peft_model(build_base(args), LoraConfig(init_lora_weights=False, **LORA)))
        for count in args.hypotheses:
            if count > 1:
                config = MCLoraConfig(num_hypotheses=count, init_lora_weights=False, **LORA)
                model = on_device(get_peft_model(build_base(args), config))
                for prompts in args.prompts:
                    connection.send(("row", generation_row(model, lora, prompts, args)))
        connection.send(("end", None))


def on_device(model: PeftModel) -> PeftModel:
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def generation_row(model: PeftModel, lora: PeftModel, prompts: int, args: BenchmarkArguments) -> dict[str, Any]:
    """The three ways to K continuations of each prompt, taking turns."""
    count = model.num_hypotheses
    tokens = random_tokens(prompts, args.prompt_length, vocabulary_size(model.config)).to(model.device)
    options = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": args.new_tokens,
        "min_new_tokens": args.new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    sides: dict[str, Callable[[], Any]] = {
        "one_call": lambda: model.generate(**options),
        "calls": lambda: [model.generate(**options, hypotheses=k) for k in range(count)],
        "beam_search": lambda: lora.generate(**options, num_beams=count),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    outputs: dict[str, Any] = {}
    for _ in range(WARMUP_STEPS + args.repeats):
        for side, call in sides.items():
            synchronize()
            start = time.perf_counter()
            outputs[side] = call()
            synchronize()
            seconds[side].append(time.perf_counter() - start)
    medians = {side: statistics.median(values[WARMUP_STEPS:]) for side, values in seconds.items()}
    # Row b * K + k of the one call is hypothesis k of prompt b.
    in_turn = torch.stack(outputs["calls"], dim=1).flatten(0, 1)
    return {
        "hypotheses": count,
        "prompts": prompts,
        "seconds": medians,
        "all_seconds": {side: values[WARMUP_STEPS:] for side, values in seconds.items()},
        "calls_over_one_call": medians["calls"] / medians["one_call"],
        "one_call_over_beam_search": medians["one_call"] / medians["beam_search"],
        "sequences": len(in_turn),
        "equal_sequences": int((in_turn == outputs["one_call"]).all(dim=1).sum()),
    }


# --- targets ---


def targets(
    training: list[dict[str, Any]], generation: list[dict[str, Any]], gradient_checkpointing: bool
) -> list[dict[str, Any]]:
    """What was promised of the K that were measured, and what came of it."""
    found: list[dict[str, Any]] = []

    def judge(what: str, value: float | None, least: float = -math.inf, most: float = math.inf) -> None:
        if value is not None:
            bounds = {"least": least if math.isfinite(least) else None, "most": most if math.isfinite(most) else None}
            found.append({"what": what, "value": value, **bounds, "met": least <= value <= most})

    rows = {(row["hypotheses"], row["variant"]): row for row in training}
    for count in sorted({row["hypotheses"] for row in training}):
        wta, loop = rows.get((count, "wta")), rows.get((count, "loop"))
        if wta is None:
            continue
        ratios = wta["ratios"]
        if count == 1:
            judge("K = 1: time of wta / lora", ratios["seconds"], most=1.05)
            continue
        if count in (5, 8):
            most = (count + 3) / 3 * 1.1 if gradient_checkpointing else {5: 3.4, 8: 4.8}[count]
            judge(f"K = {count}: time of wta / lora", ratios["seconds"], most=most)
            if loop is not None:
                judge(
                    f"K = {count}: time of loop / wta", loop["seconds"] / wta["seconds"], least={5: 1.5, 8: 1.7}[count]
                )
        peak = "peak_mb" if ratios["cuda_peak_mb"] is None else "cuda_peak_mb"
        judge(f"K = {count}: peak memory of wta / lora", ratios[peak], most=1.25)
        judge(f"K = {count}: saved activations of wta / lora", ratios["saved_mb"], most=1.05)
    for row in generation:
        if (row["hypotheses"], row["prompts"]) == (5, 1):
            judge("K = 5, one prompt: time of 5 calls / one call", row["calls_over_one_call"], least=2.4)
            judge("K = 5, one prompt: time of one call / beam search", row["one_call_over_beam_search"], most=1.0)
    return found


# --- reports ---


def show_training(console: Console, rows: list[dict[str, Any]]) -> None:
    has_cuda = any(row["cuda_peak_mb"] is not None for row in rows)
    table = Table(title="One training step; each ratio (x) is to lora with the same K", title_justify="left")
    for name in ("K", "variant", "seconds", "min", "max", "x", "peak MB", "x", "saved MB", "x"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    if has_cuda:
        table.add_column("CUDA MB", justify="right")
        table.add_column("x", justify="right")
    for i, row in enumerate(rows):
        ratios = {key: number(value, 2) for key, value in row["ratios"].items()}
        cells = [str(row["hypotheses"]), row["variant"]]
        cells += [number(value, 3) for value in (row["seconds"], min(row["all_seconds"]), max(row["all_seconds"]))]
        cells += [ratios["seconds"], number(row["peak_mb"], 0), ratios["peak_mb"]]
        cells += [number(row["saved_mb"], 0), ratios["saved_mb"]]
        cells += [number(row["cuda_peak_mb"], 0), ratios["cuda_peak_mb"]] if has_cuda else []
        is_last = i + 1 == len(rows) or rows[i + 1]["hypotheses"] != row["hypotheses"]
        table.add_row(*cells, end_section=is_last)
    console.print(table)
    console.print(
        "seconds: the median. peak MB: resident set beyond that before the step. saved MB: kept for the backward pass."
    )


def show_generation(console: Console, rows: list[dict[str, Any]], new_tokens: int) -> None:
    table = Table(title=f"K continuations of {new_tokens} tokens, greedy, seconds (median)", title_justify="left")
    names = ("K", "prompts", "one call", "K calls", "K beams", "K calls / one call", "one call / K beams", "equal")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        seconds = [number(row["seconds"][side], 3) for side in ("one_call", "calls", "beam_search")]
        ratios = [number(row[key], 2) for key in ("calls_over_one_call", "one_call_over_beam_search")]
        equal = f"{row['equal_sequences']}/{row['sequences']}"
        table.add_row(str(row["hypotheses"]), str(row["prompts"]), *seconds, *ratios, equal)
    console.print(table)
    console.print(
        "equal: sequences of the one call that are, token by token, those of the K calls. In bfloat16 the rounding of a "
        "product depends on the number of its rows."
    )


def show_targets(console: Console, found: list[dict[str, Any]], threads: int) -> None:
    if found:
        console.print(f"Targets, set for two CPU threads (here {threads}{', CUDA' * torch.cuda.is_available()}):")
    for target in found:
        bounds = [f"{word} {target[word]:.2f}" for word in ("least", "most") if target[word] is not None]
        console.print(
            f"  {'met   ' if target['met'] else 'MISSED'}  {target['what']}: {target['value']:.2f} (at {', at '.join(bounds)})"
        )


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def draw(training: list[dict[str, Any]], generation: list[dict[str, Any]], path: Path) -> None:
    """The picture of all ratios by K."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    titles = {
        "seconds": "time",
        "cuda_peak_mb": "CUDA peak memory",
        "peak_mb": "peak memory",
        "saved_mb": "saved activations",
    }
    for row in training:
        for key, value in row["ratios"].items():
            if value is not None:
                lines = panels.setdefault(f"{titles[key]} of a step / lora", {})
                lines.setdefault(row["variant"], []).append((row["hypotheses"], value))
    for row in generation:
        lines = panels.setdefault("time of generation / one call", {})
        prompts = f"{row['prompts']} prompt{'s' * (row['prompts'] > 1)}"
        lines.setdefault(f"K calls, {prompts}", []).append((row["hypotheses"], row["calls_over_one_call"]))
        beams = 1 / row["one_call_over_beam_search"]
        lines.setdefault(f"K beams, {prompts}", []).append((row["hypotheses"], beams))

    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 4.5), layout="constrained", squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, points in lines.items():
            axis.plot(*zip(*points, strict=True), "k--" if label == "lora" else "o-", label=label)
        axis.set_title(title)
        axis.set_xlabel("K")
        axis.set_xticks(sorted({count for points in lines.values() for count, _ in points}))
        axis.set_ylim(bottom=0)
        axis.legend()
    save_plot(figure, path)
    plt.close(figure)


# --- the program ---


def check(args: BenchmarkArguments) -> None:
    """Raise a ValueError for what can be seen to fail before anything is measured."""
    least = {"repeats": 1, "threads": 1, "batch_size": 1, "length": 2, "prompt_length": 1, "new_tokens": 1}
    for name, bound in least.items():
        if getattr(args, name) < bound:
            raise ValueError(f"`{name}` must be {bound} or more, got {getattr(args, name)}.")
    for name in ("hypotheses", "prompts"):
        values = getattr(args, name)
        if not values or min(values) < 1:
            raise ValueError(f"`{name}` must be one or more numbers from 1 on, got {values}.")
    unknown = sorted(set(args.variants or []) - set(VARIANTS))
    if unknown:
        raise ValueError(f"`variants`: there is no {unknown[0]!r}. Choose from {', '.join(VARIANTS)}.")
    if args.skip_training and args.skip_generation:
        raise ValueError("`skip_training` and `skip_generation` leave nothing to measure. Leave one of them out.")
    if Path(args.output).suffix != ".json":
        raise ValueError(f"`output` must be the name of a .json file, got {args.output!r}.")
    if args.model != "tiny":
        try:
            AutoConfig.from_pretrained(args.model)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`model`: {args.model!r} is neither 'tiny' nor a model that can be loaded. Give a directory with a "
                f"config.json or an id of the Hub. ({error})"
            ) from error
    if args.dataset is not None:
        check_dataset(args)


def check_dataset(args: BenchmarkArguments) -> None:
    if args.model == "tiny":
        raise ValueError(
            f"`dataset` ({args.dataset!r}) needs a `model` with a tokenizer, but that is 'tiny'. Name one."
        )
    if not Path(args.dataset).is_file():
        raise ValueError(f"`dataset`: there is no file {args.dataset!r}. Give a JSONL file, or leave it out.")
    rows = load_dataset("json", data_files=args.dataset, split="train")
    if not {"prompt", "completion"} <= set(rows.column_names):
        raise ValueError(f"`dataset` needs the columns 'prompt' and 'completion', but has {rows.column_names}.")
    if len(rows) < args.batch_size:
        raise ValueError(f"`dataset` has {len(rows)} rows, less than one batch of `batch_size` = {args.batch_size}.")


def main(args: BenchmarkArguments) -> None:
    args.threads = os.cpu_count() if args.threads is None else args.threads
    disable_progress_bars()
    check(args)
    args.hypotheses = sorted(set(args.hypotheses))
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    # For the workers, which inherit it. Threads that spin while another worker has its turn would take the cores from it:
    # GNU's OpenMP stops after a millisecond on its own, Intel's needs to be told.
    os.environ.update(OMP_NUM_THREADS=str(args.threads), KMP_BLOCKTIME="1", TOKENIZERS_PARALLELISM="false")
    # Trainer would split batches over all the GPUs it sees.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

    # Not a terminal: as wide as the tables.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    console.print(
        f"{args.model} on {device}, {args.threads} threads, torch {torch.__version__}, {args.dtype}, "
        f"{args.batch_size} rows x {'at most ' if args.dataset else ''}{args.length} tokens, {args.repeats} repeats"
        f"{', gradient checkpointing' if args.gradient_checkpointing else ''}"
    )
    training: list[dict[str, Any]] = []
    for count in [] if args.skip_training else args.hypotheses:
        rows = measure_training(args, count)
        training += rows
        times = ", ".join(f"{row['variant']} {row['ratios']['seconds']:.2f}x" for row in rows)
        console.print(f"K = {count}: {times}")
    generation = [] if args.skip_generation else list(measure_generation(args))

    if training:
        show_training(console, training)
    if generation:
        show_generation(console, generation, args.new_tokens)
    found = targets(training, generation, args.gradient_checkpointing)
    show_targets(console, found, args.threads)

    setting = {"device": device, "torch": torch.__version__, "platform": platform.platform(), **asdict(args)}
    results = {"setting": setting, "training": training, "generation": generation, "targets": found}
    write_whole(output, json.dumps(results, indent=2) + "\n")
    draw(training, generation, output.with_suffix(".png"))
    console.print(f"Wrote {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    try:
        main(*TrlParser((BenchmarkArguments,)).parse_args_and_config())
    except WorkerFailed as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
