"""Tests of pushing to and loading from the Hub, with the real client and a server on loopback.

The client reads its settings when it is imported, so pushing and loading are programs of their own, each with an empty
cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tests.hub_server import TOKEN, HubServer
from tests.tiny import tiny_llama, with_hypotheses


ROOT = Path(__file__).resolve().parents[2]

PUSH = """
import sys
from huggingface_hub import HfApi
from peft_mcl import export_hypotheses
from tests.tiny import tiny_llama, with_hypotheses

model = with_hypotheses(tiny_llama())
print(model.push_to_hub("user/hypotheses", commit_message="All hypotheses"))
for k, directory in enumerate(export_hypotheses(model, sys.argv[1])):
    HfApi().create_repo(f"user/hypothesis_{k}")
    HfApi().upload_folder(repo_id=f"user/hypothesis_{k}", folder_path=directory)
with_hypotheses(tiny_llama(), seed=2).push_to_hub("user/hypotheses", commit_message="Better ones")
"""

LOAD = """
import sys
import torch
from peft import AutoPeftModel, PeftConfig, PeftModel
from peft_mcl import MCLoraConfig, from_lora_adapters
from tests.tiny import tiny_llama

ids = torch.arange(4, 22).view(3, 6)
config = PeftConfig.from_pretrained("user/hypotheses")
assert type(config) is MCLoraConfig, config
model = PeftModel.from_pretrained(tiny_llama(), "user/hypotheses").eval()
pinned = PeftModel.from_pretrained(tiny_llama(), "user/hypotheses", revision=sys.argv[2]).eval()
alone = [PeftModel.from_pretrained(tiny_llama(), f"user/hypothesis_{k}").eval() for k in range(3)]
stacked = from_lora_adapters(tiny_llama(), [f"user/hypothesis_{k}" for k in (2, 0)]).eval()
try:
    PeftModel.from_pretrained(tiny_llama(), "user/missing")
except ValueError as error:
    print("refused:", error)
with torch.no_grad():
    torch.save(
        {
            "all": model(ids, hypotheses="all").logits,
            "generated": model.generate(ids, max_new_tokens=4),
            "pinned": pinned(ids, hypotheses="all").logits,
            "alone": torch.cat([lora(ids).logits for lora in alone]),
            "stacked": stacked(ids, hypotheses="all").logits,
        },
        sys.argv[1],
    )
"""


def run(program: str, hub: HubServer, home: Path, *arguments: str) -> str:
    environment = {**os.environ, **hub.environment(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, exported: Path) -> Iterator[HubServer]:
    """A Hub that the adapters were pushed to."""
    with HubServer() as server:
        assert f"{server.endpoint}/user/hypotheses" in run(PUSH, server, tmp_path_factory.mktemp("push"), str(exported))
        yield server


def test_what_was_pushed(hub: HubServer):
    assert set(hub.repositories) == {"user/hypotheses", *(f"user/hypothesis_{k}" for k in range(3))}
    messages = [commit.message for commit in hub.repositories["user/hypotheses"]]
    assert messages == ["initial commit", "All hypotheses", "Better ones"]
    files = hub.files("user/hypotheses")
    assert set(files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(files["adapter_config.json"])
    assert config["peft_type"] == "MCLORA"
    assert config["num_hypotheses"] == 3
    weights = load(files["adapter_model.safetensors"])
    assert all(tensor.shape[0] == 3 for tensor in weights.values())
    assert hub.repositories["user/hypotheses"][-1].files["adapter_model.safetensors"].is_lfs


def test_exported_directories_arrive_unchanged(hub: HubServer, exported: Path):
    assert len(list(exported.iterdir())) == 3
    for k in range(3):
        directory = exported / f"hypothesis_{k}"
        files = {name: content for name, content in hub.files(f"user/hypothesis_{k}").items() if name[0] != "."}
        assert files == {path.name: path.read_bytes() for path in directory.iterdir()}


def test_loading_in_a_fresh_home(hub: HubServer, tmp_path: Path):
    first = hub.repositories["user/hypotheses"][1].sha
    output = run(LOAD, hub, tmp_path, str(tmp_path / "results.pt"), first)
    assert "refused: Can't find 'adapter_config.json' at 'user/missing'" in output
    found = torch.load(tmp_path / "results.pt")
    model, newest = with_hypotheses(tiny_llama()), with_hypotheses(tiny_llama(), seed=2)
    ids = torch.arange(4, 22).view(3, 6)
    with torch.no_grad():
        expected = model(ids, hypotheses="all").logits
        torch.testing.assert_close(found["all"], newest(ids, hypotheses="all").logits)
    assert torch.equal(found["generated"], newest.generate(ids, max_new_tokens=4))
    torch.testing.assert_close(found["pinned"], expected)
    torch.testing.assert_close(found["alone"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["stacked"], torch.cat([expected[6:], expected[:3]]), rtol=1e-4, atol=1e-4)


def test_nothing_is_written_without_the_token(hub: HubServer, tmp_path: Path):
    before = {name: len(commits) for name, commits in hub.repositories.items()}
    program = """
import os
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
try:
    HfApi(token="hf_wrong").upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="user/hypotheses")
except HfHubHTTPError as error:
    print("refused", error.response.status_code)
"""
    assert run(program, hub, tmp_path) == "refused 401\n"
    assert {name: len(commits) for name, commits in hub.repositories.items()} == before
    assert TOKEN != "hf_wrong"
