"""Errors for assignments to frozen dataclasses and for names that are none of their fields, with advice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

C = TypeVar("C")


def refusing_assignment(advice: Callable[[str], str]) -> Callable[[type[C]], type[C]]:
    """Returns a decorator of frozen dataclasses. Assignments and deletions raise an error with advice.

    Args:
        advice: Maps the attribute's name to a sentence that names the correction.

    Raises:
        FrozenInstanceError: On assignment and deletion.

    Example:
        >>> @refusing_assignment(lambda name: f"Make another: Point({name}=...).")
        ... @dataclasses.dataclass(frozen=True)
        ... class Point:
        ...     x: int = 0
        >>> Point().x = 1
        Traceback (most recent call last):
        ...
        dataclasses.FrozenInstanceError: expected Point to stay unchanged, got an assignment to x. Make another: ...
    """

    def decorate(kind: type[C]) -> type[C]:
        def refuse(self: object, name: str, *value: object) -> None:
            raise dataclasses.FrozenInstanceError(
                f"expected {kind.__name__} to stay unchanged, got {'an assignment to' if value else 'a deletion of'} "
                f"{name}. {advice(name)}"
            )

        frozen: Any = kind  # dataclass generates these methods and refuses a class that defines them
        frozen.__setattr__ = frozen.__delattr__ = refuse
        return kind

    return decorate


def missing_field(owner: object, name: str, fields: Iterable[str], remedy: Callable[[], str]) -> AttributeError:
    """Returns the error of ``__getattr__`` for a name that is none of the fields.

    Args:
        owner: The object.
        name: The name.
        fields: The names of its fields.
        remedy: Returns a sentence that names the correction. It is not called for the protocols of Python, such as
            ``__array__``, which libraries probe for.

    Example:
        >>> print(missing_field(Exception(), "notes", ["args"], lambda: "Read error.args."))
        expected a field of Exception (args), got 'notes'. Read error.args.
    """
    kind = type(owner).__name__
    if name.startswith("__"):
        return AttributeError(f"{kind!r} object has no attribute {name!r}", name=name, obj=owner)
    return AttributeError(f"expected a field of {kind} ({', '.join(fields)}), got {name!r}. {remedy()}")
