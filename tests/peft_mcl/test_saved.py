"""Tests of adapters in folders and on the Hub: one repository that holds the MCLORA adapter and its hypotheses.

The client of the Hub reads its settings when it is imported, so pushing and loading are programs of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from peft_mcl.saved import SavedAdapter
from tests.hub_server import HubServer
from tests.tiny import tiny_llama, with_hypotheses


ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(4, 22).view(3, 6)

PUSH = """
import sys
from pathlib import Path
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from peft_mcl import export_hypotheses
from tests.tiny import tiny_llama, with_hypotheses

folder = Path(sys.argv[1])
tiny_llama().save_pretrained(folder / "base")
api = HfApi()
for name in ("both", "pickled"):
    api.create_repo(f"user/{name}")
for seed in (1, 2):
    model = with_hypotheses(type(tiny_llama()).from_pretrained(folder / "base"), seed=seed)
    model.save_pretrained(folder / "both")
    export_hypotheses(folder / "both", folder / "both")
    print(api.upload_folder(repo_id="user/both", folder_path=folder / "both").oid)
lora = folder / "both" / "hypothesis_0"
torch.save(load_file(lora / "adapter_model.safetensors"), lora / "adapter_model.bin")
(lora / "adapter_model.safetensors").unlink()
api.upload_folder(repo_id="user/pickled", folder_path=lora)
"""

# What anyone can do who has PEFT and nothing else.
STOCK = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM

ids = torch.arange(4, 22).view(3, 6)
results, first, base = sys.argv[1:]
plain = lambda: AutoModelForCausalLM.from_pretrained(base)
for load in (
    AutoPeftModelForCausalLM.from_pretrained,
    AutoModelForCausalLM.from_pretrained,
    lambda name: PeftModel.from_pretrained(plain(), name),
):
    try:
        load("user/both")
    except KeyError as error:
        print("KeyError:", error)
found = {
    "subfolder": PeftModel.from_pretrained(plain(), "user/both", subfolder="hypothesis_1"),
    "revision": PeftModel.from_pretrained(plain(), "user/both", subfolder="hypothesis_1", revision=first),
    "swapped": PeftModel.from_pretrained(plain(), "user/both", subfolder="hypothesis_0"),
    "named": PeftModel.from_pretrained(plain(), "user/both", subfolder="hypothesis_0"),
}
hotswap_adapter(found["swapped"], "user/both", adapter_name="default", subfolder="hypothesis_2", torch_device="cpu")
found["named"].load_adapter("user/both", adapter_name="two", subfolder="hypothesis_2")
found["named"].set_adapter("two")
with torch.no_grad():
    torch.save({name: model.eval()(input_ids=ids).logits for name, model in found.items()}, results)
assert "peft_mcl" not in sys.modules
"""

OURS = """
import sys
import torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
from peft_mcl import check_serving, export_hypotheses, from_lora_adapters, split_lora_adapter

ids = torch.arange(4, 22).view(3, 6)
results, first, base = sys.argv[1:]
plain = lambda: AutoModelForCausalLM.from_pretrained(base)
added = plain()
added.load_adapter("user/both")
found = {
    "stacked": from_lora_adapters(plain(), ["user/both/hypothesis_2", f"user/both/hypothesis_0@{first}"]),
    "split": split_lora_adapter(plain(), f"user/both/hypothesis_1@{first}", 2, perturbation=0),
    "transformers": AutoModelForCausalLM.from_pretrained("user/both"),
    "added": added,
    "exported": PeftModel.from_pretrained(plain(), export_hypotheses(f"user/both@{first}", results + ".exported")[2]),
}
check_serving("user/both/hypothesis_1", "vllm", max_lora_rank=8)
with torch.no_grad():
    logits = {}
    for name, model in found.items():
        model.eval()
        if name == "exported":
            logits[name] = model(input_ids=ids).logits
        else:
            count = {"stacked": 2, "split": 2}.get(name, 3)
            logits[name] = torch.cat([model(input_ids=ids, hypotheses=k).logits for k in range(count)])
    logits["generated"] = found["added"].generate(ids, max_new_tokens=4)
torch.save(logits, results)
for adapter in ("user/pickled", "user/missing", "user/both/hypothesis_7", "user/both/hypothesis_0@nowhere", "user/both"):
    try:
        from_lora_adapters(plain(), [adapter])
    except ValueError as error:
        print(error)
"""


def run(program: str, hub: HubServer, home: Path, *arguments: str) -> str:
    environment = {**os.environ, **hub.environment(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, str, str]]:
    """A Hub, the commit of the first of two versions there, and the base model."""
    folder = tmp_path_factory.mktemp("pushed")
    with HubServer() as server:
        *_, first, _ = run(PUSH, server, tmp_path_factory.mktemp("home"), str(folder)).split()
        yield server, first, str(folder / "base")


def expected(seed: int) -> list[torch.Tensor]:
    model = with_hypotheses(tiny_llama(), seed=seed)
    with torch.no_grad():
        return [model(input_ids=IDS, hypotheses=k).logits for k in range(3)]


def test_one_repository_serves_plain_peft(pushed: tuple[HubServer, str, str], tmp_path: Path):
    hub, first, base = pushed
    output = run(STOCK, hub, tmp_path, str(tmp_path / "logits.pt"), first, base)
    # All that is said of the MCLORA adapter itself; the first lines of its card tell what to do about exactly this.
    assert output == "KeyError: 'MCLORA'\n" * 3
    head = hub.files("user/both")["README.md"].decode().split("##")[0]
    assert "`KeyError: 'MCLORA'`" in head
    assert "`import peft_mcl`" in head
    found, newest = torch.load(tmp_path / "logits.pt"), expected(seed=2)
    assert torch.equal(found["subfolder"], newest[1])
    assert torch.equal(found["revision"], expected(seed=1)[1])
    assert torch.equal(found["swapped"], newest[2])
    assert torch.equal(found["named"], newest[2])


def test_and_this_package(pushed: tuple[HubServer, str, str], tmp_path: Path):
    hub, first, base = pushed
    output = run(OURS, hub, tmp_path, str(tmp_path / "logits.pt"), first, base)
    found, older, newest = torch.load(tmp_path / "logits.pt"), expected(seed=1), expected(seed=2)
    assert torch.equal(found["stacked"], torch.cat([newest[2], older[0]]))
    assert torch.equal(found["split"], torch.cat([older[1], older[1]]))
    assert torch.equal(found["transformers"], torch.cat(newest))
    assert torch.equal(found["added"], torch.cat(newest))
    assert torch.equal(found["exported"], older[2])
    model = with_hypotheses(tiny_llama(), seed=2)
    assert torch.equal(found["generated"], model.generate(IDS, max_new_tokens=4))
    assert "There is no adapter_model.safetensors in user/pickled" in output
    for name in ("user/missing", "user/both/hypothesis_7", "user/both/hypothesis_0@nowhere"):
        assert f"The adapter_config.json of the adapter {name} cannot be found." in output
    assert "user/both has a MCLoraConfig; it is not an ordinary LoRA adapter" in output


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = (
        ("user/name", None, None),
        ("user/name", "a/b", None),
        ("user/name", None, "v1"),
        ("user/name", "a", "refs/pr/1"),
    )
    for name, parts in zip(("user/name", "user/name/a/b", "user/name@v1", "user/name/a@refs/pr/1"), hub, strict=True):
        found = SavedAdapter.find(name, token="secret")
        assert (found.location, found.subfolder, found.revision) == parts
        assert found.name == name
        assert found.token == "secret"
        assert "secret" not in repr(found)
    # A folder comes first, and a path is never the name of a repository.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "name@v1").mkdir(parents=True)
    assert SavedAdapter.find("user/name@v1") == SavedAdapter("user/name@v1", "user/name@v1")
    for missing in (Path("user/name"), "alone", "/nowhere/at/all", "user/name@"):
        with pytest.raises(ValueError, match="there is no such folder, and it is no adapter of the Hub"):
            SavedAdapter.find(missing)
