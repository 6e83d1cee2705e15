"""Compiled graphs as files: what is loaded elsewhere, what is compiled instead, and that no file breaks a run."""

import builtins
import contextlib
import errno
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import tree
from fxtrain._torch_internals import interface
from fxtrain.compiler.artefacts import _file as files
from fxtrain.compiler.artefacts import _fingerprint as fingerprint
from fxtrain.compiler.artefacts import _lease as lease
from fxtrain.compiler.lowering import _trace as traced

TX = fx.optim.sgd(1e-2)
needs_inductor = pytest.mark.skipif(sys.platform != "linux", reason="compiles C++")


def loss_fn(model, batch):
    return model(batch).square().mean()


def evaluated(model, batch):
    return {"loss": model(batch).square().mean()}


def start(width=4):
    torch.manual_seed(0)
    return fx.init(nn.Linear(3, width), TX, seed=0)


BATCH = torch.linspace(-1, 1, 24).view(8, 3)


def make(folder, **options):
    return fx.compile(fx.train_step(loss_fn, TX), artefacts=folder, **options)


def steps(step, count=3, state=None):
    state = start() if state is None else state
    for _ in range(count):
        state, _ = step(state, BATCH)
    return state


def same(first, second):
    return all(map(torch.equal, tree.leaves(first), tree.leaves(second)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the graph of one step, and the state after three of its steps."""
    folder, cache = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("cache", numbered=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
        return folder, steps(make(folder))


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the folder."""
    copy = tmp_path / "artefacts"
    copy.mkdir()
    for path in made[0].glob("*.fxc"):
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """An empty cache, and a compiler that counts its graphs and runs them operation by operation."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    graphs = []

    def compile_graph(graph, *_):
        graphs.append(graph)
        code = f"def call(tensors):\n    return graph{len(graphs)}(*tensors)"
        calls = {"libraries": [], "kernels": {}, "functions": []}
        files = {"code.py": code.encode(), "calls.json": json.dumps(calls).encode()}
        setattr(builtins, f"graph{len(graphs)}", graph)
        return traced.Compiled(lambda tensors: graph(*tensors), lambda: files, {"kernels": 0})

    monkeypatch.setattr(traced, "_compiled_by_inductor", compile_graph)
    yield graphs
    for index in range(len(graphs)):
        delattr(builtins, f"graph{index + 1}")


def file_in(folder):
    (path,) = folder.glob("*.fxc")
    return path


class TestLoading:
    def test_graph_is_loaded_with_the_same_bits(self, made, folder, compiled):
        assert same(steps(make(folder)), made[1])
        assert not compiled

    def test_donating_step_is_another_graph(self, folder, compiled):
        donating = make(folder, donate=True)
        old = start()
        donating(old, BATCH)
        assert len(compiled) == 1
        with pytest.raises(fx.DonatedError):
            _ = old.params

    def test_path_may_be_text(self, made, folder, compiled):
        assert same(steps(make(str(folder))), made[1])
        assert not compiled

    def test_two_steps_share_a_folder(self, made, folder, compiled):
        evaluation = fx.compile(fx.eval_step(evaluated), artefacts=folder)
        evaluation(start(), BATCH)
        assert len(compiled) == 1
        assert len(list(folder.glob("*.fxc"))) == 2
        assert same(steps(make(folder)), made[1])
        assert len(compiled) == 1

    @pytest.mark.parametrize("change", ["width", "optimizer", "loss", "batch"])
    def test_other_graph_is_compiled_without_a_warning(self, folder, compiled, change):
        tx = fx.optim.sgd(2e-2) if change == "optimizer" else TX
        loss = (lambda model, batch: model(batch).abs().mean()) if change == "loss" else loss_fn
        batch = BATCH[:6] if change == "batch" else BATCH
        step = fx.compile(fx.train_step(loss, tx), artefacts=folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(start(5) if change == "width" else start(), batch)
        assert len(compiled) == 1

    def test_background_compilation_loads(self, made, folder, compiled):
        step = make(folder, background=True)
        state, deadline = steps(step, 1), time.monotonic() + 60
        while step.pending and time.monotonic() < deadline:
            state = steps(step, 1, state)
            time.sleep(0.01)
        assert not step.pending
        assert not compiled

    def test_graph_of_this_machine_is_copied_into_the_folder(self, monkeypatch, made, compiled, tmp_path):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(made[0].parent / "cache"))
        steps(make(tmp_path / "other"), 1)
        assert files.read_entry(file_in(tmp_path / "other")).files == files.read_entry(file_in(made[0])).files
        assert not compiled

    def test_graph_of_a_run_is_found_beside_its_checkpoints(self, made, folder, compiled, tmp_path):
        run = tmp_path / "run"
        run.mkdir()
        folder.rename(run / "compiled")

        def train(count):
            step = fx.compile(fx.train_step(loss_fn, TX), artefacts=run / "compiled")
            return fx.fit(
                start(), step, [BATCH], epochs=None, steps=count, checkpointer=fx.checkpointer(run), resume=True
            ).state

        # `fit` donates its state, which makes another graph.
        train(1)
        state = train(3)
        assert int(state.step) == 3
        assert len(compiled) == 1
        assert len(list((run / "compiled").glob("*.fxc"))) == 2

    def test_said_at_level_info(self, folder, compiled, caplog):
        with caplog.at_level(logging.INFO, "fxtrain.compiler"):
            steps(make(folder), 1)
        assert f"Loaded a compiled graph from {folder}" in caplog.text


FACTS = {
    "processor features": ("_processor_features", "avx2 fma"),
    "fxtrain's compiler": ("_source_digest", "0123"),
}


def test_step_that_is_no_traced_graph_says_that_it_is_not_saved(monkeypatch, recwarn, folder):
    monkeypatch.setattr(interface, "NEWEST_TESTED", (2, 1))  # only torch.compile is left
    by_torch = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: by_torch(function, backend="eager"))
    steps(make(folder), 1)
    assert any("cannot be saved in" in str(each.message) and "dynamo" in str(each.message) for each in recwarn)


class TestFingerprint:
    @pytest.mark.parametrize("name", FACTS)
    def test_mismatch_compiles_and_names_both_values(self, monkeypatch, made, folder, compiled, name):
        function, value = FACTS[name]
        before = getattr(fingerprint, function)()
        monkeypatch.setattr(fingerprint, function, lambda: value)
        step = make(folder)
        there = "none only here" if name == "processor features" else f"{value} here, {before} there"
        with pytest.warns(UserWarning, match=rf"{name}: {there}.*It took \d+") as caught:
            steps(step, 1)
        assert len(compiled) == 1
        assert len(caught) == 1

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("threads", lambda patch: patch.setattr(torch, "get_num_threads", lambda: 17)),
            ("torch", lambda patch: patch.setattr(torch, "__version__", "2.0.1")),
            ("Python", lambda patch: patch.setattr(sys.implementation, "cache_tag", "cpython-34")),
            ("platform", lambda patch: patch.setattr(fingerprint.platform, "machine", lambda: "riscv")),
            ("C library", lambda patch: patch.setattr(fingerprint.platform, "libc_ver", lambda: ("musl", "1"))),
            ("vector instructions", lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", str)),
            ("numerics", lambda patch: patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")),
            ("environment variables", lambda patch: patch.setenv("TORCHINDUCTOR_FREEZING", "1")),
        ],
    )
    def test_each_fact_counts(self, monkeypatch, folder, name, change):
        here = fingerprint.environment_facts({torch.device("cpu")})
        change(monkeypatch)
        there = fingerprint.environment_facts({torch.device("cpu")})
        assert [key for key in here if here[key] != there[key]] == [name]
        assert fingerprint.digest(here) != fingerprint.digest(there)
        assert fingerprint.differences(here, there).startswith(f"{name}: ")

    def test_settings_of_inductor_count_if_they_have_an_effect(self, monkeypatch):
        here = fingerprint.environment_facts({torch.device("cpu")})
        with torch._inductor.config.patch(fallback_random=True):
            there = fingerprint.environment_facts({torch.device("cpu")})
        assert fingerprint.differences(here, there) == "Inductor's settings: none here, fallback_random=True there"
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
        with torch._inductor.config.patch(compile_threads=1):
            assert fingerprint.environment_facts({torch.device("cpu")}) == here

    def test_mismatch_is_said_once(self, monkeypatch, folder, compiled):
        monkeypatch.setattr(fingerprint, "_source_digest", lambda: "other")
        step = make(folder)
        with pytest.warns(UserWarning, match="another environment"):
            step(start(), BATCH)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step.fresh()(start(), BATCH)

    def test_both_environments_keep_their_files(self, monkeypatch, made, folder, compiled):
        with monkeypatch.context() as patch:
            patch.setattr(fingerprint, "_source_digest", lambda: "other")
            with pytest.warns(UserWarning, match="another environment"):
                steps(make(folder), 1)
        assert same(steps(make(folder)), made[1])
        assert len(compiled) == 1


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_bytes(b"PK\3\4" * 1000),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "bit of the library": lambda path: flip(path, -500),
    "bit of the header": lambda path: flip(path, 150),
    "bit of the checksum": lambda path: flip(path, 40),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "unreadable": lambda path: (path.unlink(), path.symlink_to("/proc/self/mem")),
    "dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_step_is_compiled(self, folder, compiled, damage):
        DAMAGES[damage](file_in(folder))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps(make(folder))
        assert len(compiled) == 1
        assert any(str(folder) in str(each.message) for each in caught) or damage == "dangling link"

    def test_damaged_file_is_replaced(self, folder, compiled):
        path = file_in(folder)
        flip(path, -500)
        with pytest.warns(UserWarning, match=r"is damaged.*compiled, and the file is replaced"):
            steps(make(folder), 1)
        assert files.read_entry(path).header["kernels"] == 0

    def test_file_of_another_graph_under_this_name(self, folder, compiled, tmp_path):
        path = file_in(folder)
        entry = files.read_entry(path)
        files.write_entry(path, entry._replace(header={**entry.header, "graph": "0" * 64}))
        with pytest.warns(UserWarning, match="another graph"):
            steps(make(folder), 1)
        assert len(compiled) == 1

    def test_library_that_cannot_be_loaded(self, folder, compiled):
        path = file_in(folder)
        entry = files.read_entry(path)
        broken = {name: b"no library" if name.endswith(".so") else content for name, content in entry.files.items()}
        files.write_entry(path, entry._replace(files=broken))
        with pytest.warns(UserWarning, match="cannot be loaded"):
            steps(make(folder), 1)
        assert len(compiled) == 1

    def test_extracted_library_is_verified(self, made, folder, compiled, tmp_path):
        steps(make(folder), 1)
        for path in (tmp_path / "cache").rglob("*.so"):
            content = path.read_bytes()
            path.unlink()  # this process has mapped it
            path.write_bytes(content[:100])
        assert same(steps(make(folder)), made[1])

    def test_code_that_raises(self, folder, compiled):
        path = file_in(folder)
        entry = files.read_entry(path)
        files.write_entry(path, entry._replace(files={**entry.files, "code.py": b"call = 1 / 0"}))
        with pytest.warns(UserWarning, match="ZeroDivisionError"):
            steps(make(folder), 1)
        assert len(compiled) == 1


class TestFolder:
    def test_file_is_refused(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("")
        with pytest.raises(ValueError, match=r"expected artefacts to be a folder, got the file .*file"):
            make(path)

    @pytest.mark.parametrize("options", [{"backend": "eager"}, {"dynamic": True}])
    def test_options_that_exclude_it(self, tmp_path, options):
        with pytest.raises(ValueError, match="expected artefacts without backend and dynamic"):
            make(tmp_path, **options)

    def test_folder_is_created_with_its_first_graph(self, compiled, tmp_path):
        step = make(tmp_path / "deep" / "folder")
        assert not (tmp_path / "deep").exists()
        steps(step, 1)
        assert file_in(tmp_path / "deep" / "folder").stat().st_mode & 0o044
        assert not list((tmp_path / "deep" / "folder").glob("*.lease"))

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
    def test_run_goes_on_if_nothing_can_be_written(self, monkeypatch, compiled, tmp_path, number):
        def fail(*_, **__):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(files.tempfile, "mkstemp", fail)
        with pytest.warns(UserWarning, match=f"cannot be saved.*{os.strerror(number)}"):
            steps(make(tmp_path / "full"))
        assert len(compiled) == 1

    def test_disk_that_fills_while_writing_leaves_no_file(self, monkeypatch, compiled, tmp_path):
        def fail(handle):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", fail)
            with pytest.warns(UserWarning, match="No space left"):
                steps(make(tmp_path / "full"), 1)
        assert not list((tmp_path / "full").iterdir())

    def test_graph_is_read_from_a_read_only_folder(self, made, folder, compiled):
        folder.chmod(0o555)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert same(steps(make(folder)), made[1])
        finally:
            folder.chmod(0o755)
        assert not compiled

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_kill_while_writing_leaves_the_old_file(self, tmp_path, call):
        path = tmp_path / "x.fxc"
        files.write_entry(path, files.Entry({"old": 1}, {"a": b"old"}))
        child = os.fork()
        if not child:
            setattr(files.os, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            files.write_entry(path, files.Entry({"new": 1}, {"a": b"new" * 10**6}))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert files.read_entry(path) == files.Entry({"old": 1}, {"a": b"old"})
        (left,) = set(tmp_path.iterdir()) - {path}
        os.utime(left, (0, 0))
        files.write_entry(path, files.Entry({}, {"a": b"newer"}))
        assert set(tmp_path.iterdir()) == {path}

    def test_graph_that_cannot_be_saved_is_compiled_with_a_warning(self, compiled, tmp_path):
        @torch.library.custom_op("artefacts_test::twice", mutates_args=())
        def twice(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        twice.register_fake(torch.empty_like)
        step = fx.compile(fx.eval_step(lambda model, batch: {"x": twice(batch).sum()}), artefacts=tmp_path / "none")
        with pytest.warns(
            UserWarning, match=r"cannot be saved in .*none, because it calls the operator artefacts_test"
        ):
            step(start(), BATCH)
        assert not (tmp_path / "none").exists()


class TestLease:
    @pytest.mark.parametrize("turn", [lease.turn, lease.local_turn])
    def test_one_compiles_for_all(self, turn, tmp_path):
        done, entered, begun = tmp_path / "done", [], threading.Barrier(5)

        def work():
            begun.wait()
            with turn(tmp_path / "x.lease", done.exists, lambda: None):
                if not done.exists():
                    entered.append(threading.get_ident())
                    time.sleep(0.3)
                    done.touch()

        threads = [threading.Thread(target=work) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(entered) == 1
        assert not (tmp_path / "x.lease").exists()

    def test_killed_holder_on_this_machine_is_followed_at_once(self, tmp_path):
        path = tmp_path / "x.lease"
        code = (
            "import pathlib, sys, time\n"
            "from fxtrain.compiler.artefacts._lease import local_turn\n"
            "with local_turn(pathlib.Path(sys.argv[1]), lambda: False, lambda: None):\n"
            "    print('holds', flush=True)\n"
            "    time.sleep(600)\n"
        )
        waits, entered = threading.Event(), threading.Event()

        def work():
            with lease.local_turn(path, lambda: False, waits.set):
                entered.set()

        with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout.readline() == "holds\n"
            thread = threading.Thread(target=work)
            thread.start()
            assert waits.wait(30)
            assert not entered.is_set()
            holder.kill()
            holder.wait()
            assert entered.wait(30)
            thread.join()
        assert not path.exists()

    def test_dead_holder_does_not_hang_others(self, monkeypatch, tmp_path):
        monkeypatch.setattr(lease, "_DEAD_SECONDS", 0.3)
        (tmp_path / "x.lease").touch()
        waited = []
        with lease.turn(tmp_path / "x.lease", lambda: False, lambda: waited.append(1)):
            assert waited == [1]
        assert not (tmp_path / "x.lease").exists()

    def test_living_holder_keeps_its_lease(self, monkeypatch, tmp_path):
        monkeypatch.setattr(lease, "_DEAD_SECONDS", 0.5)
        monkeypatch.setattr(lease, "_BEAT_SECONDS", 0.1)
        monkeypatch.setattr(lease, "_MAX_WAIT_SECONDS", 1.5)
        path = tmp_path / "x.lease"
        with lease.turn(path, lambda: False, lambda: None):
            began = time.monotonic()
            with lease.turn(path, lambda: False, lambda: None):
                # The wait is bounded, and the second process does not take the lease.
                assert time.monotonic() - began > 1.4
            assert path.exists()

    @pytest.mark.parametrize("turn", [lease.turn, lease.local_turn])
    def test_failed_holder_lets_another_compile(self, turn, tmp_path):
        path = tmp_path / "x.lease"
        with contextlib.suppress(ZeroDivisionError), turn(path, lambda: False, lambda: None):
            raise ZeroDivisionError
        with turn(path, lambda: False, lambda: pytest.fail("waits")):
            pass

    @pytest.mark.parametrize("turn", [lease.turn, lease.local_turn])
    def test_folder_without_leases_is_entered_by_all(self, turn, tmp_path):
        (tmp_path / "file").touch()
        with turn(tmp_path / "file" / "x.lease", lambda: False, lambda: pytest.fail("waits")):
            pass

    def test_lease_that_cannot_be_removed(self, monkeypatch, tmp_path):
        monkeypatch.setattr(lease, "_DEAD_SECONDS", 0.2)
        (tmp_path / "x.lease").mkdir()
        with lease.turn(tmp_path / "x.lease", lambda: False, lambda: None):
            pass
        assert (tmp_path / "x.lease").is_dir()


OTHER_PROCESS = """
import json, sys, torch
torch.set_num_threads({threads})
sys.path.insert(0, {tests!r})
import test_artefacts as here
from fxtrain.compiler.lowering import _trace

def refuse(*_):
    raise SystemExit("compiled")

_trace.compile_graph = refuse
state = here.steps(here.make({folder!r}))
assert "torch._inductor.lowering" not in sys.modules, "imported Inductor"
print(here.same(state, torch.load({expected!r}, weights_only=False)))
"""


@needs_inductor
@pytest.mark.slow
def test_other_process_with_an_empty_cache_compiles_nothing(made, tmp_path):
    folder, expected = made
    torch.save(tree.leaves(expected), tmp_path / "expected.pt")
    code = OTHER_PROCESS.format(
        tests=str(pathlib.Path(__file__).parent),
        threads=torch.get_num_threads(),
        folder=str(folder),
        expected=str(tmp_path / "expected.pt"),
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert found.stdout.strip() == "True", found.stderr


@needs_inductor
@pytest.mark.slow
def test_library_made_ahead_of_time_is_loaded(monkeypatch, tmp_path):
    step = fx.eval_step(evaluated)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "first"))
    wanted = fx.compile(step, mode="ahead-of-time", artefacts=tmp_path / "made")(start(), BATCH)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "second"))
    monkeypatch.setattr(traced, "compile_ahead", lambda *_: pytest.fail("compiles"))
    found = fx.compile(step, mode="ahead-of-time", artefacts=tmp_path / "made")(start(), BATCH)
    assert torch.equal(found.metrics["loss"], wanted.metrics["loss"])
