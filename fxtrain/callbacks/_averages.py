"""Averages of the weights, kept in slots and read through views. Live weights are never swapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Control, Scalar, TrainState, Tree, Updated, check_int, describe, did_you_mean, wide_dtype
from fxtrain.equivalents import with_known_arguments
from fxtrain.fold import Handler, When, as_trigger, stateful
from fxtrain.optim._leafwise import wide


class AveragedState(NamedTuple):
    """State of ``ema`` and ``swa``."""

    # (params, buffers) or (params, ()) in float32 or wider. Leaves that are not floating or complex hold the latest.
    average: Tree
    weight: Tensor  # float64 []: 1, or with debias the total weight of the parameters in the average
    count: Tensor  # int64 []: updates in the average


_Mean = Callable[[AveragedState], tuple[Scalar, Tensor]]
"""Maps the callback state to the new value's share of the average and to the new weight, [] each."""


@with_known_arguments
def ema(
    decay: float,
    *,
    debias: bool = False,
    warmup: bool = False,
    every: When = 1,
    start: int = 0,
    buffers: bool = False,
    model: str | None = None,
    name: str = "ema",
) -> Handler:
    """Keeps an exponential moving average of the parameters, updated at each step that is not skipped.

        average = d average + (1 - d) params        d = decay, or with ``warmup`` min(decay, (1 + n) / (10 + n))

    It runs inside the compiled step, once per step and not per microbatch. ``averaged`` returns the state with the
    average in place of the parameters.

    Args:
        decay: Between 0 and 1, exclusive.
        debias: Whether the average starts at zero with a bias correction, as Adam's moments do, instead of at the
            parameters.
        warmup: Whether the decay rises with n, the number of updates averaged so far, so that the first parameters are
            forgotten faster.
        every: When to average: a number of steps, or a trigger, evaluated inside the step.
        start: Up to and including this step, the average equals the parameters.
        buffers: Whether to average floating buffers too, such as batch norm statistics. If not, ``averaged`` uses the
            live ones.
        model: In a step of several models, the one at whose updates to average. All parameters are averaged.
        name: The slot.

    Raises:
        ValueError: If an argument is out of range. When it runs, if ``model`` is None and an update names one.

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
        raise ValueError(f"expected decay to be between 0 and 1, got {describe(decay)}.")
    check_int("start", start, minimum=0)

    def mean(slot: AveragedState) -> tuple[Scalar, Tensor]:
        # 1 - d in float64, because rounding d to float32 first would cause a relative error of up to 3e-8 / (1 - d).
        share: Scalar = 1 - decay
        if warmup:  # 1 - (1 + n) / (10 + n)
            share = (9 / (10 + slot.count.to(slot.weight.dtype))).clamp(min=share)
        if debias:
            weight = slot.weight + share * (1 - slot.weight)
            # The stored average is already divided by its weight, so a view only reads it.
            return share / weight, weight
        return share, slot.weight

    return _averaging(name, mean, every=every, start=start, buffers=buffers, model=model, weight=0.0 if debias else 1.0)


@with_known_arguments
def swa(*, start: int, every: When = 1, buffers: bool = False, model: str | None = None, name: str = "swa") -> Handler:
    """Keeps the equal-weight mean of the parameters at the steps of ``every`` after ``start``.

        average = average + (params - average) / (n + 1)

    It runs inside the compiled step.

    Batch norm statistics stay those of the live parameters. Recompute them for the averaged ones with
    ``fxtrain.recompute_statistics``, or average them too.

    Args:
        start: Up to and including this step, the average equals the parameters.
        every: When to average: a number of steps, or a trigger, evaluated inside the step.
        buffers: As for ``ema``.
        model: In a step of several models, the one at whose updates to average. All parameters are averaged.
        name: The slot.

    Raises:
        ValueError: If an argument is out of range. When it runs, if ``model`` is None and an update names one.

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
    check_int("start", start, minimum=0)

    def mean(slot: AveragedState) -> tuple[Scalar, Tensor]:
        return 1 / (slot.count.to(slot.weight.dtype) + 1), slot.weight

    return _averaging(name, mean, every=every, start=start, buffers=buffers, model=model, weight=1.0)


def averaged(state: TrainState, name: str = "ema") -> TrainState:
    """Returns the state with averaged parameters in place of the live ones, for ``evaluate`` or ``fit(eval_view=)``.

    Args:
        state: Any state with a slot of ``ema`` or ``swa``. It is not modified.
        name: The slot.

    Raises:
        KeyError: If the state has no such slot.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.attach(fx.init({"w": torch.tensor(4.0)}), ema(0.5))
        >>> state = state.replace(params={"w": torch.tensor(2.0)})
        >>> float(averaged(state).params["w"])
        4.0
    """
    if name not in state.slots or not isinstance(state.slots[name], AveragedState):
        there = [key for key, value in state.slots.items() if isinstance(value, AveragedState)]
        raise KeyError(
            f"expected a state with the average {name!r}, got one with {', '.join(map(repr, there)) or 'none'}."
            f"{did_you_mean(name, there)} Give fit the callback that keeps it, such as fxtrain.callbacks.ema(0.99)."
        )
    params, buffers = state.slots[name].average
    live = (state.params, () if buffers == () else state.buffers)
    params, buffers = tree.map(lambda average, now: average.to(now.dtype), (params, buffers), live)
    return state.replace(params=params, **({} if buffers == () else {"buffers": buffers}))


def _averaging(
    name: str, mean: _Mean, *, every: When, start: int, buffers: bool, model: str | None, weight: float
) -> Handler:
    """Returns a callback that averages the parameters.

    Args:
        name: The slot.
        mean: The kind of average.
        every: When to average: a number of steps, or a trigger, evaluated inside the step.
        start: Average after this step.
        buffers: Whether to average buffers.
        model: The model at whose updates to average.
        weight: Initial weight.
    """
    due = as_trigger(every)

    def init(state: TrainState) -> AveragedState:
        zero = torch.zeros_like(state.step)
        first = torch.tensor(weight, dtype=wide_dtype(zero.device), device=zero.device)
        # In half precision, an average would stop moving once its updates round to zero.
        average = tree.map(_wide, (state.params, state.buffers if buffers else ()))
        return AveragedState(average, first, zero)

    def update(state: TrainState, event: Updated, slot: AveragedState) -> tuple[AveragedState, Control]:
        if event.model != model:
            if None in (model, event.model):
                raise ValueError(
                    f"expected an update of {_named(model)} for {name}, got one of {_named(event.model)}. Choose the "
                    f"model at whose updates to average: model={event.model!r}."
                )
            return slot, Control()
        now = (state.params, state.buffers if buffers else ())
        counts = ~event.skipped & (event.step > start) & due(event)
        before = ~event.skipped & (event.step <= start)
        share, new_weight = mean(slot)

        def averaged_leaf(average: Tensor, value: Tensor) -> Tensor:
            if not value.is_floating_point() and not value.is_complex():
                return torch.where(counts | before, value, average)
            value = _wide(value)
            real = value.real if value.is_complex() else value
            by = share.to(real.dtype) if isinstance(share, Tensor) else share
            return torch.where(counts, torch.lerp(average, value, by), torch.where(before, value, average))

        average = tree.map(averaged_leaf, slot.average, now)
        return AveragedState(average, torch.where(counts, new_weight, slot.weight), slot.count + counts), Control()

    return stateful(name, init, update)


def _named(model: str | None) -> str:
    return "all models" if model is None else f"the model {model!r}"


def _wide(leaf: Tensor) -> Tensor:
    return wide(leaf) if leaf.is_floating_point() or leaf.is_complex() else leaf
