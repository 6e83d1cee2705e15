"""The public names of fxtrain, each under the path by which users write it."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import itertools
import pathlib
import sys
import types
from collections.abc import Mapping
from typing import NamedTuple

import fxtrain

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Package(NamedTuple):
    """A package or module with public names.

    Attributes:
        path: Its import path, such as ``fxtrain.optim``.
        names: The names that its page documents, each with the path by which users write it.
        repeated: The names that it shares with other packages, which document them.
    """

    path: str
    names: Mapping[str, str]
    repeated: Mapping[str, str]

    @property
    def module(self) -> types.ModuleType:
        return importlib.import_module(self.path)

    @property
    def page(self) -> str:
        return f"reference/{self.path.rpartition('.')[2]}"


@functools.cache
def packages() -> tuple[Package, ...]:
    """Returns all modules of fxtrain that declare ``__all__``, in alphabetical order.

    A name that several of them export is documented by the package that defines it. Its path is the shortest one.
    """
    root = pathlib.Path(fxtrain.__file__).parent
    found = sorted(p.stem for p in root.iterdir() if (p / "__init__.py").exists() or p.suffix == ".py")
    modules = [importlib.import_module(f"fxtrain.{name}") for name in found if not name.startswith("_")]
    modules = [module for module in modules if hasattr(module, "__all__")]
    homes: dict[int, types.ModuleType] = {}
    for module in modules:
        for value in (getattr(module, name) for name in module.__all__):
            if getattr(value, "__module__", module.__name__).startswith(module.__name__):
                homes[id(value)] = module
            homes.setdefault(id(value), module)
    listed: list[Package] = []
    for module in modules:
        paths = {name: _shortest(module, name) for name in module.__all__}
        own = {name: path for name, path in paths.items() if homes[id(getattr(module, name))] is module}
        listed.append(Package(module.__name__, own, {name: paths[name] for name in paths if name not in own}))
    return tuple(listed)


def _shortest(module: types.ModuleType, name: str) -> str:
    at_top = name in fxtrain.__all__ and getattr(fxtrain, name) is getattr(module, name)
    return f"fxtrain.{name}" if at_top else f"{module.__name__}.{name}"


@functools.cache
def ambiguous_names() -> frozenset[str]:
    """Returns the names of arguments and attributes of public functions and classes."""
    found: set[str] = set()
    for value in (getattr(package.module, name) for package in packages() for name in package.names):
        if isinstance(value, type):
            found |= {name for name in dir(value) if not name.startswith("_")}
        elif inspect.isfunction(value):
            found |= set(inspect.signature(value).parameters)
    return frozenset(found)


def resolves(path: str) -> bool:
    """Whether a dotted path, such as ``fxtrain.Control.stop``, leads to a module, an attribute or a dataclass field."""
    value: object = fxtrain
    for name in path.split(".")[1:]:
        if isinstance(value, type) and any(name in vars(base).get("__annotations__", ()) for base in value.__mro__):
            return True
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def exists(name: str) -> bool:
    """Whether a name is a path of a file or folder in the repository, or that of a module."""
    if "/" in name:
        return (ROOT / name).exists()
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that contains it
        return False


class Alias(NamedTuple):
    """A name for a type.

    Attributes:
        type: What it stands for, as written in the code.
        description: The string below its definition.
    """

    type: str
    description: str


def alias(package: Package, name: str) -> Alias:
    """Returns the definition of an alias of a type, from the module that has its description.

    Raises:
        ValueError: If it has no description.
    """
    for module in [module for path, module in sys.modules.items() if path.startswith(f"{package.path}.")]:
        if vars(module).get(name) is not getattr(package.module, name):
            continue
        body = ast.parse(inspect.getsource(module)).body
        for definition, text in itertools.pairwise(body):
            match definition, text:
                case ast.Assign([ast.Name(found)], value), ast.Expr(ast.Constant(str(description))) if found == name:
                    # TypeAliasType("Name", type)
                    meaning = value.args[1] if isinstance(value, ast.Call) else value
                    quoted = isinstance(meaning, ast.Constant)
                    return Alias(str(meaning.value) if quoted else ast.unparse(meaning), inspect.cleandoc(description))
    raise ValueError(f"expected a description of {package.path}.{name}, got none. Write a string below its definition.")
