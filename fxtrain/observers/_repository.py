"""Repository: what git says of the code that a run is made with."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git(folder: Path, *arguments: str) -> str | None:
    """The output of ``git`` in a folder, or None where there is no repository, or no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, encoding="utf-8", errors="replace"
        )
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def commit_of(folder: Path) -> str | None:
    """The commit that is checked out there."""
    said = git(folder, "rev-parse", "HEAD")
    return None if said is None else said.strip()
