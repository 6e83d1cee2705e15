"""Leaves of optimizer states: zeros, copies and counts like the parameters, and scalars per parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Scalar, Tree, describe, did_you_mean, register_node
from fxtrain.tree import MaskedNode, Path, as_code, as_name, children, leaf_paths, rebuilt


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


@dataclasses.dataclass(frozen=True, eq=False)
class PerParameter:
    """One scalar for each parameter: a pytree node whose only leaf is a vector.

    Optimizers with bias correction count updates per parameter, as ``torch.optim`` does: a parameter that is unfrozen
    later, or that only some steps use, starts at 0 regardless of the other counts. Schedules count the updates of the
    whole optimizer. One vector needs one kernel of a compiled step and one leaf of the state, while a 0-d tensor per
    parameter would need hundreds of both.

    Args:
        values: [parameters], in the order of the leaves.
        paths: The paths of the parameters. Static.

    Example:
        >>> count = start_counts({"bias": torch.zeros(2), "weight": torch.zeros(2, 2)})
        >>> (count + 1)["weight"]
        tensor(1)
    """

    values: Tensor
    paths: tuple[Path, ...]

    def __add__(self, number: int) -> PerParameter:
        return PerParameter(self.values + number, self.paths)

    def __getitem__(self, name: str) -> Tensor:
        """Returns the scalar of the parameter with this name: []."""
        names = [as_name(path) for path in self.paths]
        if name not in names:
            raise KeyError(f"expected a parameter among {', '.join(names)}, got {name!r}.{did_you_mean(name, names)}")
        return self.values[names.index(name)]

    def replace(self, values: Tensor) -> PerParameter:
        """Returns other values for the same parameters."""
        return PerParameter(values, self.paths)

    def of(self, paths: Sequence[Path]) -> PerParameter:
        """Returns the scalars of some of the parameters. Each path must be in ``self.paths``."""
        chosen = tuple(paths)
        if chosen == self.paths:
            return self
        return PerParameter(_stacked(dict(zip(self.paths, self.values.unbind(), strict=True)), chosen, self), chosen)

    def updated(self, other: PerParameter) -> PerParameter:
        """Returns the scalars of ``other`` for its parameters, and those of ``self`` for the rest."""
        if other.paths == self.paths:
            return other
        own = dict(zip(self.paths, self.values.unbind(), strict=True))
        new = dict(zip(other.paths, other.values.unbind(), strict=True))
        return self.replace(_stacked({**own, **{path: new[path] for path in new if path in own}}, self.paths, self))


def per_parameter(params: Tree, value: float | Tensor = 0, *, dtype: torch.dtype = torch.int64) -> PerParameter:
    """Returns the same scalar for each leaf of ``params``.

    Args:
        params: Pytree of tensors.
        value: A number, or a tensor of shape [].
        dtype: Dtype of the vector.

    Example:
        >>> per_parameter({"bias": torch.zeros(2), "weight": torch.zeros(2, 2)}, 0.5, dtype=torch.float32).values
        tensor([0.5000, 0.5000])
    """
    paths = tuple(leaf_paths(params))
    device = tree.device_of(params)
    blank = torch.zeros(len(paths), dtype=dtype, device=device)
    return PerParameter(blank + value if isinstance(value, Tensor) or value != 0 else blank, paths)


def start_counts(params: Tree) -> PerParameter:
    """Returns the update count of each parameter before the first update: int64 [parameters]."""
    return per_parameter(params)


def where_each(chosen: PerParameter, otherwise: Tensor, values: Tree, others: Tree) -> Tree:
    """Returns ``values`` for the chosen parameters, and ``others`` for the rest.

    Args:
        chosen: Bools [parameters].
        otherwise: Bool []: the condition for leaves that belong to no parameter.
        values: A pytree like the parameters, or an optimizer state that contains such trees.
        others: A pytree like ``values``.

    Example:
        >>> params = {"bias": torch.zeros(2), "weight": torch.zeros(2)}
        >>> chosen = per_parameter(params, dtype=torch.bool).replace(torch.tensor([True, False]))
        >>> where_each(chosen, torch.tensor(True), params, {"bias": torch.ones(2), "weight": torch.ones(2)})
        {'bias': tensor([0., 0.]), 'weight': tensor([1., 1.])}
    """
    flags = dict(zip(chosen.paths, chosen.values.unbind(), strict=True))

    def merged(value: Tree, other: Tree) -> Tree:
        if isinstance(value, PerParameter):
            known = all(path in flags for path in value.paths)
            which = chosen.of(value.paths).values if known else otherwise
            return value.replace(torch.where(which, value.values, other.values))
        if _is_like(flags, value):
            leaves, structure = tree.flatten(value)
            rows = zip(leaf_paths(value), leaves, tree.leaves(other), strict=True)
            return tree.unflatten(structure, [torch.where(flags[path], one, two) for path, one, two in rows])
        inner = children(value)
        if inner is None:
            return torch.where(otherwise, value, other)
        pairs = zip(inner, children(other) or [], strict=True)
        return rebuilt(value, [merged(one, two) for (_, one), (_, two) in pairs])

    return merged(values, others)


def _is_like(flags: Mapping[Path, Tensor], node: Tree) -> bool:
    """Returns whether a node of an optimizer state is a tree of all or some of the parameters."""
    if isinstance(node, Tensor):
        return () in flags and (node.is_floating_point() or node.is_complex())
    if hasattr(node, "_fields"):
        return False
    paths = leaf_paths(node)
    return bool(paths) and all(path in flags for path in paths)


def _stacked(numbers: dict[Path, Tensor], paths: tuple[Path, ...], like: PerParameter) -> Tensor:
    # Indexing by a list of positions would add a tensor constant, which a graph cannot close over.
    return torch.stack([numbers[path] for path in paths]) if paths else like.values[:0]


def _flatten(node: PerParameter) -> tuple[list[Tensor], tuple[Path, ...]]:
    return [node.values], node.paths


def _unflatten(paths: tuple[Path, ...], children: Sequence[Tensor]) -> PerParameter:
    return PerParameter(children[0], paths)


register_node(PerParameter, _flatten, _unflatten, fields=("values",))
