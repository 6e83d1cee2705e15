"""Function modes of a trace, for code that reads values which the tracer's tensors do not have.

*Literals:* code such as ``torch.arange(2, x.ndim).tolist()`` computes a list of integers by way of a tensor. Its values
depend only on the arguments.

*CTC losses:* torch's own cannot be traced if lengths are tensors, as it reads their values.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdRef

from fxtrain._torch_internals.dispatch import without_dispatch_modes
from fxtrain._torch_internals.memory import write_count
from fxtrain.compiler.passes._operators import ctc
from fxtrain.core import Tree

_FACTORIES = (torch.arange, torch.tensor)
_MAX_VALUES = 4096
_READS = ("tolist", "item")
_REDUCTIONS = ("none", "mean", "sum")


class KnownLiterals(TorchFunctionMode):
    """A context in which ``tolist`` and ``item`` work on tensors that ``arange`` and ``tensor`` made from literals.

    Tensors modified in place afterwards are excluded.

    Example:
        >>> from fxtrain._torch_internals.tracing import new_fake_mode
        >>> with new_fake_mode(), KnownLiterals():
        ...     torch.arange(2, 5).tolist()
        [2, 3, 4]
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[WeakIdRef, tuple[int, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Tree, ...] = (), kwargs: dict[str, Tree] | None = None
    ) -> Tree:
        kwargs = kwargs or {}
        name = func.__name__
        values = self._values_of(args[0]) if name in (*_READS, "unbind") and args else None
        if values is not None and name in _READS:
            with without_dispatch_modes():
                return getattr(values, name)(*args[1:], **kwargs)
        made = func(*args, **kwargs)
        if values is not None:
            # Outside of torch.func, the tracer's tolist unbinds the tensor and reads each element.
            with without_dispatch_modes():
                parts = values.unbind(*args[1:], **kwargs)
            for part, value in zip(made, parts, strict=True):
                self._add(part, value)
            return made
        if func in _FACTORIES and _is_literal((args, kwargs)) and made.numel() <= _MAX_VALUES:
            with without_dispatch_modes():
                self._add(made, func(*args, **{**kwargs, "device": "cpu"}))
        return made

    def _values_of(self, tensor: object) -> Tensor | None:
        if not isinstance(tensor, Tensor):
            return None
        version, values = self._known.get(WeakIdRef(tensor), (-1, None))
        return values if values is not None and version == write_count(tensor) else None

    def _add(self, tensor: Tensor, values: Tensor) -> None:
        self._known[WeakIdRef(tensor)] = write_count(tensor), values
        weakref.finalize(tensor, self._known.pop, WeakIdRef(tensor), None)


def _is_literal(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_literal, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_literal, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | torch.layout)


class OpaqueCTC(TorchFunctionMode):
    """A context in which ``ctc_loss`` is one opaque operator, so that its lengths stay tensors.

    Example:
        >>> scores = torch.randn(5, 2, 4).log_softmax(-1)
        >>> given = scores, torch.tensor([[1, 2], [3, 3]]), torch.tensor([5, 4]), torch.tensor([2, 1])
        >>> with OpaqueCTC():
        ...     found = torch.nn.functional.ctc_loss(*given)
        >>> bool(found == torch.nn.functional.ctc_loss(*given))
        True
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Tree, ...] = (), kwargs: dict[str, Tree] | None = None
    ) -> Tree:
        if func is torch.nn.functional.ctc_loss or func is torch.ctc_loss:
            return _ctc_loss(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str | int = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """Like ``torch.nn.functional.ctc_loss``. ``log_probs`` is [time, batch, classes] or [time, classes]."""
    is_batched = log_probs.ndim == 3
    scores = log_probs if is_batched else log_probs.unsqueeze(1)
    inputs, lengths = (
        torch.as_tensor(given, dtype=torch.int64, device=None if isinstance(given, Tensor) else "cpu").reshape(-1)
        for given in (input_lengths, target_lengths)
    )
    losses = _CTC.apply(scores, targets, inputs, lengths, blank, zero_infinity)[0]
    kind = reduction if isinstance(reduction, str) else _REDUCTIONS[reduction]
    if kind == "mean":
        return (losses / lengths.to(losses.device, losses.dtype).clamp_min(1)).mean()
    return losses.sum() if kind == "sum" else losses if is_batched else losses.squeeze(0)


class _CTC(torch.autograd.Function):
    """Computes the losses, and in the same pass their gradients with respect to the scores."""

    @staticmethod
    def forward(
        scores: Tensor, targets: Tensor, inputs: Tensor, lengths: Tensor, blank: int, zero_infinity: bool
    ) -> tuple[Tensor, Tensor]:
        return ctc()(scores, targets, inputs, lengths, blank, zero_infinity)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tree) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], inputs[0])

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> Tree:
        return slope[:, None] * _Once.apply(*ctx.saved_tensors), None, None, None, None, None


class _Once(torch.autograd.Function):
    """Returns the gradients unchanged. They cannot be differentiated again."""

    @staticmethod
    def forward(slopes: Tensor, scores: Tensor) -> Tensor:
        return slopes.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tree) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        raise NotImplementedError(
            "expected a first derivative of ctc_loss, got a second one, which is not implemented."
        )
