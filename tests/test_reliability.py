"""Checkpoints survive kills, power cuts, damaged files and failing disks. The harness is in benchmarks/reliability."""

import functools
import json
import re
import shutil
import sys

import pytest
import torch

from benchmarks.reliability import children, shim
from benchmarks.reliability.power_cut import losses
from benchmarks.reliability.shim import Call
from benchmarks.reliability.synced import unsynced
from benchmarks.reliability.systems import same, values_of
from benchmarks.reliability.table import Cell, render

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("cc") is None, reason="the shim needs Linux and a C compiler"
    ),
]
ROWS = {"fxtrain": "R3,R4,R5,R6,R7,R8,R9,R11,R12,R13", "torch.save": "R3,R5,R9"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns a function that returns a row of the table for a system. All rows of a system run in one subprocess."""

    @functools.cache
    def cells(system):
        file = tmp_path_factory.mktemp("reliability") / "cells"
        options = ["--rows", ROWS[system], "--systems", system, "--every", "3", "--json", str(file)]
        code = shim.run_under("benchmarks.reliability", [*options, *(["--flips", "20"] * (system == "torch.save"))])
        found = {cell["row"]: cell for cell in json.loads(file.read_text())}
        assert code == (system == "fxtrain" and any(cell["lost"] for cell in found.values()))
        return found

    return lambda row, system="fxtrain": cells(system)[row]


def nothing_is_lost(cell):
    assert cell["notes"] == []
    assert cell["lost"] == 0


class TestWhole:
    def test_kill_before_any_call_of_save_and_delete_loses_nothing(self, run):
        cell = run("R3")  # every third call. The option --full runs all calls, over 400.
        nothing_is_lost(cell)
        assert cell["tried"] > 130

    def test_killed_run_resumes_to_the_same_result(self, run):
        cell = run("R4")
        nothing_is_lost(cell)
        assert cell["tried"] >= 10

    def test_save_is_synced_before_older_ones_are_deleted(self, run):
        cell = run("R11")
        nothing_is_lost(cell)
        assert cell["tried"] >= 10

    def test_power_cut_keeps_every_reported_save(self, run):
        cell = run("R12")
        nothing_is_lost(cell)
        assert cell["tried"] > 400


class TestVerified:
    def test_each_flipped_bit_is_detected(self, run):
        cell = run("R5")
        nothing_is_lost(cell)
        assert cell["tried"] == cell["detected"] == 150

    @pytest.mark.parametrize("row", ["R6", "R7"])
    def test_damage_and_mismatches_are_never_silent(self, run, row):
        cell = run(row)
        nothing_is_lost(cell)
        assert cell["tried"] == cell["detected"] > 0

    def test_every_kind_of_leaf_and_key_is_restored(self, run):
        cell = run("R13")
        nothing_is_lost(cell)
        assert cell["tried"] > 20


class TestAlive:
    def test_changes_after_save_returned_never_reach_the_file(self, run):
        cell = run("R8")
        nothing_is_lost(cell)
        assert cell["tried"] > 20

    def test_failing_disk_is_reported_and_loses_nothing(self, run):
        cell = run("R9")
        nothing_is_lost(cell)
        assert cell["tried"] > 30
        # Not all faults are reported, because some are harmless: a full disk does not affect calls that remove files.
        assert cell["detected"] > cell["tried"] / 2


class TestHarness:
    """The harness detects the losses of a writer without atomic saves and checksums."""

    def test_kill_loses_a_file_overwritten_in_place(self, run):
        cell = run("R3", "torch.save")
        assert cell["lost"] > 0
        assert any("last is listed and cannot be restored" in note for note in cell["notes"])

    def test_flipped_bits_without_checksums_restore_wrong_values(self, run):
        cell = run("R5", "torch.save")
        assert cell["lost"] > 0
        assert cell["tried"] == 20

    def test_failing_disk_loses_a_file_overwritten_in_place(self, run):
        assert run("R9", "torch.save")["lost"] > 0

    def test_equality_is_bitwise(self):
        values = values_of(1)
        assert same(values, {name: value.clone() for name, value in values.items()})
        assert not same(values, {**values, "bias": values["bias"].double()})
        assert not same({"x": torch.tensor(0.0)}, {"x": torch.tensor(-0.0)})
        assert same({"x": torch.tensor(torch.nan)}, {"x": torch.tensor(torch.nan)})

    def test_table_shows_the_counts_of_a_cell(self):
        cell = Cell(detected=0)
        cell.add([], detected=True)
        cell.add(["gone"], detected=False, at="call 7")
        assert str(cell) == "2 / 1 / 1"
        assert cell.notes == ["call 7: gone"]
        assert render({"R3": "kills"}, {("R3", "ours"): cell}, ["ours"]).splitlines()[-1] == (
            "R3 kills                 2 / 1 / 1"
        )


def _save(number, *, older=None):
    """The log of one correct save."""
    new, root = f"/w/run/.new-{number}", "/w/run"
    calls = [Call("note", "begin")]
    if older is None:
        calls += [Call("mkdir", root), Call("sync", "/w")]
    calls += [Call("mkdir", new)]
    for file in ("leaves", "manifest"):
        calls += [Call(name, f"{new}/{file}") for name in ("create", "write", "write", "sync")]
    calls += [Call("sync", new), Call("rename", new, f"{root}/{number}"), Call("sync", root)]
    if older is not None:
        gone = f"{root}/.gone-{older}"
        calls += [Call("rename", f"{root}/{older}", gone), Call("sync", root)]
        calls += [Call("remove", f"{gone}/{file}") for file in ("leaves", "manifest")] + [Call("remove", gone)]
    return [*calls, Call("note", "committed")]


LOG = [*_save(1), *_save(2, older=1), *_save(3, older=2)]


class TestUnsynced:
    def test_correct_log_passes(self):
        assert unsynced(LOG) == []

    @pytest.mark.parametrize("index", [index for index, call in enumerate(LOG) if call.name == "sync"])
    def test_each_missing_sync_is_detected(self, index):
        assert unsynced(LOG[:index] + LOG[index + 1 :])

    @pytest.mark.parametrize("file", ["leaves", "manifest"])
    def test_write_after_sync_is_detected(self, file):
        index = LOG.index(Call("sync", f"/w/run/.new-2/{file}"))
        assert unsynced([*LOG[:index], LOG[index], LOG[index - 1], *LOG[index + 1 :]])

    def test_early_deletion_of_an_older_save_is_detected(self):
        gone = LOG.index(Call("rename", "/w/run/1", "/w/run/.gone-1"))
        committed = LOG.index(Call("rename", "/w/run/.new-2", "/w/run/2"))
        log = [*LOG[: committed + 1], *LOG[gone:]]
        assert unsynced(log)[0] == "save 2: 1 of an earlier save is renamed while run is not synced"

    def test_message_names_the_unsynced_file(self):
        log = [call for call in LOG if call != Call("sync", "/w/run/.new-2/leaves")]
        assert unsynced(log) == ["save 2: .new-2 is renamed while leaves is not synced"]

    def test_overwriting_in_place_is_detected(self):
        write = [Call("note", "begin"), Call("truncate", "/w/last"), Call("write", "/w/last"), Call("sync", "/w/last")]
        log = [*write, Call("sync", "/w"), Call("note", "committed"), *write, Call("note", "committed")]
        assert unsynced(log) == ["save 2: last of an earlier save is overwritten in place"]


def _run(number):
    """The log of one correct save. The first save also creates the run's folder."""
    new, root = f"/w/run/.new-{number}", "/w/run"
    calls = [Call("mkdir", "/w"), Call("mkdir", root)] if number == 0 else []
    calls += [Call("sync", "/"), Call("sync", "/w")] if number == 0 else []
    calls += [Call("mkdir", new)]
    for file in ("leaves.bin", "manifest.jsonl"):
        calls += [Call(name, f"{new}/{file}") for name in ("create", "write", "sync")]
    calls += [Call("sync", new), Call("rename", new, f"{root}/{number:08d}-step-000000001"), Call("sync", root)]
    return [*calls, Call("note", "committed")]


RUN = [*_run(0), *_run(1)]


class TestPowerCut:
    def test_correct_log_passes(self):
        assert losses(RUN, "") == (len(RUN), [])

    @pytest.mark.parametrize("index", [index for index, call in enumerate(RUN) if call.name == "sync"])
    def test_each_missing_sync_is_detected(self, index):
        assert losses(RUN[:index] + RUN[index + 1 :], "")[1]

    def test_write_after_sync_is_detected(self):
        index = RUN.index(Call("sync", "/w/run/.new-1/leaves.bin"))
        assert losses([*RUN[:index], RUN[index], RUN[index - 1], *RUN[index + 1 :]], "")[1]

    def test_early_deletion_of_an_older_save_is_detected(self):
        gone = Call("rename", "/w/run/00000000-step-000000001", "/w/run/.gone")
        log = [*_run(0), gone, Call("sync", "/w/run"), *_run(1)]
        assert losses(log, "")[1]


class TestChildren:
    def test_failing_child_returns_its_messages_and_error(self):
        def ends_badly(tell):
            tell({"step": 3})
            raise RuntimeError("no")

        outcome = children.in_child(ends_badly)
        assert outcome.told == [{"step": 3}]
        assert not outcome.killed
        assert re.search(r"RuntimeError: no", outcome.error)

    def test_killed_child_returns_its_messages(self):
        outcome = children.in_child(lambda tell: [tell(1), __import__("time").sleep(60)], kill_after=0.2)
        assert outcome == children.Outcome([1], killed=True, error="")


def test_shim_log_is_parsed():
    assert shim.parse("create\t/w/a\t\nrename\t/w/a\t/w/b\n") == [
        Call("create", "/w/a"),
        Call("rename", "/w/a", "/w/b"),
    ]
