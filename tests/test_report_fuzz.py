"""Reports of runs with damaged values: a page that lists unreadable parts, or a one-line error, without a traceback."""

import contextlib
import json
import os
import random

import pytest
from report_checks import STEPS, report, unread
from report_checks import original as original  # a fixture
from report_checks import run as run  # a fixture


def test_undamaged_run_lists_no_problems(run, capsys):
    text, _ = report(run, capsys)
    assert unread(text) == []


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
