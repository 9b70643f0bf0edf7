"""What a competition is told by: metrics of its scores and winners, and warnings of hypotheses that fail."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft.utils import CONFIG_NAME
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from peft_mcl import MCLoraConfig
from peft_mcl.card import CardFigures
from trainer_ext import checks
from trainer_ext.metrics import ScoreWindow, WinWatch, win_weights
from trainer_ext.objectives import is_broken
from trainer_ext.saving import SavingTrainer


logger = logging.getLogger(__name__)


class ReportingTrainer(SavingTrainer):
    """A trainer that reports how its hypotheses fare, and keeps their win shares in the adapter."""

    # The hypothesis weights that may be replaced by win shares; others are a user's.
    _own_weights: list[float] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forget_reports()

    def _forget_reports(self) -> None:
        """Begin anew, as for a new run."""
        # Metrics of the training sequences since the last log, and of the last evaluation.
        self._train_window, self._eval_window = ScoreWindow(), ScoreWindow()
        # For the model card: what was last measured in training and on each evaluation set.
        self.figures: dict[str, CardFigures] = {}
        self._was_evaluated = False
        self._wins: WinWatch | None = None
        self._reported_broken: set[int] = set()

    @property
    def _num_hypotheses(self) -> int:
        return self.model.num_hypotheses

    # ------------------------------------------------------------------------------------------------------------
    # Of each step

    def _record(self, scores: torch.Tensor, num_tokens: torch.Tensor, winners: torch.Tensor) -> list[int]:
        """Add the sequences of all processes to the metrics, and return the winner of each."""
        self._report_broken(scores)
        tensors = (scores.contiguous(), num_tokens, winners)
        # In training the batches of a step are fetched in advance, so `gather_for_metrics` would take each of the last step
        # for the last of the epoch, and cut it to the length of that one. It would also cut a packed row to as many
        # sequences as the batch has rows.
        if self.model.training or self.accelerator.num_processes == 1:
            scores, num_tokens, winners = (self._gather_ragged(tensor) for tensor in tensors)
        else:
            scores, num_tokens, winners = self.accelerator.gather_for_metrics(tensors)
        return self._note(scores, num_tokens, winners)

    def _note(self, scores: torch.Tensor, num_tokens: torch.Tensor, winners: torch.Tensor) -> list[int]:
        """Add sequences that all processes know to the metrics, and return the winner of each."""
        window = self._train_window if self.model.training else self._eval_window
        if self.model.training:
            self._refuse_broken_hypotheses(scores[num_tokens > 0])
        window.add(scores, num_tokens, winners)
        return winners[num_tokens > 0].tolist()

    def _refuse_broken_hypotheses(self, scores: torch.Tensor) -> None:
        """Raise a FloatingPointError if a hypothesis gives no sequence of a batch a finite score: it would never win again."""
        broken = (~scores.isfinite()).all(dim=0).nonzero().flatten().tolist() if len(scores) else []
        if not broken:
            return
        checks.check_finite(self.model)
        frozen = checks.not_finite(self.model, trainable=False)
        cause = (
            f"The base model has NaN or infinite weights, the first of them in {frozen[0]!r}: load it again from its source"
            if frozen
            else "All weights are finite, so activations overflow: use bf16 or float32 in place of fp16, or lower `learning_rate`"
        )
        raise FloatingPointError(
            f"Hypothesis {', '.join(map(str, broken))} gave no sequence of step {self.state.global_step} a finite score, so it "
            f"cannot compete any more. {cause}. Nothing more is saved."
        )

    def _report_broken(self, scores: torch.Tensor) -> None:
        """Warn, once for each, of hypotheses that have no finite score for a sequence."""
        found = set(is_broken(scores).any(dim=0).nonzero().flatten().tolist()) - self._reported_broken
        self._reported_broken |= found
        for hypothesis in sorted(found):
            logger.warning(
                "Hypothesis %d gives a likelihood that is not finite for a sequence of step %d: it is left out there and cannot "
                "win. If this is an overflow of float16, train in bfloat16 (`bf16=True`); otherwise its weights are broken.",
                hypothesis,
                self.state.global_step,
            )

    @property
    def _lengths_differ(self) -> bool:
        """Whether processes may have different numbers of sequences."""
        return self.padding_free

    def _gather_ragged(self, tensor: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """`tensor` of all processes; where their lengths may differ, shorter ones are filled up."""
        if self._lengths_differ:
            tensor = self.accelerator.pad_across_processes(tensor, pad_index=fill)
        return self.accelerator.gather(tensor)

    def _watch_wins(self, winners: list[int]) -> None:
        """Warn of a hypothesis that has not been among the winners for a while."""
        num_hypotheses, patience = self._num_hypotheses, self.args.no_win_warning_steps
        # Under objective "random" a hypothesis is trained whether it wins or not.
        if not self.model.training or not patience or self.args.objective == "random" or num_hypotheses == 1:
            return
        step = self.state.global_step
        if self._wins is None:
            self._wins = WinWatch(num_hypotheses, patience, step)
        for hypothesis, steps in self._wins.update(set(winners), step):
            if self.is_world_process_zero():
                logger.warning(
                    "Hypothesis %d has won no sequence for %d steps (up to step %d): it is trained no longer, or only by the "
                    "share of the losers. `objective='balanced'` gives each hypothesis its part of the sequences.",
                    hypothesis,
                    steps,
                    step,
                )

    # ------------------------------------------------------------------------------------------------------------
    # Of each log and each evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As SFTTrainer; training logs get the metrics of the competition since the last log."""
        # Told by what is logged: a callback may have left the model in either mode.
        if self._train_window and ("loss" in logs or "train_loss" in logs):
            logs.update(self._competition_logs())
            self._train_window.clear()
        super().log(logs, start_time)

    def _competition_logs(self) -> dict[str, float]:
        """The metrics of the training sequences since the last log."""
        # Nothing was scored if all winners were remembered.
        if not len(self._train_window.winners):
            return {}
        self.figures["training"] = self._train_window.for_card()
        if not self._was_evaluated:
            self._keep_weights(self.figures["training"])
        return self._train_window.summary()

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As SFTTrainer, with the exact metrics of the competition over the whole data set; the loss is `wta_nll`."""
        checks.check_packed_evaluation(self.args, self.padding_free, self.accelerator.num_processes)
        self._eval_window = ScoreWindow()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._eval_window and output.metrics is not None:
            metrics = self._eval_window.summary()
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
            output.metrics[f"{metric_key_prefix}_loss"] = metrics["wta_nll"]
            self.figures[metric_key_prefix] = self._eval_window.for_card()
            self._was_evaluated = True
            self._keep_weights(self.figures[metric_key_prefix])
        return output

    def _keep_weights(self, figures: CardFigures) -> None:
        """Make the win shares the weights of the hypotheses, unless somebody else has set some since training began."""
        if self._adapter_config.hypothesis_weights == self._own_weights:
            shares = [figures.metrics[f"win_share/{k}"] for k in range(self._num_hypotheses)]
            weights = win_weights([share * figures.num_sequences for share in shares])
            self._adapter_config.hypothesis_weights = self._own_weights = weights

    def score(self, dataset: Dataset) -> ScoreWindow:
        """Score every sequence of a data set under every hypothesis, without training.

        Args:
            dataset (`datasets.Dataset`): In any format that `evaluate` takes.

        Returns:
            [`ScoreWindow`]: `scores` (N, K) in nats, `num_tokens` (N,) and `winners` (N,), in the order of the data set.

        Raises:
            ValueError: A sequence lost its completion when it was cut to `max_length`, or an option changes the order of
                evaluation (`shuffle_dataset`, packing, grouping by length).
        """
        reorders = self.args.shuffle_dataset or self.args.train_sampling_strategy == "group_by_length"
        if reorders or checks.packs_evaluation(self.args):
            raise ValueError(
                "`score` keeps the order of the data set, so it needs `shuffle_dataset=False`, `eval_packing=False` and a "
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
    # From run to run

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See [`SavingTrainer.train`]."""
        self._forget_reports()
        # They were those of the hypotheses as they were.
        self._own_weights = self._adapter_config.hypothesis_weights
        return super().train(*args, **kwargs)

    def _go_on_from(self, checkpoint: str) -> None:
        super()._go_on_from(checkpoint)
        self._take_weights(checkpoint)
        log_history = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).log_history
        self._was_evaluated = any(name.endswith("_win_share/0") for logs in log_history for name in logs)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._take_weights(str(self.state.best_model_checkpoint))

    def _take_weights(self, checkpoint: str) -> None:
        """Take the hypothesis weights over from a checkpoint, as PEFT does the tensors; sharded ones have no configuration."""
        folder = Path(checkpoint, self._adapter_folder)
        if (folder / CONFIG_NAME).is_file():
            self._own_weights = MCLoraConfig.from_pretrained(str(folder)).hypothesis_weights
            self._adapter_config.hypothesis_weights = self._own_weights
