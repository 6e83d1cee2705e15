"""The base class of sources that batch examples of different lengths, and the padding that they count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fxtrain.data._batch_checks import ALL_DIMS
from fxtrain.data._examples import MeasuredExamples
from fxtrain.data._pad import PadLayout
from fxtrain.data._seeding import seeded
from fxtrain.data._source import Source

# With more shapes, compiling a graph for each no longer pays off.
_MAX_COMPILED_SHAPES = 16


class Padding(NamedTuple):
    """The amount of padding in an epoch's batches.

    Args:
        padded: Number of padding positions.
        positions: Number of all positions.
    """

    padded: int
    positions: int

    @property
    def fraction(self) -> float:
        """The fraction of padding, between 0 and 1."""
        return self.padded / self.positions


class BatchPlan(NamedTuple):
    """The composition of a batch.

    Args:
        items: Indices of examples, int64 [n].
        rows: Number of rows, at least n.
        sizes: The padded length of each column.
    """

    items: np.ndarray
    rows: int
    sizes: Mapping[str, int]


class RaggedBatches(Source):
    """Batches of examples of different lengths. Subclasses choose the examples of each batch.

    Args:
        examples: The examples and their lengths.
        layout: The layout of examples in a batch.
        lengths: The length of each example after truncation, by column.
        sizes: Rows and length of each batch shape.
        epoch_length: Batches per epoch.
        seed: Seed of the dataset's random samples.
    """

    epoch_length: int

    def __init__(
        self,
        examples: MeasuredExamples,
        layout: PadLayout,
        lengths: Mapping[str, np.ndarray],
        *,
        sizes: Sequence[tuple[int, int]],
        epoch_length: int,
        seed: int,
    ) -> None:
        few = len(sizes) <= _MAX_COMPILED_SHAPES
        super().__init__(dynamic_dims=0 if few else ALL_DIMS, num_shapes=len(sizes) if few else None)
        self.examples, self.layout, self.lengths = examples, layout, lengths
        self.sizes = tuple(sizes)
        """Rows and length of each batch shape."""
        self.epoch_length, self.seed = epoch_length, seed
        # Make a batch of one example, so that unsuitable data raises now and not during a run.
        layout.batch([examples.first], {name: int(each[0]) for name, each in lengths.items()}, 1)

    def choose(self, epoch: int, index: int) -> BatchPlan:
        """Returns the composition of the batch at an index of an epoch."""
        raise NotImplementedError

    def fetch(self, position: int) -> dict[str, Tensor]:
        chosen = self.choose(*divmod(position, self.epoch_length))
        with seeded(self.seed, position):
            return self.layout.batch(self.examples.read(chosen.items), chosen.sizes, chosen.rows)

    def padding(self, epoch: int = 0) -> Padding:
        """Returns the amount of padding in an epoch, without reading examples."""
        real = positions = 0
        for index in range(self.epoch_length):
            items, rows, sizes = self.choose(epoch, index)
            real += sum(int(self.lengths[name][items].sum()) for name in sizes)
            positions += rows * sum(sizes.values())
        return Padding(positions - real, positions)
