"""The loop: ``steps`` is a generator, and ``fit`` drains it."""

from fxtrain.loop.evaluate import evaluate as evaluate
from fxtrain.loop.fit import Result as Result
from fxtrain.loop.fit import fit as fit
from fxtrain.loop.fit import steps as steps
from fxtrain.loop.history import History as History
from fxtrain.loop.history import Series as Series
