"""The arguments of `MCLTrainer`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from trl import SFTConfig

from trainer_ext import launches
from trainer_ext.objectives import ANNEALED, OBJECTIVES


NORMALIZATIONS = ("token", "sequence")
TEMPERATURE_UNITS = ("nats", "spread")
TARGET_SHARES = ("clusters", "uniform", "tracked")
DEFAULT_ANNEALING_FRACTION = 0.5
DEFAULT_SEEDING_FRACTION = 0.2
# Initial and final.
DEFAULT_TEMPERATURES = {"nats": (1.0, 1e-6), "spread": (0.2, 0.05)}


@dataclass
class MCLConfig(SFTConfig):
    """Arguments of [`MCLTrainer`]: all of `trl.SFTConfig`, and those of the winner-takes-all objective.

    Args:
        objective (`str`): How the losses of the K hypotheses of a sequence are weighted. `"balanced"` (the default) and
            `"annealed"`: by a softmax of their scores for each token, at a temperature that falls during training, then as
            `"wta"`; `"balanced"` with offsets of the hypotheses that give each its share of the sequences (entropic optimal
            transport), so that none starves; `"wta"`: only the best; `"relaxed"`: the best by `1 - relaxed_epsilon`, the others share the
            rest; `"random"`: one drawn at random (the control that any claim about the method needs).
        relaxed_epsilon (`float`): Weight that the losers share under `"relaxed"`, in [0, 1].
        initial_temperature (`float`, *optional*): Temperature at step 0 (or when the hypotheses begin to compete), above 0, in
            units of `temperature_unit`. 1 nat or 0.2 spreads by default.
        final_temperature (`float`, *optional*): Temperature at which annealing ends, above 0 and at most the initial one.
            1e-6 nats or 0.05 spreads by default.
        temperature_unit (`str`, *optional*): `"nats"` for each token; or `"spread"`, how far the hypotheses differ about the
            recent sequences beyond one being better on all (`transport.score_spread`), so that a schedule means the same on
            every task. By default `"spread"` under `"balanced"` and `"nats"` under `"annealed"`.
        temperature_decay (`float`, *optional*): Factor on the temperature at each optimizer step, in (0, 1].
        annealing_fraction (`float`, *optional*): Part of training after which the temperature reaches its final value, in
            (0, 1]; the decay is derived. 0.5 unless `temperature_decay` is given. Give one of the two.
        together_fraction (`float`): Part of training, in [0, 1), in which all hypotheses learn as one, at the price of plain
            LoRA; then they split. They must start almost alike: `MCLoraConfig(init_perturbation=0.1)`. Annealing begins
            with the split.
        seeding_fraction (`float`, *optional*): Of `"balanced"`: part of training, in [0, 1), from the split on, in which
            sequences go to hypotheses by clusters of what the base model sees in them (`seeding`); then the scores decide,
            and annealing begins. 0.2 by default.
        seeding_sequences (`int`): How many sequences of the training data the clusters are made from.
        target_shares (`str` or `list[float]`, *optional*): Of `"balanced"`: the part of the sequences that each hypothesis gets.
            `"clusters"` (the default): the shares of the clusters that the hypotheses began with, equal ones without seeding, a twentieth of
            the way towards equal ones; `"tracked"`: the shares that they would get without balancing, a fifth of the way;
            `"uniform"`; or K numbers above 0. A base model that knows nothing of the data (a random one) has clusters that mean
            nothing, and hypotheses would keep their shares: take `"tracked"`, or the objective `"wta"`.
        balance_strength (`float`): Of `"balanced"`, above 0, in units of `temperature_unit`: how much better a hypothesis must
            be to get e times its share (see `transport.share_offsets`). Infinity: the shares are kept whatever it costs.
        balance_queue (`int`, *optional*): Of `"balanced"` and the unit `"spread"`: how many sequences before those of a step
            take part, 0 or more; 16 for each hypothesis by default.
        sample_winner (`bool`, *optional*): Train one hypothesis of each sequence, drawn by its weight, so that the mean
            gradient is that of all. By default only under `"balanced"`, unless `sample_losers` is set.
        group_column (`str`, *optional*): A column of the training data whose value is the same in the rows of one prompt, if the
            prompt has several references, each a row. They are then matched with the hypotheses one to one (by the largest
            sum of scores), in place of each going to its best: of R references a hypothesis wins at most ceil(R / K). The
            scores that decide are those of the objective, with its offsets under `"balanced"`; matched winners are used from
            the start, also while a temperature is warm. Groups are kept together when the data is shuffled; a step takes the
            next rows, and the parts of a group that it cuts are matched each on their own, so let the global batch be several
            groups. Nothing is matched in evaluation.
        loss_normalization (`str`): `"token"`: the mean over the supervised tokens of the global batch, as SFTTrainer does;
            `"sequence"`: the mean over sequences of their means over tokens.
        scoring_batch_size (`int`, *optional*): The most rows (sequence times hypothesis; a packed row is one) of a forward
            pass that scores without a graph. By default as many as have 2,048 positions, and at least the batch size. Fewer
            rows need less memory; the scores do not depend on it.
        sample_losers (`bool`): Where several hypotheses of a sequence carry weight (`"relaxed"`, `"annealed"` while it is
            warm), train the one with the largest and one of the others, drawn and weighted so that the mean gradient is
            that of all (see `objectives.sample_losers`). Saves time from K = 4 on, and memory.
        min_weight (`float`): Do not train hypotheses with a weight below this for a sequence, in [0, 1]. The error of the
            gradient is below (K - 1) times this times the largest gradient of a hypothesis
            (see `objectives.drop_small_weights`).
        score_every (`int`): In training over several epochs, score a sequence at its first visit and then at every
            `score_every`-th; in between the remembered winner is trained. Only while the weights follow from the winners
            alone (`"wta"`, `"relaxed"`, the end of `"annealed"`).
        score_prefix (`int`, *optional*): Score on at most this many supervised tokens of each sequence, in training; so are
            the metrics. `"relaxed"`, which trains all rows and need not score them first, scores all tokens.
        no_win_warning_steps (`int`): Warn about a hypothesis that has won no sequence for this many optimizer steps; 0 for
            never.
        revive_after_steps (`int`): Re-seed a hypothesis that has won no sequence for this many optimizer steps from the one
            that has won most in them; 0 for never. Its adapters become a copy with noise, and their optimizer states a copy.
        revive_perturbation (`float`): Size of that noise relative to the matrices B, at least 0.
        save_hypotheses (`bool`): Whenever the model is saved or pushed, put each hypothesis beside it as an ordinary LoRA
            adapter, `hypothesis_0/` and so on, for plain PEFT and serving engines. Checkpoints to resume from do not get
            them (transformers would take them for adapters of the model), but what is pushed during training does.
        card_prompts (`int`): Show the continuations of this many prompts of the evaluation data (or else of the training
            data) on the model card, when the trainer saves or pushes it at the end; 0 for none. On one process.

    Raises:
        ValueError: A value is out of its range, or an option of SFTConfig makes no sense with one loss for each sequence;
            the message names it and says why.
    """

    objective: str = field(
        default="balanced",
        metadata={
            "help": "Winner-takes-all objective: 'annealed', 'balanced', 'wta', 'relaxed' or 'random'.",
            "choices": list(OBJECTIVES),
        },
    )
    relaxed_epsilon: float = field(
        default=0.05, metadata={"help": "Weight that the losers share under objective 'relaxed', in [0, 1]."}
    )
    initial_temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature at step 0, in nats per token or spreads of the scores (1 nat, .2 spreads)."},
    )
    final_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature at which annealing ends; from there on only the winner is trained (1e-6 nats, .05 spreads)."
        },
    )
    temperature_unit: str | None = field(
        default=None,
        metadata={
            "help": "'nats' or 'spread' (default under objective 'balanced').",
            "choices": list(TEMPERATURE_UNITS),
        },
    )
    temperature_decay: float | None = field(
        default=None, metadata={"help": "Factor on the temperature at each optimizer step, in (0, 1]."}
    )
    annealing_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Part of training after which the temperature is final (0.5 if no temperature_decay is given)."
        },
    )
    together_fraction: float = field(
        default=0.0, metadata={"help": "Part of training in which all hypotheses learn as one, in [0, 1)."}
    )
    seeding_fraction: float | None = field(
        default=None,
        metadata={"help": "Part of training in which clusters of the data decide, under 'balanced' (default .2)."},
    )
    seeding_sequences: int = field(default=512, metadata={"help": "Sequences that the clusters are made from."})
    # Any: numbers in code and YAML, words on a command line.
    target_shares: Any = field(
        default=None,
        metadata={
            "help": "Shares of the hypotheses under 'balanced': 'clusters', 'uniform', 'tracked' or K numbers.",
            "nargs": "+",
        },
    )
    balance_strength: float = field(
        default=0.5,
        metadata={"help": "How much better a hypothesis must be for e times its share; inf: the shares are strict."},
    )
    balance_queue: int | None = field(
        default=None, metadata={"help": "Sequences before those of a step that are balanced with it (default: 16 K)."}
    )
    sample_winner: bool | None = field(
        default=None,
        metadata={"help": "Train one hypothesis of each sequence, drawn by weight (default: under 'balanced')."},
    )
    group_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the same value in all references of a prompt, which are matched with hypotheses one to one."
        },
    )
    loss_normalization: str = field(
        default="token",
        metadata={
            "help": "'token' (as SFTTrainer) or 'sequence' (mean of the means of sequences).",
            "choices": list(NORMALIZATIONS),
        },
    )
    scoring_batch_size: int | None = field(
        default=None,
        metadata={"help": "Most rows of a scoring pass (default: 2,048 positions, at least the batch size)."},
    )
    sample_losers: bool = field(
        default=False, metadata={"help": "Train one sampled loser of each sequence in place of all that carry weight."}
    )
    min_weight: float = field(
        default=0.0, metadata={"help": "Do not train a hypothesis with a weight below this, in [0, 1]."}
    )
    score_every: int = field(
        default=1, metadata={"help": "Score a sequence at every n-th visit; its winner is remembered in between."}
    )
    score_prefix: int | None = field(
        default=None, metadata={"help": "Score on at most this many supervised tokens of each sequence."}
    )
    no_win_warning_steps: int = field(
        default=100, metadata={"help": "Warn about a hypothesis without a win for this many steps; 0 for never."}
    )
    revive_after_steps: int = field(
        default=0,
        metadata={
            "help": "Re-seed a hypothesis without a win for this many steps from the one with most; 0 for never."
        },
    )
    revive_perturbation: float = field(
        default=0.1, metadata={"help": "Noise of a re-seeded hypothesis, relative to its matrices B."}
    )
    save_hypotheses: bool = field(
        default=False,
        metadata={"help": "Save each hypothesis as an ordinary LoRA adapter, too, in hypothesis_0/, hypothesis_1/ ..."},
    )
    card_prompts: int = field(
        default=3, metadata={"help": "Prompts of the data whose continuations the model card shows; 0 for none."}
    )

    def __post_init__(self) -> None:
        if self.temperature_unit is None:
            self.temperature_unit = "spread" if self.objective == "balanced" else "nats"
        initial, final = DEFAULT_TEMPERATURES.get(self.temperature_unit, (None, None))
        self.initial_temperature = initial if self.initial_temperature is None else self.initial_temperature
        self.final_temperature = final if self.final_temperature is None else self.final_temperature
        if self.seeding_fraction is None:
            self.seeding_fraction = DEFAULT_SEEDING_FRACTION if self.objective == "balanced" else 0.0
        if self.sample_winner is None:
            self.sample_winner = self.objective == "balanced" and not self.sample_losers
        self._check_objective()
        self._check_balance()
        self._check_reviving()
        self._check_groups()
        self._refuse_meaningless_options()
        if self.temperature_decay is None and self.annealing_fraction is None:
            self.annealing_fraction = DEFAULT_ANNEALING_FRACTION
        # Trainer takes every metric whose name does not end with "loss" for a score.
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith("_nll"):  # type: ignore[has-type]
            self.greater_is_better = False
        launches.check_deepspeed(self.deepspeed)
        super().__post_init__()

    def _check_objective(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}.")
        if self.loss_normalization not in NORMALIZATIONS:
            raise ValueError(
                f"`loss_normalization` must be one of {', '.join(NORMALIZATIONS)}, got {self.loss_normalization!r}."
            )
        if self.temperature_unit not in TEMPERATURE_UNITS:
            raise ValueError(
                f"`temperature_unit` must be one of {', '.join(TEMPERATURE_UNITS)}, got {self.temperature_unit!r}."
            )
        numbers = ["relaxed_epsilon", "initial_temperature", "final_temperature", "no_win_warning_steps"]
        numbers += [name for name in ("temperature_decay", "annealing_fraction") if getattr(self, name) is not None]
        for name in numbers:
            if not isinstance(getattr(self, name), Real):
                raise ValueError(f"`{name}` must be a number, got {getattr(self, name)!r}.")
        if not 0.0 <= self.relaxed_epsilon <= 1.0:
            raise ValueError(f"`relaxed_epsilon` must be in [0, 1], got {self.relaxed_epsilon!r}.")
        for name in ("initial_temperature", "final_temperature"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be above 0 and finite, got {getattr(self, name)!r}.")
        assert self.initial_temperature is not None
        assert self.final_temperature is not None
        if self.final_temperature > self.initial_temperature:
            raise ValueError(
                f"`final_temperature` ({self.final_temperature!r}) must not be above `initial_temperature` "
                f"({self.initial_temperature!r}): the temperature only falls."
            )
        if self.temperature_decay is not None and self.annealing_fraction is not None:
            raise ValueError(
                f"Give `temperature_decay` ({self.temperature_decay!r}) or `annealing_fraction` "
                f"({self.annealing_fraction!r}), not both: the decay follows from the fraction."
            )
        for name in ("temperature_decay", "annealing_fraction"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"`{name}` must be in (0, 1], got {value!r}.")
        if not isinstance(self.min_weight, Real) or not 0.0 <= self.min_weight <= 1.0:
            raise ValueError(f"`min_weight` must be in [0, 1], got {self.min_weight!r}.")
        for name in ("scoring_batch_size", "score_every", "score_prefix"):
            value = getattr(self, name)
            if value is None and name != "score_every":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if isinstance(self.card_prompts, bool) or not isinstance(self.card_prompts, int) or self.card_prompts < 0:
            raise ValueError(f"`card_prompts` must be an integer, 0 (none) or more, got {self.card_prompts!r}.")
        if self.no_win_warning_steps < 0:
            raise ValueError(f"`no_win_warning_steps` must be 0 (never) or more, got {self.no_win_warning_steps!r}.")

    def _check_balance(self) -> None:
        if not isinstance(self.together_fraction, Real) or not 0.0 <= self.together_fraction < 1.0:
            raise ValueError(f"`together_fraction` must be in [0, 1), got {self.together_fraction!r}.")
        if not isinstance(self.seeding_fraction, Real) or not 0.0 <= self.seeding_fraction < 1.0:
            raise ValueError(f"`seeding_fraction` must be in [0, 1), got {self.seeding_fraction!r}.")
        if self.seeding_fraction and self.objective != "balanced":
            raise ValueError(
                f"`seeding_fraction={self.seeding_fraction!r}` needs `objective='balanced'`, got {self.objective!r}."
            )
        if (
            isinstance(self.seeding_sequences, bool)
            or not isinstance(self.seeding_sequences, int)
            or self.seeding_sequences < 1
        ):
            raise ValueError(f"`seeding_sequences` must be an integer of at least 1, got {self.seeding_sequences!r}.")
        fraction = DEFAULT_ANNEALING_FRACTION if self.annealing_fraction is None else self.annealing_fraction
        before = self.together_fraction + self.seeding_fraction
        if self.objective in ANNEALED and self.temperature_decay is None and before >= fraction:
            raise ValueError(
                f"`together_fraction` ({self.together_fraction!r}) and `seeding_fraction` ({self.seeding_fraction!r}) together "
                f"must be below `annealing_fraction` ({fraction!r}): annealing begins after them."
            )
        if not isinstance(self.balance_strength, Real) or not self.balance_strength > 0.0:
            raise ValueError(
                f"`balance_strength` must be above 0 (infinity: strict shares), got {self.balance_strength!r}."
            )
        queue = self.balance_queue
        if queue is not None and (isinstance(queue, bool) or not isinstance(queue, int) or queue < 0):
            raise ValueError(f"`balance_queue` must be an integer of at least 0, got {queue!r}.")
        self.target_shares = _parse_shares(self.target_shares)
        if self.objective == "balanced" and self.score_every > 1:
            raise ValueError(
                f"`score_every={self.score_every!r}` cannot be used with `objective='balanced'`, which needs the scores of all "
                "sequences of a step. Set it to 1."
            )
        if self.sample_winner and self.sample_losers:
            raise ValueError("Give `sample_winner` or `sample_losers`, not both: they draw from the same weights.")

    def _check_reviving(self) -> None:
        steps, perturbation = self.revive_after_steps, self.revive_perturbation
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"`revive_after_steps` must be an integer, 0 (never) or more, got {steps!r}.")
        if isinstance(perturbation, bool) or not isinstance(perturbation, Real) or not 0 <= perturbation < 1e6:
            raise ValueError(f"`revive_perturbation` must be a number of at least 0, got {perturbation!r}.")
        if steps and self.objective == "random":
            raise ValueError(
                f"`revive_after_steps={steps}` does not go with `objective='random'`, which trains a hypothesis whether it wins "
                "or not: it would be no control any more. Set it to 0."
            )

    def _check_groups(self) -> None:
        column = self.group_column
        if column is None:
            return
        if not isinstance(column, str) or not column:
            raise ValueError(f"`group_column` must be the name of a column, or None, got {column!r}.")
        # What the groups cannot go with, why, and what to do.
        refuse = {
            "objective": (self.objective == "random", "which draws hypotheses and matches nothing. Choose another"),
            "score_every": (
                self.score_every > 1,
                "as references are matched by the scores of all of them. Set it to 1",
            ),
            "packing": (self.packing, "as packed rows do not tell the groups of their sequences. Set it to False"),
            "train_sampling_strategy": (
                self.train_sampling_strategy not in ("random", "sequential"),
                "as it tears groups apart. Set it to 'random', which keeps groups together, or 'sequential'",
            ),
        }
        for name, (is_set, reason) in refuse.items():
            if is_set:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` cannot be used with `group_column={column!r}`, {reason}."
                )

    def __getstate__(self) -> dict[str, Any]:
        """Without tokens: this goes into `training_args.bin`, which goes to the Hub with the adapter."""
        return {**self.__dict__, "hub_token": None, "model_init_kwargs": _without_token(self.model_init_kwargs)}

    def __deepcopy__(self, memo: dict[int, Any]) -> MCLConfig:
        # A copy goes nowhere, and may be trained with.
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __copy__(self) -> MCLConfig:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, which hides `hub_token`: this goes into logs. The token of the base model is hidden too."""
        found = super().to_dict()
        return {**found, "model_init_kwargs": _without_token(found["model_init_kwargs"])}

    def __str__(self) -> str:
        shown = copy.copy(self)
        shown.model_init_kwargs = _without_token(self.model_init_kwargs)
        return super(MCLConfig, shown).__str__()

    # A dataclass would get one that shows all.
    __repr__ = __str__

    def _refuse_meaningless_options(self) -> None:
        wrapped = (self.packing or bool(self.eval_packing)) and self.packing_strategy == "wrapped"
        refuse = {
            # "chunked_nll" is TRL's old name for "nll".
            "loss_type": (
                self.loss_type not in ("nll", "chunked_nll"),
                "it weights tokens by their own probability, but a winner is the hypothesis with the best likelihood of the "
                "whole sequence. Leave it at 'nll'",
            ),
            "label_smoothing_factor": (
                self.label_smoothing_factor != 0,
                "the smoothed loss is not a likelihood, so it cannot tell which hypothesis explains a sequence best. Leave "
                "it at 0",
            ),
            "packing_strategy": (
                wrapped,
                "wrapped rows do not tell where one sequence ends and the next begins, but each sequence has its own "
                "winner. Set it to 'bfd'",
            ),
        }
        for name, (is_set, reason) in refuse.items():
            if is_set:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is not supported by MCLTrainer: {reason}.")


def _parse_shares(value: Any) -> Any:
    """`target_shares` as a name or a list of floats; on a command line both come as a list of words."""
    if value is None:
        return "clusters"
    words = [value] if isinstance(value, str) else value
    if isinstance(words, (list, tuple)) and len(words) == 1 and words[0] in TARGET_SHARES:
        return words[0]
    try:
        shares = [float(share) for share in words]
    except (TypeError, ValueError):
        shares = []
    if not shares or not all(0.0 < share < float("inf") for share in shares):
        raise ValueError(
            f"`target_shares` must be 'clusters', 'uniform', 'tracked' or one number above 0 for each hypothesis, got {value!r}."
        )
    return shares


def _without_token(model_init_kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    return model_init_kwargs and {name: value for name, value in model_init_kwargs.items() if name != "token"}
