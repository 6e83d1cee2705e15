"""Epochs with a changing number of batches, as from a sampler that fills batches up to a token budget."""

import pytest
import torch
from problem import Together
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import fxtrain as fx
from fxtrain.data import batches, from_loader, prefetch

SIZES = [3, 2, 4, 4, 1, 5]
TX = fx.optim.adam(0.1)


class Sampler:
    """Yields a different number of batches in each epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return SIZES[self.epoch]

    def __iter__(self):
        return iter([[4 * i, 4 * i + 1] for i in range(len(self))])


class Stream(IterableDataset):
    """Yields a different number of samples in each epoch, with random noise."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for i in range(2 * SIZES[self.epoch] + 1):
            yield torch.tensor([self.epoch, i]) + 0.1 * torch.rand(2)


class Shrinking(Stream):
    """A stateful stream whose epochs get shorter."""

    start = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for i in range(start, 2 * (5 - self.epoch)):
            self.start = i + 1
            yield torch.tensor([self.epoch, i])
        self.start = 0

    def state_dict(self):
        return {"start": self.start}

    def load_state_dict(self, state):
        self.start = state["start"]


KINDS = {
    "sampler": (lambda: DataLoader(torch.rand(20, 2, generator=torch.Generator()), batch_sampler=Sampler()), SIZES),
    "stream": (lambda: batches(Stream(), 2), SIZES),
    "short stream": (lambda: batches(Stream(), 2, drop_last=False), [size + 1 for size in SIZES]),
    "loader of a stream": (lambda: DataLoader(Stream(), 2, drop_last=True), SIZES),
    "stateful": (lambda: batches(Shrinking(), 2), [5, 4, 3, 2, 1]),
    "prefetched sampler": (lambda: prefetch(KINDS["sampler"][0]()), SIZES),
    "prefetched stream": (lambda: prefetch(batches(Stream(), 2)), SIZES),
    "prefetched stateful": (lambda: prefetch(batches(Shrinking(), 2)), [5, 4, 3, 2, 1]),
}


def loss_fn(model, batch):
    return (model(batch.float()) + torch.rand(())).square().mean()


def start():
    torch.manual_seed(0)
    return fx.init(nn.Linear(2, 1), TX)


STEP = fx.train_step(loss_fn, TX)


def train(make, **options):
    seen, ends = [], []

    def look(state, event: fx.StepBegin):
        seen.append((event.position, event.batch.sum().item()))
        return state, fx.Control()

    def end(state, event: fx.EpochEnd):
        ends.append(event.step)
        return state, fx.Control()

    callbacks = [look, end, *options.pop("callbacks", ())]
    result = fx.fit(start(), STEP, make(), **{"epochs": 5, **options}, callbacks=callbacks)
    return result, seen, ends


@pytest.mark.parametrize("kind", list(KINDS))
def test_epochs_are_read_completely_and_resume_bitwise(kind, tmp_path):
    make, sizes = KINDS[kind]
    whole, seen, ends = train(make)
    assert ends == [sum(sizes[: i + 1]) for i in range(5)]
    for cut in range(1, sum(sizes[:5]), 2):
        folder = fx.checkpointer(tmp_path / str(cut))
        train(make, steps=cut, checkpointer=folder)
        then, read, _ = train(make, checkpointer=fx.checkpointer(tmp_path / str(cut)), resume=True)
        assert read == seen[cut:]
        assert then.state.params["weight"].equal(whole.state.params["weight"])


@pytest.mark.parametrize("kind", ["sampler", "stream", "stateful", "prefetched stream"])
def test_multi_step_stops_at_epoch_end(kind):
    make, sizes = KINDS[kind]
    whole, _, _ = train(make)
    ends = []

    def end(state, event: fx.EpochEnd):
        ends.append(event.step)
        return state, fx.Control()

    found = fx.fit(start(), Together(STEP, 2), make(), epochs=5, callbacks=[end])
    assert ends == [sum(sizes[: i + 1]) for i in range(5)]
    assert found.state.params["weight"].equal(whole.state.params["weight"])


@pytest.mark.parametrize("kind", ["sampler", "stream", "prefetched sampler", "prefetched stream"])
def test_rewind_across_epochs_reads_same_batches(kind):
    make, _ = KINDS[kind]

    def back(state, event: fx.StepEnd):
        return state, fx.Control(rewind=4 if event.step == 8 else 0, reason="again")

    _, expected, _ = train(make)
    result, seen, _ = train(make, callbacks=[back], snapshot_every=1, snapshots=6, rewind_limit=1)
    assert seen[:8] == expected[:8]
    assert seen[8:12] == expected[4:8]
    assert result.reason


def test_evaluation_reads_whole_source():
    measure = fx.eval_step(lambda model, batch: {"rows": torch.tensor(1.0), "first": batch[:, 0].mean()})
    for kind in ("sampler", "stream"):
        data = KINDS[kind][0]()
        for _ in range(2):
            assert fx.evaluate(start(), measure, data)["rows"] == 1


def test_indexing_requires_equal_epochs():
    data = from_loader(DataLoader(torch.rand(20, 2), batch_sampler=Sampler()))
    with pytest.raises(ValueError, match="all epochs must have equal length"):
        [data[i] for i in range(5)]


def test_growing_stateful_loader_is_rejected():
    with pytest.raises(ValueError, match=r"expected 2 batches in epoch 2 of .*, as many as before, got more"):
        fx.fit(start(), STEP, StatefulDataLoader(Stream(), 2, drop_last=True), epochs=4)
