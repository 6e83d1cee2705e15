"""A guard against non-finite losses and gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.callbacks._update_stats import trainable
from fxtrain.core import Control, Gradients, StepEnd, TrainState, check_positive_int
from fxtrain.fold import Handler, on, slotted
from fxtrain.precision import finite_leaves
from fxtrain.tree import as_code, leaf_paths


class NanGuardState(NamedTuple):
    """State of ``nan_guard``."""

    in_a_row: Tensor  # int64 []: skipped steps since the last finite one
    skipped: Tensor  # int64 []: skipped steps in total
    step: Tensor  # int64 []: the last skipped step; -1 before the first
    first: Tensor  # int64 []: leaf index of its first non-finite gradient; -1 if only the loss was non-finite


def nan_guard(*, patience: int = 10, name: str = "nan_guard") -> Handler:
    """Skips updates with a non-finite loss or gradient, and stops the run after ``patience`` in a row.

    It runs inside the compiled step. On a CPU the reason of the stop names the first non-finite gradient. On other
    devices ``first_not_finite`` does.

    Args:
        patience: Consecutive non-finite steps that stop the run, 1 or more.
        name: The slot, and the prefix of the logged name: ``<name>/skipped``.

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
        >>> fx.callbacks.first_not_finite(after)
        "grads['weight'] at step 1"
    """
    check_positive_int("patience", patience)

    def init(state: TrainState) -> NanGuardState:
        zero, none = torch.zeros_like(state.step), torch.full_like(state.step, -1)
        return NanGuardState(zero, zero, none, none)

    def update(state: TrainState, event: Gradients | StepEnd) -> tuple[TrainState, Control]:
        slot: NanGuardState = state.slots[name]
        if isinstance(event, StepEnd):
            return state, stop_with_first(state, slot)
        good = finite_leaves(event.grads)
        finite = event.loss.isfinite() & good.all()
        place = torch.where(good.all(), -1, (~good).to(torch.uint8).argmax() if good.numel() else -1)
        slot = NanGuardState(
            in_a_row=torch.where(finite, 0, slot.in_a_row + 1),
            skipped=torch.where(finite, slot.skipped, slot.skipped + 1),
            step=torch.where(finite, slot.step, event.step),
            first=torch.where(finite, slot.first, place),
        )
        reason = "loss or gradients are not finite"
        skip = Control(skip_update=~finite, reason=reason, log={f"{name}/skipped": slot.skipped})
        stop_reason = f"loss or gradients were not finite {patience} times in a row"
        return state.with_slot(name, slot), skip | Control(stop=slot.in_a_row >= patience, reason=stop_reason)

    def stop_with_first(state: TrainState, slot: NanGuardState) -> Control:
        # Only on a CPU, because on an accelerator the read would synchronize with the device at each step.
        if slot.in_a_row.device.type != "cpu" or int(slot.in_a_row) < patience:
            return Control()
        return Control(stop=True, reason=f"first non-finite: {first_not_finite(state, name)}")

    return slotted(name, init, on(Gradients | StepEnd, update))


def first_not_finite(state: TrainState, name: str = "nan_guard") -> str:
    """Returns the latest finding of ``nan_guard``, such as ``"grads['weight'] at step 7"``; empty if there is none.

    Args:
        state: Any state with the guard's slot, which is read from the device.
        name: The slot.

    Raises:
        KeyError: If the state has no such slot.

    Example:
        >>> import torch, fxtrain as fx
        >>> guard = fx.compose(nan_guard())
        >>> state = fx.attach(fx.init({"w": torch.tensor(1.0)}), guard)
        >>> nan = torch.tensor(float("nan"))
        >>> event = fx.Gradients(step=torch.tensor(7), loss=torch.tensor(0.0), metrics={}, grads={"w": nan})
        >>> first_not_finite(state), first_not_finite(guard(state, event)[0])
        ('', "grads['w'] at step 7")
    """
    slot: NanGuardState = state.slots[name]
    step, place = int(slot.step), int(slot.first)
    if step < 0:
        return ""
    what = "the loss" if place < 0 else f"grads{as_code(leaf_paths(trainable(state))[place])}"
    return f"{what} at step {step}"
