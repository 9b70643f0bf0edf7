"""SFTTrainer with a competition between hypotheses in place of cross-entropy."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput, get_config_model_id

from trainer_ext import checks
from trainer_ext.config import MCLConfig
from trainer_ext.metrics import ScoreWindow
from trainer_ext.objectives import assignment_weights, decay_for, temperature_at
from trainer_ext.scoring import SupervisedPositions, score_tokens


logger = logging.getLogger(__name__)


class MCLTrainer(SFTTrainer):
    """Trains the K hypotheses of an MCLORA model by winner-takes-all (LoRA-MCL, arXiv 2507.10419).

    Takes the arguments of `trl.SFTTrainer`; data sets, chat templates, masks, callbacks, checkpoints and the Hub work as
    there. For every batch all hypotheses are scored without a graph and without dropout, the objective turns the scores into
    weights, and only the (sequence, hypothesis) rows with a weight above zero are trained. With one hypothesis this is
    SFTTrainer.

    ```python
    from trainer_ext import MCLConfig, MCLTrainer
    from peft_mcl import MCLoraConfig

    trainer = MCLTrainer(
        model="Qwen/Qwen3-0.6B",
        args=MCLConfig(output_dir="out", objective="annealed"),
        train_dataset=dataset,
        peft_config=MCLoraConfig(num_hypotheses=3, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): As for SFTTrainer; a `PeftModel` must have
            an MCLORA adapter.
        args ([`MCLConfig`], *optional*): The arguments.
        peft_config ([`~peft_mcl.MCLoraConfig`], *optional*): Needed unless `model` is an MCLORA model.
        data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks, optimizers,
            optimizer_cls_and_kwargs, preprocess_logits_for_metrics, quantization_config, formatting_func: As for SFTTrainer.
        compute_loss_func: Refused; the loss is the objective's.

    Raises:
        ValueError: The model has no hypotheses, the data set is empty or lacks its columns, an option makes no sense with
            one loss for each sequence, or the output directory cannot be written.
    """

    _tag_names = ["trl", "peft-mcl", "mclora"]
    _name = "LoRA-MCL"
    _paper = {
        "title": "Multiple Choice Learning of Low-Rank Adapters for Language Modeling",
        "id": "2507.10419",
    }

    # Untyped in the parents: a transformers model, None only before `__init__` has run.
    model: Any
    args: MCLConfig

    def __init__(
        self,
        model: Any,
        args: MCLConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, Any] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[..., Any] | None = None,
    ) -> None:
        args = _as_mcl_config(args, model)
        checks.check_model(model, peft_config)
        if compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` is not supported by MCLTrainer: the loss is the weighted sum of the likelihoods of the "
                "hypotheses. Choose it with `MCLConfig(objective=...)`."
            )
        checks.check_offloading(args)
        checks.check_output_dir(args.output_dir)
        checks.check_dataset("train_dataset", train_dataset, args, formatting_func)
        for name, dataset in _named_datasets(eval_dataset).items():
            checks.check_dataset(name, dataset, args, formatting_func)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        checks.check_parallelism(self.accelerator)
        for name, dataset in {"train_dataset": self.train_dataset, **_named_datasets(self.eval_dataset)}.items():
            checks.check_prepared_dataset(name, dataset, args.max_length)
        self._positions = SupervisedPositions(self.model.get_base_model())
        self._eval_window = ScoreWindow()
        self._forget_earlier_runs()
        self._has_dropout = has_dropout(self.model) or self.args.neftune_noise_alpha is not None
        if self.args.loss_normalization == "sequence":
            # Some models make Trainer count no labels, because their own loss would not use the number. Ours does.
            self.model_accepts_loss_kwargs = True

    def _forget_earlier_runs(self) -> None:
        self._train_window = ScoreWindow()
        self._draws = (-1, 0)
        self._last_win: list[int] | None = None
        self._warned: set[int] = set()
        self._last_temperature = self.args.initial_temperature
        self._weighted_share = 1.0

    # ------------------------------------------------------------------------------------------------------------
    # The loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the competition, by TRL's own normalisation, scaling and metrics.

        TRL asks the model for the log-probability of each token of B rows. It is answered with the weighted sum over the
        hypotheses, sum_k q_k log p_k, so everything TRL does with it stays exact: the division by the tokens of the global
        batch, accumulation, several processes.
        """
        return super().compute_loss(
            _Competition(self, model), inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def _compete(self, model: nn.Module, inputs: dict[str, Any]) -> FusedCausalLMOutput:
        """Score all hypotheses, weight them, train the rows that carry weight.

        Returns:
            TRL's output with one entry for each of the N supervised tokens of the batch: `log_probs` is sum_k q_k log p_k
            with the graph of the trained rows; `entropy` and `is_top1` are those of the winner.
        """
        num_hypotheses = self._num_hypotheses
        is_training = self.model.training
        all_have_graphs = is_training and (num_hypotheses == 1 or self._trains_all_rows())
        if all_have_graphs or not is_training:
            scored = score_tokens(model, self._positions, inputs, "all")
        else:
            with torch.no_grad(), evaluation_mode(self.model):
                scored = score_tokens(model, self._positions, inputs, "all")

        scores, sequence = scored.per_sequence().T, scored.sequence
        weights, winners = self._assign(scores, scored.num_tokens, is_training)
        self._record(scores, scored.num_tokens, winners)
        self._winners = winners
        if is_training and self._annealing_temperature() is not None:
            # One number for all processes: each must make the same calls, as a call may synchronise buffers or weights.
            share = (weights > 0).float().mean()
            self._weighted_share = self.accelerator.gather(share).mean().item()

        if all_have_graphs or not is_training:
            log_probs, aux_loss = (weights.T[:, sequence] * scored.log_probs).sum(dim=0), scored.aux_loss
        else:
            log_probs, aux_loss = self._train_rows(model, inputs, weights)
        if self.args.loss_normalization == "sequence":
            # Dividing by the tokens of a sequence here leaves TRL to divide by what `_get_num_items_in_batch` counts.
            log_probs = log_probs / scored.num_tokens[sequence]
        token = torch.arange(len(sequence), device=sequence.device)
        winner = winners[sequence]
        return FusedCausalLMOutput(
            log_probs=log_probs,
            entropy=scored.entropy[winner, token],
            is_top1=scored.is_top1[winner, token],
            label_mask=torch.ones_like(sequence, dtype=torch.bool),
            aux_loss=aux_loss,
        )

    def _train_rows(
        self, model: nn.Module, inputs: dict[str, Any], weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the rows with a weight above zero with a graph.

        Returns:
            sum_k q_k log p_k of the supervised tokens, shape (N,), and the load-balancing loss of mixtures of experts.
        """
        batch_size = len(weights)
        sequences, hypotheses = weights.nonzero(as_tuple=True)
        if len(sequences) == batch_size:
            # Exactly one row for each sequence, and `nonzero` keeps their order: nothing needs to be copied.
            trained = score_tokens(model, self._positions, inputs, hypotheses)
            return weights[sequences, hypotheses][trained.sequence] * trained.log_probs[0], trained.aux_loss

        if not has_only_rows(inputs, batch_size):
            # Image patches and the like cannot be selected by row: train all rows, some with weight zero.
            trained = score_tokens(model, self._positions, inputs, "all")
            return (weights.T[:, trained.sequence] * trained.log_probs).sum(dim=0), trained.aux_loss

        trained = score_tokens(model, self._positions, select_rows(inputs, sequences), hypotheses)
        weighted = weights[sequences, hypotheses][trained.sequence] * trained.log_probs[0]
        # The tokens of row r go back to the place of the tokens of its sequence.
        num_tokens = inputs["labels"][:, 1:].ne(-100).sum(dim=1)
        first_of_sequence = num_tokens.cumsum(0) - num_tokens
        first_of_row = trained.num_tokens.cumsum(0) - trained.num_tokens
        offset = torch.arange(len(trained.sequence), device=weights.device) - first_of_row[trained.sequence]
        place = first_of_sequence[sequences[trained.sequence]] + offset
        return weighted.new_zeros(int(num_tokens.sum())).index_add(0, place, weighted), trained.aux_loss

    def _trains_all_rows(self) -> bool:
        """Whether to run all rows with a graph at once, because scoring them first would save too little.

        A backward pass costs two forward passes, so scoring all rows and training a share f of them costs 1 + 3 f against 3:
        more, if f is above 2/3. The share of the last batch stands for that of this one; the gradient is exact either way.
        Only without dropout: the winner is chosen without its noise (Shen et al., 2019).
        """
        if self.args.objective == "relaxed":
            all_weighted = 0.0 < self.args.relaxed_epsilon < 1.0
        else:
            all_weighted = self._annealing_temperature() is not None and self._weighted_share > 2 / 3
        return all_weighted and not self._has_dropout

    def _assign(
        self, scores: torch.Tensor, num_tokens: torch.Tensor, is_training: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights (B, K) of this batch and its winners (B,). In evaluation the best hypothesis has all the weight."""
        if is_training:
            self._last_temperature = self.temperature
        return assignment_weights(
            self.args.objective if is_training else "wta",
            scores,
            num_tokens,
            epsilon=self.args.relaxed_epsilon,
            temperature=self._annealing_temperature(),
            generator=self._generator(is_training),
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        if self.args.loss_normalization == "sequence":
            # The transformers Trainer counts labels; give it one label for each sequence that has any.
            batch_samples = [_one_label_per_sequence(batch) for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    # ------------------------------------------------------------------------------------------------------------
    # Schedule and draws

    @property
    def _num_hypotheses(self) -> int:
        return self.model.num_hypotheses

    @property
    def temperature(self) -> float:
        """The temperature of the running optimizer step, in nats for each token."""
        args = self.args
        decay = args.temperature_decay
        if decay is None:
            steps = args.annealing_fraction * self.state.max_steps
            decay = decay_for(args.initial_temperature, args.final_temperature, steps)
        return temperature_at(self.state.global_step, args.initial_temperature, args.final_temperature, decay)

    def _annealing_temperature(self) -> float | None:
        """The temperature of objective "annealed" while it falls, None once it is final."""
        if self.args.objective != "annealed":
            return None
        temperature = self.temperature
        return temperature if temperature > self.args.final_temperature else None

    def _generator(self, is_training: bool) -> torch.Generator:
        """Random numbers for ties and draws that depend only on the seed and the place in training.

        So a run that was resumed draws what it would have drawn, and processes draw differently.
        """
        step = self.state.global_step
        if is_training:
            count = self._draws[1] + 1 if self._draws[0] == step else 0
            self._draws = (step, count)
        else:
            count = len(self._eval_window)
        place = f"{self.args.seed}/{is_training}/{step}/{count}/{self.accelerator.process_index}"
        digest = hashlib.blake2b(place.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    # ------------------------------------------------------------------------------------------------------------
    # Reports

    def _record(self, scores: torch.Tensor, num_tokens: torch.Tensor, winners: torch.Tensor) -> None:
        # In training the batches of a step are fetched in advance, so `gather_for_metrics` would take each of the last step
        # for the last of the epoch, and cut it to the length of that one.
        is_training = self.model.training
        gather = self.accelerator.gather if is_training else self.accelerator.gather_for_metrics
        scores, num_tokens, winners = gather((scores.contiguous(), num_tokens.contiguous(), winners.contiguous()))
        if not is_training:
            self._eval_window.add(scores, num_tokens, winners)
            return
        self._train_window.add(scores, num_tokens, winners)
        # Under objective "random" a hypothesis is trained whether it wins or not.
        if self.args.no_win_warning_steps and self.args.objective != "random" and scores.shape[1] > 1:
            self._watch_wins(set(winners[num_tokens > 0].tolist()), scores.shape[1])

    def _watch_wins(self, winners: set[int], num_hypotheses: int) -> None:
        step, patience = self.state.global_step, self.args.no_win_warning_steps
        if self._last_win is None:
            self._last_win = [step] * num_hypotheses
        for hypothesis in range(num_hypotheses):
            if hypothesis in winners:
                self._last_win[hypothesis] = step
                self._warned.discard(hypothesis)
            elif step - self._last_win[hypothesis] >= patience and hypothesis not in self._warned:
                self._warned.add(hypothesis)
                if self.is_world_process_zero():
                    logger.warning(
                        "Hypothesis %d has won no sequence for %d steps (up to step %d): it is no longer trained, or only by "
                        "the share of the losers. A slower annealing or `objective='relaxed'` with a larger "
                        "`relaxed_epsilon` keeps hypotheses alive.",
                        hypothesis,
                        step - self._last_win[hypothesis],
                        step,
                    )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As SFTTrainer; training logs get the metrics of the competition since the last log."""
        # Told by what is logged: a callback may have left the model in either mode.
        if self._train_window and ("loss" in logs or "train_loss" in logs):
            logs.update(self._train_window.summary())
            self._train_window.clear()
            if self.args.objective == "annealed":
                logs["temperature"] = self._last_temperature
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As SFTTrainer, with the exact metrics of the competition over the whole data set; the loss is `wta_nll`."""
        self._eval_window = ScoreWindow()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._eval_window and output.metrics is not None:
            metrics = self._eval_window.summary()
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
            output.metrics[f"{metric_key_prefix}_loss"] = metrics["wta_nll"]
        return output

    def score(self, dataset: Dataset) -> ScoreWindow:
        """Score every sequence of a data set under every hypothesis, without training.

        Args:
            dataset (`datasets.Dataset`): In any format that `evaluate` takes.

        Returns:
            [`ScoreWindow`]: `scores` (N, K) in nats, `num_tokens` (N,) and `winners` (N,), in the order of the data set.

        Raises:
            ValueError: A sequence lost its completion when it was cut to `max_length`, or an option changes the order of
                evaluation (`shuffle_dataset`, grouping by length).
        """
        if self.args.shuffle_dataset or self.args.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "`score` keeps the order of the data set, so it needs `shuffle_dataset=False` and a "
                "`train_sampling_strategy` other than 'group_by_length'."
            )
        self.evaluate(dataset)
        if len(self._eval_window.winners) != len(dataset):
            raise ValueError(
                f"Only {len(self._eval_window.winners)} of the {len(dataset)} sequences can be scored: the others lost their "
                f"completion when they were cut to `max_length={self.args.max_length}`. Raise it, or shorten the prompts."
            )
        return self._eval_window

    # ------------------------------------------------------------------------------------------------------------
    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As SFTTrainer. `resume_from_checkpoint=True` takes the newest checkpoint that was written whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(checks.last_whole_checkpoint(Path(str(self.args.output_dir))))
        checks.check_trainable(self.model)
        self._forget_earlier_runs()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


class _Competition:
    """Stands for the model in TRL's `compute_loss`, which only calls it."""

    def __init__(self, trainer: MCLTrainer, model: nn.Module) -> None:
        self.trainer = trainer
        self.model = model

    def __call__(self, *, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if fused_lm_head:
            return self.trainer._compete(self.model, inputs)
        # TRL asks again without the fused head for the logits of `compute_metrics`: those of the winners.
        hypotheses = 0 if self.trainer._num_hypotheses == 1 else self.trainer._winners
        return self.model(**inputs, hypotheses=hypotheses)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and put every module back as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def has_dropout(model: Any) -> bool:
    """Whether a training forward of `model` is random: dropout modules, or dropout rates in its configuration."""
    modules = (module.p > 0 for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd))
    config = model.config.to_dict() if hasattr(model, "config") else {}
    return any(modules) or _has_dropout_rate(config)


def _has_dropout_rate(config: dict[str, Any]) -> bool:
    for name, value in config.items():
        if isinstance(value, dict) and _has_dropout_rate(value):  # The parts of a multimodal model.
            return True
        # Not all keys are strings (`id2label`).
        if "drop" in str(name) and isinstance(value, (int, float)) and value > 0:
            return True
    return False


def select_rows(inputs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """The inputs of the given rows of a batch, in their order.

    Args:
        inputs (`dict`): Model inputs whose tensors have one row for each sequence (see `has_only_rows`).
        rows (`torch.Tensor`): int64 of shape (R,), indices of sequences.
    """
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and value.dim() > 0 else value
        for name, value in inputs.items()
    }


def has_only_rows(inputs: dict[str, Any], batch_size: int) -> bool:
    """Whether every tensor of the inputs has one row for each sequence, so that rows can be selected."""
    return all(
        value.dim() == 0 or len(value) == batch_size for value in inputs.values() if isinstance(value, torch.Tensor)
    )


def _one_label_per_sequence(batch: dict[str, Any]) -> dict[str, Any]:
    labels = batch["labels"]
    has_label = labels[:, 1:].ne(-100).any(dim=1)
    counted = labels.new_full((len(labels), 2), -100)
    counted[:, 1] = torch.where(has_label, 0, -100)
    return {**batch, "labels": counted}


def _named_datasets(eval_dataset: Any) -> dict[str, Any]:
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{key!r}]": dataset for key, dataset in eval_dataset.items()}
    return {"eval_dataset": eval_dataset}


def _as_mcl_config(args: MCLConfig | TrainingArguments | None, model: Any) -> MCLConfig:
    if isinstance(args, MCLConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return MCLConfig(f"{os.path.basename(name.rstrip('/'))}-MCL")
    # `to_dict` hides whatever is called a token, also those of the tokenizer.
    tokens = {name: getattr(args, name) for name in args.to_dict() if name.endswith("_token")}
    return MCLConfig(**{**args.to_dict(), **tokens})
