"""Detects tracing and transforms, hides operations from them, and derives host seeds from keys."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fxtrain.rng._philox import Key, philox4x32

_MODES = torch._C._TorchDispatchModeKey
_HOST_SITE = (1 << 24) - 1  # the last site of a key, which program order never reaches
_WORD = (1 << 32) - 1


def is_traced() -> bool:
    """Returns whether ``make_fx`` is recording or tensors are fake. False inside Dynamo."""
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in (_MODES.PROXY, _MODES.FAKE))


def has_symbolic_sizes() -> bool:
    """Returns whether a step is traced with symbolic sizes. False inside Dynamo."""
    mode = torch._C._get_dispatch_mode(_MODES.FAKE)
    return getattr(mode, "shape_env", None) is not None and not getattr(mode, "static_shapes", True)


def is_transformed() -> bool:
    """Returns whether this call is inside a ``torch.func`` transform. Must not be called inside Dynamo."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def unrecorded() -> AbstractContextManager[object]:
    """A context manager whose operations ``make_fx`` does not record."""
    if torch._C._get_dispatch_mode(_MODES.PROXY) is None:
        return contextlib.nullcontext()
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()


def unwatched() -> AbstractContextManager[object]:
    """A context manager whose operations no dispatch mode sees, so that reads by the library break no graph."""
    return _disable_current_modes()


def host_seed(key: Key) -> int | None:
    """Returns a 64-bit seed for host generators as a function of the key, or None if the key has no values.

    A key has no values while a graph is traced, and under ``vmap`` over keys. Reading them synchronizes with the
    device.

    Example:
        >>> from fxtrain import rng
        >>> host_seed(rng.key(0, step=1)) == host_seed(rng.key(0, step=1)) != host_seed(rng.key(0, step=2))
        True
    """
    if is_traced():
        return None
    tensors = key.seed, key.step, key.microbatch
    try:
        with unwatched():
            if key.seed.device.type == "cpu":
                seed, step, microbatch = map(int, tensors)
            else:
                seed, step, microbatch = torch.stack(tensors).tolist()  # one transfer
    except RuntimeError:  # batched by vmap
        return None
    counter = 0, key.stream << 24 | _HOST_SITE, step & _WORD, microbatch & _WORD
    words = philox4x32(counter, (seed & _WORD, (seed >> 32 ^ (step >> 32) * 0x9E3779B9) & _WORD))
    return int(words[0]) | int(words[1]) << 32
