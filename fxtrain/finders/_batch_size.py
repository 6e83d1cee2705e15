"""Batch size: the largest that fits into memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from fxtrain.compiler import Compiled
from fxtrain.compiler._anew import anew
from fxtrain.core import TrainState, check_positive_int
from fxtrain.fold import attach
from fxtrain.loop._evaluate import to_device
from fxtrain.step import Step

_START = 8
_STEPS = 2  # at each batch size: what a first one leaves behind is there in the second
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",  # torch's allocator on a CPU
    "not enough memory",  # the same on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def find_batch_size(
    state: TrainState,
    step: Callable[..., Any],
    make_batch: Callable[[int], Any],
    *,
    start: int | None = None,
    limit: int = 65536,
    multiple: int = 1,
) -> int:
    """The largest batch size at which the step runs.

    It is doubled from ``start`` on as long as two steps fit into memory; then what lies between the last that fitted
    and the first that did not is halved again and again. Each size has a copy of the state, and all that was allocated
    is freed.

    A compiled step is compiled for each size that is tried, in graphs that are thrown away.

    On a GPU, what other things need later must fit too, evaluation with a larger batch for example: leave some room.
    On a CPU most systems end a process that takes too much memory instead of refusing it, so choose ``limit`` such
    that this cannot happen, or set a limit on the process.

    Args:
        state: Whose copies to use.
        step: From ``train_step``, compiled or not; or any pure function of that signature.
        make_batch: From a size to a batch of that many rows, as the data gives it.
        start: The size to begin with, a multiple of ``multiple``; by default about 8. Smaller ones, which a layer as
            batch norm may refuse, are tried only where it does not fit.
        limit: No size above this one is tried.
        multiple: Only multiples of so many are tried: what ``accumulate`` needs, or what is fast.

    Raises:
        ValueError: If an argument is out of its range.
        RuntimeError: If the smallest size does not fit either.
        Exception: What else the step raises.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        >>> state = fx.init(torch.nn.Linear(4, 1), tx)
        >>> find_batch_size(state, step, lambda size: torch.ones(size, 4), limit=48)
        48
    """
    for name, value in (("start", 1 if start is None else start), ("limit", limit), ("multiple", multiple)):
        check_positive_int(name, value)
    if start is None:
        start = max(min(_START, limit) // multiple, 1) * multiple
    if start % multiple or start > limit:
        raise ValueError(
            f"start={start}, the first size that is tried, is to be a multiple of multiple={multiple} and at most "
            f"limit={limit}."
        )
    # In multiples; between the two, nothing is known.
    largest, size, said = limit // multiple, start // multiple, ""
    fits, too_large = 0, largest + 1
    while too_large - fits > 1:
        problem = _out_of_memory(state, step, make_batch, size * multiple)
        if problem is None:
            fits = size
        else:
            too_large, said = size, problem
        size = min(2 * fits, largest) if too_large > largest else (fits + too_large) // 2
    if not fits:
        raise RuntimeError(
            f"Not even a batch of {multiple} fits into memory ({said}): make the model smaller, or its numbers."
        )
    return fits * multiple


def _out_of_memory(
    state: TrainState, step: Callable[..., Any], make_batch: Callable[[int], Any], size: int
) -> str | None:
    """What was said when the memory did not suffice; None if it did."""
    try:
        _take_steps(state, step, make_batch, size)
    except Exception as error:
        said = _said_of_memory(error)
        if said is None:
            raise
        return said  # and no more of the error: its traceback holds on to tensors
    finally:
        gc.collect()
        if state.step.device.type != "cpu":
            torch.accelerator.empty_cache()
    return None


def _take_steps(state: TrainState, step: Callable[..., Any], make_batch: Callable[[int], Any], size: int) -> None:
    # Its graphs go with it.
    step = anew(step) if isinstance(step, Compiled) else step if hasattr(step, "fires") else Step(step)
    state = attach(state, step).copy()
    for _ in range(_STEPS):
        state, _ = step(state, to_device(make_batch(size), state.step.device))
    if state.step.device.type != "cpu":
        torch.accelerator.synchronize(state.step.device)


def _said_of_memory(error: BaseException | None) -> str | None:
    while error is not None:
        said = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(part in said for part in _OUT_OF_MEMORY):
            return said.strip().split("\n")[0] or type(error).__name__
        error = error.__cause__ or error.__context__
    return None
