"""Exceptions raised by this package."""


class CheckpointError(Exception):
    """A checkpoint cannot be written, cannot be read, or does not fit the tree it is restored into.

    Example:
        >>> import fxtrain as fx
        >>> try:
        ...     fx.restore("nowhere", like={})
        ... except fx.CheckpointError as error:
        ...     print(error)
        expected a checkpoint at nowhere, got no such folder. Check the path.
    """


class DamagedError(CheckpointError):
    """The content of a checkpoint differs from what was written.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = fx.save(f"{folder}/first", {"x": torch.ones(2)})
        ...     _ = (path / "leaves.bin").write_bytes(bytes(8))
        ...     try:
        ...         fx.restore(path, like={"x": torch.zeros(2)})
        ...     except fx.checkpoint.DamagedError as error:
        ...         print("is damaged" in str(error))
        True
    """
