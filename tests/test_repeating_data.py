"""Resuming a run warns if its data differs from the data before the checkpoint."""

import random
import warnings

import numpy as np
import problem
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fxtrain as fx
from fxtrain import testing
from fxtrain.data import checksum


class OwnGenerator(Dataset):
    """Samples from a private generator that restarts in each process."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __len__(self):
        return 24

    def __getitem__(self, index):
        x = torch.tensor(self.rng.normal(size=4), dtype=torch.float32)
        return {"x": x, "y": x.sum(0, keepdim=True)}


class ByIndex(OwnGenerator):
    def __getitem__(self, index):
        self.rng = np.random.default_rng(index)
        return super().__getitem__(index)


def shuffled(seed):
    """Returns a function that yields batches in an order seeded by ``seed()``."""

    def stream():
        rng = random.Random(seed())
        order = problem.data(8)
        rng.shuffle(order)
        yield from ({**batch, "x": batch["x"] + rng.random()} for batch in order)

    return stream


SOURCES = {
    "own generator": lambda: DataLoader(OwnGenerator(), 3),
    "own generator in workers": lambda: DataLoader(OwnGenerator(), 3, num_workers=2),
    "own generator, batches": lambda: fx.data.batches(OwnGenerator(), 3),
    "own generator, prefetched": lambda: fx.data.prefetch(DataLoader(OwnGenerator(), 3)),
    "unseeded shuffle": lambda: shuffled(lambda: None),
    "unseeded shuffle, mapped": lambda: fx.data.from_iterable(shuffled(lambda: None)).map(dict),
}
REPEATING = {
    "by index": lambda: DataLoader(ByIndex(), 3, shuffle=True),
    "by index in workers": lambda: DataLoader(ByIndex(), 3, shuffle=True, num_workers=2),
    "list": lambda: problem.data(8),
    "seeded shuffle": lambda: shuffled(lambda: 3),
    "global generators": lambda: shuffled(random.random),
}


def resumed(make, folder, at=5):
    checkpoints = fx.checkpointer(folder)
    fx.fit(problem.start(), problem.step(), make(), steps=at, checkpointer=checkpoints)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fx.fit(problem.start(), problem.step(), make(), steps=at + 2, checkpointer=checkpoints, resume=True)
    assert int(result.state.step) == at + 2
    return [str(warning.message) for warning in caught if "expected batch" in str(warning.message)]


@pytest.mark.parametrize("name", SOURCES)
def test_changed_data_warns_on_resume(name, tmp_path):
    (message,) = resumed(SOURCES[name], tmp_path)
    assert "expected batch 4 of the data to be the same as before the checkpoint, got a different one" in message


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("own")])
def test_changed_data_warns_on_resume_between_epochs(name, tmp_path):
    (message,) = resumed(SOURCES[name], tmp_path, at=8)
    assert "expected batch 7 of the data" in message


@pytest.mark.parametrize("at", [1, 5, 8, 9])
@pytest.mark.parametrize("name", REPEATING)
def test_repeatable_data_resumes_without_warning(name, at, tmp_path):
    assert not resumed(REPEATING[name], tmp_path, at)


def test_saving_does_not_change_the_state(tmp_path):
    options = {"steps": 4, "checkpointer": fx.checkpointer(tmp_path)}
    saved = fx.fit(problem.start(), problem.step(), problem.data(), **options)
    plain = fx.fit(problem.start(), problem.step(), problem.data(), steps=4)
    testing.assert_equal(saved.state, plain.state, "saved")
    again = fx.fit(problem.start(), problem.step(), problem.data(), resume=True, **options)
    testing.assert_equal(again.state, plain.state, "resumed")


def test_changed_data_warns_after_a_restore_by_hand(tmp_path):
    checkpoints = fx.checkpointer(tmp_path)
    fx.fit(problem.start(), problem.step(), problem.data(8), steps=3, checkpointer=checkpoints)
    state = checkpoints.restore(problem.start())
    with pytest.warns(UserWarning, match="expected batch 2 of the data"):
        fx.fit(state, problem.step(), problem.data(8, seed=1), steps=4)


def test_checksums_cover_small_leaves_and_samples_of_large_ones():
    seen = set()
    for index in range(7):
        batch = torch.zeros(7, dtype=torch.bfloat16)
        batch[index] = 1
        seen.add(checksum(batch))
    assert len(seen) == 7
    large = torch.zeros(3_000_000)
    assert checksum(large) == checksum(large.clone())
    assert checksum(large) != checksum(large.roll(1) + 1)
    assert checksum(torch.zeros(2, 3)) != checksum(torch.zeros(3, 2))
    assert checksum({"a": torch.zeros(1)}) != checksum({"b": torch.zeros(1)})
    assert checksum(torch.arange(6).reshape(2, 3).T) == checksum(torch.arange(6).reshape(2, 3).T.contiguous())
    assert -(2**63) <= checksum(np.ones(3)) < 2**63
    assert checksum(torch.zeros(0)) != checksum(torch.tensor(True))
