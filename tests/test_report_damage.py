"""Reports of runs whose files are damaged, missing or links: a page that lists them, or a one-line error."""

import json
import os
import random
import re
import shutil
import socket
import stat

import pytest
from report_checks import SECONDS, SECRET, report, unread, within
from report_checks import original as original  # a fixture
from report_checks import run as run  # a fixture

from fxtrain import cli


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder outside the run, whose content must not appear in a page."""
    folder = tmp_path_factory.mktemp("outside")
    for name in ("00000001.md", "summary.txt", "run.json", "metrics.jsonl"):
        line = {"step": 1, "metrics": {SECRET: 1.0}, "config": {SECRET: SECRET}}
        (folder / name).write_text(json.dumps(line) + "\n" if "json" in name else SECRET)
    return folder


# Damaged files and folders

FILES = ("metrics.jsonl", "metrics.csv", "events.jsonl", "run.json", "summary.txt", "result.json")
MEDIA = ("00000003-0.png", "00000003.mp4", "00000003.gif", "00000003.wav", "00000003.md", "00000003.json")
FOLDERS = ("media", "media/samples", "checkpoints", "code")


def empty(path, outside):
    path.write_bytes(b"")


def zeros(path, outside):
    path.write_bytes(bytes(path.stat().st_size))


def noise(path, outside):
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def half(path, outside):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 + 1])


def utf16(path, outside):
    path.write_bytes(path.read_bytes().decode(errors="replace").encode("utf-16"))


def sparse(path, outside):
    with open(path, "wb") as file:
        file.truncate(2**26)  # four times the longest line


def missing(path, outside):
    path.unlink()


def fifo(path, outside):
    path.unlink()
    os.mkfifo(path)


def folder(path, outside):
    path.unlink()
    path.mkdir()


def bound(path, outside):
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # because the length of a socket's path is limited
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def zero_device(path, outside):
    path.unlink()
    path.symlink_to("/dev/zero")


def link_to_itself(path, outside):
    path.unlink()
    path.symlink_to(path.name)


def link_to_nothing(path, outside):
    path.unlink()
    path.symlink_to("nothing")


def link_outside(path, outside):
    there = outside / (path.name if (outside / path.name).exists() else "00000001.md")
    path.unlink()
    path.symlink_to(there)


def link_outside_by_two_dots(path, outside):
    link_outside(path, outside)
    there = os.path.relpath(os.readlink(path), path.parent)
    path.unlink()
    path.symlink_to(there)


DAMAGES = (empty, zeros, noise, half, utf16, sparse, missing, fifo, folder, bound, zero_device, link_to_itself)
DAMAGES += (link_to_nothing, link_outside, link_outside_by_two_dots)
QUIET = {empty, missing}  # absent and empty files are valid
QUIET_MEDIA = {missing, folder, sparse}  # folders may have any name, and large files are not shown


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", [*FILES, *MEDIA])
def test_damaged_file_is_listed_in_the_page(run, outside, capsys, name, damage):
    if name.endswith(".md"):  # metrics.jsonl has the same text
        (run / "metrics.jsonl").unlink()
    for path in sorted(run.rglob(name)):
        damage(path, outside)
    text, _ = report(run, capsys)
    read = name != "metrics.csv" and not (name == "summary.txt" and damage in (noise, half))
    if read and damage not in (QUIET_MEDIA if name in MEDIA else QUIET):
        assert any(name in line for line in unread(text)) or (name.endswith(".md") and damage in (empty, half))


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("damage", [missing, fifo, bound, link_to_itself, link_to_nothing, link_outside, empty])
def test_damaged_folder_is_listed_in_the_page(run, outside, capsys, name, damage):
    path = run / name
    shutil.rmtree(path)
    path.touch()
    damage(path, outside)
    if damage is link_outside:
        path.unlink()
        path.symlink_to(outside)
    text, _ = report(run, capsys)
    if name.startswith("media") and damage is not missing and (name == "media" or path.is_symlink()):
        assert any(name in line for line in unread(text))


def test_run_without_metrics_gives_a_page_of_samples(run, capsys):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.csv").unlink()
    text, _ = report(run, capsys)
    assert "Samples" in text


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_run_without_readable_values_is_an_error(tmp_path, outside, capsys, damage):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1')
    damage(folder / "metrics.jsonl", outside)
    text, error = report(folder, capsys)
    assert text is None
    assert str(folder) in error


def test_files_without_permission_are_listed_in_the_page(run, capsys, monkeypatch):
    opened = os.open

    def refused(path, flags, *rest, **more):
        if str(path).endswith(("run.json", "events.jsonl", ".wav")):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refused)
    text, _ = report(run, capsys)
    assert {"run.json", "events.jsonl"} <= {line.split(":")[0] for line in unread(text)}
    assert all("Permission denied" in line for line in unread(text))


# File names and links


def test_hostile_media_names_are_escaped_or_listed(run, capsys):
    folder = os.fsencode(run / "media")
    content = (run / "media/samples/text/00000006.md").read_bytes()
    for name in (b"\xff\xfe", b"<script>alert(1)</script>".replace(b"/", b"%2F"), b"%00%ff%2e%2e%2fpasswd", b"a" * 255):
        os.mkdir(os.path.join(folder, name))
        with open(os.path.join(folder, name, b"00000001.md"), "wb") as file:
            file.write(content)
    with open(os.path.join(folder, b"9" * 200 + b".md"), "wb") as file:
        file.write(content)
    deep = folder
    for _ in range(300):
        deep = os.path.join(deep, b"deep")
        os.mkdir(deep)
    text, _ = report(run, capsys)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert any("9999" in line for line in unread(text))


def test_cyclic_link_in_media_is_listed_in_the_page(run, capsys):
    (run / "media" / "again").symlink_to("..")
    text, _ = report(run, capsys)
    assert any("media/again" in line for line in unread(text))


def test_link_within_the_run_is_followed(run, capsys):
    path = run / "media/samples/text/00000006.md"
    path.rename(run / "kept.md")
    path.symlink_to(run / "kept.md")
    text, _ = report(run, capsys)
    assert "<strong>6</strong>" in text
    assert unread(text) == []


def test_linked_run_folder_is_read(run, tmp_path, capsys):
    (tmp_path / "latest").symlink_to(run)
    text, _ = report(tmp_path / "latest", capsys)
    assert unread(text) == []


# The path of the page


def command(*arguments, capsys):
    with within(SECONDS):
        code = cli.main(["report", *map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


@pytest.mark.parametrize("damage", [fifo, folder, bound, link_outside, link_to_nothing, zero_device, link_to_itself])
def test_special_file_at_the_path_of_the_page_is_not_overwritten(run, outside, capsys, damage):
    place = run / "report.html"
    place.touch()
    damage(place, outside)
    before = {path: path.read_bytes() for path in outside.iterdir()}
    kind = stat.S_IFMT(place.lstat().st_mode)
    code, out, err = command(run, capsys=capsys)
    assert (code, out) == (1, "")
    assert re.fullmatch(
        r"fxtrain report: expected a writable path for the page, got .*report\.html \(it is a.*\)\. .*--out.*\n", err
    )
    assert stat.S_IFMT(place.lstat().st_mode) == kind
    assert {path: path.read_bytes() for path in outside.iterdir()} == before
    assert not list(run.glob("*.tmp"))


def test_earlier_page_is_replaced_atomically(run, capsys, monkeypatch):
    place = run / "report.html"
    place.write_text("before")

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        code, out, err = command(run, capsys=capsys)
    assert (code, out, place.read_text()) == (1, "", "before")
    assert "No space left on device" in err
    assert sorted(path.name for path in run.iterdir() if "report" in path.name) == ["report.html"]
    assert command(run, capsys=capsys)[0] == 0
    assert place.read_text().startswith("<!doctype html>")
