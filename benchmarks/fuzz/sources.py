"""Data sources of every kind over the same values. They call ``read`` before every batch or row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

import fxtrain as fx
from benchmarks.fuzz.program import Program

FEATURES = 3
Read = Callable[[], None]


def rows_of(program: Program) -> tuple[Tensor, Tensor]:
    """Returns all rows of an epoch: x [n, 3] and y [n, 1], float32. Rows of bad batches are NaN."""
    count = program.batches * program.rows - (program.short and program.rows > 1)
    place = torch.arange(count * FEATURES, dtype=torch.float32).reshape(count, FEATURES)
    x = torch.sin(place * 1.7 + program.seed % 1000)
    y = x.sum(-1, keepdim=True).tanh()
    for index in program.bad:
        x[index * program.rows : (index + 1) * program.rows] = float("nan")
    return x, y


def source(program: Program, read: Read) -> Any:
    """Returns the training data of a program."""
    x, y = rows_of(program)
    return KINDS[program.source](program, {"x": x, "y": y}, read)


def eval_source(program: Program, read: Read) -> Any:
    """Returns the evaluation data of a program."""
    x, y = rows_of(program.replace(bad=(), batches=program.eval_batches))
    batches = _batches({"x": x, "y": y}, program.rows)
    if not program.eval_unknown:
        return fx.data.sequence(batches).map(_after(read))

    def generate() -> Iterator[Any]:
        for batch in batches:
            read()
            yield batch

    return generate


class _Rows(Dataset[Any]):
    """A map-style dataset that adds random noise to its rows."""

    def __init__(self, arrays: dict[str, Tensor], read: Read) -> None:
        self._arrays, self._read = arrays, read

    def __len__(self) -> int:
        return len(self._arrays["x"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self._read()
        return {"x": self._arrays["x"][index] + 0.01 * torch.randn(FEATURES), "y": self._arrays["y"][index]}


class _Lines(IterableDataset[Any]):
    """An iterable-style dataset over the same rows."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Any]:
        return map(self._rows.__getitem__, range(len(self._rows)))


class _Iterable:
    """A re-iterable source of batches."""

    def __init__(self, batches: list[Any], read: Read) -> None:
        self._batches, self._read = batches, read

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self._read()
            yield batch


class _Foreign:
    """A duck-typed source of batches by position."""

    def __init__(self, batches: list[Any], read: Read) -> None:
        self._batches, self._read, self.epoch_length = batches, read, len(batches)

    def __getitem__(self, position: int) -> Any:
        self._read()
        epoch, index = divmod(position, self.epoch_length)
        return self._batches[(index + epoch) % self.epoch_length if self._is_even else index]

    @property
    def _is_even(self) -> bool:
        return len({batch["x"].shape for batch in self._batches}) == 1


class _Stateful:
    """A loader that saves and restores its own position."""

    def __init__(self, batches: list[Any], read: Read) -> None:
        self._batches, self._read = batches, read
        self._index = self._loaded = 0

    def __iter__(self) -> Iterator[Any]:
        self._index, self._loaded = self._loaded, 0
        return self._rest()

    def _rest(self) -> Iterator[Any]:
        while self._index < len(self._batches):
            self._read()
            self._index += 1
            yield self._batches[self._index - 1]

    def state_dict(self) -> dict[str, int]:
        return {"index": self._index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._loaded = state["index"]


def _batches(arrays: dict[str, Tensor], rows: int) -> list[Any]:
    parts = {name: array.split(rows) for name, array in arrays.items()}
    return [{"x": x, "y": y} for x, y in zip(parts["x"], parts["y"], strict=True)]


def _after(read: Read) -> Callable[[Any], Any]:
    def mapped(batch: Any) -> Any:
        read()
        return batch

    return mapped


def _arrays(shuffle: bool) -> Callable[..., Any]:
    def make(program: Program, arrays: dict[str, Tensor], read: Read) -> Any:
        options = {"shuffle": shuffle, "seed": program.seed, "drop_last": False}
        return fx.data.batches(arrays, program.rows, **options).map(_after(read))

    return make


def _generator(program: Program, arrays: dict[str, Tensor], read: Read) -> Any:
    def generate() -> Iterator[Any]:
        for batch in _batches(arrays, program.rows):
            read()
            yield {**batch, "x": batch["x"] + 0.01 * torch.randn(FEATURES)}

    return generate


def _endless(program: Program, arrays: dict[str, Tensor], read: Read) -> Any:
    batches = _batches(arrays, program.rows)

    def generate() -> Iterator[Any]:
        for position in itertools.count():
            read()
            yield batches[position % len(batches)]

    return generate


def _loader(workers: int) -> Callable[..., Any]:
    def make(program: Program, arrays: dict[str, Tensor], read: Read) -> Any:
        return DataLoader(_Rows(arrays, read), program.rows, shuffle=True, num_workers=workers)

    return make


def _torchdata(program: Program, arrays: dict[str, Tensor], read: Read) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(_Rows(arrays, read), program.rows, shuffle=True)


KINDS: dict[str, Callable[[Program, dict[str, Tensor], Read], Any]] = {
    "list": lambda program, arrays, read: _batches(arrays, program.rows),
    "sequence": lambda program, arrays, read: fx.data.sequence(_batches(arrays, program.rows)).map(_after(read)),
    "arrays": _arrays(shuffle=False),
    "shuffled": _arrays(shuffle=True),
    "prefetched": lambda *given: fx.data.prefetch(_arrays(shuffle=True)(*given)),
    "loader": _loader(workers=0),
    "workers": _loader(workers=2),
    "generator": _generator,
    "iterable": lambda program, arrays, read: _Iterable(_batches(arrays, program.rows), read),
    "iterable_loader": lambda program, arrays, read: DataLoader(_Lines(_Rows(arrays, read)), program.rows),
    "iterator": lambda *given: _generator(*given)(),
    "endless": _endless,
    "foreign": lambda program, arrays, read: _Foreign(_batches(arrays, program.rows), read),
    "stateful": lambda program, arrays, read: _Stateful(_batches(arrays, program.rows), read),
    "torchdata": _torchdata,
}
"""Sources by name. The source ``"list"`` never calls ``read``."""
