"""Worker processes of a DataLoader: they outlive signals to the process group, and end in bounded time.

A scheduler, a service manager and Ctrl-C send their signal to every process of a job. The training process answers it
by saving and ending. Workers that die of it first would take the batch under way with them, and torch raises their
death in the middle of whatever the training process does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

# Windows has no SIGUSR1.
_OUTLIVED = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)}
_PATIENCE = 2.0


def started(loader: Any) -> Iterator[Any]:
    """``iter(loader)``, whose worker processes outlive SIGINT, SIGTERM and SIGUSR1.

    They end with their iterator, or when the process that started them is gone.
    """
    if not isinstance(loader, DataLoader) or not loader.num_workers or not hasattr(signal, "pthread_sigmask"):
        return iter(loader)
    _start_helpers(loader)
    init, iterator = loader.worker_init_fn, None
    # A worker inherits the mask: a signal that arrives while it starts is delivered when it can take it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OUTLIVED)
    try:
        try:
            loader.worker_init_fn = Outliving(init, _OUTLIVED - before)
            iterator = iter(loader)
            for worker in getattr(iterator, "_workers", ()):
                worker._popen.terminate = worker._popen.kill  # terminate() sends SIGTERM
        finally:
            loader.worker_init_fn = init
            signal.pthread_sigmask(signal.SIG_SETMASK, before)  # pending signals are handled in this call
    except BaseException:
        ended(iterator)
        raise
    return iterator


def ended(iterator: Any) -> None:
    """Ends the workers of an iterator from ``started``. Those still busy after two seconds are killed."""
    children = multiprocessing.active_children()  # in a process that was forked later, these are not its own
    workers = [worker for worker in getattr(iterator, "_workers", ()) if worker in children]
    if not workers:
        return
    # Torch waits up to five seconds for each worker in turn.
    killer = threading.Timer(_PATIENCE, _kill, (iterator, workers))
    killer.daemon = True
    killer.start()
    try:
        iterator._shutdown_workers()
    finally:
        killer.cancel()


class Outliving:
    """A ``worker_init_fn`` that ignores signals and then calls the loader's own. A class, so that it can be pickled.

    A handler rather than SIG_IGN, because programs that a dataset starts would inherit the latter.
    """

    def __init__(self, init: Callable[[int], None] | None, unblock: set[Any]) -> None:
        self.init = init
        self.unblock = unblock

    def __call__(self, worker_id: int) -> None:
        for kind in _OUTLIVED:
            signal.signal(kind, _outlive)
            signal.siginterrupt(kind, False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.unblock)
        if self.init is not None:
            self.init(worker_id)


def _outlive(number: int, frame: FrameType | None) -> None:
    pass


def _start_helpers(loader: DataLoader[Any]) -> None:
    """Starts the processes that multiprocessing needs to start others.

    They come before the signals are blocked: the start of the resource tracker unblocks SIGINT and SIGTERM, and a fork
    server hands its mask to every process of the program that it forks later.
    """
    from multiprocessing import forkserver, resource_tracker  # not on Windows

    context: Any = loader.multiprocessing_context or multiprocessing
    method = context.get_start_method()
    if method == "fork":
        return
    kinds = _OUTLIVED - {signal.SIGINT, signal.SIGTERM}  # which the resource tracker ignores by itself
    before = signal.pthread_sigmask(signal.SIG_BLOCK, kinds)
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if method == "forkserver":
        forkserver.ensure_running()


def _kill(iterator: Any, workers: list[Any]) -> None:
    if iterator._worker_pids_set:
        # Otherwise torch raises in the main thread that a worker was killed.
        iterator._worker_pids_set = False
        with contextlib.suppress(ValueError):
            signal_handling._remove_worker_pids(id(iterator))
    for worker in workers:
        worker.kill()
