"""Calls of factories, which are made once, and can be written with all their arguments."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fxtrain.cli._errors import ConfigError, message_of
from fxtrain.cli._names import Rooms
from fxtrain.cli._type_checks import fitting, hints_of
from fxtrain.cli._yaml import anchored

FOLDER = "$RUN"
"""In a string, the folder of the run."""

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_UNKNOWN_SIGNATURE = inspect.Signature(
    [inspect.Parameter(name, kind) for name, kind in zip(("args", "kwargs"), VARIADIC, strict=True)]
)
_UNSET = object()


@dataclasses.dataclass
class Context:
    """What the calls of a configuration share.

    Args:
        calls: The calls by the id of their mappings.
        folder: The folder of the run, once there is one.
    """

    calls: dict[int, Call] = dataclasses.field(default_factory=dict)
    folder: pathlib.Path | None = None


class Reference(NamedTuple):
    """An object that a string stands for, such as a function with that name or a path."""

    text: str
    object: Any


class InFolder(NamedTuple):
    """A string that contains the folder of the run."""

    text: str
    context: Context


class Call:
    """A factory with its arguments, which may contain other calls. It is made once.

    Args:
        name: The factory's name in the configuration.
        function: The factory.
        path: The path of its arguments, for errors.
        context: What it shares with the other calls.
        rooms: Where bare names in its arguments are found. By default, this depends on the parameter.
        anchor: The anchor in the file, or an empty string.

    Attributes:
        arguments: Values and calls by parameter, those of ``*args`` and ``**kwargs`` too.
        is_read: Whether the arguments are complete.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        path: str,
        context: Context,
        rooms: Rooms | None = None,
        anchor: str = "",
    ) -> None:
        self.name, self.function, self.path, self.anchor = name, function, path, anchor
        self.context, self.rooms = context, rooms
        self.arguments: dict[str, Any] = {}
        self.is_read = False
        self.hints, self.parameters = hints_of(function), _signature(function).parameters
        self._made: Any = _UNSET

    def make(self) -> Any:
        """Returns the object. The first call makes it, and the objects in its arguments.

        Raises:
            ConfigError: An argument has the wrong type, or a factory raised an error. The message has the path.
        """
        if self._made is _UNSET:
            bound = inspect.BoundArguments(_signature(self.function), {})  # pyright: ignore[reportArgumentType]
            for name in self.parameters:  # in this order
                if name in self.arguments:
                    bound.arguments[name] = self._made_argument(name)
            try:
                self._made = self.function(*bound.args, **bound.kwargs)
            except ConfigError:
                raise
            except Exception as error:
                raise ConfigError(self._located(error)) from error
        return self._made

    def make_arguments(self) -> None:
        """Makes the objects in the arguments that need no folder of a run, and the whole if none needs it."""
        needs_none = [name for name, value in self.arguments.items() if not _needs_folder(value)]
        for name in needs_none:
            self._made_argument(name)
        if len(needs_none) == len(self.arguments):
            self.make()

    def complete(self) -> dict[str, Any]:
        """Returns the arguments as YAML represents them, with the defaults of those that are not given."""
        return self._complete({})

    def path_of(self, name: str) -> str:
        """Returns the path of an argument."""
        return f"{self.path}.{name}" if self.path else name

    def _made_argument(self, name: str) -> Any:
        value = self.arguments[name]
        made = _made(value)
        kind = self.parameters[name].kind
        if made is value or kind is VARIADIC[1]:
            return made
        path, hint = self.path_of(name), self.hints.get(name, Any)
        if kind is VARIADIC[0]:
            return [fitting(each, hint, f"{path}[{index}]") for index, each in enumerate(made)]
        return fitting(made, hint, path)

    def _complete(self, done: dict[int, Any]) -> Any:
        found: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if name in self.arguments and parameter.kind is VARIADIC[1]:
                found |= _plain(self.arguments[name], done)
            elif name in self.arguments:
                found[name] = _plain(self.arguments[name], done)
            elif parameter.kind not in VARIADIC and is_plain(parameter.default):
                found[name] = _plain(parameter.default, done)
        first = next(iter(self.parameters.values()), None)
        is_list = first is not None and first.kind is VARIADIC[0] and list(found) == [first.name]
        return found[first.name] if first is not None and is_list else found  # *args alone are a list

    def _located(self, error: Exception) -> str:
        """Returns the message of a factory's error, with the path in place of the argument's name."""
        text = " ".join(str(error).split())
        name = next((name for name in self.parameters if text.startswith(f"expected {name} ")), None)
        if name is not None:
            return text.replace(f"expected {name} ", f"expected {self.path_of(name)} ", 1)
        return f"{self.path}: {message_of(error)}" if self.path else message_of(error)


def has_calls(value: Any) -> bool:
    """Returns whether a value contains something that is made."""
    if isinstance(value, dict):
        return any(map(has_calls, value.values()))
    return isinstance(value, Call | Reference | InFolder) or (isinstance(value, list) and any(map(has_calls, value)))


def is_plain(value: Any) -> bool:
    """Returns whether YAML has a literal for a value."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _needs_folder(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_needs_folder, value.values() if isinstance(value, dict) else value))
    return isinstance(value, InFolder) or (isinstance(value, Call) and _needs_folder(value.arguments))


def _made(value: Any) -> Any:
    if isinstance(value, Call):
        return value.make()
    if isinstance(value, Reference):
        return value.object
    if isinstance(value, InFolder):
        return value.text.replace(FOLDER, str(value.context.folder))
    if has_calls(value):
        return {key: _made(each) for key, each in value.items()} if isinstance(value, dict) else [*map(_made, value)]
    return value


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """Returns a value as YAML represents it. A call that is used twice becomes one mapping."""
    if isinstance(value, Call):
        if id(value) not in done:
            plain = anchored(value.anchor)
            plain[value.name] = value._complete(done)
            done[id(value)] = plain
        return done[id(value)]
    if isinstance(value, Reference | InFolder):
        return value.text
    if isinstance(value, Mapping):
        return {key: _plain(each, done) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, done) for each in value]
    return value


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # a function in C
        return _UNKNOWN_SIGNATURE
