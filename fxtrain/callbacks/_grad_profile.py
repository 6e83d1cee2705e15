"""The gradient of each layer over the depth of a model, as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from fxtrain.callbacks._monitor import UpdateStats, layers, monitor
from fxtrain.core import TrainState, matching_blocks, truncate_middle
from fxtrain.fold import Handler, When
from fxtrain.values import Figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_MAX_LABELS = 60
_MAX_LABEL = 36  # characters


class GradProfile(NamedTuple):
    """Measurements of ``grad_profile``, float32 [layers] each, in order of depth."""

    mean: Tensor  # mean absolute value of the layer's gradients
    max: Tensor  # largest absolute value


def grad_profile(
    *,
    every: When,
    layer: str | Sequence[str] = "*",
    publish: When | None = None,
    at_saves: bool = False,
    name: str = "grad_profile",
) -> Handler:
    """Logs a picture of the gradients over depth: their mean and largest absolute value in each layer.

    The first layer is at the top, and magnitudes are on a logarithmic scale. Gradients that vanish towards the input
    slope to the left there, and a layer without gradient or with one that is not finite has a cross and its value.

    The values are of the averaged gradients before clipping, and measured inside the compiled step. The picture is
    drawn only if a writer takes it, when it is written.

    Args:
        every: When to measure: a number of steps, or a trigger, evaluated inside the step.
        layer: Patterns of the layers to show; all by default. The name of a block, such as ``"blocks.0"``, shows its
            layers as one.
        publish: When to publish, evaluated at ``StepEnd``. By default every measured step is published.
        at_saves: Whether to publish at each save of a measured step too.
        name: The slot, and the name of the logged figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If an argument is out of range, or, at run time, if a pattern matches no layer.

    Example:
        >>> import torch, fxtrain as fx
        >>> profile, tx = grad_profile(every=100), fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: 3 * model["a"] + 4 * model["b"], tx, callbacks=profile)
        >>> state = fx.attach(fx.init({"a": torch.tensor(1.0), "b": torch.tensor(1.0)}, tx), profile)
        >>> for _ in range(100):
        ...     state, _ = step(state, torch.zeros(1))
        >>> state.slots["grad_profile"].values
        GradProfile(mean=tensor([3., 4.]), max=tensor([3., 4.]))
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("grad_profile requires matplotlib. Install it: pip install 'fxtrain[plot]'.") from error

    def chosen(state: TrainState) -> list[tuple[str, list[int]]]:
        """Returns the names to show, each with the indices of its leaves, in order of depth."""
        groups = layers(state)
        leaves = list(groups.values())
        parts = sorted(matching_blocks(list(groups), layer, "layer"), key=lambda item: item[1])
        return [(name, [leaf for index in indices for leaf in leaves[index]]) for name, indices in parts]

    def measure(state: TrainState, stats: UpdateStats, before: GradProfile | None) -> GradProfile:
        groups = [leaves for _, leaves in chosen(state)]
        return GradProfile(stats.norms("grads", "mean", groups), stats.norms("grads", "linf", groups))

    def show(state: TrainState, values: GradProfile) -> dict[str, Figure]:
        draw = _Profile(tuple(name for name, _ in chosen(state)))
        # Copied, because the slot's buffers may be donated before the picture is drawn.
        return {"": Figure.drawn(draw, values.mean.clone(), values.max.clone())}

    return monitor(name, measure, show, every=every, publish=publish, at_saves=at_saves)


@dataclasses.dataclass(frozen=True)
class _Profile:
    """Draws a profile. Equal for equal names, as parts of a pytree's structure are."""

    names: tuple[str, ...]

    def __call__(self, mean: np.ndarray, largest: np.ndarray) -> Canvas:
        from matplotlib.figure import Figure as Canvas

        count = len(self.names)
        stride = -(-count // _MAX_LABELS)
        canvas = Canvas(figsize=(6.4, 1.1 + 0.2 * max(4, min(count, _MAX_LABELS))), layout="constrained")
        axes = canvas.subplots()
        depth = np.arange(count)
        shown = [np.where(np.isfinite(values) & (values > 0), values, np.nan) for values in (mean, largest)]
        marker = "o" if stride == 1 else ""
        for values, label, color in zip(shown, ("mean", "max"), ("tab:blue", "tab:orange"), strict=True):
            axes.plot(values, depth, marker=marker, markersize=4, linewidth=1.2, color=color, label=label)
        axes.fill_betweenx(depth, shown[0], shown[1], color="tab:blue", alpha=0.1, linewidth=0)
        if np.isfinite(shown).any():
            axes.set_xscale("log")
        else:  # a logarithmic scale needs a value
            axes.set_xticks([])
        for index in np.flatnonzero(np.isnan(shown[1])):
            text = f"  {largest[index]:g}"
            axes.plot(0, index, "x", color="tab:red", transform=axes.get_yaxis_transform(), clip_on=False)
            axes.annotate(text, (0, index), xycoords=axes.get_yaxis_transform(), va="center", color="tab:red")
        axes.set_yticks(
            depth[::stride], [truncate_middle(name, _MAX_LABEL) for name in self.names[::stride]], fontsize="small"
        )
        axes.set_ylim(count - 0.5, -0.5)
        axes.set_xlabel("|gradient|", fontsize="small")
        axes.tick_params(axis="x", labelsize="small")
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        canvas.legend(loc="outside upper right", ncols=2, fontsize="small", frameon=False)
        return canvas
