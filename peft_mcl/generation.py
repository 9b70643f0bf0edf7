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

from peft_mcl.routing import NOT_BATCHED, Route, cache_rows, check_hypothesis


if TYPE_CHECKING:
    from peft_mcl.model import MCLoraModel

# What serves one sequence at a time, and so one hypothesis at a time.
SINGLE_ROW_ARGUMENTS = ("streamer", "assistant_model", "prompt_lookup_num_tokens")


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
        ValueError: A hypothesis does not exist, or an argument that serves one sequence at a time (a streamer, an
            assistant model, a filled cache) meets several hypotheses.
    """
    base: Any = tuner.model
    chosen = _choose(tuner, hypotheses)
    route = Route(hypothesis=chosen[0])
    if len(chosen) > 1:
        arguments = _bind(base, args, kwargs)
        _refuse_single_row_arguments(arguments, len(chosen))
        rows = _repeat_rows(base, arguments, len(chosen))
        args, kwargs = (), arguments
        route = Route(index=torch.tensor(chosen).repeat(rows))
    with tuner.routing.use(route):
        return type(base).generate(base, *args, **kwargs)


def _choose(tuner: MCLoraModel, hypotheses: Any) -> list[int]:
    """The hypotheses to decode, in order."""
    count = tuner.num_hypotheses
    if hypotheses is None:
        layer = next(module for module in tuner.model.modules() if isinstance(module, tuner.tuner_layer_cls))
        if layer.disable_adapters or layer.merged:
            return [tuner.routing.active]
        return list(range(count))
    if isinstance(hypotheses, str):
        if hypotheses != "all":
            raise ValueError(f"`hypotheses` must be an int, a list of ints or 'all', got {hypotheses!r}.")
        return list(range(count))
    if isinstance(hypotheses, torch.Tensor):
        if hypotheses.dim() != 1 or hypotheses.is_floating_point() or hypotheses.dtype == torch.bool:
            raise ValueError(
                "`hypotheses` must be an int, a list of ints or a 1-D integer tensor, got a tensor of shape "
                f"{tuple(hypotheses.shape)} and dtype {hypotheses.dtype}."
            )
        hypotheses = hypotheses.tolist()
    if isinstance(hypotheses, (list, tuple)):
        if not hypotheses:
            raise ValueError("`hypotheses` is empty: name at least one hypothesis, or leave it out for all of them.")
        return [check_hypothesis(index, count, "hypotheses") for index in hypotheses]
    return [check_hypothesis(hypotheses, count, "hypotheses")]


def _bind(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the base model's `generate` by name, those left at None dropped."""
    signature = inspect.signature(type(base).generate)
    arguments = signature.bind_partial(base, *args, **kwargs).arguments
    arguments.pop("self", None)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return {name: value for name, value in arguments.items() if value is not None}


def _refuse_single_row_arguments(arguments: dict[str, Any], count: int) -> None:
    config = arguments.get("generation_config")
    for name in SINGLE_ROW_ARGUMENTS:
        if arguments.get(name) is not None or getattr(config, name, None) is not None:
            raise ValueError(
                f"`{name}` serves one sequence at a time, but {count} hypotheses were asked for. Pass `hypotheses=k` to "
                "generate under one of them."
            )
    if "paged" in (arguments.get("cache_implementation"), getattr(config, "cache_implementation", None)):
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


def _repeat_rows(base: Any, arguments: dict[str, Any], count: int) -> int:
    """Repeat every input `count` times in a row, in place, by the model's own rule. Returns B."""
    options = GenerationConfig()
    batched = {
        name: value
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor)
        and value.dim() > 0
        and name not in NOT_BATCHED
        and not hasattr(options, name)
    }
    main = arguments.get("inputs", batched.get("input_ids", batched.get("inputs_embeds")))
    if main is None and not batched:
        # As transformers does for a call without a prompt, only for several rows.
        main = arguments["inputs"] = batched["inputs"] = _empty_prompt(base, arguments)
    main = next(iter(batched.values())) if main is None else main

    # Tensors that are arguments of `generate` itself are not inputs of the model, so its rule does not see them.
    own = [name for name in batched if name in inspect.signature(type(base).generate).parameters]
    for name in own:
        arguments[name] = batched.pop(name).repeat_interleave(count, dim=0)
    input_ids, expanded = base._expand_inputs_for_generation(
        expand_size=count, is_encoder_decoder=False, input_ids=batched.pop("input_ids", None), **batched
    )
    arguments.update(expanded)
    if input_ids is not None:
        arguments["input_ids"] = input_ids
    if isinstance(arguments.get("encoder_outputs"), ModelOutput):
        outputs = arguments["encoder_outputs"]
        arguments["encoder_outputs"] = type(outputs)(
            **{key: _interleave(value, count) for key, value in outputs.items()}
        )
    allowed_tokens = arguments.get("prefix_allowed_tokens_fn")
    if allowed_tokens is not None:
        # The user's function counts inputs, not rows.
        arguments["prefix_allowed_tokens_fn"] = lambda row, ids: allowed_tokens(row // count, ids)
    return main.shape[0]


def _interleave(value: Any, count: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value.repeat_interleave(count, dim=0)
    if isinstance(value, tuple):
        return tuple(_interleave(item, count) for item in value)
    return value


def _empty_prompt(base: Any, arguments: dict[str, Any]) -> torch.Tensor:
    config = arguments.get("generation_config") or base.generation_config
    token = arguments.get("bos_token_id", config.bos_token_id)
    if token is None:
        raise ValueError("`generate` needs `input_ids`, or a `bos_token_id` to start from.")
    return torch.full((1, 1), token, dtype=torch.long, device=base.device)
