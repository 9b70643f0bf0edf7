"""The forward contract: every row equals brute force, one hypothesis at a time with its update merged by hand."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    StaticCache,
)

from peft_mcl.routing import expand_inputs
from tests.peft_mcl.reference import (
    adapt,
    adapted_layers,
    assert_same_gradients,
    batch,
    merged_by_hand,
    plain_net,
    take_gradients,
)
from tests.tiny import PAD, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_t5


EVERY_KIND = [
    "embed_tokens",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "lm_head",
    "wte",
    "c_attn",
    "c_proj",
    "c_fc",
    "q",
    "k",
    "v",
    "o",
    "wi",
    "wo",
    "shared",
    "hidden",
    "embedding",
    "head",
]
TIGHT = {"rtol": 1e-5, "atol": 1e-6}


def double(build, **options):
    """A float64 model. Norms and rotary angles stay in float32 inside transformers, hence the tolerance above."""
    return build(**options).double()


def brute_force(base, model, inputs, rows_of):
    """The logits that `rows_of` = [(hypothesis, row of the batch), ...] ask for, each hypothesis on its own."""
    outputs = {}
    for hypothesis in sorted({hypothesis for hypothesis, _ in rows_of}):
        outputs[hypothesis] = merged_by_hand(base, model, hypothesis)(**inputs).logits
    return torch.stack([outputs[hypothesis][row] for hypothesis, row in rows_of])


def routes(num_hypotheses, rows, draw_index=None):
    """Arguments of every kind, each with the (hypothesis, row) that it stands for."""
    index = draw_index if draw_index is not None else [(2 * row + 1) % num_hypotheses for row in range(rows)]
    last = num_hypotheses - 1
    return {
        "int": (last, [(last, row) for row in range(rows)]),
        "all": ("all", [(k, row) for k in range(num_hypotheses) for row in range(rows)]),
        "index": (torch.tensor(index), list(zip(index, range(rows), strict=True))),
    }


def check(base, model, inputs, hypotheses, rows_of, **tolerance):
    """Outputs and gradients of A, B and `inputs_embeds` against brute force, under a loss that weighs every number."""
    generator = torch.Generator().manual_seed(0)
    tolerance = tolerance or TIGHT
    leaves = [value for value in inputs.values() if value.requires_grad]

    expected = brute_force(base, model, inputs, rows_of)
    weights = torch.randn(expected.shape, generator=generator, dtype=expected.dtype)
    (expected * weights).sum().backward()
    expected_gradients = {**take_gradients(model), **{str(i): leaf.grad for i, leaf in enumerate(leaves)}}
    for leaf in leaves:
        leaf.grad = None

    actual = model(**inputs, hypotheses=hypotheses).logits
    torch.testing.assert_close(actual, expected, **tolerance)
    (actual * weights).sum().backward()
    gradients = {**take_gradients(model), **{str(i): leaf.grad for i, leaf in enumerate(leaves)}}
    assert_same_gradients(gradients, expected_gradients)


# ------------------------------------------------------------------------------------------------------------
# Every kind of model, layer and option


MODELS = {
    "llama": (tiny_llama, {"target_modules": EVERY_KIND}),
    "llama, all-linear": (tiny_llama, {"target_modules": "all-linear"}),
    "llama, patterns": (
        tiny_llama,
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, "up_proj": 5},
            "alpha_pattern": {"v_proj": 3},
            "exclude_modules": ["o_proj"],
        },
    ),
    "llama, one layer": (tiny_llama, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "llama, rslora": (tiny_llama, {"target_modules": "all-linear", "use_rslora": True}),
    "llama, learned bias": (tiny_llama, {"target_modules": ["q_proj"], "bias": "all"}),
    "llama, shared part": (tiny_llama, {"target_modules": EVERY_KIND, "shared_r": 2, "rank_pattern": {"q_proj": 3}}),
    "gpt2": (tiny_gpt2, {"target_modules": EVERY_KIND, "bias": "lora_only"}),
    "gemma3": (tiny_gemma3, {"target_modules": EVERY_KIND}),
    "t5": (tiny_t5, {"target_modules": EVERY_KIND}),
}


@pytest.mark.parametrize("kind", ["int", "all", "index"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_brute_force(name, kind):
    build, options = MODELS[name]
    base = double(build)
    model = adapt(copy.deepcopy(base), num_hypotheses=3, **options)
    # Shared parameters get the sum of the gradients; here only A and B are compared.
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "mclora_" in parameter_name)
    inputs = batch(rows=3, padding="right")
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch(rows=3, length=4, seed=1)["input_ids"]
    check(base, model, inputs, *routes(3, 3)[kind])


@settings(deadline=None, max_examples=30)
@given(
    num_hypotheses=st.integers(1, 4),
    rows=st.integers(1, 4),
    length=st.integers(1, 6),
    padding=st.sampled_from([None, "left", "right"]),
    seed=st.integers(0, 1000),
    embeds=st.booleans(),
    shared_r=st.integers(0, 2),
    data=st.data(),
)
def test_equals_brute_force_for_any_shape(num_hypotheses, rows, length, padding, seed, embeds, shared_r, data):
    base = double(tiny_llama)
    model = adapt(copy.deepcopy(base), num_hypotheses=num_hypotheses, r=2, shared_r=shared_r)
    inputs = batch(rows, length, seed, padding)
    if embeds:
        ids = inputs.pop("input_ids")
        inputs["inputs_embeds"] = base.get_input_embeddings()(ids).detach().requires_grad_()
    index = data.draw(st.lists(st.integers(0, num_hypotheses - 1), min_size=rows, max_size=rows))
    kind = data.draw(st.sampled_from(["int", "all", "index"]))
    check(base, model, inputs, *routes(num_hypotheses, rows, index)[kind])


@settings(deadline=None, max_examples=30)
@given(
    num_hypotheses=st.integers(1, 4),
    rows=st.integers(1, 4),
    length=st.integers(1, 6),
    seed=st.integers(0, 1000),
    shared_r=st.integers(0, 2),
    data=st.data(),
)
def test_a_module_without_config_equals_brute_force(num_hypotheses, rows, length, seed, shared_r, data):
    base = plain_net().double()
    options = {"target_modules": ["embedding", "hidden", "head"], "rank_pattern": {"hidden": 1}, "lora_alpha": 5}
    model = adapt(copy.deepcopy(base), num_hypotheses=num_hypotheses, shared_r=shared_r, **options)
    index = data.draw(st.lists(st.integers(0, num_hypotheses - 1), min_size=rows, max_size=rows))
    ids = torch.randint(
        0, 4, (rows, length), generator=torch.Generator().manual_seed(seed)
    )  # the padding row among them
    for hypotheses, rows_of in routes(num_hypotheses, rows, index).values():
        outputs = {k: merged_by_hand(base, model, k)(ids, 0.5) for k in range(num_hypotheses)}
        expected = torch.stack([outputs[k][row] for k, row in rows_of])
        expected.pow(2).sum().backward()
        expected_gradients = take_gradients(model)
        actual = model(ids, 0.5, hypotheses=hypotheses)
        torch.testing.assert_close(actual, expected)
        actual.pow(2).sum().backward()
        assert_same_gradients(take_gradients(model), expected_gradients)


def test_the_padding_row_of_an_embedding_gets_no_gradient():
    model = adapt(plain_net(), target_modules=["embedding"])
    ids = torch.tensor([[PAD, 3], [4, PAD]])
    for hypotheses in (1, "all", torch.tensor([0, 2])):
        model(ids, hypotheses=hypotheses).sum().backward()
        gradient = take_gradients(model)["base_model.model.embedding.mclora_embedding_A.default"]
        assert (gradient[..., PAD] == 0).all()
        assert (gradient != 0).any()


def test_a_module_to_save_is_shared_by_all_hypotheses():
    base = double(tiny_llama)
    model = adapt(copy.deepcopy(base), target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    inputs = batch()
    expected, head = [], 0
    for k in range(3):
        plain = merged_by_hand(base, model, k)
        plain.lm_head.weight.requires_grad_()
        logits = plain(**inputs).logits
        logits.pow(2).sum().backward()
        expected.append(logits)
        head = head + plain.lm_head.weight.grad
    expected_gradients = take_gradients(model)
    expected_gradients["base_model.model.lm_head.modules_to_save.default.weight"] = head
    actual = model(**inputs, hypotheses="all").logits
    torch.testing.assert_close(actual, torch.cat(expected), **TIGHT)
    actual.pow(2).sum().backward()
    assert_same_gradients(take_gradients(model), expected_gradients)


def test_only_the_hypotheses_of_the_rows_get_a_gradient():
    model = adapt(tiny_llama(), num_hypotheses=4)
    for hypotheses, used in ((2, {2}), (torch.tensor([3, 1]), {1, 3}), ("all", {0, 1, 2, 3})):
        model(**batch(), hypotheses=hypotheses).logits.sum().backward()
        for name, gradient in take_gradients(model).items():
            assert {k for k in range(4) if gradient[k].abs().max() > 0} == used, name


def test_dropout_falls_on_the_update_alone():
    model = adapt(tiny_llama(), lora_dropout=0.5)
    inputs = batch(rows=1)
    quiet = model(**inputs, hypotheses="all").logits
    assert torch.equal(quiet, model(**inputs, hypotheses="all").logits)
    model.train()
    noisy = model(**inputs, hypotheses="all").logits
    assert not torch.isclose(noisy, quiet).any(dim=-1).all()
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, tiny_llama()(**inputs).logits)


# ------------------------------------------------------------------------------------------------------------
# The argument


def test_a_plain_call_is_the_active_hypothesis():
    base = tiny_llama()
    model = adapt(copy.deepcopy(base))
    inputs = batch()
    assert model.active_hypothesis == 0
    assert torch.equal(model(**inputs).logits, model(**inputs, hypotheses=0).logits)
    model.set_hypothesis(2)
    assert model.active_hypothesis == 2
    torch.testing.assert_close(model(**inputs).logits, merged_by_hand(base, model, 2)(**inputs).logits)
    assert torch.equal(model(**inputs, hypotheses=None).logits, model(**inputs, hypotheses=2).logits)
    assert model.num_hypotheses == 3


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_every_way_to_call(task_type):
    base = tiny_llama()
    model = adapt(copy.deepcopy(base), task_type=task_type)
    inputs = batch(padding="left")
    expected = brute_force(base, model, inputs, routes(3, 2)["all"][1])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    wrapped = model.get_base_model()
    for logits in (
        model(**inputs, hypotheses="all").logits,
        model(ids, mask, hypotheses="all").logits,
        model(ids, attention_mask=mask, hypotheses="all", return_dict=False)[0],
        wrapped(**inputs, hypotheses="all").logits,
        wrapped(ids, mask, hypotheses="all").logits,
        model.base_model(ids, attention_mask=mask, hypotheses="all").logits,
    ):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "hypotheses",
    [1, np.int64(1), np.array(1), torch.tensor([1, 1]), torch.tensor([1, 1], dtype=torch.int32)],
    ids=["int", "numpy", "numpy 0-d", "int64 tensor", "int32 tensor"],
)
def test_accepted_spellings_of_one(hypotheses):
    model = adapt(tiny_llama())
    torch.testing.assert_close(
        model(**batch(), hypotheses=hypotheses).logits, model(**batch(), hypotheses=torch.tensor([1, 1])).logits
    )


ALLOWED = (
    "`hypotheses` must be an int .*, a 1-D integer tensor with one hypothesis for each row .*, 'all' .*, or 'mean'"
)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
@pytest.mark.parametrize(
    ("hypotheses", "message"),
    [
        (3, r"`hypotheses` must be in \[0, 2\] for a model with 3 hypotheses, got 3"),
        (-1, r"`hypotheses` must be in \[0, 2\] for a model with 3 hypotheses, got -1"),
        ("every", f"{ALLOWED}.*, got 'every'"),
        (True, f"{ALLOWED}.*got True of type bool"),
        (1.0, f"{ALLOWED}.*got 1.0 of type float"),
        ([0, 1], f"{ALLOWED}.*of type list"),
        ((0, 1), f"{ALLOWED}.*of type tuple"),
        ({0}, f"{ALLOWED}.*of type set"),
        (np.array([0, 1]), f"{ALLOWED}.*of type ndarray"),
        (np.float32(1), f"{ALLOWED}.*of type float32"),
        (torch.tensor(1), rf"{ALLOWED}.*got a tensor of shape \(\) and dtype torch.int64"),
        (torch.tensor([[0], [1]]), rf"{ALLOWED}.*got a tensor of shape \(2, 1\)"),
        (torch.tensor([0.0, 1.0]), f"{ALLOWED}.*dtype torch.float32"),
        (torch.tensor([True, False]), f"{ALLOWED}.*dtype torch.bool"),
        (torch.tensor([0, 1j]), f"{ALLOWED}.*dtype torch.complex64"),
        (torch.tensor([0]), "must have one entry for each of the 2 rows of the batch, got 1 entries"),
        (torch.tensor([0, 1, 2]), "must have one entry for each of the 2 rows of the batch, got 3 entries"),
        (torch.tensor([], dtype=torch.long), "must have one entry for each of the 2 rows of the batch, got 0 entries"),
        (torch.tensor([0, 3]), r"must lie in \[0, 2\] for a model with 3 hypotheses, got values from 0 to 3"),
        (torch.tensor([-1, 0]), r"must lie in \[0, 2\] for a model with 3 hypotheses, got values from -1 to 0"),
    ],
    ids=repr,
)
def test_wrong_values(hypotheses, message, task_type):
    model = adapt(tiny_llama(), task_type=task_type)
    expected = model(**batch()).logits
    with pytest.raises(ValueError, match=message):
        model(**batch(), hypotheses=hypotheses)
    assert model.base_model.routing.stack == []
    assert torch.equal(model(**batch()).logits, expected)


@pytest.mark.parametrize("hypothesis", [3, -1, True, 1.0, "1", None, torch.tensor(1), [1], np.array([1, 2])], ids=repr)
def test_wrong_active_hypothesis(hypothesis):
    model = adapt(tiny_llama())
    with pytest.raises(ValueError, match=r"`hypothesis` must be (an int )?in \[0, 2\]"):
        model.set_hypothesis(hypothesis)
    assert model.active_hypothesis == 0


def test_the_callers_inputs_are_left_alone():
    model = adapt(tiny_llama())
    inputs = batch()
    before = copy.deepcopy(inputs)
    model(**inputs, hypotheses="all")
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


# ------------------------------------------------------------------------------------------------------------
# Positions, labels and other inputs


@pytest.mark.parametrize("kind", ["int", "all", "index"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("shape", ["one row", "every row"])
def test_position_ids(build, shape, kind):
    base = double(build)
    model = adapt(copy.deepcopy(base))
    inputs = batch(rows=3)
    positions = torch.arange(7).flip(0)[None]
    inputs["position_ids"] = positions if shape == "one row" else torch.cat([positions + row for row in range(3)])
    hypotheses, rows_of = routes(3, 3)[kind]
    torch.testing.assert_close(
        model(**inputs, hypotheses=hypotheses).logits, brute_force(base, model, inputs, rows_of), **TIGHT
    )


def test_position_ids_of_one_row_for_a_batch_of_one():
    base = double(tiny_llama)
    model = adapt(copy.deepcopy(base))
    inputs = {"input_ids": batch(rows=1)["input_ids"], "position_ids": torch.arange(3, 10)[None]}
    torch.testing.assert_close(
        model(**inputs, hypotheses="all").logits, brute_force(base, model, inputs, routes(3, 1)["all"][1]), **TIGHT
    )


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_position_ids_of_multimodal_models(rows):
    """Of shape (3, batch, length), also where the batch is 3."""
    positions = torch.arange(3 * rows * 5).view(3, rows, 5)
    ids = torch.zeros(rows, 5, dtype=torch.long)
    expanded = expand_inputs({"input_ids": ids, "position_ids": positions}, copies=2, batch_size=rows)
    assert torch.equal(expanded["position_ids"], torch.cat([positions, positions], dim=1))
    one_row = positions[:, :1]
    if rows > 1:
        assert expand_inputs({"position_ids": one_row}, copies=2, batch_size=rows)["position_ids"] is one_row


@pytest.mark.parametrize("rows_of_mask", [1, 2])
def test_a_mask_of_four_dimensions(rows_of_mask):
    base = double(tiny_llama)
    model = adapt(copy.deepcopy(base))
    mask = torch.tril(torch.ones(7, 7, dtype=torch.bool)).repeat(rows_of_mask, 1, 1, 1)
    mask[-1, :, 3:, 0] = False
    inputs = {"input_ids": batch()["input_ids"], "attention_mask": mask}
    torch.testing.assert_close(
        model(**inputs, hypotheses="all").logits, brute_force(base, model, inputs, routes(3, 2)["all"][1]), **TIGHT
    )


@pytest.mark.parametrize("kind", ["int", "all", "index"])
def test_labels_and_loss(kind):
    base = double(tiny_llama)
    model = adapt(copy.deepcopy(base))
    inputs = batch(rows=3, padding="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :2] = -100
    hypotheses, rows_of = routes(3, 3)[kind]
    logits = brute_force(base, model, inputs, rows_of)[:, :-1]
    targets = torch.stack([labels[row] for _, row in rows_of])[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    actual = model(**inputs, labels=labels, hypotheses=hypotheses).loss
    torch.testing.assert_close(actual.double(), expected, **TIGHT)


@pytest.mark.parametrize("logits_to_keep", [2, torch.tensor([0, 3])], ids=["int", "tensor"])
def test_logits_to_keep(logits_to_keep):
    model = adapt(tiny_llama())
    inputs = batch()
    kept = slice(-2, None) if isinstance(logits_to_keep, int) else logits_to_keep
    expected = model(**inputs, hypotheses="all").logits[:, kept]
    torch.testing.assert_close(model(**inputs, hypotheses="all", logits_to_keep=logits_to_keep).logits, expected)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_outputs_of_an_encoder(as_tuple):
    base = double(tiny_t5)
    model = adapt(copy.deepcopy(base))
    encoded = base.get_encoder()(**batch())
    inputs = {
        "encoder_outputs": (encoded.last_hidden_state,) if as_tuple else encoded,
        "attention_mask": batch()["attention_mask"],
        "decoder_input_ids": batch(length=4, seed=1)["input_ids"],
    }
    expected = brute_force(base, model, inputs, routes(3, 2)["all"][1])
    torch.testing.assert_close(model(**inputs, hypotheses="all").logits, expected, **TIGHT)
    assert encoded.last_hidden_state.shape[0] == 2


@pytest.mark.parametrize(
    ("model_class", "task_type", "labels"),
    [
        (LlamaForSequenceClassification, "SEQ_CLS", torch.tensor([0, 1])),
        (LlamaForTokenClassification, "TOKEN_CLS", torch.ones(2, 7, dtype=torch.long)),
        (LlamaModel, "FEATURE_EXTRACTION", None),
    ],
    ids=["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"],
)
def test_other_tasks(model_class, task_type, labels):
    base = model_class(tiny_llama().config).eval()
    model = adapt(copy.deepcopy(base), task_type=task_type, target_modules=["q_proj", "up_proj"])
    inputs = batch() if labels is None else {**batch(), "labels": labels}
    outputs = [merged_by_hand(base, model, k)(**inputs) for k in range(3)]
    actual = model(**inputs, hypotheses="all")
    name = "last_hidden_state" if labels is None else "logits"
    torch.testing.assert_close(actual[name], torch.cat([output[name] for output in outputs]), rtol=1e-4, atol=1e-5)
    if labels is not None:
        torch.testing.assert_close(actual.loss, torch.stack([output.loss for output in outputs]).mean())


# ------------------------------------------------------------------------------------------------------------
# The key-value cache


def decode(model, inputs, next_ids, past_key_values, **route):
    """One more token for each row; the mask of `inputs` goes on."""
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(next_ids)], dim=1)
    positions = mask.sum(1, keepdim=True) - 1
    return model(
        input_ids=next_ids, attention_mask=mask, position_ids=positions, past_key_values=past_key_values, **route
    ).logits


def prefill(model, inputs, **options):
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(**inputs, position_ids=positions, use_cache=True, **options).past_key_values


NEXT_IDS = torch.tensor([[5], [9]])


@pytest.mark.parametrize("gradient", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_gemma3])
def test_cache(build, gradient):
    base = double(build)
    model = adapt(copy.deepcopy(base))
    inputs = batch(padding="left")
    references = [merged_by_hand(base, model, k) for k in range(3)]
    with torch.set_grad_enabled(gradient):
        alone = [decode(plain, inputs, NEXT_IDS, prefill(plain, inputs)) for plain in references]

        # Prefilled with all hypotheses, decoded with all of them: the cache has every row already.
        cache = prefill(model, inputs, hypotheses="all")
        actual = decode(model, inputs, NEXT_IDS, cache, hypotheses="all")
        torch.testing.assert_close(actual, torch.cat(alone), **TIGHT)
        assert cache.get_seq_length() == 8

        # One hypothesis for each row, in prefill and in decoding.
        index = torch.tensor([2, 0])
        actual = decode(model, inputs, NEXT_IDS, prefill(model, inputs, hypotheses=index), hypotheses=index)
        torch.testing.assert_close(actual, torch.stack([alone[2][0], alone[0][1]]), **TIGHT)

        # One computed prompt for all hypotheses: a cache of B rows is copied, and left as it is.
        cache = prefill(model, inputs, hypotheses=1)
        keys = cache.layers[-1].keys.clone()
        expected = [decode(plain, inputs, NEXT_IDS, prefill(references[1], inputs)) for plain in references]
        for _ in range(2):
            actual = decode(model, inputs, NEXT_IDS, cache, hypotheses="all")
            torch.testing.assert_close(actual, torch.cat(expected), **TIGHT)
        assert cache.get_seq_length() == 7
        assert torch.equal(cache.layers[-1].keys, keys)

    if gradient:
        # The copied cache is part of the graph of the prompt.
        decode(model, inputs, NEXT_IDS, cache, hypotheses="all").pow(2).sum().backward()
        gradients = take_gradients(model)
        torch.cat(expected).pow(2).sum().backward()
        assert_same_gradients(gradients, take_gradients(model))


@torch.no_grad()
def test_static_cache():
    base = double(tiny_llama)
    model = adapt(copy.deepcopy(base))
    inputs = batch()
    cache = StaticCache(config=base.config, max_cache_len=12)
    prefill(model, inputs, past_key_values=cache, hypotheses=1)
    expected = [
        decode(merged_by_hand(base, model, k), inputs, NEXT_IDS, prefill(merged_by_hand(base, model, 1), inputs))
        for k in range(3)
    ]
    for _ in range(2):
        actual = decode(model, inputs, NEXT_IDS, cache, hypotheses="all")
        torch.testing.assert_close(actual, torch.cat(expected), **TIGHT)
    assert int(cache.get_seq_length()) == 7


@torch.no_grad()
def test_cache_of_an_encoder_decoder():
    base = double(tiny_t5)
    model = adapt(copy.deepcopy(base))
    inputs, decoder_ids = batch(), torch.tensor([[PAD, 5, 8], [PAD, 9, 4]])

    def step(model, ids, **options):
        return model(**inputs, decoder_input_ids=ids, use_cache=True, **options)

    references = [merged_by_hand(base, model, k) for k in range(3)]
    alone = [
        step(plain, decoder_ids[:, 2:], past_key_values=step(plain, decoder_ids[:, :2]).past_key_values).logits
        for plain in references
    ]
    cache = step(model, decoder_ids[:, :2], hypotheses="all").past_key_values
    actual = step(model, decoder_ids[:, 2:], past_key_values=cache, hypotheses="all").logits
    torch.testing.assert_close(actual, torch.cat(alone), **TIGHT)

    cache = step(model, decoder_ids[:, :2], hypotheses=1).past_key_values
    expected = [
        step(plain, decoder_ids[:, 2:], past_key_values=step(references[1], decoder_ids[:, :2]).past_key_values).logits
        for plain in references
    ]
    for _ in range(2):
        actual = step(model, decoder_ids[:, 2:], past_key_values=cache, hypotheses="all").logits
        torch.testing.assert_close(actual, torch.cat(expected), **TIGHT)
    assert cache.get_seq_length() == 2


def test_an_empty_cache_is_filled():
    model = adapt(tiny_llama())
    cache = DynamicCache()
    model(**batch(), past_key_values=cache, hypotheses="all")
    assert cache.layers[0].keys.shape[0] == 6


def test_a_cache_of_another_size_is_refused():
    model = adapt(tiny_llama())
    cache = prefill(model, batch(rows=4))
    with pytest.raises(ValueError, match=r"`past_key_values` holds 4 rows; .* on 2 rows needs 2 of them, or 6 from"):
        model(input_ids=NEXT_IDS, past_key_values=cache, hypotheses="all")


def test_the_tests_cover_every_kind_of_layer():
    kinds = set()
    for build, options in MODELS.values():
        layers = adapted_layers(adapt(build(), **options)).values()
        kinds |= {(type(layer).__name__, type(layer.get_base_layer()).__name__) for layer in layers}
    assert kinds == {
        ("MCLoraLinear", "Linear"),
        ("MCLoraLinear", "Conv1D"),
        ("MCLoraEmbedding", "Embedding"),
        ("MCLoraEmbedding", "Gemma3TextScaledWordEmbedding"),
    }
