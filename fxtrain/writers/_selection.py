"""The values that a writer keeps, with a warning about those that it leaves out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from fxtrain.values import KINDS, Audio, Histogram, Image, Kind, Table, Value, Video, kind_of, simplified
from fxtrain.values._media import note_of_clipping


class Selection:
    """Selects the values that a writer can keep, and converts others to a simpler kind.

    Warns once per kind that the writer cannot keep, once per name that is clipped, and for each value out of range.

    Args:
        writer: The name of the writer, for warnings.
        kinds: The kinds that it keeps.
    """

    def __init__(self, writer: str, kinds: frozenset[Kind]) -> None:
        self.kinds = kinds
        self._writer = writer
        self._warned: set[Kind | str] = set()

    def silence(self, kinds: Iterable[Kind]) -> None:
        """Suppresses the warnings about kinds, because another writer of the run keeps them."""
        self._warned.update(kinds)

    def select(self, step: int, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the values to write, by name.

        Args:
            step: The step of the values.
            values: Values by name.
        """
        kept: dict[str, Value] = {}
        for name, value in values.items():
            kind = kind_of(value)
            if kind is float and float in self.kinds:  # most values; they need no conversion
                kept[name] = value
                continue
            simpler = simplified(value, self.kinds)
            if simpler is None:
                self._warn_once(
                    kind,
                    f"{self._writer} does not store {KINDS.get(kind, 'scalars')} and skips {name!r} and similar "
                    "values. Add a writer that does, such as fxtrain.writers.tensorboard or fxtrain.writers.media.",
                )
                continue
            try:
                for clipped in _convert(simpler):
                    self._warn_once(
                        f"clipped {name}",
                        f"{name!r} of step {step}: {clipped} Set limits= or scale the values. Later values of this "
                        "name are clipped without a warning.",
                    )
            except ValueError as error:
                warnings.warn(f"{name!r} of step {step} is not written: {error}", RuntimeWarning, stacklevel=4)
                continue
            kept[name] = simpler
        return kept

    def _warn_once(self, about: Kind | str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, RuntimeWarning, stacklevel=5)


def _convert(value: Value) -> list[str]:
    """Converts a value on the host, where all writers find it, and returns descriptions of what was clipped.

    Raises:
        ValueError: The value is out of range.
    """
    notes: list[str] = []
    for part in value.columns.values() if isinstance(value, Table) else (value,):
        match part:
            case Image() | Video():
                _ = part.frames
            case Audio():
                _ = part.waves
            case Histogram():
                part.buckets()
            case _:
                continue
        if (clipped := note_of_clipping(part)) is not None:
            notes.append(clipped)
    return notes
