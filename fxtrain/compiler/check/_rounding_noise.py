"""Runs a computation with other rounding errors, which shows how much its results depend on rounding.

A compiler reorders sums, fuses operations and keeps intermediate results in a higher precision. Each of these changes
the last bits of intermediate results. ``RoundingNoise`` changes them too, by a little more, at each operation. This
measures what no tolerance per dtype can know: gradients that are zero up to rounding, ties of an ``argmax``, and
training that amplifies differences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.collectives import NAMESPACE as COLLECTIVES
from fxtrain._torch_internals.collectives import is_wait
from fxtrain._torch_internals.dispatch import (
    TorchDispatchMode,
    arguments_kept,
    is_in_place,
    is_view,
    operator_name,
)
from fxtrain._torch_internals.tracing import decomposition
from fxtrain.core import Tree

_AMPLITUDE = 16.0
"""Largest noise in rounding errors (eps): enough to change the sign of a gradient that consists of rounding errors."""
_LOW_AMPLITUDE = 2.0
"""The same for dtypes of at most 16 bits, in which 16 rounding errors would be a tenth of the value."""
_LOW_EPS = 1e-4
"""Machine precision above which a dtype has at most 16 bits. Kernels sum such tensors in float32."""
_SUM_EPS = torch.finfo(torch.float32).eps
_PERIOD = 1 << 18
"""After how many elements the noise repeats."""

# These add an update to a value that is large compared with it. Noise of more than one rounding error would hide what
# the update changes.
_ADDITIONS = frozenset(("add", "sub", "rsub", "addcdiv", "addcmul", "lerp"))
# These only move or select values, so their results are exact.
_EXACT_NAMES = """
abs alias all_gather_into_tensor all_reduce
amax amin arange as_strided as_strided_scatter bitwise_and bitwise_or bitwise_xor cat ceil clamp clamp_max
clamp_min clone complex constant_pad_nd copy copysign detach diag_embed diagonal diagonal_scatter embedding empty
empty_like empty_strided expand eye fill flip floor fmax fmin full full_like gather hardtanh heaviside im2col index
index_copy index_fill index_select isfinite isinf isnan lift_fresh masked_fill masked_scatter masked_select maximum
minimum nan_to_num narrow neg new_empty new_empty_strided new_full new_ones new_zeros ones ones_like permute
pixel_shuffle pixel_unshuffle put reflection_pad1d reflection_pad2d relu repeat replication_pad2d reshape resize roll
round rot90 scalar_tensor scatter select select_backward select_scatter set sgn sign slice slice_backward slice_scatter
split split_with_sizes squeeze stack t take threshold threshold_backward transpose tril triu trunc unbind unfold
unfold_backward unsqueeze view view_as_complex view_as_real wait_tensor where zero zeros zeros_like
"""
_EXACT = frozenset(_EXACT_NAMES.split())
# These return positions of floating-point values. Ties may be broken in another way by a compiled step.
_SELECTION_NAMES = """
argmax argmin argsort kthvalue max median min mode sort topk max_pool2d_with_indices max_pool3d_with_indices
adaptive_max_pool2d adaptive_max_pool3d
"""
_SELECTIONS = frozenset(_SELECTION_NAMES.split())
# These compute a statistic and use it for many elements, so one rounding error inside them reaches all of these.
_COMPOSITE_NAMES = """
batch_norm_backward batch_norm_no_update batch_norm_with_update batch_norm_with_update_functional cudnn_batch_norm
cudnn_batch_norm_backward fused_rms_norm fused_rms_norm_backward log_softmax log_softmax_backward_data logsumexp
miopen_batch_norm_backward native_batch_norm native_batch_norm_backward native_batch_norm_legit
native_batch_norm_legit_functional native_batch_norm_legit_no_training native_group_norm native_group_norm_backward
native_layer_norm native_layer_norm_backward renorm safe_softmax softmax softmax_backward_data weight_norm_interface
"""
_COMPOSITES = frozenset(_COMPOSITE_NAMES.split())

# These may round float32 inputs to fewer bits, as ``torch.backends`` has settings for.
_MATMULS = ("addbmm", "addmm", "addmv", "baddbmm", "bmm", "dot", "linear", "mm", "mv", "scaled_dot_product", "vdot")
_INPUT_EPS = {"tf32": 2.0**-10, "bf16": torch.finfo(torch.bfloat16).eps}
"""Machine precision of the inputs by setting. cuDNN rounds those of convolutions to TF32 by default."""

_PLAIN: Any = Tensor


class RoundingNoise(TorchDispatchMode):
    """A context that adds noise of a few rounding errors to the result of each operation.

    The noise is a function of the order of operations. Two contexts with opposite signs add opposite noise, so a value
    that consists of rounding errors gets both signs.

    Args:
        seed: Selects the noise.
        sign: 1.0 or -1.0.
        errors: The largest noise in rounding errors, for dtypes of more than 16 bits.

    Attributes:
        has_overflowed: Whether a float16 result was infinite. A compiled step may keep float32 intermediates instead,
            in which case the two are not comparable.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.1, 0.0])
        >>> with RoundingNoise(seed=0, sign=1.0):
        ...     y = x * 3
        >>> bool(y[0] == x[0] * 3), bool(y[1] == 0)
        (False, True)
    """

    def __init__(self, *, seed: int, sign: float, errors: float = _AMPLITUDE) -> None:
        super().__init__()
        self.has_overflowed = False
        self._errors = errors
        self._coarsest = 0.0  # machine precision of the dtype with the fewest bits so far
        self._sign, self._count = sign, seed * 7919
        self._tables: dict[tuple[torch.device, torch.dtype, float], Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Tree, ...] = (), kwargs: dict[str, Tree] | None = None
    ) -> Tree:
        if any(kind.__torch_dispatch__ is not _PLAIN.__torch_dispatch__ for kind in types):
            return NotImplemented  # the operations that a tensor such as a DTensor consists of follow
        kwargs = kwargs or {}
        if func.namespace == COLLECTIVES:
            # Before the wait, a transfer still writes to the result.
            result = func(*args, **kwargs)
            return self._noisy(result) if is_wait(func) else result
        name = operator_name(func).removeprefix("_foreach_").strip("_").removesuffix("_copy")
        writes, selects = is_in_place(func), name in _SELECTIONS
        if is_view(func) or (name in _EXACT and not selects):
            return func(*args, **kwargs)
        simpler = decomposition(func) if name in _COMPOSITES else None
        if simpler is not None:
            with self:
                return simpler(*args, **kwargs)
        if name in ("to", "copy") and not writes:
            result = func(*args, **kwargs)
            return self._noisy(result) if _is_rounded(args[0], result) else result
        is_pointwise = torch.Tag.pointwise in func.tags
        if selects:
            args = tuple(self._untied(arg) if isinstance(arg, Tensor) else arg for arg in args)
        elif not is_pointwise:
            args = tuple(
                self._noisy(arg, _input_errors(name, arg)) if isinstance(arg, Tensor) and is_kept else arg
                for arg, is_kept in zip(args, arguments_kept(func), strict=False)
            )
        operands = [arg for arg in args if isinstance(arg, Tensor) and _is_noisy(arg)] if is_pointwise else []
        if writes and name != "copy":
            operands = [arg.clone() for arg in operands]
        result = func(*args, **kwargs)
        if selects:
            return result
        errors = 1.0 if name in _ADDITIONS else None

        def with_noise(leaf: Tree) -> Tree:
            if not isinstance(leaf, Tensor):
                return leaf
            return self._noisy(leaf, errors, 1.0 if is_pointwise else _terms(args, leaf), operands)

        if not writes:
            return tree.map(with_noise, result)
        if name != "copy":
            for leaf in tree.leaves(result):
                if isinstance(leaf, Tensor) and _is_noisy(leaf):
                    leaf.copy_(with_noise(leaf))
        return result

    def added_to(self, value: Tree) -> Tree:
        """Returns the value with noise, if it is a floating-point tensor.

        The noise is that of the coarsest dtype in which an operation rounded, because autocast would round away less.
        """
        if not isinstance(value, Tensor) or not _is_noisy(value):
            return value
        if self._coarsest <= max(torch.finfo(value.dtype).eps, _LOW_EPS):
            return self._noisy(value)
        self._count += 1
        return value * self._table(value, min(_LOW_AMPLITUDE, self._errors) * self._coarsest)

    def _noisy(
        self, value: Tensor, errors: float | None = None, terms: float = 1.0, operands: Sequence[Tensor] = ()
    ) -> Tensor:
        """Returns the value with noise. Small integers stay the same, because they are exact: masks, counts and zeros.

        Args:
            value: Any tensor.
            errors: The largest noise in rounding errors, by default that of the dtype.
            terms: How many terms were summed for each element. The rounding errors of sequential sums grow with its
                square root, and are relative to the partial sums, whose size is estimated by that of all results.
            operands: The operands of an element-wise operation. Only results of exact operands are exact.
        """
        if not _is_noisy(value) or not value.numel():
            return value
        if value.dtype == torch.float16:
            self.has_overflowed |= bool(value.isinf().any())
        eps = torch.finfo(value.dtype).eps
        self._coarsest = max(self._coarsest, eps)
        is_low = eps > _LOW_EPS
        if errors is None:
            errors = min(_LOW_AMPLITUDE, self._errors) if is_low else self._errors
        wide = value.float() if is_low else value
        self._count += 1
        of_sums = math.sqrt(terms) * (_SUM_EPS if is_low else eps)
        if errors > 1 and of_sums <= errors * eps:
            # Faster, and leaves zeros and infinities as they are. Factors are too coarse for a single rounding error.
            moved = wide * self._table(wide, errors * eps)
        else:
            size = wide.abs() * (errors * eps)
            if of_sums > errors * eps:
                size = size + wide.square().mean().sqrt() * of_sums
            moved = torch.where(wide.isfinite(), wide + size * self._table(wide), wide)
        moved = moved.to(value.dtype)
        if not (value.frac() == 0).any():
            return moved
        # A result that is an integer only because it was rounded, such as 1 - 1e-9, is not exact.
        return torch.where(
            functools.reduce(torch.logical_and, map(_is_exact, operands), _is_exact(value)), value, moved
        )

    def _untied(self, value: Tensor) -> Tensor:
        """Returns the value with absolute noise, so that equal elements differ."""
        if not _is_noisy(value) or not value.numel():
            return value
        self._count += 1
        largest = torch.where(value.isfinite(), value.abs(), 0).max().clamp(min=torch.finfo(value.dtype).tiny)
        return (value + self._table(value) * (largest * torch.finfo(value.dtype).eps * 2)).to(value.dtype)

    def _table(self, like: Tensor, size: float | None = None) -> Tensor:
        """Returns noise between -1 and 1 in the shape of ``like``, or 1 plus noise of this size.

        It is read from a table, at a place that depends on the count of operations.
        """
        key = like.device, like.dtype, size or 0.0
        table = self._tables.get(key)
        if table is None:
            generator = torch.Generator().manual_seed(0)
            table = (torch.rand(_PERIOD, generator=generator, dtype=torch.float64) * 2 - 1) * self._sign
            if size is not None:
                table = 1 + table * size
            table = self._tables[key] = table.to(like.device, like.dtype).repeat(2)
        start, count = self._count * 104729 % _PERIOD, like.numel()
        if count > _PERIOD:
            table = table[start : start + _PERIOD].repeat(-(-count // _PERIOD))
            start = 0
        return table[start : start + count].view(like.shape)


def _is_noisy(value: Tensor) -> bool:
    # Other dtypes, such as complex numbers, are computed from real ones in most models.
    return value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _is_exact(value: Tensor) -> Tensor:
    """Returns where a value is a small integer."""
    return (value == value.round()) & (value.abs() <= 0.25 / torch.finfo(value.dtype).eps)


def _is_rounded(before: Tree, after: Tree) -> bool:
    """Whether a conversion loses bits of a floating-point tensor."""
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or not (_is_noisy(before) and _is_noisy(after)):
        return False
    return torch.finfo(after.dtype).eps > torch.finfo(before.dtype).eps


def _input_errors(name: str, value: Tensor) -> float | None:
    """Returns the largest noise of a float32 input that an operation rounds to fewer bits, or None for others."""
    if value.dtype != torch.float32:
        return None
    is_on_cpu = value.device.type == "cpu"
    settings: Any = torch.backends.mkldnn if is_on_cpu else torch.backends.cudnn
    setting: Any = None
    if "conv" in name:
        setting = settings.conv
    elif any(kind in name for kind in ("rnn", "lstm", "gru")):
        setting = settings.rnn
    elif name.startswith(_MATMULS):
        setting = settings.matmul if is_on_cpu else torch.backends.cuda.matmul
    eps = None if setting is None else _INPUT_EPS.get(setting.fp32_precision)
    return None if eps is None else _LOW_AMPLITUDE * eps / torch.finfo(torch.float32).eps


def _terms(args: Sequence[Tree], result: Tensor) -> float:
    """Returns about how many terms an operation sums for each element, such as k for a matmul [m, k] x [k, n]."""
    sizes = sorted((arg.numel() for arg in args if isinstance(arg, Tensor) and _is_noisy(arg)), reverse=True)[:2]
    if not sizes or not result.numel():
        return 1.0
    terms = math.sqrt(math.prod(sizes) / result.numel()) if len(sizes) == 2 else sizes[0] / result.numel()
    return max(1.0, terms)
