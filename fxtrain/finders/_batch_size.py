"""Search for the largest batch size that fits into memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from fxtrain import tree
from fxtrain.compiler import Compiled
from fxtrain.core import (
    Batch,
    StepFn,
    TrainState,
    check_callable,
    check_positive_int,
    check_train_state,
    format_bytes,
)
from fxtrain.core._available_memory import available_bytes
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.data import to_device
from fxtrain.diagnostics._memory_estimate import estimated_bytes
from fxtrain.fold import attach
from fxtrain.step import Step

_START = 8
# The second step of a trial runs with the memory that the first one leaves allocated.
_STEPS = 2
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",  # torch's CPU allocator on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@with_short_traceback
def find_batch_size(
    state: TrainState,
    step: StepFn,
    make_batch: Callable[[int], Batch],
    *,
    start: int | None = None,
    limit: int = 65536,
    multiple: int = 1,
) -> int:
    """Returns the largest batch size at which the step fits into memory.

    The size is doubled from ``start`` as long as two steps fit into memory, and then refined by bisection. Each trial
    uses a copy of the state and frees all its allocations. A compiled step is compiled again for each trial, in graphs
    that are then discarded.

    On a GPU, leave room for other allocations, such as evaluation with a larger batch. On a CPU, most systems kill a
    process that uses too much memory instead of raising an error. There a size is only tried if an estimate of the
    step's memory, that of ``fxtrain.explain``, is below what the machine and the container have left. Steps that cannot
    be traced have no estimate: choose ``limit`` so that they fit, or set a memory limit for the process.

    Args:
        state: The training state. Only copies of it are used.
        step: A step from ``train_step``, compiled or not, or any pure function with that signature.
        make_batch: From a size to a batch of that many rows, as the data source yields it.
        start: The first size to try, a multiple of ``multiple``. Defaults to about 8. Smaller sizes, which layers such
            as batch norm may reject, are tried only if it does not fit.
        limit: The largest size to try.
        multiple: Try only multiples of this, such as the number of parts for ``accumulate``, or a size that is fast.

    Raises:
        TypeError: If an argument is not an int.
        ValueError: If an argument is out of range, or a batch lacks rows.
        RuntimeError: If not even the smallest size fits.
        Exception: Any other error of the step.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        >>> state = fx.init(torch.nn.Linear(4, 1), tx)
        >>> find_batch_size(state, step, lambda size: torch.ones(size, 4), limit=48)
        48
    """
    check_train_state(state, "find_batch_size(state, step, make_batch)")
    check_callable("make_batch", make_batch, "(size) -> batch")
    for name, value in (("start", 1 if start is None else start), ("limit", limit), ("multiple", multiple)):
        check_positive_int(name, value)
    if multiple > limit:
        raise ValueError(f"expected limit to be at least multiple={multiple}, got {limit}. Raise limit.")
    if start is None:
        start = _allowed(_START, limit, multiple)
    if start % multiple or start > limit:
        raise ValueError(
            f"expected start to be a multiple of multiple={multiple} and at most limit={limit}, got {start}. "
            f"Use {_allowed(start, limit, multiple)}."
        )
    make_batch = _with_all_rows(make_batch)
    # Sizes are in units of ``multiple``. Sizes up to ``fits`` fit, and sizes from ``too_large`` on do not.
    largest, size, reason = limit // multiple, start // multiple, ""
    fits, too_large = 0, largest + 1
    while too_large - fits > 1:
        problem = _out_of_memory(state, step, make_batch, size * multiple)
        if problem is None:
            fits = size
        else:
            too_large, reason = size, problem
        size = min(2 * fits, largest) if too_large > largest else (fits + too_large) // 2
    if not fits:
        raise RuntimeError(
            f"Not even a batch of {multiple} fits into memory ({reason}). Use a smaller model or a narrower dtype."
        )
    return fits * multiple


def _allowed(size: int, limit: int, multiple: int) -> int:
    """Returns the largest multiple up to a size and a limit, or the smallest one."""
    return max(min(size, limit) // multiple, 1) * multiple


def _with_all_rows(make_batch: Callable[[int], Batch]) -> Callable[[int], Batch]:
    """Returns the function, which then raises a ValueError for a batch that lacks rows."""
    first_size, first_shapes = 0, dict[str, Any]()

    def make(size: int) -> Batch:
        nonlocal first_size, first_shapes
        batch = make_batch(size)
        shapes: dict[str, Any] = {
            path: getattr(leaf, "shape", None)
            for path, leaf in zip(tree.paths(batch, "batch"), tree.leaves(batch), strict=True)
        }
        if not first_size:
            first_size, first_shapes = size, shapes
        # Other leaves may have a constant size, or the rows in another dimension.
        by_row = [path for path, shape in first_shapes.items() if shape and shape[0] == first_size]
        has_rows = any(shapes.get(path) and shapes[path][0] == size for path in by_row)
        changed = [path for path in by_row if shapes.get(path) != first_shapes[path]]
        if size != first_size and first_shapes.items() <= shapes.items():
            got = f"the shapes of make_batch({first_size})"
        elif changed and not has_rows:
            shape = shapes.get(changed[0])
            got = f"{changed[0]}: {shape and list(shape)}"
        else:
            return batch
        raise ValueError(
            f"expected make_batch({size}) to return a batch of {size} rows, got {got}. Repeat rows if there are too "
            "few, or set limit to their number."
        )

    return make


def _out_of_memory(state: TrainState, step: StepFn, make_batch: Callable[[int], Batch], size: int) -> str | None:
    """Returns the message of the error if memory was insufficient, or None."""
    try:
        return _take_steps(state, step, make_batch, size)
    except Exception as error:
        reason = _out_of_memory_reason(error)
        if reason is None:
            raise
        # Only the text is kept, because the error's traceback references tensors.
        return reason
    finally:
        gc.collect()
        if state.step.device.type != "cpu":
            torch.accelerator.empty_cache()


def _take_steps(state: TrainState, step: StepFn, make_batch: Callable[[int], Batch], size: int) -> str | None:
    """Takes steps, or returns why they would not fit."""
    # A separate compiled step, so that its graphs are freed after the trial.
    step = step.fresh() if isinstance(step, Compiled) else step if hasattr(step, "fires") else Step(step)
    if state.step.device.type == "cpu" and (reason := _too_large(state, step, make_batch(size))):
        return reason
    state = attach(state, step).copy()
    for _ in range(_STEPS):
        state, _ = step(state, to_device(make_batch(size), state.step.device))
    if state.step.device.type != "cpu":
        torch.accelerator.synchronize(state.step.device)
    return None


def _too_large(state: TrainState, step: Any, batch: Batch) -> str | None:
    available, needed = available_bytes(state.step.device), estimated_bytes(step, state, batch)
    if available is None or needed is None or needed <= available:
        return None
    return f"it takes about {format_bytes(needed)}, of which {format_bytes(available)} are free"


def _out_of_memory_reason(error: BaseException | None) -> str | None:
    while error is not None:
        reason = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(part in reason for part in _OUT_OF_MEMORY):
            return reason.strip().split("\n")[0] or type(error).__name__
        error = error.__cause__ or error.__context__
    return None
