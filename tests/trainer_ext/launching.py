"""How the tests start several processes: torchrun, and accelerate with DeepSpeed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml


ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="DeepSpeed builds an extension with g++: apt-get install g++"
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def torchrun(processes: int = 2) -> list[str]:
    """The beginning of a command; a script and its arguments follow."""
    options = ["--nproc_per_node", str(processes), "--master_port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *options]


def deepspeed(directory: Path, zero: dict[str, Any], processes: int = 2) -> list[str]:
    """As `torchrun`, for accelerate with DeepSpeed: `zero` is the `zero_optimization` part of DeepSpeed's own configuration."""
    own = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    (directory / "deepspeed.json").write_text(json.dumps(own))
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "deepspeed_config_file": str(directory / "deepspeed.json"),
            "zero3_init_flag": zero["stage"] == 3,
        },
        "num_machines": 1,
        "num_processes": processes,
    }
    (directory / "accelerate.yaml").write_text(yaml.safe_dump(config))
    options = ["--config_file", str(directory / "accelerate.yaml"), "--main_process_port", str(free_port())]
    return [sys.executable, "-m", "accelerate.commands.launch", *options]


def finish(command: list[str], timeout: float = 400, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(command, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=timeout)
