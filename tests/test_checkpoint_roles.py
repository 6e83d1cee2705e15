"""Roles of checkpoints (trajectory, session, snapshot): their retention, listing, and use for resume and rewind."""

import problem
import pytest
import torch

import fxtrain as fx


def at(step, **changes):
    return problem.start().replace(step=torch.tensor(step), **changes)


def saved(folder, saves, **policy):
    """Saves steps with the role trajectory (``10``), session (``"10s"``) or snapshot (``"10r"``)."""
    checkpoints = fx.checkpointer(folder, **policy)
    roles = {"s": "session", "r": "snapshot"}
    for save in saves:
        text = str(save)
        role = roles.get(text[-1], "trajectory")
        checkpoints.save(at(int(text.rstrip("sr"))), {"loss": float(text.rstrip("sr"))}, role=role)
    checkpoints.wait()
    return checkpoints


def present(folder):
    kinds = {"session": "s", "snapshot": "r"}
    found = []
    for path in sorted(folder.glob("*-step-*")):
        kind = next((letter for word, letter in kinds.items() if f"-{word}-" in path.name), "")
        found.append(f"{int(path.name.rpartition('-')[2])}{kind}")
    return found


class TestSession:
    def test_kept_only_while_newest(self, tmp_path):
        checkpoints = saved(tmp_path, [10, "13s"], keep=1)
        assert checkpoints.steps() == [10, 13]
        assert checkpoints.latest() == 13
        checkpoints.save(at(17), role="session")
        assert checkpoints.steps() == [10, 17]
        checkpoints.save(at(20))
        assert checkpoints.steps() == [20]
        checkpoints.close()

    def test_kept_while_only_snapshots_are_newer(self, tmp_path):
        assert saved(tmp_path, [10, "13s", "15r"]).latest() == 13
        assert present(tmp_path) == ["10", "13s", "15r"]

    @pytest.mark.parametrize(
        "policy", [{"keep": 2}, {"keep": 1, "keep_every": 10}, {"keep": 1, "best": "loss", "mode": "min"}]
    )
    def test_does_not_count_for_retention(self, tmp_path, policy):
        whole = saved(tmp_path / "whole", [10, 20, 30, 40], **policy)
        often = saved(tmp_path / "often", ["1s", 10, "13s", "17s", 20, 30, "33s", "36s", 40], **policy)
        assert [name for name in present(tmp_path / "often") if name[-1] != "s"] == present(tmp_path / "whole")
        assert often.best() == whole.best()

    def test_same_step_does_not_replace_trajectory_checkpoint(self, tmp_path):
        checkpoints = saved(tmp_path, [10, 20, "20s", 30], keep=2)
        assert present(tmp_path) == ["20", "20s", "30"]
        checkpoints.save(at(40))
        checkpoints.close()
        assert present(tmp_path) == ["30", "40"]

    def test_is_not_a_rewind_target(self, tmp_path):
        checkpoints = saved(tmp_path, [10, "13s"])
        assert checkpoints.newest_until(15) == 10
        assert int(checkpoints.read_newest_until(15, problem.start()).state.step) == 10

    def test_is_resumable(self, tmp_path):
        saved(tmp_path, [10, "13s"]).close()
        assert int(fx.checkpointer(tmp_path).restore(problem.start()).step) == 13


class TestSnapshot:
    def test_is_not_listed(self, tmp_path):
        checkpoints = saved(tmp_path, [10, "12r", "14r"], best="loss", mode="max")
        assert checkpoints.steps() == [10]
        assert checkpoints.latest() == 10
        assert checkpoints.best() == 10
        assert [step for step, _, _ in checkpoints.committed()] == [10]
        with pytest.raises(fx.CheckpointError, match="expected a checkpoint of step 12 in"):
            checkpoints.restore(problem.start(), step=12)
        assert int(checkpoints.restore(problem.start()).step) == 10

    def test_is_read_by_step(self, tmp_path):
        checkpoints = saved(tmp_path, [10, "12r", "14r"])
        assert checkpoints.snapshots() == {12, 14}
        assert int(checkpoints.read_snapshot(12, problem.start()).state.step) == 12
        assert checkpoints.read_snapshot(13, problem.start()) is None
        assert checkpoints.newest_until(13) == 10
        assert checkpoints.read_newest_until(13, problem.start(), newer_than=10) is None

    def test_damaged_snapshot_is_set_aside(self, tmp_path):
        checkpoints = saved(tmp_path, [10, "12r"])
        (path,) = tmp_path.glob("*-snapshot-step-*")
        (path / "leaves.bin").write_bytes(b"")
        with pytest.warns(UserWarning, match="It is kept as unreadable-"):
            assert checkpoints.read_snapshot(12, problem.start()) is None
        checkpoints.close()

    def test_is_kept_until_retain_snapshots(self, tmp_path):
        checkpoints = saved(tmp_path, ["2r", "4r", "6r", 7, "8r", 9], keep=1)
        assert present(tmp_path) == ["2r", "4r", "6r", "8r", "9"]
        checkpoints.retain_snapshots([6, 8])
        checkpoints.wait()
        assert present(tmp_path) == ["6r", "8r", "9"]
        checkpoints.retain_snapshots([])
        checkpoints.close()
        assert present(tmp_path) == ["9"]

    def test_is_not_resumable(self, tmp_path):
        saved(tmp_path, ["2r"]).close()
        checkpoints = fx.checkpointer(tmp_path)
        assert not checkpoints.has_any()
        result = fx.fit(problem.start(), problem.step(), problem.data(), steps=1, checkpointer=checkpoints, resume=True)
        assert result.state.step == 1
        assert checkpoints.steps() == [1]
        with pytest.raises(fx.CheckpointError, match="another run"):
            fx.fit(problem.start(), problem.step(), problem.data(), steps=1, checkpointer=fx.checkpointer(tmp_path))

    def test_same_step_replaces_older_snapshot(self, tmp_path):
        saved(tmp_path, ["2r", "4r", 4, 2, "4r"], keep=None)
        assert present(tmp_path) == ["2r", "4", "2", "4r"]

    def test_retain_snapshots_requires_writing_session(self, tmp_path):
        with pytest.raises(fx.CheckpointError, match="expected a session that saves to"):
            fx.checkpointer(tmp_path).retain_snapshots([])

    def test_role_is_validated(self, tmp_path):
        with pytest.raises(ValueError, match=r"expected role to be one of .*, got 'best'"):
            fx.checkpointer(tmp_path).save(at(1), role="best")


class TestTimeline:
    def test_deletion_does_not_restore_abandoned_steps(self, tmp_path):
        checkpoints = saved(tmp_path, [5, 10, 20, 30], keep=1, keep_every=20)
        for step in (10, 35, 36, 37):
            checkpoints.save(at(step))
        checkpoints.wait()
        assert checkpoints.newest_until(34) == 10
        assert 20 in checkpoints.steps()

    def test_two_rewinds_are_both_respected(self, tmp_path):
        checkpoints = saved(tmp_path, [10, 20, 30, 10, 20, 10, 45, 46, 47], keep=1, keep_every=30)
        assert checkpoints.newest_until(44) == 10


class TestRewindToDamage:
    def test_falls_back_to_older_target(self, tmp_path):
        checkpoints = saved(tmp_path, [10, 20, 30])
        (path,) = tmp_path.glob("*-step-000000020")
        (path / "leaves.bin").write_bytes(b"")
        with pytest.warns(UserWarning, match="damaged.* It is kept as unreadable-.*, and step 10 is restored"):
            report = checkpoints.read_newest_until(25, problem.start())
        assert int(report.state.step) == 10
        assert checkpoints.steps() == [10, 30]
        checkpoints.close()

    def test_returns_none_without_readable_target(self, tmp_path):
        checkpoints = saved(tmp_path, [10, 20, 30])
        for path in tmp_path.glob("*-step-*"):
            (path / "leaves.bin").write_bytes(b"")
        with pytest.warns(UserWarning, match="It is kept as unreadable-"):
            assert checkpoints.read_newest_until(25, problem.start()) is None
        checkpoints.close()

    @pytest.mark.filterwarnings("ignore:.*It is kept as unreadable")
    def test_run_continues_from_older_target(self, tmp_path):
        def rewind_once(state, event: fx.StepEnd):
            if event.step == 8 and "seen" not in state.slots:
                (path,) = tmp_path.glob("*-step-000000006")
                (path / "leaves.bin").write_bytes(b"")
            return state, fx.Control(rewind=2 * (event.step == 8), reason="try again")

        seen = []

        def observe(state, event: fx.Rewound, control):
            if isinstance(event, fx.Rewound):
                seen.append(event.to_step)

        fx.fit(
            problem.start(),
            problem.step(),
            problem.data(),
            steps=9,
            callbacks=[rewind_once, fx.when(fx.every(2), fx.callbacks.save())],
            checkpointer=fx.checkpointer(tmp_path, keep=None, background=False),
            observers=[observe],
            rewind_limit=0,
        )
        assert seen == [4]
