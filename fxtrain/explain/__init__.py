"""Explain: what a step is made of, what it costs, and what keeps it from being one graph."""

from fxtrain.explain.explain import explain as explain
from fxtrain.explain.explanation import Break as Break
from fxtrain.explain.explanation import Explanation as Explanation
