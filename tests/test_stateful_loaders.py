"""Stateful loaders: snapshots of the iterator state resume a run exactly."""

import random

import pytest
import torch
from sources import Augmented, Lines, assert_resumes, assert_same, same, take
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from fxtrain.data import Exhausted, from_loader, from_stateful_loader, prefetch


class Counting(IterableDataset):
    """An iterable dataset whose state torchdata can restore."""

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
    # Random samples of an iterable dataset in a worker cannot resume, because torchdata does not save its generator.
    source = Counting(noise=workers == 0) if kind == "iterable" else Augmented(11)
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
        resumed.restore(position, snapshot)  # a second restore, as in a rewind
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
def test_stateful_loader_continues_from_a_snapshot(kind, wrap, caplog):
    assert_snapshots(kind, 0, range(9), WRAPPED[wrap])
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_stateful_loader_with_workers_continues_from_a_snapshot(kind):
    assert_snapshots(kind, 2, (0, 2, 4), WRAPPED["alone"])


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_stateful_loader_resumes_without_snapshots(kind):
    assert_resumes(lambda: from_stateful_loader(stateful(kind, 0), seed=2), range(8), 8)


@pytest.mark.parametrize("wrap", list(WRAPPED))
def test_snapshot_after_the_end_keeps_the_epoch_length(wrap):
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


def test_stateful_loader_refuses_invalid_snapshots_and_logs_rereads(caplog):
    data = from_stateful_loader(stateful("iterable", 0), seed=2)
    found = take(data, range(7))
    snapshot = data.snapshot(7)
    with pytest.raises(ValueError, match=r"a snapshot of .* at position 6, got one at 7"):
        data.restore(6, snapshot)
    assert not caplog.records
    assert same(data[5], found[5])  # without a snapshot, the epoch is read from its start
    assert "Reading 2 batches again to reach position 5" in caplog.text
    at_next_epoch = data.snapshot(9)  # not the current position
    resumed = from_stateful_loader(stateful("iterable", 0), seed=2)
    resumed.restore(9, at_next_epoch)
    assert_same(take(resumed, range(9, 13)), take(data, range(9, 13)))
    assert resumed.epoch_length == 3

    class Opaque(Counting):
        def state_dict(self):
            return {"i": random.Random()}

    with pytest.raises(ValueError, match="got one that cannot be read from a checkpoint"):
        from_stateful_loader(StatefulDataLoader(Opaque(), 3)).snapshot(0)


class OwnGenerator(Augmented):
    def __init__(self, count=24):
        super().__init__(count)
        self.rng = random.Random(0)

    def __getitem__(self, index):
        return {"i": index, "own": self.rng.random()}


class KeepsGenerator(OwnGenerator):
    def state_dict(self):
        return {"own": list(self.rng.getstate()[1])}

    def load_state_dict(self, state):
        self.rng.setstate((3, tuple(state["own"]), None))


def mixed(samples):
    """Collates samples and adds random values."""
    batch = torch.utils.data.default_collate(samples)
    return {**batch, "mixed": torch.rand(2)}


def read(make, stop):
    data = from_stateful_loader(make(), seed=2)
    found = take(data, range(stop))
    data.close()
    return found


def resume(make, start, stop):
    data = from_stateful_loader(make(), seed=2)
    take(data, range(start))
    snapshot = data.snapshot(start)
    data.close()
    data = from_stateful_loader(make(), seed=2)
    data.restore(start, snapshot)
    found = take(data, range(start, stop))
    data.close()
    return found


@pytest.mark.parametrize("start", [pytest.param(start, marks=pytest.mark.slow) for start in (1, 3, 4, 6)] + [5])
@pytest.mark.parametrize("persistent", [False, True])
def test_augmentation_in_workers_resumes_exactly(start, persistent):
    def make():
        options = {"shuffle": True, "num_workers": 2, "persistent_workers": persistent, "collate_fn": mixed}
        return StatefulDataLoader(Augmented(12), 3, **options)

    whole = read(make, 10)
    assert not same(whole[0]["r"], whole[4]["r"])
    assert_same(resume(make, start, 10), whole[start:])


@pytest.mark.parametrize("workers", [0, 2])
def test_nondeterministic_loader_warns(workers):
    with pytest.warns(UserWarning, match=f"expected batch {max(1, workers)} of the StatefulDataLoader"):
        resume(lambda: StatefulDataLoader(OwnGenerator(), 3, num_workers=workers), 6, 7)


@pytest.mark.parametrize("start", [1, 2, 3, 8, 9])
def test_generator_in_the_dataset_state_resumes_exactly(start, recwarn):
    def make():
        return StatefulDataLoader(KeepsGenerator(), 3, shuffle=True)

    assert_same(resume(make, start, 12), read(make, 12)[start:])
    assert not [warning for warning in recwarn if "expected batch" in str(warning.message)]


def test_sequential_random_samples_in_workers_warn():
    with pytest.warns(UserWarning, match="expected batch 2 of the StatefulDataLoader"):
        resume(lambda: StatefulDataLoader(Counting(24), 3, num_workers=2), 4, 5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_persistent_workers_are_seeded_by_epoch_from_any_start(kind):
    def make():
        source = Lines(24) if kind == "iterable" else Augmented(12)
        loader = DataLoader(source, 3, num_workers=2, persistent_workers=True, drop_last=True)
        return from_loader(loader, seed=2)

    data = make()
    whole = take(data, range(14))
    assert not same(whole[0], whole[8 if kind == "iterable" else 4])
    assert_same(take(data, (9, 10, 2, 9)), [whole[position] for position in (9, 10, 2, 9)])
    data.close()
    for start in (3, 9):
        data = make()
        data.expect_epoch_length(8) if kind == "iterable" else None
        assert_same(take(data, range(start, 14)), whole[start:])
        data.close()


@pytest.mark.parametrize(("kind", "length"), [("map", 3), ("iterable", None)])
def test_length_of_a_map_style_dataset_is_known_in_the_first_epoch(kind, length):
    data = from_stateful_loader(stateful(kind, 0))
    assert data.epoch_length == length
    assert len(take(data, range(4))) == 4
