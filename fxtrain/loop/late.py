"""Late: numbers that stay on their device until somebody looks at them, and then come together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, ItemsView, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fxtrain import metrics
from fxtrain.core import Logged

_MANY = 256  # mappings nobody looked at, among which one looks for those that are gone


class Late(Mapping[str, Any]):
    """A mapping whose numbers are on a device until somebody first looks into it; made by ``Together``."""

    def __init__(self, together: Together, parts: Callable[[], list[Any]], made: Callable[[list[Any]], dict[str, Any]]):
        self._together = together
        self.parts: Callable[[], list[Any]] | None = parts  # what is to come to the host; None when it has come
        self.made = made
        self.values_: dict[str, Any] = {}

    def _all(self) -> dict[str, Any]:
        if self.parts is not None:
            self._together.read(self)
        return self.values_

    def __getitem__(self, name: str) -> Any:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def items(self) -> ItemsView[str, Any]:
        return self._all().items()

    def __repr__(self) -> str:
        return repr(self._all())


class Together:
    """Makes late mappings, and reads all that somebody still holds when one of them is looked into: in one transfer,
    so that an observer which keeps a hundred steps waits for the device once."""

    def __init__(self) -> None:
        self._waiting: list[weakref.ref[Late]] = []

    def metrics(self, measured: Mapping[str, Any]) -> Late:
        """The metrics of an event, to be looked at as numbers."""
        names: list[str] = []

        def parts() -> list[Any]:
            computed = metrics.compute(measured)
            names.extend(computed)
            return list(computed.values())

        return self._late(parts, lambda numbers: dict(zip(names, numbers, strict=True)))

    def log(self, log: Mapping[str, Logged]) -> Late:
        """What was logged, with numbers, and without what its flag holds back."""
        entries = list(log.values())

        def made(numbers: list[Any]) -> dict[str, Any]:
            values, flags = numbers[: len(entries)], numbers[len(entries) :]
            named = zip(log, entries, values, flags, strict=True)
            return {name: Logged(value, True, entry.owner) for name, entry, value, flag in named if flag}

        return self._late(lambda: [*(entry.value for entry in entries), *(entry.when for entry in entries)], made)

    def _late(self, parts: Callable[[], list[Any]], made: Callable[[list[Any]], dict[str, Any]]) -> Late:
        if len(self._waiting) > _MANY:
            self._waiting = [each for each in self._waiting if (late := each()) is not None and late.parts is not None]
        late = Late(self, parts, made)
        self._waiting.append(weakref.ref(late))
        return late

    def read(self, wanted: Late) -> None:
        """Reads a mapping, and all others that wait."""
        others, self._waiting = [late for each in self._waiting if (late := each()) is not wanted], []
        found: list[tuple[Late, list[Any]]] = []
        for late in (wanted, *others):
            if late is None or late.parts is None:
                continue
            try:
                found.append((late, late.parts()))
            except Exception:
                if late is wanted:
                    raise
                # Whoever looks into it will see why.
        numbers = iter(on_host([part for _, parts in found for part in parts]))
        for late, parts in found:
            late.values_, late.parts = late.made([next(numbers) for _ in parts]), None


def at_once(measured: Mapping[str, Any]) -> dict[str, Any] | None:
    """The numbers, where nobody has to wait for them."""
    numbers: dict[str, Any] = {}
    for name, value in measured.items():
        if not (isinstance(value, Tensor) and value.is_cpu and value.ndim == 0):
            return None
        numbers[name] = value.item()
    return numbers


def on_host(values: list[Any]) -> list[Any]:
    """0-d tensors as Python numbers, in one transfer where they are on a device; anything else as it is."""
    scalars = [value for value in values if isinstance(value, Tensor) and value.ndim == 0]
    if all(value.is_cpu for value in scalars):
        return [value.item() if isinstance(value, Tensor) and value.ndim == 0 else value for value in values]
    numbers = iter(torch.stack([value.double() for value in scalars]).tolist())
    return [next(numbers) if isinstance(value, Tensor) and value.ndim == 0 else value for value in values]
