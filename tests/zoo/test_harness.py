"""The zoo command: recorded results, timeouts, known limitations and crashes."""

import dataclasses
import json
import os
import pathlib
import subprocess
import time

import pytest

import zoo
from benchmarks.zoo import __main__ as command
from benchmarks.zoo import processes, worker
from benchmarks.zoo.table import summary, table, verdict
from zoo.case import Limitation

PASSED = {
    "status": "passed",
    "error": "",
    "parity": 1e-16,
    "differentiate": "func",
    "route": "inductor, traced",
    "difference": 1e-7,
    "seconds": 3.0,
    "date": "2026-01-01",
}
FAILED = {"status": "failed", "error": "ValueError: no", "date": "2026-01-02"}
KNOWN = Limitation("Values decide its shapes.", "DynamicShape")


def test_failed_rerun_leaves_nothing_of_an_earlier_run(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results.json")
    key = next(iter(zoo.cases()))
    command.record(key, PASSED)
    command.record(key, {"status": "failed", "error": "ValueError: no"})
    recorded = json.loads(command.RESULTS.read_text())
    assert recorded[key].keys() == {"status", "error", "date"}
    assert "traced |" not in table(recorded, zoo.cases())


@pytest.mark.parametrize(
    ("error", "limitation", "status"),
    [
        ("", None, "passed"),
        ("ValueError: no", None, "failed"),
        ("DynamicShapeError: 3", KNOWN, "limited"),
        ("ValueError: no", KNOWN, "failed"),
        ("", KNOWN, "failed"),
        ("", dataclasses.replace(KNOWN, is_certain=False), "passed"),
    ],
)
def test_only_the_named_error_is_a_known_limitation(error, limitation, status):
    result = {"error": error}
    assert verdict(result, limitation) == status
    assert bool(result["error"]) == (status != "passed")


def test_share_counts_graphs_of_the_whole_step_among_all_that_were_tried():
    results = {
        "timm: a": PASSED,
        "timm: b": {**PASSED, "route": "inductor, dynamo", "interpreted": True},
        "timm: c": {**PASSED, "route": "inductor, regions"},
        "timm: d": FAILED,
        "none: e": {"status": "skipped", "error": "ModuleNotFoundError: none", "date": "2026-01-01"},
    }
    text = summary(results, 6)
    assert "**2 of 4 (50%) are one graph**; the graphs of 1 " in text
    assert "1 were skipped" in text
    assert "1 have no result" in text


def test_case_of_a_missing_package_is_skipped(monkeypatch):
    case = dataclasses.replace(zoo.cases()["torch: triplet embedding"], package="not_a_package")
    monkeypatch.setattr(zoo, "cases", lambda: {case.key: case})
    result = worker.checked(case.key, None)
    assert result["status"] == "skipped"
    assert "not_a_package" in result["error"]


def test_choice_of_autograd_is_recorded():
    found = worker.checked("torch: autograd.Function, old signature", None)
    assert (found["error"], found["differentiate"]) == ("", "autograd")


def test_graphs_can_be_checked_without_a_compiler():
    found = worker.checked("torch: triplet embedding", "none")
    assert (found["error"], found["route"], found["interpreted"]) == ("", "inductor, traced", True)
    assert "seconds" not in found


def test_rotation_chooses_a_third_by_the_commit(monkeypatch, capsys):
    given = command.argparse.Namespace(only=None, part=None, rotate=True)
    keys = [str(number) for number in range(10)]
    parts = []
    for commit in ("0a", "0b", "0c"):
        done = subprocess.CompletedProcess([], 0, stdout=f"{commit}\n")
        monkeypatch.setattr(command.subprocess, "run", lambda *_, done=done, **__: done)
        parts.append(command.chosen(keys, given))
    assert sorted(key for part in parts for key in part) == keys
    assert "chosen by the commit 0a" in capsys.readouterr().out


def test_timeout_kills_what_the_process_started(tmp_path):
    file = tmp_path / "pid"
    for timeout in (2, 10, 60):  # retries, because a slow machine may not start bash in time
        script = f"echo $$ > {file}.new; mv {file}.new {file}; sleep 600"
        result = processes.result_of(subprocess.run, ["bash", "-c", script], timeout=timeout)
        assert result == {"error": f"took longer than {timeout} s"}
        if file.exists():
            break
    while is_alive(int(file.read_text())):
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_crash_of_a_process_is_an_error():
    assert processes.result_of(os._exit, 7, timeout=60) == {"error": "ended with exit code 7"}
