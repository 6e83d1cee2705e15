"""Microbatches: the parts of a batch, and the mean of their gradients."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import NAMESPACE, ops
from fxtrain.data._containers import holds_graph
from fxtrain.metrics import Metric
from fxtrain.step._gradients import Gradient
from fxtrain.step._returned import described


def microbatches(batch: Any, count: int) -> list[Any]:
    """The batch cut into ``count`` parts of equal size along the first dimension of its tensors.

    Lists and tuples of values that are not tensors, such as texts, are cut too if they have an entry for each example.

    Leaves without examples are shared by all parts: tensors of shape [], tensors whose first dimension is 1 (which
    broadcast, as position ids do), and all other leaves.

    Args:
        batch: A pytree of tensors [examples, ...], of columns with an entry for each example, and of leaves to share.
        count: How many parts.

    Raises:
        ValueError: If two first dimensions differ, if ``count`` does not divide them, or if there is a graph.

    Example:
        >>> microbatches({"x": torch.arange(4), "scale": torch.tensor(2.0)}, 2)
        [{'x': tensor([0, 1]), 'scale': tensor(2.)}, {'x': tensor([2, 3]), 'scale': tensor(2.)}]
    """
    if count == 1:
        return [batch]
    if not torch.compiler.is_dynamo_compiling() and holds_graph(batch):  # Dynamo cannot follow the search
        raise ValueError(
            f"accumulate={count}: expected a batch of tensors [examples, ...], got a graph, which cannot be cut. Take "
            "accumulate=1 and a smaller batch size in its loader."
        )
    examples = _common_size(batch, count)
    size = examples // count

    def part(leaf: Any, index: int) -> Any:
        is_cut = _has_examples(leaf) or _is_column(leaf, examples)
        return leaf[index * size : (index + 1) * size] if is_cut else leaf

    if torch.compiler.is_dynamo_compiling():
        return [tree.map(lambda leaf, index=index: part(leaf, index), batch) for index in range(count)]

    def is_leaf(part: Any) -> bool:
        return _is_column(part, examples)

    return [
        ops.tree_map(lambda leaf, index=index: part(leaf, index), batch, is_leaf=is_leaf, namespace=NAMESPACE)
        for index in range(count)
    ]


def mean_gradient(parts: Iterable[Gradient]) -> Gradient:
    """The gradient of several microbatches: the mean of theirs, by weight where the loss function returns one.

        sum_i w_i g_i / sum_i w_i

    Loss and 0-d metrics are averaged in the same way, ``fxtrain.metrics`` are merged, and buffers are the last part's.

    Args:
        parts: At least one, from ``gradients``. A generator keeps no more than two in memory.

    Raises:
        ValueError: If there is no part, or only some of them have a weight.

    Example:
        >>> import torch, fxtrain as fx
        >>> find = fx.gradients(lambda model, batch: fx.weighted(model["w"] * batch.mean(), len(batch)))
        >>> state = fx.init({"w": torch.tensor(1.0)})
        >>> mean_gradient(find(state, part) for part in (torch.ones(1), torch.zeros(3))).grads
        {'w': tensor(0.2500)}
    """
    total, count = None, 0
    for part in parts:
        total, count = part if total is None else joined(total, part), count + 1
    if total is None:
        raise ValueError("expected the gradients of at least one microbatch, got none.")
    return averaged(total, count)


def joined(total: Gradient, part: Gradient) -> Gradient:
    """The weighted mean of two parts, or their sum where they have no weight: ``averaged`` makes the mean of it."""
    if (total.weight is None) != (part.weight is None):
        raise ValueError(
            "expected every microbatch to have a weight or none to have one, got both. Return fxtrain.weighted from "
            "all paths of the loss function."
        )
    weight = share = None
    if total.weight is not None and part.weight is not None:
        weight = total.weight + part.weight
        # A running mean, because products of weights and gradients would overflow in float16.
        share = torch.where(weight > 0, part.weight / weight, 0)

    def mix(first: Tensor, second: Tensor) -> Tensor:
        return first + second if share is None else _mixed(first, second, share)

    metrics: dict[str, Any] = {
        name: value.merge(part.metrics[name]) if isinstance(value, Metric) else mix(value, part.metrics[name])
        for name, value in total.metrics.items()
    }
    used = tree.map(operator.or_, total.used, part.used)
    grads = tree.map(mix, total.grads, part.grads)
    return Gradient(metrics["loss"], metrics, grads, part.buffers, used, weight, part.written)


def averaged(total: Gradient, count: int) -> Gradient:
    """The mean, from what ``joined`` made of ``count`` parts."""
    if count == 1 or total.weight is not None:
        return total
    metrics = {name: value if isinstance(value, Metric) else value / count for name, value in total.metrics.items()}
    grads = tree.map(lambda grad: grad / count, total.grads)
    return dataclasses.replace(total, loss=metrics["loss"], metrics=metrics, grads=grads)


def _mixed(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """``(1 - share) * first + share * second``, computed in float32 at least."""
    is_inexact = first.is_floating_point() or first.is_complex()
    dtype = first.dtype if is_inexact else torch.get_default_dtype()
    wide = torch.promote_types(dtype, torch.float32)
    other, share = (1 - share).to(wide), share.to(wide)
    return (first.to(wide) * other + second.to(wide) * share).to(dtype)


def _has_examples(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] != 1


def _is_column(part: Any, examples: int) -> bool:
    """Whether this is a list or a tuple of an entry for each example, without tensors."""
    return (
        type(part) in (list, tuple)
        and len(part) == examples
        and not any(isinstance(leaf, Tensor) for leaf in ops.tree_leaves(part, namespace=NAMESPACE))
    )


def _common_size(batch: Any, count: int) -> int:
    leaves = tree.leaves(batch)
    size = next((leaf.shape[0] for leaf in leaves if _has_examples(leaf)), 1)
    for index, leaf in enumerate(leaves):
        if size % count or (_has_examples(leaf) and leaf.shape[0] != size):
            # Dynamo cannot write paths.
            path = "a leaf" if torch.compiler.is_dynamo_compiling() else tree.paths(batch, "batch")[index]
            raise ValueError(
                f"accumulate={count}: expected tensors with one first dimension that {count} divides, the examples, "
                f"got {path}, {described(leaf)}. Choose another batch size; keep a tensor without examples outside of "
                "the batch, or give it a first dimension of 1, which all microbatches share."
            )
    return size
