"""Transformations that bound the size of updates."""

from __future__ import annotations

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Scalar, Tree, check_positive
from fxtrain.optim._leafwise import map_updates
from fxtrain.optim._moments import at_least, at_most, root_mean_square
from fxtrain.optim._transform import GradientTransformation, stateless


def clip_by_value(max_delta: Scalar) -> GradientTransformation:
    """Clips each element to [-max_delta, max_delta]. Split complex updates first: see ``split_real_and_imaginary``.

    Example:
        >>> tx = clip_by_value(5.0)
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([ 3., -5.])
    """
    check_positive(max_delta=max_delta)
    return stateless(
        lambda updates, params: map_updates(lambda update: at_most(at_least(update, -max_delta), max_delta), updates)
    )


def clip_by_global_norm(max_norm: Scalar) -> GradientTransformation:
    """Scales all updates by one factor, so that the norm of the whole tree is at most ``max_norm``.

        u = g min(1, max_norm / |g|)

    Gradients that are not finite stay non-finite: see ``apply_if_finite``.

    Args:
        max_norm: Upper bound of the norm, above 0.

    Example:
        >>> tx = clip_by_global_norm(1.0)
        >>> grads = {"a": torch.tensor(3.0), "b": torch.tensor(4.0)}
        >>> tx.update(grads, tx.init(grads))[0]
        {'a': tensor(0.6000), 'b': tensor(0.8000)}

    References:
        Pascanu et al., On the difficulty of training Recurrent Neural Networks, 2013.
    """
    check_positive(max_norm=max_norm)

    def clipped(updates: Tree, params: Tree) -> Tree:
        norm = tree.global_norm(updates)
        factor = torch.where(norm < max_norm, 1.0, max_norm / norm)
        return map_updates(lambda update: update * factor, updates)

    return stateless(clipped)


def clip_by_block_rms(threshold: Scalar) -> GradientTransformation:
    """Scales each leaf down so that its root mean square is at most ``threshold``.

        u = g / max(1, rms(g) / threshold)

    Example:
        >>> tx = clip_by_block_rms(1.0)
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([ 0.0212, -1.4141])
    """
    check_positive(threshold=threshold)

    def rule(update: Tensor) -> Tensor:
        return update / (root_mean_square(update) / threshold).clamp(min=1.0)

    return stateless(lambda updates, params: map_updates(rule, updates))
