"""The two functions inside ``torch.utils.checkpoint``, and in-place writes that autograd does not count."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from fxtrain._torch_internals.interface import Interface

_PURPOSE = "activation checkpoints inside torch.func and in traces"
PASSES = Interface("torch.utils.checkpoint._checkpoint_without_reentrant_generator", _PURPOSE)
FUNCTION = Interface("torch.utils.checkpoint.CheckpointFunction", _PURPOSE)
KEEP_VERSION = Interface("torch.autograd._unsafe_preserve_version_counter", "recomputing code that writes buffers")


def can_replace_checkpoints() -> bool:
    """Whether ``replace_checkpoints`` works with the installed torch."""
    return PASSES.exists and FUNCTION.exists


def replace_checkpoints(passes: Callable[..., Any], function: object) -> tuple[Any, Any]:
    """Replaces what ``torch.utils.checkpoint.checkpoint`` calls in this process. Returns what was there before.

    Code that imported ``checkpoint`` itself is reached too, because ``checkpoint`` looks these two up at each call.

    Args:
        passes: A generator function of the arguments of ``_checkpoint_without_reentrant_generator``. Its first part
            runs before the function, and its second part after it.
        function: An object whose ``apply(function, preserve_rng_state, *args)`` runs a reentrant checkpoint.
    """
    module: Any = sys.modules["torch.utils.checkpoint"]
    before = module._checkpoint_without_reentrant_generator, module.CheckpointFunction
    module._checkpoint_without_reentrant_generator, module.CheckpointFunction = passes, function
    return before


def keeping_versions(tensors: Iterable[Tensor]) -> AbstractContextManager[object]:
    """A context whose in-place writes into these tensors are not counted, so that autograd accepts them later."""
    return KEEP_VERSION.get()(tuple(tensors)) if KEEP_VERSION.exists else contextlib.nullcontext()
