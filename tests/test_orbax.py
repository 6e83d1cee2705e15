"""Orbax checkpoints are exchanged with JAX in both directions without importing JAX into this process."""

import json
import subprocess
import sys

import numpy as np
import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import testing, tree

pytestmark = pytest.mark.slow

WRITES = """
import sys, jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp
tree = {
    "params": {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)}},
    "layers": [jnp.zeros(2, jnp.int32), np.arange(3, dtype=np.int64) << 40],
    "step": jnp.array(7),
}
if sys.argv[2] == "tree":
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(sys.argv[1], tree)
else:
    with ocp.CheckpointManager(sys.argv[1]) as manager:
        manager.save(5, args=ocp.args.StandardSave(tree))
"""

READS = """
import json, sys, jax, numpy as np, orbax.checkpoint as ocp
with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(sys.argv[1])
flat, _ = jax.tree_util.tree_flatten_with_path(tree)
told = {jax.tree_util.keystr(path): [str(leaf.dtype), np.asarray(leaf, np.float64).tolist()] for path, leaf in flat}
print(json.dumps(told))
"""


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def _no_jax_comes_in():
    before = "jax" in sys.modules
    yield
    assert before or "jax" not in sys.modules


@pytest.mark.parametrize("kind", ["tree", "manager"])
def test_checkpoints_written_by_jax_are_read(tmp_path, kind):
    run(WRITES, tmp_path / "jax", kind)
    path = tmp_path / "jax" if kind == "tree" else tmp_path / "jax" / "5"
    like = {
        "params": {"dense": {"kernel": torch.zeros(2, 3), "bias": torch.zeros(3, dtype=torch.bfloat16)}},
        "layers": [torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)],
        "step": torch.tensor(0, dtype=torch.int32),
    }
    got = fx.checkpoint.from_orbax(path, like=like)
    assert torch.equal(got["params"]["dense"]["kernel"], torch.arange(6.0).reshape(2, 3))
    assert got["params"]["dense"]["bias"].dtype == torch.bfloat16
    assert got["layers"][1].tolist() == [0, 1 << 40, 2 << 40]
    assert int(got["step"]) == 7
    part = fx.checkpoint.from_orbax(
        path, like={"w": torch.zeros(2, 3)}, where={"tree['w']": "tree['params']['dense']['kernel']"}
    )
    assert torch.equal(part["w"], got["params"]["dense"]["kernel"])
    with pytest.raises(fx.CheckpointError, match=r"expected float32\[9\], got float32\[2, 3\]"):
        fx.checkpoint.from_orbax(path, like={"params": {"dense": {"kernel": torch.zeros(9)}}})


def test_exported_state_is_read_by_jax(tmp_path):
    state = fx.init(problem.module(), fx.optim.adam(0.1), seed=3)
    path = fx.checkpoint.to_orbax(tmp_path / "jax", state)
    read = json.loads(run(READS, path))
    assert read["['seed']"][1] == 3
    dtype, values = read["['params']['0.weight']"]
    assert dtype == "float32"
    assert np.array_equal(np.float32(values), state.params["0.weight"].numpy())
    testing.assert_equal(fx.checkpoint.from_orbax(path, like=tree.zeros_like(state)), state, "a state, there and back")


@pytest.mark.parametrize(
    ("tree_", "said"),
    [
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, r"would store both .* as a\.b\. Rename a key"),
        ({"a": torch.ones(0)}, r"tree\['a'\] has no elements"),
        ({}, "the tree is empty"),
    ],
)
def test_trees_that_orbax_would_corrupt_are_rejected(tmp_path, tree_, said):
    with pytest.raises(fx.CheckpointError, match=f"expected Orbax to write .*{said}"):
        fx.checkpoint.to_orbax(tmp_path / "jax", tree_)


def test_directory_without_checkpoint_is_rejected(tmp_path):
    with pytest.raises(fx.CheckpointError, match="expected Orbax to read"):
        fx.checkpoint.from_orbax(tmp_path, like={"a": torch.ones(1)})
