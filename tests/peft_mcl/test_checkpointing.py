"""Gradient checkpointing: layers that run again during backward run under the route of their own forward pass."""

import copy

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from peft_mcl.routing import RouteKeepingCheckpoint
from tests.peft_mcl.reference import adapt, adapted_layers, assert_same_gradients, batch, plain_net, take_gradients
from tests.tiny import tiny_gemma3, tiny_gpt2, tiny_llama, tiny_t5


# In float64, so that sums in another order do not matter.
BASES = {
    "llama": lambda: tiny_llama().double(),
    "gpt2": lambda: tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double(),
    "gemma3": lambda: tiny_gemma3().double(),
    "t5": lambda: tiny_t5(dropout_rate=0.0).double(),
}
CHOICES = {"plain": None, "int": 1, "other int": 2, "all": "all", "index": torch.tensor([2, 0]), "mean": "mean"}
PAIRS = [("int", "other int"), ("int", "all"), ("all", "index"), ("index", "plain"), ("all", "all"), ("mean", "all")]


def inputs_of(model):
    inputs = batch(padding="right")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch(length=4, seed=1)["input_ids"]
    return inputs


def loss_of(model, hypotheses, weight=1.0):
    # A cache would grow once more when a layer runs again; transformers switches it off for its own checkpointing alone.
    return model(**inputs_of(model), hypotheses=hypotheses, use_cache=False).logits.pow(2).sum() * weight


def gradients_of_two(model, first, second, between=lambda: None):
    """Forward under one route, forward under another, then backward of both in one."""
    loss = loss_of(model, first) + loss_of(model, second, weight=3.0)
    between()
    loss.backward()
    return take_gradients(model)


def count_calls(model):
    """The number of calls of every adapted layer, in a dict that goes on counting."""
    calls = dict.fromkeys(adapted_layers(model), 0)

    def counter(name):
        def count(*_):
            calls[name] += 1

        return count

    for name, layer in adapted_layers(model).items():
        layer.register_forward_pre_hook(counter(name))
    return calls


@pytest.mark.parametrize("pair", PAIRS, ids=" then ".join)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", BASES)
def test_two_routes_before_backward(name, reentrant, pair):
    model = adapt(BASES[name](), shared_r=2 if "mean" in pair else 0).train()
    expected = gradients_of_two(model, *(CHOICES[choice] for choice in pair))

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = count_calls(model)
    actual = gradients_of_two(model, *(CHOICES[choice] for choice in pair))
    assert_same_gradients(actual, expected)
    # Every layer of the stack ran twice for each forward; the language model head is not checkpointed.
    assert {count for layer, count in calls.items() if "layers" in layer or ".h." in layer or "block" in layer} == {4}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_enabled_before_the_adapter(task_type, reentrant):
    expected = gradients_of_two(adapt(BASES["llama"]()).train(), 1, "all")
    base = BASES["llama"]()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model = adapt(base, task_type=task_type).train()
    calls = count_calls(model)
    assert_same_gradients(gradients_of_two(model, 1, "all"), expected)
    assert calls["model.layers.0.self_attn.q_proj"] == 4


def test_enabled_disabled_and_enabled_otherwise():
    model = adapt(BASES["llama"]()).train()
    expected = gradients_of_two(model, 2, "all")
    model.enable_input_require_grads()
    calls = count_calls(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert_same_gradients(gradients_of_two(model, 2, "all"), expected)
        assert calls["model.layers.0.mlp.up_proj"] == 4
        model.gradient_checkpointing_disable()
        calls["model.layers.0.mlp.up_proj"] = 0
        assert_same_gradients(gradients_of_two(model, 2, "all"), expected)
        assert calls["model.layers.0.mlp.up_proj"] == 2
        calls["model.layers.0.mlp.up_proj"] = 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_active_hypothesis_set_between_forward_and_backward(name):
    model = adapt(BASES[name]()).train()
    expected = gradients_of_two(model, None, "all")
    model.gradient_checkpointing_enable()
    actual = gradients_of_two(model, None, "all", between=lambda: model.set_hypothesis(2))
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("implementation", list(CheckpointImpl), ids=str)
@pytest.mark.parametrize("wrapped_first", [True, False], ids=["wrapper first", "adapter first"])
def test_checkpoint_wrapper_of_torch(wrapped_first, implementation):
    expected = gradients_of_two(adapt(BASES["llama"]()).train(), 1, torch.tensor([2, 0]))

    def wrap(base):
        for index, layer in enumerate(base.model.layers):
            base.model.layers[index] = checkpoint_wrapper(layer, checkpoint_impl=implementation)

    base = BASES["llama"]()
    if wrapped_first:
        wrap(base)
    model = adapt(base).train()
    if not wrapped_first:
        wrap(base)
    model.enable_input_require_grads()
    calls = count_calls(model)
    actual = gradients_of_two(model, 1, torch.tensor([2, 0]))
    assert {name.replace("_checkpoint_wrapped_module.", "") for name in actual} == expected.keys()
    actual = {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in actual.items()}
    assert_same_gradients(actual, expected)
    assert max(calls.values()) == 4


def test_the_whole_model_checkpointed_by_hand():
    model = adapt(plain_net(), target_modules=["hidden", "head"]).train()
    ids = batch()["input_ids"]

    def two(call):
        (call("all").pow(2).sum() + 3 * call(1).pow(2).sum()).backward()
        return take_gradients(model)

    expected = two(lambda hypotheses: model(ids, hypotheses=hypotheses))
    actual = two(lambda hypotheses: checkpoint(model, ids, hypotheses=hypotheses, use_reentrant=False))
    assert_same_gradients(actual, expected)


def checkpoint_by_hand(layer, reentrant):
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(lambda x: forward(x), *args, use_reentrant=reentrant, **kwargs)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("hypotheses", CHOICES.values(), ids=CHOICES.keys())
def test_an_unknown_checkpoint_function_raises(hypotheses, reentrant):
    model = adapt(BASES["llama"]()).train()
    model.enable_input_require_grads()
    checkpoint_by_hand(model.get_base_model().model.layers[1].mlp, reentrant)
    loss = loss_of(model, hypotheses)
    with pytest.raises(RuntimeError, match=r"'model.layers.1.mlp.\w+' is recomputed during backward by an unknown"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_an_unknown_checkpoint_function_cannot_confuse_one_hypothesis(reentrant):
    model = adapt(BASES["llama"](), num_hypotheses=1).train()
    model.enable_input_require_grads()
    expected = gradients_of_two(model, None, "all")
    checkpoint_by_hand(model.get_base_model().model.layers[1].mlp, reentrant)
    assert_same_gradients(gradients_of_two(model, None, "all"), expected)


def test_evaluation_is_not_touched():
    model = adapt(BASES["llama"]()).eval()
    expected = model(**batch(), hypotheses="all").logits
    model.gradient_checkpointing_enable()
    calls = count_calls(model)
    assert torch.equal(model(**batch(), hypotheses="all").logits, expected)
    assert set(calls.values()) == {1}


def test_memory_is_given_once_and_taken_back():
    model = adapt(BASES["llama"]()).train()
    model.gradient_checkpointing_enable()
    base = model.get_base_model()

    def functions():
        return [
            module.__dict__["_gradient_checkpointing_func"]
            for module in base.modules()
            if "_gradient_checkpointing_func" in module.__dict__
        ]

    before = functions()
    assert before
    for _ in range(2):
        model(**batch(), hypotheses="all")
        for function, own in zip(functions(), before, strict=True):
            assert isinstance(function, RouteKeepingCheckpoint)
            assert function.checkpoint is own
    plain = model.unload()
    assert functions() == before
    assert copy.deepcopy(plain)(**batch()).logits.shape[0] == 2
