"""The same global batch gives the same run, whatever it is launched with: one process, DDP, ZeRO-1, 2 and 3, FSDP2."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer_ext.launched_run import (
    CASES,
    EVALUATED,
    GLOBAL_BATCH,
    OBJECTIVES,
    QUANTISED,
    WITHOUT_NOISE,
    run,
    save_base,
)
from tests.trainer_ext.launching import deepspeed, finish, needs_compiler, torchrun


pytestmark = pytest.mark.slow

# Small enough that the adapters are sharded, too.
SHARD_ALL = {"stage3_param_persistence_threshold": 0}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# The kind of launch, DeepSpeed's `zero_optimization`, and the cases.
LAUNCHES: dict[str, tuple[dict | None, list[str]]] = {
    "ddp": (None, [*CASES, QUANTISED, EVALUATED]),
    "fsdp2": (None, [*CASES]),
    "zero1": ({"stage": 1}, [*OBJECTIVES, "revived"]),
    "zero2": ({"stage": 2}, [*CASES, QUANTISED]),
    "zero2, offloaded": ({"stage": 2, **OFFLOAD}, ["annealed", "checkpointed", "revived"]),
    "zero3": ({"stage": 3, **SHARD_ALL}, [*CASES, QUANTISED]),
    "zero3, offloaded": ({"stage": 3, **SHARD_ALL, **OFFLOAD}, ["annealed", "checkpointed", "revived"]),
}
SEEN = {
    "ddp": ("MULTI_CPU", "DistributedDataParallel"),
    "fsdp2": ("FSDP", "FSDPPeftModelForCausalLM"),
}
KINDS = [pytest.param(kind, marks=needs_compiler if zero else ()) for kind, (zero, _) in LAUNCHES.items()]


@pytest.fixture(scope="module", params=KINDS)
def launched(request, tmp_path_factory):
    """The kind of launch, and what each of its two processes with four rows each saw, by case."""
    zero, cases = LAUNCHES[request.param]
    root = tmp_path_factory.mktemp("launched")
    save_base(root)
    launcher = torchrun() if zero is None else deepspeed(root, zero)
    script = ["fsdp2.py", "launched"] if request.param == "fsdp2" else ["launched_run.py"]
    script[0] = f"tests/trainer_ext/{script[0]}"
    finished = finish([*launcher, *script, str(root), str(GLOBAL_BATCH // 2), *cases])
    assert finished.returncode == 0, finished.stderr[-3000:]
    return request.param, [json.loads((root / f"process_{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process with eight rows saw, by case."""
    root = tmp_path_factory.mktemp("alone")
    save_base(root)
    return {case: run(case, root, per_device_train_batch_size=GLOBAL_BATCH) for case in (*CASES, QUANTISED, EVALUATED)}


def assert_same_run(found, expected, tolerance):
    assert len(found["logs"]) == len(expected["logs"]) == 6
    for ours, theirs in zip(
        (*found["logs"], found["evaluated"]), (*expected["logs"], expected["evaluated"]), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    ours, theirs = load_file(found["adapter"]), load_file(expected["adapter"])
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name].float(), tensor.float(), rtol=0, atol=tolerance, msg=name)


def test_the_launch_is_what_it_seems(launched):
    kind, processes = launched
    zero, _ = LAUNCHES[kind]
    for own in processes:
        for found in own.values():
            assert found["processes"] == 2
            assert (found["distributed_type"], found["wrapper"]) == SEEN.get(kind, ("DEEPSPEED", "DeepSpeedEngine"))
            assert found["zero_stage"] == (None if zero is None else zero["stage"])


def test_two_processes_do_what_one_does(launched, alone):
    kind, (first, second) = launched
    for case in LAUNCHES[kind][1]:
        # TRL keeps the adapters of a 4-bit base in bfloat16, so gradients are rounded before they are added up.
        tolerance = 3e-3 if case == QUANTISED else 2e-6
        assert_same_run(first[case], alone[case], tolerance)
        for ours, theirs in zip(second[case]["logs"], first[case]["logs"], strict=True):
            for name in ("wta_nll", "mean_nll", "worst_nll", "mixture_nll", "win_share/0", "temperature"):
                assert ours.get(name) == theirs.get(name), name


def test_copies_stay_copies(launched, alone):
    kind, (first, _) = launched
    if WITHOUT_NOISE not in LAUNCHES[kind][1]:
        return
    found = equal_pairs(first[WITHOUT_NOISE]["adapter"])
    assert found == equal_pairs(alone[WITHOUT_NOISE]["adapter"])
    assert 0 < len(found) < 28


def equal_pairs(file):
    """The pairs of equal hypotheses in an adapter."""
    tensors = load_file(file)
    rows = torch.cat([tensors[name].flatten(1) for name in sorted(tensors)], dim=1)
    gaps = (rows[:, None] - rows[None]).abs().amax(dim=2)
    return {(i, j) for i, j in (gaps < 1e-6).nonzero().tolist() if i < j}


@pytest.mark.parametrize("case", CASES)
def test_accumulation_does_what_one_batch_does(alone, case, tmp_path):
    options = {"per_device_train_batch_size": GLOBAL_BATCH // 2, "gradient_accumulation_steps": 2}
    assert_same_run(run(case, tmp_path, **options), alone[case], 2e-6)


def test_the_runs_are_not_trivial(alone):
    """Ties at the first step go to several hypotheses, training changes the hypotheses, and the objectives differ."""
    for case, found in alone.items():
        shares = [found["logs"][0][f"win_share/{k}"] for k in range(3)]
        assert max(shares) < 1, case
        assert abs(found["evaluated"]["loss"] - found["evaluated"]["worst_nll"]) > 1e-3, case
    for case in ("revived", WITHOUT_NOISE):
        assert sum(log["revived"] for log in alone[case]["logs"]) > 2
    losses = {case: tuple(log["loss"] for log in alone[case]["logs"]) for case in OBJECTIVES}
    assert len(set(losses.values())) == len(OBJECTIVES)
