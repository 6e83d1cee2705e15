"""Splits a batch into microbatches, and averages their gradients."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Batch, Metrics, Tree, describe
from fxtrain.data._graphs import holds_graph
from fxtrain.metrics import Metric
from fxtrain.step._gradients import Gradient


def microbatches(batch: Batch, count: int) -> list[Batch]:
    """Splits a batch into ``count`` parts of equal size along the first dimension of its tensors.

    Lists and tuples without tensors, such as texts, are split too if they have one entry per example. All other leaves
    are shared by all parts: 0-d tensors, tensors whose first dimension is 1 (which broadcast, as position ids do), and
    leaves that are not tensors.

    Args:
        batch: A pytree of tensors [examples, ...], of columns with one entry per example, and of leaves to share.
        count: Number of parts.

    Returns:
        The parts, in order.

    Raises:
        ValueError: If first dimensions differ, if ``count`` does not divide them, or if the batch contains a graph.

    Example:
        >>> microbatches({"x": torch.arange(4), "scale": torch.tensor(2.0)}, 2)
        [{'x': tensor([0, 1]), 'scale': tensor(2.)}, {'x': tensor([2, 3]), 'scale': tensor(2.)}]
    """
    if count == 1:
        return [batch]
    # Dynamo cannot trace the search for graphs.
    if not torch.compiler.is_dynamo_compiling() and holds_graph(batch):
        raise ValueError(
            f"accumulate={count}: expected a batch of tensors [examples, ...], got a graph, which cannot be split. Use "
            "accumulate=1 and a smaller batch size in its loader."
        )
    examples = _common_size(batch, count)
    is_column = functools.partial(_is_column, examples)

    def part(index: int) -> Batch:
        rows = slice(index * examples // count, (index + 1) * examples // count)
        return tree.map(
            lambda leaf: leaf[rows] if _has_examples(leaf) or is_column(leaf) else leaf, batch, is_leaf=is_column
        )

    return [part(index) for index in range(count)]


def mean_gradient(parts: Iterable[Gradient]) -> Gradient:
    """Returns the mean of the gradients of several microbatches, weighted if the loss function returns weights.

        sum_i w_i g_i / sum_i w_i

    Loss and 0-d metrics are averaged in the same way, ``fxtrain.metrics`` are merged, and buffers are the last part's.
    Outputs are concatenated along their first dimension, and 0-d outputs are stacked.

    Args:
        parts: One or more results of ``gradients``. With a generator, at most two are in memory at a time.

    Raises:
        ValueError: If ``parts`` is empty, or if only some parts have a weight.

    Example:
        >>> import torch, fxtrain as fx
        >>> find = fx.gradients(lambda model, batch: fx.weighted(model["w"] * batch.mean(), len(batch)))
        >>> state = fx.init({"w": torch.tensor(1.0)})
        >>> mean_gradient(find(state, part) for part in (torch.ones(1), torch.zeros(3))).grads
        {'w': tensor(0.2500)}
    """
    total: Gradient | None = None
    outputs: list[Tree] = []
    for part in parts:
        total = part if total is None else joined(total, part)
        outputs.append(part.outputs)
    if total is None:
        raise ValueError("expected the gradients of at least one microbatch, got none.")
    return averaged(total, outputs)


def joined(total: Gradient, part: Gradient) -> Gradient:
    """Returns the weighted mean of two parts, or their sum if they have no weights, which ``averaged`` divides.

    Args:
        total: A part, or the result for earlier parts.
        part: The next part.

    Raises:
        ValueError: If only one of them has a weight.
    """
    if (total.weight is None) != (part.weight is None):
        raise ValueError(
            "expected all microbatches or none to have a weight, got both kinds. Return fxtrain.weighted from all "
            "paths of the loss function."
        )
    weight = share = None
    if total.weight is not None and part.weight is not None:
        weight = total.weight + part.weight
        # A running mean, because weights times gradients would overflow in float16.
        share = torch.where(weight > 0, part.weight / weight, 0)

    def mix(first: Tensor, second: Tensor) -> Tensor:
        return first + second if share is None else _mixed(first, second, share)

    metrics: Metrics = {
        name: value.merge(part.metrics[name]) if isinstance(value, Metric) else mix(value, part.metrics[name])
        for name, value in total.metrics.items()
    }
    used = tree.map(operator.or_, total.used, part.used)
    grads = tree.map(mix, total.grads, part.grads)
    local = total.local
    if local is not None and part.local is not None:
        local = local._replace(examples=local.examples + part.local.examples)
    return Gradient(metrics["loss"], metrics, grads, part.buffers, used, weight, part.written, local=local)


def averaged(total: Gradient, outputs: Sequence[Tree]) -> Gradient:
    """Returns the mean of all parts.

    Args:
        total: The result of ``joined``.
        outputs: The outputs of each part.
    """
    count = len(outputs)
    if count == 1:
        return total
    if outputs[0] is not None:
        total = dataclasses.replace(total, outputs=tree.map(_concatenated, *outputs))
    if total.weight is not None:
        return total
    metrics = {name: value if isinstance(value, Metric) else value / count for name, value in total.metrics.items()}
    grads = tree.map(lambda grad: grad / count, total.grads)
    return dataclasses.replace(total, loss=metrics["loss"], metrics=metrics, grads=grads)


def _concatenated(*parts: Tensor) -> Tensor:
    return torch.cat(parts) if parts[0].ndim else torch.stack(parts)


def _mixed(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Returns ``(1 - share) * first + share * second``, computed in float32 or wider."""
    is_inexact = first.is_floating_point() or first.is_complex()
    dtype = first.dtype if is_inexact else torch.get_default_dtype()
    wide = torch.promote_types(dtype, torch.float32)
    other, share = (1 - share).to(wide), share.to(wide)
    return (first.to(wide) * other + second.to(wide) * share).to(dtype)


def _has_examples(leaf: object) -> TypeGuard[Tensor]:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] != 1


def _is_column(examples: int, part: Tree) -> bool:
    """Whether this is a list or a tuple with one entry per example and without tensors."""
    if type(part) not in (list, tuple) or len(part) != examples:
        return False
    return not any(isinstance(leaf, Tensor) for leaf in tree.leaves(part))


def _common_size(batch: Batch, count: int) -> int:
    leaves = tree.leaves(batch)
    size = next((leaf.shape[0] for leaf in leaves if _has_examples(leaf)), 1)
    for index, leaf in enumerate(leaves):
        if size % count or (_has_examples(leaf) and leaf.shape[0] != size):
            # Dynamo cannot trace the formatting of paths.
            is_traced = torch.compiler.is_dynamo_compiling()
            place = "in the batch" if is_traced else f"at {tree.paths(batch, 'batch')[index]}"
            raise ValueError(
                f"accumulate={count}: expected tensors with the same first dimension, divisible by {count}, got "
                f"{describe(leaf)} {place}. Choose another batch size. Keep a tensor without examples outside the "
                "batch, or give it a first dimension of 1, which all microbatches share."
            )
    return size
