"""Compiles a step into one graph and calls it with little dispatch overhead."""

from fxtrain.compiler._compile import compile as compile  # noqa: A004
from fxtrain.compiler._compiled import Compiled
from fxtrain.compiler._recompiles import RecompileError
from fxtrain.compiler.check._mismatch import MiscompiledError
from fxtrain.compiler.lowering._routes import GraphBreakError

__all__ = [
    "Compiled",
    "GraphBreakError",
    "MiscompiledError",
    "RecompileError",
    "compile",
]
