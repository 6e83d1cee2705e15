"""Runs Python code in several processes that are the ranks of one run, as torchrun does."""

import datetime
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import torch.distributed as dist

from tests import processes

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = datetime.timedelta(seconds=60)
ON_GPU = {"CUDA_VISIBLE_DEVICES": "0"}
"""Environment variables of ranks that share a GPU."""


def run(code, size, *, timeout=120, env=None, arguments=(), check=True):
    """Runs ``code`` in ``size`` processes to their end, and returns the result of each.

    Args:
        code: The program, as text. ``tests`` can be imported.
        size: The number of ranks.
        timeout: Seconds after which all processes are killed, and the test fails.
        env: Environment variables to add.
        arguments: Those of the program, after ``sys.argv[0]``.
        check: Whether a rank that fails fails the test, with its errors.
    """
    with started(code, size, env=env, arguments=arguments) as ranks:
        return ranks.results(timeout, check=check)


def started(code, size, *, env=None, arguments=()):
    """Starts the ranks, for tests that send signals. A context manager, which kills what still runs."""
    return Ranks(["-c", code, *arguments], size, env or {})


class Unforked(subprocess.Popen):
    """A Python process with imports of its own, whose output does not block it."""

    def __init__(self, arguments, **options):
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 -- they live as long as the process
        super().__init__([sys.executable, *arguments], stdout=self.files[0], stderr=self.files[1], **options)

    def communicate(self):
        for file in self.files:
            file.seek(0)
        return [file.read() for file in self.files]

    def __exit__(self, *error):
        super().__exit__(*error)
        for file in self.files:
            file.close()


class Ranks:
    """The running processes of one run, by rank."""

    def __init__(self, arguments, size, env):
        # The store outlives the ranks, so they need no free port of their own.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=LIMIT)
        shared = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # ranks on one machine with fewer GPUs are tested on CPUs
            "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            **env,
        }
        on_gpu = bool(shared["CUDA_VISIBLE_DEVICES"])
        kind = Unforked if on_gpu else processes.Process  # a forked process cannot use a GPU
        self.processes = []
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            if on_gpu:
                # NCCL lets ranks share a GPU that call themselves different machines.
                own |= {"LOCAL_RANK": "0", "NCCL_HOSTID": str(rank), "NCCL_SOCKET_IFNAME": "lo"}
            self.processes.append(kind(arguments, env=shared | own, cwd=ROOT))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.__exit__(None, None, None)

    def results(self, timeout=120, *, check=True):
        """Waits for all ranks and returns the result of each, or kills all after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while pending := [rank for rank, process in enumerate(self.processes) if process.poll() is None]:
            failed = check and any(process.poll() not in (None, 0) for process in self.processes)
            if time.monotonic() > deadline or failed:
                # A rank that waits for one that failed says nothing new.
                for process in self.processes:
                    process.kill()
                break
            time.sleep(0.02)
        found = [processes.Done(process.wait(), *process.communicate()) for process in self.processes]
        if check:
            # A negative code is that of a signal, most likely sent above.
            for rank, done in sorted(enumerate(found), key=lambda item: item[1].returncode < 0):
                assert done.returncode == 0, f"rank {rank} ended with {done.returncode}:\n{done.stderr}\n{done.stdout}"
        assert time.monotonic() <= deadline, f"ranks {pending} still ran after {timeout} s"
        return found
