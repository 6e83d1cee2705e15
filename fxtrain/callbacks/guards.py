"""Guards: keep a bad step from doing harm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core import Control, Gradients, TrainState
from fxtrain.fold import Handler, stateful
from fxtrain.precision import all_finite


class NanGuardState(NamedTuple):
    """The memory of ``nan_guard``."""

    in_a_row: Tensor  # int64 []: skipped steps since the last good one
    skipped: Tensor  # int64 []: skipped steps in all


def nan_guard(*, patience: int = 10, name: str = "nan_guard") -> Handler:
    """Skips the update of a step whose loss or gradients are not finite, and stops after ``patience`` in a row.

    It runs inside the compiled step: give it to ``train_step(..., callbacks=)`` as well as to ``fit``.

    Args:
        patience: Non-finite steps in a row that stop the run, 1 or more.
        name: The slot, and the prefix of what is logged: ``<name>/skipped``.

    Raises:
        ValueError: If ``patience`` is below 1.

    Example:
        >>> import torch, fxtrain as fx
        >>> guard, tx = nan_guard(patience=2), fx.optim.sgd(1.0)
        >>> step = fx.train_step(lambda model, batch: model(batch).sum(), tx, callbacks=guard)
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1, bias=False), tx), guard)
        >>> after, output = step(state, torch.tensor([[float("nan")]]))
        >>> bool((after.params["weight"] == state.params["weight"]).all()), int(after.slots["nan_guard"].skipped)
        (True, 1)
    """
    if patience < 1:
        raise ValueError(f"patience={patience!r}: at least 1 step is wanted.")

    def init(state: TrainState) -> NanGuardState:
        zero = torch.tensor(0, device=state.step.device)
        return NanGuardState(zero, zero)

    def update(state: TrainState, event: Gradients, memory: NanGuardState) -> tuple[NanGuardState, Control]:
        bad = ~(event.loss.isfinite() & all_finite(event.grads))
        memory = NanGuardState(
            in_a_row=torch.where(bad, memory.in_a_row + 1, 0),
            skipped=torch.where(bad, memory.skipped + 1, memory.skipped),
        )
        control = Control(
            skip_update=bad, reason="loss or gradients are not finite", log={f"{name}/skipped": memory.skipped}
        )
        stop = Control(
            stop=memory.in_a_row >= patience, reason=f"loss or gradients were not finite {patience} times in a row"
        )
        return memory, control | stop

    return stateful(name, init, update)
