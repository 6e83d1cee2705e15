"""Record code: the source that a run was made with, in its folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

from fxtrain.core import Control, FitBegin, TrainState

_LARGEST = 2**20  # bytes of a file; source is smaller
_ENDINGS = frozenset((".py", ".ipynb", ".toml", ".cfg", ".ini", ".yaml", ".yml", ".json", ".md", ".txt", ".sh", ".cu"))
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of all files, so that the same source makes the same archive


def record_code(folder: str | os.PathLike[str], *, source: str | os.PathLike[str] = ".") -> Callable[..., None]:
    """Writes the source into ``<folder>/code`` as a session begins.

    ``<digest>.zip`` holds the files, and ``sessions.jsonl`` has a line for each session: its step, the digest, and, in
    a git repository, the commit and whether anything had been changed since. A session with the same source as one
    before it writes no second archive.

    In a git repository the files are those that git knows or would add, of at most a megabyte; elsewhere those whose
    ending is one of source, configuration or text, outside hidden folders.

    Args:
        folder: Of the run.
        source: The folder to record.

    Raises:
        NotADirectoryError: If ``source`` is no folder.

    Example:
        >>> import pathlib, tempfile
        >>> run, source = (pathlib.Path(tempfile.mkdtemp()) for _ in range(2))
        >>> _ = (source / "train.py").write_text("print('hello')")
        >>> record_code(run, source=source)(None, FitBegin(step=0), Control())
        >>> sorted(path.suffix for path in (run / "code").iterdir())
        ['.jsonl', '.zip']
    """
    root, target = Path(source).resolve(), Path(folder) / "code"
    if not root.is_dir():
        raise NotADirectoryError(f"source={os.fspath(source)!r} is no folder: give the one that has the code.")

    def record_code(state: TrainState | None, event: FitBegin, control: Control) -> None:
        archive = _archive(root, [path for path in _files(root) if target.resolve() not in path.parents])
        digest = hashlib.sha256(archive).hexdigest()[:16]
        target.mkdir(parents=True, exist_ok=True)
        path = target / f"{digest}.zip"
        if not path.exists():
            path.write_bytes(archive)
        line = {"step": event.step, "archive": path.name, **_commit(root)}
        with open(target / "sessions.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    return record_code


def _files(root: Path) -> list[Path]:
    known = _git(root, "ls-files", "--cached", "--others", "--exclude-standard", "-z", ".")
    if known is not None:
        paths = [root / name for name in known.split("\0") if name]
    else:
        paths = [
            path
            for path in root.rglob("*")
            if path.suffix in _ENDINGS and not any(part.startswith(".") for part in path.relative_to(root).parts)
        ]
    return sorted(path for path in paths if path.is_file() and path.stat().st_size <= _LARGEST)


def _archive(root: Path, paths: list[Path]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            archive.writestr(zipfile.ZipInfo(str(path.relative_to(root)), _EPOCH), path.read_bytes())
    return buffer.getvalue()


def _commit(root: Path) -> dict[str, object]:
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"commit": commit.strip(), "changed": bool(_git(root, "status", "--porcelain", "."))}


def _git(root: Path, *arguments: str) -> str | None:
    """What git says, or None where there is no repository, or no git."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
