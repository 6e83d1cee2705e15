"""Whole runs of several ranks: they decide alike, end together, and any number of ranks continues them."""

import contextlib
import json
import os
import random
import signal
import time
import warnings

import psutil
import pytest
import torch.distributed as dist

import fxtrain as fx
from tests import processes, rank_runs, ranks

CHECKS = [
    "equals_one_process",
    "each_row_is_read_once",
    "other_numbers_of_ranks_continue",
    "another_batch_on_any_rank_is_noticed",
    "data_of_unknown_length",
    "data_that_ends_on_one_rank",
    "rewinds_in_memory_and_from_checkpoints",
    "rank_zero_keeps_the_time",
    "different_states_are_refused",
    "forgotten_mesh_of_the_step_is_found",
    "error_of_a_callback_ends_all_ranks",
    "error_of_all_ranks_is_that_of_each",
    "error_of_the_data_ends_all_ranks",
    "error_in_an_evaluation_ends_all_ranks",
    "error_of_a_save_ends_all_ranks",
    "callbacks_that_depend_on_the_rank_are_found",
    "saves_are_seen_at_the_same_step",
    "steps_yield_the_same_events",
    "warnings_are_those_of_rank_zero",
    "evaluate_is_that_of_all_rows",
]


def program(call):
    return f"from tests import rank_programs\nrank_programs.{call}"


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(checked, name):
    checked(name, "rank_runs", CHECKS, timeout=120, collective_timeout=30)


def ended(started, timeout=60):
    """Waits for all ranks, and returns the result of each."""
    return started.results(timeout, check=False)


def when_ready(started, rank):
    """Waits for "ready" on the output of a rank."""
    for line in started.processes[rank].stdout:
        if line == "ready\n":
            return
    raise AssertionError(f"rank {rank} ended without a signal:\n{started.processes[rank].communicate()[1]}")


def last_line(done):
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of a run that nothing interrupts."""
    call = f"interrupted({str(tmp_path_factory.mktemp('whole') / 'run')!r}, '')"
    return last_line(ranks.run(program(call), 2, env={"STEPS": "60"})[0])


@pytest.mark.parametrize(
    ("number", "receiver", "where"),
    [(signal.SIGTERM, 0, "step"), (signal.SIGTERM, 1, "step"), (signal.SIGINT, 1, "evaluation")],
)
def test_signal_on_one_rank_ends_all_at_the_same_step(tmp_path, whole, number, receiver, where):
    folder = str(tmp_path / "run")
    env = {"STEPS": "60"}
    with ranks.started(program(f"interrupted({folder!r}, {where!r})"), 2, env=env) as started:
        when_ready(started, receiver)
        started.processes[receiver].send_signal(number)
        results = ended(started)
    assert [done.returncode for done in results] == [128 + number] * 2, [done.stderr for done in results]
    steps = [last_line(done)[0] for done in results]
    assert steps[0] == steps[1]
    assert last_line(results[0])[1:] == last_line(results[1])[1:]
    assert last_line(results[1])[1] == f"interrupted by {number.name}"
    assert fx.checkpointer(folder).latest() == steps[0] < 60
    assert not any("Traceback" in done.stderr for done in results)
    if where == "step":
        resumed = ranks.run(program(f"interrupted({folder!r}, '')"), 2, env=env)
        assert last_line(resumed[0]) == last_line(resumed[1]) == whole


def test_run_continues_with_any_number_of_ranks(tmp_path):
    folder = str(tmp_path / "run")
    for size, steps in ((2, 6), (4, 13), (2, 17)):
        done = ranks.run(program(f"interrupted({folder!r}, '')"), size, env={"STEPS": str(steps)})
        assert [last_line(each)[0] for each in done] == [steps] * size
        assert sum("UserWarning" in each.stderr for each in done) == int(steps > 6)
    with pytest.warns(UserWarning, match="ranks: 2 at the save, 1 now"):
        last = rank_runs.fit(None, steps=22, checkpointer=fx.checkpointer(folder), resume=True)
    rank_runs.assert_close(last.state, rank_runs.fit(None, steps=22).state)


def test_signal_that_kills_the_workers_of_a_rank_ends_all_ranks(tmp_path):
    folder = str(tmp_path / "run")
    with ranks.started(program(f"interrupted({folder!r}, 'workers')"), 2) as started:
        when_ready(started, 1)
        process = psutil.Process(started.processes[1].pid)
        for each in [*process.children(recursive=True), process]:
            each.send_signal(signal.SIGTERM)
        results = ended(started)
    assert [done.returncode for done in results] == [128 + signal.SIGTERM] * 2, [done.stderr for done in results]
    steps = [last_line(done)[0] for done in results]
    assert steps[0] == steps[1] == fx.checkpointer(folder).latest() >= 7


@pytest.mark.parametrize("rank", [0, 1])
def test_hung_rank_ends_the_other_within_the_timeout(rank):
    with ranks.started(program(f"hanging({rank})"), 2) as started:
        other = started.processes[1 - rank]
        assert other.wait(30) == 1
        errors = other.communicate(5)[1]
    assert "LostRankError: expected all 2 ranks to join the all-reduce of agreement of ranks at step 4" in errors
    assert f"within 3 s, got an error on rank {1 - rank}" in errors


def test_killed_rank_ends_the_other():
    with ranks.started(program("killed(1)"), 2) as started:
        began = time.monotonic()
        assert started.processes[1].wait(30) == -signal.SIGKILL
        assert started.processes[0].wait(10) == 1
        assert time.monotonic() - began < 30
        assert "LostRankError" in started.processes[0].communicate(5)[1]


def restarted(folder, kills, machines=1):
    """Runs a job of two ranks that torchrun restarts after each kill.

    Args:
        folder: Of the checkpoints.
        kills: The rank and the step of each kill.
        machines: The number of torchruns, one on each machine.

    Returns:
        The number of kills, and the final state.
    """
    counts = ["--nproc-per-node", str(2 // machines), "--max-restarts", str(len(kills)), "--monitor-interval", "0.1"]
    job = ["-m", "tests.rank_programs", str(folder), json.dumps(kills)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ranks.ROOT),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(machines - 1),
    }
    with contextlib.ExitStack() as closing:
        if machines == 1:
            place = ["--standalone"]
        else:
            # Each machine connects to the store of one of them.
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            conf = ["--rdzv-conf", "is_host=0,join_timeout=60,last_call_timeout=2"]
            place = ["--nnodes", str(machines), "--rdzv-backend", "c10d", "--rdzv-id", "job", *conf]
            place += ["--rdzv-endpoint", f"127.0.0.1:{store.port}"]
        command = ["-m", "torch.distributed.run", *place, *counts, *job]
        options = {"cwd": ranks.ROOT, "env": environment, "start_new_session": True}
        agents = [closing.enter_context(processes.Process(command, **options)) for _ in range(machines)]
        try:
            codes = [agent.wait(240) for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
        assert codes == [0] * machines, "\n".join("".join(agent.communicate(10)) for agent in agents)
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return restarted(tmp_path_factory.mktemp("undisturbed"), [])[1]


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(2))
def test_job_that_is_killed_and_restarted_ends_bitwise_like_an_undisturbed_one(tmp_path, undisturbed, trial):
    chance = random.Random(trial)
    kills = [(chance.randrange(2), chance.randrange(1, 30)) for _ in range(2)]
    attempts, state = restarted(tmp_path, kills)
    assert attempts == 2, kills
    assert state == undisturbed, kills


@pytest.mark.slow
@pytest.mark.parametrize("kills", [[], [(1, 13)]])
def test_job_on_two_machines_ends_bitwise_like_that_on_one(tmp_path, undisturbed, kills):
    """Each machine has its own torchrun, and one rank. After a kill on one of them, both restart theirs."""
    assert restarted(tmp_path, kills, machines=2) == [len(kills), undisturbed]


@pytest.mark.parametrize("rank", [0, 1])
def test_error_inside_a_step_of_one_rank_ends_the_other(rank):
    began = time.monotonic()
    results = ranks.run(program(f"failing_in_a_step({rank})"), 2, timeout=60, check=False)
    assert [done.returncode for done in results] == [1, 1]
    assert "ValueError: a bad value" in results[rank].stderr
    assert (
        "LostRankError: expected all 2 ranks to join the collectives of the training step" in results[1 - rank].stderr
    )
    assert "at step 3" in results[1 - rank].stderr
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("rank", "number"), [(0, 1), (0, 3), (0, 5), (0, 7), (0, 9), (0, 12), (1, 1), (1, 3)])
def test_rank_killed_in_a_save_loses_no_reported_checkpoint(tmp_path, rank, number):
    folder = str(tmp_path / "run")
    call = program(f"killed_in_a_save({folder!r}, {rank}, {number})")
    results = ranks.run(call, 2, timeout=60, check=False)
    assert results[rank].returncode == -signal.SIGKILL, results[rank]
    assert results[1 - rank].returncode == 1
    reported = [int(line.split()[1]) for done in results for line in done.stdout.splitlines()]
    saved = fx.checkpointer(folder).steps()
    assert set(reported) <= set(saved) <= set(range(4, 13))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the number of ranks differs
        resumed = rank_runs.fit(None, steps=12, checkpointer=fx.checkpointer(folder), resume=True)
    rank_runs.assert_close(resumed.state, rank_runs.fit(None, steps=12).state)
