"""Tests of hypotheses saved as ordinary LoRA adapters, and of training that starts from such adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, load_file

from peft_mcl import from_lora_adapters, split_lora_adapter
from tests.hub_server import HubServer
from tests.tiny import tiny_llama
from tests.trainer_ext.reference import logged, ragged_pairs, trainer_for


ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(4, 22).view(3, 6)
FOLDERS = ["hypothesis_0", "hypothesis_1", "hypothesis_2"]
FILES = {"adapter_config.json", "adapter_model.safetensors"}


def logits(model: torch.nn.Module, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits


def are_slices_of(hypotheses: list[dict[str, torch.Tensor]], stacked: dict[str, torch.Tensor]) -> None:
    """The parameters of plain LoRA adapters are those of the hypotheses of an MCLORA adapter."""
    assert len(stacked) > 0
    for key, tensor in stacked.items():
        name = key.replace("mclora_", "lora_") + ".weight"
        assert all(torch.equal(hypotheses[k][name], tensor[k]) for k in range(3))
        assert not torch.equal(tensor[0], tensor[1])


# --- saving ---


def test_hypotheses_beside_the_model(tmp_path: Path):
    options = {"save_hypotheses": True, "save_strategy": "steps", "save_steps": 2, "objective": "wta"}
    trainer = trainer_for(tmp_path, **options)
    trainer.train()
    # What is resumed from holds nothing that transformers would take for more adapters of the model.
    assert not list(tmp_path.glob("checkpoint-*/hypothesis_*"))
    assert not list(tmp_path.glob("hypothesis_*"))
    trainer.save_model()
    trainer.save_model(str(tmp_path / "elsewhere"))
    trainer.model.eval()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        assert sorted(path.name for path in folder.glob("*hypothesis*")) == FOLDERS
        assert not list(folder.glob(".export-*"))
        for k, name in enumerate(FOLDERS):
            assert {path.name for path in (folder / name).iterdir()} == FILES
            lora = PeftModel.from_pretrained(tiny_llama(), folder, subfolder=name).eval()
            assert torch.equal(logits(lora), logits(trainer.model, hypotheses=k))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded, hypotheses="all"), logits(trainer.model, hypotheses="all"))

    resumed = trainer_for(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert torch.equal(logits(resumed.model.eval(), hypotheses="all"), logits(loaded, hypotheses="all"))


def test_not_unless_asked_for(tmp_path: Path):
    trainer = trainer_for(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.glob("hypothesis_*"))


def test_weights_that_were_saved_in_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any):
    """FSDP then writes no adapter file; the run ends all the same, and says what is missing."""
    trainer = trainer_for(tmp_path, max_steps=1, save_hypotheses=True)
    trainer.train()
    monkeypatch.setattr(trainer, "_save", lambda output_dir=None, state_dict=None: None)
    trainer.save_model()
    assert "there is no adapter in" in caplog.text
    assert not list(tmp_path.glob("*hypothes*"))


def test_hypotheses_of_a_named_adapter(tmp_path: Path):
    lora(tmp_path / "lora")
    model = split_lora_adapter(tiny_llama(), tmp_path / "lora", 3, adapter_name="mine")
    trainer = trainer_for(tmp_path / "out", model=model, save_hypotheses=True, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert sorted(path.name for path in (tmp_path / "out" / "mine").iterdir() if path.is_dir()) == FOLDERS


@pytest.mark.slow
def test_two_processes_and_the_hub(tmp_path: Path):
    with HubServer() as hub:
        environment = {
            **os.environ,
            **hub.environment(tmp_path / "home"),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        script = str(ROOT / "tests" / "trainer_ext" / "saving_run.py")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*torchrun, script, str(tmp_path / "out")]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
        commits = hub.repositories["user/trained"].branches["main"]
    at_checkpoint = next(commit for commit in commits if commit.message == "Training in progress, step 3")
    for commit in (at_checkpoint, commits[-1]):
        files = {path: file.content for path, file in commit.files.items()}
        folders = {path.partition("/")[0] for path in files if "/" in path}
        assert {folder for folder in folders if "hypothesis" in folder or "export" in folder} == set(FOLDERS)
        stacked = load(files["adapter_model.safetensors"])
        are_slices_of([load(files[f"{name}/adapter_model.safetensors"]) for name in FOLDERS], stacked)
    for path in [path for path in files if "hypothesis" in path]:
        assert (tmp_path / "out" / path).read_bytes() == files[path]


# --- starting from ordinary adapters ---


def lora(path: Path, seed: int = 0) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(tiny_llama(), config).eval()
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("perturbation", [0.0, 0.1])
def test_training_of_one_adapter_that_was_split(perturbation: float, tmp_path: Path):
    expected = logits(lora(tmp_path / "lora"))
    model = split_lora_adapter(tiny_llama(), tmp_path / "lora", 3, perturbation=perturbation)
    data = ragged_pairs(rows=24)
    trainer = trainer_for(tmp_path / "out", model=model, data=data, objective="wta", max_steps=3)
    before = trainer.score(data)
    ties = (before.scores == before.scores.max(dim=1, keepdim=True).values).sum(dim=1)
    if perturbation:
        # Each sequence has a winner of its own, though none is far from the adapter that all of them come from.
        assert (ties == 1).all()
        torch.testing.assert_close(logits(model, hypotheses=0), expected, rtol=0.5, atol=0.2)
    else:
        assert (ties == 3).all()
    # Ties are broken at random: no hypothesis takes everything.
    assert (before.winners.bincount(minlength=3) > 0).all()
    stacked = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(stacked) == {name for name, _ in model.named_parameters() if "mclora_" in name}
    first = {name: parameter.clone() for name, parameter in stacked.items()}
    trainer.train()
    assert len(logged(trainer, "wta_nll")) == 3
    for name, parameter in stacked.items():
        # All of them have learnt, each from sequences of its own.
        assert all(not torch.equal(parameter[k], first[name][k]) for k in range(3))
        assert not torch.equal(parameter[0] - first[name][0], parameter[1] - first[name][1])


def test_training_of_several_adapters(tmp_path: Path):
    plain = [lora(tmp_path / str(seed), seed) for seed in range(2)]
    model = from_lora_adapters(tiny_llama(), [tmp_path / "0", tmp_path / "1"], is_trainable=True)
    data = ragged_pairs(rows=16)
    trainer = trainer_for(
        tmp_path / "out", model=model, data=data, objective="wta", max_steps=8, learning_rate=3e-2, save_hypotheses=True
    )
    before = trainer.score(data)
    assert all(torch.equal(logits(model, hypotheses=k), logits(plain[k])) for k in range(2))
    trainer.train()
    after = trainer.score(data)
    assert after.scores.max(dim=1).values.sum() > before.scores.max(dim=1).values.sum()
    # Out again, and each hypothesis is the adapter that it came from, trained on.
    trainer.save_model()
    for k in range(2):
        theirs, ours = (
            load_file(f / "adapter_model.safetensors")
            for f in (tmp_path / str(k), tmp_path / "out" / f"hypothesis_{k}")
        )
        assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in theirs.items()}
        assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
