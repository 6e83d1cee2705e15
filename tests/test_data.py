"""Data: a batch is a function of (seed, position), however it is reached."""

import collections
import functools
import gc
import itertools
import random
import subprocess
import sys
import threading
import time
import traceback

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from fxtrain import tree
from fxtrain.data import (
    Exhausted,
    Source,
    adapt,
    batches,
    check,
    from_iterable,
    from_loader,
    from_stateful_loader,
    prefetch,
    sequence,
    windows,
)
from fxtrain.data.generators import seeded
from fxtrain.data.order import Order, mix, permuted


def same(first, second):
    leaves, structure = tree.flatten(first)
    others, other_structure = tree.flatten(second)
    return structure == other_structure and all(map(torch.equal, leaves, others))


def take(data, positions):
    """The batches at these positions; where an epoch of unknown length ends, it is asked again, as the loop does."""
    found = []
    for position in positions:
        try:
            found.append(data[position])
        except Exhausted:
            found.append(data[position])
    return found


def assert_same(first, second):
    assert len(first) == len(second)
    assert all(map(same, first, second))


# The order of an epoch


@given(size=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_item_once(size, seed, epoch):
    assert sorted(Order(size, seed=seed).items(epoch, 0, size).tolist()) == list(range(size))


@given(size=st.integers(2, 5000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_the_network_is_a_permutation_of_any_size(size, key):
    assert np.array_equal(np.sort(permuted(np.arange(size, dtype=np.uint64), size, key)), np.arange(size))


@given(data=st.data(), size=st.sampled_from([10, 2**14, 2**14 + 1, 50_000]))
@settings(max_examples=40, deadline=None)
def test_a_stretch_is_a_part_of_the_whole(data, size):
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    whole = Order(size, seed=5).items(2, 0, size)
    assert np.array_equal(np.sort(whole), np.arange(size))
    assert np.array_equal(Order(size, seed=5).items(2, start, stop), whole[start:stop])


@pytest.mark.parametrize("size", [100, 40_000])
def test_orders_differ_between_epochs_and_seeds(size):
    orders = [Order(size, seed=seed).items(epoch, 0, size) for seed in range(3) for epoch in range(3)]
    agreements = [int((a == b).sum()) for a, b in itertools.combinations(orders, 2)]
    assert max(agreements) <= 8  # the number is Poisson of mean 1; the chance of more is 1e-6 for each pair


def test_orders_never_change():
    assert Order(10, seed=0).items(0, 0, 10).tolist() == [1, 8, 9, 3, 6, 5, 0, 7, 4, 2]
    assert Order(10, seed=-7).items(3, 0, 10).tolist() == [4, 6, 0, 9, 2, 7, 8, 1, 3, 5]
    large = Order(10**8, seed=0).items(3, 12_345_678, 12_345_683)
    assert large.tolist() == [80312633, 62244421, 83687984, 24101437, 59317673]
    assert mix(1, 2, 3) == 16914669369030367833


def test_small_orders_are_all_equally_likely():
    found = collections.Counter(tuple(Order(4, seed=s).items(e, 0, 4).tolist()) for s in range(40) for e in range(150))
    assert stats.chisquare([found[order] for order in itertools.permutations(range(4))]).pvalue > 0.01


@pytest.mark.parametrize("size", [1000, 20_011])
def test_large_orders_are_uniform_in_place_and_in_succession(size):
    bins = 10
    places, steps = np.zeros((bins, bins)), np.zeros(bins)
    for epoch in range(60):
        items = permuted(np.arange(size, dtype=np.uint64), size, mix(1, epoch)).astype(np.int64)
        np.add.at(places, (np.arange(size) * bins // size, items * bins // size), 1)
        np.add.at(steps, (np.diff(items) % size) * bins // size, 1)
    assert stats.chi2_contingency(places).pvalue > 0.01
    assert stats.chisquare(steps).pvalue > 0.01


# Arrays, datasets, windows, lists


def arrays(count=23):
    return {"x": torch.arange(count * 2.0).reshape(count, 2), "y": (np.arange(count), torch.arange(count))}


@pytest.mark.parametrize(("drop_last", "length", "rows"), [(True, 4, 20), (False, 5, 23), ("pad", 5, 23)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_of_arrays(drop_last, length, rows, shuffle):
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


class Augmented(Dataset):
    """Each sample carries random numbers from all global generators. Counts the samples that are read."""

    def __init__(self, count=23):
        self.count, self.reads = count, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads += 1
        return {"i": index, "r": torch.rand(2), "p": random.random(), "n": np.random.rand()}


class AtOnce(Augmented):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


def indexed_sources():
    return {
        "arrays": batches(arrays(), 4),
        "dataset": batches(Augmented(), 4, drop_last=False),
        "dataset at once": batches(AtOnce(), 4, drop_last="pad"),
        "list of samples": batches([(i, float(i)) for i in range(23)], 4),
        "windows": windows(torch.arange(200), 7, 4),
        "mapped": batches(arrays(), 4).map(lambda batch, at: batch["x"] + at, with_position=True),
        "sequence": sequence([torch.full((3,), i) for i in range(5)]),
        "loader": from_loader(DataLoader(Augmented(), 4, shuffle=True)),
    }


@functools.cache
def in_order(name):
    data = indexed_sources()[name]
    return [data[position] for position in range(14)]


@pytest.mark.parametrize("name", list(indexed_sources()))
@given(positions=st.lists(st.integers(0, 13), min_size=1, max_size=10))
@settings(max_examples=15, deadline=None)
def test_a_position_is_the_same_batch_whatever_came_before(name, positions):
    data = indexed_sources()[name]
    for position in positions:
        assert same(data[position], in_order(name)[position])


def test_the_global_generators_are_not_moved():
    def state():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = state()
    for data in indexed_sources().values():
        take(data, range(3))
    take(from_iterable(lambda: (torch.rand(2) for _ in range(3))), range(5))
    assert state() == before


def test_memory_mapped_arrays_and_unsigned_words(tmp_path):
    tokens = np.memmap(tmp_path / "tokens.bin", np.uint16, "w+", shape=(50,))
    tokens[:] = np.arange(50) + 65_000
    read_only = np.memmap(tmp_path / "tokens.bin", np.uint16, "r")
    for source in (read_only, torch.from_numpy(np.array(tokens))):
        batch = windows(source, 4, 3, shuffle=False)[1]
        assert batch["x"].dtype == batch["y"].dtype == torch.int64
        assert batch["x"].flatten().tolist() == list(range(65_012, 65_024))
        assert batches({"t": source}, 2, shuffle=False)[1]["t"].tolist() == [65_002, 65_003]


def test_windows_do_not_overlap_and_begin_elsewhere_each_epoch():
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
        (lambda: batches(arrays(3), 4), ValueError, "batch_size=4, and the arrays have 3 rows: there is no full batch"),
        (lambda: batches([], 4), ValueError, "the dataset has 0 samples: there is no full batch"),
        (lambda: batches(torch.zeros(0, 2), 1, drop_last=False), ValueError, "the arrays have 0 rows"),
        (lambda: batches(arrays(), 0), ValueError, "batch_size=0: a whole number of samples, 1 or more"),
        (lambda: batches(arrays(), True), ValueError, "batch_size=True: a whole number of samples"),
        (lambda: batches(arrays(), 2, drop_last="no"), ValueError, "drop_last='no': True, False or \"pad\" is wanted"),
        (
            lambda: batches({"x": torch.zeros(3), "y": (torch.zeros(4),)}, 2),
            ValueError,
            r"arrays\['x'\] has 3 rows and arrays\['y'\]\[0\] has 4: arrays of one length are wanted",
        ),
        (lambda: batches({"x": [1, 2]}, 2), TypeError, r"arrays\['x'\]\[0\] is a int: a tensor or a numpy array"),
        (lambda: batches({"x": torch.tensor(1)}, 2), ValueError, r"arrays\['x'\] has shape \[\]"),
        (lambda: batches({}, 2), ValueError, "There is no array"),
        (lambda: batches(np.array(["a", "b"]), 2), TypeError, "array of <U1, which torch does not have"),
        (lambda: batches(Lines(), 2), TypeError, "put it into a DataLoader"),
        (lambda: batches(torch.zeros(3), 2, drop_last="pad"), ValueError, 'adds the entry "mask" to each batch'),
        (lambda: batches({"mask": torch.zeros(3)}, 2, drop_last="pad"), ValueError, 'adds the entry "mask"'),
        (lambda: batches([1, 2, 3], 2, drop_last="pad")[0], ValueError, 'adds the entry "mask"'),
        (lambda: batches(["a", "b"], 2)[0], TypeError, r"batch\[0\] is a str \('b'\), and a batch is made of tensors"),
        (lambda: windows(torch.arange(10), 4, 2), ValueError, "10 tokens make 1 windows of 4: there is no full batch"),
        (lambda: windows(torch.arange(3), 4, 2, drop_last=False), ValueError, "3 tokens make 0 windows of 4"),
        (lambda: windows(torch.zeros(9), 4, 2), ValueError, "tokens are torch.float32 of shape .9.: integers"),
        (lambda: windows(torch.zeros(9, 1, dtype=torch.int64), 4, 2), ValueError, "integers of shape .n. are wanted"),
        (lambda: windows(torch.arange(9), 0, 2), ValueError, "length=0: a whole number of tokens"),
        (lambda: sequence([]), ValueError, "The list of batches is empty"),
        (lambda: sequence([torch.zeros(2), torch.zeros(3), torch.zeros(2)]), ValueError, "At position 1: batch is"),
        (lambda: batches(arrays(), 2)[-1], ValueError, "positions start at 0"),
        (lambda: prefetch([torch.zeros(1)], 0), ValueError, "size=0: a whole number of batches"),
        (lambda: adapt(torch.zeros(3)), TypeError, "A Tensor holds samples, and batches are wanted"),
        (lambda: adapt({"x": torch.zeros(3)}), TypeError, "A dict holds samples"),
        (lambda: adapt(Augmented()), TypeError, r"fxtrain.data.batches\(source, batch_size\), or put it into a Data"),
        (lambda: adapt(3), TypeError, "An iterable of batches is wanted, or a function that returns one, and not 3"),
        (lambda: from_stateful_loader([1]), TypeError, "list has not both: use from_loader or from_iterable"),
        (lambda: from_loader(DataLoader([1, 2], 4, drop_last=True)), ValueError, "has no batch: with batch_size=4"),
    ],
)
def test_errors_before_anything_is_lost(make, error, message):
    with pytest.raises(error, match=message):
        make()


# What a batch may be


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.zeros(4, 2)}, r"has another structure than the batches before: batch\['y'\] missing"),
        ({"x": torch.zeros(4, 2), "z": torch.zeros(4)}, r"batch\['y'\] missing and batch\['z'\] added"),
        (
            {"x": torch.zeros(4, 2), "y": torch.zeros(4, dtype=torch.float64)},
            r"batch\['y'\] is a float64 tensor of shape \[4\], and before it was a float32 tensor of shape \[4\]: conv",
        ),
        ({"x": torch.zeros(3, 2), "y": torch.zeros(3)}, r"batch\['x'\] is .* \[3, 2\], and .* \[4, 2\]: .*drop_last="),
        ({"x": torch.zeros(4, 3), "y": torch.zeros(4)}, "pad other sizes to one, or let them change with dynamic=True"),
        ({"x": torch.zeros(4, 2, 1), "y": torch.zeros(4)}, r"shape \[4, 2, 1\]"),
    ],
)
def test_a_batch_is_like_the_others(batch, message):
    like = {"x": torch.zeros(4, 2), "y": torch.zeros(4)}
    assert check(like, like)
    with pytest.raises(ValueError, match=message):
        check(batch, like)
    for stream in (from_iterable([like, like, batch, like]), adapt(iter([like, like, batch, like]))):
        with pytest.raises(ValueError, match=r"^At position 2: |^The batch at position 2 had another number of rows"):
            take(stream, range(4))


def test_only_the_last_batch_of_an_epoch_may_be_short():
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


def test_a_short_first_batch_sets_no_example():
    class Sizes(Source):
        epoch_length = 4

        def fetch(self, position):
            return torch.zeros([4, 4, 4, 3, 4, 2][position])

    data = Sizes()
    take(data, [3, 4])
    with pytest.raises(ValueError, match=r"At position 5: batch is .* \[2\], and before it was .* \[4\]"):
        data[5]


class Encoding(collections.UserDict):
    """As the batches of a tokenizer: a mapping that is no dict."""


def test_arrays_become_tensors_and_the_rest_is_refused_by_path():
    frozen = np.arange(3)
    frozen.flags.writeable = False
    batch = adapt([{"a": np.ones(2), "b": [frozen, np.float32(1)], "c": Encoding(d=np.zeros(1))}])[0]
    expected = {"a": torch.ones(2, dtype=torch.float64), "b": [torch.arange(3), torch.tensor(1.0)]}
    assert same(batch, {**expected, "c": {"d": torch.zeros(1, dtype=torch.float64)}})
    for wrong, path in ([{"a": [1.5]}, r"batch\['a'\]\[0\] is a float"], [Encoding(d="x"), r"batch\['d'\] is a str"]):
        with pytest.raises(TypeError, match=path):
            adapt([wrong])
    with pytest.raises(TypeError, match="no tensor in it"):
        adapt([{}])
    # A function of `map` sees what comes, before it is checked.
    assert from_iterable([Encoding(d="four")]).map(lambda b: torch.tensor(len(b["d"])))[0] == 4


# Streams


class Rows:
    """Can be iterated again. Counts the batches that are read."""

    def __init__(self, count=5, random_rows=False):
        self.count, self.reads, self.random_rows = count, 0, random_rows

    def __iter__(self):
        order = random.sample(range(self.count), self.count) if self.random_rows else range(self.count)
        for i in order:
            self.reads += 1
            yield {"i": torch.full((2,), i), "r": torch.rand(2) if self.random_rows else torch.zeros(2)}


class Lines(IterableDataset):
    def __init__(self, count=23):
        self.count = count

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        for i in range(self.count)[info.id :: info.num_workers] if info else range(self.count):
            yield i, torch.rand(2)


class Unsized:
    """A sampler without a length."""

    def __init__(self, generator=None):
        self.generator = generator

    def __iter__(self):
        for _ in range(23):
            yield int(torch.randint(23, (), generator=self.generator))


def loaders(workers):
    settings = {"num_workers": workers, "persistent_workers": False}
    generator = torch.Generator()
    weights = torch.arange(1.0, 24.0)
    return {
        "in order": DataLoader(Augmented(), 5, **settings),
        "shuffled": DataLoader(Augmented(), 5, shuffle=True, drop_last=True, **settings),
        "generator": DataLoader(AtOnce(), 5, shuffle=True, generator=generator, **settings),
        "weighted": DataLoader(Augmented(), 5, sampler=WeightedRandomSampler(weights, 20, generator=generator)),
        "tensors": DataLoader(TensorDataset(torch.arange(23.0)), 5, shuffle=True, **settings),
        "batch sampler": DataLoader(
            Augmented(), batch_sampler=torch.utils.data.BatchSampler(range(23), 4, True), **settings
        ),
        "no batches": DataLoader(TensorDataset(torch.arange(23.0)), None, shuffle=True, **settings),
        "persistent": DataLoader(Augmented(), 5, shuffle=True, **{**settings, "persistent_workers": workers > 0}),
        "iterable": DataLoader(Lines(), 5, **settings),
        "iterable with generator": DataLoader(Lines(), 5, generator=generator, **settings),
        "unsized": DataLoader(Augmented(), 5, sampler=Unsized(), **settings),
        "unsized with generator": DataLoader(Augmented(), 5, sampler=Unsized(generator), **settings),
    }


def assert_resumes(make, starts, stop):
    whole = take(make(), range(stop))
    for start in starts:
        data = make()
        assert_same(take(data, range(start, stop)), whole[start:])
        data.close()
    data = make()
    for position in (stop - 1, 2, stop - 2, 0):
        assert same(take(data, [position])[0], whole[position])
    data.close()


@pytest.mark.parametrize("name", list(loaders(0)))
def test_a_loader_resumes_anywhere(name):
    assert_resumes(lambda: from_loader(loaders(0)[name], seed=3), range(13), 13)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(loaders(0)))
def test_a_loader_with_workers_resumes_and_workers_change_no_order(name):
    assert_resumes(lambda: from_loader(loaders(2)[name], seed=3), (4, 7), 12)
    if not name.startswith(("iterable", "unsized")):  # those can only be read from the start, by workers as they are
        assert_same(
            take(from_loader(loaders(2)[name], seed=3), range(7)), take(from_loader(loaders(0)[name], seed=3), range(7))
        )


@pytest.mark.parametrize("name", ["shuffled", "generator", "weighted", "iterable", "unsized with generator"])
def test_orders_of_a_loader_depend_on_seed_and_epoch_and_move_nothing(name):
    loader = loaders(0)[name]
    generators = [g for g in (loader.generator, getattr(loader.sampler, "generator", None)) if g is not None]
    before = [generator.get_state() for generator in generators]
    data = from_loader(loader, seed=3)
    length = len(take(data, range(10))) and data.epoch_length
    assert not same(data[0], data[length])
    assert not same(data[0], from_loader(loaders(0)[name], seed=4)[0])
    assert same(data[length], take(from_loader(loaders(0)[name], seed=3), [length])[0])
    assert all(map(torch.equal, before, [generator.get_state() for generator in generators]))
    again, found = from_loader(loader, seed=3), take(data, range(4))
    for position, batch in enumerate(found):  # whoever else uses them
        assert same(again[position], batch)
        [torch.rand(3, generator=generator) for generator in generators]
    assert len({str(batch) for batch in found}) == 4


def test_a_loader_jumps_without_reading(caplog):
    dataset = Augmented(10_000)
    data = from_loader(DataLoader(dataset, 5, shuffle=True))
    data[3 * data.epoch_length + 1500]
    assert dataset.reads == 5
    assert not caplog.records


def test_a_loader_with_a_set_epoch_is_told():
    class Told(torch.utils.data.Sampler):
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __len__(self):
            return 4

        def __iter__(self):
            return iter([self.epoch] * 4)

    data = from_loader(DataLoader(range(100), 2, sampler=Told()))
    assert [int(data[position][0]) for position in range(6)] == [0, 0, 1, 1, 2, 2]


def test_a_sampler_that_changes_its_length_is_refused():
    class Growing(list):
        def __iter__(self):
            self.append([0])
            return super().__iter__()

    with pytest.raises(ValueError, match="gave 2 batches for epoch 0, and its length is 1"):
        from_loader(DataLoader([1, 2], batch_sampler=Growing([[0]])))[0]


def initialise(worker):
    dataset = torch.utils.data.get_worker_info().dataset
    dataset.offset = dataset.count


class Offset(Augmented):
    offset = 0

    def __getitem__(self, index):
        return index + self.offset


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_worker_init_fn_finds_the_dataset(context):
    loader = DataLoader(Offset(8), 4, num_workers=1, worker_init_fn=initialise, multiprocessing_context=context)
    data = from_loader(loader)
    assert data[1].tolist() == [12, 13, 14, 15]
    data.close()


@pytest.mark.parametrize("random_rows", [False, True])
def test_an_iterable_resumes_and_says_what_it_costs(random_rows, caplog):
    assert_resumes(lambda: from_iterable(Rows(random_rows=random_rows), seed=1), range(13), 13)
    caplog.clear()
    source = Rows()
    assert from_iterable(source)[13]["i"][0] == 3
    assert source.reads == 5 + 4  # the first epoch, to learn its length, and then the third as far as needed
    assert [record.getMessage() for record in caplog.records] == [
        "Reading 13 batches again to reach position 13, because the Rows can only be read from its start.",
        "Reading 3 batches again to reach position 13, because the Rows can only be read from its start.",
    ]
    take(from_iterable(source), range(12))
    assert len(caplog.records) == 2


def test_the_length_of_an_epoch_is_learned_where_it_ends():
    data = from_iterable(Rows(3))
    take(data, range(3))
    assert data.epoch_length is None
    with pytest.raises(Exhausted) as raised:
        data[3]
    assert (raised.value.position, str(raised.value)) == (3, "The data ends before position 3.")
    assert data.epoch_length == 3
    assert int(data[3]["i"][0]) == 0
    assert int(data[6]["i"][0]) == 0


def test_an_iterator_serves_once():
    data = adapt(torch.full((2,), i) for i in range(3))
    assert [int(data[i][0]) for i in range(2)] == [0, 1]
    data.close()
    assert int(data[2][0]) == 2
    for _ in range(2):
        with pytest.raises(Exhausted):
            data[3]
    assert data.epoch_length == 3
    with pytest.raises(ValueError, match=r"Position 1 has gone by, and the generator can be read only once\. Give wh"):
        data[1]
    with pytest.raises(Exhausted):
        adapt(torch.zeros(2) for i in range(3))[7]


def uneven(sizes):
    sizes = iter(sizes)
    return lambda: iter([torch.zeros(2)] * next(sizes))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (uneven([3, 2]), "has fewer batches than the first, which has 3: positions need epochs of one length"),
        (uneven([3, 4, 3]), "has more batches than the first, which has 3"),
        (uneven([0]), "Epoch 0 of .* has no batch: the data is empty, or used up"),
        (uneven([3, 0]), "Epoch 1 of .* has no batch"),
    ],
)
def test_epochs_have_one_length(source, message):
    with pytest.raises(ValueError, match=message):
        take(from_iterable(source), range(8))


def test_a_source_that_fails_is_begun_again():
    class Flaky(Rows):
        fails = 1

        def __iter__(self):
            for i, row in enumerate(super().__iter__()):
                if i == 2 and self.fails:
                    self.fails -= 1
                    raise OSError("the disk is gone")
                yield row

    for data in (from_iterable(Flaky(), seed=1), prefetch(from_iterable(Flaky(), seed=1))):
        take(data, range(2))
        with pytest.raises(OSError, match="the disk is gone"):
            data[2]
        assert [int(batch["i"][0]) for batch in take(data, range(2, 6))] == [2, 3, 4, 0]
        data.close()


class Countdown:
    """Somebody else's batches."""

    epoch_length = 4
    closed = False

    def __getitem__(self, position):
        return np.full(2, 4 - position % 4)

    def close(self):
        self.closed = True


def test_adapt_takes_what_there_is():
    ready = batches(arrays(), 2)
    assert adapt(ready) is ready
    foreign = Countdown()
    data = adapt(foreign)
    assert data.map(lambda x: x + 1)[1].tolist() == [4, 4]
    assert data.epoch_length == 4
    assert not hasattr(data, "snapshot")
    data.close()
    assert foreign.closed
    assert adapt((torch.zeros(2), torch.ones(2))).epoch_length == 2
    assert adapt(Rows().__iter__)[1]["i"][0] == 1
    loader = DataLoader(torch.arange(8), 2, shuffle=True)
    assert not same(adapt(loader, seed=1)[0], adapt(loader, seed=2)[0])
    assert isinstance(adapt(DataLoader(Lines(), 2)), Source)
    assert hasattr(adapt(StatefulDataLoader(torch.arange(8), 2)), "snapshot")


# Prefetch


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "fxtrain prefetch"]


@pytest.fixture
def _no_threads_left():
    yield
    if threads():
        gc.collect()
    assert not threads()


pytestmark = pytest.mark.usefixtures("_no_threads_left")


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("device", [None, "cpu"])
@given(positions=st.lists(st.integers(0, 13), min_size=1, max_size=8))
@settings(max_examples=15, deadline=None)
def test_prefetch_changes_nothing(size, device, positions):
    data = prefetch(indexed_sources()["dataset"], size, device=device)
    assert_same([data[position] for position in positions], [in_order("dataset")[position] for position in positions])
    assert_same([data[position] for position in range(14)], in_order("dataset"))
    data.close()
    assert same(data[3], in_order("dataset")[3])  # and begins anew
    data.close()


def test_two_threads_share_the_global_generators():
    for _ in range(5):
        sources = [prefetch(indexed_sources()["dataset"], 3), prefetch(indexed_sources()["loader"], 3)]
        for position in range(14):
            for data, name in zip(sources, ("dataset", "loader"), strict=True):
                assert same(data[position], in_order(name)[position])
        for data in sources:
            data.close()


def test_a_prefetch_inside_a_source_is_refused():
    inner = prefetch(batches(torch.arange(8), 2))
    with pytest.raises(RuntimeError, match="the two threads would wait for each other: put prefetch around the outer"):
        from_iterable(inner[position] for position in range(4))[0]
    inner.close()


@pytest.mark.slow
def test_a_worker_does_not_inherit_a_lock():
    held, done = threading.Event(), threading.Event()

    def hold():
        with seeded(1):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    data = from_loader(DataLoader(Augmented(), 4, num_workers=1))
    data._order, data._epoch = data._drawn(0), 0
    thread.start()
    held.wait(60)
    assert data[0]["i"].tolist() == [0, 1, 2, 3]
    done.set()
    thread.join()
    data.close()


def test_prefetch_reads_ahead_so_far_and_no_farther():
    asked = []
    data = prefetch(batches(torch.arange(100), 1).map(lambda b, at: asked.append(at) or b, with_position=True), 3)
    data[0]
    deadline = time.monotonic() + 5
    while len(asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert asked == [0, 1, 2, 3]
    data.close()


def failing(batch, position):
    if position == 2:
        raise KeyError("no such file")
    return batch


def test_an_error_comes_up_at_its_position_with_its_traceback():
    data = prefetch(batches(torch.arange(100), 1).map(failing, with_position=True), 4)
    take(data, range(2))
    for _ in range(2):
        with pytest.raises(KeyError, match="no such file") as raised:
            data[2]
        assert "failing" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    take(data, range(3, 6))
    data.close()


def test_prefetch_knows_no_more_than_its_batches_did():
    data = prefetch(from_iterable(Rows(3)), 4)
    for position in range(3):
        data[position]
        time.sleep(0.02)  # the thread has found the end by now
        assert data.epoch_length is None
    with pytest.raises(Exhausted):
        data[3]
    assert data.epoch_length == 3
    assert [int(data[i]["i"][0]) for i in range(3, 8)] == [0, 1, 2, 0, 1]
    data.close()


def test_a_prefetch_that_is_forgotten_ends_its_thread():
    data = prefetch(batches(torch.arange(100), 1))
    data[0]
    assert len(threads()) == 1
    del data
    gc.collect()
    assert not threads()


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(3)", "raise KeyboardInterrupt"])
def test_the_interpreter_exits_while_a_thread_reads(end):
    program = (
        "import time, torch\nfrom fxtrain.data import batches, prefetch\n"
        "data = prefetch(batches(torch.arange(100), 1).map(lambda b: time.sleep(0.05) or b))\ndata[0]\n" + end
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == {"pass": 0, "raise SystemExit(3)": 3}.get(end, -2)
    assert "terminate" not in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetch_copies_to_a_device():
    plain = batches({"x": torch.randn(4096, 256)}, 512)
    data = prefetch(plain, 3, device="cuda")
    for position in range(40):
        batch = data[position]["x"]
        assert batch.is_cuda
        assert batch.cpu().equal(plain[position]["x"])
    data.close()


# Loaders that keep their own place


class Counting(IterableDataset):
    """An iterable dataset that torchdata can put back."""

    def __init__(self, count=11, noise=True):
        self.count, self.i, self.noise = count, 0, noise

    def __iter__(self):
        while self.i < self.count:
            self.i += 1
            yield self.i, torch.rand(2) if self.noise else 0
        self.i = 0

    def state_dict(self):
        return {"i": self.i}

    def load_state_dict(self, state):
        self.i = state["i"]


def stateful(kind, workers):
    # What a worker draws after it was begun anew is torchdata's own business, and not in its state.
    augmented = Augmented(11) if workers == 0 else torch.arange(11)
    source = Counting(noise=workers == 0) if kind == "iterable" else augmented
    options = {"shuffle": True} if kind == "map" else {}
    return StatefulDataLoader(source, 3, drop_last=True, num_workers=workers, **options)


def assert_snapshots(kind, workers, positions, wrap):
    data = wrap(stateful(kind, workers))
    found, kept = [], {}
    stop = max(positions) + 5
    for position in range(stop):
        if position in positions:
            kept[position] = data.snapshot(position)
        found += take(data, [position])
    data.close()
    for position, snapshot in kept.items():
        assert snapshot.dtype == torch.uint8
        resumed = wrap(stateful(kind, workers))
        resumed.restore(position, snapshot)
        assert_same(take(resumed, range(position, stop)), found[position:])
        resumed.restore(position, snapshot)  # and so does a rewind
        assert_same(take(resumed, range(position, stop)), found[position:])
        resumed.close()


WRAPPED = {
    "alone": lambda loader: from_stateful_loader(loader, seed=2),
    "prefetched": lambda loader: prefetch(from_stateful_loader(loader, seed=2), 3),
    "mapped": lambda loader: from_stateful_loader(loader, seed=2).map(lambda batch: [batch]),
    "mapped and prefetched": lambda loader: prefetch(
        from_stateful_loader(loader, seed=2).map(lambda batch: [batch]), 2
    ),
}


@pytest.mark.parametrize("wrap", list(WRAPPED))
@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_a_stateful_loader_continues_from_a_snapshot(kind, wrap, caplog):
    assert_snapshots(kind, 0, range(9), WRAPPED[wrap])
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_a_stateful_loader_with_workers_continues_from_a_snapshot(kind):
    assert_snapshots(kind, 2, (0, 2, 4), WRAPPED["alone"])


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_a_stateful_loader_can_be_read_without_snapshots(kind):
    assert_resumes(lambda: from_stateful_loader(stateful(kind, 0), seed=2), range(8), 8)


@pytest.mark.parametrize("wrap", list(WRAPPED))
def test_a_snapshot_at_the_end_that_was_just_found(wrap):
    data = WRAPPED[wrap](stateful("iterable", 0))
    take(data, range(3))
    with pytest.raises(Exhausted):
        data[3]
    snapshot, resumed = data.snapshot(3), WRAPPED[wrap](stateful("iterable", 0))
    resumed.restore(3, snapshot)
    assert resumed.epoch_length == 3
    assert_same([resumed[position] for position in range(3, 8)], [data[position] for position in range(3, 8)])
    data.close()
    resumed.close()


def test_a_stateful_loader_says_what_it_cannot_do(caplog):
    data = from_stateful_loader(stateful("iterable", 0), seed=2)
    found = take(data, range(7))
    snapshot = data.snapshot(7)
    with pytest.raises(ValueError, match="was made at position 7, and is not for 6"):
        data.restore(6, snapshot)
    assert not caplog.records
    assert same(data[5], found[5])  # without a snapshot it reads the epoch again
    assert "Reading 2 batches again to reach position 5" in caplog.text
    at_next_epoch = data.snapshot(9)  # nor need it stand there
    resumed = from_stateful_loader(stateful("iterable", 0), seed=2)
    resumed.restore(9, at_next_epoch)
    assert_same(take(resumed, range(9, 13)), take(data, range(9, 13)))
    assert resumed.epoch_length == 3

    class Opaque(Counting):
        def state_dict(self):
            return {"i": random.Random()}

    with pytest.raises(ValueError, match="cannot be kept in a checkpoint: let its state_dict, and those of its data"):
        from_stateful_loader(StatefulDataLoader(Opaque(), 3)).snapshot(0)
