"""Exceptions raised by this package."""


class CheckpointError(Exception):
    """A checkpoint cannot be written, cannot be read, or does not fit the tree it is restored into."""


class DamagedError(CheckpointError):
    """The content of a checkpoint differs from what was written."""
