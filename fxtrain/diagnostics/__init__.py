"""Explains a step: its operations, its cost, and what keeps it from being one graph."""

from fxtrain.diagnostics._explain import explain as explain
from fxtrain.diagnostics._explanation import Break as Break
from fxtrain.diagnostics._explanation import Explanation as Explanation
