"""The trainer as users meet it: SFTTrainer at K = 1, logs, schedules, data sets, checkpoints, callbacks."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer, TrlParser

import trainer_ext.trainer as trainer_module
from peft_mcl import MCLoraConfig
from tests.tiny import FAMILIES, SPECIAL, VOCABULARY, tiny_llama, with_hypotheses
from tests.trainer_ext.reference import (
    LORA,
    QUICK,
    WORDS,
    Gradients,
    RecordingCollator,
    adapted_llama,
    count_tokens,
    frozen_copy,
    hypotheses,
    log_likelihood,
    logged,
    ragged_pairs,
    ragged_rows,
    scores_by_hand,
    sequences_of,
    text,
    tokenized,
    trainer_for,
    weights_by_hand,
    word_tokenizer,
)
from trainer_ext import MCLConfig, MCLTrainer
from trainer_ext.metrics import competition_metrics


COMPETITION = {
    "wta_nll",
    "mean_nll",
    "worst_nll",
    "mixture_nll",
    "win_share/0",
    "win_share/1",
    "win_share/2",
    "assignment_entropy",
}
# What the logs say of time, which no two runs share.
TIMES = ("runtime", "per_second", "preparation_time", "flos")


# --- data sets in every format ---


def conversations(rows: int = 10, seed: int = 0, turns: int = 1) -> list[dict]:
    generator = random.Random(seed)
    found = []
    for _ in range(rows):
        messages = []
        for _ in range(turns):
            messages.append({"role": "user", "content": text(generator, 1, 4)})
            messages.append({"role": "assistant", "content": text(generator, 1, 6)})
        found.append({"messages": messages})
    return found


def plain_texts(rows: int = 10, seed: int = 0) -> list[dict]:
    generator = random.Random(seed)
    return [{"text": text(generator, 2, 9)} for _ in range(rows)]


def conversational_pairs(rows: int = 10) -> list[dict]:
    return [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in conversations(rows)]


def streamed(rows: list[dict]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


FORMATS = {
    "prompt and completion": (lambda: ragged_pairs(), {}),
    "prompt and completion, all tokens": (lambda: ragged_pairs(), {"completion_only_loss": False}),
    "text": (lambda: Dataset.from_list(plain_texts()), {}),
    "text of another name": (
        lambda: Dataset.from_list([{"story": row["text"]} for row in plain_texts()]),
        {"dataset_text_field": "story"},
    ),
    "messages": (lambda: Dataset.from_list(conversations(turns=2)), {}),
    "messages, assistant only": (lambda: Dataset.from_list(conversations(turns=2)), {"assistant_only_loss": True}),
    "conversations": (
        lambda: Dataset.from_list(
            [
                {"conversations": [{"from": "user", "value": "w1 w2"}, {"from": "assistant", "value": f"w3 w{i} w4"}]}
                for i in range(8)
            ]
        ),
        {},
    ),
    "conversational prompt and completion": (lambda: Dataset.from_list(conversational_pairs()), {}),
    "pretokenized": (lambda: ragged_rows(without_labels=()), {}),
    "pretokenized, nothing to learn in a row": (lambda: ragged_rows(), {"max_length": None}),
    "iterable prompt and completion": (lambda: streamed(list(ragged_pairs())), {}),
    "iterable text": (lambda: streamed(plain_texts()), {}),
}


def sft_for(output_dir, *, model=None, data=None, **options):
    """SFTTrainer with plain LoRA, as alike as can be to `trainer_for` with one hypothesis."""
    names = ("eval_dataset", "callbacks", "compute_metrics", "data_collator", "formatting_func")
    own = {name: options.pop(name) for name in names if name in options}
    lora = options.pop("lora", {})
    return SFTTrainer(
        model=tiny_llama() if model is None else model,
        args=SFTConfig(output_dir=str(output_dir), **{**QUICK, **options}),
        train_dataset=ragged_pairs() if data is None else data,
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(**{**LORA, **lora}),
        **own,
    )


def mcl_for_one(output_dir, *, lora=None, **options):
    return trainer_for(output_dir, peft_config=hypotheses(1, **(lora or {})), **options)


def comparable(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if not any(time in name for time in TIMES)}


def assert_same_as_sft(mcl, sft, names=("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")):
    for trainer in (mcl, sft):
        set_seed(QUICK["seed"])  # Dropout draws from the global numbers.
        trainer.train()
    for name in names:
        expected = logged(sft, name)
        assert expected, name
        assert logged(mcl, name) == pytest.approx(expected, rel=1e-5, abs=1e-5), name


# --- one hypothesis is SFTTrainer ---


@pytest.mark.parametrize("format_name", FORMATS)
def test_one_hypothesis_is_sft_on_plain_lora_for_every_format(tmp_path, format_name):
    data, options = FORMATS[format_name]
    mcl = mcl_for_one(tmp_path, data=data(), **options)
    sft = sft_for(tmp_path, data=data(), **options)
    if isinstance(mcl.train_dataset, Dataset):
        assert mcl.train_dataset["labels"][:] == sft.train_dataset["labels"][:]
    assert_same_as_sft(mcl, sft)
    # It learned something, so the curves are of use.
    assert logged(mcl, "loss")[0] != logged(mcl, "loss")[-1]


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 3, "num_train_epochs": 3, "max_steps": -1},
        {"objective": "wta"},
        {"objective": "relaxed", "relaxed_epsilon": 0.5},
        {"objective": "random"},
        {"lora": {"lora_dropout": 0.3}},
        {"lora": {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}, "gradient_checkpointing": True},
        {"weight_decay": 0.1, "warmup_steps": 2, "lr_scheduler_type": "cosine", "max_grad_norm": 0.1},
        {"per_device_train_batch_size": 3, "max_length": 6},
        {"neftune_noise_alpha": 5.0},
        {"bf16": True},
    ],
    ids=lambda options: ", ".join(options),
)
def test_one_hypothesis_is_sft_on_plain_lora_under_other_options(tmp_path, options):
    ours = {"objective"} | {name for name in options if name.startswith("relaxed")}
    sft = sft_for(tmp_path, **{name: value for name, value in options.items() if name not in ours})
    mcl = mcl_for_one(tmp_path, **options)
    assert_same_as_sft(mcl, sft)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_one_hypothesis_is_sft_for_other_models(tmp_path, family):
    mcl = mcl_for_one(tmp_path, model=FAMILIES[family]())
    assert_same_as_sft(mcl, sft_for(tmp_path, model=FAMILIES[family]()))


def tiny_mixtral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, **sizes, **experts, **SPECIAL))


def test_one_hypothesis_is_sft_for_mixtures_of_experts(tmp_path):
    options = {"gradient_accumulation_steps": 2, "lora": {"target_modules": ["q_proj", "v_proj"]}}
    mcl = mcl_for_one(tmp_path, model=tiny_mixtral(), **options)
    sft = sft_for(tmp_path, model=tiny_mixtral(), **options)
    assert_same_as_sft(mcl, sft, ("loss", "grad_norm", "aux_loss", "entropy"))
    assert min(logged(mcl, "aux_loss")) > 0


def test_one_hypothesis_has_the_eval_loss_of_sft(tmp_path):
    held_out = ragged_pairs(7, seed=1)
    # In one batch: over several, SFTTrainer's own is a mean of means.
    options = {"eval_dataset": held_out, "per_device_eval_batch_size": 7, "eval_strategy": "steps", "eval_steps": 2}
    mcl, sft = mcl_for_one(tmp_path, **options), sft_for(tmp_path, **options)
    assert_same_as_sft(mcl, sft, ("loss", "eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"))
    assert logged(mcl, "eval_loss") == logged(mcl, "eval_wta_nll")


def test_one_hypothesis_logs_everything_that_sft_logs(tmp_path):
    options = {"eval_dataset": ragged_pairs(5, seed=1), "eval_strategy": "steps", "eval_steps": 2}
    mcl, sft = mcl_for_one(tmp_path, **options), sft_for(tmp_path, **options)
    mcl.train()
    sft.train()
    for ours, theirs in zip(mcl.state.log_history, sft.state.log_history, strict=True):
        assert theirs.keys() <= ours.keys()


# --- what is logged ---


def test_all_metrics_are_logged_in_training_and_evaluation(tmp_path):
    trainer = trainer_for(tmp_path, eval_dataset=ragged_pairs(5, seed=1), eval_strategy="steps", eval_steps=2)
    trainer.train()
    sft = {"entropy", "mean_token_accuracy", "num_tokens"}
    training = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluation = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert (len(training), len(evaluation)) == (4, 2)
    for entry in training:
        assert COMPETITION | sft | {"temperature", "loss", "grad_norm", "learning_rate"} <= entry.keys()
        assert not any(name.startswith("eval_") for name in entry)
        assert sum(entry[f"win_share/{k}"] for k in range(3)) == pytest.approx(1)
        assert entry["wta_nll"] <= entry["mixture_nll"] + 1e-6
    for entry in evaluation:
        assert {f"eval_{name}" for name in COMPETITION | sft} <= entry.keys()
        assert entry["eval_loss"] == entry["eval_wta_nll"]
        assert "eval_temperature" not in entry
        assert not any(name in COMPETITION for name in entry)


@pytest.mark.parametrize("objective", ["wta", "relaxed", "random"])
def test_only_annealing_has_a_temperature(tmp_path, objective):
    trainer = trainer_for(tmp_path, objective=objective, max_steps=1)
    trainer.train()
    assert logged(trainer, "temperature") == []
    assert len(logged(trainer, "wta_nll")) == 1


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_evaluation_is_exact_over_ragged_batches(tmp_path, normalization):
    model = adapted_llama()
    reference = frozen_copy(model)
    # Seven sequences in batches of 4 and 3, of different lengths.
    collator = RecordingCollator()
    trainer = trainer_for(
        tmp_path,
        model=model,
        eval_dataset=ragged_pairs(7, seed=1),
        data_collator=collator,
        loss_normalization=normalization,
    )
    metrics = trainer.evaluate()
    sequences = [sequence for batch in collator.batches for sequence in sequences_of(batch)]
    scores = [row for batch in collator.batches for row in scores_by_hand(reference, batch)]
    assert len(sequences) == 7
    tokens = sum(count_tokens(labels) for _, labels in sequences)
    wins = [row.index(max(row)) for row in scores]
    shares = [wins.count(k) / 7 for k in range(3)]
    expected = {
        "eval_loss": -sum(map(max, scores)) / tokens,
        "eval_wta_nll": -sum(map(max, scores)) / tokens,
        "eval_mean_nll": -sum(sum(row) / 3 for row in scores) / tokens,
        "eval_worst_nll": -sum(map(min, scores)) / tokens,
        "eval_mixture_nll": -sum(
            math.log(sum(share * math.exp(score) for share, score in zip(shares, row, strict=True))) for row in scores
        )
        / tokens,
        **{f"eval_win_share/{k}": share for k, share in enumerate(shares)},
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_training_metrics_are_exact_over_everything_since_the_last_log(tmp_path, accumulation):
    # Ten rows in batches of 4, 4 and 2: with three micro-batches all are fetched before the first is trained.
    model = adapted_llama()
    reference = frozen_copy(model)
    collator = RecordingCollator()
    trainer = trainer_for(
        tmp_path,
        model=model,
        data=ragged_rows(without_labels=()),
        data_collator=collator,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.0,
        max_steps=-1,
        num_train_epochs=2,
        logging_steps=2,
        objective="wta",
    )
    trainer.train()
    steps_in_epoch = math.ceil(3 / accumulation)
    batches_of_step = [
        [epoch * 3 + index for index in range(3)][step * accumulation : (step + 1) * accumulation]
        for epoch in range(2)
        for step in range(steps_in_epoch)
    ]
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == len(batches_of_step) // 2
    for number, entry in enumerate(entries):
        batches = [collator.batches[i] for step in batches_of_step[2 * number : 2 * number + 2] for i in step]
        scores = torch.tensor([row for batch in batches for row in scores_by_hand(reference, batch)])
        counts = torch.tensor([count_tokens(labels) for batch in batches for _, labels in sequences_of(batch)])
        expected = competition_metrics(scores, counts, scores.argmax(dim=1))
        assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_entropy_and_accuracy_are_those_of_the_winners(tmp_path):
    model = adapted_llama()
    reference = frozen_copy(model)
    collator = RecordingCollator()
    options = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 10, "objective": "wta"}
    # Learning what the second hypothesis would say makes its accuracy differ from that of the others.
    prompts = torch.tensor([[10 + row, 20 + row] for row in range(10)])
    ids = model.generate(input_ids=prompts, hypotheses=1, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    data = tokenized([(row, [-100, -100, *row[2:]]) for row in ids.tolist()])
    trainer = trainer_for(tmp_path, model=model, data=data, data_collator=collator, **options)
    trainer.train()
    batch = collator.batches[0]
    entropies, correct = [], []
    for row, (own, labels) in zip(scores_by_hand(reference, batch), sequences_of(batch), strict=True):
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([own]), hypotheses=row.index(max(row))).logits[0]
        log_probs = torch.log_softmax(logits, dim=-1)
        for t in range(1, len(own)):
            if labels[t] != -100:
                entropies.append(-(log_probs[t - 1].exp() * log_probs[t - 1]).sum().item())
                correct.append(log_probs[t - 1].argmax().item() == labels[t])
    assert logged(trainer, "entropy") == pytest.approx([sum(entropies) / len(entropies)], rel=1e-6)
    assert logged(trainer, "mean_token_accuracy") == pytest.approx([sum(correct) / len(correct)])
    assert sum(correct) > 0


def test_training_metrics_survive_an_evaluation_in_between(tmp_path):
    def run(**options):
        trainer = trainer_for(
            tmp_path, model=adapted_llama(), logging_steps=4, eval_dataset=ragged_pairs(5, seed=1), **options
        )
        trainer.train()
        return next(comparable(entry) for entry in trainer.state.log_history if "loss" in entry)

    assert run(eval_strategy="steps", eval_steps=1) == run()


def test_ties_in_evaluation_go_to_every_hypothesis(tmp_path):
    # B is zero, so that all hypotheses are identical; one sequence to a batch.
    trainer = trainer_for(tmp_path, eval_dataset=ragged_pairs(60, seed=1), per_device_eval_batch_size=1)
    metrics = trainer.evaluate()
    assert all(0.1 < metrics[f"eval_win_share/{k}"] < 0.6 for k in range(3))
    assert trainer.evaluate()["eval_win_share/0"] == metrics["eval_win_share/0"]


def test_ties_in_training_follow_the_seed(tmp_path):
    def shares(seed):
        data = tokenized([([5, 6, 7], [5, 6, 7])] * 60)
        trainer = trainer_for(
            tmp_path, data=data, max_steps=1, per_device_train_batch_size=60, objective="wta", seed=seed
        )
        trainer.train()
        return [logged(trainer, f"win_share/{k}")[0] for k in range(3)]

    assert shares(1) == shares(1) != shares(2)
    assert all(0.1 < share < 0.6 for share in shares(1))


def test_losses_of_the_objectives(tmp_path):
    # At learning rate zero the loss is known from the metrics of the step.
    def entry(**options):
        trainer = trainer_for(tmp_path, model=adapted_llama(), learning_rate=0.0, max_steps=1, **options)
        trainer.train()
        return trainer.state.log_history[0]

    wta = entry(objective="wta")
    assert wta["loss"] == pytest.approx(wta["wta_nll"])
    relaxed = entry(objective="relaxed", relaxed_epsilon=0.3)
    others = (3 * relaxed["mean_nll"] - relaxed["wta_nll"]) / 2
    assert relaxed["loss"] == pytest.approx(0.7 * relaxed["wta_nll"] + 0.3 * others)
    annealed = entry(objective="annealed", initial_temperature=1e6)
    assert annealed["loss"] == pytest.approx(annealed["mean_nll"])
    assert wta["wta_nll"] == pytest.approx(annealed["wta_nll"])


def test_several_evaluation_sets_and_predictions(tmp_path):
    sets = {"near": ragged_pairs(5, seed=1), "far": ragged_pairs(6, seed=2)}
    trainer = trainer_for(tmp_path, model=adapted_llama(), eval_dataset=sets)
    metrics = trainer.evaluate()
    for name, dataset in sets.items():
        alone = trainer.evaluate(dataset)
        assert metrics[f"eval_{name}_wta_nll"] == metrics[f"eval_{name}_loss"] == alone["eval_wta_nll"]
    predicted = trainer.predict(trainer.eval_dataset["far"]).metrics
    assert predicted["test_wta_nll"] == metrics["eval_far_wta_nll"]
    assert predicted["test_loss"] == predicted["test_wta_nll"]


def test_scores_come_in_the_order_of_the_data_set(tmp_path):
    model = adapted_llama()
    reference = frozen_copy(model)
    trainer = trainer_for(tmp_path, model=model)
    data = ragged_pairs(7, seed=1)
    window = trainer.score(data)
    prepared = trainer._prepare_dataset(data, trainer.processing_class, trainer.args, False, None, "eval")
    with torch.no_grad():
        expected = [
            [log_likelihood(reference, row["input_ids"], row["labels"], k).item() for k in range(3)] for row in prepared
        ]
    torch.testing.assert_close(window.scores, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert window.num_tokens.tolist() == [count_tokens(row["labels"]) for row in prepared]
    assert window.winners.tolist() == [row.index(max(row)) for row in expected]


def test_scores_are_refused_where_their_order_would_be_lost(tmp_path):
    for option in ({"shuffle_dataset": True}, {"train_sampling_strategy": "group_by_length"}):
        trainer = trainer_for(tmp_path, **option)
        with pytest.raises(ValueError, match=next(iter(option))):
            trainer.score(ragged_pairs(7, seed=1))


# --- a hypothesis that stopped winning ---


def won_by(winners):
    """A model that is sure of what it says, and eight sequences as the named hypotheses alone would go on."""
    base = tiny_llama()
    base.lm_head.weight.data *= 30
    model = with_hypotheses(base, lora_alpha=8)
    prompts = torch.tensor([[10 + row, 20 + row] for row in range(8 // len(winners))])
    ids = model.generate(input_ids=prompts, hypotheses=winners, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return model, tokenized([(row, [-100, -100, *row[2:]]) for row in ids.tolist()])


def no_win_messages(caplog):
    return [record.getMessage() for record in caplog.records if "has won no sequence" in record.getMessage()]


def test_a_hypothesis_that_stopped_winning_is_named_once(tmp_path, caplog):
    model, data = won_by([0, 2])
    options = {"learning_rate": 0.0, "max_steps": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    trainer = trainer_for(tmp_path, model=model, data=data, objective="wta", no_win_warning_steps=3, **options)
    with caplog.at_level(logging.WARNING, logger="trainer_ext"):
        trainer.train()
    assert logged(trainer, "win_share/1") == [0.0] * 8
    assert logged(trainer, "win_share/0") == logged(trainer, "win_share/2") == [0.5] * 8
    (message,) = no_win_messages(caplog)
    assert message.startswith("Hypothesis 1 has won no sequence for 3 steps (up to step 3)")


@pytest.mark.parametrize(
    "options", [{"no_win_warning_steps": 0}, {"objective": "random"}, {"no_win_warning_steps": 100}]
)
def test_no_warning_where_there_is_nothing_to_warn_of(tmp_path, caplog, options):
    model, data = won_by([0, 2])
    defaults = {"objective": "wta", "no_win_warning_steps": 2, "learning_rate": 0.0, "max_steps": 5}
    trainer = trainer_for(tmp_path, model=model, data=data, per_device_train_batch_size=8, **{**defaults, **options})
    with caplog.at_level(logging.WARNING, logger="trainer_ext"):
        trainer.train()
    assert logged(trainer, "win_share/1") == [0.0] * 5
    assert no_win_messages(caplog) == []


def test_every_hypothesis_that_stopped_winning_is_named(tmp_path, caplog):
    model, data = won_by([1])
    options = {"learning_rate": 0.0, "max_steps": 4, "per_device_train_batch_size": 8, "no_win_warning_steps": 2}
    trainer = trainer_for(tmp_path, model=model, data=data, objective="relaxed", **options)
    with caplog.at_level(logging.WARNING, logger="trainer_ext"):
        trainer.train()
    assert sorted(message.split(" has")[0] for message in no_win_messages(caplog)) == ["Hypothesis 0", "Hypothesis 2"]


# --- the schedule ---


@pytest.fixture
def assignments(monkeypatch):
    """The temperature, weights and winners of every training batch, in order."""
    found = []

    def record(objective, scores, num_tokens, *, temperature, **kwargs):
        result = original(objective, scores, num_tokens, temperature=temperature, **kwargs)
        if torch.is_grad_enabled():  # Evaluation is not.
            found.append((temperature, *result))
        return result

    original = trainer_module.assignment_weights
    monkeypatch.setattr(trainer_module, "assignment_weights", record)
    return found


def test_temperature_by_fraction_of_training(tmp_path, assignments):
    trainer = trainer_for(
        tmp_path,
        max_steps=8,
        gradient_accumulation_steps=2,
        objective="annealed",
        initial_temperature=10.0,
        final_temperature=0.1,
        annealing_fraction=0.5,
    )
    trainer.train()
    # From 10 to .1 in half of the 8 steps.
    expected = [10.0, 10**0.5, 1.0, 10**-0.5, 0.1, 0.1, 0.1, 0.1]
    assert logged(trainer, "temperature") == pytest.approx(expected)
    # Used in every micro-batch of the step that logs it, the last with two of the three batches of an epoch or with one.
    used = [temperature for temperature, _, _ in assignments]
    by_step = [used[start] for start in (0, 2, 3, 5, 6, 8, 9, 11)]
    assert by_step == [*logged(trainer, "temperature")[:4], None, None, None, None]


def test_temperature_by_decay(tmp_path, assignments):
    trainer = trainer_for(
        tmp_path, objective="annealed", temperature_decay=0.25, initial_temperature=2.0, final_temperature=0.1
    )
    trainer.train()
    assert logged(trainer, "temperature") == [2.0, 0.5, 0.125, 0.1]
    assert [temperature for temperature, _, _ in assignments] == [2.0, 0.5, 0.125, None]
    for _, weights, winners in assignments[3:]:
        assert torch.equal(weights, torch.nn.functional.one_hot(winners, 3).float())


def test_annealing_takes_half_of_training_by_default(tmp_path):
    trainer = trainer_for(tmp_path, objective="annealed", max_steps=6)
    trainer.train()
    assert logged(trainer, "temperature") == pytest.approx([1.0, 1e-2, 1e-4, 1e-6, 1e-6, 1e-6])


def test_temperature_counts_epochs_too(tmp_path):
    trainer = trainer_for(
        tmp_path, objective="annealed", max_steps=-1, num_train_epochs=2, annealing_fraction=1.0, final_temperature=1e-3
    )
    trainer.train()
    assert logged(trainer, "temperature") == pytest.approx([10 ** (-3 * step / 6) for step in range(6)])


def test_temperature_is_that_of_the_last_step_when_several_are_logged_together(tmp_path):
    trainer = trainer_for(tmp_path, objective="annealed", logging_steps=2, temperature_decay=0.5)
    trainer.train()
    assert logged(trainer, "temperature") == [0.5, 0.125]


def test_weights_follow_the_scores_of_the_moment(tmp_path, assignments):
    # The parameters move, and the weights are those of the definition at each step.
    model = adapted_llama()
    collator = RecordingCollator()
    snapshots = []

    class Snapshot(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            snapshots.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})

    reference = frozen_copy(model)
    trainer = trainer_for(
        tmp_path,
        model=model,
        data_collator=collator,
        callbacks=[Snapshot()],
        objective="annealed",
        initial_temperature=0.1,
        temperature_decay=0.5,
    )
    trainer.train()
    for step, (temperature, weights, _) in enumerate(assignments):
        reference.load_state_dict(snapshots[step], strict=False)
        assert temperature == 0.1 * 0.5**step
        scores = scores_by_hand(reference, collator.batches[step])
        rows = [
            weights_by_hand("annealed", row, count_tokens(labels), 0.0, temperature)
            for row, (_, labels) in zip(scores, sequences_of(collator.batches[step]), strict=True)
        ]
        torch.testing.assert_close(weights, torch.tensor(rows), rtol=1e-3, atol=1e-5)


def test_random_hypotheses_are_drawn_anew_for_every_batch(tmp_path, assignments):
    options = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "max_steps": 40}
    trainer_for(tmp_path, objective="random", **options).train()
    draws = torch.stack([weights.argmax(dim=1) for _, weights, _ in assignments])
    assert draws.shape == (80, 5)
    # No batch, step or place in a batch repeats another or has a favourite.
    assert len(draws.unique(dim=0)) > 60
    assert len(draws[::2].unique(dim=0)) > 30
    for place in range(5):
        assert torch.bincount(draws[:, place], minlength=3).min() > 10
    winners = torch.stack([winners for _, _, winners in assignments])
    assert 0.2 < (draws == winners).float().mean() < 0.5


# --- checkpoints ---

RESUME = {"max_steps": 7, "gradient_accumulation_steps": 2, "save_strategy": "steps", "learning_rate": 3e-2}


def history(trainer):
    """The training logs, without their times."""
    return [comparable(entry) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("stop", [3, 4])  # In the middle of an epoch, and at its end.
@pytest.mark.parametrize(
    "options",
    [
        {"objective": "annealed", "annealing_fraction": 0.7, "final_temperature": 1e-2},
        {"objective": "annealed", "temperature_decay": 0.7, "peft_config": hypotheses(3, lora_dropout=0.2)},
        {"objective": "random"},
        {"objective": "wta"},
        {"objective": "relaxed", "relaxed_epsilon": 0.2, "loss_normalization": "sequence"},
    ],
    ids=["annealed", "annealed with dropout", "random", "wta", "relaxed"],
)
def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path, assignments, options, stop):
    whole = trainer_for(tmp_path, save_steps=stop, **RESUME, **options)
    whole.train()
    expected = list(assignments)
    assignments.clear()
    resumed = trainer_for(tmp_path, save_steps=100, **RESUME, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert len(logged(resumed, "loss")) == 7
    # Not the number of tokens, which TRL counts from zero.
    for ours, theirs in zip(history(resumed), history(whole), strict=True):
        assert ours | {"num_tokens": 0} == theirs | {"num_tokens": 0}
    for ours, theirs in zip(assignments, expected[-len(assignments) :], strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[2], theirs[2])
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_resuming_skips_a_checkpoint_that_was_not_written_to_its_end(tmp_path):
    whole = trainer_for(tmp_path, save_steps=2, **RESUME)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-7")
    # As an interrupt leaves them: no state, an empty one, and one cut short.
    for number, state in ((10, None), (11, ""), (12, '{"best_metric": null, "epo')):
        half = tmp_path / f"checkpoint-{number}"
        shutil.copytree(tmp_path / "checkpoint-6", half)
        (half / "trainer_state.json").unlink()
        if state is not None:
            (half / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    resumed = trainer_for(tmp_path, save_steps=100, **RESUME)
    starts = []

    class Start(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            starts.append(state.global_step)

    resumed.add_callback(Start())
    resumed.train(resume_from_checkpoint=True)
    assert starts == [6]
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_resume_is_off_by_default_and_with_false(tmp_path):
    first = trainer_for(tmp_path, save_strategy="steps", save_steps=2)
    first.train()
    again = trainer_for(tmp_path)
    again.train(resume_from_checkpoint=False)
    assert logged(again, "loss") == logged(first, "loss")


def test_saved_model_is_an_ordinary_peft_adapter(tmp_path):
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    trainer = MCLTrainer(
        model=str(base),
        args=MCLConfig(output_dir=str(tmp_path / "out"), **QUICK),
        train_dataset=ragged_pairs(),
        peft_config=hypotheses(),
    )
    trainer.train()
    trainer.save_model()
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**inputs, hypotheses="all").logits
        for loaded in (
            PeftModel.from_pretrained(tiny_llama(), tmp_path / "out"),
            AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"),
        ):
            torch.testing.assert_close(loaded.eval()(**inputs, hypotheses="all").logits, expected)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


def test_a_saved_adapter_can_be_trained_on(tmp_path):
    trainer = trainer_for(tmp_path / "first")
    trainer.train()
    trainer.save_model()
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "first", is_trainable=True)
    held_out = ragged_pairs(5, seed=1)
    again = trainer_for(tmp_path / "second", model=model)
    assert again.evaluate(held_out)["eval_wta_nll"] == pytest.approx(
        trainer.evaluate(held_out)["eval_wta_nll"], rel=1e-6
    )
    again.train()
    assert logged(again, "loss")[-1] < logged(trainer, "loss")[0]


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    # A learning rate under which the last model is not the best.
    trainer = trainer_for(
        tmp_path,
        eval_dataset=ragged_pairs(6, seed=1),
        max_steps=8,
        learning_rate=0.2,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_wta_nll",
    )
    trainer.train()
    values = logged(trainer, "eval_wta_nll")
    assert min(values) < values[-1] - 1e-4
    assert trainer.state.best_metric == min(values)
    assert trainer.evaluate()["eval_wta_nll"] == pytest.approx(min(values), rel=1e-6)


@pytest.mark.parametrize("name", ["wta_nll", "eval_mean_nll", "eval_worst_nll", "mixture_nll", "eval_near_wta_nll"])
def test_a_lower_likelihood_loss_is_better(tmp_path, name):
    assert (
        MCLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, metric_for_best_model=name).greater_is_better
        is False
    )


def test_what_the_user_says_about_the_best_metric_stands(tmp_path):
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    assert MCLConfig(**common, metric_for_best_model="wta_nll", greater_is_better=True).greater_is_better is True
    assert MCLConfig(**common, metric_for_best_model="assignment_entropy").greater_is_better is True
    assert MCLConfig(**common).greater_is_better is None


def test_model_card_names_the_method_and_the_base(tmp_path):
    base = tiny_llama()
    base.config._name_or_path = "someone/tiny-llama"
    trainer = trainer_for(tmp_path / "my-hypotheses", model=base)
    trainer.create_model_card(model_name="my-hypotheses", dataset_name="some/data")
    card = (tmp_path / "my-hypotheses" / "README.md").read_text()
    for part in ("LoRA-MCL", "someone/tiny-llama", "my-hypotheses", "2507.10419", "mclora", "some/data"):
        assert part in card, part
    assert "SFT" not in card


def test_checkpoints_carry_a_model_card(tmp_path):
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    assert "LoRA-MCL" in (tmp_path / "README.md").read_text()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["log_history"][-1]["wta_nll"] == logged(trainer, "wta_nll")[-1]


# --- data sets ---


def supervised_words(trainer):
    """The supervised text of each sequence of the prepared training set."""
    tokenizer = trainer.processing_class
    return [
        tokenizer.decode([token for token in row["labels"] if token != -100]).replace(" <eos>", "<eos>")
        for row in trainer.train_dataset
    ]


def test_completions_are_learned_and_prompts_are_not(tmp_path):
    data = ragged_pairs()
    trainer = trainer_for(tmp_path, data=data)
    assert supervised_words(trainer) == [completion.strip() + "<eos>" for completion in data["completion"]]
    trainer.train()


def test_assistant_turns_are_learned_and_user_turns_are_not(tmp_path):
    rows = conversations(turns=2)
    trainer = trainer_for(tmp_path, data=Dataset.from_list(rows), assistant_only_loss=True)
    expected = [
        " ".join(message["content"] + "<eos>" for message in row["messages"] if message["role"] == "assistant")
        for row in rows
    ]
    assert supervised_words(trainer) == expected
    trainer.train()
    assert len(logged(trainer, "wta_nll")) == 4


def test_formatting_function(tmp_path):
    data = Dataset.from_list([{"question": "w1 w2", "answer": f"w{i} w4"} for i in range(8)])
    trainer = trainer_for(tmp_path, data=data, formatting_func=lambda row: f"{row['question']} w9 {row['answer']}")
    assert supervised_words(trainer)[3] == "w1 w2 w9 w3 w4<eos>"
    trainer.train()
    assert len(logged(trainer, "loss")) == 4


def test_prepared_data_and_a_collator_of_ones_own(tmp_path):
    trainer = trainer_for(
        tmp_path,
        data=ragged_rows(without_labels=()),
        data_collator=RecordingCollator(),
        dataset_kwargs={"skip_prepare_dataset": True},
        eval_dataset=ragged_rows(5, seed=1),
    )
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_wta_nll"])


def test_iterable_evaluation_set(tmp_path):
    rows = list(ragged_pairs(6, seed=1))
    trainer = trainer_for(tmp_path, model=adapted_llama(), eval_dataset=streamed(rows))
    metrics = trainer.evaluate()
    assert metrics["eval_wta_nll"] == pytest.approx(trainer.evaluate(Dataset.from_list(rows))["eval_wta_nll"])


def test_extra_columns_are_no_part_of_training(tmp_path):
    data = ragged_pairs().add_column("version", [f"v{i}" for i in range(10)])
    with_column, without = trainer_for(tmp_path, data=data), trainer_for(tmp_path)
    with_column.train()
    without.train()
    assert logged(with_column, "loss") == logged(without, "loss")


# --- arguments and models ---


def test_training_arguments_and_sft_arguments_become_ours(tmp_path):
    given = {**QUICK, "learning_rate": 0.123, "weight_decay": 0.5, "lr_scheduler_type": "cosine", "hub_token": "secret"}
    plain = {name: value for name, value in given.items() if name != "dataset_num_proc"}
    for args in (
        TrainingArguments(output_dir=str(tmp_path), **plain),
        SFTConfig(output_dir=str(tmp_path), max_length=77, completion_only_loss=False, **given),
        SFTConfig(output_dir=str(tmp_path), eos_token="w5", pad_token="w6", **given),
    ):
        trainer = MCLTrainer(
            model=tiny_llama(),
            args=args,
            train_dataset=ragged_pairs(),
            processing_class=word_tokenizer(),
            peft_config=hypotheses(),
        )
        assert isinstance(trainer.args, MCLConfig)
        assert (trainer.args.objective, trainer.args.annealing_fraction) == ("balanced", 0.5)
        for name in ("learning_rate", "weight_decay", "lr_scheduler_type", "bf16", "max_steps", "seed", "hub_token"):
            assert getattr(trainer.args, name) == getattr(args, name), name
        for name in ("max_length", "completion_only_loss", "eos_token", "pad_token"):
            if isinstance(args, SFTConfig):
                assert getattr(trainer.args, name) == getattr(args, name), name
        trainer.train()
        assert len(logged(trainer, "wta_nll")) == 4


def test_no_arguments_at_all_give_a_directory_named_after_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    # The defaults are for machines that compute in bfloat16 on a device.
    class OnCPU(MCLConfig):
        def __init__(self, output_dir):
            super().__init__(output_dir=output_dir, use_cpu=True, bf16=False)

    monkeypatch.setattr(trainer_module, "MCLConfig", OnCPU)
    base = tiny_llama()
    base.config._name_or_path = "someone/tiny-llama"
    trainer = MCLTrainer(
        model=base, train_dataset=ragged_pairs(), processing_class=word_tokenizer(), peft_config=hypotheses()
    )
    assert Path(trainer.args.output_dir).name == "tiny-llama-MCL"
    assert trainer.args.objective == "balanced"


def test_models_of_every_kind_train_alike(tmp_path):
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    word_tokenizer().save_pretrained(base)

    def losses(model, **options):
        args = MCLConfig(output_dir=str(tmp_path / "out"), **QUICK)
        trainer = MCLTrainer(
            model=model, args=args, train_dataset=ragged_pairs(), processing_class=word_tokenizer(), **options
        )
        trainer.train()
        return logged(trainer, "loss")

    expected = losses(tiny_llama(), peft_config=hypotheses())
    assert losses(str(base), peft_config=hypotheses()) == expected
    torch.manual_seed(QUICK["seed"])
    assert losses(get_peft_model(tiny_llama(), hypotheses())) == expected


def test_processing_class_is_loaded_with_a_model_of_a_path(tmp_path):
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    trainer = MCLTrainer(
        model=str(base),
        args=MCLConfig(output_dir=str(tmp_path / "out"), model_init_kwargs={"dtype": "float32"}, **QUICK),
        train_dataset=ragged_pairs(),
        peft_config=hypotheses(),
    )
    assert trainer.processing_class.get_vocab() == word_tokenizer().get_vocab()
    trainer.train()


def test_yaml_of_the_configuration(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"output_dir: {tmp_path}\nobjective: relaxed\nrelaxed_epsilon: 0.2\nfinal_temperature: 1e-3\n"
        "annealing_fraction: 0.25\nloss_normalization: sequence\nmax_steps: 7\nbf16: false\nuse_cpu: true\n"
    )
    (config,) = TrlParser(MCLConfig).parse_args_and_config(["--config", str(path), "--relaxed_epsilon", "0.3"])
    assert isinstance(config, MCLConfig)
    assert (config.objective, config.relaxed_epsilon, config.final_temperature) == ("relaxed", 0.3, 1e-3)
    assert (config.annealing_fraction, config.loss_normalization, config.max_steps) == (0.25, "sequence", 7)


def test_a_configuration_can_be_rebuilt_from_its_own_values(tmp_path):
    for options in ({}, {"temperature_decay": 0.9}, {"annealing_fraction": 0.3}):
        config = MCLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
        values = {name: value for name, value in config.to_dict().items() if not name.endswith("_token")}
        again = MCLConfig(**values)
        assert (again.temperature_decay, again.annealing_fraction) == (
            config.temperature_decay,
            config.annealing_fraction,
        )


def test_the_defaults_of_sft_train(tmp_path):
    # bfloat16 autocast and gradient checkpointing, on a CPU.
    args = MCLConfig(
        output_dir=str(tmp_path), use_cpu=True, max_steps=3, report_to=[], logging_steps=1, disable_tqdm=True
    )
    assert args.bf16
    assert args.gradient_checkpointing
    trainer = MCLTrainer(
        model=tiny_llama(),
        args=args,
        train_dataset=ragged_pairs(),
        processing_class=word_tokenizer(),
        peft_config=hypotheses(),
    )
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert trainer.model.base_model.model.model.layers[0].mlp.up_proj.mclora_A["default"].dtype == torch.float32


@pytest.mark.skipif(torch.accelerator.current_accelerator() is None, reason="there is nothing to offload from")
@pytest.mark.parametrize("objective", ["wta", "relaxed", "annealed"])
def test_activation_offloading_changes_nothing(tmp_path, objective):
    def losses(**options):
        trainer = trainer_for(tmp_path, model=adapted_llama(), objective=objective, use_cpu=False, **options)
        trainer.train()
        return logged(trainer, "loss")

    assert losses(activation_offloading=True) == pytest.approx(losses())


def test_mixtures_of_experts_train_with_several_hypotheses(tmp_path):
    for objective in ("wta", "relaxed"):
        trainer = trainer_for(
            tmp_path,
            model=tiny_mixtral(),
            peft_config=hypotheses(3, target_modules=["q_proj", "v_proj"]),
            objective=objective,
        )
        trainer.train()
        assert min(logged(trainer, "aux_loss")) > 0
        entry = trainer.state.log_history[0]
        # At the first step all hypotheses are the base model.
        assert entry["loss"] == pytest.approx(entry["wta_nll"] + 0.1 * entry["aux_loss"], rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_other_models_train_with_several_hypotheses(tmp_path, family):
    trainer = trainer_for(tmp_path, model=FAMILIES[family](), max_steps=8, learning_rate=3e-2)
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]


def test_shared_modules_are_trained_beside_the_hypotheses(tmp_path):
    gradients = Gradients()
    config = MCLoraConfig(num_hypotheses=3, **{**LORA, "target_modules": ["q_proj"], "bias": "none"})
    config.modules_to_save = ["embed_tokens"]
    trainer = trainer_for(tmp_path, peft_config=config, callbacks=[gradients], objective="relaxed")
    trainer.train()
    assert any("embed_tokens" in name for name in gradients.steps[0])


# --- metrics of the user ---


def test_compute_metrics_gets_the_logits_of_the_winners(tmp_path):
    model = adapted_llama()
    reference = frozen_copy(model)
    collator = RecordingCollator()
    seen = {}

    def compute_metrics(prediction):
        seen["logits"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"answer": 42.0}

    trainer = trainer_for(
        tmp_path,
        model=model,
        data_collator=collator,
        eval_dataset=ragged_pairs(6, seed=1),
        compute_metrics=compute_metrics,
        per_device_eval_batch_size=6,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_answer"] == 42.0
    assert metrics["eval_loss"] == metrics["eval_wta_nll"]
    (batch,) = collator.batches
    winners = [row.index(max(row)) for row in scores_by_hand(reference, batch)]
    assert len(set(winners)) > 1
    with torch.no_grad():
        expected = reference(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], hypotheses=torch.tensor(winners)
        ).logits.numpy()
    real = batch["attention_mask"].bool().numpy()
    np.testing.assert_allclose(seen["logits"][real], expected[real], atol=1e-5)
    assert (seen["labels"] == batch["labels"].numpy()).all()


# --- callbacks ---


class GenerateInBetween(TrainerCallback):
    """Decodes after each step, as callbacks that show samples do."""

    def __init__(self, put_back: bool) -> None:
        self.put_back = put_back
        self.shapes = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.eval()
        ids = torch.tensor([[5, 6], [7, 8]])
        with torch.no_grad():
            self.shapes.append(model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape)
            model(input_ids=ids, hypotheses=1)
        model.set_hypothesis(2)
        if self.put_back:
            model.train()


@pytest.mark.parametrize("put_back", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_decoding_in_the_middle_of_training_changes_nothing(tmp_path, put_back, checkpointing):
    def entries(*callbacks):
        trainer = trainer_for(
            tmp_path, model=adapted_llama(), callbacks=list(callbacks), gradient_checkpointing=checkpointing
        )
        trainer.train()
        return history(trainer)

    decoder = GenerateInBetween(put_back)
    with_decoding, without = entries(decoder), entries()
    assert decoder.shapes == [torch.Size([6, 5])] * 4
    for ours, theirs in zip(with_decoding, without, strict=True):
        # TRL tells training from evaluation by the mode that the callback left the model in, and names its own so.
        own = (
            theirs.keys()
            if put_back
            else [name for name in theirs if name not in ("entropy", "mean_token_accuracy", "num_tokens")]
        )
        assert {name: ours.get(name) for name in own} == {name: theirs[name] for name in own}


def test_callbacks_see_the_metrics(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(metrics)

    trainer = trainer_for(
        tmp_path, max_steps=1, callbacks=[Watch()], eval_dataset=ragged_pairs(5), eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    assert any("win_share/2" in entry and "temperature" in entry for entry in seen)
    assert any("eval_win_share/2" in entry for entry in seen)


def test_training_stops_when_a_callback_says_so(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = trainer_for(tmp_path, callbacks=[Stop()])
    trainer.train()
    assert len(logged(trainer, "loss")) == 2


# --- the point of it all ---


def test_hypotheses_take_a_mode_each(tmp_path):
    # Two ways to go on after one prompt.
    ways = (" " + " ".join(WORDS[1:6]), " " + " ".join(WORDS[11:16]))
    rows = Dataset.from_list([{"prompt": "w50", "completion": ways[i % 2]} for i in range(32)])
    base = tiny_llama()
    base.lm_head.weight.data *= 60  # So that it can be sure of a word.
    trainer = trainer_for(
        tmp_path,
        model=base,
        data=rows,
        peft_config=hypotheses(2),
        max_steps=40,
        per_device_train_batch_size=16,
        lr_scheduler_type="constant",
        objective="relaxed",
        logging_steps=40,
    )
    trainer.train()
    scored = trainer.score(rows)
    assert set(zip(scored.winners.tolist(), [0, 1] * 16, strict=True)) in ({(0, 0), (1, 1)}, {(0, 1), (1, 0)})
    # One model has to hedge: log 2 nats for the six tokens.
    assert scored.summary()["wta_nll"] < 0.5 * math.log(2) / 6
    trainer.model.eval()
    decoded = trainer.model.generate(
        **trainer.processing_class(["w50"], return_tensors="pt", return_token_type_ids=False),
        max_new_tokens=5,
        do_sample=False,
    )
    assert {" " + words for words in trainer.processing_class.batch_decode(decoded[:, 1:])} == set(ways)


class CompiledGraphs(TrainerCallback):
    """The number of graphs that have been compiled by the end of each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, *args, **kwargs):
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["wta", pytest.param("relaxed", marks=pytest.mark.long)])
def test_a_compiled_model_is_not_compiled_anew_for_each_batch(tmp_path, objective):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs, losses = CompiledGraphs(), []
    for options in ({"torch_compile": True, "torch_compile_backend": "eager", "callbacks": [graphs]}, {}):
        data = ragged_rows(40)
        trainer = trainer_for(tmp_path, model=adapted_llama(), data=data, max_steps=10, objective=objective, **options)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # Lengths and winners change from step to step, which is found out in the first three. The last batch has fewer rows.
    assert 0 < graphs.counts[2] == graphs.counts[8]
