"""Checks and programs of ranks that write a checkpoint together. ``shared_checks`` runs the checks."""

import errno
import os
import pathlib
import signal
import sys
import time
import warnings

import pytest
import torch

import fxtrain as fx
from fxtrain import tree
from fxtrain.distributed import Shard
from tests import sharded_run_checks
from tests.rank_runs import error_of
from tests.sharded_states import BATCH, examples, loss_fn, parts, sharded

KINDS = ("sharded", "replicated")


# What the checks share.


def state_of(step, *, is_blank=False):
    """Returns a state with several dtypes, whose sizes 2, 3 and 4 divide or not, along one axis or another."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(step)

    def random(dtype, *shape):
        if dtype.is_complex:
            return torch.randn(shape, dtype=dtype, generator=generator)
        return torch.randn(shape, generator=generator).mul(1000).to(dtype)

    params = {
        "even": random(torch.bfloat16, 12, 5),
        "twos": random(torch.float32, 10, 9),
        "odd": random(torch.float64, 7, 11),
        "deep": random(torch.float32, 1, 7, 24),
        "long": random(torch.float16, 36),
        "bias": random(torch.float32, 3),
    }
    slots = {
        "counts": random(torch.int64, 12, 5),
        "phases": random(torch.complex64, 10, 9),
        "flags": random(torch.int64, 36) > 0,
        "scalar": random(torch.complex128),
    }
    state = fx.init(params, fx.optim.sgd(0.1)).replace(slots=slots, step=torch.tensor(step), seed=torch.tensor(step))
    return tree.zeros_like(state) if is_blank else state


def placed(state, kind, mesh):
    return fx.shard(state, mesh, fx.distributed.fsdp(least=20)) if kind == "sharded" else state


def save(mesh, folder, state):
    """Saves a state at the end of a run that takes no step, and returns the path."""
    step = fx.train_step(loss_fn, fx.optim.sgd(0.1), mesh=mesh)
    batches = fx.data.batches(examples(), BATCH)
    fx.fit(state, step, batches, mesh=mesh, steps=int(state.step), checkpointer=fx.checkpointer(folder))
    return only(folder)


def save_alone(folder, state):
    with fx.checkpointer(folder) as store:
        store.save(state)


def is_shard(node):
    return isinstance(node, Shard)


def shards_in(state):
    return [leaf for leaf in tree.leaves(state, is_leaf=is_shard) if is_shard(leaf)]


def assert_bitwise(found, expected):
    """Compares this rank's slices with a whole state."""
    for path, one, other in zip(
        tree.paths(expected),
        tree.leaves(found, is_leaf=is_shard),
        tree.leaves(expected),
        strict=True,
    ):
        own = one
        if is_shard(one):
            rows = other.shape[one.axis] // one.mesh.size
            own, other = one.local, other.narrow(one.axis, one.mesh.rank * rows, rows)
        assert own.dtype == other.dtype, path
        assert torch.equal(own.cpu(), other), path


def only(folder):
    (path,) = folder.glob("*-step-*")
    return path


def fit(mesh, folder, *, callbacks=(), every=2, **options):
    """Trains a sharded state for 8 steps, with saves."""
    callbacks = [*callbacks, fx.callbacks.save(every=every)]
    return run(mesh, folder, callbacks=callbacks, checkpointer=fx.checkpointer(folder, keep=None, **options))


def run(mesh, folder, **options):
    state, tx = parts(mesh)
    given = {"checkpointer": fx.checkpointer(folder), "epochs": 2, "resume": True, **options}
    return sharded_run_checks.fit(mesh, sharded(state, mesh), tx, **given)


def main_then(mesh, act):
    """Calls a function on rank 0, while the others wait."""
    if mesh.is_main:
        act()
    mesh.gather(None, "an act of rank 0")


# Checks.


def each_rank_writes_and_reads_its_slices(mesh, folder):
    state = state_of(7)
    found = placed(state, "sharded", mesh)
    path = save(mesh, folder, found)
    own = sum(shard.local.nbytes for shard in shards_in(found))
    whole = tree.nbytes(state) - own * mesh.size
    sizes = [(path / name).stat().st_size for name in ("leaves.bin", "leaves-1.bin")]
    added = sizes[0] - own - whole  # slots of the loop
    assert sizes[1] == own
    assert 0 <= added < 100
    read, preadv = [], os.preadv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", lambda *args: read.append(preadv(*args)) or read[-1])
        fx.restore(path, found, extra="drop")
    assert sum(read) == own + whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not state.diff(fx.restore(path, state, extra="drop"))


def full_disk_of_a_rank_fails_the_save(mesh, folder):
    for failing in (0, 1):
        fsync = os.fsync

        def full(descriptor, fsync=fsync, failing=failing):
            if mesh.rank == failing and "step-000000004" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch.setattr(os, "fsync", full)
            path = folder / f"warn-{failing}"
            fit(mesh, path, on_error="warn", background=failing == 0)
            assert fx.checkpointer(path).steps() == [2, 6, 8]
            texts = [str(each.message) for each in caught if "No space left" in str(each.message)]
            assert bool(texts) == mesh.is_main
            assert not texts or failing == 0 or "got an error on rank 1: OSError" in texts[0], texts
            error = error_of(lambda failing=failing: fit(mesh, folder / f"raise-{failing}"))
        assert "No space left" in str(error), error
        assert type(error) is (fx.CheckpointError if mesh.is_main else fx.distributed.FailedRankError)
        assert fx.checkpointer(folder / f"raise-{failing}").steps()[0] == 2
        mesh.gather(None, "the end of a run")
        assert not list(folder.glob("*/.unfinished-*"))


def damage_of_a_part_is_found_by_all_ranks(mesh, folder):
    def flip(path):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    expected = fit(mesh, folder / "whole").state
    for name, harm in (("flipped", flip), ("cut", lambda path: os.truncate(path, 3)), ("missing", pathlib.Path.unlink)):
        path = folder / name
        fit(mesh, path)
        newest = max(path.glob("*-step-000000008"))
        main_then(mesh, lambda harm=harm, newest=newest: harm(newest / "leaves-1.bin"))
        state = fx.distributed.gathered(expected)
        with pytest.raises(fx.checkpoint.DamagedError, match=r"leaves-1\.bin"):
            fx.restore(newest, state)
        mesh.gather(None, "the end of a restore")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = fit(mesh, path)
        found = [str(each.message) for each in caught if "leaves-1.bin" in str(each.message)]
        assert bool(found) == mesh.is_main
        assert not found or "and step 6 is restored" in found[0], found
        assert not state.diff(fx.distributed.gathered(again.state))
        assert len(list(path.glob("unreadable-*"))) == 1
        mesh.gather(None, "the end of a check")


def folder_that_a_rank_cannot_see_is_named(mesh, folder):
    is_dir = pathlib.Path.is_dir
    with pytest.MonkeyPatch.context() as patch:
        if mesh.rank == 1:
            patch.setattr(pathlib.Path, "is_dir", lambda path: ".unfinished" not in path.name and is_dir(path))
        error = error_of(lambda: save(mesh, folder, placed(state_of(7), "sharded", mesh)))
    assert "file system that all ranks share" in str(error), error
    assert "on rank 1" in str(error), error
    mesh.gather(None, "the end of a save")
    assert not list(folder.glob("[!.]*"))


def refused_saves_leave_no_rank_waiting(mesh, folder):
    """Rank 0 refuses to save to another folder than the one that it has locked."""

    def swap(state, event: fx.StepEnd):
        if event.step == 3 and mesh.is_main:
            (folder / "run").rename(folder / "away")
        return state, fx.Control()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(mesh, folder / "run", callbacks=[swap], on_error="warn")
    assert int(result.state.step) == 8
    texts = [str(each.message) for each in caught if "moved, deleted or unmounted" in str(each.message)]
    assert len(texts) == 4 * mesh.is_main  # at steps 4, 6 and 8, and at the end


def snapshots_are_written_by_parts_and_rewound_to(mesh, folder):
    """A run that is stopped, and rewinds to a snapshot on disk, ends like one that is not stopped."""
    options = {"snapshot_every": 3, "snapshots": 2}

    def rewind(state, event: fx.StepEnd):
        return state, fx.Control(rewind=3 if event.step == 7 and not rewound else 0)

    def note(state, event: fx.Rewound):
        rewound.append(event.to_step)
        return state, fx.Control()

    rewound = []
    whole = run(mesh, folder / "whole", callbacks=[rewind, note], **options)
    assert rewound == [3], rewound
    rewound = []
    run(mesh, folder / "run", epochs=None, steps=6, **options)
    snapshots = sorted((folder / "run").glob("*-snapshot-*"))
    assert len(snapshots) == 2
    assert all((path / "leaves-1.bin").stat().st_size > 0 for path in snapshots)
    mesh.gather(None, "the end of a check")
    found = run(mesh, folder / "run", callbacks=[rewind, note], **options)
    assert rewound == [3], rewound
    assert not fx.distributed.gathered(found.state).diff(fx.distributed.gathered(whole.state))


def readers_that_do_not_agree_are_refused(mesh, folder):
    found = placed(state_of(7), "sharded", mesh)
    save(mesh, folder, found)
    with pytest.raises(TypeError, match="shard"):
        fx.checkpointer(folder).restore(found)


# Programs.


def world(folder, before):
    """Restores each checkpoint of another world into each placement, and saves what was restored."""
    torch.set_num_threads(1)
    mesh, folder, before = fx.distributed.mesh(timeout=60), pathlib.Path(folder), pathlib.Path(before)
    for kind in KINDS:
        for stored in KINDS:
            state = restored(before / stored, placed(state_of(0, is_blank=True), kind, mesh))
            assert bool(shards_in(state)) == (kind == "sharded")
        save(mesh, folder / kind, state)
        files = {f"leaves-{rank}.bin" for rank in range(1, mesh.size)} if kind == "sharded" else set()
        assert {path.name for path in only(folder / kind).iterdir()} == {"leaves.bin", "manifest.jsonl", *files}


def world_of_one(folder, before):
    """Restores each checkpoint of another world in this process, and saves it."""
    for stored in KINDS:
        save_alone(folder / stored, restored(before / stored, state_of(0, is_blank=True)))


def restored(folder, like):
    state = fx.restore(only(folder), like, extra="drop")
    assert_bitwise(state, state_of(7))
    return state


CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


def killed_in_a_save(folder, rank, number):
    """Is killed before a call of the second save.

    Args:
        folder: The folder of the checkpoints.
        rank: The rank that is killed.
        number: The number of the call that changes the file system or opens a file or folder, from 1.
    """
    torch.set_num_threads(1)
    mesh = fx.distributed.mesh(timeout=30)
    calls, is_armed, fsync = 0, False, os.fsync

    def before(path):
        nonlocal calls
        calls += is_armed and str(path).startswith(folder)
        if calls == number and mesh.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, arguments):
        if is_armed and event in CALLS and not isinstance(arguments[0], int):
            before(arguments[0])

    def sync(descriptor):
        before(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = sync
    sys.addaudithook(audit)

    def arm(state, event: fx.SaveBegin):
        nonlocal is_armed
        while event.step == 8 and 4 not in fx.checkpointer(folder).steps():
            time.sleep(0.01)
        is_armed = event.step == 8
        return state, fx.Control()

    def announce(state, event: fx.Saved):
        print(f"saved {event.step}", flush=True)
        return state, fx.Control()

    fit(mesh, folder, callbacks=[arm, announce], every=4)
    print(f"{calls} calls", flush=True)


def hanging_disk(folder):
    """Hangs in the background of rank 1, in a save."""
    mesh = fx.distributed.mesh(timeout=3)
    if mesh.rank == 1:
        os.fsync = lambda descriptor: time.sleep(60)
    fit(mesh, folder)
