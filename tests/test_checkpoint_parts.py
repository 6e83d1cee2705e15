"""Checkpoints that several ranks write together: whole or not listed, and restored by any number of ranks, bitwise."""

import shutil
import signal

import pytest
from saved_steps import rewrite

import fxtrain as fx
from fxtrain.checkpoint import DamagedError
from fxtrain.cli import main
from tests import part_checks, ranks, shared_checks

CHECKS = [
    "each_rank_writes_and_reads_its_slices",
    "full_disk_of_a_rank_fails_the_save",
    "damage_of_a_part_is_found_by_all_ranks",
    "folder_that_a_rank_cannot_see_is_named",
    "refused_saves_leave_no_rank_waiting",
    "snapshots_are_written_by_parts_and_rewound_to",
    "readers_that_do_not_agree_are_refused",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def outcomes(folder):
    """Runs all checks with two ranks, and returns the errors of each."""
    return shared_checks.outcomes("part_checks", CHECKS, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(outcomes, name):
    shared_checks.assert_passed(outcomes, name)


def program(call):
    return f"from tests import part_checks\npart_checks.{call}"


def test_any_number_of_ranks_restores_what_another_saved(tmp_path):
    """Sharded and replicated states are restored into either, along 1-2-4-1-3-2-1 ranks."""
    before = tmp_path / "0"
    for kind in part_checks.KINDS:
        part_checks.save_alone(before / kind, part_checks.state_of(7))
    for index, size in enumerate((2, 4, 1, 3, 2, 1), 1):
        folder = tmp_path / str(index)
        if size == 1:
            part_checks.world_of_one(folder, before)
        else:
            ranks.run(program(f"world({str(folder)!r}, {str(before)!r})"), size)
        before = folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing interrupts, and the number of calls of its second save on each rank."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    results = ranks.run(program(f"killed_in_a_save({str(folder)!r}, -1, -1)"), 2)
    return folder, [int(done.stdout.splitlines()[-1].split()[0]) for done in results]


CALLS = [11, 2]  # of the second save, on each rank
POINTS = [(rank, number) for rank, calls in enumerate(CALLS) for number in range(1, calls + 1)]
FAST = [(0, 3), (0, 9), (0, 10), (1, 2)]  # of those run always: around the files and the commit


def test_all_calls_of_a_save_are_points_of_a_kill(undisturbed):
    assert undisturbed[1] == CALLS


def slow_unless(point):
    return pytest.param(*point, marks=[] if point in FAST else pytest.mark.slow)


@pytest.mark.parametrize(("rank", "number"), [slow_unless(point) for point in POINTS])
def test_rank_killed_in_a_save_loses_no_checkpoint(tmp_path, undisturbed, rank, number):
    folder = tmp_path / "run"
    results = ranks.run(program(f"killed_in_a_save({str(folder)!r}, {rank}, {number})"), 2, timeout=60, check=False)
    assert results[rank].returncode == -signal.SIGKILL, results[rank]
    assert results[1 - rank].returncode == 1
    assert "LostRankError" in results[1 - rank].stderr
    reported = {int(line.split()[1]) for done in results for line in done.stdout.splitlines()}
    with fx.checkpointer(folder) as store, fx.checkpointer(undisturbed[0]) as expected:
        assert {4, *reported} <= set(store.steps()) <= {4, 8}
        for step in store.steps():
            assert not store.restore(like(), step=step).diff(expected.restore(like(), step=step))
        store.save(store.restore(like()))
    assert not list(folder.glob(".unfinished-*"))


def test_hanging_disk_of_a_rank_ends_the_run_without_a_checkpoint(tmp_path):
    with ranks.started(program(f"hanging_disk({str(tmp_path / 'run')!r})"), 2) as started:
        assert started.processes[0].wait(60) == 1
        errors = started.processes[0].communicate(5)[1]
    assert "LostRankError: expected all 2 ranks to join the all-gather of parts of a checkpoint within 3 s" in errors
    assert fx.checkpointer(tmp_path / "run").steps() == []


@pytest.fixture
def checkpoint(tmp_path, undisturbed):
    """A checkpoint of two ranks that a test may change."""
    return shutil.copytree(max(undisturbed[0].glob("*-step-*")), tmp_path / "checkpoint")


def like():
    return part_checks.parts(None)[0]


def test_one_process_inspects_compares_and_exports(tmp_path, checkpoint, capsys):
    assert main(["inspect", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "leaves, written by 2 ranks" in out
    assert "  ['0.weight']  float64 [16, 6]" in out
    restored = fx.restore(checkpoint, like())
    assert main(["inspect", str(checkpoint), str(fx.save(tmp_path / "whole", restored))]) == 0


def test_damaged_part_is_marked(checkpoint, capsys):
    content = bytearray((checkpoint / "leaves-1.bin").read_bytes())
    content[-1] ^= 1
    (checkpoint / "leaves-1.bin").write_bytes(content)
    assert main(["inspect", str(checkpoint)]) == 1
    assert "damaged: 1 leaf of" in capsys.readouterr().out


def test_session_in_one_process_continues_the_run(tmp_path, undisturbed):
    """The first state of a session without resume is compared with the slices of the checkpoint."""
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    with fx.checkpointer(folder) as store:
        state = store.restore(like())
        store.begin(state, resume=False)
        store.save(state)
    other = state.replace(params={**state.params, "0.weight": state.params["0.weight"] + 1})
    with fx.checkpointer(folder) as store:
        store.restore(like())
        with pytest.raises(fx.CheckpointError, match="checkpoints of another run"):
            store.begin(other, resume=False)


@pytest.mark.parametrize(
    ("what", "change"),
    {
        "that begins at 0": lambda row: row["slices"].reverse(),
        "that begins at 8": lambda row: row["slices"][1].update(start=9),
        "slices of all 16 rows": lambda row: row["slices"].pop(),
        "slices": lambda row: row.update(slices=[]),
        "a slice": lambda row: row["slices"].insert(0, 1),
        "a slice ": lambda row: row["slices"][0].pop("part"),
        "an axis": lambda row: row.update(axis=2),
        "a number of rows": lambda row: row["slices"][0].update(length=0),
        "bytes of a slice": lambda row: row["slices"][0].update(length=7),
        "the number of a part": lambda row: row["slices"][0].update(part="../x"),
        "at the offset": lambda row: row["slices"][0].update(part=1),
        "a checksum": lambda row: row["slices"][1].update(xxh3=1),
        "a row": lambda row: row.update(offset=0),
    }.items(),
)
def test_invalid_slices_are_named(checkpoint, what, change):
    def apply(lines):
        change(next(row for row in lines[1:] if row["path"] == "state.params['0.weight']"))

    rewrite(checkpoint, apply)
    with pytest.raises(DamagedError, match=rf"manifest\.jsonl is damaged: expected .*{what.strip()}.*, got "):
        fx.restore(checkpoint, like())
