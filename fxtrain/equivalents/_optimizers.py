"""Translates optimizers of ``torch.optim`` and their options to expressions of ``fx.optim``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from fxtrain.equivalents._expressions import NoEquivalentError
from fxtrain.equivalents._groups import Group, partitioned
from fxtrain.equivalents._options import FOR_SPEED, Options, defaults_of
from fxtrain.equivalents._schedulers import Schedules


def optimizer(
    given: torch.optim.Optimizer,
    model: object = None,
    schedules: Callable[[int], Schedules] | None = None,
    *,
    inject: bool = False,
) -> str:
    """Returns the expression for an optimizer with its parameter groups.

    Args:
        given: The optimizer.
        model: The module that holds the parameters, for their names.
        schedules: Maps the index of a group to the schedules of its learning rate and momentum.
        inject: Whether the learning rate is kept in the optimizer state, where a callback can change it.

    Raises:
        NoEquivalentError: If there is no equivalent expression.
    """
    kind = type(given)
    if not _is_translated(kind):
        raise NoEquivalentError(_unknown(kind))
    groups: list[Group] = []
    for index, group in enumerate(given.param_groups):
        options = {name: _plain(value) for name, value in group.items() if name != "params"}
        options["lr"] = _plain(group.get("initial_lr", group["lr"]))
        scheduled = schedules(index) if schedules else Schedules("")
        plain = not any(param.is_complex() for param in group["params"])
        expression, undecayed = (
            _of_group(kind, each, scheduled, plain=plain, inject=inject)
            for each in (options, {**options, "weight_decay": 0.0})
        )
        groups.append(Group(expression, undecayed, cast(float, options.get("weight_decay", 0.0)), group))
    return partitioned(groups, model, has_mask=kind is torch.optim.AdamW)


def optimizer_class(kind: type) -> str:
    """Returns the expression for an optimizer class with its default options.

    Raises:
        NoEquivalentError: If there is no equivalent expression.
    """
    if not _is_translated(kind):
        raise NoEquivalentError(_unknown(kind))
    return _of_group(kind, _defaults(kind), Schedules(""), plain=True, inject=False)


def _of_group(kind: type, options: Mapping[str, object], scheduled: Schedules, *, plain: bool, inject: bool) -> str:
    rate = scheduled.rate or repr(options["lr"])
    if kind is torch.optim.Rprop and (scheduled.rate or inject):
        raise NoEquivalentError("Rprop uses its learning rate in the first step only. Leave the scheduler out.")
    amsgrad, maximize = options.get("amsgrad", False), options.get("maximize", False)
    named = _named(kind, cast(Options, options)) if plain and not amsgrad and not maximize else None
    if named is None:
        if scheduled.momentum:
            raise NoEquivalentError(
                f"the scheduler cycles the momentum of {kind.__name__}, which from_torch keeps constant. "
                "Pass cycle_momentum=False to the scheduler."
            )
        given = _given(kind, options)
        call = f"fx.optim.inject_hyperparams({_FROM})" if inject else _FROM
        return f"{call}({', '.join([f'torch.optim.{kind.__name__}', f'lr={rate}', *given])})"
    before, name, arguments = named
    if scheduled.momentum:
        arguments["momentum" if name == "sgd" else "b1"] = scheduled.momentum
    listed = [f"{argument}={value}" for argument, value in arguments.items()]
    if inject or scheduled.momentum:
        call = f"fx.optim.inject_hyperparams(fx.optim.{name})({', '.join([f'learning_rate={rate}', *listed])})"
    else:
        call = f"fx.optim.{name}({', '.join([rate, *listed])})"
    return f"fx.optim.chain({before}, {call})" if before else call


_FROM = "fx.optim.from_torch"

Named = tuple[str, str, dict[str, str]]
"""The transformation to chain before, the factory's name, and its arguments except the learning rate."""


def _named(kind: type, options: Options) -> Named | None:
    """Returns the translation to a factory of fx.optim, or None if there is only ``from_torch``."""
    match kind:
        case torch.optim.SGD:
            momentum = _other(options, momentum=0, nesterov=False, dampening=0) if options["momentum"] else {}
            return _decayed(options), "sgd", _code(momentum)
        case torch.optim.Adam if not options["decoupled_weight_decay"]:
            return _decayed(options), "adam", _moments(options)
        case torch.optim.Adam | torch.optim.AdamW:
            return "", "adamw", {**_moments(options), "weight_decay": repr(options["weight_decay"])}
        case torch.optim.Adamax:
            return _decayed(options), "adamax", _moments(options)
        case torch.optim.NAdam if not options["decoupled_weight_decay"]:
            return _decayed(options), "nadam", {**_moments(options), "momentum_decay": repr(options["momentum_decay"])}
        case torch.optim.RAdam if not options["decoupled_weight_decay"]:
            return _decayed(options), "radam", {**_moments(options), "correct_eps": "True"}
        # With momentum, fx.optim.rmsprop applies the learning rate before the momentum and torch after it.
        case torch.optim.RMSprop if not options["momentum"]:
            arguments = {"decay": options["alpha"], **_other(options, eps=1e-8), "eps_in_sqrt": False}
            arguments |= {"centered": True} if options["centered"] else {}
            return _decayed(options), "rmsprop", _code(arguments)
        case torch.optim.Adagrad if not options["lr_decay"]:
            start = float(options["initial_accumulator_value"])
            arguments = {"initial_accumulator_value": start, "eps": options["eps"], "eps_in_sqrt": False}
            return _decayed(options), "adagrad", _code(arguments)
        case torch.optim.Adadelta:
            return "", "adadelta", _code(_other(options, rho=0.9, eps=1e-6, weight_decay=0.0))
        case torch.optim.Rprop:
            (eta_minus, eta_plus), (smallest, largest) = options["etas"], options["step_sizes"]
            steps = {"eta_minus": eta_minus, "eta_plus": eta_plus, "min_step_size": smallest, "max_step_size": largest}
            return "", "rprop", _code(_other(steps, eta_minus=0.5, eta_plus=1.2, min_step_size=1e-6, max_step_size=50))
        case _:
            return None


def _moments(options: Options) -> dict[str, str]:
    b1, b2 = options["betas"]
    arguments = {"b1": b1, "b2": b2} if (b1, b2) != (0.9, 0.999) else {}
    return _code({**arguments, **_other(options, eps=1e-8)})


def _other(options: Mapping[str, object], **defaults: float) -> dict[str, object]:
    """Returns the options that differ from the given defaults of fx."""
    return {name: options[name] for name, default in defaults.items() if options[name] != default}


def _decayed(options: Options) -> str:
    decay = options["weight_decay"]
    return f"fx.optim.add_decayed_weights({decay!r})" if decay else ""


def _code(arguments: Mapping[str, object]) -> dict[str, str]:
    return {name: repr(value) for name, value in arguments.items()}


def _is_translated(kind: type) -> bool:
    return kind.__module__.startswith("torch.optim") and kind.__name__ not in ("Optimizer", *_REFUSED)


def _given(kind: type, options: Mapping[str, object]) -> list[str]:
    """Returns keyword arguments for the options that differ from the class's defaults, except the learning rate."""
    defaults = {name: value for name, value in _defaults(kind).items() if name != "lr" and name not in FOR_SPEED}
    return [f"{name}={options[name]!r}" for name, value in defaults.items() if options.get(name, value) != value]


def _defaults(kind: type) -> dict[str, object]:
    """Returns the options of an optimizer's class with their defaults."""
    return {name: _plain(value) for name, value in defaults_of(kind).items()}


def _plain(value: object) -> object:
    """Converts one-element tensors to Python scalars, also inside tuples."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return tuple(_plain(item) for item in value) if isinstance(value, tuple | list) else value


_REFUSED: Mapping[str, str] = {
    "LBFGS": (
        "torch.optim.LBFGS has no counterpart, because it evaluates the loss several times in each step. Use a "
        "first-order optimizer, such as fx.optim.adam, or run LBFGS in a plain loop on fx.state_dict(state)"
    ),
    "SparseAdam": (
        "torch.optim.SparseAdam has no counterpart, because gradients are dense in fx. Use fx.optim.adam, and "
        "sparse=False in nn.Embedding"
    ),
}

_KNOWN: Mapping[str, str] = {
    "Lion": "fx.optim.lion(lr, weight_decay=...)",
    "Lamb": "fx.optim.lamb(lr, weight_decay=...)",
    "LAMB": "fx.optim.lamb(lr, weight_decay=...)",
    "Adafactor": "fx.optim.adafactor(lr)",
    "Muon": "fx.optim.muon(lr)",
    "Lookahead": "fx.optim.lookahead(tx)",
    "AdamW8bit": "fx.optim.adamw(lr, weight_decay=...)",
    "PagedAdamW": "fx.optim.adamw(lr, weight_decay=...)",
    "PagedAdamW8bit": "fx.optim.adamw(lr, weight_decay=...)",
    "PagedAdamW32bit": "fx.optim.adamw(lr, weight_decay=...)",
    "Adam8bit": "fx.optim.adam(lr)",
    "Lion8bit": "fx.optim.lion(lr, weight_decay=...)",
    "FusedAdam": "fx.optim.adamw(lr, weight_decay=...)",
    "FusedLAMB": "fx.optim.lamb(lr, weight_decay=...)",
    "DeepSpeedCPUAdam": "fx.optim.adamw(lr, weight_decay=...)",
    "AdamW": "fx.optim.adamw(lr, weight_decay=...)",
    "Adam": "fx.optim.adam(lr)",
    "SGD": "fx.optim.sgd(lr, momentum=...)",
}
"""Optimizers of other packages by class name, with the closest one in fx. Details may differ."""


def _unknown(kind: type) -> str:
    name = kind.__name__
    if kind.__module__.startswith("torch.optim") and name in _REFUSED:
        return _REFUSED[name]
    bases = [base for base in kind.__mro__[1:] if _is_translated(base)]
    if name in _KNOWN:
        close = f"The closest is {_KNOWN[name]}, whose defaults may differ. Otherwise implement"
    elif bases:
        close = (
            f"It derives from torch.optim.{bases[0].__name__}, whose equivalent is {optimizer_class(bases[0])}. "
            "Otherwise implement"
        )
    else:
        close = "Implement"
    return (
        f"{kind.__module__}.{name} has no exact counterpart. {close} it as "
        "fx.optim.GradientTransformation(init, update). init(params) returns the optimizer state, and "
        "update(grads, state, params) returns the updates, which are added to the parameters, and the new state"
    )
