"""Tests of what transformers and PEFT do with MCLORA and exported adapters by their own means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, pipeline

from peft_mcl import export_hypotheses
from peft_mcl.layer import MCLoraLayer
from tests.tiny import VOCABULARY, merged, tiny_gpt2, tiny_llama, with_hypotheses


K = 3
IDS = torch.arange(4, 22).view(3, 6)
FAMILIES: dict[str, tuple[Callable[..., Any], list[str], list[str]]] = {
    # Targets of the MCLORA adapter, and of the ordinary one: some are shared, some are not.
    "llama": (tiny_llama, ["q_proj", "v_proj", "up_proj", "embed_tokens"], ["q_proj", "down_proj", "embed_tokens"]),
    "gpt2": (tiny_gpt2, ["c_attn", "c_fc"], ["c_attn", "mlp.c_proj"]),
}


def logits(model: torch.nn.Module, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits


def generated(model: Any, **kwargs: Any) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=4, **kwargs)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "t0", "bos_token": "t1", "eos_token": "t2", "unk_token": "t3"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)


class Saved:
    """A base model, an MCLORA adapter and an ordinary one on it in folders, and what each of them answers."""

    def __init__(self, folder: Path, family: str) -> None:
        build, mcl_targets, lora_targets = FAMILIES[family]
        self.base, self.mcl, self.lora = (str(folder / name) for name in ("base", "mcl", "lora"))
        build().save_pretrained(self.base)
        tokenizer().save_pretrained(self.base)
        self.model = with_hypotheses(self.load(), K, target_modules=mcl_targets)
        self.model.save_pretrained(self.mcl)
        self.hypotheses = [logits(self.model, hypotheses=k) for k in range(K)]
        torch.manual_seed(3)
        config = LoraConfig(
            target_modules=lora_targets, r=2, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        lora = get_peft_model(self.load(), config).eval()
        lora.save_pretrained(self.lora)
        self.of_lora, self.of_base = logits(lora), logits(self.load())

    def load(self, path: str | None = None) -> Any:
        return AutoModelForCausalLM.from_pretrained(path or self.base)

    def answers_as_hypotheses(self, model: Any) -> None:
        assert all(torch.equal(logits(model, hypotheses=k), self.hypotheses[k]) for k in range(K))
        torch.testing.assert_close(logits(model, hypotheses="all"), torch.cat(self.hypotheses), rtol=1e-4, atol=1e-4)
        assert torch.equal(logits(model), self.hypotheses[0])
        # K sequences for each prompt, and what a subset of them is.
        assert torch.equal(generated(model), generated(self.model))
        assert torch.equal(generated(model, hypotheses=[2]), generated(merged(self.model, 2)))


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp(request.param), request.param)


pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:Model has .*tie", "ignore:Already found a `peft_config`"
)


def test_model_of_transformers_from_the_adapter(saved: Saved, tmp_path: Path):
    model = saved.load(saved.mcl)
    assert type(model) is type(saved.load())
    saved.answers_as_hypotheses(model)
    # And back to a PeftModel.
    model.save_pretrained(tmp_path / "again")
    saved.answers_as_hypotheses(PeftModel.from_pretrained(saved.load(), tmp_path / "again").eval())
    for k, directory in enumerate(export_hypotheses(model, tmp_path / "exported")):
        assert torch.equal(logits(PeftModel.from_pretrained(saved.load(), directory).eval()), saved.hypotheses[k])


def test_load_adapter_of_transformers(saved: Saved):
    model = saved.load()
    found = model.load_adapter(saved.mcl)
    assert not found.missing_keys
    assert not found.unexpected_keys
    saved.answers_as_hypotheses(model)
    model.disable_adapters()
    assert torch.equal(logits(model), saved.of_base)
    assert len(generated(model)) == len(IDS)
    model.enable_adapters()
    saved.answers_as_hypotheses(model)
    model.delete_adapter("default")
    assert torch.equal(logits(model), saved.of_base)
    assert len(generated(model)) == len(IDS)


@pytest.mark.parametrize("first", ["lora", "mcl"])
def test_an_ordinary_adapter_on_the_same_model(first: str, saved: Saved, tmp_path: Path):
    model = saved.load()
    for name in (first, "mcl" if first == "lora" else "lora"):
        model.load_adapter(getattr(saved, name), adapter_name=name)
    for _ in range(2):
        model.set_adapter("lora")
        assert torch.equal(logits(model), saved.of_lora)
        assert len(generated(model)) == len(IDS)
        model.set_adapter("mcl")
        saved.answers_as_hypotheses(model)
    # Both: each hypothesis on top of the ordinary adapter.
    model.set_adapter(["lora", "mcl"])
    assert len(generated(model)) == K * len(IDS)
    of_base = saved.load().state_dict()
    of_lora = PeftModel.from_pretrained(saved.load(), saved.lora).merge_and_unload().state_dict()
    for k in range(K):
        reference = merged(saved.model, k)
        weights = {name: tensor + of_lora[name] - of_base[name] for name, tensor in reference.state_dict().items()}
        reference.load_state_dict(weights)
        torch.testing.assert_close(logits(model, hypotheses=k), logits(reference), rtol=1e-4, atol=1e-4)
        rows = logits(model, hypotheses="all")[k * len(IDS) : (k + 1) * len(IDS)]
        torch.testing.assert_close(rows, logits(reference), rtol=1e-4, atol=1e-4)
    model.disable_adapters()
    assert torch.equal(logits(model), saved.of_base)
    model.enable_adapters()
    # Whichever lies inside of the other is exported under its own names.
    for k, directory in enumerate(export_hypotheses(model, tmp_path, adapter_name="mcl")):
        assert torch.equal(logits(PeftModel.from_pretrained(saved.load(), directory).eval()), saved.hypotheses[k])
    model.delete_adapter("lora")
    model.set_adapter("mcl")
    saved.answers_as_hypotheses(model)


def test_gradients_through_an_ordinary_adapter(saved: Saved):
    """The inner adapter is part of the frozen layer, and its update of the output that the hypotheses see."""
    model = saved.load()
    model.load_adapter(saved.lora, adapter_name="lora")
    model.load_adapter(saved.mcl, adapter_name="mcl", is_trainable=True)
    model.set_adapter(["lora", "mcl"])
    model(input_ids=IDS, hypotheses="all").logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "mclora_" in name}
    assert gradients
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_peft_refuses_two_types_in_one_model(saved: Saved):
    for first, second in ((saved.mcl, saved.lora), (saved.lora, saved.mcl)):
        model = PeftModel.from_pretrained(saved.load(), first).eval()
        before = logits(model)
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            model.load_adapter(second, adapter_name="second")
        assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="MCLORA is not supported for mixed models"):
        PeftMixedModel.from_pretrained(saved.load(), saved.mcl)


def test_hot_swap(tmp_path: Path):
    # Not of embeddings: PEFT saves their weights along, and its hot swap stumbles over them.
    model = with_hypotheses(tiny_llama(), K)
    hypotheses = [logits(model, hypotheses=k) for k in range(K)]
    directories = [str(path) for path in export_hypotheses(model, tmp_path)]
    swapped = PeftModel.from_pretrained(tiny_llama(), directories[0]).eval()
    added = tiny_llama()
    added.load_adapter(directories[0])
    for k in (1, 2, 0):
        hotswap_adapter(swapped, directories[k], adapter_name="default", torch_device="cpu")
        added.load_adapter(directories[k], adapter_name="default", hotswap=True)
        assert torch.equal(logits(swapped), hypotheses[k])
        assert torch.equal(logits(added), hypotheses[k])
    # For compiled models PEFT turns the scales into tensors first.
    prepared = PeftModel.from_pretrained(tiny_llama(), directories[0]).eval()
    prepare_model_for_compiled_hotswap(prepared)
    hotswap_adapter(prepared, directories[2], adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(prepared), hypotheses[2], rtol=1e-5, atol=1e-5)
    # All hypotheses at once cannot be swapped, and PEFT says so.
    model.save_pretrained(tmp_path / "mclora")
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but MCLORA was passed"):
        hotswap_adapter(model, str(tmp_path / "mclora"), adapter_name="default", torch_device="cpu")


def test_pipeline(saved: Saved):
    """K candidates for each prompt, in the order of the hypotheses, as `num_return_sequences=K` would give."""
    prompts = ["t5 t6 t7", "t8 t9"]
    words = tokenizer()
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}

    def alone(hypothesis: int, prompt: str) -> str:
        ids = words(prompt, return_tensors="pt")
        sequence = merged(saved.model, hypothesis).generate(**ids, max_new_tokens=5, do_sample=False)[0]
        return words.decode(sequence[ids["input_ids"].shape[1] :], skip_special_tokens=True)

    expected = [[alone(k, prompt) for k in range(K)] for prompt in prompts]
    assert len({text for texts in expected for text in texts}) > K
    for model in (saved.model, saved.load(saved.mcl)):
        for batch_size in (1, 2):
            pipe = pipeline("text-generation", model=model, tokenizer=words, batch_size=batch_size, **options)
            found = [[candidate["generated_text"] for candidate in candidates] for candidates in pipe(prompts)]
            assert found == expected
        found = [candidate["generated_text"] for candidate in pipe(prompts[0], hypotheses=[2, 0])]
        assert found == [expected[0][2], expected[0][0]]
    # By the name of the adapter alone.
    pipe = pipeline("text-generation", model=saved.mcl, tokenizer=saved.base, **options)
    assert [candidate["generated_text"] for candidate in pipe(prompts[1])] == expected[1]


def test_a_base_that_was_never_adapted_is_left_alone(saved: Saved):
    model: PreTrainedModel = saved.load()
    model.load_adapter(saved.lora)
    assert not any(isinstance(module, MCLoraLayer) for module in model.modules())
    assert "generate" not in vars(model)
    assert torch.equal(logits(model), saved.of_lora)
