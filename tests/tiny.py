"""Random models of a few thousand parameters, and hypotheses on them that answer differently from the first token on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    CLIPVisionConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from peft_mcl import MCLoraConfig


VOCABULARY = 64
PAD, BOS, EOS = 0, 1, 2
SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def _build(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model in eval mode whose weights depend on nothing but its configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config).eval()


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
    }
    return _build(LlamaForCausalLM, LlamaConfig(**{**defaults, **SPECIAL, **options}))


def tiny_gpt2(**options: Any) -> GPT2LMHeadModel:
    """Conv1D layers, learned positions, tied embeddings."""
    defaults = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
    return _build(GPT2LMHeadModel, GPT2Config(**{**defaults, **SPECIAL, **options}))


def tiny_gemma3(**options: Any) -> Gemma3ForCausalLM:
    """One layer with a sliding window of 4 and one with full attention: a hybrid cache; tied, scaled embeddings."""
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 128,
    }
    return _build(Gemma3ForCausalLM, Gemma3TextConfig(**{**defaults, **SPECIAL, **options}))


def tiny_t5(**options: Any) -> T5ForConditionalGeneration:
    """An encoder and a decoder."""
    defaults = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    return _build(T5ForConditionalGeneration, T5Config(**{**defaults, **special, **options}))


def tiny_llava() -> LlavaForConditionalGeneration:
    """A picture of 8 by 8 pixels is 4 tokens."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=tiny_llama().config, image_token_id=VOCABULARY - 1, vision_feature_layer=-1
    )
    return _build(LlavaForConditionalGeneration, config)


def tiny_whisper() -> WhisperForConditionalGeneration:
    """Sound of 40 frames of 8 channels in, tokens out."""
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
        decoder_start_token_id=BOS,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **SPECIAL,
    )
    model = _build(WhisperForConditionalGeneration, config)
    model.generation_config.max_length = 20
    return model


FAMILIES = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gemma3": tiny_gemma3, "t5": tiny_t5}


def with_hypotheses(base: PreTrainedModel, num_hypotheses: int = 3, seed: int = 1, **options: Any) -> PeftModel:
    """`base` with K random hypotheses (both A and B drawn), in eval mode."""
    task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    defaults = {"r": 4, "lora_alpha": 64, "target_modules": "all-linear", "task_type": task_type}
    config = MCLoraConfig(num_hypotheses=num_hypotheses, init_lora_weights=False, **{**defaults, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(base, config).eval()


def merged(model: PeftModel, hypothesis: int) -> PreTrainedModel:
    """A plain transformers model with one hypothesis in its weights; `model` itself is left alone."""
    return copy.deepcopy(model).merge_and_unload(hypothesis=hypothesis)
