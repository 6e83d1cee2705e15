"""Checks values against type annotations, with pydantic.

Values are not converted, except where YAML has no literal: a list becomes a tuple, and a string a path, an enum or the
object with that dotted name, if the annotation requires it.
"""

from __future__ import annotations

import enum
import functools
import inspect
import pathlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pydantic
from torch import Tensor
from typing_extensions import TypeAliasType, get_protocol_members

from fxtrain.cli._errors import ConfigError
from fxtrain.core import Tree, did_you_mean, truncate
from fxtrain.core import describe as described

_WORDS = {int: "an int", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
_MAX_SHOWN = 60  # characters
_NO_HINTS: Mapping[str, Any] = {}


def hints_of(function: Callable[..., object]) -> Mapping[str, Any]:
    """Returns the evaluated annotations of a function or class, or none if they cannot be evaluated.

    A number that may be a tensor, as ``patience: int | Tensor``, is a number here, because YAML has no tensors.

    Example:
        >>> from fxtrain.callbacks import early_stopping
        >>> hints_of(early_stopping)["patience"]
        <class 'int'>
    """
    try:
        is_of_fields = hasattr(function, "__dataclass_fields__") or hasattr(function, "_fields")
        is_class = inspect.isclass(function) and not is_of_fields
        hints = typing.get_type_hints(function.__init__ if is_class else function)
    except Exception:  # names that are imported for type checkers alone, or annotations that are no types
        return _NO_HINTS
    return {name: _without_tensor(hint) for name, hint in hints.items()}


def _without_tensor(hint: Any) -> Any:
    parts = tuple(part for part in typing.get_args(hint) if part is not Tensor)
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and parts and all(part in _WORDS for part in parts):
        return typing.Union[parts]  # noqa: UP007
    return hint


def fitting(
    value: object, hint: Any, path: str, imported: Callable[[str], object] | None = None, names: Iterable[str] = ()
) -> object:
    """Returns a value as an annotation requires it.

    Args:
        value: The value.
        hint: The evaluated annotation.
        path: The path of the key, for errors.
        imported: Returns the object with a dotted name, or raises ConfigError.
        names: Names that the author of the value may have meant, for errors.

    Raises:
        ConfigError: The value does not fit.

    Example:
        >>> fitting([0.5, 2], tuple[float, float], "healthy"), fitting("a.txt", pathlib.Path, "file").name
        ((0.5, 2), 'a.txt')
        >>> fitting("3", int | None, "callbacks[0].early_stopping.patience")
        Traceback (most recent call last):
        ...
        fxtrain.cli._errors.ConfigError: expected callbacks[0].early_stopping.patience to be an int or null, got '3'.
    """
    adapter = _adapter(hint)
    if adapter is None:
        return value
    is_name = isinstance(value, str) and "." in value and _is_tree_or_function(hint)
    for candidate in () if is_name else _candidates(value, hint):
        if _fits(adapter, candidate):
            return candidate
    if isinstance(value, str) and imported is not None and not _is_plain(hint):
        found = imported(value)
        if _fits(adapter, found):
            return found
        raise ConfigError(f"expected {path} to be {words(hint)}, got {value}, which is {described(found)}.")
    choices = [choice for choice in typing.get_args(hint) if isinstance(choice, str)]
    given = next(iter(value)) if isinstance(value, Mapping) and len(value) == 1 else value
    raise ConfigError(
        f"expected {path} to be {words(hint)}, got {shown(value)}.{did_you_mean(given, [*choices, *names])}"
    )


def _fits(adapter: pydantic.TypeAdapter[Any], value: object) -> bool:
    try:
        adapter.validate_python(value)
    except pydantic.ValidationError:
        return False
    return True


def _candidates(value: object, hint: Any) -> Iterator[object]:
    yield value
    if isinstance(value, list):
        yield _as_tuples(value)
    if isinstance(value, str):
        yield pathlib.Path(value)
        for kind in (hint, *typing.get_args(hint)):
            if inspect.isclass(kind) and issubclass(kind, enum.Enum) and value in kind.__members__:
                yield kind[value]


def _as_tuples(value: object) -> object:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _is_tree_or_function(hint: Any) -> bool:
    """Whether an annotation accepts a pytree, which any value is, or a function, which a dotted name is."""
    parts = typing.get_args(hint)
    return Tree in parts and any(getattr(typing.get_origin(part), "__name__", "") == "Callable" for part in parts)


def _is_plain(hint: Any) -> bool:
    """Whether an annotation describes data alone, so that a string cannot be the name of an object."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return all(part in _WORDS or typing.get_origin(part) is typing.Literal for part in parts)


@functools.lru_cache(maxsize=1024)
def _adapter_of(hint: Any) -> pydantic.TypeAdapter[Any] | None:
    config = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True)
    try:
        return pydantic.TypeAdapter(_checkable(hint), config=config)
    except Exception:  # an annotation of the user's code that is no type, which is not an error of a configuration
        return None


def _adapter(hint: Any) -> pydantic.TypeAdapter[Any] | None:
    try:
        return _adapter_of(hint)
    except TypeError:  # not hashable, as Literal[[]]
        return None


def _checkable(hint: Any, seen: frozenset[str] = frozenset()) -> Any:
    """Returns an annotation that checks objects by their classes, where pydantic would rebuild them from fields."""
    if isinstance(hint, TypeAliasType):
        return Any if hint.__name__ in seen else _checkable(hint.__value__, seen | {hint.__name__})
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Literal, type) or getattr(origin, "__name__", "") == "Callable":
        return hint
    if origin is typing.Annotated:
        return _checkable(parts[0], seen)
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(_checkable(part, seen) for part in parts)]  # noqa: UP007
    kind = origin or hint
    if not inspect.isclass(kind) or kind is Any:
        return hint
    if kind.__module__ in ("builtins", "collections.abc"):
        return hint if origin is None else origin[tuple(_checkable(part, seen) for part in parts)]
    if getattr(kind, "_is_protocol", False):
        return typing.Annotated[Any, pydantic.AfterValidator(functools.partial(_has, get_protocol_members(kind)))]
    return typing.Annotated[Any, pydantic.AfterValidator(functools.partial(_instance, kind))]


def _has(members: frozenset[str], value: object) -> object:
    if not all(hasattr(value, name) for name in members):
        raise ValueError("a member is missing")
    return value


def _instance(kind: type, value: object) -> object:
    if not isinstance(value, kind):
        raise ValueError("another class")
    return value


def shown(value: object) -> str:
    """Describes a value of a configuration for an error."""
    if isinstance(value, list | dict) and len(text := repr(value)) <= _MAX_SHOWN:
        return text
    return described(value)


def words(hint: Any) -> str:
    """Describes the values of an annotation.

    Example:
        >>> words(float | Callable[[int], float] | None), words(typing.Literal["min", "max"]), words(list[str])
        ('a number, a function or null', "'min' or 'max'", 'a list of strings')
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is typing.Literal:
        return _alternatives(map(repr, parts))
    if origin in (typing.Union, types.UnionType):
        return _alternatives(dict.fromkeys(map(words, parts)))
    kind = origin or hint
    name = getattr(kind, "__name__", str(hint))
    if name in ("Callable", "Predicate"):
        return "a function"
    if inspect.isclass(kind) and issubclass(kind, Mapping):
        return "a mapping"
    if name in ("list", "tuple", "set", "frozenset", "Sequence", "Iterable", "Collection"):
        items = {words(part) for part in parts if part is not Ellipsis}
        plain = items.pop().split(" ") if len(items) == 1 else []
        return f"a list of {plain[1]}s" if len(plain) == 2 and plain[0] in ("a", "an") else "a list"
    if name == "PathLike" or (inspect.isclass(kind) and issubclass(kind, pathlib.PurePath)):
        return "a path"
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {truncate(name, 60)}"


def _alternatives(given: Iterable[str]) -> str:
    *first, last = given
    return f"{', '.join(first)} or {last}" if first else last
