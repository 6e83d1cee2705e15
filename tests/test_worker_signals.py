"""Signals to a run with data worker processes, sent to the main process or to its process group."""

import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import processes
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fxtrain as fx
from fxtrain.data import from_loader

PROGRAM = pathlib.Path(__file__).with_name("worker_run.py")
# Far longer than a shutdown, and far shorter than a hang. A signal waits for the batch of a generator, and the first
# batch for spawned workers to import torch. With three such runs on two cores, that took 11 s.
SECONDS = 120
GRACE = 5  # for helpers of multiprocessing to exit after their parent, on a busy machine


def members(session):
    """Returns the running processes of a session."""
    found = []
    for folder in pathlib.Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(of) == session and state != "Z":
                found.append(folder.name)
    return found


def lasting(session):
    """Returns the processes of a session that still run after the grace period."""
    until = time.monotonic() + GRACE
    while (left := members(session)) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def end(tmp_path, method, where, kind, number, *, group):
    """Sends a signal when the program is ready, and checks that it saves and exits."""
    arguments = [PROGRAM, tmp_path / "run", method, where, kind]
    with processes.Process(arguments, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == "ready\n", process.communicate()
            time.sleep(0.05)  # the program enters the call in which the signal finds it
            (os.killpg if group else os.kill)(process.pid, number)
            out, err = process.communicate(timeout=SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, out) == (128 + number, f"interrupted by {number.name}\n"), err
    assert not lasting(process.pid)
    assert fx.checkpointer(tmp_path / "run").steps()


@pytest.mark.parametrize("where", ["step", "wait"])
def test_signal_to_the_group_saves_and_exits(tmp_path, where):
    end(tmp_path, "fork", where, "plain", signal.SIGTERM, group=True)


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
KINDS = ["plain", "persistent", "prefetched", "stateful", "nested"]
WHERE = ["step", "wait", "evaluation", "start"]


def pairwise(*parameters):
    """Returns combinations of values in which every two values of different parameters occur together."""

    def pairs(values):
        return set(itertools.combinations(enumerate(values), 2))

    combinations = list(itertools.product(*parameters))
    left, chosen = set().union(*map(pairs, combinations)), []
    while left:
        chosen.append(max(combinations, key=lambda values: len(pairs(values) & left)))
        left -= pairs(chosen[-1])
    return chosen


# Workers that are not forked start slowly, so those that are come first and fill the other pairs.
COMBINATIONS = pairwise(["fork", "spawn", "forkserver"], WHERE, KINDS, SIGNALS, [True, False])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "where", "kind", "number", "group"), COMBINATIONS)
def test_signal_to_a_run_with_workers_saves_and_exits(tmp_path, method, where, kind, number, group):
    end(tmp_path, method, where, kind, number, group=group)


class Hanging(Dataset):
    """Returns the examples of the first batch immediately, and hangs on all others."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index >= 2:
            time.sleep(1000)
        return torch.tensor(float(index))


@pytest.mark.parametrize("persistent", [False, True])
def test_close_terminates_hanging_workers(persistent):
    data = from_loader(DataLoader(Hanging(), 2, num_workers=2, persistent_workers=persistent))
    assert data[0].equal(torch.tensor([0.0, 1.0]))
    workers = multiprocessing.active_children()
    assert len(workers) >= 2
    began = time.monotonic()
    data.close()
    assert time.monotonic() - began < 6
    assert not any(worker.is_alive() for worker in workers)


UNENDED = """
import sys, time, torch
from torch.utils.data import DataLoader, IterableDataset
from fxtrain.data import from_loader

class Hanging(IterableDataset):
    def __iter__(self):
        yield torch.ones(1)
        time.sleep(1000)

loader = DataLoader(Hanging(), 1, num_workers=2, persistent_workers=True)
data = from_loader(loader)
data[0]
sys.exit(3)
"""


def test_hanging_workers_do_not_block_process_exit():
    ended = processes.run(["-c", UNENDED], timeout=SECONDS)
    assert (ended.returncode, ended.stderr) == (3, "")


def test_loader_settings_and_signal_mask_are_unchanged():
    loader = DataLoader(Hanging(), 2, num_workers=1)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    data = from_loader(loader)
    data[0]
    assert loader.worker_init_fn is None
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    data.close()


SAVING = """
import os, stat, sys, time, torch, fxtrain as fx

def slow(descriptor):
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        print("writing", flush=True)
        time.sleep(60)

os.fsync = slow
tx = fx.optim.sgd(0.1)
step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
state = fx.init(torch.nn.Linear(1, 1), tx)
print("lost without a flush", end="")
try:
    result = fx.fit(
        state,
        step,
        [torch.ones(4, 1)],
        steps=10**9,
        callbacks=fx.when(fx.at(3), fx.callbacks.save()),
        checkpointer=fx.checkpointer(sys.argv[1]),
    )
except BaseException as error:
    print(repr(error))
    raise
sys.exit(result.exit_code)
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_ctrl_c_does_not_wait_for_a_save(tmp_path, first):
    with processes.Process(["-c", SAVING, tmp_path]) as process:
        try:
            assert process.stdout.readline().endswith("writing\n")
            process.send_signal(first)
            time.sleep(0.3)
            assert process.poll() is None  # the first signal waits for the save
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT, err  # a shell reports 130
    assert not fx.checkpointer(tmp_path).steps()


SLOW_THREAD = """
import sys, time, torch, fxtrain as fx

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 99

    def __getitem__(self, index):
        if index > 1:
            print("reading", flush=True)
            time.sleep(60)
        return torch.ones(1)

tx = fx.optim.sgd(0.1)
step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
data = fx.data.prefetch(torch.utils.data.DataLoader(Slow(), 2))
checkpoints = fx.checkpointer(sys.argv[1])
sys.exit(fx.fit(fx.init(torch.nn.Linear(1, 1), tx), step, data, steps=9, checkpointer=checkpoints).exit_code)
"""


@pytest.mark.slow
def test_slow_reader_thread_does_not_delay_process_exit(tmp_path):
    with processes.Process(["-c", SLOW_THREAD, tmp_path]) as process:
        try:
            assert process.stdout.readline() == "reading\n"
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert process.returncode == 143, err
    assert fx.checkpointer(tmp_path).steps() in ([0], [1])  # the first step may have waited for the thread


def test_sigchld_handler_of_the_program_is_still_called():
    heard = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: heard.append(number))

    def end_a_child(state, event: fx.StepEnd, control):
        if event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            child = subprocess.Popen([sys.executable, "-c", ""])
            child.wait()

    try:
        tx = fx.optim.sgd(0.1)
        step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        state = fx.init(torch.nn.Linear(1, 1), tx)
        handler = signal.getsignal(signal.SIGCHLD)
        result = fx.fit(state, step, [torch.ones(2, 1)], steps=9, observers=[fx.observers.required(end_a_child)])
        assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert (result.exit_code, heard) == (130, [signal.SIGCHLD])


def test_forked_child_ignores_sigint_and_obeys_sigterm():
    context = multiprocessing.get_context("fork")
    exits = []

    def fork(state, event: fx.StepEnd, control):
        if event.step == 1:
            child = context.Process(target=time.sleep, args=(1000,))
            child.start()
            time.sleep(0.2)
            os.kill(child.pid, signal.SIGINT)
            child.join(0.5)
            exits.append(child.exitcode)
            child.terminate()
            child.join(SECONDS)
            exits.append(child.exitcode)
            child.kill()

    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
    state = fx.init(torch.nn.Linear(1, 1), tx)
    fx.fit(state, step, [torch.ones(2, 1)], steps=2, observers=[fx.observers.required(fork)])
    assert exits == [None, -signal.SIGTERM]


def test_data_error_after_a_signal_still_saves(tmp_path):
    class Interrupted:
        epoch_length = 9

        def __getitem__(self, position):
            if position == 3:
                signal.raise_signal(signal.SIGINT)
                raise EOFError("a pipe was closed")
            return torch.ones(2, 1)

        def snapshot(self, position):
            return torch.zeros(1, dtype=torch.uint8)

        def restore(self, position, snapshot):
            pass

    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
    options = {"steps": 9, "checkpointer": fx.checkpointer(tmp_path)}
    result = fx.fit(fx.init(torch.nn.Linear(1, 1), tx), step, Interrupted(), **options)
    assert (result.exit_code, int(result.state.step)) == (130, 3)
    assert options["checkpointer"].steps() == [3]
