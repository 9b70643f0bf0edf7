"""MCLoraConfig: its defaults, what it refuses, and its way to disk and back."""

import copy
import json
import pickle

import numpy as np
import pytest
from peft import LoraConfig, PeftConfig, PeftType

from peft_mcl import MCLoraConfig


def test_defaults():
    config = MCLoraConfig()
    assert config.peft_type is PeftType.MCLORA
    assert (config.num_hypotheses, config.r, config.lora_alpha, config.lora_dropout) == (3, 8, 8, 0.0)
    assert config.use_rslora is False
    assert config.init_lora_weights is True
    assert config.bias == "none"
    assert config.rank_pattern == config.alpha_pattern == {}
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
        assert getattr(config, name) is None


def test_shared_options_have_the_defaults_of_lora():
    ours, lora = MCLoraConfig().to_dict(), LoraConfig().to_dict()
    different = {name for name in ours.keys() & lora.keys() if ours[name] != lora[name]}
    assert different == {"peft_type"}
    assert ours.keys() - lora.keys() == {
        "num_hypotheses", "shared_r", "init_perturbation", "hypothesis_weights", "requires"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hypotheses": 0}, "`num_hypotheses` must be an integer of at least 1, got 0"),
        ({"num_hypotheses": -2}, "`num_hypotheses` must be an integer of at least 1, got -2"),
        ({"num_hypotheses": 2.0}, "`num_hypotheses` must be an integer of at least 1, got 2.0"),
        ({"num_hypotheses": "3"}, "`num_hypotheses` must be an integer of at least 1, got '3'"),
        ({"num_hypotheses": True}, "`num_hypotheses` must be an integer of at least 1, got True"),
        ({"num_hypotheses": None}, "`num_hypotheses` must be an integer of at least 1, got None"),
        ({"num_hypotheses": np.float32(2)}, "`num_hypotheses` must be an integer of at least 1"),
        ({"r": 0}, "`r` must be an integer of at least 1, got 0"),
        ({"r": -1}, "`r` must be an integer of at least 1, got -1"),
        ({"r": 4.5}, "`r` must be an integer of at least 1, got 4.5"),
        ({"shared_r": -1}, "`shared_r` must be an integer of at least 0, got -1"),
        ({"shared_r": True}, "`shared_r` must be an integer of at least 0, got True"),
        ({"shared_r": 2.0}, "`shared_r` must be an integer of at least 0, got 2.0"),
        ({"shared_r": None}, "`shared_r` must be an integer of at least 0, got None"),
        ({"init_perturbation": -0.1}, "`init_perturbation` must be a number of at least 0, or None, got -0.1"),
        ({"init_perturbation": float("nan")}, "`init_perturbation` must be a number of at least 0, or None, got nan"),
        ({"init_perturbation": "0.1"}, "`init_perturbation` must be a number of at least 0, or None, got '0.1'"),
        ({"init_perturbation": True}, "`init_perturbation` must be a number of at least 0, or None, got True"),
        (
            {"hypothesis_weights": [1.0, 2.0]},
            "`hypothesis_weights` must be a list of 3 numbers of at least 0, not all of them 0",
        ),
        ({"hypothesis_weights": [1.0, 2.0, -1.0]}, r"`hypothesis_weights` .* got \[1.0, 2.0, -1.0\]"),
        ({"hypothesis_weights": [0, 0, 0]}, r"`hypothesis_weights` .* got \[0, 0, 0\]"),
        ({"hypothesis_weights": [1, 1, float("inf")]}, "`hypothesis_weights` must be a list of 3 numbers"),
        ({"hypothesis_weights": [1, 1, True]}, "`hypothesis_weights` must be a list of 3 numbers"),
        ({"hypothesis_weights": "abc"}, "`hypothesis_weights` must be a list of 3 numbers"),
        ({"rank_pattern": {"q_proj": 0}}, r"`rank_pattern\['q_proj'\]` must be an integer of at least 1, got 0"),
        ({"alpha_pattern": {"q_proj": "1"}}, r"`alpha_pattern\['q_proj'\]` must be a number, got '1'"),
        ({"lora_alpha": "16"}, "`lora_alpha` must be a number, got '16'"),
        ({"lora_alpha": float("nan")}, "`lora_alpha` must be a number, got nan"),
        ({"lora_alpha": None}, "`lora_alpha` must be a number, got None"),
        ({"lora_dropout": -0.1}, r"`lora_dropout` must be a probability in \[0, 1\), got -0.1"),
        ({"lora_dropout": 1.0}, r"`lora_dropout` must be a probability in \[0, 1\), got 1.0"),
        ({"lora_dropout": float("nan")}, r"`lora_dropout` must be a probability in \[0, 1\), got nan"),
        ({"lora_dropout": "0.1"}, r"`lora_dropout` must be a probability in \[0, 1\), got '0.1'"),
        ({"lora_dropout": None}, r"`lora_dropout` must be a probability in \[0, 1\), got None"),
        ({"lora_dropout": True}, r"`lora_dropout` must be a probability in \[0, 1\), got True"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` must be True, False or 'gaussian', got 'pissa'"),
        ({"init_lora_weights": None}, "`init_lora_weights` must be True, False or 'gaussian', got None"),
        ({"bias": "some"}, "`bias` must be 'none', 'all' or 'lora_only', got 'some'"),
        ({"bias": True}, "`bias` must be 'none', 'all' or 'lora_only', got True"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [0]},
            r"`layers_to_transform` cannot be used when `target_modules` is a regular expression \('.\*q_proj'\)",
        ),
        (
            {"target_modules": ".*q_proj", "layers_pattern": "layers"},
            "`layers_pattern` cannot be used when `target_modules` is a regular expression",
        ),
        (
            {"target_modules": ["q_proj"], "layers_pattern": "layers"},
            "`layers_pattern` needs `layers_to_transform`: the indices of the layers to adapt",
        ),
    ],
    ids=str,
)
def test_bad_value(options, message):
    with pytest.raises(ValueError, match=message):
        MCLoraConfig(**options)


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="num_heads"):
        MCLoraConfig(num_heads=3)


def test_names_become_sets():
    config = MCLoraConfig(target_modules=["q_proj", "v_proj", "q_proj"], exclude_modules=["v_proj"])
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.exclude_modules == {"v_proj"}
    assert MCLoraConfig(target_modules="all-linear").target_modules == "all-linear"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["v_proj", "q_proj"], "exclude_modules": ["lm_head"], "layers_to_transform": [0, 2]},
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": ".*0.*", "task_type": "CAUSAL_LM"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 0.5}, "lora_alpha": 0.25, "use_rslora": True},
        {"modules_to_save": ["lm_head"], "bias": "lora_only", "init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}, "target_modules": ["q_proj"], "num_hypotheses": 1},
    ],
    ids=str,
)
def test_round_trip(tmp_path, options):
    config = MCLoraConfig(**{"num_hypotheses": 4, "r": 3, **options})
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "MCLORA"
    assert written["num_hypotheses"] == config.num_hypotheses
    for found in (
        PeftConfig.from_pretrained(str(tmp_path)),
        MCLoraConfig.from_pretrained(str(tmp_path)),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        # A saved adapter is loaded for inference unless one asks for training.
        assert {**found.to_dict(), "inference_mode": None} == {**config.to_dict(), "inference_mode": None}
        assert type(found) is MCLoraConfig


def test_a_bad_value_on_disk_is_refused(tmp_path):
    MCLoraConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"num_hypotheses": 3', '"num_hypotheses": 0'))
    with pytest.raises(ValueError, match="`num_hypotheses` must be an integer of at least 1, got 0"):
        PeftConfig.from_pretrained(str(tmp_path))
