"""Choosing among the outputs of an input: which of the sequences that its hypotheses have decoded comes first.

Sequence y of input c has log-likelihoods log p_j(y | c), the sum over its tokens up to and with its end, under the
hypotheses j = 1 .. K; w_j are their weights (`MCLoraConfig.hypothesis_weights`). They are computed in one teacher-forced
pass of the model over the finished sequences, which get their prompts ready by `generate` itself, so that masks, positions
and encoders are those of decoding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateBeamEncoderDecoderOutput
from transformers.utils import ModelOutput

from peft_mcl import generation
from peft_mcl.config import check_weights
from peft_mcl.routing import Route, map_leaves


if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft_mcl.model import MCLoraModel

METHODS = ("likelihood", "mixture", "consensus")
# What `generate` takes beside the inputs of the model and its own arguments, and what belongs to decoding alone.
_NOT_FOR_SCORING = (
    "tokenizer",
    "assistant_tokenizer",
    "past_key_values",
    "labels",
    "output_attentions",
    "output_hidden_states",
)


@dataclass(frozen=True)
class Ranking:
    """The M sequences of each of B inputs, best first. All tensors have the shape (B, M), and are on the CPU.

    Attributes:
        order (`torch.Tensor`): int64. `order[b, i]` is the place of the i-th best sequence of input b among those of its
            input, so that its row in the output of `generate` is `b * M + order[b, i]`.
        scores (`torch.Tensor`): float32. What they were ranked by: nats (per token, by default), or chrF (0 to 100).
        hypotheses (`torch.Tensor`): int64. The hypothesis that has decoded each.
    """

    order: torch.Tensor
    scores: torch.Tensor
    hypotheses: torch.Tensor

    @property
    def rows(self) -> torch.Tensor:
        """int64 of shape (B * M,): `sequences[ranking.rows]` is what `generate(..., rank=...)` returns."""
        size, count = self.order.shape
        return (torch.arange(size).unsqueeze(1) * count + self.order).flatten()


def rank_sequences(
    model: Any,
    sequences: torch.Tensor,
    *,
    method: str = "likelihood",
    hypotheses: Any = None,
    weights: Sequence[float] | None = None,
    **arguments: Any,
) -> Ranking:
    """Rank what `model.generate(hypotheses=hypotheses, **arguments)` has returned, the sequences of each input by themselves.

    With n tokens in a sequence, its end included, and alpha = `length_penalty` (1, the mean over tokens, unless it is given),
    the scores of sequence y, decoded by hypothesis k, are

    | `method` | score |
    |---|---|
    | `"likelihood"` | (log w_k + log p_k(y given c)) / n^alpha |
    | `"mixture"` | log(sum_j w_j p_j(y given c)) / n^alpha, over all K hypotheses, whichever have decoded |
    | `"consensus"` | sum_i w_i chrF(y, y_i) over the M sequences of the input: minimum Bayes risk |

    The division is that of transformers' beam search, so with equal weights a beam's score under `"likelihood"` is its
    `sequences_scores` plus a constant over n. Likelihoods are the model's own: temperature, penalties and other processors of
    decoding have no part in them. In a consensus, the weight of a hypothesis is divided among its sequences. Of equal
    scores, the sequence that comes first stays first; one without a finite likelihood comes last.

    Args:
        model ([`peft.PeftModel`], or a `transformers.PreTrainedModel` with the adapter): The model that has decoded.
        sequences (`torch.Tensor`): int64 of shape (B * M, T), in the order of `generate`.
        method (`str`): One of the above.
        hypotheses: As for `generate`.
        weights (`list[float]`, *optional*): K numbers of at least 0, in place of the adapter's `hypothesis_weights`.
        **arguments: What `generate` was given, by name: inputs, and the options that matter here, `num_return_sequences`
            (with the `do_sample` or `num_beams` that allow it), `eos_token_id`, `pad_token_id`, `length_penalty`,
            `stop_strings`, `stopping_criteria` and `tokenizer`. The rest may be there, too.

    Returns:
        [`Ranking`]: With M = len(hypotheses) * num_return_sequences.

    Raises:
        ValueError: An unknown method, wrong weights, sequences that do not belong to these inputs, a consensus without a
            tokenizer, or likelihoods asked of a model with a `generate` of its own (Whisper).
        ImportError: sacrebleu is missing (consensus).

    Where stop strings or criteria have ended a row and the padding is the end token, it cannot be told from an end, and its
    first token is scored as one.

    Sources: weighted joint likelihood and length normalisation as in beam search (Wu et al. 2016, arXiv 1609.08144, without
    its constant); minimum Bayes risk by Kumar and Byrne (2004), with chrF by Popović (2015).
    """
    tuner = _tuner_of(model)
    call = _RankedCall(tuner, generation.choose_hypotheses(tuner, hypotheses), method, arguments, weights)
    return call.rank(sequences)


def generate_ranked(tuner: MCLoraModel, *args: Any, rank: str, hypotheses: Any = None, **kwargs: Any) -> Any:
    """As [`peft_mcl.generation.generate`], with the rows of each input ordered by [`rank_sequences`], best first.

    Returns:
        What `generate` returns. Rows b * M .. (b + 1) * M - 1 are those of input b, so rows 0, M, 2 * M, ... are the chosen
        ones. Of an output with `return_dict_in_generate`, everything that has one row for each sequence is ordered alike,
        the key-value cache included. With beam search that is `sequences`, `sequences_scores` and `beam_indices`; the rest has
        rows of beams, stays as it is, and `beam_indices` still point to it.

    Raises:
        ValueError: As for both functions; or a cache is given, whose rows would keep the order of decoding; or an encoder's
            states are asked for that have no row for each sequence.
    """
    base: Any = tuner.model
    chosen = generation.choose_hypotheses(tuner, hypotheses)
    arguments = generation.bind_arguments(base, args, kwargs)
    call = _RankedCall(tuner, chosen, rank, arguments)
    call.check_output()
    if arguments.get("encoder_outputs") is not None:
        # transformers expands the object that it is given.
        arguments = {**arguments, "encoder_outputs": copy.copy(arguments["encoder_outputs"])}
    output = generation.generate(tuner, hypotheses=chosen, **arguments)
    if call.count == 1:
        return output
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return _reorder(output, call.rank(sequences).rows)


def consensus_order(texts: Sequence[str], weights: Sequence[float] | None = None) -> tuple[list[int], list[float]]:
    """Order texts by how much they have in common with all of them: minimum Bayes risk with chrF as the utility.

    The utility of a text is the weighted mean of its chrF (sacrebleu's chrF2: characters, up to 6 of them, no words) against
    each of the texts, itself included.

    Args:
        texts (`list[str]`): M texts.
        weights (`list[float]`, *optional*): M numbers of at least 0; all alike by default.

    Returns:
        `tuple`: The M indices, best first (of equals, the first one first), and the M utilities in the order of `texts`, in
        [0, 100].

    Raises:
        ValueError: There are no texts, or not as many weights.
        ImportError: sacrebleu is missing.
    """
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"`texts` must be a list of at least one text, got {texts!r}.")
    shares = [1 / len(texts)] * len(texts) if weights is None else _check_weights("weights", weights, len(texts))
    chrf = _chrf()
    utilities = [
        sum(share * chrf.sentence_score(text, [other]).score for share, other in zip(shares, texts, strict=True))
        for text in texts
    ]
    return sorted(range(len(texts)), key=lambda place: -utilities[place]), utilities


# --------------------------------------------------------------------------------------------------------------------
# One call whose sequences are ranked


class _RankedCall:
    """A call of `generate` whose sequences are ranked. What is wrong with it is found before anything is decoded."""

    def __init__(
        self,
        tuner: MCLoraModel,
        chosen: list[int],
        method: str,
        arguments: dict[str, Any],
        weights: Sequence[float] | None = None,
    ) -> None:
        self.tuner = tuner
        self.base: Any = tuner.model
        self.chosen = chosen
        self.method = method
        self.arguments = arguments
        self.options, self.inputs = generation.tell_apart(self.base, arguments)
        self.samples = self.options.num_return_sequences or 1
        self.size = generation.count_inputs(self.base, arguments, self.inputs)
        self.tokenizer = arguments.get("tokenizer")
        self.weights = tuner.hypothesis_weights
        if weights is not None:
            self.weights = _check_weights("weights", weights, tuner.num_hypotheses)
        self._check()

    @property
    def count(self) -> int:
        """M, the sequences of an input."""
        return len(self.chosen) * self.samples

    def _check(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"The method to rank by (`rank`) must be one of {', '.join(METHODS)}, got {self.method!r}."
            )
        if self.method == "consensus":
            if not hasattr(self.tokenizer, "batch_decode"):
                raise ValueError(
                    "`tokenizer` is needed to rank by consensus, which compares texts; got "
                    f"{self.tokenizer!r}. Pass the tokenizer of the model."
                )
            _chrf()
        elif type(self.base).generate is not GenerationMixin.generate:
            raise ValueError(
                f"`rank`: {type(self.base).__name__} has a `generate` of its own, whose sequences cannot be scored. Rank them "
                "by 'consensus'."
            )
        if self.method == "mixture" and self.tuner.num_hypotheses > 1 and self.tuner.is_merged:
            raise ValueError(
                "`rank='mixture'` scores under all hypotheses, but one is merged into the base weights, so no other can run. "
                "Call `unmerge_adapter()` first."
            )

    def check_output(self) -> None:
        """Raise a ValueError if what `generate` will return cannot be put in another order."""
        if self.count == 1:
            return
        if self.arguments.get("past_key_values") is not None:
            raise ValueError(
                "`past_key_values` would keep its rows in the order of decoding, while `rank` orders the sequences. Leave the "
                "cache out, or rank afterwards with `peft_mcl.rank_sequences`."
            )
        inside = self.options.output_attentions or self.options.output_hidden_states
        has_beams = (self.options.num_beams or 1) > 1
        if inside and self.base.config.is_encoder_decoder and self.samples > 1 and not has_beams:
            raise ValueError(
                "`output_attentions` and `output_hidden_states` with `num_return_sequences` give rows of the encoder that "
                "belong to several sequences, which `rank` cannot order. Leave them out, or rank afterwards with "
                "`peft_mcl.rank_sequences`."
            )

    def rank(self, sequences: torch.Tensor) -> Ranking:
        """Rank `sequences` (B * M, T)."""
        if sequences.dim() != 2 or len(sequences) != self.size * self.count:
            raise ValueError(
                f"`sequences` has the shape {tuple(sequences.shape)}; {self.size} inputs under {len(self.chosen)} hypotheses "
                f"with num_return_sequences={self.samples} have {self.size * self.count} rows. Pass the inputs and options that "
                "`generate` was given."
            )
        decoded_by = torch.tensor(self.chosen).repeat_interleave(self.samples)
        if self.method == "consensus":
            scores = self._consensus(sequences, decoded_by)
        else:
            scores = self._likelihoods(sequences, decoded_by)
        scores = scores.view(self.size, self.count)
        # A hypothesis that gives NaN has nothing to say; and a sort would put it first.
        scores, order = scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf).sort(dim=1, descending=True, stable=True)
        return Ranking(order, scores.float(), decoded_by[order])

    def _consensus(self, sequences: torch.Tensor, decoded_by: torch.Tensor) -> torch.Tensor:
        """float64 of shape (B * M,)."""
        assert self.tokenizer is not None
        texts = self.tokenizer.batch_decode(sequences[:, self._prompt_columns() :], skip_special_tokens=True)
        shares = [self.weights[k] for k in decoded_by.tolist()]
        if not any(shares):
            shares = [1.0] * len(shares)
        utilities: list[float] = []
        for start in range(0, len(texts), self.count):
            utilities += consensus_order(texts[start : start + self.count], shares)[1]
        return torch.tensor(utilities, dtype=torch.float64)

    def _prompt_columns(self) -> int:
        """How many columns of the sequences are the prompt, but for special tokens."""
        if self.base.config.is_encoder_decoder:
            prompt = self.inputs.get("decoder_input_ids")
        else:
            given = self.arguments.get("inputs")
            prompt = self.inputs.get("input_ids") if given is None else given
        return 0 if prompt is None else prompt.shape[1]

    def _likelihoods(self, sequences: torch.Tensor, decoded_by: torch.Tensor) -> torch.Tensor:
        """float64 of shape (B * M,)."""
        log_weights = torch.tensor(self.weights, dtype=torch.float64).log()
        if self.method == "likelihood":
            route = Route(hypothesis=self.chosen[0])
            if len(self.chosen) > 1:
                route = Route(decoded=tuple(self.chosen), num_inputs=self.size)
            totals, lengths = self._score(sequences, route)
            totals = totals + log_weights[decoded_by].repeat(self.size)
        else:
            # One hypothesis after the other: the calls are then no larger than those of decoding.
            found = [self._score(sequences, Route(hypothesis=k)) for k in range(self.tuner.num_hypotheses)]
            lengths = found[0][1]
            joint = torch.stack([totals for totals, _ in found], dim=1) + log_weights
            totals = joint.nan_to_num(nan=-torch.inf, neginf=-torch.inf).logsumexp(dim=1)
        alpha = 1.0 if self.options.length_penalty is None else self.options.length_penalty
        return totals / lengths.clamp(min=1).double() ** alpha

    def _score(self, sequences: torch.Tensor, route: Route) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-likelihood of each row under its hypothesis, in nats, float64 of shape (B * M,), and its tokens, int64."""
        inputs = {name: value for name, value in self.inputs.items() if name not in _NOT_FOR_SCORING}
        arguments = {**inputs, "inputs": self.arguments.get("inputs")}
        if self.count > 1:
            generation.repeat_rows(self.base, arguments, self.options, inputs, self.count)
        # What the model's own defaults would fill in has to be named.
        options = GenerationConfig(
            max_new_tokens=sequences.shape[1],
            num_beams=1,
            num_return_sequences=1,
            do_sample=False,
            use_cache=False,
            token_healing=False,
            output_attentions=False,
            output_hidden_states=False,
            bos_token_id=self.options.bos_token_id,
            eos_token_id=self.options.eos_token_id,
            pad_token_id=self.options.pad_token_id,
            decoder_start_token_id=arguments.pop("decoder_start_token_id", self.options.decoder_start_token_id),
        )

        def score(
            model: Any,
            input_ids: torch.Tensor,
            logits_processor: Any = None,
            stopping_criteria: Any = None,
            generation_config: Any = None,
            **model_kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rows = sequences.to(input_ids.device)
            _check_prompts(rows, input_ids)
            new = rows[:, input_ids.shape[1] :]
            has_other_ends = bool(self.arguments.get("stopping_criteria") or self.options.stop_strings)
            lengths = _lengths(new, self.options, has_other_ends)
            return _log_likelihoods(model, rows, new, lengths, model_kwargs), lengths.cpu()

        with self.tuner.routing.use(route):
            return type(self.base).generate(self.base, generation_config=options, custom_generate=score, **arguments)


def _check_prompts(sequences: torch.Tensor, prompts: torch.Tensor) -> None:
    if not torch.equal(sequences[:, : prompts.shape[1]], prompts):
        raise ValueError(
            "`sequences` do not begin with the prompts that were given with them. Pass the inputs and options that `generate` "
            "was given."
        )


def _lengths(new: torch.Tensor, options: GenerationConfig, has_other_ends: bool) -> torch.Tensor:
    """How many tokens of each row of `new` (N, T) were written, its end included: int64 (N,).

    A row without an end has been written to its last token, padding tokens included, unless something other than an end
    (`has_other_ends`) may have stopped it: then what it ends in is padding.
    """
    rows, columns = new.shape
    lengths = torch.full((rows,), columns, device=new.device)
    if options.eos_token_id is None or not columns:
        return lengths
    if has_other_ends and options.pad_token_id is not None:
        padding = (new.flip(1) == options.pad_token_id).long().cumprod(dim=1).sum(dim=1)
        # The first token was written, whatever it is.
        lengths = (lengths - padding).clamp(min=1)
    is_end = torch.isin(new, torch.as_tensor(options.eos_token_id, device=new.device))
    return torch.where(is_end.any(dim=1), is_end.long().argmax(dim=1) + 1, lengths)


def _log_likelihoods(
    model: Any, sequences: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor, model_kwargs: dict[str, Any]
) -> torch.Tensor:
    """Run the model once over `sequences` (N, P + T), whose last columns are `new` (N, T): float64 (N,) on the CPU, in nats."""
    columns = new.shape[1]
    if not columns:
        return torch.zeros(len(new), dtype=torch.float64)
    # The last token is predicted, not read. Masks, positions and types of the others come by the model's own rule.
    for _ in range(columns - 1):
        model_kwargs = model._update_model_kwargs_for_generation(
            ModelOutput(), model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
    embedded = model_kwargs.get("inputs_embeds")
    if embedded is not None and not model.config.is_encoder_decoder:
        written = model.get_input_embeddings()(new[:, :-1]).to(embedded.dtype)
        model_kwargs["inputs_embeds"] = torch.cat([embedded, written], dim=1)
    if "logits_to_keep" in model_kwargs:
        model_kwargs["logits_to_keep"] = columns
    inputs = model.prepare_inputs_for_generation(sequences[:, :-1], is_first_iteration=True, **model_kwargs)
    logits = model(**inputs, return_dict=True).logits[:, -columns:]
    # Row by row: all logits in float32 would be the largest tensor of the call.
    return torch.stack(
        [
            -F.cross_entropy(row[:length].float(), tokens[:length].to(row.device), reduction="none").double().sum()
            for row, tokens, length in zip(logits, new, lengths.tolist(), strict=True)
        ]
    ).cpu()


def _reorder(output: Any, rows: torch.Tensor) -> Any:
    """What `generate` has returned, with its rows in another order."""

    def reorder(name: str, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf[rows.to(leaf.device)]
        if isinstance(leaf, Cache):
            leaf.reorder_cache(rows)
        return leaf

    if isinstance(output, (GenerateBeamDecoderOnlyOutput, GenerateBeamEncoderDecoderOutput)):
        by_sequence = ("sequences", "sequences_scores", "beam_indices")
        return type(output)(**{k: reorder(k, v) if k in by_sequence else v for k, v in output.items()})
    return map_leaves("", output, reorder)


def _check_weights(name: str, weights: Any, count: int) -> list[float]:
    """As `config.check_weights`, for tensors and arrays, too."""
    return check_weights(name, weights.tolist() if hasattr(weights, "tolist") else weights, count)


def _chrf() -> Any:
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise ImportError(
            "A consensus needs the package sacrebleu: pip install 'peft-mcl[evaluation]', or rank by 'likelihood'."
        ) from error
    return CHRF()


def _tuner_of(model: Any) -> MCLoraModel:
    """The tuner of a PeftModel, or of a transformers model that has the adapter, which keeps the tuner's `generate`."""
    owner = getattr(vars(model).get("generate"), "__self__", None)
    candidates: tuple[Any, ...] = (getattr(model, "base_model", None), model, owner)
    for found in candidates:
        if hasattr(found, "routing") and hasattr(found, "num_hypotheses"):
            return found
    raise ValueError(f"`model` has no MCLORA adapter: it is a {type(model).__name__}.")
