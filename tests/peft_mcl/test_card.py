"""The model card: what it says, where it is written, and that it never replaces what somebody wrote."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, metadata_load
from peft import LoraConfig, get_peft_model

from peft_mcl import CardFigures, MCLoraConfig, TrainingFacts, create_model_card, write_model_card
from peft_mcl.card import base_license, is_as_written, is_edited
from tests.tiny import tiny_llama, tiny_t5, with_hypotheses


def config(**options) -> MCLoraConfig:
    defaults = {"num_hypotheses": 3, "base_model_name_or_path": "user/base", "task_type": "CAUSAL_LM"}
    return MCLoraConfig(**{**defaults, **options})


# --- what it says ---


def test_a_card_of_a_model_that_was_not_trained_here(hub):
    model = with_hypotheses(tiny_llama(), modules_to_save=["lm_head"])
    model.peft_config["default"].base_model_name_or_path = "user/base"
    facts = TrainingFacts(dataset="user/data", license={"license": "mit"}, tags=["poetry"])
    model.push_to_hub("user/by-function")
    create_model_card(model, repo_id="user/by-function", facts=facts).push_to_hub("user/by-function")
    # PEFT keeps the card that it finds there.
    other = with_hypotheses(tiny_llama(), seed=9)
    other.push_to_hub("user/by-function", commit_message="Again")
    assert hub.messages("user/by-function")[-1] == "Again"
    card = ModelCard.load("user/by-function")
    card.validate()
    assert is_as_written(card)
    assert card.data.to_dict() == {
        "base_model": "user/base",
        "datasets": ["user/data"],
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["lora-mcl", "mclora", "peft-mcl", "poetry"],
    }
    assert HfApi().model_info("user/by-function").card_data.base_model == "user/base"
    assert "| trained in full, shared by all hypotheses | lm_head |" in card.text
    assert "arXiv:2507.10419" in card.text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "all-linear"}, "all linear layers"),
        ({"target_modules": r".*\.q_proj"}, r"`.*\.q_proj`"),
        ({"target_modules": ["a.q_proj", "b.q_proj", "b.v_proj"]}, "`q_proj`, `v_proj` (3 modules)"),
        ({"target_modules": ["v_proj"]}, "| `v_proj` |"),
        ({}, "the default of the architecture"),
        ({"rank_pattern": {"q_proj": 2}}, '`{"q_proj": 2}`'),
        ({"use_rslora": True}, "rank-stabilised"),
        ({"shared_r": 5}, "| rank of the part that all hypotheses share | 5 (exported: 5 more than r) |"),
        ({"bias": "all"}, "biases"),
        ({"num_hypotheses": 1}, "1 LoRA hypothesis on"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "AutoModelForSeq2SeqLM.from_pretrained"),
    ],
)
def test_options_of_the_adapter(options, expected):
    assert expected in create_model_card(config(**options)).text


@pytest.mark.parametrize("name", ["/data/models/secret-project", "./models/tiny", None, "models/of/mine"])
def test_a_base_model_without_a_hub_id(name):
    card = create_model_card(config(base_model_name_or_path=name))
    assert "base_model" not in card.data.to_dict()
    assert "/data" not in str(card)
    assert "has to be given when the adapter is loaded" in card.text


def test_a_base_model_that_exists_as_a_folder_has_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "base").mkdir(parents=True)
    assert "base_model" not in create_model_card(config()).data.to_dict()


def test_the_log_k_line():
    figures = {"test": CardFigures({"wta_nll": 2.0, "mean_nll": 2.5, "win_share/0": 0.25}, 10, 20.0)}
    text = create_model_card(config(num_hypotheses=4), facts=TrainingFacts(figures=figures)).text
    assert f"| **log K line: `wta_nll` + log 4 per sequence** | {2.0 + math.log(4) / 20:.4g} |" in text
    assert "log 4 = 1.386 nats off the loss of each sequence for free: 0.06931 nats per token on test" in text
    assert "| win share of hypothesis 0 | 0.25 |" in text
    assert "log K" not in create_model_card(config(num_hypotheses=1), facts=TrainingFacts(figures=figures)).text


def test_texts_of_data_and_models_stay_in_their_cells():
    wild = "a | b\n\n---\n# c <script>alert(1)</script> `d` [e](f) *g* " + "x" * 500
    examples = [(wild, [wild, "", wild])]
    text = create_model_card(config(), facts=TrainingFacts(examples=examples)).text
    section = text.split("## Examples")[1].split("## Limits")[0]
    row = next(line for line in section.splitlines() if line.startswith("| a"))
    assert len(row.replace(r"\|", "").split("|")) == 6
    assert "<script>" not in text
    assert len(row) < 1500


def test_what_is_no_adapter():
    lora = get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM"))
    for wrong in (lora, LoraConfig(), tiny_llama()):
        with pytest.raises(ValueError, match="`adapter` has no MCLORA adapter named 'default'"):
            create_model_card(wrong)
    with pytest.raises(ValueError, match="no MCLORA adapter named 'other'"):
        create_model_card(with_hypotheses(tiny_llama()), adapter_name="other")


# --- saving ---


def test_peft_saves_with_our_card(tmp_path):
    model = with_hypotheses(tiny_llama())
    model.base_model.model.name_or_path = "user/base"
    model.save_pretrained(tmp_path)
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata["base_model"] == "user/base"
    assert {"lora-mcl", "peft-mcl"} <= set(metadata["tags"])
    text = (tmp_path / "README.md").read_text()
    assert "More Information Needed" not in text
    assert "import peft_mcl" in text
    assert json.loads((tmp_path / "adapter_config.json").read_text())["requires"]
    # Again, and with a card that tells more: PEFT changes its metadata, which are set right.
    facts = TrainingFacts(settings={"objective": "wta"}, tags=["poetry"])
    write_model_card(create_model_card(model, facts=facts), tmp_path)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert "`wta`" in card.text
        assert not is_edited(card)
        assert "lora-mcl" in card.data.tags


def test_a_local_base_model_is_not_in_the_card_that_peft_saves(tmp_path):
    model = with_hypotheses(tiny_llama())
    model.base_model.model.config._name_or_path = model.base_model.model.name_or_path = str(tmp_path)
    for _ in range(2):
        model.save_pretrained(tmp_path / "out")
        assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def test_a_configuration_alone_is_saved_without_a_card(tmp_path):
    config().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_an_encoder_and_decoder(tmp_path):
    with_hypotheses(tiny_t5()).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "AutoModelForSeq2SeqLM" in card.text


# --- cards that somebody wrote ---

MINE = "---\nlicense: mit\n---\n# Mine\n"


@pytest.mark.parametrize("edit", ["text", "license", "tag", "removed signature"])
def test_an_edited_card_is_not_overwritten(tmp_path, edit):
    card = create_model_card(config())
    assert write_model_card(card, tmp_path)
    path = tmp_path / "README.md"
    assert write_model_card(card, tmp_path), "as it was written"
    edits = {
        "text": ("## Limits", "## No limits"),
        "license": ("library_name", "license: mit\nlibrary_name"),
        "tag": ("- lora-mcl", "- lora-mcl\n- mine"),
        "removed signature": ("Signature", "Signed"),
    }
    text = path.read_text().replace(*edits[edit])
    path.write_text(text)
    assert not write_model_card(card, tmp_path)
    assert path.read_text() == text
    if edit != "tag":  # Which PEFT replaces, whoever wrote it.
        with_hypotheses(tiny_llama()).save_pretrained(tmp_path)
        assert ModelCard.load(path).text.split("### Framework")[0] == ModelCard(text).text.split("### Framework")[0]


@pytest.mark.parametrize("text", [MINE, "---\ntags: [a\n---\n# Broken\n", "# Without metadata\n", b"\xff\xfe bytes"])
def test_a_card_of_somebody_else_is_not_overwritten(tmp_path, text):
    path = tmp_path / "README.md"
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(content)
    assert not write_model_card(create_model_card(config()), tmp_path)
    assert path.read_bytes() == content


def test_metadata_without_text_are_filled_in(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\nbase_model: user/named\ndatasets:\n- user/data\ntags:\n- mine\n---\n")
    for _ in range(2):  # The second time it finds its own card.
        assert write_model_card(create_model_card(config(base_model_name_or_path="/a/path")), tmp_path)
        metadata = yaml.safe_load(path.read_text().split("---")[1])
        assert (metadata["license"], metadata["base_model"], metadata["datasets"]) == (
            "mit",
            "user/named",
            ["user/data"],
        )
        assert {"mine", "lora-mcl"} <= set(metadata["tags"])
    # What is known now wins.
    write_model_card(create_model_card(config(), facts=TrainingFacts(dataset="user/other")), tmp_path)
    assert metadata_load(path)["base_model"] == "user/base"
    assert metadata_load(path)["datasets"] == ["user/other"]


# --- licences ---


def test_the_licence_of_a_base_model(hub, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: own\n---\n")
    assert base_license(str(tmp_path)) == {"license": "other", "license_name": "own"}
    HfApi().create_repo("user/licensed")
    ModelCard("---\nlicense: apache-2.0\n---\nA base.\n").push_to_hub("user/licensed")
    assert base_license("user/licensed") == {"license": "apache-2.0"}
    # No card, no such model, no name: nothing is invented.
    HfApi().create_repo("user/without-card")
    for name in ("user/without-card", "user/no-such-model", "not a name", None, ""):
        assert base_license(name) == {}
    card = create_model_card(config())
    assert "license" not in card.data.to_dict()
    assert "Not stated here" in card.text
