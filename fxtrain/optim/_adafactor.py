"""Adafactor: second moments of matrices kept as one row and one column."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Scalar, Tree, args_from, check_fraction, check_non_negative, check_positive_int
from fxtrain.optim._leafwise import at_least, mixed, refuse_paths, squared, wide, widest
from fxtrain.optim._masking import Mask
from fxtrain.optim._momentum import ema
from fxtrain.optim._scaling import (
    ScalarOrSchedule,
    add_decayed_weights,
    clip_by_block_rms,
    scale,
    scale_by_learning_rate,
    scale_by_param_block_rms,
)
from fxtrain.optim._state import PerParameter, real_full, start_counts
from fxtrain.optim._transform import GradientTransformation, chain, described
from fxtrain.tree import MaskedNode, leaf_paths


class FactoredState(NamedTuple):
    """The state of ``scale_by_factored_rms``. A parameter has either ``v_row`` and ``v_col``, or ``v``."""

    count: PerParameter  # int64 [parameters]: updates of each
    v_row: Tree  # the parameter's shape without its largest dimension, real, float32 at least
    v_col: Tree  # the parameter's shape without its second largest dimension, real, float32 at least
    v: Tree  # the parameter's shape, real, float32 at least


@described
def scale_by_factored_rms(
    *,
    factored: bool = True,
    decay_rate: Scalar = 0.8,
    decay_offset: int = 0,
    min_dim_size_to_factor: int = 128,
    eps: Scalar | None = 1e-30,
    factor_last: bool = False,
    clamp: bool = False,
) -> GradientTransformation:
    """Divides updates by the root of a factored moving average of their squares; see ``adafactor``.

        R = b R + (1 - b) mean_columns(g^2 + eps),    C = b C + (1 - b) mean_rows(g^2 + eps),    b = 1 - t^-decay_rate
        u = g / sqrt(R C / mean(R))

    Args:
        factored: Whether to factor second moments at all.
        decay_rate: Exponent of the decay schedule of the averages, in [0, 1). Larger values average over more steps.
        decay_offset: Subtracted from the update count in that schedule. For fine-tuning, pass the count at which it
            starts.
        min_dim_size_to_factor: A parameter is factored if two of its dimensions have at least this size.
        eps: Added to the squares. None for the machine epsilon of the parameter's dtype.
        factor_last: Whether to factor the last two dimensions, as in ``torch.optim.Adafactor``, or the two largest, as
            in optax.
        clamp: Whether ``eps`` is a lower bound of the mean of R and of the root, as in torch, instead of being added.

    Example:
        >>> tx = scale_by_factored_rms(min_dim_size_to_factor=2)
        >>> grads = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
        >>> tx.update(grads, tx.init(grads))[0]
        tensor([[1., 1.],
                [1., 1.]])
    """
    check_fraction(decay_rate=decay_rate)
    check_positive_int("min_dim_size_to_factor", min_dim_size_to_factor)
    if eps is not None:
        check_non_negative(eps=eps)

    def dims(leaf: Tensor) -> tuple[int, int] | None:
        """Returns the two dimensions to factor, or None if the leaf is not factored."""
        if not factored or leaf.ndim < 2:
            return None
        ranked = list(range(leaf.ndim)) if factor_last else sorted(range(leaf.ndim), key=lambda dim: leaf.shape[dim])
        second, largest = ranked[-2:]
        return (second, largest) if leaf.shape[second] >= min_dim_size_to_factor else None

    def without(leaf: Tensor, dim: int) -> Tensor:
        return leaf.new_zeros(leaf.shape[:dim] + leaf.shape[dim + 1 :])

    def init(params: Tree) -> FactoredState:
        leaves, structure = tree.flatten(real_full(params))
        found = [(leaf, dims(leaf)) for leaf in leaves]
        return FactoredState(
            start_counts(params),
            tree.unflatten(structure, [without(leaf, at[1]) if at else MaskedNode() for leaf, at in found]),
            tree.unflatten(structure, [without(leaf, at[0]) if at else MaskedNode() for leaf, at in found]),
            tree.unflatten(structure, [MaskedNode() if at else leaf for leaf, at in found]),
        )

    def update(updates: Tree, opt_state: FactoredState, params: Tree | None = None) -> tuple[Tree, FactoredState]:
        leaves, structure = tree.flatten(updates)
        rows, columns, whole = (dict(zip(leaf_paths(kept), tree.leaves(kept), strict=True)) for kept in opt_state[1:])
        paths = leaf_paths(updates)
        if {*paths} != {*rows, *whole}:
            refuse_paths("updates", paths, "the optimizer state", [*rows, *whole])
        new: tuple[list[Tensor], ...] = ([], [], [])
        results: list[Tensor] = []
        count = opt_state.count + 1
        shares = (count.values - decay_offset).to(widest(updates)) ** -decay_rate

        for path, leaf, share in zip(paths, leaves, shares.unbind(), strict=True):
            floor = torch.finfo(leaf.dtype).eps if eps is None else eps
            update = wide(leaf)
            square = squared(update) if clamp else squared(update) + floor
            at = dims(leaf)
            if at is None:
                v = mixed(square, whole[path], share)
                new[2].append(v)
                scaled = update / (at_least(v.sqrt(), floor) if clamp else v.sqrt())
            else:
                row = mixed(square.mean(at[1]), rows[path], share)
                column = mixed(square.mean(at[0]), columns[path], share)
                new[0].append(row)
                new[1].append(column)
                scaled = _over_factored_root(update, row, column, at, floor if clamp else None)
            results.append(scaled.to(leaf.dtype))

        memory = (
            tree.unflatten(tree.flatten(kept)[1], values) for kept, values in zip(opt_state[1:], new, strict=True)
        )
        return tree.unflatten(structure, results), FactoredState(count, *memory)

    return GradientTransformation(init, update)


@described
@args_from(scale_by_factored_rms, add_decayed_weights)
def adafactor(
    learning_rate: ScalarOrSchedule | None = None,
    *,
    min_dim_size_to_factor: int = 128,
    decay_rate: Scalar = 0.8,
    decay_offset: int = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Scalar | None = 1.0,
    momentum: Scalar | None = None,
    dtype_momentum: torch.dtype = torch.float32,
    weight_decay_rate: ScalarOrSchedule | None = None,
    eps: Scalar = 1e-30,
    factored: bool = True,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adafactor: adaptive steps with second moments per row and column of a matrix instead of per element.

        u = -lr max(rms(p), 0.001) clip(g / sqrt(R C / mean(R)))

    Args:
        learning_rate: A float, a tensor of shape [], or a schedule. None is the same as 1.
        multiply_by_parameter_scale: Whether to multiply each update by the root mean square of its parameter.
        clipping_threshold: Upper bound of the root mean square of each update. None disables clipping.
        momentum: Decay rate of a moving average of the updates. None disables it.
        dtype_momentum: Dtype of that average.
        weight_decay_rate: Decoupled weight decay, not multiplied by the learning rate. None disables it.
        eps: Added to the squares.

    Example:
        >>> tx = adafactor(0.01)
        >>> state = tx.init({"embedding": torch.ones(512, 256), "bias": torch.ones(256)})
        >>> state[0].v_row["embedding"].shape, state[0].v_col["embedding"].shape, state[0].v["bias"].shape
        (torch.Size([256]), torch.Size([512]), torch.Size([256]))

    References:
        Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018.
    """
    parts = [
        scale_by_factored_rms(
            factored=factored,
            decay_rate=decay_rate,
            decay_offset=decay_offset,
            min_dim_size_to_factor=min_dim_size_to_factor,
            eps=eps,
        )
    ]
    if clipping_threshold is not None:
        parts.append(clip_by_block_rms(clipping_threshold))
    if learning_rate is not None:
        parts.append(scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        parts.append(scale_by_param_block_rms())
    if momentum is not None:
        parts.append(ema(momentum, debias=False, accumulator_dtype=dtype_momentum))
    if weight_decay_rate is not None:
        parts.append(add_decayed_weights(weight_decay_rate, mask))
    return chain(*parts, scale(-1.0))


def _over_factored_root(
    update: Tensor, row: Tensor, column: Tensor, dims: tuple[int, int], floor: Scalar | None
) -> Tensor:
    second, largest = dims
    # ``row`` lacks the largest dimension, so the index of the second one may have shifted.
    mean = row.mean(second - 1 if second > largest else second, keepdim=True)
    if floor is not None:
        variance = (row / at_least(mean, floor)).unsqueeze(largest) * column.unsqueeze(second)
        return update / at_least(variance.sqrt(), floor)
    # Multiply by one factor at a time, because the product of two tiny averages underflows in float32.
    return update * torch.rsqrt(row / mean).unsqueeze(largest) * torch.rsqrt(column).unsqueeze(second)
