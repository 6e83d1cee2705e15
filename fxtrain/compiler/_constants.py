"""The constants of generated code."""

from __future__ import annotations

from typing import Any


class Constants:
    """The namespace of generated code, and the base class of its writers."""

    def __init__(self) -> None:
        self.constants: dict[str, Any] = {}

    def constant(self, value: Any) -> str:
        """Adds a value to the namespace and returns its name."""
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def key(self, key: Any) -> str:
        """Returns the code of a dict key."""
        return repr(key) if type(key) in (str, int) else self.constant(key)
