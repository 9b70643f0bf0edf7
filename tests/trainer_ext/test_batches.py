"""Batches as sequences: selection, trimming, prefixes, keys, and the plan of scoring calls against all other plans."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.tiny import PAD
from trainer_ext.batches import SequenceBatch, plan_slices


# (length, prompt, tokens without a label at the end)
EXAMPLES = [(7, 3, 0), (2, 1, 0), (12, 5, 2), (4, 4, 0), (1, 0, 0), (9, 0, 4)]


def examples(shapes=EXAMPLES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length, prompt, tail in shapes:
        ids = torch.randint(3, 60, (length,), generator=generator).tolist()
        labels = [-100 if t < prompt or t >= length - tail else ids[t] for t in range(length)]
        found.append({"input_ids": ids, "labels": labels})
    return found


def collated(layout, shapes=EXAMPLES, seed=0, **options):
    collate = DataCollatorForLanguageModeling(PAD, padding_free=layout == "packed", **options)
    return collate(examples(shapes, seed))


def supervised(example):
    """(position, target) of each supervised token of an example, the first token never being one."""
    return [(t - 1, label) for t, label in enumerate(example["labels"]) if t > 0 and label != -100]


def contents(batch):
    """The supervised (position in the sequence, target) pairs of each sequence of a batch."""
    found = [[] for _ in range(len(batch))]
    for sequence, row, column, target in zip(
        *(tensor.tolist() for tensor in (batch.sequence, batch.row, batch.column, batch.targets)), strict=True
    ):
        start = 0 if batch.bounds is None else batch.bounds[sequence]
        assert row == (sequence if batch.bounds is None else 0)
        found[sequence].append((column - start, target))
    return found


def ids_of(batch, sequence):
    if batch.bounds is not None:
        return batch.inputs["input_ids"][0, batch.bounds[sequence] : batch.bounds[sequence + 1]].tolist()
    mask = batch.inputs["attention_mask"][sequence].bool()
    return batch.inputs["input_ids"][sequence][mask].tolist()


LAYOUTS = ["padded", "packed"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequences_and_their_supervised_tokens(layout):
    batch = SequenceBatch(collated(layout))
    assert len(batch) == len(EXAMPLES)
    assert batch.is_packed == (layout == "packed")
    assert contents(batch) == [supervised(example) for example in examples()]
    assert batch.num_tokens.tolist() == [len(supervised(example)) for example in examples()]
    # Up to the position that predicts the last supervised token.
    assert batch.needed_tokens == [max([1, *(t + 1 for t, _ in supervised(e))]) for e in examples()]


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, len(EXAMPLES) - 1), min_size=1, max_size=8))
def test_selection_keeps_what_the_scores_need(layout, chosen):
    batch = SequenceBatch(collated(layout))
    part = batch.select(chosen)
    assert contents(part) == [contents(batch)[index] for index in chosen]
    width = 0
    for place, index in enumerate(chosen):
        own, whole = ids_of(part, place), examples()[index]["input_ids"]
        assert own == whole[: len(own)]
        assert len(own) >= batch.needed_tokens[index]
        width = max(width, min(batch.needed_tokens[index] + 1, len(whole) if layout == "packed" else 99))
    lengths = part.labels.shape[1] if layout == "padded" else part.inputs["max_length_q"]
    assert lengths == min(width, batch.labels.shape[1])
    if layout == "packed":
        assert part.inputs["seq_idx"].dtype == batch.inputs["seq_idx"].dtype
        assert part.inputs["cu_seq_lens_q"].dtype == torch.int32
        restarts = (part.inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        assert restarts == part.bounds[:-1]
        assert part.inputs["seq_idx"][0].bincount().tolist() == torch.tensor(part.bounds).diff().tolist()


def test_columns_are_cut_to_a_multiple_and_other_inputs_are_respected():
    inputs = collated("padded")
    assert inputs["input_ids"].shape[1] == 12
    assert SequenceBatch(inputs).select([1]).labels.shape[1] == 2
    assert SequenceBatch(inputs).select([0], multiple_of=4).labels.shape[1] == 8
    # An input of unknown meaning with as many columns: nothing is cut.
    whole = SequenceBatch({**inputs, "bias": torch.zeros(6, 12)}).select([1])
    assert whole.labels.shape == whole.inputs["bias"].shape == (1, 12)
    picture = SequenceBatch({**inputs, "pixel_values": torch.zeros(6, 3, 8, 8)}).select([1, 2])
    assert picture.inputs["pixel_values"].shape == (2, 3, 8, 8)
    assert not SequenceBatch({**inputs, "pixel_values": torch.zeros(11, 5)}).can_select
    positions = torch.arange(12).expand(3, 6, 12)
    multimodal = SequenceBatch({**inputs, "position_ids": positions}).select([1, 2])
    assert multimodal.inputs["position_ids"].shape == (3, 2, 10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 3, 100])
def test_prefixes(layout, count):
    batch = SequenceBatch(collated(layout))
    before = batch.labels.clone()
    assert contents(batch.first_tokens(count)) == [own[:count] for own in contents(batch)]
    assert torch.equal(batch.labels, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hidden", [[], [1], [0, 5], range(2, 6), range(6)])
def test_sequences_without_labels(layout, hidden):
    batch = SequenceBatch(collated(layout))
    before = batch.labels.clone()
    found = batch.without_labels(hidden)
    assert contents(found) == [[] if row in hidden else own for row, own in enumerate(contents(batch))]
    assert torch.equal(found.inputs["input_ids"], batch.inputs["input_ids"])
    assert torch.equal(batch.labels, before)


def test_keys_tell_sequences_apart_by_content_alone():
    keys = {layout: SequenceBatch(collated(layout)).keys for layout in LAYOUTS}
    assert keys["padded"] == keys["packed"]
    assert len(set(keys["padded"])) == len(EXAMPLES)
    assert all(0 <= key < 2**63 for key in keys["padded"])
    assert SequenceBatch(collated("padded", pad_to_multiple_of=16)).keys == keys["padded"]
    order = [3, 0, 5, 1, 2, 4]
    shuffled = DataCollatorForLanguageModeling(PAD)([examples()[index] for index in order])
    assert SequenceBatch(shuffled).keys == [keys["padded"][index] for index in order]
    # The same ids with another prompt are another sequence.
    other = examples()
    other[0]["labels"][3] = -100
    changed = SequenceBatch(DataCollatorForLanguageModeling(PAD)(other)).keys
    assert changed[0] != keys["padded"][0]
    assert changed[1:] == keys["padded"][1:]


def test_keys_see_other_inputs():
    inputs = collated("padded")
    pictures = torch.arange(6 * 12.0).view(6, 3, 2, 2)
    first = SequenceBatch({**inputs, "pixel_values": pictures}).keys
    second = SequenceBatch({**inputs, "pixel_values": pictures.flip(0)}).keys
    assert all(own != other for own, other in zip(first, second, strict=True))


# --- the plan ---


def cost(groups, lengths, copies, overhead):
    return sum(overhead + copies * len(group) * max(lengths[index] for index in group) for group in groups)


def partitions(items):
    """All partitions of a list into groups."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            left = [item for item in rest if item not in others]
            for partition in partitions(left):
                yield [[first, *others], *partition]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 16),
    st.integers(0, 200),
    st.integers(0, 300),
)
def test_no_other_plan_is_cheaper(lengths, copies, max_rows, overhead, max_positions):
    def is_allowed(group):
        rows = copies * len(group)
        return len(group) == 1 or rows <= max_rows or rows * max(lengths[index] for index in group) <= max_positions

    groups = plan_slices(lengths, copies, max_rows, overhead, max_positions)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(is_allowed(group) for group in groups)
    others = [p for p in partitions(list(range(len(lengths)))) if all(is_allowed(group) for group in p)]
    assert cost(groups, lengths, copies, overhead) == min(cost(p, lengths, copies, overhead) for p in others)
