"""Reads the events written by ``observers.record_run`` and converts them to marks."""

from __future__ import annotations

from array import array

from fxtrain.core import truncate
from fxtrain.report import _validation as validation
from fxtrain.report._downsampling import Items
from fxtrain.report._folder import Folder
from fxtrain.report._run import Mark

_MAX_MARKS = 20_000  # per kind
_MAX_REASONS = 20  # per request
_REQUESTS = (("skip_update", "skipped"), ("skip_batch", "skipped"), ("stop", "stopped"))


class Events:
    """The marks of a run, by kind. Checkpoints abandoned by a rewind or a resumed session are omitted.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._saved = array("q")
        self._marks: dict[str, Items[Mark]] = {}

    def read(self, path: str) -> None:
        """Reads events from the JSON Lines file ``path``."""
        for count, content in self._folder.lines(path):
            try:
                self._add(validation.mapping(validation.parsed(content)))
            except ValueError as error:
                self._folder.problems.add(path, f"line {count}: {error}")

    def marks(self) -> list[Mark]:
        """Returns the retained marks: first all kinds except checkpoints, each in order of time, then checkpoints."""
        saved = [Mark(step, "saved", "checkpoint") for step in self._saved]
        return [mark for items in self._marks.values() for _, mark in items.items] + saved

    def counts(self) -> dict[str, int]:
        """Returns the number of marks of each kind, including those that were dropped to save memory."""
        counts = {kind: items.count for kind, items in self._marks.items()}
        return counts | ({"saved": len(self._saved)} if self._saved else {})

    def _add(self, line: dict[str, object]) -> None:
        step, kind = validation.step(line.get("step")), line.get("event")
        if kind == "Saved":
            self._saved.append(step)
        elif kind == "Rewound":
            first, to = validation.step(line.get("from_step")), validation.step(line.get("to_step"))
            self._keep_saved(to)
            self._mark(first, "rewound", f"back to step {to}")
        elif kind == "Interrupted":
            self._mark(step, "interrupted", f"interrupted by {validation.words(line.get('cause'))}")
        elif kind == "FitBegin" and line.get("resumed"):
            # The resumed session repeats the steps that a killed session took after its last checkpoint.
            self._keep_saved(step)
            self._mark(step, "resumed", "a session resumed here")
        asked = validation.mapping(line.get("asked", {}))
        for request, mark in _REQUESTS:
            if request in asked:
                reasons = [validation.words(each) for each in validation.listed(asked[request])[:_MAX_REASONS]]
                self._mark(step, mark, "; ".join(reasons))

    def _keep_saved(self, last: int) -> None:
        self._saved = array("q", (step for step in self._saved if step <= last))

    def _mark(self, step: int, kind: str, text: str) -> None:
        items = self._marks.setdefault(kind, Items())
        # Stored by index, because steps decrease after a rewind.
        items.put(items.count, Mark(step, kind, truncate(text, validation.MAX_WORDS)))
        if items.cost > _MAX_MARKS:
            items.thin()
