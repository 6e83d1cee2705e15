"""Types of the arguments of ``init``, ``with_trainable`` and ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn
from typing_extensions import TypeAliasType

from fxtrain.core import Tree
from fxtrain.optim import GradientTransformation

Out = TypeVar("Out")
"""The output of a function of the model."""

Modules = TypeAliasType("Modules", "nn.Module | Tensor | Mapping[str, Modules] | Sequence[Modules]")
"""A module, or a pytree of modules and tensors."""

Transforms = TypeAliasType("Transforms", "GradientTransformation | Mapping[str, Transforms] | None")
"""A gradient transformation, or one for each entry of a dict of modules."""

StateDict = TypeAliasType("StateDict", Mapping[str, Tree] | Sequence[Tree])
"""Tensors by name, or a tree of such mappings like the modules."""
