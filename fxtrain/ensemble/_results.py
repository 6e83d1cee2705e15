"""The best member of a batch of runs, and the history of one."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fxtrain.core import EVALUATED, History, TrainState, check_choice, did_you_mean
from fxtrain.core._members import is_stacked, member_name
from fxtrain.ensemble._states import index_of_member, member, stacked


class _Result(Protocol):
    @property
    def state(self) -> TrainState: ...

    @property
    def history(self) -> History: ...


def best(result: _Result, metric: str = "loss", *, mode: Literal["min", "max"] = "min") -> TrainState:
    """Returns the state of the best member, from which a single run continues.

    Args:
        result: From ``fit`` with a batch of runs.
        metric: A metric of each member's last evaluation, such as ``"loss"``. Or a published name, such as
            ``"train/loss"``, whose last value in ``result.history`` decides.
        mode: ``"min"`` if lower is better, or ``"max"``. NaN is never the best.

    Raises:
        KeyError: If there is no such metric.
        ValueError: If it is the result of one run, or the metric is NaN for all members.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: (model["w"] - batch).square(), tx)
        >>> runs = fx.ensemble.stack([fx.init({"w": torch.tensor(w)}, tx) for w in (0.0, 3.0, 2.0)])
        >>> result = fx.fit(runs, step, [torch.tensor(2.5)], steps=1)
        >>> fx.ensemble.best(result, "train/loss").params
        {'w': tensor(2.9000)}
    """
    check_choice("mode", mode, ("min", "max"))
    state = stacked(result.state)
    values = _values(result, state, metric).double().cpu()
    values = values if mode == "min" else -values
    if bool(values.isnan().all()):
        raise ValueError(
            f"expected a value of {metric!r} for one or more members, got nan for all. Choose another metric."
        )
    known = (~values.isnan()).nonzero().flatten()  # not NaN as infinity, which members may have
    return member(state, int(known[values[known].argmin()]))


def _values(result: _Result, state: TrainState, metric: str) -> Tensor:
    evaluated: Any = state.slots.get(EVALUATED)
    measured: dict[str, Tensor] = {} if evaluated is None else evaluated["metrics"]
    if metric in measured:
        return measured[metric]
    names = [member_name(metric, index) for index in range(len(state.step))]
    if any(name in result.history for name in names):
        nan = float("nan")
        last = [_last_number(result.history, name) if name in result.history else nan for name in names]
        return torch.tensor(last)
    published = sorted({name.partition("/member_")[0] for name in result.history if "/member_" in name})
    known = [*measured, *published]
    raise KeyError(
        f"expected a metric of the members, got {metric!r}.{did_you_mean(metric, known)} Metrics: "
        f"{', '.join(map(repr, known)) or 'none. Give fit an eval_step'}."
    )


def _last_number(history: History, name: str) -> float:
    """Returns the last value that is a number: a member that has stopped publishes nan."""
    values = history[name].values
    values = values[values == values]
    return float(values[-1]) if len(values) else float("nan")


def history(result: _Result, index: int) -> History:
    """Returns the history of one member, with the names of a single run, until it stopped.

    If the others rewind to before its stop, the points of the steps that they take again are nan.

    Args:
        result: From ``fit`` with a batch of runs.
        index: The member. Negative indices count from the end.

    Raises:
        ValueError: If it is the result of one run.
        TypeError: If ``index`` is not an int.
        IndexError: If there is no such member.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: (model["w"] - batch).square(), tx)
        >>> runs = fx.ensemble.stack([fx.init({"w": torch.tensor(w)}, tx) for w in (0.0, 1.0)])
        >>> result = fx.fit(runs, step, [torch.tensor(1.0)], steps=2)
        >>> [round(float(value), 2) for value in fx.ensemble.history(result, 0)["train/loss"].values]
        [1.0, 0.64]
    """
    state = result.state
    if not is_stacked(state):
        raise ValueError("expected the result of a batch of runs, got that of one run. Its history is result.history.")
    index = index_of_member(index, len(state.step))
    end, tail = int(state.step[index]), member_name("", index)
    points: dict[str, tuple[list[int], list[float]]] = {}
    for name in result.history:
        if name.endswith(tail):
            steps, values = result.history[name]
            kept = steps <= end
            if kept.any():
                points[name.removesuffix(tail)] = steps[kept].tolist(), values[kept].tolist()
    return History(points)
