"""Names for the values that annotations alone cannot describe: pytrees, batches and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import TypeAliasType

Tree = TypeAliasType("Tree", Any)
"""A pytree of tensors: a tensor, or nested dicts, lists, tuples and registered dataclasses of tensors.

Static type checkers treat it as ``Any``, because the structure is known at run time only.
"""

Scalar = float | Tensor
"""A Python number, or a tensor of shape []."""

Batch = TypeAliasType("Batch", Any)
"""One element of a data source: usually a dict of tensors, but any pytree of tensors or arrays."""

Metrics = TypeAliasType("Metrics", Mapping[str, Any])
"""Metrics by name: 0-d tensors, Python scalars or ``fxtrain.metrics`` values."""
