"""Values that keep the call that made them, so that their ``repr`` reads like it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from fxtrain.core._checks import describe
from fxtrain.core._formats import decimal_text, name_of, public_name
from fxtrain.core._short_tracebacks import shorten_traceback

P = ParamSpec("P")
R = TypeVar("R")

_MAX_SHOWN_ENTRIES = 6


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Call:
    """A call of a function. Its ``repr`` leaves out arguments that have their default value.

    Args:
        function: The function.
        args: The positional arguments.
        kwargs: The keyword arguments.
        name: The text before the parenthesis. Defaults to the function's name.

    Example:
        >>> def scale(factor, *, power=1.0, offset=0.0): ...
        >>> Call(scale, (), {"factor": 2.0, "power": 1.0, "offset": 0.5})
        scale(2.0, offset=0.5)
    """

    function: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    name: str = ""

    def __repr__(self) -> str:
        return f"{self.name or name_of(self.function)}({', '.join(self._shown())})"

    def _shown(self) -> Iterator[str]:
        signature = inspect.signature(self.function)
        arguments = signature.bind(*self.args, **self.kwargs).arguments
        follows = True  # whether all arguments before this one are shown, so that it needs no name
        for name, parameter in signature.parameters.items():
            value = argument_text(arguments.get(name, parameter.default))
            if parameter.kind is parameter.VAR_POSITIONAL:
                yield from map(argument_text, arguments.get(name, ()))
            elif parameter.kind is parameter.VAR_KEYWORD:
                yield from (f"{key}={argument_text(part)}" for key, part in arguments.get(name, {}).items())
            elif parameter.default is not parameter.empty and value == argument_text(parameter.default):
                follows = False
            else:
                yield value if follows and parameter.kind is not parameter.KEYWORD_ONLY else f"{name}={value}"


def records_call(attach: Callable[[R, Call], R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Returns a decorator after which a function's results keep the call that made them, and its tracebacks are short.

    Args:
        attach: Returns the result of a call with the call attached.

    Example:
        >>> @records_call(lambda made, call: f"{made} from {call}")
        ... def double(text, *, times=2):
        ...     return text * times
        >>> double("a"), double("a", times=3)
        ("aa from double('a')", "aaa from double('a', times=3)")
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def recorded(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_dynamo_compiling():
                # Only a trace sees what is made inside of it, and Dynamo cannot trace signatures.
                return function(*args, **kwargs)
            try:
                made = function(*args, **kwargs)
            except Exception as error:
                shorten_traceback(error)
                raise
            return attach(made, Call(recorded, args, kwargs))

        return recorded

    return decorate


def argument_text(value: object) -> str:
    """Returns an argument as it reads in a call, with long values shortened.

    Example:
        >>> argument_text([3e-3 / 20, torch.bfloat16, torch.nn.Linear, torch.zeros(2), {"a": None}])
        "[0.00015, torch.bfloat16, Linear, <a float32 tensor of shape [2]>, {'a': None}]"
    """
    if isinstance(value, Tensor):
        return repr(value) if value.ndim == 0 else f"<{describe(value)}>"
    if isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value).items()
        return f"{{{_listed(f'{key!r}: {argument_text(part)}' for key, part in entries)}}}"
    if type(value) in (list, tuple):
        parts = _listed(map(argument_text, cast("Sequence[object]", value)))
        return f"[{parts}]" if isinstance(value, list) else f"({parts})"
    # Plain functions and classes are named. Other callable objects may describe themselves.
    if isinstance(value, type) or inspect.isroutine(value) or isinstance(value, functools.partial):
        return public_name(cast(object, value))
    return decimal_text(value) if type(value) is float else repr(value)


def _listed(texts: Iterable[str]) -> str:
    first = list(itertools.islice(texts, _MAX_SHOWN_ENTRIES + 1))
    return ", ".join([*first[:_MAX_SHOWN_ENTRIES], *(["..."] if len(first) > _MAX_SHOWN_ENTRIES else [])])
