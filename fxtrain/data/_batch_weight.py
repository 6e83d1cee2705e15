"""The weight of a batch in averages over batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Batch
from fxtrain.data._foreign_containers import count_examples


def batch_weight(batch: Batch) -> Tensor | int:
    """Returns the sum of a batch's mask, the number of its graphs or list elements, or its tensors' first dimension.

    Raises:
        ValueError: If the tensors differ in their first dimension. The message names two of them.

    Example:
        >>> batch_weight({"x": torch.zeros(3, 2), "mask": torch.tensor([True, True, False])})
        tensor(2)
    """
    mask = _mask(batch)
    tensors = [leaf for leaf in tree.leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    sizes = {leaf.shape[0] for leaf in tensors if leaf is not mask}
    if mask is not None and (not sizes or len(mask) in sizes):
        return mask.sum()
    # Dynamo cannot trace the search for graphs.
    examples = count_examples(batch) if mask is None and not torch.compiler.is_dynamo_compiling() else None
    if examples is not None:
        return examples
    if len(sizes) > 1 or mask is not None:
        raise ValueError(
            f"expected one first dimension, the batch size that weights the averages, got {_two_sizes(batch)}. Give "
            'the batch a 1-d "mask" of its examples, keep tensors without a batch dimension out of it, or return '
            "metrics with their own weights from eval_step, such as "
            "fxtrain.metrics.Average.from_model_output(losses)."
        )
    return sizes.pop() if sizes else 1


def _mask(batch: Batch) -> Tensor | None:
    """Returns the 1-d mask of a batch, which selects or weights its examples; None if there is none."""
    if isinstance(batch, Tensor | list):
        return None
    mask = cast(Mapping[Any, Any], batch).get("mask") if isinstance(batch, Mapping) else getattr(batch, "mask", None)
    return mask if isinstance(mask, Tensor) and mask.ndim == 1 and not mask.is_complex() else None


def _two_sizes(batch: Batch) -> str:
    pairs = zip(tree.paths(batch, "batch"), tree.leaves(batch), strict=True)
    shapes = {
        leaf.shape[0]: f"{path} of shape {list(leaf.shape)}"
        for path, leaf in pairs
        if isinstance(leaf, Tensor) and leaf.ndim
    }
    return " and ".join(list(shapes.values())[:2])
