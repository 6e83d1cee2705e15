"""Whether the operations of this moment are recorded or run without values: a tracer's tensors have no numbers."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fxtrain.rng._philox import Key, philox4x32

_MODES = torch._C._TorchDispatchModeKey
_HOST_SITE = (1 << 24) - 1  # the last site of a key: program order never gets there
_WORD = (1 << 32) - 1


def is_traced() -> bool:
    """Whether ``make_fx`` records, or tensors are fake. Not True inside Dynamo."""
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in (_MODES.PROXY, _MODES.FAKE))


def has_symbolic_sizes() -> bool:
    """Whether a step is traced for inputs of any sizes. Not True inside Dynamo."""
    mode = torch._C._get_dispatch_mode(_MODES.FAKE)
    return getattr(mode, "shape_env", None) is not None and not getattr(mode, "static_shapes", True)


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` surrounds this call. Not to be called inside Dynamo."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def unrecorded() -> AbstractContextManager[object]:
    """A context whose operations do not enter the graph that ``make_fx`` records, if it does."""
    if torch._C._get_dispatch_mode(_MODES.PROXY) is None:
        return contextlib.nullcontext()
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()


def unwatched() -> AbstractContextManager[object]:
    """A context whose operations no dispatch mode sees: what the library itself reads is no break of a graph."""
    return _disable_current_modes()


def host_seed(key: Key) -> int | None:
    """A seed of 64 bits for generators of the host, as a function of the key; None where the key has no values.

    It has none while a graph is traced, and under ``vmap`` over keys. Waits for the device of the key.

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
