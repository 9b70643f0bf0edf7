"""Bad input of the evaluation is refused before anything is computed; missing packages are told by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def required(module: str) -> Any:
    """Import a module of the extra `evaluation`, or raise an ImportError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"The module {module!r} is needed for this and cannot be imported ({error}): pip install 'peft-mcl[evaluation]'"
        ) from error


def check_outputs(outputs: Sequence[Sequence[str]]) -> int:
    """Raise a ValueError unless there are K texts for each of N inputs, N and K at least 1; returns K."""
    _check_table("outputs", outputs)
    count = len(outputs[0])
    for n, row in enumerate(outputs):
        if len(row) != count:
            raise ValueError(
                f"`outputs` has {len(row)} texts for input {n}, but {count} for input 0: give every input the same number."
            )
    return count


def check_references(references: Sequence[Sequence[str]], num_inputs: int | None = None) -> None:
    """Raise a ValueError unless each input, of which there are `num_inputs` if that is given, has at least one reference."""
    _check_table("references", references)
    if num_inputs is not None and len(references) != num_inputs:
        raise ValueError(
            f"`references` has {len(references)} inputs, but `outputs` has {num_inputs}: give one list of references for each."
        )


def _check_table(name: str, table: Sequence[Sequence[str]]) -> None:
    if isinstance(table, str) or len(table) == 0:
        raise ValueError(f"`{name}` is {table!r}: give a list of inputs, each a list of texts.")
    for n, row in enumerate(table):
        if isinstance(row, str) or not isinstance(row, Sequence):
            raise ValueError(f"`{name}[{n}]` is {row!r}, not a list of texts: put one text in a list, too.")
        if len(row) == 0:
            raise ValueError(f"`{name}[{n}]` is empty: give this input at least one text, or leave the input out.")
        check_texts(f"{name}[{n}]", row)


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Raise a ValueError that names the first of some texts that is none."""
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"`{name}[{i}]` is {text!r}, not a text: give a string, '' if there is nothing.")


def check_winners(
    winners: ArrayLike, num_hypotheses: int, name: str = "winners", num_sequences: int | None = None
) -> np.ndarray:
    """The winners as an int64 array of shape (N,), N at least 1; a ValueError unless each is one of the hypotheses.

    Args:
        winners (array or CPU tensor): What was given.
        num_hypotheses (`int`): K.
        name (`str`): Of the argument, for errors.
        num_sequences (`int`, *optional*): What N must be.
    """
    array = np.asarray(winners)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"`{name}` has the shape {array.shape} and the dtype {array.dtype}: give the index of the winning hypothesis of each "
            "sequence, integers of shape (N,)."
        )
    if num_sequences is not None and len(array) != num_sequences:
        raise ValueError(f"`{name}` has {len(array)} entries for {num_sequences} sequences: give one for each.")
    wrong = np.flatnonzero((array < 0) | (array >= num_hypotheses))
    if len(wrong):
        raise ValueError(
            f"`{name}[{wrong[0]}]` is {array[wrong[0]]}, but there are {num_hypotheses} hypotheses: give numbers from 0 to "
            f"{num_hypotheses - 1}, or the right `num_hypotheses`."
        )
    return array.astype(np.int64)
