"""Loaders and iterables: sources that can only be read in order, resumed at any position."""

import numpy as np
import pytest
import torch
from sources import AtOnce, Augmented, Lines, Rows, arrays, assert_resumes, assert_same, same, take
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from fxtrain.data import Exhausted, Source, as_source, batches, from_iterable, from_loader, prefetch


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


@pytest.mark.parametrize("name", list(loaders(0)))
def test_loader_resumes_at_any_position(name):
    assert_resumes(lambda: from_loader(loaders(0)[name], seed=3), range(13), 13)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(loaders(0)))
def test_loader_with_workers_resumes_in_the_same_order(name):
    assert_resumes(lambda: from_loader(loaders(2)[name], seed=3), (4, 7), 12)
    if not name.startswith(("iterable", "unsized")):  # their order depends on the number of workers
        assert_same(
            take(from_loader(loaders(2)[name], seed=3), range(7)), take(from_loader(loaders(0)[name], seed=3), range(7))
        )


@pytest.mark.parametrize("name", ["shuffled", "generator", "weighted", "iterable", "unsized with generator"])
def test_loader_order_depends_only_on_seed_and_epoch(name):
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
    for position, batch in enumerate(found):  # other uses of the generators do not change the order
        assert same(again[position], batch)
        [torch.rand(3, generator=generator) for generator in generators]
    assert len({str(batch) for batch in found}) == 4


def test_loader_seeks_without_reading(caplog):
    dataset = Augmented(10_000)
    data = from_loader(DataLoader(dataset, 5, shuffle=True))
    data[3 * data.epoch_length + 1500]
    assert dataset.reads == 5
    assert not caplog.records


def test_set_epoch_of_the_sampler_is_called():
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


def test_sampler_of_changing_length_is_refused():
    class Growing(list):
        def __iter__(self):
            self.append([0])
            return super().__iter__()

    with pytest.raises(ValueError, match="to yield 1 batches in epoch 0, its length, got 2"):
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
def test_worker_init_fn_can_change_the_dataset(context):
    loader = DataLoader(Offset(8), 4, num_workers=1, worker_init_fn=initialise, multiprocessing_context=context)
    data = from_loader(loader)
    assert data[1].tolist() == [12, 13, 14, 15]
    data.close()


@pytest.mark.parametrize("random_rows", [False, True])
def test_iterable_resumes_and_logs_rereads(random_rows, caplog):
    assert_resumes(lambda: from_iterable(Rows(random_rows=random_rows), seed=1), range(13), 13)
    caplog.clear()
    source = Rows()
    assert from_iterable(source)[13]["i"][0] == 3
    assert source.reads == 5 + 4  # one epoch to learn its length, then the start of the third
    assert [record.getMessage() for record in caplog.records] == [
        "Reading 13 batches again to reach position 13, because the Rows can only be read from its start.",
        "Reading 3 batches again to reach position 13, because the Rows can only be read from its start.",
    ]
    take(from_iterable(source), range(12))
    assert len(caplog.records) == 2


def test_epoch_length_is_learned_at_the_first_end():
    data = from_iterable(Rows(3))
    take(data, range(3))
    assert data.epoch_length is None
    with pytest.raises(Exhausted) as raised:
        data[3]
    assert (raised.value.position, str(raised.value)) == (3, "expected a batch at position 3, got the end of the data.")
    assert data.epoch_length == 3
    assert int(data[3]["i"][0]) == 0
    assert int(data[6]["i"][0]) == 0


def test_iterator_is_read_only_once():
    data = as_source(torch.full((2,), i) for i in range(3))
    assert [int(data[i][0]) for i in range(2)] == [0, 1]
    data.close()
    assert int(data[2][0]) == 2
    for _ in range(2):
        with pytest.raises(Exhausted):
            data[3]
    assert data.epoch_length == 3
    with pytest.raises(ValueError, match=r"to reach position 1, got the generator, which can be read only once\. Pass"):
        data[1]
    with pytest.raises(Exhausted):
        as_source(torch.zeros(2) for i in range(3))[7]


def uneven(sizes):
    sizes = iter(sizes)
    return lambda: iter([torch.zeros(2)] * next(sizes))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (uneven([3, 2]), r"expected 3 batches in epoch 1 of .*, as many as before, got fewer"),
        (uneven([3, 4, 3]), r"expected 3 batches in epoch 1 of .*, as many as before, got more"),
        (uneven([0]), "at least one batch in epoch 0 of .*, got none. The data is empty or"),
        (uneven([3, 0]), "at least one batch in epoch 1 of .*, got none"),
    ],
)
def test_epochs_of_different_lengths_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        take(from_iterable(source), range(8))


def test_iterable_restarts_after_an_error():
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
    """A third-party source of batches."""

    epoch_length = 4
    closed = False

    def __getitem__(self, position):
        return np.full(2, 4 - position % 4)

    def close(self):
        self.closed = True


def test_as_source_accepts_every_kind_of_source():
    ready = batches(arrays(), 2)
    assert as_source(ready) is ready
    foreign = Countdown()
    data = as_source(foreign)
    assert data.map(lambda x: x + 1)[1].tolist() == [4, 4]
    assert data.epoch_length == 4
    assert not data.has_snapshots
    data.close()
    assert foreign.closed
    assert as_source((torch.zeros(2), torch.ones(2))).epoch_length == 2
    assert as_source(Rows().__iter__)[1]["i"][0] == 1
    loader = DataLoader(torch.arange(8), 2, shuffle=True)
    assert not same(as_source(loader, seed=1)[0], as_source(loader, seed=2)[0])
    assert isinstance(as_source(DataLoader(Lines(), 2)), Source)
    assert as_source(StatefulDataLoader(torch.arange(8), 2)).has_snapshots
