"""No state leaks: not after exceptions, not between nested calls, threads or copies of a model."""

import copy
import pickle
import threading
from contextlib import contextmanager

import pytest
import torch
from transformers import LogitsProcessorList

from tests.peft_mcl.reference import adapt, adapted_layers, assert_same_gradients, batch, plain_net, take_gradients
from tests.tiny import tiny_gpt2, tiny_llama, tiny_t5


@contextmanager
def hooked(module, action, pre=False):
    """Run `action()` whenever `module` has been called (or, with `pre`, before)."""

    def hook(*_):
        action()

    handle = module.register_forward_pre_hook(hook) if pre else module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def once(action):
    """`action`, the first time only: a hook that calls the model is not to call itself."""
    pending = [action]
    return lambda: pending.pop()() if pending else None


def layer_of(model, index=0):
    base = getattr(model, "get_base_model", lambda: model)()
    return (base.model.layers if hasattr(base, "model") else base.transformer.h)[index]


def answers(model, inputs):
    """What every kind of call gives."""
    with torch.no_grad():
        return [*answers_of_wrapper(model, inputs), model.get_base_model()(**inputs).logits]


def answers_of_wrapper(model, inputs):
    with torch.no_grad():
        return [
            model(**inputs).logits,
            model(**inputs, hypotheses=2).logits,
            model(**inputs, hypotheses="all").logits,
            model(**inputs, hypotheses=torch.tensor([1, 0])).logits,
            model.generate(**inputs, max_new_tokens=3, do_sample=False),
        ]


def assert_unchanged(model, inputs, expected):
    for actual, wanted in zip(answers(model, inputs), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert model.base_model.routing.stack == []


# ------------------------------------------------------------------------------------------------------------
# Exceptions


@pytest.mark.parametrize("hypotheses", [None, 2, "all", torch.tensor([1, 2])], ids=["plain", "int", "all", "index"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_exception_in_forward(error, hypotheses, task_type):
    model = adapt(tiny_llama(), task_type=task_type)
    inputs = batch()
    expected = answers(model, inputs)

    def fail():
        raise error("stop")

    with hooked(layer_of(model, 1), fail), pytest.raises(error, match="stop"):
        model(**inputs, hypotheses=hypotheses)
    assert_unchanged(model, inputs, expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_in_generate(error):
    model = adapt(tiny_llama())
    inputs = batch()
    expected = answers(model, inputs)
    calls = []

    def fail_later():
        calls.append(None)
        if len(calls) == 3:
            raise error("stop")

    with hooked(layer_of(model, 1), fail_later), pytest.raises(error, match="stop"):
        model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert_unchanged(model, inputs, expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_in_a_call_of_the_base_model(error):
    # torch runs no hook when Ctrl-C goes through a module, so here nobody can tidy up; later calls are right even so.
    model = adapt(tiny_llama())
    inputs = batch()
    expected = answers(model, inputs)

    def fail():
        raise error("stop")

    with hooked(layer_of(model, 1), fail), pytest.raises(error, match="stop"):
        model.get_base_model()(**inputs, hypotheses=2)
    for actual, wanted in zip(answers(model, inputs), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_exception_in_backward_under_checkpointing():
    model = adapt(tiny_llama()).train()
    model.gradient_checkpointing_enable()
    inputs = batch()
    loss = model(**inputs, hypotheses=2).logits.sum()

    def fail():
        raise KeyboardInterrupt

    with hooked(layer_of(model, 0).mlp, fail, pre=True), pytest.raises(KeyboardInterrupt):
        loss.backward()
    assert model.base_model.routing.stack == []


def test_refused_inputs_leave_nothing_behind():
    model = adapt(tiny_llama())
    inputs = batch()
    expected = answers(model, inputs)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(hypotheses="all")
    with pytest.raises(TypeError):
        model.get_base_model()(*([inputs["input_ids"]] * 30), hypotheses="all")
    assert_unchanged(model, inputs, expected)


# ------------------------------------------------------------------------------------------------------------
# Calls inside of calls


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
@pytest.mark.parametrize("outer", [None, 2, "all", torch.tensor([2, 1])], ids=["plain", "int", "all", "index"])
def test_calls_from_a_forward_hook(outer, task_type):
    model = adapt(tiny_llama(), task_type=task_type)
    inputs = batch()
    expected = answers(model, inputs)
    wanted = model(**inputs, hypotheses=outer).logits
    seen = []
    with hooked(layer_of(model), once(lambda: seen.extend(answers(model, inputs)))):
        actual = model(**inputs, hypotheses=outer).logits
    assert torch.equal(actual, wanted)
    assert len(seen) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert_unchanged(model, inputs, expected)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
@pytest.mark.parametrize("chosen", [None, 1, [2, 0]], ids=["all", "int", "subset"])
def test_calls_from_a_logits_processor(chosen, task_type):
    model = adapt(tiny_llama(), task_type=task_type)
    inputs = batch()
    expected = answers_of_wrapper(model, inputs)
    wanted = model.generate(**inputs, hypotheses=chosen, max_new_tokens=3, do_sample=False)
    seen = []

    def processor(ids, scores):
        seen.append(answers_of_wrapper(model, inputs))
        return scores

    actual = model.generate(
        **inputs,
        hypotheses=chosen,
        max_new_tokens=3,
        do_sample=False,
        logits_processor=LogitsProcessorList([processor]),
    )
    assert torch.equal(actual, wanted)
    assert len(seen) == 3
    for found in seen:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_active_hypothesis_set_in_the_middle_of_a_call():
    model = adapt(tiny_llama())
    inputs = batch()
    first, second = model(**inputs, hypotheses=0).logits, model(**inputs, hypotheses=1).logits
    with hooked(layer_of(model), lambda: model.set_hypothesis(1)):
        assert torch.equal(model(**inputs).logits, first)
    assert torch.equal(model(**inputs).logits, second)


def test_two_models_do_not_share_state():
    first, second = adapt(tiny_llama()), adapt(tiny_gpt2(), num_hypotheses=2)
    inputs = batch()
    expected = first(**inputs, hypotheses="all").logits, second(**inputs, hypotheses="all").logits
    first.set_hypothesis(2)
    seen = []
    with hooked(layer_of(first), lambda: seen.append(second(**inputs, hypotheses="all").logits)):
        assert torch.equal(first(**inputs, hypotheses="all").logits, expected[0])
    assert torch.equal(seen[0], expected[1])
    assert second.active_hypothesis == 0


# ------------------------------------------------------------------------------------------------------------
# In the middle of training


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("hypotheses", [1, "all", torch.tensor([2, 0])], ids=["int", "all", "index"])
def test_other_calls_between_forward_and_backward(hypotheses, checkpointing):
    model = adapt(tiny_llama()).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = batch()
    model(**inputs, hypotheses=hypotheses).logits.pow(2).sum().backward()
    expected = take_gradients(model)

    loss = model(**inputs, hypotheses=hypotheses).logits.pow(2).sum()
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    model.generate(**inputs, max_new_tokens=3, do_sample=False, hypotheses=2)
    with torch.no_grad():
        model(**inputs, hypotheses=0)
    model.set_hypothesis(2)
    loss.backward()
    assert_same_gradients(take_gradients(model), expected, relative=0)


def test_generate_leaves_modes_and_gradients_alone():
    model = adapt(tiny_llama()).train()
    model.generate(**batch(), max_new_tokens=3, do_sample=False)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model(**batch()).logits.requires_grad


# ------------------------------------------------------------------------------------------------------------
# Threads


def test_threads_with_different_hypotheses():
    model = adapt(tiny_llama())
    inputs = batch()
    choices = [0, 2, "all", torch.tensor([1, 2])]
    expected = [model(**inputs, hypotheses=choice).logits for choice in choices]
    # All threads are inside of the model at once: none leaves the layer before all have entered it.
    barrier = threading.Barrier(len(choices), timeout=30)
    found: dict[int, torch.Tensor] = {}

    def work(number):
        found[number] = model(**inputs, hypotheses=choices[number]).logits

    with hooked(layer_of(model), barrier.wait, pre=True):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(choices))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert len(found) == len(choices)
    for number, wanted in enumerate(expected):
        assert torch.equal(found[number], wanted)


def test_backward_in_another_thread():
    model = adapt(tiny_llama()).train()
    model.gradient_checkpointing_enable()
    inputs = batch()
    model(**inputs, hypotheses="all").logits.pow(2).sum().backward()
    expected = take_gradients(model)
    loss = model(**inputs, hypotheses="all").logits.pow(2).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join(timeout=60)
    assert_same_gradients(take_gradients(model), expected, relative=0)


# ------------------------------------------------------------------------------------------------------------
# Copies


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_t5])
@pytest.mark.parametrize(
    ("duplicate", "checkpointing"),
    # A hook of transformers, put on with checkpointing, cannot be pickled.
    [(copy.deepcopy, False), (copy.deepcopy, True), (lambda model: pickle.loads(pickle.dumps(model)), False)],
    ids=["copy", "copy under checkpointing", "pickle"],
)
def test_a_copy_is_independent(duplicate, build, checkpointing):
    model = adapt(build()).train()
    inputs = batch()
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if checkpointing:
        model.gradient_checkpointing_enable()
        model(**inputs, hypotheses="all")  # the checkpoint functions get their memory
    model.eval()
    model.set_hypothesis(1)
    expected = model(**inputs).logits, model(**inputs, hypotheses="all").logits
    twin = duplicate(model)
    assert twin.active_hypothesis == 1
    assert torch.equal(twin(**inputs).logits, expected[0])
    assert torch.equal(twin(**inputs, hypotheses="all").logits, expected[1])

    # Neither the hypothesis nor the weights nor the routes are shared.
    twin.set_hypothesis(2)
    for layer in adapted_layers(twin).values():
        assert layer.routing is twin.base_model.routing is not model.base_model.routing
        layer.stacked_b["default"].data.zero_()
    assert torch.equal(model(**inputs).logits, expected[0])
    twin.train()(**inputs, hypotheses=1).logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any(parameter.grad is not None for parameter in twin.parameters())
    generated = twin.generate(input_ids=inputs["input_ids"], max_new_tokens=2, do_sample=False)
    assert len(generated) == 6
    # The copy can be taken apart by itself.
    plain = twin.unload()
    assert not adapted_layers(plain)
    assert "generate" not in vars(plain)
    assert len(plain.generate(input_ids=inputs["input_ids"], max_new_tokens=2, do_sample=False)) == 2
    assert torch.equal(model(**inputs, hypotheses="all").logits, expected[1])


def test_a_copy_made_in_the_middle_of_a_call_starts_afresh():
    model = adapt(plain_net(), target_modules=["hidden"])
    ids = batch()["input_ids"]
    copies = []
    with hooked(model.get_base_model().norm, once(lambda: copies.append(copy.deepcopy(model)))):
        model(ids, hypotheses="all")
    assert copies[0].base_model.routing.stack == []
    copies[0].get_base_model().norm._forward_hooks.clear()
    assert torch.equal(copies[0](ids), model(ids))


# ------------------------------------------------------------------------------------------------------------
# The base model itself, and no adapter at all


def test_calls_of_the_base_model_itself():
    model = adapt(tiny_llama())
    wrapped, inputs = model.get_base_model(), batch()
    model.set_hypothesis(1)
    assert torch.equal(wrapped(**inputs).logits, model(**inputs, hypotheses=1).logits)
    assert torch.equal(wrapped(**inputs, hypotheses="all").logits, model(**inputs, hypotheses="all").logits)
    assert torch.equal(wrapped(**inputs).logits, model(**inputs, hypotheses=1).logits)
    # A part of it, called by itself, is under the active hypothesis too.
    hidden = wrapped.model(**inputs).last_hidden_state
    assert torch.equal(wrapped.lm_head(hidden), model(**inputs).logits)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_disabled_adapters(task_type):
    inputs = batch()
    expected = tiny_llama()(**inputs).logits
    model = adapt(tiny_llama(), task_type=task_type)
    before = answers(model, inputs)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(**inputs, hypotheses=2).logits, expected)
        assert torch.equal(model(**inputs, hypotheses=torch.tensor([0, 1])).logits, expected)
        assert torch.equal(model(**inputs, hypotheses="all").logits, torch.cat([expected] * 3))
        with pytest.raises(ValueError, match="must be in"):
            model(**inputs, hypotheses=7)
    assert_unchanged(model, inputs, before)


def test_adapter_names_are_refused():
    model = adapt(tiny_llama())
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"`adapter_names` is not supported by MCLORA. Use `hypotheses=`"):
            call(**batch(), adapter_names=["default", "__base__"])
    assert model.base_model.routing.stack == []
