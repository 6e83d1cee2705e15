"""Reads objects that are given as factories and their arguments.

A mapping with one key, ``{name: arguments}``, is a call. Its arguments are a mapping, a list for positional ones, or
null for none. A string where an object is required is the name of that object. A mapping that is used twice, by an
anchor and its aliases, is one call, so its object is made once.

Reading checks names and arguments. Nothing is called before ``Call.make``. ``$RUN`` in a string stands for the folder
of the run, which is created after all that does not need it.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fxtrain.cli._calls import FOLDER, VARIADIC, Call, Context, InFolder, Reference, has_calls, is_plain
from fxtrain.cli._errors import ConfigError
from fxtrain.cli._names import Rooms, find, named, names_in, rooms_of
from fxtrain.cli._type_checks import fitting, shown
from fxtrain.cli._yaml import Anchored
from fxtrain.core import did_you_mean

_MAPPINGS = (collections.abc.Mapping, dict)
_ITERABLES = (collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection, list, tuple)


def read(arguments: Any, function: Callable[..., Any], name: str = "the configuration", path: str = "") -> Call:
    """Returns the call of a function with the arguments in a configuration, which are checked.

    Args:
        arguments: A mapping from parameters to values.
        function: The function.
        name: Its name, for errors.
        path: The path of the arguments, for errors.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type. The message has the key's path.

    Example:
        >>> import fxtrain as fx
        >>> call = read({"decay_steps": 9, "init_value": 0.1}, fx.schedules.cosine)
        >>> call.make(), call.complete()
        (cosine(0.1, 9), {'init_value': 0.1, 'decay_steps': 9, 'alpha': 0.0, 'exponent': 1.0})
        >>> read({"metric": "loss", "patience": 5, "moda": "max"}, fx.callbacks.early_stopping, "early_stopping")
        Traceback (most recent call last):
        ...
        fxtrain.cli._errors.ConfigError: expected an argument of early_stopping, got moda. Did you mean 'mode'?
    """
    call = Call(name, function, path, Context())
    try:
        _fill(call, _mapping(arguments, name))
    except RecursionError:
        raise ConfigError("expected nested values, got an alias inside of its own anchor. Remove it.") from None
    return call


def _fill(call: Call, node: Any) -> None:
    """Sets the arguments of a call from a mapping, a list or None."""
    given = _positional(call, node) if isinstance(node, list) else _by_name(call, node or {})
    for name, parameter in call.parameters.items():
        if name in given:
            call.arguments[name] = _argument(call, parameter, given[name])
        elif parameter.default is inspect.Parameter.empty and parameter.kind not in VARIADIC:
            raise ConfigError(f"expected {call.path_of(name)}, which {call.name} requires, got none. Give it.")
    call.is_read = True


def _by_name(call: Call, node: Mapping[Any, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    others = next((each.name for each in call.parameters.values() if each.kind is VARIADIC[1]), None)
    for name, value in node.items():
        if name in call.parameters and name != others:
            given[name] = value
        elif others is not None and isinstance(name, str):
            given.setdefault(others, {})[name] = value
        else:
            known = f" It has {', '.join(call.parameters)}." if call.parameters else " It has none."
            raise ConfigError(
                f"expected an argument of {call.name}, got {call.path_of(str(name))}."
                f"{did_you_mean(name, call.parameters) or known}"
            )
    return given


def _positional(call: Call, values: list[Any]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    left = list(values)
    for name, parameter in call.parameters.items():
        if parameter.kind is VARIADIC[0]:
            given[name], left = left, []
        elif left and parameter.kind not in (inspect.Parameter.KEYWORD_ONLY, VARIADIC[1]):
            given[name] = left.pop(0)
    if left:
        raise ConfigError(
            f"expected at most {len(given)} positional arguments of {call.path}, got {len(values)}. Give the others by "
            f"name, in a mapping: {', '.join(call.parameters)}."
        )
    return given


def _argument(call: Call, parameter: inspect.Parameter, value: Any) -> Any:
    path, hint = call.path_of(parameter.name), call.hints.get(parameter.name, Any)
    reader = _Reader(rooms_of(parameter.name) if call.rooms is None else call.rooms, call.context)
    if parameter.kind is VARIADIC[0]:
        if not isinstance(value, list):
            raise ConfigError(f"expected {path} to be a list, got {shown(value)}. Give a list.")
        where = call.path if len(call.parameters) == 1 else path
        return [reader.read(each, f"{where}[{index}]", hint) for index, each in enumerate(value)]
    if parameter.kind is VARIADIC[1]:
        return {name: reader.read(each, call.path_of(name), hint) for name, each in value.items()}
    if is_plain(parameter.default) and value == parameter.default and type(value) is type(parameter.default):
        return value  # a default may be None where the annotation excludes it
    return reader.read(value, path, hint)


class _Reader:
    """Reads values, with bare names from ``rooms``."""

    def __init__(self, rooms: Rooms, context: Context) -> None:
        self._rooms, self._context = rooms, context

    def read(self, value: Any, path: str, hint: Any) -> Any:
        """Returns a value with calls in place of their mappings, after a check of all that is not made by calls."""
        result = value
        if isinstance(value, dict):
            call = self._call(value, path, hint)
            if call is not None:
                return call
            item = _item_hint(hint, _MAPPINGS)
            result = {key: self.read(each, f"{path}.{key}", item) for key, each in value.items()}
        elif isinstance(value, list):
            item = _item_hint(hint, _ITERABLES)
            result = [self.read(each, f"{path}[{index}]", item) for index, each in enumerate(value)]
        if has_calls(result):
            return result
        imported = functools.partial(named, path=path, rooms=self._rooms)
        found = fitting(result, hint, path, imported=imported, names=_Names(self._rooms, value))
        if isinstance(value, str) and FOLDER in value:
            return InFolder(value, self._context)
        return Reference(value, found) if isinstance(value, str) and found is not value else found

    def _call(self, value: dict[Any, Any], path: str, hint: Any) -> Call | None:
        """Returns the call that a mapping describes, or None if it is a mapping of values."""
        calls = self._context.calls
        if id(value) in calls:
            if not calls[id(value)].is_read:
                raise ConfigError(f"expected {path} to be a value, got an alias inside of its own anchor. Remove it.")
            return calls[id(value)]
        if len(value) != 1 or typing.get_origin(hint) in _MAPPINGS:
            return None
        [(name, arguments)] = value.items()
        inside = f"{path}.{name}"
        function = self._function(name, inside)
        if function is None or (not _is_dotted(name) and not _is_arguments(arguments) and _accepts_mapping(hint)):
            return None
        if not _is_arguments(arguments):
            raise ConfigError(
                f"expected the arguments of {inside} as a mapping or a list, got {shown(arguments)}. Write "
                f"{name}: [{shown(arguments)}]."
            )
        anchor = value.anchor if isinstance(value, Anchored) else ""
        call = calls[id(value)] = Call(name, function, inside, self._context, self._rooms, anchor)
        _fill(call, arguments)
        return call

    def _function(self, name: Any, path: str) -> Callable[..., Any] | None:
        if not isinstance(name, str):
            return None
        found = named(name, path) if _is_dotted(name) else find(name, self._rooms)
        if found is not None and not callable(found):
            raise ConfigError(f"expected {path} to name a function or a class, got {shown(found)}. Check the name.")
        return found


class _Names:
    """The names in rooms for a suggestion, which are listed only after an error."""

    def __init__(self, rooms: Rooms, value: Any) -> None:
        self._rooms = rooms if isinstance(value, dict | str) else ()

    def __iter__(self) -> Iterator[str]:
        return iter(names_in(self._rooms))


def _is_arguments(value: Any) -> bool:
    return value is None or isinstance(value, dict | list)


def _accepts_mapping(hint: Any) -> bool:
    return hint is Any or _item_hint(hint, _MAPPINGS, missing=None) is not None


def _is_dotted(name: Any) -> bool:
    return isinstance(name, str) and "." in name and all(part.isidentifier() for part in name.split("."))


def _item_hint(hint: Any, kinds: tuple[Any, ...], missing: Any = Any) -> Any:
    """Returns the annotation of the items of a list or the values of a mapping, also inside of a union."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for each in typing.get_args(hint) if is_union else (hint,):
        arguments = typing.get_args(each)
        if typing.get_origin(each) in kinds and arguments:
            is_uneven = typing.get_origin(each) is tuple and arguments[1:] not in ((), (Ellipsis,))
            return Any if is_uneven else arguments[-1 if kinds is _MAPPINGS else 0]
    return missing


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if value is None or isinstance(value, dict):
        return value or {}
    raise ConfigError(f"expected {name} to be a mapping of arguments, got {shown(value)}. Write key: value.")
