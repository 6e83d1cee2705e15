"""Functional training for PyTorch: one immutable state, a pure compiled step, callbacks that fold over it."""

import gc as _gc
import importlib as _importlib
import sys as _sys
import typing as _typing

# Objects allocated by the imports are permanent. A garbage collection in the middle would traverse torch's objects in
# vain, and would take as long as importing fxtrain itself.
_collecting = _gc.isenabled()
_gc.disable()

try:
    from fxtrain import (
        checkpoint,
        core,
        data,
        loop,
        metrics,
        optim,
        rng,
        schedules,
        tree,
        values,
    )
    from fxtrain.checkpoint import Checkpointer, CheckpointError, checkpointer, restore, save
    from fxtrain.compiler import Compiled, GraphBreakError, MiscompiledError, RecompileError
    from fxtrain.compiler import compile as compile  # noqa: A004
    from fxtrain.core import *  # noqa: F403
    from fxtrain.fold import (
        Composed,
        Handler,
        Trigger,
        after,
        at,
        attach,
        compose,
        every,
        needs,
        of_model,
        on,
        slotted,
        stateful,
        tolerant,
        when,
    )
    from fxtrain.loop import Result, evaluate, fit, steps
    from fxtrain.model import (
        LoadReport,
        Summary,
        View,
        init,
        load_state_dict,
        recompute_statistics,
        remat,
        state_dict,
        summary,
        to_module,
        view,
        with_trainable,
    )
    from fxtrain.precision import Policy
    from fxtrain.step import Step, apply_gradients, eval_step, gradients, tap, train_step, weighted, wrap_step
finally:
    if _collecting:
        if not _gc.get_freeze_count():
            # Moves all objects to the oldest generation, so the next collection of the youngest skips them.
            _gc.freeze()
            _gc.unfreeze()
        _gc.enable()

if _typing.TYPE_CHECKING:
    from fxtrain import callbacks, diagnostics, distributed, ensemble, finders, interop, observers, writers
    from fxtrain.diagnostics import Explanation, explain
    from fxtrain.distributed import shard
    from fxtrain.finders import find_batch_size, find_learning_rate
    from fxtrain.interop import load_optimizer_state, load_weights, optimizer_state_dict, save_weights

_PACKAGES_IMPORTED_ON_USE = frozenset(
    ("callbacks", "diagnostics", "distributed", "ensemble", "finders", "interop", "observers", "writers")
)
_NAMES_IMPORTED_ON_USE = {
    "Explanation": "fxtrain.diagnostics",
    "explain": "fxtrain.diagnostics",
    "find_batch_size": "fxtrain.finders",
    "find_learning_rate": "fxtrain.finders",
    "load_optimizer_state": "fxtrain.interop",
    "load_weights": "fxtrain.interop",
    "optimizer_state_dict": "fxtrain.interop",
    "save_weights": "fxtrain.interop",
    "shard": "fxtrain.distributed",
}

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "Compiled",
    "Composed",
    "Explanation",
    "GraphBreakError",
    "Handler",
    "LoadReport",
    "MiscompiledError",
    "Policy",
    "RecompileError",
    "Result",
    "Step",
    "Summary",
    "Trigger",
    "View",
    "after",
    "apply_gradients",
    "at",
    "attach",
    "callbacks",
    "checkpoint",
    "checkpointer",
    "compile",
    "compose",
    "data",
    "distributed",
    "ensemble",
    "eval_step",
    "evaluate",
    "every",
    "explain",
    "find_batch_size",
    "find_learning_rate",
    "fit",
    "gradients",
    "init",
    "interop",
    "load_optimizer_state",
    "load_state_dict",
    "load_weights",
    "loop",
    "metrics",
    "needs",
    "observers",
    "of_model",
    "on",
    "optim",
    "optimizer_state_dict",
    "recompute_statistics",
    "remat",
    "restore",
    "rng",
    "save",
    "save_weights",
    "schedules",
    "shard",
    "slotted",
    "state_dict",
    "stateful",
    "steps",
    "summary",
    "tap",
    "to_module",
    "tolerant",
    "train_step",
    "tree",
    "values",
    "view",
    "weighted",
    "when",
    "with_trainable",
    "wrap_step",
    "writers",
]
__all__ += core.__all__


if not _typing.TYPE_CHECKING:  # With it, type checkers would accept any name.

    def __getattr__(name: str) -> _typing.Any:
        """Imports what a script that only trains does not use."""
        if name in _PACKAGES_IMPORTED_ON_USE:
            return _importlib.import_module(f"{__name__}.{name}")
        if name not in _NAMES_IMPORTED_ON_USE:
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}", name=name, obj=_sys.modules[__name__]
            )
        found = getattr(_importlib.import_module(_NAMES_IMPORTED_ON_USE[name]), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES_IMPORTED_ON_USE})
