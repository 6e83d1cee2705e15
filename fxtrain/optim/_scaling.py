"""Transformations that scale or bound the size of updates, and weight decay."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Scalar, Tree, check_non_negative, check_positive, describe
from fxtrain.equivalents import refuse_foreign
from fxtrain.optim._leafwise import at_least, at_most, map_updates, map_with_params, norm, root_mean_square
from fxtrain.optim._learning_rates import LearningRate, ScalarOrSchedule
from fxtrain.optim._masking import Mask, masked
from fxtrain.optim._state import start_count
from fxtrain.optim._transform import GradientTransformation, described, identity, stateless
from fxtrain.schedules import Schedule
from fxtrain.schedules._schedule import refuse_unusable_function


@described
def scale(factor: Scalar) -> GradientTransformation:
    """Multiplies updates by a constant: ``u = factor * g``.

    Example:
        >>> tx = scale(0.5)
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([   1.5000, -100.0000])
    """
    return stateless(lambda updates, params: map_updates(lambda update: factor * update, updates))


class ScaleByScheduleState(NamedTuple):
    """The state of ``scale_by_schedule``."""

    count: Tensor  # int64 []: updates made


@described
def scale_by_schedule(schedule: Schedule) -> GradientTransformation:
    """Multiplies updates by a schedule: ``u = schedule(count) * g``, with a count from 0.

    Args:
        schedule: A function from the count (int64 []) to a float or a tensor of shape [].

    Example:
        >>> from fxtrain import schedules
        >>> tx = scale_by_schedule(schedules.linear(1.0, 0.0, transition_steps=2))
        >>> state = tx.init(torch.tensor(0.0))
        >>> for _ in range(3):
        ...     update, state = tx.update(torch.tensor(1.0), state)
        ...     print(float(update))
        1.0
        0.5
        0.0
    """
    refuse_foreign("schedule", "a function of the step", schedule, as_schedule=True)
    if not callable(schedule):
        raise TypeError(
            f"expected schedule to be a function of the step, got {describe(schedule)}. For a number, use "
            "fx.optim.scale."
        )
    refuse_unusable_function("schedule", schedule)

    def update(
        updates: Tree, opt_state: ScaleByScheduleState, params: Tree | None = None
    ) -> tuple[Tree, ScaleByScheduleState]:
        factor: Any = schedule(opt_state.count)

        def scaled(update: Tensor) -> Tensor:
            # The product has this dtype anyway. Casting the factor first lets a compiled step cast it only once.
            dtype = torch.promote_types(update.real.dtype, torch.float32)
            return (factor.to(dtype) if isinstance(factor, Tensor) else factor) * update

        return map_updates(scaled, updates), ScaleByScheduleState(opt_state.count + 1)

    def init(params: Tree) -> ScaleByScheduleState:
        return ScaleByScheduleState(start_count(params))

    return GradientTransformation(init, update)


@described
def scale_by_learning_rate(learning_rate: ScalarOrSchedule, *, flip_sign: bool = True) -> GradientTransformation:
    """Multiplies updates by the negative learning rate, which turns them into descent steps.

    Args:
        learning_rate: A float, a tensor of shape [], or a schedule.
        flip_sign: Whether to multiply by -1 as well.

    Raises:
        ValueError: If the learning rate is negative.

    Example:
        >>> tx = scale_by_learning_rate(0.1)
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([-0.3000, 20.0000])
    """
    sign = -1 if flip_sign else 1
    refuse_foreign("learning_rate", "a number or a schedule", learning_rate, as_schedule=True)
    if callable(learning_rate):
        refuse_unusable_function("learning_rate", learning_rate)

    def value(opt_state: Any) -> Scalar:
        return learning_rate(opt_state.count) if callable(learning_rate) else learning_rate

    if callable(learning_rate):
        tx = scale_by_schedule(lambda count: sign * learning_rate(count))
    else:
        check_non_negative(learning_rate=learning_rate)
        tx = scale(sign * learning_rate)
    return tx._replace(learning_rates=(LearningRate(learning_rate, value),))


@described
def scale_by_trust_ratio(
    *, min_norm: Scalar = 0.0, trust_coefficient: Scalar = 1.0, eps: Scalar = 0.0
) -> GradientTransformation:
    """Scales each leaf's update to the norm of its parameter.

        u = c |p| / (|g| + eps) g,    and u = g where either norm is 0

    Args:
        min_norm: Lower bound of both norms.
        trust_coefficient: c.
        eps: Added to the norm of the update.

    Example:
        >>> tx = scale_by_trust_ratio()
        >>> grads, params = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 4.0])
        >>> tx.update(grads, tx.init(params), params)[0]
        tensor([0., 5.])

    References:
        You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, 2020.
    """
    check_non_negative(min_norm=min_norm, trust_coefficient=trust_coefficient, eps=eps)

    def rule(update: Tensor, param: Tensor) -> Tensor:
        param_norm = at_least(norm(param), min_norm)
        update_norm = at_least(norm(update), min_norm)
        ratio = trust_coefficient * param_norm / (update_norm + eps)
        return update * torch.where((param_norm == 0) | (update_norm == 0), 1.0, ratio)

    return stateless(lambda updates, params: map_with_params(rule, "scale_by_trust_ratio", updates, params))


@described
def scale_by_param_block_rms(*, min_scale: Scalar = 1e-3) -> GradientTransformation:
    """Multiplies each leaf's update by the root mean square of its parameter, or by ``min_scale`` if that is larger.

    Example:
        >>> tx = scale_by_param_block_rms()
        >>> grads, params = torch.tensor([0.0, 2.0]), torch.tensor([4.0, 4.0])
        >>> tx.update(grads, tx.init(params), params)[0]
        tensor([0., 8.])
    """
    check_non_negative(min_scale=min_scale)

    def rule(update: Tensor, param: Tensor) -> Tensor:
        return update * at_least(root_mean_square(param), min_scale)

    return stateless(lambda updates, params: map_with_params(rule, "scale_by_param_block_rms", updates, params))


@described
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


@described
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


@described
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


class WeightDecaySchedule(NamedTuple):
    """The state of a scheduled weight decay."""

    count: Tensor  # int64 []: updates made


@described
def add_decayed_weights(weight_decay: ScalarOrSchedule = 0.0, mask: Mask | None = None) -> GradientTransformation:
    """Adds a multiple of the parameters to the updates: ``u = g + weight_decay * p``.

    Before an adaptive rescaling this is L2 regularization. Between the rescaling and the learning rate it is the
    decoupled weight decay of AdamW.

    Args:
        weight_decay: A float, a tensor of shape [], or a schedule.
        mask: Which parameters decay: a pytree of bools, or a function ``(path, leaf) -> bool``. Defaults to all.

    Example:
        >>> import torch
        >>> params = {"norm.scale": torch.ones(2), "linear.weight": torch.ones(2, 2)}
        >>> tx = add_decayed_weights(0.1, mask=lambda path, leaf: leaf.ndim > 1)
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> float(updates["norm.scale"][0]), float(updates["linear.weight"][0, 0])
        (1.0, 1.10...)
    """
    refuse_foreign("weight_decay", "a number or a schedule", weight_decay, as_schedule=True)
    if callable(weight_decay):
        refuse_unusable_function("weight_decay", weight_decay)
    tx = _scheduled(weight_decay) if callable(weight_decay) else _constant(weight_decay)
    return tx if mask is None else masked(tx, mask)


def _constant(weight_decay: float | Tensor) -> GradientTransformation:
    check_non_negative(weight_decay=weight_decay)
    if not isinstance(weight_decay, Tensor) and weight_decay == 0:
        return identity()
    return stateless(lambda updates, params: _decayed(updates, params, weight_decay))


def _scheduled(weight_decay: Schedule) -> GradientTransformation:
    def update(
        updates: Tree, opt_state: WeightDecaySchedule, params: Tree | None = None
    ) -> tuple[Tree, WeightDecaySchedule]:
        decayed = _decayed(updates, params, weight_decay(opt_state.count))
        return decayed, WeightDecaySchedule(opt_state.count + 1)

    def init(params: Tree) -> WeightDecaySchedule:
        return WeightDecaySchedule(start_count(params))

    return GradientTransformation(init, update)


def _decayed(updates: Tree, params: Tree, rate: Scalar) -> Tree:
    return map_with_params(lambda update, param: update + rate * param, "add_decayed_weights", updates, params)
