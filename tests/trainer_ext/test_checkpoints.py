"""What counts as a whole checkpoint, and what is left when writing one fails."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from tests.tiny import tiny_llama
from tests.trainer_ext.reference import logged, trainer_for
from trainer_ext import checkpoints
from trainer_ext.checkpoints import (
    MANIFEST_NAME,
    check_checkpoint,
    discard,
    find_damage,
    last_whole_checkpoint,
    processes_of,
    staged,
    whole_or_nothing,
    write_manifest,
)
from trainer_ext.launches import check_same_processes


FILES = {"adapter_model.safetensors": b"weights", "optimizer.pt": b"\x00" * 5000, "global_step3/shard_0.pt": b"shard"}


def write(directory, number, files=FILES, num_processes=2):
    checkpoint = directory / f"checkpoint-{number}"
    for name, content in files.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(content)
    write_manifest(checkpoint, num_processes)
    return checkpoint


def test_a_whole_checkpoint(tmp_path):
    checkpoint = write(tmp_path, 3)
    assert find_damage(checkpoint) is None
    assert processes_of(checkpoint) == 2
    check_checkpoint(checkpoint)
    manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        name: len(content) for name, content in FILES.items()
    }


def test_what_people_read_may_be_edited_and_files_may_be_added(tmp_path):
    checkpoint = write(tmp_path, 3, {**FILES, "README.md": b"card"})
    (checkpoint / "README.md").write_text("a better card")
    (checkpoint / "notes.txt").write_text("mine")
    assert find_damage(checkpoint) is None


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(FILES)), st.data())
def test_every_damage_is_found_and_named(tmp_path_factory, name, data):
    checkpoint = write(tmp_path_factory.mktemp("damage"), 3)
    path, content = checkpoint / name, FILES[name]
    kind = data.draw(st.sampled_from(["removed", "truncated", "flipped", "longer"]))
    if kind == "removed":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif kind == "longer":
        path.write_bytes(content + data.draw(st.binary(min_size=1, max_size=9)))
    else:
        place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :])
    assert name in find_damage(checkpoint)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("manifest", [None, "", '{"files": {"a"', "[]", '{"num_processes": 2}'])
def test_without_a_manifest_it_was_not_written_to_its_end(tmp_path, manifest):
    checkpoint = write(tmp_path, 3)
    (checkpoint / MANIFEST_NAME).unlink()
    if manifest is not None:
        (checkpoint / MANIFEST_NAME).write_text(manifest)
    assert "not written to its end" in find_damage(checkpoint)


def test_the_newest_whole_one_is_taken_by_number(tmp_path, caplog):
    whole = [write(tmp_path, number) for number in (2, 9, 10)]
    half = write(tmp_path, 11)
    (half / MANIFEST_NAME).unlink()
    changed = write(tmp_path, 12)
    (changed / "optimizer.pt").write_bytes(b"\x01" * 5000)
    (tmp_path / "checkpoint-13").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) == whole[-1]
    assert "checkpoint-12 is passed over: its file optimizer.pt was changed" in caplog.text
    assert "checkpoint-11 is passed over: it has no readable manifest.json" in caplog.text


def test_no_whole_one_lists_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="no whole checkpoint"):
        last_whole_checkpoint(tmp_path)
    (write(tmp_path, 4) / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint.*checkpoint-4: its file optimizer\.pt cannot be read"):
        last_whole_checkpoint(tmp_path)


def test_a_named_one_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint`: there is no directory .*checkpoint-7"):
        check_checkpoint(tmp_path / "checkpoint-7")


def test_discard_takes_the_manifest_first(tmp_path, monkeypatch):
    checkpoint = write(tmp_path, 3)
    seen = []
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda path: seen.append(find_damage(path)))
    discard(checkpoint)
    assert "not written to its end" in seen[0]
    monkeypatch.undo()
    discard(checkpoint)
    assert not checkpoint.exists()
    discard(checkpoint)


# How a full disk is told by safetensors, torch and the system; the texts of torch are those of its two writers.
FULL = [
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    RuntimeError("basic_ios::clear: iostream error"),
    OSError(28, "No space left on device"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:20])
def test_what_could_not_be_written_is_removed_and_named(tmp_path, error):
    half, earlier = tmp_path / "checkpoint-5", write(tmp_path, 3)

    def fail():
        with whole_or_nothing(half):
            half.mkdir()
            (half / "optimizer.pt").write_bytes(b"0")
            raise error

    with pytest.raises(OSError, match=r"checkpoint-5.* MB are free there.*Earlier checkpoints are whole"):
        fail()
    assert not half.exists()
    assert find_damage(earlier) is None


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), whole_or_nothing(tmp_path / "checkpoint-5"):
        raise RuntimeError("something else")


@pytest.mark.parametrize("error", [*FULL, KeyboardInterrupt()], ids=lambda error: str(error)[:20])
def test_staged_files_appear_together_or_not_at_all(tmp_path, error):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"old")
    (tmp_path / "README.md").write_text("mine")

    def fail():
        with staged(tmp_path) as staging:
            (staging / "adapter_model.safetensors").write_bytes(b"ne")
            raise error

    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError):
        fail()
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_model.safetensors"]
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"old"
    with staged(tmp_path) as staging:
        (staging / "adapter_model.safetensors").write_bytes(b"new")
        (staging / "second").mkdir()
        (staging / "second" / "adapter_config.json").write_text("{}")
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_model.safetensors", "second"]
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"new"
    assert (tmp_path / "README.md").read_text() == "mine"
    assert os.listdir(tmp_path / "second") == ["adapter_config.json"]


# --- in the trainer ---

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "objective": "wta"}


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path, save_total_limit=1, **SAVING)
    save = torch.save

    def save_on_a_full_disk(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        if "checkpoint-4" in str(path) and "optimizer" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save_on_a_full_disk)
    with pytest.raises(OSError, match=r"checkpoint-4.*No space left on device.*make room"):
        trainer.train()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = trainer_for(tmp_path, save_total_limit=1, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer_for(tmp_path / "whole", **SAVING)
    whole.train()
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_what_an_earlier_run_left_is_no_part_of_a_new_checkpoint(tmp_path):
    trainer_for(tmp_path, **SAVING).train()
    (tmp_path / "checkpoint-4" / "rng_state_1.pth").write_bytes(b"of another run")
    trainer_for(tmp_path, **SAVING).train()
    assert not (tmp_path / "checkpoint-4" / "rng_state_1.pth").exists()
    assert find_damage(tmp_path / "checkpoint-4") is None


def test_the_limit_on_checkpoints_holds_and_the_best_is_kept(tmp_path):
    trainer = trainer_for(tmp_path, save_total_limit=2, **SAVING)
    trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    assert trainer.args.save_total_limit == 2


def test_a_damaged_checkpoint_that_is_named_is_refused(tmp_path):
    trainer_for(tmp_path, **SAVING).train()
    checkpoint = tmp_path / "checkpoint-4"
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (checkpoint / "optimizer.pt").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"checkpoint-4.*its file optimizer\.pt has 6 bytes"):
        trainer_for(tmp_path, **SAVING).train(resume_from_checkpoint=str(checkpoint))
    # A whole one may have any name.
    resumed = trainer_for(tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=str(copy))
    assert resumed.state.global_step == 6


@pytest.mark.parametrize(("kind", "refused"), [("MULTI_CPU", False), ("DEEPSPEED", True), ("FSDP", True)])
def test_another_number_of_processes(tmp_path, caplog, kind, refused):
    class Accelerator:
        num_processes = 3
        distributed_type = kind

    check_same_processes(tmp_path, 3, Accelerator)
    assert not caplog.text
    if refused:
        with pytest.raises(ValueError, match=r"written by 2 processes.*but 3 are running\. Launch 2"):
            check_same_processes(tmp_path, 2, Accelerator)
    else:
        check_same_processes(tmp_path, 2, Accelerator)
        assert "was written by 2 processes, and 3 are running" in caplog.text


def test_a_finished_run_that_is_resumed_trains_nothing(tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer_for(tmp_path, **options).train()
    resumed = trainer_for(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert [log["step"] for log in resumed.state.log_history if "loss" in log] == [1, 2, 3]
    # But further than that it goes.
    longer = trainer_for(tmp_path, **{**options, "max_steps": 4})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 4


def test_weights_of_the_base_that_are_not_finite_are_named(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    trainer = trainer_for(tmp_path, model=model, save_strategy="steps", save_steps=1)
    with pytest.raises(FloatingPointError, match=r"step 0 .*base model has NaN .*layers.1.mlp.up_proj"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
