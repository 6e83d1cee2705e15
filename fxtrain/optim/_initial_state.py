"""Initial values of optimizer states: zeros, copies and counts like the parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Scalar, Tree, describe
from fxtrain.tree import MaskedNode, Path, as_code, children, rebuilt


def zeros(params: Tree, *, dtype: torch.dtype | None = None) -> Tree:
    """Returns zeros like each parameter, the initial value of first moments.

    Args:
        params: Pytree of floating-point or complex tensors.
        dtype: Dtype of real leaves. Defaults to that of the parameter.
    """

    def zero(path: Path, leaf: Tensor) -> Tensor:
        _refuse_undifferentiable(path, leaf)
        return torch.zeros_like(leaf, dtype=leaf.dtype if leaf.is_complex() else dtype)

    return _map_params(zero, params)


def clones(params: Tree) -> Tree:
    """Returns a copy of each parameter."""

    def clone(path: Path, leaf: Tensor) -> Tensor:
        _refuse_undifferentiable(path, leaf)
        return leaf.clone()

    return _map_params(clone, params)


def real_full(params: Tree, value: Scalar = 0.0) -> Tree:
    """Returns a real tensor filled with ``value`` for each parameter, the initial value of second moments.

    The dtype is float32 or wider, because half precision is not enough: in bfloat16 small relative changes are lost,
    and in float16 small squares underflow.
    """

    def full(path: Path, leaf: Tensor) -> Tensor:
        _refuse_undifferentiable(path, leaf)
        blank = torch.zeros_like(leaf, dtype=_real(torch.promote_types(leaf.dtype, torch.float32)))
        return blank + value if isinstance(value, Tensor) or value != 0.0 else blank

    return _map_params(full, params)


def start_count(params: Tree) -> Tensor:
    """Returns the update count before the first update: int64 [], on the device of the parameters."""
    return torch.zeros((), dtype=torch.int64, device=tree.device_of(params))


def _refuse_undifferentiable(path: Path, leaf: object) -> None:
    if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
        raise TypeError(
            f"expected params{as_code(path)} to be a floating-point or complex tensor, got {describe(leaf)}. Leave it "
            "out of the parameters."
        )


def _map_params(make: Callable[[Path, Tensor], Tensor], node: Tree, path: Path = ()) -> Tree:
    if node is None:
        # A frozen parameter may be None, which torch's pytrees, and therefore vmap, treat as a leaf.
        return MaskedNode()
    inner = children(node)
    if inner is None:
        return make(path, node)
    return rebuilt(node, [_map_params(make, child, (*path, key)) for key, child in inner])


def _real(dtype: torch.dtype) -> torch.dtype:
    # Dynamo cannot trace `dtype.to_real()`.
    return _PARTS.get(dtype, dtype)


_PARTS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
