"""Rankings against brute force: one sequence and one hypothesis at a time, without padding; consensus by plain loops."""

from __future__ import annotations

import builtins
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from sacrebleu.metrics import CHRF

from peft_mcl import MCLoraConfig, consensus_order, export_hypotheses, from_lora_adapters, rank_sequences
from peft_mcl.config import check_weights
from tests.peft_mcl.test_generation import ENDS, K, adapted, prompts, words
from tests.tiny import FAMILIES, PAD, tiny_llama, tiny_whisper, with_hypotheses


WEIGHTS = [0.2, 0.7, 0.1]
DECODING = {
    "greedy": {},
    "beams": {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
    "samples": {"do_sample": True, "num_return_sequences": 2},
}


def log_likelihood(family: str, prompt: list[int], written: list[int], hypothesis: int) -> float:
    """Of the tokens `written`, by one call of the model for one row without padding."""
    with torch.no_grad():
        if family == "t5":
            inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[PAD, *written[:-1]]])}
            logits = adapted(family)(**inputs, hypotheses=hypothesis).logits[0]
        else:
            ids = torch.tensor([prompt + written[:-1]])
            logits = adapted(family)(input_ids=ids, hypotheses=hypothesis).logits[0, len(prompt) - 1 :]
    log_probs = logits.double().log_softmax(-1)
    return sum(log_probs[place, token].item() for place, token in enumerate(written))


def by_hand(
    family: str, inputs: dict[str, torch.Tensor], sequences: torch.Tensor, chosen: list[int], samples: int, alpha: float
) -> dict[str, list[list[float]]]:
    """The scores of all sequences of each input, in the order of decoding, by method."""
    count = len(chosen) * samples
    found: dict[str, list[list[float]]] = {"likelihood": [], "mixture": []}
    for b, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        prompt = [token for token, keep in zip(ids.tolist(), mask.tolist(), strict=True) if keep]
        likelihood, mixture = [], []
        for place in range(count):
            start = 1 if family == "t5" else len(ids)
            written = sequences[b * count + place, start:].tolist()
            ends = [t for t, token in enumerate(written) if token in ENDS]
            written = written[: ends[0] + 1] if ends else written
            joint = [math.log(WEIGHTS[k]) + log_likelihood(family, prompt, written, k) for k in range(K)]
            likelihood.append(joint[chosen[place // samples]] / len(written) ** alpha)
            mixture.append(torch.tensor(joint).logsumexp(0).item() / len(written) ** alpha)
        found["likelihood"].append(likelihood)
        found["mixture"].append(mixture)
    return found


@pytest.mark.parametrize("name", DECODING)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_order_are_those_of_brute_force(family: str, name: str):
    inputs, options = prompts([7, 3], family), {**DECODING[name], "eos_token_id": ENDS}
    chosen = [2, 0] if name == "samples" else [0, 1, 2]
    torch.manual_seed(0)
    call = {**inputs, **options, "max_new_tokens": 6, "hypotheses": chosen}
    sequences = adapted(family).generate(**call)
    samples, alpha = options.get("num_return_sequences", 1), options.get("length_penalty", 1.0)
    expected = by_hand(family, inputs, sequences, chosen, samples, alpha)
    for method in ("likelihood", "mixture"):
        ranking = rank_sequences(adapted(family), sequences, method=method, weights=WEIGHTS, **call)
        assert ranking.order.shape == ranking.scores.shape == ranking.hypotheses.shape == (2, len(chosen) * samples)
        assert (ranking.order.dtype, ranking.scores.dtype) == (torch.int64, torch.float32)
        for b in range(2):
            order = ranking.order[b].tolist()
            assert sorted(order) == list(range(len(order)))
            assert ranking.scores[b].tolist() == pytest.approx([expected[method][b][i] for i in order], abs=2e-5)
            assert ranking.hypotheses[b].tolist() == [chosen[i // samples] for i in order]
        assert (ranking.scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("method", ["likelihood", "mixture", "consensus"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generate_returns_the_rows_in_that_order(family: str, method: str):
    inputs = prompts([7, 3], family)
    call = {**inputs, "max_new_tokens": 6, "eos_token_id": ENDS, "tokenizer": words()}
    sequences = adapted(family).generate(**call)
    ranking = rank_sequences(adapted(family), sequences, method=method, **call)
    assert torch.equal(adapted(family).generate(**call, rank=method), sequences[ranking.rows])


def test_inputs_of_every_kind_are_ranked_alike():
    model, ids = adapted(), prompts([5, 5])["input_ids"]
    expected = model.generate(input_ids=ids, max_new_tokens=4, rank="mixture")
    assert torch.equal(model.generate(ids, max_new_tokens=4, rank="mixture"), expected)
    assert torch.equal(model.generate(inputs=ids, max_new_tokens=4, rank="mixture"), expected)
    embedded = model.get_base_model().get_input_embeddings()(ids).detach()
    written = model.generate(inputs_embeds=embedded, max_new_tokens=4, rank="mixture")
    assert torch.equal(written, expected[:, 5:])
    assert model.generate(max_new_tokens=4, rank="mixture").shape[0] == K


def test_one_candidate_and_one_hypothesis():
    inputs = prompts([5, 3])
    call = {**inputs, "max_new_tokens": 4, "hypotheses": 1}
    sequences = adapted().generate(**call)
    assert torch.equal(adapted().generate(**call, rank="likelihood"), sequences)
    ranking = rank_sequences(adapted(), sequences, **call)
    assert ranking.order.tolist() == [[0], [0]]
    assert ranking.hypotheses.tolist() == [[1], [1]]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_mixture_is_at_least_each_of_its_parts_and_rankings_ignore_the_scale_of_weights(data: st.DataObject):
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=K, max_size=K))
    call = {**prompts(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))), "max_new_tokens": 4}
    sequences = adapted().generate(**call)
    own = rank_sequences(adapted(), sequences, weights=weights, **call)
    mixture = rank_sequences(adapted(), sequences, weights=weights, method="mixture", **call)
    back = own.order.argsort(dim=1), mixture.order.argsort(dim=1)
    assert (mixture.scores.gather(1, back[1]) >= own.scores.gather(1, back[0]) - 1e-5).all()
    scaled = rank_sequences(adapted(), sequences, weights=[7 * w for w in weights], **call)
    torch.testing.assert_close(scaled.scores, own.scores)


def test_a_weight_of_zero_comes_last():
    call = {**prompts([5]), "max_new_tokens": 4}
    ranking = rank_sequences(adapted(), adapted().generate(**call), weights=[0, 1, 1], **call)
    assert ranking.hypotheses[0, -1] == 0
    assert ranking.scores[0, -1] == -math.inf


@given(
    st.lists(st.text("ab ", max_size=6), min_size=1, max_size=4),
    st.lists(st.floats(0.1, 5), min_size=4, max_size=4),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_consensus_is_the_expected_chrf(texts: list[str], weights: list[float]):
    weights = weights[: len(texts)]
    order, utilities = consensus_order(texts, weights)
    for text, utility in zip(texts, utilities, strict=True):
        total = 0.0
        for other, weight in zip(texts, weights, strict=True):
            total += weight / sum(weights) * CHRF().sentence_score(text, [other]).score
        assert utility == pytest.approx(total, abs=1e-9)
    assert sorted(order) == list(range(len(texts)))
    assert [utilities[i] for i in order] == sorted(utilities, reverse=True)


def test_outputs_in_full_are_ordered_alike():
    inputs = prompts([6, 3])
    options = {"max_new_tokens": 4, "eos_token_id": None, "return_dict_in_generate": True, "output_scores": True}
    plain = adapted().generate(**inputs, **options, output_hidden_states=True)
    rows = rank_sequences(adapted(), plain.sequences, **inputs, **options).rows
    ranked = adapted().generate(**inputs, **options, output_hidden_states=True, rank="likelihood")
    assert torch.equal(ranked.sequences, plain.sequences[rows])
    assert torch.equal(ranked.scores[2], plain.scores[2][rows])
    assert torch.equal(ranked.hidden_states[1][0], plain.hidden_states[1][0][rows])
    assert torch.equal(ranked.past_key_values.layers[0].keys, plain.past_key_values.layers[0].keys[rows])

    options |= {"num_beams": 2, "num_return_sequences": 2}
    plain = adapted().generate(**inputs, **options)
    rows = rank_sequences(adapted(), plain.sequences, **inputs, **options).rows
    ranked = adapted().generate(**inputs, **options, rank="likelihood")
    steps = [
        adapted().compute_transition_scores(output.sequences, output.scores, output.beam_indices)
        for output in (plain, ranked)
    ]
    assert torch.equal(steps[1], steps[0][rows])
    # Equal weights: a beam's own score and a constant, over the four tokens.
    scores = rank_sequences(adapted(), plain.sequences, **inputs, **options).scores.flatten()
    expected = plain.sequences_scores[rows] + math.log(1 / K) / 4
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_ranked_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch):
    inputs, model = prompts([4]), adapted()
    with pytest.raises(ValueError, match="one of likelihood, mixture, consensus, got 'best'"):
        model.generate(**inputs, rank="best")
    with pytest.raises(ValueError, match="`tokenizer` is needed"):
        model.generate(**inputs, rank="consensus")
    sequences = model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match="`weights` must be a list of 3 numbers"):
        rank_sequences(model, sequences, weights=[1, 2], **inputs)
    with pytest.raises(ValueError, match=r"`sequences` has the shape .* have 6 rows"):
        rank_sequences(model, sequences, num_return_sequences=2, do_sample=True, **inputs)
    with pytest.raises(ValueError, match="do not begin with the prompts"):
        rank_sequences(model, sequences, input_ids=inputs["input_ids"] - 1)
    with pytest.raises(ValueError, match="no MCLORA adapter: it is a LlamaForCausalLM"):
        rank_sequences(tiny_llama(), sequences, **inputs)
    with pytest.raises(ValueError, match="`past_key_values` would keep its rows"):
        model.generate(**inputs, past_key_values=object(), rank="likelihood")
    for texts in ([], "text"):
        with pytest.raises(ValueError, match="`texts` must be a list"):
            consensus_order(texts)
    with pytest.raises(ValueError, match=r"has a `generate` of its own.*'consensus'"):
        with_hypotheses(tiny_whisper(), task_type=None).generate(input_features=torch.randn(1, 8, 40), rank="mixture")
    merged = with_hypotheses(tiny_llama())
    merged.merge_adapter(hypothesis=1)
    with pytest.raises(ValueError, match="one is merged"):
        merged.generate(**inputs, rank="mixture")

    real = builtins.__import__

    def without_sacrebleu(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sacrebleu"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sacrebleu)
    with pytest.raises(ImportError, match=r"peft-mcl\[evaluation\]"):
        model.generate(**inputs, rank="consensus", tokenizer=words())


# --- the weights of an adapter ---


@given(st.lists(st.floats(0, 1e308), min_size=1, max_size=6).filter(any))
def test_weights_are_normalised_once(weights: list[float]):
    first = check_weights("weights", weights, len(weights))
    assert math.fsum(first) == pytest.approx(1)
    assert check_weights("weights", first, len(weights)) == first


def test_weights_stay_with_the_adapter_and_decide(tmp_path: Any):
    model = with_hypotheses(tiny_llama(), hypothesis_weights=[1, 1, 998])
    assert model.base_model.hypothesis_weights == pytest.approx([0.001, 0.001, 0.998])
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    assert loaded.active_peft_config.hypothesis_weights == model.active_peft_config.hypothesis_weights
    call = {**prompts([5, 3]), "max_new_tokens": 2}
    sequences = loaded.generate(**call)
    assert (rank_sequences(loaded, sequences, **call).hypotheses[:, 0] == 2).all()
    even = rank_sequences(loaded, sequences, weights=[1, 1, 1], **call)
    assert not torch.equal(even.scores, rank_sequences(loaded, sequences, **call).scores)
    assert with_hypotheses(tiny_llama()).base_model.hypothesis_weights == [1 / 3] * 3

    # Ordinary adapters have no weights, and so have those that are made of them none.
    folders = export_hypotheses(model, tmp_path / "exported")
    assert "hypothesis_weights" not in (folders[0] / "adapter_config.json").read_text()
    again = from_lora_adapters(tiny_llama(), folders)
    assert again.active_peft_config.hypothesis_weights is None

    model.active_peft_config.hypothesis_weights = [1.0, 2.0]
    with pytest.raises(ValueError, match="`hypothesis_weights` must be a list of 3"):
        model.save_pretrained(tmp_path / "bad")
    assert MCLoraConfig(num_hypotheses=2, hypothesis_weights=(3, 1)).hypothesis_weights == [0.75, 0.25]
