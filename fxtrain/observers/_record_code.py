"""Archives of the source code of a run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path

from fxtrain.core import Control, FitBegin, Observer, TrainState
from fxtrain.core._rank import rank
from fxtrain.disk import append_lines, make_folder, sync_file, sync_folder
from fxtrain.observers._artifacts import ArtifactLog
from fxtrain.values import Artifact
from fxtrain.writers import Writer

_MAX_FILE_BYTES = 2**20  # bytes; larger files are unlikely to be source
_EXTENSIONS = frozenset(
    (".py", ".ipynb", ".toml", ".cfg", ".ini", ".yaml", ".yml", ".json", ".md", ".txt", ".sh", ".cu")
)
_MODIFICATION_TIME = (1980, 1, 1, 0, 0, 0)  # of every file, so that archives compare equal


def record_code(
    folder: str | os.PathLike[str], *, source: str | os.PathLike[str] = ".", writers: Sequence[Writer] = ()
) -> Observer:
    """Archives the source code in ``<folder>/code`` when a session begins.

    ``<digest>.zip`` contains the files. ``sessions.jsonl`` has a line for each session with its step and archive and,
    in a git repository, the commit and whether there were uncommitted changes. Sessions with the same source share an
    archive.

    In a git repository, the archive contains all tracked files, and the untracked ones that are not ignored and have an
    extension of source, configuration or text. Elsewhere, it contains all files with such an extension outside hidden
    folders and virtual environments. Files above 1 MiB and the folder of the run are left out.

    With several processes, only rank 0 archives.

    Args:
        folder: The folder of the run.
        source: The folder to archive.
        writers: Writers that get the archive as the artifact ``code``.

    Raises:
        NotADirectoryError: ``source`` is not a folder.

    Example:
        >>> import pathlib, tempfile
        >>> run, source = (pathlib.Path(tempfile.mkdtemp()) for _ in range(2))
        >>> _ = (source / "train.py").write_text("print('hello')")
        >>> record_code(run, source=source)(None, FitBegin(step=0), Control())
        >>> sorted(path.suffix for path in (run / "code").iterdir())
        ['.jsonl', '.zip']
    """
    log = ArtifactLog("record_code", writers)
    root, run = Path(source).resolve(), Path(folder)
    target = run / "code"
    if not root.is_dir():
        raise NotADirectoryError(
            f"expected source to be a folder, got {os.fspath(source)!r}. Give the one with the code."
        )

    def record_code(state: TrainState | None, event: FitBegin, control: Control) -> None:
        if rank() != 0:
            return
        # The files that the run writes would change the digest in each session.
        own = run.resolve() if root in run.resolve().parents else target.resolve()
        files = {str(path.relative_to(root)): path for path in _files(root) if own not in path.parents}
        contents = {name: path.read_bytes() for name, path in sorted(files.items())}
        path = target / f"{_digest(contents)}.zip"
        make_folder(target)
        if not zipfile.is_zipfile(path):  # missing, or damaged by a power cut
            _write_archive(path, {name: (files[name].stat().st_mode, content) for name, content in contents.items()})
        line = {"step": event.step, "archive": path.name, **_commit(root, own)}
        append_lines(target / "sessions.jsonl", json.dumps(line).encode() + b"\n")
        sync_folder(target)
        log.begin(event)
        log.add(event, event.step, "code", Artifact(path, "code"))

    record_code.take_failure, record_code.flush, record_code.close = log.take_failure, log.flush, log.close
    return record_code


def _files(root: Path) -> set[Path]:
    found = _git_files(root, "--cached")
    if found is None:
        found = _source_files(root)
    else:
        found += filter(_is_source, _git_files(root, "--others", "--exclude-standard") or ())
    return {path for path in found if path.is_file() and path.stat().st_size <= _MAX_FILE_BYTES}


def _git_files(root: Path, *which: str) -> list[Path] | None:
    names = git(root, "ls-files", *which, "-z", ".")
    return None if names is None else [root / name for name in names.split("\0") if name]


def _source_files(root: Path) -> list[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        if "pyvenv.cfg" in names:
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += filter(_is_source, (Path(folder, name) for name in names))
    return found


def _is_source(path: Path) -> bool:
    return path.suffix in _EXTENSIONS and not path.name.startswith(".")


def _digest(contents: dict[str, bytes]) -> str:
    """Returns a digest of the uncompressed files, because compression may differ between machines."""
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _write_archive(path: Path, entries: dict[str, tuple[int, bytes]]) -> None:
    new = path.with_suffix(".zip.tmp")  # renamed once complete, in case of a crash
    with zipfile.ZipFile(new, "w") as archive:
        for name, (mode, content) in entries.items():
            entry = zipfile.ZipInfo(name, _MODIFICATION_TIME)
            entry.external_attr = mode << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    sync_file(new)
    os.replace(new, path)


def _commit(root: Path, own: Path) -> dict[str, object]:
    commit = commit_of(root)
    if commit is None:
        return {}
    apart = (f":(exclude){own.relative_to(root)}",) if root in own.parents else ()
    return {"commit": commit, "changed": bool(git(root, "status", "--porcelain", ".", *apart))}


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
