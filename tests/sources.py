"""Data sources of all kinds, and assertions that two of them yield equal batches."""

import functools
import random

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fxtrain import tree
from fxtrain.data import (
    Exhausted,
    batches,
    from_loader,
    sequence,
    windows,
)


def same(first, second):
    leaves, structure = tree.flatten(first)
    others, other_structure = tree.flatten(second)
    return structure == other_structure and all(map(equal, leaves, others))


def equal(first, second):
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def take(data, positions):
    """Returns the batches at ``positions``. Reads again after ``Exhausted``, as the loop does at an epoch's end."""
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


def arrays(count=23):
    return {"x": torch.arange(count * 2.0).reshape(count, 2), "y": (np.arange(count), torch.arange(count))}


class Augmented(Dataset):
    """Each sample contains random values from all global generators. Counts the samples read."""

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


class Rows:
    """A reiterable source. Counts the batches read."""

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
