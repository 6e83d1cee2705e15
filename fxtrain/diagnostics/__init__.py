"""Explains a step: its operations, its cost, and what keeps it from being one graph."""

from fxtrain.diagnostics._explain import explain
from fxtrain.diagnostics._explanation import Break, Explanation

__all__ = ["Break", "Explanation", "explain"]
