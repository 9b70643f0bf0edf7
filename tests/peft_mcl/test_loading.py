"""What is refused when an adapter is loaded: missing and foreign tensors, NaN, and pickles."""

import os
import pickle

import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_mcl import MCLoraConfig
from tests.peft_mcl.reference import adapt
from tests.tiny import tiny_llama


@pytest.fixture
def saved(tmp_path):
    """A saved adapter, and its tensors."""
    adapt(tiny_llama()).save_pretrained(tmp_path)
    return tmp_path, load_file(tmp_path / "adapter_model.safetensors")


def loads(way, directory):
    if way == "PeftModel":
        PeftModel.from_pretrained(tiny_llama(), directory)
    elif way == "low memory":
        PeftModel.from_pretrained(tiny_llama(), directory, low_cpu_mem_usage=True)
    elif way == "second":
        adapt(tiny_llama()).load_adapter(directory, "second")
    else:
        set_peft_model_state_dict(adapt(tiny_llama()), load_file(directory / "adapter_model.safetensors"))


@pytest.mark.parametrize("way", ["PeftModel", "low memory", "second", "state dict"])
def test_tensors_are_those_of_the_adapter(saved, way):
    directory, tensors = saved
    file = directory / "adapter_model.safetensors"
    loads(way, directory)
    first = "base_model.model.model.layers.0.self_attn.q_proj.mclora_B"
    broken = tensors[first].clone()
    broken[1, 0, 0] = float("nan")
    for damaged, message in (
        ({key: value for key, value in tensors.items() if key != first}, r"lacks 1 of 28 tensors \(\S*q_proj.mclora_B"),
        (
            {**tensors, "base_model.model.no.such.mclora_A": torch.zeros(1)},
            r"have no place in the model \(no.such.mclora_A\)",
        ),
        (
            {**tensors, first: tensors[first][:2]},
            r"1 of its tensors have other shapes \(\S*q_proj.mclora_B\S* is \(2, 16, 4\)",
        ),
        (
            {**tensors, first: broken},
            r"NaN or infinite weights in hypothesis 1 of \S*layers.0.self_attn.q_proj.mclora_B",
        ),
    ):
        save_file(damaged, file)
        with pytest.raises(ValueError, match=message):
            loads(way, directory)


def test_an_adapter_beside_another_is_not_taken_for_it():
    """The state of one named adapter is loaded while another is there, and by a name that contains the other's."""
    model = adapt(tiny_llama())
    model.add_adapter("default_2", model.peft_config["default"])
    state = get_peft_model_state_dict(model, adapter_name="default_2")
    assert not set_peft_model_state_dict(model, state, adapter_name="default").unexpected_keys
    assert not set_peft_model_state_dict(model, state, adapter_name="default_2").unexpected_keys


def test_shared_parts_are_no_foreign_tensors(tmp_path):
    adapt(
        tiny_llama(),
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        trainable_token_indices={"embed_tokens": [1]},
    ).save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_llama(), tmp_path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_refused_and_not_run(saved):
    directory, tensors = saved
    (directory / "adapter_model.safetensors").unlink()
    file, trace = directory / "adapter_model.bin", directory / "was here"
    torch.save({**tensors, "more": Malicious(trace)}, file)
    with pytest.raises(ValueError, match=r"pickle \(adapter_model.bin\), which is not read"):
        MCLoraConfig.from_pretrained(directory)
    with pytest.raises(ValueError, match="which is not read"):
        PeftModel.from_pretrained(tiny_llama(), directory)
    assert not trace.exists()
    # Not because it is harmless.
    with file.open("rb") as stream, pytest.raises(pickle.UnpicklingError):
        torch.load(stream, weights_only=True)
    torch.load(file, weights_only=False)
    assert trace.exists()
