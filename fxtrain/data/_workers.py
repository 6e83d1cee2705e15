"""Worker processes of a ``DataLoader`` that survive signals to the process group, and end in bounded time.

A scheduler, a service manager or Ctrl-C sends its signal to every process of a job. The training process responds by
saving and exiting. If workers died of the signal first, the batch in progress would be lost, and torch would raise
their death at an arbitrary point of the training process.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import multiprocessing
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import xxhash
from torch.utils.data import DataLoader

from fxtrain._torch_internals.loaders import (
    forget_iterator,
    is_by_index,
    iterator_of,
    set_fetcher,
    shut_down_workers,
    unregister_workers,
    workers_of,
)
from fxtrain.core import Batch
from fxtrain.data._seeding import seed_process

# Windows has no SIGUSR1.
_SURVIVED_SIGNALS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)}
_SHUTDOWN_TIMEOUT = 2.0


def start_iterator(loader: Iterable[Batch], seeds: WorkerSeeds | None = None) -> Iterator[Batch]:
    """Returns ``iter(loader)``, with worker processes that survive SIGINT, SIGTERM and SIGUSR1.

    The workers end with their iterator, or when their parent process is gone.

    Args:
        loader: Any iterable. Only a ``DataLoader`` with workers is treated specially.
        seeds: Seeds of the workers' global generators. By default the loader's own.
    """
    if not isinstance(loader, DataLoader) or not loader.num_workers:
        return iter(loader)
    if not hasattr(signal, "pthread_sigmask"):
        with _replaced(loader, worker_init_fn=WorkerInit(loader.worker_init_fn, seeds, None)):
            return iter(loader)
    _start_helpers(loader)
    iterator = None
    # Workers inherit the signal mask, so a signal during their startup is delivered after their handlers are set.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    init, context = WorkerInit(loader.worker_init_fn, seeds, _SURVIVED_SIGNALS - before), _context_of(loader)
    try:
        # Block signals while torch's loader starts its workers, because an interrupt would leave them half started.
        # torchdata's loader also waits for its workers and rereads batches, which is too long to block signals.
        with (
            _blocked() if not hasattr(loader, "load_state_dict") else contextlib.nullcontext(),
            _replaced(loader, worker_init_fn=init, multiprocessing_context=context),
        ):
            iterator = iter(loader)
            for worker in workers_of(iterator):
                worker._popen.terminate = functools.partial(_terminate, worker._popen, weakref.ref(iterator))
    except BaseException:
        end_workers(iterator)
        raise
    return iterator


def end_workers(iterator: object) -> None:
    """Ends the workers of an iterator from ``started``. Workers still busy after two seconds are killed."""
    children = multiprocessing.active_children()  # excludes workers of the parent, in a process forked later
    workers = [worker for worker in workers_of(iterator) if worker in children]
    if not workers:
        return
    # Torch waits up to five seconds for each worker in turn.
    killer = threading.Timer(_SHUTDOWN_TIMEOUT, _kill, (iterator, workers))
    killer.daemon = True
    killer.start()
    try:
        shut_down_workers(iterator)
    finally:
        killer.cancel()


def end_persistent(loader: object) -> None:
    """Ends the persistent workers of a loader."""
    iterator = iterator_of(loader)
    if iterator is not None:
        forget_iterator(loader)
        end_workers(iterator)


class WorkerSeeds(NamedTuple):
    """Seeds for the global generators of a loader's workers.

    Args:
        seed: Any int.
        epoch: The epoch in which the workers start. Persistent workers count up from it.
    """

    seed: int
    epoch: int


class WorkerInit(NamedTuple):
    """A picklable ``worker_init_fn`` that ignores signals, seeds generators and calls the loader's own."""

    init: Callable[[int], None] | None
    seeds: WorkerSeeds | None
    unblock: set[Any] | None

    def __call__(self, worker_id: int) -> None:
        if self.unblock is not None:
            for kind in _SURVIVED_SIGNALS:
                # A handler instead of SIG_IGN, because a dataset's subprocesses would inherit SIG_IGN.
                signal.signal(kind, lambda *_: None)
                signal.siginterrupt(kind, False)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.unblock)
        if self.init is not None:
            self.init(worker_id)
        if self.seeds is not None:
            _seed_fetches(self.seeds, worker_id)


def _seed_fetches(seeds: WorkerSeeds, worker_id: int) -> None:
    """Seeds the generators for each batch that this process makes, from the epoch and the sample keys.

    A worker that starts in the middle of an epoch thus generates the same random samples as one that read the whole
    epoch. The iterator of an iterable dataset is seeded from the epoch and the worker.
    """
    epochs = itertools.count(seeds.epoch)

    def created(create: Callable[..., Any], *args: object) -> Any:  # called once per epoch
        epoch = next(epochs)
        seed_process(seeds.seed, epoch, worker_id, 3)
        fetcher: Any = create(*args)
        fetch = fetcher.fetch

        def fetch_seeded(keys: object) -> Batch:
            text = repr(keys)
            if keys is not None and " at 0x" not in text:  # addresses differ between processes
                seed_process(seeds.seed, epoch, xxhash.xxh3_64_intdigest(text.encode()))
            return fetch(keys)

        if is_by_index(args[0]):
            fetcher.fetch = fetch_seeded
        return fetcher

    set_fetcher(lambda create: functools.partial(created, create))


@contextlib.contextmanager
def _replaced(loader: DataLoader[object], **settings: object) -> Iterator[None]:
    """Changes settings of a loader temporarily."""
    before = {name: getattr(loader, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(loader, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(loader, name, value)


@contextlib.contextmanager
def _blocked(kinds: set[signal.Signals] = _SURVIVED_SIGNALS) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, kinds)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # pending signals are handled in this call


def _context_of(loader: DataLoader[object]) -> BaseContext:
    """Returns the loader's multiprocessing context, modified to start processes with blocked signals."""
    given: Any = loader.multiprocessing_context or multiprocessing.get_context()
    context, make = copy.copy(given), given.Process

    def process(*args: object, **options: object) -> BaseProcess:
        worker = make(*args, **options)
        worker.start = functools.partial(_start, worker)
        return worker

    context.Process = process
    return context


def _start(worker: Any) -> None:
    del worker.start  # must not be pickled with the process
    with _blocked():
        worker.start()
        worker._popen.terminate = worker._popen.kill  # workers survive SIGTERM, the default


def _terminate(popen: Any, iterator: Callable[[], object]) -> None:
    """Kills a busy worker. Called by torch at the end of an iterator, and by multiprocessing at exit."""
    unregister_workers(iterator())
    popen.kill()


def _start_helpers(loader: DataLoader[object]) -> None:
    """Starts the processes that multiprocessing needs to start others.

    They start before signals are blocked, because starting the resource tracker unblocks SIGINT and SIGTERM, and a fork
    server passes its mask to every process that the program forks later.
    """
    from multiprocessing import forkserver, resource_tracker  # unavailable on Windows

    context: Any = loader.multiprocessing_context or multiprocessing
    method = context.get_start_method()
    if method == "fork":
        return
    with _blocked(_SURVIVED_SIGNALS - {signal.SIGINT, signal.SIGTERM}):  # the resource tracker ignores these two
        resource_tracker.ensure_running()
    if method == "forkserver":
        forkserver.ensure_running()


def _kill(iterator: object, workers: list[BaseProcess]) -> None:
    unregister_workers(iterator)
    for worker in workers:
        worker.kill()
