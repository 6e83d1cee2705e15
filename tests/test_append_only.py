"""Files that only grow have one writer at a time, in one process and in several."""

import os
import signal
import subprocess
import sys

import pytest

import fxtrain as fx
from fxtrain.disk import Appendable, append_lines
from fxtrain.writers import csv, jsonl, read_csv, read_jsonl

WRITERS = pytest.mark.parametrize(("make", "read"), [(jsonl, read_jsonl), (csv, read_csv)])


def steps(read, path):
    return [record["step"] for record in read(path)]


@WRITERS
def test_second_writer_of_a_file_is_refused_until_the_first_is_closed(make, read, tmp_path):
    path = tmp_path / "metrics"
    first, second = make(path), make(path)  # nothing is written yet, as when a cell of a notebook runs again
    first.write_scalars(1, {"loss": 1.0})
    with pytest.raises(BlockingIOError, match=f"expected exclusive access to {path}, got a file that .* Close that"):
        make(path)
    with pytest.raises(BlockingIOError):
        second.write_scalars(1, {"loss": 5.0})
    first.write_scalars(2, {"accuracy": 0.5})
    with pytest.raises(BlockingIOError):
        second.purge(0)
    first.close()
    second.write_scalars(3, {"loss": 0.1})
    second.close()
    assert steps(read, path) == [1, 2, 3]


@WRITERS
def test_other_process_cannot_write_to_an_open_file(make, read, tmp_path):
    path = tmp_path / "metrics"
    writer = make(path)
    writer.write_scalars(1, {"loss": 1.0})
    script = f"""
from fxtrain.writers import {make.__name__} as make
writer = make({str(path)!r})  # as another rank does, which writes nothing
print("made")
writer.write_scalars(7, {{"loss": 7.0}})"""
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert other.stdout == "made\n"
    assert "BlockingIOError: expected exclusive access" in other.stderr
    writer.write_scalars(2, {"loss": 0.5})
    writer.close()
    assert steps(read, path) == [1, 2]


def test_record_of_a_writer_at_work_is_not_taken_for_a_torn_one(tmp_path):
    path = tmp_path / "events.jsonl"
    file = Appendable(path)
    file.append(b'{"step":')  # a record in two parts
    with pytest.raises(BlockingIOError):
        append_lines(path, b"{}\n")
    file.append(b" 1}\n")
    file.close()
    append_lines(path, b"{}\n")
    assert path.read_bytes() == b'{"step": 1}\n{}\n'


def test_second_writer_does_not_stop_a_run_and_catches_up_later(tmp_path):
    writer, rest = jsonl(tmp_path / "a"), fx.observers.write(jsonl(tmp_path / "a"))
    writer.write_scalars(1, {"loss": 1.0})
    with pytest.warns(RuntimeWarning, match="JsonLinesWriter failed at step 2 .* expected exclusive access"):
        rest(None, fx.EvalEnd(step=2, metrics={"loss": 0.5}), fx.Control())
    writer.close()
    with pytest.warns(RuntimeWarning, match="works again"):
        rest.close()
    assert steps(read_jsonl, tmp_path / "a") == [1, 2]


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="there is no null device")
def test_null_device_has_any_number_of_writers():
    for writer in [jsonl("/dev/null"), jsonl("/dev/null")] * 2:
        writer.write_scalars(1, {"loss": 1.0})


def test_replaced_file_is_opened_under_its_name(tmp_path, monkeypatch):
    path, opened = tmp_path / "a", os.open

    def replaced_once(*args, **options):
        descriptor = opened(*args, **options)
        monkeypatch.setattr(os, "open", opened)
        (tmp_path / "new").write_bytes(b"new\n")
        os.replace(tmp_path / "new", path)
        return descriptor

    path.write_bytes(b"old\n")
    monkeypatch.setattr(os, "open", replaced_once)
    append_lines(path, b"more\n")
    assert path.read_bytes() == b"new\nmore\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_forked_child_does_not_keep_the_file_locked(tmp_path):
    writer = jsonl(tmp_path / "a")
    writer.write_scalars(1, {"loss": 1.0})
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        writer.close()
        jsonl(tmp_path / "a").write_scalars(2, {"loss": 1.0})
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
