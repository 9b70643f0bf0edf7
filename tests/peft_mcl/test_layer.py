"""The adapted layers: which modules they wrap, how they start, their dtypes, scales and messages."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_mcl import MCLoraConfig
from peft_mcl.layer import MCLoraEmbedding, MCLoraLinear
from peft_mcl.routing import Route
from tests.peft_mcl.reference import adapt, adapted_layers, batch, plain_net, randomize
from tests.tiny import tiny_gemma3, tiny_gpt2, tiny_llama, tiny_t5


ALL_LLAMA = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def fresh(base: nn.Module, seed: int = 3, **options):
    """`base` with hypotheses as they are initialised."""
    torch.manual_seed(seed)
    return get_peft_model(base, MCLoraConfig(**{"r": 4, "target_modules": "all-linear", **options}))


# ------------------------------------------------------------------------------------------------------------
# Which modules


def test_stacked_shapes_and_kinds():
    layers = adapted_layers(fresh(tiny_llama(), num_hypotheses=3, target_modules=ALL_LLAMA))
    assert len(layers) == 2 * 7 + 2
    for name, layer in layers.items():
        assert isinstance(layer, MCLoraEmbedding if name.endswith("embed_tokens") else MCLoraLinear)
        assert layer.stacked_a["default"].shape == (3, 4, layer.in_features)
        assert layer.stacked_b["default"].shape == (3, layer.out_features, 4)
    assert "mclora.MCLoraLinear" in repr(layers["lm_head"])


def test_conv1d_has_the_features_of_its_use_and_not_of_its_storage():
    layer = adapted_layers(fresh(tiny_gpt2(), target_modules=["c_attn"]))["transformer.h.0.attn.c_attn"]
    assert isinstance(layer.get_base_layer(), Conv1D)
    assert (layer.in_features, layer.out_features) == (16, 48)
    assert layer.get_delta_weight("default").shape == layer.get_base_layer().weight.shape == (16, 48)


@pytest.mark.parametrize(("build", "expected"), [(tiny_llama, {"q_proj", "v_proj"}), (tiny_gpt2, {"c_attn"})])
def test_default_targets_are_those_of_lora(build, expected):
    ours = adapted_layers(fresh(build(), target_modules=None))
    lora = get_peft_model(build(), LoraConfig())
    theirs = {name.removeprefix("base_model.model.") for name, m in lora.named_modules() if isinstance(m, LoraLayer)}
    assert ours.keys() == theirs
    assert {name.rpartition(".")[2] for name in ours} == expected


def test_a_module_without_config_needs_targets():
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(plain_net(), MCLoraConfig())
    assert adapted_layers(fresh(plain_net(), target_modules=["hidden", "embedding"])).keys() == {"hidden", "embedding"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"model.layers.1.self_attn.q_proj"}),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
            {"model.layers.0.self_attn.q_proj"},
        ),
        (
            {"target_modules": r".*\.0\..*(q|v)_proj", "exclude_modules": ["v_proj"]},
            {"model.layers.0.self_attn.q_proj"},
        ),
        ({"target_modules": "all-linear", "exclude_modules": ".*(mlp|self_attn).*|lm_head"}, None),
    ],
    ids=["index", "pattern", "exclude", "nothing"],
)
def test_selection(options, expected):
    if expected is None:
        with pytest.raises(ValueError, match=r"No modules were targeted|All modules were excluded"):
            fresh(tiny_llama(), **options)
    else:
        assert adapted_layers(fresh(tiny_llama(), **options)).keys() == expected


def test_rank_and_alpha_patterns():
    model = fresh(
        tiny_llama(),
        num_hypotheses=2,
        lora_alpha=8,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        alpha_pattern={"q_proj": 3},
    )
    layers = adapted_layers(model)
    for name, rank, scaling in [
        ("model.layers.0.self_attn.q_proj", 2, 3 / 2),
        ("model.layers.1.mlp.up_proj", 6, 8 / 6),
        ("model.layers.0.mlp.up_proj", 4, 8 / 4),
    ]:
        assert layers[name].stacked_a["default"].shape[:2] == (2, rank)
        assert layers[name].stacked_b["default"].shape[2] == rank
        assert layers[name].scaling["default"] == scaling


def test_use_rslora():
    layers = adapted_layers(fresh(tiny_llama(), use_rslora=True, lora_alpha=8, rank_pattern={"q_proj": 9}))
    assert layers["model.layers.0.self_attn.k_proj"].scaling["default"] == 8 / math.sqrt(4)
    assert layers["model.layers.0.self_attn.q_proj"].scaling["default"] == 8 / 3


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_bias_trains_what_lora_trains(bias):
    def trained(model, prefix):
        return {
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not any(f"{prefix}{end}" in name for end in ("_A", "_B", "_embedding"))
        }

    ours = fresh(tiny_gpt2(), target_modules=["c_attn"], bias=bias)
    lora = get_peft_model(tiny_gpt2(), LoraConfig(r=4, target_modules=["c_attn"], bias=bias))
    assert trained(ours, "mclora") == trained(lora, "lora")
    assert bool(trained(ours, "mclora")) == (bias != "none")


# ------------------------------------------------------------------------------------------------------------
# The start


@pytest.mark.parametrize("init", [True, "gaussian"])
@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
def test_starts_as_the_base_model(base, init):
    inputs = batch()
    expected = base()(**inputs).logits
    model = fresh(base(), num_hypotheses=3, init_lora_weights=init, task_type="CAUSAL_LM")
    assert torch.equal(model(**inputs, hypotheses="all").logits, torch.cat([expected] * 3))
    assert torch.equal(model(**inputs, hypotheses=torch.tensor([2, 0])).logits, expected)


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_each_hypothesis_has_its_own_start(init):
    for name, layer in adapted_layers(fresh(tiny_llama(), target_modules=ALL_LLAMA, init_lora_weights=init)).items():
        # In an embedding it is A that is zero, as in LoRA.
        random, zero = layer.stacked_a["default"], layer.stacked_b["default"]
        if name.endswith("embed_tokens"):
            random, zero = zero, random
        for k, other in ((0, 1), (0, 2), (1, 2)):
            assert not torch.isclose(random[k], random[other]).any()
        assert (zero == 0).all() == (init is not False)


def test_no_init_does_not_start_as_the_base_model():
    model = fresh(tiny_llama(), init_lora_weights=False, task_type="CAUSAL_LM")
    outputs = model(**batch(rows=1), hypotheses="all").logits
    assert not torch.isclose(outputs[0], outputs[1]).all()


def test_start_is_reproducible_from_the_seed():
    first, again, other = (fresh(tiny_llama(), seed).state_dict() for seed in (5, 5, 6))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    a_names = [name for name in first if "mclora_A" in name]
    assert a_names
    assert not any(torch.equal(first[name], other[name]) for name in a_names)


# ------------------------------------------------------------------------------------------------------------
# K = 1 is plain LoRA, bit for bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (tiny_llama, {"target_modules": ALL_LLAMA}),
        (tiny_llama, {"target_modules": "all-linear", "lora_dropout": 0.3, "use_rslora": True}),
        (tiny_llama, {"target_modules": "all-linear", "init_lora_weights": "gaussian", "lora_alpha": 7}),
        (tiny_llama, {"target_modules": ALL_LLAMA, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        (tiny_gpt2, {"target_modules": ["c_attn", "c_fc", "wte"], "bias": "all", "fan_in_fan_out": True}),
        (tiny_gemma3, {"target_modules": ["embed_tokens", "q_proj"]}),
        (tiny_t5, {"target_modules": ["q", "v", "wi", "wo"], "modules_to_save": ["lm_head"], "lora_dropout": 0.2}),
    ],
    ids=["every kind", "dropout", "gaussian", "patterns", "Conv1D", "scaled embedding", "encoder-decoder"],
)
def test_one_hypothesis_is_lora(build, options, dtype):
    inputs = batch(padding="right")
    inputs["labels"] = inputs["input_ids"]
    results = []
    for config_class in (MCLoraConfig, LoraConfig):
        own = {name: value for name, value in options.items() if name != "fan_in_fan_out" or config_class is LoraConfig}
        if config_class is MCLoraConfig:
            own["num_hypotheses"] = 1
        base = build().to(dtype)
        task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
        torch.manual_seed(11)
        model = get_peft_model(base, config_class(r=4, task_type=task_type, **own))
        # Three steps of training, with dropout: the same draws, the same gradients, the same weights in the end.
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(3):
            torch.manual_seed(12)
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        parameters = {n.replace("mclora", "lora"): p.detach() for n, p in model.named_parameters() if p.requires_grad}
        results.append((losses, model.eval()(**inputs).logits, parameters))

    (losses, logits, parameters), (lora_losses, lora_logits, lora_parameters) = results
    assert losses == lora_losses
    assert len(set(losses)) == 3
    assert torch.equal(logits, lora_logits)
    assert len(parameters) == len(lora_parameters)
    for name, expected in lora_parameters.items():
        found = parameters.get(name.replace(".default.weight", ".default"), parameters.get(name))
        assert torch.equal(found.reshape(expected.shape), expected), name


def test_one_hypothesis_is_lora_for_every_argument():
    inputs = batch()
    model = adapt(tiny_llama(), num_hypotheses=1)
    expected = model(**inputs).logits
    for hypotheses in (0, "all", torch.tensor([0, 0])):
        torch.testing.assert_close(model(**inputs, hypotheses=hypotheses).logits, expected)


# ------------------------------------------------------------------------------------------------------------
# Dtypes


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_adapter_dtype_follows_the_rule_of_peft(dtype, autocast_adapter_dtype):
    dtypes = []
    for config in (MCLoraConfig(target_modules=ALL_LLAMA), LoraConfig(target_modules=ALL_LLAMA)):
        model = get_peft_model(tiny_llama().to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
        dtypes.append({parameter.dtype for parameter in model.parameters() if parameter.requires_grad})
    assert dtypes[0] == dtypes[1]
    assert len(dtypes[0]) == 1


@pytest.mark.parametrize("hypotheses", [1, "all", torch.tensor([2, 1])], ids=["int", "all", "index"])
def test_half_precision_base_keeps_its_dtype(hypotheses):
    inputs = batch()
    model = adapt(tiny_llama().bfloat16(), target_modules=ALL_LLAMA)
    exact = adapt(tiny_llama().bfloat16().float(), target_modules=ALL_LLAMA)
    logits = model(**inputs, hypotheses=hypotheses).logits
    assert logits.dtype is torch.bfloat16
    torch.testing.assert_close(
        logits.float(), exact(**inputs, hypotheses=hypotheses).logits, rtol=0.1, atol=0.1 * logits.float().std().item()
    )


@pytest.mark.parametrize("hypotheses", [1, "all", torch.tensor([2, 1])], ids=["int", "all", "index"])
def test_autocast(hypotheses):
    inputs = batch()
    model = adapt(tiny_llama(), target_modules=ALL_LLAMA)
    exact = model(**inputs, hypotheses=hypotheses).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**inputs, hypotheses=hypotheses).logits
        logits.float().sum().backward()
    assert logits.dtype is torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, rtol=0.1, atol=0.1 * exact.std().item())
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------------------
# Scales


def test_scales_as_lora_layers():
    layer = adapted_layers(adapt(tiny_llama(), lora_alpha=8))["model.layers.0.self_attn.q_proj"]
    layer.set_scale("default", 3)
    assert layer.scaling["default"] == 6
    layer.scale_layer(0.5)
    assert layer.scaling["default"] == 3
    layer.unscale_layer(0.5)
    assert layer.scaling["default"] == 6
    layer.unscale_layer()
    assert layer.scaling["default"] == 2
    layer.set_scale("no such adapter", 3)
    assert layer.scaling == {"default": 2}


# ------------------------------------------------------------------------------------------------------------
# What cannot be adapted


class Net(nn.Module):
    def __init__(self, **embedding_options):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv2d(1, 1, 3)
        self.norm = nn.LayerNorm(4)
        self.embedding = nn.Embedding(5, 4, **embedding_options)


@pytest.mark.parametrize(("name", "kind"), [("conv", "Conv2d"), ("norm", "LayerNorm")])
def test_unsupported_module_is_named_with_its_class(name, kind):
    with pytest.raises(TypeError, match=rf"Target module '{name}' is a {kind}, which is not supported.*nn.Embedding"):
        get_peft_model(Net(), MCLoraConfig(target_modules=["linear", name]))


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}], ids=str)
def test_unsupported_option_of_an_embedding_is_named(options):
    with pytest.raises(TypeError, match=f"'embedding' is an nn.Embedding with `{next(iter(options))}`"):
        get_peft_model(Net(**options), MCLoraConfig(target_modules=["embedding"]))


def test_rows_that_do_not_fit_the_groups_are_refused():
    # The learned positions of GPT-2 are one row for the whole batch.
    model = adapt(tiny_gpt2(), target_modules=["wpe"], num_hypotheses=2)
    assert model(**batch(rows=3), hypotheses=1).logits.shape[0] == 3
    with pytest.raises(ValueError, match=r"does not keep the batch in dimension 0.*Pass `hypotheses` as an int"):
        model(**batch(rows=3), hypotheses="all")


def test_grouped_views():
    x = torch.arange(12).view(6, 2)
    assert torch.equal(Route(blocks=3).grouped(x), x.view(3, 2, 2))
    assert torch.equal(Route(index=torch.tensor([0, 1, 0])).grouped(x), x.view(3, 2, 2))
    with pytest.raises(ValueError, match=r"an input of 6 rows, shape \(6, 2\), in a call for 4 rows"):
        Route(blocks=4).grouped(x)


def test_randomize_is_reproducible_and_differs_between_hypotheses():
    # The other tests lean on it.
    first, second = (randomize(fresh(tiny_llama())).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    stacked = next(value for name, value in first.items() if "mclora_B" in name)
    assert not torch.isclose(stacked[0], stacked[1]).any()
