"""The configuration of a multi-hypothesis LoRA adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from peft_mcl.card import replace_card_of_peft
from peft_mcl.loading import refuse_pickle
from peft_mcl.registration import PEFT_TYPE, add_peft_type


# Found by those who look into the file because PEFT said `KeyError: 'MCLORA'`.
REQUIRES = "the Python package peft-mcl: `import peft_mcl` before PEFT loads this adapter"


def require_positive_int(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is an int (not a bool) of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_weights(name: str, weights: Any, count: int) -> list[float]:
    """The weights that are given for `count` things, divided by their sum.

    Raises:
        ValueError: They are not `count` numbers of at least 0, or all of them are 0; the message calls them `name`.
    """
    is_list = isinstance(weights, (list, tuple)) and len(weights) == count
    if not is_list or not all(_is_number(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ValueError(
            f"`{name}` must be a list of {count} numbers of at least 0, not all of them 0, got {weights!r}."
        )
    # The largest first, because a sum of large numbers may overflow.
    weights = [weight / max(weights) for weight in weights] if max(weights) > 1 else [float(w) for w in weights]
    total = math.fsum(weights)
    # What was normalised once stays as it is, bit by bit, each time that it is saved and loaded.
    return weights if abs(total - 1) < 1e-12 else [weight / total for weight in weights]


@dataclass
class MCLoraConfig(PeftConfig):
    """Configuration of K LoRA hypotheses on one frozen model (LoRA-MCL, arXiv 2507.10419).

    Every argument other than `num_hypotheses` has the meaning it has in `peft.LoraConfig`, and applies to each of the K
    hypotheses alike.

    Args:
        num_hypotheses (`int`): K, the number of LoRA adapters that compete for every training sequence. With
            `num_hypotheses=1` the model is numerically plain LoRA.
        r (`int`): Rank of each hypothesis.
        shared_r (`int`): Rank of a part of the update that all hypotheses share: W + scale * (B_s A_s + B_k A_k), with the
            scale that `r` gives. Every sequence trains it. 0: there is none.
        lora_alpha (`int` or `float`): The update is scaled by `lora_alpha / r`.
        lora_dropout (`float`): Dropout probability on the input of the low-rank update, in [0, 1).
        use_rslora (`bool`): Scale by `lora_alpha / sqrt(r)` instead (rank-stabilised LoRA).
        init_lora_weights (`bool` or `"gaussian"`): `True`: A Kaiming-uniform, different for each hypothesis, and B zero;
            `"gaussian"`: A normal with deviation 1/r, B zero; `False`: A and B random (for tests: the model does not start
            as the base model).
        init_perturbation (`float`, *optional*): `None`: each hypothesis has random matrices of its own. A number p of at least
            0: all start from the same ones, to which each adds normal noise of p times their standard deviation. So they can
            be trained as one first, with `hypotheses="mean"`. Where B is zero (A, in an embedding) it stays so.
        target_modules (`list[str]` or `str`, *optional*): Names or regular expression of the modules to adapt,
            `"all-linear"`, or `None` for the architecture's default (the same one as LoRA's).
        exclude_modules (`list[str]` or `str`, *optional*): Names or regular expression of modules to leave alone.
        layers_to_transform (`list[int]` or `int`, *optional*): Indices of the layers to adapt.
        layers_pattern (`list[str]` or `str`, *optional*): Name of the module list that `layers_to_transform` indexes.
        rank_pattern (`dict[str, int]`): Module name or regular expression -> rank that differs from `r`.
        alpha_pattern (`dict[str, float]`): Module name or regular expression -> alpha that differs from `lora_alpha`.
        bias (`"none"`, `"all"` or `"lora_only"`): Biases of the base model that are trained. They are **shared by all
            hypotheses**.
        modules_to_save (`list[str]`, *optional*): Modules trained in full and saved with the adapter. There is one copy
            of each, **shared by all hypotheses**.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*): Token embeddings that are trained,
            **shared by all hypotheses**.
        hypothesis_weights (`list[float]`, *optional*): How much each hypothesis counts when outputs are ranked
            (`generate(..., rank=...)`): K numbers of at least 0, kept divided by their sum. `None`: all alike. `MCLTrainer`
            puts the win shares here; training never reads them. They are no part of what a hypothesis computes, so ordinary
            LoRA adapters (`export_hypotheses`) and merged models do not have them, nor does a model made of LoRA adapters.
        requires (`str`): A note for readers of the saved file; it changes nothing.

    Raises:
        ValueError: A value is out of its range; the message names the argument, the value and what is allowed.
    """

    num_hypotheses: int = field(default=3, metadata={"help": "Number of LoRA hypotheses (K)."})
    r: int = field(default=8, metadata={"help": "Rank of each hypothesis."})
    shared_r: int = field(default=0, metadata={"help": "Rank of a part that all hypotheses share; 0 for none."})
    lora_alpha: float = field(default=8, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the low-rank update."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) instead."})
    init_lora_weights: bool | str = field(
        default=True, metadata={"help": "True (Kaiming A, zero B), 'gaussian' (normal A, zero B) or False (random)."}
    )
    init_perturbation: float | None = field(
        default=None,
        metadata={
            "help": "Start all hypotheses alike but for noise of this size, relative to their weights; None: apart."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of the modules to adapt, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of the modules not to adapt."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform indexes."}
    )
    rank_pattern: dict = field(default_factory=dict, metadata={"help": "Module name or regex -> rank."})
    alpha_pattern: dict = field(default_factory=dict, metadata={"help": "Module name or regex -> alpha."})
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'lora_only'; shared by all hypotheses."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full; one copy, shared by all hypotheses."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token embeddings that are trained; shared by all hypotheses."}
    )
    hypothesis_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the hypotheses in rankings: K numbers; None for all alike."}
    )
    requires: str = field(default=REQUIRES, repr=False, metadata={"help": "A note for readers of the saved file."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type(PEFT_TYPE)
        self._check_values()
        # PEFT matches names against sets.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def _check_values(self) -> None:
        require_positive_int("num_hypotheses", self.num_hypotheses)
        require_positive_int("r", self.r)
        if isinstance(self.shared_r, bool) or not isinstance(self.shared_r, int) or self.shared_r < 0:
            raise ValueError(f"`shared_r` must be an integer of at least 0, got {self.shared_r!r}.")
        for pattern, rank in (self.rank_pattern or {}).items():
            require_positive_int(f"rank_pattern[{pattern!r}]", rank)
        if not _is_number(self.lora_alpha):
            raise ValueError(f"`lora_alpha` must be a number, got {self.lora_alpha!r}.")
        for pattern, alpha in (self.alpha_pattern or {}).items():
            if not _is_number(alpha):
                raise ValueError(f"`alpha_pattern[{pattern!r}]` must be a number, got {alpha!r}.")
        if not _is_number(self.lora_dropout) or not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"`lora_dropout` must be a probability in [0, 1), got {self.lora_dropout!r}.")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"`init_lora_weights` must be True, False or 'gaussian', got {self.init_lora_weights!r}. The other "
                "initialisations of LoRA change the base weights or give every hypothesis the same start."
            )
        if self.init_perturbation is not None and (
            not _is_number(self.init_perturbation) or self.init_perturbation < 0
        ):
            raise ValueError(
                f"`init_perturbation` must be a number of at least 0, or None, got {self.init_perturbation!r}."
            )
        self._check_weights()
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"`bias` must be 'none', 'all' or 'lora_only', got {self.bias!r}.")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` cannot be used when `target_modules` is a regular expression "
                        f"({self.target_modules!r}); select the layers in the expression or pass a list of names."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`: the indices of the layers to adapt.")

    def _check_weights(self) -> None:
        if self.hypothesis_weights is not None:
            self.hypothesis_weights = check_weights("hypothesis_weights", self.hypothesis_weights, self.num_hypotheses)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As `peft.PeftConfig.from_pretrained`, but for an MCLORA adapter whose weights, if they are here, are whole.

        Raises:
            ValueError: There is no such folder, repository, revision or file, or none that the token may read; it holds
                another type of adapter; or the weight file beside a local configuration is truncated or no safetensors
                file or a pickle.
        """
        name = pretrained_model_name_or_path
        try:
            config = super().from_pretrained(name, subfolder=subfolder, **kwargs)
        except ValueError as error:
            if (reason := _why_not_found(name, subfolder, kwargs.get("revision"), error.__cause__)) is None:
                raise
            raise ValueError(reason) from error
        if not isinstance(config, MCLoraConfig):
            raise ValueError(
                f"{name!r} holds an adapter of type {getattr(config.peft_type, 'value', config.peft_type)}, not MCLORA. Load "
                "it with `PeftModel.from_pretrained`, or make hypotheses of LoRA adapters with `from_lora_adapters`."
            )
        refuse_pickle(str(name), subfolder, **kwargs)
        weights = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if weights.is_file():
            check_safetensors(weights)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in PEFT, and where `PeftModel.save_pretrained` has left a blank model card, fills it in.

        Raises:
            ValueError: `hypothesis_weights` were set to something else than K weights.
        """
        self._check_weights()
        super().save_pretrained(save_directory, **kwargs)
        replace_card_of_peft(save_directory, self)


def _why_not_found(name: str, subfolder: str | None, revision: str | None, cause: BaseException | None) -> str | None:
    """What to tell of an error of the Hub's client; None if there is nothing to add."""
    inside = f" in subfolder {subfolder!r}" if subfolder else ""
    if isinstance(cause, RevisionNotFoundError):
        return f"`revision`: {name!r} has no branch, tag or commit {revision!r}."
    if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
        return f"{name!r} has no {CONFIG_NAME}{inside}: it holds no adapter there. Check the name and `subfolder`."
    if isinstance(cause, RepositoryNotFoundError):
        return (
            f"{name!r} is neither a folder here nor a repository on the Hub that your token may read. Check the name; for a "
            "private repository set HF_TOKEN, log in with `hf auth login`, or pass `token=`."
        )
    if isinstance(cause, HfHubHTTPError) and cause.response.status_code == 401:
        return f"The Hub refused your token for {name!r}. Log in with `hf auth login`, set HF_TOKEN, or pass another `token=`."
    return None


def check_safetensors(path: Path) -> None:
    """Raise a ValueError that names `path` unless it is a complete safetensors file (header and length are checked)."""
    try:
        with safe_open(str(path), framework="pt") as weights:
            weights.keys()
    except SafetensorError as error:
        raise ValueError(
            f"The adapter file {path} is truncated or corrupt ({error}). Save or download it again."
        ) from error
