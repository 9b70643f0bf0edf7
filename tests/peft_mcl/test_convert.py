"""Tests of the way to and from ordinary LoRA adapters, which plain PEFT reads and writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from peft_mcl import MCLoraConfig, convert, export_hypotheses, from_lora_adapters, split_lora_adapter
from peft_mcl.layer import MCLoraLayer
from tests.tiny import FAMILIES, VOCABULARY, tiny_gpt2, tiny_llama, tiny_t5, with_hypotheses


K = 3
IDS = torch.arange(4, 22).view(3, 6)

# Options of LoRA and MCLORA that mean the same, each with a base model on which it matters.
CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "llama, all-linear": (tiny_llama, {}),
    "llama, default targets": (tiny_llama, {"target_modules": None}),
    "llama, regex": (tiny_llama, {"target_modules": r".*layers\.1\..*(q|v)_proj"}),
    "llama, one layer": (tiny_llama, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "llama, excluded": (tiny_llama, {"exclude_modules": ["down_proj"]}),
    "llama, embedding": (tiny_llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "gpt2": (tiny_gpt2, {"target_modules": ["c_attn", "c_fc"]}),
    "gpt2, tied embedding": (tiny_gpt2, {"target_modules": ["wte", "c_attn"]}),
    "gpt2, bias all": (tiny_gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
    "gpt2, bias lora_only": (tiny_gpt2, {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "gemma3, scaled embedding": (FAMILIES["gemma3"], {"target_modules": ["embed_tokens", "q_proj"]}),
    "t5": (tiny_t5, {}),
    "patterns": (tiny_llama, {"rank_pattern": {"q_proj": 2, r"layers\.1.*v_proj": 7}, "alpha_pattern": {"v_proj": 90.5}}),
    "rslora": (tiny_llama, {"use_rslora": True}),
    "rslora, patterns": (tiny_llama, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 8}}),
    "modules_to_save": (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "token indices": (tiny_llama, {"target_modules": ["q_proj"], "trainable_token_indices": [4, 9]}),
    "no task type": (tiny_llama, {"task_type": None}),
}  # fmt: skip


def options_of(base: PreTrainedModel, options: dict[str, Any]) -> dict[str, Any]:
    task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    return {"r": 4, "lora_alpha": 48, "target_modules": "all-linear", "task_type": task_type, **options}


def trained(build: Callable[[], PreTrainedModel], options: dict[str, Any]) -> PeftModel:
    """A model with K hypotheses in which everything trainable differs from the start."""
    base = build()
    model = with_hypotheses(base, K, **options_of(base, options))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits(model: torch.nn.Module, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            kwargs["decoder_input_ids"] = IDS[:, :3]
        return model(input_ids=IDS, **kwargs).logits


def lora_adapter(path: Path, seed: int = 0, base: PreTrainedModel | None = None, **options: Any) -> PeftModel:
    """An ordinary LoRA adapter with random weights, saved to `path`."""
    torch.manual_seed(seed)
    defaults = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    config = LoraConfig(**{**defaults, "init_lora_weights": False, **options})
    model = get_peft_model(base or tiny_llama(), config).eval()
    model.save_pretrained(path)
    return model


# --- out ---


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has .*tie")
@pytest.mark.parametrize("name", CASES)
def test_plain_peft_reads_every_hypothesis(name: str, tmp_path: Path):
    build, options = CASES[name]
    model = trained(build, options)
    directories = export_hypotheses(model, tmp_path / "out")
    assert directories == [tmp_path / "out" / f"hypothesis_{k}" for k in range(K)]
    together = []
    for k, directory in enumerate(directories):
        lora = PeftModel.from_pretrained(build(), directory).eval()
        assert type(lora.peft_config["default"]) is LoraConfig
        together.append(logits(lora))
        assert torch.equal(together[-1], logits(model, hypotheses=k))
    # All at once is another order of additions.
    torch.testing.assert_close(torch.cat(together), logits(model, hypotheses="all"), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    assert not torch.allclose(together[0], logits(build()), atol=1e-3)

    # transformers loads the hypotheses by itself, and they can be taken out of its model alike.
    model.save_pretrained(tmp_path / "saved")
    added = build()
    added.load_adapter(str(tmp_path / "saved"))
    assert all(torch.equal(logits(added, hypotheses=k), together[k]) for k in range(K))
    export_hypotheses(added, tmp_path / "of added")
    for name in (f"hypothesis_{k}/adapter_model.safetensors" for k in range(K)):
        ours, theirs = load_file(tmp_path / "out" / name), load_file(tmp_path / "of added" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    # And back.
    again = from_lora_adapters(build(), directories)
    for k in range(K):
        assert torch.equal(logits(again, hypotheses=k), together[k])
    torch.testing.assert_close(logits(again, hypotheses="all"), torch.cat(together), rtol=1e-4, atol=1e-4)
    theirs, ours = again.peft_config["default"].to_dict(), model.peft_config["default"].to_dict()
    different = {key for key in ours if theirs[key] != ours[key]}
    # The hypotheses of `model` were drawn for this test and are trainable.
    assert different <= {"init_lora_weights", "inference_mode"}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has .*tie")
@pytest.mark.parametrize("name", CASES)
def test_files_are_those_of_plain_peft(name: str, tmp_path: Path):
    build, options = CASES[name]
    plain = get_peft_model(build(), LoraConfig(**options_of(build(), options)))
    plain.save_pretrained(tmp_path / "plain")
    for directory in export_hypotheses(trained(build, options), tmp_path):
        files = {path.name for path in directory.iterdir()}
        # All but the model card.
        assert files == {path.name for path in (tmp_path / "plain").iterdir()} - {"README.md"}
        theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "plain", directory))
        assert {key: (t.shape, t.dtype) for key, t in ours.items()} == {
            key: (t.shape, t.dtype) for key, t in theirs.items()
        }
        with safe_open(directory / "adapter_model.safetensors", "pt") as weights:
            assert weights.metadata() == {"format": "pt"}
        theirs, ours = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "plain", directory))
        for config in (theirs, ours):
            for key in ("target_modules", "modules_to_save", "exclude_modules"):
                if isinstance(config[key], list):
                    config[key].sort()
        # PEFT writes what it was given, and corrects it again and again for Conv1D.
        assert ours["fan_in_fan_out"] == ("gpt2" in name)
        theirs["fan_in_fan_out"] = ours["fan_in_fan_out"]
        assert ours == theirs


def test_key_names(tmp_path: Path):
    """The names that serving engines look for, spelled out."""
    model = with_hypotheses(tiny_llama(num_hidden_layers=1), 2, target_modules=["q_proj", "embed_tokens"])
    directory = export_hypotheses(model, tmp_path)[1]
    prefix = "base_model.model.model."
    assert set(load_file(directory / "adapter_model.safetensors")) == {
        f"{prefix}layers.0.self_attn.q_proj.lora_A.weight",
        f"{prefix}layers.0.self_attn.q_proj.lora_B.weight",
        f"{prefix}embed_tokens.lora_embedding_A",
        f"{prefix}embed_tokens.lora_embedding_B",
        f"{prefix}embed_tokens.base_layer.weight",
    }
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == 4
    assert config["lora_alpha"] == 64
    assert config["inference_mode"] is True


def test_exported_without_task_type_is_found_by_auto_model(tmp_path: Path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model = with_hypotheses(base, K, task_type=None)
    directory = export_hypotheses(model, tmp_path)[2]
    loaded = AutoPeftModel.from_pretrained(directory).eval()
    torch.testing.assert_close(logits(loaded), logits(model, hypotheses=2), rtol=1e-4, atol=1e-4)


def test_export_of_a_named_adapter(tmp_path: Path):
    model = with_hypotheses(tiny_llama(), 2)
    config = MCLoraConfig(num_hypotheses=4, r=2, init_lora_weights=False, target_modules=["v_proj"])
    model.add_adapter("other", config)
    assert len(export_hypotheses(model, tmp_path / "default")) == 2
    directories = export_hypotheses(model, tmp_path / "other", adapter_name="other")
    assert len(directories) == 4
    model.set_adapter("other")
    for k, directory in enumerate(directories):
        lora = PeftModel.from_pretrained(tiny_llama(), directory).eval()
        torch.testing.assert_close(logits(lora), logits(model, hypotheses=k), rtol=1e-4, atol=1e-4)


def test_half_precision_base(tmp_path: Path):
    model = with_hypotheses(tiny_llama().to(torch.bfloat16))
    before = {name: p.dtype for name, p in model.named_parameters()}
    directory = export_hypotheses(model, tmp_path)[1]
    assert {t.dtype for t in load_file(directory / "adapter_model.safetensors").values()} == {torch.float32}
    lora = PeftModel.from_pretrained(tiny_llama().to(torch.bfloat16), directory).eval()
    torch.testing.assert_close(logits(lora), logits(model, hypotheses=1), rtol=0.02, atol=0.02)
    assert {name: p.dtype for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("model", "adapter_name"),
    [
        (lambda: with_hypotheses(tiny_llama()), "other"),
        (tiny_llama, "default"),
        (lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), "default"),
    ],
    ids=["unknown name", "no adapter", "plain LoRA"],
)
def test_nothing_to_export(model: Callable[[], Any], adapter_name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"no MCLORA adapter named '{adapter_name}'"):
        export_hypotheses(model(), tmp_path / "out", adapter_name=adapter_name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters(dtype: torch.dtype, tmp_path: Path):
    """Loaded as PEFT loads them, with float32 adapters or with those of the file, to the bit; and written as they were."""
    torch.manual_seed(1)
    config = MCLoraConfig(
        num_hypotheses=K, init_lora_weights=False, target_modules=["embed_tokens", "q_proj", "up_proj"]
    )
    model = get_peft_model(tiny_llama().to(dtype), config, autocast_adapter_dtype=False).eval()
    directories = export_hypotheses(model, tmp_path / "first")
    assert {t.dtype for t in load_file(directories[0] / "adapter_model.safetensors").values()} == {dtype}
    for options in ({"autocast_adapter_dtype": False}, {}):
        again = from_lora_adapters(tiny_llama().to(dtype), directories, **options).eval()
        for k, directory in enumerate(directories):
            lora = PeftModel.from_pretrained(tiny_llama().to(dtype), directory, **options).eval()
            assert torch.equal(logits(again, hypotheses=k), logits(lora))
            if options:
                assert torch.equal(logits(again, hypotheses=k), logits(model, hypotheses=k))
        ours = export_hypotheses(again, tmp_path / "second")
        dtypes = {t.dtype for t in load_file(ours[0] / "adapter_model.safetensors").values()}
        # The embedding itself comes along and is of the base.
        assert dtypes == ({dtype} if options else {dtype, torch.float32})
    weights = [load_file(f / "adapter_model.safetensors") for f in (*directories, *ours)]
    assert all(
        torch.equal(weights[k][key].float(), weights[K + k][key].float()) for k in range(K) for key in weights[k]
    )


WITHOUT_THIS_PACKAGE = """
import sys
import torch
from peft import AutoPeftModelForCausalLM

ids = torch.arange(4, 22).view(3, 6)
found = {}
for directory in sys.argv[2:]:
    model = AutoPeftModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        found[directory] = model(input_ids=ids).logits
torch.save(found, sys.argv[1])
assert not [name for name in sys.modules if name.partition(".")[0] in ("peft_mcl", "trainer_ext")]
"""


def test_a_process_without_this_package(tmp_path: Path):
    cases = ("llama, embedding", "gpt2", "rslora, patterns", "modules_to_save")
    expected = {}
    for case in cases:
        build, options = CASES[case]
        build().save_pretrained(tmp_path / case / "base")
        model = trained(lambda build=build, case=case: type(build()).from_pretrained(tmp_path / case / "base"), options)
        for k, directory in enumerate(export_hypotheses(model, tmp_path / case)):
            expected[str(directory)] = logits(model, hypotheses=k)
    command = [sys.executable, "-c", WITHOUT_THIS_PACKAGE, str(tmp_path / "logits.pt"), *expected]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=240)
    found = torch.load(tmp_path / "logits.pt")
    assert len(found) == K * len(cases)
    assert all(torch.equal(found[directory], logits_there) for directory, logits_there in expected.items())


def test_export_of_a_saved_adapter(tmp_path: Path):
    """Needs no base model, and gives the files that the model gives."""
    for case in ("llama, embedding", "rslora, patterns", "modules_to_save", "gpt2", "no task type"):
        build, options = CASES[case]
        model = trained(build, options)
        model.save_pretrained(tmp_path / "saved")
        export_hypotheses(model, tmp_path / "model")
        export_hypotheses(tmp_path / "saved", tmp_path / "saved")
        of_model = snapshot(tmp_path / "model")
        if case == "gpt2":
            # Only the model knows; PEFT corrects it as it loads.
            for name in [name for name in of_model if name.endswith(".json")]:
                of_model[name] = of_model[name].replace(b'"fan_in_fan_out": true', b'"fan_in_fan_out": false')
        beside = {name: content for name, content in snapshot(tmp_path / "saved").items() if "/" in name}
        assert in_order(beside) == in_order(of_model)
        # The adapter itself is where it was.
        loaded = PeftModel.from_pretrained(build(), tmp_path / "saved").eval()
        assert torch.equal(logits(loaded, hypotheses="all"), logits(model, hypotheses="all"))


def test_saved_adapters_that_hold_no_hypotheses(tmp_path: Path):
    lora_adapter(tmp_path / "lora")
    with pytest.raises(ValueError, match="lora has a LoraConfig; it is not an MCLORA adapter"):
        export_hypotheses(tmp_path / "lora", tmp_path / "out")
    with_hypotheses(tiny_llama(), K).save_pretrained(tmp_path / "cut")
    change_weights(tmp_path / "cut", lambda weights: weights.update({key: t[:2] for key, t in weights.items()}))
    with pytest.raises(ValueError, match=r"(?s)3 in the first .* - .*mclora_A has the shape \(2, 4, 32\).*and 16 more"):
        export_hypotheses(tmp_path / "cut", tmp_path / "out")
    change_weights(tmp_path / "cut", dict.clear)
    with pytest.raises(ValueError, match=r"(?s)three-dimensional parameters.*- there is none"):
        export_hypotheses(tmp_path / "cut", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- whole or not at all ---


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def in_order(files: dict[str, bytes]) -> dict[str, Any]:
    """Files with the lists in JSON sorted: sets come out of a configuration in an order that the hash seed decides."""

    def ordered(name: str, content: bytes) -> Any:
        if not name.endswith(".json"):
            return content
        values = json.loads(content)
        return {key: sorted(value) if isinstance(value, list) else value for key, value in values.items()}

    return {name: ordered(name, content) for name, content in files.items()}


def failing_save(at: int, error: type[BaseException]) -> Callable[..., None]:
    calls = []

    def save(weights: Any, path: Path, **kwargs: Any) -> None:
        calls.append(path)
        if len(calls) == at:
            Path(path).write_bytes(b"half a file")
            raise error("disk full")
        save_file(weights, path, **kwargs)

    return save


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failed_export_leaves_nothing(at: int, error: type[BaseException], monkeypatch: Any, tmp_path: Path):
    monkeypatch.setattr(convert, "save_file", failing_save(at, error))
    with pytest.raises(error, match="disk full"):
        export_hypotheses(with_hypotheses(tiny_llama()), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 3])
def test_a_failed_export_keeps_the_older_one(at: int, error: type[BaseException], monkeypatch: Any, tmp_path: Path):
    export_hypotheses(with_hypotheses(tiny_llama(), seed=1), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(convert, "save_file", failing_save(at, error))
        with pytest.raises(error, match="disk full"):
            export_hypotheses(with_hypotheses(tiny_llama(), seed=5), tmp_path)
    assert snapshot(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"hypothesis_{k}" for k in range(K)] + ["notes.txt"]


def test_a_directory_that_cannot_be_moved_in_keeps_the_older_one(monkeypatch: Any, tmp_path: Path):
    export_hypotheses(with_hypotheses(tiny_llama(), seed=1), tmp_path)
    before = snapshot(tmp_path)
    rename = Path.rename

    def failing_rename(self: Path, target: Path) -> Path:
        if Path(target) == tmp_path / "hypothesis_0" and not self.name.endswith(".old"):
            raise OSError("cannot rename")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing_rename)
        with pytest.raises(OSError, match="cannot rename"):
            export_hypotheses(with_hypotheses(tiny_llama(), seed=5), tmp_path)
    assert snapshot(tmp_path) == before


def test_fewer_hypotheses_than_before(monkeypatch: Any, tmp_path: Path):
    export_hypotheses(with_hypotheses(tiny_llama(), 4, seed=1), tmp_path)
    # Not written by an export.
    (tmp_path / "hypothesis_9").mkdir()
    (tmp_path / "hypothesis_9" / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    rename = Path.rename

    def failing_rename(self: Path, target: Path) -> Path:
        if Path(target) == tmp_path / "hypothesis_1":
            monkeypatch.undo()
            raise OSError("cannot rename")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(OSError, match="cannot rename"):
        export_hypotheses(with_hypotheses(tiny_llama(), 2, seed=5), tmp_path)
    assert snapshot(tmp_path) == before
    export_hypotheses(with_hypotheses(tiny_llama(), 2, seed=5), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hypothesis_0", "hypothesis_1", "hypothesis_9"]


def test_a_new_export_replaces_the_older_one(tmp_path: Path):
    export_hypotheses(with_hypotheses(tiny_llama(), seed=1), tmp_path / "twice")
    (tmp_path / "twice" / "hypothesis_1" / "optimizer.bin").write_text("of the older one")
    for folder in ("twice", "once"):
        export_hypotheses(with_hypotheses(tiny_llama(), seed=5), tmp_path / folder)
    assert snapshot(tmp_path / "twice") == snapshot(tmp_path / "once")


def test_exported_directories_can_be_read_by_others(tmp_path: Path):
    for directory in export_hypotheses(with_hypotheses(tiny_llama()), tmp_path):
        (tmp_path / "usual").mkdir(exist_ok=True)
        assert directory.stat().st_mode == (tmp_path / "usual").stat().st_mode


# --- in ---


@pytest.mark.parametrize("is_trainable", [False, True])
def test_separately_made_adapters(is_trainable: bool, tmp_path: Path):
    expected = [logits(lora_adapter(tmp_path / str(seed), seed)) for seed in range(4)]
    model = from_lora_adapters(tiny_llama(), [tmp_path / str(seed) for seed in range(4)], is_trainable=is_trainable)
    model.eval()
    assert model.peft_config["default"].num_hypotheses == 4
    assert all(torch.equal(logits(model, hypotheses=k), expected[k]) for k in range(4))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {name for name, _ in model.named_parameters() if "mclora_" in name}
    assert trainable == (adapters if is_trainable else set())


def test_order_repetition_and_text_paths(tmp_path: Path):
    first, second = (logits(lora_adapter(tmp_path / str(seed), seed)) for seed in range(2))
    model = from_lora_adapters(tiny_llama(), [str(tmp_path / "1"), str(tmp_path / "0"), str(tmp_path / "1")]).eval()
    expected = torch.cat([second, first, second])
    torch.testing.assert_close(logits(model, hypotheses="all"), expected, rtol=1e-4, atol=1e-4)


def test_what_may_differ(tmp_path: Path):
    """Where an adapter came from and how it was trained."""
    expected = [
        logits(lora_adapter(tmp_path / "0", 0, lora_dropout=0.1)),
        logits(lora_adapter(tmp_path / "1", 1, revision="other", init_lora_weights="gaussian")),
        logits(lora_adapter(tmp_path / "2", 2, init_lora_weights="orthogonal")),
    ]
    model = from_lora_adapters(tiny_llama(), [tmp_path / str(k) for k in range(3)]).eval()
    torch.testing.assert_close(logits(model, hypotheses="all"), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_the_new_adapter_lives_on(tmp_path: Path):
    paths = [tmp_path / str(seed) for seed in range(2)]
    for seed, path in enumerate(paths):
        lora_adapter(path, seed)
    model = from_lora_adapters(tiny_llama(), paths, adapter_name="pair").eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved" / "pair").eval()
    assert torch.equal(logits(loaded, hypotheses="all"), logits(model, hypotheses="all"))
    directories = export_hypotheses(model, tmp_path / "out", adapter_name="pair")
    for path, directory in zip(paths, directories, strict=True):
        theirs, ours = load_file(path / "adapter_model.safetensors"), load_file(directory / "adapter_model.safetensors")
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_shared_parameters_that_agree(tmp_path: Path):
    for seed in range(2):
        lora_adapter(tmp_path / str(seed), seed, modules_to_save=["lm_head"])
    from_lora_adapters(tiny_llama(), [tmp_path / "0", tmp_path / "1"])


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(path / "adapter_model.safetensors")
    change(weights)
    save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})


def first_key(weights: dict[str, torch.Tensor]) -> str:
    return sorted(weights)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 2}, "`r` is 4 in .*/good and 2 in .*/bad"),
        ({"lora_alpha": 8}, "`lora_alpha` is 32 in .*/good and 8 in .*/bad"),
        ({"target_modules": ["q_proj"]}, "`target_modules` is .*v_proj.* in .*/good and .* in .*/bad"),
        ({"use_rslora": True}, "`use_rslora` is False in .*/good and True in .*/bad"),
        ({"rank_pattern": {"q_proj": 2}}, "`rank_pattern`"),
        ({"bias": "all"}, "`bias` is 'none' in .*/good and 'all' in .*/bad"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save`"),
        ({"use_dora": True}, "bad uses use_dora; only plain LoRA"),
        ({"lora_bias": True}, "bad uses lora_bias; only plain LoRA"),
        ({"init_lora_weights": "pissa"}, "bad was initialised by 'pissa'.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "bad was initialised by 'olora'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_adapters_that_cannot_be_hypotheses(options: dict[str, Any], message: str, tmp_path: Path):
    lora_adapter(tmp_path / "good")
    lora_adapter(tmp_path / "bad", **options)
    refuse(tiny_llama(), [tmp_path / "good", tmp_path / "bad"], message)
    if message.startswith("bad"):
        refuse(tiny_llama(), [tmp_path / "bad", tmp_path / "good"], message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(first_key(w)), "good has .*lora_A.weight, and .*bad has not"),
        (lambda w: w.update(extra=torch.zeros(1)), "bad has extra, and .*good has not"),
        (
            lambda w: w.update({first_key(w): torch.zeros(5, 16)}),
            r"lora_A.weight has the shape \(4, 16\) in .*good and \(5, 16\) in .*bad",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_weights_of_another_shape(change: Callable[..., Any], message: str, tmp_path: Path):
    for name in ("good", "bad"):
        lora_adapter(tmp_path / name)
    change_weights(tmp_path / "bad", change)
    refuse(tiny_llama(), [tmp_path / "good", tmp_path / "bad"], message)


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}], ids=str)
def test_shared_parameters_that_differ(options: dict[str, Any], tmp_path: Path):
    build = tiny_gpt2 if "bias" in options else tiny_llama
    targets = ["c_attn"] if "bias" in options else ["q_proj"]
    for name in ("good", "bad"):
        lora_adapter(tmp_path / name, base=build(), target_modules=targets, **options)

    def change(weights: dict[str, torch.Tensor]) -> None:
        key = next(key for key in weights if "lora_" not in key)
        weights[key] += 1

    change_weights(tmp_path / "bad", change)
    refuse(build(), [tmp_path / "good", tmp_path / "bad"], "trained in full and differs .* all hypotheses share it")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"num_hidden_layers": 1}, "it has no place for .*layers.1.self_attn.q_proj.lora_A.weight"),
        ({"num_hidden_layers": 3}, "they have no .*layers.2.self_attn.q_proj.lora_A.weight"),
        ({"hidden_size": 32}, r"lora_A.weight has the shape \(4, 16\), and \(4, 32\) is needed"),
    ],
    ids=["fewer layers", "more layers", "wider"],
)
def test_adapters_of_another_base(base: dict[str, Any], message: str, tmp_path: Path):
    for seed in range(2):
        lora_adapter(tmp_path / str(seed), seed)
    refuse(
        tiny_llama(**base), [tmp_path / "0", tmp_path / "1"], f"(?s)`adapters` do not fit the base model:.*{message}"
    )


def test_other_kinds_of_adapters(tmp_path: Path):
    lora_adapter(tmp_path / "good")
    torch.manual_seed(0)
    config = AdaLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", total_step=10)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adalora")
    with_hypotheses(tiny_llama()).save_pretrained(tmp_path / "mclora")
    refuse(
        tiny_llama(),
        [tmp_path / "good", tmp_path / "adalora"],
        "adalora has a AdaLoraConfig; it is not an ordinary LoRA",
    )
    refuse(tiny_llama(), [tmp_path / "mclora"], "mclora has a MCLoraConfig; it is not an ordinary LoRA")


def test_nothing_or_no_list_of_adapters(tmp_path: Path):
    refuse(tiny_llama(), [], "`adapters` is empty")
    lora_adapter(tmp_path / "good")
    refuse(tiny_llama(), str(tmp_path / "good"), "`adapters` must be a list")
    refuse(tiny_llama(), tmp_path / "good", "`adapters` must be a list")


def test_files_that_are_missing_or_broken(tmp_path: Path):
    for name in ("good", "empty", "cut", "pickled"):
        lora_adapter(tmp_path / name)
    (tmp_path / "pickled" / "adapter_model.safetensors").unlink()
    torch.save(load_file(tmp_path / "good" / "adapter_model.safetensors"), tmp_path / "pickled" / "adapter_model.bin")
    (tmp_path / "empty" / "adapter_model.safetensors").unlink()
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    good = tmp_path / "good"
    refuse(tiny_llama(), [good, tmp_path / "none"], "adapter_config.json in .*none: there is no such folder")
    (tmp_path / "bare").mkdir()
    refuse(tiny_llama(), [good, tmp_path / "bare"], "(?s)adapter_config.json of the adapter .*bare cannot be found")
    (tmp_path / "good" / "adapter_config.json").rename(tmp_path / "bare" / "adapter_config.json")
    (tmp_path / "good" / "adapter_config.json").write_text("{")
    refuse(tiny_llama(), [good], "adapter_config.json of the adapter .*good cannot be used .JSONDecodeError")
    (tmp_path / "good" / "adapter_config.json").write_text('{"peft_type": "NEWEST"}')
    refuse(tiny_llama(), [good], "adapter_config.json of the adapter .*good cannot be used .KeyError.*NEWEST")
    (tmp_path / "bare" / "adapter_config.json").rename(tmp_path / "good" / "adapter_config.json")
    refuse(tiny_llama(), [good, tmp_path / "empty"], "no adapter_model.safetensors in .*empty")
    refuse(
        tiny_llama(), [good, tmp_path / "pickled"], "no adapter_model.safetensors in .*pickled.*other formats are not"
    )
    refuse(tiny_llama(), [good, tmp_path / "cut"], "cut/adapter_model.safetensors is truncated or corrupt")


def test_all_differences_are_listed(tmp_path: Path):
    lora_adapter(tmp_path / "0", r=4)
    lora_adapter(tmp_path / "1", r=2, lora_alpha=8)
    lora_adapter(tmp_path / "2", target_modules=["q_proj"])
    with pytest.raises(ValueError) as caught:
        from_lora_adapters(tiny_llama(), [tmp_path / str(k) for k in range(3)])
    message = str(caught.value)
    assert len(message.splitlines()) == 14
    for difference in (
        "`r` is 4 in",
        "`lora_alpha` is 32 in",
        "`target_modules` is",
        "has the shape (4, 16) in",
        "and 3 more",
    ):
        assert difference in message
    lora_adapter(tmp_path / "wide", base=tiny_llama(hidden_size=32))
    with pytest.raises(ValueError, match="do not fit") as caught:
        from_lora_adapters(tiny_llama(), [tmp_path / "wide"])
    assert len([line for line in str(caught.value).splitlines() if "has the shape" in line]) == 8
    refuse(
        tiny_gpt2(), [tmp_path / "0"], "(?s)do not fit the base model:.*Target modules .* not found in the base model"
    )


@pytest.mark.parametrize(
    ("trained_on", "base", "fits"),
    [
        (["meta-llama/Llama-3.2-1B"], "/models/Llama-3.2-1B/", True),
        (["/cache/models--meta-llama--Llama-3.2-1B/snapshots/0a1b"], "meta-llama/llama-3.2-1b", True),
        (["meta-llama/Llama-3.2-1B"], "meta-llama/Llama-3.2-3B", False),
        ([None, None], "meta-llama/Llama-3.2-3B", True),
        (["meta-llama/Llama-3.2-1B", None, "copies/llama-3.2-1b"], "", True),
        (["meta-llama/Llama-3.2-3B", None, "meta-llama/Llama-3.2-1B"], "", False),
        (["."], "..", False),
    ],
)
def test_the_base_that_adapters_were_trained_on(trained_on: list[str | None], base: str, fits: bool, tmp_path: Path):
    for number, name in enumerate(trained_on):
        lora_adapter(tmp_path / str(number))
        path = tmp_path / str(number) / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}))
    adapters = [tmp_path / str(number) for number in range(len(trained_on))]
    model = tiny_llama()
    model.config._name_or_path = base
    if not fits:
        reference = f"the base model is '{base}'" if base else f"{adapters[0]} on '{trained_on[0]}'"
        message = re.escape(
            f"{adapters[-1]} was trained on '{trained_on[-1]}', and {reference} (pass `check_base_name=False`"
        )
        refuse(model, adapters, message)
    from_lora_adapters(model, adapters, check_base_name=fits)


def test_a_second_adapter_for_a_model_with_hypotheses(tmp_path: Path):
    expected = [logits(lora_adapter(tmp_path / str(seed), seed, target_modules=["down_proj"])) for seed in range(2)]
    model = with_hypotheses(tiny_llama(), K)
    hypotheses = [logits(model, hypotheses=k) for k in range(K)]
    assert from_lora_adapters(model, [tmp_path / "0", tmp_path / "1"], adapter_name="plain") is model
    assert all(torch.equal(logits(model, hypotheses=k), hypotheses[k]) for k in range(K))
    model.set_adapter("plain")
    assert model.num_hypotheses == 2
    assert all(torch.equal(logits(model, hypotheses=k), expected[k]) for k in range(2))
    model.set_adapter("default")
    assert all(torch.equal(logits(model, hypotheses=k), hypotheses[k]) for k in range(K))
    with pytest.raises(ValueError, match="an adapter named 'plain' already"):
        from_lora_adapters(model, [tmp_path / "0"], adapter_name="plain")
    lora_adapter(tmp_path / "wide", base=tiny_llama(intermediate_size=64), target_modules=["down_proj"])
    with pytest.raises(ValueError, match=r"(?s)do not fit .*lora_A.weight has the shape \(4, 64\), and \(4, 32\)"):
        from_lora_adapters(model, [tmp_path / "wide"], adapter_name="wide")
    assert set(model.peft_config) == {"default", "plain"}
    assert all(torch.equal(logits(model, hypotheses=k), hypotheses[k]) for k in range(K))


# --- one becomes several ---


def test_copies_of_one_adapter(tmp_path: Path):
    for case in ("llama, embedding", "gpt2", "rslora, patterns", "modules_to_save"):
        build, options = CASES[case]
        expected = logits(lora_adapter(tmp_path / case, base=build(), **options_of(build(), options)))
        model = split_lora_adapter(build(), tmp_path / case, K, perturbation=0).eval()
        assert all(torch.equal(logits(model, hypotheses=k), expected) for k in range(K))
        assert model.peft_config["default"].num_hypotheses == K


def test_perturbed_copies(tmp_path: Path):
    targets = ["embed_tokens", "q_proj", "up_proj"]
    expected = logits(lora_adapter(tmp_path / "lora", target_modules=targets))
    original = load_file(tmp_path / "lora" / "adapter_model.safetensors")

    def split(num_hypotheses: int, *args: Any, **kwargs: Any) -> PeftModel:
        return split_lora_adapter(tiny_llama(), tmp_path / "lora", num_hypotheses, *args, **kwargs).eval()

    model = split(4, 0.3, seed=5)
    hypotheses = [load_file(d / "adapter_model.safetensors") for d in export_hypotheses(model, tmp_path / "out")]
    for key, tensor in original.items():
        found = torch.stack([weights[key] for weights in hypotheses])
        if not key.endswith(("lora_B.weight", "lora_embedding_B")):
            assert all(torch.equal(other, tensor) for other in found)
            continue
        # None of them is the original, their mean is, and they are off by 30 % of its size.
        noise = (found - tensor) / tensor.square().mean().sqrt()
        torch.testing.assert_close(noise.mean(dim=0), torch.zeros_like(tensor), rtol=0, atol=1e-6)
        assert 0.24 < noise.square().mean().sqrt() < 0.36
        assert all(0.2 < part.square().mean().sqrt() < 0.4 for part in noise)
    differences = [(logits(model, hypotheses=k) - expected).abs().max() for k in range(4)]
    assert min(differences) > 1e-4
    # From the seed and nothing else.
    torch.manual_seed(123)
    assert torch.equal(logits(split(4, 0.3, seed=5), hypotheses="all"), logits(model, hypotheses="all"))
    assert not torch.equal(logits(split(4, 0.3, seed=6), hypotheses="all"), logits(model, hypotheses="all"))
    # One alone has nothing to differ from.
    assert torch.equal(logits(split(1)), expected)
    # For training.
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "mclora_" in name
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_hypotheses": 0}, "`num_hypotheses` must be an integer of at least 1, got 0"),
        ({"perturbation": -0.1}, "`perturbation` must be a number of at least 0, got -0.1"),
        ({"perturbation": float("nan")}, "`perturbation` must be a number of at least 0, got nan"),
        ({"perturbation": True}, "`perturbation` must be a number of at least 0, got True"),
        ({"adapter": "dora"}, "dora uses use_dora; only plain LoRA"),
        pytest.param({"base": tiny_gpt2}, "(?s)do not fit the base model:.*Target modules", id="another base"),
    ],
    ids=str,
)
def test_what_cannot_be_split(arguments: dict[str, Any], message: str, tmp_path: Path):
    lora_adapter(tmp_path / "lora")
    lora_adapter(tmp_path / "dora", use_dora=True)
    options = {"base": tiny_llama, "adapter": "lora", "num_hypotheses": 3, **arguments}
    base, adapter = options.pop("base")(), tmp_path / options.pop("adapter")
    with pytest.raises(ValueError, match=message):
        split_lora_adapter(base, adapter, **options)
    assert not any(isinstance(module, MCLoraLayer) for module in base.modules())


def refuse(base: PreTrainedModel, adapters: Any, message: str) -> None:
    """The adapters are refused with this message, and the base model is left as it was."""
    before = logits(base)
    modules = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=message):
        from_lora_adapters(base, adapters)
    assert [type(module) for module in base.modules()] == modules
    assert not any(isinstance(module, MCLoraLayer) for module in base.modules())
    assert "generate" not in vars(base)
    assert torch.equal(logits(base), before)
    assert before.shape[-1] == VOCABULARY
