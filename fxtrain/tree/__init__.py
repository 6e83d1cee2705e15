"""Pytree functions: optree in fxtrain's namespace, with paths written as code.

Dictionaries, lists, tuples and named tuples are nodes, as are ``TrainState``, ``Control`` and metrics. ``None`` is an
empty node. Dictionaries are flattened in the order of their sorted keys.
"""

from fxtrain.tree._arithmetic import clone, global_norm, where, zeros_like
from fxtrain.tree._arithmetic import device_of as device_of
from fxtrain.tree._arithmetic import nbytes as nbytes
from fxtrain.tree._generated_flatten import Flatten as Flatten
from fxtrain.tree._generated_flatten import OtherStructureError as OtherStructureError
from fxtrain.tree._generated_flatten import generate_flatten as generate_flatten
from fxtrain.tree._generated_unflatten import generate_unflatten as generate_unflatten
from fxtrain.tree._map import accessors as accessors
from fxtrain.tree._map import flatten, leaves, map, map_with_path, paths, structure, unflatten  # noqa: A004
from fxtrain.tree._nodes import MaskedNode as MaskedNode
from fxtrain.tree._nodes import Path as Path
from fxtrain.tree._nodes import as_code as as_code
from fxtrain.tree._nodes import as_name as as_name
from fxtrain.tree._nodes import children as children
from fxtrain.tree._nodes import leaf_paths as leaf_paths
from fxtrain.tree._nodes import rebuilt as rebuilt

__all__ = [
    "clone",
    "flatten",
    "global_norm",
    "leaves",
    "map",
    "map_with_path",
    "paths",
    "structure",
    "unflatten",
    "where",
    "zeros_like",
]
