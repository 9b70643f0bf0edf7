"""Frozen modules before the first adapter run once for all hypotheses, and nothing else changes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    MptConfig,
    MptForCausalLM,
)

from peft_mcl.layer import MCLoraLayer
from peft_mcl.sharing import modules_before_adapters
from tests.tiny import FAMILIES, PAD, tiny_llama, tiny_llava, tiny_t5, with_hypotheses


UPPER = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [2]}


def deep_llama(**options):
    return tiny_llama(num_hidden_layers=4, **options)


def inputs(rows=2):
    ids = torch.randint(3, 60, (rows, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, 5:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask, "use_cache": False}


def rows_seen(model, call):
    """Rows that the embeddings and each decoder layer compute in a call."""
    base, seen = model.get_base_model().model, []
    modules = [base.embed_tokens, *base.layers]
    hooks = [
        module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])) or None) for module in modules
    ]
    result = call()
    for hook in hooks:
        hook.remove()
    return seen, result


def one_at_a_time(model, given, num_hypotheses=3):
    return torch.cat([model(**given, hypotheses=k).logits for k in range(num_hypotheses)])


def test_the_layers_below_the_first_adapter_see_one_copy():
    model, given = with_hypotheses(deep_llama(), **UPPER), inputs()
    seen, output = rows_seen(model, lambda: model(**given, hypotheses="all"))
    assert seen == [2, 2, 2, 6, 6]
    torch.testing.assert_close(output.logits, one_at_a_time(model, given), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(output.logits[:2], output.logits[2:4], atol=1e-3)


def test_with_adapters_everywhere_only_the_embeddings_are_shared():
    model, given = with_hypotheses(deep_llama()), inputs()
    assert rows_seen(model, lambda: model(**given, hypotheses="all"))[0] == [2, 6, 6, 6, 6]


@pytest.mark.parametrize("hypotheses", [1, torch.tensor([0, 2])], ids=str)
def test_other_calls_run_as_they_are(hypotheses):
    model, given = with_hypotheses(deep_llama(), **UPPER), inputs()
    assert rows_seen(model, lambda: model(**given, hypotheses=hypotheses))[0] == [2] * 5


def test_a_cache_holds_the_rows_of_all_hypotheses():
    model, given = with_hypotheses(deep_llama(), **UPPER), inputs(2)
    given["use_cache"] = True
    seen, output = rows_seen(model, lambda: model(**given, hypotheses="all"))
    assert seen == [2, 6, 6, 6, 6]
    assert [layer.keys.shape[0] for layer in output.past_key_values.layers] == [6] * 4


def test_hidden_states_of_all_layers_have_all_rows():
    model, given = with_hypotheses(deep_llama(), **UPPER), inputs()
    states = model(**given, hypotheses="all", output_hidden_states=True).hidden_states
    assert [len(state) for state in states] == [6] * 5
    alone = [model(**given, hypotheses=k, output_hidden_states=True).hidden_states for k in range(3)]
    for depth, state in enumerate(states):
        torch.testing.assert_close(state, torch.cat([own[depth] for own in alone]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_gradients_equal_one_hypothesis_at_a_time(checkpointing):
    # Trainable norms and embeddings below the adapters, so that gradients flow through what is shared.
    def gradients(one_call):
        model = with_hypotheses(deep_llama(), modules_to_save=["input_layernorm", "embed_tokens"], **UPPER).train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        given = inputs()
        given["labels"] = given["input_ids"]
        if one_call:
            logits = model(**given, hypotheses="all").logits
            weight = torch.arange(logits.numel()).view(logits.shape).remainder(7.0)
            (logits * weight).sum().backward()
        else:
            weight = torch.arange(6 * logits_of(model, given).numel() // 2).remainder(7.0).view(6, 7, -1)
            for k in range(3):
                (model(**given, hypotheses=k).logits * weight[2 * k : 2 * k + 2]).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    def logits_of(model, given):
        with torch.no_grad():
            return model(**given, hypotheses=0).logits

    ours, theirs = gradients(True), gradients(False)
    assert any("input_layernorm" in name for name in ours)
    for name, gradient in theirs.items():
        if gradient is not None:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-3, msg=name)


def test_dropout_is_drawn_for_each_hypothesis():
    model, given = with_hypotheses(deep_llama(attention_dropout=0.5), **UPPER), inputs()
    assert rows_seen(model, lambda: model(**given, hypotheses="all"))[0] == [2, 2, 2, 6, 6]
    model.train()
    assert rows_seen(model, lambda: model(**given, hypotheses="all"))[0] == [2, 6, 6, 6, 6]


def test_what_counts_as_before_the_adapters():
    def names(model):
        base = model.get_base_model()
        found = modules_before_adapters(base, lambda module: isinstance(module, MCLoraLayer))
        return [name for name, module in base.named_modules() if module in found]

    def llama(**options):
        return names(with_hypotheses(deep_llama(), **options))

    assert llama(**UPPER) == ["model.embed_tokens", "model.layers.0", "model.layers.1"]
    assert llama(target_modules=["lm_head"]) == ["model.embed_tokens"]
    assert llama(target_modules="(lm_head|.*layers.1.*q_proj)") == ["model.embed_tokens", "model.layers.0"]
    assert llama(target_modules=["embed_tokens", "q_proj"]) == []
    # The encoder feeds the layers of the decoder, so none of these is shared.
    assert names(with_hypotheses(tiny_t5(), target_modules=["q"], layers_to_transform=[1])) == ["shared"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_what_it_gave(family):
    base = FAMILIES[family](
        **({"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 3} if family == "gemma3" else {})
    )
    target = {"t5": ["q", "wo"], "gpt2": ["c_attn", "c_proj"]}.get(family, ["q_proj", "down_proj"])
    model = with_hypotheses(base, target_modules=target, layers_to_transform=[1])
    given = inputs()
    if family == "t5":
        given["decoder_input_ids"] = given["input_ids"][:, :4]
    together = model(**given, hypotheses="all").logits
    torch.testing.assert_close(together, one_at_a_time(model, given), rtol=1e-5, atol=1e-6)


def test_images_and_text():
    model = with_hypotheses(tiny_llava(), target_modules=r".*language_model.*layers\.1.*q_proj")
    ids = torch.tensor([[63, 63, 63, 63, 5, 6], [63, 63, 63, 63, 7, 8]])
    given = {"input_ids": ids, "pixel_values": torch.rand(2, 3, 8, 8), "use_cache": False}
    together = model(**given, hypotheses="all").logits
    torch.testing.assert_close(together, one_at_a_time(model, given), rtol=1e-5, atol=1e-6)


def test_a_changed_adapter_changes_what_is_shared():
    model, given = with_hypotheses(deep_llama(), **UPPER), inputs()
    lower = copy.deepcopy(model.peft_config["default"])
    lower.layers_to_transform = [1]
    model.add_adapter("lower", lower)
    assert rows_seen(model, lambda: model(**given, hypotheses="all"))[0] == [2, 2, 6, 6, 6]
    model.delete_adapter("lower")
    assert rows_seen(model, lambda: model(**given, hypotheses="all"))[0] == [2, 2, 2, 6, 6]
    plain = model.unload()
    assert not plain.model.layers[0]._forward_pre_hooks
    assert not plain.model.embed_tokens._forward_hooks


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_copies_share_too(how):
    model, given = with_hypotheses(deep_llama(), **UPPER), inputs()
    expected = model(**given, hypotheses="all").logits
    if how == "copied":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    seen, output = rows_seen(other, lambda: other(**given, hypotheses="all"))
    assert seen == [2, 2, 2, 6, 6]
    torch.testing.assert_close(output.logits, expected)


def test_a_failed_call_leaves_nothing_behind():
    model, given = with_hypotheses(deep_llama(), **UPPER), inputs()
    expected = model(**given, hypotheses="all").logits

    def fail(module, args):
        raise RuntimeError("stop")

    hook = model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model(**given, hypotheses="all")
    hook.remove()
    seen, output = rows_seen(model, lambda: model(**given, hypotheses="all"))
    assert seen == [2, 2, 2, 6, 6]
    assert torch.equal(output.logits, expected)


# --------------------------------------------------------------------------------------------------------------------
# Models whose layers take more than their own rows


def test_layers_that_run_again_see_all_rows_the_second_time():
    """A looped decoder: the list of layers is run twice, so its first layer comes after the adapters, too."""
    model = with_hypotheses(deep_llama(), **UPPER)
    layers = model.get_base_model().model.layers
    again = layers[2].register_forward_hook(lambda module, args, output: layers[0](output, position_embeddings=places))
    given = inputs()
    rotary = model.get_base_model().model.rotary_emb
    places = rotary(torch.zeros(1), position_ids=torch.arange(7)[None])
    for _ in range(2):
        together = model(**given, hypotheses="all").logits
        torch.testing.assert_close(together, one_at_a_time(model, given), rtol=1e-5, atol=1e-6)
    again.remove()


@pytest.mark.parametrize(("num_hypotheses", "rows"), [(4, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("name", ["mpt", "bloom"])
def test_attention_biases_by_head_are_not_taken_for_rows(name, num_hypotheses, rows):
    small = {
        "vocab_size": 64,
        "n_layers" if name == "mpt" else "n_layer": 3,
        "n_heads" if name == "mpt" else "n_head": 4,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "mpt":
            base = MptForCausalLM(MptConfig(d_model=16, max_seq_len=32, **small))
        else:
            base = BloomForCausalLM(BloomConfig(hidden_size=16, **small))
    target = "Wqkv" if name == "mpt" else "query_key_value"
    model = with_hypotheses(base, num_hypotheses, target_modules=[target], layers_to_transform=[1])
    given = inputs(rows)
    together = model(**given, hypotheses="all").logits
    expected = one_at_a_time(model, given, num_hypotheses)
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)


def test_gemma_3n_with_its_four_streams():
    config = Gemma3nTextConfig(
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size=16,
        hidden_size_per_layer_input=8,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        laurel_rank=4,
        num_kv_shared_layers=1,
        layer_types=["full_attention"] * 4,
        activation_sparsity_pattern=[0.0] * 4,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = with_hypotheses(Gemma3nForCausalLM(config), 4, target_modules=["q_proj"], layers_to_transform=[2])
    given = inputs()
    together = model(**given, hypotheses="all").logits
    torch.testing.assert_close(together, one_at_a_time(model, given, 4), rtol=1e-4, atol=1e-5)
