"""Hypotheses on 4-bit and 8-bit bases of bitsandbytes, on the CPU."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_bnb_weight
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from peft_mcl import MCLoraConfig
from tests.peft_mcl.reference import (
    adapt,
    adapted_layers,
    assert_same_gradients,
    batch,
    merged_by_hand,
    randomize,
    take_gradients,
)
from tests.tiny import tiny_llama


bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
QUANTISATIONS = {
    "nf4": NF4,
    "nf4, double": {**NF4, "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A saved base whose widths suit the kernels: multiples of 64. Its weights are not small beside the updates."""
    path = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    tiny_llama(**sizes, initializer_range=0.15).save_pretrained(path)
    return path


@pytest.fixture(params=QUANTISATIONS)
def quantisation(request):
    return request.param


def load(directory, quantisation):
    config = BitsAndBytesConfig(**QUANTISATIONS[quantisation])
    return LlamaForCausalLM.from_pretrained(
        directory, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    ).eval()


def quantised(model):
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def dequantised(base, directory):
    """A plain float32 model with the weights that the quantised `base`, adapted or not, really has."""
    plain = LlamaForCausalLM.from_pretrained(directory).eval()
    layers = quantised(base)
    assert layers
    for name, module in layers.items():
        state = module.state if isinstance(module, bnb.nn.Linear8bitLt) else None
        plain.get_submodule(name.removesuffix(".base_layer")).weight.data = (
            dequantize_bnb_weight(module.weight, state=state).float().clone()
        )
    return plain


def cosine(actual, expected):
    return torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0).item()


def assert_close(actual, expected, quantisation):
    if quantisation == "int8":
        # LLM.int8 rounds the activations to 8 bits too, which no merged weight can repeat.
        assert cosine(actual, expected) > 0.99
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def train_step(model, hypotheses="all"):
    was_training = model.training
    model.train()(**batch(), hypotheses=hypotheses).logits.pow(2).sum().backward()
    model.train(was_training)
    return take_gradients(model)


def reference_gradients(plain, model, adapter="default"):
    for k in range(3):
        merged_by_hand(plain, model, k, [adapter])(**batch()).logits.pow(2).sum().backward()
    return take_gradients(model)


@pytest.mark.parametrize(
    ("hypotheses", "rows_of"),
    [
        (2, [(2, 0), (2, 1)]),
        ("all", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]),
        (torch.tensor([1, 2]), [(1, 0), (2, 1)]),
    ],
    ids=["int", "all", "index"],
)
def test_forward_equals_brute_force(directory, quantisation, hypotheses, rows_of):
    base = load(directory, quantisation)
    plain = dequantised(base, directory)
    model = adapt(base, target_modules=TARGETS)
    assert all(layer.quantization_backend is not None for layer in adapted_layers(model).values())
    inputs = batch(padding="left")
    with torch.no_grad():
        alone = [merged_by_hand(plain, model, k)(**inputs).logits for k in range(3)]
        actual = model(**inputs, hypotheses=hypotheses).logits
    for row, (k, of_batch) in enumerate(rows_of):
        real = inputs["attention_mask"][of_batch].bool()
        assert_close(actual[row][real], alone[k][of_batch][real], quantisation)


def test_equals_lora_on_the_same_base(directory, quantisation):
    """Every hypothesis against PEFT's own layers for bitsandbytes."""
    base = load(directory, quantisation)
    model = adapt(copy.deepcopy(base), target_modules=TARGETS, lora_alpha=8)
    lora = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    # In eval mode its 4-bit layers would be repacked and compute in bfloat16; there is no dropout to mind.
    lora.train(quantisation != "int8")
    inputs = batch()
    with torch.no_grad():
        together = model(**inputs, hypotheses="all").logits
        for k in range(3):
            for name, layer in adapted_layers(model).items():
                theirs = lora.get_base_model().get_submodule(name)
                theirs.lora_A["default"].weight.copy_(layer.stacked_a["default"][k])
                theirs.lora_B["default"].weight.copy_(layer.stacked_b["default"][k])
            expected = lora(**inputs).logits
            torch.testing.assert_close(model(**inputs, hypotheses=k).logits, expected, rtol=1e-4, atol=1e-4)
            if quantisation != "int8":  # which tells outliers by the whole batch
                torch.testing.assert_close(together[2 * k : 2 * k + 2], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", ["nothing", "no-grad pass", "evaluation", "generate", "base model"])
def test_gradients_are_right_whatever_was_called_first(directory, quantisation, first):
    base = load(directory, quantisation)
    original = dequantised(base, directory)
    if first == "base model":
        with torch.no_grad():
            base(**batch())
    model = adapt(base, target_modules=TARGETS)
    if first == "no-grad pass":
        with torch.no_grad():
            model.train()(**batch(), hypotheses="all")
            model.eval()(**batch(), hypotheses="all")
    if first == "evaluation":
        model.eval()(**batch(), labels=batch()["input_ids"])
    if first == "generate":
        model.eval().generate(**batch(), max_new_tokens=2, do_sample=False)
    # What was repacked before the adapter came is turned back, with scales rounded to bfloat16; nothing else changes.
    plain = dequantised(base, directory)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(
            weight, original.state_dict()[name], rtol=0.02 if first == "base model" else 0, atol=0.01
        )
    expected = reference_gradients(plain, model)
    actual = train_step(model)
    if quantisation == "int8":
        for name, gradient in actual.items():
            assert cosine(gradient, expected[name]) > 0.97, name
    else:
        assert_same_gradients(actual, expected, relative=1e-3)


def test_a_shared_part_and_the_mean(directory):
    base = load(directory, "nf4")
    plain = dequantised(base, directory)
    model = adapt(base, target_modules=TARGETS, shared_r=2)
    assert_same_gradients(train_step(model), reference_gradients(plain, model), relative=1e-3)
    # Of hypotheses that are alike, the mean is each of them.
    for layer in adapted_layers(model).values():
        for stacked in (layer.stacked_a["default"], layer.stacked_b["default"]):
            stacked.data[:] = stacked.data[0]
    with torch.no_grad():
        expected = merged_by_hand(plain, model, 0)(**batch()).logits
        assert_close(model(**batch(), hypotheses="mean").logits, expected, "nf4")


@pytest.mark.parametrize("way", ["loaded", "second adapter", "copied", "base in training mode"])
def test_gradients_after_scoring_are_right_however_the_adapter_came(directory, tmp_path, way):
    """Every 4-bit layer is guarded, those without an adapter too: the gradient goes through them."""
    base = load(directory, "nf4")
    plain = dequantised(base, directory)
    if way == "base in training mode":
        base.train()
    model = adapt(base, target_modules=TARGETS)
    if way == "loaded":
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(load(directory, "nf4"), tmp_path, is_trainable=True)
    if way == "second adapter":
        with torch.no_grad():
            model(**batch(), hypotheses="all")
        model.add_adapter("second", MCLoraConfig(r=2, target_modules=[*TARGETS, "o_proj"], task_type="CAUSAL_LM"))
        model.set_adapter("second")
        randomize(model, seed=1)
    if way == "copied":
        model = copy.deepcopy(model)
    layers = quantised(model)
    assert len(layers) == 2 * 7  # Four of the seven of a block have an adapter.
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers.values())
    with torch.no_grad():
        model.eval()(**batch(), hypotheses="all")
    expected = reference_gradients(plain, model, model.active_adapter)
    assert_same_gradients(train_step(model), expected, relative=1e-3)


@pytest.mark.skipif(
    not getattr(bnb.functional, "has_avx512bf16", lambda: False)(),
    reason="this CPU has no AVX512-BF16, where alone bitsandbytes repacks: it cannot tell whether the guard is needed",
)
def test_the_trap_is_there_without_the_work_around(directory):
    """What the tuner guards against: bitsandbytes repacks an eval-mode weight for a kernel without gradients."""
    model = adapt(load(directory, "nf4"), target_modules=TARGETS)
    expected = train_step(model)
    for module in quantised(model).values():
        assert module.support_avx512bf16_for_cpu is False
        module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        model(**batch())
    actual = train_step(model)
    first = next(name for name in actual if "layers.0.self_attn.q_proj.mclora_B" in name)
    assert cosine(actual[first], expected[first]) < 0.97


def test_checkpointed_training_after_preparing(directory, quantisation):
    base = prepare_model_for_kbit_training(load(directory, quantisation))
    model = adapt(base, target_modules=TARGETS)
    actual = train_step(model)
    unprepared = adapt(load(directory, quantisation), target_modules=TARGETS)
    assert_same_gradients(actual, train_step(unprepared), relative=1e-3)


def test_merge_and_unmerge(directory, quantisation):
    base = load(directory, quantisation)
    model = adapt(base, target_modules=TARGETS)
    inputs = batch()
    with torch.no_grad():
        before = model(**inputs, hypotheses="all").logits
        model.merge_adapter(hypothesis=1)
        merged = model(**inputs).logits
        model.unmerge_adapter()
        after = model(**inputs, hypotheses="all").logits
    # Merging rounds the sum to 4 or 8 bits: near, not equal, and nearer to its own hypothesis than to another.
    distances = [(merged - before[2 * k : 2 * k + 2]).norm() for k in range(3)]
    assert distances[1] == min(distances)
    assert cosine(merged, before[2:4]) > 0.9
    assert cosine(after, before) > 0.9
    # Still quantised, and still guarded.
    for layer in adapted_layers(model).values():
        assert isinstance(layer.get_base_layer(), (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
        assert not getattr(layer.get_base_layer(), "support_avx512bf16_for_cpu", False)


@pytest.mark.filterwarnings("default")
def test_merging_into_a_quantised_base_warns_and_into_a_plain_one_does_not(directory, quantisation, recwarn):
    model = adapt(load(directory, quantisation), target_modules=TARGETS)
    with pytest.warns(
        UserWarning, match=r"hypothesis 1 into a quantised base model \(bnb .bit\) is lossy.* in bfloat16"
    ):
        model.merge_adapter(hypothesis=1)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="hypothesis 2 into a quantised base model"):
        model.merge_and_unload(hypothesis=2)
    recwarn.clear()
    adapt(LlamaForCausalLM.from_pretrained(directory), target_modules=TARGETS).merge_and_unload(hypothesis=1)
    assert not [warning for warning in recwarn if "lossy" in str(warning.message)]


def test_merge_and_unload(directory, quantisation):
    model = adapt(load(directory, quantisation), target_modules=TARGETS)
    inputs = batch()
    with torch.no_grad():
        expected = model(**inputs, hypotheses=2).logits
        plain = model.merge_and_unload(hypothesis=2, safe_merge=True)
        actual = plain(**inputs).logits
    assert type(plain) is LlamaForCausalLM
    assert not adapted_layers(plain)
    assert cosine(actual, expected) > 0.9


def test_save_and_load(directory, quantisation, tmp_path):
    model = adapt(load(directory, quantisation), target_modules=TARGETS)
    with torch.no_grad():
        expected = model(**batch(), hypotheses="all").logits
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(load(directory, quantisation), tmp_path)
        assert torch.equal(loaded(**batch(), hypotheses="all").logits, expected)
        auto = AutoPeftModelForCausalLM.from_pretrained(
            tmp_path,
            quantization_config=BitsAndBytesConfig(**QUANTISATIONS[quantisation]),
            dtype=torch.float32,
            device_map={"": "cpu"},
        )
        assert torch.equal(auto(**batch(), hypotheses="all").logits, expected)


def test_unload_gives_the_quantised_base_back(directory, quantisation):
    base = load(directory, quantisation)
    kinds = {name: type(module) for name, module in base.named_modules()}
    with torch.no_grad():
        model = adapt(base, target_modules=TARGETS)
        with model.disable_adapter():
            expected = model(**batch()).logits
        plain = model.unload()
        assert {name: type(module) for name, module in plain.named_modules()} == kinds
        assert torch.equal(plain(**batch()).logits, expected)
