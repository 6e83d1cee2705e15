"""Histograms of gradients, weights and updates, counted inside the compiled step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.callbacks._monitor import KINDS, UpdateStats, leaf_names, monitor
from fxtrain.core import TrainState, check_choice, check_positive_int, describe, matching_blocks
from fxtrain.core._shard import full_tensor
from fxtrain.fold import Composed, Handler, When, compose
from fxtrain.values import Histogram

_TOGETHER = 32
"""The most samples that are counted together, which threads divide among them. Uncompiled, it takes memory for all."""


class Histograms(NamedTuple):
    """Measurements of ``histograms``."""

    counts: Tensor  # int64 [parameters, bins]: edges[i - 1] < value <= edges[i]. The last one includes NaN
    seen: Tensor  # int64 [parameters]: number of elements counted


def histograms(
    of: str = "grads",
    *,
    parameter: str | Sequence[str] = "*",
    sample: int = 4096,
    smallest: float = 1e-8,
    largest: float = 10.0,
    per_decade: int = 2,
    every: When = 100,
    publish: When | None = None,
    at_saves: bool = False,
    name: str = "",
) -> Handler:
    """Logs histograms of gradients, weights or updates over fixed buckets.

    Bucket edges grow geometrically from ``smallest`` to ``largest`` on both sides of zero, so distributions of any
    scale can be compared between steps. One bucket spans zero, and one lies beyond each end. From each parameter,
    ``sample`` evenly spaced elements are counted, or all elements if it has fewer.

    It runs inside the compiled step, in a conditional branch.

    Args:
        of: ``"grads"``, ``"weights"`` or ``"updates"``.
        parameter: Patterns of the parameters to include. The name of a block, such as ``"blocks.0"``, includes one
            histogram of all its parameters.
        sample: Elements per parameter, 1 or more.
        smallest: The positive edge next to zero.
        largest: The outermost edge, above ``smallest``.
        per_decade: Buckets per power of ten, 1 or more.
        every: When to count: a number of steps, or a trigger, evaluated inside the step.
        publish: When to publish, evaluated at ``StepEnd``. By default every counted step is published.
        at_saves: Whether to publish at each save of a measured step too.
        name: The slot, and the prefix of the logged names ``<name>/<parameter>``. By default ``histograms/<of>``.

    Raises:
        ValueError: If an argument is out of range, or, at run time, if a pattern matches no parameter.

    Example:
        >>> import torch, fxtrain as fx
        >>> counted, tx = histograms("weights", every=1, smallest=0.1, largest=1.0, per_decade=1), fx.optim.sgd(0.0)
        >>> step = fx.train_step(lambda model, batch: model["w"].sum(), tx, callbacks=counted)
        >>> state = fx.attach(fx.init({"w": torch.tensor([-5.0, 0.0, 0.5, 0.7])}, tx), counted)
        >>> step(state, torch.zeros(1))[0].slots["histograms/weights"].values.counts
        tensor([[1, 0, 1, 2, 0]])
    """
    check_choice("of", of, KINDS)
    check_positive_int("sample", sample)
    check_positive_int("per_decade", per_decade)
    if not 0 < smallest < largest < math.inf:
        raise ValueError(
            f"expected 0 < smallest < largest, both finite, got smallest={describe(smallest)} and "
            f"largest={describe(largest)}."
        )
    decades = math.log10(largest / smallest)
    steps = max(1, round(decades * per_decade))

    def edges(device: torch.device) -> Tensor:
        # Computed with arange, because a conditional branch of the graph cannot hold a constant tensor.
        exponents = torch.arange(steps + 1, device=device, dtype=torch.float32) * (decades / steps)
        positive = smallest * torch.pow(10.0, exponents)
        return torch.cat([-positive.flip(0), positive])

    def measure(state: TrainState, stats: UpdateStats, before: Histograms | None) -> Histograms:
        leaves = tree.leaves(getattr(stats, of))
        samples = [
            torch.cat([_sample(leaves[part], sample) for part in parts])
            for _, parts in matching_blocks(leaf_names(state), parameter, "parameter")
        ]
        bounds = edges(samples[0].device)
        above = _above(samples, bounds)
        seen = _as_tensor([values.shape[0] for values in samples], above.device)
        beyond = torch.cat([seen[:, None], above, torch.zeros_like(seen)[:, None]], 1)
        return Histograms(beyond[:, :-1] - beyond[:, 1:], seen)

    def show(state: TrainState, values: Histograms) -> dict[str, Histogram]:
        names = leaf_names(state)
        ends = torch.tensor([10 * largest])
        bounds = torch.cat([-ends, edges(ends.device), ends])
        return {
            chosen: Histogram(counts=values.counts[row], edges=bounds)
            for row, (chosen, _) in enumerate(matching_blocks(names, parameter, "parameter"))
        }

    return monitor(name or f"histograms/{of}", measure, show, every=every, publish=publish, at_saves=at_saves)


def _sample(leaf: Tensor, count: int) -> Tensor:
    leaf = full_tensor(leaf)
    flat = (leaf.abs() if leaf.is_complex() else leaf).flatten()
    stride = max(1, flat.shape[0] // count)
    return flat[: stride * count : stride].to(torch.float32)


def _above(samples: Sequence[Tensor], bounds: Tensor) -> Tensor:
    """Returns the number of values of each sample above each bound, int64 [samples, bounds]. NaN is above all."""
    of_size: dict[int, list[int]] = {}
    for index, values in enumerate(samples):
        of_size.setdefault(values.shape[0], []).append(index)
    rows: dict[int, Tensor] = {}
    for places in of_size.values():
        for start in range(0, len(places), _TOGETHER):
            some = places[start : start + _TOGETHER]
            values = torch.stack([samples[index] for index in some])
            # Comparing all values with each bound vectorizes, so it is faster than a binary search per value.
            above = (~(values[:, None] <= bounds[:, None])).sum(dim=2, dtype=torch.int32)
            rows |= zip(some, above.unbind(), strict=True)
    return torch.stack([rows[index] for index in range(len(samples))]).to(torch.int64)


def _as_tensor(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Returns int64 [sizes], of one operation for each run of equal sizes."""
    # A conditional branch of the graph cannot hold a constant tensor.
    runs = [(size, len(list(run))) for size, run in itertools.groupby(sizes)]
    return torch.cat([torch.full((count,), size, device=device) for size, count in runs])


_WATCHED: dict[str, tuple[str, ...]] = {
    "gradients": ("grads",),
    "parameters": ("weights",),
    "updates": ("updates",),
    "all": ("weights", "grads"),
}


def watch(
    log: str | Sequence[str] = "all", *, every: When = 100, parameter: str | Sequence[str] = "*", sample: int = 4096
) -> Composed:
    """Logs histograms of parameters and gradients: several ``histograms``, composed.

    Gradients exist only inside the compiled step, so this is a callback and not an observer.

    Args:
        log: ``"gradients"``, ``"parameters"``, or ``"all"`` for both, as in ``wandb.watch``; or ``"updates"``. Or
            several of them.
        every: As for ``histograms``.
        parameter: Patterns of the parameters and blocks to include, as for ``histograms``.
        sample: Elements per parameter, 1 or more.

    Raises:
        ValueError: As for ``histograms``.

    Example:
        >>> watch("gradients", every=50)
        1 callback
          Updated    histograms/grads
          StepEnd    histograms/grads
          slots: 'histograms/grads'
    """
    words = [log] if isinstance(log, str) else list(log)
    if not words:
        raise ValueError("expected log to name what to watch, got nothing. Pass 'all'.")
    for word in words:
        check_choice("log", word, tuple(_WATCHED))
    kinds = dict.fromkeys(kind for word in words for kind in _WATCHED[word])
    return compose(*(histograms(kind, every=every, parameter=parameter, sample=sample) for kind in kinds))
