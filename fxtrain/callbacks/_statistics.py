"""Statistics of gradients, weights, updates and module outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.callbacks._layer_warnings import layer_warning
from fxtrain.callbacks._monitor import NORMS, UpdateStats, layers, leaf_names, monitor, trainable
from fxtrain.core import (
    Logged,
    TrainState,
    check_choice,
    check_int,
    check_non_negative,
    check_positive,
    check_positive_int,
    matching_blocks,
)
from fxtrain.core._shard import full_tensor
from fxtrain.fold import Handler, When
from fxtrain.values import Text


class GradNorms(NamedTuple):
    """Measurements of ``grad_norms``."""

    total: Tensor  # float32 []: norm of all gradients as one vector
    layers: Tensor  # float32 [layers]: norm of each layer
    parameters: Tensor  # float32 [parameters]: norm of each parameter; [0] without warn_above


def grad_norms(
    *,
    norm: str = "l2",
    layer: str | Sequence[str] | None = None,
    warn_above: float | None = None,
    every: When = 1,
    publish: When | None = None,
    at_saves: bool = False,
    name: str = "grad_norm",
) -> Handler:
    """Measures the norm of the averaged gradients before clipping, in total and per layer.

        l2: sqrt(sum g^2)        l1: sum |g|        linf: max |g|        mean: mean |g|

    It runs inside the compiled step. The norms of all layers are in ``state.slots[name].values.layers``, in module
    order.

    Args:
        norm: ``"l2"``, ``"l1"``, ``"linf"`` or ``"mean"``.
        layer: Patterns of the layers to publish individually, such as ``"blocks.0.*"``; none by default. The name of a
            block, such as ``"blocks.0"``, publishes the norm of all its layers as one vector.
        warn_above: Norm of a parameter's gradient above which a published step has a text such as
            ``"large gradient in blocks.0.attn.weight: 12.3"``, which names the five largest. None for no warnings.
        every: When to measure: a number of steps, or a trigger, evaluated inside the step.
        publish: When to publish, evaluated at ``StepEnd``. By default every measured step is published.
        at_saves: Whether to publish at each save of a measured step too.
        name: The slot, and the prefix of the logged names: ``<name>/total``, ``/max``, ``/min`` and ``/mean`` over
            layers, ``/<layer>``, and the text ``/large``.

    Raises:
        ValueError: If an argument is out of range, or, at run time, if a pattern matches no layer.

    Example:
        >>> import torch, fxtrain as fx
        >>> norms, tx = grad_norms(), fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: 3 * model["a"] + 4 * model["b"], tx, callbacks=norms)
        >>> state = fx.attach(fx.init({"a": torch.tensor(1.0), "b": torch.tensor(1.0)}, tx), norms)
        >>> state, _ = step(state, torch.zeros(1))
        >>> state.slots["grad_norm"].values
        GradNorms(total=tensor(5.), layers=tensor([3., 4.]), parameters=tensor([]))
    """
    check_choice("norm", norm, NORMS)
    if warn_above is not None:
        check_positive(warn_above=warn_above)

    def measure(state: TrainState, stats: UpdateStats, before: GradNorms | None) -> GradNorms:
        groups = list(layers(state).values())
        everything = [[index for group in groups for index in group]]
        total, norms = stats.norms("grads", norm, everything)[0], stats.norms("grads", norm, groups)
        each = norms.new_zeros(0) if warn_above is None else stats.norms("grads", norm, [[i] for i in everything[0]])
        return GradNorms(total, norms, each)

    def show(state: TrainState, values: GradNorms) -> dict[str, Tensor | Logged]:
        names, (total, norms, parameters) = list(layers(state)), values
        shown: dict[str, Tensor | Logged] = {
            "total": total,
            "max": norms.max(),
            "min": norms.min(),
            "mean": norms.mean(),
        }
        whole = {"l2": lambda part: part.norm(), "l1": torch.sum, "linf": torch.amax}
        for chosen, parts in matching_blocks(names, layer, "layer"):
            if norm == "mean":
                sizes = _sizes(state, parts, norms)
                shown[chosen] = (norms[parts] * sizes).sum() / sizes.sum()
            else:
                shown[chosen] = whole[norm](norms[parts])
        if warn_above is not None:
            leaves = leaf_names(state)
            ordered = [leaves[index] for group in layers(state).values() for index in group]
            shown["large"] = layer_warning("large gradient", ordered, parameters, ~(parameters <= warn_above))
        return shown

    return monitor(name, measure, show, every=every, publish=publish, at_saves=at_saves)


def _sizes(state: TrainState, parts: Sequence[int], like: Tensor) -> Tensor:
    """Returns the number of elements of some layers, float32 [parts]."""
    leaves, groups = tree.leaves(trainable(state)), list(layers(state).values())
    return like.new_tensor([float(sum(leaves[index].numel() for index in groups[part])) for part in parts])


def _sum(leaf: Tensor) -> Tensor:
    return full_tensor((leaf.real if leaf.is_complex() else leaf).sum(dtype=torch.float32))


class WeightStats(NamedTuple):
    """Measurements of ``weight_stats``, float32 [parameters] each."""

    norm: Tensor  # l2 norm
    mean: Tensor  # mean of the real part
    std: Tensor  # population standard deviation
    max: Tensor  # largest absolute value


def weight_stats(
    *,
    parameter: str | Sequence[str] | None = None,
    every: When = 1,
    publish: When | None = None,
    at_saves: bool = False,
    name: str = "weights",
) -> Handler:
    """Measures the norm, mean, standard deviation and largest absolute value of each trainable parameter.

    It runs inside the compiled step.

    Args:
        parameter: Patterns of the parameters to publish individually, such as ``"*.weight"``; none by default. The name
            of a block, such as ``"blocks.0"``, publishes statistics of all its parameters as one vector.
        every: When to measure: a number of steps, or a trigger, evaluated inside the step.
        publish: When to publish, evaluated at ``StepEnd``. By default every measured step is published.
        at_saves: Whether to publish at each save of a measured step too.
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
        total = torch.stack([_sum(leaf) for leaf in leaves])
        mean = total / counts
        variance = (squares / counts - mean * mean).clamp(min=0)
        return WeightStats(squares.sqrt(), mean, variance.sqrt(), stats.sums("weights", "max"))

    def show(state: TrainState, values: WeightStats) -> dict[str, Tensor]:
        names, leaves = leaf_names(state), tree.leaves(trainable(state))
        chosen: dict[str, Tensor] = {}
        for group, parts in matching_blocks(names, parameter, "parameter"):
            sizes = values.mean.new_tensor([float(leaves[part].numel()) for part in parts])
            shares = sizes / sizes.sum()
            mean = (values.mean[parts] * shares).sum()
            variance = ((values.std[parts].square() + (values.mean[parts] - mean).square()) * shares).sum()
            whole = (values.norm[parts].norm(), mean, variance.sqrt(), values.max[parts].amax())
            chosen |= {f"{group}/{field}": value for field, value in zip(values._fields, whole, strict=True)}
        return {"norm": values.norm.square().sum().sqrt(), "max": values.max.amax(), **chosen}

    return monitor(name, measure, show, every=every, publish=publish, at_saves=at_saves)


class UpdateRatios(NamedTuple):
    """Measurements of ``update_ratios``."""

    ratios: Tensor  # float32 [parameters]: ||update|| / ||parameter||
    still: Tensor  # int64 [parameters]: consecutive measured steps without movement
    chosen: Tensor  # float32 [chosen]: ratio of each parameter or block that is published individually


def update_ratios(
    *,
    parameter: str | Sequence[str] | None = None,
    frozen_below: float = 0.0,
    patience: int = 10,
    worst: int = 0,
    every: When = 1,
    publish: When | None = None,
    at_saves: bool = False,
    name: str = "update_ratio",
) -> Handler:
    """Measures the ratio of update norm to parameter norm, and counts parameters that do not move.

        ratio = ||update|| / ||parameter||

    Ratios around 1e-3 are typical of healthy training. A parameter is frozen if its ratio was at most ``frozen_below``
    at ``patience`` measured steps in a row. Skipped steps are not counted.

    It runs inside the compiled step.

    Args:
        parameter: Patterns of the parameters to publish individually; none by default. The name of a block, such as
            ``"blocks.0"``, publishes the ratio of all its parameters as one vector.
        frozen_below: Largest ratio that counts as no movement, 0 or more.
        patience: Measured steps without movement, 1 or more.
        worst: Number of largest ratios to list as text. The list is made on the host, so publish it rarely on an
            accelerator.
        every: When to measure: a number of steps, or a trigger, evaluated inside the step.
        publish: When to publish, evaluated at ``StepEnd``. By default every measured step is published.
        at_saves: Whether to publish at each save of a measured step too.
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
        names = leaf_names(state)
        ratios = _ratios(stats, [[index] for index in range(len(names))])
        chosen = _ratios(stats, [parts for _, parts in matching_blocks(names, parameter, "parameter")])
        still = torch.zeros_like(ratios, dtype=torch.int64) if before is None else before.still
        return UpdateRatios(
            torch.where(stats.skipped, 0.0, ratios),
            torch.where(stats.skipped, still, torch.where(ratios > frozen_below, 0, still + 1)),
            torch.where(stats.skipped, 0.0, chosen),
        )

    def show(state: TrainState, values: UpdateRatios) -> dict[str, Tensor | Text]:
        names, (ratios, still, chosen) = leaf_names(state), values
        shown: dict[str, Tensor | Text] = {"mean": ratios.mean(), "max": ratios.max(), "min": ratios.min()}
        shown["frozen"] = (still >= patience).sum()
        groups = matching_blocks(names, parameter, "parameter")
        shown |= {group: ratio for (group, _), ratio in zip(groups, chosen.unbind(), strict=True)}
        if worst:
            largest = ratios.topk(min(worst, len(names)))
            pairs = zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
            shown["worst"] = Text("\n".join(f"- `{names[index]}`: {ratio:.3g}" for index, ratio in pairs))
        return shown

    return monitor(name, measure, show, every=every, publish=publish, at_saves=at_saves)


def _ratios(stats: UpdateStats, groups: list[list[int]]) -> Tensor:
    """Returns the ratio of update norm to parameter norm of each group of parameters, float32 [groups]."""
    if not groups:
        return stats.sums("updates", "squares")[:0]
    sizes = stats.norms("weights", "l2", groups).clamp(min=torch.finfo(torch.float32).tiny)
    return stats.norms("updates", "l2", groups) / sizes


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
