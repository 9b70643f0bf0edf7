"""A run that was killed between and during checkpoints goes on as if it had not been."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer_ext.killed_run import KILLED_DURING, STEPS
from tests.trainer_ext.launching import deepspeed, finish, needs_compiler, torchrun
from trainer_ext.checkpoints import find_damage


pytestmark = pytest.mark.slow


def command(kind, root):
    scripts = "tests/trainer_ext"
    if kind.startswith("zero"):
        return [
            *deepspeed(root, {"stage": int(kind[-1]), "stage3_param_persistence_threshold": 0}),
            f"{scripts}/killed_run.py",
        ]
    if kind == "fsdp2":
        return [*torchrun(), f"{scripts}/fsdp2.py", "killed"]
    return [*(torchrun() if kind == "ddp" else [sys.executable]), f"{scripts}/killed_run.py"]


@pytest.mark.parametrize(
    "kind",
    [
        "one process",
        "ddp",
        "fsdp2",
        pytest.param("zero1", marks=[needs_compiler, pytest.mark.long]),
        pytest.param("zero2", marks=[needs_compiler, pytest.mark.long]),
        pytest.param("zero3", marks=needs_compiler),
    ],
)
def test_killed_runs_go_on(kind, tmp_path):
    # Sharded runs take long to start.
    for phase in ("between", "during", "not") if kind in ("one process", "ddp") else ("during", "not"):
        # The last sees what the one before it left: a half-written checkpoint of step 6, which is newer than the whole one of step 4.
        finished = finish([*command(kind, tmp_path), str(tmp_path), phase], timeout=240)
        assert (finished.returncode == 0) == (phase == "not"), finished.stderr[-3000:]
        if phase == "during":
            half = tmp_path / "cut" / f"checkpoint-{KILLED_DURING}"
            assert (half / "adapter_model.safetensors").is_file()
            assert "not written to its end" in find_damage(half)
            assert find_damage(tmp_path / "cut" / "checkpoint-4") is None
    assert "checkpoint-6 is passed over" in finished.stderr

    whole, cut = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "cut"))
    assert len(cut) == len(whole) == STEPS
    for ours, theirs in zip(cut, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    names = {path.name for path in (tmp_path / "cut").glob("checkpoint-*")}
    assert names == {f"checkpoint-{STEPS - 2}", f"checkpoint-{STEPS}"}
    for name in names:
        assert find_damage(tmp_path / "cut" / name) is None
        ours, theirs = (load_file(tmp_path / run / name / "adapter_model.safetensors") for run in ("cut", "whole"))
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-7)
