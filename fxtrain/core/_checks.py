"""Argument checks shared by all rooms, and the words in which an error describes a value."""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import inspect
import os
import reprlib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fxtrain.core._formats import dtype_name

_MAX_REPR = 60
_MAX_KEYS = 8
_MAX_PARTS = 4
_MAX_SUGGESTIONS = 3

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _MAX_REPR


def check_positive_int(name: str, value: object) -> None:
    """Raises unless ``value`` is an int of at least 1.

    Args:
        name: The argument's name.
        value: Its value.

    Raises:
        TypeError: ``value`` is not an int.
        ValueError: ``value`` is smaller than 1.

    Example:
        >>> check_positive_int("every", 0)
        Traceback (most recent call last):
        ...
        ValueError: expected every to be a positive int, got 0.
    """
    check_int(name, value, minimum=1)


def check_int(name: str, value: object, *, minimum: int) -> None:
    """Raises unless ``value`` is an int of at least ``minimum``. Booleans are not ints here.

    Args:
        name: The argument's name.
        value: Its value.
        minimum: The smallest value allowed.

    Raises:
        TypeError: ``value`` is not an int.
        ValueError: ``value`` is smaller than ``minimum``.

    Example:
        >>> check_int("warmup_steps", 2.5, minimum=0)
        Traceback (most recent call last):
        ...
        TypeError: expected warmup_steps to be an int of at least 0, got 2.5.
    """
    kind = "a positive int" if minimum == 1 else f"an int of at least {minimum}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected {name} to be {kind}, got {describe(value)}.")
    if value < minimum:
        raise ValueError(f"expected {name} to be {kind}, got {value}.")


def check_non_negative(**values: object) -> None:
    """Raises unless each value is a number of at least 0. Of tensors only the shape is checked, which must be [].

    Args:
        values: The values by argument name.

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is negative, or a tensor has dimensions.

    Example:
        >>> check_non_negative(eps=1e-8, weight_decay=-0.1)
        Traceback (most recent call last):
        ...
        ValueError: expected weight_decay to be at least 0, got -0.1.
    """
    _check_numbers(values, lambda value: value >= 0, "at least 0")


def check_positive(**values: object) -> None:
    """Like ``check_non_negative``, for numbers above 0.

    Args:
        values: The values by argument name.

    Example:
        >>> check_positive(max_norm=0.0)
        Traceback (most recent call last):
        ...
        ValueError: expected max_norm to be above 0, got 0.0.
    """
    _check_numbers(values, lambda value: value > 0, "above 0")


def check_fraction(**values: object) -> None:
    """Like ``check_non_negative``, for numbers in [0, 1), such as decay rates.

    Args:
        values: The values by argument name.

    Example:
        >>> check_fraction(b1=0.9, b2=1)
        Traceback (most recent call last):
        ...
        ValueError: expected b2 to be in [0, 1), got 1.
    """
    _check_numbers(values, lambda value: 0 <= value < 1, "in [0, 1)")


def _check_numbers(values: Mapping[str, object], holds: Callable[[float], bool], expected: str) -> None:
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.ndim != 0:
                raise ValueError(f"expected {name} to be a float or a tensor of shape [], got {describe(value)}.")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"expected {name} to be a float or a tensor of shape [], got {describe(value)}.")
        elif not holds(value):
            raise ValueError(f"expected {name} to be {expected}, got {value!r}.")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises unless ``value`` is one of ``choices``.

    Args:
        name: The argument's name.
        value: Its value.
        choices: The values allowed.

    Raises:
        ValueError: ``value`` is not among them. The message suggests the choice with the nearest spelling.

    Example:
        >>> check_choice("unit", "step", ("steps", "epochs"))
        Traceback (most recent call last):
        ...
        ValueError: expected unit to be one of 'steps', 'epochs', got 'step'. Did you mean 'steps'?
    """
    # Types are compared too, because 1 == True.
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return
    listed = ", ".join(map(repr, choices))
    raise ValueError(f"expected {name} to be one of {listed}, got {describe(value)}.{did_you_mean(value, choices)}")


def check_callable(name: str, value: object, signature: str) -> None:
    """Raises unless ``value`` can be called.

    Args:
        name: The argument's name.
        value: Its value.
        signature: Its parameters and its result, for the error.

    Raises:
        TypeError: ``value`` cannot be called.

    Example:
        >>> check_callable("make", 3, "(view, key) -> value")
        Traceback (most recent call last):
        ...
        TypeError: expected make to be a function (view, key) -> value, got 3. Pass a function.
    """
    if not callable(value):
        raise TypeError(f"expected {name} to be a function {signature}, got {describe(value)}. Pass a function.")


def takes(function: Callable[..., object], count: int) -> bool:
    """Whether a function accepts this many positional arguments. True if its signature cannot be read.

    Args:
        function: Any callable.
        count: The number of arguments.

    Example:
        >>> takes(lambda state, event: None, 2), takes(lambda state, event: None, 3)
        (True, False)
    """
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError) as error:
        return isinstance(error, ValueError)
    return True


def check_path(name: str, value: object, remedy: str = "Pass a str or a pathlib.Path.") -> None:
    """Raises unless ``value`` is a path.

    Args:
        name: The argument's name.
        value: Its value.
        remedy: What to do instead, for the error.

    Raises:
        TypeError: ``value`` is neither a str nor an ``os.PathLike``.
        ValueError: It is empty, as an environment variable that is not set.

    Example:
        >>> check_path("folder", None)
        Traceback (most recent call last):
        ...
        TypeError: expected folder to be a path, got None. Pass a str or a pathlib.Path.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"expected {name} to be a path, got {describe(value)}. {remedy}")
    if not os.fspath(value):
        raise ValueError(f"expected {name} to be a path, got ''. Pass '.' for the current folder.")


def check_new_path(name: str, value: object) -> None:
    """Raises unless ``value`` is a path at which a file or folder may be made, as far as its text tells.

    Args:
        name: The argument's name.
        value: Its value.

    Raises:
        TypeError: As ``check_path``.
        ValueError: It is empty, too long for the system, has a null character, or has links in a circle.

    Example:
        >>> check_new_path("folder", "runs/1")
    """
    check_path(name, value)
    try:
        os.stat(cast("str", value))
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            reason = str(error) if isinstance(error, ValueError) else error.strerror
            raise ValueError(
                f"expected {name} to be a path, got {describe(value)} ({reason}). Choose another."
            ) from None


def check_device(name: str, value: object) -> None:
    """Raises unless ``value`` is None or names a device.

    Args:
        name: The argument's name.
        value: Its value.

    Raises:
        TypeError: ``value`` is neither a str, an int nor a device.
        ValueError: torch knows no such device.

    Example:
        >>> check_device("device", "gpu")
        Traceback (most recent call last):
        ...
        ValueError: expected device to be a device, got 'gpu'. Name one as in torch, such as 'cuda', 'cuda:1' or 'cpu'.
    """
    if value is None or isinstance(value, torch.device):
        return
    kind: type[Exception] = TypeError
    if isinstance(value, str | int) and not isinstance(value, bool):
        kind = ValueError
        with contextlib.suppress(RuntimeError):
            torch.device(value)
            return
    raise kind(
        f"expected {name} to be a device, got {describe(value)}. Name one as in torch, such as 'cuda', 'cuda:1' or "
        "'cpu'."
    )


def did_you_mean(name: object, names: Iterable[object]) -> str:
    """Returns `` Did you mean 'x'?`` for the nearest spelling among ``names``, or an empty string.

    Names that differ only before the last slash are nearest, because metrics are ``loss`` in events and ``train/loss``
    or ``eval/loss`` where they are published.

    Args:
        name: The name that was given. Values that are not strings have no suggestion.
        names: The names that exist.

    Example:
        >>> did_you_mean("los", ["loss", "accuracy"]), did_you_mean("los", ["accuracy"])
        (" Did you mean 'loss'?", '')
        >>> did_you_mean("loss", ["eval/loss", "train/loss"])
        " Did you mean 'eval/loss' or 'train/loss'?"
    """
    if not isinstance(name, str):
        return ""
    spellings = [other for other in names if isinstance(other, str)]
    last = name.rpartition("/")[2]
    nearest = [other for other in spellings if other.rpartition("/")[2] == last][:_MAX_SUGGESTIONS]
    nearest = nearest or [other for other in spellings if other.casefold() == name.casefold()][:1]
    nearest = nearest or difflib.get_close_matches(name, spellings, n=1)
    return f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""


def describe(value: object) -> str:
    """Returns a short description of ``value`` for an error message.

    Tensors and arrays are described by dtype and shape, numbers and strings by their shortened repr, modules,
    functions and classes by name, everything else by type.

    Example:
        >>> import torch
        >>> describe(torch.zeros(2, 3)), describe(np.zeros(3)), describe(0.5)
        ('a float32 tensor of shape [2, 3]', 'a float64 array of shape [3]', '0.5')
        >>> describe((torch.zeros(()), "x")), describe(describe), describe({"loss": 1.0})
        ("a tuple of (a float32 tensor of shape [], 'x')", 'the function describe', "a dict with keys 'loss'")
    """
    kind: str = type(value).__name__
    if isinstance(value, Tensor):
        return f"{_with_article(dtype_name(value.dtype))} tensor of shape {list(value.shape)}"
    if isinstance(value, np.ndarray):
        array = typing.cast("np.ndarray[Any, np.dtype[Any]]", value)
        return f"{_with_article(str(array.dtype))} array of shape {list(array.shape)}"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return _REPR.repr(value)
    if isinstance(value, functools.partial):
        return f"a partial of {describe(typing.cast(Any, value.func))}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Mapping):
        keys: list[Any] = list(typing.cast("Mapping[Any, Any]", value))
        shown = ", ".join(map(_REPR.repr, keys[:_MAX_KEYS])) + ", ..." * (len(keys) > _MAX_KEYS)
        return f"{_with_article(kind)} with keys {shown}" if keys else f"an empty {kind}"
    if type(value) is tuple and len(parts := typing.cast("tuple[Any, ...]", value)) <= _MAX_PARTS:
        return f"a tuple of ({', '.join(map(describe, parts))})"
    if isinstance(value, list | tuple):
        return f"{_with_article(kind)} of length {len(typing.cast('Sequence[Any]', value))}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    return _with_article(kind)


def _with_article(kind: str) -> str:
    # Abbreviations are spelled aloud: an MSELoss, an ndarray.
    is_spelled = kind[:2].isupper() or kind.startswith("nd")
    return f"{'an' if kind[0].lower() in ('aefhilmnorsx' if is_spelled else 'aeio') else 'a'} {kind}"
