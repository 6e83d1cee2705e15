"""Reports of damaged run folders: a page that lists unreadable parts, or a one-line error, and never a traceback."""

import contextlib
import html
import html.parser
import json
import os
import random
import re
import shutil
import signal
import socket
import stat

import pytest
import torch
from problem import data, eval_step, loss_fn, start, transform

import fxtrain as fx
from fxtrain import cli, observers, values, writers

SECRET = "the-content-of-a-file-outside-of-the-run"
SECONDS = 20  # for one page; a hang is a failure
STEPS = 6
TAGS = {"html", "head", "meta", "title", "style", "script", "body", "header", "main", "section", "div", "p", "small"}
TAGS |= {"h1", "h2", "h3", "h4", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "ul", "ol", "li"}
TAGS |= {"figure", "figcaption", "img", "audio", "video", "pre", "code", "em", "strong", "br", "hr", "blockquote"}
TAGS |= {"details", "summary", "i"}


def record(folder):
    """Records a short run with one value of each kind and the files of all observers."""

    def measure(state, event: fx.StepEnd):
        if event.step % 3:  # few files, because each test copies them
            return state, fx.Control(log={"monitor/improved_by": 0.5}, save=event.step == 4, reason="half of it")
        made = {
            "samples/image": values.Image(torch.rand(2, 4, 4, 1)),
            "samples/film": values.Video(torch.rand(2, 4, 4, 3)),
            "samples/glass": values.Video(torch.rand(2, 4, 4, 4)),  # with transparency, which only GIF has
            "samples/tone": values.Audio(torch.zeros(50), 8000),
            "samples/text": values.Text(f"# Step\n\n- **{event.step}**\n"),
            "samples/table": values.Table({"picture": values.Image(torch.rand(2, 4, 4, 1)), "name": ["a", "b"]}),
            "confusion": values.ConfusionMatrix(torch.ones(2, 2), labels=("cat", "dog")),
            "weights": values.Histogram(state.params["0.weight"]),
            "monitor/improved_by": 0.5,
        }
        return state, fx.Control(log=made)

    tx = transform()
    with open(folder / "summary.txt", "w") as summary:
        fx.fit(
            start(),
            fx.train_step(loss_fn, tx),
            data(),
            steps=STEPS,
            callbacks=[measure],
            eval_step=eval_step,
            eval_data=data(1),
            eval_when=fx.every(2),
            checkpointer=fx.checkpointer(folder / "checkpoints"),
            run=fx.RunInfo(name="a run"),
            observers=[
                observers.write(
                    writers.jsonl(folder / "metrics.jsonl"),
                    writers.csv(folder / "metrics.csv"),
                    writers.media(folder / "media"),
                    hparams={"lr": 0.1, "model": {"layers": 2}},
                ),
                observers.record_run(folder, {"lr": 0.1, "data": ["a", "b"]}),
                observers.record_code(folder, source=folder),
                observers.summary(file=summary),
            ],
        )
    (folder / "result.json").write_text(json.dumps({"loss": {"eval": 0.5}, "bits": {"this model": 0.5, "xz": 1}}))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "run"
    folder.mkdir()
    record(folder)
    return folder


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder outside the run, whose content must not appear in a page."""
    folder = tmp_path_factory.mktemp("outside")
    for name in ("00000001.md", "summary.txt", "run.json", "metrics.jsonl"):
        line = {"step": 1, "metrics": {SECRET: 1.0}, "config": {SECRET: SECRET}}
        (folder / name).write_text(json.dumps(line) + "\n" if "json" in name else SECRET)
    return folder


# Checks of pages and errors


class Page(html.parser.HTMLParser):
    """Collects tags, scripts and attributes that could run or load something."""

    def __init__(self):
        super().__init__()
        self.tags, self.suspicious, self.scripts = set(), [], 0

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.scripts += tag == "script"
        for name, value in attributes:
            if name.startswith("on") or (name in ("src", "href") and not re.match(r"data:(image|audio|video)/", value)):
                self.suspicious.append((tag, name, value[:80]))


@contextlib.contextmanager
def within(seconds):
    def expired(number, frame):
        raise TimeoutError(f"no page after {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def strict(constant):
    raise AssertionError(f"{constant} is no JSON")


def report(folder, capsys, *others):
    """Runs the command on folders; returns the page and an empty error, or None and the error's line."""
    out = folder.parent / "page.html"
    out.unlink(missing_ok=True)
    with within(SECONDS):
        code = cli.main(["report", *map(str, (folder, *others)), "--out", str(out)])
    captured = capsys.readouterr()
    if code:
        assert code in (1, 2)
        assert captured.out == ""
        assert captured.err.startswith("fxtrain report: ")
        assert captured.err.count("\n") == 1
        assert not out.exists()
        return None, captured.err
    assert captured.err == ""
    text = out.read_bytes().decode("utf-8")
    found = Page()
    found.feed(text)
    assert found.tags <= TAGS
    assert found.suspicious == []
    assert found.scripts == 2
    assert SECRET not in text
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    json.loads(embedded, parse_constant=strict)
    return text, ""


def unread(text):
    """The problems that a page lists."""
    found = re.search(r"<h2>Problems</h2><ul>(.*?)</ul>", text, re.DOTALL)
    return re.findall("<li>(.*?)</li>", found[1], re.DOTALL) if found else []


@pytest.fixture
def run(original, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    return folder


def test_undamaged_run_lists_no_problems(run, capsys):
    text, _ = report(run, capsys)
    assert unread(text) == []


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


# Damaged values

HOSTILE = (
    *(
        "[]",
        "{}",
        "null",
        "true",
        '""',
        '"7"',
        "-1",
        "-0.0",
        "1.5",
        "1e400",
        "-1e400",
        "NaN",
        "Infinity",
        '"NaN"',
        "[[]]",
    ),
    "1" + 400 * "0",
    "9" * 5000,
    "9007199254740993",
    "1e308",
    "5e-324",
    '[1, "a", null, {}]',
    '{"a": {"b": [1, {"c": NaN}]}}',
    '"\\ud800"',
    '"\\u0000\\u001b[31m\\u2028\\u202e"',
    json.dumps("</script><script>alert(1)</script><!--"),
    json.dumps("\"'><img src=x onerror=alert(1)>"),
    json.dumps("../../../../etc/passwd"),
    json.dumps("/etc/passwd"),
    json.dumps("[a](javascript:alert(1)) ![b](http://example.com/x.png) <http://example.com> <b onclick=alert(1)>"),
    json.dumps("x" * 300_000),
    json.dumps("`" * 5000),
    json.dumps("__proto__"),
    200 * "[" + 200 * "]",
    10_000 * "[" + 10_000 * "]",
    10_000 * '{"a":' + "1" + 10_000 * "}",
    10_000 * "[",
)
JSON_FILES = ("metrics.jsonl", "events.jsonl", "run.json", "result.json", "table.json", "confusion.json")


def places(value, path=()):
    """The paths of all nodes of a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def replaced(value, path, new, *, key=False):
    """The JSON text of a value with the node at a path, or its key, replaced."""
    mark = "4d8f1c"

    def at(value, path):
        if not path:
            return mark
        copy = dict(value) if isinstance(value, dict) else list(value)
        if key and len(path) == 1 and isinstance(copy, dict):
            return {(mark if k == path[0] else k): v for k, v in copy.items()}
        copy[path[0]] = at(value[path[0]], path[1:])
        return copy

    text = json.dumps(at(value, path))
    return text.replace(f'"{mark}"', new if not key or new.startswith('"') else json.dumps(new[:1000]))


def json_file(run, name):
    if name in ("table.json", "confusion.json"):
        kind = "samples/table" if name.startswith("table") else "confusion"
        return run / "media" / kind / f"{STEPS:08d}.json"
    return run / name


@pytest.mark.parametrize("seed", range(240))
def test_replaced_json_values_give_a_page(run, original, capsys, seed):
    choose = random.Random(seed)
    name = JSON_FILES[seed % len(JSON_FILES)]
    path = json_file(run, name)
    lines = path.read_text().splitlines() if name.endswith("l") else [path.read_text()]
    for _ in range(choose.choice((1, 1, 3, 10))):
        index = choose.randrange(len(lines))
        with contextlib.suppress(ValueError, RecursionError):  # the line was damaged in an earlier round
            value = json.loads(lines[index])
            lines[index] = replaced(
                value, choose.choice(list(places(value))), choose.choice(HOSTILE), key=choose.random() < 0.2
            )
    path.write_text("\n".join(lines) + "\n")
    others = [original] if choose.random() < 0.3 else []  # of one name
    text, _ = report(run, capsys, *others)
    assert text is not None


@pytest.mark.parametrize("new", HOSTILE, ids=lambda new: new[:12])
@pytest.mark.parametrize(
    "at",
    [  # in one run, values of different files, which are read one by one
        {
            "metrics.jsonl": ("step",),
            "events.jsonl": ("step",),
            "run.json": ("sessions", 0),
            "table.json": ("columns", "picture", 0),
            "confusion.json": ("counts", 0, 0),
            "result.json": ("bits", "xz"),
        },
        {
            "metrics.jsonl": ("metrics",),
            "run.json": ("sessions", 0, "seconds"),
            "confusion.json": ("labels", 0),
            "result.json": ("bits",),
        },
        {"metrics.jsonl": ("metrics", "train/loss"), "run.json": ("sessions", 0, "environment", "threads")},
        {"metrics.jsonl": ("epoch",), "run.json": ("run", "name")},
        {"metrics.jsonl": ("time",), "run.json": ("config", "lr")},
    ],
    ids=["steps and parts", "objects", "numbers", "epoch", "time"],
)
def test_hostile_values_used_in_arithmetic_give_a_page_or_an_error(run, capsys, at, new):
    for name, place in at.items():
        path = json_file(run, name)
        lines = path.read_text().splitlines() if name.endswith("l") else [path.read_text()]
        index = next(i for i, line in enumerate(lines) if place in set(places(json.loads(line))))
        lines[index] = replaced(json.loads(lines[index]), place, new)
        path.write_text("\n".join(lines) + "\n")
    report(run, capsys)


INSERTED = (b"\n", b'"', b"\0", b"\xff\xfe", b"{", b"]", b",,,", b"\r", b"<script>")


@pytest.mark.parametrize("seed", range(60))
def test_changed_bytes_give_a_page_or_an_error(run, capsys, seed):
    choose = random.Random(seed)
    files = sorted(path for path in run.rglob("*") if path.is_file() and "checkpoints" not in path.parts)
    for path in choose.sample(files, 3):
        content = bytearray(path.read_bytes())
        for _ in range(choose.choice((1, 5, 50))):
            at = choose.randrange(len(content))
            choice = choose.randrange(3)
            if choice == 0:
                content[at] = choose.randrange(256)
            elif choice == 1:
                content[at : at + choose.randrange(20)] = b""
            else:
                content[at:at] = choose.choice(INSERTED)
            content = content or bytearray(b"\n")
        path.write_bytes(content)
    report(run, capsys)


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.csv", "events.jsonl"])
@pytest.mark.parametrize("order", ["reversed", "shuffled", "twice", "without ends", "one line"])
def test_reordered_lines_give_a_page(run, capsys, name, order):
    path = run / name
    if name == "metrics.csv":
        (run / "metrics.jsonl").unlink()
    lines = path.read_text().splitlines(keepends=True)
    changed = {
        "reversed": lines[::-1],
        "shuffled": random.Random(0).sample(lines, len(lines)),
        "twice": lines + lines,
        "without ends": [line.rstrip() for line in lines],
        "one line": lines[:1],
    }[order]
    path.write_text("".join(changed))
    text, _ = report(run, capsys)
    if order in ("reversed", "twice", "without ends") and name.startswith("metrics"):
        assert any(name in line for line in unread(text))


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.csv", "events.jsonl", "run.json", "summary.txt"])
def test_line_of_20_megabytes_is_skipped(run, capsys, name):
    path = run / name
    if name == "metrics.csv":
        (run / "metrics.jsonl").unlink()
    content = path.read_bytes()
    with open(path, "wb") as file:
        file.write(content.splitlines(keepends=True)[0] if name == "metrics.csv" else b"")
        file.write(b'{"step": ')
        file.seek(20 * 2**20, os.SEEK_CUR)
        file.write(b"\n" + content)
    text, _ = report(run, capsys)
    assert any(name in line for line in unread(text))
    if name == "metrics.jsonl":
        assert '"title":"loss"' in text


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
