"""The methods that ``dataclass`` would generate for each class when fxtrain is imported."""

from __future__ import annotations

import dataclasses
from typing import Any, cast


class Record:
    """Comparison, hash and repr of frozen dataclasses, from their fields.

    Example:
        >>> @dataclasses.dataclass(frozen=True, eq=False, repr=False)
        ... class Place(Record):
        ...     file: str
        ...     line: int = 1
        >>> Place("train.py"), Place("train.py") == Place("train.py", 2)
        (Place(file='train.py', line=1), False)
    """

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and _values(other) == _values(self)

    def __hash__(self) -> int:
        return hash(tuple(_values(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in _values(self).items())})"


def _values(record: object) -> dict[str, object]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(cast("Any", record))}
