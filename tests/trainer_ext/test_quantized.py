"""QLoRA through the trainer, from loading to merging, on 4-bit and 8-bit bases of bitsandbytes on the CPU."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, TrainerCallback

from tests.tiny import tiny_llama
from tests.trainer_ext.reference import (
    Gradients,
    RecordingCollator,
    assert_same_gradients,
    count_tokens,
    frozen_copy,
    gradients_by_hand,
    hypotheses,
    logged,
    ragged_pairs,
    scores_by_hand,
    sequences_of,
    trainer_for,
    weights_by_hand,
)


bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# As `recipes/train_mcl.py --dtype bfloat16 --load_in_4bit --use_bnb_nested_quant` and `--load_in_8bit` have them.
QUANTISATIONS = {"nf4": {**NF4, "bnb_4bit_compute_dtype": torch.bfloat16}, "int8": {"load_in_8bit": True}}
# TRL's own defaults, which the quick tests of the trainer switch off.
DEFAULTS = {"bf16": True, "gradient_checkpointing": True, "max_steps": 6, "learning_rate": 3e-2}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A saved base whose widths suit the kernels: multiples of 64."""
    path = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    tiny_llama(**sizes, initializer_range=0.15).save_pretrained(path)
    return path


@pytest.fixture(params=QUANTISATIONS)
def quantisation(request) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**QUANTISATIONS[request.param])


def train(output_dir: Path, directory: Path, quantisation: BitsAndBytesConfig, **options):
    """The trainer after a run that loads the base model itself, by name, as a user does."""
    resume = options.pop("resume", None)
    trainer = trainer_for(
        output_dir,
        model=str(directory),
        quantization_config=quantisation,
        model_init_kwargs={"dtype": "bfloat16"},
        data=ragged_pairs(24),
        eval_dataset=ragged_pairs(6, seed=1),
        **{**DEFAULTS, **options},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Generation(TrainerCallback):
    """Decodes after each step, in eval mode."""

    def __init__(self) -> None:
        self.sequences: list[torch.Tensor] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        prompt = torch.tensor([[7, 8, 9], [9, 8, 7]])
        self.sequences.append(model.eval().generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False))


def prompt_and_mask():
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def all_logits(model: PeftModel) -> torch.Tensor:
    return model.eval()(**prompt_and_mask(), hypotheses="all").logits.float()


def cosine(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0).item()


def test_from_loading_to_merging(tmp_path, directory, quantisation):
    # Train, evaluating and decoding after each step.
    generation = Generation()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 3}
    trainer = train(tmp_path / "all", directory, quantisation, callbacks=[generation], **options)
    kind = bnb.nn.Linear4bit if quantisation.load_in_4bit else bnb.nn.Linear8bitLt
    assert sum(isinstance(module, kind) for module in trainer.model.modules()) == 2 * 7
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - 0.05
    assert len(logged(trainer, "eval_loss")) == 6
    assert all(sequences.shape == (6, 7) for sequences in generation.sequences)

    # Neither leaves a trace.
    plain = train(tmp_path / "plain", directory, quantisation)
    assert logged(plain, "loss") == losses
    assert logged(plain, "grad_norm") == logged(trainer, "grad_norm")

    # A resumed run is the run that was not interrupted.
    resumed = train(tmp_path / "all", directory, quantisation, resume=str(tmp_path / "all" / "checkpoint-3"), **options)
    assert logged(resumed, "loss") == losses
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, resumed.model.get_parameter(name)), name

    # Save, and load on the same quantised base.
    trainer.save_model()
    adapter = tmp_path / "all"
    saved = load_file(adapter / "adapter_model.safetensors")
    assert all("mclora" in name for name in saved)
    again = AutoModelForCausalLM.from_pretrained(directory, quantization_config=quantisation, dtype=torch.bfloat16)
    expected = all_logits(trainer.model)
    assert not torch.allclose(expected[:2], expected[2:4], atol=1e-3)
    reloaded = PeftModel.from_pretrained(again, adapter, autocast_adapter_dtype=False)
    with torch.autocast("cpu", torch.bfloat16):  # As the trainer's model runs.
        assert torch.equal(all_logits(reloaded), expected)

    # Load on a base in full precision: the same model but for what quantisation rounds away. Merge there, exactly.
    full = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32), adapter)
    exact = all_logits(full)
    assert cosine(exact, expected) > 0.9
    generated = full.generate(**prompt_and_mask(), max_new_tokens=4, do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = full.merge_and_unload(hypothesis=2)
    assert type(merged) is LlamaForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(merged(**prompt_and_mask()).logits, exact[4:6], rtol=1e-4, atol=1e-4)
    alone = merged.generate(**prompt_and_mask(), max_new_tokens=4, do_sample=False)
    # The sequences of the other hypotheses may be longer.
    width = alone.shape[1]
    assert torch.equal(alone, generated[2::3, :width])
    assert (generated[2::3, width:] == merged.generation_config.pad_token_id).all()


def dequantised(model: torch.nn.Module, directory: Path) -> LlamaForCausalLM:
    """A plain float32 model with the weights that a quantised one really has."""
    plain = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = dequantize_bnb_weight(module.weight, state=module.weight.quant_state)
            plain.get_submodule(name.removesuffix(".base_layer")).weight.data = weight.float().clone()
    return plain


@pytest.mark.parametrize("objective", ["wta", "relaxed"])
@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepare_model_for_kbit_training"])
def test_gradients_after_evaluation_and_generation_equal_brute_force(tmp_path, directory, objective, prepared):
    """The scores of a step, its evaluation and what is decoded after it must not touch the 4-bit weights."""
    exactly = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(directory, quantization_config=exactly, dtype=torch.float32)
    plain = dequantised(base, directory)
    if prepared:
        base = prepare_model_for_kbit_training(base)
    config = hypotheses(3, init_lora_weights=False)
    model = get_peft_model(base, config)
    collator, gradients = RecordingCollator(), Gradients()
    trainer = trainer_for(
        tmp_path,
        model=model,
        data=ragged_pairs(12),
        eval_dataset=ragged_pairs(3, seed=1),
        data_collator=collator,
        callbacks=[gradients, Generation()],
        objective=objective,
        relaxed_epsilon=0.2,
        learning_rate=0.0,
        max_grad_norm=0.0,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
    )
    # TRL trains the adapters of a quantised model in bfloat16; a comparison needs more digits.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.bfloat16
            parameter.data = parameter.data.float()
    reference = get_peft_model(plain, config)
    reference.load_state_dict(
        {name: value for name, value in trainer.model.state_dict().items() if "mclora" in name}, strict=False
    )
    reference = frozen_copy(reference)
    trainer.train()

    batches = [batch for batch in collator.batches if len(batch["labels"]) == 4]  # Those of evaluation have 3 rows.
    assert len(batches) == len(gradients.steps) == 3
    for batch, actual in zip(batches, gradients.steps, strict=True):
        rows = zip(scores_by_hand(reference, batch), sequences_of(batch), strict=True)
        weights = [weights_by_hand(objective, own, count_tokens(labels), 0.2, None) for own, (_, labels) in rows]
        assert_same_gradients(actual, gradients_by_hand(reference, [batch], [weights], "token"), 1e-3)
