"""Autocast in which norms and softmax are computed in float32 on every device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch.overrides import TorchFunctionMode

from fxtrain._torch_internals.dynamo import inlined_only
from fxtrain.core import Tree

HALF = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    # Cast weights are not cached, because the cache would keep tensors of a functorch level after its end.
    with torch.autocast(device.type, dtype=dtype, cache_enabled=False), Float32Norms():
        yield


@inlined_only
class Float32Norms(TorchFunctionMode):
    """Computes norms and softmax in float32 on every device.

    On the CPU, autocast leaves them in half precision. In norms it mixes dtypes, which ``vmap`` rejects.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Tree, ...] = (),
        kwargs: Mapping[str, Tree] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func.__name__ in _IN_FLOAT32:
            if args and args[0].dtype in HALF:
                return func(args[0].float(), *args[1:], **kwargs)
            if "input" in kwargs and kwargs["input"].dtype in HALF:
                return func(*args, **{**kwargs, "input": kwargs["input"].float()})
        if func.__name__ == "unflatten":
            return args[0].unflatten(*args[1:], **kwargs)  # Dynamo cannot call this Python method as a function
        return func(*args, **kwargs)


_IN_FLOAT32 = frozenset(
    {"batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm", "softmax", "log_softmax"}
)
