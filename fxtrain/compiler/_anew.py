"""Anew: a compiled step without its graphs, for whoever tries things out and leaves the one in use as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from fxtrain.compiler._compiled import Compiled
from fxtrain.compiler._trace import Artefact, Run


def anew(compiled: Compiled, wrap: Callable[[Run], Run] = lambda run: run) -> Compiled:
    """The same step, compiled in the same way, without a graph yet. It makes graphs silently and in the foreground.

    Args:
        compiled: From ``compile``. It is left as it is.
        wrap: What to put around each artefact.

    Example:
        >>> import torch, fxtrain as fx
        >>> step = fx.compile(fx.eval_step(lambda model, batch: {"mean": batch.mean()}), backend="eager")
        >>> _ = step(fx.init(torch.nn.ReLU()), torch.ones(2))
        >>> step.graphs, anew(step).graphs
        (1, 0)
    """
    made = copy.copy(compiled)
    compiler = made._routes = copy.copy(compiled._routes)  # which may choose a route

    def compile_and_wrap(*args: Any, **options: Any) -> Artefact:
        artefact = compiler(*args, **options)
        return artefact._replace(run=wrap(artefact.run))

    made._compiler = compile_and_wrap
    made._graphs, made._known, made._donating, made._several = [], [], None, None
    made._on_recompile, made._pending = "allow", None
    return made
