"""Commands in several processes: one run, printed once, which one process can continue."""

import json
import pathlib
import signal
import sys

import pytest

import fxtrain as fx
from fxtrain.cli import main
from tests import ranks
from tests.trainings import CONFIG, MODULE

SHAPE = ["--batch-size", "8", "--length", "16", "--layers", "1", "--width", "16", "--heads", "2", "--dropout", "0.1"]
OPTIONS = ["--no-compile", "--eval-interval", "10", "--snapshot-interval", "5", "--steps", "40"]
SHARDED = """
import dataclasses
import sys
import fxtrain as fx
from fxtrain.cli import main

shard = fx.shard

def shard_small(state, mesh, layout):
    state = shard(state, mesh, dataclasses.replace(layout, least=64))
    kinds = [type(leaf).__name__ for leaf in state.params.values()]
    print(f"{kinds.count('Shard')} of {len(kinds)} split among {mesh.size} processes", file=sys.stderr)
    return state

fx.shard = shard_small
sys.exit(main(sys.argv[1:]))
"""
PROGRAM = "import sys\nfrom fxtrain.cli import main\nsys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text("".join(pathlib.Path(module.__file__).read_text() for module in (json, pathlib)))
    return str(path)


def bits(folder):
    return json.loads((folder / "result.json").read_text())["bits_per_byte"]["this model"]


def only(folder):
    (run,) = folder.iterdir()
    return run


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """The folder of a run in one process."""
    runs = tmp_path_factory.mktemp("alone")
    assert main(["lm", "--dataset", text, "--runs", str(runs), *SHAPE, *OPTIONS]) == 0
    return only(runs)


def test_two_processes_train_like_one_and_print_once(text, alone, tmp_path):
    arguments = ["lm", "--dataset", text, "--runs", str(tmp_path), "--parallel", "ddp", *SHAPE, *OPTIONS]
    first, second = ranks.run(PROGRAM, 2, arguments=arguments)
    assert second.stdout == ""
    assert first.stdout.count("corpus ") == 1
    assert "2 processes" in first.stdout
    assert "torchrun --standalone --nproc-per-node 2 -m fxtrain lm --resume" in first.stdout
    run = only(tmp_path)
    assert abs(bits(run) - bits(alone)) < 1e-3
    assert len(list(run.iterdir())) == len(list(alone.iterdir()))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


@pytest.mark.slow
def test_sharded_processes_train_like_one_and_one_continues_them(text, alone, tmp_path):
    arguments = ["lm", "--dataset", text, "--runs", str(tmp_path), "--parallel", "fsdp", *SHAPE, *OPTIONS]
    first, second = ranks.run(SHARDED, 2, arguments=[*arguments, "--early-stopping"], timeout=240)
    assert second.stdout == ""
    assert "split among 2 processes" in first.stderr
    assert "sample" in first.stdout
    run = only(tmp_path)
    assert abs(bits(run) - bits(alone)) < 1e-3
    assert fx.checkpointer(run / "checkpoints").latest() == 40
    with pytest.warns(UserWarning, match="ranks: 2 at the save, 1 now"):
        assert main(["lm", "--resume", str(run), "--parallel", "none"]) == 0
    assert abs(bits(run) - bits(alone)) < 1e-3


def test_one_process_continues_an_interrupted_run_of_two(text, alone, tmp_path, capsys):
    arguments = ["lm", "--dataset", text, "--runs", str(tmp_path), "--parallel", "ddp", *SHAPE, *OPTIONS]
    with ranks.started(PROGRAM, 2, arguments=arguments) as started:
        for line in started.processes[0].stdout:
            if line.startswith("step 10 "):
                break
        started.processes[1].send_signal(signal.SIGTERM)
        results = started.results(60, check=False)
    assert [done.returncode for done in results] == [128 + signal.SIGTERM] * 2, results
    run = only(tmp_path)
    assert 10 <= fx.checkpointer(run / "checkpoints").latest() < 40
    assert main(["lm", "--resume", str(run)]) == 2
    assert "To continue a run in one process, add --parallel none." in capsys.readouterr().err
    with pytest.warns(UserWarning, match="ranks: 2 at the save, 1 now"):
        assert main(["lm", "--resume", str(run), "--parallel", "none"]) == 0
    assert abs(bits(run) - bits(alone)) < 1e-3


@pytest.mark.slow
def test_two_processes_with_one_model_train_like_one_and_one_continues_them(text, alone, tmp_path):
    arguments = ["lm", "--dataset", text, "--runs", str(tmp_path), "--parallel", "tp", *SHAPE, *OPTIONS]
    first, second = ranks.run(PROGRAM, 2, arguments=arguments, timeout=240)
    assert second.stdout == ""
    assert "2 processes" in first.stdout
    assert "sample" in first.stdout
    run = only(tmp_path)
    assert abs(bits(run) - bits(alone)) < 1e-3
    with pytest.warns(UserWarning, match="ranks: 2 at the save, 1 now"):
        assert main(["lm", "--resume", str(run), "--parallel", "none"]) == 0
    assert abs(bits(run) - bits(alone)) < 1e-3


def test_heads_that_processes_do_not_divide_are_refused(text, tmp_path):
    arguments = ["lm", "--dataset", text, "--runs", str(tmp_path), "--parallel", "tp", *SHAPE, "--heads", "1"]
    first, second = ranks.run(PROGRAM, 2, arguments=arguments, check=False)
    assert (first.returncode, second.returncode) == (2, 2)
    assert "expected --heads to be a multiple of the 2 processes with --parallel tp, got 1." in first.stderr
    assert second.stderr == ""
    assert not list(tmp_path.iterdir())


def test_processes_that_would_train_alone_are_refused(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["lm", "--dataset", text, "--runs", str(tmp_path)]) == 2
    assert "expected --parallel ddp, fsdp or tp in 2 processes, got none" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(["lm", "--dataset", text, "--runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err == ""


def test_one_process_with_ddp_is_refused(text, tmp_path, capsys):
    assert main(["lm", "--dataset", text, "--runs", str(tmp_path), "--parallel", "ddp"]) == 2
    assert "torchrun --standalone --nproc-per-node 2 -m fxtrain lm --parallel ddp" in capsys.readouterr().err


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder with the package of ``trainings`` and its configuration, which is the current one."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.py").write_text(MODULE + FUNCTIONS)
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


FUNCTIONS = """
def shared(steps: int = 20):
    mesh, tx = fx.distributed.mesh(), fx.optim.adamw(0.1)
    step = fx.train_step(loss_fn, tx, mesh=mesh)
    data = fx.data.batches(load(), 16)
    return dict(state=fx.init(Net(), tx, seed=0), step=step, data=data, steps=steps, mesh=mesh)
"""


def trained(shop, *arguments, check=True):
    """Runs ``fxtrain train`` in two processes."""
    env = {"PYTHONPATH": f"{ranks.ROOT}:{shop}"}
    program = f"import os\nos.chdir({str(shop)!r})\n{PROGRAM}"
    return ranks.run(program, 2, arguments=["train", *arguments], env=env, check=check)


def losses(folder, metric="eval/loss"):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["metrics"][metric] for line in lines if metric in line.get("metrics", ())]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_configuration_trains_in_two_processes_and_one_continues_it(shop, parallel):
    width = "model.shop.Net.width=32768"  # from which a parameter is split
    assert main(["train", "run.yaml", width, "--runs", "alone"]) == 0
    first, second = trained(shop, "run.yaml", width, f"parallel={parallel}", "epochs=2")
    assert second.stdout == ""
    run = only(shop / "runs")
    assert f"torchrun --standalone --nproc-per-node 2 -m fxtrain train --resume runs/{run.name}" in first.stdout
    assert losses(run) == pytest.approx(losses(only(shop / "alone"))[:2], rel=1e-4)
    with pytest.warns(UserWarning, match="ranks: 2 at the save, 1 now"):
        assert main(["train", "--resume", str(run), "parallel=none", "epochs=3"]) == 0
    assert losses(run) == pytest.approx(losses(only(shop / "alone")), rel=1e-4)


def test_a_configuration_splits_the_modules_of_a_plan(shop):
    model = "model={Sequential: [{Linear: [2, 8]}, {Tanh: {}}, {Linear: [8, 2]}]}"
    assert main(["train", "run.yaml", model, "--runs", "alone"]) == 0
    first, _ = trained(shop, "run.yaml", model, "parallel=tp", "plan={'0': column, '2': row}")
    assert "finished 3 epochs" in first.stdout
    assert losses(only(shop / "runs")) == pytest.approx(losses(only(shop / "alone")), rel=1e-4)


def test_a_function_with_a_mesh_trains_in_two_processes(shop):
    assert main(["train", "shop:shared", "--runs", "alone"]) == 0
    first, second = trained(shop, "shop:shared")
    assert "reached 20 steps" in first.stdout
    assert second.stdout == ""
    alone, both = (losses(only(shop / name), "train/loss") for name in ("alone", "runs"))
    assert both == pytest.approx(alone, rel=1e-4)


def test_a_function_without_a_mesh_is_refused_in_two_processes(shop):
    first, second = trained(shop, "shop:baseline", check=False)
    assert (first.returncode, second.returncode) == (2, 2)
    assert "to return the arguments of fxtrain.fit with a mesh in 2 processes, got none" in first.stderr
    assert second.stderr == ""
    assert not (shop / "runs").exists()


@pytest.mark.parametrize(
    ("processes", "change", "message"),
    [
        ("2", "parallel=none", "expected parallel=ddp, fsdp or tp in 2 processes, got none"),
        ("1", "parallel=ddp", "torchrun --standalone --nproc-per-node 2 -m fxtrain train run.yaml parallel=ddp"),
        (
            "1",
            "plan={layers.0: column}",
            "expected a plan with parallel=tp and only then, got parallel=none and a plan",
        ),
        ("1", "parallel=dpp", "parallel"),
    ],
)
def test_configurations_that_do_not_fit_the_processes_are_refused(
    shop, processes, change, message, capsys, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", processes)
    assert main(["train", "run.yaml", change]) == 2
    assert message in capsys.readouterr().err
    assert not (shop / "runs").exists()
