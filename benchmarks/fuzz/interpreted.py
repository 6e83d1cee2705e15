"""A compiled step without a compiler: the call path, the donation and the multi-step calls of ``fx.compile``, eagerly.

Compiling takes seconds, and most of what can go wrong in the loop does not depend on the kernels. Here the artefact
that a compiler would make is a Python function that computes the new state and copies it over the old leaves.
"""

from __future__ import annotations

from fxtrain.compiler._compiled import Compiled
from fxtrain.compiler._routes import Route, Routes
from fxtrain.compiler._uncompiled import uncompiled
from fxtrain.step import Step


def interpreted(step: Step, *, donate: bool, steps_per_call: int) -> Compiled:
    """``step`` with the interface of a compiled one.

    Args:
        step: The step.
        donate: Whether ``fit`` gets a variant that overwrites the state it is given.
        steps_per_call: As for ``fx.compile``.
    """
    made = _made(step, steps_per_call, donate=False)
    return made if donate else undonating(made)


def undonating(step: Compiled) -> Compiled:
    """``step`` without its donating twin, so that ``fit`` uses it as it is."""
    step.donating = lambda: step
    return step


def _made(step: Step, steps_per_call: int, *, donate: bool) -> Compiled:
    return Compiled(
        step,
        routes=Routes([Route("interpreter", uncompiled, "nothing", True)], fullgraph=False),
        on_recompile="allow",
        steps_per_call=steps_per_call,
        background=False,
        twin=lambda: _made(step, steps_per_call, donate=True),
        donate=donate,
        dynamic=False,
    )
