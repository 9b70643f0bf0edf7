"""A batch as its sequences, whether they are padded rows or packed one after the other into one row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch

from trainer_ext.groups import GROUPS


# Inputs with one column for each token. They are cut together, and only if no other input seems to have such columns.
TOKEN_INPUTS = frozenset(
    {"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids", "mm_token_type_ids", "inputs_embeds"}
)


class SequenceBatch:
    """The sequences of a batch of model inputs.

    Args:
        inputs (`dict`): What a collator made: `labels`, and tensors of shape (B, T, ...) for padded rows. With
            `cu_seq_lens_q` (S + 1,), the bounds of S sequences, and tensors of shape (1, L, ...), it is one packed row.

    Attributes:
        inputs (`dict`): Those for the model: without the groups.
        groups (`torch.Tensor`, *optional*): int64 of shape (B,), the group of each sequence, if the collator tells it.
        bounds (`list[int]`, *optional*): The bounds of the sequences of a packed row; None for padded rows.
        sequence (`torch.Tensor`): int64 of shape (N,), the sequence of each of the N supervised tokens.
        row, column (`torch.Tensor`): int64 of shape (N,), the position that predicts each supervised token.
        targets (`torch.Tensor`): int64 of shape (N,), the supervised tokens.
        num_tokens (`torch.Tensor`): int64 of shape (B,), the supervised tokens of each sequence.

    Raises:
        ValueError: There are groups, but not one for each sequence.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = {name: value for name, value in inputs.items() if name != GROUPS}
        self.groups: torch.Tensor | None = inputs.get(GROUPS)
        self.labels: torch.Tensor = inputs["labels"]
        ends = inputs.get("cu_seq_lens_q")
        self.bounds: list[int] | None = None if ends is None else ends.tolist()
        # Position t predicts token t + 1.
        self.row, self.column = (self.labels[:, 1:] != -100).nonzero(as_tuple=True)
        self.targets = self.labels[self.row, self.column + 1]
        self.sequence = self.row
        if self.bounds is not None:
            self.sequence = self._sequence_of_columns(self.column + 1)
        ones = torch.ones_like(self.sequence)
        self.num_tokens = self.sequence.new_zeros(len(self)).index_add(0, self.sequence, ones)
        if self.groups is not None and len(self.groups) != len(self):
            self.groups = self._fill_up(self.groups)

    def _fill_up(self, groups: torch.Tensor) -> torch.Tensor:
        """Each position that fills up a packed row is a sequence with nothing to learn: it gets a group, too, which counts nowhere."""
        if len(groups) > len(self) or self.num_tokens[len(groups) :].any():
            raise ValueError(
                f"`group_column` gives {len(groups)} rows of this batch their groups, but it has {len(self)} sequences. Give each "
                "sequence a row of its own, without packing."
            )
        return torch.cat([groups, groups.new_zeros(len(self) - len(groups))])

    def __len__(self) -> int:
        return len(self.labels) if self.bounds is None else len(self.bounds) - 1

    @property
    def is_packed(self) -> bool:
        return self.bounds is not None

    @property
    def can_select(self) -> bool:
        """Whether sequences can be taken out: not where image patches, say, do not lie in rows."""
        if self.is_packed:
            return True
        tensors = {name: value for name, value in self.inputs.items() if isinstance(value, torch.Tensor)}
        return all(
            value.dim() == 0 or value.shape[_row_dimension(name, value)] == len(self) for name, value in tensors.items()
        )

    @cached_property
    def needed_tokens(self) -> list[int]:
        """How many leading positions of each sequence the scores need: up to the one that predicts the last supervised token.

        What comes after it cannot change them in a causal model. At least 1.
        """
        start = 0 if self.bounds is None else torch.tensor(self.bounds, device=self.labels.device)[self.sequence]
        needed = torch.ones(len(self), dtype=torch.int64, device=self.labels.device)
        return needed.scatter_reduce(0, self.sequence, self.column + 1 - start, "amax").tolist()

    def _sequence_of_columns(self, columns: torch.Tensor) -> torch.Tensor:
        """The sequences that columns (N,) of a packed row belong to."""
        assert self.bounds is not None
        return torch.bucketize(columns, torch.tensor(self.bounds[1:], device=self.labels.device), right=True)

    @property
    def sequence_of_positions(self) -> torch.Tensor:
        """The sequence in [0, B - 1] that each position belongs to, -1 for padding: int64 of the shape of the labels."""
        rows, width = self.labels.shape
        device = self.labels.device
        if self.bounds is not None:
            return self._sequence_of_columns(torch.arange(width, device=device))[None]
        sequence = torch.arange(rows, device=device)[:, None].expand(rows, width)
        mask = self.inputs.get("attention_mask")
        return sequence if mask is None else torch.where(mask.bool(), sequence, -1)

    def select(self, sequences: list[int], multiple_of: int | None = None) -> SequenceBatch:
        """The named sequences in their order, each as often as it is named, without the columns that none of them needs.

        Args:
            sequences (`list[int]`): At least one index in [0, len(self) - 1].
            multiple_of (`int`, *optional*): Keep the number of columns of padded rows a multiple of this.
        """
        if self.bounds is not None:
            return self._select_packed(sequences)
        # One more column of labels than of predictions.
        columns = max(self.needed_tokens[sequence] for sequence in sequences) + 1
        columns = -(-columns // (multiple_of or 1)) * (multiple_of or 1)
        columns = min(columns, self.labels.shape[1]) if self._can_cut else self.labels.shape[1]
        rows = torch.tensor(sequences, device=self.labels.device)
        inputs = {name: self._cut(name, value, rows, columns) for name, value in self.inputs.items()}
        return SequenceBatch(self._with_groups(inputs, sequences))

    @property
    def _can_cut(self) -> bool:
        width = self.labels.shape[1]
        return all(
            name in TOKEN_INPUTS or value.dim() < 2 or width not in value.shape[1:]
            for name, value in self.inputs.items()
            if isinstance(value, torch.Tensor)
        )

    def _cut(self, name: str, value: Any, rows: torch.Tensor, columns: int) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        if _row_dimension(name, value) == 1:
            return value[:, rows, :columns]
        return value[rows, :columns] if name in TOKEN_INPUTS and value.dim() > 1 else value[rows]

    def _select_packed(self, sequences: list[int]) -> SequenceBatch:
        assert self.bounds is not None
        width, device = self.labels.shape[1], self.labels.device
        # One more token than predictions, if the sequence has it: the last target must not fall off.
        lengths = [
            min(self.needed_tokens[sequence] + 1, self.bounds[sequence + 1] - self.bounds[sequence])
            for sequence in sequences
        ]
        places = torch.cat(
            [torch.arange(length) + self.bounds[s] for s, length in zip(sequences, lengths, strict=True)]
        )
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        inputs: dict[str, Any] = {
            name: value[:, places.to(value.device)]
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == width
            else value
            for name, value in self.inputs.items()
        }
        inputs.update(
            {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}
        )
        if "seq_idx" in inputs:
            order = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            inputs["seq_idx"] = order[None].to(self.inputs["seq_idx"])
        return SequenceBatch(self._with_groups(inputs, sequences))

    def _with_groups(self, inputs: dict[str, Any], sequences: list[int] | slice) -> dict[str, Any]:
        return inputs if self.groups is None else {**inputs, GROUPS: self.groups[sequences]}

    def first_tokens(self, count: int) -> SequenceBatch:
        """The same sequences with at most their first `count` supervised tokens supervised."""
        first = self.num_tokens.cumsum(0) - self.num_tokens
        rank = torch.arange(len(self.sequence), device=self.labels.device) - first[self.sequence]
        return self._without_targets(rank >= count)

    def without_labels(self, sequences: Iterable[int]) -> SequenceBatch:
        """The same batch, but with nothing to learn from the named sequences."""
        named = torch.tensor(list(sequences), dtype=torch.int64, device=self.labels.device)
        return self._without_targets(torch.isin(self.sequence, named))

    def _without_targets(self, hidden: torch.Tensor) -> SequenceBatch:
        labels = self.labels.clone()
        labels[self.row[hidden], self.column[hidden] + 1] = -100
        return SequenceBatch(self._with_groups({**self.inputs, "labels": labels}, slice(None)))

    @cached_property
    def keys(self) -> list[int]:
        """A number for each sequence that tells it from others by its content: 63 bits of a hash of its ids and labels.

        It is the same in every batch, whatever the padding, the packing and the order. Other inputs of a row, an image say,
        are part of the content; those that do not lie in rows are not.
        """
        ids, labels = self.inputs["input_ids"].cpu(), self.labels.cpu()
        mask = self.inputs.get("attention_mask")
        mask = None if mask is None else mask.bool().cpu()
        others = [
            value.cpu()
            for name, value in sorted(self.inputs.items())
            if isinstance(value, torch.Tensor) and value.dim() > 0 and name not in TOKEN_INPUTS
            if not self.is_packed and len(value) == len(self)
        ]
        keys = []
        for sequence in range(len(self)):
            if self.bounds is not None:
                row, place = 0, slice(self.bounds[sequence], self.bounds[sequence + 1])
            else:
                row, place = sequence, slice(None)
            pair = torch.stack([ids[row, place], labels[row, place]])
            if mask is not None:
                pair = pair[:, mask[row, place]]
            # The first token is never a target, and packing masks its label.
            pair[1, :1] = -100
            digest = hashlib.blake2b(_bytes(pair), digest_size=8)
            for value in others:
                digest.update(_bytes(value[sequence]))
            keys.append(int.from_bytes(digest.digest(), "big") >> 1)
        return keys


def _row_dimension(name: str, value: torch.Tensor) -> int:
    # (3, batch, length): the position ids of multimodal rotary embeddings.
    return 1 if name == "position_ids" and value.dim() == 3 else 0


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def plan_slices(
    lengths: list[int], copies: int, max_rows: int, overhead: int, max_positions: int = 0
) -> list[list[int]]:
    """Group sequences into calls so that as few positions as possible are computed, padding included.

    Sequences of like length go together; a call of g sequences computes `copies * g * longest` positions and costs `overhead`
    positions besides. The cheapest contiguous partition of the sorted lengths is found exactly (dynamic programming).

    Args:
        lengths (`list[int]`): Positions that each sequence needs.
        copies (`int`): Rows for each sequence of a call.
        max_rows (`int`): Most rows of a call, unless it has at most `max_positions`; a call has at least one sequence.
        overhead (`int`): Cost of a call, in positions.
        max_positions (`int`): See `max_rows`.

    Returns:
        `list[list[int]]`: The indices of the sequences of each call.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    # best[n]: the cost of the n shortest sequences, and where their last call begins.
    best = [(0, 0)]
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        largest = max(1, max_rows // copies, max_positions // (copies * longest))
        starts = range(max(0, stop - largest), stop)
        best.append(min((best[start][0] + overhead + copies * (stop - start) * longest, start) for start in starts))
    groups, stop = [], len(order)
    while stop:
        start = best[stop][1]
        groups.append(sorted(order[start:stop]))
        stop = start
    return groups[::-1]
