"""Compiled graphs as files: what is loaded elsewhere, and what is compiled instead."""

import json
import logging
import os
import pathlib
import subprocess
import sys
import time
import warnings

import pytest
import torch
from saved_graphs import BATCH, TX, file_in, loss_fn, make, same, start, steps
from saved_graphs import compiled as compiled  # a fixture
from saved_graphs import folder as folder  # a fixture
from saved_graphs import made as made  # a fixture

import fxtrain as fx
from fxtrain import tree
from fxtrain._torch_internals import interface
from fxtrain.compiler.artefacts import _file as files
from fxtrain.compiler.artefacts import _fingerprint as fingerprint
from fxtrain.compiler.lowering import _trace as traced

needs_inductor = pytest.mark.skipif(sys.platform != "linux", reason="compiles C++")


def evaluated(model, batch):
    return {"loss": model(batch).square().mean()}


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

    @pytest.mark.parametrize(
        "header",
        [
            {"facts": {"torch": "9.9", "processor features": ["avx2", "fma"]}, "time": 1.0},
            {"facts": {"torch": None}, "time": 1.0},
            {"facts": {"torch": "9.9"}, "time": "yesterday"},
            {"facts": {"torch": "9.9"}, "time": 1.0, "seconds": "none"},
        ],
    )
    @pytest.mark.filterwarnings("ignore:.*another environment:UserWarning")
    def test_header_of_another_program_does_not_matter(self, header, tmp_path):
        lines = b"fxtrain compiled graph 1", b"0" * 64, json.dumps({"graph": "0" * 64, "files": [], **header}).encode()
        (tmp_path / f"{'0' * 32}-{'0' * 16}.fxc").write_bytes(b"\n".join([*lines, b""]))
        step = make(tmp_path)
        steps(step, 1)
        assert step.route == "inductor, traced"
        assert len(list(tmp_path.glob("*.fxc"))) == 2

    def test_both_environments_keep_their_files(self, monkeypatch, made, folder, compiled):
        with monkeypatch.context() as patch:
            patch.setattr(fingerprint, "_source_digest", lambda: "other")
            with pytest.warns(UserWarning, match="another environment"):
                steps(make(folder), 1)
        assert same(steps(make(folder)), made[1])
        assert len(compiled) == 1


OTHER_PROCESS = """
import json, sys, torch
torch.set_num_threads({threads})
sys.path.insert(0, {tests!r})
import saved_graphs as here
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
