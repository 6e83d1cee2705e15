"""The optimizers of ``torch.optim`` as gradient transformations."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fxtrain.core import Scalar, Tree, describe, did_you_mean, wide_dtype
from fxtrain.equivalents import refuse_foreign
from fxtrain.equivalents._options import FOR_SPEED, Options, defaults_of
from fxtrain.optim._accumulated_squares import scale_by_adadelta, scale_by_rms, scale_by_rss, scale_by_stddev
from fxtrain.optim._adafactor import scale_by_factored_rms
from fxtrain.optim._adam import scale_by_adam, scale_by_amsgrad
from fxtrain.optim._adam_variants import scale_by_adamax, scale_by_nadam, scale_by_radam
from fxtrain.optim._leafwise import at_most, map_with_state, widest
from fxtrain.optim._learning_rates import LearningRate
from fxtrain.optim._momentum import trace
from fxtrain.optim._muon import scale_by_muon, scale_by_shape
from fxtrain.optim._rprop import rprop
from fxtrain.optim._scaling import (
    add_decayed_weights,
    clip_by_block_rms,
    scale,
    scale_by_learning_rate,
    scale_by_param_block_rms,
)
from fxtrain.optim._state import PerParameter, per_parameter, start_count, start_counts, zeros
from fxtrain.optim._transform import GradientTransformation, chain, described
from fxtrain.optim._wrappers import split_real_and_imaginary


@described
def from_torch(optimizer: type[torch.optim.Optimizer], **hyperparameters: object) -> GradientTransformation:
    """Returns a transformation that takes the same steps as a ``torch.optim`` optimizer.

    Arguments, their defaults and their checks are those of the class. Steps agree up to rounding. Second moments of
    half-precision parameters are kept in float32.

    The steps are built from the transformations of this package. torch's own functions update their arguments in place
    and read values back from the device, so they cannot be vmapped, and some of them cannot be compiled into one graph.

    Args:
        optimizer: A class, such as ``torch.optim.AdamW``.
        hyperparameters: The arguments of the class. ``lr`` may also be a schedule. ``foreach``, ``fused``,
            ``capturable`` and ``differentiable`` do not affect the result and are ignored.

    Raises:
        TypeError: If the optimizer has no functional form, or does not take an argument.
        ValueError: If the class rejects a value.

    Example:
        >>> tx = from_torch(torch.optim.SGD, lr=0.1, momentum=0.9)
        >>> params = {"w": torch.tensor(1.0)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor(-0.1000)}
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        refuse_foreign("optimizer", "a class of torch.optim", optimizer)
    refuse_foreign("lr", "a number or a schedule", hyperparameters.get("lr"), as_schedule=True)
    if optimizer not in _RULES:
        name = getattr(optimizer, "__name__", describe(optimizer))
        why = _REFUSED.get(name, "")
        raise TypeError(
            f"expected optimizer to be a torch.optim class with a functional form, got {name}{why}. There are "
            f"{', '.join(sorted(known.__name__ for known in _RULES))}."
        )
    defaults = _DEFAULTS[optimizer]
    for name in hyperparameters:
        if name not in defaults:
            raise TypeError(
                f"expected an argument of torch.optim.{optimizer.__name__} ({', '.join(defaults)}), got {name!r}."
                f"{did_you_mean(name, defaults)}"
            )
    numbers = {name: value for name, value in hyperparameters.items() if name not in FOR_SPEED and not callable(value)}
    if not any(isinstance(value, Tensor) for value in numbers.values()):
        cast(Any, optimizer)([torch.zeros(1, 1)], **numbers)  # torch checks its arguments
    options = cast(Options, {**defaults, **hyperparameters})
    tx = _RULES[optimizer](options)
    if options.get("maximize", False):
        tx = chain(scale(-1.0), tx)
    return split_real_and_imaginary(tx)


def _sgd(options: Options) -> GradientTransformation:
    parts = [_l2(options)]
    if _is_set(options["momentum"]):
        dampening = options["dampening"] if _is_set(options["dampening"]) else None
        parts.append(trace(options["momentum"], nesterov=options["nesterov"], dampening=dampening))
    return chain(*parts, scale_by_learning_rate(options["lr"]))


def _adam(options: Options) -> GradientTransformation:
    b1, b2 = options["betas"]
    if options["amsgrad"]:
        scaled = scale_by_amsgrad(b1=b1, b2=b2, eps=options["eps"], correct_maximum=True)
    else:
        scaled = scale_by_adam(b1=b1, b2=b2, eps=options["eps"])
    return _with_decay(scaled, options)


def _adamw(options: Options) -> GradientTransformation:
    return _adam({**options, "decoupled_weight_decay": True})


def _adamax(options: Options) -> GradientTransformation:
    b1, b2 = options["betas"]
    return _with_decay(scale_by_adamax(b1=b1, b2=b2, eps=options["eps"]), options)


def _nadam(options: Options) -> GradientTransformation:
    b1, b2 = options["betas"]
    scaled = scale_by_nadam(b1=b1, b2=b2, eps=options["eps"], momentum_decay=options["momentum_decay"])
    return _with_decay(scaled, options)


def _radam(options: Options) -> GradientTransformation:
    b1, b2 = options["betas"]
    return _with_decay(scale_by_radam(b1=b1, b2=b2, eps=options["eps"], correct_eps=True), options)


def _rmsprop(options: Options) -> GradientTransformation:
    scale_by = scale_by_stddev if options["centered"] else scale_by_rms
    scaled = scale_by(decay=options["alpha"], eps=options["eps"], eps_in_sqrt=False)
    if _is_set(options["momentum"]):
        scaled = chain(scaled, trace(options["momentum"]))
    return _with_decay(scaled, options)


def _adagrad(options: Options) -> GradientTransformation:
    scaled = scale_by_rss(
        initial_accumulator_value=options["initial_accumulator_value"], eps=options["eps"], eps_in_sqrt=False
    )
    if _is_set(options["lr_decay"]):
        scaled = chain(scaled, _scale_each(lambda updates, step: 1 / (1 + updates * options["lr_decay"])))
    return _with_decay(scaled, options)


def _adadelta(options: Options) -> GradientTransformation:
    return _with_decay(scale_by_adadelta(rho=options["rho"], eps=options["eps"]), options)


def _rprop(options: Options) -> GradientTransformation:
    (eta_minus, eta_plus), (smallest, largest) = options["etas"], options["step_sizes"]
    return rprop(
        cast("Scalar", options["lr"]),
        eta_minus=eta_minus,
        eta_plus=eta_plus,
        min_step_size=smallest,
        max_step_size=largest,
    )


def _adafactor(options: Options) -> GradientTransformation:
    eps, smallest_scale = cast("tuple[Scalar | None, Scalar]", options["eps"])
    rate, decay = options["lr"], options["weight_decay"]

    def relative_step(updates: Tensor, step: Tensor) -> Tensor:
        largest = rate(step) if callable(rate) else rate
        return at_most(torch.rsqrt(updates + 1), largest)

    def current(opt_state: StepSizeState) -> Tensor:
        """Returns the step size of parameters that every step uses."""
        return relative_step(opt_state.step.to(wide_dtype(opt_state.step.device)), opt_state.step)

    scaled = _scale_each(relative_step)
    used = LearningRate(rate, current, follows_step=False)
    return chain(
        scale_by_factored_rms(
            decay_rate=-options["beta2_decay"], min_dim_size_to_factor=1, eps=eps, factor_last=True, clamp=True
        ),
        clip_by_block_rms(options["d"]),
        scale_by_param_block_rms(min_scale=smallest_scale),
        scaled._replace(learning_rates=(used,)),
        # As in torch, the learning rate multiplies the weight decay but only bounds the step size.
        add_decayed_weights((lambda count: rate(count) * decay) if callable(rate) else rate * decay),
        scale(-1.0),
    )


def _muon(options: Options) -> GradientTransformation:
    adjust = options["adjust_lr_fn"]
    scaled = scale_by_muon(
        ns_coeffs=options["ns_coefficients"],
        ns_steps=options["ns_steps"],
        ns_dtype=torch.bfloat16,
        beta=options["momentum"],
        eps=options["eps"],
        nesterov=options["nesterov"],
        bias_correction=False,
    )
    shaped = scale_by_shape(0.2 if adjust == "match_rms_adamw" else None)
    return _with_decay(chain(scaled, shaped), {**options, "decoupled_weight_decay": True})


class AsgdState(NamedTuple):
    """The state of ``torch.optim.ASGD``."""

    step: Tensor  # int64 []: updates of the optimizer, read by a learning rate schedule
    count: PerParameter  # int64 [parameters]: updates of each
    eta: PerParameter  # float32 or float64 [parameters]: next step size, at the last learning rate
    ax: Tree  # like the parameters: their average
    # ``with_trainable`` may add parameters at any step, which only schedules read. Each parameter has its own count.
    SHARED_COUNTS = ()


def _asgd(options: Options) -> GradientTransformation:
    rate, lambd, alpha, start = options["lr"], options["lambd"], options["alpha"], options["t0"]

    def init(params: Tree) -> AsgdState:
        eta = per_parameter(params, dtype=widest(params))
        return AsgdState(start_count(params), start_counts(params), eta, zeros(params))

    def at(opt_state: AsgdState) -> Scalar:
        return rate(opt_state.step) if callable(rate) else rate

    def step_sizes(opt_state: AsgdState) -> Tensor:
        return torch.where(opt_state.count.values == 0, at(opt_state), opt_state.eta.values)

    def update(updates: Tree, opt_state: AsgdState, params: Tree | None = None) -> tuple[Tree, AsgdState]:
        if params is None:
            raise ValueError("expected params for from_torch(ASGD), got None. Call update(grads, opt_state, params).")
        count, base, eta = opt_state.count.values.to(widest(updates)), at(opt_state), step_sizes(opt_state)
        share = 1 / (count - start).clamp(min=1)

        def rule(update: Tensor, param: Tensor, ax: Tensor, eta: Tensor, share: Tensor) -> tuple[Tensor, ...]:
            update = -eta * (update + lambd * param)
            return update, param, ax + share * (param + update - ax)

        steps, _, ax = map_with_state(rule, updates, params, opt_state.ax, numbers=[eta, share])
        following = opt_state.eta.replace((base / (1 + lambd * base * (count + 1)) ** alpha).to(eta.dtype))
        return steps, AsgdState(opt_state.step + 1, opt_state.count + 1, following, ax)

    def current(opt_state: AsgdState) -> Scalar:
        """Returns the step size of parameters that every step uses."""
        return step_sizes(opt_state).amin() if opt_state.count.paths else at(opt_state)

    used = LearningRate(rate, current, follows_step=False)
    return chain(_l2(options), GradientTransformation(init, update, (used,)))


def _with_decay(scaled: GradientTransformation, options: Options) -> GradientTransformation:
    """Chains ``scaled`` with the learning rate and the weight decay: L2 before ``scaled``, or decoupled after it."""
    rate = scale_by_learning_rate(options["lr"])
    if options.get("decoupled_weight_decay", False):
        return chain(scaled, _l2(options), rate)
    return chain(_l2(options), scaled, rate)


def _l2(options: Options) -> GradientTransformation:
    return add_decayed_weights(options["weight_decay"])


class StepSizeState(NamedTuple):
    """The state of a step size that shrinks with the updates of each parameter."""

    step: Tensor  # int64 []: updates of the optimizer, read by a learning rate schedule
    count: PerParameter  # int64 [parameters]: updates of each


def _scale_each(factor: Callable[[Tensor, Tensor], Tensor]) -> GradientTransformation:
    """Multiplies each parameter's update by ``factor(earlier updates of the parameter, step of the optimizer)``."""

    def rule(update: Tensor, by: Tensor) -> tuple[Tensor]:
        return (by * update,)

    def update(updates: Tree, opt_state: StepSizeState, params: Tree | None = None) -> tuple[Tree, StepSizeState]:
        factors = factor(opt_state.count.values.to(widest(updates)), opt_state.step)
        (scaled,) = map_with_state(rule, updates, numbers=[factors])
        return scaled, StepSizeState(opt_state.step + 1, opt_state.count + 1)

    def init(params: Tree) -> StepSizeState:
        return StepSizeState(start_count(params), start_counts(params))

    return GradientTransformation(init, update)


def _is_set(value: Scalar) -> bool:
    # The value of a tensor cannot be read while the graph is traced.
    return isinstance(value, Tensor) or value != 0


_RULES: dict[type[torch.optim.Optimizer], Callable[[Options], GradientTransformation]] = {
    torch.optim.ASGD: _asgd,
    torch.optim.Adadelta: _adadelta,
    torch.optim.Adafactor: _adafactor,
    torch.optim.Adagrad: _adagrad,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adamw,
    torch.optim.Adamax: _adamax,
    torch.optim.Muon: _muon,
    torch.optim.NAdam: _nadam,
    torch.optim.RAdam: _radam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Rprop: _rprop,
    torch.optim.SGD: _sgd,
}

_REFUSED = {
    "LBFGS": ", which evaluates the loss several times per step, while a transformation sees one gradient",
    "SparseAdam": ", which is for sparse gradients, while torch.func computes dense ones",
}


# Read at import, because Dynamo cannot trace `inspect.signature`.
_DEFAULTS = {optimizer: defaults_of(optimizer) for optimizer in _RULES}
