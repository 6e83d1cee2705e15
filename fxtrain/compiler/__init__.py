"""Compile: a step as one graph, called with as little between the call and the graph as is safe."""

from fxtrain.compiler._compiled import Compiled as Compiled
from fxtrain.compiler._compiled import RecompileError as RecompileError
from fxtrain.compiler._compiled import compile as compile  # noqa: A004
from fxtrain.compiler._routes import GraphBreakError as GraphBreakError
