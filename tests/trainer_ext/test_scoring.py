"""Scores from the fused head, against the log-softmax of the full logits."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from tests.tiny import FAMILIES, PAD, SPECIAL, VOCABULARY, tiny_llama, with_hypotheses
from trainer_ext.batches import SequenceBatch
from trainer_ext.scoring import (
    POSITIONS_OF_LOGITS,
    SupervisedPositions,
    logit_transform,
    plan_scoring,
    score_sequences,
    score_tokens,
)


EXACT = {"rtol": 1e-5, "atol": 1e-5}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "output_router_logits": True,
    **SPECIAL,
}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **SMALL))


def qwen3_moe():
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **SMALL))


def scored_model(base, num_hypotheses=3):
    """The model with TRL's head, its hook, and an untouched copy for references."""
    model = with_hypotheses(base, num_hypotheses, lora_alpha=8)
    reference = copy.deepcopy(model)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    return model, SupervisedPositions(model.get_base_model()), reference


def batch(side="right", seed=0):
    """Four ragged rows with masked prompts; the last has nothing to learn."""
    generator = torch.Generator().manual_seed(seed)
    lengths, prompts = (9, 5, 7, 6), (4, 1, 6, 6)
    ids = torch.full((4, 9), PAD)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        place = slice(0, length) if side == "right" else slice(9 - length, 9)
        ids[row, place] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, place] = 1
        labels[row, place] = torch.where(torch.arange(length) < prompt, -100, ids[row, place])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def log_softmax_of_logits(reference, inputs, hypothesis):
    """log p, entropy and top-1 of each supervised token, from the full logits of one hypothesis, row by row."""
    logits = reference(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], hypotheses=hypothesis)
    log_probs = torch.log_softmax(logits.logits.float(), dim=-1)
    found = []
    for row, labels in enumerate(inputs["labels"].tolist()):
        for t in range(1, len(labels)):
            if labels[t] != -100:
                own = log_probs[row, t - 1]
                found.append((own[labels[t]], -(own.exp() * own).sum(), own.argmax() == labels[t]))
    return [torch.stack(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_scores_equal_the_log_softmax_for_every_hypothesis(family, side):
    model, positions, reference = scored_model(FAMILIES[family]())
    inputs = batch(side)
    scored = score_tokens(model, positions, SequenceBatch(inputs), "all")
    assert scored.log_probs.shape == scored.entropy.shape == scored.is_top1.shape == (3, 10)
    assert scored.num_tokens.tolist() == [5, 4, 1, 0]
    assert scored.sequence.tolist() == [0] * 5 + [1] * 4 + [2]
    for hypothesis in range(3):
        log_probs, entropy, is_top1 = log_softmax_of_logits(reference, inputs, hypothesis)
        torch.testing.assert_close(scored.log_probs[hypothesis], log_probs, **EXACT)
        torch.testing.assert_close(scored.entropy[hypothesis], entropy, **EXACT)
        assert torch.equal(scored.is_top1[hypothesis], is_top1)
        sums = [log_probs[:5].sum(), log_probs[5:9].sum(), log_probs[9], torch.tensor(0.0)]
        torch.testing.assert_close(scored.per_sequence()[hypothesis], torch.stack(sums), **EXACT)
    assert not torch.allclose(scored.log_probs[0], scored.log_probs[1], atol=1e-3)


@torch.no_grad()
def test_one_hypothesis_for_all_rows_and_one_for_each():
    model, positions, _ = scored_model(tiny_llama())
    inputs = batch()
    everything = score_tokens(model, positions, SequenceBatch(inputs), "all")
    second = score_tokens(model, positions, SequenceBatch(inputs), 2)
    torch.testing.assert_close(second.log_probs, everything.log_probs[2:], **EXACT)
    chosen = torch.tensor([2, 0, 1, 1])
    mixed = score_tokens(model, positions, SequenceBatch(inputs), chosen)
    expected = everything.log_probs[chosen[everything.sequence], torch.arange(10)]
    torch.testing.assert_close(mixed.log_probs[0], expected, **EXACT)


@pytest.mark.parametrize("hypotheses", ["all", 1, torch.tensor([0, 2, 1, 0])])
def test_nothing_supervised_gives_no_scores_and_a_graph_all_the_same(hypotheses):
    model, positions, _ = scored_model(tiny_llama())
    model.train()
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    scored = score_tokens(model, positions, SequenceBatch(inputs), hypotheses)
    assert scored.log_probs.shape == (3 if hypotheses == "all" else 1, 0)
    assert scored.num_tokens.tolist() == [0, 0, 0, 0]
    assert scored.per_sequence().abs().sum() == 0
    scored.log_probs.sum().backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())


@torch.no_grad()
def test_the_first_token_is_never_predicted():
    model, positions, _ = scored_model(tiny_llama())
    ids = torch.tensor([[5], [6]])
    scored = score_tokens(model, positions, SequenceBatch({"input_ids": ids, "labels": ids}), "all")
    assert scored.num_tokens.tolist() == [0, 0]
    longer = torch.tensor([[5, 7, 8]])
    assert score_tokens(
        model, positions, SequenceBatch({"input_ids": longer, "labels": longer}), "all"
    ).num_tokens.tolist() == [2]


@pytest.mark.parametrize("base", [mixtral, qwen3_moe])
@torch.no_grad()
def test_mixtures_of_experts_keep_their_load_balancing_loss(base):
    torch.manual_seed(0)
    model, positions, reference = scored_model(base())
    inputs = batch()
    scored = score_tokens(model, positions, SequenceBatch(inputs), "all")
    for hypothesis in range(3):
        torch.testing.assert_close(
            scored.log_probs[hypothesis], log_softmax_of_logits(reference, inputs, hypothesis)[0], **EXACT
        )
        alone = score_tokens(model, positions, SequenceBatch(inputs), hypothesis)
        own = reference(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            hypotheses=hypothesis,
            output_router_logits=True,
        )
        assert own.aux_loss > 0
        torch.testing.assert_close(alone.aux_loss, own.aux_loss, **EXACT)
    everything = reference(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        hypotheses="all",
        output_router_logits=True,
    )
    torch.testing.assert_close(scored.aux_loss, everything.aux_loss, **EXACT)


@torch.no_grad()
def test_dense_models_have_no_load_balancing_loss():
    model, positions, _ = scored_model(tiny_llama())
    assert score_tokens(model, positions, SequenceBatch(batch()), "all").aux_loss is None


@torch.no_grad()
def test_the_hook_does_nothing_outside_of_scoring():
    model, positions, reference = scored_model(tiny_llama())
    inputs = batch()
    plain = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}

    def logits_are_untouched():
        for hypotheses in (1, "all"):
            assert torch.equal(
                model(**plain, hypotheses=hypotheses).logits, reference(**plain, hypotheses=hypotheses).logits
            )
        return torch.equal(
            model.generate(**plain, max_new_tokens=3, do_sample=False),
            reference.generate(**plain, max_new_tokens=3, do_sample=False),
        )

    assert logits_are_untouched()
    score_tokens(model, positions, SequenceBatch(inputs), "all")
    assert logits_are_untouched()
    with pytest.raises(ValueError, match="hypotheses"):
        score_tokens(model, positions, SequenceBatch(inputs), 7)
    assert logits_are_untouched()


@torch.no_grad()
def test_the_head_sees_the_supervised_positions_only():
    model, positions, _ = scored_model(tiny_llama())
    seen = []
    rows = model.get_base_model().base_model.register_forward_hook(
        lambda module, args, output: seen.append(tuple(output.last_hidden_state.shape))
    )
    score_tokens(model, positions, SequenceBatch(batch()), "all")
    rows.remove()
    assert seen == [(3, 10, 16)]


@torch.no_grad()
def test_the_inputs_are_left_alone():
    model, positions, _ = scored_model(tiny_llama())
    inputs = batch()
    before = {name: value.clone() for name, value in inputs.items()}
    score_tokens(model, positions, SequenceBatch(inputs), "all")
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[name], before[name]) for name in before)


@torch.no_grad()
def test_scores_of_half_precision_models_are_summed_in_float32():
    model, positions, _ = scored_model(tiny_llama().to(torch.bfloat16))
    scored = score_tokens(model, positions, SequenceBatch(batch()), "all")
    assert scored.log_probs.dtype == scored.per_sequence().dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------------
# Scores without a graph, by a head of their own

HEADS = {
    "llama": lambda small: tiny_llama(),
    "gpt2": lambda small: FAMILIES["gpt2"](),
    # A tanh on the logits.
    "gemma2": lambda small: Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=0.05, head_dim=8, **small)),
    # Factors on the logits.
    "cohere": lambda small: CohereForCausalLM(CohereConfig(logit_scale=0.3, **small)),
    "granite": lambda small: GraniteForCausalLM(GraniteConfig(logits_scaling=4.0, **small)),
    # A bias of the head.
    "phi": lambda small: PhiForCausalLM(PhiConfig(**{**small, "num_key_value_heads": 2})),
    "mixtral": lambda small: mixtral(),
}


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_sums_of_the_scoring_head_are_those_of_the_logits(name):
    torch.manual_seed(0)
    base = HEADS[name]({key: value for key, value in SMALL.items() if key != "output_router_logits"})
    if getattr(base.lm_head, "bias", None) is not None:
        base.lm_head.bias.normal_()
    model, positions, reference = scored_model(base)
    inputs = SequenceBatch(batch())
    for budget in (None, 1, 5):
        scores = score_sequences(model, positions, inputs, 3, plan_scoring(inputs, 3, budget))
        for hypothesis in range(3):
            log_probs, _, _ = log_softmax_of_logits(reference, inputs.inputs, hypothesis)
            sums = torch.stack([log_probs[:5].sum(), log_probs[5:9].sum(), log_probs[9], torch.tensor(0.0)])
            torch.testing.assert_close(scores[:, hypothesis], sums, **EXACT)
    # They are also those of TRL's head.
    torch.testing.assert_close(scores, score_tokens(model, positions, inputs, "all").per_sequence().T, **EXACT)
    transform = {"gemma2": (1.0, 0.05), "cohere": (0.3, None), "granite": (0.25, None)}
    assert logit_transform(base.config) == transform.get(name, (1.0, None))


@torch.no_grad()
def test_more_positions_than_logits_at_a_time():
    model, positions, reference = scored_model(tiny_llama(max_position_embeddings=256))
    ids = torch.randint(3, VOCABULARY, (3, 2 * POSITIONS_OF_LOGITS // 3 + 40))
    inputs = SequenceBatch({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    assert len(inputs.targets) > 2 * POSITIONS_OF_LOGITS
    sizes = []
    original = torch.nn.functional.cross_entropy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "cross_entropy",
            lambda logits, *args, **kwargs: sizes.append(len(logits)) or original(logits, *args, **kwargs),
        )
        scores = score_sequences(model, positions, inputs, 3, plan_scoring(inputs, 3))
    assert max(sizes) == POSITIONS_OF_LOGITS
    assert sum(sizes) == 3 * len(inputs.targets)
    for hypothesis in range(3):
        log_probs, _, _ = log_softmax_of_logits(reference, inputs.inputs, hypothesis)
        torch.testing.assert_close(scores[:, hypothesis], log_probs.view(3, -1).sum(dim=1), **EXACT)


def test_scoring_makes_no_graph_and_leaves_the_model_as_it_was():
    model, positions, _ = scored_model(tiny_llama())
    inputs = SequenceBatch(batch())
    before = {name: value.clone() for name, value in inputs.inputs.items()}
    expected = score_tokens(model, positions, inputs, 1).log_probs
    scores = score_sequences(model, positions, inputs, 3, plan_scoring(inputs, 3))
    assert not scores.requires_grad
    assert torch.equal(score_tokens(model, positions, inputs, 1).log_probs, expected)
    assert inputs.inputs.keys() == before.keys()
    assert all(torch.equal(inputs.inputs[name], before[name]) for name in before)


@torch.no_grad()
def test_scores_of_half_precision_are_float32_sums():
    model, positions, reference = scored_model(tiny_llama().to(torch.bfloat16))
    inputs = SequenceBatch(batch())
    scores = score_sequences(model, positions, inputs, 3, plan_scoring(inputs, 3))
    assert scores.dtype == torch.float32
    for hypothesis in range(3):
        log_probs, _, _ = log_softmax_of_logits(reference, inputs.inputs, hypothesis)
        torch.testing.assert_close(scores[0, hypothesis], log_probs[:5].sum(), rtol=1e-2, atol=1e-2)
