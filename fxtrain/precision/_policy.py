"""The dtypes of parameters, computation and outputs, and autocast with norms and softmax in float32."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxtrain import tree
from fxtrain._torch_internals.dynamo import inlined_only
from fxtrain.core import Metrics, Tree, describe, did_you_mean
from fxtrain.precision._loss_scale import LossScale

HALF = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Policy:
    """The dtypes of a step. None leaves a dtype unchanged.

    Args:
        param: The dtype of floating-point parameters, and so of gradients and optimizer state. The state must have it
            already.
        compute: The dtype of matmuls and convolutions under ``torch.autocast``: bfloat16 or float16, with float32
            parameters. Norms, softmax and losses stay in float32. With None, nothing is cast and batches must have the
            dtype of the parameters.
        output: The dtype of the loss and the floating-point metrics.
        loss_scale: Dynamic loss scaling, whose state is in the slot ``"loss_scale"``; None for none.
        keep: Shell patterns of module names, such as ``"*.wo"``. The ``forward`` of these modules computes in float32,
            with autocast off and half-precision inputs cast. If ``param`` is a half-precision dtype, their parameters
            and buffers are cast for the call and their outputs are cast back.

    Raises:
        TypeError: If a dtype is not a floating-point dtype.
        ValueError: If autocast does not support ``compute`` with ``param``, or if ``loss_scale`` is given and ``param``
            is not float32.

    Example:
        >>> Policy(compute=torch.bfloat16).param
        torch.float32
    """

    param: torch.dtype | None = torch.float32
    compute: torch.dtype | None = None
    output: torch.dtype | None = torch.float32
    loss_scale: LossScale | None = None
    keep: str | Sequence[str] = ()

    @property
    def described(self) -> str:
        """The policy in one line of text."""
        dtypes = (f"{name} {getattr(self, name) or 'unchanged'}" for name in ("param", "compute", "output"))
        kept = f", {' '.join(self.keep)} in float32" if self.keep else ""
        scaled = ", loss scale" if self.loss_scale is not None else ""
        return ", ".join(dtypes).replace("torch.", "") + kept + scaled

    def __post_init__(self) -> None:
        # A tuple is hashable, like the other fields.
        object.__setattr__(self, "keep", (self.keep,) if isinstance(self.keep, str) else tuple(self.keep))
        for field in ("param", "compute", "output"):
            dtype = getattr(self, field)
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise TypeError(
                    f"expected {field} to be a floating-point dtype such as torch.bfloat16, got {dtype!r:.60}."
                )
        if self.casts and (self.compute not in HALF or self.param != torch.float32):
            raise ValueError(
                "expected compute to be torch.bfloat16 or torch.float16 and param to be torch.float32, got "
                f"compute={self.compute}, param={self.param}. To keep parameters in another dtype, pass it as both."
            )
        if self.loss_scale is not None and self.param != torch.float32:
            raise ValueError(
                f"expected param to be torch.float32 with a loss scale, got {self.param}. Small gradients of a "
                "narrower dtype underflow when they are divided by the scale."
            )

    @property
    def casts(self) -> bool:
        """Whether the forward pass runs under autocast."""
        return self.compute is not None and self.compute != self.param

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Returns the context manager for the forward pass."""
        if not self.casts:
            return contextlib.nullcontext()
        return _autocast(device, self.compute)

    def backward(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Returns the context manager for the backward pass inside ``autocast``. Operations keep their dtypes."""
        return torch.autocast(device.type, enabled=False) if self.casts else contextlib.nullcontext()

    def cast_output(self, metrics: Metrics) -> dict[str, Tree]:
        """Returns ``metrics`` with floating-point tensors cast to ``output``. ``fxtrain.metrics`` values are kept."""
        return {
            name: value.to(self.output) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in metrics.items()
        }

    def check(self, params: Tree) -> None:
        """Raises TypeError if a floating-point parameter does not have the dtype ``param``."""
        if self.param is None:
            return
        for index, leaf in enumerate(tree.leaves(params)):
            if leaf.is_floating_point() and leaf.dtype != self.param:
                # Dynamo cannot format paths.
                path = "a leaf" if torch.compiler.is_dynamo_compiling() else tree.paths(params, "state.params")[index]
                raise TypeError(
                    f"expected {path} to be {self.param}, the precision policy's parameter dtype, got {leaf.dtype}. "
                    f"Cast the parameters with fxtrain.init(..., dtype={self.param})."
                )


_NAMED = {
    None: Policy(param=None, output=None),
    "fp32": Policy(),
    "bf16": Policy(compute=torch.bfloat16),
    "fp16": Policy(compute=torch.float16, loss_scale=LossScale()),
}


def policy_of(precision: str | Policy | None) -> Policy:
    """Returns the policy for ``"fp32"``, ``"bf16"`` or ``"fp16"``. None is the policy that changes no dtypes.

    ``"bf16"`` and ``"fp16"`` compute in half precision with float32 parameters. ``"fp16"`` uses dynamic loss scaling.

    Raises:
        ValueError: If there is no policy of this name.

    Example:
        >>> policy_of("bf16").compute
        torch.bfloat16
    """
    if isinstance(precision, Policy):
        return precision
    if precision not in _NAMED:
        names = [name for name in _NAMED if name]
        raise ValueError(
            f"expected precision to be {', '.join(map(repr, names))}, None or an fxtrain.Policy, got "
            f"{describe(precision)}.{did_you_mean(precision, names)}"
        )
    return _NAMED[precision]


@contextlib.contextmanager
def _autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
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
