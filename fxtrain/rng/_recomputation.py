"""Replays random samples in recomputations, such as activation checkpointing in the backward pass."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fxtrain.rng._functional import Functional

_MARK = "_fxtrain_site"
_lock = threading.Lock()
_real: Any = (torch.get_rng_state, torch.set_rng_state)
_depth = 0


@contextlib.contextmanager
def replayed() -> Iterator[None]:
    """A context manager in which torch's generator state also carries the next site of ``functional``.

    Code that recomputes, such as ``torch.utils.checkpoint``, reads the generator state before the first pass and
    restores it before the second. Inside ``functional``, samples come from the sites of a key instead. The state
    therefore carries the next site, and restoring the state restores the site. The generator itself is not changed.

    Within this context, ``torch.get_rng_state`` and ``torch.set_rng_state`` are replaced. Threads outside
    ``functional`` read and write the generator as usual.

    Example:
        >>> from fxtrain import rng
        >>> with rng.functional(rng.key(0)), replayed():
        ...     before = torch.get_rng_state()
        ...     first = torch.rand(2)
        ...     torch.set_rng_state(before)
        ...     bool((torch.rand(2) == first).all())
        True
    """
    global _depth
    with _lock:
        _depth += 1
        torch.get_rng_state, torch.set_rng_state = _get, _set
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth:
                torch.get_rng_state, torch.set_rng_state = _real


def _get() -> Tensor:
    state = _real[0]()
    mode = innermost_functional()
    if mode is not None:
        setattr(state, _MARK, (mode, mode.sites))
    return state


def _set(new_state: Tensor) -> None:
    mode, site = getattr(new_state, _MARK, (None, 0))
    if mode is not None and mode is innermost_functional():
        mode.sites = site
    else:
        _real[1](new_state)


def innermost_functional() -> Functional | None:
    # Function modes see this call as one of torch's functions. `Functional` answers it, and others pass it on.
    return handle_torch_function(innermost_functional, (None,)) if has_torch_function((None,)) else None
