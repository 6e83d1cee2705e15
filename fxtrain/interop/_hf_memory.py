"""Converts the attributes of Python objects to JSON and back, to keep them in a slot."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Json = Any
"""A value that ``json`` can represent."""

_ATOMS = (type(None), bool, int, float, str)
_TAG = "type"


class NotDataError(Exception):
    """Raised for a value that cannot be saved, such as an open file, a module or a function."""


def encode(value: object) -> Json:
    """Converts data to a value that JSON can represent.

    Args:
        value: None, a bool, a number, a string, a tensor or an array; or a list, tuple, set or dict of these.

    Raises:
        NotDataError: If the value is, or contains, anything else.

    Example:
        >>> decode(encode({"best": (0.5, 3), "seen": {1, 2}})) == {"best": (0.5, 3), "seen": {1, 2}}
        True
    """
    if type(value) in _ATOMS:
        return value
    if type(value) is list:
        return [encode(each) for each in value]
    if type(value) is dict:
        return {_TAG: "dict", "items": [[encode(key), encode(each)] for key, each in value.items()]}
    if type(value) is tuple or type(value) is set:
        return {_TAG: type(value).__name__, "items": [encode(each) for each in value]}
    if isinstance(value, np.generic | np.ndarray):
        numeric = value.dtype.kind in "biufc"
        if not numeric:
            raise NotDataError
        return {_TAG: type(value).__name__, "data": _as_text(torch.from_numpy(np.asarray(value).copy()))}
    if type(value) is Tensor:
        return {_TAG: "Tensor", "data": _as_text(value)}
    raise NotDataError


def decode(value: Json) -> Any:
    """Converts a value from ``encode`` back."""
    if isinstance(value, list):
        return [decode(each) for each in value]
    if not isinstance(value, dict):
        return value
    kind = value[_TAG]
    if kind == "dict":
        return {decode(key): decode(each) for key, each in value["items"]}
    if kind in ("tuple", "set"):
        return (tuple if kind == "tuple" else set)(decode(each) for each in value["items"])
    tensor = torch.load(io.BytesIO(base64.b64decode(value["data"])), weights_only=True)
    if kind == "Tensor":
        return tensor
    return tensor.numpy() if kind == "ndarray" else tensor.numpy()[()]


def _as_text(tensor: Tensor) -> str:
    buffer = io.BytesIO()
    torch.save(tensor.detach().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


class ObjectMemory:
    """Saves and restores the attributes of an object that differ from those it was constructed with.

    Other attributes, such as open files and progress bars, are neither saved nor changed.

    Args:
        target: The object.
        transient: Names of attributes to leave out.
        read: Returns the state that the object exports; None for an object that exports none.
        write: Restores an exported state.
    """

    def __init__(
        self,
        target: object,
        *,
        transient: frozenset[str] = frozenset(),
        read: Callable[[], Mapping[str, object]] | None = None,
        write: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._target, self._transient, self._read, self._write = target, transient, read, write
        self._configured, self._configured_export = self._attributes(), self._exported()

    def capture(self) -> dict[str, Json]:
        """Returns the differences. Arguments of the constructor are left out, so a resumed run may change them."""
        now, configured = self._attributes(), self._configured
        found: dict[str, Json] = {}
        if changed := {key: now[key] for key in now if key not in configured or configured[key] != now[key]}:
            found["set"] = changed
        if gone := [name for name in configured if name not in vars(self._target)]:
            found["gone"] = gone
        if (exported := self._exported()) != self._configured_export:
            found["exported"] = exported
        return found

    def restore(self, memory: Mapping[str, Json]) -> None:
        """Restores the attributes that ``capture`` returned, and resets all others to their values at construction."""
        wanted = {**self._configured, **memory.get("set", {})}
        for name in memory.get("gone", ()):
            wanted.pop(name, None)
        now, attributes = self._attributes(), vars(self._target)
        for name in now.keys() - wanted.keys():
            del attributes[name]
        for name, value in wanted.items():
            if name not in now or now[name] != value:
                setattr(self._target, name, decode(value))
        exported = memory.get("exported", self._configured_export)
        if self._write is not None and exported != self._exported():
            self._write(decode(exported))

    def _attributes(self) -> dict[str, Json]:
        found: dict[str, Json] = {}
        for name, value in vars(self._target).items():
            if name not in self._transient:
                try:
                    found[name] = encode(value)
                except NotDataError:
                    continue
        return found

    def _exported(self) -> Json:
        return None if self._read is None else encode(dict(self._read()))
