"""Python processes that start in milliseconds: each is forked from a server that has imported torch and fxtrain.

A process has its own streams, environment, folder, signals and exit, and ends like any Python process, exit handlers
included. Only the imports, the hash seed and the thresholds of garbage collection are those of the server. Tests of
these start a process by ``subprocess``.
"""

import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
from typing import NamedTuple

# The first gradient imports torch._dynamo, and the first compiled step the modules of Inductor.
PRELOADED = ["torch._dynamo", "torch._inductor.compile_fx", "torch.utils.data", "fxtrain", "fxtrain.cli"]
COLLECTION = 20_000, 20, 10
"""Thresholds of garbage collection, because tracing and compiling create many objects, of which few are garbage."""
_LENGTH = struct.Struct("I")


class Done(NamedTuple):
    """The result of a process that has ended."""

    returncode: int
    stdout: str
    stderr: str


class Process:
    """A running Python process, with the interface of ``subprocess.Popen``.

    Args:
        arguments: Those of Python: ``["-c", code, ...]``, ``["-m", module, ...]`` or ``[script, ...]``.
        cwd: The folder in which it runs. None means the current one.
        env: Its environment. None means the current one.
        start_new_session: Whether it leads a session and a process group.
    """

    def __init__(self, arguments, *, cwd=None, env=None, start_new_session=False):
        request = json.dumps(
            {
                "arguments": list(map(str, arguments)),
                "cwd": str(cwd or os.getcwd()),
                "env": dict(os.environ if env is None else env),
                "start_new_session": start_new_session,
            }
        ).encode()
        reading, writing = os.pipe()
        report, reported = os.pipe()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- it lives as long as the process
        server = _server()
        socket.send_fds(server, [_LENGTH.pack(len(request))], [writing, self._errors.fileno(), reported])
        server.sendall(request)
        os.close(writing)
        os.close(reported)
        self.stdout, self._report = os.fdopen(reading), os.fdopen(report)
        self.pid, self.returncode = int(self._report.readline()), None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.wait()
        for stream in (self.stdout, self._errors, self._report):
            stream.close()

    def poll(self):
        is_over = self.returncode is not None or select.select([self._report], [], [], 0)[0]
        return self.wait() if is_over else None

    def wait(self, timeout=None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
            self.returncode = int(self._report.readline())
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """Returns the rest of the output and the errors, once no process can write any more."""
        read = []
        reader = threading.Thread(target=lambda: read.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        if reader.is_alive():
            raise TimeoutError(f"process {self.pid} or one of its own still writes after {timeout} s")
        self.wait(timeout)
        self._errors.seek(0)
        return read[0], self._errors.read()


def run(arguments, *, timeout=300, **options):
    """Runs a process to its end, as ``subprocess.run`` does with captured text."""
    with Process(arguments, **options) as process:
        try:
            out, err = process.communicate(timeout)
        finally:
            process.kill()
    return Done(process.wait(), out, err)


@functools.cache
def _server():
    """Starts the server, which ends with this process, and returns the connection to it."""
    ours, its = socket.socketpair()
    subprocess.Popen(
        [sys.executable, __file__, str(its.fileno())],
        pass_fds=[its.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    its.close()
    return ours


def _serve(connection):
    """Starts a process for each request. Returns the program to run, in the process that was started for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        header, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, 3)
        if not header:
            os._exit(0)
        request = json.loads(connection.recv(_LENGTH.unpack(header)[0], socket.MSG_WAITALL))
        if os.fork() == 0:
            connection.close()
            _watch(descriptors[2])
            return _prepared(request, *descriptors[:2])
        for descriptor in descriptors:
            os.close(descriptor)


def _watch(report):
    """Forks the process, and reports its id and its exit code. Returns in the forked process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (child := os.fork()) == 0:
        os.close(report)
        return
    os.write(report, f"{child}\n".encode())
    for descriptor in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    os.closerange(3, report)
    os.closerange(report + 1, 1024)
    _, status = os.waitpid(child, 0)
    os.write(report, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _prepared(request, out, err):
    """Gives the process its streams, session, folder, environment and arguments. Returns the function to call."""
    for descriptor, number in ((out, 1), (err, 2)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if request["start_new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    kind, *rest = request["arguments"]
    if kind == "-m":
        sys.path[0] = request["cwd"]
        sys.argv = rest
        return functools.partial(runpy.run_module, rest[0], run_name="__main__", alter_sys=True)
    if kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        return functools.partial(exec, rest[0], vars(main))
    sys.path[0], sys.argv = os.path.dirname(kind), [kind, *rest]
    return functools.partial(runpy.run_path, kind, run_name="__main__")


if __name__ == "__main__":
    for _name in PRELOADED:
        importlib.import_module(_name)
    gc.set_threshold(*COLLECTION)
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))()
