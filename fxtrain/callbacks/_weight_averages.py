"""Averaging: averages of the weights, kept inside the step; evaluated as a view, never swapped into the live ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Control, TrainState, Updated, check_int, check_positive_int, wide_dtype
from fxtrain.fold import Handler, stateful
from fxtrain.optim._leaves import Scalar, wide


class AveragedState(NamedTuple):
    """The memory of ``ema`` and of ``swa``."""

    average: Any  # like (params, buffers), or (params, ()), float32 at least: floating leaves averaged, others the last
    weight: Tensor  # float64 []: 1, or if debiased the share of the average that comes from parameters seen
    count: Tensor  # int64 []: updates averaged


def ema(
    decay: float,
    *,
    debias: bool = False,
    warmup: bool = False,
    every: int = 1,
    start: int = 0,
    buffers: bool = False,
    name: str = "ema",
) -> Handler:
    """Keeps an exponential moving average of the parameters, updated once per step that was not skipped.

        average = d average + (1 - d) params        d = decay, or with ``warmup`` min(decay, (1 + n) / (10 + n))

    It runs inside the compiled step, where the microbatches are past: give it to ``train_step(..., callbacks=)`` as
    well as to ``fit``. ``averaged`` is the state with the average in the place of its parameters.

    Args:
        decay: Between 0 and 1.
        debias: Whether the average begins at zero and is corrected for that, as Adam's moments are, instead of
            beginning at the parameters.
        warmup: Whether the decay rises with n, the updates averaged so far, so that the first parameters are
            forgotten faster.
        every: Average at the multiples of so many steps.
        start: Until this step the average is the parameters themselves.
        buffers: Whether to average floating buffers too, such as the statistics of batch norm; else a view has the
            live ones.
        name: The slot.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch, fxtrain as fx
        >>> average, tx = ema(0.5), fx.optim.sgd(1.0)
        >>> step = fx.train_step(lambda model, batch: model["w"] * batch, tx, callbacks=average)
        >>> state = fx.attach(fx.init({"w": torch.tensor(4.0)}, tx), average)
        >>> state, _ = step(state, torch.tensor(2.0))
        >>> float(state.params["w"]), float(averaged(state).params["w"])
        (2.0, 3.0)

    References:
        Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay={decay!r}: between 0 and 1 is wanted.")
    check_positive_int("every", every)
    check_int("start", start, minimum=0)

    def mean(memory: AveragedState) -> tuple[Scalar, Tensor]:
        # The share of the new value, 1 - d, as rounding d to float32 first would change it by up to 3e-8 / (1 - d).
        share: Scalar = 1 - decay
        if warmup:  # 1 - (1 + n) / (10 + n)
            share = (9 / (10 + memory.count.to(memory.weight.dtype))).clamp(min=share)
        if debias:
            weight = memory.weight + share * (1 - memory.weight)
            # The average is kept divided by its weight, so that a view has no more to do than to read it.
            return share / weight, weight
        return share, memory.weight

    return _averaging(name, mean, every=every, start=start, buffers=buffers, weight=0.0 if debias else 1.0)


def swa(*, start: int, every: int = 1, buffers: bool = False, name: str = "swa") -> Handler:
    """Keeps the plain mean of the parameters at the multiples of ``every`` steps after ``start``.

        average = average + (params - average) / (n + 1)

    Batch norm's statistics are those of the live parameters: for a model that has some, recompute them for the averaged
    ones with ``fxtrain.recompute_statistics`` before they are used, or average them too.

    Args:
        start: Steps before the first that counts. Until then the average is the parameters themselves.
        every: Steps from one to the next.
        buffers: As for ``ema``.
        name: The slot.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch, fxtrain as fx
        >>> mean, tx = swa(start=1), fx.optim.sgd(1.0)
        >>> step = fx.train_step(lambda model, batch: model["w"] * batch, tx, callbacks=mean)
        >>> state = fx.attach(fx.init({"w": torch.tensor(4.0)}, tx), mean)
        >>> for _ in range(3):
        ...     state, _ = step(state, torch.tensor(1.0))
        >>> float(state.params["w"]), float(averaged(state, "swa").params["w"])
        (1.0, 1.5)

    References:
        Izmailov et al., "Averaging weights leads to wider optima and better generalization", 2018.
    """
    check_positive_int("every", every)
    check_int("start", start, minimum=0)

    def mean(memory: AveragedState) -> tuple[Scalar, Tensor]:
        return 1 / (memory.count.to(memory.weight.dtype) + 1), memory.weight

    return _averaging(name, mean, every=every, start=start, buffers=buffers, weight=1.0)


def averaged(state: TrainState, name: str = "ema") -> TrainState:
    """The state with averaged parameters in the place of the live ones: for ``evaluate``, and ``fit(eval_view=)``.

    Args:
        state: Any state with such a slot. It stays as it is.
        name: The slot.

    Raises:
        KeyError: If there is no such slot.
    """
    if name not in state.slots or not isinstance(state.slots[name], AveragedState):
        there = ", ".join(repr(slot) for slot, memory in state.slots.items() if isinstance(memory, AveragedState))
        raise KeyError(f"The state has no average {name!r}; there {f'is {there}' if there else 'is none'}.")
    params, buffers = state.slots[name].average
    live = (state.params, () if buffers == () else state.buffers)
    params, buffers = tree.map(lambda average, now: average.to(now.dtype), (params, buffers), live)
    return state.replace(params=params, **({} if buffers == () else {"buffers": buffers}))


def _averaging(
    name: str,
    mean: Callable[[AveragedState], tuple[Scalar, Tensor]],
    *,
    every: int,
    start: int,
    buffers: bool,
    weight: float,
) -> Handler:
    """A callback that averages.

    Args:
        name: The slot.
        mean: From the memory to the share of the new value in the average, and the weight: each [].
        every: At the multiples of so many steps.
        start: After this step.
        buffers: Whether to average buffers.
        weight: The first one.
    """

    def init(state: TrainState) -> AveragedState:
        zero = torch.zeros_like(state.step)
        first = torch.tensor(weight, dtype=wide_dtype(zero.device), device=zero.device)
        # In half precision an average would stop moving once its steps are below its last bit.
        average = tree.map(_wide, (state.params, state.buffers if buffers else ()))
        return AveragedState(average, first, zero)

    def update(state: TrainState, event: Updated, memory: AveragedState) -> tuple[AveragedState, Control]:
        now = (state.params, state.buffers if buffers else ())
        counts = ~event.skipped & (event.step > start) & (event.step % every == 0)
        before = ~event.skipped & (event.step <= start)
        share, new_weight = mean(memory)

        def averaged_leaf(average: Tensor, value: Tensor) -> Tensor:
            if not value.is_floating_point() and not value.is_complex():
                return torch.where(counts | before, value, average)
            value = _wide(value)
            real = value.real if value.is_complex() else value
            by = share.to(real.dtype) if isinstance(share, Tensor) else share
            moved = torch.lerp(average, value, by)
            return torch.where(counts, moved, torch.where(before, value, average))

        return (
            AveragedState(
                average=tree.map(averaged_leaf, memory.average, now),
                weight=torch.where(counts, new_weight, memory.weight),
                count=memory.count + counts,
            ),
            Control(),
        )

    return stateful(name, init, update)


def _wide(leaf: Tensor) -> Tensor:
    return wide(leaf) if leaf.is_floating_point() or leaf.is_complex() else leaf
