"""The worker processes of a ``DataLoader``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from fxtrain._torch_internals.interface import Interface

KIND = Interface("torch.utils.data._DatasetKind", "seeding workers batch by batch")
FETCHER = Interface("torch.utils.data._DatasetKind.create_fetcher", "seeding workers batch by batch")
MAP = Interface("torch.utils.data._DatasetKind.Map", "seeding workers batch by batch")
UNREGISTER = Interface("torch.utils.data._utils.signal_handling._remove_worker_pids", "ending busy workers")


def workers_of(iterator: object) -> Sequence[Any]:
    """Returns the worker processes of a loader's iterator."""
    return getattr(iterator, "_workers", ())


def shut_down_workers(iterator: Any) -> None:
    """Ends the workers of a loader's iterator, after a wait of up to five seconds for each."""
    iterator._shutdown_workers()


def iterator_of(loader: object) -> Any:
    """Returns the iterator that a loader with persistent workers keeps, or None."""
    return getattr(loader, "_iterator", None)


def forget_iterator(loader: Any) -> None:
    """Removes the iterator that a loader keeps."""
    loader._iterator = None


def set_fetcher(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces, in this worker process, the function that creates the object that fetches batches.

    Args:
        make: Takes that function and returns its replacement.
    """
    kinds = KIND.get()
    kinds.create_fetcher = staticmethod(make(kinds.create_fetcher))


def is_by_index(kind: object) -> bool:
    """Whether a fetcher's kind is that of datasets with an index."""
    return kind == MAP.get()


def unregister_workers(iterator: Any) -> None:
    """Keeps torch from raising in the main thread that a worker of this iterator was killed."""
    if getattr(iterator, "_worker_pids_set", False):
        iterator._worker_pids_set = False
        if UNREGISTER.exists:
            with contextlib.suppress(ValueError):
                UNREGISTER.get()(id(iterator))
