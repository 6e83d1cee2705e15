"""Finds the objects that a configuration names: bare names in rooms, dotted names by import."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pathlib
import pkgutil
import sys
from collections.abc import Sequence

from fxtrain.cli._errors import ConfigError
from fxtrain.core import describe, did_you_mean

Rooms = Sequence[str]

_EVERYTHING = (
    "fxtrain.optim",
    "fxtrain.schedules",
    "fxtrain.callbacks",
    "fxtrain.observers",
    "fxtrain.writers",
    "fxtrain.data",
    "fxtrain.interop",
    "fxtrain",
)
_DATA = ("fxtrain.data",)
_DOTTED = " Names of other packages have a dot: my_package.my_function."
_ROOMS: dict[str, Rooms] = {
    "model": ("torch.nn",),
    "optimizer": ("fxtrain.optim", "fxtrain.schedules"),
    "loss": ("torch.nn.functional",),
    "data": _DATA,
    "eval_data": _DATA,
    "callbacks": ("fxtrain.callbacks", "fxtrain.schedules", "fxtrain"),
    "observers": ("fxtrain.observers", "fxtrain.writers", "fxtrain"),
}


def rooms_of(key: str) -> Rooms:
    """Returns the modules in which bare names below a key are found, the first of them first.

    Example:
        >>> rooms_of("optimizer"), rooms_of("eval_when")[-1]
        (('fxtrain.optim', 'fxtrain.schedules'), 'fxtrain')
    """
    return _ROOMS.get(key, _EVERYTHING)


def names_in(rooms: Rooms) -> list[str]:
    """Returns the public names of callables in rooms."""
    return [name for room in rooms for name in _public(room) if callable(getattr(sys.modules[room], name))]


def find(name: str, rooms: Rooms) -> object | None:
    """Returns the callable with a bare name in rooms, or None."""
    room = next((room for room in rooms if name in _public(room)), None)
    found = None if room is None else getattr(sys.modules[room], name)
    return found if callable(found) else None


def _public(room: str) -> list[str]:
    module = importlib.import_module(room)
    return [name for name in getattr(module, "__all__", None) or vars(module) if not name.startswith("_")]


def named(name: str, path: str, rooms: Rooms = ()) -> object:
    """Returns the object with a bare or a dotted name.

    Args:
        name: A name in rooms, ``package.module.name``, or ``package.module:name``.
        path: The path of the key, for errors.
        rooms: Where bare names are found.

    Raises:
        ConfigError: There is no such object, or its module cannot be imported.

    Example:
        >>> named("math.pi", "loss")
        3.141592653589793
        >>> named("math.sqr", "loss")
        Traceback (most recent call last):
        ...
        fxtrain.cli._errors.ConfigError: expected loss to name an object, got 'math.sqr', which math lacks. Did you \
mean 'sqrt'?
    """
    if name.isidentifier():
        found = find(name, rooms)
        if found is None:
            where = f"a name in {' or '.join(rooms)}, or a dotted name" if rooms else "a dotted name"
            raise ConfigError(
                f"expected {path} to be {where}, got {name!r}.{did_you_mean(name, names_in(rooms)) or _DOTTED}"
            )
        return found
    try:
        return pkgutil.resolve_name(name)
    except AttributeError as error:
        owner = getattr(error.obj, "__name__", describe(error.obj))
        raise ConfigError(
            f"expected {path} to name an object, got {name!r}, which {owner} lacks."
            f"{did_you_mean(error.name, dir(error.obj)) or ' Check the name.'}"
        ) from error
    except Exception as error:  # of the user's module too
        raise ConfigError(
            f"expected {path} to name an object, got {name!r}, which cannot be imported "
            f"({type(error).__name__}: {error}). Check the name, and run the command in the folder of the package."
        ) from error


def function_at(target: str) -> object:
    """Returns the object that ``MODULE:NAME`` or ``PATH.py:NAME`` names. Modules in the current folder are found.

    Raises:
        ConfigError: There is no such object, or its module cannot be imported.
    """
    add_current_folder()
    place, _, name = target.rpartition(":")
    if not place.endswith(".py"):
        return named(target, "the function")
    path = pathlib.Path(place)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"expected a Python file, got {place}, which does not exist. Check the path.")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) != str(path.absolute()):
        raise ConfigError(f"expected a file with a new module name, got {place}, as {path.stem} is loaded. Rename it.")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as Python does for a script
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            f"expected {place} to be imported, got {type(error).__name__}: {error}. Correct the file."
        ) from error
    return named(f"{path.stem}:{name}", "the function")


def add_current_folder() -> None:
    """Adds the current folder to the module search path, as ``python -m`` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
