"""The summary's tables of modules and parameters, for models of any size."""

import pytest
import torch
from summary_pages import facts, panels, printed
from torch import nn

import fxtrain as fx


def rows_of(page, title="modules"):
    """Returns the cells of a table, with the indentation of the first column."""
    lines = [line for line in panels(page).get(title, []) if line.startswith("| ")]
    cells = [[cell[1:-1] for cell in line.split("|")[1:-1]] for line in lines]
    return [[first.rstrip(), *(cell.strip() for cell in rest)] for first, *rest in cells]


class Block(nn.Module):
    def __init__(self, size=2):
        super().__init__()
        self.mix = nn.Linear(size, size)
        self.act = nn.ReLU()


class Language(nn.Module):
    """A nested model with tied and frozen parameters and a buffer."""

    def __init__(self, blocks=2):
        super().__init__()
        self.embed = nn.Embedding(5, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm.requires_grad_(False)


# Modules


def test_module_rows_keep_model_order_and_include_children():
    page = printed(fx.init(Language()), depth=3)
    assert [row[:5] for row in rows_of(page)[1:]] == [
        ["(model)", "Language", "26", "100.0%", "some"],
        ["  embed", "Embedding", "10", "38.5%", "all"],
        ["  blocks", "ModuleList", "12", "46.2%", "all"],
        ["    0", "Block", "6", "23.1%", "all"],
        ["      mix", "Linear", "6", "23.1%", "all"],
        ["    1", "Block", "6", "23.1%", "all"],
        ["      mix", "Linear", "6", "23.1%", "all"],
        ["  norm", "BatchNorm1d", "4", "15.4%", "frozen"],
    ]


@pytest.mark.parametrize(("depth", "deepest"), [(1, 0), (2, 1), (3, 2), (9, 2)])
def test_depth_limits_the_module_rows(depth, deepest):
    names = [row[0] for row in rows_of(printed(fx.init(Language()), depth))[2:]]
    assert max((len(name) - len(name.lstrip())) // 2 - 1 for name in names) == deepest


def test_tied_parameters_are_counted_once_and_named():
    page = printed(fx.init(Language()))
    assert facts(page, "model")["parameters"] == "26 in 7 tensors: 22 trainable, 4 frozen"
    assert facts(page, "model")["tied"] == "head.weight is embed.weight"
    assert [row[0] for row in rows_of(page, "tensors")[1:]].count("embed.weight") == 1


def test_shared_module_is_counted_once():
    shared = nn.Linear(2, 2)
    page = printed(fx.init(nn.ModuleDict({"a": shared, "b": shared})))
    assert [row[:3] for row in rows_of(page)[2:]] == [["  a", "Linear", "6"]]
    assert facts(page, "model")["tied"] == "b.weight is a.weight, b.bias is a.bias"


def test_parameters_frozen_by_with_trainable_are_shown_as_frozen():
    tx = fx.optim.sgd(0.1)
    state = fx.with_trainable(fx.init(Language(), tx), tx, "blocks.0.*")
    page = printed(state)
    assert facts(page, "model")["parameters"] == "26 in 7 tensors: 6 trainable, 20 frozen"
    assert [row[4] for row in rows_of(page)[1:]] == ["some", "frozen", "some", "all", "frozen", "frozen"]
    frozen = nn.Linear(1, 1).requires_grad_(False)
    assert facts(printed(fx.init(frozen)), "model")["parameters"] == "2 in 2 tensors, all frozen"


def test_parameters_are_counted_by_dtype():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    module[0].to(torch.bfloat16)
    page = printed(fx.init(module))
    assert facts(page, "model")["dtype"] == "bfloat16 16, float32 8"
    assert [row[-1] for row in rows_of(page)[1:]] == ["bfloat16, float32", "bfloat16", "float32"]


def test_model_without_parameters_has_no_tables():
    page = printed(fx.init(nn.ReLU()))
    assert facts(page, "model") == {"parameters": "0 in 0 tensors", "state": "38 B: other 38 B"}
    assert not {"modules", "tensors", "training"} & set(panels(page))


def test_parameters_without_a_module_are_shown_by_name():
    params = {"encoder": {"w": torch.zeros(3), "b": torch.zeros(1)}, "scale": torch.zeros(())}
    page = printed(fx.init(params))
    header, *rows = rows_of(page)
    assert header == ["Module", "Parameters", "Share", "Trainable", "Dtype"]
    assert [row[:2] for row in rows] == [["(model)", "5"], ["  encoder", "4"]]
    assert [row[0] for row in rows_of(page, "tensors")[1:]] == ["encoder.b", "encoder.w", "scale"]
    assert "modules" not in panels(printed(fx.init({"w": torch.zeros(2)})))


def test_state_without_a_model_omits_trainable_counts():
    page = printed(fx.init(nn.Linear(3, 2)).replace(model=None))
    assert facts(page, "model")["parameters"] == "8 in 2 tensors"
    assert "modules" not in panels(page)
    assert len(rows_of(page, "tensors")) == 3


def test_tree_of_modules_is_shown_as_one_model():
    tx = fx.optim.adam(1e-3)
    state = fx.init({"G": nn.Linear(2, 2), "D": Language()}, {"G": tx, "D": tx})
    page = printed(state, depth=1)
    assert [row[:3] for row in rows_of(page)[1:]] == [
        ["(model)", "", "32"],
        ["  D", "Language", "26"],
        ["  G", "Linear", "6"],
    ]
    assert facts(page, "model")["tied"] == "D.head.weight is D.embed.weight"


def test_summary_does_not_change_the_state():
    state = fx.init(Language(), fx.optim.adam(1e-3))
    before = state.copy()
    printed(state)
    assert fx.tree.paths(state) == fx.tree.paths(before)
    assert all(map(torch.equal, fx.tree.leaves(state), fx.tree.leaves(before)))


# Large models


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (99, ["(model)", "  embed", "  blocks", *[f"    {i}" for i in range(12)], "  norm"]),
        (15, ["(model)", "  embed", "  blocks", "    *", "  norm"]),
        (4, ["(model)", "  embed", "  blocks", "  norm"]),
        (3, ["(model)", "  embed", "  (and 2 more)"]),
        (1, ["  (and 4 more)"]),
    ],
)
def test_large_model_is_shown_in_less_detail(rows, names):
    page = printed(fx.init(Language(12)), rows=rows)
    assert [row[0] for row in rows_of(page)[1:]] == names
    if rows == 15:
        assert rows_of(page)[4][:4] == ["    *", "12 x Block", "72", "83.7%"]
    assert rows > 3 or rows_of(page)[-1][-4] == {3: "76", 1: "86"}[rows]


def test_only_identical_layers_are_merged():
    module = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 2), nn.Conv1d(1, 1, 1)])
    rows = rows_of(printed(fx.init(module), rows=4))[2:]
    assert [row[:3] for row in rows] == [["  *", "2 x Linear", "4"], ["  2", "Linear", "4"], ["  3", "Conv1d", "2"]]


def test_identical_parameter_groups_are_merged():
    params = {"layers": [{"w": torch.zeros(2), "b": torch.zeros(1)} for _ in range(6)]}
    rows = rows_of(printed(fx.init(params), rows=4))[1:]
    assert [row[:3] for row in rows] == [["(model)", "", "18"], ["  layers", "", "18"], ["    *", "6 similar", "18"]]


def test_long_tensor_table_is_truncated():
    state = fx.init(nn.ParameterDict({name: torch.zeros(2) for name in "abcdef"}))
    rows = rows_of(printed(state, rows=3), "tensors")
    assert [(row[0], row[-1]) for row in rows[1:]] == [("a", "2"), ("b", "2"), ("(and 4 more)", "8")]


def test_long_names_are_truncated_in_the_middle():
    name = "a" * 100 + "z" * 100
    page = printed(fx.init(nn.ModuleDict({name: nn.Linear(1, 1)})))
    assert f"|   {'a' * 22}...{'z' * 22} |" in page
    assert max(map(len, page.splitlines())) < 120


def test_long_panel_lines_are_wrapped():
    state = fx.init(nn.Linear(1, 1))
    for number in range(30):
        state = state.with_slot(f"callback_{number}", torch.zeros(number))
    page = printed(state)
    lines = panels(page)["training"]
    assert len(lines) > 5
    assert max(map(len, page.splitlines())) <= 98
    assert lines[1].startswith(" " * 13 + "callback_")
