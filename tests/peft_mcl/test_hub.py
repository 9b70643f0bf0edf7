"""Tests of pushing to and loading from the Hub, with the real client and a server on loopback (see tests/conftest.py)."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from peft_mcl import MCLoraConfig, export_hypotheses
from tests.hub_server import GUEST_TOKEN, HubServer
from tests.tiny import tiny_llama, with_hypotheses


ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(4, 22).view(3, 6)


@torch.no_grad()
def all_logits(model) -> torch.Tensor:
    return model.eval()(IDS, hypotheses="all").logits


@pytest.fixture(scope="module")
def base(hub: HubServer) -> str:
    tiny_llama().push_to_hub("user/base")
    return "user/base"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def pushed(hub: HubServer, base: str, exported: Path) -> str:
    """A repository with an adapter, pushed twice, and its hypotheses as ordinary LoRA adapters beside it."""
    model = with_hypotheses(AutoModelForCausalLM.from_pretrained(base))
    model.push_to_hub("user/hypotheses", commit_message="All hypotheses")
    HfApi().create_tag("user/hypotheses", tag="v1")
    model = with_hypotheses(AutoModelForCausalLM.from_pretrained(base), seed=2)
    model.push_to_hub("user/hypotheses", commit_message="Better ones")
    export_hypotheses(model, exported)
    HfApi().upload_folder(repo_id="user/hypotheses", folder_path=exported, commit_message="Exported")
    return "user/hypotheses"


def refused(match: str, name: str, **options) -> None:
    with pytest.raises(ValueError, match=match):
        MCLoraConfig.from_pretrained(name, **options)


# --- what is pushed, and what comes back ---


def test_what_was_pushed(hub, pushed):
    assert hub.messages(pushed) == ["initial commit", "All hypotheses", "Better ones", "Exported"]
    files = hub.files(pushed)
    own = {name for name in files if "/" not in name}
    assert own == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(files["adapter_config.json"])
    assert (config["peft_type"], config["num_hypotheses"]) == ("MCLORA", 3)
    assert config["base_model_name_or_path"] == "user/base"
    assert "import peft_mcl" in config["requires"]
    weights = load(files["adapter_model.safetensors"])
    assert all(tensor.shape[0] == 3 for tensor in weights.values())
    assert hub.repositories[pushed].commit("main").files["adapter_model.safetensors"].is_lfs


def test_exported_directories_arrive_unchanged(hub, pushed, exported):
    here = {str(path.relative_to(exported)): path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    assert {name for name in here if "safetensors" in name} == {
        f"hypothesis_{k}/adapter_model.safetensors" for k in range(3)
    }
    assert {name: content for name, content in hub.files(pushed).items() if "/" in name} == here


def test_loading_what_was_pushed(pushed, base):
    first, newest = with_hypotheses(tiny_llama()), with_hypotheses(tiny_llama(), seed=2)
    expected = all_logits(newest)
    torch.testing.assert_close(all_logits(AutoPeftModelForCausalLM.from_pretrained(pushed)), expected)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), pushed)
    torch.testing.assert_close(all_logits(loaded), expected)
    pinned = PeftModel.from_pretrained(tiny_llama(), pushed, revision="v1")
    torch.testing.assert_close(all_logits(pinned), all_logits(first))


# --- branches, folders, private repositories ---


def test_branches_tags_and_commits(hub):
    first, second = with_hypotheses(tiny_llama()), with_hypotheses(tiny_llama(), seed=2)
    first.push_to_hub("user/branches")
    second.push_to_hub("user/branches", revision="runs/second")
    HfApi().create_tag("user/branches", tag="best", revision="runs/second")
    assert [ref.name for ref in HfApi().list_repo_refs("user/branches").branches] == ["main", "runs/second"]
    commit = hub.repositories["user/branches"].commit("main").sha
    for revision, model in (("main", first), (commit, first), ("runs/second", second), ("best", second)):
        loaded = PeftModel.from_pretrained(tiny_llama(), "user/branches", revision=revision)
        torch.testing.assert_close(all_logits(loaded), all_logits(model))
    refused(r"`revision`: 'user/branches' has no branch, tag or commit 'worst'", "user/branches", revision="worst")


def test_an_adapter_in_a_folder_of_a_repository(hub, tmp_path):
    model = with_hypotheses(tiny_llama())
    model.save_pretrained(tmp_path)
    HfApi().create_repo("user/folders")
    HfApi().upload_folder(repo_id="user/folders", folder_path=tmp_path, path_in_repo="inner/one")
    loaded = PeftModel.from_pretrained(tiny_llama(), "user/folders", subfolder="inner/one")
    torch.testing.assert_close(all_logits(loaded), all_logits(model))
    refused("'user/folders' has no adapter_config.json in subfolder 'two'", "user/folders", subfolder="two")
    refused("'user/folders' has no adapter_config.json: it holds no adapter there", "user/folders")


def test_a_private_repository(hub, tmp_path):
    model = with_hypotheses(tiny_llama())
    model.push_to_hub("user/private", private=True)
    assert hub.repositories["user/private"].private
    loaded = PeftModel.from_pretrained(tiny_llama(), "user/private")
    torch.testing.assert_close(all_logits(loaded), all_logits(model))
    # The client would show what is in its cache to anyone.
    for token in (GUEST_TOKEN, False):
        options = {"token": token, "cache_dir": tmp_path}
        refused(
            "'user/private' is neither a folder here nor a repository .* that your token", "user/private", **options
        )
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config[.]json' at 'user/private'"):
            PeftModel.from_pretrained(tiny_llama(), "user/private", **options)


# --- what cannot work ---


def test_a_pickle(hub, tmp_path):
    adapter = with_hypotheses(tiny_llama())
    adapter.peft_config["default"].save_pretrained(tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    HfApi().create_repo("user/pickle")
    HfApi().upload_folder(repo_id="user/pickle", folder_path=tmp_path)
    refused("'user/pickle' has its weights in a pickle", "user/pickle")
    with pytest.raises(ValueError, match="'user/pickle' has its weights in a pickle"):
        PeftModel.from_pretrained(tiny_llama(), "user/pickle")


def test_what_is_not_there(pushed, tmp_path):
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config[.]json' at 'user/missing'"):
        PeftModel.from_pretrained(tiny_llama(), "user/missing")
    refused("'user/missing' is neither a folder here nor a repository on the Hub", "user/missing")
    refused(f"The Hub refused your token for {pushed!r}", pushed, token="hf_wrong", cache_dir=tmp_path)


def test_another_type_of_adapter(hub):
    get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM")).push_to_hub("user/plain-lora")
    refused("'user/plain-lora' holds an adapter of type LORA, not MCLORA.*from_lora_adapters", "user/plain-lora")
    # PEFT itself loads it as what it is.
    assert isinstance(PeftModel.from_pretrained(tiny_llama(), "user/plain-lora").peft_config["default"], LoraConfig)


def test_an_adapter_of_another_base_model(hub, pushed):
    made_for = r".*load it on the base model that it was made for, 'user/base'"
    with pytest.raises(ValueError, match=r"of its tensors have other shapes" + made_for):
        PeftModel.from_pretrained(tiny_llama(hidden_size=32), pushed)
    with pytest.raises(ValueError, match=r"14 tensors that have no place in the model \(\S*layers.1" + made_for):
        PeftModel.from_pretrained(tiny_llama(num_hidden_layers=1), pushed)
    # Nothing but the name tells that it is another one.
    other = tiny_llama()
    other.name_or_path = "user/other"
    with pytest.warns(UserWarning, match="was made for user/base .* and is put on user/other"):
        PeftModel.from_pretrained(other, pushed)


def test_nothing_is_written_without_the_right_token(hub, pushed):
    before = hub.messages(pushed)
    model = with_hypotheses(tiny_llama())
    for token, status in (("hf_wrong", 401), (GUEST_TOKEN, 403)):
        with pytest.raises(HfHubHTTPError) as error:
            model.push_to_hub(pushed, token=token)
        assert error.value.response.status_code == status
    assert hub.messages(pushed) == before


# --- a bad connection ---


def test_an_upload_that_is_cut_is_repeated_by_the_client(hub):
    model = with_hypotheses(tiny_llama(), seed=4)
    with hub.failing("PUT", "/lfs/.*") as failure:
        model.push_to_hub("user/cut")
    assert failure.times == 0
    torch.testing.assert_close(all_logits(PeftModel.from_pretrained(tiny_llama(), "user/cut")), all_logits(model))


def test_an_upload_that_fails_leaves_the_repository_as_it_was_and_can_be_repeated(hub):
    first, second = with_hypotheses(tiny_llama(), seed=5), with_hypotheses(tiny_llama(), seed=6)
    first.push_to_hub("user/failing")
    before = hub.files("user/failing")
    # Cut in the middle of the weights and refused when repeated; refused with all weights there; cut in the commit itself.
    for failures in (
        (("PUT", "/lfs/.*", None), ("PUT", "/lfs/.*", 403)),
        (("POST", ".*/commit/main", 500),),
        (("POST", ".*/commit/main", None),),
    ):
        with (
            hub.failing(*failures[0]),
            hub.failing(*failures[-1]),
            pytest.raises(Exception, match=r"Error while uploading|500|disconnected"),
        ):
            second.push_to_hub("user/failing")
        assert hub.files("user/failing") == before
    second.push_to_hub("user/failing")
    torch.testing.assert_close(all_logits(PeftModel.from_pretrained(tiny_llama(), "user/failing")), all_logits(second))


def test_a_download_that_is_cut_goes_on(hub):
    model = with_hypotheses(tiny_llama(), seed=7)
    model.push_to_hub("user/cut-download")
    with hub.failing("GET", ".*cut-download/resolve/.*safetensors") as failure:
        loaded = PeftModel.from_pretrained(tiny_llama(), "user/cut-download")
    assert failure.times == 0
    torch.testing.assert_close(all_logits(loaded), all_logits(model))


def test_several_clients_at_once(hub, tmp_path):
    HfApi().create_repo("user/crowd")
    model = with_hypotheses(tiny_llama())
    folders = export_hypotheses(model, tmp_path)

    def push(k: int) -> None:
        HfApi().upload_folder(
            repo_id="user/crowd", folder_path=folders[k % 3], path_in_repo=str(k), commit_message=str(k)
        )

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(push, range(6)))
    # No commit has lost what another one brought.
    assert sorted(hub.messages("user/crowd")) == [*"012345", "initial commit"]
    files = hub.files("user/crowd")
    for k in range(6):
        assert files[f"{k}/adapter_model.safetensors"] == (folders[k % 3] / "adapter_model.safetensors").read_bytes()
