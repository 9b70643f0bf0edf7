"""SFTTrainer with a competition between hypotheses in place of cross-entropy."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import broadcast
from peft import PeftConfig
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, has_length
from trl.trainer.utils import FusedCausalLMOutput, get_config_model_id

from trainer_ext import checks, launches
from trainer_ext.batches import SequenceBatch
from trainer_ext.config import MCLConfig
from trainer_ext.draws import Occurrences, sequence_draws
from trainer_ext.groups import GROUPS, GroupCollator, GroupSampler, group_id, matched_weights
from trainer_ext.noise import evaluation_mode, has_dropout
from trainer_ext.objectives import (
    ANNEALED,
    assignment_weights,
    drop_small_weights,
    give_broken_to_winner,
    is_broken,
    needs_winners_only,
    pick_winners,
    sample_losers,
    sample_one,
    winner_weights,
    wta_weights,
)
from trainer_ext.planning import RecentScores, StepPlan, balanced_scores, finite_rows, spread_of
from trainer_ext.reporting import ReportingTrainer
from trainer_ext.reseeding import Revival, reseed
from trainer_ext.schedule import Schedule
from trainer_ext.scoring import (
    ScoringCall,
    SupervisedPositions,
    TokenScores,
    join_copies,
    join_rows,
    plan_rows,
    plan_scoring,
    pool_sequences,
    score_sequences,
    score_tokens,
)
from trainer_ext.seeding import Clusters, find_clusters
from trainer_ext.winners import RememberedWinners


logger = logging.getLogger(__name__)

# Sequences of a call that looks for clusters: the same for every launch.
SEEDING_BATCH = 8


class MCLTrainer(ReportingTrainer):
    """Trains the K hypotheses of an MCLORA model by winner-takes-all (LoRA-MCL, arXiv 2507.10419).

    Takes the arguments of `trl.SFTTrainer`; data sets, chat templates, masks, callbacks, checkpoints and the Hub work as
    there. For every batch all hypotheses are scored without a graph and without dropout, the objective turns the scores into
    weights, and only the (sequence, hypothesis) rows with a weight above zero are trained. With one hypothesis this is
    SFTTrainer.

    The win shares become the adapter's `hypothesis_weights`, for rankings: those of the last evaluation, or, while there was
    none in this run, of the training sequences since the log before the last; smoothed, as if each hypothesis had won one more.
    Weights that were there before training are replaced, as they were those of other hypotheses. Weights that are set later
    are left alone, and so are those of a trainer that only evaluates.

    ```python
    from trainer_ext import MCLConfig, MCLTrainer
    from peft_mcl import MCLoraConfig

    trainer = MCLTrainer(
        model="Qwen/Qwen3-0.6B",
        args=MCLConfig(output_dir="out"),
        train_dataset=dataset,
        peft_config=MCLoraConfig(
            num_hypotheses=3, r=2, shared_r=56, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
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

    _tag_names = ["trl", "lora-mcl", "mclora", "peft-mcl"]
    _name = "LoRA-MCL"
    _paper = {
        "title": "Multiple Choice Learning of Low-Rank Adapters for Language Modeling",
        "id": "2507.10419",
    }

    # Untyped in the parents: a transformers model, None only before `__init__` has run.
    model: Any
    data_collator: Any
    _signature_columns: Any
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
        launches.check_launch(args.world_size, args.n_gpu)
        launches.check_compiler(args)
        checks.check_model(model, peft_config)
        checks.check_start(model, peft_config, args)
        if compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` is not supported by MCLTrainer: the loss is the weighted sum of the likelihoods of the "
                "hypotheses. Choose it with `MCLConfig(objective=...)`."
            )
        checks.check_offloading(args)
        launches.check_mixed_precision(args)
        checks.check_output_dir(args.output_dir)
        checks.check_dataset("train_dataset", train_dataset, args, formatting_func)
        for name, dataset in _named_datasets(eval_dataset).items():
            checks.check_dataset(name, dataset, args, formatting_func)
        checks.check_groups(train_dataset, args.group_column)
        self._group_sampler: GroupSampler | None = None

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
        launches.check_sharding(self.accelerator)
        launches.check_parallelism(self.accelerator)
        launches.check_trained_head(self.model, self.accelerator)
        launches.check_reviving(args.revive_after_steps, self.accelerator)
        if self.eval_dataset is not None:
            checks.check_packed_evaluation(self.args, self.padding_free, self.accelerator.num_processes)
        for name, dataset in {"train_dataset": self.train_dataset, **_named_datasets(self.eval_dataset)}.items():
            checks.check_prepared_dataset(name, dataset, args.max_length)
        if args.group_column is not None:
            self.data_collator = GroupCollator(self.data_collator, args.group_column)
        self._positions = SupervisedPositions(self.model.get_base_model())
        self._forget_earlier_runs()
        self._has_dropout = has_dropout(self.model) or self.args.neftune_noise_alpha is not None
        if self.args.loss_normalization == "sequence":
            # Some models make Trainer count no labels, because their own loss would not use the number. Ours does.
            self.model_accepts_loss_kwargs = True

    def _forget_earlier_runs(self) -> None:
        self._occurrences = Occurrences()
        self._last_temperature: float | None = None
        # Of steps that are planned as a whole.
        self._plan: StepPlan | None = None
        self._recent = RecentScores(self._num_hypotheses, self.args.balance_queue)
        self._spread = 1.0
        self._weighted_share = 1.0
        self._remembered = RememberedWinners(self.args.score_every) if self.args.score_every > 1 else None
        after = self.args.revive_after_steps
        self._revival = Revival(self._num_hypotheses, after) if after and self._num_hypotheses > 1 else None

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
            TRL's output with one entry for each token of the rows that were run: `log_probs` is q_k log p_k of the row, with
            its graph. `label_mask` is true in one row of each sequence, that of its largest weight; `entropy` and `is_top1`
            are zero in the others. TRL only sums these, so the order of the rows does not matter.
        """
        batch = SequenceBatch(inputs)
        is_training = self.model.training
        if is_training and self._schedule.is_together:
            return self._learn_together(model, batch)
        if is_training and self._plans_steps:
            # A batch that does not come from `get_batch_samples` is a step of its own.
            plan = self._plan or self._plan_step([inputs])
            weights = plan.take(batch.keys)
            return self._weigh(*self._run_weighted(model, batch, weights, _is_largest(weights)))
        draws = self._draw(batch, is_training)
        if is_training:
            self._last_temperature = self.temperature
        runs_all = self._num_hypotheses == 1 or (is_training and self._trains_all_rows())
        if runs_all:
            run = self._run_all(model, batch)
            scores = run.per_sequence().T
            weights, self._winners = self._assign(scores, batch.num_tokens, draws, is_training)
            # A hypothesis that is broken on a sequence has put NaN into the graph, so the others are run without it.
            runs_all = self._num_hypotheses == 1 or not self._happens_anywhere(is_broken(scores).any())
        else:
            weights, self._winners = self._score(model, batch, draws, is_training)
        if is_training:
            weights = self._thin_out(weights, draws)
        # One row that is run stands for its sequence in what TRL counts.
        is_largest = _is_largest(weights)
        if runs_all:
            row_weights, is_counted = weights.T, is_largest.T
        else:
            run, row_weights, is_counted = self._run_weighted(model, batch, weights, is_largest)
        if is_training and self._annealing_temperature() is not None:
            # One number for all processes: each must make the same calls, as a call may synchronise buffers or weights.
            share = (weights > 0).float().mean()
            self._weighted_share = self.accelerator.gather(share).mean().item()
        return self._weigh(run, row_weights, is_counted)

    def _weigh(self, run: TokenScores, row_weights: torch.Tensor, is_counted: torch.Tensor) -> FusedCausalLMOutput:
        """What TRL gets of the rows that were run, (C, R) of them with as many entries of `row_weights` and `is_counted`."""
        log_probs, counted = row_weights[:, run.sequence] * run.log_probs, is_counted[:, run.sequence]
        if self.args.loss_normalization == "sequence":
            # Dividing by the tokens of a sequence here leaves TRL to divide by what `_get_num_items_in_batch` counts.
            log_probs = log_probs / run.num_tokens[run.sequence]
        return FusedCausalLMOutput(
            log_probs=log_probs,
            entropy=run.entropy * counted,
            is_top1=run.is_top1 & counted,
            label_mask=counted,
            aux_loss=run.aux_loss,
        )

    def _learn_together(self, model: nn.Module, batch: SequenceBatch) -> FusedCausalLMOutput:
        """Train all hypotheses as one, their mean: a step of plain LoRA. They all tie, so lots decide what is reported."""
        run = score_tokens(model, self._positions, batch, "mean")
        scores = run.per_sequence().T.expand(-1, self._num_hypotheses)
        draws = self._draw(batch, is_training=True)
        self._watch_wins(self._record(scores, batch.num_tokens, pick_winners(scores, draws[:, : self._num_hypotheses])))
        ones = torch.ones_like(run.num_tokens)[None]
        return self._weigh(run, ones.float(), ones.bool())

    @property
    def _runs_in_parts(self) -> bool:
        """Whether rows beyond those of the batch are run one part after the other, under one graph.

        Then the temporary memory of a pass, the logits above all, is that of plain LoRA. Not with several processes, which
        would have to agree on the number of parts, nor with a load-balancing loss, which is that of the rows of a call.
        """
        return self.accelerator.num_processes == 1 and not self.aux_loss_enabled

    def _happens_anywhere(self, condition: torch.Tensor) -> bool:
        """Whether a condition (a bool tensor) is true in any process. All of them must ask."""
        if self.accelerator.num_processes > 1:
            condition = self.accelerator.gather(condition.int()).any()
        return bool(condition)

    def _run_all(self, model: nn.Module, batch: SequenceBatch) -> TokenScores:
        """Run every sequence under every hypothesis: scores with C = K."""
        if self._num_hypotheses == 1 or not self._runs_in_parts:
            return score_tokens(model, self._positions, batch, "all")
        return join_copies([score_tokens(model, self._positions, batch, k) for k in range(self._num_hypotheses)])

    def _run_weighted(
        self, model: nn.Module, batch: SequenceBatch, weights: torch.Tensor, is_counted: torch.Tensor
    ) -> tuple[TokenScores, torch.Tensor, torch.Tensor]:
        """Run the (sequence, hypothesis) rows with a weight above zero.

        Returns:
            The C * R rows that were run, and of each its entries (C, R) of `weights` and `is_counted`, both of shape (B, K).
        """
        sequences, hypotheses = weights.nonzero(as_tuple=True)
        learns = batch.num_tokens[sequences] > 0
        if len(sequences) == len(batch) and not batch.is_packed and (bool(learns.all()) or not batch.can_select):
            # Exactly one row for each sequence, and `nonzero` keeps their order: nothing needs to be copied.
            run = score_tokens(model, self._positions, batch, hypotheses)
        elif not batch.can_select:
            # Image patches and the like cannot be selected by row: all rows are run, some with weight zero.
            return self._run_all(model, batch), weights.T, is_counted.T
        else:
            # What has nothing to learn needs no row, and its hypothesis may be broken. But a batch needs one, for its graph.
            learns[0] |= not learns.any()
            sequences, hypotheses = sequences[learns], hypotheses[learns]
            parts = plan_rows(batch, sequences.tolist(), hypotheses.tolist(), self._runs_in_parts)
            runs = []
            for part in parts:
                chosen = batch.select(sequences[part].tolist(), self.args.pad_to_multiple_of)
                runs.append(score_tokens(model, self._positions, chosen, hypotheses[part]))
            run, order = join_rows(runs), [row for part in parts for row in part]
            sequences, hypotheses = sequences[order], hypotheses[order]
        return run, weights[sequences, hypotheses][None], is_counted[sequences, hypotheses][None]

    def _score(
        self, model: nn.Module, batch: SequenceBatch, draws: torch.Tensor, is_training: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights (B, K) and winners (B,) of a batch, from scores without a graph and without dropout."""
        temperature = self._annealing_temperature()
        if not is_training or self._remembered is None or not needs_winners_only(self.args.objective, temperature):
            scores, num_tokens = self._score_part(model, batch, list(range(len(batch))), is_training)
            return self._assign(scores, num_tokens, draws, is_training)
        return self._score_what_is_due(model, batch, draws, self._remembered)

    def _score_what_is_due(
        self, model: nn.Module, batch: SequenceBatch, draws: torch.Tensor, remembered: RememberedWinners
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not batch.can_select:
            raise ValueError(
                f"`score_every={self.args.score_every}` needs inputs with one row for each sequence, but these batches have "
                "others (patches of images, say), which cannot be taken apart. Set it to 1."
            )
        keys = batch.keys
        has_tokens = (batch.num_tokens > 0).tolist()
        # Sequences with nothing to learn have no winner, and whatever stands for it does not matter.
        known = [remembered.look_up(key) if counts else 0 for key, counts in zip(keys, has_tokens, strict=True)]
        due = [sequence for sequence, winner in enumerate(known) if winner is None]
        scores, num_tokens = self._score_part(model, batch, due, is_training=True)
        found = pick_winners(scores, draws[due, : self._num_hypotheses])
        self._record(scores, num_tokens, found)

        winners = torch.tensor([-1 if winner is None else winner for winner in known], device=scores.device)
        winners[due] = found
        is_due = torch.zeros_like(winners)
        is_due[due] = 1
        # Every process remembers everything: in the next epoch a sequence may come to another one.
        visits = torch.stack([torch.tensor(keys, device=winners.device), winners, is_due], dim=1)[has_tokens]
        everywhere = [visit for visit in self._gather_ragged(visits, fill=-1).tolist() if visit[0] >= 0]
        for key, winner, was_scored in everywhere:
            remembered.visit(key, winner if was_scored else None)
        self._watch_wins([winner for _, winner, _ in everywhere])
        weights = winner_weights(self.args.objective, winners, self._num_hypotheses, self.args.relaxed_epsilon)
        weights[due] = give_broken_to_winner(weights[due], scores, found)
        return weights, winners

    def _score_part(
        self, model: nn.Module, batch: SequenceBatch, sequences: list[int], is_training: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (S, K) of some sequences of a batch, and the number of tokens (S,) that they are sums of."""
        part = batch if len(sequences) == len(batch) else batch.select(sequences or [0], self.args.pad_to_multiple_of)
        if is_training and self.args.score_prefix is not None:
            part = part.first_tokens(self.args.score_prefix)
        calls = plan_scoring(part, self._num_hypotheses, self.args.scoring_batch_size) if sequences else []
        if self.accelerator.num_processes > 1:
            # Calls synchronise buffers or sharded weights, so every process makes as many. What an extra one computes is
            # overwritten by the calls after it.
            count = torch.tensor(len(calls), device=self.accelerator.device)
            most = int(self.accelerator.gather(count).max())
            calls = [ScoringCall([0] if part.can_select else None, 0)] * (most - len(calls)) + calls
        with self._scoring_mode(is_training):
            scores = score_sequences(
                model, self._positions, part, self._num_hypotheses, calls, self.args.pad_to_multiple_of
            )
        return scores[: len(sequences)], part.num_tokens[: len(sequences)]

    def _scoring_mode(self, is_training: bool) -> AbstractContextManager[None]:
        """The state of the model while it scores: without dropout, in training too. Experiments measure what noise would do."""
        return evaluation_mode(self.model)

    def _trains_all_rows(self) -> bool:
        """Whether to run all rows with a graph at once, because scoring them first would save too little.

        Scoring a row costs about a third of training it, so scoring all rows and training a share f of them costs more if f is
        above 2/3. The share of the last batch stands for that of this one; the gradient is exact either way.
        Only without dropout: the winner is chosen without its noise (Shen et al., 2019).
        """
        # One loser of two hypotheses is all of them.
        if self._has_dropout or (self.args.sample_losers and self._num_hypotheses > 2):
            return False
        if self.args.objective == "relaxed":
            loser = self.args.relaxed_epsilon / (self._num_hypotheses - 1)
            return 0.0 < loser >= self.args.min_weight and self.args.relaxed_epsilon < 1.0
        # Scores of prefixes and of whole sequences are not the same, and the share depends on the batches.
        if self.args.score_prefix is not None:
            return False
        return self._annealing_temperature() is not None and self._weighted_share > 2 / 3

    def _assign(
        self, scores: torch.Tensor, num_tokens: torch.Tensor, draws: torch.Tensor, is_training: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights (B, K) of this batch and its winners (B,), which are recorded.

        In evaluation the best hypothesis has all the weight.
        """
        weights, winners = assignment_weights(
            self.args.objective if is_training else "wta",
            scores,
            num_tokens,
            epsilon=self.args.relaxed_epsilon,
            temperature=self._annealing_temperature(),
            draws=draws,
        )
        self._watch_wins(self._record(scores, num_tokens, winners))
        return weights, winners

    def _thin_out(self, weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Fewer rows to train, by the options that the user has chosen; at least one of each sequence stays."""
        if self.args.min_weight > 0:
            weights = drop_small_weights(weights, self.args.min_weight)
        if self.args.sample_losers:
            weights = sample_losers(weights, draws[:, -1])
        if self.args.sample_winner:
            weights = sample_one(weights, draws[:, -1])
        return weights

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """As Trainer; sequences that fill up the last batch of an epoch on several processes are not learned from twice.

        Each process gets as many batches of as many rows. Those that begin again from the first sequence lose their labels
        here, so a step is the one that a single process makes. Not in packed rows of several sequences each, nor where the
        length of the data set is unknown.
        """
        if self._remembered is not None:
            self._remembered.end_step()
        self._revive()
        batches, count = self._get_batch_samples(epoch_iterator, num_batches, device)
        self._plan = (
            self._plan_step(batches) if self._plans_steps and not self._schedule.is_together and batches else None
        )
        return batches, count

    def _get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        processes = self.accelerator.num_processes
        if processes == 1 or not batches or self.args.packing or not has_length(self.train_dataset):
            return batches, count
        if self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last:
            batch = SequenceBatch(batches[-1])
            rows = len(batch)
            last = len(self.train_dataset) % (rows * processes)
            if last > 0:
                # The rows of the first process come first.
                real = min(max(last - rows * self.accelerator.process_index, 0), rows)
                batches[-1] = {**batches[-1], "labels": batch.without_labels(range(real, rows)).labels}
                count = self._get_num_items_in_batch(batches, device)
        return batches, count

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        if self.args.loss_normalization == "sequence":
            # The transformers Trainer counts labels; give it one label for each sequence that has any.
            batch_samples = [{**batch, "labels": _one_label_per_sequence(batch)} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    # ------------------------------------------------------------------------------------------------------------
    # Steps that are planned as a whole

    @property
    def _plans_steps(self) -> bool:
        """Whether the weights of a sequence depend on the other sequences of the step."""
        args = self.args
        in_spreads = args.objective in ANNEALED and args.temperature_unit == "spread"
        is_matched = args.group_column is not None
        return self._num_hypotheses > 1 and (args.objective == "balanced" or in_spreads or is_matched)

    def _plan_step(self, batch_samples: list[dict[str, Any]]) -> StepPlan:
        """Score all micro-batches of a step and decide, for the sequences of all processes at once, what each trains."""
        batches = [SequenceBatch(self._prepare_inputs(inputs)) for inputs in batch_samples]
        # As `training_step` does; an evaluation may have come before.
        self.model.train()
        with self.compute_loss_context_manager():
            parts = [self._score_part(self.model_wrapped, batch, list(range(len(batch))), True) for batch in batches]
            is_seeding = self._schedule.is_seeding
            deciding = [self._seeding_scores(batch) for batch in batches] if is_seeding else [s for s, _ in parts]
        keys = torch.tensor([key for batch in batches for key in batch.keys], device=self.accelerator.device)
        local = (
            keys,
            self._groups_of(batches),
            torch.cat([scores for scores, _ in parts]),
            torch.cat([num_tokens for _, num_tokens in parts]),
            torch.cat(deciding),
        )
        # Where processes have different numbers of sequences, what fills up has no tokens.
        padded = (self.accelerator.pad_across_processes(tensor) for tensor in local)
        all_keys, groups, scores, num_tokens, decisive = (self.accelerator.gather(tensor).cpu() for tensor in padded)
        place = self._place(is_training=True)
        # In an order of the content alone, sums and what is remembered do not depend on the processes. Sequences with nothing
        # to learn decide nothing.
        order = sorted(
            num_tokens.nonzero().flatten().tolist(), key=lambda row: (all_keys[row].item(), groups[row].item())
        )
        numbered = self._occurrences.number(all_keys[order].tolist(), place)
        draws = sequence_draws(numbered, self._num_hypotheses + 1, place)
        found = wta_weights(torch.zeros(len(all_keys), dtype=torch.int64), self._num_hypotheses)
        self._watch_scores(scores[order], num_tokens[order], draws)
        found[order] = self._weights_of_step(decisive[order], num_tokens[order], groups[order], draws)
        # What a hypothesis is given counts here, which may be something that another one explains better.
        self._watch_wins(found[order].argmax(dim=1).tolist())
        first = self.accelerator.process_index * (len(all_keys) // self.accelerator.num_processes)
        return StepPlan(keys.tolist(), found[first : first + len(keys)].to(self.accelerator.device))

    def _groups_of(self, batches: list[SequenceBatch]) -> torch.Tensor:
        """The group of each sequence (S,), 0 where nothing is matched."""
        if self.args.group_column is None:
            return torch.zeros(sum(map(len, batches)), dtype=torch.int64, device=self.accelerator.device)
        if any(batch.groups is None for batch in batches):
            raise ValueError(
                f"A batch does not tell its groups, though there is a `group_column` ({self.args.group_column!r}). Leave "
                "`trainer.data_collator` as it is, and give your own as an argument: `MCLTrainer(data_collator=...)`."
            )
        return torch.cat([batch.groups for batch in batches if batch.groups is not None])

    def _watch_scores(self, scores: torch.Tensor, num_tokens: torch.Tensor, draws: torch.Tensor) -> None:
        """Report the scores (S, K) of a step; the winners are the best, whatever is trained."""
        self._report_broken(scores)
        best = pick_winners(scores, draws[:, : self._num_hypotheses])
        self._note(scores, num_tokens, best)

    def _weights_of_step(
        self, scores: torch.Tensor, num_tokens: torch.Tensor, groups: torch.Tensor, draws: torch.Tensor
    ) -> torch.Tensor:
        """The weights (S, K) of the sequences of a step.

        From their scores (S, K), numbers of tokens (S,), groups (S,) and draws (S, K + 1).
        """
        if self.state.global_step == self._schedule.seeded:
            self._recent.forget()
        rows = self._recent.add(finite_rows(scores, num_tokens))
        self._spread = spread_of(rows)
        args, temperature = self.args, self._annealing_temperature()
        self._last_temperature = self.temperature
        if args.objective == "balanced":
            scores = balanced_scores(
                scores,
                num_tokens,
                rows,
                wanted=args.target_shares,
                clusters=None if self._recent.clusters is None else self._recent.clusters.shares,
                temperature=self._last_temperature,
                strength=args.balance_strength * self._unit,
            )
        weights, _ = assignment_weights(
            args.objective, scores, num_tokens, epsilon=args.relaxed_epsilon, temperature=temperature, draws=draws
        )
        if args.group_column is not None:
            weights = matched_weights(
                weights, scores, groups, objective=args.objective, epsilon=args.relaxed_epsilon, draws=draws
            )
        return self._thin_out(weights, draws)

    def _seeding_scores(self, batch: SequenceBatch) -> torch.Tensor:
        """What decides while clusters do, as if it were scores: (B, K)."""
        if self._recent.clusters is None:
            self._recent.clusters = self._find_clusters()
        return self._recent.clusters.closeness(self._features(batch)) * batch.num_tokens.unsqueeze(1)

    def _features(self, batch: SequenceBatch) -> torch.Tensor:
        with evaluation_mode(self.model), self.model.disable_adapter():
            return pool_sequences(self.model_wrapped, self._positions, batch)

    def _find_clusters(self) -> Clusters:
        """Clusters of some sequences of the training data. Every process takes those of the first."""
        count = self.args.seeding_sequences
        if has_length(self.train_dataset):
            generator = torch.Generator().manual_seed(self.args.seed)
            chosen = torch.randperm(len(self.train_dataset), generator=generator)[:count].tolist()
            rows = [self.train_dataset[index] for index in chosen]
        else:
            rows = list(itertools.islice(iter(self.train_dataset), count))
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        found = []
        for start in range(0, len(rows), SEEDING_BATCH):
            inputs = self._prepare_inputs(collate(rows[start : start + SEEDING_BATCH]))
            batch = SequenceBatch(inputs)
            found.append(self._features(batch)[batch.num_tokens > 0])
        # What is not finite is reported where it is scored.
        features = torch.cat(found)
        features = features[features.isfinite().flatten(1).all(dim=1)]
        clusters = find_clusters(features, self._num_hypotheses, self.args.seed)
        wanted = self.args.target_shares
        if isinstance(wanted, list):
            # The largest cluster for the hypothesis with the largest share, and so on.
            by_share = sorted(range(len(wanted)), key=lambda k: -wanted[k])
            clusters = clusters.arranged([by_share.index(k) for k in range(len(wanted))])
        # On another machine a rounding may tip them over.
        tensors = {name: tensor.to(features.device) for name, tensor in clusters.tensors().items()}
        return Clusters(**{name: tensor.cpu() for name, tensor in broadcast(tensors).items()})

    # ------------------------------------------------------------------------------------------------------------
    # Groups of references

    def _set_signature_columns_if_needed(self) -> None:
        """As SFTTrainer, with the column of groups."""
        super()._set_signature_columns_if_needed()
        column = self.args.group_column
        if column is not None and column not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, column]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As Trainer; groups are shuffled, not their sequences."""
        args, dataset = self.args, self.train_dataset if train_dataset is None else train_dataset
        if args.group_column is None or args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        seed = args.seed if args.data_seed is None else args.data_seed
        self._group_sampler = GroupSampler([group_id(value) for value in dataset[args.group_column]], seed)
        return self._group_sampler

    def _run_epoch(self, **kwargs: Any) -> None:
        # accelerate does not reach a sampler below batches that are skipped, on several processes.
        if self._group_sampler is not None:
            self._group_sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)

    # ------------------------------------------------------------------------------------------------------------
    # Schedule and draws

    @property
    def _schedule(self) -> Schedule:
        """The place of the running step in training."""
        return Schedule(self.args, self._num_hypotheses, self.state.global_step, self.state.max_steps)

    @property
    def temperature(self) -> float:
        """The temperature of the running optimizer step, in nats for each token."""
        return self._unit * self._schedule.temperature

    @property
    def _unit(self) -> float:
        """The unit of temperatures, in nats for each token."""
        return self._spread if self.args.temperature_unit == "spread" else 1.0

    def _annealing_temperature(self) -> float | None:
        """The temperature of an annealed objective while it falls, None once it is final."""
        return self.temperature if self._schedule.is_warm else None

    def _place(self, is_training: bool) -> str:
        """What draws depend on besides the sequence: the seed and the step."""
        return f"{self.args.seed}/{is_training}/{self.state.global_step}"

    def _draw(self, batch: SequenceBatch, is_training: bool) -> torch.Tensor:
        """Random numbers for ties and choices (B, K + 1), which depend only on the seed, the step and the sequence.

        So they are the same for any number of processes and micro-batches, and in a resumed run.
        """
        if self._num_hypotheses == 1:
            return torch.zeros(len(batch), 2)  # There is nothing to decide.
        place = self._place(is_training)
        keys = torch.tensor(batch.keys, device=self.accelerator.device)
        everywhere = self._gather_ragged(keys, fill=-1)
        numbered = self._occurrences.number(everywhere.tolist(), place)
        first = self.accelerator.process_index * (len(everywhere) // self.accelerator.num_processes)
        return sequence_draws(numbered[first : first + len(batch)], self._num_hypotheses + 1, place)

    # ------------------------------------------------------------------------------------------------------------
    # Winners over time

    @property
    def _lengths_differ(self) -> bool:
        return super()._lengths_differ or self._remembered is not None

    def _watch_wins(self, winners: list[int]) -> None:
        if self._revival is not None and self.model.training:
            self._revival.record(winners, self.state.global_step)
        super()._watch_wins(winners)

    def _revive(self) -> None:
        """Re-seed the hypotheses that have not won for too long, before the next step. All processes know the same winners."""
        if self._revival is None or self._schedule.is_together:
            return
        step, steps = self.state.global_step, self.args.revive_after_steps
        wins = self._revival.wins(step)
        for target, source in self._revival.due(step):
            noise = self.args.revive_perturbation
            reseed(self.model, self.optimizer, target, source, noise, f"{self.args.seed}/{step}")
            self._recent.copy(source, target)
            if self.is_world_process_zero():
                logger.warning(
                    "Hypothesis %d has won no sequence for %d steps (up to step %d): it goes on as a copy of hypothesis %d, which "
                    "has won %d of %d, with noise of %g.",
                    target,
                    steps,
                    step,
                    source,
                    wins[source],
                    sum(wins),
                    noise,
                )

    def _competition_logs(self) -> dict[str, float]:
        """As [`ReportingTrainer`], with what the schedule and the options for winners have to tell."""
        logs = super()._competition_logs()
        # Not while all hypotheses learn as one.
        if self.args.objective in ANNEALED and self._last_temperature is not None:
            logs["temperature"] = self._last_temperature
            if self.args.temperature_unit == "spread":
                logs["score_spread"] = self._spread
        split = self._schedule.split
        if split:
            # Of the last step that was trained.
            logs["together"] = float(self.state.global_step <= split)
        flips = None if self._remembered is None else self._remembered.flips()
        if flips is not None:
            logs["winner_flips"] = flips
        if self._revival is not None:
            logs["revived"] = self._revival.count()
        return logs

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As [`ReportingTrainer`]; each evaluation draws the same."""
        self._occurrences = Occurrences()
        return super().evaluation_loop(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------------------
    # From run to run

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See [`SavingTrainer.train`]."""
        self._forget_earlier_runs()
        return super().train(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        # With the rest of what resuming needs.
        super()._save_rng_state(output_dir)
        if self._remembered is not None and self.args.should_save:
            self._remembered.save(output_dir)
        if self._plans_steps and self.args.should_save:
            self._recent.save(output_dir)
        if self._revival is not None and self.args.should_save:
            self._revival.save(output_dir)

    def _go_on_from(self, checkpoint: str) -> None:
        super()._go_on_from(checkpoint)
        if self._remembered is not None:
            self._remembered.load(checkpoint)
        if self._revival is not None:
            self._revival.load(checkpoint)
        if self._plans_steps:
            self._recent.load(checkpoint)


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
        inputs.pop(GROUPS, None)
        return self.model(**inputs, hypotheses=hypotheses)


def _is_largest(weights: torch.Tensor) -> torch.Tensor:
    """Whether a weight is the largest of its sequence, one for each: bool of the shape (B, K) of the weights."""
    return nn.functional.one_hot(weights.argmax(dim=1), weights.shape[1]).bool()


def _one_label_per_sequence(inputs: dict[str, Any]) -> torch.Tensor:
    num_tokens = SequenceBatch(inputs).num_tokens
    counted = num_tokens.new_full((len(num_tokens), 2), -100)
    counted[:, 1] = torch.where(num_tokens > 0, 0, -100)
    return counted


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
