"""The model card of an adapter: what it is, how to load it, and what is known of its training.

A card ends in a signature, a comment with hashes of what was written. As long as the signature is right nobody has edited
the card and it may be written anew; once it is not, the card belongs to the user and is left alone.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from peft_mcl.version import __version__


if TYPE_CHECKING:
    from peft_mcl.config import MCLoraConfig


CARD_NAME = "README.md"
TAGS = ("lora-mcl", "mclora", "peft-mcl")
# PEFT writes these into every card that it finds where it saves an adapter, whoever wrote it.
KEYS_OF_PEFT = ("base_model", "library_name", "tags")
PIPELINES = {"CAUSAL_LM": "text-generation"}
LICENSE_KEYS = ("license", "license_name", "license_link")
LONGEST_CELL = 300

_SIGNATURE = re.compile(r"<!-- Written by peft-mcl.*Signature: (\w+) (\w+) -->\s*")
_CITATION = """```bibtex
@article{letzelter2025multiple,
  title   = {Multiple Choice Learning of Low-Rank Adapters for Language Modeling},
  author  = {Letzelter, Victor and Malard, Hugo and others},
  journal = {arXiv preprint arXiv:2507.10419},
  year    = {2025}
}
```"""


@dataclass
class CardFigures:
    """How the hypotheses did on some sequences.

    Args:
        metrics (`dict[str, float]`): `wta_nll`, `mixture_nll`, `mean_nll` and `worst_nll` in nats for each supervised token,
            and `win_share/k`. What is missing is left out.
        num_sequences (`int`): How many sequences that was.
        tokens_per_sequence (`float`): Supervised tokens of a sequence, on average.
    """

    metrics: Mapping[str, float]
    num_sequences: int
    tokens_per_sequence: float


@dataclass
class TrainingFacts:
    """What only the one who trained an adapter knows. Everything may be left out.

    Args:
        dataset (`str`, *optional*): Hub id or path of the training data.
        settings (`dict`): Name -> value of the objective and its settings.
        figures (`dict[str, CardFigures]`): What was measured, by the name of the data.
        examples (`list` of `(str, list[str])`): Prompts, each with the continuations of the K hypotheses.
        license (`dict[str, str]`): `license`, `license_name` and `license_link` of the card's metadata.
        tags (`list[str]`): More tags.
        versions (`dict[str, str]`): Library -> version, besides PEFT, transformers, torch and this package.
    """

    dataset: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, CardFigures] = field(default_factory=dict)
    examples: Sequence[tuple[str, Sequence[str]]] = ()
    license: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def create_model_card(
    adapter: Any,
    repo_id: str | None = None,
    title: str | None = None,
    facts: TrainingFacts | None = None,
    exported: bool = False,
    adapter_name: str = "default",
) -> ModelCard:
    """Write the card of an MCLORA adapter, trained here or elsewhere.

    `card.push_to_hub("user/name")` puts it on the Hub, before or after `model.push_to_hub("user/name")`, which leaves a card
    that it finds there alone; [`write_model_card`] puts it into a folder.

    Args:
        adapter ([`peft.PeftModel`] or [`MCLoraConfig`]): The adapter.
        repo_id (`str`, *optional*): Its name on the Hub, for the code on the card.
        title (`str`, *optional*): The title; the name on the Hub by default.
        facts ([`TrainingFacts`], *optional*): What is known of its training.
        exported (`bool`): Whether the folders `hypothesis_k` of `export_hypotheses` lie beside it.
        adapter_name (`str`): Which adapter of the model.

    Returns:
        [`~huggingface_hub.ModelCard`]: Valid metadata and the text. A base model that is a local folder is not in the
        metadata, which takes Hub ids only. There is a licence only if `facts` give one.

    Raises:
        ValueError: There is no MCLORA adapter of that name.
    """
    config: Any = adapter.peft_config.get(adapter_name) if hasattr(adapter, "peft_config") else adapter
    if not hasattr(config, "num_hypotheses"):
        raise ValueError(
            f"`adapter` has no MCLORA adapter named {adapter_name!r}: it is a {type(adapter).__name__}. Pass a model made by "
            "`get_peft_model(model, MCLoraConfig(...))`, or its configuration."
        )
    facts = facts or TrainingFacts()
    sections = [
        _head(config, title or (repo_id or "").split("/")[-1] or "LoRA-MCL adapter"),
        _how_to_load(config, repo_id),
        _how_to_use_one(repo_id, exported, config),
        _adapter(config),
        _training(facts),
        *(_results(facts.figures, config.num_hypotheses) if facts.figures else ()),
        *(_examples(facts.examples, config.num_hypotheses) if facts.examples else ()),
        _limits(config),
        _license(config, facts.license),
        "## Citation\n\n" + _CITATION,
        _versions(facts.versions),
    ]
    dataset = hub_id(facts.dataset)
    stated: dict[str, Any] = {key: value for key, value in facts.license.items() if key in LICENSE_KEYS}
    metadata = ModelCardData(
        base_model=hub_id(config.base_model_name_or_path),
        library_name="peft",
        pipeline_tag=PIPELINES.get(_task(config)),
        datasets=[dataset] if dataset else None,
        tags=sorted({*TAGS, *facts.tags}),
        **stated,
    )
    card = ModelCard(
        f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"
    )
    _sign(card)
    return card


def write_model_card(card: ModelCard, directory: str | os.PathLike[str]) -> bool:
    """Write `directory/README.md`, whole or not at all, unless there is one that somebody has edited.

    A card with metadata but without text (as the Hub's page for new repositories makes it), and the blank form that PEFT
    leaves, are filled in. Metadata that are there stay, but for those that the new card has of the base model, the data set
    and the library; tags are joined.

    Returns:
        `bool`: Whether it was written.
    """
    path = Path(directory, CARD_NAME)
    found = load_card(path)
    if path.is_file() and (found is None or is_edited(found)):
        return False
    if found is not None:
        new, old = card.data.to_dict(), found.data.to_dict()
        known = {key: value for key, value in old.items() if key not in (*KEYS_OF_PEFT, "datasets")}
        metadata = {
            "datasets": old.get("datasets"),
            "base_model": hub_id(old["base_model"]) if isinstance(old.get("base_model"), str) else None,
            **new,
            **known,
            "tags": sorted({*new["tags"], *_own_tags(found)}),
        }
        card = ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n{card.text}")
        _sign(card)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, str(card))
    return True


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_edited(card: ModelCard, after_peft: bool = False) -> bool:
    """Whether a card is the work of a user: neither blank nor as this package wrote it.

    Args:
        card ([`~huggingface_hub.ModelCard`]): The card.
        after_peft (`bool`): Do not count what PEFT changes in a card when it saves an adapter beside it.
    """
    return not _is_blank(card) and not is_as_written(card, after_peft)


def is_as_written(card: ModelCard, after_peft: bool = False) -> bool:
    """Whether this package wrote a card and nobody has edited it since; `after_peft` as for [`is_edited`]."""
    signature, hashes = _signature_of(card), _hashes(card)
    return signature is not None and (signature[0] == hashes[0] if after_peft else signature == hashes)


def load_card(path: str | os.PathLike[str]) -> ModelCard | None:
    """The card in a file; None if there is none or it cannot be read."""
    if not os.path.isfile(path):
        return None
    try:
        return ModelCard(Path(path).read_text(encoding="utf-8"))
    except Exception:
        # Bytes that are no text, metadata that are no YAML: the parser raises what it likes.
        return None


def replace_card_of_peft(directory: str | os.PathLike[str], config: MCLoraConfig) -> None:
    """After PEFT saved an adapter: put a card in place of its blank form, and its tags beside those of other cards."""
    path = Path(directory, CARD_NAME)
    found = load_card(path)
    if found is None or is_edited(found, after_peft=True):
        return
    if _signature_of(found) is None:
        write_model_card(create_model_card(config, exported=Path(directory, "hypothesis_0").is_dir()), directory)
        return
    # It may tell more than the configuration does: only what PEFT wrote over is set right.
    found.data["tags"] = sorted({*TAGS, *_own_tags(found)})
    found.data["base_model"] = hub_id(config.base_model_name_or_path)
    _sign(found)
    write_text(path, str(found))


def base_license(base_model: str | None, token: str | bool | None = None) -> dict[str, str]:
    """The licence that the card of a base model states: of a local folder, or of a repository on the Hub.

    Returns:
        `dict[str, str]`: Those of `license`, `license_name` and `license_link` that it has; empty if there is no such card, or
        no way to reach it.
    """
    if not base_model:
        return {}
    path = Path(base_model, CARD_NAME)
    if not os.path.isdir(base_model):
        try:
            path = Path(hf_hub_download(base_model, CARD_NAME, token=token))
        except (OSError, ValueError):  # Those of the Hub client are OSErrors, too.
            return {}
    card = load_card(path)
    found = {key: card.data.get(key) for key in LICENSE_KEYS} if card else {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


# ----------------------------------------------------------------------------------------------------------------
# Sections


def _head(config: MCLoraConfig, title: str) -> str:
    base = hub_id(config.base_model_name_or_path)
    named = f"[{base}](https://huggingface.co/{base})" if base else "its base model"
    return (
        f"# {_one_line(title)}\n\n"
        "> **To load this adapter, install the package `peft-mcl` and `import peft_mcl` first.** It has the PEFT type MCLORA, "
        "which PEFT alone does not know: without the import, loading stops with `KeyError: 'MCLORA'`.\n\n"
        f"{config.num_hypotheses} LoRA {'hypothesis' if config.num_hypotheses == 1 else 'hypotheses'} on {named} (LoRA-MCL, "
        "[arXiv 2507.10419](https://arxiv.org/abs/2507.10419)): hypotheses compete for every training sequence, and each "
        "decodes its own answer to a prompt."
    )


def _how_to_load(config: MCLoraConfig, repo_id: str | None) -> str:
    name = repo_id or "path/or/hub-id/of/this/adapter"
    tokenizer = hub_id(config.base_model_name_or_path) or "path/to/the/base/model"
    if hub_id(config.base_model_name_or_path) and _task(config) == "CAUSAL_LM":
        classes, load = "AutoPeftModelForCausalLM", f'AutoPeftModelForCausalLM.from_pretrained("{name}")'
        imports = "from transformers import AutoTokenizer"
    else:
        auto = "AutoModelForSeq2SeqLM" if _task(config) == "SEQ_2_SEQ_LM" else "AutoModelForCausalLM"
        classes, load = "PeftModel", f'PeftModel.from_pretrained({auto}.from_pretrained("{tokenizer}"), "{name}")'
        imports = f"from transformers import {auto}, AutoTokenizer"
    return f"""## How to load it

```python
import peft_mcl  # registers the adapter type
from peft import {classes}
{imports}

model = {load}
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
inputs = tokenizer("A prompt", return_tensors="pt")
answers = model.generate(**inputs, max_new_tokens=40)  # {config.num_hypotheses} sequences: row k is hypothesis k
model.generate(**inputs, max_new_tokens=40, hypotheses=0)  # one of them
```"""


def _how_to_use_one(repo_id: str | None, exported: bool, config: MCLoraConfig) -> str:
    name, last = repo_id or "path/or/hub-id/of/this/adapter", config.num_hypotheses - 1
    intro = "## One hypothesis without peft-mcl\n\n"
    if exported:
        return intro + (
            f"The folders `hypothesis_0` to `hypothesis_{last}` hold ordinary LoRA adapters:\n\n"
            f'```python\nPeftModel.from_pretrained(base_model, "{name}", subfolder="hypothesis_0")\n```'
        )
    return intro + (
        "Export them once; each then is an ordinary LoRA adapter for PEFT, vLLM, SGLang or LoRAX:\n\n"
        "```python\n"
        f'peft_mcl.export_hypotheses(model, "exported")  # exported/hypothesis_0 to exported/hypothesis_{last}\n'
        'PeftModel.from_pretrained(base_model, "exported/hypothesis_0")  # in a process without peft_mcl\n'
        "```\n\n"
        "`model.merge_and_unload(hypothesis=0)` gives a plain transformers model."
    )


def _adapter(config: MCLoraConfig) -> str:
    base = config.base_model_name_or_path
    rows = {
        "base model": _name_of(base, "https://huggingface.co") if base else "not recorded",
        "hypotheses (K)": config.num_hypotheses,
        "rank, alpha, dropout": f"{config.r}, {config.lora_alpha}, {config.lora_dropout}"
        + (" (rank-stabilised)" if config.use_rslora else ""),
        "adapted modules": _targets(config.target_modules),
    }
    if config.shared_r:
        rows["rank of the part that all hypotheses share"] = (
            f"{config.shared_r} (exported: {config.shared_r} more than r)"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name):
            rows[name.replace("_", " ")] = f"`{json.dumps(getattr(config, name))}`"
    shared = [*(config.modules_to_save or ())]
    shared += ["biases"] if config.bias != "none" else []
    shared += ["some token embeddings"] if config.trainable_token_indices else []
    if shared:
        rows["trained in full, shared by all hypotheses"] = ", ".join(shared)
    return "## The adapter\n\n" + _table(["", ""], [[name, str(value)] for name, value in rows.items()])


def _training(facts: TrainingFacts) -> str:
    rows = {}
    if facts.dataset:
        rows["data set"] = _name_of(facts.dataset, "https://huggingface.co/datasets")
    rows.update({f"`{name}`": f"`{value}`" for name, value in facts.settings.items()})
    if not rows:
        return ""
    return "## Training\n\n" + _table(["", ""], [[name, value] for name, value in rows.items()])


def _results(figures: Mapping[str, CardFigures], num_hypotheses: int) -> list[str]:
    labels = {
        "wta_nll": "best hypothesis of each sequence (`wta_nll`)",
        "mixture_nll": "mixture of the hypotheses by win share (`mixture_nll`)",
        "mean_nll": "mean of the hypotheses (`mean_nll`)",
        "worst_nll": "worst hypothesis of each sequence (`worst_nll`)",
    }
    rows = [
        [label, *(_number(figure.metrics.get(name)) for figure in figures.values())] for name, label in labels.items()
    ]
    free = math.log(num_hypotheses)
    if num_hypotheses > 1:
        lines = [
            figure.metrics.get("wta_nll", math.nan) + free / max(figure.tokens_per_sequence, 1e-9)
            for figure in figures.values()
        ]
        rows.append([f"**log K line: `wta_nll` + log {num_hypotheses} per sequence**", *map(_number, lines)])
    for k in range(num_hypotheses):
        rows.append(
            [f"win share of hypothesis {k}", *(_number(f.metrics.get(f"win_share/{k}")) for f in figures.values())]
        )
    heads = [f"{name}, {figure.num_sequences} sequences" for name, figure in figures.items()]
    table = "## Results\n\nNats for each supervised token.\n\n" + _table(["", *heads], rows)
    if num_hypotheses == 1:
        return [table]
    tokens = "; ".join(
        f"{_number(free / max(figure.tokens_per_sequence, 1e-9))} nats per token on {name} "
        f"({figure.tokens_per_sequence:.1f} supervised tokens per sequence)"
        for name, figure in figures.items()
    )
    return [
        table,
        f"**A low best-of-{num_hypotheses} loss alone proves nothing.** Any balanced split of the data in {num_hypotheses} "
        f"parts takes log {num_hypotheses} = {free:.3f} nats off the loss of each sequence for free: {tokens}. The "
        "hypotheses have found more than such a split only if the loss of a single LoRA lies above the log K line.",
    ]


def _examples(examples: Sequence[tuple[str, Sequence[str]]], num_hypotheses: int) -> list[str]:
    heads = ["prompt", *(f"hypothesis {k}" for k in range(num_hypotheses))]
    rows = [[_cell(prompt), *map(_cell, continuations)] for prompt, continuations in examples]
    return ["## Examples\n\nGreedy continuations of a few prompts, not chosen by hand.\n\n" + _table(heads, rows)]


def _limits(config: MCLoraConfig) -> str:
    items = [
        "Hypotheses are not ranked: each is one plausible answer, and nothing says which one is right for an input.",
        "What a hypothesis stands for is what the data made of it; hypothesis 0 of another training run is another one.",
        "The limits and biases of the base model remain.",
    ]
    if not hub_id(config.base_model_name_or_path):
        items.append("The base model is not named by a Hub id, so it has to be given when the adapter is loaded.")
    return "## Limits\n\n" + "\n".join(f"- {item}" for item in items)


def _license(config: MCLoraConfig, license: Mapping[str, str]) -> str:
    if not license:
        return "## Licence\n\nNot stated here. Mind that of the base model."
    name = license.get("license_name") or license.get("license")
    link = f" ({license['license_link']})" if "license_link" in license else ""
    return f"## Licence\n\nThe base model's is {name}{link}."


def _versions(versions: Mapping[str, str]) -> str:
    known = {"Transformers": transformers.__version__, "PyTorch": torch.__version__, "peft-mcl": __version__}
    # The heading and the first line are what PEFT looks for, and would add.
    lines = [f"- PEFT {peft.__version__}", *(f"- {name} {version}" for name, version in {**known, **versions}.items())]
    return "### Framework versions\n\n" + "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------
# Words and cells


def hub_id(name: str | None) -> str | None:
    """`name` if it can be the id of a repository on the Hub, None for a path."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _name_of(name: str, site: str) -> str:
    """A link to the Hub, or the last part of a path: the rest of it is nobody's business."""
    if hub_id(name):
        return f"[{name}]({site}/{name})"
    return f"`{Path(name).name}` (a local path)"


def _task(config: MCLoraConfig) -> str:
    # A member of an enum, or its value.
    return str(getattr(config.task_type, "value", config.task_type))


def _targets(targets: Any) -> str:
    if targets is None:
        return "the default of the architecture"
    if isinstance(targets, str):
        return "all linear layers" if targets == "all-linear" else f"`{targets}`"
    kinds = sorted({name.split(".")[-1] for name in targets})
    count = f" ({len(targets)} modules)" if len(targets) > len(kinds) else ""
    return ", ".join(f"`{kind}`" for kind in kinds) + count


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    """Text of a data set or a model as it is, in one cell of a table."""
    text = text.strip()
    text = text if len(text) <= LONGEST_CELL else text[:LONGEST_CELL] + "…"
    text = html.escape(text, quote=False)
    text = re.sub(r"([\\`*_\[\]|])", r"\\\1", text)
    return re.sub(r"\s*\n\s*", "<br>", text)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ----------------------------------------------------------------------------------------------------------------
# Signature


def _own_tags(card: ModelCard) -> set[str]:
    """The tags of a card but for those of PEFT that name the base model, by its path on this machine perhaps."""
    return {tag for tag in card.data.get("tags", ()) if not tag.startswith("base_model:")}


def _is_blank(card: ModelCard) -> bool:
    """Whether a card has no text, or only that of the blank form that PEFT and huggingface_hub write."""
    form = _lines(ModelCard.from_template(ModelCardData()).text)
    return _lines(card.text) in ([], form, [*form, "### Framework versions"])


def _lines(text: str) -> list[str]:
    """The lines of a text without what PEFT adds to it and without the signature."""
    lines = [line.strip() for line in _SIGNATURE.sub("", text).splitlines()]
    return [line for line in lines if line and not line.startswith("- PEFT ")]


def _hashes(card: ModelCard) -> tuple[str, str]:
    metadata = card.data.to_dict()
    of_peft = {key: metadata.pop(key) for key in KEYS_OF_PEFT if key in metadata}
    core = _hash([_lines(card.text), metadata])
    return core, _hash([core, of_peft])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _signature_of(card: ModelCard) -> tuple[str, str] | None:
    match = _SIGNATURE.search(card.text)
    return (match[1], match[2]) if match else None


def _sign(card: ModelCard) -> None:
    core, whole = _hashes(card)
    text = _SIGNATURE.sub("", card.text).rstrip()
    card.text = (
        f"{text}\n\n<!-- Written by peft-mcl, and written anew until you edit it. Signature: {core} {whole} -->\n"
    )
