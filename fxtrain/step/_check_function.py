"""Checks of loss functions and steps before anything runs, with errors that suggest a fix for common mistakes."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable

import torch
from torch import nn

from fxtrain.core import describe, name_of
from fxtrain.core._tracebacks import place


class ContractError(TypeError):
    """A user-defined function breaks its contract. Differentiating it in another way does not help."""


def place_of(function: object) -> str:
    """Returns the name of a function, with its file and line if they are known.

    Example:
        >>> place_of(len)
        'len'
    """
    code = code_of(function)
    return name_of(function) + (f" ({place(code.co_filename, code.co_firstlineno)})" if code is not None else "")


def refuse_unless_loss(function: object, argument: str = "loss_fn") -> None:
    """Raises unless ``function`` can be called as ``function(model, batch)``.

    Args:
        function: The value that a user passed as a loss function.
        argument: Name of the parameter, for errors.

    Raises:
        TypeError: Names the function, its line and a fix.
    """
    if torch.compiler.is_dynamo_compiling() or _is_plain_loss_function(function):
        return
    found = _fault_of_loss(function)
    if found is not None:
        what, remedy = found
        raise TypeError(f"expected {argument} to be a function (model, batch) -> loss, got {what}. {remedy}")


def refuse_unless_step(function: object) -> None:
    """Raises unless ``function`` can be called as ``function(state, batch)``.

    Raises:
        TypeError: Names the function, its line and a fix.
    """
    if torch.compiler.is_dynamo_compiling():
        return
    remedy = ""
    if not callable(function) or isinstance(function, type | nn.Module):
        what = describe(function)
        remedy = "Make a step from a loss function: fxtrain.train_step(loss_fn, tx)."
    elif takes_model(function):
        what = f"the loss function {place_of(function)}"
        remedy = "Make a step from it: fxtrain.train_step(loss_fn, tx)."
    elif not _takes_two(function):
        what = _shown(function)
        remedy = "Define it with these two parameters."
    if remedy:
        raise TypeError(f"expected step to be a function (state, batch) -> (state, output), got {what}. {remedy}")


def refuse_unless_transform(function: object) -> None:
    """Raises unless ``function`` can be called as ``function(state, batch)`` and is no loss function.

    Raises:
        TypeError: Names the function, its line and a fix.
    """
    if torch.compiler.is_dynamo_compiling():
        return
    expected = "expected transform_batch to be a function (state, batch) -> batch, got"
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{expected} {describe(function)}. Define one: def transform(state, batch): return {{...}}.")
    called: Callable[..., object] = function.forward if isinstance(function, nn.Module) else function
    if takes_model(called):
        what = f"{place_of(function)}, which takes a model"
        remedy = "Take the state. A view of it is its model: fxtrain.view(state, train=True)."
    elif _positional_names(called)[1:2] == ["state"]:
        what, remedy = _shown(called), "Swap the parameters: (state, batch)."
    elif not _takes_two(called):
        what = f"the module {name_of(function)}" if isinstance(function, nn.Module) else _shown(function)
        remedy = f"Add the state: lambda state, batch: {name_of(function)}(batch)."
    else:
        return
    raise TypeError(f"{expected} {what}. {remedy}")


def takes_model(function: Callable[..., object]) -> bool:
    """Returns whether the first parameter of a function is named like a model.

    Example:
        >>> takes_model(lambda model, batch: None), takes_model(lambda state, batch: None)
        (True, False)
    """
    return not _MODEL_NAMES.isdisjoint(_positional_names(function)[:1])


_MODEL_NAMES = frozenset(("model", "net", "network", "module", "m"))
_BATCH_NAMES = frozenset(("batch", "data", "inputs"))
_PREDICTION_NAMES = frozenset(
    ("input", "output", "outputs", "logits", "pred", "preds", "predictions", "prediction", "y_pred", "y_hat", "target")
)
_UNUSUAL_FLAGS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_COROUTINE | inspect.CO_GENERATOR
_UNUSUAL_FLAGS |= inspect.CO_ASYNC_GENERATOR


def _is_plain_loss_function(function: object) -> bool:
    """Whether this is a plain function of two parameters with usual names. Cheap, for steps that make one per call."""
    if type(function) is not types.FunctionType:
        return False
    code = function.__code__
    return (
        code.co_argcount == 2
        and not code.co_kwonlyargcount
        and not code.co_flags & _UNUSUAL_FLAGS
        and code.co_varnames[0] in _MODEL_NAMES
        and not hasattr(function, "__wrapped__")
    )


def _fault_of_loss(function: object) -> tuple[str, str] | None:
    """Returns a description of an invalid loss function and a fix, or None if it may be valid."""
    if isinstance(function, type) or not callable(function):
        return describe(function), _remedy_for_class(function)
    if isinstance(function, nn.Module):
        return _fault_of_module(function)
    target = function if code_of(function) is not None else type(function).__call__
    while isinstance(target, functools.partial):
        target = target.func
    shown = _shown(function)
    if inspect.iscoroutinefunction(target) or inspect.isasyncgenfunction(target):
        return f"the async function {shown}", "Write it without async."
    if inspect.isgeneratorfunction(target):
        return f"the generator function {shown}", "Return the loss instead of yielding it."
    first = _positional_names(function)
    if first[:1] == ["self"]:
        return f"{shown}, an unbound method", "Give the method of an instance."
    fault = _fault_of_names(function, first)
    if fault is None and _takes_two(function):
        return None
    return shown, fault or _remedy_for_signature(function, first)


def _fault_of_names(function: Callable[..., object], first: list[str]) -> str | None:
    """Returns a fix for a function whose parameter names are not those of a model and a batch, or None."""
    name = name_of(function)
    if len(first) > 1 and first[0] not in _MODEL_NAMES and first[1] in _MODEL_NAMES:
        return f"Swap the parameters: ({first[1]}, {first[0]})."
    if first and first[0] in _BATCH_NAMES:
        return "Take the model as the first parameter, and call it. It has the weights of the state."
    if len(first) > 1 and first[0] in _PREDICTION_NAMES:
        return f'Call it on the output of the model: lambda model, batch: {name}(model(batch["x"]), batch["y"]).'
    return None


def _remedy_for_signature(function: Callable[..., object], first: list[str]) -> str:
    required = [
        parameter
        for parameter in _parameters(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    beyond = [parameter.name for parameter in required if parameter.name not in first[:2]]
    if len(first) < 2 and {"model", "batch"} <= {parameter.name for parameter in required}:
        return f"Pass them by keyword: lambda model, batch: {name_of(function)}(model=model, batch=batch)."
    if len(first) >= 2 and beyond:
        given = ", ".join(f"{name}=..." for name in beyond)
        return f"Bind the others: functools.partial({name_of(function)}, {given})."
    return "Define it with the parameters (model, batch)."


def _fault_of_module(module: nn.Module) -> tuple[str, str] | None:
    kind = type(module).__name__
    first = _positional_names(module.forward)
    if hasattr(module, "training_step"):
        is_lightning = any(base.__name__ == "LightningModule" for base in type(module).__mro__)
        return (
            f"the LightningModule {kind}" if is_lightning else f"the module {kind}",
            "Give it to fxtrain.init, and turn its training_step into a function that calls model instead of self.",
        )
    if type(module).__module__.startswith("torch.nn.modules.loss") or (
        first and first[0] in _PREDICTION_NAMES and len(first) > 1
    ):
        return (
            f"the module {kind}, which compares predictions with targets",
            'Call it in a function: lambda model, batch: criterion(model(batch["x"]), batch["y"]).',
        )
    if _takes_two(module.forward) and first[:1] and first[0] in _MODEL_NAMES:
        return None
    return (
        f"the module {kind}",
        "Give the model to fxtrain.init, and write a function that computes the loss: "
        'lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]).',
    )


def _remedy_for_class(function: object) -> str:
    if not isinstance(function, type):
        return "Give the function itself, as in fxtrain.train_step(loss_fn, tx)."
    if issubclass(function, nn.Module):
        return (
            f"Make an instance, and call it in a function: criterion = {function.__name__}(), "
            'lambda model, batch: criterion(model(batch["x"]), batch["y"]).'
        )
    return "Give an instance, or one of its methods."


def _takes_two(function: Callable[..., object]) -> bool:
    try:
        _parameters(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _parameters(function: Callable[..., object]) -> inspect.Signature:
    # The wrapper is called, so its own signature counts and not that of the wrapped function.
    return inspect.signature(function, follow_wrapped=False)


def _positional_names(function: Callable[..., object]) -> list[str]:
    """Returns the names of the positional parameters."""
    try:
        parameters = _parameters(function).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def _shown(function: Callable[..., object]) -> str:
    """Returns the name, signature and line of a function, without annotations."""
    name, place = name_of(function), place_of(function)
    try:
        signature = _parameters(function)
    except (TypeError, ValueError):
        return place
    plain = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return f"{name}{signature.replace(parameters=plain, return_annotation=signature.empty)}{place.removeprefix(name)}"


def code_of(function: object) -> types.CodeType | None:
    """Returns the code of a function, or of the function behind a method, a partial or a callable object."""
    function = inspect.unwrap(function) if callable(function) else function
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    function = getattr(function, "__func__", function)
    method = None if isinstance(function, type) else getattr(type(function), "__call__", None)  # noqa: B004
    code = getattr(function, "__code__", None) or getattr(method, "__code__", None)
    return code if isinstance(code, types.CodeType) else None
