"""The trainer and the Hub (on loopback, see tests/conftest.py): pushes, their failures, tokens, and the model card."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
import threading
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard, metadata_load
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoTokenizer

import trainer_ext.hub as hub_module
from peft_mcl import create_model_card
from tests.hub_server import GUEST_TOKEN, HubServer
from tests.tiny import tiny_llama, with_hypotheses
from tests.trainer_ext.reference import QUICK, hypotheses, logged, ragged_pairs, trainer_for, word_tokenizer
from trainer_ext import MCLConfig, MCLTrainer, PushFailed


# A second token of the same account, which stands nowhere else.
SECRET = "hf_secretOfThisTest"
COMMIT = ".*/commit/.*"


@pytest.fixture(scope="module")
def base(hub: HubServer) -> str:
    """A base model with a tokenizer and a licence, on the Hub."""
    tiny_llama().push_to_hub("user/trained-base")
    word_tokenizer().push_to_hub("user/trained-base")
    card = ModelCard("---\nlicense: other\nlicense_name: tiny-license\nlicense_link: LICENSE.md\n---\nA tiny model.\n")
    card.push_to_hub("user/trained-base")
    return "user/trained-base"


def pushing(output_dir: Path, name: str, **options) -> MCLTrainer:
    return trainer_for(output_dir, push_to_hub=True, hub_model_id=f"user/{name}", **options)


def warnings_of_push(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == hub_module.__name__]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- pushing ---


def test_a_commit_for_each_checkpoint_and_one_at_the_end(hub, base, tmp_path):
    trainer = pushing(
        tmp_path, "every", model=base, save_strategy="steps", save_steps=1, hub_always_push=True, max_steps=3
    )
    trainer.train()
    trainer.push_to_hub()
    steps = [f"Training in progress, step {step}" for step in (1, 2, 3)]
    assert hub.messages("user/every") == ["initial commit", *steps, "End of training"]
    # Each commit holds the weights of its own step.
    for step, commit in zip((1, 2, 3), hub.repositories["user/every"].branches["main"][1:], strict=False):
        saved = (tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes()
        assert commit.files["adapter_model.safetensors"].content == saved
    files = hub.files("user/every")
    assert not [name for name in files if name.startswith(("_", "checkpoint-"))]
    assert files["README.md"] == (tmp_path / "README.md").read_bytes()

    ids = torch.arange(6, 12)[None]
    loaded = AutoPeftModelForCausalLM.from_pretrained("user/every")
    with torch.no_grad():
        expected = trainer.model.eval()(ids, hypotheses="all").logits
        torch.testing.assert_close(loaded(ids, hypotheses="all").logits, expected)


def test_a_private_repository_and_a_branch(hub, tmp_path):
    trainer = pushing(tmp_path, "branch", hub_private_repo=True, hub_revision="runs/one")
    trainer.train()
    trainer.push_to_hub()
    assert hub.repositories["user/branch"].private
    assert hub.messages("user/branch") == ["initial commit"]
    assert hub.messages("user/branch", "runs/one") == ["initial commit", "End of training"]
    PeftModel.from_pretrained(tiny_llama(), "user/branch", revision="runs/one")


def test_pushing_without_having_said_so_before(hub, tmp_path):
    trainer = trainer_for(tmp_path / "by-folder-name")
    trainer.push_to_hub()
    assert hub.messages("user/by-folder-name") == ["initial commit", "End of training"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hub_token": "hf_wrong"}, "Invalid credentials"),
        ({"hub_token": GUEST_TOKEN}, "may not write"),
        ({"hub_model_id": "guest/theirs"}, "may not write"),
    ],
)
def test_a_repository_that_cannot_be_written_is_told_before_training(tmp_path, options, reason):
    name = options.get("hub_model_id", "user/every-refused")
    with pytest.raises(ValueError, match=rf"`hub_model_id`: the repository '{name}' .*{reason}.*`hub_token`"):
        trainer_for(tmp_path, **{"push_to_hub": True, "hub_model_id": name, **options})


# --- failing to push ---


def test_pushes_that_fail_stop_no_training(hub, tmp_path, caplog):
    trainer = pushing(tmp_path, "unlucky", save_strategy="steps", save_steps=1, hub_always_push=True)
    with hub.failing("POST", COMMIT, status=500), hub.failing("PUT", "/lfs/.*", status=403):
        trainer.train()
    assert trainer.state.global_step == 4
    messages = warnings_of_push(caplog)
    assert len(messages) == 2
    assert all("could not be pushed to user/unlucky" in message for message in messages)
    assert [status in message for status, message in zip(("403", "500"), messages, strict=True)] == [True, True]
    assert len(hub.messages("user/unlucky")) == 3  # The first, and two checkpoints of four.
    for step in (1, 2, 3, 4):
        load((tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes())


def test_what_goes_wrong_before_an_upload_stops_no_training_either(hub, tmp_path, caplog, monkeypatch):
    trainer = pushing(tmp_path, "unluckier", save_strategy="steps", save_steps=2)
    with hub.failing("HEAD", ".*unluckier/resolve.*", status=403, times=9):
        trainer.train()
    assert trainer.state.global_step == 4
    assert len(warnings_of_push(caplog)) == 2


def test_the_final_push_raises_and_can_be_repeated(hub, tmp_path, caplog):
    trainer = pushing(tmp_path, "late")
    trainer.train()
    with hub.failing("POST", COMMIT, status=500):
        trainer.save_model()
    assert "could not be pushed to user/late: " in warnings_of_push(caplog)[0]
    before = files_of(tmp_path)
    with (
        hub.failing("POST", COMMIT, status=500),
        pytest.raises(PushFailed, match=r"saved in .*500.*`hf upload user/late"),
    ):
        trainer.push_to_hub()
    after = files_of(tmp_path)
    assert after.keys() == before.keys()
    assert load(after["adapter_model.safetensors"]).keys() == load(before["adapter_model.safetensors"]).keys()
    assert after["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert hub.messages("user/late") == ["initial commit"]
    trainer.push_to_hub()
    assert hub.files("user/late")["adapter_model.safetensors"] == after["adapter_model.safetensors"]


# --- tokens ---


def test_no_token_is_written_or_printed(hub, base, tmp_path, capfd, caplog):
    hub.accounts[SECRET] = "user"
    transformers.logging.set_verbosity_debug()
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.DEBUG):
            trainer = MCLTrainer(
                model=base,
                args=MCLConfig(
                    **{**QUICK, "save_strategy": "steps", "save_steps": 2, "max_steps": 2, "disable_tqdm": False},
                    output_dir=str(tmp_path),
                    push_to_hub=True,
                    hub_model_id="user/secretive",
                    hub_token=SECRET,
                    hub_strategy="all_checkpoints",
                    model_init_kwargs={"token": SECRET},
                ),
                train_dataset=ragged_pairs(),
                eval_dataset=ragged_pairs(),
                processing_class=AutoTokenizer.from_pretrained(base, token=SECRET),
                peft_config=hypotheses(),
            )
            trainer.train()
            print(trainer.args, repr(trainer.args), f"{trainer.args}", trainer.args.to_json_string())
            trainer.push_to_hub()
            hub.accounts.pop(SECRET)
            with pytest.raises(PushFailed) as refused:
                trainer.push_to_hub()
            print(refused.value)
    finally:
        transformers.logging.disable_propagation()
        transformers.logging.set_verbosity_warning()
        hub.accounts.pop(SECRET, None)
    # The token did its work: all was pushed with it.
    assert {"checkpoint-2/optimizer.pt", "checkpoint-2/manifest.json"} <= hub.files("user/secretive").keys()
    written = {**files_of(tmp_path), **hub.files("user/secretive")}
    assert "training_args.bin" in written
    printed = "".join(capfd.readouterr()) + caplog.text
    assert "hub_token" in printed
    assert [name for name, content in written.items() if SECRET.encode() in content] == []
    assert SECRET not in printed
    # Training goes on with a copy, but what is written cannot tell.
    assert copy.deepcopy(trainer.args).hub_token == copy.copy(trainer.args).hub_token == SECRET
    assert pickle.loads(pickle.dumps(trainer.args)).hub_token is None
    assert trainer.args.model_init_kwargs == {"token": SECRET}


# --- the card ---


def measured(trainer: MCLTrainer) -> dict[str, float]:
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}


def test_the_card_tells_what_there_is_to_know(hub, base, tmp_path):
    data = ragged_pairs(rows=6, seed=2)
    trainer = pushing(
        tmp_path, "told", model=base, objective="relaxed", relaxed_epsilon=0.125, eval_dataset=data, score_every=2
    )
    trainer.train()
    metrics = measured(trainer)
    trainer.push_to_hub(dataset_name="user/data")
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata["base_model"] == base
    assert metadata["library_name"] == "peft"
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["datasets"] == ["user/data"]
    assert {"lora-mcl", "trl", "peft-mcl"} <= set(metadata["tags"])
    # As the card of the base model says.
    assert (metadata["license"], metadata["license_name"]) == ("other", "tiny-license")
    card = ModelCard.load("user/told")
    card.validate()
    text = card.text
    for part in (
        "# told",
        'AutoPeftModelForCausalLM.from_pretrained("user/told")',
        "| hypotheses (K) | 3 |",
        "| rank, alpha, dropout | 4, 8, 0.0 |",
        "`down_proj`",
        "| `objective` | `relaxed` |",
        "| `relaxed_epsilon` | `0.125` |",
        "| `score_every` | `2` |",
        "[user/data](https://huggingface.co/datasets/user/data)",
        "eval, 6 sequences",
        "2507.10419",
        "tiny-license",
        "### Framework versions",
    ):
        assert part in text, part
    assert "temperature" not in text
    rows = dict(found for line in text.splitlines() if len(found := line.strip("| ").split(" | ")) == 2)
    for name in ("wta_nll", "mean_nll", "worst_nll", "mixture_nll"):
        row = next(value for label, value in rows.items() if f"`{name}`)" in label)
        assert float(row) == pytest.approx(metrics[name], rel=1e-3)
    assert float(rows["win share of hypothesis 1"]) == pytest.approx(metrics["win_share/1"], abs=1e-3)
    # Word by word, with the end of each sequence.
    tokens = sum(len(row["completion"].split()) + 1 for row in data) / len(data)
    line = next(value for label, value in rows.items() if "log K line" in label)
    assert float(line) == pytest.approx(metrics["wta_nll"] + math.log(3) / tokens, rel=1e-3)
    assert f"{math.log(3):.3f} nats off" in text


def test_the_code_on_the_card_runs(base, tmp_path):
    adapter = with_hypotheses(AutoModelForCausalLM.from_pretrained(base))
    adapter.push_to_hub("user/card-code")
    blocks = create_model_card(adapter, repo_id="user/card-code").text.split("```python\n")[1:]
    loading, using_one = (block.split("```")[0] for block in blocks)
    names: dict = {}
    exec(loading, names)
    assert len(names["answers"]) == 3
    names |= {"PeftModel": PeftModel, "base_model": tiny_llama()}
    exec(using_one.replace('"exported', f'"{tmp_path}/exported'), names)
    assert (tmp_path / "exported" / "hypothesis_2").is_dir()


def test_the_examples_are_what_the_hypotheses_say(tmp_path):
    prompts = ["w1 w2 w3", "w1 w2 w3", "w4 w5", "w6 w7", "w8 w9"]
    data = Dataset.from_list([{"prompt": prompt, "completion": " w10 w11"} for prompt in prompts])
    trainer = trainer_for(tmp_path, data=data, card_prompts=3, objective="wta")
    trainer.train()
    trainer.save_model()
    section = (tmp_path / "README.md").read_text().split("## Examples")[1].split("##")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| w")]
    assert [row[0] for row in rows] == ["w1 w2 w3", "w4 w5", "w6 w7"]
    tokenizer = trainer.processing_class
    for prompt, *answers in rows:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = trainer.model.generate(input_ids=ids, max_new_tokens=32, do_sample=False, pad_token_id=0)
        words = tokenizer.batch_decode(expected[:, ids.shape[1] :], skip_special_tokens=True)
        assert [answer.strip() for answer in answers] == words


def test_examples_can_be_switched_off_and_are_not_those_of_another_step(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=2, card_prompts=2)
    decoded = []
    decode = hub_module.decode_examples
    monkeypatch.setattr(hub_module, "decode_examples", lambda *args: decoded.append(1) or decode(*args))
    trainer.save_model()
    assert "## Examples" in (tmp_path / "README.md").read_text()
    trainer.train()
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        assert "## Examples" not in (folder / "README.md").read_text()
    trainer.save_model()
    trainer.save_model()
    assert len(decoded) == 2
    trainer.args.card_prompts = 0
    trainer.state.global_step += 1
    trainer.save_model()
    assert "## Examples" not in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match=r"`card_prompts` must be an integer, 0 .none. or more, got -1"):
        trainer_for(tmp_path, card_prompts=-1)


@pytest.mark.parametrize("kind", ["text", "packed", "stream", "failing"])
def test_examples_of_other_data(tmp_path, kind, caplog, monkeypatch):
    data, options = ragged_pairs(), {}
    if kind == "text":
        data = Dataset.from_list([{"text": " ".join(f"w{i + j}" for j in range(12))} for i in range(5)])
    elif kind == "packed":
        options = {"packing": True, "max_length": 32}
    elif kind == "stream":
        data = data.to_iterable_dataset()
    elif kind == "failing":
        monkeypatch.setattr(hub_module, "decode_examples", lambda *args: 1 / 0)
    trainer = trainer_for(tmp_path, data=data, card_prompts=2, **options)
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    if kind == "failing":
        assert "## Examples" not in text
        assert "decoding them failed" in caplog.text
        return
    rows = [line for line in text.split("## Examples")[1].splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 2
    # Of texts, which have no prompt, the first words; packing changes the order of the sequences.
    prompts = ["w0 w1 w2 w3 w4 w5 w6 w7", "w1 w2 w3 w4 w5 w6 w7 w8"] if kind == "text" else ragged_pairs()["prompt"]
    assert {row.strip("| ").split(" | ")[0] for row in rows} <= set(prompts)


def test_a_base_model_in_a_folder_is_named_without_its_path(hub, tmp_path):
    folder = tmp_path / "private-path" / "tiny-base"
    tiny_llama().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nTiny.\n")
    trainer = pushing(tmp_path / "out", "from-folder", model=str(folder))
    trainer.train()
    trainer.push_to_hub(dataset_name=str(tmp_path / "private-path"))
    card = ModelCard.load("user/from-folder")
    card.validate()
    assert card.data.base_model is None
    assert card.data.license == "mit"
    assert card.data.get("datasets") is None
    assert "`tiny-base` (a local path)" in card.text
    assert str(tmp_path) not in str(card)


def test_a_card_that_was_edited_is_left_alone(hub, tmp_path):
    trainer = pushing(tmp_path, "edited", save_strategy="steps", save_steps=2, hub_always_push=True)
    trainer.create_model_card(dataset_name="user/data")
    readme = tmp_path / "README.md"
    assert "user/data" in readme.read_text()
    mine = readme.read_text().replace("tags:\n", "tags:\n- my-tag\n").replace("## Limits", "## What I think of it")
    readme.write_text(mine)
    trainer.train()
    trainer.evaluate(ragged_pairs())
    trainer.save_model()
    trainer.push_to_hub()
    assert readme.read_text() == mine
    assert hub.files("user/edited")["README.md"].decode() == mine
    assert "What I think" not in (tmp_path / "checkpoint-4" / "README.md").read_text()
    # Metadata alone are an edit, too, and PEFT cannot even read these.
    for text in (mine.replace("my-tag", "their-tag"), "---\ntags: [unfinished\n---\nMine.\n"):
        readme.write_text(text)
        trainer.save_model(str(tmp_path))
        assert readme.read_text() == text
    assert not list(tmp_path.glob(".README*"))


def test_a_card_that_was_edited_on_the_hub_is_taken_over(hub, tmp_path):
    trainer = pushing(tmp_path, "edited-there")
    trainer.train()
    trainer.push_to_hub()
    theirs = hub.files("user/edited-there")["README.md"].decode().replace("## Limits", "## Limits, revised")
    HfApi().upload_file(path_or_fileobj=theirs.encode(), path_in_repo="README.md", repo_id="user/edited-there")
    trainer.push_to_hub()
    assert hub.files("user/edited-there")["README.md"].decode() == theirs
    # Edited on both sides: what is pushed is what is here.
    (tmp_path / "README.md").write_text(theirs.replace("revised", "revised here"))
    trainer.push_to_hub()
    assert "revised here" in hub.files("user/edited-there")["README.md"].decode()


def test_metadata_of_a_repository_made_by_hand_stay(hub, tmp_path):
    HfApi().create_repo("user/by-hand")
    by_hand = b"---\nlicense: apache-2.0\nlanguage: fr\ntags:\n- mine\n---\n"
    HfApi().upload_file(path_or_fileobj=by_hand, path_in_repo="README.md", repo_id="user/by-hand")
    trainer = pushing(tmp_path, "by-hand", save_strategy="steps", save_steps=2)
    trainer.train()
    for _ in range(2):
        trainer.push_to_hub()
        card = ModelCard.load("user/by-hand")
        assert (card.data.license, card.data.language) == ("apache-2.0", "fr")
        assert {"mine", "lora-mcl"} <= set(card.data.tags)
        assert "## How to load it" in card.text


def test_exported_hypotheses_beside_the_adapter_are_on_the_card(hub, tmp_path):
    trainer = pushing(tmp_path, "both", save_hypotheses=True)
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert 'subfolder="hypothesis_0"' in (tmp_path / "elsewhere" / "README.md").read_text()
    trainer.push_to_hub()
    card = ModelCard.load("user/both")
    assert 'PeftModel.from_pretrained(base_model, "user/both", subfolder="hypothesis_0")' in card.text
    PeftModel.from_pretrained(tiny_llama(), "user/both", subfolder="hypothesis_2")


def test_checkpoints_have_cards_with_their_own_figures(tmp_path):
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    for step in (2, 4):
        text = (tmp_path / f"checkpoint-{step}" / "README.md").read_text()
        assert f"| `optimizer steps` | `{step}` |" in text
        value = logged(trainer, "wta_nll")[step - 1]
        assert f"`wta_nll`) | {value:.4g} |" in text
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["log_history"]


def test_pushes_of_several_trainers_at_once(hub, tmp_path):
    trainers = [pushing(tmp_path / str(i), f"parallel-{i}") for i in range(3)]
    errors: list[BaseException] = []

    def push(trainer: MCLTrainer) -> None:
        try:
            trainer.push_to_hub()
        except (PushFailed, HfHubHTTPError) as error:
            errors.append(error)

    threads = [threading.Thread(target=push, args=(trainer,)) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for i in range(3):
        assert "adapter_model.safetensors" in hub.files(f"user/parallel-{i}")
