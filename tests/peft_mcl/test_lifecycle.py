"""PEFT's life cycle: saving, loading, named adapters, merging, unloading, status, compilation, other ways in."""

import copy
import json
import warnings

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from peft_mcl import MCLoraConfig
from tests.peft_mcl.reference import (
    adapt,
    adapted_layers,
    assert_same_gradients,
    batch,
    merged_by_hand,
    plain_net,
    randomize,
    take_gradients,
)
from tests.tiny import tiny_gpt2, tiny_llama, tiny_t5


CLOSE = {"rtol": 1e-4, "atol": 1e-5}
BUILDS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "t5": tiny_t5}
TARGETS = {
    "llama": ["embed_tokens", "q_proj", "v_proj", "down_proj", "lm_head"],
    "gpt2": ["c_attn", "c_fc"],
    "t5": ["q", "v", "wo"],
}


def inputs_of(model):
    inputs = batch(padding="right")
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = batch(length=4, seed=1)["input_ids"]
    return inputs


def all_logits(model):
    with torch.no_grad():
        return model(**inputs_of(model), hypotheses="all").logits


def snapshot(model):
    """Everything about a plain model that an adapter could change."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "hooks": [
            len(getattr(module, attribute))
            for module in model.modules()
            for attribute in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
        ],
        "attributes": set(vars(model)),
        "training": [module.training for module in model.modules()],
    }


def assert_same_model(actual, expected_snapshot, expected_state):
    for what, found in snapshot(actual).items():
        assert found == expected_snapshot[what], what
    state = actual.state_dict()
    assert state.keys() == expected_state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected_state[name]), name


# ------------------------------------------------------------------------------------------------------------
# Saving and loading


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low memory"])
@pytest.mark.parametrize("name", BUILDS)
def test_save_and_load(tmp_path, name, low_cpu_mem_usage):
    model = adapt(BUILDS[name](), target_modules=TARGETS[name], modules_to_save=["lm_head"] if name == "t5" else None)
    expected = all_logits(model)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    stacked = {key: value for key, value in written.items() if "mclora" in key}
    assert len(stacked) == 2 * len(adapted_layers(model))
    assert all(value.shape[0] == 3 for value in stacked.values())

    loaded = PeftModel.from_pretrained(BUILDS[name](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(all_logits(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert not loaded.training


def test_load_to_go_on_training(tmp_path):
    model = adapt(tiny_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for model_ in (model, loaded):
        all_logits_with_grad = model_(**batch(), hypotheses="all").logits
        all_logits_with_grad.pow(2).sum().backward()
    assert_same_gradients(take_gradients(loaded), take_gradients(model), relative=0)


def test_auto_model_for_causal_lm(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model = adapt(base)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(all_logits(loaded), all_logits(model))
    assert len(loaded.generate(**batch(), max_new_tokens=2, do_sample=False)) == 6


def test_auto_model_for_seq2seq_lm(tmp_path):
    tiny_t5().save_pretrained(tmp_path / "base")
    model = adapt(type(tiny_t5()).from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(all_logits(loaded), all_logits(model))
    assert len(loaded.generate(**batch(), max_new_tokens=2, do_sample=False)) == 6


def test_state_dict_there_and_back():
    model, other = adapt(tiny_llama()), adapt(tiny_llama())
    randomize(other, seed=1)
    state = get_peft_model_state_dict(model)
    assert all("mclora" in key and "default" not in key for key in state)
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(all_logits(other), all_logits(model))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low memory"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "no safetensors", "cut in the header"])
def test_damaged_adapter_file(tmp_path, damage, low_cpu_mem_usage):
    adapt(tiny_llama()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {
            "truncated": whole[:-100],
            "empty": b"",
            "no safetensors": b"not what it says it is" * 10,
            "cut in the header": whole[:50],
        }[damage]
    )
    base = tiny_llama()
    before, state = snapshot(base), base.state_dict()
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors is truncated or corrupt .*Save or download it again"
    ):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same_model(base, before, state)
    # The same for one more adapter on a model that has one.
    model = adapt(tiny_llama())
    expected = all_logits(model)
    with pytest.raises(ValueError, match="is truncated or corrupt"):
        model.load_adapter(tmp_path, adapter_name="second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(all_logits(model), expected)


def test_damaged_configuration(tmp_path):
    adapt(tiny_llama()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text()[:40])
    with pytest.raises(json.JSONDecodeError):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low memory"])
def test_adapter_of_another_base(tmp_path, low_cpu_mem_usage):
    adapt(tiny_llama()).save_pretrained(tmp_path)
    shapes = r"have other shapes \(.*gate_proj.mclora_A.default is \(3, 4, 16\) and has to be \(3, 4, 32\)"
    with pytest.raises(ValueError, match=shapes):
        PeftModel.from_pretrained(tiny_llama(hidden_size=32), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    with pytest.raises(ValueError, match=r"Target modules .* not found in the base model"):
        PeftModel.from_pretrained(tiny_t5(), tmp_path)


def test_wrapped_layers_are_not_taken_for_another_base():
    model = adapt(tiny_llama())
    layers = model.base_model.model.model.layers
    layers[1] = torch.compile(layers[1], backend="eager")
    state = {name: tensor + 1 for name, tensor in get_peft_model_state_dict(model).items()}
    assert any("layers.1._orig_mod" in name for name in state)
    set_peft_model_state_dict(model, state)
    loaded = get_peft_model_state_dict(model)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_adapter_with_another_number_of_hypotheses_than_it_says(tmp_path):
    adapt(tiny_llama()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"num_hypotheses": 3', '"num_hypotheses": 2'))
    with pytest.raises(ValueError, match=r"is \(3, 4, 16\) and has to be \(2, 4, 16\)"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Several named adapters


def second_config(num_hypotheses, **options):
    return MCLoraConfig(
        **{
            "num_hypotheses": num_hypotheses,
            "r": 2,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            **options,
        }
    )


@pytest.mark.parametrize("num_hypotheses", [3, 2, 5])
def test_second_adapter(tmp_path, num_hypotheses):
    base = tiny_llama()
    model = adapt(copy.deepcopy(base))
    model.add_adapter("second", second_config(num_hypotheses))
    randomize(model, seed=1)
    inputs = batch()

    def check(active, count):
        expected = [merged_by_hand(base, model, k, [active])(**inputs).logits for k in range(count)]
        assert model.active_adapter == active
        assert model.num_hypotheses == count
        torch.testing.assert_close(model(**inputs, hypotheses="all").logits, torch.cat(expected), **CLOSE)
        torch.testing.assert_close(model(**inputs, hypotheses=count - 1).logits, expected[-1], **CLOSE)
        with pytest.raises(ValueError, match=rf"must be in \[0, {count - 1}\]"):
            model(**inputs, hypotheses=count)

    check("default", 3)
    model.set_adapter("second")
    check("second", num_hypotheses)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.endswith(".second") for name in trained)
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    check("default", 3)

    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    loaded.load_adapter(tmp_path / "second", adapter_name="other name")
    loaded.set_adapter("other name")
    assert loaded.num_hypotheses == num_hypotheses
    model.set_adapter("second")
    assert torch.equal(all_logits(loaded), all_logits(model))

    model.delete_adapter("default")
    check("second", num_hypotheses)
    assert list(model.peft_config) == ["second"]
    assert not any("default" in name for name, _ in model.named_parameters())


def test_deleting_the_active_adapter_falls_back_to_the_other():
    model = adapt(tiny_llama())
    expected = all_logits(model)
    model.add_adapter("second", second_config(5))
    model.set_adapter("second")
    model.set_hypothesis(4)
    with pytest.warns(UserWarning, match="has 3 hypotheses, so hypothesis 4 is no longer there"):
        model.delete_adapter("second")
    assert model.active_hypothesis == 0
    assert torch.equal(all_logits(model), expected)
    for layer in adapted_layers(model).values():
        assert layer.num_hypotheses.keys() == layer.scaling.keys() == layer.r.keys() == {"default"}


def test_an_active_hypothesis_that_the_next_adapter_lacks():
    model = adapt(tiny_llama())
    model.add_adapter("second", second_config(2))
    model.set_hypothesis(2)
    with pytest.warns(
        UserWarning, match="has 2 hypotheses, so hypothesis 2 is no longer there. Plain calls use hypothesis 0"
    ):
        model.set_adapter("second")
    assert torch.equal(model(**batch()).logits, model(**batch(), hypotheses=0).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_adapter("default")


def test_adapters_of_one_size_are_active_together():
    base = tiny_llama()
    model = adapt(copy.deepcopy(base))
    model.add_adapter("second", second_config(3))
    randomize(model, seed=1)
    model.base_model.set_adapter(["default", "second"])
    inputs = batch()
    expected = [merged_by_hand(base, model, k, ["default", "second"])(**inputs).logits for k in range(3)]
    torch.testing.assert_close(model(**inputs, hypotheses="all").logits, torch.cat(expected), **CLOSE)
    model.base_model.merge_adapter(hypothesis=1)
    torch.testing.assert_close(model(**inputs).logits, expected[1], **CLOSE)
    model.base_model.unmerge_adapter()
    torch.testing.assert_close(model(**inputs, hypotheses="all").logits, torch.cat(expected), **CLOSE)


def test_adapters_of_different_sizes_are_not_active_together():
    model = adapt(tiny_llama())
    model.add_adapter("second", second_config(2))
    expected = all_logits(model)
    with pytest.raises(ValueError, match=r"must have the same `num_hypotheses`, got \{'default': 3, 'second': 2\}"):
        model.base_model.set_adapter(["default", "second"])
    assert model.active_adapter == "default"
    assert torch.equal(all_logits(model), expected)


def test_adapters_on_different_layers():
    base = tiny_llama()
    model = adapt(copy.deepcopy(base), target_modules=["q_proj"])
    model.add_adapter("second", second_config(2, target_modules=["up_proj"]))
    randomize(model, seed=1)
    inputs = batch()
    for active, count in (("default", 3), ("second", 2)):
        model.set_adapter(active)
        expected = [merged_by_hand(base, model, k, [active])(**inputs).logits for k in range(count)]
        torch.testing.assert_close(model(**inputs, hypotheses="all").logits, torch.cat(expected), **CLOSE)
        assert len(model.generate(**inputs, max_new_tokens=2, do_sample=False)) == 2 * count


def test_a_second_adapter_that_fails_leaves_the_first():
    model = adapt(tiny_llama())
    expected = all_logits(model)
    with pytest.raises(ValueError, match="not found in the base model"):
        model.add_adapter("second", second_config(2, target_modules=["no_such_module"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(all_logits(model), expected)
    assert len(model.generate(**batch(), max_new_tokens=2, do_sample=False)) == 6


# ------------------------------------------------------------------------------------------------------------
# Merging


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("hypothesis", [None, 2])
def test_merge_and_unmerge(name, hypothesis):
    base = BUILDS[name]().double()
    model = adapt(copy.deepcopy(base), target_modules=TARGETS[name])
    model.set_hypothesis(1)
    expected = all_logits(model)
    chosen = 1 if hypothesis is None else hypothesis
    with torch.no_grad():
        wanted = merged_by_hand(base, model, chosen)(**inputs_of(model)).logits

    model.merge_adapter(hypothesis=hypothesis)
    assert model.active_hypothesis == chosen
    assert all(layer.merged for layer in adapted_layers(model).values())
    torch.testing.assert_close(model(**inputs_of(model)).logits, wanted, **CLOSE)
    torch.testing.assert_close(model(**inputs_of(model), hypotheses=chosen).logits, wanted, **CLOSE)
    message = rf"Hypothesis {chosen} is merged into the base weights, so no other can run. Call `unmerge_adapter"
    for other in (0, "all", torch.tensor([0, chosen])):
        with pytest.raises(ValueError, match=message):
            model(**inputs_of(model), hypotheses=other)
    with pytest.raises(ValueError, match=f"Hypothesis {chosen} is merged already, so hypothesis 0 cannot be"):
        model.merge_adapter(hypothesis=0)

    model.unmerge_adapter()
    assert not any(layer.merged for layer in adapted_layers(model).values())
    torch.testing.assert_close(all_logits(model), expected)
    # Nothing is left of the first in the weights when another is merged afterwards.
    model.merge_adapter(hypothesis=0)
    with torch.no_grad():
        wanted = merged_by_hand(base, model, 0)(**inputs_of(model)).logits
    torch.testing.assert_close(model(**inputs_of(model)).logits, wanted, **CLOSE)


@pytest.mark.parametrize("safe_merge", [False, True], ids=["", "safe"])
@pytest.mark.parametrize("name", BUILDS)
def test_merge_and_unload(name, safe_merge):
    base = BUILDS[name]()
    before = snapshot(base)
    model = adapt(copy.deepcopy(base), target_modules=TARGETS[name])
    for hypothesis in (0, 2):
        with torch.no_grad():
            wanted = merged_by_hand(base, model, hypothesis)(**inputs_of(model)).logits
        plain = copy.deepcopy(model).merge_and_unload(hypothesis=hypothesis, safe_merge=safe_merge)
        found = snapshot(plain)
        assert found["classes"] == before["classes"]
        assert found["hooks"] == before["hooks"]
        assert found["attributes"] == before["attributes"]
        assert plain.state_dict().keys() == base.state_dict().keys()
        torch.testing.assert_close(plain(**inputs_of(model)).logits, wanted, **CLOSE)


def test_merge_and_unload_takes_the_active_hypothesis():
    model = adapt(tiny_llama())
    model.set_hypothesis(2)
    expected = model(**batch()).logits
    torch.testing.assert_close(model.merge_and_unload()(**batch()).logits, expected, **CLOSE)


def test_merge_and_unload_can_be_saved(tmp_path):
    model = adapt(tiny_llama())
    plain = model.merge_and_unload(hypothesis=1)
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert torch.equal(again(**batch()).logits, plain(**batch()).logits)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_merges_all_or_nothing(merge):
    base = tiny_llama()
    model = adapt(copy.deepcopy(base))
    layers = adapted_layers(model)
    # The last layer of all: everything else would have been merged before it.
    name, last = list(layers.items())[-1]
    last.stacked_b["default"].data[1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=rf"NaNs detected in the merged weights of '{name}'.*Nothing was merged"):
        getattr(model, merge)(hypothesis=1, safe_merge=True)
    assert not any(layer.merged for layer in layers.values())
    for layer_name, layer in layers.items():
        assert torch.equal(layer.get_base_layer().weight, base.get_submodule(layer_name).weight)
    assert model.active_hypothesis == 0
    # The other hypotheses are sound.
    torch.testing.assert_close(
        model(**batch(), hypotheses=2).logits, merged_by_hand(base, model, 2)(**batch()).logits, **CLOSE
    )
    getattr(model, merge)(hypothesis=2, safe_merge=True)


@pytest.mark.parametrize("hypothesis", [3, -1, "1", True, torch.tensor(1)], ids=repr)
def test_merge_of_a_hypothesis_that_is_not_there(hypothesis):
    model = adapt(tiny_llama())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"`hypothesis` must be (an int )?in \[0, 2\]"):
            merge(hypothesis=hypothesis)
    assert not any(layer.merged for layer in adapted_layers(model).values())


def test_merge_of_an_adapter_of_another_size():
    model = adapt(tiny_llama())
    model.add_adapter("second", second_config(2))
    expected = all_logits(model)
    with pytest.raises(ValueError, match=r"`hypothesis` must be in \[0, 1\]"):
        model.merge_adapter(["second"], hypothesis=2)
    assert torch.equal(all_logits(model), expected)
    model.merge_adapter(["second"], hypothesis=1)
    model.unmerge_adapter()
    torch.testing.assert_close(all_logits(model), expected, **CLOSE)


def test_merge_twice_and_unmerge_twice_warn():
    model = adapt(tiny_llama())
    expected = all_logits(model)
    model.merge_adapter(hypothesis=1)
    merged = model(**batch()).logits
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter(hypothesis=1)
    assert torch.equal(model(**batch()).logits, merged)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    torch.testing.assert_close(all_logits(model), expected, **CLOSE)


def test_disabling_unmerges():
    model = adapt(tiny_llama())
    expected = all_logits(model)
    model.merge_adapter(hypothesis=1)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch()).logits, tiny_llama()(**batch()).logits, **CLOSE)
    torch.testing.assert_close(all_logits(model), expected, **CLOSE)


def test_merge_in_half_precision():
    model = adapt(tiny_llama().bfloat16())
    expected = model(**batch(), hypotheses=1).logits
    plain = model.merge_and_unload(hypothesis=1)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(plain(**batch()).logits.float(), expected.float(), rtol=0.1, atol=0.2)


# ------------------------------------------------------------------------------------------------------------
# Taking the adapter off, and putting it on in vain


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", BUILDS)
def test_unload(name, checkpointing):
    base = BUILDS[name]()
    if checkpointing:
        base.gradient_checkpointing_enable()
    before, state = snapshot(base), copy.deepcopy(base.state_dict())
    expected = base.generate(input_ids=batch()["input_ids"], max_new_tokens=3, do_sample=False)
    model = adapt(base, target_modules=TARGETS[name])
    model.train()(**inputs_of(model), hypotheses="all")
    model.eval()
    plain = model.unload()
    assert plain is base
    if not checkpointing:  # PEFT puts a hook of its own on the embeddings
        assert snapshot(plain)["hooks"] == before["hooks"]
    for what in ("classes", "attributes", "training"):
        assert snapshot(plain)[what] == before[what]
    assert plain.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in plain.state_dict().items())
    assert torch.equal(plain.generate(input_ids=batch()["input_ids"], max_new_tokens=3, do_sample=False), expected)
    # And once more, with another number.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = adapt(plain, num_hypotheses=2, target_modules=TARGETS[name])
    assert again(**inputs_of(again), hypotheses="all").logits.shape[0] == 4


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.conv = nn.Conv2d(1, 1, 3)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.first(x))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"target_modules": ["first", "conv"]}, TypeError),
        ({"target_modules": ["first", "norm"]}, TypeError),
        ({"target_modules": ["nothing"]}, ValueError),
        ({"target_modules": ["first"], "exclude_modules": ["first"]}, ValueError),
        ({}, ValueError),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", [get_peft_model, lambda model, config: inject_adapter_in_model(config, model)])
def test_failed_injection_leaves_the_base_as_it_was(way, options, error):
    torch.manual_seed(0)
    base = Mixed().eval()
    before, state = snapshot(base), copy.deepcopy(base.state_dict())
    with pytest.raises(error):
        way(base, MCLoraConfig(**options))
    assert_same_model(base, before, state)
    model = get_peft_model(base, MCLoraConfig(target_modules=["first"]))
    assert model(torch.ones(2, 4), hypotheses="all").shape == (6, 4)


def test_failed_injection_into_a_language_model():
    base = tiny_llama()
    before, state = snapshot(base), copy.deepcopy(base.state_dict())
    with pytest.raises(TypeError, match=r"'model\.layers\.0\.input_layernorm' is a LlamaRMSNorm"):
        get_peft_model(base, MCLoraConfig(target_modules=["q_proj", "input_layernorm"]))
    assert_same_model(base, before, state)
    assert len(base.generate(**batch(), max_new_tokens=2)) == 2


def test_target_that_matches_nothing():
    with pytest.raises(ValueError, match=r"Target modules \{'w_q'\} not found in the base model"):
        get_peft_model(tiny_llama(), MCLoraConfig(target_modules=["w_q"]))


# ------------------------------------------------------------------------------------------------------------
# What PEFT reports


def test_trainable_parameters(capsys):
    model = adapt(tiny_llama(), num_hypotheses=3, target_modules=["q_proj"])
    trainable, total = model.get_nb_trainable_parameters()
    lora = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    assert trainable == 3 * lora.get_nb_trainable_parameters()[0]
    assert total == sum(parameter.numel() for parameter in model.parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,} || all params: {total:,}" in capsys.readouterr().out


def test_status():
    model = adapt(tiny_llama(), target_modules=["q_proj", "embed_tokens"])
    status = get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "MCLoraModel")
    assert status.peft_types == {"default": "MCLORA"}
    assert status.num_adapter_layers == 3
    assert status.active_adapters == status.available_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.enabled is True
    assert status.requires_grad == {"default": True}
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    assert model.get_model_status() == status
    layers = {layer.name: layer for layer in get_layer_status(model)}
    assert layers.keys() == {f"model.{name}" for name in adapted_layers(model)}
    assert {layer.module_type for layer in layers.values()} == {"mclora.MCLoraLinear", "mclora.MCLoraEmbedding"}

    model.merge_adapter(hypothesis=1)
    assert get_model_status(model).merged_adapters == ["default"]
    model.unmerge_adapter()
    model.add_adapter("second", second_config(2, target_modules=["q_proj"]))
    model.base_model.disable_adapter_layers()
    status = get_model_status(model)
    assert status.available_adapters == ["default", "second"]
    assert status.enabled is False


def test_module_to_save_is_saved_and_trained_once(tmp_path):
    model = adapt(tiny_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    head.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    expected = all_logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(all_logits(loaded), expected)
    plain = model.merge_and_unload(hypothesis=1)
    assert type(plain.lm_head) is nn.Linear
    assert torch.equal(plain.lm_head.weight, head)
    torch.testing.assert_close(plain(**inputs_of(plain)).logits, expected[2:4], **CLOSE)


def test_trainable_tokens_are_shared(tmp_path):
    model = adapt(tiny_llama(), target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 6]})
    model(input_ids=torch.tensor([[5, 7, 8]]), hypotheses="all").logits.pow(2).sum().backward()
    gradients = take_gradients(model)
    name = next(name for name in gradients if "trainable_tokens_delta" in name)
    assert gradients[name].shape == (2, 16)
    model.get_parameter(name).data += 0.3
    expected = model(input_ids=torch.tensor([[5, 7, 8]]), hypotheses="all").logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(loaded(input_ids=torch.tensor([[5, 7, 8]]), hypotheses="all").logits, expected)


# ------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_compiled_forward_is_one_graph(counter, task_type):
    model = adapt(tiny_llama(num_hidden_layers=1), task_type=task_type)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    # The graph is made once for "all" and once for all index tensors; each int is a graph of its own.
    for graphs, choices in (
        (1, ["all", "all"]),
        (2, [torch.tensor([0, 1]), torch.tensor([2, 2])]),
        (3, [1, 1]),
        (4, [2]),
    ):
        for seed, hypotheses in enumerate(choices):
            inputs = batch(seed=seed)
            with torch.no_grad():
                actual = compiled(**inputs, hypotheses=hypotheses, use_cache=False).logits
                expected = model(**inputs, hypotheses=hypotheses, use_cache=False).logits
            torch.testing.assert_close(actual, expected)
        assert counter.frame_count == graphs


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_step(counter, checkpointing):
    model = adapt(tiny_llama(num_hidden_layers=1)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.disable_input_require_grads()  # a hook of transformers that breaks the graph, with plain LoRA too
    inputs = batch()

    def step(call):
        loss = call(**inputs, hypotheses="all", use_cache=False).logits.pow(2).sum()
        (loss + call(**inputs, hypotheses=torch.tensor([2, 0]), use_cache=False).logits.pow(2).sum()).backward()
        return take_gradients(model)

    expected = step(model)
    assert_same_gradients(step(torch.compile(model, backend="aot_eager", fullgraph=True)), expected, relative=1e-3)


def test_compiled_base_model(counter):
    model = adapt(plain_net(), target_modules=["hidden", "embedding"])
    compiled = torch.compile(model.get_base_model(), backend=counter)
    ids = batch()["input_ids"]
    for hypotheses in ("all", 2, torch.tensor([1, 0])):
        torch.testing.assert_close(compiled(ids, hypotheses=hypotheses), model(ids, hypotheses=hypotheses))


# ------------------------------------------------------------------------------------------------------------
# Other ways in


def test_inject_adapter_in_model():
    torch.manual_seed(0)
    base = tiny_llama()
    model = inject_adapter_in_model(MCLoraConfig(num_hypotheses=2, r=2, target_modules=["q_proj"]), copy.deepcopy(base))
    randomize(model)
    assert type(model) is type(base)
    inputs = batch()
    expected = torch.cat([merged_by_hand(base, model, k)(**inputs).logits for k in range(2)])
    torch.testing.assert_close(model(**inputs, hypotheses="all").logits, expected, **CLOSE)
    assert len(model.generate(**inputs, max_new_tokens=2, do_sample=False)) == 4

    # Once more, with another number: the new one is active.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(MCLoraConfig(num_hypotheses=3, r=2, target_modules=["v_proj"]), model, "second")
    active = {name for layer in adapted_layers(model).values() for name in layer.active_adapters}
    count = 3 if active == {"second"} else 2
    assert model(**inputs, hypotheses="all").logits.shape[0] == 2 * count
    assert len(model.generate(**inputs, max_new_tokens=2, do_sample=False)) == 2 * count


def test_adapters_of_transformers(tmp_path):
    model = tiny_llama()
    inputs = batch()
    plain = model(**inputs).logits
    model.add_adapter(MCLoraConfig(num_hypotheses=2, r=2, target_modules=["q_proj"]))
    model.add_adapter(MCLoraConfig(num_hypotheses=3, r=2, target_modules=["q_proj"]), "second")
    randomize(model)
    logits = model(**inputs, hypotheses="all").logits
    assert len(logits) == 6
    assert len(model.generate(**inputs, max_new_tokens=2, do_sample=False)) == 6
    model.set_adapter("default")
    first = model(**inputs, hypotheses="all").logits
    assert len(first) == 4
    assert len(model.generate(**inputs, max_new_tokens=2, do_sample=False)) == 4
    model.disable_adapters()
    assert torch.equal(model(**inputs).logits, plain)
    model.enable_adapters()
    model.set_adapter("second")
    model.save_pretrained(tmp_path)
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(loaded(**inputs, hypotheses="all").logits, logits)
    model.delete_adapter("second")
    assert model.active_adapters() == ["default"]
    assert torch.equal(model(**inputs, hypotheses="all").logits, first)
