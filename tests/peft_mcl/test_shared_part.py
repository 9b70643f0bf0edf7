"""The part of the update that all hypotheses share, a common start, and calls under the mean of the hypotheses."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_mcl import MCLoraConfig, check_serving, export_hypotheses, from_lora_adapters
from peft_mcl.layer import adapt as adapt_layer
from peft_mcl.routing import Route, Routing
from tests.peft_mcl.reference import (
    adapt,
    adapted_layers,
    assert_same_gradients,
    batch,
    merged_by_hand,
    randomize,
    take_gradients,
)
from tests.tiny import tiny_gemma3, tiny_gpt2, tiny_llama


WIDTH, OUT = 5, 4
LAYERS = {"linear": lambda: nn.Linear(WIDTH, OUT), "conv1d": lambda: Conv1D(OUT, WIDTH), "embedding": lambda: nn.Embedding(WIDTH, OUT)}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Every route against a loop over tokens


def drawn_route(data, num_hypotheses):
    """A route, and the hypothesis of each row of its input ("mean" for the mean); of a packed row, of each token."""
    kind = data.draw(st.sampled_from(["hypothesis", "mean", "blocks", "index", "decoded", "runs"]))
    some = st.lists(st.integers(0, num_hypotheses - 1), min_size=1, max_size=4)
    rows = data.draw(st.integers(1, 3))
    if kind == "hypothesis":
        k = data.draw(st.integers(0, num_hypotheses - 1))
        return Route(hypothesis=k), [k] * rows
    if kind == "mean":
        return Route(mean=True), ["mean"] * rows
    if kind == "blocks":
        return Route(blocks=num_hypotheses), [k for k in range(num_hypotheses) for _ in range(rows)]
    chosen = data.draw(some)
    if kind == "index":
        return Route(index=torch.tensor(chosen)), chosen
    if kind == "decoded":
        return Route(decoded=tuple(chosen), num_inputs=rows), chosen * rows
    ends = torch.tensor([0] + [data.draw(st.integers(1, 3)) for _ in chosen]).cumsum(0).tolist()
    runs = tuple(zip(chosen, ends[:-1], ends[1:], strict=True))
    return Route(runs=runs), [k for k, start, stop in runs for _ in range(start, stop)]


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(LAYERS)), st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.booleans(), st.data()
)
def test_every_route_is_a_loop_over_tokens(kind, num_hypotheses, shared_r, r, rslora, data):
    config = MCLoraConfig(
        num_hypotheses=num_hypotheses, r=r, shared_r=shared_r, use_rslora=rslora, init_lora_weights=False
    )
    routing = Routing()
    layer = adapt_layer(LAYERS[kind](), "default", routing, "layer", r, 3, config).double()
    route, hypotheses = drawn_route(data, num_hypotheses)
    # (rows, tokens), or one row of all tokens.
    shape = (1, len(hypotheses)) if route.runs else (len(hypotheses), 2)
    per_token = hypotheses if route.runs else [k for k in hypotheses for _ in range(2)]
    is_embedding = kind == "embedding"
    x = torch.randint(WIDTH, shape) if is_embedding else torch.randn(*shape, WIDTH).double().requires_grad_()

    own = {"a": layer.stacked_a["default"], "b": layer.stacked_b["default"]}
    shared = {"a": layer.shared_a["default"], "b": layer.shared_b["default"]} if shared_r else {}
    scaling = 3 / (math.sqrt(r) if rslora else r)
    tokens = []
    for token, k in zip(x.flatten(0, 1), per_token, strict=True):
        a, b = (own["a"].mean(0), own["b"].mean(0)) if k == "mean" else (own["a"][k], own["b"][k])
        delta = scaling * ((shared["b"] @ shared["a"] if shared else 0) + b @ a)
        update = delta[:, token] if is_embedding else delta @ token
        tokens.append(layer.base_layer(token[None])[0] + update)
    expected = torch.stack(tokens).view(*shape, OUT)
    with routing.use(route):
        actual = layer(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    weight = torch.randn_like(expected)
    names = [*own, *(f"shared {name}" for name in shared), *([] if is_embedding else ["x"])]
    leaves = [*own.values(), *shared.values(), *([] if is_embedding else [x])]
    ours = torch.autograd.grad((actual * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for name, gradient, other in zip(names, ours, theirs, strict=True):
        # Calculus gives each hypothesis 1 / K of the gradient of the mean; it gets 1 / sqrt(K).
        factor = math.sqrt(num_hypotheses) if route.mean and name in own else 1.0
        torch.testing.assert_close(gradient, factor * other, rtol=1e-10, atol=1e-10, msg=name)
        assert gradient.abs().max() > 0


def test_without_a_shared_part_nothing_is_added():
    torch.manual_seed(0)
    layer = adapted_layers(get_peft_model(tiny_llama(), MCLoraConfig(target_modules=["q_proj"])))["model.layers.0.self_attn.q_proj"]  # fmt: skip
    assert len(layer.shared_a) == len(layer.shared_b) == 0
    assert [name for name, _ in layer.named_parameters() if "mclora" in name] == [
        "mclora_A.default",
        "mclora_B.default",
    ]
    assert layer._factors("default", Route(blocks=3))[0] is layer.mclora_A["default"]
    # The shared part is drawn after the hypotheses.
    torch.manual_seed(0)
    more = adapted_layers(get_peft_model(tiny_llama(), MCLoraConfig(target_modules=["q_proj"], shared_r=2)))["model.layers.0.self_attn.q_proj"]  # fmt: skip
    assert torch.equal(more.mclora_A["default"], layer.mclora_A["default"])
    assert more.mclora_shared_A["default"].shape == (2, 16)
    assert more.mclora_shared_A["default"].abs().max() > 0
    assert more.mclora_shared_B["default"].shape == (16, 2)
    assert more.mclora_shared_B["default"].abs().max() == 0


def test_generated_tokens_are_those_of_the_merged_models():
    base = tiny_llama()
    model = adapt(copy.deepcopy(base), shared_r=2, target_modules=["embed_tokens", "q_proj", "down_proj"])
    options = {"max_new_tokens": 5, "do_sample": False}
    together = model.generate(**batch(), **options)
    with torch.no_grad():
        for k in range(3):
            assert torch.equal(together[k::3], merged_by_hand(base, model, k).generate(**batch(), **options))
    assert len({tuple(row.tolist()) for row in together[:3]}) > 1


# ------------------------------------------------------------------------------------------------------------
# A common start, and training as one


@pytest.mark.parametrize("init", [True, "gaussian", False])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_perturbed_copies(kind, init):
    def factors(seed=0, **options):
        torch.manual_seed(seed)
        base = nn.Linear(300, 200) if kind == "linear" else nn.Embedding(300, 200)
        config = MCLoraConfig(num_hypotheses=3, init_lora_weights=init, **options)
        layer = adapt_layer(base, "default", Routing(), "layer", 8, 8, config)
        return layer.stacked_a["default"].detach(), layer.stacked_b["default"].detach()

    zero = [] if init is False else [1] if kind == "linear" else [0]
    alike, perturbed, apart = factors(init_perturbation=0), factors(init_perturbation=0.25), factors()
    for i in range(2):
        assert alike[i].shape == perturbed[i].shape == apart[i].shape
        assert torch.equal(alike[i], alike[i][:1].expand_as(alike[i]))
        # Hypothesis 0 starts where it would without the option.
        assert torch.equal(alike[i][0], apart[i][0])
        noise = perturbed[i] - alike[i]
        if i in zero:
            assert perturbed[i].abs().max() == 0
            continue
        for k in range(3):
            assert noise[k].std() / alike[i].std() == pytest.approx(0.25, rel=0.1)
            assert torch.corrcoef(torch.stack([noise[k].flatten(), noise[k - 1].flatten()]))[0, 1].abs() < 0.1
    again, other = factors(init_perturbation=0.25), factors(seed=1, init_perturbation=0.25)
    assert all(torch.equal(*pair) for pair in zip(perturbed, again, strict=True))
    assert not torch.equal(torch.cat([t.flatten() for t in perturbed]), torch.cat([t.flatten() for t in other]))


def steps(model, count, optimizer_options, **call):
    """Train for some steps, gradients clipped; returns the norms that were clipped."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, **optimizer_options)
    norms = []
    for step in range(count):
        inputs = batch(seed=step)
        model(**inputs, labels=inputs["input_ids"], **call).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


# Epsilon is what of AdamW minds the scale of a gradient.
ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-16}


@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens", "v_proj"]], ids=["linear", "embedding"])
def test_hypotheses_that_train_as_one_are_plain_lora(targets):
    options = {"r": 3, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), MCLoraConfig(num_hypotheses=3, init_perturbation=0, **options)).double()
    torch.manual_seed(0)
    lora = get_peft_model(tiny_llama(), LoraConfig(**options)).double()
    assert steps(model, 6, ADAMW, hypotheses="mean") == pytest.approx(steps(lora, 6, ADAMW), rel=1e-9)
    ours, theirs = adapted_layers(model), dict(lora.get_base_model().named_modules())
    for name, layer in ours.items():
        kind = "lora_embedding_" if "embed" in name else "lora_"
        for letter, stacked in (("A", layer.stacked_a["default"]), ("B", layer.stacked_b["default"])):
            own = getattr(theirs[name], kind + letter)["default"]
            expected = own.weight if isinstance(own, nn.Module) else own
            assert torch.equal(stacked, stacked[:1].expand_as(stacked))
            torch.testing.assert_close(stacked[0], expected, rtol=1e-8, atol=1e-10, msg=f"{name} {letter}")
            assert expected.abs().max() > 0


def test_hypotheses_that_train_as_one_keep_their_differences():
    torch.manual_seed(0)
    config = MCLoraConfig(shared_r=2, init_perturbation=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config).double()
    before = {name: layer.stacked_a["default"].detach().clone() for name, layer in adapted_layers(model).items()}
    steps(model, 4, ADAMW, hypotheses="mean")
    for name, layer in adapted_layers(model).items():
        a, b = layer.stacked_a["default"], layer.stacked_b["default"]
        # Weight decay alone makes them smaller.
        expected = (before[name] - before[name][0]) * (1 - ADAMW["lr"] * ADAMW["weight_decay"]) ** 4
        torch.testing.assert_close(a - a[0], expected, rtol=1e-9, atol=1e-12)
        assert torch.equal(b, b[:1].expand_as(b))
        assert (a - before[name]).abs().max() > 1e-3
        assert layer.shared_b["default"].abs().max() > 0


def test_the_mean_of_one_hypothesis_is_that_hypothesis():
    model = adapt(tiny_llama(), num_hypotheses=1, shared_r=1)
    assert torch.equal(model(**batch(), hypotheses="mean").logits, model(**batch()).logits)


def test_the_mean_of_a_packed_row():
    model = adapt(tiny_llama(), shared_r=2)
    ids = [own[None] for own in torch.arange(3, 17).split((5, 2, 7))]
    ends = torch.tensor([0, 5, 7, 14], dtype=torch.int32)
    packed = {"input_ids": torch.cat(ids, 1), "position_ids": torch.cat([torch.arange(n.shape[1]) for n in ids])[None]}
    packed |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7, "use_cache": False}
    apart = torch.cat([model(own, hypotheses="mean").logits for own in ids], 1)
    torch.testing.assert_close(model(**packed, hypotheses="mean").logits, apart, rtol=1e-4, atol=1e-5)


def test_where_there_is_no_mean():
    model = adapt(tiny_llama())
    with pytest.raises(ValueError, match=r"`hypotheses` must be an int, a list, .*got 'mean'"):
        model.generate(**batch(), hypotheses="mean", max_new_tokens=2)
    with pytest.raises(ValueError, match=r"`hypothesis` must be an int in \[0, 2\], got 'mean'"):
        model.set_hypothesis("mean")
    with pytest.raises(ValueError, match=r"`hypothesis` must be an int in \[0, 2\], got 'mean'"):
        model.merge_and_unload(hypothesis="mean")
    model.merge_adapter(hypothesis=1)
    with pytest.raises(ValueError, match="Hypothesis 1 is merged into the base weights, so no other can run"):
        model(**batch(), hypotheses="mean")


# ------------------------------------------------------------------------------------------------------------
# Life cycle


def test_merging_and_scaling():
    base = tiny_llama().double()
    model = adapt(copy.deepcopy(base), shared_r=2).double()
    inputs, close = batch(), {"rtol": 1e-5, "atol": 1e-6}
    before = [merged_by_hand(base, model, k)(**inputs).logits for k in range(3)]
    model.merge_adapter(hypothesis=2)
    torch.testing.assert_close(model(**inputs).logits, before[2], **close)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**inputs, hypotheses="all").logits, torch.cat(before), **close)
    for layer in adapted_layers(model).values():
        layer.set_scale("default", 0.5)
    half = merged_by_hand(base, model, 1)(**inputs).logits  # reads the layers' scale
    torch.testing.assert_close(model(**inputs, hypotheses=1).logits, half, **close)
    assert not torch.allclose(half, before[1], atol=1e-2)
    torch.testing.assert_close(model.merge_and_unload(hypothesis=1)(**inputs).logits, half, **close)


def test_adapters_with_and_without_a_shared_part_beside_each_other():
    base = tiny_llama()
    model = adapt(copy.deepcopy(base), shared_r=2)
    model.add_adapter("other", MCLoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    randomize(model)
    model.base_model.set_adapter(["default", "other"])
    for hypotheses in (1, "all"):
        actual = model(**batch(), hypotheses=hypotheses).logits
        expected = merged_by_hand(base, model, 1, ["default", "other"])(**batch()).logits
        torch.testing.assert_close(actual[2:4] if hypotheses == "all" else actual, expected, rtol=1e-4, atol=1e-4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum("shared" in name for name in trained) == 28
    model.delete_adapter("default")
    assert not any("mclora_shared" in name for name, _ in model.named_parameters())


def test_saved_and_loaded(tmp_path):
    model = adapt(tiny_llama(), shared_r=2, target_modules=["embed_tokens", "q_proj"], init_perturbation=0.5)
    expected = model(**batch(), hypotheses="all").logits
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(again(**batch(), hypotheses="all").logits, expected)
    assert again.peft_config["default"].shared_r == 2
    assert again.peft_config["default"].init_perturbation == 0.5

    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.mclora_shared_B"
    broken = tensors[key].clone()
    broken[1, 0] = float("nan")
    for damaged, message in (
        ({name: tensor for name, tensor in tensors.items() if name != key}, r"lacks 1 of 12 .*q_proj.mclora_shared_B"),
        ({name: tensor for name, tensor in tensors.items() if "shared" not in name}, "lacks 6 of 12 tensors"),
        (
            {**tensors, key: tensors[key][:, :1].contiguous()},
            r"other shapes \(\S*mclora_shared_B\S* is \(16, 1\) and has to be \(16, 2\)",
        ),
        (
            {**tensors, key: broken},
            r"NaN or infinite weights in \S*q_proj.mclora_shared_B\S*, which all hypotheses share",
        ),
    ):
        save_file(damaged, file)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(tiny_llama(), tmp_path)
    adapt(tiny_llama(), target_modules=["embed_tokens", "q_proj"]).save_pretrained(tmp_path / "plain")
    save_file(tensors, tmp_path / "plain" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="6 tensors that have no place in the model"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")


# ------------------------------------------------------------------------------------------------------------
# Out, as ordinary LoRA

EXPORTED = {
    "all-linear": (tiny_llama, {}, {"r": 7, "lora_alpha": 112}),
    "rslora": (tiny_llama, {"use_rslora": True}, {"r": 7, "lora_alpha": 64 * math.sqrt(7 / 4)}),
    "alpha of modules": (tiny_llama, {"alpha_pattern": {"q_proj": 8}}, {"alpha_pattern": {"q_proj": 14}}),
    "patterns": (
        tiny_llama,
        {"rank_pattern": {"q_proj": 2, r"layers\.1.*v_proj": 7}, "alpha_pattern": {"v_proj": 90.5}},
        {"rank_pattern": {"q_proj": 5, r"layers\.1.*v_proj": 10}},
    ),
    "rslora, patterns": (tiny_llama, {"use_rslora": True, "rank_pattern": {"up_proj": 1}, "alpha_pattern": {"v_proj": 3}}, {}),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "v_proj"], "rank_pattern": {"embed_tokens": 2}}, {}),
    "scaled embedding": (tiny_gemma3, {"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "Conv1D": (tiny_gpt2, {"target_modules": ["wte", "c_attn", "c_fc"]}, {}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has .*tie")
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_hypotheses_are_the_same_function(name, tmp_path):
    build, options, facts = EXPORTED[name]
    model = adapt(build(), shared_r=3, lora_alpha=64, **options)
    directories = export_hypotheses(model, tmp_path / "exported")
    model.save_pretrained(tmp_path / "saved")
    again = export_hypotheses(tmp_path / "saved", tmp_path / "again")
    portable = export_hypotheses(model, tmp_path / "portable", portable=True)
    outputs = []
    with torch.no_grad():
        for k in range(3):
            outputs.append(model(**batch(), hypotheses=k).logits)
            lora = PeftModel.from_pretrained(build(), directories[k]).eval()
            assert torch.equal(lora(**batch()).logits, outputs[-1])
            lora = PeftModel.from_pretrained(build(), portable[k]).eval()
            torch.testing.assert_close(lora(**batch()).logits, outputs[-1], rtol=1e-4, atol=1e-4)
            files = [load_file(folder[k] / "adapter_model.safetensors") for folder in (directories, again)]
            assert all(torch.equal(files[1][key], tensor) for key, tensor in files[0].items())
        assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
        # And back: the shared part now belongs to each.
        back = from_lora_adapters(build(), directories).eval()
        assert back.peft_config["default"].shared_r == 0
        assert all(torch.equal(back(**batch(), hypotheses=k).logits, outputs[k]) for k in range(3))
    config = json.loads((directories[0] / "adapter_config.json").read_text())
    for fact, value in facts.items():
        assert config[fact] == pytest.approx(value) if isinstance(value, float) else config[fact] == value
    assert json.loads((portable[0] / "adapter_config.json").read_text())["r"] >= 7


def test_engines_are_told_the_rank_of_both_parts(tmp_path):
    directory = export_hypotheses(adapt(tiny_llama(), shared_r=6), tmp_path)[0]
    check_serving(directory, "vllm", max_lora_rank=16)
    check_serving(directory, "sglang", max_lora_rank=10)
    with pytest.raises(ValueError, match="its rank is 10; start the engine with `--max-lora-rank 16`"):
        check_serving(directory, "vllm", max_lora_rank=8)


def test_export_of_a_file_that_lacks_a_shared_part(tmp_path):
    adapt(tiny_llama(), shared_r=2, target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.mclora_shared_A"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, file)
    with pytest.raises(
        ValueError, match=r"`shared_r=2`:\s+- that of \S*q_proj.mclora_A is missing, and has to be \(2, 16\)"
    ):
        export_hypotheses(tmp_path, tmp_path / "out")
    save_file({**tensors, key.replace("q_proj", "k_proj"): tensors[key].clone()}, file)
    with pytest.raises(ValueError, match=r"k_proj.mclora_A is \(2, 16\), and has to be absent"):
        export_hypotheses(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gradients_of_all_hypotheses_add_up_in_the_shared_part():
    base = tiny_llama().double()
    model = adapt(copy.deepcopy(base), shared_r=2).double()
    for k in range(3):
        (merged_by_hand(base, model, k)(**batch()).logits.pow(2).sum() * (k + 1)).backward()
    expected = take_gradients(model)
    logits = model(**batch(), hypotheses="all").logits
    (logits.pow(2).sum((1, 2)) * torch.tensor([1, 1, 2, 2, 3, 3])).sum().backward()
    assert_same_gradients(take_gradients(model), expected)
