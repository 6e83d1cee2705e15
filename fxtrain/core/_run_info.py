"""The facts of a run that are given by its user, and the conversion of a configuration to plain values."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fxtrain.core._checks import describe
from fxtrain.core._record import Record

Json = str | int | float | None | dict[str, "Json"] | list["Json"]
"""A value that ``json`` can represent."""


@dataclasses.dataclass(frozen=True, init=False, eq=False, repr=False)
class RunInfo(Record):
    """The project, group, name, description, tags and configuration of a run.

    ``fit(..., run=RunInfo(...))`` passes it to all records of the run: ``FitBegin.run``, the summary, ``run.json`` of
    ``record_run``, and the writers of ``write``. A project or name given to a writer has priority there. Callbacks at
    other events take the configuration from a closure.

    Args:
        project: The project. An experiment in MLflow.
        group: The group of runs in the project.
        name: The name of the run.
        description: A text in Markdown. The notes of a run in Weights & Biases.
        tags: Strings.
        config: The configuration, as a mapping, a dataclass or an ``argparse.Namespace``. It may contain strings,
            numbers, bools, None, paths, enums, dtypes and devices, and lists, mappings and dataclasses of these. It is
            copied, and converted to values that JSON can represent.

    Raises:
        TypeError: An argument or a value of the configuration has another type. The message names its key.
        ValueError: A text is empty.

    Example:
        >>> run = RunInfo(name="baseline", tags=["small"], config={"lr": 0.1, "betas": (0.9, 0.99), "decay": None})
        >>> run.name, run.tags, run.config
        ('baseline', ('small',), {'lr': 0.1, 'betas': [0.9, 0.99], 'decay': None})
    """

    project: str | None
    group: str | None
    name: str | None
    description: str | None
    tags: tuple[str, ...]
    config: Mapping[str, Json]

    def __init__(
        self,
        *,
        project: str | None = None,
        group: str | None = None,
        name: str | None = None,
        description: str | None = None,
        tags: Iterable[str] = (),
        config: object = None,
    ) -> None:
        texts: dict[str, object] = {"project": project, "group": group, "name": name, "description": description}
        for label, text in texts.items():
            if text is not None and not isinstance(text, str):
                raise TypeError(f"expected {label} to be a string, got {describe(text)}. Convert it with str.")
            if text is not None and not text.strip():
                raise ValueError(f"expected {label} to be a text, got an empty string. Omit it.")
        if isinstance(tags, str):
            raise TypeError(f"expected tags to be a list of strings, got {describe(tags)}. Pass a list.")
        listed = cast("tuple[object, ...]", tuple(tags))
        for tag in listed:
            if not isinstance(tag, str):
                raise TypeError(f"expected tags to be strings, got {describe(tag)}. Convert it with str.")
        for label, value in {**texts, "tags": listed, "config": plain_config(config)}.items():
            object.__setattr__(self, label, value)

    def given(self) -> dict[str, str | list[str]]:
        """Returns what is given besides the configuration, by the names of the arguments.

        Example:
            >>> RunInfo(name="baseline", tags=["small", "cpu"]).given()
            {'name': 'baseline', 'tags': ['small', 'cpu']}
        """
        names = ("project", "group", "name", "tags", "description")
        found = {name: value for name in names if (value := getattr(self, name))}
        return found | ({"tags": list(self.tags)} if self.tags else {})

    def texts(self) -> dict[str, str]:
        """Returns what ``given`` does, with the tags as one text.

        Example:
            >>> RunInfo(name="baseline", tags=["small", "cpu"]).texts()
            {'name': 'baseline', 'tags': 'small, cpu'}
        """
        return {name: value if isinstance(value, str) else ", ".join(value) for name, value in self.given().items()}


def plain_config(config: object, name: str = "config") -> dict[str, Json]:
    """Returns a copy of a configuration, as values that JSON can represent. None is an empty one.

    Args:
        config: A mapping, a dataclass or an ``argparse.Namespace``.
        name: The name of the argument, for errors.

    Raises:
        TypeError: The configuration or a value in it has another type. The message names its key.
    """
    found = {} if config is None else _plain(config, "")
    if not isinstance(found, dict):
        raise TypeError(
            f"expected {name} to be a mapping or a dataclass, got {describe(config)}. Pass a dict with string keys."
        )
    return found


def _plain(value: object, path: str, outer: tuple[int, ...] = ()) -> Json:
    if value is None or type(value) in (str, bool, int, float):
        return cast(Json, value)
    if isinstance(value, enum.Enum):
        return _plain(value.value, path)
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        return _plain(cast(object, value.item()), path)
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, os.PathLike):
        return os.fsdecode(cast("os.PathLike[str]", value))
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    if id(cast(object, value)) in outer:
        raise TypeError(f"expected {path} to be a value, got a container that it is part of. Leave it out.")
    outer = (*outer, id(cast(object, value)))
    if (parts := _parts(value)) is not None:
        return {key: _plain(inner, f"{path}/{key}" if path else key, outer) for key, inner in _with_names(parts, path)}
    if isinstance(value, Sequence | Set) and not isinstance(value, bytes | bytearray):
        items = cast("Iterable[object]", value)
        listed = sorted(items, key=repr) if isinstance(value, Set) else items
        return [_plain(inner, f"{path}/{index}", outer) for index, inner in enumerate(listed)]
    raise TypeError(
        f"expected {path or 'the configuration'} to be a string, number, bool or None, or a list or mapping of these, "
        f"got {describe(cast(object, value))}. Convert it to a string, or leave it out."
    )


def _parts(value: Any) -> Mapping[Any, object] | None:
    """Returns the parts of a value with names, or None if its parts have none."""
    if isinstance(value, Mapping):
        return cast("Mapping[Any, object]", value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, argparse.Namespace):
        return vars(value)
    is_named = hasattr(value, "_asdict") and isinstance(value, tuple)
    return cast(Any, value)._asdict() if is_named else None


def _with_names(parts: Mapping[Any, object], path: str) -> Iterable[tuple[str, object]]:
    for key, value in parts.items():
        if not isinstance(key, str):
            raise TypeError(f"expected string keys in {path or 'the configuration'}, got {describe(key)}.")
        yield key, value
