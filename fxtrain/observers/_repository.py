"""Queries of the git repository that contains a folder."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git(folder: Path, *arguments: str) -> str | None:
    """Runs git in a folder and returns its output, or None if git fails or is not installed.

    Args:
        folder: The folder to run git in.
        arguments: The command and its arguments.
    """
    try:
        process = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, encoding="utf-8", errors="replace"
        )
    except OSError:
        return None
    return process.stdout if process.returncode == 0 else None


def commit_of(folder: Path) -> str | None:
    """Returns the checked-out commit of the repository that contains ``folder``, or None."""
    output = git(folder, "rev-parse", "HEAD")
    return None if output is None else output.strip()
