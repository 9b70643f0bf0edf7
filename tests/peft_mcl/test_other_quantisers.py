"""Bases quantised by other packages than bitsandbytes, where these are installed: they take the same path."""

import copy
import random

import pytest
import torch
from transformers import GPTQConfig, LlamaForCausalLM, QuantoConfig, TorchAoConfig

from tests.peft_mcl.reference import (
    adapt,
    adapted_layers,
    assert_same_gradients,
    batch,
    merged_by_hand,
    take_gradients,
)
from tests.tiny import VOCABULARY, tiny_llama
from tests.trainer_ext.reference import word_tokenizer


pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
MERGED = ("hqq", "torchao int8", "torchao int4")


def load(directory, quantization_config):
    return LlamaForCausalLM.from_pretrained(
        directory, quantization_config=quantization_config, dtype=torch.float32, device_map={"": "cpu"}
    )


def hqq(directory):
    # The HqqConfig of transformers refuses CPUs.
    quantize = pytest.importorskip("hqq.core.quantize", reason="needs the package hqq")
    model = LlamaForCausalLM.from_pretrained(directory)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
            layer = quantize.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            model.model.set_submodule(name, layer)
    return model


def torchao_int8(directory):
    torchao = pytest.importorskip("torchao.quantization", reason="needs the package torchao")
    return load(directory, TorchAoConfig(torchao.Int8WeightOnlyConfig()))


def torchao_int4(directory):
    torchao = pytest.importorskip("torchao.quantization", reason="needs the package torchao")
    return load(directory, TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)))


def quanto(directory):
    pytest.importorskip("optimum.quanto", reason="needs the package optimum-quanto")
    return load(directory, QuantoConfig(weights="int8"))


def gptq(directory):
    gptqmodel = pytest.importorskip("gptqmodel", reason="needs the packages gptqmodel and optimum")
    pytest.importorskip("optimum.gptq", reason="needs the packages gptqmodel and optimum")
    generator = random.Random(0)
    rows = [{"input_ids": generator.choices(range(3, VOCABULARY), k=64), "attention_mask": [1] * 64} for _ in range(32)]
    word_tokenizer().save_pretrained(directory)  # gptqmodel wants one.
    options = {"bits": 4, "group_size": 32}
    plain = gptqmodel.GPTQModel.load(str(directory), gptqmodel.QuantizeConfig(**options), device="cpu")
    plain.quantize(rows, batch_size=1)
    plain.save(str(directory / "gptq"))
    return load(directory / "gptq", GPTQConfig(**options))


def awq(directory):
    # gptqmodel quantises by AWQ on GPUs only; so its layers for CPUs get random codes.
    kernels = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_aten_kernel_awq", reason="needs gptqmodel")
    model = LlamaForCausalLM.from_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            sizes = {"in_features": module.in_features, "out_features": module.out_features}
            layer = kernels.TorchAtenAwqLinear(bits=4, group_size=32, sym=False, desc_act=False, **sizes)
            for codes in (layer.qweight, layer.qzeros):
                codes.copy_(torch.randint(-(2**31), 2**31, codes.shape, generator=generator))
            layer.scales.copy_(0.02 * torch.rand(layer.scales.shape, generator=generator))
            layer.post_init()
            model.model.set_submodule(name, layer)
    return model


QUANTISERS = {
    "hqq": hqq,
    "torchao int8": torchao_int8,
    "torchao int4": torchao_int4,
    "quanto": quanto,
    "gptq": gptq,
    "awq": awq,
}


def weight_of(module):
    """The weight (out, in) of a quantised layer, or None for any other module."""
    if hasattr(module, "awq_weight_dequantize"):
        return module.awq_weight_dequantize("cpu", torch.float32).T
    if hasattr(module, "dequantize_weight"):  # GPTQ
        return module.dequantize_weight().T
    if type(module).__name__ == "HQQLinear":
        return module.dequantize()
    weight = getattr(module, "weight", None)
    return None if weight is None or type(weight) is torch.nn.Parameter else weight.dequantize()


@pytest.fixture(scope="module", params=QUANTISERS)
def bases(request, tmp_path_factory):
    """The name of the package, a quantised model, and a plain one of the weights that it really has."""
    directory = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    tiny_llama(**sizes, initializer_range=0.15).save_pretrained(directory)
    base = QUANTISERS[request.param](directory).eval()
    plain = LlamaForCausalLM.from_pretrained(directory).eval()
    # What is not quantised may have been rounded, too.
    rounded = {
        name: value for name, value in base.state_dict().items() if "norm" in name or "embed" in name or "head" in name
    }
    plain.load_state_dict({name: value.float().clone() for name, value in rounded.items()}, strict=False)
    weights = {name: weight_of(module) for name, module in base.model.named_modules() if name}
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    assert len(weights) == 2 * 7
    for name, weight in weights.items():
        plain.model.get_submodule(name).weight.data = weight.float().detach().clone()
    return request.param, base, plain


def test_logits_and_gradients_equal_brute_force_on_the_dequantised_weights(bases):
    _, base, plain = bases
    model = adapt(base, target_modules=TARGETS)
    try:
        with torch.no_grad():
            actual = model(**batch(), hypotheses="all").logits
            expected = torch.cat([merged_by_hand(plain, model, k)(**batch()).logits for k in range(3)])
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        assert model.generate(**batch(), max_new_tokens=2, do_sample=False).shape[0] == 6
        # After a pass without a graph, as in training.
        model.train()(**batch(), hypotheses="all").logits.pow(2).sum().backward()
        gradients = take_gradients(model.eval())
        for k in range(3):
            merged_by_hand(plain, model, k)(**batch()).logits.pow(2).sum().backward()
        assert_same_gradients(gradients, take_gradients(model), relative=1e-3)
    finally:
        model.unload()
    assert not adapted_layers(base)
    with torch.no_grad():
        torch.testing.assert_close(base(**batch()).logits, plain(**batch()).logits, rtol=1e-3, atol=1e-4)


def test_merging_is_lossy_or_refused(bases):
    name, base, _ = bases
    if name not in MERGED:
        model = adapt(base, target_modules=TARGETS)
        with pytest.raises(
            ValueError, match=r"Hypothesis 1 cannot be merged into the quantised layer 'model\.layers\.0"
        ):
            model.merge_and_unload(hypothesis=1)
        assert len(adapted_layers(model)) == 8
        model.unload()
        return
    model = adapt(copy.deepcopy(base), target_modules=TARGETS)
    with torch.no_grad():
        expected = model(**batch(), hypotheses=1).logits
        with pytest.warns(UserWarning, match=rf"quantised base model \({name.split()[0]}\) is lossy"):
            merged = model.merge_and_unload(hypothesis=1)
        actual = merged(**batch()).logits
    assert torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.85


def test_gptq_layers_that_were_called_before_are_refused(tmp_path):
    """On a CPU, gptqmodel repacks at the first call in eval mode, for a kernel without gradients."""
    tiny_llama(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4).save_pretrained(
        tmp_path
    )
    base = gptq(tmp_path).eval()
    with torch.no_grad():
        base(**batch())
    layer = base.model.layers[0].self_attn.k_proj
    if getattr(layer, "linear_mode", None) != "inference":
        pytest.skip(f"{type(layer).__name__} does not repack here")
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.k_proj'.*Load the base model again"):
        adapt(base, target_modules=TARGETS)
    assert not adapted_layers(base)
    # Good enough to decode with.
    assert adapt(base, target_modules=TARGETS, inference_mode=True).generate(**batch(), max_new_tokens=2).shape[0] == 6
