"""Translates what other libraries offer: optimizers and schedulers, callbacks, metrics, and arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from fxtrain.core import did_you_mean

Options = ParamSpec("Options")
R = TypeVar("R")


def refuse_foreign(
    argument: str, expected: str, value: object, model: object = None, *, as_schedule: bool = False
) -> None:
    """Raises if ``value`` is an optimizer or a scheduler of another library, or a class of either.

    The message contains an expression that evaluates to the equivalent, with ``fx`` for ``fxtrain``. All other values
    pass.

    Args:
        argument: The argument's name.
        expected: A noun phrase for what is expected there, with its article.
        value: The value that was passed.
        model: The module that is trained, for the names of parameters in groups.
        as_schedule: Whether a scheduler is translated to a schedule alone, without its optimizer.

    Raises:
        TypeError: If ``value`` is such an object or class.
    """
    if value is None or isinstance(value, int | float | Tensor):
        return
    # Imported lazily to keep `import fxtrain` fast.
    from fxtrain.equivalents._advice import advice_on

    found = advice_on(value, model, as_schedule=as_schedule)
    if found is not None:
        kind, advice = found
        raise TypeError(f"expected {argument} to be {expected}, got {kind}. {advice}")


_LIBRARIES = ("lightning", "pytorch_lightning", "transformers", "keras", "tf_keras", "ignite", "fastai", "composer")


def class_of(value: object) -> type[object]:
    """Returns a class itself, and of any other value its class."""
    return value if isinstance(value, type) else type(value)


def library_of(value: object) -> str | None:
    """Returns the name of the training library that a value or a class belongs to, or None.

    Example:
        >>> library_of(type("EarlyStopping", (), {"__module__": "keras.src.callbacks"}))
        'keras'
    """
    return next(
        (root for base in class_of(value).__mro__ if (root := base.__module__.partition(".")[0]) in _LIBRARIES), None
    )


def refuse_foreign_callback(argument: str, expected: str, value: object) -> None:
    """Raises if ``value`` is a callback or a logger of another library, or a class of either.

    Args:
        argument: The argument's name.
        expected: A noun phrase for what is expected there.
        value: The value that was passed.

    Raises:
        TypeError: The message names the counterpart.
    """
    library = library_of(value)
    if library is not None:
        from fxtrain.equivalents._classes import advice_on_callback

        name = class_of(value).__name__
        raise TypeError(f"{argument}: expected {expected}, got {name} of {library}. {advice_on_callback(value)}")


def advice_on_metric(value: object) -> str | None:
    """Returns advice on a metric of torchmetrics or Keras; None for other values."""
    roots = {base.__module__.partition(".")[0] for base in class_of(value).__mro__}
    if "torchmetrics" in roots:
        return (
            "Make its class once, Measure = fxtrain.interop.torchmetric(metric), and measure with "
            "Measure.from_model_output(predictions, targets)."
        )
    if "keras" in roots:
        return "Use a class of fxtrain.metrics, or one of torchmetrics with fxtrain.interop.torchmetric(metric)."
    return None


def with_known_arguments(function: Callable[Options, R]) -> Callable[Options, R]:
    """Returns ``function``, whose error for an argument of another library says where it went.

    Example:
        >>> @with_known_arguments
        ... def early_stopping(metric, *, patience): ...
        >>> early_stopping(monitor="loss")
        Traceback (most recent call last):
        ...
        TypeError: early_stopping: expected the arguments metric, patience, got 'monitor'. The metric comes first: ...
    """

    @functools.wraps(function)
    def checked(*args: Options.args, **kwargs: Options.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except TypeError:
            unknown = _unknown_of(function, kwargs)
            if unknown is None:
                raise
        try:
            raise unknown
        finally:
            del unknown  # its traceback references this frame

    return checked


def _unknown_of(function: Callable[..., object], given: Iterable[str]) -> TypeError | None:
    """Returns the error for the first keyword argument that a function does not have, or None."""
    parameters = inspect.signature(function).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return None
    name = next((name for name in given if name not in parameters), None)
    return None if name is None else unknown_argument(function, name, parameters)


def unknown_argument(function: Callable[..., object], name: str, known: Iterable[str]) -> TypeError:
    """Returns the error for an argument that a function does not have.

    Args:
        function: The function.
        name: The argument.
        known: The arguments that the function has.

    Returns:
        The error. Its message says where the argument of another library went, or suggests the nearest spelling.
    """
    # Imported lazily to keep `import fxtrain` fast.
    from fxtrain.equivalents._arguments import advice_on_argument

    called = getattr(function, "__name__", repr(function))
    room = (getattr(function, "__module__", None) or "").removeprefix("fxtrain.").partition(".")[0]
    known = list(known)
    advice = advice_on_argument(called, name, room)
    suggestion = f" {advice}" if advice else did_you_mean(name, known) or " Leave it out."
    return TypeError(f"{called}: expected the arguments {', '.join(known)}, got {name!r}.{suggestion}")
