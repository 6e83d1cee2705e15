"""The part of each batch that a rank reads."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from fxtrain import tree
from fxtrain.core import Batch, describe
from fxtrain.data import Source, SourceLike, as_source
from fxtrain.data._as_tensors import as_tensors
from fxtrain.data._graphs import holds_graph
from fxtrain.data._indexed_batches import IndexedBatches
from fxtrain.data._source import MappedBatches
from fxtrain.distributed._examples import has_examples, num_examples
from fxtrain.distributed._mesh import Mesh


def rows(source: SourceLike, mesh: Mesh) -> Source:
    """Returns the examples of each batch that this rank trains on. Together, the ranks have each example once.

    Rank r of R has the examples r, r + R, r + 2 R, ... of each batch, so sizes differ by at most one, and the
    microbatches of all ranks are together those of one process. Which examples these are is a function of the position,
    which counts whole batches, so a run that resumes with another number of ranks continues in the same order.

    ``fxtrain.data.batches`` and ``windows`` read only these examples. Of other sources, each rank reads whole batches,
    so write ``prefetch(rows(data, mesh))`` rather than ``rows(prefetch(data), mesh)``. Random augmentations of a
    map-style dataset depend on the number of ranks.

    Args:
        source: A source of whole batches, as for ``fit``. Their tensors have one row per example. 0-d tensors, tensors
            with first dimension 1, and values that are not tensors are the same for all ranks. Lists with one entry per
            example are split.
        mesh: The ranks.

    Returns:
        A source. If a batch has fewer examples than there are ranks, some get tensors of no rows, which count with
        weight 0. If the model cannot take these, leave out the short batch by ``drop_last=True``.

    Raises:
        ValueError: If a batch has tensors of different first dimensions, or contains a graph.

    Example:
        >>> import torch, fxtrain as fx
        >>> mesh = fx.distributed.mesh()
        >>> fx.distributed.rows(fx.data.batches(torch.arange(6), 3, shuffle=False), mesh)[1]
        tensor([3, 4, 5])
    """
    return RankRows(as_source(source), mesh)


def split(source: Source, mesh: Mesh) -> Source:
    """Returns ``rows(source, mesh)``, or ``source`` if it or a source that it wraps is split already."""
    inner: Any = source
    while inner is not None and not isinstance(inner, RankRows):
        inner = getattr(inner, "source", None)
    return source if inner is not None else rows(source, mesh)


class RankRows(MappedBatches):
    """The rows of one rank. Use ``rows``."""

    def __init__(self, source: Source, mesh: Mesh) -> None:
        # Not the mesh, which cannot be sent to the workers of prefetch.
        self.rank, self.ranks = mesh.rank, mesh.size
        super().__init__(source, functools.partial(rows_of_rank, rank=self.rank, ranks=self.ranks))
        self.is_in_memory = source.is_in_memory

    def fetch(self, position: int) -> Batch:
        source = self.source
        if self.ranks == 1:
            return source.fetch(position)
        if not isinstance(source, IndexedBatches) or source.drop_last == "pad":
            return self.function(as_tensors(source.fetch(position)))
        count = source.num_items(position)
        if count >= self.ranks:
            return source.fetch_rows(position, self.rank, self.ranks)
        # A dataset has no batch of no samples, so that of a rank without examples is cut from the whole batch.
        return rows_of_rank(as_tensors(source.fetch(position)), self.rank, self.ranks, count)


def rows_of_rank(batch: Batch, rank: int, ranks: int, count: int | None = None) -> Batch:
    """Returns the examples ``rank``, ``rank + ranks``, ... of a batch.

    Args:
        batch: The whole batch.
        rank: The rank.
        ranks: Number of ranks.
        count: Number of examples. If it is unknown, all ranks share a batch of one example.

    Raises:
        ValueError: As for ``rows``.

    Example:
        >>> import torch
        >>> rows_of_rank({"x": torch.arange(5), "names": ["a", "b", "c", "d", "e"]}, rank=1, ranks=2)
        {'x': tensor([1, 3]), 'names': ['b', 'd']}
    """
    if holds_graph(batch):
        raise ValueError(
            "expected a batch of tensors [examples, ...], got a graph, which cannot be split. Give each rank batches "
            "of its own graphs, without fxtrain.distributed.rows."
        )
    is_single = count == 1
    size = num_examples(batch) if count is None else count

    def is_column(part: Any) -> bool:
        return type(part) in (list, tuple) and len(part) == size and not _are_fields(part, size)

    def split(path: str, leaf: Any) -> Any:
        if is_column(leaf):
            return leaf[rank::ranks]
        if not has_examples(leaf) and not (is_single and isinstance(leaf, Tensor) and leaf.ndim):
            return leaf
        if leaf.shape[0] != size:
            raise ValueError(
                f"expected tensors with the same first dimension, {size}, got {describe(leaf)} at {path}. Keep a "
                "tensor without examples outside the batch, or give it a first dimension of 1."
            )
        return leaf[rank::ranks]

    return tree.map_with_path(split, batch, root="batch", is_leaf=is_column)


def _are_fields(part: Any, count: int) -> bool:
    """Whether the entries of a list or tuple are tensors with one row per example, such as inputs and targets."""
    return any(isinstance(entry, Tensor) and entry.ndim and len(entry) == count for entry in part)
