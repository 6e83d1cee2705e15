"""Keeps the best weights of a run and restores them at its end."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

from torch import Tensor

from fxtrain import tree
from fxtrain.callbacks._watched_metric import (
    Best,
    Better,
    Metric,
    called,
    direction,
    improve,
    measured,
    needing,
    no_best,
)
from fxtrain.core import Control, EvalEnd, FitEnd, TrainState, Tree, describe
from fxtrain.equivalents import with_known_arguments
from fxtrain.fold import Handler, slotted


class Checkpoints(Protocol):
    """Where the best checkpoint is read from, such as ``fxtrain.checkpointer``."""

    def steps(self) -> list[int]: ...

    def restore(self, like: TrainState, *, step: int) -> TrainState: ...


class RestoreBestState(NamedTuple):
    """State of ``restore_best``."""

    best: Tensor  # float64 []: the best value so far; before the first, the worst value (nan if mode is a function)
    step: Tensor  # int64 []: its step; -1 before the first
    kept: Tree  # its (params, buffers), or () with a checkpointer


@with_known_arguments
def restore_best(
    metric: Metric,
    *,
    mode: str | Better = "min",
    checkpointer: Checkpoints | None = None,
    name: str = "restore_best",
) -> Handler:
    """Puts the parameters and buffers of the best evaluation into ``result.state`` at the end of the session.

    Live parameters never change during the run. Without a checkpointer, a copy of the best ones is kept in the slot.
    With one, each improvement requests a save, and the best checkpoint is read at the end.

    Args:
        metric: Metric name at ``EvalEnd``, or a function of all metrics there.
        mode: ``"min"`` if lower is better, or ``"max"``. Or a function ``(value, best) -> improved`` of tensors of
            shape []. Its ``best`` is nan before the first evaluation.
        checkpointer: The run's own checkpointer, which must retain the best checkpoint. Not for a batch of runs.
        name: The slot.

    Raises:
        TypeError: If ``checkpointer`` is not a checkpointer.
        ValueError: If ``mode`` is unknown, or, at the end, if the best checkpoint was deleted.
        KeyError: At run time, if the evaluation has no such metric.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(restore_best("loss"))
        >>> state = fx.attach(fx.init({"w": torch.tensor(0.0)}), callback)
        >>> for step, loss in enumerate([3.0, 2.0, 2.5]):
        ...     state = state.replace(params={"w": torch.tensor(float(step))})
        ...     state, _ = callback(state, fx.EvalEnd(step=step, metrics={"loss": torch.tensor(loss)}))
        >>> float(state.params["w"]), float(callback(state, fx.FitEnd(step=2, reason=""))[0].params["w"])
        (2.0, 1.0)
    """
    if checkpointer is not None and not hasattr(checkpointer, "restore"):
        raise TypeError(f"expected checkpointer to be a checkpointer or None, got {describe(checkpointer)}.")
    better, worst = direction(mode)
    what = called(metric)

    def init(state: TrainState) -> RestoreBestState:
        kept = (state.params, state.buffers) if checkpointer is None else ()
        return RestoreBestState(*no_best(state, worst), kept)

    def update(state: TrainState, event: EvalEnd | FitEnd) -> tuple[TrainState, Control]:
        slot: RestoreBestState = state.slots[name]
        if isinstance(event, FitEnd):
            return _with_best(state, slot, checkpointer, what), Control()
        value = measured(event, metric, name, slot.best.device)
        best, improved = improve(Best(slot.best, slot.step), value, state.step, better)
        kept = tree.where(improved, (state.params, state.buffers), slot.kept) if checkpointer is None else ()
        slot = RestoreBestState(*best, kept)
        saves = Control() if checkpointer is None else Control(save=improved, reason=f"{what} improved")
        return state.with_slot(name, slot), saves

    handler = needing(slotted(name, init, update), metric)
    if checkpointer is None:
        return handler
    # A checkpoint has the state of all members, but a member's callback sees its own.
    own = "Leave out checkpointer=, and each member keeps its best parameters in the slot."
    return dataclasses.replace(handler, needs=dataclasses.replace(handler.needs, one_run=own))


def _with_best(state: TrainState, slot: RestoreBestState, checkpointer: Checkpoints | None, what: str) -> TrainState:
    found = slot.step >= 0
    if checkpointer is None:
        params, buffers = tree.where(found, slot.kept, (state.params, state.buffers))
        return state.replace(params=params, buffers=buffers)
    if not bool(found):
        return state
    step = int(slot.step)
    if step not in checkpointer.steps():
        raise ValueError(
            f"expected a checkpoint of step {step}, where {what} was best, got steps {checkpointer.steps()} in "
            f"{checkpointer!r}. Keep the best one with fxtrain.checkpointer(..., best=...), or leave out checkpointer=."
        )
    best = checkpointer.restore(state, step=step)
    return state.replace(params=best.params, buffers=best.buffers)
