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
    return _map_params(lambda leaf: _zeros_like(leaf, leaf.dtype if leaf.is_complex() else dtype), params)


def clones(params: Tree) -> Tree:
    """Returns a copy of each parameter."""
    return _map_params(torch.clone, params)


def real_full(params: Tree, value: Scalar = 0.0) -> Tree:
    """Returns a real tensor filled with ``value`` for each parameter, the initial value of second moments.

    The dtype is float32 or wider, because half precision is not enough: in bfloat16 small relative changes are lost,
    and in float16 small squares underflow.
    """

    def full(leaf: Tensor) -> Tensor:
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        blank = _zeros_like(leaf, _REAL.get(dtype, dtype))
        return blank + value if isinstance(value, Tensor) or value != 0.0 else blank

    return _map_params(full, params)


def start_count(params: Tree) -> Tensor:
    """Returns the update count before the first update: int64 [], on the device of the parameters."""
    return torch.zeros((), dtype=torch.int64, device=tree.device_of(params))


def _zeros_like(leaf: Tensor, dtype: torch.dtype | None) -> Tensor:
    if leaf.is_meta:
        # The first step checks the structure of its state on this device, for which ``zeros_like`` imports sympy.
        return torch.zeros(leaf.shape, dtype=dtype or leaf.dtype, device="meta")
    return torch.zeros_like(leaf, dtype=dtype)


def _map_params(make: Callable[[Tensor], Tensor], node: Tree, path: Path = ()) -> Tree:
    if node is None:
        # A frozen parameter may be None, which torch's pytrees, and therefore vmap, treat as a leaf.
        return MaskedNode()
    inner = children(node)
    if inner is not None:
        return rebuilt(node, [_map_params(make, child, (*path, key)) for key, child in inner])
    if not isinstance(node, Tensor) or not (node.is_floating_point() or node.is_complex()):
        raise TypeError(
            f"expected params{as_code(path)} to be a floating-point or complex tensor, got {describe(node)}. Leave it "
            "out of the parameters."
        )
    return make(node)


# Dynamo cannot trace `dtype.to_real()`.
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


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
        return self._picked(self.by_path(), chosen)

    def updated(self, other: PerParameter) -> PerParameter:
        """Returns the scalars of ``other`` for its parameters, and those of ``self`` for the rest."""
        if other.paths == self.paths:
            return other
        return self._picked({**self.by_path(), **other.by_path()}, self.paths)

    def by_path(self) -> dict[Path, Tensor]:
        """Returns the scalars by the paths of their parameters."""
        return dict(zip(self.paths, self.values.unbind(), strict=True))

    def _picked(self, scalars: Mapping[Path, Tensor], paths: tuple[Path, ...]) -> PerParameter:
        # Indexing by a list of positions would add a tensor constant, which a graph cannot close over.
        return PerParameter(torch.stack([scalars[path] for path in paths]) if paths else self.values[:0], paths)


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
    flags = chosen.by_path()

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


register_node(
    PerParameter,
    lambda node: ([node.values], node.paths),
    lambda paths, values: PerParameter(values[0], paths),
    fields=("values",),
)
