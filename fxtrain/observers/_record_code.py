"""Record code: the source that a run was made with, in its folder."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from fxtrain.core import Control, FitBegin, TrainState
from fxtrain.disk import make_folder, put_file, sync_file, sync_folder
from fxtrain.observers._repository import commit_of, git

_LARGEST = 2**20  # bytes of a file; source is smaller
_ENDINGS = frozenset((".py", ".ipynb", ".toml", ".cfg", ".ini", ".yaml", ".yml", ".json", ".md", ".txt", ".sh", ".cu"))
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of all files: when they were written is no part of the source


def record_code(folder: str | os.PathLike[str], *, source: str | os.PathLike[str] = ".") -> Callable[..., None]:
    """Writes the source into ``<folder>/code`` as a session begins.

    ``<digest>.zip`` holds the files, and ``sessions.jsonl`` has a line for each session: its step, the digest, and, in
    a git repository, the commit and whether anything had been changed since. A session with the same source as one
    before it writes no second archive.

    The files are those of at most a megabyte that git knows, and those whose ending is one of source, configuration or
    text and that it would add; without a repository, all with such an ending, outside hidden folders and virtual
    environments. The run's own folder is left out.

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
    root, run = Path(source).resolve(), Path(folder)
    target = run / "code"
    if not root.is_dir():
        raise NotADirectoryError(f"source={os.fspath(source)!r} is no folder: give the one that has the code.")

    def record_code(state: TrainState | None, event: FitBegin, control: Control) -> None:
        # What the run writes would make other source of it at each session.
        own = run.resolve() if root in run.resolve().parents else target.resolve()
        files = {str(path.relative_to(root)): path for path in _files(root) if own not in path.parents}
        contents = {name: path.read_bytes() for name, path in sorted(files.items())}
        path = target / f"{_digest(contents)}.zip"
        make_folder(target)
        if not zipfile.is_zipfile(path):  # it is not there, or a power cut left no more than its name
            _write(path, {name: (files[name].stat().st_mode, content) for name, content in contents.items()})
        line = {"step": event.step, "archive": path.name, **_commit(root, own)}
        _add_line(target / "sessions.jsonl", json.dumps(line).encode())
        sync_folder(target)

    return record_code


def _files(root: Path) -> set[Path]:
    known = _listed(root, "--cached")
    if known is None:
        found = _source_below(root)
    else:
        found = {*known, *(path for path in _listed(root, "--others", "--exclude-standard") or () if _is_source(path))}
    return {path for path in found if path.is_file() and path.stat().st_size <= _LARGEST}


def _listed(root: Path, *which: str) -> list[Path] | None:
    names = git(root, "ls-files", *which, "-z", ".")
    return None if names is None else [root / name for name in names.split("\0") if name]


def _source_below(root: Path) -> set[Path]:
    found: set[Path] = set()
    for folder, folders, names in os.walk(root):
        if "pyvenv.cfg" in names:
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        found.update(path for path in (Path(folder, name) for name in names) if _is_source(path))
    return found


def _is_source(path: Path) -> bool:
    return path.suffix in _ENDINGS and not path.name.startswith(".")


def _digest(contents: dict[str, bytes]) -> str:
    """Of what is in the archive: compressed, it may differ from one machine to another."""
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _write(path: Path, entries: dict[str, tuple[int, bytes]]) -> None:
    new = path.with_suffix(".zip.tmp")  # a crash leaves no half of an archive that the next session would trust
    with zipfile.ZipFile(new, "w") as archive:
        for name, (mode, content) in entries.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = mode << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    sync_file(new)
    os.replace(new, path)


def _add_line(path: Path, line: bytes) -> None:
    """Adds a line, after one that a crash may have torn or a power cut filled with zeros."""
    before = path.read_bytes() if path.exists() else b""
    kept = before.rstrip(b"\0")
    if len(kept) < len(before):
        os.truncate(path, len(kept))
    torn = kept and not kept.endswith(b"\n")
    put_file(path, [b"\n" * bool(torn), line, b"\n"], "ab")


def _commit(root: Path, own: Path) -> dict[str, object]:
    commit = commit_of(root)
    if commit is None:
        return {}
    apart = (f":(exclude){own.relative_to(root)}",) if root in own.parents else ()
    return {"commit": commit, "changed": bool(git(root, "status", "--porcelain", ".", *apart))}
