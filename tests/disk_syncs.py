"""Acts before files and folders are synced to the disk, to simulate full and slow disks and to record syncs."""

import errno
import os
import stat


def before_sync(monkeypatch, act, *, of=stat.S_ISREG):
    """Calls ``act`` with the descriptor before each sync of a file, or of a folder for ``of=stat.S_ISDIR``."""
    whole = os.fsync

    def fsync(descriptor):
        if of(os.fstat(descriptor).st_mode):
            act(descriptor)
        whole(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def no_room(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
