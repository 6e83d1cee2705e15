"""A copy of a compiled step that starts without graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from fxtrain.compiler._compiled import Compiled
from fxtrain.compiler._trace import Artefact, Run


def fresh(compiled: Compiled, wrap: Callable[[Run], Run] = lambda run: run) -> Compiled:
    """Returns a copy of a compiled step that has no graphs yet.

    The copy compiles in the foreground and does not warn about recompilation.

    Args:
        compiled: A compiled step. It is not modified.
        wrap: Wraps the ``run`` function of each artefact.

    Example:
        >>> import torch, fxtrain as fx
        >>> step = fx.compile(fx.eval_step(lambda model, batch: {"mean": batch.mean()}), backend="eager")
        >>> _ = step(fx.init(torch.nn.ReLU()), torch.ones(2))
        >>> step.graphs, fresh(step).graphs
        (1, 0)
    """
    made = copy.copy(compiled)
    # Copied, because the copy may choose another route.
    compiler = made._routes = copy.copy(compiled._routes)

    def compile_and_wrap(*args: Any, **options: Any) -> Artefact:
        artefact = compiler(*args, **options)
        return artefact._replace(run=wrap(artefact.run))

    made._compiler = compile_and_wrap
    made._graphs, made._known, made._donating, made._several = [], [], None, None
    made._others = {}
    made._on_recompile, made._pending = "allow", None
    return made
