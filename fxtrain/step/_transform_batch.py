"""Transforms the batch of a step from the training state, with random samples that resume exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxtrain import rng, tree
from fxtrain._torch_internals.tracing import is_traced
from fxtrain.core import Batch, TrainState, describe
from fxtrain.data import for_step
from fxtrain.model import versions
from fxtrain.model._unseeded_values import HostSeeding
from fxtrain.rng import _host_generators as host
from fxtrain.step._check_function import ContractError, place_of, refuse_unless_transform

if TYPE_CHECKING:
    from fxtrain.distributed import Mesh

TransformBatch = Callable[[TrainState, Batch], Batch]
"""A pure function from the state before a step and its batch to the batch that the step uses."""


def seeded_transform(
    transform: TransformBatch, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch, int | Tensor], Batch]:
    """Returns a function ``(state, batch, index) -> batch`` whose random samples depend on seed, step and index only.

    Args:
        transform: The function given to ``train_step`` or ``eval_step``.
        mesh: The ranks among which the batch is split.

    Raises:
        TypeError: If ``transform`` does not take a state and a batch. When it runs, if it does not return a batch.
        RuntimeError: When it runs uncompiled, if it writes into the state or into the batch in place.
    """
    refuse_unless_transform(transform)

    def transformed(state: TrainState, batch: Batch, index: int | Tensor) -> Batch:
        key = rng.key(state.seed, stream=rng.Stream.BATCH, step=state.step, microbatch=index)
        if mesh is not None:
            from fxtrain.distributed._examples import on_rank

            key = on_rank(key, mesh, batch)
        if torch.compiler.is_dynamo_compiling():
            with rng.functional(key):
                return transform(state, batch)
        try:
            given = [leaf for leaf in tree.leaves((state, batch)) if isinstance(leaf, Tensor)]
            before = versions(given)
            result = _sampled(transform, key, state, batch)
            if versions(given) != before:
                raise RuntimeError(
                    f"expected {place_of(transform)} to leave the state and the batch unchanged, got an in-place "
                    "write. Write into a clone."
                )
            return _checked(transform, result)
        except Exception as error:
            error.add_note(f"Raised by transform_batch={place_of(transform)}.")
            raise

    return transformed


def _sampled(transform: TransformBatch, key: rng.Key, state: TrainState, batch: Batch) -> Batch:
    """Calls the function with torch's random samples, and those of Python and NumPy, taken from the key."""
    seeding = HostSeeding(key, transform, compare=False)
    if is_traced():  # raises if the function samples on the host
        with seeding(), rng.functional(key):
            return transform(state, batch)
    before = host.mark()
    with rng.functional(key):
        result = transform(state, batch)
    if before is None or not host.rewind_if_moved(before):
        return result
    with seeding(), rng.functional(key):
        return transform(state, batch)


def _checked(transform: TransformBatch, result: Batch) -> Batch:
    is_step_result = isinstance(result, tuple) and any(isinstance(part, TrainState) for part in result)
    if result is None or isinstance(result, TrainState) or is_step_result:
        raise ContractError(
            f"expected {place_of(transform)} to return a batch, got {describe(result)}. Return the new batch alone."
        )
    return for_step(result)
