"""Eager steps with the call path, donation and multi-step calls of ``fx.compile``.

Compiling takes seconds, and most bugs in the loop do not depend on the kernels. Here the compiled artifact is replaced
by a Python function that computes the new state and copies it into the old leaves.
"""

from __future__ import annotations

from fxtrain.compiler._compiled import Compiled
from fxtrain.compiler.lowering._executable import uncompiled
from fxtrain.compiler.lowering._routes import Route, Routes
from fxtrain.step import Step


def interpreted(step: Step, *, donate: bool, steps_per_call: int) -> Compiled:
    """Returns ``step`` with the interface of a compiled step.

    Args:
        step: The step to run eagerly.
        donate: Whether ``fit`` gets a variant that donates its input state.
        steps_per_call: As for ``fx.compile``.
    """
    made = _made(step, steps_per_call, donate=False)
    return made if donate else undonating(made)


def undonating(step: Compiled) -> Compiled:
    """Returns ``step`` without its donating variant, so that ``fit`` uses it unchanged."""
    step.with_donation = lambda: step
    return step


def _made(step: Step, steps_per_call: int, *, donate: bool) -> Compiled:
    return Compiled(
        step,
        routes=Routes([Route("interpreter", uncompiled, "nothing", True)], fullgraph=False),
        on_recompile="allow",
        steps_per_call=steps_per_call,
        background=False,
        remake=lambda step, routes=None, *, donate: _made(step, steps_per_call, donate=donate),
        donate=donate,
        dynamic=False,
        check=False,
    )
