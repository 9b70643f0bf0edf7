"""Two processes on a CPU (gloo) compute what one process computes on the same global batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer_ext.reference import adapted_llama, assert_same_gradients, gradients_by_hand
from tests.trainer_ext.two_processes import ACCUMULATION, BATCH_SIZE, CASES, STEPS, run


ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of the two processes saw, by case."""
    root = tmp_path_factory.mktemp("processes")
    launcher = f"-m torch.distributed.run --nproc_per_node 2 --master_port {free_port()}"
    finished = subprocess.run(
        [sys.executable, *launcher.split(), "tests/trainer_ext/two_processes.py", str(root)],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [torch.load(root / f"process_{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_there_are_two_processes(processes, case):
    for own in processes:
        assert own[case]["processes"] == 2
        assert own[case]["distributed_type"] == "DistributedType.MULTI_CPU"
        assert own[case]["wrapper"] == "DistributedDataParallel"


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_brute_force_on_the_global_batch(processes, case):
    first, second = (own[case] for own in processes)
    assert len(first["gradients"]) == len(second["gradients"]) == STEPS
    normalization = CASES[case].get("loss_normalization", "token")
    for step in range(STEPS):
        own = range(step * ACCUMULATION, (step + 1) * ACCUMULATION)
        batches = [process["batches"][index] for process in (first, second) for index in own]
        weights = [process["weights"][index].tolist() for process in (first, second) for index in own]
        expected = gradients_by_hand(adapted_llama(), batches, weights, normalization)
        assert_same_gradients(first["gradients"][step], expected, 2e-5)
        assert_same_gradients(second["gradients"][step], first["gradients"][step], 1e-7)


@pytest.mark.parametrize("case", [case for case in CASES if "random" not in case and "sampled" not in case])
def test_one_process_with_the_same_global_batch_agrees(processes, case, tmp_path):
    alone = run(case, tmp_path, per_device_train_batch_size=2 * BATCH_SIZE)
    assert alone["processes"] == 1
    # Examples are decoded by one process alone; several, which would have to decode together, leave them out.
    assert "## Examples" in alone["card"]
    together = processes[0][case]
    assert "## Results" in together["card"]
    assert "## Examples" not in together["card"]
    for own, other in zip(alone["gradients"], together["gradients"], strict=True):
        assert_same_gradients(other, own, 2e-5)
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    # TRL's own two are means over batches, in which several processes repeat sequences to fill the last one.
    exact = [name for name in alone["metrics"] if name not in ("eval_entropy", "eval_mean_token_accuracy")]
    assert "eval_wta_nll" in exact
    for name in exact:
        assert together["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-5), name
    for ours, theirs in zip(together["logs"][:STEPS], alone["logs"][:STEPS], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("wta_nll", "mean_nll", "worst_nll", "mixture_nll", "win_share/0", "assignment_entropy"):
            if case == "remembered" and name not in ours:
                continue
            # Rows without labels draw their winner; they count nowhere.
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_processes_draw_differently(processes):
    for normalization in ("token", "sequence"):
        draws = [torch.cat(own[f"random, {normalization}"]["weights"]) for own in processes]
        assert not torch.equal(*draws)


def test_processes_make_the_same_calls(processes):
    calls = [own["processes of one mind"]["calls"] for own in processes]
    assert calls[0] == calls[1]
    # They did not agree because both saw the same: only one of them had rows that all carry weight.
    shares = [[(w > 0).float().mean().item() for w in own["processes of one mind"]["weights"]] for own in processes]
    assert shares[0] == [1.0] * len(shares[0])
    assert max(shares[1]) < 0.5


def test_processes_score_in_as_many_calls(processes):
    first, second = (own["different numbers of scoring calls"]["calls"] for own in processes)
    assert first == second
    assert first[0] == "score in 2 calls"


def test_processes_remember_together(processes):
    first, second = (own["remembered"] for own in processes)
    # The second step is the second epoch: its call of `score_sequences` has nothing to do.
    assert first["calls"] == second["calls"] == ["score in 1 calls", "run"] * 2 + ["score in 0 calls", "run"] * 2
    for own in (first, second):
        assert all(torch.equal(*pair) for pair in zip(own["weights"][:2], own["weights"][2:4], strict=True))
    assert "wta_nll" in first["logs"][0]
    assert "wta_nll" not in first["logs"][1]
