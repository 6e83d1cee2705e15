"""Descriptions of arguments that several functions share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_HEAD = "\n\nArgs:\n"
_ENTRY = re.compile(r"^ {4}(\w+): .*(?:\n {8}.*)*", re.MULTILINE)
_LATER_SECTION = re.compile(r"\n\n(?:Returns|Raises|Example|References):\n")


def args_from(*sources: Callable[..., Any]) -> Callable[[Function], Function]:
    """Decorates a function so that its docstring describes arguments as the docstrings of ``sources`` do.

    An argument is described once, where it is used. Functions that pass it on describe only their other arguments.
    ``help`` shows all of them, in the order of the signature, which does not change.

    Args:
        sources: Functions with arguments of the same names. The first that describes an argument wins.

    Example:
        >>> def scale(*, factor: float):
        ...     '''Scales.
        ...
        ...     Args:
        ...         factor: Above 0.
        ...     '''
        >>> @args_from(scale)
        ... def scale_twice(first: float, *, factor: float):
        ...     '''Scales twice.
        ...
        ...     Args:
        ...         first: The other factor.
        ...     '''
        >>> print(scale_twice.__doc__)
        Scales twice.
        <BLANKLINE>
        Args:
            first: The other factor.
            factor: Above 0.
    """

    def decorate(function: Function) -> Function:
        if function.__doc__ is None:  # python -OO removes docstrings
            return function
        summary, own, rest = _split(function.__doc__)
        described: dict[str, str] = {}
        for entries in (*(_split(source.__doc__ or "")[1] for source in reversed(sources)), own):
            described.update(entries)
        listed = [described[name] for name in inspect.signature(function).parameters if name in described]
        function.__doc__ = summary + _HEAD + "\n".join(listed) + rest
        return function

    return decorate


def _split(docstring: str) -> tuple[str, dict[str, str], str]:
    """Returns the text before ``Args``, the descriptions by argument, and the text after them."""
    text = inspect.cleandoc(docstring)
    later = _LATER_SECTION.search(text)
    end = later.start() if later else len(text)
    summary, _, args = text[:end].partition(_HEAD)
    return summary, {entry[1]: entry[0] for entry in _ENTRY.finditer(args)}, text[end:]
