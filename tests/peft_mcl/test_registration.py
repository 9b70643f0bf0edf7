"""The peft type MCLORA: one member more in PEFT's enum, everything else as it was."""

import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import peft
import pytest
from peft import PeftConfig, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_mcl
from peft_mcl import MCLoraConfig, MCLoraModel
from peft_mcl.registration import add_peft_type


ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    """Run `code` in a fresh interpreter and return what it printed."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_type_is_a_member_of_the_enum():
    assert PeftType("MCLORA") is PeftType.MCLORA is PeftType["MCLORA"]
    assert PeftType.MCLORA == "MCLORA"
    assert PeftType.MCLORA.value == PeftType.MCLORA.name == "MCLORA"
    assert isinstance(PeftType.MCLORA, PeftType)
    assert PeftType.MCLORA in PeftType
    assert list(PeftType).count("MCLORA") == 1
    assert pickle.loads(pickle.dumps(PeftType.MCLORA)) is PeftType.MCLORA


def test_other_types_are_untouched():
    assert PeftType("LORA") is PeftType.LORA
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is peft.LoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is peft.LoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA] == "lora_"
    assert len({member.value for member in PeftType}) == len(PeftType)
    with pytest.raises(ValueError, match="NO_SUCH_TYPE"):
        PeftType("NO_SUCH_TYPE")


def test_adding_a_known_type_changes_nothing():
    members = list(PeftType)
    assert add_peft_type("LORA") is PeftType.LORA
    assert add_peft_type("MCLORA") is PeftType.MCLORA
    assert list(PeftType) == members


def test_method_is_registered():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MCLORA] is MCLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MCLORA] is MCLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.MCLORA] == "mclora_"


def test_registering_again_is_harmless():
    peft_mcl.register(MCLoraConfig, MCLoraModel)
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MCLORA] is MCLoraModel


def test_peft_finds_the_config(tmp_path):
    MCLoraConfig(num_hypotheses=5, target_modules=["q_proj"]).save_pretrained(tmp_path)
    found = PeftConfig.from_pretrained(str(tmp_path))
    assert type(found) is MCLoraConfig
    assert found.num_hypotheses == 5
    assert type(get_peft_config({"peft_type": "MCLORA", "num_hypotheses": 2})) is MCLoraConfig


# What every order of imports has to end in.
WORKS = """
    import pickle, torch, peft
    from peft import PeftConfig, PeftType, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    def works():
        import peft_mcl
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MCLORA] is peft_mcl.MCLoraConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MCLORA] is peft_mcl.MCLoraModel
        assert PeftType("MCLORA") is PeftType.MCLORA and PeftType("LORA") is PeftType.LORA
        assert [member.value for member in PeftType].count("MCLORA") == 1
        config = peft_mcl.MCLoraConfig(num_hypotheses=2, r=2, target_modules=["0"])
        assert pickle.loads(pickle.dumps(config)) == config
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), config)
        assert model(torch.ones(2, 3), hypotheses="all").shape == (4, 3)
        lora = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), peft.LoraConfig(r=2, target_modules=["0"]))
        assert lora(torch.ones(2, 3)).shape == (2, 3)

    def purge():
        for name in [name for name in sys.modules if name.partition(".")[0] == "peft_mcl"]:
            del sys.modules[name]
"""


def test_import_before_peft_twice_reloaded_and_purged():
    code = (
        "import sys\nimport peft_mcl\nimport peft_mcl"
        + textwrap.dedent(WORKS)
        + textwrap.dedent(
            """
            import importlib
            works()
            importlib.reload(peft_mcl)
            works()
            for name in sorted(name for name in sys.modules if name.startswith("peft_mcl.")):
                importlib.reload(sys.modules[name])
            importlib.reload(peft_mcl)
            works()
            for _ in range(2):
                purge()
                import peft_mcl
                works()
            print("done")
            """
        )
    )
    assert run(code).endswith("done\n")


def test_import_of_a_part_after_peft_and_in_any_order():
    code = (
        "import sys"
        + textwrap.dedent(WORKS)
        + textwrap.dedent(
            """
            assert "MCLORA" not in PeftType.__members__
            for part in ("peft_mcl.routing", "peft_mcl.registration", "peft_mcl.convert", "peft_mcl.config"):
                __import__(part)
                works()
                purge()
            print("done")
            """
        )
    )
    assert run(code).endswith("done\n")
