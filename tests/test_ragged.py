"""Padding, bucketing and packing: each example occurs once per epoch, in declared sizes, with its loss unchanged."""

import collections
import functools
import itertools
import multiprocessing
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fxtrain as fx
from fxtrain import tree
from fxtrain.data import attention_mask, bucketed, next_tokens, packed, pad, padded
from fxtrain.data._bin_packing import Bins
from fxtrain.data._bucketed import least_padding


def texts(lengths):
    """Texts of consecutive token ids, starting at 1, so that each token is unique."""
    ends = np.cumsum(lengths)
    return [list(range(end - length + 1, end + 1)) for end, length in zip(ends, lengths, strict=True)]


def same(a, b):
    return tree.structure(a) == tree.structure(b) and all(map(torch.equal, tree.leaves(a), tree.leaves(b)))


def seen(batches):
    """The texts in the rows of batches, in order and without padding."""
    return [tuple(row[mask].tolist()) for batch in batches for row, mask in zip(batch["x"], batch["mask"], strict=True)]


def shapes(batches):
    return {tuple(batch["x"].shape) for batch in batches}


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)
DROP = st.sampled_from([True, False, "pad"])


@given(LENGTHS, st.integers(1, 6), st.booleans(), DROP, st.integers(1, 5), st.sampled_from([1, 8]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_buckets_yield_each_text_once_per_epoch_in_declared_sizes(
    lengths, rows, by_tokens, drop_last, sizes, multiple, shuffle
):
    found = texts(lengths)
    size = {"tokens": rows * 48} if by_tokens else {"batch_size": rows}
    make = functools.partial(bucketed, found, **size, sizes=sizes, multiple=multiple, shuffle=shuffle, seed=3)
    most = make(drop_last="pad").sizes[-1][0]
    if drop_last is True and len(found) < most:
        with pytest.raises(ValueError, match="expected at least"):
            make(drop_last=True)
        return
    data = make(drop_last=drop_last)
    for epoch in range(2):
        batches = [data[epoch * data.epoch_length + index] for index in range(data.epoch_length)]
        assert shapes(batches) == set(data.sizes)
        kept = [text for text in seen(batches) if text]
        missing = collections.Counter(map(tuple, found)) - collections.Counter(kept)
        assert len(kept) + missing.total() == len(found)
        assert missing.total() < (most if drop_last is True else 1)
        positions = sum(batch["mask"].numel() for batch in batches)
        assert data.padding(epoch) == (positions - sum(map(len, kept)), positions)
    assert data.sizes[-1][1] == max(length for _, length in data.sizes)
    if by_tokens:
        assert all(rows * length <= size["tokens"] for rows, length in data.sizes)


@given(LENGTHS, st.integers(1, 5), st.sampled_from([False, "pad"]), st.sampled_from([None, "split"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_packing_keeps_each_text_in_one_segment(lengths, rows, drop_last, truncate, shuffle):
    found, length = texts(lengths), 13 if truncate else 40
    data = packed(found, length, rows, truncate=truncate, shuffle=shuffle, seed=5, drop_last=drop_last)
    pieces = collections.Counter(tuple(text[at : at + length]) for text in found for at in range(0, len(text), length))
    for epoch in range(2):
        batches = [data[epoch * data.epoch_length + index] for index in range(data.epoch_length)]
        assert shapes(batches) == set(data.sizes)
        kept = collections.Counter()
        for batch in batches:
            for x, segments, positions, mask in zip(
                *(batch[name] for name in ("x", "segments", "positions", "mask")), strict=True
            ):
                assert mask.equal(segments > 0)
                assert not x[~mask].any()
                for number in range(1, int(segments.max()) + 1):
                    at = segments == number
                    assert positions[at].equal(torch.arange(int(at.sum())))
                    kept[tuple(x[at].tolist())] += 1
        assert kept == pieces
        taken = sum(batch["mask"].numel() for batch in batches)
        assert data.padding(epoch) == (taken - sum(lengths), taken)


@pytest.mark.parametrize("drop_last", [True, "pad"])
def test_leftover_packed_rows_are_dropped_or_padded(drop_last):
    found = texts([5, 4, 3, 3, 2, 2, 1])
    rows = packed(found, 6, 1, shuffle=False).epoch_length
    data = packed(found, 6, rows - 1, drop_last=drop_last)
    assert data.epoch_length == (1 if drop_last is True else 2)
    assert data.sizes == ((rows - 1, 6),)
    batches = [data[index] for index in range(data.epoch_length)]
    real = sum(int(batch["mask"].sum()) for batch in batches)
    assert data.padding(0).positions - data.padding(0).padded == real
    assert (real == 20) == (drop_last == "pad")


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(12, 20))
@settings(max_examples=60, deadline=None)
def test_bins_match_best_fit_decreasing(lengths, capacity):
    spaces = []
    for length in sorted(lengths, reverse=True):
        fitting = [at for at, space in enumerate(spaces) if space >= length]
        at = min(fitting, key=spaces.__getitem__, default=None)
        if at is None:
            spaces.append(capacity)
            at = len(spaces) - 1
        spaces[at] -= length
    bins = Bins(collections.Counter(lengths), capacity)
    slots = [bins.slots(row) for row in range(bins.count)]
    assert sorted(capacity - sum(length for length, _ in row) for row in slots) == sorted(spaces)
    counts = collections.Counter(lengths)
    assert sorted(slot for row in slots for slot in row) == sorted((n, i) for n in counts for i in range(counts[n]))


@given(st.lists(st.integers(1, 14), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_chosen_bounds_minimize_padding(lengths, count, multiple):
    def padded_to(bounds):
        return sum(min(bound for bound in bounds if bound >= length) for length in lengths)

    candidates = sorted({-(-length // multiple) * multiple for length in lengths})
    best = padded_to(candidates)
    if len(candidates) > count:
        choices = itertools.combinations(candidates[:-1], count - 1)
        best = min(padded_to([*choice, candidates[-1]]) for choice in choices)
    bounds = least_padding(np.array(lengths), count, multiple)
    assert len(bounds) <= count
    assert padded_to(bounds) == best


def test_padded_batches_have_the_length_of_their_longest_text():
    generator = random.Random(0)
    found = texts([generator.randint(1, 30) for _ in range(41)])
    for drop_last, last in ((True, None), (False, 1), ("pad", 8)):
        data = padded(found, 8, multiple=8, seed=1, drop_last=drop_last)
        batches = [data[index] for index in range(data.epoch_length)]
        assert shapes(batches) <= set(data.sizes)
        for batch in batches:
            longest = int(batch["mask"].sum(1).max())
            assert batch["x"].shape[1] == -(-longest // 8) * 8
        kept = [text for text in seen(batches) if text]
        assert len(set(kept)) == len(kept) == (40 if drop_last is True else 41)
        assert last is None or len(batches[-1]["x"]) == last
        taken = sum(batch["mask"].numel() for batch in batches)
        assert data.padding(0) == (taken - sum(map(len, kept)), taken)


MAKERS = {
    "padded": functools.partial(padded, batch_size=3, multiple=8, drop_last="pad"),
    "bucketed": functools.partial(bucketed, tokens=60, sizes=3, multiple=4, drop_last=False),
    "packed": functools.partial(packed, length=24, batch_size=2, truncate="right", drop_last="pad"),
}


def made(name, seed=0):
    generator = random.Random(7)
    return MAKERS[name](texts([generator.randint(1, 20) for _ in range(40)]), seed=seed)


def digest(name, queue):
    data = made(name)
    queue.put([fx.data.checksum(data[position]) for position in range(2 * data.epoch_length)])


@pytest.mark.parametrize("name", MAKERS)
def test_batch_depends_only_on_its_position_and_seed(name):
    data, again = made(name), made(name)
    positions = list(range(2 * data.epoch_length))
    forward = [data[position] for position in positions]
    random.Random(1).shuffle(positions)
    assert all(same(again[position], forward[position]) for position in positions)
    assert not same(made(name, seed=1)[0], forward[0])
    assert not all(same(forward[i], forward[i + data.epoch_length]) for i in range(data.epoch_length))
    queue = multiprocessing.get_context("fork").SimpleQueue()
    process = multiprocessing.get_context("fork").Process(target=digest, args=(name, queue))
    process.start()
    assert queue.get() == [fx.data.checksum(batch) for batch in forward]
    process.join()
    prefetched = fx.data.prefetch(data)
    assert all(same(prefetched[position], forward[position]) for position in range(4))
    prefetched.close()


# Example formats


class Tokens(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": list(range(1, index + 2)), "labels": list(range(index + 1)), "score": float(index)}


def test_all_example_formats_yield_equal_batches():
    rows = [Tokens()[index] for index in range(4)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    arrow = pytest.importorskip("datasets").Dataset.from_dict(columns)
    sources = {
        "a dataset": Tokens(),
        "a list": rows,
        "columns": {**columns, "score": np.array(columns["score"])},
        "tensors": {**columns, "input_ids": [torch.tensor(ids) for ids in columns["input_ids"]]},
        "arrow": arrow,
        "formatted": arrow.with_format("numpy"),
        "selected": arrow.select([3, 2, 1, 0]).select([3, 2, 1, 0]),
        "transformed": arrow.with_transform(lambda batch: batch),
    }
    for make in (functools.partial(bucketed, batch_size=2, sizes=(2, 4)), functools.partial(padded, batch_size=2)):
        batches = {name: make(source, shuffle=False)[1] for name, source in sources.items()}
        first = batches["a dataset"]
        assert first["input_ids"].dtype == torch.int64
        assert first["score"].tolist() == [2, 3]
        assert (first["labels"] == -100).equal(~first["mask"])
        for name, batch in batches.items():
            batch["score"] = batch["score"].to(torch.float64)
            assert same(batch, first), name
    known = bucketed(Tokens(), 2, sizes=(2, 4), shuffle=False, lengths=[1, 2, 3, 4])[1]
    assert same(known, bucketed(Tokens(), 2, sizes=(2, 4), shuffle=False)[1])
    measured = arrow.add_column("n", [1, 2, 3, 4])
    assert bucketed(measured, 2, sizes=(2, 4), lengths="n", columns=("input_ids",), shuffle=False)[1].keys() == {
        "input_ids",
        "mask",
    }


def test_stored_dataset_is_measured_without_reading_rows(monkeypatch):
    datasets = pytest.importorskip("datasets")
    arrow = datasets.Dataset.from_dict({"ids": [[1, 2], [3]] * 50, "label": [0, 1] * 50})
    read = []
    original = datasets.Dataset.__getitem__
    monkeypatch.setattr(datasets.Dataset, "__getitem__", lambda self, key: read.append(key) or original(self, key))
    bucketed(arrow, 4, sizes=2, multiple=1)
    assert len([key for key in read if not isinstance(key, slice)]) <= 1


def test_columns_of_different_lengths_have_separate_masks():
    pairs = {"source": texts([3, 9, 4, 8]), "target": texts([2, 4, 4, 3]), "class": torch.arange(4)}
    masks = {"source": "source_mask", "target": "target_mask"}
    data = bucketed(pairs, 2, sizes=(4, 10), mask=masks, shuffle=False)
    assert data[1]["source"].shape == data[1]["source_mask"].shape == (2, 10)
    assert data[1]["target"].shape == data[1]["target_mask"].shape == (2, 4)
    assert data[1]["target_mask"].sum(1).tolist() == [4, 3]
    assert data.padding() == (16 - 7 - 6 + 28 - 17 - 7, 16 + 28)
    batch = pad([{"source": [1, 2, 3], "target": [1]}, {"source": [1], "target": [1, 2]}], mask=masks, multiple=2)
    assert batch["source"].shape == (2, 4)
    assert batch["target"].shape == (2, 2)


def test_signals_keep_channels_and_dtypes():
    signals = [np.full((length, 2), length, np.float32) for length in (3, 1, 2)]
    batch = pad(signals, side="left", value=-1)
    assert batch["x"].shape == (3, 3, 2)
    assert batch["x"].dtype == torch.float32
    assert batch["x"][1].tolist() == [[-1, -1], [-1, -1], [1, 1]]
    assert batch["mask"][1].tolist() == [False, False, True]
    for dtype, expected in (("uint16", "int64"), ("int32", "int64"), ("uint8", "uint8"), ("float16", "float16")):
        assert pad([np.ones(2, dtype), np.ones(1, dtype)])["x"].dtype == getattr(torch, expected)
    assert packed(signals, 4, 1, shuffle=False)[0]["x"].shape == (1, 4, 2)


def test_long_texts_are_truncated_on_the_given_side():
    found = [[1, 2, 3, 4], [5]]
    assert pad(found, max_length=2, truncate="right")["x"].tolist() == [[1, 2], [5, 0]]
    assert pad(found, max_length=2, truncate="left")["x"].tolist() == [[3, 4], [5, 0]]
    assert bucketed(found, 2, sizes=[2], truncate="left", shuffle=False)[0]["x"].tolist() == [[3, 4], [5, 0]]
    assert packed(found, 3, 1, truncate="split", shuffle=False, drop_last=False)[0]["x"].tolist() == [[1, 2, 3]]


def test_pad_works_as_collate_fn():
    loader = DataLoader(Tokens(), 2, collate_fn=functools.partial(pad, multiple=4))
    assert [batch["input_ids"].shape for batch in loader] == [(2, 4), (2, 4)]


class Growing(Dataset):
    """Examples that get longer with each read."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.reads += 1
        return [1] * self.reads


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: bucketed([], 2), ValueError, "at least one example, got none"),
        (lambda: bucketed([[1], []], 2), ValueError, "length 0 in column 'x' at index 1. Filter empty"),
        (lambda: bucketed([[1], [1, 2, 3]], 2, sizes=[2]), ValueError, "at most 2 positions in an example, got 3 in"),
        (lambda: bucketed([[1]], 2), ValueError, "expected at least 2 examples, for a batch of length 8, got 1"),
        (lambda: bucketed([[1]]), ValueError, "batch_size or tokens, got neither"),
        (lambda: bucketed([[1]], 2, tokens=2), ValueError, "batch_size or tokens, got both"),
        (
            lambda: bucketed([[1] * 9], tokens=15),
            ValueError,
            "tokens to be at least 16, for batch_multiple=1 examples of length",
        ),
        (lambda: bucketed([[1]], 1, sizes=[4, 2]), ValueError, "ascending lengths without repeats"),
        (lambda: bucketed([[1]], 1, sizes=0), ValueError, "sizes to be a positive int, got 0"),
        (lambda: bucketed([[1]], 1, side="up"), ValueError, "side to be one of 'right', 'left', got 'up'"),
        (lambda: bucketed(torch.zeros(3, 2), 1), TypeError, "got a float32 .* Pass rows of equal size to"),
        (lambda: bucketed(iter([[1]]), 1), TypeError, "Read it into a list first"),
        (lambda: bucketed(["ab", "c"], 1), TypeError, "Tokenize texts first"),
        (lambda: bucketed([([1], 0)], 1), TypeError, r"got a tuple of .*. Name its parts: columns=\(...\)"),
        (lambda: bucketed([{"a": [1], "t": "b"}], 1), TypeError, "in column 't', got 'b'.*columns="),
        (lambda: bucketed({"a": [[1]], "b": [1, 2]}, 1), ValueError, "columns of equal length, .*'a': 1, 'b': 2"),
        (lambda: bucketed([[1], [1.0, 2]], 2)[0], ValueError, "equal dtype, .* got torch.float32"),
        (lambda: bucketed({"a": [[1], [1, 2]], "b": [[1, 2], [1]]}, 1), ValueError, "got 1 in 'a' and 2 in 'b'"),
        (lambda: bucketed({"mask": [[1], [1, 2]]}, 1), ValueError, "a mask name that is not a column, got 'mask'"),
        (lambda: bucketed([[1], [1, 2]], 1, lengths=[1]), ValueError, r"integers of shape \[2\]"),
        (lambda: bucketed([[1], [1, 2]], 1, lengths=[2, 1]), ValueError, r"lengths\[0\]=2 to be the length"),
        (lambda: bucketed([[1], [1, 2]], 1, variable=("y",)), ValueError, "variable to be one of 'x', got 'y'"),
        (
            lambda: bucketed([[1], [1, 2]], 1, value=0.5),
            ValueError,
            "a torch.int64 value to pad column 'x', got",
        ),
        (lambda: bucketed(Growing(), 4, sizes=[5])[0], ValueError, "at most 5 positions .* as measured before"),
        (lambda: packed(Growing(), 9, 1)[0], ValueError, "as measured before, got .* the same length on each read"),
        (lambda: packed([[1], [1, 2, 3]], 2, 1), ValueError, "at most 2 positions in an example, got 3"),
        (lambda: packed([[1]], 2, 2), ValueError, "at least batch_size=2 rows of length 2, got 1"),
        (lambda: packed([{"a": [1], "n": 0}], 2, 1), ValueError, r"got \['n'\] with a value per document.*columns="),
        (lambda: packed([{"segments": [1]}], 2, 1), ValueError, r"which packing adds, got \['segments'\]"),
        (lambda: padded([[1]], 2), ValueError, "expected at least batch_size=2 examples, got 1"),
        (lambda: pad([]), ValueError, "at least one example"),
        (lambda: pad([{"n": 1}]), TypeError, "a column of arrays or lists to pad, got none"),
        (lambda: pad([[1], [2]], mask={"y": "m"}), ValueError, "mask to have keys among the columns .*got 'y'"),
    ],
)
def test_invalid_arguments_raise_with_the_remedy(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Losses of a model


class Tiny(nn.Module):
    """A transformer with one block."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 8), nn.Embedding(40, 8)
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 50)

    def forward(self, tokens, attend, positions=None):
        places = torch.arange(tokens.shape[1]) if positions is None else positions
        x = self.tokens(tokens) + self.places(places)
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
        return self.head(torch.tanh(x + self.out(mixed.transpose(1, 2).flatten(2))))


def loss_of(model, batch):
    """The loss summed over tokens, and the token count."""
    segments = batch.get("segments", batch["mask"])
    targets = next_tokens(batch["x"], segments)
    logits = model(batch["x"], attention_mask(segments), batch.get("positions"))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), (targets != -100).sum()


@pytest.mark.parametrize("name", MAKERS)
def test_epoch_loss_and_gradient_equal_the_sum_over_single_texts(name):
    torch.manual_seed(0)
    model = Tiny().double()
    generator = random.Random(2)
    found = [[generator.randrange(50) for _ in range(generator.randint(1, 20))] for _ in range(23)]
    data = MAKERS[name](found)
    parts = [loss_of(model, data[index]) for index in range(data.epoch_length)]
    total = sum(value for value, _ in parts)
    gradient = torch.autograd.grad(total, model.qkv.weight)[0]
    alone = sum(loss_of(model, pad([text]))[0] for text in found)
    assert sum(int(count) for _, count in parts) == sum(len(text) - 1 for text in found)
    assert torch.allclose(total, alone, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(alone, model.qkv.weight)[0]
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-12)


def test_attention_masks_are_block_diagonal_without_empty_rows():
    segments = torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]])
    for causal in (True, False):
        mask = attention_mask(segments, causal=causal)
        assert mask.any(-1).all()
        for row, query, key in np.ndindex(2, 5, 5):
            expected = bool(segments[row, query] == segments[row, key]) and (query >= key or not causal)
            assert bool(mask[row, 0, query, key]) == expected
        added = attention_mask(segments, causal=causal, dtype=torch.float32)
        assert (added == 0).equal(mask)
        assert added.isfinite().all()
    tokens = torch.arange(10).reshape(2, 5)
    labels, targets = next_tokens(tokens, segments, shift=False), next_tokens(tokens, segments)
    assert labels[:, 1:].equal(targets[:, :-1])
    assert targets.tolist() == [[1, -100, 3, -100, -100], [6, 7, 8, 9, -100]]


def test_map_and_prefetch_keep_declared_shapes_and_refuse_others():
    data = bucketed(texts([2, 4, 2, 4]), 1, sizes=(2, 4), shuffle=False)
    mapped = data.map(lambda batch: {"x": batch["x"][:, 1:]})
    assert data.num_shapes == mapped.num_shapes == fx.data.prefetch(mapped).num_shapes == 2
    assert [mapped[index]["x"].shape[1] for index in range(4)] == [1, 1, 3, 3]
    growing = data.map(lambda batch, position: batch["x"][:, : 1 + position], with_position=True)
    with pytest.raises(ValueError, match=r"At position 2: expected the 2 batch shapes .* data.map"):
        [growing[index] for index in range(4)]
    other = data.map(
        lambda batch, position: batch["x"].to([torch.int64, torch.int32][position % 2]), with_position=True
    )
    with pytest.raises(ValueError, match=r"At position 1: .* int32"):
        [other[index] for index in range(4)]
