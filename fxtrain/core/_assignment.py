"""Refuses assignments to frozen dataclasses, with advice on what to do instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
