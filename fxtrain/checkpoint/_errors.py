"""What can go wrong with a checkpoint."""


class CheckpointError(Exception):
    """A checkpoint cannot be written, or cannot be read as what it is wanted for."""


class DamagedError(CheckpointError):
    """A checkpoint is not what was written: its disk, or somebody, has changed it."""
