"""The slot of transformers' callbacks: their state and the log history, in buffers of fixed size."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fxtrain.core import TrainState, warn
from fxtrain.interop._hf_trainer import TrainerFacts


class Content(NamedTuple):
    """The content of the slot."""

    memory: Tensor  # uint8 [n]: attributes as JSON, padded with zeros
    history: Tensor  # uint8 [n]: the log history as JSON lines, padded with zeros
    loss: Tensor  # float64 []: sum of the losses since the last log


class Slot:
    """Moves callback state between Python objects and a slot.

    The objects are those of one process and the slot is part of a state. Whenever a callback is called with another
    slot than the one written last, as after a resume or a rewind, the objects are restored first.

    Args:
        name: The name of the slot.
        facts: The objects.
        sizes: Bytes for callback state and for the history.
    """

    def __init__(self, name: str, facts: TrainerFacts, sizes: tuple[int, int]) -> None:
        self.name, self._facts, self._sizes = name, facts, sizes
        self._memory: Tensor | None = None  # read or written last
        self._text = b""  # its text
        self._history: Tensor | None = None
        self._lines: list[bytes] = []
        self._has_warned = False
        self.begin()

    def init(self, state: TrainState) -> Content:
        """Returns empty buffers."""
        device = state.step.device
        memory, history = (torch.zeros(size, dtype=torch.uint8, device=device) for size in self._sizes)
        return Content(memory, history, torch.zeros((), dtype=torch.float64, device=device))

    def read(self, state: TrainState) -> Content:
        """Returns the content.

        Raises:
            KeyError: If the state has no such slot.
        """
        if self.name not in state.slots:
            raise KeyError(
                f"expected the state to have the slot {self.name!r}, got none. Call fxtrain.attach(state, callbacks) "
                "first."
            )
        return state.slots[self.name]

    def begin(self) -> None:
        """Starts a session: the next ``recall`` restores the objects from the slot."""
        self._memory = self._history = None
        self._is_new_session = True
        self._at_begin = b""

    def keep_beginning(self) -> None:
        """Keeps the values set before the first step, with which a new run begins, because its slot is empty."""
        self._at_begin = self._facts.capture(self._sizes[0])

    def recall(self, state: TrainState) -> None:
        """Restores the objects from the slot, if it changed since the last call.

        Otherwise values set by methods at session events remain, because these events cannot write to the slot.
        """
        content = self.read(state)
        self._read_history(content.history)
        if content.memory is self._memory:
            return
        self._memory, self._text = content.memory, _text_of(content.memory)
        self._facts.restore(self._text or self._at_begin)
        if self._is_new_session:
            self._facts.continue_after_stop()
            self._is_new_session = False

    def remember(self, state: TrainState, loss: Tensor) -> TrainState:
        """Returns the state with the attributes of the objects in the slot."""
        before = self.read(state)
        text = self._facts.capture(before.memory.numel())
        if text != self._text:
            self._memory, self._text = _buffer_of(text, like=before.memory), text
        memory = before.memory if self._memory is None else self._memory
        now = Content(memory, self._written_history(before.history), loss)
        unchanged = all(new is old for new, old in zip(now, before, strict=True))
        return state if unchanged else state.with_slot(self.name, now)

    def _read_history(self, buffer: Tensor) -> None:
        if buffer is not self._history:
            self._lines = [line for line in _text_of(buffer).split(b"\n") if line]
            self._facts.state.log_history[:] = [json.loads(line) for line in self._lines]
            self._history = buffer

    def _written_history(self, before: Tensor) -> Tensor:
        entries = self._facts.state.log_history
        if len(entries) <= len(self._lines):
            return before
        self._lines += [json.dumps(entry, default=float).encode() for entry in entries[len(self._lines) :]]
        if sum(len(line) + 1 for line in self._lines) > before.numel():
            self._drop_oldest(before.numel())
        self._history = _buffer_of(b"".join(line + b"\n" for line in self._lines), like=before)
        return self._history

    def _drop_oldest(self, size: int) -> None:
        while self._lines and sum(len(line) + 1 for line in self._lines) > size:
            del self._lines[0], self._facts.state.log_history[0]
        if not self._has_warned:
            self._has_warned = True
            warn(
                f"state.log_history of {self.name} is larger than {size:,} bytes, so its oldest entries are dropped. "
                "Reserve more with fxtrain.interop.hf(..., history=...).",
                UserWarning,
            )


def _text_of(buffer: Tensor) -> bytes:
    return buffer.cpu().numpy().tobytes().rstrip(b"\0")


def _buffer_of(text: bytes, like: Tensor) -> Tensor:
    padded = np.zeros(like.numel(), dtype=np.uint8)
    padded[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    return torch.from_numpy(padded).to(like.device)
