"""Trees: flatten, unflatten and map give the same results in eager and in compiled code."""

import pytest
import torch

import fxtrain as fx
from fxtrain import tree


def a_tree():
    return {"b": torch.ones(2), "a": [torch.zeros(1), ()], "empty": {}, "none": None, "state": fx.init({})}


def test_compiled_traversal_equals_eager():
    def walk(values):
        leaves, structure = tree.flatten(values)
        doubled = tree.unflatten(structure, [leaf * 2 for leaf in leaves])
        return tree.map(torch.add, values, doubled), tree.leaves(doubled)

    values = a_tree()
    compiled, compiled_leaves = torch.compile(walk, fullgraph=True, backend="eager")(values)
    wanted, wanted_leaves = walk(values)
    assert tree.structure(compiled) == tree.structure(wanted)
    assert all(map(torch.equal, tree.leaves(compiled), tree.leaves(wanted)))
    assert all(map(torch.equal, compiled_leaves, wanted_leaves))


def test_compiled_map_refuses_different_keys():
    def add(first, second):
        return tree.map(torch.add, first, second)

    with pytest.raises(Exception, match="expected trees with the same keys"):
        torch.compile(add, fullgraph=True, backend="eager")({"a": torch.ones(1)}, {"b": torch.ones(1)})


def test_flatten_works_while_another_thread_compiles(monkeypatch):
    # The flag is global, and prefetching continues while the first step compiles.
    structure = tree.structure({"a": torch.ones(1)})
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    assert tree.flatten({"a": torch.ones(1)})[1] == structure
    with pytest.raises(TypeError, match=r"expected state\.params\['w'\] to be a tensor"):
        fx.init(torch.nn.Linear(1, 1)).replace(params={"w": 1.0})
