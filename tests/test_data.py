"""Data sources: a batch is a function of (seed, position), in any order of access."""

import collections
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import Augmented, Lines, arrays, in_order, indexed_sources, same, take
from torch.utils.data import DataLoader

from fxtrain import tree
from fxtrain.data import (
    Source,
    as_source,
    batches,
    check_batch,
    from_iterable,
    from_loader,
    from_stateful_loader,
    prefetch,
    sequence,
    windows,
)


@pytest.mark.parametrize(("drop_last", "length", "rows"), [(True, 4, 20), (False, 5, 23), ("pad", 5, 23)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_epoch_contains_each_row_once(drop_last, length, rows, shuffle):
    data = batches(arrays(), 5, seed=1, shuffle=shuffle, drop_last=drop_last)
    assert data.epoch_length == length
    for epoch in range(3):
        found = [data[epoch * length + index] for index in range(length)]
        kept = [b["y"][0][b["mask"]] if drop_last == "pad" else b["y"][0] for b in found]
        items = torch.cat(kept)
        assert len(items) == rows == len(items.unique())
        assert shuffle or items.equal(torch.arange(rows))
        for batch in found:
            assert batch["x"][:, 0].equal(batch["y"][0] * 2.0)
            assert batch["y"][0].equal(batch["y"][1])
        if drop_last == "pad":
            assert {len(leaf) for batch in found for leaf in tree.leaves(batch)} == {5}
            assert not found[-1]["y"][0][~found[-1]["mask"]].any()
    assert shuffle != same(data[0], data[length])


@pytest.mark.parametrize("name", list(indexed_sources()))
@given(positions=st.lists(st.integers(0, 13), min_size=1, max_size=10))
@settings(max_examples=15, deadline=None)
def test_position_gives_same_batch_in_any_order(name, positions):
    data = indexed_sources()[name]
    for position in positions:
        assert same(data[position], in_order(name)[position])


def test_global_generators_are_unchanged():
    def state():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = state()
    for data in indexed_sources().values():
        take(data, range(3))
    take(from_iterable(lambda: (torch.rand(2) for _ in range(3))), range(5))
    assert state() == before


def test_memory_mapped_uint16_tokens_become_int64(tmp_path):
    tokens = np.memmap(tmp_path / "tokens.bin", np.uint16, "w+", shape=(50,))
    tokens[:] = np.arange(50) + 65_000
    read_only = np.memmap(tmp_path / "tokens.bin", np.uint16, "r")
    for source in (read_only, torch.from_numpy(np.array(tokens))):
        batch = windows(source, 4, 3, shuffle=False)[1]
        assert batch["x"].dtype == batch["y"].dtype == torch.int64
        assert batch["x"].flatten().tolist() == list(range(65_012, 65_024))
        assert batches({"t": source}, 2, shuffle=False)[1]["t"].tolist() == [65_002, 65_003]


def test_windows_are_disjoint_and_shift_each_epoch():
    tokens, length = torch.arange(1000), 9
    data = windows(tokens, length, 5, seed=3)
    starts = []
    for epoch in range(6):
        found = [data[epoch * data.epoch_length + i] for i in range(data.epoch_length)]
        x = torch.cat([batch["x"] for batch in found])
        assert x.equal(x[:, :1] + torch.arange(length))
        assert torch.cat([batch["y"] for batch in found]).equal(x + 1)
        assert len(x.unique()) == x.numel() == data.epoch_length * 5 * length
        starts.append(int(x[0, 0]) % length)
    assert len(set(starts)) > 2
    whole = windows(tokens, length, 37, shuffle=False)
    assert whole.epoch_length == 3
    assert sum(windows(torch.arange(28), 9, 2, shuffle=False, drop_last=False)[1]["y"][0] == torch.arange(19, 28)) == 9


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: batches(arrays(3), 4), ValueError, "one batch of batch_size=4, got arrays with 3 rows"),
        (lambda: batches([], 4), ValueError, "got a dataset with 0 samples"),
        (lambda: batches(torch.zeros(0, 2), 1, drop_last=False), ValueError, "got arrays with 0 rows"),
        (lambda: batches(arrays(), 0), ValueError, "expected batch_size to be a positive int, got 0"),
        (lambda: batches(arrays(), True), TypeError, "expected batch_size to be a positive int, got True"),
        (lambda: batches(arrays(), 2, drop_last="no"), ValueError, "True, False, 'pad', got 'no'"),
        (
            lambda: batches({"x": torch.zeros(3), "y": (torch.zeros(4),)}, 2),
            ValueError,
            r"arrays of equal length, got 3 rows in arrays\['x'\] and 4 in arrays\['y'\]\[0\]",
        ),
        (lambda: batches({"x": [1, 2]}, 2), TypeError, r"arrays\['x'\]\[0\] to be .*, got 1. Convert it with numpy"),
        (lambda: batches({"x": torch.tensor(1)}, 2), ValueError, r"a first dimension .* got shape \[\]"),
        (lambda: batches({}, 2), ValueError, "expected at least one array, got an empty dict"),
        (lambda: batches(np.array(["a", "b"]), 2)[0], TypeError, r"a batch with at least one tensor, got a <U1 array"),
        (lambda: batches(Lines(), 2, shuffle=True), ValueError, "Shuffle the stream itself"),
        (lambda: batches(Lines(), 2, drop_last="pad"), ValueError, "drop_last to be True or False for a stream"),
        (lambda: batches(torch.zeros(3), 2, drop_last="pad"), ValueError, 'dict of arrays without the key "mask"'),
        (lambda: batches({"mask": torch.zeros(3)}, 2, drop_last="pad"), ValueError, 'without the key "mask"'),
        (lambda: batches([1, 2, 3], 2, drop_last="pad")[0], ValueError, 'to be a dict without the key "mask"'),
        (lambda: batches(["a", "b"], 2)[0], TypeError, "a batch with at least one tensor, got a list of length 2"),
        (lambda: windows(torch.arange(10), 4, 2), ValueError, "got 1 windows of length=4 from 10 tokens"),
        (lambda: windows(torch.arange(3), 4, 2, drop_last=False), ValueError, "got 0 windows of length=4 from 3"),
        (
            lambda: windows(torch.zeros(9), 4, 2),
            ValueError,
            r"integers of shape \[n\], got a float32 tensor of shape \[9\]",
        ),
        (
            lambda: windows(torch.zeros(9, 1, dtype=torch.int64), 4, 2),
            ValueError,
            r"got an int64 tensor of shape \[9, 1\]",
        ),
        (lambda: windows(torch.arange(9), 0, 2), ValueError, "expected length to be a positive int, got 0"),
        (lambda: sequence([]), ValueError, "expected at least one batch, got an empty list"),
        (lambda: sequence([torch.zeros(2), torch.zeros(3), torch.zeros(2)]), ValueError, "At position 1: expected"),
        (lambda: batches(arrays(), 2)[-1], ValueError, "a position of at least 0, got -1"),
        (lambda: prefetch([torch.zeros(1)], 0), ValueError, "expected size to be a positive int, got 0"),
        (lambda: as_source(torch.zeros(3)), TypeError, "expected batches, got a float32 tensor .*, which contains"),
        (
            lambda: as_source({"x": torch.zeros(3)}),
            TypeError,
            "expected batches, got a dict with keys 'x', which contains",
        ),
        (lambda: as_source(Augmented()), TypeError, r"fxtrain.data.batches\(source, batch_size\), or with a Data"),
        (lambda: as_source(3), TypeError, "an iterable of batches, or a function that returns one, got 3"),
        (lambda: from_stateful_loader([1]), TypeError, "got a list of length 1. Use from_loader or from_iterable"),
        (lambda: from_loader(DataLoader([1, 2], 4, drop_last=True)), ValueError, "got none with batch_size=4"),
    ],
)
def test_invalid_arguments_are_rejected(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Contents of batches


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.zeros(4, 2)}, r"the same structure as in earlier batches, got another: batch\['y'\] missing"),
        ({"x": torch.zeros(4, 2), "z": torch.zeros(4)}, r"batch\['y'\] missing and batch\['z'\] added"),
        (
            {"x": torch.zeros(4, 2), "y": torch.zeros(4, dtype=torch.float64)},
            r"'y'\] to be a float32 tensor of shape \[4\] as before, got a float64 tensor of shape \[4\]. Convert",
        ),
        ({"x": torch.zeros(3, 2), "y": torch.zeros(3)}, r"'x'\] to be .* \[4, 2\] as .* \[3, 2\]\. .*drop_last="),
        (
            {"x": torch.zeros(4, 3), "y": torch.zeros(4)},
            r"fxtrain.data.bucketed, .* fxtrain.data.from_loader\(loader, dynamic=True\)",
        ),
        ({"x": torch.zeros(4, 2, 1), "y": torch.zeros(4)}, r"shape \[4, 2, 1\]"),
    ],
)
def test_mismatched_batch_is_rejected(batch, message):
    like = {"x": torch.zeros(4, 2), "y": torch.zeros(4)}
    assert check_batch(like, like)
    with pytest.raises(ValueError, match=message):
        check_batch(batch, like)
    for stream in (from_iterable([like, like, batch, like]), as_source(iter([like, like, batch, like]))):
        with pytest.raises(ValueError, match=r"^At position 2: |^expected the batch at position 2 to have as many"):
            take(stream, range(4))


def test_only_last_batch_of_epoch_may_be_short():
    full, short = torch.zeros(4, 2), torch.zeros(3, 2)
    sizes = [4, 4, 3]
    for make in (
        lambda: sequence([full, full, short]),
        lambda: from_iterable(lambda: iter([full, full, short])),
        lambda: from_loader(DataLoader(torch.zeros(11, 2), 4)),
    ):
        for start in range(4):
            found = take(make(), range(start, 9))
            assert [len(batch) for batch in found] == [sizes[i % 3] for i in range(start, 9)]
    growing = [torch.zeros(4, n) for n in range(1, 5)]
    assert [b.shape[1] for b in take(from_iterable(growing, dynamic=True), range(4))] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="At position 1"):
        take(from_iterable(growing), range(4))


def test_short_first_batch_is_not_the_reference():
    class Sizes(Source):
        epoch_length = 4

        def fetch(self, position):
            return torch.zeros([4, 4, 4, 3, 4, 2][position])

    data = Sizes()
    take(data, [3, 4])
    with pytest.raises(ValueError, match=r"At position 5: expected batch to be .* \[4\] as before, got .* \[2\]"):
        data[5]


class Encoding(collections.UserDict):
    """Mimics a tokenizer's batch encoding, a mapping that is not a dict."""


def test_arrays_become_tensors():
    frozen = np.arange(3)
    frozen.flags.writeable = False
    batch = as_source([{"a": np.ones(2), "b": [frozen, np.float32(1)], "c": Encoding(d=np.zeros(1))}])[0]
    expected = {"a": torch.ones(2, dtype=torch.float64), "b": [torch.arange(3), torch.tensor(1.0)]}
    assert same(batch, {**expected, "c": Encoding(d=torch.zeros(1, dtype=torch.float64))})
    for wrong in ({}, Encoding(d="x")):
        with pytest.raises(TypeError, match="expected a batch with at least one tensor"):
            as_source([wrong])
    # Functions given to ``map`` receive the raw batch, before it is checked.
    assert from_iterable([Encoding(d="four")]).map(lambda b: torch.tensor(len(b["d"])))[0] == 4
