"""The checkpoints of a run: kept by policy, written behind the run's back, read back from whatever is left."""

import os
import subprocess
import sys
import threading

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import testing
from fxtrain.checkpoint import _folder as folders
from fxtrain.checkpoint import _manifest as manifests


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
    def test_keeps_by_policy(self, tmp_path, policy, kept):
        losses = [(10, 3.0), (20, 1.0), (30, 5.0), (40, None), (50, float("nan"))]
        checkpoints = saved(tmp_path / "run", losses, **policy)
        assert checkpoints.steps() == kept
        assert checkpoints.latest() == 50
        again = fx.checkpointer(tmp_path / "run", **policy)  # a process that has not written the metrics itself
        assert again.best() == checkpoints.best()
        if "best" in policy:
            assert checkpoints.best() == (30 if policy.get("mode") == "max" else 20)
        assert len(folders_of(tmp_path / "run")) == len(kept)

    def test_after_going_back_a_later_save_is_not_swallowed(self, tmp_path):
        checkpoints = saved(tmp_path, [10, 20, 15])
        assert checkpoints.latest() == 15
        checkpoints.save(at(15, seed=torch.tensor(5)))
        assert int(checkpoints.restore(problem.start(), step=15).seed) == 5
        assert checkpoints.steps() == [15, 20]

    def test_what_a_rewind_left_behind_is_not_on_the_way(self, tmp_path):
        checkpoints = saved(tmp_path, [5, 10, 20, 30, 10, 35], keep=None)
        assert checkpoints.newest_until(34) == 10
        assert checkpoints.newest_until(35) == 35
        assert checkpoints.newest_until(9) == 5
        assert checkpoints.newest_until(4) is None

    def test_what_was_not_committed_is_not_listed_and_cleared_away(self, tmp_path):
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

    def test_says_what_is_there(self, tmp_path):
        checkpoints = saved(tmp_path, [10])
        with pytest.raises(fx.CheckpointError, match=r"expected a checkpoint of step 11 in .*, got steps 10"):
            checkpoints.restore(problem.start(), step=11)
        with pytest.raises(fx.CheckpointError, match=r"expected a checkpoint in .*, got none"):
            fx.checkpointer(tmp_path / "empty").restore(problem.start())
        assert repr(checkpoints).endswith("steps 10)")

    @pytest.mark.parametrize("arguments", [{"keep": 0}, {"keep_every": 0}, {"mode": "least"}, {"on_error": "ignore"}])
    def test_validates(self, tmp_path, arguments):
        with pytest.raises(ValueError, match=f"expected {next(iter(arguments))} to be "):
            fx.checkpointer(tmp_path, **arguments)

    def test_another_environment_is_told(self, tmp_path):
        checkpoints = saved(tmp_path, [10])
        (path,) = folders_of(tmp_path)
        manifest = manifests.read_manifest(path)
        manifest["environment"]["threads"] = 64
        with open(path / "manifest.jsonl", "wb") as file:
            manifests.write_manifest(file, manifest, manifest.pop("leaves"))
        with pytest.warns(UserWarning, match=r"may differ in the last bits \(threads: 64 at the save, 1 now\)"):
            checkpoints.restore(problem.start())


class TestBackground:
    def test_what_happens_to_the_state_after_save_does_not_reach_the_disk(self, tmp_path):
        checkpoints = fx.checkpointer(tmp_path, keep=None)
        for step in range(1, 9):
            state = at(step)
            wanted = state.copy()
            checkpoints.save(state)
            for leaf in fx.tree.leaves(state):  # as a step does that was given the state's memory
                leaf.zero_()
            testing.assert_equal(checkpoints.restore(problem.start(), step=step), wanted, "the saved state")

    def test_saving_does_not_wait_for_the_disk(self, tmp_path, monkeypatch):
        go_on, write = threading.Event(), folders.write
        monkeypatch.setattr(folders, "write", lambda *args: go_on.wait() and write(*args))
        checkpoints = fx.checkpointer(tmp_path)
        checkpoints.save(at(1))
        assert checkpoints.saving
        assert checkpoints.committed() == []
        assert not folders_of(tmp_path)
        go_on.set()
        checkpoints.wait()
        ((step, path, _),) = checkpoints.committed()
        assert (step, path) == (1, folders_of(tmp_path)[0])
        assert checkpoints.committed() == []
        checkpoints.close()

    def test_the_buffer_is_used_again(self, tmp_path):
        checkpoints = fx.checkpointer(tmp_path)
        checkpoints.reserve(at(1))
        buffer = checkpoints._snapshot._buffer.data_ptr()
        for step in (1, 2):
            checkpoints.save(at(step))
            checkpoints.wait()
        assert checkpoints._snapshot._buffer.data_ptr() == buffer
        checkpoints.save(at(3, slots={"more": torch.ones(1000)}))
        assert torch.equal(
            checkpoints.restore(at(0, slots={"more": torch.zeros(1000)})).slots["more"], torch.ones(1000)
        )
        checkpoints.close()

    def test_only_a_state_has_a_step(self, tmp_path):
        with pytest.raises(TypeError, match=r"expected state to be a TrainState, got an? .*dict.*\. fxtrain\.save"):
            fx.checkpointer(tmp_path).save({"a": torch.ones(1)})


def no_room(*args):
    raise fx.CheckpointError("There is no room.")


class TestErrors:
    def test_surface_at_the_next_call(self, tmp_path, monkeypatch):
        checkpoints = saved(tmp_path, [1])
        with monkeypatch.context() as broken:
            broken.setattr(folders, "write", no_room)
            checkpoints.save(at(2))
            with pytest.raises(fx.CheckpointError, match="no room"):
                checkpoints.latest()
        assert checkpoints.latest() == 1
        checkpoints.save(at(2))
        assert checkpoints.steps() == [1, 2]
        checkpoints.close()

    def test_are_warnings_by_choice(self, tmp_path, monkeypatch):
        checkpoints = fx.checkpointer(tmp_path, on_error="warn")
        monkeypatch.setattr(folders, "write", no_room)
        checkpoints.save(at(1))
        with pytest.warns(RuntimeWarning, match=r"no room\. Training continues"):
            assert checkpoints.latest() is None
        checkpoints.close()

    def test_reach_the_run_at_its_next_event(self, tmp_path, monkeypatch):
        checkpoints = fx.checkpointer(tmp_path, background=False)
        seen = []
        monkeypatch.setattr(folders, "write", no_room)
        with (
            pytest.warns(RuntimeWarning, match="Ending the run after an error raised another"),
            pytest.raises(fx.CheckpointError, match="no room"),
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
        assert seen[-1] == "Interrupted"

    def test_a_run_goes_on_by_choice_and_tries_again_at_its_end(self, tmp_path, monkeypatch):
        checkpoints, write, calls = fx.checkpointer(tmp_path, on_error="warn"), folders.write, []

        def fails_at_first(*args):
            calls.append(args)
            return no_room() if len(calls) == 1 else write(*args)

        monkeypatch.setattr(folders, "write", fails_at_first)
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

    def test_a_folder_that_cannot_be_made_is_found_out_before_the_first_step(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(fx.CheckpointError, match=r"expected a writable folder at .* Make it writable"):
            fx.fit(
                problem.start(),
                problem.step(),
                problem.data(),
                steps=1,
                checkpointer=fx.checkpointer(tmp_path / "file" / "run"),
            )

    def test_a_folder_that_vanishes_is_not_made_anew(self, tmp_path):
        checkpoints = fx.checkpointer(tmp_path / "run")
        checkpoints.save(at(1))
        checkpoints.wait()
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        with pytest.raises(
            fx.CheckpointError, match=r"the folder that this run has been saving to, got another one or none"
        ):
            checkpoints.save(at(2))
        (tmp_path / "run").mkdir()  # the empty place that a file system was mounted on
        with pytest.raises(fx.CheckpointError, match="the folder that this run has been saving to"):
            checkpoints.save(at(2))
        checkpoints.close()


def test_no_jax_comes_into_the_process(tmp_path):
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
    def test_a_second_writer_is_refused(self, tmp_path):
        first, second = fx.checkpointer(tmp_path), fx.checkpointer(tmp_path)
        first.save(at(1))
        first.wait()
        with pytest.raises(fx.CheckpointError, match=f"got a lock held by process {os.getpid()} on"):
            second.save(at(2))
        assert second.steps() == [1]  # who reads needs no lock
        first.close()
        second.restore(problem.start())
        second.save(at(2))
        assert second.steps() == [1, 2]
        second.close()

    def test_in_another_process_too_and_a_killed_one_holds_nothing(self, tmp_path):
        code = (
            "import os, signal, sys, torch, fxtrain as fx\n"
            "checkpoints = fx.checkpointer(sys.argv[1])\n"
            "checkpoints.save(fx.init(torch.nn.Linear(1, 1)))\n"
            "checkpoints.wait()\n"
            "if os.fork() == 0: os.execlp('sleep', 'sleep', '60')\n"  # as a worker that outlives its parent
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
                os.kill(worker, 0)  # it is alive
                mine.restore(fx.init(torch.nn.Linear(1, 1)))
                mine.save(at(1))
                mine.close()
            finally:
                os.kill(worker, 9)
        assert mine.steps() == [0, 1]

    def test_a_run_lets_go_at_its_end(self, tmp_path):
        for steps in (2, 4):
            checkpoints = fx.checkpointer(tmp_path)
            fx.fit(problem.start(), problem.step(), problem.data(), steps=steps, checkpointer=checkpoints, resume=True)
            assert checkpoints.latest() == steps


def damage(path):
    (path / "leaves.bin").write_bytes(b"0" * (path / "leaves.bin").stat().st_size)


class TestDamage:
    def test_a_damaged_newest_is_set_aside_and_the_next_older_one_restored(self, tmp_path):
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

    def test_none_that_can_be_read_is_an_error_and_stays_one(self, tmp_path):
        checkpoints = saved(tmp_path, [10, 20])
        before = [path.name for path in folders_of(tmp_path)]
        for path in folders_of(tmp_path):
            damage(path)
        for _ in range(2):
            with pytest.raises(fx.CheckpointError, match=r"(?s)expected a readable checkpoint in .*000020.*000010"):
                fx.fit(problem.start(), problem.step(), problem.data(), steps=3, checkpointer=checkpoints, resume=True)
        assert [path.name for path in folders_of(tmp_path)] == before

    def test_what_was_set_aside_is_no_reason_to_begin_anew(self, tmp_path):
        checkpoints = saved(tmp_path, [10])
        (path,) = folders_of(tmp_path)
        path.rename(tmp_path / f"unreadable-{path.name}")
        with pytest.raises(fx.CheckpointError, match="was set aside earlier as unreadable"):
            fx.fit(problem.start(), problem.step(), problem.data(), steps=3, checkpointer=checkpoints, resume=True)

    def test_one_that_was_asked_for_is_not_replaced(self, tmp_path):
        checkpoints = saved(tmp_path, [10, 20])
        damage(folders_of(tmp_path)[1])
        with pytest.raises(fx.CheckpointError, match="damaged"):
            checkpoints.restore(problem.start(), step=20)
        assert checkpoints.steps() == [10, 20]

    def test_a_state_that_does_not_fit_sets_nothing_aside(self, tmp_path):
        checkpoints = saved(tmp_path, [10, 20])
        with pytest.raises(fx.CheckpointError, match="got others in"):
            checkpoints.restore(fx.init(torch.nn.Linear(1, 1)))
        assert checkpoints.steps() == [10, 20]
