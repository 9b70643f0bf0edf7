"""How `tests/faults.py` starts runs of recipes/train_mcl.py, waits for places in them, and tells what is left of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.tiny import tiny_llama
from tests.trainer_ext.launching import ROOT, environment, free_port, torchrun
from tests.trainer_ext.reference import ragged_pairs, word_tokenizer
from trainer_ext.checkpoints import find_damage, last_whole_checkpoint


# A run of this size takes some seconds, so what takes this long hangs.
HANGS_AFTER = 240
KINDS = {"1 process": 1, "DDP": 2, "ZeRO-2": 2, "ZeRO-3": 2}
STEPS, SAVE_STEPS = 6, 2
# What a resumed run has to repeat to be the same.
CURVE = ("step", "loss", "grad_norm", "learning_rate", "wta_nll", "mean_nll", "temperature", "win_share/0", "eval_loss")


class UnexpectedError(Exception):
    """The project did not do what the table promises."""


def expect(condition: Any, otherwise: str) -> None:
    if not condition:
        raise UnexpectedError(otherwise)


def launcher(kind: str, processes: int) -> list[str]:
    if kind == "1 process":
        return [sys.executable]
    if kind == "DDP":
        return torchrun(processes)
    config = f"recipes/accelerate/{kind.lower().replace('-', '')}.yaml"
    options = ["--config_file", config, "--num_processes", str(processes), "--main_process_port", str(free_port())]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, "--mixed_precision", "no"]


class Run:
    """A run that is going on, `waiting` of whose processes will wait; its output goes to a file."""

    def __init__(self, command: list[str], folder: Path, env: dict[str, str], waiting: int = 1) -> None:
        self.folder, self.waiting, self.signalled = folder, waiting, time.monotonic()
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            # A group of its own, as a shell gives it: Ctrl-C goes to all of it.
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def workers(self) -> dict[int, int]:
        """The ids of the processes that wait, by rank."""
        return {int(path.stem): int(path.read_text()) for path in self.folder.glob("*.pid")}

    def until_it_waits(self) -> None:
        start = time.monotonic()
        while len(self.workers) < self.waiting:
            expect(self.process.poll() is None, f"ended before it was reached: {self.message()}")
            expect(time.monotonic() - start < HANGS_AFTER, "was never reached")
            time.sleep(0.05)

    def go_on(self) -> None:
        self.signalled = time.monotonic()
        (self.folder / "go").touch()

    def interrupt(self, number: int) -> None:
        """Send a signal to the launcher and what is in its group (that of torchrun's workers is their own)."""
        self.signalled = time.monotonic()
        os.killpg(self.process.pid, number)

    def kill(self, rank: int) -> None:
        os.kill(self.workers[rank], signal.SIGKILL)
        self.go_on()

    def end(self) -> int:
        """Wait for the end of all processes.

        Returns:
            The exit status as a shell shows it.
        """
        try:
            status = self.process.wait(HANGS_AFTER)
        except subprocess.TimeoutExpired:
            for pid in (*self.workers.values(), self.process.pid):
                with_children(pid, signal.SIGKILL)
            raise UnexpectedError(f"hung for {HANGS_AFTER} s") from None
        self.seconds = time.monotonic() - self.signalled
        left = [rank for rank, pid in self.workers.items() if Path(f"/proc/{pid}").exists()]
        expect(not left, f"processes of rank {left} are left behind")
        return 128 - status if status < 0 else status

    def message(self) -> str:
        """The line about an interrupt, or the error of the process that failed first, without those that follow from it."""
        if "\nInterrupted." in self.text:
            return "Interrupted." + self.text.split("\nInterrupted.")[1].split("\n")[0]
        last: dict[str, str] = {}
        for line in self.text.splitlines():
            rank, error = re.match(r"(\[rank\d+\]: )?(.*)", line.strip()).groups()  # type: ignore[union-attr]
            if re.match(r"[\w.]*(Error|Exception|Interrupt|Invalid)\b", error) and "ChildFailedError" not in error:
                # Of errors that were raised from one another, the last is the one that is for the user.
                last.pop(rank, None)
                last[rank] = error
        first_hand = [error for error in last.values() if "Connection" not in error and "SignalException" not in error]
        return next(iter(first_hand or last.values()), "")


def with_children(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(os.getpgid(pid), number)


class Lab:
    """A folder with a tiny model, data, and runs; what the faults share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
        self.base = folder / "base"
        tiny_llama(**sizes).save_pretrained(self.base)
        word_tokenizer().save_pretrained(self.base)
        self.data, self.eval_data = folder / "train.jsonl", folder / "eval.jsonl"
        self.write_rows(self.data, 48)
        self.write_rows(self.eval_data, 5)
        self._whole: dict[tuple[str, ...], Path] = {}
        self._count = 0

    @staticmethod
    def write_rows(path: Path, rows: int) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in ragged_pairs(rows)), encoding="utf-8")

    def new(self, name: str = "out") -> Path:
        self._count += 1
        path = self.folder / f"{self._count:03d}-{name}"
        path.mkdir()
        return path

    def start(
        self,
        kind: str,
        output: Path,
        *options: str,
        wait_at: str | None = None,
        env: dict[str, str] | None = None,
        base: Path | None = None,
        processes: int | None = None,
        batch_size: int = 2,
        python: Path | None = None,
    ) -> Run:
        """Start the user's command; with `wait_at` by the script that waits there (`waiting_run.py`)."""
        processes = processes or KINDS[kind]
        folder = self.new("run")
        waits = {"WAIT_AT": wait_at, "WAIT_IN": str(folder)} if wait_at else {}
        script = "tests/waiting_run.py" if wait_at else "recipes/train_mcl.py"
        given = {option for option in options if option.startswith("--")}
        settings = {
            "--model_name_or_path": str(base or self.base),
            "--dataset_name": str(self.data),
            "--output_dir": str(output),
            "--per_device_train_batch_size": str(batch_size),
            "--dtype": "float32",
            "--bf16": "False",
            "--gradient_checkpointing": "False",
            "--lora_r": "4",
            "--lora_target_modules": "all-linear",
            "--lora_dropout": "0.1",
            "--max_steps": str(STEPS),
            "--save_steps": str(SAVE_STEPS),
            "--save_total_limit": "3",
            "--logging_steps": "1",
            "--learning_rate": "1e-2",
            "--report_to": "none",
            "--eval_dataset_name": str(self.eval_data),
            "--eval_strategy": "steps",
            "--eval_steps": str(SAVE_STEPS),
        }
        if "--dataset_streaming" in given:
            settings |= {"--eval_strategy": "no"}
            del settings["--eval_dataset_name"]
        arguments = [text for name, value in settings.items() if name not in given for text in (name, value)]
        start = [str(python)] if python else launcher(kind, processes)
        command = [*start, script, "--use_cpu", *arguments, *options]
        # The adapter is saved by the first process alone.
        return Run(command, folder, environment(**waits, **(env or {})), 1 if wait_at == "adapter" else processes)

    def finish(self, kind: str, output: Path, *options: str, **settings: Any) -> tuple[int, Run]:
        run = self.start(kind, output, *options, **settings)
        return run.end(), run

    def whole(self, kind: str, *options: str, **settings: Any) -> Path:
        """The output of an uninterrupted run, made once."""
        key = (kind, *options, *(f"{name}={value}" for name, value in settings.items()))
        if key not in self._whole:
            output = self.new("whole")
            status, run = self.finish(kind, output, *options, **settings)
            expect(status == 0, f"the uninterrupted run failed: {run.message()}")
            self._whole[key] = output
        return self._whole[key]

    def copy(self, output: Path) -> Path:
        copy = self.new()
        shutil.copytree(output, copy, dirs_exist_ok=True)
        return copy

    def goes_on(self, kind: str, output: Path, *options: str, whole: Path | None = None, **settings: Any) -> str:
        """Resume a run, and compare all of it with the uninterrupted one."""
        whole = whole or self.whole(kind, *options)
        start = last_whole_checkpoint(output).name
        status, run = self.finish(kind, output, *options, "--resume_from_checkpoint", "True", **settings)
        expect(status == 0, f"could not be resumed: {run.message()}")
        resumed, expected = curve(output), curve(whole)
        expect(
            len(resumed) == len(expected) >= STEPS,
            f"resumed from {start}, but has {len(resumed)} of {len(expected)} logs",
        )
        for ours, theirs in zip(resumed, expected, strict=True):
            for name, value in theirs.items():
                expect(
                    abs(ours[name] - value) <= 1e-5 * max(1, abs(value)),
                    f"resumed from {start}, but {name} of step {theirs['step']} is {ours[name]}, not {value}",
                )
        ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (output, whole))
        for name, tensor in theirs.items():
            expect(
                torch.allclose(ours[name], tensor, rtol=1e-4, atol=1e-6), f"resumed from {start}, but {name} differs"
            )
        return f"resumed from {start}: same curve, same adapter"


def curve(output: Path) -> list[dict[str, float]]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [
        {name: log[name] for name in CURVE if name in log} for log in history if "loss" in log or "eval_loss" in log
    ]


def whole_checkpoints(output: Path) -> list[str]:
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    return [path.name for path in found if find_damage(path) is None]


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own, in memory (needs root)."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Fill up a file system but for `leave` bytes."""
    filler = folder / "filler"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with filler.open("wb") as file:
        for _ in range(max(free - leave, 0) // 4096):
            file.write(b"\0" * 4096)
    return filler


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """A folder that is mounted read-only on itself: permissions do not bind root, who this needs."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
