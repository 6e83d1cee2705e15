"""Reads the events that a callback subscribes to from the annotation of its second parameter."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fxtrain.core import EVENTS, SESSION, TRAJECTORY, Event, LoopEvent, Published, did_you_mean, name_of


def subscription(callback: Callable[..., object]) -> Iterable[type[Event]]:
    """Returns the event types named by the annotation of the second parameter.

    Raises:
        TypeError: If the signature cannot be read, has no second parameter, or the annotation names no event.
    """
    try:
        parameters = list(inspect.signature(callback).parameters.values())
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name_of(callback)}: expected a callback with a readable signature, got none. Subscribe it explicitly: "
            "fxtrain.on(fxtrain.StepEnd, callback)."
        ) from error
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2:
        raise TypeError(
            f"{name_of(callback)}: expected the parameters (state, event), got ({_names(parameters)}). Define it with "
            "both, or decorate a wrapper with functools.wraps."
        )
    if inspect.iscoroutinefunction(callback) or inspect.isgeneratorfunction(callback):
        kind, remedy = (
            ("an async function", "Define it without async")
            if inspect.iscoroutinefunction(callback)
            else ("a generator function", "Return the result instead of yielding it")
        )
        raise TypeError(f"{name_of(callback)}: expected a plain function, got {kind}. {remedy}.")
    annotation = positional[1].annotation
    if annotation is inspect.Parameter.empty and _names_event(positional[0].annotation, _globals(callback)):
        raise TypeError(
            f"{name_of(callback)}: expected the parameters (state, event), got an event as the first one, "
            f"({_names(positional)}). Swap the parameters."
        )
    if annotation is inspect.Parameter.empty or annotation is Any or annotation is object:
        return TRAJECTORY
    try:
        return kinds(annotation, _globals(callback))
    except TypeError as error:
        raise TypeError(f"{name_of(callback)}: {error}") from None


def _names(parameters: Iterable[inspect.Parameter]) -> str:
    return ", ".join(str(each.replace(annotation=each.empty, default=each.empty)) for each in parameters)


def _names_event(annotation: object, names: Mapping[str, object]) -> bool:
    if annotation in (inspect.Parameter.empty, Any, object, "Any", "object"):
        return False
    with contextlib.suppress(TypeError):
        return bool(kinds(annotation, names))
    return False


def _globals(callback: Callable[..., object]) -> Mapping[str, object]:
    function: Any = inspect.unwrap(callback)
    while isinstance(function, functools.partial):
        function = inspect.unwrap(typing.cast(Any, function.func))
    if not hasattr(function, "__globals__"):  # a callable object
        function = inspect.unwrap(typing.cast(Any, type(function)).__call__)
    return getattr(function, "__globals__", {})


def kinds(annotation: object, names: Mapping[str, object] | None = None) -> tuple[type[Event], ...]:
    """Resolves an annotation to event types.

    Args:
        annotation: An event type, a base class of several, a union, or a string that names these.
        names: The names that strings may refer to.

    Raises:
        TypeError: If the annotation names no event.
    """
    if isinstance(annotation, str):
        return _kinds_of_text(annotation, names or {})
    if isinstance(annotation, typing.TypeVar):
        annotation = annotation.__bound__
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return tuple(kind for part in typing.get_args(annotation) for kind in kinds(part, names))
    if typing.get_origin(annotation) is typing.Annotated:
        return kinds(typing.get_args(annotation)[0], names)
    found = tuple(kind for kind in EVENTS if isinstance(annotation, type) and issubclass(kind, annotation))
    if annotation is LoopEvent:  # `Published` repeats what other events publish, so only its name subscribes to it
        found = tuple(kind for kind in found if kind is not Published)
    if not found:
        raise _no_event(getattr(annotation, "__name__", repr(annotation)))
    return found


def _kinds_of_text(annotation: str, names: Mapping[str, object]) -> tuple[type[Event], ...]:
    # Parsed and looked up by name, never evaluated, because names imported only for type checkers do not exist at run
    # time.
    def read(node: ast.expr) -> tuple[type[Event], ...]:
        match node:
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return read(left) + read(right)
            case ast.Subscript(slice=ast.Tuple(elts=parts)):
                return tuple(kind for part in parts for kind in read(part))
            case ast.Subscript(slice=part):
                return read(part)
            case ast.Constant(value=str(inner)):
                return _kinds_of_text(inner, names)
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return look_up(name)
            case _:
                raise _no_event(annotation)

    def look_up(name: str) -> tuple[type[Event], ...]:
        by_name: dict[str, tuple[type[Event], ...]] = {kind.__name__: (kind,) for kind in EVENTS}
        by_name |= {"Event": EVENTS, "Any": TRAJECTORY, "object": TRAJECTORY, "LoopEvent": (*TRAJECTORY, *SESSION)}
        if name in by_name:
            return by_name[name]
        if name in names and not isinstance(names[name], str):
            return kinds(names[name])
        raise _no_event(name)

    try:
        return read(ast.parse(annotation, mode="eval").body)
    except SyntaxError:
        raise _no_event(annotation) from None


def _no_event(name: str) -> TypeError:
    names = [kind.__name__ for kind in EVENTS]
    return TypeError(
        f"expected an event type or a union of event types, got {name}.{did_you_mean(name, names)} The event types are "
        f"{', '.join(names)}."
    )
