"""The table of results: trials, detected faults and losses for each guarantee and system."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping


@dataclasses.dataclass
class Cell:
    """The results of testing one guarantee with one system.

    Args:
        tried: The number of trials.
        detected: The number of trials in which the system reported a fault. None if there is no fault to detect.
        lost: The number of trials with problems.
        notes: One line per problem.
    """

    tried: int = 0
    detected: int | None = None
    lost: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, problems: Iterable[str], *, detected: bool | None = None, at: str = "") -> None:
        """Adds a trial with its problems."""
        found = list(problems)
        self.tried += 1
        self.lost += bool(found)
        if detected is not None:
            self.detected = (self.detected or 0) + detected
        self.notes += [f"{at}: {problem}" if at else problem for problem in found]

    def __str__(self) -> str:
        return " / ".join("-" if part is None else str(part) for part in (self.tried, self.detected, self.lost))


def render(rows: Mapping[str, str], cells: Mapping[tuple[str, str], Cell], systems: Iterable[str]) -> str:
    """Returns the table as text, with cells ``tried / detected / lost``."""
    head = ["tried / detected / lost", *systems]
    body = [
        [f"{row} {title}", *(str(cells.get((row, system), "")) for system in head[1:])] for row, title in rows.items()
    ]
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join("  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)) for line in lines)
