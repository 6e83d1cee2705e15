"""Constants: what code that is written for one tree refers to by name."""

from __future__ import annotations

from typing import Any


class Constants:
    """Collects values under names; the namespace for the code. A writer of code is one."""

    def __init__(self) -> None:
        self.constants: dict[str, Any] = {}

    def constant(self, value: Any) -> str:
        """The name of a value."""
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def key(self, key: Any) -> str:
        """A dict's key, as code."""
        return repr(key) if type(key) in (str, int) else self.constant(key)
