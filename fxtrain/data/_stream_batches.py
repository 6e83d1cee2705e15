"""Groups of a stream's samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fxtrain.core import Batch, Tree
from fxtrain.data._types import Sample, StatefulLoader


class StreamBatches:
    """A stream's samples in groups of ``batch_size``. Use ``fxtrain.data.batches``."""

    def __init__(
        self, dataset: Iterable[Sample], batch_size: int, collate: Callable[[list[Sample]], Batch], drop_last: bool
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self._collate = collate

    def set_epoch(self, epoch: int) -> None:
        if callable(set_epoch := getattr(self.dataset, "set_epoch", None)):
            set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        group: list[Any] = []
        for sample in self.dataset:
            group.append(sample)
            if len(group) == self.batch_size:
                yield self._collate(group)
                group = []
        if group and not self.drop_last:
            yield self._collate(group)


class StatefulStreamBatches(StreamBatches):
    """``StreamBatches`` for a stream that can save and restore its position."""

    dataset: StatefulLoader

    def state_dict(self) -> dict[str, Tree]:
        return {"dataset": copy.deepcopy(self.dataset.state_dict())}

    def load_state_dict(self, state: Mapping[str, Tree]) -> None:
        self.dataset.load_state_dict(copy.deepcopy(state["dataset"]))
