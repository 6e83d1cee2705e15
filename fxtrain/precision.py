"""Precision: which dtype parameters are kept in, computed in and reported in; dynamic loss scaling for float16."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxtrain import tree
from fxtrain.core import Control, Gradients, TrainState
from fxtrain.fold import Handler, stateful
from fxtrain.rng._frames import inlined_only

SLOT = "loss_scale"
HALF = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class LossScale:
    """How a dynamic loss scale moves: halved when a gradient overflows, doubled after ``period`` good steps.

    The loss is multiplied by the scale, so that small gradients do not vanish in float16, and the gradients are
    divided by it. A step whose gradients are not finite is skipped.

    Args:
        initial: The first scale.
        factor: By what it is divided and multiplied; above 1. A power of two loses no digits.
        period: Good steps before it grows.
        floor: It never falls below this.

    References:
        Micikevicius and others, "Mixed precision training", 2018.
    """

    initial: float = 2.0**15
    factor: float = 2.0
    period: int = 2000
    floor: float = 1.0

    def __post_init__(self) -> None:
        if not (self.initial > 0 and self.factor > 1 and self.period >= 1 and 0 < self.floor <= self.initial):
            raise ValueError(f"A loss scale needs factor > 1, period >= 1 and 0 < floor <= initial, and {self} came.")


class LossScaleState(NamedTuple):
    """The memory of a dynamic loss scale."""

    scale: Tensor  # float32 []
    good_steps: Tensor  # int64 []: finite steps since the scale last moved


@dataclasses.dataclass(frozen=True)
class Policy:
    """The dtypes of a step. None leaves a dtype as it is.

    Args:
        param: Of the floating parameters in the state, and so of gradients and optimizer. Must be what the state has.
        compute: Of matrix products and convolutions, by ``torch.autocast``: bfloat16 or float16, over float32
            parameters. Norms, softmax and losses stay in float32. Without it nothing is cast, and batches must come in
            the dtype of the parameters.
        output: Of the loss and the floating metrics.
        loss_scale: A dynamic loss scale, kept in the state's slot ``"loss_scale"``; None for none.
        keep: Shell patterns of module names, such as ``"*.wo"``: modules whose ``forward`` computes in float32, with
            autocast off and bfloat16 and float16 inputs cast. Their parameters and buffers are cast for the call where
            ``param`` is one of these dtypes; their outputs are then cast back to it.

    Raises:
        TypeError: If a dtype is not floating.
        ValueError: If autocast cannot compute in ``compute`` over ``param``.

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
        """The dtypes in a line."""
        dtypes = (f"{name} {getattr(self, name) or 'unchanged'}" for name in ("param", "compute", "output"))
        kept = f", {' '.join(self.keep)} in float32" if self.keep else ""
        scaled = ", loss scale" if self.loss_scale is not None else ""
        return ", ".join(dtypes).replace("torch.", "") + kept + scaled

    def __post_init__(self) -> None:
        # A tuple has a hash, as the other fields.
        object.__setattr__(self, "keep", (self.keep,) if isinstance(self.keep, str) else tuple(self.keep))
        for field in ("param", "compute", "output"):
            dtype = getattr(self, field)
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise TypeError(f"Policy({field}={dtype!r}): a floating torch.dtype is wanted, such as torch.bfloat16.")
        if self.casts and (self.compute not in HALF or self.param != torch.float32):
            raise ValueError(
                f"Policy(param={self.param}, compute={self.compute}): autocast computes in bfloat16 or float16, over "
                "float32 parameters. To keep parameters in another dtype too, give it for both."
            )
        if self.loss_scale is not None and self.param != torch.float32:
            raise ValueError(
                f"Policy(param={self.param}, loss_scale=...): what the scale saves is lost again in gradients of "
                "that dtype, so float32 parameters are wanted."
            )

    @property
    def casts(self) -> bool:
        """Whether autocast runs the forward pass."""
        return self.compute is not None and self.compute != self.param

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context that the forward pass runs in."""
        if not self.casts:
            return contextlib.nullcontext()
        return _autocast(device, self.compute)

    def backward(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context inside that one which the backward pass runs in: operations keep the dtypes they had."""
        return torch.autocast(device.type, enabled=False) if self.casts else contextlib.nullcontext()

    def cast_output(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics, the floating tensors among them in ``output``. What ``fxtrain.metrics`` made keeps its own."""
        return {
            name: value.to(self.output) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in metrics.items()
        }

    def check(self, params: Any) -> None:
        """Refuses floating parameters of another dtype than ``param``."""
        if self.param is None:
            return
        for index, leaf in enumerate(tree.leaves(params)):
            if leaf.is_floating_point() and leaf.dtype != self.param:
                # Dynamo cannot write paths.
                path = "a leaf" if torch.compiler.is_dynamo_compiling() else tree.paths(params, "state.params")[index]
                raise TypeError(
                    f"{path} is {leaf.dtype}, and the precision policy keeps parameters in {self.param}: "
                    f"fxtrain.init(..., dtype={self.param}) casts them."
                )


@contextlib.contextmanager
def _autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    # No cache of cast weights: it would hold tensors of one transform's level beyond it.
    with torch.autocast(device.type, dtype=dtype, cache_enabled=False), _Float32():
        yield


@inlined_only
class _Float32(TorchFunctionMode):
    """Norms and softmax in float32, on every device.

    On a CPU, autocast leaves them in half precision, and mixes dtypes in norms, which ``vmap`` refuses.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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

_NAMED = {
    None: Policy(param=None, output=None),
    "fp32": Policy(),
    "bf16": Policy(compute=torch.bfloat16),
    "fp16": Policy(compute=torch.float16, loss_scale=LossScale()),
}


def policy_of(precision: str | Policy | None) -> Policy:
    """The policy of a name: ``"bf16"`` or ``"fp16"`` (computed over float32 parameters), ``"fp32"``, or None for none.

    Raises:
        ValueError: If there is no such name.

    Example:
        >>> policy_of("bf16").compute
        torch.bfloat16
    """
    if isinstance(precision, Policy):
        return precision
    if precision not in _NAMED:
        names = ", ".join(repr(name) for name in _NAMED if name)
        raise ValueError(f"precision={precision!r}: choose {names}, or give an fxtrain.Policy.")
    return _NAMED[precision]


def dynamic_loss_scale(scale: LossScale) -> Handler:
    """The traced callback that skips overflowing steps and moves the scale."""

    def init(state: TrainState) -> LossScaleState:
        return LossScaleState(
            scale=torch.tensor(scale.initial, device=state.step.device),
            good_steps=torch.tensor(0, device=state.step.device),
        )

    def update(state: TrainState, event: Gradients, memory: LossScaleState) -> tuple[LossScaleState, Control]:
        finite = all_finite(event.grads)
        grown = memory.good_steps + 1 >= scale.period
        up = torch.where(grown, memory.scale * scale.factor, memory.scale)
        down = (memory.scale / scale.factor).clamp(min=scale.floor)
        moved = LossScaleState(
            # A scale that overflows itself would never come back.
            scale=torch.where(finite, torch.where(up.isfinite(), up, memory.scale), down),
            good_steps=torch.where(finite & ~grown, memory.good_steps + 1, 0),
        )
        return moved, Control(skip_update=~finite, reason="gradients overflowed at this loss scale")

    return stateful(SLOT, init, update)


def loss_scale_of(state: TrainState) -> Tensor:
    """The loss scale that the state is at: float32 [].

    Raises:
        ValueError: If it has none.
    """
    if SLOT not in state.slots:
        raise ValueError(
            f"expected the loss scale of the precision policy in the slot {SLOT!r}, got a state without it. Give the "
            "hand-written step its callback, fxtrain.precision.dynamic_loss_scale: Step(function, callbacks=...) then "
            "attaches the slot and moves the scale."
        )
    return state.slots[SLOT].scale


def all_finite(values: Any) -> Tensor:
    """Whether every element of every leaf is finite: bool []."""
    return finite_leaves(values).all()


def finite_leaves(values: Any) -> Tensor:
    """Whether every element of each leaf is finite: bool [leaves]."""
    finite = [leaf.isfinite().all() for leaf in tree.leaves(values)]
    return torch.stack(finite) if finite else torch.ones(0, dtype=torch.bool)
