"""Unfinished: the folder that a checkpoint is written in, and those that killed writers have left.

The writer holds a lock on its folder, which ends with its process. A process id would not tell: another process, or
one on another machine, may have the same.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence

UNFINISHED = ".unfinished-"
_NAME = re.compile(rf"{re.escape(UNFINISHED)}.+-[0-9a-f]{{8}}")


@contextlib.contextmanager
def unfinished_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder beside ``path``, locked until the block is left, and deleted if that is by an exception."""
    folder, descriptor = _make_locked(path)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def clear_abandoned(above: pathlib.Path, files: Sequence[str]) -> None:
    """Deletes the unfinished folders in ``above`` whose writers have ended.

    Args:
        above: Where to look.
        files: The names of a checkpoint's files. A folder with any other file is left alone.
    """
    for path in above.glob(f"{UNFINISHED}*"):
        if not _NAME.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):  # another writer may clear at the same time
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if set(os.listdir(path)) <= set(files) and _try_lock(descriptor):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _make_locked(path: pathlib.Path) -> tuple[pathlib.Path, int]:
    while True:
        folder = path.with_name(f"{UNFINISHED}{path.name}-{secrets.token_hex(4)}")
        folder.mkdir()
        descriptor = os.open(folder, os.O_RDONLY)
        # Without locks nothing is ever cleared. Otherwise another writer may have cleared it before it was locked.
        if _try_lock(descriptor) is not False and folder.exists():
            return folder, descriptor
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock was free; None if the file system has no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True
