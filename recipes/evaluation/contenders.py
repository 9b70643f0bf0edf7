"""Who is compared: adapters with hypotheses, single LoRAs, several LoRAs side by side, the base model alone."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import AutoModelForCausalLM

from peft_mcl import MCLoraConfig, export_hypotheses, from_lora_adapters
from peft_mcl.convert import not_plain_lora
from peft_mcl.saved import SavedAdapter
from recipes.data.cache import sha256_of
from recipes.generate import base_options, load_model, load_tokenizer


BASE = "base"


@dataclass(frozen=True)
class Contender:
    """One trained thing: a seed of a contender. Contenders of one name are seeds of each other.

    Args:
        name: Its name in the results.
        adapters: Folders or Hub ids: one MCLORA adapter; or LoRA adapters (MCLORA ones with one hypothesis, too), of which each
            becomes a hypothesis; none for the base model.
        base: The base model.
        num_hypotheses: Outputs that it gives by itself.
        weights: Of the hypotheses, for mixtures and rankings; they add up to 1.
    """

    name: str
    adapters: tuple[str, ...]
    base: str
    num_hypotheses: int
    weights: tuple[float, ...]

    def fingerprint(self) -> dict[str, Any]:
        """What tells it from others, by content where it is in folders: the path of an adapter says little."""
        files = [
            sha256_of(Path(adapter, name)) if Path(adapter).is_dir() else adapter
            for adapter in self.adapters
            for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)
        ]
        return {"base": self.base, "adapters": files}

    def load(self, options: Any) -> tuple[Any, Any]:
        """The model, as one with hypotheses whatever it is, and the tokenizer.

        Args:
            options: `dtype`, `load_in_4bit`, `use_bnb_nested_quant` and `load_in_8bit` of the base model.
        """
        if len(self.adapters) == 1 and _is_mcl(self.adapters[0]):
            model = load_model(self.adapters[0], options)
            return model, load_tokenizer(self.adapters[0], model)
        base = AutoModelForCausalLM.from_pretrained(self.base, **base_options(options))
        if not self.adapters:
            # An adapter that was not trained adds nothing, to the bit.
            config = MCLoraConfig(
                num_hypotheses=1,
                r=1,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
                base_model_name_or_path=self.base,
            )
            model = get_peft_model(base, config).eval()
            return model, load_tokenizer(self.base, model)
        with tempfile.TemporaryDirectory() as scratch:
            plain = [
                str(export_hypotheses(adapter, Path(scratch, str(place)))[0]) if _is_mcl(adapter) else adapter
                for place, adapter in enumerate(self.adapters)
            ]
            model = from_lora_adapters(base, plain).eval()
        return model, load_tokenizer(self.adapters[0], model)


def contender(name: str, adapters: list[str], base: str | None = None) -> Contender:
    """Look at the configurations of adapters, without loading a model.

    Args:
        name: Its name in the results.
        adapters: See [`Contender`].
        base: The base model, where there are no adapters.

    Raises:
        ValueError: An adapter cannot be found or used, or has several hypotheses where it stands beside others.
    """
    if not adapters:
        if base is None:
            raise ValueError(f"`contenders`: {name!r} needs an adapter beside it, whose base model it is.")
        return Contender(name, (), base, 1, (1.0,))
    found = []
    for adapter in adapters:
        try:
            source = SavedAdapter.find(adapter)
            config = source.read_config()
            if Path(adapter).is_dir() and not Path(adapter, SAFETENSORS_WEIGHTS_NAME).is_file():
                raise ValueError(f"There is no {SAFETENSORS_WEIGHTS_NAME} in {adapter}.")
        except ValueError as error:
            raise ValueError(f"`contenders`: {name!r} cannot be used: {error}") from error
        count = config.num_hypotheses if isinstance(config, MCLoraConfig) else 1
        problems = [] if isinstance(config, MCLoraConfig) else not_plain_lora(adapter, config)
        if len(adapters) > 1 and count > 1:
            problems.append(f"{adapter} has {count} hypotheses; side by side stand adapters with one each")
        if problems:
            raise ValueError(f"`contenders`: {name!r} cannot be used: {'; '.join(problems)}.")
        found.append(config)
    count = found[0].num_hypotheses if len(found) == 1 and isinstance(found[0], MCLoraConfig) else len(found)
    weights = getattr(found[0], "hypothesis_weights", None) if len(found) == 1 else None
    shares = [1 / count] * count if weights is None else [weight / sum(weights) for weight in weights]
    return Contender(name, tuple(adapters), found[0].base_model_name_or_path, count, tuple(shares))


def parse_contenders(texts: list[str], base: str | None = None) -> list[Contender]:
    """Contenders from `NAME=PATH`, `NAME=PATH,PATH` (side by side) or `base`; a name given again is another seed of it.

    Raises:
        ValueError: As for `contender`, or a text has another form.
    """
    found: list[Contender] = []
    for text in texts:
        name, given, paths = text.partition("=")
        adapters = [path for path in paths.split(",") if path]
        if text != BASE and not (name and given and adapters):
            raise ValueError(f"`contenders`: {text!r} is not NAME=PATH, NAME=PATH,PATH or {BASE!r}.")
        base = base or next((one.base for one in found), None)
        found.append(contender(name, adapters, base))
    return found


def _is_mcl(adapter: str) -> bool:
    return isinstance(SavedAdapter.find(adapter).read_config(), MCLoraConfig)
