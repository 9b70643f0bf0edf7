"""What serving engines accept, and what they leave out of a LoRA adapter without a word.

Read in the sources of vLLM 0.33.0 (`vllm/lora/peft_helper.py`, `lora_model.py`, `utils.py`, `config/lora.py`) and SGLang 0.5.23
(`sglang/srt/lora/lora.py`, `lora_manager.py`, `mem_pool.py`, `utils.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig

from peft_mcl.config import require_positive_int
from peft_mcl.convert import PREFIX, not_plain_lora, refuse
from peft_mcl.saved import SavedAdapter


ENGINES = ("vllm", "sglang")
# The values that vLLM's `--max-lora-rank` can have.
VLLM_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# The modules that vLLM and SGLang can adapt other than linear layers inside of the numbered layers.
EMBEDDINGS = ("embed_tokens", "lm_head")
# The names that SGLang knows, without those of single architectures.
SGLANG_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj", *EMBEDDINGS)
_LORA_KEY = re.compile(r"^(?P<module>.+)\.(lora_[AB]\.weight|lora_embedding_[AB])$")


def check_serving(
    adapter: str | os.PathLike[str], engine: str, max_lora_rank: int | None = None, token: str | None = None
) -> None:
    """Check that a serving engine computes with an ordinary LoRA adapter what PEFT computes with it.

    vLLM refuses what it cannot serve. SGLang serves all adapters by `lora_alpha / r` and leaves out weights that it does not
    know, at most with a warning, and then answers with another model than the one that was trained.

    Args:
        adapter (`str` or `PathLike`): A LoRA adapter, such as a directory that [`export_hypotheses`] has written; or on the
            Hub `user/name`, `user/name/folder` or `user/name/folder@revision`.
        engine (`str`): `"vllm"` or `"sglang"`.
        max_lora_rank (`int`, *optional*): The `--max-lora-rank` that the engine is started with.
        token (`str`, *optional*): Token of the Hub, instead of the one that is logged in.

    Raises:
        ValueError: The engine refuses the adapter, or would serve something else; the message lists why. Or the adapter
            cannot be read, or an argument is out of its range. Whether the engine knows the architecture of the base model
            is not checked.
    """
    if engine not in ENGINES:
        raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {engine!r}.")
    if max_lora_rank is not None:
        require_positive_int("max_lora_rank", max_lora_rank)
    source = SavedAdapter.find(adapter, token)
    config: Any = source.read_config()
    refuse(f"{engine} cannot serve this adapter:", not_plain_lora(source.name, config))
    keys = list(source.read_weights())
    modules = {match["module"].removeprefix(PREFIX) for key in keys if (match := _LORA_KEY.fullmatch(key))}
    problems = _rank_problems(config, engine, max_lora_rank) + _weight_problems(engine, keys, modules)
    problems += _vllm_problems(config) if engine == "vllm" else _sglang_problems(config, modules)
    refuse(f"{engine} cannot serve {source.name} as it was trained:", problems)


def _rank_problems(config: LoraConfig, engine: str, max_lora_rank: int | None) -> list[str]:
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    if max_lora_rank is not None and rank > max_lora_rank:
        return [f"its rank is {rank}; start the engine with `--max-lora-rank {_allowed_rank(rank, engine)}`"]
    if engine == "vllm":
        if rank > VLLM_MAX_RANKS[-1]:
            return [f"its rank is {rank}, and vLLM serves ranks up to {VLLM_MAX_RANKS[-1]}"]
        if max_lora_rank is not None and max_lora_rank not in VLLM_MAX_RANKS:
            return [f"`--max-lora-rank` is {max_lora_rank}, and vLLM takes {', '.join(map(str, VLLM_MAX_RANKS))}"]
    return []


def _allowed_rank(rank: int, engine: str) -> int:
    """The smallest `--max-lora-rank` for adapters of this rank."""
    return next((allowed for allowed in VLLM_MAX_RANKS if allowed >= rank), rank) if engine == "vllm" else rank


def _weight_problems(engine: str, keys: Sequence[str], modules: set[str]) -> list[str]:
    problems = []
    for key in keys:
        match = _LORA_KEY.fullmatch(key)
        if match and key.endswith("lora_embedding_A") and match["module"].rpartition(".")[2] not in EMBEDDINGS:
            problems.append(
                f"{match['module']} is an embedding, of which {engine} adapts {' and '.join(EMBEDDINGS)} only"
            )
    # The weights of an adapted embedding come along, unchanged.
    full = [
        key
        for key in keys
        if not _LORA_KEY.fullmatch(key) and key.removeprefix(PREFIX).removesuffix(".base_layer.weight") not in modules
    ]
    if full:
        names = ", ".join(full[:3]) + (f" and {len(full) - 3} more" if len(full) > 3 else "")
        problems.append(
            f"it has weights that were trained in full (`modules_to_save`, `bias` or `trainable_token_indices`): {names}, "
            f"which {engine} {'refuses' if engine == 'vllm' else 'ignores'}; merge the hypothesis with `merge_and_unload` and "
            "serve it as a model of its own"
        )
    return problems


def _vllm_problems(config: LoraConfig) -> list[str]:
    # The option alone is refused, whether there are biases or not.
    return [] if config.bias == "none" else [f"`bias` is {config.bias!r}, and vLLM serves 'none'"]


def _sglang_problems(config: LoraConfig, modules: set[str]) -> list[str]:
    problems = []
    fold = "export with `portable=True`, which puts the scale into the weights"
    if config.use_rslora:
        problems.append(f"`use_rslora` is set, and SGLang scales by lora_alpha / r; {fold}")
    for option in ("rank_pattern", "alpha_pattern"):
        if getattr(config, option):
            problems.append(f"`{option}` is {getattr(config, option)}, and SGLang takes one r and lora_alpha; {fold}")
    if isinstance(config.target_modules, str) and config.target_modules not in ("all", "all-linear"):
        problems.append(
            f"`target_modules` is the regular expression {config.target_modules!r}, and SGLang takes a list of names; export "
            "with `portable=True`, which writes one"
        )
    for module in sorted(modules):
        parent, _, name = module.rpartition(".")
        if name not in SGLANG_MODULES or not (name in EMBEDDINGS or re.search(r"\blayers\.\d+\.", module)):
            problems.append(f"{module} is no module that SGLang adapts in every architecture: see its `get_hidden_dim`")
        # It stacks q, k, v and gate, up. What lacks its first part, or q its last, is left out or fails.
        for part, whole in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("q_proj", "v_proj"), ("up_proj", "gate_proj")):
            if name == part and f"{parent}.{whole}" not in modules:
                problems.append(
                    f"{module} is adapted without {whole}, and SGLang cannot load the one without the other"
                )
    return problems
