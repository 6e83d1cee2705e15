"""Learning rate: one to begin with, from a short run in which it rises."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from fxtrain import metrics, optim
from fxtrain.core import TrainState, check_int
from fxtrain.data import Exhausted, adapt
from fxtrain.fold import attach
from fxtrain.loop._evaluate import to_device
from fxtrain.step import Step


@dataclasses.dataclass(frozen=True, repr=False)
class LearningRates:
    """How the loss went while the learning rate rose; from ``lr_finder``.

    Args:
        rates: One for each step that was taken, rising by the same factor.
        losses: What each step measured, before it moved.
        smoothed: The losses, averaged with those around them; the curve that the suggestion is read from.
        suggestion: The rate at which the smoothed loss falls fastest, by the logarithm of the rate; None where it
            falls nowhere.
        diverged: Whether the loss left all bounds, which ends the search before the highest rate.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    diverged: bool

    def __repr__(self) -> str:
        return f"LearningRates: {'; '.join(text for _, text in _facts(self))}"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{label}</th><td>{html.escape(text)}</td></tr>" for label, text in _facts(self))
        return f"<table><caption>LearningRates</caption>{rows}</table>"


def lr_finder(
    state: TrainState,
    step: Callable[..., Any],
    data: Any,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    metric: str = "loss",
    factor: float = 4.0,
) -> LearningRates:
    """A learning rate to begin with, from some steps whose rate rises from ``low`` to ``high``.

    The rate is set between steps, by ``fxtrain.optim.set_hyperparams``, so the optimizer has to keep it in its memory,
    and a compiled step is compiled once. Everything happens to a copy: there is nothing to restore afterwards.

    The suggestion is where the smoothed loss falls fastest; take it as an order of magnitude, and for a schedule as its
    peak. It depends on how far the state is trained already: ask at the beginning.

    Args:
        state: From ``init``.
        step: From ``train_step``, compiled or not.
        data: As ``fit`` takes it; what can be read once only is used up.
        low: The rate of the first step.
        high: The rate of the last one.
        steps: How many, 5 or more.
        metric: What is to fall, of what the step measures.
        factor: The loss has diverged, and the search ends, where it is not finite, or where its running mean has risen
            from its least value by ``factor - 1`` times that value or what it had fallen by, whichever is more.

    Raises:
        ValueError: If an argument is out of its range, the learning rate is not in the optimizer's memory or follows a
            schedule, or the data is empty.
        KeyError: If the step measures none of this name.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=0.1)
        >>> step = fx.train_step(lambda model, batch: (model["w"] - batch).square(), tx)
        >>> state = fx.init({"w": torch.tensor(9.0)}, tx)
        >>> found = lr_finder(state, step, [torch.tensor(1.0), torch.tensor(2.0)], low=1e-4)
        >>> found.diverged, 0.001 < found.suggestion < 1
        (True, True)
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"low={low!r} and high={high!r}: two rates, 0 < low < high, are wanted.")
    check_int("steps", steps, minimum=5)
    if not factor > 1:
        raise ValueError(f"factor={factor!r}: more than 1 is wanted.")
    step = step if hasattr(step, "fires") else Step(step)
    state = _with_rate(attach(state, step).copy(), low)
    rates, losses, diverged = [], [], False
    batches = _batches(data, state)
    mean = best = first = weight = 0.0
    for rate in np.geomspace(low, high, steps).tolist():
        # A stopped state is a fixed point, and its loss would say nothing of the rate.
        go_on = state.due._replace(stop=torch.zeros_like(state.due.stop))
        state, output = step(_with_rate(state.replace(due=go_on), rate), to_device(next(batches), state.step.device))
        loss = _measured(output, metric)
        rates.append(rate)
        losses.append(loss)
        # The mean over about the last ten steps, unbiased at the beginning.
        mean, weight = 0.9 * mean + 0.1 * loss, 0.9 * weight + 0.1
        now = mean / weight
        first = now if len(losses) == 1 else first
        best = now if len(losses) == 1 else min(best, now)
        diverged = not math.isfinite(loss) or now > best + (factor - 1) * max(abs(best), first - best)
        if diverged:
            break
    smoothed = _smoothed(losses)
    return LearningRates(tuple(rates), tuple(losses), tuple(smoothed), _steepest(rates, smoothed), diverged)


def _with_rate(state: TrainState, rate: float) -> TrainState:
    try:
        return state.replace(opt_state=optim.set_hyperparams(state.opt_state, learning_rate=rate))
    except ValueError as error:
        raise ValueError(
            f"lr_finder sets learning_rate between steps, and cannot here. {error} For example, for init and for "
            "train_step: tx = fxtrain.optim.inject_hyperparams(fxtrain.optim.adamw)(learning_rate=3e-4)."
        ) from None


def _batches(data: Any, state: TrainState) -> Iterator[Any]:
    """The batches from the state's position on."""
    source = adapt(data, seed=int(state.seed))
    position = begin = int(state.position)
    try:
        while True:
            try:
                try:
                    batch = source[position]
                except Exhausted:
                    batch = source[position]  # of the next epoch
            except Exhausted:
                raise ValueError(
                    f"The data ended after {position - begin} batches: give data that can be read again, or ask for "
                    "fewer steps."
                ) from None
            yield batch
            position += 1
    finally:
        source.close()


def _measured(output: Any, metric: str) -> float:
    found = metrics.compute(output.metrics)
    if metric not in found:
        raise KeyError(f"metric={metric!r}: the step measures {', '.join(map(repr, found)) or 'nothing'}; name one.")
    return float(found[metric])


def _smoothed(losses: list[float]) -> list[float]:
    """Each loss averaged with those around it, the less the farther away; fewer of them at the ends."""
    values = np.array([loss for loss in losses if math.isfinite(loss)])
    reach = max(2, len(values) // 20)
    weights = 1 - np.abs(np.arange(-reach, reach + 1)) / (reach + 1)
    if not len(values):
        return []
    padded = np.convolve(values, weights)[reach : reach + len(values)]
    return (padded / np.convolve(np.ones_like(values), weights)[reach : reach + len(values)]).tolist()


def _steepest(rates: list[float], smoothed: list[float]) -> float | None:
    if len(smoothed) < 3:
        return None
    until = int(np.argmin(smoothed)) + 1  # what falls after it has risen is noise
    slopes = np.gradient(smoothed, np.log(rates[: len(smoothed)]))[:until]
    steepest = int(np.argmin(slopes))
    return rates[steepest] if slopes[steepest] < 0 else None


def _facts(found: LearningRates) -> list[tuple[str, str]]:
    suggested = "none, as the loss fell nowhere" if found.suggestion is None else f"{found.suggestion:.2g}"
    end = "the loss diverged" if found.diverged else "the highest rate"
    rates = f"{len(found.rates)} rates from {found.rates[0]:.2g} to {found.rates[-1]:.2g}, until {end}"
    return [("suggestion", f"suggestion {suggested}"), ("rates", rates)]
