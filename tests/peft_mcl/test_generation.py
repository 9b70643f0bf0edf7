"""Tests of `generate`: one call decodes what each hypothesis decodes alone, and that is what it decodes once merged.

The reference is brute force: a plain transformers model for each hypothesis, made by merging it into a copy.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from peft_mcl import MCLoraConfig
from tests.tiny import (
    BOS,
    EOS,
    FAMILIES,
    PAD,
    VOCABULARY,
    merged,
    tiny_llama,
    tiny_llava,
    tiny_whisper,
    with_hypotheses,
)


K = 3
# Any of these ends a sequence, so that random models stop early and at different times.
ENDS = list(range(52, VOCABULARY))
GREEDY_AND_BEAMS = {
    "greedy": {},
    "greedy, no cache": {"use_cache": False},
    "greedy, processors": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "2 beams": {"num_beams": 2},
    "3 beams, all returned": {"num_beams": 3, "num_return_sequences": 3},
    "4 beams, 2 returned, long": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0},
    "3 beams, short, early": {"num_beams": 3, "length_penalty": -1.0, "early_stopping": True},
    "2 beams, never early": {"num_beams": 2, "num_return_sequences": 2, "early_stopping": "never"},
}


# --- the models and the comparison ---


@cache
def adapted(family: str = "llama", num_hypotheses: int = K) -> PeftModel:
    """Shared by the tests; those that change a model make their own."""
    return with_hypotheses(FAMILIES[family](), num_hypotheses)


@cache
def plain(family: str = "llama", hypothesis: int = 0, num_hypotheses: int = K) -> PreTrainedModel:
    return merged(adapted(family, num_hypotheses), hypothesis)


def prompts(lengths: list[int], family: str = "llama", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded on the left (for an encoder on the right), with their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(ids, lengths, strict=True):
        tokens = torch.randint(4, VOCABULARY, (length,), generator=generator)
        if family == "t5":
            row[:length] = tokens
        else:
            row[-length:] = tokens
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def answers(sequences: torch.Tensor, prompt_length: int = 0, ends: Any = ENDS) -> list[list[int]]:
    """What was written in each row, up to and with its end; what follows is padding, as long as the longest row."""
    written = []
    for row in sequences[:, prompt_length:].tolist():
        stops = [position for position, token in enumerate(row) if token in ends]
        written.append(row[: stops[0] + 1] if stops else row)
    return written


def rows_of(together: Any, position: int, count: int, samples: int = 1) -> Any:
    """The rows of the hypothesis at this position of the subset, in the order that it has alone."""
    size = len(together) // (count * samples)
    return [together[(b * count + position) * samples + i] for b in range(size) for i in range(samples)]


def check_rows(
    inputs: dict[str, Any],
    family: str = "llama",
    chosen: tuple[int, ...] = tuple(range(K)),
    num_hypotheses: int = K,
    **options: Any,
) -> list[list[int]]:
    """Compare one call with each hypothesis alone and with each merged model. Returns the rows of the one call."""
    model = adapted(family, num_hypotheses)
    options = {"max_new_tokens": 8, "eos_token_id": ENDS, **options}
    length = 0 if family == "t5" or "input_ids" not in inputs else inputs["input_ids"].shape[1]
    together = answers(model.generate(**inputs, hypotheses=list(chosen), **options), length)
    samples = options.get("num_return_sequences", 1)
    references = []
    for position, hypothesis in enumerate(chosen):
        alone = answers(model.generate(**inputs, hypotheses=hypothesis, **options), length)
        reference = answers(plain(family, hypothesis, num_hypotheses).generate(**inputs, **options), length)
        assert alone == reference
        assert rows_of(together, position, len(chosen), samples) == reference
        references.append(reference)
    # The comparison means something only while the hypotheses differ.
    assert len(set(chosen)) == 1 or any(reference != references[0] for reference in references)
    return together


# --- every row is what its hypothesis alone decodes ---


@pytest.mark.parametrize("name", GREEDY_AND_BEAMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_what_its_hypothesis_decodes_alone(family: str, name: str):
    check_rows(prompts([7, 3, 5], family), family, **GREEDY_AND_BEAMS[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_one(family: str):
    check_rows(prompts([6], family), family)
    check_rows(prompts([6], family), family, num_beams=2, num_return_sequences=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str):
    lengths = [7, 2, 5]
    batch = prompts(lengths, family)
    together = check_rows(batch, family)
    for row, length in enumerate(lengths):
        ids = batch["input_ids"][row : row + 1]
        ids = ids[:, :length] if family == "t5" else ids[:, -length:]
        assert together[row * K : row * K + K] == check_rows({"input_ids": ids}, family)


def test_rows_end_at_different_times():
    together = check_rows(prompts([7, 3, 5]), max_new_tokens=16)
    lengths = {len(row) for row in together}
    assert len(lengths) > 2
    assert max(lengths) == 16 > min(lengths)
    sequences = adapted().generate(**prompts([7, 3, 5]), max_new_tokens=16, eos_token_id=ENDS)
    for row, written in zip(sequences[:, 7:].tolist(), together, strict=True):
        assert row == written + [PAD] * (16 - len(written))


def test_an_end_can_be_switched_off():
    model = with_hypotheses(tiny_llama())
    model.generation_config.eos_token_id = ENDS
    inputs = prompts([7, 3])
    stopped = model.generate(**inputs, max_new_tokens=12)
    endless = model.generate(**inputs, max_new_tokens=12, eos_token_id=None)
    assert (stopped == PAD).sum() > (endless == PAD).sum()
    for k in range(K):
        alone = model.generate(**inputs, max_new_tokens=12, eos_token_id=None, hypotheses=k)
        assert torch.equal(endless[k::K], alone)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_batch_any_subset_any_beams(data: st.DataObject):
    num_hypotheses = data.draw(st.integers(1, 4), "K")
    chosen = data.draw(st.lists(st.integers(0, num_hypotheses - 1), min_size=1, max_size=4), "hypotheses")
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3), "lengths")
    beams = data.draw(st.integers(1, 3), "beams")
    samples = data.draw(st.integers(1, beams), "returned")
    options = {
        "num_beams": beams,
        "num_return_sequences": samples,
        "max_new_tokens": data.draw(st.integers(1, 6), "new"),
    }
    if beams > 1:
        options["length_penalty"] = data.draw(st.sampled_from([-1.0, 0.0, 1.0, 2.0]), "length_penalty")
        options["early_stopping"] = data.draw(st.sampled_from([True, False, "never"]), "early_stopping")
    inputs = prompts(lengths, seed=data.draw(st.integers(0, 99), "seed"))
    together = generate_all(num_hypotheses, inputs, chosen, options)
    for position, hypothesis in enumerate(chosen):
        reference = plain("llama", hypothesis, num_hypotheses).generate(**inputs, eos_token_id=ENDS, **options)
        assert rows_of(together, position, len(chosen), samples) == answers(reference, max(lengths))


def generate_all(num_hypotheses: int, inputs: dict[str, Any], chosen: list[int], options: dict[str, Any]) -> Any:
    model = adapted("llama", num_hypotheses)
    return answers(
        model.generate(**inputs, hypotheses=chosen, eos_token_id=ENDS, **options), inputs["input_ids"].shape[1]
    )


# --- which hypotheses ---


@pytest.mark.parametrize(
    ("hypotheses", "chosen"),
    [
        (None, [0, 1, 2]),
        ("all", [0, 1, 2]),
        (1, [1]),
        (np.int64(2), [2]),
        ([0, 2], [0, 2]),
        ([2, 0], [2, 0]),
        ([1, 1], [1, 1]),
        ([2], [2]),
        ((1, 0, 1, 2), [1, 0, 1, 2]),
        (torch.tensor([2, 1]), [2, 1]),
        (torch.tensor([0], dtype=torch.uint8), [0]),
    ],
    ids=str,
)
def test_subset_and_order(hypotheses: Any, chosen: list[int]):
    inputs = prompts([4, 6])
    sequences = adapted().generate(**inputs, max_new_tokens=5, hypotheses=hypotheses)
    assert len(sequences) == 2 * len(chosen)
    for position, k in enumerate(chosen):
        expected = plain(hypothesis=k).generate(**inputs, max_new_tokens=5)
        assert torch.equal(sequences[position :: len(chosen)], expected)


@pytest.mark.parametrize(
    "hypotheses",
    [
        3, -1, True, 1.0, "some", "1", [], (), [0, 3], [-1], [0, 1.5], [True], ["all"], [None], [[0]], {0, 1}, {},
        pytest.param(object(), id="object"),
        np.array([0, 1]), torch.tensor(1), torch.tensor([[0]]), torch.tensor([0.0]), torch.tensor([True]), torch.tensor([3]), torch.tensor([]),
    ],
    ids=repr,
)  # fmt: skip
def test_wrong_hypotheses_say_what_is_allowed(hypotheses: Any):
    with pytest.raises(ValueError, match=r"\[0, 2\]|at least one hypothesis"):
        adapted().generate(**prompts([3]), max_new_tokens=1, hypotheses=hypotheses)


def test_the_active_hypothesis_is_neither_used_nor_changed():
    model = with_hypotheses(tiny_llama())
    inputs = prompts([4, 6])
    before = model.generate(**inputs, max_new_tokens=4)
    model.set_hypothesis(2)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), before)
    assert model.active_hypothesis == 2
    assert torch.equal(model(**inputs).logits, model(**inputs, hypotheses=2).logits)


def test_one_hypothesis():
    model = with_hypotheses(tiny_llama(), num_hypotheses=1)
    inputs = prompts([4, 6])
    expected = merged(model, 0).generate(**inputs, max_new_tokens=4)
    for hypotheses in (None, "all", 0, [0]):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, hypotheses=hypotheses), expected)
    twice = model.generate(**inputs, max_new_tokens=4, hypotheses=[0, 0])
    assert torch.equal(twice, expected.repeat_interleave(2, dim=0))


# --- inputs of every kind ---


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_embeds(family: str):
    inputs = prompts([6, 4], family)
    embed = adapted(family).get_base_model().get_input_embeddings()
    embedded = {"inputs_embeds": embed(inputs["input_ids"]).detach(), "attention_mask": inputs["attention_mask"]}
    written = check_rows(embedded, family)
    # The same answers as from the tokens: the embedding is not adapted here.
    assert written == check_rows(inputs, family)
    if family != "t5":
        check_rows({**embedded, "input_ids": inputs["input_ids"]}, family, num_beams=2)


def test_positional_and_named_inputs():
    ids = prompts([5, 5])["input_ids"]
    expected = adapted().generate(input_ids=ids, max_new_tokens=4)
    assert torch.equal(adapted().generate(ids, max_new_tokens=4), expected)
    assert torch.equal(adapted().generate(inputs=ids, max_new_tokens=4), expected)
    assert torch.equal(adapted().generate(ids, GenerationConfig(max_new_tokens=4)), expected)


def test_mask_is_inferred_from_padding():
    inputs = prompts([6, 3])
    expected = adapted().generate(**inputs, max_new_tokens=4)
    assert torch.equal(adapted().generate(input_ids=inputs["input_ids"], max_new_tokens=4), expected)


def test_position_ids_and_masks():
    ids = prompts([5, 5])["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 9]])
    shifted = check_rows({"input_ids": ids, "position_ids": positions})
    assert shifted != check_rows({"input_ids": ids})
    # A single row applies to the whole batch, as it does in transformers.
    check_rows({"input_ids": ids, "position_ids": positions[1:]})
    check_rows({"input_ids": ids, "attention_mask": torch.ones(1, 5, dtype=torch.long)})


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_no_prompt(options: dict[str, Any]):
    config = GenerationConfig(max_new_tokens=5, **options)
    for kwargs in ({"max_new_tokens": 5, **options}, {"generation_config": config}, {"bos_token_id": 7, **options}):
        sequences = adapted().generate(**kwargs)
        assert len(sequences) == K
        for k in range(K):
            expected = plain(hypothesis=k).generate(**kwargs)
            assert answers(sequences, ends=[EOS])[k] == answers(expected, ends=[EOS])[0]
            assert torch.equal(adapted().generate(**kwargs, hypotheses=k), expected)


def test_no_prompt_and_nothing_to_start_from():
    with pytest.raises(ValueError, match="bos_token_id"):
        adapted("t5").generate(max_new_tokens=2)


def test_t5_encoder_outputs():
    inputs = prompts([6, 4], "t5")
    with torch.no_grad():
        encoded = plain("t5", 1).get_encoder()(**inputs, output_hidden_states=True)
    kept = copy.deepcopy(encoded)
    check_rows({"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"]}, "t5")
    check_rows({"encoder_outputs": encoded}, "t5")
    check_rows({"encoder_outputs": encoded.to_tuple(), **inputs}, "t5")
    options = {"num_beams": 2, "max_new_tokens": 5}
    together = adapted("t5").generate(encoder_outputs=encoded, **options)
    assert torch.equal(encoded.last_hidden_state, kept.last_hidden_state)
    assert torch.equal(encoded.hidden_states[0], kept.hidden_states[0])
    for k in range(K):
        # A copy, because transformers expands the object it is given.
        expected = plain("t5", k).generate(encoder_outputs=copy.copy(encoded), **options)
        assert answers(together[k::K], ends=[EOS]) == answers(expected, ends=[EOS])


def test_several_images_for_an_input_are_refused():
    base = tiny_llava()
    model = with_hypotheses(base, target_modules=r".*language_model.*(q|v)_proj", task_type=None)
    torch.manual_seed(0)
    image = base.config.image_token_id

    def picture_prompts(images: int) -> dict[str, torch.Tensor]:
        ids = torch.cat([torch.full((2, 4 * images), image), prompts([5, 5])["input_ids"].clamp(max=image - 1)], dim=1)
        return {"input_ids": ids, "pixel_values": torch.randn(2 * images, 3, 8, 8)}

    one, two = picture_prompts(1), picture_prompts(2)
    sequences = model.generate(**one, max_new_tokens=4)
    for k in range(K):
        assert torch.equal(sequences[k::K], merged(model, k).generate(**one, max_new_tokens=4))
        assert torch.equal(
            model.generate(**two, max_new_tokens=4, hypotheses=k), merged(model, k).generate(**two, max_new_tokens=4)
        )
    with pytest.raises(ValueError, match=r"`pixel_values` has 4 rows for 2 inputs.*hypotheses=k"):
        model.generate(**two, max_new_tokens=4)


def test_whisper():
    """Its `generate` is its own, with another main input."""
    model = with_hypotheses(tiny_whisper(), task_type=None)
    torch.manual_seed(0)
    sound = {"input_features": torch.randn(2, 8, 40)}
    written = answers(model.generate(**sound, max_new_tokens=5), ends=[EOS])
    for k in range(K):
        expected = answers(merged(model, k).generate(**sound, max_new_tokens=5), ends=[EOS])
        for ours, theirs in zip(written[k::K], expected, strict=True):
            assert ours[: len(theirs)] == theirs
            assert set(ours[len(theirs) :]) <= {PAD}
    assert len({tuple(row) for row in written}) > 1


def test_t5_decoder_inputs():
    inputs = prompts([6, 4], "t5")
    start = torch.tensor([[PAD, 9, 8], [PAD, 11, 12]])
    written = check_rows({**inputs, "decoder_input_ids": start}, "t5")
    assert [row[:3] for row in written] == start.repeat_interleave(K, dim=0).tolist()
    for tokens in ([5, 6], torch.tensor([5, 6])):
        written = check_rows(inputs, "t5", decoder_start_token_id=tokens)
        assert [row[0] for row in written] == [5] * K + [6] * K


def test_arguments_are_left_alone():
    inputs = prompts([6, 3])
    kept = copy.deepcopy(inputs)
    config = GenerationConfig(max_new_tokens=3, num_beams=2)
    before = config.to_dict()
    allowed = lambda row, ids: list(range(VOCABULARY))  # noqa: E731
    adapted().generate(**inputs, generation_config=config, prefix_allowed_tokens_fn=allowed)
    assert config.to_dict() == before
    assert all(torch.equal(inputs[name], kept[name]) for name in kept)


# --- what comes back ---


def test_scores_and_logits():
    inputs = prompts([6, 3])
    options = {
        "max_new_tokens": 4, "eos_token_id": None, "temperature": None, "repetition_penalty": 1.3,
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True,
    }  # fmt: skip
    output = adapted().generate(**inputs, **options)
    for k in range(K):
        expected = plain(hypothesis=k).generate(**inputs, **options)
        assert torch.equal(output.sequences[k::K], expected.sequences)
        for name in ("scores", "logits"):
            for ours, theirs in zip(getattr(output, name), getattr(expected, name), strict=True):
                torch.testing.assert_close(ours[k::K], theirs, rtol=1e-4, atol=1e-4)
        ours, theirs = output.hidden_states[1][-1], expected.hidden_states[1][-1]
        torch.testing.assert_close(ours[k::K], theirs, rtol=1e-4, atol=1e-4)
    assert not torch.equal(output.scores[0], output.logits[0])


def test_beam_scores():
    inputs = prompts([6, 3])
    options = {
        "max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2,
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    output = adapted().generate(**inputs, **options)
    assert output.sequences_scores.shape == (2 * K * 2,)
    assert output.scores[0].shape == (2 * K * 3, VOCABULARY)
    for k in range(K):
        expected = plain(hypothesis=k).generate(**inputs, **options)
        scores = torch.stack(rows_of(output.sequences_scores, k, K, 2))
        torch.testing.assert_close(scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
        whole = adapted().compute_transition_scores(output.sequences, output.scores, output.beam_indices)
        torch.testing.assert_close(
            torch.stack(rows_of(whole, k, K, 2)),
            plain(hypothesis=k).compute_transition_scores(expected.sequences, expected.scores, expected.beam_indices),
            rtol=1e-4,
            atol=1e-4,
        )


# --- sampling ---


def test_sampling_draws_from_each_hypothesis():
    inputs = prompts([6, 3])
    options = {
        "do_sample": True, "top_k": 4, "temperature": 0.7, "max_new_tokens": 5, "eos_token_id": None,
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    torch.manual_seed(0)
    output = adapted().generate(**inputs, **options, num_return_sequences=4)
    assert len(output.sequences) == 2 * K * 4
    for k in range(K):
        expected = plain(hypothesis=k).generate(**inputs, **options).scores[0].softmax(-1)
        rows = torch.stack(rows_of(output.scores[0], k, K, 4)).softmax(-1)
        torch.testing.assert_close(rows, expected.repeat_interleave(4, dim=0), rtol=1e-4, atol=1e-5)
        check_likely(rows_of(output.sequences, k, K, 4), inputs, k, samples=4, top_k=4)
    assert len({tuple(row.tolist()) for row in output.sequences}) > 2 * K
    torch.manual_seed(0)
    assert torch.equal(adapted().generate(**inputs, **options, num_return_sequences=4).sequences, output.sequences)


def test_beam_sampling_draws_from_each_hypothesis():
    inputs = prompts([6, 3])
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 3, "num_beams": 2, "num_return_sequences": 2, "eos_token_id": None}
    sequences = adapted().generate(**inputs, **options, max_new_tokens=5)
    assert len(sequences) == 2 * K * 2
    for k in range(K):
        check_likely(rows_of(sequences, k, K, 2), inputs, k, samples=2, top_k=3)


def check_likely(rows: list[torch.Tensor], inputs: dict[str, Any], hypothesis: int, samples: int, top_k: int) -> None:
    """Every token after the prompt is one of the `top_k` likeliest of the merged model at its place."""
    sequences = torch.stack(rows)
    start = inputs["input_ids"].shape[1]
    mask = inputs["attention_mask"].repeat_interleave(samples, dim=0)
    mask = torch.cat([mask, torch.ones_like(sequences[:, start:])], dim=1)
    assert torch.equal(sequences[:, :start], inputs["input_ids"].repeat_interleave(samples, dim=0))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = plain(hypothesis=hypothesis)(sequences, attention_mask=mask, position_ids=positions).logits
    likeliest = logits[:, start - 1 : -1].topk(top_k).indices
    assert (likeliest == sequences[:, start:, None]).any(-1).all()


def test_sampling_the_likeliest_is_greedy():
    check_rows(prompts([6, 3]), do_sample=True, top_k=1, num_return_sequences=2)


# --- the user's own functions ---


class Recorder(LogitsProcessor):
    """Forbids one token, and keeps what it was given."""

    def __init__(self, forbidden: int):
        self.forbidden = forbidden
        self.rows: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert len(input_ids) == len(scores)
        self.rows.append(len(scores))
        scores[:, self.forbidden] = -torch.inf
        return scores


class StopAfter(StoppingCriteria):
    """Stops a row at any of the given tokens."""

    def __init__(self, tokens: list[int]):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], self.tokens)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_logits_processor(options: dict[str, Any]):
    inputs = prompts([6, 3])
    free = check_rows(inputs, eos_token_id=None, **options)
    common = max(range(VOCABULARY), key=[token for row in free for token in row].count)
    recorder = Recorder(common)
    written = check_rows(inputs, eos_token_id=None, logits_processor=[recorder], **options)
    assert all(common not in row for row in written)
    assert set(recorder.rows) == {2 * options.get("num_beams", 1), 2 * K * options.get("num_beams", 1)}


def test_stopping_criteria():
    check_rows(prompts([6, 3]), eos_token_id=EOS, stopping_criteria=[StopAfter(ENDS)], max_new_tokens=12)
    written = check_rows(prompts([6, 3]), stopping_criteria=[StopAfter(ENDS)], max_new_tokens=12)
    assert max(map(len, written)) > min(map(len, written))


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, [0, 1]),
        ({"num_beams": 2}, [0, 1]),
        ({"num_beams": 3, "num_return_sequences": 2}, [0, 1]),
        # transformers numbers the samples, not the inputs.
        ({"num_return_sequences": 2, "do_sample": True, "top_k": 1}, [0, 1, 2, 3]),
    ],
    ids=["greedy", "beams", "beams returned", "samples"],
)
def test_prefix_allowed_tokens_fn_is_given_the_number_of_the_input(options: dict[str, Any], numbers: list[int]):
    seen: set[int] = set()

    def allowed(number: int, ids: torch.Tensor) -> list[int]:
        seen.add(number)
        return [3 + number, 20 + number, 30 + len(ids)]

    inputs = prompts([6, 3])
    check_rows(inputs, prefix_allowed_tokens_fn=allowed, **options)
    assert sorted(seen) == numbers
    seen.clear()
    adapted().generate(**inputs, prefix_allowed_tokens_fn=allowed, max_new_tokens=2, **options)
    assert sorted(seen) == numbers


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("negative", ["none", "ids", "ids and mask"])
def test_guidance(family: str, negative: str):
    options: dict[str, Any] = {"guidance_scale": 1.8}
    if negative != "none":
        unwanted = prompts([4, 2], family, seed=5)
        options["negative_prompt_ids"] = unwanted["input_ids"]
        if negative == "ids and mask":
            options["negative_prompt_attention_mask"] = unwanted["attention_mask"]
    inputs = prompts([6, 4], family)
    assert check_rows(inputs, family, **options) != check_rows(inputs, family)


def test_calls_inside_a_logits_processor_are_calls_of_their_own():
    model = with_hypotheses(tiny_llama())
    model.set_hypothesis(1)
    inputs = prompts([6, 3])
    expected = model(**inputs).logits, model.generate(**inputs, max_new_tokens=2)
    inner = []

    class Asks(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            for call in (model, model.base_model):
                inner.append((call(**inputs).logits, call.generate(**inputs, max_new_tokens=2)))
            return scores

    for hypotheses in (None, [2, 1]):
        before = model.generate(**inputs, max_new_tokens=3, hypotheses=hypotheses)
        after = model.generate(**inputs, max_new_tokens=3, hypotheses=hypotheses, logits_processor=[Asks()])
        assert torch.equal(before, after)
    assert len(inner) == 2 * 2 * 3
    for logits, sequences in inner:
        assert torch.equal(logits, expected[0])
        assert torch.equal(sequences, expected[1])


def test_an_exception_leaves_no_trace():
    model = with_hypotheses(tiny_llama())
    inputs = prompts([6, 3])
    expected, logits = model.generate(**inputs, max_new_tokens=3), model(**inputs).logits

    class Fails(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    for hypotheses in (None, 2, [2, 1]):
        with pytest.raises(KeyboardInterrupt):
            model.generate(**inputs, max_new_tokens=3, logits_processor=[Fails()], hypotheses=hypotheses)
        assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3), expected)


# --- caches ---


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", FAMILIES)
def test_static_cache(family: str, options: dict[str, Any]):
    inputs = prompts([6, 3], family)
    written = check_rows(inputs, family, cache_implementation="static", **options)
    assert written == check_rows(inputs, family, **options)


def test_prefill_in_chunks():
    assert check_rows(prompts([6, 6]), prefill_chunk_size=2) == check_rows(prompts([6, 6]))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_given_cache(kind: str):
    model, ids = adapted(), prompts([6, 6])["input_ids"]

    def new_cache() -> Any:
        config = model.get_base_model().config
        return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=32)

    def write(ids: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, eos_token_id=None, **options
        )

    expected = write(ids, 6)
    cache = new_cache()
    assert torch.equal(write(ids, 6, past_key_values=cache), expected)
    # Filled, it belongs to the rows that filled it.
    with pytest.raises(ValueError, match=r"`past_key_values`.*3 hypotheses.*hypotheses=k"):
        write(expected, 2, past_key_values=cache)
    # With one hypothesis a conversation goes on.
    cache = new_cache()
    first = write(ids, 3, past_key_values=cache, hypotheses=2)
    assert torch.equal(write(first, 3, past_key_values=cache, hypotheses=2), expected[2::K])


# --- what serves one sequence, and so one hypothesis, at a time ---


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of the words <0> to <3>, the special ones, and w4 to w63."""
    tokens = [f"<{i}>" if i < 4 else f"w{i}" for i in range(VOCABULARY)]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<3>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<0>",
        bos_token="<1>",
        eos_token="<2>",
        unk_token="<3>",
        padding_side="left",
    )


SINGLE: dict[str, Callable[[], Any]] = {
    "streamer": lambda: TextStreamer(words()),
    "assistant_model": lambda: tiny_llama(num_hidden_layers=1),
    "prompt_lookup_num_tokens": lambda: 2,
    "assistant_early_exit": lambda: 1,
    "token_healing": lambda: True,
}
OPTIONS = ("prompt_lookup_num_tokens", "assistant_early_exit", "token_healing")


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, "argument") for name in SINGLE] + [(name, place) for name in OPTIONS for place in ("config", "model")],
)
def test_refused_with_several_hypotheses_works_with_one(name: str, place: str):
    model = with_hypotheses(tiny_llama())
    inputs = prompts([6])
    options: dict[str, Any] = {"tokenizer": words()} if name == "token_healing" else {}
    if place == "config":
        options["generation_config"] = GenerationConfig(**{name: SINGLE[name](), "max_new_tokens": 5})
    else:
        options["max_new_tokens"] = 5
    if place == "argument":
        options[name] = SINGLE[name]()
    elif place == "model":
        setattr(model.generation_config, name, SINGLE[name]())
    for hypotheses in (None, "all", [0, 2], [1, 1]):
        with pytest.raises(ValueError, match=rf"`{name}` serves one sequence at a time.*`hypotheses=k`"):
            model.generate(**inputs, **options, hypotheses=hypotheses)
    expected = merged(model, 1).generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, hypotheses=1), expected)
    assert torch.equal(model.generate(**inputs, **options, hypotheses=[1]), expected)
    assert len(expected) == 1


def test_paged_cache_is_refused():
    for options in (
        {"cache_implementation": "paged"},
        {"generation_config": GenerationConfig(cache_implementation="paged")},
    ):
        with pytest.raises(ValueError, match=r"paged.*hypotheses=k"):
            adapted().generate(**prompts([4]), **options)


def test_token_healing_keeps_the_hypothesis():
    # "w6" also begins "w60": the last token is chosen anew, by `generate` inside `generate`. Healing favours the token
    # that is there, so the model must be sure of itself.
    base = tiny_llama()
    base.lm_head.weight.data *= 100
    model = with_hypotheses(base)
    options = {"tokenizer": words(), "token_healing": True, "max_new_tokens": 4}
    healed = []
    for last in (4, 5, 6):
        inputs = {"input_ids": torch.tensor([[20, 30, 40, last], [7, 8, 41, last]])}
        for k in range(K):
            sequences = model.generate(**inputs, **options, hypotheses=k)
            assert torch.equal(sequences, merged(model, k).generate(**inputs, **options))
            healed += sequences[:, 3].ne(last).tolist()
    assert any(healed)
    assert not all(healed)


def test_text_streamer_writes_the_words(capsys: pytest.CaptureFixture[str]):
    inputs = prompts([6])
    sequences = adapted().generate(**inputs, max_new_tokens=5, hypotheses=1, streamer=TextStreamer(words()))
    assert capsys.readouterr().out.split() == [words().decode(token) for token in sequences[0].tolist()]


def test_iterator_streamer_in_a_thread():
    inputs = prompts([6])
    expected = plain(hypothesis=2).generate(**inputs, max_new_tokens=5)[0, 6:]
    streamer = TextIteratorStreamer(words(), skip_prompt=True, timeout=30)
    options = {**inputs, "max_new_tokens": 5, "hypotheses": 2, "streamer": streamer}
    thread = threading.Thread(target=adapted().generate, kwargs=options)
    thread.start()
    written = "".join(streamer).split()
    thread.join()
    assert written == [words().decode(token) for token in expected.tolist()]


def test_threads_do_not_meet():
    inputs = prompts([6, 3])
    model = adapted()
    expected = {h: model.generate(**inputs, max_new_tokens=8, hypotheses=h) for h in (0, 1, (2, 0, 1))}
    results: dict[Any, list[torch.Tensor]] = {h: [] for h in expected}

    def work(hypotheses: Any) -> None:
        for _ in range(3):
            results[hypotheses].append(model.generate(**inputs, max_new_tokens=8, hypotheses=hypotheses))

    threads = [threading.Thread(target=work, args=(h,)) for h in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for hypotheses, sequences in results.items():
        assert len(sequences) == 3
        assert all(torch.equal(sequence, expected[hypotheses]) for sequence in sequences)


def test_pipeline():
    tokenizer = words()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generator = pipeline("text-generation", model=adapted(), tokenizer=tokenizer)
    texts = ["w5 w6 w7", "w30 w31"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 4, "return_tensors": True, "do_sample": False}
    # One sequence for each hypothesis, as with num_return_sequences.
    together = generator(texts, **options)
    assert [len(answer) for answer in together] == [K, K]
    for k in range(K):
        for text, row in zip(range(2), plain(hypothesis=k).generate(**inputs, max_new_tokens=4), strict=True):
            expected = [token for token in row.tolist() if token != PAD]
            written = together[text][k]["generated_token_ids"]
            assert [token for token in written if token != PAD] == expected
            alone = generator(texts, hypotheses=k, **options)[text]
            assert [token for token in alone[0]["generated_token_ids"] if token != PAD] == expected
            assert len(alone) == 1


# --- the other states of a model ---


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_without_task_type(family: str):
    config = MCLoraConfig(num_hypotheses=K, r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(FAMILIES[family](), config).eval()
    assert type(model) is PeftModel
    reference = [merged(model, k) for k in range(K)]
    inputs = prompts([6, 3], family)
    if family == "llama":
        logits = model(**inputs, hypotheses="all").logits
        for k in range(K):
            torch.testing.assert_close(logits[2 * k : 2 * k + 2], reference[k](**inputs).logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(model(**inputs, hypotheses=k).logits, logits[2 * k : 2 * k + 2])
    sequences = model.generate(**inputs, max_new_tokens=5, eos_token_id=None)
    subset = model.generate(**inputs, max_new_tokens=5, eos_token_id=None, hypotheses=[2, 0])
    for k in range(K):
        expected = reference[k].generate(**inputs, max_new_tokens=5, eos_token_id=None)
        assert torch.equal(sequences[k::K], expected)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, eos_token_id=None, hypotheses=k), expected)
    assert torch.equal(subset, torch.stack([sequences[2::K], sequences[0::K]], dim=1).flatten(0, 1))
    with pytest.raises(ValueError, match=r"\[0, 2\]"):
        model.generate(**inputs, hypotheses=3)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_auto_model(task_type: str | None, tmp_path: Any):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = with_hypotheses(base, task_type=task_type)
    model.save_pretrained(tmp_path / "adapter")
    auto = AutoPeftModelForCausalLM if task_type else AutoPeftModel
    loaded = auto.from_pretrained(tmp_path / "adapter").eval()
    inputs = prompts([6, 3])
    expected = model.generate(**inputs, max_new_tokens=5)
    assert len(expected) == 2 * K
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=5), expected)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=5, hypotheses=1), expected[1::K])


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_while_disabled(task_type: str | None):
    model = with_hypotheses(tiny_llama(), task_type=task_type)
    inputs = prompts([6, 3])
    adapted_rows = model.generate(**inputs, max_new_tokens=5)
    expected = tiny_llama().generate(**inputs, max_new_tokens=5)
    with model.disable_adapter():
        assert torch.equal(model.generate(**inputs, max_new_tokens=5), expected)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, hypotheses=1), expected)
        everyone = model.generate(**inputs, max_new_tokens=5, hypotheses="all")
        assert torch.equal(everyone, expected.repeat_interleave(K, dim=0))
        # One row for each input, so what serves one sequence is welcome.
        model.generate(**prompts([6]), max_new_tokens=2, prompt_lookup_num_tokens=2)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), adapted_rows)


def test_while_merged():
    model = with_hypotheses(tiny_llama())
    inputs = prompts([6, 3])
    before = model.generate(**inputs, max_new_tokens=5)
    model.merge_adapter(hypothesis=2)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), before[2::K])
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, hypotheses=2), before[2::K])
    for other in (0, "all", [2, 1]):
        with pytest.raises(ValueError, match="Hypothesis 2 is merged"):
            model.generate(**inputs, max_new_tokens=5, hypotheses=other)
    model.unmerge_adapter()
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), before)


def test_unloaded_model_is_plain_again():
    model = with_hypotheses(tiny_llama())
    inputs = prompts([6, 3])
    base = model.unload()
    assert "generate" not in vars(base)
    assert torch.equal(base.generate(**inputs, max_new_tokens=3), tiny_llama().generate(**inputs, max_new_tokens=3))
    with pytest.raises(ValueError, match="hypotheses"):
        base.generate(**inputs, max_new_tokens=3, hypotheses=1)


def test_copies_and_the_base_model_generate_too():
    model = with_hypotheses(tiny_llama())
    inputs = prompts([6, 3])
    expected = model.generate(**inputs, max_new_tokens=3)
    assert torch.equal(model.get_base_model().generate(**inputs, max_new_tokens=3), expected)
    assert torch.equal(model.base_model.generate(**inputs, max_new_tokens=3), expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mclora_B" in name:
                parameter.zero_()
    assert torch.equal(twin.generate(**inputs, max_new_tokens=3), expected)
    assert torch.equal(twin.get_base_model().generate(**inputs, max_new_tokens=3), expected)
    assert not torch.equal(model.generate(**inputs, max_new_tokens=3), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_generate_between_forward_and_backward(checkpointing: bool):
    inputs = prompts([6, 6])

    def gradients(generate: bool) -> dict[str, torch.Tensor]:
        model = with_hypotheses(tiny_llama(), seed=3).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        losses = [model(**inputs, labels=inputs["input_ids"], hypotheses=h).loss for h in (1, torch.tensor([2, 0]))]
        if generate:
            model.generate(**inputs, max_new_tokens=3)
            model.generate(**inputs, max_new_tokens=3, hypotheses=2)
        (losses[0] + 2 * losses[1]).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys()
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name in expected:
        assert torch.equal(expected[name], found[name])


def test_generating_needs_no_graph_and_keeps_the_mode():
    model = with_hypotheses(tiny_llama()).train()
    output = model.generate(**prompts([6]), max_new_tokens=2, return_dict_in_generate=True, output_scores=True)
    assert not output.scores[0].requires_grad
    assert model.training
    assert BOS not in output.sequences[:, :6]
