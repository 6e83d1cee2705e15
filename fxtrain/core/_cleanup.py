"""Cleanup of several objects, of which some may fail."""

from __future__ import annotations

from collections.abc import Callable


def try_all(*actions: Callable[[], object]) -> None:
    """Runs every action, then raises the first error, so that one failure does not prevent other cleanup."""
    errors: list[Exception] = []
    for act in actions:
        try:
            act()
        except Exception as error:
            errors.append(error)
    try:
        if errors:
            raise errors[0]
    finally:
        errors.clear()  # their tracebacks reference this frame
