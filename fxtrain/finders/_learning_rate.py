"""Learning rate range test: a short run in which the learning rate rises."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from fxtrain import metrics, optim
from fxtrain.core import (
    Batch,
    Record,
    StepFn,
    StepOutput,
    TrainState,
    check_int,
    check_train_state,
    did_you_mean,
    new_figure,
    style,
)
from fxtrain.core._html import facts, html_view, view
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.data import Exhausted, SourceLike, as_source, to_device
from fxtrain.fold import attach
from fxtrain.step import Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LearningRates(Record):
    """The loss during a learning rate range test; from ``find_learning_rate``.

    Args:
        rates: The learning rate of each step, in a geometric sequence.
        losses: The loss of each step, before its update.
        smoothed: The losses averaged with their neighbors. The suggestion is read from this curve.
        suggestion: The learning rate at which the smoothed loss falls fastest as a function of the learning rate's
            logarithm, or None if it never falls.
        diverged: Whether the loss diverged, which ends the search before the highest learning rate.

    Example:
        >>> LearningRates((0.1, 0.2, 0.4), (3.0, 1.0, 9.0), (3.0, 1.0, 9.0), suggestion=0.1, diverged=True)
        LearningRates: suggestion 0.1; 3 learning rates from 0.1 to 0.4, until the loss diverged
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    diverged: bool

    def __repr__(self) -> str:
        return f"LearningRates: {'; '.join(text for _, text in _rows(self))}"

    @html_view
    def _repr_html_(self) -> str:
        return view("LearningRates", facts(_rows(self)))

    def plot(self) -> Figure:
        """Plots the loss over the learning rate, with the suggestion. In a notebook, return the figure to show it.

        Returns:
            A ``matplotlib.figure.Figure``.

        Raises:
            ImportError: If matplotlib is not installed.

        Example:
            >>> found = LearningRates((0.1, 0.2, 0.4), (3.0, 1.0, 9.0), (3.0, 1.0, 9.0), suggestion=0.1, diverged=True)
            >>> [text.get_text() for text in found.plot().axes[0].get_legend().get_texts()]
            ['loss', 'smoothed', 'suggestion 0.1']
        """
        figure, ((axes,),) = new_figure(width=6.0, height=3.4)
        losses = np.array(self.losses)
        shown = np.isfinite(losses)
        axes.plot(self.rates, np.where(shown, losses, np.nan), color="tab:blue", alpha=0.5, linewidth=1, label="loss")
        # The smoothed curve leaves out losses that are not finite.
        axes.plot(np.array(self.rates)[shown], self.smoothed, color="tab:blue", linewidth=2, label="smoothed")
        if self.suggestion is not None:
            label = f"suggestion {self.suggestion:.2g}"
            axes.axvline(self.suggestion, color="tab:orange", linestyle="--", label=label)
        if self.smoothed:
            # The losses at the end of a diverging run would make the rest of the curve flat.
            low, high = min(self.smoothed), max(self.smoothed[0], float(np.median(self.smoothed)))
            axes.set_ylim(low - 0.1 * (high - low or 1), high + 0.5 * (high - low or 1))
        axes.set_xscale("log")
        axes.set_xlabel("learning rate", fontsize="small")
        style(axes)
        axes.legend(fontsize="small", frameon=False)
        return figure


@with_short_traceback
def find_learning_rate(
    state: TrainState,
    step: StepFn,
    data: SourceLike,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    metric: str = "loss",
    factor: float = 4.0,
) -> LearningRates:
    """Suggests a learning rate, by a short run whose learning rate rises from ``low`` to ``high``.

    ``fxtrain.optim.set_hyperparams`` sets the learning rate between steps, so it must be part of the optimizer state,
    and a compiled step is compiled once. The run uses a copy of ``state``.

    The suggestion is the learning rate at which the smoothed loss falls fastest. Treat it as an order of magnitude, and
    in a schedule as the peak. It depends on how far the state is trained, so run the search before training.

    Args:
        state: The training state, from ``init``.
        step: A step from ``train_step``, compiled or not.
        data: As in ``fit``. One-shot iterators are consumed.
        low: The learning rate of the first step.
        high: The learning rate of the last step.
        steps: The number of steps, at least 5.
        metric: The metric that should fall, by its name in the step's output.
        factor: Divergence threshold, above 1. The search ends if the loss is not finite, or if its running mean exceeds
            its minimum by more than ``factor - 1`` times the larger of the minimum's absolute value and the decrease so
            far.

    Raises:
        TypeError: If ``state`` is not the state of one run, or ``steps`` is not an int.
        ValueError: If an argument is out of range, the learning rate is not in the optimizer state or follows a
            schedule, or the data ends before the search does.
        KeyError: If the step's output has no such metric.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=0.1)
        >>> step = fx.train_step(lambda model, batch: (model["w"] - batch).square(), tx)
        >>> state = fx.init({"w": torch.tensor(9.0)}, tx)
        >>> found = find_learning_rate(state, step, [torch.tensor(1.0), torch.tensor(2.0)], low=1e-4)
        >>> found.diverged, 0.001 < found.suggestion < 1
        (True, True)
    """
    check_train_state(state, "find_learning_rate(state, step, data)")
    if not 0 < low < high < math.inf:
        raise ValueError(f"expected 0 < low < high < inf, got low={low!r} and high={high!r}.")
    check_int("steps", steps, minimum=5)
    if not factor > 1:
        raise ValueError(f"expected factor to be above 1, got {factor!r}.")
    step = step if hasattr(step, "fires") else Step(step)
    state = _with_learning_rate(attach(state, step).copy(), low)
    rates, losses, diverged = [], [], False
    batches = _batches(data, state)
    mean = best = first = weight = 0.0
    for rate in np.geomspace(low, high, steps).tolist():
        # Stop requests are cleared, because a stopped state is a fixed point of the step.
        without_stop = state.due._replace(stop=torch.zeros_like(state.due.stop))
        state = _with_learning_rate(state.replace(due=without_stop), rate)
        state, output = step(state, to_device(next(batches), state.step.device))
        loss = _measured(output, metric)
        rates.append(rate)
        losses.append(loss)
        # Bias-corrected moving average over about ten steps.
        mean, weight = 0.9 * mean + 0.1 * loss, 0.9 * weight + 0.1
        now = mean / weight
        first = now if len(losses) == 1 else first
        best = now if len(losses) == 1 else min(best, now)
        diverged = not math.isfinite(loss) or now > best + (factor - 1) * max(abs(best), first - best)
        if diverged:
            break
    smoothed = _smoothed(losses)
    return LearningRates(tuple(rates), tuple(losses), tuple(smoothed), _steepest(rates, smoothed), diverged)


def _with_learning_rate(state: TrainState, rate: float) -> TrainState:
    try:
        return state.replace(opt_state=optim.set_hyperparams(state.opt_state, learning_rate=rate))
    except ValueError as error:
        raise ValueError(
            f"find_learning_rate cannot set the learning rate: {error} For example, pass to init and train_step: "
            "tx = fx.optim.inject_hyperparams(fx.optim.adamw)(learning_rate=3e-4)."
        ) from None


def _batches(data: SourceLike, state: TrainState) -> Iterator[Batch]:
    """Yields the batches from the state's data position on."""
    source = as_source(data, seed=int(state.seed))
    position = begin = int(state.position)
    try:
        while True:
            try:
                try:
                    batch = source[position]
                except Exhausted:
                    batch = source[position]  # in the next epoch
            except Exhausted:
                raise ValueError(
                    f"expected a batch for each step, got the end of the data after {position - begin} batches. Pass "
                    "data that can be read again, or fewer steps."
                ) from None
            yield batch
            position += 1
    finally:
        source.close()


def _measured(output: StepOutput, metric: str) -> float:
    found = metrics.compute(output.metrics)
    if metric not in found:
        listed = ", ".join(map(repr, found)) or "it has none"
        raise KeyError(f"expected a metric of the step ({listed}), got {metric!r}.{did_you_mean(metric, found)}")
    return float(found[metric])


def _smoothed(losses: list[float]) -> list[float]:
    """Returns each loss averaged with its neighbors by triangular weights, with fewer neighbors at the ends."""
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
    until = int(np.argmin(smoothed)) + 1  # a fall after the minimum is noise
    slopes = np.gradient(smoothed, np.log(rates[: len(smoothed)]))[:until]
    steepest = int(np.argmin(slopes))
    return rates[steepest] if slopes[steepest] < 0 else None


def _rows(found: LearningRates) -> list[tuple[str, str]]:
    suggested = "none, because the loss never fell" if found.suggestion is None else f"{found.suggestion:.2g}"
    end = "the loss diverged" if found.diverged else "the highest"
    rates = f"{len(found.rates)} learning rates from {found.rates[0]:.2g} to {found.rates[-1]:.2g}, until {end}"
    return [("suggestion", f"suggestion {suggested}"), ("rates", rates)]
