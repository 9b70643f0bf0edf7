"""Packed rows, as TRL's collator makes them: one hypothesis for each sequence of one row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_mcl.routing import expand_inputs
from tests.tiny import tiny_gpt2, tiny_llama, with_hypotheses


LENGTHS = (5, 1, 7, 3)


def sequences(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (length,), generator=generator) for length in lengths]


def packed(ids):
    lengths = [len(own) for own in ids]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))[None],
        "use_cache": False,
    }


def apart(model, ids, hypotheses):
    """Logits of each sequence alone under its hypothesis, one after the other."""
    return torch.cat([model(own[None], hypotheses=k).logits[0] for own, k in zip(ids, hypotheses, strict=True)])


MODELS = {
    "llama": lambda: with_hypotheses(tiny_llama()),
    "gpt2": lambda: with_hypotheses(tiny_gpt2()),
    "embeddings": lambda: with_hypotheses(tiny_llama(), target_modules=["embed_tokens", "q_proj", "down_proj"]),
    "shared part": lambda: with_hypotheses(tiny_llama(), shared_r=2, target_modules=["embed_tokens", "q_proj"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_sequence_runs_under_its_hypothesis(name):
    model, ids = MODELS[name](), sequences()
    for hypotheses in ([2, 0, 1, 1], [0, 0, 0, 0], [1, 2, 1, 2]):
        logits = model(**packed(ids), hypotheses=torch.tensor(hypotheses)).logits[0]
        torch.testing.assert_close(logits, apart(model, ids, hypotheses), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_all_hypotheses_of_a_packed_row_are_its_copies(name):
    model, ids = MODELS[name](), sequences()
    logits = model(**packed(ids), hypotheses="all").logits
    assert logits.shape[:2] == (3, sum(LENGTHS))
    for k in range(3):
        torch.testing.assert_close(logits[k], apart(model, ids, [k] * 4), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(**packed(ids), hypotheses=k).logits[0], logits[k], rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2)), min_size=1, max_size=6))
def test_any_lengths_and_hypotheses(pairs):
    model, ids = MODELS["llama"](), sequences([length for length, _ in pairs])
    hypotheses = [k for _, k in pairs]
    logits = model(**packed(ids), hypotheses=torch.tensor(hypotheses)).logits[0]
    torch.testing.assert_close(logits, apart(model, ids, hypotheses), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["llama", "embeddings"])
def test_gradients(name, checkpointing):
    ids, hypotheses = sequences(), [2, 0, 1, 1]

    def gradients(run, model):
        logits = run(model)
        weight = torch.arange(logits.numel()).view(logits.shape).remainder(7.0)
        (logits * weight).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    model = MODELS[name]().train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    ours = gradients(lambda model: model(**packed(ids), hypotheses=torch.tensor(hypotheses)).logits[0], model)
    theirs = gradients(lambda model: apart(model, ids, hypotheses), MODELS[name]())
    for parameter, gradient in theirs.items():
        if gradient is not None:
            torch.testing.assert_close(ours[parameter], gradient, rtol=1e-4, atol=1e-3, msg=parameter)


def test_bounds_of_copies_lie_one_after_the_other():
    inputs = packed(sequences((2, 3)))
    expanded = expand_inputs(inputs, 3, 1)
    assert expanded["cu_seq_lens_q"].tolist() == [0, 2, 5, 7, 10, 12, 15]
    assert expanded["cu_seq_lens_q"].dtype == torch.int32
    assert expanded["input_ids"].shape == expanded["position_ids"].shape == expanded["seq_idx"].shape == (3, 5)
    assert expanded["max_length_q"] == 3


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_number_of_hypotheses_must_be_that_of_the_sequences(count):
    model = MODELS["llama"]()
    with pytest.raises(ValueError, match=f"each of the 4 sequences of the packed row, got {count} entries"):
        model(**packed(sequences()), hypotheses=torch.zeros(count, dtype=torch.int64))


def test_a_layer_that_does_not_see_the_tokens_is_named():
    model = with_hypotheses(tiny_llama(), target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"packed row of 16 tokens.*exclude_modules"):
        model(**packed(sequences()), hypotheses=torch.tensor([0, 1, 2, 0]), logits_to_keep=3)


@pytest.mark.parametrize("bounds", [[2, 9, 16], [0, 9, 5, 16], [0], []], ids=str)
def test_bounds_that_are_none(bounds):
    given = packed(sequences())
    given["cu_seq_lens_q"] = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="`cu_seq_lens_q` must hold the bounds"):
        MODELS["llama"]()(**given, hypotheses=torch.tensor([0, 1]))


def test_bounds_that_end_before_the_row():
    given = packed(sequences())
    given["cu_seq_lens_q"] = torch.tensor([0, 5, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match="packed row of 10 tokens"):
        MODELS["llama"]()(**given, hypotheses=torch.tensor([0, 1]))
