"""The gradient flow: how the gradient norm changes from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.callbacks._layer_warnings import layer_warning
from fxtrain.callbacks._monitor import UpdateStats, layers, monitor
from fxtrain.core import Logged, TrainState, describe, matching_blocks
from fxtrain.fold import Handler, When


class GradFlow(NamedTuple):
    """Measurements of ``grad_flow``."""

    norms: Tensor  # float32 [layers]: l2 norms, in module order
    gains: Tensor  # float32 [layers - 1]: norm of each layer / norm of the next layer


def grad_flow(
    *,
    healthy: tuple[float, float] = (0.5, 2.0),
    vanishing: float = 1e-7,
    exploding: float = 1e3,
    layer: str | Sequence[str] | None = None,
    warn: bool = False,
    every: When = 1,
    publish: When | None = None,
    at_saves: bool = False,
    name: str = "grad_flow",
) -> Handler:
    """Measures how the gradient norm changes from layer to layer in the backward pass.

        gain_i = ||g_i|| / ||g_(i+1)||

    Layers are in module order. A layer is healthy if its gain is within ``healthy``, damping if below, and amplifying
    if above. Independently of its gain, a layer is vanishing if its norm is below ``vanishing``, and exploding if its
    norm is above ``exploding`` or not finite.

    It runs inside the compiled step. Its reductions are shared with ``grad_norms``.

    Args:
        healthy: Smallest and largest healthy gain.
        vanishing: Norm below which a layer is vanishing.
        exploding: Norm above which a layer is exploding.
        layer: Patterns of the layers whose gain is published, such as ``"blocks.*"``; none by default. The gain of a
            block, such as ``"blocks.0"``, is the product of its layers' gains.
        warn: Whether a published step with vanishing or exploding layers has a text that names the five worst.
        every: When to measure: a number of steps, or a trigger, evaluated inside the step.
        publish: When to publish, evaluated at ``StepEnd``. By default every measured step is published.
        at_saves: Whether to publish at each save of a measured step too.
        name: The slot, and the prefix of the logged names: ``<name>/gain_mean``, ``/gain_min``, ``/gain_max``, the
            counts ``/healthy``, ``/damping``, ``/amplifying``, ``/vanishing``, ``/exploding``, ``/gain/<layer>``,
            and the texts ``/vanishing_in`` and ``/exploding_in``.

    Raises:
        ValueError: If an argument is out of range, or, at run time, if a pattern matches no layer.

    Example:
        >>> import torch, fxtrain as fx
        >>> flow, tx = grad_flow(), fx.optim.sgd(0.1)
        >>> def loss_fn(model, batch):
        ...     return 8 * model["first"] + model["second"] + model["third"]
        >>> step = fx.train_step(loss_fn, tx, callbacks=flow)
        >>> start = {name: torch.tensor(1.0) for name in ("first", "second", "third")}
        >>> state, _ = step(fx.attach(fx.init(start, tx), flow), torch.zeros(1))
        >>> log = fx.compose(flow)(state, fx.StepEnd(step=1, metrics={}))[1].log
        >>> int(log["grad_flow/amplifying"].value), int(log["grad_flow/healthy"].value)
        (1, 1)
    """
    least, most = healthy
    if not 0 < least <= most:
        raise ValueError(f"expected healthy to be two ascending positive gains, got {describe(healthy)}.")
    if not 0 <= vanishing < exploding:
        raise ValueError(
            f"expected 0 <= vanishing < exploding, got vanishing={describe(vanishing)} and "
            f"exploding={describe(exploding)}."
        )

    def measure(state: TrainState, stats: UpdateStats, before: GradFlow | None) -> GradFlow:
        norms = stats.norms("grads", "l2", list(layers(state).values()))
        return GradFlow(norms, norms[:-1] / norms[1:])

    def show(state: TrainState, values: GradFlow) -> dict[str, Tensor | Logged]:
        warnings: dict[str, Logged] = {}
        if warn:
            low, high = values.norms < vanishing, ~(values.norms <= exploding)
            every_layer = list(layers(state))
            warnings["vanishing_in"] = layer_warning("vanishing gradient", every_layer, values.norms, low, sign=-1.0)
            warnings["exploding_in"] = layer_warning("exploding gradient", every_layer, values.norms, high)
        names, (norms, gains) = list(layers(state))[:-1], values
        # A gain is not finite where the next layer has no gradient.
        known = gains.isfinite()
        count = known.sum().clamp(min=1)
        return {
            "gain_mean": torch.where(known, gains, 0.0).sum() / count,
            "gain_min": torch.where(known, gains, torch.inf).amin() if names else torch.zeros(()),
            "gain_max": torch.where(known, gains, -torch.inf).amax() if names else torch.zeros(()),
            "healthy": ((gains >= least) & (gains <= most)).sum(),
            "damping": (gains < least).sum(),
            "amplifying": (gains > most).sum(),
            "vanishing": (norms < vanishing).sum(),
            "exploding": (~(norms <= exploding)).sum(),
            **{f"gain/{chosen}": _block_gain(norms, parts) for chosen, parts in matching_blocks(names, layer, "layer")},
            **warnings,
        }

    return monitor(name, measure, show, every=every, publish=publish, at_saves=at_saves)


def _block_gain(norms: Tensor, parts: Sequence[int]) -> Tensor:
    """Returns the norm of consecutive layers' first one / norm of the layer after the last: the product of gains."""
    return norms[parts[0]] / norms[parts[-1] + 1]
