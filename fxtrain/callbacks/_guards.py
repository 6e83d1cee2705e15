"""Guards that skip updates with a non-finite loss or gradient, or a spike of one."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.callbacks._monitor import trainable
from fxtrain.callbacks._per_model import per_model
from fxtrain.core import (
    Control,
    Gradients,
    Logged,
    Rewound,
    StepEnd,
    TrainState,
    check_choice,
    check_int,
    check_positive_int,
    describe,
    wide_dtype,
)
from fxtrain.equivalents import with_known_arguments
from fxtrain.fold import Handler, on, slotted
from fxtrain.fold._settings import accepts_settings_per_member
from fxtrain.model import model_of
from fxtrain.precision import finite_leaves
from fxtrain.tree import as_code, leaf_paths


class NanGuardState(NamedTuple):
    """State of ``nan_guard``."""

    in_a_row: Tensor  # int64 []: skipped steps since the last finite one
    skipped: Tensor  # int64 []: skipped steps in total
    step: Tensor  # int64 []: the last skipped step; -1 before the first
    first: Tensor  # int64 []: leaf index of its first non-finite gradient; -1 if only the loss was non-finite


@with_known_arguments
@accepts_settings_per_member
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
            # Only on a CPU, because on an accelerator the read would synchronize with the device at each step.
            if slot.in_a_row.device.type != "cpu" or int(slot.in_a_row) < patience:
                return state, Control()
            return state, Control(stop=True, reason=f"first non-finite: {first_not_finite(state, name)}")
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

    return per_model(slotted(name, init, on(Gradients | StepEnd, update)))


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
    slot: NanGuardState | dict[str, NanGuardState] = state.slots[name]
    if isinstance(slot, dict):
        model, content = max(slot.items(), key=lambda item: int(item[1].step))
        params, prefix = model_of(state).split(state.params, model), f"[{model!r}]"
    else:
        content, params, prefix = slot, trainable(state), ""
    step, place = int(content.step), int(content.first)
    if step < 0:
        return ""
    what = f"grads{prefix}{as_code(leaf_paths(params)[place])}" if place >= 0 else f"the loss{prefix}"
    return f"{what} at step {step}"


class SpikeGuardState(NamedTuple):
    """State of ``spike_guard``."""

    window: Tensor  # float64 [window]: ring buffer of accepted values; inf where empty
    count: Tensor  # int64 []: accepted values so far
    in_a_row: Tensor  # int64 []: spikes since the last accepted value
    spikes: Tensor  # int64 []: spikes in total
    found: Tensor  # int64 [record]: ring buffer of data positions with spikes since the last rewind; -1 where empty
    banned: Tensor  # int64 [record]: data positions whose updates are skipped; -1 where empty


def spike_guard(
    watch: str = "loss",
    *,
    deviations: float = 6.0,
    window: int = 128,
    warmup: int = 32,
    rewind: int = 0,
    patience: int = 10,
    record: int = 64,
    name: str = "spike_guard",
) -> Handler:
    """Skips updates whose loss or gradient norm is far above its recent values, and optionally rewinds past them.

        spike = value > median + deviations * 1.4826 * median |values - median|        over the last accepted values

    Non-finite values are spikes. Batches of weight 0 (see ``fxtrain.weighted``) are not part of the statistics.

    With ``rewind``, a spike also rewinds the run by at least that many steps, to a state retained by
    ``fit(snapshot_every=)`` or a checkpointer. The positions of the batches that caused spikes survive the rewind, and
    their updates are skipped from then on.

    It runs inside the compiled step.

    Args:
        watch: ``"loss"`` or ``"grad_norm"``.
        deviations: Robust standard deviations above the median, more than 0.
        window: Number of accepted values in the statistics, 2 or more.
        warmup: Accepted values before a finite value can be a spike, from 2 to ``window``.
        rewind: Steps to rewind after a spike; 0 only skips its update.
        patience: Consecutive spikes that stop the run, 1 or more.
        record: Maximum number of batches to skip after rewinds. Beyond it, the earliest positions are dropped.
        name: The slot, and the prefix of the logged names: ``<name>/spikes``, and the threshold ``<name>/limit``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch, fxtrain as fx
        >>> guard, tx = spike_guard(warmup=4, window=8), fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: model["w"] * 0 + batch, tx, callbacks=guard)
        >>> state = fx.attach(fx.init({"w": torch.tensor(1.0)}, tx), guard)
        >>> for loss in [1.0, 1.1, 0.9, 1.0, 50.0, 1.0]:
        ...     state, output = step(state, torch.tensor(loss))
        >>> int(state.slots["spike_guard"].spikes)
        1

    References:
        Chowdhery et al., "PaLM: Scaling language modeling with pathways", 2022, section 5.1, for the rewind.
    """
    check_choice("watch", watch, ("loss", "grad_norm"))
    if not 0 < deviations < math.inf:
        raise ValueError(f"expected deviations to be positive and finite, got {describe(deviations)}.")
    check_int("window", window, minimum=2)
    check_int("warmup", warmup, minimum=2)
    if warmup > window:
        raise ValueError(f"expected warmup to be at most window, {window}, got {warmup}.")
    check_int("rewind", rewind, minimum=0)
    check_positive_int("patience", patience)
    check_positive_int("record", record)
    what = "loss" if watch == "loss" else "gradient norm"

    def init(state: TrainState) -> SpikeGuardState:
        zero = torch.zeros_like(state.step)
        no_positions = torch.full((record,), -1, dtype=torch.int64, device=zero.device)
        values = torch.full((window,), math.inf, dtype=wide_dtype(zero.device), device=zero.device)
        return SpikeGuardState(values, zero, zero, zero, no_positions, no_positions)

    def update(state: TrainState, event: Gradients | StepEnd | Rewound) -> tuple[TrainState, Control]:
        slot: SpikeGuardState = state.slots[name]
        if isinstance(event, Rewound):
            return state.with_slot(name, _ban(slot)), Control()
        if isinstance(event, StepEnd):
            has_spikes = (slot.found >= 0).any()
            return state, Control(rewind=torch.where(has_spikes, rewind, 0), reason=f"a spike of the {what}")
        value = (event.loss if watch == "loss" else tree.global_norm(event.grads)).to(slot.window.dtype)
        limit = torch.where(slot.count >= warmup, _limit(slot.window, slot.count, deviations), math.inf)
        banned = (slot.banned == state.position).any()
        left_out = banned if event.weight is None else banned | (event.weight == 0)
        spike = ~left_out & ~(value.isfinite() & (value <= limit))
        good = ~spike & ~left_out
        slot = SpikeGuardState(
            window=_put(slot.window, slot.count, value, good),
            count=slot.count + good,
            in_a_row=torch.where(spike, slot.in_a_row + 1, torch.where(left_out, slot.in_a_row, 0)),
            spikes=slot.spikes + spike,
            found=_put(slot.found, slot.spikes, state.position, spike),
            banned=slot.banned,
        )
        control = Control(skip_update=spike, reason=f"a spike of the {what}")
        control = control | Control(skip_update=banned, reason=f"the batch made a spike of the {what} before")
        stop_reason = f"the {what} was a spike {patience} times in a row"
        control = control | Control(stop=slot.in_a_row >= patience, reason=stop_reason)
        log = {f"{name}/spikes": slot.spikes, f"{name}/limit": Logged(limit, when=limit.isfinite())}
        return state.with_slot(name, slot), control | Control(log=log)

    return per_model(slotted(name, init, on(Gradients | StepEnd | Rewound if rewind else Gradients, update)))


def _limit(window: Tensor, count: Tensor, deviations: float) -> Tensor:
    """Returns the threshold above which a value is a spike: float64 []."""
    filled = count.clamp(max=window.shape[0])
    median = _median(window, filled)
    # Empty entries are inf, so their distance is inf too and they sort last.
    spread = 1.4826 * _median((window - median).abs(), filled)
    # Equal values have no spread, so allow at least a thousandth of the median.
    return median + deviations * torch.maximum(spread, 1e-3 * median.abs())


def _median(values: Tensor, count: Tensor) -> Tensor:
    """Returns the median of the ``count`` smallest values."""
    ordered = values.sort().values
    low, high = (count - 1).clamp(min=0) // 2, count // 2
    pair = ordered.gather(0, torch.stack([low, high.clamp(max=values.shape[0] - 1)]))
    return pair.mean()


def _put(ring: Tensor, place: Tensor, value: Tensor, flag: Tensor) -> Tensor:
    places = torch.arange(ring.shape[0], device=ring.device)
    return torch.where((places == place % ring.shape[0]) & flag, value, ring)


def _ban(slot: SpikeGuardState) -> SpikeGuardState:
    """Returns the callback state that survives a rewind: recorded positions become banned ones."""
    both = torch.cat([slot.banned, slot.found])
    newest = both.sort(stable=True).values[-slot.banned.shape[0] :]
    return slot._replace(in_a_row=torch.zeros_like(slot.in_a_row), found=torch.full_like(slot.found, -1), banned=newest)
