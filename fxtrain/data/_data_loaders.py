"""Random access to the batches of a ``DataLoader``: reading starts anywhere in an epoch, without earlier batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fxtrain.core import Batch, describe
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.data._batch_checks import ALL_DIMS
from fxtrain.data._collate import samples
from fxtrain.data._iterables import IterableBatches, dynamic_dimensions
from fxtrain.data._seeding import restoring_generators, seeded, start_epoch
from fxtrain.data._source import Source
from fxtrain.data._workers import WorkerSeeds, end_persistent, end_workers, start_iterator


@with_short_traceback
def from_loader(loader: DataLoader[object], *, seed: int = 0, dynamic: bool = False) -> Source:
    """Returns the batches of a ``DataLoader``, with any samplers, workers and collation.

    For a map-style dataset, the loader's sampler generates the order of an epoch when the epoch is first read, and
    reading starts at the requested position. All random samples of the sampler, the dataset and the collation are a
    function of (seed, epoch) or (seed, position), for any number of workers. This also replaces the seeds of the
    loader's own generators. All generators are restored afterwards.

    In ``fit``, samplers other than torch's may yield a different number of batches in each epoch.

    An ``IterableDataset``, a sampler without a length, or a loader that overrides ``__iter__`` can only be read from
    its start. To reach a position, the batches before it are read again, and a warning is logged.

    Args:
        loader: The loader. Its settings for processes, pinned memory and prefetching apply.
        seed: Any int.
        dynamic: Whether sizes may change from batch to batch.

    Example:
        >>> loader = DataLoader(list(range(6)), batch_size=2, shuffle=True)
        >>> data = from_loader(loader)
        >>> data.epoch_length, data[4].equal(from_loader(loader)[4])
        (3, True)
    """
    if not isinstance(loader, DataLoader):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected loader to be a DataLoader, got {describe(loader)}. Batch a dataset with "
            "fxtrain.data.batches(dataset, batch_size)."
        )
    if _can_jump(loader):
        return LoaderBatches(loader, seed=seed, dynamic=dynamic)
    read: list[int] = []
    data = IterableBatches(
        lambda epoch: _epoch(loader, epoch, seed, read),
        name=f"the {type(loader).__name__}",
        seed=seed,
        dynamic_dims=dynamic_dimensions(loader, dynamic),
    )
    data.iterable = loader
    return data


class LoaderBatches(Source):
    """A ``DataLoader`` over a map-style dataset. Use ``from_loader``."""

    epoch_length: int

    def __init__(self, loader: DataLoader[object], *, seed: int, dynamic: bool) -> None:
        super().__init__(dynamic_dims=ALL_DIMS if dynamic else 0)
        self.loader, self.seed = loader, seed
        self.epoch_length = len(loader)
        if self.epoch_length == 0:
            raise ValueError(
                f"expected a DataLoader with at least one batch, got none with batch_size={loader.batch_size} and "
                f"drop_last={loader.drop_last}. Lower batch_size, or set drop_last=False."
            )
        self._epoch: int | None = None
        self._order: list[object] = []  # the sample keys of each batch in that epoch
        self._tasks: list[tuple[int, object]] = []  # the positions to read, with their keys
        self._pool = self._workers()
        self._iterator: Iterator[Batch] | None = None
        self._next: int | None = None

    @property
    def has_variable_epochs(self) -> bool:
        """Whether the loader has custom samplers, which may yield a different number of batches in each epoch."""
        samplers = self.loader.batch_sampler, self.loader.sampler
        return any(not type(part).__module__.startswith("torch.utils.data") for part in samplers if part is not None)

    def begin_epoch(self, epoch: int, length: int) -> None:
        """Generates the order of an epoch, for which a custom sampler may yield a different number of batches."""
        if self.has_variable_epochs and epoch != self._epoch:
            order = self._order_of(epoch)
            if not order:
                raise ValueError(f"expected the DataLoader's sampler to yield batches in epoch {epoch}, got none.")
            self._order, self._epoch, self._next, self.epoch_length = order, epoch, None, len(order)

    def fetch(self, position: int) -> Batch:
        epoch, index = divmod(position, self.epoch_length)
        if self._iterator is None or position != self._next or index == 0:
            if epoch != self._epoch:
                order = self._order_of(epoch)
                if len(order) != self.epoch_length:
                    raise ValueError(
                        f"expected the DataLoader's sampler to yield {self.epoch_length} batches in epoch {epoch}, its "
                        f"length, got {len(order)}. Outside of fit, all epochs must have equal length."
                    )
                self._order, self._epoch = order, epoch
            self._tasks[:] = [(position + ahead, keys) for ahead, keys in enumerate(self._order[index:])]
            if not self.loader.persistent_workers:
                end_workers(self._iterator)
            self._iterator = None
            self._iterator = start_iterator(self._pool)
        self._next = None  # if reading fails, the next fetch starts a new iterator
        batch = next(self._iterator)
        self._next = position + 1
        return batch

    def close(self) -> None:
        end_workers(self._iterator)
        end_workers(getattr(self._pool, "_iterator", None))  # persistent workers, if restarting them failed
        self._iterator = self._next = None
        self._pool = self._workers()

    def _order_of(self, epoch: int) -> list[object]:
        with seeded(self.seed, epoch, 1), restoring_generators(self.loader):
            start_epoch(self.loader, epoch, self.seed)
            return list(self.loader.sampler if self.loader.batch_sampler is None else self.loader.batch_sampler)

    def _workers(self) -> DataLoader[object]:
        # A DataLoader with the same settings serves as an ordered worker pool, whose sampler yields our tasks.
        loader = self.loader
        return DataLoader(
            KeyedDataset(loader, self.seed),
            batch_size=None,
            sampler=self._tasks,
            collate_fn=_same,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator(),
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )


class KeyedDataset(Dataset[Batch]):
    """A loader's dataset indexed by (position, sample keys). It returns batches, and seeds random samples by position.

    Other attributes are those of the wrapped dataset, because a ``worker_init_fn`` may access them.
    """

    def __init__(self, loader: DataLoader[object], seed: int) -> None:
        self.__dict__["_parts"] = (loader.dataset, loader.collate_fn, loader.batch_sampler is not None, seed)

    def __getitem__(self, key: tuple[int, Sequence[object]]) -> Batch:
        dataset, collate, batched, seed = self.__dict__["_parts"]
        position, keys = key
        with seeded(seed, position):
            return collate(samples(dataset, keys) if batched else dataset[keys])

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # pickle looks up its hooks before _parts exists
            raise AttributeError(name)
        return getattr(self.__dict__["_parts"][0], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.__dict__["_parts"][0], name, value)


def _epoch(loader: DataLoader[object], epoch: int, seed: int, read: list[int]) -> Iterator[Batch]:
    """Yields the batches of one epoch, and isolates the loader's generators from other users.

    Args:
        loader: The loader to iterate over.
        epoch: Index of the epoch.
        seed: Any int.
        read: Contains the index of the last epoch, if the loader was read to its end. Updated in place.
    """
    iterator, states = None, []
    follows = read == [epoch - 1]
    read.clear()
    if not follows:
        end_persistent(loader)  # persistent workers count epochs, so a jump restarts them
    try:
        while True:
            with restoring_generators(loader) as generators:
                if iterator is None:
                    start_epoch(loader, epoch, seed)
                    iterator = start_iterator(loader, WorkerSeeds(seed, epoch))
                for generator, state in zip(generators, states, strict=False):
                    generator.set_state(state)
                batch = next(iterator, _same)
                states = [generator.get_state() for generator in generators]
            if batch is _same:
                read[:] = [epoch]
                return
            yield batch
    finally:
        if not getattr(loader, "persistent_workers", False):
            end_workers(iterator)


def _same(batch: Batch) -> Batch:
    return batch


def _can_jump(loader: DataLoader[object]) -> bool:
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    sized = all(hasattr(part, "__len__") for part in (sampler, getattr(sampler, "sampler", sampler)))
    return type(loader).__iter__ is DataLoader.__iter__ and not isinstance(loader.dataset, IterableDataset) and sized
