"""Arithmetic on single leaves, and update rules of single leaves applied to whole trees.

A transformation is written as a rule from one update and its state to the new update and state. A rule sees tensors in
float32 or wider, regardless of the dtypes they are stored in, and its results are rounded once, to those dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Scalar, Tree
from fxtrain.tree import Path, as_code, leaf_paths


def wide(leaf: Tensor) -> Tensor:
    """Returns the leaf in float32 or complex64, or as it is if it is wider."""
    return leaf if leaf.dtype in _EXACT else leaf.to(torch.promote_types(leaf.dtype, torch.float32))


def widest(values: Tree) -> torch.dtype:
    """Returns the real dtype in which every leaf is exact: float32 or float64."""
    dtypes = {leaf.dtype for leaf in tree.leaves(values)}
    return torch.float64 if torch.float64 in dtypes or torch.complex128 in dtypes else torch.float32


def squared(update: Tensor) -> Tensor:
    """Returns the elementwise squared absolute value, which is real."""
    if update.is_complex():
        return update.real.square() + update.imag.square()
    return update.square()


def moving_average(value: Tensor, average: Tensor, decay: Scalar) -> Tensor:
    """Returns ``decay * average + (1 - decay) * value``."""
    if isinstance(decay, Tensor) or value.dtype != average.dtype:
        return decay * average + (1 - decay) * value
    return torch.lerp(average, value, 1 - decay)  # one operation instead of three


def mixed(value: Tensor, average: Tensor, share: Tensor) -> Tensor:
    """Returns ``(1 - share) * average + share * value``, accurately even if ``1 - share`` rounds to 1."""
    return average + share * (value - average)


def log_decay(decay: Scalar) -> Scalar:
    """Returns the logarithm of a decay rate, or minus infinity for 0."""
    if isinstance(decay, Tensor):
        return decay.log()
    return math.log(decay) if decay > 0 else -math.inf


def bias_correction(decay: Scalar, count: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``1 - decay^count``, elementwise: the divisor that corrects the bias of an average that starts at zero.

    Computed as ``-expm1(count log(decay))``, because the direct difference loses precision in float32 at small counts.
    """
    return -torch.expm1(count.to(dtype) * log_decay(decay))


def bias_corrections(decay: Scalar, count: Tensor, dtype: torch.dtype, nesterov: bool) -> list[Tensor]:
    """Returns the corrections for ``debiased``: at this count and, for Nesterov momentum, at the next."""
    counts = (count, count + 1) if nesterov else (count,)
    return [bias_correction(decay, number, dtype) for number in counts]


def debiased(update: Tensor, average: Tensor, decay: Scalar, correction: Tensor, ahead: Tensor | None = None) -> Tensor:
    """Returns the bias-corrected average, which already includes the update. ``ahead`` selects Nesterov momentum."""
    if ahead is None:
        return average / correction
    return moving_average(update / correction, average / ahead, decay)


def at_least(value: Tensor, bound: Scalar) -> Tensor:
    """Returns the elementwise maximum."""
    return value.clamp(min=cast(Any, bound))


def at_most(value: Tensor, bound: Scalar) -> Tensor:
    """Returns the elementwise minimum."""
    return value.clamp(max=cast(Any, bound))


def root_mean_square(leaf: Tensor) -> Tensor:
    """Returns the root mean square of the absolute values: []. Zero for a tensor without elements."""
    return (squared(leaf).sum() / max(leaf.numel(), 1)).sqrt()


def norm(leaf: Tensor) -> Tensor:
    """Returns the root of the sum of squared absolute values: []."""
    return squared(leaf).sum().sqrt()


_EXACT = {torch.float32, torch.float64, torch.complex64, torch.complex128}


def map_updates(rule: Callable[[Tensor], Tensor], updates: Tree) -> Tree:
    """Returns the tree of ``rule(update)``."""
    leaves, structure = tree.flatten(updates)
    return tree.unflatten(structure, _narrowed([rule(wide(update)) for update in leaves], leaves))


def map_with_params(rule: Callable[[Tensor, Tensor], Tensor], name: str, updates: Tree, params: Tree) -> Tree:
    """Returns the tree of ``rule(update, param)``.

    Raises:
        ValueError: If ``params`` is None, or if the trees or the shapes of their leaves differ. The message names the
            transformation ``name`` or the path.
    """
    if params is None:
        raise ValueError(f"expected params for {name}, got None. Call update(grads, opt_state, params).")
    return combine(rule, "updates", updates, "params", params)


def combine(rule: Callable[[Tensor, Tensor], Tensor], name: str, values: Tree, other_name: str, others: Tree) -> Tree:
    """Returns the tree of ``rule(value, other)``, in the dtypes of ``values``. Errors use the names."""
    leaves, structure = tree.flatten(values)
    other_leaves = tree.leaves(others)
    _refuse_mismatch(name, values, leaves, other_name, others, other_leaves)
    results = [rule(wide(value), wide(other)) for value, other in zip(leaves, other_leaves, strict=True)]
    return tree.unflatten(structure, _narrowed(results, leaves))


def map_with_state(
    rule: Callable[..., tuple[Tensor, ...]], updates: Tree, *state: Tree, numbers: Sequence[Tensor] = ()
) -> tuple[Tree, ...]:
    """Returns the trees of ``rule(update, *state, *numbers) -> (update, *state)``.

    Args:
        rule: A function of one update, its state and its scalars. Tensors are in float32 or wider.
        updates: Pytree of tensors.
        state: State of the optimizer, as pytrees like ``updates``, whose dtypes may differ.
        numbers: Vectors with one scalar per leaf, such as ``PerParameter.values``. A rule sees the scalars of its own
            leaf, of shape [].

    Raises:
        ValueError: If the trees or the shapes of their leaves differ. The message names the path.
    """
    flat = [tree.flatten(values) for values in (updates, *state)]
    leaves = flat[0][0]
    for part, (kept, _) in zip(state, flat[1:], strict=True):
        _refuse_mismatch("updates", updates, leaves, "the optimizer state", part, kept)
    columns = [*([wide(leaf) for leaf in column] for column, _ in flat), *(vector.unbind() for vector in numbers)]
    results = [rule(*row) for row in zip(*columns, strict=True)]
    return tuple(
        tree.unflatten(structure, _narrowed([result[index] for result in results], column))
        for index, (column, structure) in enumerate(flat)
    )


def refuse_paths(name: str, paths: list[Path], other_name: str, other_paths: list[Path]) -> None:
    """Raises the error for two trees whose leaves have different paths."""
    where = [f"{as_code(path)} only in {name}" for path in paths if path not in other_paths][:1]
    where += [f"{as_code(path)} only in {other_name}" for path in other_paths if path not in paths][:1]
    raise ValueError(
        f"expected {name} and {other_name} to have the same structure, got {' and '.join(where)}. Pass trees like the "
        "parameters given to init."
    )


def _refuse_mismatch(
    name: str, values: Tree, leaves: list[Tensor], other_name: str, others: Tree, other_leaves: list[Tensor]
) -> None:
    """Raises if the leaves of two trees differ in path or shape. Placeholders of masked leaves may differ."""
    paths, other_paths = leaf_paths(values), leaf_paths(others)
    if paths != other_paths:
        refuse_paths(name, paths, other_name, other_paths)
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in other_leaves]:
        for path, leaf, other in zip(paths, leaves, other_leaves, strict=True):
            if leaf.shape != other.shape:
                raise ValueError(
                    f"expected {name}{as_code(path)} to have shape {list(other.shape)} as in {other_name}, got "
                    f"{list(leaf.shape)}. Pass trees like the parameters given to init."
                )


def _narrowed(values: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    # A cast to the same dtype would still add a node to the graph.
    return [v if v.dtype == was.dtype else v.to(was.dtype) for v, was in zip(values, like, strict=True)]
