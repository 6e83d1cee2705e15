"""Checkpoints of a run: retention, background writes, errors, locking and recovery from damage."""

import os
import subprocess
import sys
import threading

import problem
import pytest
import torch
from disk_syncs import before_sync, no_room

import fxtrain as fx
from fxtrain import testing


def at(step, **changes):
    return problem.start().replace(step=torch.tensor(step), **changes)


def saved(folder, steps, **policy):
    checkpoints = fx.checkpointer(folder, **policy)
    for step in steps:
        step, loss = step if isinstance(step, tuple) else (step, None)
        checkpoints.save(at(step), {} if loss is None else {"loss": loss})
    checkpoints.close()
    return checkpoints


def folders_of(path):
    return sorted(p for p in path.iterdir() if p.is_dir())


class TestPolicy:
    @pytest.mark.parametrize(
        ("policy", "kept"),
        [
            ({"keep": 2}, [40, 50]),
            ({"keep": None}, [10, 20, 30, 40, 50]),
            ({"keep": 1, "keep_every": 20}, [20, 40, 50]),
            ({"keep": 1, "best": "loss"}, [20, 50]),
            ({"keep": 1, "best": "loss", "mode": "max"}, [30, 50]),
        ],
    )
    def test_retention_follows_policy(self, tmp_path, policy, kept):
        losses = [(10, 3.0), (20, 1.0), (30, 5.0), (40, None), (50, float("nan"))]
        checkpoints = saved(tmp_path / "run", losses, **policy)
        assert checkpoints.steps() == kept
        assert checkpoints.latest() == 50
        again = fx.checkpointer(tmp_path / "run", **policy)  # a new process reads the metrics from disk
        assert again.best() == checkpoints.best()
        if "best" in policy:
            assert checkpoints.best() == (30 if policy.get("mode") == "max" else 20)
        assert len(folders_of(tmp_path / "run")) == len(kept)

    def test_repeated_step_after_rewind_replaces_checkpoint(self, tmp_path):
        checkpoints = saved(tmp_path, [10, 20, 15])
        assert checkpoints.latest() == 15
        checkpoints.save(at(15, seed=torch.tensor(5)))
        assert int(checkpoints.restore(problem.start(), step=15).seed) == 5
        assert checkpoints.steps() == [15, 20]

    def test_rewind_ignores_abandoned_steps(self, tmp_path):
        checkpoints = saved(tmp_path, [5, 10, 20, 30, 10, 35], keep=None)
        assert checkpoints.newest_until(34) == 10
        assert checkpoints.newest_until(35) == 35
        assert checkpoints.newest_until(9) == 5
        assert checkpoints.newest_until(4) is None

    def test_uncommitted_folders_are_unlisted_and_deleted(self, tmp_path):
        checkpoints = saved(tmp_path, [10])
        left = [tmp_path / ".unfinished-00000001-step-000000020-1", tmp_path / ".deleted-00000000-step-000000001"]
        for path in left:
            path.mkdir()
            (path / "leaves.bin").write_text("half")
        (tmp_path / "999").mkdir()
        assert checkpoints.steps() == [10]
        checkpoints.save(at(11))
        assert checkpoints.steps() == [10, 11]
        assert not any(path.exists() for path in left)
        assert (tmp_path / "999").exists()

    def test_errors_and_repr_list_saved_steps(self, tmp_path):
        checkpoints = saved(tmp_path, [10])
        with pytest.raises(fx.CheckpointError, match=r"expected a checkpoint of step 11 in .*, got steps 10"):
            checkpoints.restore(problem.start(), step=11)
        with pytest.raises(fx.CheckpointError, match=r"expected a checkpoint in .*, got none"):
            fx.checkpointer(tmp_path / "empty").restore(problem.start())
        assert repr(checkpoints).endswith("steps 10)")

    @pytest.mark.parametrize("arguments", [{"keep": 0}, {"keep_every": 0}, {"mode": "least"}, {"on_error": "ignore"}])
    def test_arguments_are_validated(self, tmp_path, arguments):
        with pytest.raises(ValueError, match=f"expected {next(iter(arguments))} to be "):
            fx.checkpointer(tmp_path, **arguments)

    def test_different_environment_warns(self, tmp_path, monkeypatch):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(torch, "get_num_threads", lambda: 64)
            checkpoints = saved(tmp_path, [10])
        with pytest.warns(UserWarning, match=r"may differ in the last bits \(threads: 64 at the save, 1 now\)"):
            checkpoints.restore(problem.start())


def allocated(call):
    """Returns the bytes that torch operators allocate during a call, in this thread."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profiler.events())


class TestBackground:
    def test_saved_state_ignores_later_writes(self, tmp_path):
        checkpoints = fx.checkpointer(tmp_path, keep=None)
        for step in range(1, 9):
            state = at(step)
            wanted = state.copy()
            checkpoints.save(state)
            for leaf in fx.tree.leaves(state):  # as a donating step does
                leaf.zero_()
            testing.assert_equal(checkpoints.restore(problem.start(), step=step), wanted, "the saved state")

    def test_save_does_not_wait_for_disk(self, tmp_path, monkeypatch):
        go_on = threading.Event()
        before_sync(monkeypatch, lambda descriptor: go_on.wait())
        checkpoints = fx.checkpointer(tmp_path)
        checkpoints.save(at(1))
        assert checkpoints.saving
        assert checkpoints.committed() == []
        assert not [path for path in folders_of(tmp_path) if not path.name.startswith(".unfinished")]
        go_on.set()
        checkpoints.wait()
        ((step, path, _),) = checkpoints.committed()
        assert (step, path) == (1, folders_of(tmp_path)[0])
        assert checkpoints.committed() == []
        checkpoints.close()

    def test_memory_of_first_copy_is_reused(self, tmp_path):
        checkpoints, states = fx.checkpointer(tmp_path), [at(1), at(2)]
        size = sum(leaf.nbytes for leaf in fx.tree.leaves(states[0]))
        assert allocated(lambda: checkpoints.reserve(states[0])) >= size
        for state in states:
            assert allocated(lambda state=state: checkpoints.save(state)) < size
            checkpoints.wait()
        checkpoints.save(at(3, slots={"more": torch.ones(1000)}))
        assert torch.equal(
            checkpoints.restore(at(0, slots={"more": torch.zeros(1000)})).slots["more"], torch.ones(1000)
        )
        checkpoints.close()

    def test_snapshot_is_written_without_copying_state(self, tmp_path):
        state = at(1)
        with fx.checkpointer(tmp_path) as checkpoints:
            size = sum(leaf.nbytes for leaf in fx.tree.leaves(state))
            assert allocated(lambda: checkpoints.save(state, role="snapshot")) < size

    def test_save_requires_train_state(self, tmp_path):
        with pytest.raises(TypeError, match=r"expected state to be a TrainState, got an? .*dict.*\. fxtrain\.save"):
            fx.checkpointer(tmp_path).save({"a": torch.ones(1)})


class TestErrors:
    def test_error_is_raised_by_next_call(self, tmp_path, monkeypatch):
        checkpoints = saved(tmp_path, [1])
        with monkeypatch.context() as broken:
            before_sync(broken, no_room)
            checkpoints.save(at(2))
            with pytest.raises(fx.CheckpointError, match="No space left"):
                checkpoints.latest()
        assert checkpoints.latest() == 1
        checkpoints.save(at(2))
        assert checkpoints.steps() == [1, 2]
        checkpoints.close()

    def test_errors_can_be_warnings(self, tmp_path, monkeypatch):
        checkpoints = fx.checkpointer(tmp_path, on_error="warn")
        before_sync(monkeypatch, no_room)
        checkpoints.save(at(1))
        with pytest.warns(RuntimeWarning, match="No space left.*Training continues"):
            assert checkpoints.latest() is None
        checkpoints.close()

    def test_error_ends_run_at_next_event(self, tmp_path, monkeypatch):
        checkpoints = fx.checkpointer(tmp_path, background=False)
        seen = []
        before_sync(monkeypatch, no_room)
        with (
            pytest.warns(RuntimeWarning, match="Ending the run after an error raised another"),
            pytest.raises(fx.CheckpointError, match="No space left"),
        ):
            fx.fit(
                problem.start(),
                problem.step(),
                problem.data(),
                steps=9,
                callbacks=fx.when(fx.every(2), fx.callbacks.save()),
                checkpointer=checkpoints,
                observers=[lambda state, event, control: seen.append(type(event).__name__)],
            )
        assert seen.count("StepEnd") == 2
        assert seen[-2:] == ["Interrupted", "SaveBegin"]

    def test_run_continues_after_warning_and_saves_at_end(self, tmp_path, monkeypatch):
        checkpoints, faults = fx.checkpointer(tmp_path, on_error="warn"), [no_room]
        before_sync(monkeypatch, lambda descriptor: faults and faults.pop()(descriptor))
        with pytest.warns(RuntimeWarning, match="Training continues without this checkpoint"):
            fx.fit(
                problem.start(),
                problem.step(),
                problem.data(),
                steps=4,
                callbacks=fx.when(fx.every(4), fx.callbacks.save()),
                checkpointer=checkpoints,
            )
        assert checkpoints.steps() == [4]

    def test_unwritable_folder_fails_before_first_step(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(fx.CheckpointError, match=r"expected a writable folder at .* Make it writable"):
            fx.fit(
                problem.start(),
                problem.step(),
                problem.data(),
                steps=1,
                checkpointer=fx.checkpointer(tmp_path / "file" / "run"),
            )

    def test_vanished_folder_is_not_recreated(self, tmp_path):
        checkpoints = fx.checkpointer(tmp_path / "run")
        checkpoints.save(at(1))
        checkpoints.wait()
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        with pytest.raises(
            fx.CheckpointError, match=r"the folder that this run has been saving to, got another one or none"
        ):
            checkpoints.save(at(2))
        (tmp_path / "run").mkdir()  # an unmounted file system leaves its empty mount point
        with pytest.raises(fx.CheckpointError, match="the folder that this run has been saving to"):
            checkpoints.save(at(2))
        checkpoints.close()


def test_checkpoints_do_not_import_jax(tmp_path):
    code = (
        "import sys, torch, fxtrain as fx\n"
        "tx = fx.optim.sgd(0.1)\n"
        "step = fx.train_step(lambda model, batch: model(batch).mean(), tx)\n"
        "state, checkpoints = fx.init(torch.nn.Linear(1, 1), tx), fx.checkpointer(sys.argv[1])\n"
        "fx.fit(state, step, [torch.ones(2, 1)], steps=2, checkpointer=checkpoints)\n"
        "fx.fit(state, step, [torch.ones(2, 1)], steps=3, checkpointer=checkpoints, resume=True)\n"
        "print(checkpoints.steps(), sorted({'jax', 'jaxlib', 'orbax'}.intersection(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "[2, 3] []\n"


class TestLock:
    def test_second_writer_is_rejected(self, tmp_path):
        first, second = fx.checkpointer(tmp_path), fx.checkpointer(tmp_path)
        first.save(at(1))
        first.wait()
        with pytest.raises(fx.CheckpointError, match=f"got a lock held by process {os.getpid()} on"):
            second.save(at(2))
        assert second.steps() == [1]  # reading needs no lock
        first.close()
        second.restore(problem.start())
        second.save(at(2))
        assert second.steps() == [1, 2]
        second.close()

    def test_lock_excludes_other_process_until_it_is_killed(self, tmp_path):
        code = (
            "import os, signal, sys, torch, fxtrain as fx\n"
            "checkpoints = fx.checkpointer(sys.argv[1])\n"
            "checkpoints.save(fx.init(torch.nn.Linear(1, 1)))\n"
            "checkpoints.wait()\n"
            "if os.fork() == 0: os.execlp('sleep', 'sleep', '60')\n"  # a worker that outlives its parent
            "worker = os.fork()\n"
            "if worker == 0: signal.pause()\n"
            "print(worker, flush=True)\n"
            "signal.pause()\n"
        )
        with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
            worker = int(other.stdout.readline())
            mine = fx.checkpointer(tmp_path)
            with pytest.raises(fx.CheckpointError, match=f"got a lock held by process {other.pid} on"):
                mine.save(at(1))
            other.kill()
            other.wait()
            try:
                os.kill(worker, 0)  # the worker is alive
                mine.restore(fx.init(torch.nn.Linear(1, 1)))
                mine.save(at(1))
                mine.close()
            finally:
                os.kill(worker, 9)
        assert mine.steps() == [0, 1]

    def test_run_releases_lock_at_end(self, tmp_path):
        for steps in (2, 4):
            checkpoints = fx.checkpointer(tmp_path)
            fx.fit(problem.start(), problem.step(), problem.data(), steps=steps, checkpointer=checkpoints, resume=True)
            assert checkpoints.latest() == steps


def damage(path):
    (path / "leaves.bin").write_bytes(b"0" * (path / "leaves.bin").stat().st_size)


class TestDamage:
    def test_damaged_newest_is_set_aside_and_older_one_restored(self, tmp_path):
        checkpoints = saved(tmp_path, [10, 20, 30])
        for path in folders_of(tmp_path)[1:]:
            damage(path)
        with pytest.warns(UserWarning, match="damaged.* It is kept as unreadable-.*, and step 10 is restored"):
            assert int(checkpoints.restore(problem.start()).step) == 10
        assert checkpoints.steps() == [10]
        assert len(list(tmp_path.glob("unreadable-*"))) == 2
        checkpoints.save(at(20))
        checkpoints.close()
        assert [path.name[:8] for path in folders_of(tmp_path)] == ["00000000", "00000003", "unreadab", "unreadab"]

    def test_no_readable_checkpoint_is_a_repeated_error(self, tmp_path):
        checkpoints = saved(tmp_path, [10, 20])
        before = [path.name for path in folders_of(tmp_path)]
        for path in folders_of(tmp_path):
            damage(path)
        for _ in range(2):
            with pytest.raises(fx.CheckpointError, match=r"(?s)expected a readable checkpoint in .*000020.*000010"):
                fx.fit(problem.start(), problem.step(), problem.data(), steps=3, checkpointer=checkpoints, resume=True)
        assert [path.name for path in folders_of(tmp_path)] == before

    def test_resume_rejects_folder_with_only_unreadable_checkpoints(self, tmp_path):
        checkpoints = saved(tmp_path, [10])
        (path,) = folders_of(tmp_path)
        path.rename(tmp_path / f"unreadable-{path.name}")
        with pytest.raises(fx.CheckpointError, match="was set aside earlier as unreadable"):
            fx.fit(problem.start(), problem.step(), problem.data(), steps=3, checkpointer=checkpoints, resume=True)

    def test_damaged_requested_step_is_an_error(self, tmp_path):
        checkpoints = saved(tmp_path, [10, 20])
        damage(folders_of(tmp_path)[1])
        with pytest.raises(fx.CheckpointError, match="damaged"):
            checkpoints.restore(problem.start(), step=20)
        assert checkpoints.steps() == [10, 20]

    def test_mismatched_state_sets_nothing_aside(self, tmp_path):
        checkpoints = saved(tmp_path, [10, 20])
        with pytest.raises(fx.CheckpointError, match="got others in"):
            checkpoints.restore(fx.init(torch.nn.Linear(1, 1)))
        assert checkpoints.steps() == [10, 20]
