"""Files that are written past the page cache: their content, and what happens where that is impossible."""

import errno
import os
import random

import pytest

from fxtrain.checkpoint import _new_file as new_file
from fxtrain.checkpoint._new_file import CHUNK, NewFile

LARGE = 2 * CHUNK
SIZES = [0, 1, 4095, CHUNK - 1, CHUNK, CHUNK + 1, LARGE - 1, LARGE, LARGE + 1, LARGE + 4096, 3 * CHUNK + 77]


def content_of(size):
    return random.Random(size).randbytes(size)


def write(path, content, *, seed=0):
    """Writes content in pieces of random sizes. Returns the file."""
    choose, done = random.Random(seed), 0
    with NewFile(path, len(content)) as file:
        while done < len(content):
            size = choose.choice([1, 100, 4096, CHUNK // 3, CHUNK, LARGE])
            file.write(content[done : done + size])
            done += size
    return file


class Fake:
    """A file whose first writes are not as usual."""

    def __init__(self, file, answers):
        self._file, self._answers = file, answers

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, content):
        answer = self._answers.pop(0) if self._answers else len(content)
        if isinstance(answer, OSError):
            raise answer
        return self._file.write(content[:answer])


def answering(path, size, *answers):
    file = NewFile(path, size)
    file._file = Fake(file._file, list(answers))
    return file


def is_direct_here(folder):
    with NewFile(folder / "probe", LARGE) as file:
        return file._is_direct


@pytest.mark.parametrize("size", SIZES)
def test_content_is_that_written(tmp_path, size):
    content = content_of(size)
    for seed in range(3):
        write(tmp_path / str(seed), content, seed=seed)
        assert (tmp_path / str(seed)).read_bytes() == content


def test_only_large_files_go_past_the_page_cache(tmp_path):
    if not is_direct_here(tmp_path):
        pytest.skip("needs a file system with direct writes")
    with NewFile(tmp_path / "small", LARGE - 1) as file:
        assert not file._is_direct
    with NewFile(tmp_path / "large", LARGE) as file:
        assert file._is_direct
        file.write(content_of(CHUNK))
        assert file._is_direct
        file.write(b"end")
    assert not file._is_direct
    assert (tmp_path / "large").read_bytes() == content_of(CHUNK) + b"end"


def test_refused_direct_write_is_repeated_through_the_page_cache(tmp_path):
    content = content_of(LARGE + 5)
    with answering(tmp_path / "x", len(content), OSError(errno.EINVAL, "not aligned")) as file:
        file._is_direct = True
        file.write(content)
    assert not file._is_direct
    assert (tmp_path / "x").read_bytes() == content


@pytest.mark.parametrize("written", [1, 512, CHUNK - 1])
def test_interrupted_write_goes_on(tmp_path, written):
    content = content_of(LARGE + 5)
    path = tmp_path / "x"
    with answering(path, 0, written) as file:  # small files may be cut anywhere
        file.write(content)
    assert path.read_bytes() == content


def test_interrupted_direct_write_goes_on(tmp_path):
    content = content_of(LARGE + 5)
    with answering(tmp_path / "x", len(content), 4096) as file:
        file.write(content)
    assert (tmp_path / "x").read_bytes() == content


def test_full_disk_is_an_error(tmp_path):
    with (
        pytest.raises(OSError, match="no space"),
        answering(tmp_path / "x", LARGE, OSError(errno.ENOSPC, "no space")) as file,
    ):
        file.write(content_of(LARGE))
    assert file._file.closed


def test_existing_file_is_not_replaced(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        NewFile(tmp_path / "x", LARGE)
    assert (tmp_path / "x").read_bytes() == b"old"


def test_system_without_direct_writes(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    content = content_of(LARGE + 5)
    assert not write(tmp_path / "x", content)._is_direct
    assert (tmp_path / "x").read_bytes() == content


def test_file_is_synced_unless_an_error_ends_it(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(new_file.os, "fsync", synced.append)
    write(tmp_path / "x", b"abc")
    assert len(synced) == 1
    with pytest.raises(ZeroDivisionError), NewFile(tmp_path / "y", 3):
        raise ZeroDivisionError
    assert len(synced) == 1
