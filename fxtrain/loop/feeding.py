"""Feeding: the next batches of a run, and where the data ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxtrain.data import Exhausted
from fxtrain.loop.evaluate import to_device


class Feeding:
    """What the loop knows of its data.

    Args:
        data: From ``fxtrain.data.adapt``.
        device: Where the run's state lives.
        clock: Seconds.
        wanted: How long the run is to be, in words.
    """

    def __init__(self, data: Any, device: torch.device, clock: Callable[[], float], wanted: str) -> None:
        self.data = data
        self.wait = 0.0  # seconds that the loop waited for the last batch, or batches
        self.epoch_from: int | None = None  # where this session last began an epoch
        self._end: int | None = None  # where the data said that it was exhausted
        self._told = False  # whether the loop has been told
        self._device, self._on_host = device, device.type == "cpu"  # asked once: it takes longer than all else here
        self._clock, self._wanted = clock, wanted

    def next(self, position: int, count: int) -> list[Any]:
        """So many batches from a position on; fewer, or none, where the data ends.

        Raises:
            ValueError: If there is no more data than this, and more is wanted.
        """
        began = self._clock()
        batches: list[Any] = []
        for index in range(position, position + count):
            batch = self._fetched(index)
            if batch is None:
                self._told = self._told or not batches
                break
            batches.append(batch)
        self.wait = self._clock() - began
        return batches if self._on_host else [to_device(batch, self._device) for batch in batches]

    def ends_at(self, position: int) -> bool:
        """Whether the data said that an epoch ends here."""
        return self._end == position

    def _fetched(self, position: int) -> Any:
        if self._end == position and not self._told:
            self._told = True  # it said so while batches were taken together
            return None
        try:
            return self.data[position]
        except Exhausted:
            if self._end == position or position == 0:
                raise ValueError(self._exhausted(position)) from None
            self._end, self._told = position, self.data.epoch_length is not None  # then the loop sees it coming
            if self.epoch_from == position:
                # Its end was told in the session before; this one's data has only now found it.
                self._told = True
                return self._fetched(position)
            return None

    def _exhausted(self, position: int) -> str:
        if position == 0:
            return "The data is empty: it gave no batch at all."
        return (
            f"The data is exhausted after {position} batches, and the run is to have {self._wanted}: give data that "
            "can be read more than once (a list, a DataLoader, fxtrain.data.batches), or ask for less."
        )
