"""Diverse beam search against beam search of transformers, and against a slow implementation without batches or caches."""

from __future__ import annotations

import pytest
import torch

from recipes.evaluation.diverse_beam import diverse_beam_search
from tests.tiny import EOS, PAD, VOCABULARY, tiny_gemma3, tiny_llama, tiny_t5, with_hypotheses


def prompts(rows: int = 3, length: int = 5) -> dict[str, torch.Tensor]:
    """Random prompts of different lengths, padded on the left."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        ids[row, :row], mask[row, :row] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def livelier(model):
    """Random models are almost uniform; with larger logits beams differ."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12)
    return model


def until_end(tokens: list[int]) -> list[int]:
    """Without what the end is filled up with: transformers takes the end token itself where the padding token is 0."""
    start = next((place for place, token in enumerate(tokens) if token != PAD), 0)
    return tokens[: tokens.index(EOS, start) + 1] if EOS in tokens[start:] else tokens


# Many sequences end before the longest.
BIAS = {"sequence_bias": {(EOS,): 25.0}}
OPTIONS = [
    {"num_beams": 4, "num_return_sequences": 4},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "early_stopping": "never"},
    {"num_beams": 5, "num_return_sequences": 5, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 2, "num_return_sequences": 1, "repetition_penalty": 1.3, "use_cache": False},
    {"num_beams": 1},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", [tiny_llama, tiny_gemma3, tiny_t5])
def test_one_group_is_beam_search_of_transformers(family, options):
    # The logits of the tiny T5 are large as they are.
    model = tiny_t5() if family is tiny_t5 else livelier(family(tie_word_embeddings=False))
    for bias in ({}, BIAS):
        arguments = {**prompts(), "max_new_tokens": 9, "do_sample": False, **options, **bias}
        expected = model.generate(**arguments).tolist()
        found = model.generate(**arguments, custom_generate=diverse_beam_search).tolist()
        assert [*map(until_end, found)] == [*map(until_end, expected)]
    assert any(EOS in tokens for tokens in expected)


def test_many_groups_without_a_penalty_are_the_same_search():
    model = livelier(tiny_llama())
    arguments = {**prompts(), "max_new_tokens": 6, "do_sample": False, **BIAS}
    two = model.generate(**arguments, num_beams=2, num_return_sequences=2).view(3, 2, -1)
    found = model.generate(
        **arguments, num_beams=6, num_return_sequences=6, custom_generate=diverse_beam_search, groups=3
    ).view(3, 6, -1)
    for place in range(6):
        alone, grouped = two[:, place // 3].tolist(), found[:, place].tolist()
        assert [*map(until_end, grouped)] == [*map(until_end, alone)]


def slow_search(model, prompt: list[int], beams: int, groups: int, penalty: float, new_tokens: int) -> list[list[int]]:
    """Groups of beams for one prompt, by Python lists, that score every continuation of every beam."""
    size = beams // groups
    running = [[(0.0, prompt)] for _ in range(groups)]
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(groups)]
    is_done = [False] * groups
    for step in range(1, new_tokens + 1):
        used = [0] * VOCABULARY
        for group in range(groups):
            if is_done[group]:
                continue
            candidates = []
            for score, sequence in running[group]:
                log_probs = model(torch.tensor([sequence])).logits[0, -1].log_softmax(-1).tolist()
                for token, log_prob in enumerate(log_probs):
                    candidates.append((score + log_prob - penalty * used[token], [*sequence, token]))
            candidates.sort(key=lambda candidate: -candidate[0])
            candidates = candidates[: 2 * size]
            is_last = step == new_tokens
            for score, sequence in candidates[:size]:
                if sequence[-1] == EOS or is_last:
                    ended[group].append((score / step, sequence))
            ended[group] = sorted(ended[group], key=lambda found: -found[0])[:size]
            running[group] = [found for found in candidates if found[1][-1] != EOS][:size]
            full = len(ended[group]) == size
            is_done[group] = is_last or (full and running[group][0][0] / step <= ended[group][-1][0])
            if not is_done[group]:
                for _, sequence in running[group]:
                    used[sequence[-1]] += 1
    return [ended[place % groups][place // groups][1] for place in range(beams)]


@pytest.mark.parametrize(("beams", "groups", "penalty"), [(3, 3, 0.7), (4, 2, 1.5), (6, 3, 20.0)])
def test_groups_are_those_of_a_slow_search(beams, groups, penalty):
    model = livelier(tiny_llama(tie_word_embeddings=False))
    inputs = prompts()
    found = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, num_beams=beams, num_return_sequences=beams,
        custom_generate=diverse_beam_search, groups=groups, diversity_penalty=penalty,
    ).view(3, beams, -1)  # fmt: skip
    for row in range(3):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        expected = slow_search(model, prompt, beams, groups, penalty, 6)
        start = inputs["input_ids"].shape[1] - len(prompt)
        for place in range(beams):
            tokens = found[row, place, start:].tolist()
            assert tokens[: len(expected[place])] == expected[place]
            assert set(tokens[len(expected[place]) :]) <= {PAD}


def test_a_large_penalty_makes_all_tokens_of_a_step_differ():
    found = tiny_llama().generate(
        **prompts(), max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=5, num_return_sequences=5,
        custom_generate=diverse_beam_search, groups=5, diversity_penalty=100.0,
    ).view(3, 5, -1)  # fmt: skip
    # The last token is another matter: with it all sequences end, and what has ended is in nobody's way.
    for row in found[:, :, -3:-1]:
        for tokens in row.T.tolist():
            assert len(set(tokens)) == 5


def test_hypotheses_decode_by_it_too():
    model = with_hypotheses(livelier(tiny_llama()), num_hypotheses=2)
    options = {
        **prompts(), "max_new_tokens": 5, "do_sample": False, "num_beams": 2, "num_return_sequences": 2,
        "custom_generate": diverse_beam_search, "groups": 2, "diversity_penalty": 1.0,
    }  # fmt: skip
    both = model.generate(**options).view(3, 2, 2, -1)
    for hypothesis in (0, 1):
        alone = model.generate(**options, hypotheses=hypothesis).view(3, 2, -1)
        width = alone.shape[-1]
        assert both[:, hypothesis, :, :width].tolist() == alone.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4, "groups": 3}, "`groups=3` does not divide `num_beams=4`"),
        ({"num_beams": 2, "groups": 2, "diversity_penalty": -1.0}, "`diversity_penalty=-1.0`"),
        ({"num_beams": 2, "groups": 2, "do_sample": True}, "does not sample"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_llama().generate(
            **prompts(), **{"do_sample": False, **options}, custom_generate=diverse_beam_search, max_new_tokens=1
        )
