"""The batch size and the numbers of examples and tokens that data sources declare."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxtrain as fx
from fxtrain.core import FitBegin
from fxtrain.data import as_source, batches, bucketed, from_iterable, packed, padded, prefetch, windows

TEXTS = [[1] * n for n in (3, 5, 2, 4, 5, 1)]


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.arange(6.0).reshape(6, 1)


class Endless:
    epoch_length = None
    num_tokens = 10**12

    def __getitem__(self, position):
        return torch.ones(2, 1)


class Cycle:
    """An iterable that declares sizes of other types, and wraps itself."""

    batch_size, num_examples = "8", True

    def __init__(self):
        self.source = self

    def __iter__(self):
        yield torch.ones(2, 1)


def stateful():
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(TensorDataset(torch.ones(10, 1)), batch_size=4)


def hugging_face():
    return batches(pytest.importorskip("datasets").Dataset.from_dict({"x": [[1.0]] * 7}), 2)


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (lambda: batches({"x": torch.ones(10, 1)}, 4), (4, 10, None)),
        (lambda: prefetch(batches(torch.ones(10, 1), 4).map(lambda batch: batch * 2)), (4, 10, None)),
        (lambda: windows(torch.arange(100), 8, 4), (4, 11, 100)),
        (lambda: padded(TEXTS, 2), (2, 6, 20)),
        (lambda: packed(TEXTS, 5, 2), (2, 6, 20)),
        (lambda: bucketed(TEXTS, 2), (2, 6, 20)),
        (lambda: bucketed(TEXTS, tokens=10, sizes=[2, 5]), (None, 6, 20)),
        (lambda: as_source([torch.ones(4, 1), torch.ones(3, 1)]), (4, 7, None)),
        (lambda: as_source([torch.ones(())]), (None, None, None)),
        (lambda: as_source(DataLoader(TensorDataset(torch.ones(10, 1)), batch_size=4)), (4, 10, None)),
        (lambda: as_source(DataLoader(TensorDataset(torch.ones(10, 1)), batch_size=None)), (None, None, None)),
        (lambda: as_source(DataLoader(Stream(), batch_size=4)), (4, None, None)),
        (lambda: batches(Stream(), 3), (3, None, None)),
        (lambda: as_source(stateful()), (4, 10, None)),
        (hugging_face, (2, 7, None)),
        (lambda: as_source(Endless()), (None, None, 10**12)),
        (lambda: from_iterable(Cycle()), (None, None, None)),
    ],
)
def test_sources_declare_the_sizes_that_they_know(make, sizes):
    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, batch: model(batch).mean(), tx)
    _, begin, _ = next(fx.steps(fx.init(torch.nn.Linear(1, 1), tx), step, make(), steps=1))
    assert (begin.batch_size, begin.num_examples, begin.num_tokens) == sizes


def test_begin_of_a_run_carries_the_sizes_of_its_data():
    seen = []

    def look(state, event: FitBegin, control):
        seen.append((event.batch_size, event.num_examples, event.num_tokens, event.step_description["accumulate"]))

    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, batch: model(batch).mean(), tx, accumulate=2)
    fx.fit(fx.init(torch.nn.Linear(1, 1), tx), step, batches(torch.ones(10, 1), 4), steps=1, observers=[look])
    assert seen == [(4, 10, None, "2")]
