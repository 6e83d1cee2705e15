"""Statistics of weights and module outputs, and ratios of update norm to weight norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.callbacks._monitor import UpdateStats, leaf_names, monitor
from fxtrain.core import TrainState, check_int, check_non_negative, check_positive_int, matching
from fxtrain.fold import Handler, When
from fxtrain.values import Text


class WeightStats(NamedTuple):
    """Measurements of ``weight_stats``, float32 [parameters] each."""

    norm: Tensor  # l2 norm
    mean: Tensor  # mean of the real part
    std: Tensor  # population standard deviation
    max: Tensor  # largest absolute value


def weight_stats(
    *, parameter: str | Sequence[str] | None = None, every: When = 1, publish: When | None = None, name: str = "weights"
) -> Handler:
    """Measures the norm, mean, standard deviation and largest absolute value of each trainable parameter.

    It runs inside the compiled step.

    Args:
        parameter: Patterns of the parameters to publish individually, such as ``"*.weight"``; none by default.
        every: When to measure: a number of steps, or a trigger, evaluated inside the step.
        publish: When to publish, evaluated at ``StepEnd``. By default every measured step is published.
        name: The slot, and the prefix of the logged names: ``<name>/norm`` of all parameters as one vector, ``/max``
            over all, and ``/<parameter>/norm``, ``/mean``, ``/std`` and ``/max`` for each chosen parameter.

    Raises:
        ValueError: If an argument is out of range, or, at run time, if a pattern matches no parameter.

    Example:
        >>> import torch, fxtrain as fx
        >>> stats, tx = weight_stats(), fx.optim.sgd(0.0)
        >>> step = fx.train_step(lambda model, batch: model["w"].sum(), tx, callbacks=stats)
        >>> state = fx.attach(fx.init({"w": torch.tensor([3.0, -4.0])}, tx), stats)
        >>> step(state, torch.zeros(1))[0].slots["weights"].values
        WeightStats(norm=tensor([5.]), mean=tensor([-0.5000]), std=tensor([3.5000]), max=tensor([4.]))
    """

    def measure(state: TrainState, stats: UpdateStats, before: WeightStats | None) -> WeightStats:
        leaves = tree.leaves(stats.weights)
        squares, counts = stats.sums("weights", "squares"), stats.counts("weights", [[i] for i in range(len(leaves))])
        total = torch.stack([(leaf.real if leaf.is_complex() else leaf).sum(dtype=torch.float32) for leaf in leaves])
        mean = total / counts
        variance = (squares / counts - mean * mean).clamp(min=0)
        return WeightStats(squares.sqrt(), mean, variance.sqrt(), stats.sums("weights", "max"))

    def show(state: TrainState, values: WeightStats) -> dict[str, Tensor]:
        names = leaf_names(state)
        chosen = {
            f"{names[i]}/{statistic}": column[i]
            for i in matching(names, parameter, "parameter")
            for statistic, column in values._asdict().items()
        }
        return {"norm": values.norm.square().sum().sqrt(), "max": values.max.amax(), **chosen}

    return monitor(name, measure, show, every=every, publish=publish)


class UpdateRatios(NamedTuple):
    """Measurements of ``update_ratios``."""

    ratios: Tensor  # float32 [parameters]: ||update|| / ||parameter||
    still: Tensor  # int64 [parameters]: consecutive measured steps without movement


def update_ratios(
    *,
    parameter: str | Sequence[str] | None = None,
    frozen_below: float = 0.0,
    patience: int = 10,
    worst: int = 0,
    every: When = 1,
    publish: When | None = None,
    name: str = "update_ratio",
) -> Handler:
    """Measures the ratio of update norm to parameter norm, and counts parameters that do not move.

        ratio = ||update|| / ||parameter||

    Ratios around 1e-3 are typical of healthy training. A parameter is frozen if its ratio was at most ``frozen_below``
    at ``patience`` measured steps in a row. Skipped steps are not counted.

    It runs inside the compiled step.

    Args:
        parameter: Patterns of the parameters to publish individually; none by default.
        frozen_below: Largest ratio that counts as no movement, 0 or more.
        patience: Measured steps without movement, 1 or more.
        worst: Number of largest ratios to list as text. The list is made on the host, so publish it rarely on an
            accelerator.
        every: When to measure: a number of steps, or a trigger, evaluated inside the step.
        publish: When to publish, evaluated at ``StepEnd``. By default every measured step is published.
        name: The slot, and the prefix of the logged names: ``<name>/mean``, ``/max``, ``/min``, ``/frozen``,
            ``/<parameter>``, and the text ``/worst``.

    Raises:
        ValueError: If an argument is out of range, or, at run time, if a pattern matches no parameter.

    Example:
        >>> import torch, fxtrain as fx
        >>> ratios, tx = update_ratios(patience=1), fx.optim.sgd(0.5)
        >>> step = fx.train_step(lambda model, batch: model["a"] + 0 * model["b"], tx, callbacks=ratios)
        >>> state = fx.attach(fx.init({"a": torch.tensor(1.0), "b": torch.tensor(1.0)}, tx), ratios)
        >>> state, _ = step(state, torch.zeros(1))
        >>> log = fx.compose(ratios)(state, fx.StepEnd(step=1, metrics={}))[1].log
        >>> float(log["update_ratio/max"].value), int(log["update_ratio/frozen"].value)
        (1.0, 1)
    """
    check_non_negative(frozen_below=frozen_below)
    check_positive_int("patience", patience)
    check_int("worst", worst, minimum=0)

    def measure(state: TrainState, stats: UpdateStats, before: UpdateRatios | None) -> UpdateRatios:
        sizes = stats.sums("weights", "squares").sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        ratios = stats.sums("updates", "squares").sqrt() / sizes
        still = torch.zeros_like(ratios, dtype=torch.int64) if before is None else before.still
        return UpdateRatios(
            torch.where(stats.skipped, 0.0, ratios),
            torch.where(stats.skipped, still, torch.where(ratios > frozen_below, 0, still + 1)),
        )

    def show(state: TrainState, values: UpdateRatios) -> dict[str, Tensor | Text]:
        names, (ratios, still) = leaf_names(state), values
        shown: dict[str, Tensor | Text] = {"mean": ratios.mean(), "max": ratios.max(), "min": ratios.min()}
        shown["frozen"] = (still >= patience).sum()
        shown |= {names[i]: ratios[i] for i in matching(names, parameter, "parameter")}
        if worst:
            largest = ratios.topk(min(worst, len(names)))
            pairs = zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
            shown["worst"] = Text("\n".join(f"- `{names[index]}`: {ratio:.3g}" for index, ratio in pairs))
        return shown

    return monitor(name, measure, show, every=every, publish=publish)


def activation_stats(output: Tensor) -> dict[str, Tensor]:
    """Returns the mean, standard deviation, fraction of exact zeros and largest absolute value of a module's output.

    Pass it to ``fx.tap`` to log them.

    Args:
        output: Real tensor of any shape.

    Returns:
        ``"mean"``, ``"std"``, ``"zeros"`` and ``"max"``: float32 [] each.

    Example:
        >>> import fxtrain as fx
        >>> activation_stats(torch.tensor([0.0, 4.0]))
        {'mean': tensor(2.), 'std': tensor(2.), 'zeros': tensor(0.5000), 'max': tensor(4.)}
        >>> loss_fn = fx.tap(lambda model, batch: model(batch).sum(), "*.relu", activation_stats)
    """
    values = output.to(torch.promote_types(output.dtype, torch.float32))
    mean = values.mean()
    return {
        "mean": mean.float(),
        "std": (values - mean).square().mean().sqrt().float(),
        "zeros": (values == 0).float().mean(),
        "max": values.abs().amax().float(),
    }
