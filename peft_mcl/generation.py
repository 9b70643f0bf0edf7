"""One sequence for each hypothesis, from one `generate` call.

Every input is repeated once for each hypothesis and the rows are decoded side by side, so one prefill and one decoding
loop serve all of them. Beam search and `num_return_sequences` repeat rows further, which keeps the rows of one
hypothesis together; so beams compete only within their hypothesis.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from peft_mcl.routing import BROADCAST, NOT_BATCHED, Route, cache_rows, check_hypothesis


if TYPE_CHECKING:
    from peft_mcl.model import MCLoraModel

# What serves one sequence at a time, and so one hypothesis at a time: arguments and options of transformers' `generate`.
SINGLE_ROW_ARGUMENTS = ("streamer", "assistant_model")
SINGLE_ROW_OPTIONS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "token_healing")


def generate(tuner: MCLoraModel, *args: Any, hypotheses: Any = None, **kwargs: Any) -> Any:
    """Decode each input under each hypothesis. Takes what the base model's `generate` takes, and `hypotheses`.

    Args:
        tuner ([`MCLoraModel`]): The adapted model.
        hypotheses: An int; a list, tuple or 1-D integer tensor of ints, decoded in that order; `"all"`, or None for all
            (while adapters are disabled, None is a plain call of the base model; while one hypothesis is merged, that one).
        *args, **kwargs: Arguments of `transformers.GenerationMixin.generate`.

    Returns:
        What the base model's `generate` returns, for B * K rows: row b * K + k is hypothesis k of input b, or, with
        `num_return_sequences=n`, rows (b * K + k) * n .. (b * K + k + 1) * n - 1. `K` is the length of the subset asked for.

    Raises:
        ValueError: A hypothesis does not exist, or several of them meet what serves one sequence at a time (a streamer,
            an assistant model), a filled cache, or an input that is not one row for each prompt (several pictures).
    """
    base: Any = tuner.model
    chosen = choose_hypotheses(tuner, hypotheses)
    route = Route(hypothesis=chosen[0])
    if len(chosen) > 1:
        arguments = bind_arguments(base, args, kwargs)
        options, inputs = tell_apart(base, arguments)
        _refuse_single_row_arguments(arguments, options, len(chosen))
        rows = repeat_rows(base, arguments, options, inputs, len(chosen))
        args, kwargs = (), arguments
        route = Route(decoded=tuple(chosen), num_inputs=rows)
    with tuner.routing.use(route):
        return type(base).generate(base, *args, **kwargs)


def choose_hypotheses(tuner: MCLoraModel, hypotheses: Any) -> list[int]:
    """The hypotheses to decode, in order."""
    count = tuner.num_hypotheses
    if hypotheses is None:
        running = tuner.routing.offered
        if running is not None and running.hypothesis is not None:
            # transformers calls `generate` of the model inside `generate` (token healing, early exit).
            return [running.hypothesis]
        layer = next(module for module in tuner.model.modules() if isinstance(module, tuner.tuner_layer_cls))
        if layer.disable_adapters or layer.merged:
            return [tuner.routing.active]
        return list(range(count))
    if isinstance(hypotheses, str) and hypotheses == "all":
        return list(range(count))
    if isinstance(hypotheses, torch.Tensor) and hypotheses.dim() == 1:
        hypotheses = hypotheses.tolist()
    if isinstance(hypotheses, (list, tuple)):
        if not hypotheses:
            raise ValueError("`hypotheses` is empty: name at least one hypothesis, or leave it out for all of them.")
        return [check_hypothesis(index, count, "hypotheses") for index in hypotheses]
    if isinstance(hypotheses, (str, bool, torch.Tensor)) or not hasattr(hypotheses, "__index__"):
        raise ValueError(
            f"`hypotheses` must be an int, a list, tuple or 1-D tensor of ints in [0, {count - 1}], or 'all', got "
            f"{hypotheses!r}."
        )
    return [check_hypothesis(hypotheses, count, "hypotheses")]


def bind_arguments(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the base model's `generate` by name."""
    signature = inspect.signature(type(base).generate)
    arguments = signature.bind_partial(base, *args, **kwargs).arguments
    arguments.pop("self", None)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return dict(arguments)


def tell_apart(base: Any, arguments: dict[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """The options in force, with the defaults of the model, and the inputs of the model, as `generate` tells them apart."""
    own = inspect.signature(type(base).generate).parameters
    rest = {name: value for name, value in arguments.items() if name not in own}
    return base._prepare_generation_config(arguments.get("generation_config"), **rest)


def _refuse_single_row_arguments(arguments: dict[str, Any], options: GenerationConfig, count: int) -> None:
    used = [name for name in SINGLE_ROW_ARGUMENTS if arguments.get(name) is not None]
    used += [name for name in SINGLE_ROW_OPTIONS if getattr(options, name, None)]
    if used:
        raise ValueError(
            f"`{used[0]}` serves one sequence at a time, but {count} hypotheses were asked for. Pass `hypotheses=k` to "
            "generate under one of them."
        )
    if options.cache_implementation == "paged":
        raise ValueError(
            "`cache_implementation='paged'` packs all sequences into one row, which can run only one hypothesis, but "
            f"{count} were asked for. Pass `hypotheses=k`."
        )
    cache = arguments.get("past_key_values")
    if isinstance(cache, Cache) and cache_rows(cache) is not None:
        raise ValueError(
            f"`past_key_values` holds keys and values of one hypothesis, but {count} hypotheses were asked for. Pass "
            "`hypotheses=k`, or leave the cache out."
        )


def repeat_rows(
    base: Any, arguments: dict[str, Any], options: GenerationConfig, inputs: dict[str, Any], count: int
) -> int:
    """Repeat every input `count` times in a row, in place in `arguments`, by the model's own rule. Returns B."""
    own_inputs, batched = _batched_inputs(base, arguments, inputs)
    encoder_outputs = arguments.get("encoder_outputs")
    main = _main_input(base, arguments, inputs)
    if main is None:
        # As `generate` does for a call without a prompt, only for several rows.
        main = own_inputs["inputs"] = _empty_prompt(base, options)
    size = main.shape[0]

    # Arguments of `generate` itself are no inputs of the model, so its rule does not see them.
    for name, value in own_inputs.items():
        arguments[name] = value.repeat_interleave(count, dim=0)
    for name, value in batched.items():
        if name not in BROADCAST and value.shape[0] != size:
            raise ValueError(
                f"`{name}` has {value.shape[0]} rows for {size} inputs, so it cannot be told which of them belong to which "
                f"input, to repeat them for {count} hypotheses. Pass `hypotheses=k` to generate under one of them."
            )
    # One row for a larger batch applies to all rows.
    batched = {name: value for name, value in batched.items() if not (name in BROADCAST and value.shape[0] == 1 < size)}
    input_ids, expanded = base._expand_inputs_for_generation(
        expand_size=count, is_encoder_decoder=False, input_ids=batched.pop("input_ids", None), **batched
    )
    arguments.update(expanded)
    if input_ids is not None:
        arguments["input_ids"] = input_ids
    if encoder_outputs is not None:
        arguments["encoder_outputs"] = _interleave(encoder_outputs, count)
    start = options.decoder_start_token_id
    start = start.tolist() if isinstance(start, torch.Tensor) else start
    if isinstance(start, list):
        # One token for each input.
        arguments["decoder_start_token_id"] = [token for token in start for _ in range(count)]
    allowed_tokens = arguments.get("prefix_allowed_tokens_fn")
    if allowed_tokens is not None:
        # It is given the number of the input, or, when sampling n sequences for each input, that of the sample (b * n + i).
        samples = options.num_return_sequences if options.num_beams == 1 else 1
        arguments["prefix_allowed_tokens_fn"] = lambda row, ids: allowed_tokens(
            row // (count * samples) * samples + row % samples, ids
        )
    return size


def count_inputs(base: Any, arguments: dict[str, Any], inputs: dict[str, Any]) -> int:
    """B, the number of inputs of a call of `generate`; 1 if it has no prompt."""
    main = _main_input(base, arguments, inputs)
    return 1 if main is None else main.shape[0]


def _batched_inputs(
    base: Any, arguments: dict[str, Any], inputs: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors that have a row for each input: arguments of `generate` itself, and inputs of the model."""
    own = inspect.signature(type(base).generate).parameters
    own_inputs = {name: value for name, value in arguments.items() if name in own and _is_batched(name, value)}
    return own_inputs, {name: value for name, value in inputs.items() if _is_batched(name, value)}


def _main_input(base: Any, arguments: dict[str, Any], inputs: dict[str, Any]) -> torch.Tensor | None:
    own_inputs, batched = _batched_inputs(base, arguments, inputs)
    encoder_outputs = arguments.get("encoder_outputs")
    encoded = [] if encoder_outputs is None else [encoder_outputs[0]]
    # The order in which `generate` looks for its main input.
    named = {**batched, **own_inputs}
    first = [named.get(name) for name in ("inputs", base.main_input_name, "input_ids", "inputs_embeds")]
    return next((value for value in [*first, *encoded, *batched.values()] if value is not None), None)


def _is_batched(name: str, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and name not in NOT_BATCHED


def _interleave(value: Any, count: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value.repeat_interleave(count, dim=0)
    if isinstance(value, ModelOutput):
        return type(value)(**{key: _interleave(item, count) for key, item in value.items()})
    if isinstance(value, tuple):
        return tuple(_interleave(item, count) for item in value)
    return value


def _empty_prompt(base: Any, options: GenerationConfig) -> torch.Tensor:
    if options.bos_token_id is None:
        raise ValueError("`generate` needs `input_ids`, or a `bos_token_id` to start from.")
    return torch.full((1, 1), options.bos_token_id, dtype=torch.long, device=base.device)
