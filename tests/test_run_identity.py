"""Run identity: a checkpoint folder belongs to one run. Other runs are refused, and foreign checkpoints ignored."""

import json
import shutil

import problem
import pytest
import torch
from disk_syncs import before_sync, no_room

import fxtrain as fx
from fxtrain import testing

OTHER = "expected a folder without checkpoints of another run, got .* with "


def fit(state=None, **options):
    state = problem.start() if state is None else state
    saving = fx.when(fx.every(2), fx.callbacks.save())
    return fx.fit(state, problem.step(), problem.data(), **{"callbacks": saving, "steps": 4, **options})


def at(step, **changes):
    return problem.start().replace(step=torch.tensor(step), **changes)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def runs(folder):
    heads = [json.loads(path.open().readline()) for path in sorted(folder.glob("*-step-*/manifest.jsonl"))]
    return [head["run"] for head in heads]


def damage(path):
    (path / "leaves.bin").write_bytes(b"0" * (path / "leaves.bin").stat().st_size)


class TestFreshRun:
    @pytest.mark.parametrize("keep", [1, None])
    def test_used_folder_is_refused_and_unchanged(self, tmp_path, keep):
        fit(checkpointer=fx.checkpointer(tmp_path))
        before = names(tmp_path)
        with pytest.raises(fx.CheckpointError, match=OTHER + r"checkpoints of steps 2, 4\. To resume .*overwrite=True"):
            fit(checkpointer=fx.checkpointer(tmp_path, keep=keep))
        assert names(tmp_path) == before

    def test_used_folder_is_refused_with_on_error_warn(self, tmp_path):
        fit(checkpointer=fx.checkpointer(tmp_path))
        with pytest.raises(fx.CheckpointError, match=OTHER):
            fit(checkpointer=fx.checkpointer(tmp_path, on_error="warn"))
        with pytest.raises(fx.CheckpointError, match=OTHER):
            fx.checkpointer(tmp_path, on_error="warn").save(at(1))

    def test_rerun_notebook_cell_is_refused(self, tmp_path):
        checkpoints = fx.checkpointer(tmp_path)
        fit(checkpointer=checkpoints)
        before = names(tmp_path)
        with pytest.raises(fx.CheckpointError, match=OTHER):
            fit(checkpointer=checkpoints)
        assert names(tmp_path) == before
        assert fit(checkpointer=checkpoints, resume=True, steps=6).state.step == 6

    def test_rerun_notebook_cell_after_a_stop_at_step_0_is_refused(self, tmp_path):
        checkpoints = fx.checkpointer(tmp_path)
        fit(checkpointer=checkpoints, steps=0)
        with pytest.raises(fx.CheckpointError, match=OTHER):
            fit(checkpointer=checkpoints)

    def test_folder_with_set_aside_checkpoints_only_is_refused(self, tmp_path):
        fit(checkpointer=fx.checkpointer(tmp_path), steps=1)
        (path,) = tmp_path.glob("*-step-*")
        path.rename(tmp_path / f"unreadable-{path.name}")
        with pytest.raises(fx.CheckpointError, match=OTHER + "1 that were set aside as unreadable"):
            fit(checkpointer=fx.checkpointer(tmp_path))

    def test_folder_with_a_damaged_manifest_is_refused(self, tmp_path):
        fit(checkpointer=fx.checkpointer(tmp_path), steps=1)
        (manifest,) = tmp_path.glob("*/manifest.jsonl")
        manifest.write_text("")
        with pytest.raises(fx.CheckpointError, match=OTHER):
            fit(checkpointer=fx.checkpointer(tmp_path))

    def test_nothing_is_written_before_the_refusal(self, tmp_path):
        fit(checkpointer=fx.checkpointer(tmp_path))
        (tmp_path / ".lock").unlink()
        with pytest.raises(fx.CheckpointError, match=OTHER):
            fit(checkpointer=fx.checkpointer(tmp_path))
        assert not (tmp_path / ".lock").exists()

    def test_folder_of_format_1_is_refused(self, tmp_path):
        (tmp_path / "00000000-step-000000002").mkdir()
        with pytest.raises(fx.CheckpointError, match=OTHER):
            fit(checkpointer=fx.checkpointer(tmp_path))

    def test_steps_generator_refuses_a_used_folder(self, tmp_path):
        fit(checkpointer=fx.checkpointer(tmp_path))
        with pytest.raises(fx.CheckpointError, match=OTHER):
            list(
                fx.steps(
                    problem.start(), problem.step(), problem.data(), steps=1, checkpointer=fx.checkpointer(tmp_path)
                )
            )


class TestOverwrite:
    def test_earlier_checkpoints_are_deleted_after_the_first_commit(self, tmp_path):
        fit(checkpointer=fx.checkpointer(tmp_path))
        earlier = names(tmp_path)
        present = []

        def observe(state, event: fx.Event, control):
            present.append(set(earlier) & set(names(tmp_path)))

        fit(checkpointer=fx.checkpointer(tmp_path, overwrite=True, background=False), observers=[observe])
        assert present[0] == set(earlier)
        assert present[-1] == set()
        assert len(set(runs(tmp_path))) == 1

    def test_earlier_checkpoints_are_kept_if_the_first_save_fails(self, tmp_path, monkeypatch):
        fit(checkpointer=fx.checkpointer(tmp_path))
        earlier = names(tmp_path)
        before_sync(monkeypatch, no_room)
        with pytest.warns(RuntimeWarning, match="No space left"):
            fit(checkpointer=fx.checkpointer(tmp_path, overwrite=True, on_error="warn"))
        assert names(tmp_path) == earlier

    def test_set_aside_checkpoints_are_deleted(self, tmp_path):
        fit(checkpointer=fx.checkpointer(tmp_path), steps=1)
        (path,) = tmp_path.glob("*-step-*")
        path.rename(tmp_path / f"unreadable-{path.name}")
        fit(checkpointer=fx.checkpointer(tmp_path, overwrite=True), steps=2)
        assert [name[:8] for name in names(tmp_path)] == ["00000001"]

    def test_continued_run_is_not_replaced(self, tmp_path):
        checkpoints = fx.checkpointer(tmp_path, overwrite=True)
        first = fit(checkpointer=checkpoints)
        fit(first.state, checkpointer=checkpoints, steps=6)
        assert checkpoints.steps() == [2, 4, 6]

    def test_resumed_run_is_not_replaced(self, tmp_path):
        fit(checkpointer=fx.checkpointer(tmp_path))
        fit(checkpointer=fx.checkpointer(tmp_path, overwrite=True), steps=6, resume=True)
        assert fx.checkpointer(tmp_path).steps() == [2, 4, 6]


class TestContinuing:
    def test_resumed_run_keeps_its_id(self, tmp_path):
        for steps in (2, 4, 6):
            fit(checkpointer=fx.checkpointer(tmp_path), steps=steps, resume=True)
        assert len(runs(tmp_path)) == 3
        assert len(set(runs(tmp_path))) == 1

    def test_equal_runs_have_different_ids_and_equal_states(self, tmp_path):
        results = [fit(checkpointer=fx.checkpointer(tmp_path / name)) for name in "ab"]
        testing.assert_equal(results[0].state, results[1].state, "the same run twice")
        assert runs(tmp_path / "a")[0] != runs(tmp_path / "b")[0]

    def test_last_state_continues_with_the_same_checkpointer(self, tmp_path):
        checkpoints = fx.checkpointer(tmp_path)
        first = fit(checkpointer=checkpoints)
        fit(first.state, checkpointer=checkpoints, steps=6)
        assert checkpoints.steps() == [2, 4, 6]
        assert len(set(runs(tmp_path))) == 1

    def test_restored_state_continues_with_the_same_checkpointer(self, tmp_path):
        fit(checkpointer=fx.checkpointer(tmp_path))
        checkpoints = fx.checkpointer(tmp_path)
        state = checkpoints.restore(problem.start())
        fit(state, checkpointer=checkpoints, steps=6)
        assert checkpoints.steps() == [2, 4, 6]
        assert len(set(runs(tmp_path))) == 1

    def test_restored_older_state_continues_the_run(self, tmp_path):
        fit(checkpointer=fx.checkpointer(tmp_path), steps=6)
        checkpoints = fx.checkpointer(tmp_path, keep=None)
        fit(checkpoints.restore(problem.start(), step=2), checkpointer=checkpoints, steps=3)
        assert checkpoints.latest() == 3
        assert len(set(runs(tmp_path))) == 1

    def test_state_of_another_run_at_the_same_step_is_refused(self, tmp_path):
        checkpoints = fx.checkpointer(tmp_path)
        fit(checkpointer=checkpoints)
        others = [fit(problem.start(seed=1), callbacks=()).state, fit(steps=5, callbacks=()).state]
        for other in [others[0], others[1].replace(step=torch.tensor(4))]:
            with pytest.raises(fx.CheckpointError, match=OTHER):
                fit(other, checkpointer=checkpoints, steps=6)

    def test_last_state_with_another_checkpointer_is_refused(self, tmp_path):
        first = fit(checkpointer=fx.checkpointer(tmp_path))
        with pytest.raises(fx.CheckpointError, match=OTHER):
            fit(first.state, checkpointer=fx.checkpointer(tmp_path), steps=6)

    def test_run_continued_by_another_process_is_refused(self, tmp_path):
        checkpoints = fx.checkpointer(tmp_path)
        first = fit(checkpointer=checkpoints)
        fit(checkpointer=fx.checkpointer(tmp_path), resume=True, steps=5)
        with pytest.raises(fx.CheckpointError, match=OTHER):
            fit(first.state, checkpointer=checkpoints, steps=6)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_resume_behind_another_process_is_refused(self, tmp_path, overwrite):
        fit(checkpointer=fx.checkpointer(tmp_path))
        checkpoints = fx.checkpointer(tmp_path, overwrite=overwrite)
        report = checkpoints.read(problem.start())
        fit(checkpointer=fx.checkpointer(tmp_path), resume=True, steps=5)
        with pytest.raises(fx.CheckpointError, match=OTHER):
            checkpoints.begin(report.state, resume=True)


class TestByHand:
    def test_save_to_a_used_folder_is_refused(self, tmp_path):
        fit(checkpointer=fx.checkpointer(tmp_path))
        checkpoints = fx.checkpointer(tmp_path)
        with pytest.raises(fx.CheckpointError, match=OTHER):
            checkpoints.save(at(5))
        checkpoints.restore(problem.start())
        checkpoints.save(at(5))
        assert checkpoints.steps() == [2, 4, 5]
        assert len(set(runs(tmp_path))) == 1
        checkpoints.close()

    def test_save_after_close_continues(self, tmp_path):
        checkpoints = fx.checkpointer(tmp_path)
        for step in (1, 2):
            checkpoints.save(at(step))
            checkpoints.close()
        assert checkpoints.steps() == [1, 2]

    def test_save_with_overwrite_replaces(self, tmp_path):
        fit(checkpointer=fx.checkpointer(tmp_path))
        with fx.checkpointer(tmp_path, overwrite=True) as checkpoints:
            checkpoints.save(at(1))
            assert checkpoints.steps() == [1]
        assert len(names(tmp_path)) == 1


def copied(source, target):
    """Copies the checkpoints of one folder into another, as a user may."""
    for path in source.glob("*-step-*"):
        shutil.copytree(path, target / path.name)


class TestForeignCheckpoints:
    """A folder with checkpoints copied from another run, which only ``overwrite=True`` may delete."""

    @pytest.fixture
    def mixed(self, tmp_path):
        foreign, own = tmp_path / "foreign", tmp_path / "own"
        with fx.checkpointer(foreign, keep=None) as checkpoints:
            for step in (1, 2, 3):
                checkpoints.save(at(step), {"loss": 0.0})
        with fx.checkpointer(own, keep=None) as checkpoints:
            for step in (10, 20, 30, 40, 50):
                checkpoints.save(at(step), {"loss": float(step)})
        copied(foreign, own)
        return own

    def test_reads_see_their_own_run(self, mixed):
        checkpoints = fx.checkpointer(mixed, best="loss")
        assert checkpoints.steps() == [10, 20, 30, 40, 50]
        assert checkpoints.latest() == 50
        assert checkpoints.best() == 10
        assert checkpoints.newest_until(9) is None
        with pytest.raises(fx.CheckpointError, match="expected a checkpoint of step 3 in"):
            checkpoints.restore(problem.start(), step=3)
        assert "steps 10, 20" in repr(checkpoints)

    def test_retention_sees_its_own_run(self, mixed):
        with fx.checkpointer(mixed, keep=1, best="loss") as checkpoints:
            checkpoints.restore(problem.start())
            checkpoints.save(at(60), {"loss": 60.0})
            assert checkpoints.steps() == [10, 60]
        assert len(names(mixed)) == 5

    def test_damaged_checkpoints_do_not_fall_back_to_another_run(self, mixed):
        own = sorted(mixed.glob("*-step-0000000?0"))
        for path in own:
            damage(path)
        with pytest.raises(fx.CheckpointError, match=r"(?s)expected a readable checkpoint in .*50.*10"):
            fx.checkpointer(mixed).restore(problem.start())
        for path in own:
            path.rename(mixed / f"unreadable-{path.name}")
        with pytest.raises(fx.CheckpointError, match="was set aside earlier as unreadable"):
            fit(checkpointer=fx.checkpointer(mixed), resume=True)

    def test_rewind_does_not_reach_another_run(self, mixed):
        with fx.checkpointer(mixed) as checkpoints:
            checkpoints.restore(problem.start())
            assert checkpoints.read_newest_until(9, problem.start()) is None
