"""Snapshots of the memory of CUDA devices."""

from __future__ import annotations

from pathlib import Path

from fxtrain._torch_internals.interface import Interface

RECORD = Interface("torch.cuda.memory._record_memory_history", "memory snapshots in profiles")
DUMP = Interface("torch.cuda.memory._dump_snapshot", "memory snapshots in profiles")


def start_memory_history(max_entries: int) -> None:
    """Records allocations, with their Python stacks.

    Args:
        max_entries: The number of allocations and deallocations that are kept.
    """
    RECORD.get()(max_entries=max_entries)


def stop_memory_history() -> None:
    """Ends the recording."""
    RECORD.get()(None)


def write_memory_snapshot(path: Path) -> None:
    """Writes the recorded allocations to a file for https://docs.pytorch.org/memory_viz."""
    DUMP.get()(str(path))
