"""Tests of what serving engines do with exported hypotheses.

The rules are those of the sources that `peft_mcl/serving.py` names; no engine runs here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from peft_mcl import check_serving, export_hypotheses
from peft_mcl.serving import VLLM_MAX_RANKS
from tests.tiny import tiny_gpt2, tiny_llama, with_hypotheses


K = 3
IDS = torch.arange(4, 22).view(3, 6)
UNEVEN = {"rank_pattern": {"q_proj": 2, r"layers\.1.*v_proj": 6}, "alpha_pattern": {"v_proj": 90.5}}


def logits(model: torch.nn.Module, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits


def served(build: Callable[[], PreTrainedModel], directory: Path) -> PreTrainedModel:
    """The model of an engine that knows nothing but `lora_alpha / r` and the names of the weights."""
    config = json.loads((directory / "adapter_config.json").read_text())
    weights = load_file(directory / "adapter_model.safetensors")
    model = build()
    for key, a in weights.items():
        if key.endswith(".lora_A.weight"):
            b = weights[key.replace("lora_A", "lora_B")]
            module = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight.data += config["lora_alpha"] / config["r"] * (b @ a)
    return model


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_exported_hypotheses_can_be_served(engine: str, tmp_path: Path):
    model = with_hypotheses(tiny_llama(), K)
    for hypothesis, directory in enumerate(export_hypotheses(model, tmp_path)):
        check_serving(directory, engine, max_lora_rank=8)
        torch.testing.assert_close(
            logits(served(tiny_llama, directory)), logits(model, hypotheses=hypothesis), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("build", "options", "vllm", "sglang"),
    [
        (tiny_llama, {"use_rslora": True}, None, "`use_rslora` is set"),
        (tiny_llama, UNEVEN, None, r"(?s)`rank_pattern` is .*`alpha_pattern` is .*portable=True"),
        (tiny_llama, {"target_modules": r".*\.(q|v)_proj"}, None, "`target_modules` is the regular expression"),
        (tiny_llama, {"target_modules": ["v_proj"]}, None, "v_proj is adapted without q_proj"),
        (tiny_llama, {"target_modules": ["q_proj", "k_proj"]}, None, "q_proj is adapted without v_proj"),
        (tiny_llama, {"target_modules": ["up_proj"]}, None, "up_proj is adapted without gate_proj"),
        (tiny_llama, {"target_modules": ["gate_proj", "q_proj", "v_proj"]}, None, None),
        (tiny_llama, {"modules_to_save": ["lm_head"]}, "in full .*lm_head.weight, .*refuses", "lm_head.weight, .*ignores"),
        (tiny_llama, {"trainable_token_indices": [4]}, "in full .*embed_tokens.*refuses", "embed_tokens.*ignores"),
        (tiny_llama, {"target_modules": ["embed_tokens", "q_proj", "v_proj"]}, None, None),
        (tiny_gpt2, {"target_modules": ["c_attn"], "bias": "all"}, "`bias` is 'all'", "c_attn.base_layer.bias, .* and 1. more, .*ignores"),
        (tiny_gpt2, {"target_modules": ["c_attn"]}, None, "c_attn is no module that SGLang adapts"),
        (tiny_gpt2, {"target_modules": ["wte"]}, "wte is an embedding", "wte is an embedding"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has .*tie")
def test_rules(build: Any, options: dict[str, Any], vllm: str | None, sglang: str | None, tmp_path: Path):
    directory = export_hypotheses(with_hypotheses(build(), 2, **options), tmp_path)[1]
    for engine, message in (("vllm", vllm), ("sglang", sglang)):
        if message is None:
            check_serving(directory, engine)
        else:
            with pytest.raises(ValueError, match=message):
                check_serving(directory, engine)


@pytest.mark.parametrize(
    ("rank", "engine", "limit", "message"),
    [
        (4, "vllm", None, None),
        (16, "vllm", 16, None),
        (17, "vllm", 16, "its rank is 17; start the engine with `--max-lora-rank 32`"),
        (17, "sglang", 16, "its rank is 17; start the engine with `--max-lora-rank 17`"),
        (8, "vllm", 12, "`--max-lora-rank` is 12, and vLLM takes 1, 8, 16"),
        (8, "sglang", 12, None),
        (513, "vllm", None, "its rank is 513, and vLLM serves ranks up to 512"),
        (513, "sglang", None, None),
    ],
)
def test_ranks(rank: int, engine: str, limit: int | None, message: str | None, tmp_path: Path):
    model = with_hypotheses(tiny_llama(num_hidden_layers=1), 1, r=4, rank_pattern={"q_proj": rank})
    directory = export_hypotheses(model, tmp_path, portable=True)[0]
    if message is None:
        check_serving(directory, engine, max_lora_rank=limit)
    else:
        with pytest.raises(ValueError, match=message):
            check_serving(directory, engine, max_lora_rank=limit)
    assert max(VLLM_MAX_RANKS) == 512


def test_bad_arguments(tmp_path: Path):
    (directory,) = export_hypotheses(with_hypotheses(tiny_llama(), 1), tmp_path)
    with pytest.raises(ValueError, match="`engine` must be one of vllm, sglang, got 'tgi'"):
        check_serving(directory, "tgi")
    with pytest.raises(ValueError, match="`max_lora_rank` must be an integer of at least 1, got 0"):
        check_serving(directory, "vllm", max_lora_rank=0)
    with_hypotheses(tiny_llama()).save_pretrained(tmp_path / "mclora")
    with pytest.raises(ValueError, match=r"(?s)vllm cannot serve.*mclora has a MCLoraConfig"):
        check_serving(tmp_path / "mclora", "vllm")
    dora = LoraConfig(use_dora=True, target_modules=["q_proj"])
    get_peft_model(tiny_llama(), dora).save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match=r"(?s)sglang cannot serve.*uses use_dora"):
        check_serving(tmp_path / "dora", "sglang")


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, UNEVEN, {"use_rslora": True, **UNEVEN}, {"target_modules": r".*\.(q|v)_proj"}],
    ids=["rslora", "patterns", "both", "regex"],
)
def test_portable_adapters_need_nothing_but_alpha_and_r(options: dict[str, Any], tmp_path: Path):
    model = with_hypotheses(tiny_llama(), K, **options)
    before = copy.deepcopy(model.state_dict())
    usual = export_hypotheses(model, tmp_path / "usual")
    portable = export_hypotheses(model, tmp_path / "portable", portable=True)
    for hypothesis in range(K):
        expected = logits(model, hypotheses=hypothesis)
        check_serving(portable[hypothesis], "sglang")
        torch.testing.assert_close(logits(served(tiny_llama, portable[hypothesis])), expected, rtol=1e-4, atol=1e-4)
        # And PEFT agrees.
        lora = PeftModel.from_pretrained(tiny_llama(), portable[hypothesis]).eval()
        torch.testing.assert_close(logits(lora), expected, rtol=1e-4, atol=1e-4)
        if "target_modules" not in options:
            assert not torch.allclose(logits(served(tiny_llama, usual[hypothesis])), expected, atol=1e-2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_portable_embeddings_and_half_precision(tmp_path: Path):
    options = {"target_modules": ["embed_tokens", "q_proj", "v_proj"], "rank_pattern": {"embed_tokens": 2}}
    model = with_hypotheses(tiny_llama(), K, **options)
    for hypothesis, directory in enumerate(export_hypotheses(model, tmp_path, portable=True)):
        weights = load_file(directory / "adapter_model.safetensors")
        assert weights["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (4, 64)
        lora = PeftModel.from_pretrained(tiny_llama(), directory).eval()
        torch.testing.assert_close(logits(lora), logits(model, hypotheses=hypothesis), rtol=1e-4, atol=1e-4)
    half = tmp_path / "half"
    with_hypotheses(tiny_llama(), K).to(torch.bfloat16).save_pretrained(half)
    (first, *_) = export_hypotheses(half, tmp_path / "of half", portable=True)
    assert {tensor.dtype for tensor in load_file(first / "adapter_model.safetensors").values()} == {torch.bfloat16}
