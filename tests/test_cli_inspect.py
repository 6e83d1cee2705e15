"""``fxtrain inspect``: the tree, damage, differences, and paths without a checkpoint."""

import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain.cli import main


def step_once(state):
    tx = fx.optim.adam(0.1)
    step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
    return step(state, torch.ones(2, 3))[0]


@pytest.fixture
def state():
    torch.manual_seed(0)
    return fx.attach(fx.init(nn.Linear(3, 2), fx.optim.adam(0.1)), fx.callbacks.nan_guard())


@pytest.fixture
def run(tmp_path, state):
    """The folder of a run with the checkpoints of two steps."""
    with fx.checkpointer(tmp_path / "run/checkpoints") as checkpoints:
        checkpoints.save(state, metrics={"loss": 0.25})
        checkpoints.save(step_once(state), metrics={"loss": 0.125})
    return tmp_path / "run"


def shown(capsys, *arguments, code=0):
    assert main(["inspect", *map(str, arguments)]) == code
    return capsys.readouterr().out


def checkpoints_in(run):
    return sorted((run / "checkpoints").glob("0*"))


def test_checkpoint_is_shown_as_a_tree(capsys, run):
    lines = shown(capsys, run).splitlines()
    assert any(line.startswith("folder") and line.endswith("has checkpoints of the steps 0, 1") for line in lines)
    assert "step        1" in lines
    assert "metrics     loss 0.1250" in lines
    assert any(line.startswith("integrity   intact: the checksums of ") for line in lines)
    assert any(line.startswith("slots       nan_guard") for line in lines)
    assert "state.step  int64 []" in lines
    assert "state.params  2 leaves, 32 B" in lines
    assert "  ['weight']  float32 [2, 3]" in lines
    assert any(line.startswith("state.slots['nan_guard']") for line in lines)


def test_run_folder_of_checkpoints_and_checkpoint_are_accepted(capsys, run):
    newest = checkpoints_in(run)[-1]
    assert shown(capsys, run) == shown(capsys, run / "checkpoints") == shown(capsys, newest)
    assert "step        0" in shown(capsys, checkpoints_in(run)[0])


def test_tree_without_a_state_is_shown(capsys, tmp_path):
    path = fx.save(tmp_path / "tree", {"a": torch.zeros(2), "b": [torch.ones(3, dtype=torch.int8)]})
    out = shown(capsys, path)
    assert "step        none" in out
    assert "tree  2 leaves, 11 B\n  ['a']     float32 [2]\n  ['b'][0]  int8 [3]\n" in out


def flip(path, index):
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)


def test_damaged_leaf_is_named_and_sets_the_exit_code(capsys, tmp_path):
    path = fx.save(tmp_path / "tree", {"a": torch.zeros(2), "b": torch.zeros(3)})
    flip(path / "leaves.bin", -1)
    out = shown(capsys, path, code=1)
    assert "integrity   damaged: 1 leaf of 2, marked below. Restore another one." in out
    assert [line for line in out.splitlines() if line.endswith("  damaged")] == ["  ['b']  float32 [3]  damaged"]
    assert "integrity   not verified" in shown(capsys, path, "--no-verify")


@pytest.mark.parametrize("name", ["manifest.jsonl", "leaves.bin"])
def test_damaged_file_is_a_one_line_error(capsys, tmp_path, name):
    path = fx.save(tmp_path / "tree", {"a": torch.zeros(2)})
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    assert main(["inspect", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"fxtrain inspect: {path / name} is damaged: expected ")
    assert captured.err.count("\n") == 1


def test_difference_of_two_checkpoints_is_shown(capsys, run):
    first, second = checkpoints_in(run)
    out = shown(capsys, first, second, code=1)
    assert "state.step  " in out
    row = next(line.split() for line in out.splitlines() if line.strip().startswith("state.step "))
    assert row == ["state.step", "0", "1", "by", "1"]
    assert "state.params['weight']" in out
    assert "no difference in" in shown(capsys, first, first)


def test_leaves_of_other_structure_shape_and_dtype_differ(capsys, tmp_path):
    first = fx.save(tmp_path / "first", {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)})
    second = fx.save(tmp_path / "second", {"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.float64)})
    rows = [line.split("  ") for line in shown(capsys, first, second, code=1).splitlines() if line.startswith("  ")]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert rows == [
        ["tree['a']", "float32 [2]", "float32 [3]", "shape"],
        ["tree['b']", "float32", "float64", "dtype"],
        ["tree['c']", "float32 [2]", "missing", "structure"],
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "got nowhere (No such file or directory). Check the path."),
        ("file", "got file (Not a directory). Check the path."),
        (".", "got ., which has no checkpoint. Check the path."),
    ],
)
@pytest.mark.parametrize("is_other", [False, True])
def test_path_without_a_checkpoint_is_refused(capsys, monkeypatch, run, path, message, is_other):
    monkeypatch.chdir(run.parent)
    (run.parent / "file").touch()
    assert main(["inspect", "run", path] if is_other else ["inspect", path]) == 2
    expected = "fxtrain inspect: expected a checkpoint, a folder of checkpoints or the folder of a run, "
    assert capsys.readouterr().err == f"{expected}{message}\n"
