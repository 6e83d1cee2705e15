"""The optimizers of ``torch.optim`` as gradient transformations, with the numbers they have there."""

# pyright: reportIncompatibleMethodOverride=false
# `count` is the name of the field, as in optax; that tuples have a method of this name is no loss.

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain.equivalents import refuse_foreign
from fxtrain.optim._adadelta import scale_by_adadelta
from fxtrain.optim._adafactor import scale_by_factored_rms
from fxtrain.optim._adagrad import scale_by_rss
from fxtrain.optim._adam import scale_by_adam, scale_by_adamax, scale_by_amsgrad
from fxtrain.optim._clipping import clip_by_block_rms
from fxtrain.optim._complex_values import split_real_and_imaginary
from fxtrain.optim._decay import add_decayed_weights
from fxtrain.optim._leaves import at_most, map_with_memory, start_count, widest, zeros
from fxtrain.optim._momentum import trace
from fxtrain.optim._muon import scale_by_muon, scale_by_shape
from fxtrain.optim._nadam import scale_by_nadam
from fxtrain.optim._per_parameter import PerParameter, per_parameter, start_counts
from fxtrain.optim._radam import scale_by_radam
from fxtrain.optim._rmsprop import scale_by_rms, scale_by_stddev
from fxtrain.optim._rprop import rprop
from fxtrain.optim._scaling import scale, scale_by_learning_rate, scale_by_param_block_rms
from fxtrain.optim._transform import GradientTransformation, chain

Options = Mapping[str, Any]


def from_torch(optimizer: type[torch.optim.Optimizer], **hyperparameters: Any) -> GradientTransformation:
    """The transformation that makes the steps of a ``torch.optim`` optimizer.

    Its arguments, their defaults and their checks are those of the class. The steps agree to rounding. In half
    precision squares are kept in float32. It is
    made of this package's own transformations, because torch's functions write into their arguments, read numbers
    back from the device, and so can be neither ``vmap``-ed nor, some of them, compiled into one graph.

    Args:
        optimizer: A class, such as ``torch.optim.AdamW``.
        hyperparameters: As the class takes them. ``lr`` may be a schedule too. ``foreach``, ``fused``,
            ``capturable`` and ``differentiable`` change no number and are accepted.

    Raises:
        TypeError: If the optimizer has no functional form, or takes no such argument.
        ValueError: If the class refuses a value.

    Example:
        >>> tx = from_torch(torch.optim.SGD, lr=0.1, momentum=0.9)
        >>> params = {"w": torch.tensor(1.0)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor(-0.1000)}
    """
    given: Any = optimizer
    if isinstance(given, torch.optim.Optimizer):
        refuse_foreign("optimizer", "a class of torch.optim", given)
    refuse_foreign("lr", "a number or a schedule", hyperparameters.get("lr"), as_schedule=True)
    if optimizer not in _RULES:
        name = getattr(optimizer, "__name__", repr(optimizer))
        why = _REFUSED.get(name, "its steps are not known here")
        raise TypeError(
            f"from_torch({name}): {why}. There are {', '.join(sorted(known.__name__ for known in _RULES))}."
        )
    defaults = _DEFAULTS[optimizer]
    for name in hyperparameters:
        if name not in defaults:
            raise TypeError(f"torch.optim.{optimizer.__name__} takes no {name!r}; it takes {', '.join(defaults)}.")
    _let_torch_check(optimizer, hyperparameters)
    options = {**defaults, **hyperparameters}
    tx = _RULES[optimizer](options)
    if options.get("maximize", False):
        tx = chain(scale(-1.0), tx)
    return split_real_and_imaginary(tx)


def _let_torch_check(optimizer: Callable[..., Any], given: Options) -> None:
    numbers = {name: value for name, value in given.items() if name not in _FOR_SPEED and not callable(value)}
    if not any(isinstance(value, Tensor) for value in numbers.values()):
        optimizer([torch.zeros(1, 1)], **numbers)


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
    return rprop(options["lr"], eta_minus=eta_minus, eta_plus=eta_plus, min_step_size=smallest, max_step_size=largest)


def _adafactor(options: Options) -> GradientTransformation:
    eps, smallest_scale = options["eps"]
    rate = options["lr"]

    def relative_step(updates: Tensor, step: Tensor) -> Tensor:
        largest: Any = rate(step) if callable(rate) else rate
        return at_most(torch.rsqrt(updates + 1), largest)

    return chain(
        scale_by_factored_rms(
            decay_rate=-options["beta2_decay"], min_dim_size_to_factor=1, eps=eps, factor_last=True, clamp=True
        ),
        clip_by_block_rms(options["d"]),
        scale_by_param_block_rms(min_scale=smallest_scale),
        _scale_each(relative_step),
        # The learning rate is a factor of the decay, and only a bound of the step.
        _decay_at(rate, options["weight_decay"]),
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

    step: Tensor  # int64 []: updates of the optimizer, which a schedule of the learning rate reads
    count: PerParameter  # int64 [parameters]: updates of each
    eta: PerParameter  # float32 [parameters], or float64: the next step size, for the learning rate of the last update
    ax: Any  # like the parameters: their average
    AGES = ()  # the step is a schedule's, and each parameter has a count of its own


def _asgd(options: Options) -> GradientTransformation:
    rate, lambd, alpha, start = options["lr"], options["lambd"], options["alpha"], options["t0"]

    def init(params: Any) -> AsgdState:
        eta = per_parameter(params, dtype=widest(params))
        return AsgdState(start_count(params), start_counts(params), eta, zeros(params))

    def update(updates: Any, opt_state: AsgdState, params: Any = None) -> tuple[Any, AsgdState]:
        if params is None:
            raise ValueError("from_torch(ASGD) needs the parameters: call update(grads, opt_state, params).")
        count = opt_state.count.values.to(widest(updates))
        base: Any = rate(opt_state.step) if callable(rate) else rate
        eta = torch.where(opt_state.count.values == 0, base, opt_state.eta.values)
        share = 1 / (count - start).clamp(min=1)

        def rule(update: Tensor, param: Tensor, ax: Tensor, eta: Tensor, share: Tensor) -> tuple[Tensor, ...]:
            update = -eta * (update + lambd * param)
            return update, param, ax + share * (param + update - ax)

        steps, _, ax = map_with_memory(rule, updates, params, opt_state.ax, numbers=[eta, share])
        following = opt_state.eta.replace((base / (1 + lambd * base * (count + 1)) ** alpha).to(eta.dtype))
        return steps, AsgdState(opt_state.step + 1, opt_state.count + 1, following, ax)

    return chain(_l2(options), GradientTransformation(init, update))


def _with_decay(scaled: GradientTransformation, options: Options) -> GradientTransformation:
    """``scaled`` and the learning rate, with the weight decay before both or, decoupled, between them."""
    rate = scale_by_learning_rate(options["lr"])
    if options.get("decoupled_weight_decay", False):
        return chain(scaled, _l2(options), rate)
    return chain(_l2(options), scaled, rate)


def _l2(options: Options) -> GradientTransformation:
    return add_decayed_weights(options["weight_decay"])


def _decay_at(rate: Any, weight_decay: Any) -> GradientTransformation:
    if callable(rate):
        return add_decayed_weights(lambda count: rate(count) * weight_decay)
    return add_decayed_weights(rate * weight_decay)


class StepSizeState(NamedTuple):
    """The state of a step size that shrinks with the updates of each parameter."""

    step: Tensor  # int64 []: updates of the optimizer, which a schedule of the learning rate reads
    count: PerParameter  # int64 [parameters]: updates of each


def _scale_each(factor: Callable[[Tensor, Tensor], Tensor]) -> GradientTransformation:
    """Each parameter's update times a factor of the updates it had before and of the optimizer's step."""

    def rule(update: Tensor, by: Tensor) -> tuple[Tensor]:
        return (by * update,)

    def update(updates: Any, opt_state: StepSizeState, params: Any = None) -> tuple[Any, StepSizeState]:
        factors = factor(opt_state.count.values.to(widest(updates)), opt_state.step)
        (scaled,) = map_with_memory(rule, updates, numbers=[factors])
        return scaled, StepSizeState(opt_state.step + 1, opt_state.count + 1)

    def init(params: Any) -> StepSizeState:
        return StepSizeState(start_count(params), start_counts(params))

    return GradientTransformation(init, update)


def _is_set(value: Any) -> bool:
    # A tensor's value is not known when the graph is made.
    return isinstance(value, Tensor) or value != 0


_RULES: dict[Any, Callable[[Options], GradientTransformation]] = {
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
    "LBFGS": "it evaluates the loss several times in each step, and a transformation sees one gradient",
    "SparseAdam": "it is for sparse gradients, and torch.func makes dense ones",
}

_FOR_SPEED = ("foreach", "fused", "capturable", "differentiable")

# Read once, on import: the tracer of a compiled step cannot ask a class for its signature.
_DEFAULTS = {
    optimizer: {
        name: value.default for name, value in inspect.signature(optimizer).parameters.items() if name != "params"
    }
    for optimizer in _RULES
}
