"""Compile: a step as one graph, called with as little between the call and the graph as is safe."""

from fxtrain.compile.compiled import Compiled as Compiled
from fxtrain.compile.compiled import RecompileError as RecompileError
from fxtrain.compile.compiled import compile as compile  # noqa: A004
from fxtrain.compile.routes import GraphBreakError as GraphBreakError
