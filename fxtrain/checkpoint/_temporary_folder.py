"""Temporary folders that checkpoints are written to, and cleanup of those left by killed writers.

A writer locks its folder, and the lock ends with its process. A process id could not identify the writer, because it
may be reused by another process or on another machine.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator

from fxtrain.disk import try_lock

UNFINISHED = ".unfinished-"
_NAME = re.compile(rf"{re.escape(UNFINISHED)}.+-[0-9a-f]{{8}}")


@contextlib.contextmanager
def unfinished_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Creates a folder next to ``path``, locks it during the block, and deletes it if the block raises."""
    while True:
        folder = path.with_name(f"{UNFINISHED}{path.name}-{os.urandom(4).hex()}")
        folder.mkdir()
        descriptor = os.open(folder, os.O_RDONLY)
        # Another writer may have deleted the folder before it was locked. Without locks, nothing is ever deleted.
        if try_lock(descriptor) is not False and folder.exists():
            break
        os.close(descriptor)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def clear_abandoned(above: pathlib.Path, is_file: Callable[[str], bool]) -> None:
    """Deletes the unfinished folders in ``above`` whose writers have ended.

    Args:
        above: The folder to clean up.
        is_file: Whether a checkpoint can have a file of a name. Folders with any other file are not deleted.
    """
    for path in above.glob(f"{UNFINISHED}*"):
        if not _NAME.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):  # another writer may clear at the same time
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if all(map(is_file, os.listdir(path))) and try_lock(descriptor):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
