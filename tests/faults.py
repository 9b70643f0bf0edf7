"""Injects real faults into real runs of the recipes, and writes what it saw to docs/faults.md.

```bash
make faults                         # all of them; as root, who can mount small and read-only file systems
python -m tests.faults Ctrl-C       # those whose line contains this; the others keep their lines
```

Every run is the user's own command, `recipes/train_mcl.py` or `recipes/generate.py`, on a tiny model. Where a fault must hit
a certain place, the run waits there (`waiting_run.py`). After it, the run is resumed and compared with an uninterrupted one.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.fault_runs import (
    ROOT,
    Lab,
    Run,
    UnexpectedError,
    environment,
    expect,
    fill,
    read_only,
    small_disk,
    whole_checkpoints,
)
from tests.hub_server import HubServer
from trainer_ext.checkpoints import find_damage


PAGE = ROOT / "docs" / "faults.md"


@dataclass
class Fault:
    """A line of the table: `inject` returns what was seen, or raises `UnexpectedError`."""

    title: str
    how: str
    expected: str
    inject: Callable[[Lab], str]


FAULTS: list[Fault] = []


def fault(title: str, how: str, expected: str) -> Callable[[Callable[[Lab], str]], Callable[[Lab], str]]:
    def add(inject: Callable[[Lab], str]) -> Callable[[Lab], str]:
        FAULTS.append(Fault(title, how, expected, inject))
        return inject

    return add


def fails(run: Run, *parts: str, status: int | None = None) -> str:
    """The end of a run that must fail, with a message that has these parts; in words."""
    found = run.end()
    expect(found != 0, "ended as if nothing had happened")
    expect(status in (None, found), f"exit status {found}, not {status}")
    message = run.message()
    for part in parts:
        expect(part in message, f"the message lacks {part!r}: {message!r}")
    return f"exit {found} after {run.seconds:.0f} s" + (f": {shown(message)}" if message else "")


def shown(message: str, most: int = 230) -> str:
    return f"“{message if len(message) <= most else message[:most] + ' …'}”"


# --------------------------------------------------------------------------------------------------------------------
# Processes that end


def killed(kind: str, rank: int) -> None:
    @fault(
        f"Killed process ({kind})",
        f"SIGKILL of rank {rank} of 2 in step 4",
        "the other ends with an error, no hang; resumes",
    )
    def inject(lab: Lab) -> str:
        output = lab.new()
        run = lab.start(kind, output, wait_at="step 3")
        run.until_it_waits()
        run.kill(rank)
        return f"{fails(run)}; {lab.goes_on(kind, output)}"


for _kind, _rank in (("DDP", 0), ("DDP", 1), ("ZeRO-2", 0), ("ZeRO-3", 1)):
    killed(_kind, _rank)


def signalled(name: str, number: int, kind: str, place: str, where: str) -> None:
    @fault(
        f"{name} ({kind})",
        f"{signal.Signals(number).name} to the process group {where}",
        "ends within seconds, not with status 0; no half-written checkpoint or adapter; resumes",
    )
    def inject(lab: Lab) -> str:
        output = lab.new()
        before = whole_checkpoints(output)
        if place == "adapter":
            # One of an earlier run, which must survive.
            output = lab.copy(lab.whole(kind))
            shutil.rmtree(output / "checkpoint-6")
        adapter = output / "adapter_model.safetensors"
        earlier = adapter.read_bytes() if adapter.exists() else None
        resume = ("--resume_from_checkpoint", "True") if place == "adapter" else ()
        run = lab.start(kind, output, *resume, wait_at=place)
        run.until_it_waits()
        run.interrupt(number)
        seen = fails(run)
        if number == signal.SIGINT:
            expect(
                "Interrupted" in run.text or "KeyboardInterrupt" in run.text, "it does not say that it was interrupted"
            )
            expect("Traceback" not in run.text or kind != "1 process", "the interrupt is shown as a traceback")
        expect((adapter.read_bytes() if adapter.exists() else None) == earlier, "the adapter in output_dir was changed")
        expect(not list(output.glob(".saving-*")) or number == signal.SIGTERM, "a folder of the save is left behind")
        if whole_checkpoints(output) == before:
            return f"{seen}; before the first checkpoint"
        return f"{seen}; {lab.goes_on(kind, output)}"


for _kind, _place, _where in (
    ("1 process", "data", "while data is prepared"),
    ("1 process", "step 3", "in a step"),
    ("1 process", "evaluation 4", "in evaluation"),
    ("1 process", "checkpoint 4", "while a checkpoint is written"),
    ("1 process", "adapter", "in the final save"),
    ("DDP", "step 3", "in a step"),
    ("DDP", "evaluation 4", "in evaluation"),
    ("DDP", "checkpoint 4", "while a checkpoint is written"),
    ("DDP", "adapter", "in the final save"),
    ("ZeRO-3", "checkpoint 4", "while a checkpoint is written"),
):
    signalled("Ctrl-C", signal.SIGINT, _kind, _place, _where)
signalled("SIGTERM", signal.SIGTERM, "1 process", "step 3", "in a step")
signalled("SIGTERM", signal.SIGTERM, "DDP", "step 3", "in a step")
signalled("SIGTERM", signal.SIGTERM, "1 process", "checkpoint 4", "while a checkpoint is written")
signalled("SIGTERM", signal.SIGTERM, "DDP", "checkpoint 4", "while a checkpoint is written")


# --------------------------------------------------------------------------------------------------------------------
# Files that cannot be written


def full_disk(kind: str) -> None:
    @fault(
        f"Disk full, checkpoint ({kind})",
        "a file system of 16 MB (tmpfs) is filled up before the checkpoint of step 4",
        "clear error; the checkpoint of step 2 stays whole; resumes once there is room",
    )
    def inject(lab: Lab) -> str:
        with small_disk(lab.new("disk"), 16) as disk:
            output = disk / "out"
            run = lab.start(kind, output, wait_at="step 3")
            run.until_it_waits()
            # Enough for the adapter, not for the optimizer.
            filler = fill(disk, leave=(output / "checkpoint-2" / "adapter_model.safetensors").stat().st_size * 3 // 2)
            run.go_on()
            seen = fails(run, "checkpoint-4' could not be written", "MB are free")
            expect(whole_checkpoints(output) == ["checkpoint-2"], f"whole are {whole_checkpoints(output)}")
            expect(not (output / "checkpoint-4").exists(), "a part of checkpoint-4 is left")
            filler.unlink()
            return f"{seen}; {lab.goes_on(kind, output)}"


for _kind in ("1 process", "DDP", "ZeRO-3"):
    full_disk(_kind)


@fault(
    "Disk full, final adapter (1 process)",
    "the same, before the adapter is saved over the one of an earlier run",
    "clear error; the earlier adapter and all checkpoints are intact; resumes once there is room",
)
def _(lab: Lab) -> str:
    with small_disk(lab.new("disk"), 16) as disk:
        output = disk / "out"
        shutil.copytree(lab.whole("1 process"), output)
        # The run before this one was another.
        adapter = output / "adapter_model.safetensors"
        save_file({name: tensor * 2 for name, tensor in load_file(adapter).items()}, adapter)
        earlier = adapter.read_bytes()
        shutil.rmtree(output / "checkpoint-6")
        run = lab.start("1 process", output, "--resume_from_checkpoint", "True", wait_at="before the adapter")
        run.until_it_waits()
        filler = fill(disk, leave=4096)
        run.go_on()
        seen = fails(run, "could not be written", "No space left on device", "as they were")
        expect(adapter.read_bytes() == earlier, "the earlier adapter was changed")
        expect(whole_checkpoints(output) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"], "checkpoints were lost")
        filler.unlink()
        return f"{seen}; {lab.goes_on('1 process', output)}"


@fault(
    "Read-only output directory",
    "a read-only bind mount",
    "refused by name before the model is loaded",
)
def _(lab: Lab) -> str:
    with read_only(lab.new("read-only")) as output:
        # There is no such model, so loading it would be an error of its own.
        run = lab.start("1 process", output, base=lab.folder / "nothing")
        return fails(run, "`output_dir`", str(output), "Read-only file system")


@fault("Output directory below a file", "a file of that name", "refused by name before the model is loaded")
def _(lab: Lab) -> str:
    file = lab.new() / "file"
    file.touch()
    return fails(lab.start("1 process", file / "out", base=lab.folder / "nothing"), "`output_dir`", "Not a directory")


# --------------------------------------------------------------------------------------------------------------------
# Damaged files


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "cut to half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": Path.unlink,
}
FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")


def damaged(kind: str, pattern: str, damage: str) -> None:
    @fault(
        f"Damaged checkpoint ({kind})",
        f"`{pattern}` of the newest one {damage if damage != 'a flipped bit' else 'with ' + damage}",
        "passed over with a warning that names the file; resumes from the one before",
    )
    def inject(lab: Lab) -> str:
        output = lab.copy(lab.whole(kind))
        file = next((output / "checkpoint-6").rglob(pattern))
        DAMAGE[damage](file)
        found = find_damage(output / "checkpoint-6")
        expect(found is not None, "the damage is not seen")
        resumed = lab.goes_on(kind, output)
        log = sorted(lab.folder.glob("*-run"))[-1] / "log.txt"
        expect(
            "checkpoint-6 is passed over" in log.read_text() and file.name in found, "there is no warning that names it"
        )
        return f"“{found}”; {resumed}"


for _index, _file in enumerate(FILES):
    damaged("1 process", _file, list(DAMAGE)[_index % len(DAMAGE)])
damaged("ZeRO-3", "*_optim_states.pt", "a flipped bit")


@fault(
    "Damaged checkpoint, all files",
    f"each of {len(FILES)} files, each {', '.join(DAMAGE)}",
    "every one is noticed and named",
)
def _(lab: Lab) -> str:
    for name in FILES:
        for damage, inflict in DAMAGE.items():
            checkpoint = lab.copy(lab.whole("1 process")) / "checkpoint-6"
            inflict(checkpoint / name)
            expect(name in (find_damage(checkpoint) or ""), f"{name} {damage} is not noticed")
    return f"all {len(FILES) * len(DAMAGE)} noticed and named"


@fault(
    "Damaged checkpoint that is named",
    "`--resume_from_checkpoint .../checkpoint-6` with a flipped bit in its optimizer",
    "refused, with the name of the file",
)
def _(lab: Lab) -> str:
    output = lab.copy(lab.whole("1 process"))
    flip(output / "checkpoint-6" / "optimizer.pt")
    run = lab.start("1 process", output, "--resume_from_checkpoint", str(output / "checkpoint-6"))
    return fails(run, "`resume_from_checkpoint`", "optimizer.pt")


# --------------------------------------------------------------------------------------------------------------------
# NaN


def poison(file: Path, name: str, index: tuple[int, ...]) -> None:
    tensors = load_file(file)
    key = next(key for key in tensors if name in key)
    tensors[key][index] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


@fault(
    "NaN in the base model",
    "one number of one frozen weight",
    "error that names the tensor and the step; nothing is saved",
)
def _(lab: Lab) -> str:
    base, output = lab.new("base"), lab.new()
    shutil.copytree(lab.base, base, dirs_exist_ok=True)
    poison(base / "model.safetensors", "layers.1.mlp.up_proj", (0, 0))
    seen = fails(lab.start("1 process", output, base=base), "layers.1.mlp.up_proj", "step 0")
    expect(not whole_checkpoints(output) and not list(output.glob("*.safetensors")), "something was saved")
    return seen


def diverges(kind: str) -> None:
    @fault(
        f"NaN that arises in training ({kind})",
        "a learning rate of 0 in the first step, of 1e30 in the second; a checkpoint after each",
        "error that says what and when, and what to change; earlier checkpoints stay, none has NaN",
    )
    def inject(lab: Lab) -> str:
        output = lab.new()
        rising = ("--learning_rate", "1e33", "--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "1000")
        run = lab.start(kind, output, *rising, "--save_steps", "1")
        seen = fails(run, "finite", "learning_rate")
        kept = whole_checkpoints(output)
        expect(kept, "no checkpoint is left")
        for name in kept:
            tensors = load_file(output / name / "adapter_model.safetensors")
            expect(all(tensor.isfinite().all() for tensor in tensors.values()), f"{name} has NaN")
        expect(not (output / "adapter_model.safetensors").exists(), "an adapter was saved")
        return f"{seen}; kept: {', '.join(kept)}"


for _kind in ("1 process", "DDP", "ZeRO-3"):
    diverges(_kind)


# --------------------------------------------------------------------------------------------------------------------
# Another number of processes


def other_world(saved: str, running: str, batch_size: int) -> None:
    @fault(
        f"World size on resume ({saved} -> {running})",
        "resumed with another number of processes and the same global batch of 4, without dropout",
        "warned; the same curve",
    )
    def inject(lab: Lab) -> str:
        options = ("--lora_dropout", "0")
        whole = lab.whole(saved, *options, batch_size=4 if saved == "1 process" else 2)
        output = lab.copy(whole)
        for step in (4, 6):
            shutil.rmtree(output / f"checkpoint-{step}")
        resumed = lab.goes_on(running, output, *options, whole=whole, batch_size=batch_size)
        log = (sorted(lab.folder.glob("*-run"))[-1] / "log.txt").read_text()
        expect("processes, and" in log and "are running" in log, "there is no warning")
        return f"warned; {resumed}"


other_world("DDP", "1 process", 4)
other_world("1 process", "DDP", 2)


def other_shards(kind: str) -> None:
    @fault(f"World size on resume ({kind})", "written by 2 processes, resumed with 1", "refused, with both numbers")
    def inject(lab: Lab) -> str:
        output = lab.copy(lab.whole(kind))
        run = lab.start(kind, output, "--resume_from_checkpoint", "True", processes=1)
        return fails(run, "written by 2 processes", "but 1 ")


for _kind in ("ZeRO-2", "ZeRO-3"):
    other_shards(_kind)


# --------------------------------------------------------------------------------------------------------------------
# What DeepSpeed needs


@fault(
    "No compiler for DeepSpeed (ZeRO-2)",
    "no g++, c++, gcc, cc or clang on the PATH, empty TORCH_EXTENSIONS_DIR",
    "error that names the package, before the model is loaded",
)
def _(lab: Lab) -> str:
    tools = lab.new("tools")
    for folder in os.environ["PATH"].split(":"):
        for tool in Path(folder).glob("*"):
            if not os.path.lexists(tools / tool.name) and not re.search(r"[gc]\+\+|gcc|clang|^cc$|^c\d\d", tool.name):
                (tools / tool.name).symlink_to(tool)
    env = {"PATH": str(tools), "TORCH_EXTENSIONS_DIR": str(lab.new("extensions")), "CXX": "c++"}
    run = lab.start("ZeRO-2", lab.new(), env=env, base=lab.folder / "nothing")
    return fails(run, "apt-get install g++")


@fault(
    "Killed build of DeepSpeed (ZeRO-2)",
    "the lock of an hour ago, as a kill in the middle of a build leaves it in TORCH_EXTENSIONS_DIR",
    "error that names the lock, no hang",
)
def _(lab: Lab) -> str:
    extensions = lab.new("extensions")
    lock = extensions / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    run = lab.start("ZeRO-2", lab.new(), env={"TORCH_EXTENSIONS_DIR": str(extensions)}, base=lab.folder / "nothing")
    return fails(run, str(lock), "Remove the file")


@fault(
    "DeepSpeed is not installed",
    "an environment with all packages but this one; ACCELERATE_USE_DEEPSPEED=true",
    "error that names the package, before the model is loaded",
)
def _(lab: Lab) -> str:
    place = lab.new("environment")
    venv.create(place, with_pip=False, symlinks=True)
    packages = next(place.glob("lib/python*/site-packages"))
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.startswith(("deepspeed", "__pycache__", "__editable__", "distutils-precedence")):
            (packages / entry.name).symlink_to(entry)
    env = {"ACCELERATE_USE_DEEPSPEED": "true"}
    run = lab.start("1 process", lab.new(), env=env, base=lab.folder / "nothing", python=place / "bin" / "python")
    return fails(run, "pip install 'peft-mcl[deepspeed]'")


# --------------------------------------------------------------------------------------------------------------------
# Adapters that are not what they seem


def generate(lab: Lab, adapter: Path | str, **env: str) -> Run:
    command = [sys.executable, "recipes/generate.py", "--adapter", str(adapter), "--prompts", "one two"]
    return Run([*command, "--max_new_tokens", "3"], lab.new("run"), environment(**env))


def without_one(tensors: dict[str, torch.Tensor], key: str) -> None:
    del tensors[key]


def with_another(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors["base_model.model.model.layers.9.self_attn.q_proj.mclora_A"] = torch.zeros(3, 4, 64)


def with_two_hypotheses(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors.update({name: tensor[:2].contiguous() for name, tensor in tensors.items()})


def with_another_rank(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = tensors[key][:, :, :2].contiguous()


def with_nan(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key][1, 0, 0] = float("nan")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.mclora_B"


def foreign(what: str, change: Callable[[dict[str, torch.Tensor], str], None], *parts: str) -> None:
    @fault(
        f"Adapter file {what}",
        "the safetensors file is rewritten; `PeftModel`, `AutoPeftModelForCausalLM`, recipes/generate.py",
        "each refuses it and lists the tensors",
    )
    def inject(lab: Lab) -> str:
        adapter = lab.copy(lab.whole("1 process"))
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors, KEY)
        save_file(tensors, file, metadata={"format": "pt"})
        for load in (
            lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(lab.base), adapter),
            lambda: AutoPeftModelForCausalLM.from_pretrained(adapter),
        ):
            try:
                load()
            except (ValueError, RuntimeError) as error:
                message = str(error)
            else:
                raise UnexpectedError("it was loaded")
            for part in parts:
                expect(part in message, f"the message lacks {part!r}: {message!r}")
        run = generate(lab, adapter)
        seen = fails(run)
        expect(all(part in run.text for part in parts), "recipes/generate.py does not list the tensors")
        return f"{seen.split(':')[0]}: {shown(' '.join(message.split()))}"


foreign("lacks a tensor", without_one, "lacks 1 of", "layers.0.self_attn.q_proj.mclora_B")
foreign("with a foreign tensor", with_another, "have no place in the model", "layers.9.self_attn.q_proj.mclora_A")
foreign("of 2 hypotheses, configuration says 3", with_two_hypotheses, "other shapes", "mclora_B", "(2, 64, 4)")
foreign("with a wrong shape", with_another_rank, "other shapes", "q_proj.mclora_B", "(3, 64, 2)")
foreign("with NaN", with_nan, "NaN", "hypothesis 1", "layers.0.self_attn.q_proj.mclora_B")


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


def malicious_adapter(lab: Lab) -> tuple[Path, Path]:
    adapter, trace = lab.copy(lab.whole("1 process")), lab.folder / "trace"
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({KEY: Malicious(trace)}, adapter / "adapter_model.bin")
    return adapter, trace


@fault(
    "Malicious pickle, local",
    "`adapter_model.bin` that makes a folder when it is unpickled, in place of the safetensors file; recipes/generate.py",
    "refused; no folder is made",
)
def _(lab: Lab) -> str:
    adapter, trace = malicious_adapter(lab)
    seen = fails(generate(lab, adapter), "pickle", "is not read")
    expect(not trace.exists(), "the pickle was run")
    return f"{seen}; no folder"


@fault("Malicious pickle, Hub", "the same file in a repository of a Hub on loopback", "refused; no folder is made")
def _(lab: Lab) -> str:
    adapter, trace = malicious_adapter(lab)
    with HubServer() as server:
        env = {**server.environment(lab.new("home")), "HF_HUB_OFFLINE": "0"}
        push = (
            "from huggingface_hub import HfApi; import sys\n"
            "HfApi().create_repo('user/pickle')\n"
            "HfApi().upload_folder(repo_id='user/pickle', folder_path=sys.argv[1], allow_patterns=['adapter*', 'token*'])"
        )
        pushed = Run([sys.executable, "-c", push, str(adapter)], lab.new("run"), environment(**env))
        expect(pushed.end() == 0, f"the upload failed: {pushed.message()}")
        seen = fails(generate(lab, "user/pickle", **env), "pickle", "is not read")
    expect(not trace.exists(), "the pickle was run")
    return f"{seen}; no folder"


# --------------------------------------------------------------------------------------------------------------------
# Data


def breaks(kind: str) -> None:
    @fault(
        f"Data that breaks in the middle ({kind})",
        "a streamed data set of three files, the second of which is no JSON",
        "error that names the file, no hang; resumes once it is repaired",
    )
    def inject(lab: Lab) -> str:
        rows = lab.data.read_text().splitlines(keepends=True)
        # Of each process's own rows the first four batches are good: there is a checkpoint by then.
        size = 8

        def write(folder: Path, broken: bool) -> Path:
            parts = [rows[:size], rows[size : 2 * size], rows[2 * size :]]
            for number, part in enumerate(parts):
                content = "".join(part) if number != 1 or not broken else "{no json\n"
                (folder / f"train-{number}.jsonl").write_text(content)
            return folder

        data, output = write(lab.new("data"), broken=True), lab.new()
        options = ("--dataset_name", str(data), "--dataset_streaming", "True")
        run = lab.start(kind, output, *options)
        seen = fails(run, "JSON parse error")
        expect("train-1.jsonl" in run.text, "the file is not named")
        expect(whole_checkpoints(output), "no checkpoint is left")
        write(data, broken=False)
        return f"{seen}; {lab.goes_on(kind, output, *options)}"


for _kind in ("1 process", "DDP"):
    breaks(_kind)


@fault(
    "No evaluation data",
    "`--eval_strategy steps` with a file for training only",
    "refused, with the splits there are, before the model is loaded",
)
def _(lab: Lab) -> str:
    run = lab.start("1 process", lab.new(), "--eval_dataset_name", "", base=lab.folder / "nothing")
    return fails(run, "dataset_test_split", "'test'", "['train']")


@fault("Empty evaluation data", "an empty file", "refused by name, before the model is loaded")
def _(lab: Lab) -> str:
    empty = lab.new("data") / "empty.jsonl"
    empty.touch()
    run = lab.start("1 process", lab.new(), "--eval_dataset_name", str(empty), base=lab.folder / "nothing")
    return fails(run, "empty")


# --------------------------------------------------------------------------------------------------------------------
# The table


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    names = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "deepspeed")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    commit = git("rev-parse", "--short", "HEAD")
    if git("status", "--porcelain", "--", ".", ":!docs"):
        commit += " with changes"
    return f"{os.cpu_count()} cores ({model}), Python {sys.version.split()[0]}, {versions}; commit {commit}"


def page(lines: dict[str, str]) -> str:
    """The page, with a line of the table for each fault, by its beginning."""
    bad = sum("**not as expected**" in line for line in lines.values())
    introduction = f"""\
# Faults

What happens when things go wrong, as `make faults` saw it. Each fault is a real one in real processes; each run is
`recipes/train_mcl.py` (or `recipes/generate.py`) on a tiny model, with 6 steps, a checkpoint and an evaluation after every 2, and
dropout. “Same curve”: the resumed run logged in all steps what an uninterrupted one did (loss, gradient norm, likelihoods,
temperature, win share, evaluation; to 1e-5), and saved the same adapter. Times are from the fault, or else from the start of
the command, to the end of all processes. A part of the faults can be run alone, and rewrites its own lines; the commit is that
of the last run.

{machine()}. {len(lines)} faults, {bad or "none"} not as expected.

| fault | injected | expected | seen |
|---|---|---|---|
"""
    return introduction + "\n".join(lines.values()) + "\n"


def beginning(entry: Fault) -> str:
    return f"| {entry.title} | {entry.how} |"


def line_of(entry: Fault, good: bool, seen: str) -> str:
    seen = seen.replace("|", "\\|")
    return f"{beginning(entry)} {entry.expected} | {seen if good else f'**not as expected**: {seen}'} |"


def main(chosen: list[str]) -> int:
    # A shell that starts this in the background lets it ignore Ctrl-C, and so would all runs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faults = [entry for entry in FAULTS if not chosen or any(text in f"{entry.title} {entry.how}" for text in chosen)]
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    lab, bad, start = Lab(folder), 0, time.monotonic()
    # Those of earlier runs, which a part of the faults leaves as they are.
    written = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    lines = {
        beginning(entry): next((text for text in written if text.startswith(beginning(entry))), "") for entry in FAULTS
    }
    for number, entry in enumerate(faults, 1):
        print(
            f"[{number}/{len(faults)}, {(time.monotonic() - start) / 60:.1f} min] {entry.title}: {entry.how}",
            flush=True,
        )
        try:
            good, seen = True, entry.inject(lab)
        except UnexpectedError as error:
            good, seen = False, str(error)
        seen = " ".join(seen.replace(f"{folder}/", "").replace(f"{ROOT}/", "").split())
        print(f"    {'as expected' if good else 'NOT AS EXPECTED'}: {seen}", flush=True)
        bad += not good
        lines[beginning(entry)] = line_of(entry, good, seen)
        PAGE.write_text(page({key: line for key, line in lines.items() if line}), encoding="utf-8")
    if bad:
        print(f"{bad} of {len(faults)} not as expected; the runs and their logs are in {folder}")
    else:
        shutil.rmtree(folder)
    print(f"Written: {PAGE}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
