"""The base class of the writers of generated code."""

from __future__ import annotations

from collections.abc import Hashable


class CodeWriter:
    """Collects the constants to which generated code refers."""

    def __init__(self) -> None:
        self.constants: dict[str, object] = {}

    def constant(self, value: object) -> str:
        """Adds a value to the namespace and returns its name."""
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def key(self, key: Hashable) -> str:
        """Returns the code of a dict key."""
        return repr(key) if type(key) in (str, int) else self.constant(key)
